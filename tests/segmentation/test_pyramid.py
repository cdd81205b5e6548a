import pytest
import torch
from torch import nn

from beit_plugin.models.embed import tokens_to_map
from beit_plugin.segmentation.pyramid import FeaturePyramid

GRIDS = [(4, 4), (5, 7), (37, 53)]


def shapes(levels):
    return [tuple(x.shape[-2:]) for x in levels]


@pytest.mark.parametrize('grid', [(4, 4), (3, 7)])
def test_tokens_to_map_keeps_row_order_and_drops_cls(grid):
    h, w = grid
    tokens = torch.arange(2 * (1 + h * w) * 3).reshape(2, 1 + h * w, 3)
    x = tokens_to_map(tokens, grid)
    assert x.shape == (2, 3, h, w)
    assert all(torch.equal(x[1, :, i, j], tokens[1, 1 + i * w + j]) for i in range(h) for j in range(w))


def test_tokens_to_map_refuses_another_grid():
    with pytest.raises(ValueError, match=r'got 10 tokens, but a grid of 3x4 patches has 13 with \[CLS\]'):
        tokens_to_map(torch.zeros(1, 10, 2), (3, 4))


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('rescales', [(4, 2, 1, 0.5), (2, 1, 0.5, 0.25), (4, 2, 1)])
def test_level_sizes(grid, rescales):
    pyramid = FeaturePyramid(4, rescales).eval()
    levels = pyramid([torch.randn(1, 4, *grid) for _ in rescales])
    assert shapes(levels) == [(int(grid[0] * r), int(grid[1] * r)) for r in rescales]
    assert all(x.shape[1] == 4 for x in levels)


def test_parameter_names_are_those_of_mmseg():
    names = set(FeaturePyramid(4).state_dict())
    norm = {f'upsample_4x.1.{n}' for n in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')}
    layers = ('upsample_4x.0', 'upsample_4x.3', 'upsample_2x.0')
    convs = {f'{layer}.{n}' for layer in layers for n in ('weight', 'bias')}
    assert names == norm | convs


@pytest.mark.parametrize('patch', [16, 14, (8, 16)])
@pytest.mark.parametrize('size', [(33, 50), (64, 65), (100, 47)])
def test_crop_to_the_image(size, patch):
    patches = patch if isinstance(patch, tuple) else (patch, patch)
    grid = [-(-s // p) for s, p in zip(size, patches, strict=True)]
    maps = [torch.randn(1, 2, *grid) for _ in range(4)]
    pyramid = FeaturePyramid(2).eval()
    whole, cropped = pyramid(maps), pyramid(maps, size, patch)
    expected = [[-(-s * r // p) for s, p in zip(size, patches, strict=True)] for r in (4, 2, 1)]
    expected.append([g // 2 for g in grid])
    assert shapes(cropped) == [tuple(e) for e in expected]
    for full, part in zip(whole, cropped, strict=True):
        assert torch.equal(full[..., : part.shape[-2], : part.shape[-1]], part)


def test_a_whole_number_of_patches_is_not_cropped():
    maps = [torch.randn(1, 2, 3, 5) for _ in range(4)]
    pyramid = FeaturePyramid(2).eval()
    assert all(map(torch.equal, pyramid(maps), pyramid(maps, (48, 80), 16)))


def test_an_image_larger_than_the_maps_takes_what_exists():
    maps = [torch.randn(1, 2, 3, 5) for _ in range(4)]
    assert shapes(FeaturePyramid(2).eval()(maps, (70, 90))) == [(12, 20), (6, 10), (3, 5), (1, 2)]


@pytest.mark.parametrize('count', [3, 5])
def test_refuses_another_number_of_maps(count):
    with pytest.raises(ValueError, match=rf'got {count} maps for the 4 rescales \(4, 2, 1, 0.5\); select exactly'):
        FeaturePyramid(2)([torch.randn(1, 2, 4, 4)] * count)


@pytest.mark.parametrize('rescales', [(8, 4, 2, 1), (4, 4, 2, 1), (0.5, 1, 2, 4)])
def test_refuses_unknown_repeated_or_unordered_rescales(rescales):
    with pytest.raises(ValueError, match=r'got rescales=.*expected different values out of .* largest first'):
        FeaturePyramid(2, rescales)


def test_norm_device_and_dtype():
    pyramid = FeaturePyramid(2, norm_layer=nn.SyncBatchNorm, device='meta', dtype=torch.float64)
    assert isinstance(pyramid.upsample_4x[1], nn.SyncBatchNorm)
    assert all(p.is_meta and p.dtype == torch.float64 for p in pyramid.parameters())


class Padded(nn.Module):
    """A pyramid over an encoder that pads its images to whole patches."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 16, 16)
        self.pyramid = FeaturePyramid(4)

    def forward(self, image):
        height, width = image.shape[-2:]
        x = self.patch_embed(nn.functional.pad(image, (0, -width % 16, 0, -height % 16)))
        return self.pyramid([x] * 4, (height, width), 16)


def test_export_with_dynamic_size():
    model = Padded().eval()
    dynamic = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    program = torch.export.export(model, (torch.randn(2, 3, 70, 90),), dynamic_shapes=(dynamic,)).module()
    for shape in [(2, 3, 70, 90), (3, 3, 64, 129), (5, 3, 96, 80)]:
        image = torch.randn(shape)
        for expected, got in zip(model(image), program(image), strict=True):
            torch.testing.assert_close(got, expected)


def test_compiles_without_a_graph_break():
    model = Padded().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    for size in [(70, 90), (64, 64), (50, 130)]:
        image = torch.randn(2, 3, *size)
        assert all(map(torch.equal, model(image), compiled(image)))
