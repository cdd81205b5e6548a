"""Masked image modelling: predictions, loss, gradients, errors, and the [CLS] branch of v2."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, relative_error
from mim_common import MASK, SIZES, TOKENS, V1, V2, VOCAB, M, X, batch, build, logits_of, model_of

from beit_plugin.models.mim import masked_positions


def by_hand(model, x, mask):
    """Logits (B, h*w, vocab_size) of each branch, written out."""
    x, grid = model.embed(x, mask)
    bias = model.position_bias(grid, x).full
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
        (lambda m: type(m)(global_pool='avg'), "global_pool must be left out, got 'avg'"),
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


@pytest.mark.parametrize('share', [0.0, 0.4, 1.0])
def test_positions_with_and_without_their_number(share):
    mask = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) < share
    expected = mask.flatten().nonzero().flatten()
    assert torch.equal(masked_positions(mask), expected)
    assert torch.equal(masked_positions(mask, len(expected)), expected)


@pytest.mark.parametrize('wrong', [VOCAB, -100, -1])
def test_wrong_labels_make_the_loss_of_a_compiled_model_nan(wrong):
    torch._dynamo.reset()
    model = model_of(V2).eval()
    compiled = torch.compile(model, backend='eager')
    labels = TOKENS[MASK].clone()
    assert relative_error(compiled(X, MASK, labels).loss, model(X, MASK, labels).loss) < 1e-6
    labels[1] = wrong
    assert compiled(X, MASK, labels).loss.isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_listed_labels_need_no_wait_for_the_gpu():
    model = model_of(V2).cuda()
    x, mask, labels = X.cuda(), MASK.cuda(), TOKENS[MASK].cuda()
    model(x, mask, labels).loss.backward()  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss = model(x, mask, labels).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert relative_error(loss, model(x, mask, TOKENS.cuda()).loss) < 1e-5
    model(x, mask, labels[1:])
    with pytest.raises(
        ValueError, match=rf'labels must have shape \({M},\) for the {M} masked patches of the batch before'
    ):
        model(x, mask, labels)
    compiled = torch.compile(model)
    assert relative_error(compiled(x, mask, labels).loss, loss) < 1e-4 and compiled(x, mask, labels[1:]).loss.isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_wrong_labels_on_cuda_are_reported_in_the_next_step():
    model = model_of(V2).cuda()
    x, mask, tokens = X.cuda(), MASK.cuda(), TOKENS.cuda()
    assert model(x, mask, tokens + VOCAB).loss.isfinite()
    with pytest.raises(ValueError, match='has the labels'):
        model(x, mask, tokens)
    expected = model.cpu()(X, MASK, TOKENS)
    assert relative_error(model.cuda()(x, mask, tokens[mask]).loss.cpu(), expected.loss) < 1e-4
