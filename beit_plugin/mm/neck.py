"""The feature pyramid as an OpenMMLab neck."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS

from ..models.pyramid import FeaturePyramid
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
