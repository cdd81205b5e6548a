"""Norm layers for the neck and the head from an OpenMMLab `norm_cfg`."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.norm import infer_abbr
from mmengine.registry import MODELS
from torch import nn

from ...segmentation.sync_batch_norm import SyncBatchNorm

SYNC_BN: Mapping[str, Any] = {'type': 'SyncBN', 'requires_grad': True}


@MODELS.register_module()
class BEiTSyncBN(SyncBatchNorm):
    """`SyncBatchNorm` of this package by its name in configurations."""


def own_sync_bn(norm_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a norm, with our layer in place of torch's synchronised one."""
    return {**norm_cfg, 'type': 'BEiTSyncBN'} if norm_cfg['type'] == 'SyncBN' else dict(norm_cfg)


class NormFactory:
    """Makes norm layers from a config; called as the `norm_layer` of the plain torch parts.

    `SyncBN` becomes `BEiTSyncBN`; any other registered type is built by mmcv.

    Args:
        norm_cfg: `type`, a registered name or a class; `requires_grad=False` to freeze; the rest (`eps`, `momentum`,
            `num_groups`, …) goes to the layer.

    Raises:
        ValueError: no mapping with a `type`, or a type that is not registered.
    """

    def __init__(self, norm_cfg: Mapping[str, Any]) -> None:
        if not isinstance(norm_cfg, Mapping) or 'type' not in norm_cfg:
            raise ValueError(f"got norm_cfg={norm_cfg!r}, expected a dict with a type, such as dict(type='SyncBN')")
        self.cfg = own_sync_bn(norm_cfg)
        kind = self.cfg['type']
        if not inspect.isclass(kind):
            with MODELS.switch_scope_and_registry(None) as registry:
                kind = registry.get(kind)
        if kind is None:
            raise ValueError(
                f'got norm type {self.cfg["type"]!r}, which is not registered; '
                "use 'SyncBN', 'BN' or 'GN', or import the module that registers it in custom_imports"
            )
        # mmcv's name for the layer among its siblings: bn, gn, ln, ...
        self.name: str = infer_abbr(kind)

    def __call__(self, num_features: int, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Make a layer for `num_features` channels; layers without a `device` or `dtype` argument get none by default.

        Args:
            num_features: channels of the input.
            device: where the parameters are made.
            dtype: type of the parameters.
        """
        placement = {key: value for key, value in (('device', device), ('dtype', dtype)) if value is not None}
        return build_norm_layer({**self.cfg, **placement}, num_features)[1]
