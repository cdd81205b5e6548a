"""Masked image modelling against transformers (v1) and mmpretrain (v1 and v2): logits, losses, all gradients."""

import importlib.util

import pytest
import torch
from helpers import images, randomize, relative_error
from torch import nn

from beit_plugin.checkpoints.convert import to_native
from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling

VOCAB = 50
DEPTH = 4
OURS = dict(img_size=64, embed_dim=128, depth=DEPTH, num_heads=2, mlp_ratio=2.0, vocab_size=VOCAB)


def batch(grid=(4, 4)):
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, *grid, generator=generator) < 0.4
    assert 0 < mask[0].sum() != mask[1].sum() > 0
    return images(16 * grid[0], 16 * grid[1]), mask, torch.randint(VOCAB, mask.shape, generator=generator)


def load(ours, theirs):
    native, rest = to_native(theirs.state_dict())
    assert not rest
    ours.load_state_dict(native, strict=True)
    return ours.eval()


def assert_same_gradients(ours, theirs):
    expected, rest = to_native({name: parameter.grad for name, parameter in theirs.named_parameters()})
    got = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert not rest and got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)
    assert all(gradient.any() for gradient in expected.values())


@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason="needs pip install 'beit-plugin[test]'")
@pytest.mark.parametrize('tables', [dict(shared=True), dict(shared=False, own=True), dict(shared=True, positions=True)])
def test_transformers(tables):
    from transformers import BeitConfig
    from transformers import BeitForMaskedImageModeling as HFModel

    shared, own, positions = (tables.get(name, False) for name in ('shared', 'own', 'positions'))
    config = BeitConfig(
        hidden_size=128, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=256, image_size=64,
        layer_norm_eps=1e-6, drop_path_rate=0.0, attn_implementation='eager', vocab_size=VOCAB, use_mask_token=True,
        use_shared_relative_position_bias=shared, use_relative_position_bias=own,
        use_absolute_position_embeddings=positions,
    )  # fmt: skip
    theirs = randomize(HFModel(config)).eval()
    form = dict(use_shared_rel_pos_bias=shared, use_rel_pos_bias=own, use_abs_pos_emb=positions)
    ours = load(BeitForMaskedImageModeling(**OURS, **form), theirs)
    x, mask, tokens = batch()
    flat, labels = mask.flatten(1), tokens[mask]

    expected = theirs(x, bool_masked_pos=flat, labels=labels)
    everything = ours(x, mask, labels, all_logits=True)
    masked = ours(x, flat, labels)
    assert relative_error(everything.logits, expected.logits) <= 1e-5
    assert relative_error(masked.logits, expected.logits[flat]) <= 1e-5
    assert relative_error(masked.loss, expected.loss) <= 1e-5
    assert relative_error(everything.loss, expected.loss) <= 1e-5
    assert relative_error(ours(x).logits, theirs(x).logits) <= 1e-5

    masked.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)
    ours.zero_grad()
    theirs.zero_grad()
    ours(x, mask, all_logits=True).logits.square().mean().backward()
    theirs(x, bool_masked_pos=flat).logits.square().mean().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason="needs pip install 'beit-plugin[test]'")
def test_a_hundred_steps_with_transformers():
    """From the same weights on the same batches both lose the same."""
    from transformers import BeitConfig
    from transformers import BeitForMaskedImageModeling as HFModel

    config = BeitConfig(
        hidden_size=128, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=256, image_size=64,
        layer_norm_eps=1e-6, drop_path_rate=0.0, attn_implementation='eager', vocab_size=VOCAB, use_mask_token=True,
        use_shared_relative_position_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = HFModel(config).train()
    ours = load(BeitForMaskedImageModeling(**OURS), theirs).train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-4) for model in (ours, theirs)]
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(100):
        tokens = torch.randint(VOCAB, (4, 16), generator=generator) // 10 * 10  # some more frequent than others
        mask = torch.rand(4, 16, generator=generator) < 0.4
        x = tokens.view(4, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1) / VOCAB
        pair = ours(x, mask, tokens[mask]).loss, theirs(x, bool_masked_pos=mask, labels=tokens[mask]).loss
        for loss, optimizer in zip(pair, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    got, expected = torch.tensor(losses, dtype=torch.float64).T
    assert expected[-10:].mean() < 0.6 * expected[0]
    assert ((got - expected).abs() / expected).max() <= 1e-4


class Target(nn.Module):
    """Stands for a tokenizer: v2 takes indices (B, h*w), v1 scores (B, vocab_size, h, w)."""

    def __init__(self, tokens, scores):
        super().__init__()
        self.target = nn.functional.one_hot(tokens, VOCAB).permute(0, 3, 1, 2) if scores else tokens.flatten(1)

    def forward(self, _):
        return self.target


ARCH = dict(embed_dims=128, num_layers=DEPTH, depth=DEPTH, num_heads=2, feedforward_channels=256)


def theirs_of(mmpretrain, v2, tokens, out_indices, early_layers):
    """mmpretrain's whole model, as in its configs beit_beit-base-p16… and beitv2_beit-base-p16…."""
    grid = tokens.shape[1:]
    model = mmpretrain.models.BEiT(
        backbone=dict(
            type='BEiTPretrainViT', arch=ARCH, img_size=(16 * grid[0], 16 * grid[1]), patch_size=16, final_norm=not v2,
            out_indices=out_indices, out_type='raw',
        ),
        neck=dict(type='BEiTV2Neck', num_layers=2, early_layers=early_layers, backbone_arch=ARCH) if v2 else None,
        head=dict(
            type='BEiTV2Head' if v2 else 'BEiTV1Head', embed_dims=128, num_embed=VOCAB,
            loss=dict(type='CrossEntropyLoss'),
        ),
    )  # fmt: skip
    model.target_generator = Target(tokens, scores=not v2)
    return randomize(model).eval()


def losses_of(mmpretrain, model, x, mask):
    samples = []
    for hidden in mask:
        sample = mmpretrain.structures.DataSample()
        sample.set_field(hidden, 'mask')
        samples.append(sample)
    return model.loss([x, x], samples)


@pytest.mark.parametrize('grid', [(4, 4), (3, 5)])
def test_mmpretrain_v1(mmpretrain, grid):
    x, mask, tokens = batch(grid)
    theirs = theirs_of(mmpretrain, False, tokens, [-1], None)
    ours = load(BeitForMaskedImageModeling(**{**OURS, 'img_size': tuple(x.shape[2:])}), theirs)
    expected = losses_of(mmpretrain, theirs, x, mask)['loss']
    got = ours(x, mask, tokens).loss
    assert relative_error(got, expected) <= 1e-5
    got.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize('grid', [(4, 4), (3, 5)])
# its configs write [-4, -1], 0-based and from the end: all blocks but three, which is the default here
@pytest.mark.parametrize('out_indices, early_layers', [([-4, -1], None), ([1, 3], 2), ([2, 3], 3)])
def test_mmpretrain_v2(mmpretrain, out_indices, early_layers, grid):
    x, mask, tokens = batch(grid)
    theirs = theirs_of(mmpretrain, True, tokens, list(out_indices), early_layers or 1)
    size = dict(img_size=tuple(x.shape[2:]), early_layers=early_layers)
    ours = load(BeitV2ForMaskedImageModeling(**{**OURS, **size}), theirs)
    expected = losses_of(mmpretrain, theirs, x, mask)
    got = ours(x, mask, tokens)
    assert relative_error(got.loss - got.cls_pt_loss, expected['loss_1']) <= 1e-5
    assert relative_error(got.cls_pt_loss, expected['loss_2']) <= 1e-5
    assert abs(expected['loss_1'] - expected['loss_2']) > 1e-3  # two branches, not one twice
    got.loss.backward()
    sum(expected.values()).backward()
    assert_same_gradients(ours, theirs)


def test_mmpretrain_loses_the_scale_of_the_extra_blocks(mmpretrain):
    # its neck scales them in the constructor, then init_weights() draws them anew; ours keep the scale of their place
    torch.manual_seed(0)
    neck = mmpretrain.models.BEiTV2Neck(early_layers=2, backbone_arch=ARCH)
    neck.init_weights()
    ours = BeitV2ForMaskedImageModeling(**OURS, early_layers=2)
    for blocks, expected in ((neck.patch_aggregation, [1, 1]), (ours.cls_pt_layers, [6**-0.5, 8**-0.5])):
        scales = [(block.attn.proj.weight.std() / block.attn.qkv.weight.std()).item() for block in blocks]
        assert scales == pytest.approx(expected, rel=0.03)
