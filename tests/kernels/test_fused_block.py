"""Blocks on the fused sums and norms: against eager ones, changed, hooked, compiled; and why Triton cannot run."""

from types import SimpleNamespace

import pytest
import torch
from helpers import gradients, randomize, relative_error, worst
from timm.layers import DropPath, drop_path
from torch import nn

from beit_plugin.kernels import residual_ops
from beit_plugin.models import kernel_support
from beit_plugin.models.block import Block, _draw_keep

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
HALF = torch.bfloat16 if CUDA else torch.float16


def blocks(**options):
    """With the kernels, and the reference."""
    made = [Block(32, 2, attn_backend=backend, **options) for backend in ('fused', 'eager')]
    return [randomize(block).to(DEVICE).train() for block in made]


def fused_calls(monkeypatch):
    calls = []
    forward = residual_ops._residual

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(residual_ops, '_residual', counted)
    return calls


@pytest.mark.parametrize('options', [dict(), dict(init_values=0.1), dict(init_values=0.1, drop_path=0.5)])
def test_block(options, monkeypatch):
    calls = fused_calls(monkeypatch)
    x = torch.randn(8, 5, 32, device=DEVICE)
    results = []
    for block in blocks(**options):
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        out, _ = block(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *gradients(block).values()])
    assert len(calls) == 3
    assert worst(*results) <= 5e-6


def test_block_in_mixed_precision(monkeypatch):
    """The stream keeps its dtype, and the norms come in that of the linear layers."""
    calls = fused_calls(monkeypatch)
    fused, eager = blocks(init_values=0.1)
    for dtype in (torch.float32, HALF):
        x = torch.randn(4, 5, 32, device=DEVICE).to(dtype)
        with torch.autocast(DEVICE, HALF):
            got, expected = fused(x)[0], eager(x)[0]
        assert got.dtype == expected.dtype == dtype
        assert relative_error(got, expected) <= 2e-2
    assert [call[-1] for call in calls] == [HALF, HALF, torch.float32] + [HALF] * 3


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale_by_keep', [True, False])
def test_random_numbers_of_stochastic_depth(dtype, scale_by_keep):
    """Those of timm, and no more."""
    layer = DropPath(0.3, scale_by_keep)
    x = torch.ones(16, 2, 3, device=DEVICE, dtype=dtype)
    torch.manual_seed(3)
    expected, after = drop_path(x, 0.3, True, scale_by_keep)[:, 0, 0], torch.rand(2, device=DEVICE)
    torch.manual_seed(3)
    keep = _draw_keep(layer, x)
    assert torch.equal(torch.rand(2, device=DEVICE), after) and keep.dtype == torch.float32
    assert 0 < keep.count_nonzero() < 16 and relative_error(keep, expected) <= 4e-3
    assert _draw_keep(layer.eval(), x) is None and _draw_keep(nn.Identity(), x) is None


def change_norm(block):
    block.norm1 = nn.RMSNorm(32).to(DEVICE)


def change_forward(block):
    block.norm2.forward = lambda x: x


def without_bias(block):
    block.norm1 = nn.LayerNorm(32, bias=False).to(DEVICE)


def over_tokens_too(block):
    block.norm2 = nn.LayerNorm((5, 32)).to(DEVICE)


def wrap_attention(block):
    block.attn = Wrapped(block.attn)


class Wrapped(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, *args):
        return self.attn(*args)


@pytest.mark.parametrize('change', [change_norm, change_forward, without_bias, over_tokens_too, wrap_attention])
def test_other_norms_are_called_as_they_are(change, monkeypatch):
    calls = fused_calls(monkeypatch)
    fused, eager = blocks()
    change(fused), change(eager)
    x = torch.randn(2, 5, 32, device=DEVICE)
    assert relative_error(fused(x)[0], eager(x)[0]) <= 5e-6 and not calls


@pytest.mark.parametrize('name', ['norm1', 'norm2', 'drop_path1', 'drop_path2'])
@pytest.mark.parametrize(
    'register',
    ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook', 'everywhere'],
)
def test_hooks_fire(name, register, monkeypatch):
    calls = fused_calls(monkeypatch)
    block, _ = blocks(drop_path=0.5)
    module = block.get_submodule(name)
    seen = []

    def hook(hooked, *_):
        seen.append(hooked)

    if register == 'everywhere':
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = getattr(module, register)(hook)
    x = torch.randn(2, 5, 32, device=DEVICE, requires_grad=True)
    block(x)[0].sum().backward()
    assert module in seen and not calls
    handle.remove()
    block(x)
    assert len(calls) == 3


@pytest.mark.parametrize('case', ['weights', 'mask', 'eager', 'auto', 'float64', 'torch.func'])
def test_where_the_reference_runs(case, monkeypatch):
    calls = fused_calls(monkeypatch)
    block, eager = blocks()
    x = torch.randn(2, 5, 32, device=DEVICE)
    if case == 'weights':
        block(x, return_weights=True)
    elif case == 'mask':
        block(x, head_mask=torch.ones(2, device=DEVICE))
    elif case == 'eager':
        eager(x)
    elif case == 'auto':
        block.attn.backend = 'auto'
        block(x)
        assert len(calls) == (3 if CUDA else 0)
        return
    elif case == 'float64':
        block.double()(x.double())
    else:
        torch.func.grad(lambda t: block(t)[0].sum())(x)
    assert not calls


@pytest.mark.parametrize('options', [dict(), dict(init_values=0.1, drop_path=0.5)])
def test_compiled(options):
    torch._dynamo.reset()
    x = torch.randn(8, 5, 32, device=DEVICE)
    graphs, results = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for block in blocks(**options):
        torch.manual_seed(0)
        call = torch.compile(block, fullgraph=True, backend=backend) if not results else block
        leaf = x.clone().requires_grad_()
        out = call(leaf)[0]
        out.square().sum().backward()
        results.append([out, leaf.grad, *gradients(block).values()])
    assert worst(*results) <= 5e-6
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes].count('beit_plugin.residual.default') == 3


def test_compiled_with_a_hook():
    """(Of one that is registered after compiling torch.compile itself takes no notice.)"""
    torch._dynamo.reset()
    fused, eager = blocks()
    for block in (fused, eager):
        block.norm2.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 5, 32, device=DEVICE)
    assert relative_error(torch.compile(fused, backend='aot_eager')(x)[0], eager(x)[0]) <= 5e-6


def test_exported(monkeypatch):
    """The program has the plain operations."""
    calls = fused_calls(monkeypatch)
    block, eager = blocks(init_values=0.1)
    x = torch.randn(2, 5, 32, device=DEVICE)
    program = torch.export.export(block, (x,), strict=False)  # torch 2.6 cannot tell a strict one from torch.compile
    assert relative_error(program.module()(x)[0], eager(x)[0]) <= 5e-6
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes) and not calls


def test_why_triton_cannot_run(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    kernel_support._refusal.cache_clear()
    assert 'need a GPU of compute capability 8.0 or later, and the tensors are on cpu' in kernel_support.triton_refusal(
        torch.device('cpu')
    )
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert kernel_support.triton_refusal(torch.device('cpu')) is None
    kernel_support._refusal.cache_clear()
    monkeypatch.setattr(kernel_support, 'find_spec', lambda name: None)
    assert kernel_support.triton_refusal(torch.device('cpu')) == 'Triton is not installed'
    kernel_support._refusal.cache_clear()


def test_triton_that_does_not_start(monkeypatch):
    """For want of a compiler, say."""
    import triton

    def fails():
        raise RuntimeError('Failed to find C compiler')

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=fails))
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime, 'driver', driver)
    kernel_support._refusal.cache_clear()
    refusal = kernel_support.triton_refusal(torch.device('cuda', 0))
    assert refusal == 'Triton does not start on this machine (RuntimeError: Failed to find C compiler)'
    kernel_support._refusal.cache_clear()
