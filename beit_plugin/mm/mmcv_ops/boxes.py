"""Non-maximum suppression and overlaps of axis-aligned boxes (x1, y1, x2, y2).

Shapes: n, m numbers of boxes. ``offset`` is 1 where x2 and y2 name the last pixel inside the box, else 0.
Rules as in mmcv 2.1.0 ``csrc/pytorch/cpu/nms.cpp`` and ``csrc/common/cuda/bbox_overlaps_cuda_kernel.cuh``.
"""

import torch
import torchvision
from torch import Tensor

from .precision import at_least_fp32


def _areas(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


def _intersections(boxes1: Tensor, boxes2: Tensor, offset: int) -> Tensor:
    """Intersection areas of broadcastable boxes (..., 4): one axis at a time, no (..., 2) temporaries."""
    width = torch.minimum(boxes1[..., 2], boxes2[..., 2]).sub_(torch.maximum(boxes1[..., 0], boxes2[..., 0]))
    height = torch.minimum(boxes1[..., 3], boxes2[..., 3]).sub_(torch.maximum(boxes1[..., 1], boxes2[..., 1]))
    return width.add_(offset).clamp_(min=0).mul_(height.add_(offset).clamp_(min=0))


def _ious(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    """IoU (n) of one box (4) with boxes (n, 4)."""
    intersections = _intersections(box, boxes, offset)
    return intersections / (_areas(box, offset) + _areas(boxes, offset) - intersections)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the int64 indices of the kept boxes, by falling score.

    Args:
        boxes: (n, 4).
        scores: (n).
        iou_threshold: a box goes when its IoU with a kept one is greater.
        offset: 0 or 1.
    """
    boxes, scores = at_least_fp32(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Return the int64 indices of the k kept boxes by falling rescored score, and fill ``dets[:k]``.

    Source: Bodla et al., Soft-NMS, arXiv:1704.04503, figure 2.

    Args:
        boxes: (n, 4).
        scores: (n).
        dets: (n, 5), receives boxes and new scores.
        iou_threshold: overlap from which methods 0 and 1 act.
        sigma: width of the gaussian of method 2.
        min_score: a box goes when its new score is smaller.
        method: 0 naive (score 0), 1 linear (score times 1 - IoU), 2 gaussian.
        offset: 0 or 1.
    """
    boxes, scores = at_least_fp32(boxes, scores)
    indices = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(indices) > 0:
        best = int(scores.argmax())
        kept.append(indices[best])
        dets[len(kept) - 1] = torch.cat([boxes[best], scores[best, None]])
        ious = _ious(boxes[best], boxes, offset)
        if method == 0:
            scores = torch.where(ious >= iou_threshold, 0, scores)
        elif method == 1:
            scores = torch.where(ious >= iou_threshold, scores * (1 - ious), scores)
        else:
            scores = scores * torch.exp(-(ious**2) / sigma)
        remaining = scores >= min_score
        remaining[best] = False
        boxes, scores, indices = boxes[remaining], scores[remaining], indices[remaining]
    return torch.stack(kept) if kept else indices


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return groups of box indices: each kept box with those that it suppresses (IoU >= threshold), by falling score.

    Args:
        dets: (n, 5), boxes and scores.
        iou_threshold: IoU from which a box joins the group of a better one.
    """
    (dets,) = at_least_fp32(dets)
    order = dets[:, 4].argsort(descending=True, stable=True)
    groups: list[list[int]] = []
    while len(order) > 0:
        best, others = order[0], order[1:]
        matched = _ious(dets[best, :4], dets[others, :4], offset=0) >= iou_threshold
        groups.append([int(best), *others[matched].tolist()])
        order = others[~matched]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Fill ``ious`` with the overlaps of all pairs, or of the aligned pairs.

    Args:
        bboxes1: (n, 4).
        bboxes2: (m, 4).
        ious: (n, m), or (n) when aligned.
        mode: 0 intersection over union, 1 intersection over the area of the first box.
        aligned: compare box i with box i; needs n = m.
        offset: 0 or 1, also the smallest denominator.
    """
    first, second = at_least_fp32(bboxes1, bboxes2)
    if not aligned:
        first = first[:, None]
    intersections = _intersections(first, second, offset)
    denominators = _areas(first, offset)
    if mode == 0:
        denominators = denominators + _areas(second, offset) - intersections
    ious.copy_(intersections / denominators.clamp(min=offset))
