"""UPerNet and FCN as mmsegmentation decode heads, whose loss never enlarges all logits at once."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from mmcv.cnn import build_activation_layer
from mmengine.registry import MODELS
from mmseg.models.decode_heads import FCNHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.utils import SampleList
from torch import Tensor, nn

from ...models.deferred_check import LabelCheck
from ...segmentation.upernet import ConvNormAct, UPerNetLayers
from ...segmentation.upsampled_cross_entropy import upsampled_cross_entropy
from .norm import NormFactory, own_sync_bn

EPS = torch.finfo(torch.float32).eps  # that mmsegmentation adds to what it divides by


class _LeanLoss(BaseDecodeHead):
    """Softmax cross-entropy and accuracy of a `BaseDecodeHead`, computed band by band from the small logits.

    Other losses, samplers and unreduced losses see the enlarged logits, as in mmsegmentation. Labels that are no class
    are reported with their image and values.

    Raises:
        ValueError: one output channel with a softmax, whose cross-entropy is always 0.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.out_channels == 1 and any(map(_is_reduced_softmax, self._losses())):
            raise ValueError(
                f'got num_classes={self.num_classes} and out_channels=1 with a softmax cross-entropy, which is always '
                '0: use num_classes=2 and let the background be class 0 (no reduce_zero_label), or '
                "loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True) and a threshold"
            )
        self._label_guard = LabelCheck('check num_classes, and whether the dataset needs reduce_zero_label=True')

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """The losses of `BaseDecodeHead.loss_by_feat`, by name, and `acc_seg` in percent.

        Args:
            seg_logits: (B, classes, h, w) from `forward`.
            batch_data_samples: with labels (1, H, W), all of one size.
        """
        losses = [loss for loss in self._losses() if _is_reduced_softmax(loss)]
        if len(losses) < len(self._losses()) or self.sampler is not None or seg_logits.shape[1] < 2:
            return self._of_nothing(seg_logits, batch_data_samples) or super().loss_by_feat(
                seg_logits, batch_data_samples
            )
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)  # B, H, W
        counts = labels.numel() if self.ignore_index is None else (labels != self.ignore_index).sum()
        dtype = torch.promote_types(seg_logits.dtype, torch.float32)
        found: dict[str, Tensor] = {}
        right = labels.new_zeros(())
        sums: dict[Any, Tensor] = {}  # by the class weights, for several losses may differ in the rest only
        for loss in losses:
            weight = None if loss.class_weight is None else seg_logits.new_tensor(loss.class_weight, dtype=dtype)
            key = None if loss.class_weight is None else tuple(loss.class_weight)
            if key not in sums:
                sums[key], right = upsampled_cross_entropy(
                    seg_logits, labels, weight, self.ignore_index, self.align_corners
                )
            value = loss.loss_weight * sums[key] / self._divisor(loss, weight, labels, counts)
            name = str(loss.loss_name)
            found[name] = found[name] + value if name in found else value
        found['acc_seg'] = (right[None] + EPS) * (100.0 / (counts + EPS))
        return found

    def _of_nothing(self, seg_logits: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor] | None:
        """Zeros, if a single output has no label to learn from, of which mmsegmentation asks for the largest."""
        if seg_logits.shape[1] > 1 or self.ignore_index is None:
            return None
        if (self._stack_batch_gt(batch_data_samples) != self.ignore_index).any():
            return None
        zero = seg_logits.sum() * 0.0
        losses = {str(loss.loss_name): zero for loss in self._losses()}
        return {**losses, 'acc_seg': seg_logits.new_full((1,), 100.0)}

    def _stack_batch_gt(self, batch_data_samples: SampleList) -> Tensor:
        """Labels of the batch (B, 1, H, W), checked; `loss_by_feat` asks for them first."""
        labels = super()._stack_batch_gt(batch_data_samples)
        if torch.compiler.is_compiling():
            return labels  # not looked at; what is named here would be compiled anew for each image
        # a single output with a sigmoid tells two classes apart
        binary = self.out_channels == 1 and any(getattr(loss, 'use_sigmoid', False) for loss in self._losses())
        labels = self._label_guard(
            labels,
            2 if binary else self.num_classes,
            self.ignore_index,
            [sample.get('img_path', f'{i} of the batch') for i, sample in enumerate(batch_data_samples)],
        )
        if labels.is_cuda:
            # another head reads the samples next: let it see the labels without those that are no class
            for sample, checked in zip(batch_data_samples, labels, strict=True):
                sample.gt_sem_seg.data = checked
        return labels

    def _losses(self) -> list[nn.Module]:
        return list(self.loss_decode) if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]

    def _divisor(
        self, loss: CrossEntropyLoss, weight: Tensor | None, labels: Tensor, counts: Tensor | int
    ) -> Tensor | float:
        """What mmsegmentation divides the sum by, but for labels to ignore, of which it has no class weight."""
        if loss.reduction == 'sum':
            return 1.0
        if weight is None:
            return (counts if loss.avg_non_ignore else labels.numel()) + EPS
        ignored = labels == self.ignore_index if self.ignore_index is not None else labels < 0
        return weight[labels.masked_fill(ignored, 0)].masked_fill(ignored, 0.0).sum() + EPS


def _is_reduced_softmax(loss: nn.Module) -> TypeGuard[CrossEntropyLoss]:
    if type(loss) is not CrossEntropyLoss:
        return False
    return not loss.use_sigmoid and not loss.use_mask and loss.reduction in ('mean', 'sum')


@MODELS.register_module()
class BEiTFCNHead(_LeanLoss, FCNHead):
    """mmsegmentation's `FCNHead`, its arguments and weights; the loss takes the memory of the small logits.

    Labels outside the classes are reported with their image and values; `norm_cfg` SyncBN also trains on the CPU.
    """

    def __init__(self, *args: Any, norm_cfg: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, norm_cfg=None if norm_cfg is None else own_sync_bn(norm_cfg), **kwargs)


@MODELS.register_module()
class BEiTUPerHead(UPerNetLayers, _LeanLoss):
    """UPerNet decode head with the arguments, parameter names and numbers of mmsegmentation's `UPerHead`.

    Differences: labels outside the classes are reported with their image and values, `norm_cfg` SyncBN also trains on
    the CPU, small levels are mixed before they are enlarged (see `conv_of_levels`), and the loss takes the memory of
    the small logits.

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

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Maps of the neck to logits (B, out_channels, h, w) at the resolution of the first selected one."""
        return self.cls_seg(self.fuse(list(self._transform_inputs(inputs))))
