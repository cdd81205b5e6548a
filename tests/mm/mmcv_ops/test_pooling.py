"""RoI align and RoI pool: against torchvision, loops over samples and pixels, and numeric gradients through mmcv."""

import math
from types import ModuleType

import pytest
import torch
import torchvision
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install, windows

SCALE = 0.5
HEIGHT, WIDTH = 9, 7


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    """(2, 3, 9, 7), all values different, so that every maximum is unique."""
    generator = torch.Generator().manual_seed(0)
    count = 2 * 3 * HEIGHT * WIDTH
    return (torch.randperm(count, generator=generator).double() / count).view(2, 3, HEIGHT, WIDTH).to(dtype)


def regions() -> Tensor:
    """(6, 5): inside, large, reaching out of the map, thinner than a pixel, beyond the map, malformed."""
    return torch.tensor(
        [
            [0, 1.3, 2.1, 8.9, 12.4],
            [1, 0.2, 0.1, 13.7, 17.9],
            [1, -6.3, 8.2, 5.1, 25.3],
            [0, 4.1, 5.2, 4.6, 9.3],
            [1, 40.2, 50.1, 44.3, 60.7],
            [0, 9.1, 9.3, 4.2, 3.1],
        ],
        dtype=torch.float64,
    )


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Sample one map (H, W); 0 from one pixel outside it."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
    return float(top * (1 - (y - y0)) + bottom * (y - y0))


def roi_align_max_loop(maps: Tensor, rois: Tensor, size: tuple[int, int], ratio: int, aligned: bool) -> Tensor:
    """Largest bilinear sample of every bin, one sample at a time; 0 for bins without samples."""
    output = maps.new_zeros(len(rois), maps.shape[1], *size)
    for r, roi in enumerate(rois.tolist()):
        shift = 0.5 if aligned else 0.0
        x1, y1, x2, y2 = (value * SCALE - shift for value in roi[1:])
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        bin_h, bin_w = height / size[0], width / size[1]
        grid_h, grid_w = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for c in range(maps.shape[1]):
            for ph in range(size[0]):
                for pw in range(size[1]):
                    samples = [
                        bilinear(
                            maps[int(roi[0]), c],
                            y1 + bin_h * (ph + (iy + 0.5) / grid_h),
                            x1 + bin_w * (pw + (ix + 0.5) / grid_w),
                        )
                        for iy in range(grid_h)
                        for ix in range(grid_w)
                    ]
                    output[r, c, ph, pw] = max(samples, default=0.0)
    return output


def pixels_of_bin(start: float, bin_size: float, index: int, size: int) -> range:
    """Pixels of a bin along one axis, as far as they are on the map."""
    first, stop = math.floor(start + index * bin_size), math.ceil(start + (index + 1) * bin_size)
    return range(max(first, 0), min(stop, size))


def roi_pool_loop(maps: Tensor, rois: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Largest pixel of every bin and its place, one bin at a time; 0 and -1 for bins without pixels."""
    output = maps.new_zeros(len(rois), maps.shape[1], *size)
    argmax = torch.full(output.shape, -1, dtype=torch.int32)
    for r, roi in enumerate(rois.tolist()):
        x1, y1, x2, y2 = roi[1] * SCALE, roi[2] * SCALE, (roi[3] + 1) * SCALE, (roi[4] + 1) * SCALE
        if x2 <= x1 or y2 <= y1:
            continue
        bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        for ph in range(size[0]):
            for pw in range(size[1]):
                rows = pixels_of_bin(y1, bin_h, ph, HEIGHT)
                columns = pixels_of_bin(x1, bin_w, pw, WIDTH)
                for c in range(maps.shape[1]):
                    pixels = [(float(maps[int(roi[0]), c, y, x]), y * WIDTH + x) for y in rows for x in columns]
                    output[r, c, ph, pw], argmax[r, c, ph, pw] = max(pixels, default=(0.0, -1))
    return output, argmax


@pytest.fixture(params=[2**24, 1], ids=['together', 'one by one'])
def gathered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with all regions in one slice, and with one region per slice."""
    monkeypatch.setattr(windows, 'MAX_GATHERED', request.param)


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_average_is_torchvisions(ops: ModuleType, ratio: int, aligned: bool) -> None:
    rois, weight = regions()[:5], torch.rand(5, 3, 3, 2, dtype=torch.float64)
    ours, theirs = features().requires_grad_(), features().requires_grad_()
    output = ops.roi_align(ours, rois, (3, 2), SCALE, ratio, 'avg', aligned)
    expected = torchvision.ops.roi_align(theirs, rois, (3, 2), SCALE, ratio if ratio > 0 else -1, aligned)
    assert torch.equal(output, expected)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.usefixtures('gathered')
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_max_matches_a_loop(ops: ModuleType, ratio: int, aligned: bool) -> None:
    output = ops.roi_align(features(), regions(), (3, 2), SCALE, ratio, 'max', aligned)
    torch.testing.assert_close(output, roi_align_max_loop(features(), regions(), (3, 2), ratio, aligned))


@pytest.mark.parametrize('pool_mode', ['avg', 'max'])
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_gradients_are_numeric_ones(ops: ModuleType, aligned: bool, pool_mode: str) -> None:
    rois, maps = regions()[:4], features().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, (2, 2), SCALE, 0, pool_mode, aligned), maps)


@pytest.mark.usefixtures('gathered')
@pytest.mark.parametrize('size', [(3, 2), (1, 1), (4, 5)])
def test_roi_pool_matches_a_loop_with_gradients(ops: ModuleType, size: tuple[int, int]) -> None:
    expected, argmax = roi_pool_loop(features(), regions(), size)
    maps = features().requires_grad_()
    output = ops.roi_pool(maps, regions(), size, SCALE)
    assert torch.equal(output, expected)

    weight = torch.rand(output.shape, dtype=torch.float64)
    (output * weight).sum().backward()
    grad = torch.zeros_like(maps)
    for r, c, ph, pw in (argmax >= 0).nonzero().tolist():
        y, x = divmod(int(argmax[r, c, ph, pw]), WIDTH)
        grad[int(regions()[r, 0]), c, y, x] += weight[r, c, ph, pw]
    torch.testing.assert_close(maps.grad, grad)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes_follow_fp32(ops: ModuleType, dtype: torch.dtype, tolerance: float) -> None:
    rois = regions()[:4].float()
    for pool in (
        lambda x: ops.roi_align(x, rois, (3, 2), SCALE, 0, 'avg', True),
        lambda x: ops.roi_align(x, rois, (3, 2), SCALE, 2, 'max', True),
        lambda x: ops.roi_pool(x, rois, (3, 2), SCALE),
    ):
        narrow, wide = features(dtype).requires_grad_(), features(dtype).float().requires_grad_()
        output, expected = pool(narrow), pool(wide)
        assert output.dtype == dtype
        # one rounding of values up to 1, and of sums of up to six gradients
        torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)
        output.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(narrow.grad.float(), wide.grad, atol=6 * tolerance, rtol=tolerance)


def test_no_regions(ops: ModuleType) -> None:
    rois = torch.zeros(0, 5, dtype=torch.float64)
    for pool in (
        lambda x: ops.roi_align(x, rois, 2, SCALE, 0, 'avg', True),
        lambda x: ops.roi_align(x, rois, 2, SCALE, 0, 'max', True),
        lambda x: ops.roi_pool(x, rois, 2, SCALE),
    ):
        maps = features().requires_grad_()
        output = pool(maps)
        assert output.shape == (0, 3, 2, 2)
        output.sum().backward()
        assert not maps.grad.any()


def test_regions_beyond_the_map_give_zero_and_no_gradient(ops: ModuleType) -> None:
    maps = features().requires_grad_()
    output = ops.roi_pool(maps, regions()[4:], (2, 2), SCALE)
    output.sum().backward()
    assert not output.any()
    assert not maps.grad.any()
