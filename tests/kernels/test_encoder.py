"""The encoder with its attention on the Triton kernels."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, gradients, images, randomize, relative_error
from torch.autograd import forward_ad

from beit_plugin import Beit, BeitBackbone
from beit_plugin.kernels import residual_ops
from beit_plugin.models import attention as module
from beit_plugin.models import kernel_support
from beit_plugin.models.attention import fused_refusal
from beit_plugin.models.block import Block
from beit_plugin.models.mim import BeitV2ForMaskedImageModeling

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SIZES = {**TINY, 'embed_dim': 32, 'num_heads': 2}  # head dim 16


def pair(make, backends=('fused', 'eager'), **options):
    models = []
    for backend in backends:
        models.append(randomize(make(**{**SIZES, **options}, attn_backend=backend)).to(DEVICE))
    return models


FORMS = {
    'own tables': dict(),
    'shared table': dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'both': dict(use_shared_rel_pos_bias=True),
    'none': dict(use_rel_pos_bias=False),
    'recomputed': dict(),
}


@pytest.mark.parametrize('size', [(48, 80), (64, 33)])
@pytest.mark.parametrize('form', FORMS)
def test_outputs_and_gradients(form, size):
    """At the native grid (3, 5), and at another one through the resized tables."""
    fused, eager = pair(Beit, **FORMS[form], num_classes=3)
    x = images(*size).to(DEVICE)
    for model in (fused, eager):
        model.train()
        model.set_grad_checkpointing(form == 'recomputed')
        model(x).square().sum().backward()
    assert relative_error(fused(x), eager(x)) <= 2e-6
    got, expected = gradients(fused), gradients(eager)
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize('form', ['shared table', 'both'])
def test_shared_bias_in_mixed_precision(form, monkeypatch):
    """SDPA's mask is cast once for all layers; where each adds its own bias, the sum is rounded once."""
    biases, attention = [], module.attention
    monkeypatch.setattr(module, 'attention', lambda *args: biases.append(args[3]) or attention(*args))
    (sdpa, eager), x = pair(Beit, ('sdpa', 'eager'), **FORMS[form], num_classes=3), images(48, 80).to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        sdpa(x).float().square().sum().backward()
    eager(x).square().sum().backward()
    half = form == 'shared table'
    assert {bias.dtype for bias in biases[:4]} == {torch.float16 if half else torch.float32}
    assert len({id(bias) for bias in biases[:4]}) == (1 if half else 4)
    name = 'rel_pos_bias.relative_position_bias_table'
    assert relative_error(gradients(sdpa)[name], gradients(eager)[name]) <= 2e-2  # 11 bits through four blocks


def test_weights_and_masks_go_by_the_reference():
    fused, eager = pair(Beit)
    x, mask = images(48, 80).to(DEVICE), torch.tensor([1.0, 0.5], device=DEVICE)
    for options in (dict(output_attentions=True), dict(head_mask=mask)):
        got, expected = fused.encode(x, **options), eager.encode(x, **options)
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert len(got.attentions) == len(expected.attentions)


def test_backbone_and_pre_training():
    fused, eager = pair(BeitBackbone, add_fpn=True)
    x = images(48, 80).to(DEVICE)
    assert max(map(relative_error, fused.eval()(x), eager.eval()(x))) <= 5e-6
    fused, eager = pair(BeitV2ForMaskedImageModeling, vocab_size=7, early_layers=2)
    mask = torch.rand(2, 15, device=DEVICE) < 0.5
    got, expected = fused.eval()(x, mask), eager.eval()(x, mask)
    assert relative_error(got.logits, expected.logits) <= 5e-6
    assert relative_error(got.cls_pt_logits, expected.cls_pt_logits) <= 5e-6


def states_and_gradients(model, x):
    torch.manual_seed(7)  # of stochastic depth
    tokens, _, states, _ = model.run_blocks(x, stages=(0, 2, 3, 4))
    (tokens.square().sum() + sum(state.square().sum() for state in states.values())).backward()
    return [tokens, *states.values()], gradients(model.blocks)


@pytest.mark.parametrize('hooked', [False, True])
@pytest.mark.parametrize('options', [dict(), dict(window_size=2, img_size=64), dict(init_values=None)])
def test_blocks_are_chained(options, hooked, monkeypatch):
    """The last sum of each with the first norm of the next; not where somebody listens to a block."""
    calls = []
    for name in ('layer_norm', 'add_norm', 'scaled_add'):
        function = getattr(residual_ops, name)
        monkeypatch.setattr(
            residual_ops, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
        )
    (fused, eager), heard = pair(Beit, drop_path_rate=0.3, **options), []
    if hooked:
        fused.blocks[1].register_forward_hook(lambda *_: heard.append(1))
    x = images(64, 64).to(DEVICE)
    (states, got), (expected_states, expected) = (states_and_gradients(model.train(), x) for model in (fused, eager))
    depth = len(fused.blocks)
    assert depth == 4 and len(heard) == hooked
    counts = [calls.count(name) for name in ('layer_norm', 'add_norm', 'scaled_add')]
    assert counts == ([depth] * 3 if hooked else [1, 2 * depth - 1, 1])
    assert len(states) == 5 and max(map(relative_error, states, expected_states)) <= 5e-6
    assert max(relative_error(got[name], expected[name]) for name in expected) <= 1e-5


def test_blocks_compiled_in_place_run_compiled():
    (fused, _), x = pair(Beit), images(48, 80).to(DEVICE)
    expected, graphs = fused(x), []
    torch._dynamo.reset()
    fused.blocks[1].compile(backend=lambda graph, _: graphs.append(graph) or graph)
    assert relative_error(fused(x), expected) <= 5e-6 and graphs


def test_another_forward_of_blocks_is_called(monkeypatch):
    (fused, _), calls, forward = pair(Beit), [], Block.forward
    monkeypatch.setattr(Block, 'forward', lambda self, *args: calls.append(1) or forward(self, *args))
    fused(images(48, 80).to(DEVICE))
    assert len(calls) == 4


def test_what_frozen_blocks_give_needs_no_gradient():
    model, _ = pair(BeitBackbone, out_indices=(0, 1, 2, 3))
    model.requires_grad_(False)
    model.blocks[2:].requires_grad_(True)
    maps = model.train()(images(48, 80).to(DEVICE))
    assert [one.requires_grad for one in maps] == [False, False, True, True]


def test_no_block_needs_no_kernel(monkeypatch):
    """Not even Triton."""
    monkeypatch.setitem(sys.modules, 'beit_plugin.kernels.residual_ops', None)
    stem = BeitBackbone(**{**SIZES, 'attn_backend': 'fused'}, out_features=['stem']).to(DEVICE)
    assert stem(images(48, 80).to(DEVICE))[0].shape == (2, 32, 3, 5)


@pytest.mark.parametrize(
    ('options', 'dtype', 'sentence'),
    [
        (dict(attn_drop_rate=0.1), torch.float32, 'they have no dropout of the attention weights; use'),
        (dict(embed_dim=24), torch.float32, 'multiples of 16 up to 128, and this model has 12'),
        (dict(), torch.float64, 'float16, bfloat16 or float32, and the tensors are torch.float64'),
    ],
)
def test_what_it_cannot_serve(options, dtype, sentence):
    model = Beit(**{**SIZES, **options}, attn_backend='fused').to(DEVICE, dtype).train()
    with pytest.raises(ValueError, match=f"attn_backend='fused' cannot serve: .*{sentence}"):
        model(images(48, 80).to(DEVICE, dtype))
    if 'attn_drop_rate' in options:
        assert model.eval()(images(48, 80).to(DEVICE)).isfinite().all()


def test_float32_and_large_heads_on_a_small_gpu(monkeypatch):
    """Of these, GeForce cards have 99 KiB."""
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: properties)
    monkeypatch.setattr(module, 'triton_refusal', lambda device: None)
    x = SimpleNamespace(device=torch.device('cuda', 0), dtype=torch.float32)
    expected = 'in float32 with head dims above 64 they need 160 KiB of shared memory, and this GPU has 99'
    assert fused_refusal(x, 80, 0.0) == expected and fused_refusal(x, 64, 0.0) is None
    properties.shared_memory_per_block_optin = 163 * 1024
    assert fused_refusal(x, 80, 0.0) is None


def test_tangents_go_by_the_reference():
    model, eager = pair(Beit)
    x = images(48, 80).to(DEVICE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match=r"'fused' cannot serve: .*no forward-mode derivative; use"):
            model(dual)
        assert forward_ad.unpack_dual(eager(dual)).tangent.any()


def test_without_a_gpu_or_triton(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    kernel_support._refusal.cache_clear()
    assert 'need a GPU of compute capability 8.0 or later, and the tensors are on cpu' in fused_refusal(
        torch.zeros(1), 64, 0.0
    )
    kernel_support._refusal.cache_clear()
    monkeypatch.setattr(kernel_support, 'find_spec', lambda name: None)
    assert fused_refusal(torch.zeros(1), 64, 0.0) == 'Triton is not installed'
    kernel_support._refusal.cache_clear()
