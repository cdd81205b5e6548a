"""Tokenizers against the peers: transformers' FLAVA codebook, mmpretrain's DALL-E encoder and VQ-KD."""

import importlib.util

import pytest
import torch
from helpers import randomize, relative_error

from beit_plugin.tokenizers import DalleEncoder, load_tokenizer, save_tokenizer
from beit_plugin.tokenizers.codebook import Codebook
from beit_plugin.tokenizers.dalle import map_pixels

WIDTH, VOCAB = 64, 50


def pictures(*size, batch=2):
    coarse = torch.rand(batch, 3, size[0] // 16, size[1] // 16, generator=torch.Generator().manual_seed(1))
    return coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)


def centre(conv, logits):
    """Takes the mean of each logit off, so that no token outdoes the others everywhere."""
    with torch.no_grad():
        (conv.bias if hasattr(conv, 'bias') else conv.b).sub_(logits.mean((0, 2, 3)))


@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason="needs pip install 'beit-plugin[test]'")
@pytest.mark.parametrize('blocks', [2, 1])
def test_flava(blocks):
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    config = FlavaImageCodebookConfig(hidden_size=WIDTH, vocab_size=VOCAB, num_blocks_per_group=blocks)
    theirs = randomize(FlavaImageCodebook(config)).eval()
    x = pictures(48, 80)
    centre(theirs.blocks.output.conv, theirs(map_pixels(x)))
    ours = load_tokenizer(theirs.state_dict())
    expected = theirs(map_pixels(x))
    assert relative_error(ours.logits(x), expected) <= 1e-5
    assert torch.equal(ours.encode(x), theirs.get_codebook_indices(map_pixels(x)))
    assert len(ours.encode(x).unique()) > 10


def test_mmpretrain_dalle(mmpretrain):
    theirs = mmpretrain.models.DALLEEncoder(n_hid=WIDTH, vocab_size=VOCAB)
    x = pictures(48, 80)
    centre(theirs.blocks.output.conv, theirs(map_pixels(x)))
    ours = load_tokenizer({'state_dict': theirs.state_dict()})
    assert relative_error(ours.logits(x), theirs(map_pixels(x))) <= 1e-5
    assert torch.equal(ours.encode(x), theirs(map_pixels(x)).argmax(1))


def test_mmpretrain_dalle_of_full_size(mmpretrain):
    with torch.device('meta'):
        ours, theirs = DalleEncoder(), mmpretrain.models.DALLEEncoder(device='meta')
    shapes = [tuple(p.shape) for p in ours.parameters()]
    assert shapes == [tuple(p.shape) for p in theirs.parameters()]


def vqkd_of(mmpretrain, size=(64, 64), depth=3):
    """As ``vqkd_encoder`` of its configs/beitv2, smaller."""
    arch = dict(embed_dims=128, num_layers=depth, num_heads=2, feedforward_channels=256)
    return mmpretrain.models.VQKD(
        encoder_config=dict(
            arch=arch, img_size=size, patch_size=16, in_channels=3, out_indices=-1, drop_rate=0.0, drop_path_rate=0.0,
            norm_cfg=dict(type='LN', eps=1e-6), final_norm=True, out_type='featmap', with_cls_token=True,
            frozen_stages=-1, use_abs_pos_emb=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=False,
            layer_scale_init_value=0.0, interpolate_mode='bicubic', patch_cfg=dict(), layer_cfgs=dict(),
        ),
        num_embed=VOCAB,
        embed_dims=8,
    )  # fmt: skip


def tokens_of(theirs, x):
    return theirs(x * 2 - 1)  # its data preprocessor takes 127.5 off and divides by it; its tokens come in rows


def test_mmpretrain_vqkd(mmpretrain):
    theirs = randomize(vqkd_of(mmpretrain)).eval()
    theirs.quantize.embedding.initted.fill_(1)
    x = pictures(64, 64, batch=8)
    # codes among the features, or one of them would be the nearest to all
    features = load_tokenizer(theirs.state_dict()).features(x).permute(0, 2, 3, 1).flatten(0, 2)
    theirs.quantize.embedding.weight.data.copy_(torch.nn.functional.normalize(features[:VOCAB], dim=1))
    ours = load_tokenizer({f'target_generator.{name}': value for name, value in theirs.state_dict().items()})
    expected = tokens_of(theirs, x)
    got = ours.encode(x)
    assert got.shape == (8, 4, 4) and torch.equal(got.flatten(1), expected)
    assert len(got.unique()) > 15


def test_mmpretrain_reads_what_we_save(mmpretrain, tmp_path):
    theirs = randomize(vqkd_of(mmpretrain)).eval()
    theirs.quantize.embedding.initted.fill_(1)
    save_tokenizer(load_tokenizer(theirs.state_dict()), tmp_path / 'x.pth', 'mmpretrain')
    saved = torch.load(tmp_path / 'x.pth', weights_only=True)
    expected = theirs.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_mmpretrain_quantizer_learns_alike(mmpretrain):
    """Codes, loss, gradients, codebook and counts of several steps; it has no revival."""
    quantizer = importlib.import_module('mmpretrain.models.utils').NormEMAVectorQuantizer
    theirs = quantizer(VOCAB, 8, beta=1.0, decay=0.9, kmeans_init=False).train()
    ours = Codebook(VOCAB, 8, decay=0.9, kmeans_iters=0, revive=False)
    ours.weight.copy_(theirs.embedding.weight)
    for step in range(4):
        z = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(step))
        x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
        expected_codes, expected_loss, expected_ids = theirs(y)
        got = ours(x)
        assert torch.equal(got.tokens.flatten(), expected_ids)
        assert relative_error(got.codes, expected_codes) <= 1e-5
        assert relative_error(got.loss, expected_loss) <= 1e-5
        weights = torch.linspace(-1, 1, z.numel()).view_as(z)
        ((got.codes * weights).sum() + got.loss).backward()
        ((expected_codes * weights).sum() + expected_loss).backward()
        assert relative_error(x.grad, y.grad) <= 1e-5
        assert relative_error(ours.weight, theirs.embedding.weight) <= 1e-5
        assert relative_error(ours.cluster_size, theirs.cluster_size) <= 1e-5
