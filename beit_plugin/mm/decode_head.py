"""UPerNet as an mmsegmentation decode head."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from mmcv.cnn import build_activation_layer
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.utils import SampleList
from torch import Tensor, nn

from ..models.segmentation_loss import LabelGuard
from ..models.upernet import ConvNormAct, UPerNetLayers
from .norm import NormFactory


@MODELS.register_module()
class BEiTUPerHead(UPerNetLayers, BaseDecodeHead):
    """UPerNet decode head with the arguments, parameter names and numbers of mmsegmentation's `UPerHead`.

    Differences: labels outside the classes are reported with their image and values, and `norm_cfg` SyncBN also trains
    on the CPU.

    Args:
        pool_scales: sides of the grids that the coarsest map is pooled to.
        kwargs: arguments of mmsegmentation's `BaseDecodeHead`, which refuses unknown ones; `in_channels` and
            `in_index` name one entry per level, finest first.

    Raises:
        ValueError: a `conv_cfg` other than Conv2d; see also `NormFactory`.
    """

    def __init__(self, pool_scales: Sequence[int] = (1, 2, 3, 6), **kwargs: Any) -> None:
        super().__init__(input_transform='multiple_select', **kwargs)
        if self.conv_cfg is not None and self.conv_cfg != {'type': 'Conv2d'}:
            raise ValueError(f"got conv_cfg={self.conv_cfg!r}, expected None or dict(type='Conv2d'); leave it out")
        norm = None if self.norm_cfg is None else NormFactory(self.norm_cfg)
        block = partial(
            ConvNormAct,
            norm_layer=norm,
            norm_name='' if norm is None else norm.name,
            act_layer=None if self.act_cfg is None else partial(build_activation_layer, self.act_cfg),
        )
        self._build_layers(cast(Sequence[int], self.in_channels), self.channels, pool_scales, block)
        self._label_guard = LabelGuard('check num_classes, and whether the dataset needs reduce_zero_label=True')

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of the neck to logits (B, out_channels, h, w) at the resolution of the first selected one."""
        return self.cls_seg(self.fuse(list(self._transform_inputs(inputs))))

    def _stack_batch_gt(self, batch_data_samples: SampleList) -> Tensor:
        """Labels of the batch (B, 1, H, W), checked; `loss_by_feat` asks for them first."""
        losses = self.loss_decode if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]
        # a single output with a sigmoid tells two classes apart
        binary = self.out_channels == 1 and any(getattr(loss, 'use_sigmoid', False) for loss in losses)
        labels = self._label_guard(
            super()._stack_batch_gt(batch_data_samples),
            2 if binary else self.num_classes,
            self.ignore_index,
            [sample.get('img_path', f'{i} of the batch') for i, sample in enumerate(batch_data_samples)],
        )
        if labels.is_cuda:
            # an auxiliary head reads the samples next: let it see the labels without those that are no class
            for sample, checked in zip(batch_data_samples, labels, strict=True):
                sample.gt_sem_seg.data = checked
        return labels
