"""The encoder and the backbone against transformers' BeitModel and BeitBackbone."""

import importlib.util
import re

import pytest
import torch
from helpers import images, randomize, relative_error, weighted_sum

if importlib.util.find_spec('transformers') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[test]'", allow_module_level=True)

from transformers import BeitBackbone as HFBackbone
from transformers import BeitConfig, BeitModel

from beit_plugin.checkpoints.convert import CheckpointError, detect, from_native, to_native
from beit_plugin.models.beit import Beit
from beit_plugin.segmentation.backbone import BeitBackbone

FORMS = {
    'v1': (dict(use_relative_position_bias=True), dict()),
    'v2': (dict(use_relative_position_bias=True, layer_scale_init_value=1e-5), dict(init_values=1e-5)),
    'shared': (
        dict(use_shared_relative_position_bias=True),
        dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    ),
    'positions': (dict(use_absolute_position_embeddings=True), dict(use_rel_pos_bias=False, use_abs_pos_emb=True)),
    'masked': (dict(use_relative_position_bias=True, use_mask_token=True), dict(use_mask_token=True)),
    '[CLS]': (dict(use_relative_position_bias=True, use_mean_pooling=False), dict(global_pool='token')),
    'no layer scale': (dict(use_relative_position_bias=True, layer_scale_init_value=0.0), dict(init_values=0)),
    'gelu_new': (dict(use_relative_position_bias=True, hidden_act='gelu_new'), dict(act_layer='gelu_new')),
    'relu': (dict(use_relative_position_bias=True, hidden_act='relu'), dict(act_layer='relu')),
    # transformers reads tables and positions of a native size that is not square wrongly: only without them
    'not square': (dict(image_size=(64, 96)), dict(use_rel_pos_bias=False, img_size=(64, 96))),
}


def config(**options):
    arguments = dict(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=64,
        layer_norm_eps=1e-6, drop_path_rate=0.0, attn_implementation='eager',
    )  # fmt: skip
    return BeitConfig(**{**arguments, **options})


OURS = dict(img_size=64, embed_dim=128, depth=4, num_heads=2, mlp_ratio=2.0)


def pair(form):
    theirs = randomize(BeitModel(config(**FORMS[form][0]))).eval()
    ours = Beit(**{**OURS, 'num_classes': 0, **FORMS[form][1]}).eval()
    found = detect(theirs.state_dict())
    native, rest = to_native(theirs.state_dict())
    assert (found.dialect, found.prefix, rest) == ('transformers-v5', '', {})
    ours.load_state_dict(native, strict=True)
    return ours, theirs


def assert_same_gradients(ours, theirs):
    expected, rest = to_native({n: p.grad for n, p in theirs.named_parameters() if not n.startswith('fpn')})
    got = {n: p.grad for n, p in ours.named_parameters() if not n.startswith('fpn')}
    assert not rest and got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


@pytest.mark.parametrize('form', FORMS)
def test_model(form):
    ours, theirs = pair(form)
    x = images(*ours.patch_embed.img_size)
    mask = torch.rand(2, ours.window_size[0] * ours.window_size[1]) < 0.4 if form == 'masked' else None
    a = ours.encode(x, mask, output_attentions=True, output_hidden_states=True)
    b = theirs(x, bool_masked_pos=mask, output_attentions=True, output_hidden_states=True)
    mine = [a.last_hidden_state, a.pooler_output, *a.hidden_states, *a.attentions]
    other = [b.last_hidden_state, b.pooler_output, *b.hidden_states, *b.attentions]
    assert len(mine) == len(other) == 2 + 5 + 4
    assert max(map(relative_error, mine, other)) <= 1e-5
    weighted_sum(*mine).backward()
    weighted_sum(*other).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize('dialect', ['transformers-v5', 'transformers'])
@pytest.mark.parametrize('form', ['v1', 'shared', 'positions', 'masked'])
def test_weights_go_back(form, dialect, tmp_path):
    ours, theirs = pair(form)
    native = ours.state_dict()
    if dialect == 'transformers-v5':
        other = randomize(BeitModel(config(**FORMS[form][0])), seed=1)
        other.load_state_dict(from_native(native, dialect), strict=True)
    else:  # through the loader of transformers, which knows the names on disk
        state = {f'beit.{n}': t for n, t in from_native(native, dialect).items()}
        torch.save(state, tmp_path / 'pytorch_model.bin')
        config(**FORMS[form][0]).save_pretrained(tmp_path)
        other, report = BeitModel.from_pretrained(tmp_path, output_loading_info=True, attn_implementation='eager')
        assert not report['missing_keys'] and not report['unexpected_keys']
    other.eval()
    assert relative_error(other(images(64, 64))[0], theirs(images(64, 64))[0]) <= 1e-6
    again, rest = to_native(from_native(native, dialect))
    assert not rest and again.keys() == native.keys() and all(torch.equal(again[n], native[n]) for n in native)


def test_a_key_bias_is_another_model():
    state = dict(pair('v1')[1].state_dict())
    state['layers.0.attention.q_proj.weight2'] = torch.ones(1)
    assert list(to_native(state)[1]) == ['layers.0.attention.q_proj.weight2']
    del state['layers.1.attention.k_proj.weight']
    with pytest.raises(CheckpointError, match=r'blocks.1.attn.qkv.weight needs q, k and v, but k is missing'):
        to_native(state)
    native = {**pair('v1')[0].state_dict(), 'blocks.0.attn.k_bias': torch.ones(128)}
    with pytest.raises(CheckpointError, match='k_bias is not zero; BEiT has no key bias, so this is another model'):
        to_native(native)


def backbones(theirs_options, ours_options):
    theirs = randomize(HFBackbone(config(use_relative_position_bias=True, **theirs_options))).eval()
    ours = BeitBackbone(**OURS, **ours_options).eval()
    native, rest = to_native(theirs.state_dict())
    native = {re.sub('^pyramid', 'fpn', name): tensor for name, tensor in native.items()}
    assert not rest
    for name in ('norm.weight', 'norm.bias'):  # BeitBackbone has a final norm that its maps do not pass
        native.pop(name, None)
    ours.load_state_dict(native, strict=True)
    return ours, theirs


@pytest.mark.parametrize(
    'theirs_options, ours_options',
    [
        (dict(), dict()),
        (dict(out_features=['stem', 'stage2', 'stage4']), dict(out_features=['stem', 'stage2', 'stage4'])),
        (dict(out_indices=[1, 3]), dict(out_indices=[0, 2])),  # theirs counts the stem, ours blocks from 0
        (
            dict(out_features=['stage1', 'stage4'], reshape_hidden_states=False),
            dict(out_features=['stage1', 'stage4'], reshape_hidden_states=False),
        ),
        (
            dict(out_features=['stage1', 'stage2', 'stage3', 'stage4'], add_fpn=True),
            dict(out_features=['stage1', 'stage2', 'stage3', 'stage4'], add_fpn=True),
        ),
        (dict(out_indices=[1, 2, 3, 4], add_fpn=True), dict(out_indices=(0, 1, 2, 3), add_fpn=True)),
    ],
)
@pytest.mark.parametrize('training', [False, True])
def test_backbone(theirs_options, ours_options, training):
    ours, theirs = backbones(theirs_options, ours_options)
    ours.train(training)
    theirs.train(training)
    x = images(64, 64)
    a = ours.forward_backbone(x, output_attentions=True, output_hidden_states=True)
    b = theirs(x, output_attentions=True, output_hidden_states=True)
    mine = [*a.feature_maps, *a.hidden_states, *a.attentions]
    other = [*b.feature_maps, *b.hidden_states, *b.attentions]
    assert len(a.feature_maps) == len(b.feature_maps) and len(mine) == len(other)
    assert max(map(relative_error, mine, other)) <= 1e-5
    weighted_sum(*mine).backward()
    weighted_sum(*other).backward()
    assert_same_gradients(ours, theirs)
    pyramid = to_native({n: p.grad for n, p in theirs.named_parameters()})[0]
    for name, parameter in ours.named_parameters():
        if name.startswith('fpn'):
            expected = pyramid[name.replace('fpn', 'pyramid')]
            error = (parameter.grad - expected).abs().max()
            # a bias before a batch norm has no gradient but noise
            scale = ours.fpn.upsample_4x[0].weight.grad.abs().max() if name == 'fpn.upsample_4x.0.bias' else None
            assert error <= 1e-5 * (expected.abs().max() if scale is None else scale), name


def test_default_norm_eps_differs():
    # published weights were trained with 1e-6; transformers' configuration defaults to 1e-12
    assert BeitConfig().layer_norm_eps == 1e-12 and Beit(**OURS).blocks[0].norm1.eps == 1e-6


def test_tokens_start_at_zero_in_transformers_only():
    theirs, ours = BeitModel(config(use_mask_token=True)), Beit(**OURS, use_mask_token=True)
    assert not theirs.embeddings.cls_token.any() and not theirs.embeddings.mask_token.any()
    assert ours.cls_token.std() > 0.01 and ours.mask_token.std() > 0.01


def test_key_projection_has_no_bias():
    _, theirs = pair('v1')
    assert theirs.layers[0].attention.k_proj.bias is None and theirs.layers[0].attention.q_proj.bias is not None


@pytest.mark.parametrize('form, differs', [('v1', True), ('shared', True)])
@pytest.mark.parametrize('size', [(96, 80), (48, 64)])
def test_other_sizes_by_the_bilinear_rule(form, differs, size):
    ours, theirs = pair(form)
    x = images(*size)
    expected = theirs(x).last_hidden_state
    ours.rel_pos_resize = 'bilinear'
    assert relative_error(ours.encode(x).last_hidden_state, expected) <= 1e-5
    ours.rel_pos_resize = 'geometric'
    assert (relative_error(ours.encode(x).last_hidden_state, expected) > 1e-2) == differs


def test_a_table_of_a_native_size_that_is_not_square_is_read_transposed():
    options = dict(use_relative_position_bias=True, image_size=(64, 96))
    theirs = randomize(BeitModel(config(**options))).eval()
    ours = Beit(**{**OURS, 'img_size': (64, 96), 'num_classes': 0}).eval()
    ours.load_state_dict(to_native(theirs.state_dict())[0])
    x = images(64, 96)
    assert relative_error(ours.encode(x).last_hidden_state, theirs(x).last_hidden_state) > 1e-2
    transposed = {}
    for name, table in ours.state_dict().items():
        if name.endswith('relative_position_bias_table'):
            # what theirs makes of it: the (7, 11) table read as (11, 7), resized bilinearly to (7, 11)
            grid = table[:-3].reshape(1, 11, 7, 2).permute(0, 3, 1, 2)
            grid = torch.nn.functional.interpolate(grid, size=(7, 11), mode='bilinear').permute(0, 2, 3, 1)
            transposed[name] = torch.cat((grid.reshape(-1, 2), table[-3:]))
    ours.load_state_dict({**ours.state_dict(), **transposed})
    assert relative_error(ours.encode(x).last_hidden_state, theirs(x).last_hidden_state) <= 1e-5
