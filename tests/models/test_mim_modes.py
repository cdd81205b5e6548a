"""Masked image models: initialisation, what timm calls on them, number formats, torch.compile, copies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, gradients, relative_error, weighted_sum
from mim_common import MASK, SIZES, TOKENS, V1, V2, VOCAB, M, X, batch, build, logits_of, model_of
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from beit_plugin.models.beit import Beit


@pytest.mark.parametrize('cls', [V1, V2])
def test_initialisation(cls):
    torch.manual_seed(0)
    # the standard deviation of a normal cut at one of its own is 0.54 of it; unilm's pre-training cuts there
    std, cut = 0.02 * 0.5396, 0.02
    model = build(cls, embed_dim=64, vocab_size=400, mlp_ratio=4.0)
    for weight in (model.lm_head.weight, model.patch_embed.proj.weight, model.blocks[0].mlp.fc1.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.03) and weight.abs().max() <= cut
    assert max(t.abs().max() for t in (model.cls_token, model.mask_token)) <= cut
    assert not any(t.any() for n, t in model.named_parameters() if n.endswith('bias') or n.endswith('bias_table'))
    numbered = list(enumerate(model.blocks, 1)) + list(enumerate(getattr(model, 'cls_pt_layers', ()), 3))
    assert len(numbered) == (6 if cls is V2 else 4)
    for number, block in numbered:
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(std / (2 * number) ** 0.5, rel=0.05), number
        assert block.attn.qkv.weight.std().item() == pytest.approx(std, rel=0.05)
        assert (block.gamma_1 == 0.1).all()


@pytest.mark.parametrize('cls', [V1, V2])
def test_meta_device_then_init_weights(cls):
    model = build(cls, device='meta')
    assert all(t.is_meta for t in model.state_dict().values())
    model.to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(99)
    torch.manual_seed(0)
    model.init_weights()
    reference = build(cls)
    torch.manual_seed(0)
    reference.init_weights()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in reference.state_dict().items())
    assert model(X, MASK, TOKENS).loss.isfinite()


@pytest.mark.parametrize('cls', [V1, V2])
def test_names_are_those_of_the_encoder_and_of_unilm(cls):
    encoder = Beit(**TINY, num_classes=0, global_pool='', use_mask_token=True, use_rel_pos_bias=False,
                   use_shared_rel_pos_bias=True)  # fmt: skip
    extra = {'lm_head.weight', 'lm_head.bias'}
    if cls is V2:
        block = [n.removeprefix('blocks.0.') for n in encoder.state_dict() if n.startswith('blocks.0.')]
        extra |= {f'cls_pt_layers.{i}.{name}' for i in (0, 1) for name in block}
    assert set(build(cls).state_dict()) == set(encoder.state_dict()) | extra
    assert {'norm.weight', 'mask_token', 'rel_pos_bias.relative_position_bias_table'} <= set(encoder.state_dict())


@pytest.mark.parametrize('cls', [V1, V2])
def test_features(cls):
    model = model_of(cls)
    x, mask, _ = batch()
    assert len(model.encode(x, mask, output_attentions=True).attentions) == 4
    hidden = model.encode(x, mask)
    assert torch.equal(model.forward_features(x, mask), hidden.last_hidden_state)
    assert torch.equal(model.forward_head(hidden.last_hidden_state), model(x, mask, all_logits=True).logits)
    assert model.forward_head(hidden.last_hidden_state, pre_logits=True).shape == (2, 15, 16)
    last, maps = model.forward_intermediates(x, [1, 3], norm=True)
    assert [m.shape for m in maps] == [(2, 16, 3, 5)] * 2 and torch.equal(last, model.forward_features(x))
    assert torch.equal(maps[1].flatten(2).mT, last[:, 1:])
    assert [f['module'] for f in model.feature_info] == [f'blocks.{i}' for i in range(4)]


@pytest.mark.parametrize('cls', [V1, V2])
def test_another_vocabulary(cls):
    torch.manual_seed(0)
    model = model_of(cls).to(torch.bfloat16)
    assert model.get_classifier() is model.lm_head
    model.reset_classifier(300)
    assert model.get_classifier() is model.lm_head and model.num_classes == 300 and not model.lm_head.training
    assert model.lm_head.weight.dtype == torch.bfloat16 and not model.lm_head.bias.any()
    assert 0.009 < model.lm_head.weight.float().std() < 0.012
    output = model(X.bfloat16(), MASK, TOKENS + 280)
    assert output.logits.shape == (M, 300) and output.loss.dtype == torch.float32
    model.reset_classifier(0)
    assert model(X.bfloat16()).logits.shape == (2, 15, 16) and 'lm_head.weight' not in model.state_dict()


@pytest.mark.parametrize('cls', [V1, V2])
def test_pruning(cls):
    model = model_of(cls)
    expected = model.forward_intermediates(X, [1], intermediates_only=True)[0]
    kept = copy.deepcopy(model)
    assert kept.prune_intermediate_layers([1], prune_head=False) == [1]
    output = kept(X, MASK, TOKENS)
    assert output.logits.shape == (M, VOCAB) and (output.cls_pt_logits is not None) == (cls is V2)
    assert model.prune_intermediate_layers([0]) == [0]
    assert not any(n.startswith(('lm_head', 'cls_pt', 'blocks.1')) for n in model.state_dict())
    assert model(X).logits.shape == (2, 15, 16) and model(X).cls_pt_logits is None
    assert torch.equal(kept.forward_intermediates(X, 1, intermediates_only=True)[0], expected)
    kept.prune_intermediate_layers([0], prune_head=False)  # the block that the branch reads is gone
    assert kept(X, MASK, TOKENS).cls_pt_logits is None


@pytest.mark.parametrize('cls', [V1, V2])
@pytest.mark.parametrize('own', [False, True])
def test_set_input_size(cls, own):
    model = model_of(cls, use_rel_pos_bias=own)
    x, mask, tokens = batch(*SIZES[1])
    expected = model(x, mask, tokens)
    model.set_input_size((80, 48))
    assert model.window_size == (5, 3) and model.rel_pos_bias.relative_position_bias_table.shape == (9 * 5 + 3, 2)
    assert relative_error(model(x, mask, tokens).logits, expected.logits) < 1e-5
    if cls is V2:
        assert relative_error(model(x, mask, tokens).cls_pt_logits, expected.cls_pt_logits) < 1e-5


def test_optimiser_groups():
    model = build(V2)
    assert {'mask_token', 'cls_token', 'rel_pos_bias.relative_position_bias_table'} <= model.no_weight_decay()
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    got = {n: scale[id(p)] for n, p in model.named_parameters()}
    assert len(got) == len(scale)
    assert {got[n] for n in ('lm_head.weight', 'norm.weight', 'cls_pt_layers.0.norm1.weight')} == {1.0}
    assert got['blocks.3.norm1.weight'] == 0.5 and got['mask_token'] == got['patch_embed.proj.weight'] == 0.5**5
    create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.9)


@pytest.mark.parametrize('cls', [V1, V2])
def test_loss_is_float32_or_wider(cls):
    model = model_of(cls)
    x, mask, tokens = batch()
    exact = copy.deepcopy(model).double()(x.double(), mask, tokens)
    assert exact.loss.dtype == torch.float64 and relative_error(model(x, mask, tokens).loss, exact.loss) < 1e-6
    with torch.autocast('cpu', torch.bfloat16):
        low = model(x, mask, tokens)
    assert (low.loss.dtype, low.logits.dtype) == (torch.float32, torch.bfloat16)
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=3e-2)  # 8 bits of mantissa through four blocks
    # from these logits it is exact to float32
    branches = [F.cross_entropy(y.double(), tokens[mask]) for y in logits_of(low)]
    assert low.loss.item() == pytest.approx(sum(branches).item(), rel=1e-6)


def test_dropout_before_the_head_acts_in_training_only():
    model = model_of(drop_rate=0.5)
    x, mask, _ = batch()
    assert torch.equal(model(x, mask).logits, model(x, mask).logits)
    model.train()
    assert not torch.equal(model(x, mask).logits, model(x, mask).logits)


@pytest.mark.parametrize('cls', [V1, V2])
def test_compiled_training_step(cls):
    model = model_of(cls).train()
    x, mask, tokens = batch()
    expected = model(x, mask, tokens)
    weighted_sum(expected.loss, *logits_of(expected)).backward()
    want = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    got = torch.compile(model, backend='eager')(x, mask, tokens)
    weighted_sum(got.loss, *logits_of(got)).backward()
    assert relative_error(got.loss, expected.loss) < 1e-6
    assert all(relative_error(gradient, want[name]) < 1e-5 for name, gradient in gradients(model).items())


def test_copies_are_independent():
    model = model_of(V2)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.lm_head.weight)
    assert model.lm_head.weight.any() and twin(X, MASK, TOKENS).loss.isfinite()
