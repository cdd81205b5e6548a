"""mmcv's operators as detectors call them, on our stand-in and by torchvision; measured by tools/benchmark.py.

torchvision gets float32, to which autocast casts for it; ours gets the dtype asked for. Legend: B batch, C channels,
H W pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark_cases import Case, Makers, Setting
from benchmark_models import import_mm
from torch import Tensor

CHANNELS, REGIONS, CLASSES = 256, 512, 80  # of mmdetection's Faster R-CNN: FPN, RoIs of an image, COCO
PROPOSALS = 5000  # of its RPN: 1000 of each of five levels
HEADS, POINTS, STRIDES = 8, 4, (8, 16, 32, 64)  # of Deformable DETR, arXiv:2010.04159


def ops_cases(s: Setting) -> Makers:
    """Pairs of rows, torchvision's and ours; for deformable attention, which torchvision lacks, mmcv's in Python."""
    import_mm()
    import mmcv.ops as mmcv
    import torchvision.ops as vision
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    def case(function: Callable[..., Tensor], inputs: list[Tensor], wanted: int) -> Case:
        """The first ``wanted`` inputs get gradients."""
        for tensor in inputs[:wanted]:
            tensor.requires_grad_()

        def train(call: Callable[..., Tensor]) -> None:
            out = call(*inputs)
            out.backward(torch.ones_like(out))

        return Case(function, lambda call: call(*inputs), train if wanted else None, inputs[:wanted])

    def feature_map(stride: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(s.batch, CHANNELS, s.height // stride, s.width // stride, device=s.device, dtype=dtype)

    def boxes(count: int) -> Tensor:
        corners = torch.rand(count, 2, 2, device=s.device).sort(1).values  # lower and upper, x and y
        return (corners * torch.tensor([s.width, s.height], device=s.device)).flatten(1)  # count, 4

    def align(function: Callable[..., Tensor], dtype: torch.dtype) -> Case:
        image = torch.arange(s.batch, device=s.device).repeat_interleave(REGIONS)[:, None]
        return case(function, [feature_map(8, dtype), torch.cat((image, boxes(s.batch * REGIONS)), 1).to(dtype)], 1)

    def suppress(function: Callable[[Tensor, Tensor], Any]) -> Case:
        return case(function, [boxes(PROPOSALS), torch.rand(PROPOSALS, device=s.device)], 0)

    def deform(function: Callable[..., Tensor], dtype: torch.dtype, modulated: bool) -> Case:
        x = feature_map(16, dtype)
        size = (s.batch, 9, *x.shape[2:])
        offset = torch.randn(s.batch, 18, *x.shape[2:], device=s.device, dtype=dtype)
        mask = [torch.rand(size, device=s.device, dtype=dtype)] if modulated else []
        weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=s.device, dtype=dtype) / 48
        return case(function, [x, offset, *mask, weight], 3 + modulated)

    def focal(function: Callable[..., Tensor], dtype: torch.dtype) -> Case:
        count = sum((s.height // stride) * (s.width // stride) for stride in STRIDES) * s.batch
        labels = torch.randint(CLASSES, (count,), device=s.device)
        return case(function, [torch.randn(count, CLASSES, device=s.device, dtype=dtype), labels], 1)

    def attend(function: Callable[..., Tensor], dtype: torch.dtype) -> Case:
        shapes = torch.tensor([(s.height // stride, s.width // stride) for stride in STRIDES], device=s.device)
        count = int(shapes.prod(1).sum())  # of the encoder: every place asks
        options = dict(device=s.device, dtype=dtype)
        value = torch.randn(s.batch, count, HEADS, CHANNELS // HEADS, **options)
        places = torch.rand(s.batch, count, HEADS, len(STRIDES), POINTS, 2, **options)
        weights = torch.rand(s.batch, count, HEADS, len(STRIDES), POINTS, **options)
        return case(lambda v, p, a: function(v, shapes, p, a), [value, places, weights], 3)

    def stand_in(value: Tensor, shapes: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        start = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
        return MultiScaleDeformableAttnFunction.apply(value, shapes, start, places, weights, 64)  # type: ignore[return-value]

    def one_hot(logits: Tensor, labels: Tensor) -> Tensor:
        targets = torch.nn.functional.one_hot(labels, CLASSES).float()
        return vision.sigmoid_focal_loss(logits, targets, reduction='sum')

    pooling = partial(vision.roi_align, output_size=7, spatial_scale=1 / 8, sampling_ratio=-1, aligned=True)
    full = torch.float32
    return {
        'RoIAlign, torchvision': lambda: align(pooling, full),
        'RoIAlign, ours': lambda: align(mmcv.RoIAlign(7, 1 / 8, 0, aligned=True), s.dtype),
        'NMS, torchvision': lambda: suppress(lambda b, v: vision.nms(b, v, 0.7)),
        'NMS, ours': lambda: suppress(lambda b, v: mmcv.nms(b, v, 0.7)),
        'deformable convolution, torchvision': lambda: deform(
            lambda x, o, w: vision.deform_conv2d(x, o, w, padding=1), full, False
        ),
        'deformable convolution, ours': lambda: deform(
            lambda x, o, w: mmcv.deform_conv2d(x, o, w, 1, 1), s.dtype, False
        ),
        'modulated, torchvision': lambda: deform(
            lambda x, o, m, w: vision.deform_conv2d(x, o, w, padding=1, mask=m), full, True
        ),
        'modulated, ours': lambda: deform(
            lambda x, o, m, w: mmcv.modulated_deform_conv2d(x, o, m, w, None, 1, 1), s.dtype, True
        ),
        'focal loss, torchvision': lambda: focal(one_hot, full),
        'focal loss, ours': lambda: focal(
            lambda x, y: mmcv.sigmoid_focal_loss(x, y, 2.0, 0.25, None, 'sum'), s.dtype
        ),
        "deformable attention, mmcv's Python": lambda: attend(multi_scale_deformable_attn_pytorch, s.dtype),
        'deformable attention, ours': lambda: attend(stand_in, s.dtype),
    }  # fmt: skip
