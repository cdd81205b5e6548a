"""Levels mixed at their own size against the plain convolution of the enlarged ones, in float64."""

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from beit_plugin.segmentation import mixed_conv as level_mixing
from beit_plugin.segmentation.mixed_conv import add_enlarged, conv_of_levels

SIZES = {
    'halves': [(16, 24), (8, 12), (4, 6), (2, 3)],
    'odd': [(37, 53), (18, 27), (9, 13), (4, 6)],
    'tiny': [(9, 7), (5, 4), (3, 2), (1, 1)],
    'one row': [(1, 40), (1, 20), (1, 10)],
    'pooled': [(6, 5), (1, 1), (2, 2), (3, 3), (6, 6)],  # the last is larger than the first
    'alike': [(6, 5), (6, 5)],
    'alone': [(6, 5)],
}


def maps(name, dtype=torch.float64):
    sizes = SIZES[name]
    return [torch.randn(2, 3 + i, *size, dtype=dtype, requires_grad=True) for i, size in enumerate(sizes)]


def plain(conv, levels, align_corners=False):
    size = levels[0].shape[2:]
    resized = [F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in levels]
    return conv(torch.cat(resized, 1))


def convolution(levels, kernel=3, **options):
    channels = sum(x.shape[1] for x in levels)
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    return nn.Conv2d(channels, 7, kernel, **{'padding': padding, **options}).to(levels[0].dtype)


@pytest.mark.parametrize('options', [dict(), dict(bias=False), dict(kernel=1), dict(kernel=(5, 3))], ids=str)
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('name', SIZES)
def test_values_and_gradients(name, align_corners, options):
    levels = maps(name)
    conv = convolution(levels, **options)
    leaves = [*levels, *conv.parameters()]
    expected = plain(conv, levels, align_corners)
    got = conv_of_levels(conv, levels, align_corners)
    assert relative_error(got, expected) <= 1e-13
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, leaves, weights) for out in (got, expected)]
    assert all(relative_error(*pair) <= 1e-12 for pair in zip(*grads, strict=True))


@pytest.mark.parametrize(
    'options', [dict(dilation=2, padding=2), dict(padding_mode='circular'), dict(kernel=2)], ids=str
)
def test_other_convolutions_are_called_as_they_are(options):
    levels = maps('halves')
    conv = convolution(levels, **options)
    assert torch.equal(conv_of_levels(conv, levels, False), plain(conv, levels))


def test_hooks_fire():
    levels = maps('halves')
    conv = convolution(levels)
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(conv_of_levels(conv, levels, False), plain(conv, levels))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(memory_format):
    levels = [x.to(memory_format=memory_format) for x in maps('halves', torch.float32)]
    got = conv_of_levels(convolution(levels), levels, False)
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    levels = maps('odd', torch.float32)
    conv = convolution(levels)
    with torch.autocast('cpu', dtype):
        got, expected = conv_of_levels(conv, levels, False), plain(conv, levels)
    exact = plain(conv.double(), [x.double() for x in levels])
    assert got.dtype == expected.dtype == dtype
    assert relative_error(got.double(), exact) <= 2 * relative_error(expected.double(), exact) + 1e-4


def test_multiplications(monkeypatch):
    """1.09 T operations for an image of 640 pixels become 0.36 T, besides those of the enlarging."""
    monkeypatch.setattr(level_mixing, 'is_plain', lambda module, kind: True)  # the counter hooks all modules
    levels = [torch.empty(1, 768, 160 >> i, 160 >> i, device='meta') for i in range(4)]
    conv = nn.Conv2d(4 * 768, 768, 3, padding=1, bias=False, device='meta')
    counts = []
    for call in (conv_of_levels, plain):
        with FlopCounterMode(display=False) as counter:
            call(conv, levels, False)
        counts.append(counter.get_total_flops() / 1e12)
    assert counts[1] == pytest.approx(1.087, rel=1e-3) and counts[0] < 0.43


def test_after_inference_mode():
    levels = maps('halves', torch.float32)
    conv = convolution(levels)
    with torch.inference_mode():
        expected = conv_of_levels(conv, levels, False)
    got = conv_of_levels(conv, levels, False)
    got.sum().backward()
    assert torch.equal(got, expected) and levels[3].grad.any()


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    levels = maps('odd', torch.float32)
    conv = convolution(levels)
    compiled = torch.compile(conv_of_levels, fullgraph=True, backend='aot_eager')
    assert relative_error(compiled(conv, levels, False), plain(conv, levels)) <= 1e-5
    others = maps('halves', torch.float32)
    assert relative_error(compiled(conv, others, False), plain(conv, others)) <= 1e-5


def test_exported_programs_have_the_convolution():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = convolution(maps('halves', torch.float32))

        def forward(self, levels):
            return conv_of_levels(self.conv, levels, False)

    program = torch.export.export(Mixed(), (maps('halves', torch.float32),), strict=False)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum('conv2d' in name for name in names) == 1 and not any('bmm' in name for name in names)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('name', ['odd', 'tiny', 'one row', 'halves'])
def test_adding_an_enlarged_map(name, align_corners, memory_format):
    sizes = SIZES[name][:2]
    exact = [torch.randn(2, 5, *size).to(torch.bfloat16).double().requires_grad_() for size in sizes]
    expected = exact[0] + F.interpolate(exact[1], sizes[0], mode='bilinear', align_corners=align_corners)
    weights = torch.randn_like(expected).to(torch.bfloat16)
    expected_grads = torch.autograd.grad(expected, exact, weights.double())
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        leaves = [x.detach().to(dtype, memory_format=memory_format).requires_grad_() for x in exact]
        got = add_enlarged(*leaves, align_corners)
        assert got.dtype == dtype and got.is_contiguous(memory_format=memory_format)
        assert relative_error(got.double(), expected) <= tolerance
        grads = torch.autograd.grad(got, leaves, weights.to(dtype))
        assert all(relative_error(a.double(), b) <= tolerance for a, b in zip(grads, expected_grads, strict=True))
