import math

import pytest
import torch
from helpers import relative_error

from beit_plugin.models.attention import ATTENTION_BACKENDS, Attention, attention, eager_attention
from beit_plugin.models.relative_position import bias_geometry, gather_bias

CPU = torch.device('cpu')
# B, K, N, D: one token, odd, not a multiple of 8, published head dim
SHAPES = [(1, 1, 1, 4), (2, 3, 7, 5), (3, 2, 25, 64), (1, 4, 65, 32)]


def inputs(shape, dtype=torch.float64):
    B, K, N, D = shape
    q, k, v = (torch.randn(B, K, N, D, dtype=dtype) for _ in range(3))
    return q, k, v, 2 * torch.randn(K, N, N, dtype=dtype)


def attend(backend, *args):
    return eager_attention(*args)[0] if backend == 'eager' else attention(*args)


def loops(q, k, v, bias):
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = torch.stack([q[b, head, i] @ key / math.sqrt(q.shape[3]) for key in k[b, head]])
                weights = (scores + bias[head, i]).exp()
                out[b, head, i] = (weights[:, None] * v[b, head]).sum(0) / weights.sum()
    return out


def test_reference_is_the_formula():
    args = inputs((2, 2, 6, 3))
    torch.testing.assert_close(eager_attention(*args)[0], loops(*args))


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('backend', ['eager', 'sdpa'])
@pytest.mark.parametrize('shape', SHAPES)
# rounding of the inputs alone is 2**-9 in bfloat16 and 2**-12 in float16
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_backends_against_float64(shape, backend, with_bias, dtype, tolerance):
    args = inputs(shape)
    bias = args[3] if with_bias else None
    exact = [x.to(dtype).double().requires_grad_() for x in args[:3]]
    exact_bias = bias.to(dtype).double().requires_grad_() if with_bias else None
    low = [x.to(dtype).requires_grad_() for x in args[:3]]
    low_bias = bias.to(dtype).requires_grad_() if with_bias else None
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)

    expected = eager_attention(*exact, exact_bias)[0]
    expected.backward(upstream.double())
    got = attend(backend, *low, low_bias)
    got.backward(upstream)
    assert got.dtype == dtype
    assert relative_error(got, expected) <= tolerance
    pairs = list(zip((*low, low_bias), (*exact, exact_bias), strict=True))[: 4 if with_bias else 3]
    largest = max(theirs.grad.abs().max() for _, theirs in pairs)
    for ours, theirs in pairs:  # of one token alone, the gradients of query, key and bias are 0
        assert (ours.grad.double() - theirs.grad).abs().max() <= 2 * tolerance * largest


def test_float32_bias_with_half_queries():
    q, k, v, bias = inputs((2, 2, 9, 8), torch.float32)
    expected = attention(q, k, v, bias)
    for backend in ('eager', 'sdpa'):
        got = attend(backend, q.bfloat16(), k.bfloat16(), v.bfloat16(), bias)
        assert got.dtype == torch.bfloat16 and relative_error(got, expected) < 3e-2


def test_weights_sum_to_one_and_give_the_output():
    q, k, v, bias = inputs((2, 3, 7, 5))
    out, weights = eager_attention(q, k, v, bias)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    torch.testing.assert_close(weights @ v, out)


def test_head_mask_scales_each_head():
    q, k, v, bias = inputs((2, 3, 7, 5))
    mask = torch.tensor([0.0, 1.0, 0.5])
    out, weights = eager_attention(q, k, v, bias, head_mask=mask)
    plain, plain_weights = eager_attention(q, k, v, bias)
    torch.testing.assert_close(out, plain * mask.double()[:, None, None])
    torch.testing.assert_close(weights, plain_weights * mask.double()[:, None, None])


def test_large_scores_do_not_overflow_in_half_precision():
    q, k, v, bias = inputs((1, 1, 9, 8), torch.float32)
    args = [x.half() for x in (40 * q, 40 * k, v, bias)]
    for backend in ('eager', 'sdpa'):
        assert attend(backend, *args).isfinite().all()


def module(**options):
    layer = Attention(**{'dim': 12, 'num_heads': 3, 'window_size': (2, 3), **options})
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


GEOMETRY = bias_geometry((2, 3), (2, 3), 'geometric', CPU)


def test_module_backends_agree_and_weights_come_on_request():
    x = torch.randn(2, 7, 12)
    reference = module(backend='eager')
    expected, nothing = reference(x, GEOMETRY)
    assert nothing is None
    for backend in ATTENTION_BACKENDS:
        layer = module(backend=backend)
        layer.load_state_dict(reference.state_dict())
        assert relative_error(layer(x, GEOMETRY)[0], expected) < 1e-6
        out, weights = layer(x, GEOMETRY, return_weights=True)
        assert weights.shape == (2, 3, 7, 7) and relative_error(out, expected) < 1e-6


def test_own_and_shared_bias_add_up():
    layer, x = module(), torch.randn(2, 7, 12)
    shared = torch.randn(3, 7, 7)
    both = layer(x, GEOMETRY, shared)[0]
    layer.relative_position_bias_table.data.zero_()
    only_shared = layer(x, GEOMETRY, shared)[0]
    plain = module(window_size=None)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if 'table' not in n})
    assert (both - only_shared).abs().max() > 1e-2
    torch.testing.assert_close(plain(x, None, shared)[0], only_shared)
    assert (plain(x)[0] - only_shared).abs().max() > 1e-2


def test_key_has_no_bias_and_qkv_bias_is_optional():
    assert {n for n, _ in module().named_parameters()} == {
        'q_bias', 'v_bias', 'qkv.weight', 'proj.weight', 'proj.bias', 'relative_position_bias_table'
    }  # fmt: skip
    without = module(qkv_bias=False)
    layer = module()
    layer.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(2, 7, 12)
    layer.q_bias.data.zero_()
    layer.v_bias.data.zero_()
    torch.testing.assert_close(layer(x, GEOMETRY), without(x, GEOMETRY))


@pytest.mark.parametrize('backend', [name for name in ATTENTION_BACKENDS if name != 'fused'])
@pytest.mark.parametrize('option', ['attn_drop', 'proj_drop'])
def test_dropout_only_in_training_and_repeatable(backend, option):
    layer, x = module(backend=backend, **{option: 0.5}), torch.randn(2, 7, 12)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, GEOMETRY)[0]

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    layer.eval()
    assert torch.equal(run(0), run(1))


def test_weights_are_returned_after_dropout():
    layer = module(attn_drop=0.5)
    weights = layer(torch.randn(2, 7, 12), GEOMETRY, return_weights=True)[1]
    assert 0.2 < (weights == 0).float().mean() < 0.8


def test_error_sentences():
    with pytest.raises(ValueError, match='embed_dim must be a multiple of num_heads, got 10 and 3 heads'):
        Attention(10, 3)
    with pytest.raises(ValueError, match="attn_backend must be one of auto, eager, sdpa, fused, got 'flash'"):
        Attention(12, 3, backend='flash')


class TestBiasOfInference:
    """On the CPU the bias is gathered once, and anew whenever the table or the grid is another."""

    def setup_method(self):
        self.module = Attention(16, 2, window_size=(3, 4))
        torch.nn.init.normal_(self.module.relative_position_bias_table)

    def run(self, grid=(3, 4)):
        x = torch.ones(1, 1 + grid[0] * grid[1], 16).cumsum(1)
        return self.module(x, bias_geometry((3, 4), grid, 'geometric', CPU))[0]

    def gathers(self, monkeypatch):
        counted = []
        monkeypatch.setattr(
            'beit_plugin.models.relative_position.gather_bias', lambda *args: counted.append(1) or gather_bias(*args)
        )
        return counted

    def test_once(self, monkeypatch):
        counted = self.gathers(monkeypatch)
        with torch.no_grad():
            expected = self.run()
            assert torch.equal(self.run(), expected) and len(counted) == 1
            self.run((2, 2))
            assert torch.equal(self.run(), expected) and len(counted) == 3
        self.run().sum().backward()
        assert len(counted) == 4 and self.module.relative_position_bias_table.grad.any()

    @pytest.mark.parametrize('how', ['in place', 'data', 'replaced', 'dtype'])
    def test_another_table(self, how, monkeypatch):
        with torch.no_grad():
            before, table = self.run(), self.module.relative_position_bias_table
            if how == 'in place':
                table.mul_(-1)
            elif how == 'data':
                table.data.copy_(-table.data)  # as trainers swap in averaged weights
            elif how == 'replaced':
                self.module.relative_position_bias_table = torch.nn.Parameter(-table)
            else:
                table.mul_(-1)
                self.module.double()
                x = torch.ones(1, 13, 16, dtype=torch.float64).cumsum(1)
                self.module(x, bias_geometry((3, 4), (3, 4), 'geometric', CPU))
                self.module.float()
            changed = self.run()
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(changed, self.run().detach())  # with gradients it is gathered in any case

    def test_large_ones_are_not_kept(self, monkeypatch):
        monkeypatch.setattr('beit_plugin.models.relative_position.CACHED_BYTES', 100)
        counted = self.gathers(monkeypatch)
        with torch.no_grad():
            self.run(), self.run()
        assert len(counted) == 2

    def test_tensors_without_values_are_not_kept(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        def run(x):
            return module(x, bias_geometry((5, 7), (6, 9), 'geometric', CPU))[0]

        module = Attention(16, 2, window_size=(5, 7)).requires_grad_(False)
        x = torch.randn(1, 55, 16)
        with torch.no_grad(), FakeTensorMode() as mode:
            state = {name: mode.from_tensor(value) for name, value in module.named_parameters()}
            geometry = bias_geometry((5, 7), (6, 9), 'geometric', CPU)
            torch.func.functional_call(module, state, (torch.empty(1, 55, 16), geometry))
        assert run(x).isfinite().all() and type(run(x)) is torch.Tensor

    def test_is_no_part_of_the_module(self):
        import copy
        import gc
        import pickle

        from beit_plugin.models.relative_position import _BIAS_CACHE

        size = len(pickle.dumps(self.module))
        with torch.inference_mode():
            self.run()
        assert len(pickle.dumps(self.module)) == size and copy.deepcopy(self.module) not in _BIAS_CACHE
        held = len(_BIAS_CACHE)
        self.module = None
        gc.collect()
        assert len(_BIAS_CACHE) < held
