"""Simple feature pyramid: every level from the last map of a plain vision transformer, without top-down paths.

Paper: ViTDet, Li, Mao, Girshick, He, https://arxiv.org/abs/2203.16527, section 3 and appendix A.2; reference:
https://github.com/facebookresearch/detectron2, ``SimpleFeaturePyramid`` in ``modeling/backbone/vit.py`` (Apache-2.0).
Written anew. Grids of an odd size are pooled without losing their last row or column.

Shapes: B batch, C channels, h w grid.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['SimplePyramid']


class SimplePyramid(nn.Module):
    """One map of stride 16 to maps of strides 4, 8, 16, 32 and 64, all of the same width.

    Each level is rescaled (by transposed convolutions that halve the channels, or by pooling), then mapped by a 1x1 and
    a 3x3 convolution with a norm each and no bias.

    Args:
        in_channels: C of the map.
        out_channels: of every level.
        rescales: factor of each level, largest first, out of 4, 2, 1 and 0.5; (4, 2, 1, 0.5) are strides 4 to 32.
        num_outs: levels to return; those beyond the rescales pick every second pixel of the level before.
        norm_layer: called as ``norm_layer(channels, device=..., dtype=...)``; LayerNorm over the channels, as ViTDet.
        device, dtype: of the parameters.

    Raises:
        ValueError: a rescale is unknown, repeated or out of order, or there are more of them than ``num_outs``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rescales: Sequence[float] = (4, 2, 1, 0.5),
        num_outs: int = 5,
        norm_layer: Callable[..., nn.Module] = LayerNorm2d,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rescales = tuple(rescales)
        if not rescales or not set(rescales) <= {4, 2, 1, 0.5} or list(rescales) != sorted(set(rescales), reverse=True):
            raise ValueError(
                f'got rescales={rescales}, expected different values out of 4, 2, 1 and 0.5, largest first; '
                'use (4, 2, 1, 0.5) for strides 4 to 32 from patches of 16 pixels'
            )
        if num_outs < len(rescales):
            raise ValueError(
                f'got num_outs={num_outs} for {len(rescales)} rescales; leave out rescales, or raise num_outs'
            )
        self.rescales, self.num_outs, self.out_channels = rescales, num_outs, out_channels
        dd = {'device': device, 'dtype': dtype}
        self.levels = nn.ModuleList()
        for rescale in rescales:
            layers, channels = [], in_channels
            for step in range(int(rescale) // 2):  # two doublings, one, none
                layers += [norm_layer(channels, **dd), nn.GELU()] if step else []
                layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2, **dd))
                channels //= 2
            self.levels.append(
                nn.Sequential(
                    *layers,
                    nn.Conv2d(channels, out_channels, 1, bias=False, **dd),
                    norm_layer(out_channels, **dd),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **dd),
                    norm_layer(out_channels, **dd),
                )
            )

    def forward(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The last map (B, in_channels, h, w), alone or at the end of a sequence, to ``num_outs`` maps.

        Each has ``out_channels``; pooled levels and those beyond have half the rows and columns of the level before,
        rounded up.
        """
        x = x if isinstance(x, Tensor) else x[-1]
        maps = []
        for rescale, level in zip(self.rescales, self.levels, strict=True):
            # half a window at the edge counts as well: no row of an odd grid is lost
            maps.append(level(F.max_pool2d(x, 2, ceil_mode=True) if rescale == 0.5 else x))
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return tuple(maps)
