"""The feature pyramids as OpenMMLab necks."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d

from ...segmentation.pyramid import FeaturePyramid
from ...segmentation.simple_pyramid import SimplePyramid
from .norm import SYNC_BN, NormFactory


@MODELS.register_module()
class BEiTPyramid(FeaturePyramid):
    """`FeaturePyramid` with the arguments of mmsegmentation's `Feature2Pyramid`, whose weights it loads.

    Args:
        embed_dim: channels of every map.
        rescales: factor of each level, largest first; (4, 2, 1, 0.5) or (2, 1, 0.5, 0.25).
        norm_cfg: config of the norm inside the 4x level.

    Raises:
        ValueError: see `FeaturePyramid` and `NormFactory`.
    """

    def __init__(
        self,
        embed_dim: int,
        rescales: Sequence[float] = (4, 2, 1, 0.5),
        norm_cfg: Mapping[str, Any] = SYNC_BN,
    ) -> None:
        super().__init__(embed_dim, rescales, NormFactory(norm_cfg))


@MODELS.register_module()
class BEiTLN2d(LayerNorm2d):
    """LayerNorm over the channels of a map (B, C, h, w): `norm_cfg` of a neck or head, as ViTDet has it.

    Args:
        num_channels: C.
        eps: ViTDet's is 1e-6; mmcv fills in 1e-5.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)


@MODELS.register_module()
class BEiTSimplePyramid(SimplePyramid):
    """`SimplePyramid` of ViTDet, in the place of `FPN`: the same first arguments and outputs.

    Args:
        in_channels: channels of the last map, one number or, as `FPN` takes them, one for each map.
        out_channels, num_outs, rescales: as `SimplePyramid`.
        norm_cfg: config of the norms; by default LayerNorm over the channels.

    Raises:
        ValueError: see `SimplePyramid` and `NormFactory`.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        rescales: Sequence[float] = (4, 2, 1, 0.5),
        norm_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        norm_layer = LayerNorm2d if norm_cfg is None else NormFactory(norm_cfg)
        last = in_channels if isinstance(in_channels, int) else in_channels[-1]
        super().__init__(last, out_channels, rescales, num_outs, norm_layer)
