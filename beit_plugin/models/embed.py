"""Images to tokens: patches of any image size, mask token, [CLS] token, absolute positions.

Shapes: B batch, C channels, H W pixels, h w grid, N = 1 + h*w tokens.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor

__all__ = ['BeitPatchEmbed', 'check_mask', 'resize_positions']


class BeitPatchEmbed(PatchEmbed):
    """timm's patch embedding for images of any size: the right and bottom edges are padded to whole patches.

    Padding is zero, the mean colour of a normalised image. The result is a map, so that its shape tells the grid.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, flatten=False, strict_img_size=False, dynamic_img_pad=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Arguments: x (B, in_chans, H, W), any H, W of at least one patch. Returns (B, h, w, C), h = ceil(H / patch).

        Raises:
            ValueError: not four dimensions, a wrong channel count, or a side smaller than a patch.
        """
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f'expected images of shape (B, {self.proj.in_channels}, H, W), got {tuple(x.shape)}; '
                'convert the images, or build the model with in_chans set to their channel count'
            )
        H, W = x.shape[2:]
        ph, pw = self.patch_size
        symbolic = isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt)
        if not symbolic and (H < ph or W < pw):
            raise ValueError(
                f'expected images of at least one {ph}x{pw} patch, got {H}x{W} pixels; enlarge or pad the image'
            )
        if symbolic or H % ph or W % pw:
            x = F.pad(x, (0, -W % pw, 0, -H % ph))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # B, h, w, C


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """Checks a mask of patches and returns it as (B, h*w) bool.

    Args:
        mask: bool, (B, h*w) or (B, h, w), True where a patch is hidden.

    Raises:
        ValueError: another shape or dtype.
    """
    h, w = grid
    if mask.dtype != torch.bool:
        raise ValueError(f'bool_masked_pos must have dtype torch.bool, got {mask.dtype}; convert it with mask.bool()')
    if tuple(mask.shape) not in ((batch, h * w), (batch, h, w)):
        raise ValueError(
            f'bool_masked_pos must have shape ({batch}, {h * w}) or ({batch}, {h}, {w}) for this batch of '
            f'{h}x{w}-patch images, got {tuple(mask.shape)}'
        )
    return mask.reshape(batch, h * w)


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute positions (1, 1 + h*w, C) of one grid for another: bicubic, antialiased when it shrinks, [CLS] kept.

    The same as ``timm.layers.resample_abs_pos_embed`` (timm 1.0.31), but made for sizes that ``torch.export`` leaves
    open; at the stored grid the positions come back untouched.
    """
    if not isinstance(new[0], torch.SymInt) and not isinstance(new[1], torch.SymInt) and tuple(old) == tuple(new):
        return pos_embed
    patches = pos_embed[:, 1:].reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2).float()  # 1, C, h, w
    patches = F.interpolate(patches, size=new, mode='bicubic', antialias=True)
    patches = patches.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(pos_embed.dtype)
    return torch.cat((pos_embed[:, :1], patches), dim=1)
