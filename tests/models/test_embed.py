"""Patches by one product instead of a convolution: the same values, and a module that does more is called as it is."""

import pytest
import torch
from helpers import images, relative_error
from torch import nn

from beit_plugin.models.embed import BeitPatchEmbed


def embed(patch=(16, 8), channels=4):
    return BeitPatchEmbed((48, 80), patch, in_chans=channels, embed_dim=32, norm_layer=nn.LayerNorm)


def convolution(made, x):
    """What it stands for; sides that are whole patches."""
    return made.norm(made.proj(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_product_is_the_convolution(dtype, memory_format):
    made = embed().to(memory_format=memory_format)
    x = images(32, 72, channels=4).to(memory_format=memory_format).requires_grad_()
    weights = torch.randn(2, 2, 9, 32)
    results = []
    for call in (made, lambda x: convolution(made, x)):
        made.zero_grad()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            out = call(x)
        (grad,) = torch.autograd.grad((out * weights).sum(), x, retain_graph=True)
        (out * weights).sum().backward()
        results.append([out, grad, *(p.grad.clone() for p in made.parameters())])
    assert all(got.dtype == expected.dtype for got, expected in zip(*results, strict=True))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert all(relative_error(*pair) <= tolerance for pair in zip(*results, strict=True))


@pytest.mark.parametrize('without_bias', [False, True])
def test_padding(without_bias):
    made = embed()
    if without_bias:
        made.proj.bias = None
    x = images(40, 70, channels=4)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 8))
    assert relative_error(made(x), convolution(made, padded)) <= 1e-5


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_projections_are_called_as_they_are():
    x = images(32, 72, channels=4)
    made = embed()
    made.norm = nn.Identity()
    expected = 2 * made(x)
    handle = made.proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert relative_error(made(x), expected) <= 1e-5
    handle.remove()
    twice = Doubled(4, 32, (16, 8), (16, 8))
    twice.load_state_dict(made.proj.state_dict())
    made.proj = twice
    assert relative_error(made(x), expected) <= 1e-5


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_have_the_convolution(strict):
    if strict and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch 2.6 does not tell a strict export from torch.compile')
    program = torch.export.export(embed().eval(), (images(32, 72, channels=4),), strict=strict)
    assert any('conv2d' in str(node.target) for node in program.graph.nodes)
