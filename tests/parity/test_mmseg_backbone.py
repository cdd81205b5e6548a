"""The backbone against mmsegmentation's BEiT."""

import importlib.util

import pytest
import torch
from helpers import SIZES, images, randomize, relative_error, weighted_sum

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmseg.models.backbones import BEiT

from beit_plugin.checkpoints.convert import CheckpointError, detect, from_native, to_native
from beit_plugin.mm.backbone import BEiTBackbone
from beit_plugin.models.beit import Beit

ARGS = dict(
    img_size=(64, 96), embed_dims=128, num_layers=3, num_heads=2, mlp_ratio=2, out_indices=(0, 1, 2),
    norm_cfg=dict(type='LN', eps=1e-6),
)  # fmt: skip
FORMS = {
    'v1': dict(init_values=0.1),
    'v2': dict(init_values=1e-5),
    'norms': dict(patch_norm=True, final_norm=True),
    'no biases': dict(qv_bias=False),
    'default eps': dict(norm_cfg=dict(type='LN')),
    'relu': dict(act_cfg=dict(type='ReLU')),
    'patch 8': dict(patch_size=8, img_size=(24, 40)),
    'one map': dict(out_indices=-1),
}


def load(theirs, state):
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and all(n.endswith('relative_position_index') for n in result.missing_keys)


def pair(**options):
    theirs = randomize(BEiT(**{**ARGS, **options}))
    theirs.eval()  # returns None
    ours = BEiTBackbone(**{**ARGS, **options}).eval()
    found = detect(theirs.state_dict())
    assert (found.dialect, found.prefix) == ('mmseg', '')
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize('form, size', [(form, (64, 96)) for form in FORMS] + [('v1', (80, 80))])
def test_outputs_and_gradients(form, size):
    size = FORMS[form].get('img_size', size)
    ours, theirs = pair(**{**FORMS[form], 'img_size': size})
    results = []
    for model in (ours, theirs):
        maps = model(images(*size))
        weighted_sum(*maps).backward()
        results.append(maps)
    assert len(results[0]) == len(results[1])
    assert max(map(relative_error, *results)) <= 1e-5
    expected, rest = to_native({n: p.grad for n, p in theirs.named_parameters()})
    got, _ = to_native({n: p.grad for n, p in ours.named_parameters()})
    assert not rest and got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize('form', ['v1', 'norms', 'patch 8'])
def test_fresh_weights_are_drawn_as_theirs(form):
    theirs, ours = BEiT(**{**ARGS, **FORMS[form]}), BEiTBackbone(**{**ARGS, **FORMS[form]})
    theirs.init_weights()
    expected, _ = to_native(theirs.state_dict())
    for _ in range(2):  # as it is built, and drawn anew
        for name, tensor in to_native(ours.state_dict())[0].items():
            std, spread = expected[name].std(), tensor.numel() ** -0.5  # of a mean; that of a deviation is smaller
            assert (tensor.std() - std).abs() <= 6 * spread * std + 1e-5, name
            assert (tensor.mean() - expected[name].mean()).abs() <= 7 * spread * std + 1e-5, name
        ours.init_weights()


def test_weights_go_back():
    ours, theirs = pair(patch_norm=True, final_norm=True)
    native, rest = to_native(ours.state_dict())
    other = randomize(BEiT(**ARGS, patch_norm=True, final_norm=True), seed=1)
    other.eval()
    assert not rest
    load(other, from_native(native, 'mmseg', grid=(4, 6)))
    assert all(torch.equal(a, b) for a, b in zip(other(images(64, 96)), theirs(images(64, 96)), strict=True))
    with pytest.raises(CheckpointError, match='an encoder of mmseg has no place for mask_token'):
        from_native(Beit(**SIZES, num_classes=0, use_mask_token=True).state_dict(), 'mmseg', grid=(4, 6))


def test_stochastic_depth_is_theirs():
    ours, theirs = BEiTBackbone(**ARGS, drop_path_rate=0.5), BEiT(**ARGS, drop_path_rate=0.5)
    rates = [getattr(layer.drop_path, 'drop_prob', 0.0) for layer in theirs.layers]
    assert [getattr(layer.drop_path1, 'drop_prob', 0.0) for layer in ours.layers] == pytest.approx(rates)


def test_theirs_ignores_the_dropout_of_attention_weights():
    # it passes attn_drop where BEiTAttention reads attn_drop_rate and swallows the rest
    ours, theirs = BEiTBackbone(**ARGS, attn_drop_rate=0.3), BEiT(**ARGS, attn_drop_rate=0.3)
    assert ours.layers[0].attn.attn_drop.p == 0.3 and theirs.layers[0].attn.attn_drop.p == 0.0


def test_default_norm_eps_is_theirs():
    defaults = dict(img_size=32, embed_dims=16, num_layers=1, num_heads=1)
    assert BEiTBackbone(**defaults).layers[0].norm1.eps == BEiT(**defaults).layers[0].ln1.eps == 1e-5


def test_feature_taps_are_outputs_of_blocks_counted_from_0():
    ours, theirs = pair(out_indices=(0, 2))
    states = ours.run_blocks(images(64, 96), stages=(1, 3))[2]
    for got, state in zip(theirs(images(64, 96)), states.values(), strict=True):
        assert relative_error(got.flatten(2).transpose(1, 2), state[:, 1:]) <= 1e-5


def test_theirs_cannot_read_a_checkpoint_of_another_size():
    source = randomize(BEiT(**{**ARGS, 'img_size': (48, 48)})).state_dict()
    with pytest.raises(NotImplementedError):  # non-square
        BEiT(**ARGS).resize_rel_pos_embed({'state_dict': dict(source)})
    with pytest.raises(NotImplementedError, match='interp2d'):  # SciPy 1.14 removed what it calls
        BEiT(**{**ARGS, 'img_size': (80, 80)}).resize_rel_pos_embed({'state_dict': dict(source)})
    for size in ((64, 96), (80, 80)):
        ours = BEiTBackbone(**{**ARGS, 'img_size': size})
        ours.load_state_dict(source, strict=True)
        assert ours(images(*size))[0].isfinite().all()


def test_theirs_cannot_run_at_another_size():
    ours, theirs = pair()
    assert [tuple(y.shape[2:]) for y in ours(images(33, 50))] == [(3, 4)] * 3
    with pytest.raises(RuntimeError, match='must match the size'):
        theirs(images(32, 48))


def test_shared_table_is_given_to_every_layer_and_dropped_by_theirs():
    source = randomize(Beit(**SIZES, use_rel_pos_bias=False, use_shared_rel_pos_bias=True, num_classes=0))
    state = source.state_dict()
    table = state['rel_pos_bias.relative_position_bias_table']
    ours = BEiTBackbone(**ARGS)
    ours.load_state_dict({n: t for n, t in state.items() if not n.startswith('fc_norm')}, strict=True)
    assert all(torch.equal(layer.attn.relative_position_bias_table, table) for layer in ours.layers)
    theirs = BEiT(**ARGS)
    theirs.load_state_dict(state, strict=False)
    assert not any(layer.attn.relative_position_bias_table.any() for layer in theirs.layers)
