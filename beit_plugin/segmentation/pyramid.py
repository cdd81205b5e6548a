"""Four-level feature pyramid for a plain vision transformer.

A BEiT encoder gives every map at the stride of its patches (16 pixels); dense heads want strides 4, 8, 16 and 32.
The layers are those of BEiT (arXiv:2106.08254, appendix on ADE20K) with the parameter names of `Feature2Pyramid` in
mmsegmentation 1.2.2, so that its weights load as they are. Added here: cropping for images that are no multiple of
the patch. Legend: B batch, C channels, H W pixels, h w grid.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.kernel_support import is_open

# rescale -> (child name, numerator, denominator); the names are mmsegmentation's
_LEVELS = {
    4: ('upsample_4x', 4, 1),
    2: ('upsample_2x', 2, 1),
    1: ('identity', 1, 1),
    0.5: ('downsample_2x', 1, 2),
    0.25: ('downsample_4x', 1, 4),
}


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """Keep the top left `height` x `width` of a map."""
    if is_open(height, width):
        # a slice would guard on whether anything was cut, and pin an exported graph to one case
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[..., :height, :width]


def _max_pool(x: Tensor, size: int) -> Tensor:
    """Pool windows of `size` x `size` pixels; what is smaller than one is pooled as it is."""
    if not is_open(*x.shape[2:]):
        # images of a single row or column of patches: pool what there is instead of failing
        return F.max_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])))
    for dim in (2, 3):  # max_pool2d would pin the exported graph to the remainder of the example
        length = x.shape[dim]
        start = size * torch.arange(torch.sym_max(length // size, 1), device=x.device)
        x = reduce(torch.maximum, (x.index_select(dim, (start + i).clamp(max=length - 1)) for i in range(size)))
    return x


class FeaturePyramid(nn.Module):
    """Rescale maps of one stride to one stride per level.

    Args:
        embed_dim: channels C of every map.
        rescales: factor of each level, largest first, each one of 4, 2, 1, 0.5 and 0.25; (4, 2, 1, 0.5) turns maps
            of stride 16 into strides 4, 8, 16 and 32.
        norm_layer: called as `norm_layer(embed_dim, device=..., dtype=...)` for the norm inside the 4x level.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: a rescale is unknown, repeated or out of order.
    """

    def __init__(
        self,
        embed_dim: int,
        rescales: Sequence[float] = (4, 2, 1, 0.5),
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rescales = tuple(rescales)
        if not set(rescales) <= set(_LEVELS) or list(rescales) != sorted(set(rescales), reverse=True):
            raise ValueError(
                f'got rescales={rescales}, expected different values out of {tuple(_LEVELS)}, largest first; '
                'use (4, 2, 1, 0.5) for patches of 16 pixels or (2, 1, 0.5, 0.25) for patches of 8'
            )
        self.rescales = rescales
        dd = {'device': device, 'dtype': dtype}
        double = partial(nn.ConvTranspose2d, embed_dim, embed_dim, kernel_size=2, stride=2, **dd)
        for rescale in rescales:
            if rescale == 4:
                self.upsample_4x = nn.Sequential(double(), norm_layer(embed_dim, **dd), nn.GELU(), double())
            elif rescale == 2:
                self.upsample_2x = nn.Sequential(double())
            elif rescale == 1:
                self.identity = nn.Identity()
            else:
                name, _, factor = _LEVELS[rescale]
                self.add_module(name, nn.MaxPool2d(kernel_size=factor, stride=factor))

    def keep_levels(self, levels: Sequence[int]) -> None:
        """Removes all levels but those at these positions, which are in order."""
        for i, rescale in enumerate(self.rescales):
            if i not in levels:
                delattr(self, _LEVELS[rescale][0])
        self.rescales = tuple(self.rescales[i] for i in levels)

    def forward(
        self,
        maps: Sequence[Tensor],
        image_size: tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] = 16,
    ) -> tuple[Tensor, ...]:
        """Rescale each map by the factor of its level.

        Args:
            maps: one (B, C, h, w) per rescale; all have the stride of the patches.
            image_size: (H, W) of the images in pixels before they were padded to whole patches. When given, each
                enlarged map is cropped to ceil(size / its stride); pooled maps keep the floor of the pooling.
            patch_size: stride of `maps` in pixels, one number or (height, width); read only with `image_size`.

        Returns:
            one (B, C, h·rescale, w·rescale) per rescale.

        Raises:
            ValueError: the number of maps is not the number of rescales.
        """
        if len(maps) != len(self.rescales):
            raise ValueError(
                f'got {len(maps)} maps for the {len(self.rescales)} rescales {self.rescales}; '
                'select exactly as many out_indices as the pyramid has levels'
            )
        patch_h, patch_w = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        levels = []
        for rescale, x in zip(self.rescales, maps, strict=True):
            name, factor, divisor = _LEVELS[rescale]
            if divisor > 1 and (is_open(*x.shape[2:]) or min(x.shape[2:]) < divisor):
                x = _max_pool(x, divisor)
            else:
                x = getattr(self, name)(x)
            # at and below the grid's own stride ceil(size / stride) is never less than what pooling leaves
            if image_size is not None and factor > 1:
                # rounded up without a negative number, whose division ONNX rounds the other way
                height = (image_size[0] * factor + patch_h - 1) // patch_h
                width = (image_size[1] * factor + patch_w - 1) // patch_w
                x = _crop(x, height, width)
            levels.append(x)
        return tuple(levels)
