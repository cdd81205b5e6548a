"""Images to tokens: patches of any image size, mask token, [CLS] token, absolute positions.

Shapes: B batch, C channels, H W pixels, h w grid, N = 1 + h*w tokens.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from .attention import attention_dtype
from .checks import height_and_width
from .kernel_support import is_exporting, is_plain

__all__ = ['BeitPatchEmbed', 'check_mask', 'tokens_to_map']


class BeitPatchEmbed(PatchEmbed):
    """timm's patch embedding for images of any size: the right and bottom edges are padded to whole patches.

    Padding is zero, the mean colour of a normalised image. The result is a map, so that its shape tells the grid.
    """

    patch_size: tuple[int, int]
    img_size: tuple[int, int]
    grid_size: tuple[int, int]

    def __init__(self, img_size: int | tuple[int, int], patch_size: int | tuple[int, int], *args, **kwargs) -> None:
        patch_size = height_and_width('patch_size', patch_size)
        kwargs.update(flatten=False, strict_img_size=False, dynamic_img_pad=True)
        super().__init__(img_size, patch_size, *args, **kwargs)  # type: ignore[arg-type]

    def _init_img_size(self, img_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], int]:
        """Native size, its grid with the patches at the edges counted whole as ``forward`` does, and their number."""
        size, grid = _size_and_grid(img_size, self.patch_size)
        return size, grid, grid[0] * grid[1]

    def grid_at(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """The grid (h, w) that `set_input_size` with these arguments leads to.

        Raises:
            ValueError: other than one or two whole numbers above 0, or an image smaller than a patch.
        """
        patch_size = self.patch_size if patch_size is None else height_and_width('patch_size', patch_size)
        return _size_and_grid(self.img_size if img_size is None else img_size, patch_size)[1]

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Changes native size and patch; resamples the kernel. After an error nothing has changed.

        Raises:
            ValueError: see `grid_at`.
        """
        self.grid_at(img_size, patch_size)  # timm checks the image only when the patch has changed
        patch_size = None if patch_size is None else height_and_width('patch_size', patch_size)
        super().set_input_size(img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images to a map of patches.

        Args:
            x: (B, in_chans, H, W), any H and W of at least one patch.

        Returns:
            (B, h, w, C) with h = ceil(H / patch) and w likewise.

        Raises:
            ValueError: not four dimensions, a wrong channel count, or a side smaller than a patch.
        """
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f'expected images of shape (B, {self.proj.in_channels}, H, W), got {tuple(x.shape)}; '
                'convert the images, or build the model with in_chans (OpenMMLab: in_channels) set to their channels'
            )
        H, W = x.shape[2:]
        ph, pw = self.patch_size
        symbolic = isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt)
        if not symbolic and (H < ph or W < pw):
            raise ValueError(
                f'expected images of at least one {ph}x{pw} patch, got {H}x{W} pixels; enlarge or pad the image'
            )
        # a trace, too, serves other sizes of images, as far as their grid is the same
        if symbolic or torch.jit.is_tracing() or H % ph or W % pw:
            # written so that torch.export can bound the grid, which it cannot with -W % pw
            x = F.pad(x, (0, (W + pw - 1) // pw * pw - W, 0, (H + ph - 1) // ph * ph - H))
        return self.norm(self._project(x))  # B, h, w, C

    def __prepare_scriptable__(self) -> nn.Module:
        """For programs of torch.fx, which hold it as it is; see ``torchscript``."""
        from .torchscript import ScriptedPatchEmbed

        return ScriptedPatchEmbed(self)

    def _project(self, x: Tensor) -> Tensor:
        """The convolution: patches do not overlap, so one product of all with the kernel does, and is faster.

        (On an H200, 16 images of 640 pixels in bfloat16, the convolution takes 1.2 ms forward.)
        """
        if is_exporting() or torch.jit.is_tracing() or not is_plain(self.proj, nn.Conv2d):
            return self.proj(x).permute(0, 2, 3, 1)  # what other programs know best
        B, channels, H, W = x.shape
        ph, pw = self.patch_size
        pixels = x.to(attention_dtype(x)).reshape(B, channels, H // ph, ph, W // pw, pw)
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3)  # B, h, w, channels * ph * pw
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def _size_and_grid(
    img_size: int | tuple[int, int], patch_size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = height_and_width('img_size', img_size)
    ph, pw = patch_size
    if height < ph or width < pw:
        raise ValueError(f'img_size must be at least one {ph}x{pw} patch, got {img_size}')
    return (height, width), ((height + ph - 1) // ph, (width + pw - 1) // pw)


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Drop the [CLS] token and lay the patch tokens out as a map.

    Args:
        tokens: (B, 1 + h·w, C), [CLS] first, patches row by row.
        grid: (h, w) in patches.

    Returns:
        (B, C, h, w), a view of `tokens` in channels-last order.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    h, w = grid
    if tokens.shape[1] != 1 + h * w:
        raise ValueError(
            f'got {tokens.shape[1]} tokens, but a grid of {h}x{w} patches has {1 + h * w} with [CLS]; '
            'pass the grid of the image that these tokens come from'
        )
    return tokens[:, 1:].unflatten(1, (h, w)).permute(0, 3, 1, 2)  # B, C, h, w


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """Checks a mask of patches and returns it as (B, h*w) bool.

    Args:
        mask: bool, (B, h*w) or (B, h, w), True where a patch is hidden.

    Raises:
        ValueError: another shape or dtype.
    """
    h, w = grid
    if not isinstance(mask, Tensor):
        raise ValueError(f'bool_masked_pos must be a torch tensor, got {type(mask).__name__}; use torch.as_tensor')
    if mask.dtype != torch.bool:
        raise ValueError(f'bool_masked_pos must have dtype torch.bool, got {mask.dtype}; convert it with mask.bool()')
    if tuple(mask.shape) not in ((batch, h * w), (batch, h, w)):
        raise ValueError(
            f'bool_masked_pos must have shape ({batch}, {h * w}) or ({batch}, {h}, {w}) for this batch of '
            f'{h}x{w}-patch images, got {tuple(mask.shape)}'
        )
    return mask.reshape(batch, h * w)
