"""nms, softnms, nms_match, bbox_overlaps: against loops over pairs, published values, and through mmcv."""

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install
from beit_plugin.mm.mmcv_ops.boxes import bbox_overlaps, nms, nms_match, softnms


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


def random_boxes(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) that overlap a lot, and distinct scores (n)."""
    generator = torch.Generator().manual_seed(n)
    corners = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 20
    sizes = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 15 + 1
    scores = (torch.randperm(n, generator=generator) + 1) / (n + 1)
    return torch.cat([corners, corners + sizes], 1).to(dtype), scores.to(dtype)


def iou(a: list[float], b: list[float], offset: int, mode: int = 0) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    base = area_a + area_b - width * height if mode == 0 else area_a
    return width * height / max(base, offset)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('n', [0, 1, 37])
def test_nms_keeps_what_a_loop_keeps(n: int, offset: int) -> None:
    boxes, scores = random_boxes(n)
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[k].tolist(), offset) <= 0.3 for k in kept):
            kept.append(i)
    result = nms(boxes, scores, iou_threshold=0.3, offset=offset)
    assert result.dtype == torch.int64
    assert result.tolist() == kept


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_of_narrow_dtypes_is_that_of_the_same_boxes_in_fp32(dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(30, dtype)
    expected = nms(boxes.float(), scores.float(), iou_threshold=0.3, offset=0)
    assert torch.equal(nms(boxes, scores, iou_threshold=0.3, offset=0), expected)


def test_nms_through_mmcv_gives_its_published_example(ops: ModuleType) -> None:
    boxes = torch.tensor(
        [
            [49.1, 32.4, 51.0, 35.9],
            [49.3, 32.9, 51.0, 35.3],
            [49.2, 31.8, 51.0, 35.4],
            [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2],
            [35.3, 11.5, 39.9, 14.5],
            [35.2, 11.7, 39.7, 15.7],
        ]
    )
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3])
    dets, indices = ops.nms(boxes, scores, 0.6)  # docstring of mmcv.ops.nms
    assert len(dets) == len(indices) == 3
    labels = torch.tensor([0, 1, 0, 0, 1, 0, 1])
    dets, indices = ops.batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.6))
    assert sorted(indices.tolist()) == [0, 1, 3, 4, 5, 6]
    dets, indices = ops.batched_nms(boxes, scores, labels, dict(type='soft_nms', iou_threshold=0.6))
    assert len(dets) == len(indices) == 7


def soft_nms_loop(
    boxes: list[list[float]],
    scores: list[float],
    threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> tuple[list[int], list[float]]:
    """Figure 2 of arXiv:1704.04503, one pair at a time."""
    remaining, scores = list(range(len(boxes))), list(scores)
    kept, kept_scores = [], []
    while remaining:
        best = max(remaining, key=lambda i: scores[i])
        remaining.remove(best)
        kept.append(best)
        kept_scores.append(scores[best])
        for i in list(remaining):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 0 and overlap >= threshold:
                scores[i] = 0
            elif method == 1 and overlap >= threshold:
                scores[i] *= 1 - overlap
            elif method == 2:
                scores[i] *= math.exp(-(overlap**2) / sigma)
            if scores[i] < min_score:
                remaining.remove(i)
    return kept, kept_scores


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('n', [0, 1, 25])
def test_softnms_matches_a_loop(n: int, method: int, offset: int) -> None:
    boxes, scores = random_boxes(n)
    dets = boxes.new_full((n, 5), -1)
    rule = dict(sigma=0.5, min_score=0.05, method=method, offset=offset)
    indices = softnms(boxes, scores, dets, iou_threshold=0.3, **rule)
    kept, kept_scores = soft_nms_loop(boxes.tolist(), scores.tolist(), 0.3, **rule)
    assert indices.dtype == torch.int64
    assert indices.tolist() == kept
    torch.testing.assert_close(dets[: len(kept), 4], boxes.new_tensor(kept_scores))
    assert torch.equal(dets[: len(kept), :4], boxes[indices])
    assert bool((dets[len(kept) :] == -1).all())
    assert torch.equal(scores, random_boxes(n)[1])  # the caller's scores stay


def test_softnms_through_mmcv_gives_its_published_example(ops: ModuleType) -> None:
    boxes = torch.tensor([[4.0, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]])
    scores = torch.tensor([0.9, 0.9, 0.5, 0.5, 0.4, 0.0])
    dets, indices = ops.soft_nms(boxes, scores, 0.6, sigma=0.5)  # docstring of mmcv.ops.soft_nms
    assert len(dets) == len(indices) == 5
    half = ops.soft_nms(boxes.half(), scores.half(), 0.6, sigma=0.5)[0]
    torch.testing.assert_close(half.float(), dets, atol=1e-3, rtol=1e-3)  # fp16 scores have 11 bits


@pytest.mark.parametrize('n', [1, 31])
def test_nms_match_groups_what_a_loop_groups(n: int, ops: ModuleType) -> None:
    boxes, scores = random_boxes(n)
    order, groups = scores.argsort(descending=True).tolist(), []
    while order:
        best = order.pop(0)
        matched = [i for i in order if iou(boxes[best].tolist(), boxes[i].tolist(), 0) >= 0.4]
        groups.append([best, *matched])
        order = [i for i in order if i not in matched]
    dets = torch.cat([boxes, scores[:, None]], 1)
    assert nms_match(dets, iou_threshold=0.4) == groups
    assert [group.tolist() for group in ops.nms_match(dets.float(), 0.4)] == groups


def test_nms_match_joins_at_the_threshold_itself() -> None:
    dets = torch.tensor([[0.0, 0, 4, 4, 0.9], [0, 0, 4, 2, 0.8]])  # IoU exactly 0.5
    assert nms_match(dets, iou_threshold=0.5) == [[0, 1]]
    assert nms(dets[:, :4], dets[:, 4], iou_threshold=0.5, offset=0).tolist() == [0, 1]


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', [0, 1])
def test_bbox_overlaps_matches_a_loop(mode: int, offset: int) -> None:
    first, second = random_boxes(7)[0], random_boxes(5)[0]
    ious = first.new_zeros(7, 5)
    bbox_overlaps(first, second, ious, mode=mode, aligned=False, offset=offset)
    expected = [[iou(a, b, offset, mode) for b in second.tolist()] for a in first.tolist()]
    torch.testing.assert_close(ious, first.new_tensor(expected))
    aligned = first.new_zeros(5)
    bbox_overlaps(first[:5], second, aligned, mode=mode, aligned=True, offset=offset)
    torch.testing.assert_close(aligned, ious[:5].diagonal())


def test_bbox_overlaps_through_mmcv_gives_its_published_example(ops: ModuleType) -> None:
    first = torch.tensor([[0.0, 0, 10, 10], [10, 10, 20, 20], [32, 32, 38, 42]])
    second = torch.tensor([[0.0, 0, 10, 20], [0, 10, 10, 19], [10, 10, 20, 20]])
    expected = torch.tensor([[0.5, 0, 0], [0, 0, 1], [0, 0, 0]])  # docstring of mmcv.ops.bbox_overlaps
    assert torch.equal(ops.bbox_overlaps(first, second), expected)
    assert torch.equal(ops.bbox_overlaps(first.bfloat16(), second.bfloat16()), expected.bfloat16())
    assert ops.bbox_overlaps(torch.zeros(0, 4), second).shape == (0, 3)
