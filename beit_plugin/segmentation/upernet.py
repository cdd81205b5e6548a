"""UPerNet decode head and FCN auxiliary head, in plain torch.

UPerNet: arXiv:1807.10221; FCN: arXiv:1411.4038. Layers, parameter names, initialisation and numbers are those of
`UPerHead` and `FCNHead` in mmsegmentation 1.2.2, so that their weights load with strict=True.
Legend: B batch, C channels, h w pixels of a map.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .mixed_conv import add_enlarged, average_pool, conv_of_levels

_inplace_relu = partial(nn.ReLU, inplace=True)


class ConvNormAct(nn.Module):
    """Convolution that keeps the size, norm, activation; named as mmcv's `ConvModule`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel, odd.
        dilation: spacing of the kernel's taps.
        norm_layer: called as `norm_layer(out_channels, device=..., dtype=...)`; None for a bias instead of a norm.
        norm_name: name of the norm among the children.
        act_layer: called without arguments; None for no activation.
        device: where the parameters are made.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        norm_name: str = 'bn',
        act_layer: Callable[[], nn.Module] | None = _inplace_relu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            bias=norm_layer is None,
            **dd,
        )
        self.norm_name = None if norm_layer is None else norm_name
        if norm_layer is not None:
            self.add_module(norm_name, norm_layer(out_channels, **dd))
        self.activate = nn.Identity() if act_layer is None else act_layer()
        self.init_weights()

    @property
    def norm(self) -> nn.Module | None:
        """The norm, whatever its name."""
        return None if self.norm_name is None else getattr(self, self.norm_name)

    def init_weights(self) -> None:
        """Draw the kernel from He's normal by fan-out (mmcv `ConvModule`); mmengine calls this again by its name."""
        slope = getattr(self.activate, 'negative_slope', 0)
        nn.init.kaiming_normal_(self.conv.weight, a=slope, mode='fan_out', nonlinearity='leaky_relu')
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor | Sequence[Tensor], align_corners: bool = False) -> Tensor:
        """Map (B, in_channels, h, w) to (B, out_channels, h, w).

        Args:
            x: the map; or several (B, C_i, h_i, w_i), which are enlarged to the first and concatenated.
            align_corners: of the enlarging.
        """
        x = self.conv(x) if isinstance(x, Tensor) else conv_of_levels(self.conv, x, align_corners)
        return self.activate(x if self.norm is None else self.norm(x))


class UPerNetLayers(nn.Module):
    """The layers of UPerNet below its classifier, for heads of any host.

    A subclass sets `align_corners` and calls `_build_layers` in its constructor, then `fuse` in its forward.
    """

    align_corners: bool

    def _build_layers(
        self,
        in_channels: Sequence[int],
        channels: int,
        pool_scales: Sequence[int],
        conv_block: Callable[..., ConvNormAct],
    ) -> None:
        self.level_channels = tuple(in_channels)
        top = self.level_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_block(top, channels)) for scale in pool_scales
        )
        self.bottleneck = conv_block(top + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        # one level at a time, lateral before fpn: the order in which mmsegmentation draws random numbers
        for level in self.level_channels[:-1]:
            self.lateral_convs.append(conv_block(level, channels))
            self.fpn_convs.append(conv_block(channels, channels, 3))
        self.fpn_bottleneck = conv_block(len(self.level_channels) * channels, channels, 3)

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Pool the coarsest map, add it down the levels, and mix all levels at the finest resolution.

        Args:
            maps: one (B, C_i, h_i, w_i) per level, finest first.

        Returns:
            (B, channels, h_0, w_0).

        Raises:
            ValueError: the number of maps or their channels differ from those that the head was built for.
        """
        got = tuple(x.shape[1] for x in maps)
        if got != self.level_channels:
            raise ValueError(
                f'got maps with channels {got}, but this head was built for {self.level_channels}; '
                'give it one map per level, finest first, or build it with these in_channels'
            )
        top = maps[-1]
        pooled = [block(average_pool(pool, top)) for pool, block in self.psp_modules]
        x = self.bottleneck([top, *pooled], self.align_corners)  # B, channels, h_n, w_n
        levels = [x]
        for lateral, fpn, finer in zip(
            reversed(self.lateral_convs), reversed(self.fpn_convs), reversed(maps[:-1]), strict=True
        ):
            finer = lateral(finer)
            x = add_enlarged(finer, x, self.align_corners)  # B, channels, h_i, w_i
            levels.insert(0, fpn(x))
        return self.fpn_bottleneck(levels, self.align_corners)


def _classifier(channels: int, num_classes: int, device: Any, dtype: torch.dtype | None) -> nn.Conv2d:
    if num_classes < 1:
        raise ValueError(
            f'num_classes must be at least 1, got {num_classes}; a backbone with features_only has no head'
        )
    conv = nn.Conv2d(channels, num_classes, kernel_size=1, device=device, dtype=dtype)
    nn.init.normal_(conv.weight, std=0.01)  # mmsegmentation's BaseDecodeHead
    nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
    return conv


class _Classified(nn.Module):
    """What both standalone heads have: dropout of whole channels and a 1x1 convolution to the classes."""

    def _build_classifier(
        self, channels: int, num_classes: int, dropout: float, device: Any, dtype: torch.dtype | None
    ) -> None:
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _classifier(channels, num_classes, device, dtype)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last convolution by a fresh one with `num_classes` outputs."""
        old = self.conv_seg
        self.conv_seg = _classifier(old.in_channels, num_classes, old.weight.device, old.weight.dtype)


class UPerNetHead(UPerNetLayers, _Classified):
    """UPerNet decode head.

    Args:
        in_channels: channels of each level, finest first; at least one level.
        channels: channels inside the head.
        num_classes: channels of the output.
        pool_scales: sides of the grids that the coarsest map is pooled to.
        dropout: probability with which a channel is dropped before the classifier.
        align_corners: of every bilinear resize in the head.
        norm_layer: as for `ConvNormAct`.
        act_layer: as for `ConvNormAct`.
        device: where the parameters are made.
        dtype: type of the parameters.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] | None = _inplace_relu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        block = partial(ConvNormAct, norm_layer=norm_layer, act_layer=act_layer, device=device, dtype=dtype)
        self._build_layers(in_channels, channels, pool_scales, block)
        self._build_classifier(channels, num_classes, dropout, device, dtype)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Levels (B, C_i, h_i, w_i), finest first, to logits (B, num_classes, h_0, w_0); errors as `fuse`."""
        return self.conv_seg(self.dropout(self.fuse(maps)))


class FCNHead(_Classified):
    """Fully convolutional head on one map, used as an auxiliary loss.

    Args:
        in_channels: channels of the map.
        channels: channels inside the head.
        num_classes: channels of the output.
        num_convs: convolutions before the classifier, 0 or more; 1 for BEiT.
        kernel_size: side of their kernels, odd.
        dilation: spacing of their taps.
        concat_input: mix the map itself in once more before the classifier.
        dropout: probability with which a channel is dropped before the classifier.
        norm_layer: as for `ConvNormAct`.
        act_layer: as for `ConvNormAct`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Raises:
        ValueError: no convolution, and `channels` differs from `in_channels`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        num_convs: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        act_layer: Callable[[], nn.Module] | None = _inplace_relu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_convs == 0 and channels != in_channels:
            raise ValueError(
                f'got num_convs=0 with in_channels={in_channels} and channels={channels}, which must then be equal; '
                f'set channels={in_channels} or num_convs=1'
            )
        block = partial(ConvNormAct, norm_layer=norm_layer, act_layer=act_layer, device=device, dtype=dtype)
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(*(block(width, channels, kernel_size, dilation=dilation) for width in widths[:-1]))
        # not dilated, as in mmsegmentation
        self.conv_cat = block(in_channels + channels, channels, kernel_size) if concat_input else None
        self._build_classifier(channels, num_classes, dropout, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to logits (B, num_classes, h, w)."""
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat([x, y], dim=1))
        return self.conv_seg(self.dropout(y))
