"""The encoder against timm's Beit: same names, same numbers, same gradients."""

import pytest
import torch
from helpers import SIZES, gradients, images, randomize, relative_error, weighted_sum
from timm.layers import set_fused_attn
from timm.models.beit import Beit as TimmBeit
from timm.utils import AttentionExtract

import beit_plugin  # noqa: F401  tells torch.fx what not to look into
from beit_plugin.checkpoints.convert import detect, from_native, to_native
from beit_plugin.models.beit import Beit

RELATIVE = dict(use_rel_pos_bias=True, use_abs_pos_emb=False)
FORMS = {
    'v1': dict(RELATIVE, init_values=0.1),
    'v2': dict(RELATIVE, init_values=1e-5),
    'shared': dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    'both tables': dict(RELATIVE, use_shared_rel_pos_bias=True, init_values=0.1),
    'positions': dict(use_rel_pos_bias=False, use_abs_pos_emb=True),
    'no layer scale': dict(RELATIVE, init_values=None),
    'no biases': dict(RELATIVE, init_values=0.1, qkv_bias=False),
    '[CLS]': dict(RELATIVE, init_values=0.1, global_pool='token'),
    'norm before pooling': dict(RELATIVE, init_values=0.1, use_fc_norm=False),
    'patch 8': dict(RELATIVE, init_values=0.1, patch_size=8, img_size=(24, 40)),
}


def pair(form, **options):
    arguments = {**SIZES, 'num_classes': 11, **FORMS[form], **options}
    backend = arguments.pop('attn_backend', 'auto')
    theirs = randomize(TimmBeit(**arguments)).eval()
    ours = Beit(**{'init_values': None, **arguments}, attn_backend=backend).eval()
    found = detect(theirs.state_dict())
    native, rest = to_native(theirs.state_dict())
    assert (found.prefix, rest) == ('', {})
    ours.load_state_dict(native, strict=True)
    theirs.load_state_dict(from_native(ours.state_dict(), 'native'), strict=True)
    return ours, theirs


@pytest.mark.parametrize('form, size', [(form, (64, 96)) for form in FORMS] + [('v1', (80, 80)), ('shared', (80, 80))])
def test_outputs_and_gradients(form, size):
    size = FORMS[form].get('img_size', size)
    ours, theirs = pair(form, img_size=size)
    x = images(*size)
    results = []
    for model in (ours, theirs):
        tokens, maps = model.forward_intermediates(x)
        outputs = [tokens, *maps, model.forward_features(x), model.forward_head(tokens, pre_logits=True), model(x)]
        weighted_sum(*outputs).backward()
        results.append(outputs)
    assert max(map(relative_error, *results)) <= 1e-5
    expected, got = gradients(theirs), gradients(ours)
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, max(errors, key=errors.get)


def test_training_with_stochastic_depth_draws_the_same_numbers():
    ours, theirs = pair('v1', drop_path_rate=0.5)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(0)
        results.append(model(images(64, 96, batch=8)))
    assert relative_error(*results) <= 1e-5


# timm resizes once, linearly, by set_input_size; ours does the same at run time with the rule called linear
@pytest.mark.parametrize('form', ['v1', 'both tables', 'positions'])
@pytest.mark.parametrize('size', [(96, 64), (128, 160)])
def test_another_size_by_the_linear_rule(form, size):
    ours, theirs = pair(form, rel_pos_resize='linear') if form == 'none' else pair(form)
    ours.rel_pos_resize = 'linear'
    got = ours(images(*size))
    theirs.set_input_size(img_size=size)
    assert relative_error(got, theirs(images(*size))) <= 1e-4  # timm computes the places of the offsets in float32
    if form != 'positions':  # the official rule is cubic, and moves the result
        ours.rel_pos_resize = 'geometric'
        assert relative_error(ours(images(*size)), theirs(images(*size))) > 1e-3


def test_timm_refuses_another_size_without_being_rebuilt():
    ours, theirs = pair('v1')
    assert ours(images(80, 64)).shape == (2, 11)
    with pytest.raises(AssertionError, match="doesn't match model"):
        theirs(images(80, 64))


def test_norm_eps_is_timms():
    ours, theirs = Beit(**SIZES), TimmBeit(**SIZES)
    assert ours.blocks[0].norm1.eps == theirs.blocks[0].norm1.eps == ours.fc_norm.eps == theirs.fc_norm.eps == 1e-6


def test_initialisation_is_timms():
    # one sample of each parameter: same zeros and ones, same spread within the noise of a sample
    options = {**SIZES, **FORMS['both tables'], 'num_classes': 100}
    expected = TimmBeit(**options).state_dict()
    for name, ours in Beit(**options).state_dict().items():
        theirs = expected[name]
        if theirs.std() == 0:
            assert torch.equal(ours, theirs), name
        else:
            assert ours.std().item() == pytest.approx(
                theirs.std().item(), rel=0.25 if theirs.numel() < 1000 else 0.1
            ), name


def test_key_bias_is_a_buffer_of_zeros_in_timm():
    _, theirs = pair('v1')
    assert not theirs.blocks[0].attn.k_bias.any() and 'blocks.0.attn.k_bias' not in theirs.state_dict()


def test_both_spare_tables_from_weight_decay():
    for form in FORMS:
        ours, theirs = pair(form)
        names = set(ours.state_dict())
        assert ours.no_weight_decay() == theirs.no_weight_decay() & names


def test_timm_cannot_read_a_shared_table_into_layers():
    shared = pair('shared')[0].state_dict()
    with pytest.raises(RuntimeError, match='Missing key'):
        pair('v1')[1].load_state_dict(shared)


def test_mask_token_has_no_counterpart_in_timm():
    ours = Beit(**SIZES, use_mask_token=True)
    extra = ours.state_dict().keys() - TimmBeit(**SIZES, **RELATIVE, init_values=0.1).state_dict().keys()
    assert extra == {'mask_token'}


@pytest.mark.parametrize('method', ['fx', 'hook'])
@pytest.mark.parametrize('form', ['v1', 'both tables', 'positions'])
def test_attention_extract(form, method):
    set_fused_attn(False)  # timm's Beit has the weights then only
    try:
        ours, theirs = pair(form, attn_backend='eager')
    finally:
        set_fused_attn(True)
    x = images(64, 96)
    got, expected = (AttentionExtract(model, method=method)(x) for model in (ours, theirs))
    assert list(got) == list(expected) and len(got) == 3
    assert max(map(relative_error, got.values(), expected.values())) <= 1e-5
    assert all(map(torch.equal, got.values(), ours.encode(x, output_attentions=True).attentions))
    half = ours.bfloat16()
    got = AttentionExtract(half, method=method)(x.bfloat16())
    assert all(map(torch.equal, got.values(), half.encode(x.bfloat16(), output_attentions=True).attentions))
