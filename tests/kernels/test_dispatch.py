"""Which backend attends: decided once for a forward, with the reason where a request cannot be served.

On the CPU a GPU is pretended: ``auto`` then takes the kernels, which run in Triton's interpreter.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, images, randomize, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_plugin import Beit
from beit_plugin.kernels import ops
from beit_plugin.models import attention as module
from beit_plugin.models import kernel_support, relative_position
from beit_plugin.models.attention import (
    Attention,
    attention,
    attention_dtype,
    choose_backend,
    eager_attention,
    fused_refusal,
)
from beit_plugin.models.kernel_support import triton_by_default, triton_refusal
from beit_plugin.models.relative_position import RelativePositionBias, bias_geometry, gather_bias, num_relative_distance

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
SIZES = {**TINY, 'embed_dim': 32, 'num_heads': 2, 'num_classes': 3}  # head dim 16
GPU = torch.device('cuda', 0)


@pytest.fixture
def compiled_kernels(monkeypatch):
    """As if the kernels were compiled for the device of the test."""
    monkeypatch.setattr(module, 'triton_by_default', lambda device: True)
    monkeypatch.setattr(module, 'triton_is_interpreted', lambda: False)


@pytest.fixture
def fused_calls(monkeypatch):
    calls, attend = [], ops.attend
    monkeypatch.setattr(ops, 'attend', lambda *args: calls.append(args[0].dtype) or attend(*args))
    return calls


@pytest.fixture
def driver(monkeypatch):
    """Triton not interpreted, and a driver that starts; sets what PyTorch says of the GPU."""
    import triton

    def answer(capability, hip=None):
        monkeypatch.setenv('TRITON_INTERPRET', '0')
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.version, 'hip', hip)
        starts = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
        monkeypatch.setattr(triton.runtime, 'driver', starts)
        kernel_support._refusal.cache_clear()

    yield answer
    kernel_support._refusal.cache_clear()


@pytest.mark.parametrize(
    ('capability', 'hip', 'sentence'),
    [
        ((7, 5), None, 'they need a GPU of compute capability 8.0 or later, and the tensors are on cuda:0'),
        ((8, 0), None, None),
        ((12, 1), None, None),
        ((9, 4), '7.1', 'they are written for NVIDIA GPUs, and this PyTorch is built for those of AMD'),
    ],
)
def test_gpus(capability, hip, sentence, driver):
    driver(capability, hip)
    assert triton_refusal(GPU) == sentence
    assert triton_by_default(GPU) and not triton_by_default(torch.device('cpu'))


def test_interpreter_only_on_request(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', 'True')  # Triton takes this, too
    for device in (GPU, torch.device('cpu')):
        assert triton_refusal(device) is None and not triton_by_default(device)
    assert 'the tensors are on meta' in triton_refusal(torch.device('meta'))
    assert fused_refusal(tokens(), 16, 0.0) is None
    assert fused_refusal(tokens(torch.bfloat16), 16, 0.0) == "Triton's interpreter cannot multiply bfloat16"


def layers(backend='auto', **options):
    return [Attention(32, 2, window_size=(3, 5), backend=backend, **options) for _ in range(2)]


class Subclass(torch.Tensor):
    pass


def tokens(dtype=torch.float16):
    return torch.zeros(1, 16, 32, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_auto_in_half_precision(dtype, compiled_kernels):
    assert choose_backend(layers(), tokens(dtype)) == 'fused'
    with torch.autocast(DEVICE, dtype):
        assert choose_backend(layers(), tokens(torch.float32)) == 'fused'
        assert choose_backend(layers(), tokens(torch.float64)) == 'sdpa'  # autocast leaves float64 alone
    for full in (torch.float32, torch.float64):
        assert choose_backend(layers(), tokens(full)) == 'sdpa'


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(attn_drop=0.1), 'sdpa'),
        (dict(backend='sdpa'), 'sdpa'),
        (dict(backend='eager'), 'eager'),
        (dict(num_heads=4), 'sdpa'),  # head dim 8
    ],
)
def test_what_auto_does_not_take(options, expected, compiled_kernels):
    made = [Attention(32, **{'num_heads': 2, **options}, window_size=(3, 5)) for _ in range(2)]
    assert choose_backend(made, tokens()) == expected
    assert choose_backend(made, tokens(), weights=True) == 'eager'


def test_auto_of_other_tensors_and_devices(compiled_kernels, monkeypatch):
    assert choose_backend(layers(), tokens().as_subclass(Subclass)) == 'sdpa'
    assert choose_backend([], tokens()) == 'sdpa'
    monkeypatch.setattr(module, 'triton_refusal', lambda device: 'Triton is not installed')
    assert choose_backend(layers(), tokens()) == 'sdpa'
    with pytest.raises(ValueError, match="'fused' cannot serve: Triton is not installed; use attn_backend='auto'"):
        choose_backend(layers('fused'), tokens())
    monkeypatch.undo()
    if not CUDA:
        assert choose_backend(layers(), tokens()) == 'sdpa'


def test_dropout_in_a_layer_behind_a_frozen_one(compiled_kernels):
    made = layers(attn_drop=0.1)
    made[0].eval()
    assert choose_backend(made, tokens()) == 'sdpa'
    made[1].eval()
    assert choose_backend(made, tokens()) == 'fused'


def models(**options):
    made = [randomize(Beit(**{**SIZES, **options}, attn_backend=name)).to(DEVICE).eval() for name in ('auto', 'eager')]
    return made, images(48, 80).to(DEVICE)


@pytest.mark.parametrize('form', ['own', 'shared', 'none'])
def test_auto_in_the_encoder(form, compiled_kernels, fused_calls, monkeypatch):
    asked = []
    monkeypatch.setattr('beit_plugin.models.beit.choose_backend', lambda *a: asked.append(1) or choose_backend(*a))
    (model, eager), x = models(use_rel_pos_bias=form == 'own', use_shared_rel_pos_bias=form == 'shared')
    expected = eager(x)
    assert relative_error(model(x), expected) <= 2e-6 and not fused_calls
    asked.clear()
    with torch.autocast(DEVICE, torch.float16):
        got = model(x)
    assert relative_error(got, expected) <= 2e-2  # 11 bits through four blocks
    assert fused_calls == [torch.float16] * (0 if form == 'none' else 4) and len(asked) == (form != 'none')
    assert relative_error(model.half()(x.half()), expected) <= 2e-2
    assert len(fused_calls) == (0 if form == 'none' else 8)


@pytest.mark.parametrize('case', ['float32', 'training with dropout', 'weights', 'head mask', 'torch.func'])
def test_auto_leaves_the_rest(case, compiled_kernels, fused_calls):
    (model, eager), x = models(attn_drop_rate=0.1 if 'dropout' in case else 0.0)
    dtype = torch.float32 if case == 'float32' else torch.float16
    model, x = model.to(dtype), x.to(dtype)
    if case == 'training with dropout':
        assert model.train()(x).isfinite().all() and not fused_calls
        assert model.eval()(x).isfinite().all() and len(fused_calls) == 4
        return
    options = {'weights': dict(output_attentions=True), 'head mask': dict(head_mask=torch.ones(2, device=DEVICE))}
    if case == 'torch.func':
        model.requires_grad_(False)  # PyTorch's SDPA on the CPU overlooks here that a mask learns
        _, got = torch.func.grad(lambda t: ((y := model(t)).sum(), y), has_aux=True)(x)
    else:
        got = model.forward_head(model.encode(x, **options.get(case, {})).last_hidden_state)
    assert relative_error(got, eager(x.float())) <= 2e-2 and not fused_calls


def test_auto_compiled(compiled_kernels, fused_calls):
    torch._dynamo.reset()
    (model, eager), x = models()
    compiled = torch.compile(model.half(), fullgraph=True, backend='aot_eager')
    assert relative_error(compiled(x.half()), eager(x)) <= 2e-2
    assert fused_calls == [torch.float16] * 4


@pytest.mark.parametrize('strict', [False, True])
def test_exported_programs_run_without_this_package(strict, compiled_kernels, fused_calls):
    if strict and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch 2.6 does not tell a strict export from torch.compile')
    (model, _), x = models(depth=1)
    model, x = model.half(), x.half()
    program = torch.export.export(model, (x,), strict=strict)
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes) and not fused_calls
    assert relative_error(program.module()(x), model(x)) <= 5e-3
    assert len(fused_calls) == 1


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants of the trace
class TestTracing:
    def test_auto(self, compiled_kernels, fused_calls):
        (model, _), x = models(depth=1)
        model, x = model.half(), x.half()
        traced = torch.jit.trace(model, x, check_trace=False)
        assert 'beit_plugin::' not in str(traced.inlined_graph) and not fused_calls
        assert relative_error(traced(x), model(x)) <= 5e-3

    def test_fused(self):
        model = Beit(**SIZES, attn_backend='fused').to(DEVICE)
        with pytest.raises(ValueError, match="'fused' cannot serve: TorchScript and ONNX cannot hold them; use"):
            torch.jit.trace(model, images(48, 80).to(DEVICE), check_trace=False)


def test_fused_under_torch_func():
    model = Beit(**SIZES, attn_backend='fused').to(DEVICE)
    with pytest.raises(ValueError, match=r'they have no rules for the transforms of torch\.func and no forward'):
        torch.func.grad(lambda x: model(x).sum())(images(48, 80).to(DEVICE))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors without data, on a GPU as they say; and the backends that SDPA was restricted to."""
    asked = []
    monkeypatch.setattr(module, 'sdpa_kernel', lambda backends: asked.append(backends) or sdpa_kernel(backends))
    monkeypatch.setattr(relative_position, 'CACHED_TOKENS', 0)  # an index without data must not be kept
    with FakeTensorMode():
        yield asked


def inputs_on_gpu(learns):
    table = torch.empty(num_relative_distance((3, 5)), 2, device=GPU, requires_grad=learns)
    bias = gather_bias(table, bias_geometry((3, 5), (3, 5), 'geometric', GPU))
    return [torch.empty(1, 2, 16, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)], bias


def test_gradients_of_a_frozen_bias_go_past_cudnn(fake_gpu):
    qkv, bias = inputs_on_gpu(learns=False)
    assert attention(*qkv, bias).dtype == torch.bfloat16
    assert fake_gpu.pop() == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad():
        attention(*qkv, bias)
    attention(*(t.detach() for t in qkv), bias)
    attention(*qkv)
    eager_attention(*qkv, bias)
    attention(*qkv, inputs_on_gpu(learns=True)[1])
    with sdpa_kernel(SDPBackend.MATH):  # whoever has chosen is not overruled
        attention(*qkv, bias)
    attention(*(t.cpu() for t in qkv), bias.cpu())
    assert not fake_gpu


def test_going_past_cudnn_compiles(monkeypatch):
    monkeypatch.setattr(module, '_cudnn_would_differentiate', lambda q, mask: True)
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 9, 9)
    got = torch.compile(attention, fullgraph=True, backend='aot_eager')(q, k, v, bias)
    got.sum().backward()
    assert relative_error(got, eager_attention(q, k, v, bias)[0]) <= 2e-6 and q.grad.any()
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad])
def test_mask_of_sdpa_is_aligned_and_of_the_dtype_of_the_query(mode, shared, fake_gpu, monkeypatch):
    """With tables in float32: 16 columns are stored, of which 11 are used."""
    masks, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module.F, 'scaled_dot_product_attention', lambda *a, **k: masks.append(k) or sdpa(*a, **k))
    geometry = bias_geometry((2, 5), (2, 5), 'geometric', GPU)
    layer = Attention(32, 2, window_size=None if shared else (2, 5), device=GPU, dtype=torch.bfloat16)
    bias, x = None, torch.empty(1, 11, 32, device=GPU, dtype=torch.bfloat16)
    with mode():
        if shared:
            bias = RelativePositionBias((2, 5), 2, device=GPU)(geometry, attention_dtype(x))
        else:
            layer.relative_position_bias_table.data = layer.relative_position_bias_table.data.float()
        layer(x, geometry, bias)
    mask = masks.pop()['attn_mask']
    assert mask.shape == (1, 2, 11, 11) and mask.dtype == torch.bfloat16
    assert mask.stride()[1:] == (11 * 16, 16, 1)


@pytest.mark.skipif(not CUDA, reason='needs a GPU')
class TestOnGpu:
    @pytest.mark.parametrize('N', [192, 197])
    def test_gradients_with_a_frozen_bias(self, N):
        """Scores far below 0 and N % 128 == 64 are what cuDNN's gradient fails on (pytorch issue 196678)."""
        q, k, v = (0.1 * torch.randn(2, 2, N, 64, device=GPU, dtype=torch.bfloat16) for _ in range(3))
        bias = torch.randn(2, N, N + -N % 8, device=GPU)[..., :N] - 200
        leaves = [t.requires_grad_() for t in (q, k, v)]
        attention(*leaves, bias).float().square().sum().backward()
        exact = [t.detach().double().requires_grad_() for t in leaves]
        eager_attention(*exact, bias.bfloat16().double())[0].square().sum().backward()
        for got, expected in zip(leaves, exact, strict=True):
            assert relative_error(got.grad, expected.grad) <= 3e-2

    @pytest.mark.parametrize('grid', [(14, 14), (15, 13), (32, 32)])
    def test_no_fall_back_to_the_slow_backend(self, grid):
        N = 1 + grid[0] * grid[1]
        geometry = bias_geometry(grid, grid, 'geometric', GPU)
        table = torch.randn(num_relative_distance(grid), 2, device=GPU)
        qkv = torch.randn(2, N, 3, 2, 64, device=GPU, dtype=torch.bfloat16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        for learns in (False, True):
            bias = gather_bias(table.requires_grad_(learns), geometry).bfloat16()
            chosen = torch._fused_sdp_choice(q, k, v, attn_mask=bias[None])
            assert chosen in (SDPBackend.EFFICIENT_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value)
            exact = eager_attention(*(t.double() for t in (q, k, v)), bias.double())[0]
            assert relative_error(attention(q, k, v, bias), exact) <= 2e-2

    @pytest.mark.parametrize('compiled', [False, True])
    def test_auto(self, compiled, fused_calls):
        torch._dynamo.reset()
        (model, eager), x = models()
        call, expected = torch.compile(model, fullgraph=True) if compiled else model, eager(x)
        assert relative_error(call(x), expected) <= 1e-3 and not fused_calls  # TF32 may be on
        with torch.autocast('cuda', torch.bfloat16):
            assert relative_error(call(x), expected) <= 6e-2  # 8 bits through four blocks
        assert fused_calls == [torch.bfloat16] * 4
