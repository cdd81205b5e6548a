"""Masked image modelling: predictions, loss, the [CLS] branch of v2, and what timm calls on such a model."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, gradients, images, randomize, relative_error, weighted_sum
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from beit_plugin.models.beit import Beit
from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling

V1, V2 = BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
VOCAB = 11
SIZES = [((48, 80), (3, 5)), ((70, 33), (5, 3))]  # native and another, neither square


def build(cls=V1, **options):
    return cls(**{**TINY, 'vocab_size': VOCAB, **({'early_layers': 2} if cls is V2 else {}), **options})


def model_of(cls=V1, **options):
    return randomize(build(cls, **options)).eval()


def batch(size=(48, 80), grid=(3, 5)):
    """Images, a mask that hides another number of patches in each, tokens of all patches."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, *grid, generator=generator) < 0.4
    assert 0 < mask[0].sum() != mask[1].sum() > 0
    return images(*size), mask, torch.randint(VOCAB, mask.shape, generator=generator)


def by_hand(model, x, mask):
    """Logits (B, h*w, vocab_size) of each branch, written out."""
    x, grid = model.embed(x, mask)
    bias = model.position_bias(grid, x.device)
    states = [x]
    for block in model.blocks:
        states.append(block(states[-1], *bias)[0])
    branches = [states[-1]]
    if isinstance(model, V2):
        y = states[2].clone()
        y[:, 0] = states[-1][:, 0]
        for block in model.cls_pt_layers:
            y = block(y, *bias)[0]
        branches.append(y)
    return [F.linear(model.norm(y), model.lm_head.weight, model.lm_head.bias)[:, 1:] for y in branches]


def logits_of(output):
    return [logits for logits in (output.logits, output.cls_pt_logits) if logits is not None]


@pytest.mark.parametrize('size, grid', SIZES)
@pytest.mark.parametrize('options', [dict(), dict(use_rel_pos_bias=True, use_abs_pos_emb=True)])
@pytest.mark.parametrize('cls', [V1, V2])
def test_logits_and_loss(cls, options, size, grid):
    model = model_of(cls, **options)
    x, mask, tokens = batch(size, grid)
    flat = mask.flatten(1)
    expected = by_hand(model, x, mask)
    assert len(expected) == (2 if cls is V2 else 1)

    some, everything = model(x, mask), model(x, mask, all_logits=True)
    for got, whole, hand in zip(logits_of(some), logits_of(everything), expected, strict=True):
        assert relative_error(got, hand[flat]) < 1e-6 and relative_error(whole, hand) < 1e-6
    assert some.loss is everything.loss is some.cls_pt_loss is None
    for got, hand in zip(logits_of(model(x)), by_hand(model, x, None), strict=True):
        assert relative_error(got, hand) < 1e-6

    losses = [F.cross_entropy(hand[flat], tokens[mask]) for hand in expected]
    for all_logits, plain in ((False, some), (True, everything)):
        output = model(x, mask, tokens[mask], all_logits)
        assert output.loss.item() == pytest.approx(sum(losses).item(), rel=1e-6)
        assert all(map(torch.equal, logits_of(output), logits_of(plain)))
        if cls is V2:
            assert output.cls_pt_loss.item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_the_branches_differ():
    # the comparison above would see no difference between branches that agree
    output = model_of(V2)(*batch()[:2])
    assert relative_error(output.cls_pt_logits, output.logits) > 0.1


@pytest.mark.parametrize('early, expected', [(1, 1), (3, 3), (4, 4), (None, 1)])
def test_early_layers_counts_blocks_from_one(early, expected):
    model = model_of(V2, early_layers=early)
    x, mask, _ = batch()
    patches = model.run_blocks(x, mask, stages=[expected])[2][expected]
    cls_token = model.run_blocks(x, mask)[0]
    seen = []
    model.cls_pt_layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x, mask)
    assert torch.equal(seen[0][:, 1:], patches[:, 1:]) and torch.equal(seen[0][:, 0], cls_token[:, 0])
    assert model.early_layers == expected


def test_default_sizes_are_the_published_ones():
    for depth, early in ((12, 9), (24, 21)):  # unilm beit2/PRETRAINING.md
        model = V2(depth=depth, embed_dim=8, num_heads=2, device='meta')
        assert (model.early_layers, len(model.cls_pt_layers), model.num_classes) == (early, 2, 8192)
        assert model.lm_head.weight.shape == (8192, 8)
        assert model.rel_pos_bias is not None and model.blocks[0].attn.relative_position_bias_table is None


@pytest.mark.parametrize('early, expected', [(2, [0.2, 0.3]), (3, [0.225, 0.3]), (4, [0.24, 0.3])])
def test_stochastic_depth_of_the_extra_blocks(early, expected):
    # linspace(0, rate, max(depth, early + head)), of which the extra blocks take those from early on
    model = build(V2, early_layers=early, drop_path_rate=0.3)
    assert [b.drop_path1.drop_prob for b in model.cls_pt_layers] == pytest.approx(expected)
    assert [getattr(b.drop_path2, 'drop_prob', 0) for b in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize('cls', [V1, V2])
def test_every_form_of_labels_and_mask_means_the_same(cls):
    model = model_of(cls)
    x, mask, tokens = batch()
    junk = tokens.masked_fill(~mask, -100)  # no token, but of patches that are seen
    expected = model(x, mask, tokens[mask])
    for other in (tokens, junk, junk.flatten(1), tokens[mask].int(), tokens.to(torch.uint8)):
        for hidden in (mask, mask.flatten(1)):
            got = model(x, hidden, other)
            assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)
    assert not torch.equal(model(x, mask, tokens[mask].flip(0)).loss, expected.loss)


@pytest.mark.parametrize('all_logits', [False, True])
@pytest.mark.parametrize('cls', [V1, V2])
def test_empty_mask(cls, all_logits):
    model = model_of(cls).train()
    x, mask, tokens = batch()
    for labels in (tokens, tokens[:0].flatten()):
        model.zero_grad()
        output = model(x, torch.zeros_like(mask), labels, all_logits)
        assert output.loss == 0 and output.logits.shape == ((2, 15, VOCAB) if all_logits else (0, VOCAB))
        output.loss.backward()
        assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize('cls', [V1, V2])
def test_full_mask_hides_everything(cls):
    model = model_of(cls)
    x, mask, tokens = batch()
    full = torch.ones_like(mask)
    output = model(x, full, tokens)
    assert output.logits.shape == (30, VOCAB)
    assert torch.equal(output.loss, model(x, full, tokens.flatten()).loss)
    assert relative_error(model(x * 0, full, tokens).logits, output.logits) < 1e-6
    assert relative_error(model(x * 0, mask, tokens).logits, model(x, mask, tokens).logits) > 1e-2


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('size, grid', SIZES)
@pytest.mark.parametrize('cls', [V1, V2])
def test_gradients(cls, size, grid, checkpointing):
    model = model_of(cls).train()
    model.set_grad_checkpointing(checkpointing)
    x, mask, tokens = batch(size, grid)
    model(x, mask, tokens[mask]).loss.backward()
    got = {name: gradient.clone() for name, gradient in gradients(model).items()}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in got.values())
    model.zero_grad()
    sum(F.cross_entropy(hand[mask.flatten(1)], tokens[mask]) for hand in by_hand(model, x, mask)).backward()
    assert all(relative_error(got[name], expected) < 1e-5 for name, expected in gradients(model).items())


def test_checkpointing_reaches_the_extra_blocks():
    model, runs = model_of(V2).train(), []
    model.set_grad_checkpointing()
    model.cls_pt_layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    x, mask, tokens = batch()
    model(x, mask, tokens).loss.backward()
    assert len(runs) == 2


@pytest.mark.parametrize('cls', [V1, V2])
def test_learns(cls):
    torch.manual_seed(0)
    model = build(cls, embed_dim=32, use_abs_pos_emb=True)
    x, mask, tokens = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = model(x, mask, tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    branches = 2 if cls is V2 else 1
    # an untrained head knows nothing: log(vocab_size) per branch
    assert losses[0] == pytest.approx(branches * torch.tensor(VOCAB).log().item(), rel=0.05)
    assert losses[-1] < 0.1 * losses[0]


X, MASK, TOKENS = batch()
M = int(MASK.sum())


@pytest.mark.parametrize(
    'call, sentence',
    [
        (lambda m: m(X, labels=TOKENS), 'got labels without bool_masked_pos; labels belong to masked patches, so give'),
        (lambda m: m(X, MASK, TOKENS[MASK][1:]), rf'labels must have shape ({M},) for the {M} masked patches'),
        (lambda m: m(X, MASK, TOKENS.flatten()), '(2, 15) or (2, 3, 5) for all its patches, got torch.int64 of shape'),
        (lambda m: m(X, MASK, TOKENS.mT), 'got torch.int64 of shape (2, 5, 3); take them from the tokens of the same'),
        (lambda m: m(X, MASK, TOKENS[:1]), 'of shape (1, 3, 5)'),
        (lambda m: m(X, MASK, TOKENS.float()), 'labels must be a tensor of integers, got torch.float32 of shape (2, 3'),
        (lambda m: m(X, MASK, TOKENS > 3), 'labels must be a tensor of integers, got torch.bool'),
        (lambda m: m(X, MASK, TOKENS.tolist()), 'labels must be a tensor of integers, got list'),
        (
            lambda m: m(X, MASK, TOKENS.masked_fill(MASK & (TOKENS == TOKENS[MASK][-1]), VOCAB)),
            f'has the labels {VOCAB}, but there are only the {VOCAB} classes 0 to {VOCAB - 1}; use the tokenizer that',
        ),
        (lambda m: m(X, MASK, TOKENS[MASK] - VOCAB), 'image 0 of the batch has the labels -'),
        (lambda m: m(X, MASK.float(), TOKENS), 'bool_masked_pos must have dtype torch.bool, got torch.float32'),
        (lambda m: m(X, MASK.mT, TOKENS), 'bool_masked_pos must have shape (2, 15) or (2, 3, 5)'),
        (lambda m: m.reset_classifier(3, 'avg'), "global_pool must be left out, got 'avg'"),
        (lambda m: m.reset_classifier(-1), 'vocab_size must be the number of visual tokens, or 0 for no head, got -1'),
        (lambda m: build(vocab_size=-1), 'vocab_size must be the number of visual tokens'),
        (lambda m: build(use_mask_token=False)(X, MASK), 'bool_masked_pos needs a mask token'),
        (
            lambda m: build(V2, early_layers=5),
            'early_layers must be from 1 to the depth 4 and head_layers at least 1, got',
        ),
        (lambda m: build(V2, early_layers=0), 'got 0 and 2'),
        (lambda m: build(V2, early_layers=None, depth=3), 'got 0 and 2'),
        (lambda m: build(V2, head_layers=0), 'got 2 and 0'),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(model_of())


def test_labels_need_a_head():
    model = model_of(vocab_size=0)
    assert relative_error(model(X).logits, model.forward_features(X)[:, 1:]) < 1e-6
    with pytest.raises(ValueError, match='got labels, but the model has no head; give it one with reset_classifier'):
        model(X, MASK, TOKENS)


def test_wrong_labels_are_found_before_the_blocks_run():
    model, runs = model_of(), []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ValueError):
        model(X, MASK, TOKENS + VOCAB)
    assert not runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_wrong_labels_on_cuda_are_reported_in_the_next_step():
    model = model_of(V2).cuda()
    x, mask, tokens = X.cuda(), MASK.cuda(), TOKENS.cuda()
    assert model(x, mask, tokens + VOCAB).loss.isfinite()
    with pytest.raises(ValueError, match='has the labels'):
        model(x, mask, tokens)
    expected = model.cpu()(X, MASK, TOKENS)
    assert relative_error(model.cuda()(x, mask, tokens[mask]).loss.cpu(), expected.loss) < 1e-4


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
