"""ViTDet's pyramid: structure, sizes, what a level computes, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, randomize, relative_error, weighted_sum
from torch import nn

from beit_plugin.segmentation.simple_pyramid import SimplePyramid


def maps(h=4, w=6, channels=8):
    return torch.randn(2, channels, h, w, generator=torch.Generator().manual_seed(0))


def norm(x, weight, bias):
    return F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, 1e-6).movedim(-1, 1)


def by_hand(model, x):
    """Every level written out, after arXiv:2203.16527, A.2."""
    state, levels = model.state_dict(), []
    for i, steps in enumerate((2, 1, 0, 0)):
        y, layer = F.max_pool2d(x, 2) if i == 3 else x, 0

        def take(name, i=i):
            return state[f'levels.{i}.{name}']

        for step in range(steps):
            if step:
                y, layer = F.gelu(norm(y, take(f'{layer}.weight'), take(f'{layer}.bias'))), layer + 2
            y, layer = F.conv_transpose2d(y, take(f'{layer}.weight'), take(f'{layer}.bias'), 2), layer + 1
        for padding in (0, 1):
            y = F.conv2d(y, take(f'{layer}.weight'), padding=padding)
            y, layer = norm(y, take(f'{layer + 1}.weight'), take(f'{layer + 1}.bias')), layer + 2
        levels.append(y)
    return [*levels, levels[-1][:, :, ::2, ::2]]


def test_levels():
    model = randomize(SimplePyramid(8, 6))
    got = model(maps())
    assert [tuple(y.shape) for y in got] == [(2, 6, 16, 24), (2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3), (2, 6, 1, 2)]
    for y, expected in zip(got, by_hand(model, maps()), strict=True):
        assert relative_error(y, expected) < 1e-6
    weighted_sum(*got).backward()
    gradients(model)


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (7, 2)])
def test_odd_grids_lose_nothing(size):
    levels = SimplePyramid(8, 6, num_outs=6)(maps(*size))
    assert [tuple(y.shape[2:]) for y in levels] == [
        tuple(4 * n for n in size),
        tuple(2 * n for n in size),
        *(tuple(-(-n // factor) for n in size) for factor in (1, 2, 4, 8)),
    ]
    assert all(y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last) for y in levels)


def test_takes_the_last_of_several_maps():
    model = SimplePyramid(8, 6, rescales=(2, 1), num_outs=3)
    assert all(torch.equal(a, b) for a, b in zip(model([maps(2, 2), maps()]), model(maps()), strict=True))
    assert [tuple(y.shape[2:]) for y in model(maps())] == [(8, 12), (4, 6), (2, 3)]


def test_norm_device_and_dtype():
    model = SimplePyramid(8, 6, norm_layer=nn.BatchNorm2d, dtype=torch.float64)
    assert isinstance(model.levels[2][1], nn.BatchNorm2d) and model(maps().double())[0].dtype == torch.float64
    assert all(p.is_meta for p in SimplePyramid(8, 6, device='meta').parameters())


@pytest.mark.parametrize(
    'options, sentence',
    [
        (
            dict(rescales=(1, 2)),
            r'got rescales=\(1, 2\), expected different values out of 4, 2, 1 and 0.5, largest first',
        ),
        (dict(rescales=(8, 4)), 'use .* for strides 4 to 32 from patches of 16 pixels'),
        (dict(rescales=()), r'got rescales=\(\)'),
        (dict(num_outs=3), 'got num_outs=3 for 4 rescales; leave out rescales, or raise num_outs'),
    ],
)
def test_error_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SimplePyramid(8, **options)
