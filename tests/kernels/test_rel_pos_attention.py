"""The Triton kernels against the eager reference in float64: on the GPU, or in Triton's interpreter at small sizes.

The interpreter computes bfloat16 from its bits, wrongly, so on the CPU half precision is float16.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from beit_plugin.kernels.ops import attend, fold, lengthen_table, reduce_to_table
from beit_plugin.models.attention import eager_attention
from beit_plugin.models.relative_position import relative_position_index

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
HALF = torch.bfloat16 if CUDA else torch.float16
# rounding of the weights and of the scores' gradient to the dtype of the matrix units; float32 has neither
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL = [((3, 5), 2), ((1, 7), 1), ((7, 1), 1), ((8, 8), 2), ((9, 15), 2)]  # N = 16, 8, 8, 65, 136
LARGE = [((14, 14), 8), ((24, 24), 4), ((32, 32), 4), ((40, 40), 4), ((24, 66), 4), ((64, 64), 2), ((96, 96), 1)]


def inputs(grid, batch, heads, head_dim, dtype, prefix=1):
    generator = torch.Generator().manual_seed(torch.seed())  # fresh ones in each run
    h, w = grid
    n = prefix + h * w
    qkv = torch.randn(batch, n, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)
    table = torch.randn((2 * h - 1) * (2 * w - 1) + 3, heads, generator=generator).to(DEVICE)
    grad = torch.randn(batch, n, heads, head_dim, generator=generator).to(DEVICE, dtype)
    return qkv, table, grad


def bias_of(table, grid, prefix=1):
    index = relative_position_index(*grid, device=table.device)
    return table[index if prefix else index[1:, 1:]].permute(2, 0, 1)


def cls_last(pairs, prefix):
    """In the order of the kernels."""
    return pairs.roll((-prefix, -prefix), (-2, -1))


def reference(qkv, table, grad, grid, prefix=1):
    """Output and gradients in float64, one image at a time."""
    table = table.double().requires_grad_()
    outs, grads = [], []
    for image, g in zip(qkv.double(), grad.double(), strict=True):
        image = image[None].requires_grad_()
        q, k, v = image.permute(2, 0, 3, 1, 4).unbind(0)
        out = eager_attention(q, k, v, bias_of(table, grid, prefix))[0].transpose(1, 2)
        out.backward(g[None])
        outs.append(out.detach())
        grads.append(image.grad)
    return torch.cat(outs), torch.cat(grads), table.grad


def ours(qkv, table, grad, grid, prefix=1):
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = attend(qkv, table, grid, prefix)
    out.backward(grad)
    return out.detach(), qkv.grad, table.grad


@pytest.mark.parametrize('dtype', [torch.float32, HALF])
@pytest.mark.parametrize('grid, batch', LARGE if CUDA else SMALL)
def test_output_and_gradients(grid, batch, dtype):
    heads = 12 if CUDA else 2
    arguments = inputs(grid, batch, heads, 64 if CUDA else 32, dtype)
    got, expected = ours(*arguments, grid), reference(*arguments, grid)
    names = ('out', 'qkv', 'table')
    errors = {name: relative_error(a, b) for name, a, b in zip(names, got, expected, strict=True)}
    for i, name in enumerate('qkv'):
        errors[f'd{name}'] = relative_error(got[1][:, :, i], expected[1][:, :, i])
    # the sums of 9217 tokens in float32: 5.3e-6 seen
    assert max(errors.values()) <= (1e-5 if (dtype, grid) == (torch.float32, (96, 96)) else TOLERANCE[dtype]), errors


@pytest.mark.parametrize('head_dim', [32, 64, 80, 96, 128])
def test_head_dims(head_dim):
    grid = (20, 30) if CUDA else (3, 4)
    arguments = inputs(grid, 2, 3, head_dim, HALF)
    got, expected = ours(*arguments, grid), reference(*arguments, grid)
    assert max(map(relative_error, got, expected)) <= TOLERANCE[HALF]


def test_without_cls():
    grid = (16, 24) if CUDA else (3, 5)
    arguments = inputs(grid, 2, 2, 32, torch.float32, prefix=0)
    got, expected = ours(*arguments, grid, 0), reference(*arguments, grid, 0)
    assert max(map(relative_error, got, expected)) <= TOLERANCE[torch.float32]
    assert not got[2][-3:].any()  # the rows of [CLS] have no gradient


def test_projection_that_is_a_view():
    """Strided in the batch and in the tokens; dense within a token, or not, and then copied."""
    grid = (3, 4)
    qkv, table, grad = inputs(grid, 2, 2, 32, torch.float32)
    expected = ours(qkv, table, grad, grid)
    wide = torch.randn(4, 20, 3, 2, 40, device=DEVICE)
    for view in (wide[::2, 2:15, :, :, :32], wide[::2, 2:15, :, :, 4:36]):
        view.copy_(qkv)
        got = ours(view, table, grad, grid)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    padded = torch.randn(4, 20, 192, device=DEVICE)[1:3, 3:16].unflatten(-1, (3, 2, 32))
    padded.copy_(qkv)
    assert padded.stride(2) == 64 and not padded.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(ours(padded, table, grad, grid), expected, strict=True))


def test_the_same_bits_twice():
    grid, dtype = ((40, 40), HALF) if CUDA else ((5, 9), torch.float16)
    arguments = inputs(grid, 4, 2, 32, dtype)
    first, second = ours(*arguments, grid), ours(*arguments, grid)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operator_and_the_direct_way():
    """A dispatch mode, which wants to see operators, gets them; results and gradients are the same bits."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    seen = set()
    arguments = inputs((3, 4), 2, 2, 32, torch.float32)
    expected = ours(*arguments, (3, 4))
    with Watch():
        got = ours(*arguments, (3, 4))
    assert {'beit_plugin::rel_pos_attention', 'beit_plugin::rel_pos_attention_backward'} <= seen
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.no_grad():
        assert torch.equal(attend(*arguments[:2], (3, 4)), expected[0])


def test_no_images():
    _, table, _ = inputs((3, 5), 1, 2, 32, torch.float32)
    qkv = torch.zeros(0, 16, 3, 2, 32, device=DEVICE, requires_grad=True)
    out = attend(qkv, table.requires_grad_(), (3, 5))
    out.sum().backward()
    assert out.shape == (0, 16, 2, 32) and qkv.grad.shape == qkv.shape and not table.grad.any()


def test_gradients_of_gradients_are_refused():
    qkv, table, _ = inputs((3, 4), 2, 2, 32, torch.float32)
    qkv.requires_grad_()
    (grad,) = torch.autograd.grad(attend(qkv, table, (3, 4)).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_batched_gradients():
    qkv, table, _ = inputs((3, 4), 1, 2, 32, torch.float32)
    out = attend(qkv.requires_grad_(), table, (3, 4))
    grads = torch.randn(2, *out.shape, device=DEVICE)
    (got,) = torch.autograd.grad(out, qkv, grads, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(out, qkv, grad, retain_graph=True)[0] for grad in grads])
    assert relative_error(got, expected) <= 1e-6


def test_tangents_are_refused():
    """PyTorch itself would leave them out without a word."""
    qkv, table, _ = inputs((3, 4), 1, 2, 32, torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv, torch.ones_like(qkv))
        with pytest.raises(NotImplementedError, match='no forward-mode derivative'):
            attend(dual, table, (3, 4))
        assert attend(qkv, table, (3, 4)).isfinite().all()


def test_operations_are_counted():
    """As PyTorch counts its own attention, whatever is computed a second time."""
    qkv, table, grad = inputs((3, 4), 2, 2, 32, torch.float32)
    with FlopCounterMode(display=False) as counter:
        attend(qkv.requires_grad_(), table, (3, 4)).backward(grad)
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 2 * 13 * 13 * 32)


def test_a_grid_without_rows():
    with pytest.raises(ValueError, match='expected a grid of at least 1x1'):
        attend(torch.zeros(1, 1, 3, 2, 16, device=DEVICE), torch.zeros(4, 2, device=DEVICE), (0, 1))


def test_every_element_is_written(monkeypatch):
    """New memory is filled with NaN first."""
    grid = (4, 7)
    arguments = inputs(grid, 3, 2, 32, torch.float32)
    expected = ours(*arguments, grid)
    from beit_plugin.kernels import ops

    def poisoned(make):
        def new(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float('nan')) if made.is_floating_point() else made

        return new

    class Torch:
        empty, empty_like = staticmethod(poisoned(torch.empty)), staticmethod(poisoned(torch.empty_like))

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(ops, 'torch', Torch())
    got = ours(*arguments, grid)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize('programs', [1, 10_000])
def test_splitting_the_batch(programs, monkeypatch):
    """In place of the bias, and in several parts that are added up."""
    from beit_plugin.kernels import ops

    monkeypatch.setattr(ops, 'PROGRAMS', programs)
    grid = (3, 5)
    arguments = inputs(grid, 5, 2, 32, torch.float32)
    got, expected = ours(*arguments, grid), reference(*arguments, grid)
    assert max(map(relative_error, got, expected)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize('grid', [(3, 5), (1, 1), (6, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize('prefix', [0, 1])
def test_lengthened_table(grid, prefix):
    """A difference of places finds the bias of every pair, and no other; rows hold those of neighbours, too."""
    h, w = grid
    n = prefix + h * w
    table = torch.randn((2 * h - 1) * (2 * w - 1) + 3, 2, device=DEVICE)
    places, offsets = lengthen_table(table, h, w, prefix)
    key, query = offsets[:, : n + n % 2] // 8
    row = query[:, None] - key
    assert (offsets % 8 == 0).all() and row.min() >= 0 and row.max() < places.shape[2]
    expected = cls_last(bias_of(table, grid, prefix), prefix) / torch.tensor(2.0, device=DEVICE).log()
    assert torch.allclose(places[0, :, row[:n, :n], 0], expected)
    if w % 2 == 0:
        padded = F.pad(expected, (0, n % 2), value=float('-inf'))
        assert torch.allclose(places[0, :, row[:n, ::2]].flatten(2), padded)
        pairs = places[1, :, row[1::2, :n]].transpose(2, 3).flatten(1, 2)
        assert torch.allclose(pairs[:, :n], expected)
    behind = query[:n, None] - offsets[0, n + n % 2 :] // 8
    assert (places[0, :, behind] == float('-inf')).all()


@pytest.mark.parametrize('grid', [(3, 5), (1, 4), (9, 20), (33, 2), (20, 8)])
@pytest.mark.parametrize('prefix, splits', [(0, 1), (1, 3)])
def test_reduction_to_the_table(grid, prefix, splits, monkeypatch):
    from beit_plugin.kernels import ops

    h, w = grid
    n = h * w
    assert fold(n, w, 32, 16, 2).period >= n  # the cache holds all
    monkeypatch.setattr(ops, 'CACHE', 0)
    folding = fold(n, w, 32, 16, 2)
    assert (folding.period < n) == (grid in [(33, 2), (20, 8), (9, 20)])
    folded = torch.randn(splits, 2, folding.size, device=DEVICE)
    cls = torch.randn(2, 5, 2, device=DEVICE)
    grad = torch.zeros(2, n + prefix, n + prefix, dtype=torch.float64, device=DEVICE)
    rows = min(folding.period, n)
    whole = folded[:, :, : rows * folding.columns].unflatten(2, (rows, -1)).sum(0, dtype=torch.float64)
    grad[:, :rows, :n] = whole[..., :n]
    if folding.period < n:
        rest = folded[:, :, rows * folding.columns :].unflatten(2, (n - rows, -1))
        grad[:, rows:n, : folding.period] = rest.sum(0, dtype=torch.float64)
    table = torch.zeros((2 * h - 1) * (2 * w - 1) + 3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cls_last(bias_of(table, grid, prefix), prefix).backward(grad)
    by_patches, by_cls = cls.sum(1, dtype=torch.float64).unbind(1)
    expected = table.grad.clone()
    if prefix:
        expected[-3:] = torch.stack([-by_cls, by_patches, by_cls])
    assert relative_error(reduce_to_table(folded, cls, folding, h, w, prefix), expected) <= 1e-6


@pytest.mark.parametrize(
    ('grid', 'head_dim'), [((36, 4), 16), ((22, 8), 16), ((9, 16), 16), ((13, 12), 16), ((40, 8), 128)]
)
@pytest.mark.parametrize('prefix', [0, 1])
@pytest.mark.parametrize('programs', [1, 10_000])
def test_tiles_of_the_same_bias(grid, head_dim, prefix, programs, monkeypatch):
    """Tiles along a diagonal are added up, in one program and in several."""
    from beit_plugin.kernels import ops

    monkeypatch.setattr(ops, 'PROGRAMS', programs)
    monkeypatch.setattr(ops, 'CACHE', 0)
    h, w = grid
    assert (fold(h * w, w, 64, 64, 2).period < h * w) == (grid != (13, 12))
    arguments = inputs(grid, 3, 2, head_dim, torch.float32, prefix)
    got, expected = ours(*arguments, grid, prefix), reference(*arguments, grid, prefix)
    assert max(map(relative_error, got, expected)) <= TOLERANCE[torch.float32]
    assert prefix or not got[2][-3:].any()


def test_finite_differences_of_the_reference():
    grid = (2, 3)
    qkv, table, _ = inputs(grid, 2, 2, 4, torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    assert torch.autograd.gradcheck(
        lambda t: eager_attention(q, k, v, bias_of(t, grid))[0], table.double().requires_grad_(), fast_mode=False
    )


@pytest.mark.parametrize(
    ('shape', 'table', 'sentence'),
    [
        ((2, 12, 3, 2, 32), (45 + 3, 2), r'expected qkv of shape \(B, 16, 3, heads, head dim\) for a 3x5 grid'),
        ((2, 16, 2, 2, 32), (45 + 3, 2), r'got \(2, 16, 2, 2, 32\)'),
        ((2, 16, 3, 2, 32), (45, 2), r'expected a table of shape \(48, 2\) for a 3x5 grid, got \(45, 2\); resize'),
        ((2, 16, 3, 2, 32), (48, 3), r'expected a table of shape \(48, 2\)'),
        ((2, 16, 3, 2, 24), (48, 2), r'multiple of 16 up to 128, got torch.float32 and a head dim of 24'),
        ((2, 16, 3, 2, 144), (48, 2), r'got torch.float32 and a head dim of 144'),
    ],
)
def test_shapes_that_do_not_fit(shape, table, sentence):
    with pytest.raises(ValueError, match=sentence):
        attend(torch.zeros(shape, device=DEVICE), torch.zeros(table, device=DEVICE), (3, 5))


def test_another_dtype():
    with pytest.raises(ValueError, match=r'expected qkv in float16, bfloat16 or float32 .*got torch.float64'):
        attend(torch.zeros(2, 16, 3, 2, 32, device=DEVICE).double(), torch.zeros(48, 2, device=DEVICE), (3, 5))


def test_shapes_without_running():
    """What tracing sees."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        qkv = torch.empty(2, 16, 3, 2, 32, dtype=torch.bfloat16, requires_grad=True)
        table = torch.empty(48, 2, requires_grad=True)
        out = attend(qkv, table, (3, 5))
        assert out.shape == (2, 16, 2, 32) and out.dtype == torch.bfloat16
        out.sum().backward()
        assert qkv.grad.shape == qkv.shape and table.grad.dtype == torch.float32
