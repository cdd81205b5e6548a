"""Norm layers for the neck and the head from an OpenMMLab `norm_cfg`."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.norm import infer_abbr
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SYNC_BN: Mapping[str, Any] = {'type': 'SyncBN', 'requires_grad': True}


@MODELS.register_module()
class BEiTSyncBN(_BatchNorm):
    """Batch norm with statistics over all processes, that CPU tensors pass too.

    torch's own refuses CPU tensors in training as soon as a process group exists, and DDP refuses CPU models that hold
    one; so this is none of its subclasses but borrows what it does on other devices. On the CPU each process normalises
    with its own statistics, as plain batch norm under DDP does.
    """

    process_group = None  # all processes
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == 'cpu':
            return super().forward(input)
        return nn.SyncBatchNorm.forward(self, input)  # type: ignore[arg-type]


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
        self.cfg = dict(norm_cfg)
        if self.cfg['type'] == 'SyncBN':
            self.cfg['type'] = 'BEiTSyncBN'
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
