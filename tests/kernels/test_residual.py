"""Fused residual sums and LayerNorm against float64: on the GPU, or in Triton's interpreter at small sizes.

The interpreter rounds to bfloat16 towards zero, unlike a GPU, so on the CPU half precision is float16.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, worst
from torch.utils._python_dispatch import TorchDispatchMode

from beit_plugin.kernels import residual_ops
from beit_plugin.kernels.residual_ops import add_norm, layer_norm, scaled_add

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
HALF = torch.bfloat16 if CUDA else torch.float16
# float32: order of the sums; half precision: rounding of the results, half a unit in the last place of the largest one
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, **({torch.bfloat16: 4e-3} if CUDA else {})}
SHAPES = [(1, 1, 16), (1, 7, 192), (2, 65, 200), (3, 5, 768)]  # rows 1, 7, 130, 15
if CUDA:
    SHAPES += [(128, 197, 768), (16, 577, 1024), (33, 1025, 384), (2, 50, 4096), (7, 300, 1408)]
EPS = 1e-5
NAMES = ('x', 'y', 'gamma', 'weight', 'bias')


def inputs(shape, dtype=torch.float32, dtype_y=None, gamma=True, keep=True):
    B, _, C = shape
    generator = torch.Generator().manual_seed(torch.seed())  # fresh ones in each run

    def randn(*size):
        return torch.randn(*size, generator=generator).to(DEVICE)

    return dict(
        x=(randn(*shape) + 0.5).to(dtype),
        y=(2 * randn(*shape)).to(dtype_y or dtype),
        gamma=randn(C) if gamma else None,
        keep=torch.tensor([1 / 0.7, 0.0, 1 / 0.7], device=DEVICE).repeat(B // 3 + 1)[:B] if keep else None,
        weight=1 + randn(C) / 2,
        bias=randn(C),
        grads=tuple(randn(*shape).to(dtype) for _ in range(2)),
    )


def expected_sum(x, y, gamma, keep):
    y = y if gamma is None else y * gamma
    return x + (y if keep is None else y * keep[:, None, None])


def reference(stored, x, y, gamma, keep, weight, bias, grads):
    """Sum, normed and gradients in float64; the norm is that of the sum as it was stored."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, y, gamma, weight, bias)]
    total = expected_sum(*leaves[:3], None if keep is None else keep.double())
    read = total + (stored.double() - total).detach()
    normed = F.layer_norm(read, read.shape[-1:], *leaves[3:], EPS)
    torch.autograd.backward((total, normed), [grad.double() for grad in grads])
    return [total, normed, *(leaf.grad for leaf in leaves if leaf is not None)]


def ours(x, y, gamma, keep, weight, bias, grads, wanted=NAMES):
    leaves = dict(zip(NAMES, (x, y, gamma, weight, bias), strict=True))
    leaves = {n: None if t is None else t.detach().requires_grad_(n in wanted) for n, t in leaves.items()}
    got = add_norm(leaves['x'], leaves['y'], leaves['gamma'], keep, leaves['weight'], leaves['bias'], EPS)
    torch.autograd.backward(got, grads)
    return [*got, *(leaf.grad for leaf in leaves.values() if leaf is not None)]


def same_bits(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True) if a is not None)


@pytest.mark.parametrize('gamma, keep', [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES)
def test_sum_norm_and_gradients(shape, dtype, gamma, keep):
    case = inputs(shape, dtype, gamma=gamma, keep=keep)
    got = ours(**case)
    assert {t.dtype for t in got[:4]} == {dtype} and {t.dtype for t in got[4:]} == {torch.float32}
    assert worst(got, reference(got[0], **case)) <= TOLERANCE[dtype]


@pytest.mark.parametrize('dtype, dtype_y', [(torch.float32, HALF), (HALF, torch.float32)])
@pytest.mark.parametrize('scaled', [True, False])
def test_branch_of_another_dtype(dtype, dtype_y, scaled):
    case = inputs((2, 9, 48), dtype, dtype_y, gamma=scaled, keep=scaled)
    got = ours(**case)
    expected = reference(got[0], **case)
    assert got[0].dtype == dtype and got[3].dtype == dtype_y
    assert relative_error(got[0], expected[0]) <= TOLERANCE[dtype]
    assert worst(got, expected) <= TOLERANCE[HALF]


@pytest.mark.parametrize('wanted', [NAMES[:1], NAMES[1:2], NAMES[2:3], NAMES[3:4], NAMES[4:], NAMES[:2], NAMES[1:4]])
@pytest.mark.parametrize('scaled', [True, False])
def test_gradients_that_are_not_wanted(wanted, scaled):
    """They are left out, and the others are the same."""
    case = inputs((2, 9, 48), gamma=scaled, keep=scaled)
    if not scaled and wanted == ('gamma',):
        return
    got, expected = ours(**case, wanted=wanted), ours(**case)
    names = [name for name in NAMES if scaled or name != 'gamma']
    assert [grad is not None for grad in got[2:]] == [name in wanted for name in names]
    assert same_bits(got, expected)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', SHAPES)
def test_the_parts(shape, dtype):
    """The norm alone has the bits of the norm of a sum, and the sum alone those of the sum."""
    case = inputs(shape, dtype)
    x, y, gamma, keep, weight, bias, (grad, _) = case.values()
    total, normed = add_norm(x, y, gamma, keep, weight, bias, EPS)
    assert torch.equal(scaled_add(x, y, gamma, keep), total)
    assert torch.equal(layer_norm(total, weight, bias, EPS), normed)

    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = layer_norm(*leaves, EPS)
    got = (out, *torch.autograd.grad(out, leaves, grad))
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    out = F.layer_norm(leaves[0], x.shape[-1:], leaves[1], leaves[2], EPS)
    assert worst(got, (out, *torch.autograd.grad(out, leaves, grad.double()))) <= TOLERANCE[dtype]

    leaves = [t.detach().requires_grad_() for t in (x, y, gamma)]
    got = torch.autograd.grad(scaled_add(*leaves, keep), leaves, grad)
    assert torch.equal(got[0], grad)
    leaves = [t.detach().double().requires_grad_() for t in (x, y, gamma)]
    assert worst(got, torch.autograd.grad(expected_sum(*leaves, keep), leaves, grad.double())) <= TOLERANCE[dtype]


@pytest.mark.parametrize('used', [0, 1])
def test_one_of_the_two_results_used(used):
    case = inputs((2, 9, 48))
    grads = list(case['grads'])
    grads[1 - used] = torch.zeros_like(grads[used])
    expected = ours(**{**case, 'grads': grads})[2:]
    x, y, gamma, keep, weight, bias, _ = case.values()
    leaves = [t.detach().requires_grad_() for t in (x, y, gamma, weight, bias)]
    got = add_norm(*leaves[:3], keep, *leaves[3:], EPS)[used]
    got = torch.autograd.grad(got, leaves, grads[used], allow_unused=True)
    assert worst(got, expected) <= 1e-6
    assert [grad is None for grad in got] == [False] * 3 + [used == 0] * 2


def test_dtype_of_the_norm_and_of_the_parameters():
    x, y, gamma, keep, weight, bias, _ = inputs((2, 9, 48)).values()
    total, normed = add_norm(x, y, gamma, keep, weight, bias, EPS, torch.float16)
    expected = layer_norm(total, weight, bias, EPS)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.float16)
    assert torch.allclose(normed.float(), expected, rtol=2**-10, atol=1e-6)  # rounded once
    leaves = [t.half().requires_grad_() for t in (gamma, weight, bias)]
    total, normed = add_norm(x, y, leaves[0], keep, *leaves[1:], EPS, torch.float16)
    (total.sum() + normed.sum()).backward()
    assert all(leaf.grad.dtype == torch.float16 for leaf in leaves)


def test_the_same_bits_twice():
    case = inputs(SHAPES[-1], torch.float16)
    assert same_bits(ours(**case), ours(**case))


def test_more_rows_than_programs(monkeypatch):
    case = inputs((2, 65, 200))
    monkeypatch.setattr(residual_ops, 'MAX_PROGRAMS', 3)
    got = ours(**case)
    assert worst(got, reference(got[0], **case)) <= TOLERANCE[torch.float32]


def test_every_element_is_written(monkeypatch):
    """New memory is filled with NaN first."""
    case = inputs((2, 65, 200))
    expected = ours(**case)

    def poisoned(make):
        return staticmethod(lambda *args, **kwargs: make(*args, **kwargs).fill_(float('nan')))

    class Torch:
        empty, empty_like = poisoned(torch.empty), poisoned(torch.empty_like)

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(residual_ops, 'torch', Torch())
    assert same_bits(ours(**case), expected)


def test_strided_inputs():
    case = inputs((2, 9, 48))

    def strided(t):
        return torch.stack((t, torch.full_like(t, float('nan'))), -1)[..., 0]

    twisted = {n: tuple(map(strided, t)) if n == 'grads' else strided(t) for n, t in case.items()}
    assert not twisted['x'].is_contiguous()
    assert same_bits(ours(**twisted), ours(**case))
    x, weight, bias = (twisted[n].detach().requires_grad_() for n in ('x', 'weight', 'bias'))
    layer_norm(x.transpose(0, 1), weight, bias, EPS).sum().backward()  # a gradient of stride 0
    other = case['x'].clone().requires_grad_()
    layer_norm(other, case['weight'], case['bias'], EPS).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_empty_batch():
    assert [t.shape[0] for t in ours(**inputs((0, 9, 48)))[:4]] == [0] * 4
    assert not any(grad.any() for grad in ours(**inputs((0, 9, 48)))[4:])


@pytest.mark.skipif(not CUDA, reason='needs 16 GB on a GPU')
def test_more_elements_than_an_int32_counts():
    x = torch.randn(3, 1024, 1024, device=DEVICE, dtype=torch.bfloat16).repeat(1, 700, 1)  # 2.2e9
    weight, bias = torch.randn(2, 1024, device=DEVICE)
    keep = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    total, normed = add_norm(x, x, None, keep, weight, bias, EPS)
    for b, factor in enumerate((2, 1, 3)):
        assert torch.equal(total[b, -1024:], x[b, :1024] * factor)
    assert torch.equal(normed[2, -1024:], layer_norm(total[2, :1024], weight, bias, EPS))


def test_shapes_without_running():
    """What tracing sees."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 9, 48, dtype=torch.bfloat16, requires_grad=True)
        gamma, weight, bias = (torch.empty(48, requires_grad=True) for _ in range(3))
        total, normed = add_norm(x, x * 2, gamma, torch.empty(2), weight, bias, EPS, torch.float16)
        assert (total.shape, total.dtype) == (x.shape, torch.bfloat16)
        assert (normed.shape, normed.dtype) == (x.shape, torch.float16)
        (total.sum() + normed.sum() + layer_norm(x, weight, bias, EPS).sum()).backward()
        assert x.grad.dtype == torch.bfloat16 and gamma.grad.shape == weight.grad.shape == bias.grad.shape == (48,)


@pytest.mark.parametrize('left_out', [(), ('gamma', 'keep'), ('y', 'gamma', 'keep'), ('weight', 'bias')])
def test_registration(left_out):
    case = inputs((2, 3, 16))
    arguments = [
        None if n in left_out else case[n].requires_grad_(n != 'keep')
        for n in ('x', 'y', 'gamma', 'keep', 'weight', 'bias')
    ]
    torch.library.opcheck(torch.ops.beit_plugin.residual.default, (*arguments, EPS, torch.float32))


def test_arguments_that_do_not_fit():
    x, y, gamma, keep, weight, bias, _ = inputs((2, 9, 48)).values()
    for changed, sentence in (
        (dict(x=x.double()), r'with C up to 4096, got torch.float64 of shape \(2, 9, 48\)'),
        (dict(x=x[0, 0]), r'of shape \(48,\)'),
        (dict(x=x.new_empty(1, 1, 4097)), r'of shape \(1, 1, 4097\)'),
        (dict(y=y[:1]), r'expected y of shape \(2, 9, 48\), got \(1, 9, 48\)'),
        (dict(keep=keep[:, None, None]), r'expected keep of shape \(2,\), got \(2, 1, 1\)'),
        (dict(gamma=gamma[:1]), r'expected gamma of shape \(48,\), got \(1,\)'),
        (dict(weight=weight[:1]), r'expected weight of shape \(48,\)'),
    ):
        arguments = {**dict(x=x, y=y, gamma=gamma, keep=keep, weight=weight, bias=bias), **changed}
        with pytest.raises(ValueError, match=sentence):
            add_norm(**arguments, eps=EPS)


def test_the_operator_and_the_direct_way():
    """A dispatch mode, which wants to see operators, gets them; results and gradients are the same bits."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    seen = set()
    x, y, gamma, keep, weight, bias, grads = inputs((2, 9, 48)).values()
    found = []
    for mode in (nullcontext(), Watch()):
        leaves = [t.detach().requires_grad_() for t in (x, y, gamma, weight, bias)]
        with mode:
            total, normed = add_norm(*leaves[:3], keep, *leaves[3:], EPS)
            torch.autograd.backward((total, normed), grads)
        with torch.no_grad(), mode:
            alone = [layer_norm(x, weight, bias, EPS), scaled_add(x, y, gamma, keep)]
        found.append([total, normed, *alone, *(leaf.grad for leaf in leaves)])
    assert {'beit_plugin::residual', 'beit_plugin::residual_backward'} <= seen
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operators_compile():
    x, y, gamma, keep, weight, bias, _ = inputs((2, 9, 48)).values()
    leaves = [t.requires_grad_() for t in (x, y, gamma, weight, bias)]

    def function(x, y, gamma, weight, bias):
        total, normed = add_norm(x, y, gamma, keep, weight, bias, EPS)
        return (scaled_add(total, normed, gamma, None) * layer_norm(normed, weight, bias, EPS)).sum()

    got = torch.autograd.grad(torch.compile(function, fullgraph=True, backend='aot_eager')(*leaves), leaves)
    assert worst(got, torch.autograd.grad(function(*leaves), leaves)) <= 2e-6
