"""Any input size, at construction and at run time, on one model."""

import math

import pytest
import torch
from helpers import TINY, images, randomize, relative_error, weighted_sum
from torch import nn
from torch.nn import functional as F

from beit_plugin.models.beit import Beit
from beit_plugin.models.resample import RESIZE_RULES, resize_abs_pos_embed, resize_rel_pos_bias_table

# native; smaller; larger; turned; one patch; no multiples of the patch
SIZES = [(48, 80), (32, 48), (96, 112), (80, 48), (16, 16), (16, 160), (50, 81), (33, 95), (47, 17)]
FORMS = [
    dict(),
    dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    dict(use_abs_pos_emb=True),
    dict(use_abs_pos_emb=True, use_rel_pos_bias=False),
]


def beit(**options):
    return randomize(Beit(**{**TINY, 'depth': 2, 'num_classes': 7, **options})).eval()


def rebuilt(model, size, **options):
    """A model whose native size is ``size``, with the tables and positions of ``model`` resized once."""
    grid = tuple(math.ceil(s / 16) for s in size)
    other = Beit(**{**TINY, 'depth': 2, 'num_classes': 7, 'img_size': tuple(16 * g for g in grid), **options}).eval()
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if name.endswith('relative_position_bias_table'):
            state[name] = resize_rel_pos_bias_table(tensor, model.window_size, grid, model.rel_pos_resize)
        elif name == 'pos_embed':
            state[name] = resize_abs_pos_embed(tensor, model.window_size, grid)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', SIZES)
def test_running_at_a_size_is_being_built_for_it(size, form):
    model = beit(**form)
    grid = tuple(math.ceil(s / 16) for s in size)
    x = images(*size)
    output = model.encode(x, output_hidden_states=True, output_attentions=True)
    n = 1 + grid[0] * grid[1]
    assert output.grid == grid and output.last_hidden_state.shape == (2, n, 16)
    assert output.attentions[0].shape == (2, 2, n, n)
    # the right and bottom edges are filled with zeros up to a whole patch
    whole = F.pad(x, (0, 16 * grid[1] - size[1], 0, 16 * grid[0] - size[0]))
    assert relative_error(rebuilt(model, size, **form)(whole), model(x)) < 1e-5


@pytest.mark.parametrize('rule', RESIZE_RULES)
def test_each_rule_at_run_time(rule):
    model = beit(rel_pos_resize=rule)
    x = images(96, 64)
    assert relative_error(rebuilt(model, (96, 64), rel_pos_resize=rule)(x), model(x)) < 1e-5
    others = {r: beit(rel_pos_resize=r)(x) for r in RESIZE_RULES if r != rule}
    assert all(relative_error(y, model(x)) > 1e-4 for y in others.values())


@pytest.mark.parametrize('form', FORMS)
def test_native_size_is_untouched_by_other_sizes(form):
    model, x = beit(**form), images(48, 80)
    before = model(x)
    for size in SIZES:
        model(images(*size))
    assert torch.equal(model(x), before)
    state = beit(**form).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize('img_size, grid', [(40, (3, 3)), ((17, 31), (2, 2)), ((16, 160), (1, 10)), (64, (4, 4))])
@pytest.mark.parametrize('form', FORMS)
def test_any_size_at_construction(img_size, grid, form):
    model = beit(img_size=img_size, **form)
    assert model.window_size == grid  # patches at the edges count, as at run time
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert model(images(*size)).isfinite().all()
    assert model.encode(images(*size), interpolate_pos_encoding=False).grid == grid  # the static path, nothing resized


@pytest.mark.parametrize('patch', [8, (8, 16), (14, 10)])
def test_other_patches(patch):
    model = beit(patch_size=patch)
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    assert model.window_size == (math.ceil(48 / ph), math.ceil(80 / pw))
    assert model.encode(images(50, 61)).grid == (math.ceil(50 / ph), math.ceil(61 / pw))


def test_gradients_reach_the_stored_tables_from_other_sizes():
    model = beit(use_abs_pos_emb=True)
    weighted_sum(model(images(90, 40))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(b.attn.relative_position_bias_table.grad.abs().sum() > 0 for b in model.blocks)


def test_gradient_of_the_table_at_another_size_by_finite_differences():
    model = beit(dtype=torch.float64)
    x = images(64, 50).double()
    table = model.blocks[0].attn.relative_position_bias_table
    weighted_sum(model(x)).backward()
    with torch.no_grad():
        for row, head in [(0, 0), (22, 1), (44, 0), (46, 1), (47, 0)]:
            step, kept = 1e-5, table[row, head].item()
            table[row, head] = kept + step
            above = weighted_sum(model(x))
            table[row, head] = kept - step
            slope = ((above - weighted_sum(model(x))) / (2 * step)).item()
            table[row, head] = kept
            assert table.grad[row, head].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_set_input_size_equals_running_there_and_keeps_what_it_can():
    model = beit(use_abs_pos_emb=True, use_shared_rel_pos_bias=True)
    model.blocks[1].attn.relative_position_bias_table.requires_grad_(False)
    x = images(64, 112)
    expected = model(x)
    model.set_input_size(img_size=(64, 112))
    assert model.window_size == (4, 7) and model.blocks[0].attn.relative_position_bias_table.shape == (94, 2)
    assert relative_error(model(x), expected) < 1e-5
    assert [b.attn.relative_position_bias_table.requires_grad for b in model.blocks] == [True, False]


def test_set_input_size_with_another_patch_resizes_the_kernel():
    model = beit()
    assert model.feature_info[0]['reduction'] == 16
    model.set_input_size(img_size=(48, 80), patch_size=(8, 8))
    assert model.window_size == (6, 10) and model.patch_embed.proj.weight.shape == (16, 3, 8, 8)
    assert {info['reduction'] for info in model.feature_info} == {8}
    assert model.encode(images(48, 80)).grid == (6, 10)


@pytest.mark.parametrize(
    'changes, size, error',
    [
        ({}, dict(img_size=(8, 8)), 'at least one 16x16 patch'),
        ({}, dict(img_size=0), 'img_size must be one or two whole numbers'),
        ({}, dict(patch_size=0), 'patch_size must be one or two whole numbers'),
        ({}, dict(patch_size=128), 'at least one 128x128 patch'),
        ({}, dict(img_size=(10, 10), patch_size=32), 'at least one 32x32 patch'),
        (dict(rel_pos_resize='cubic'), dict(img_size=128, patch_size=8), 'rel_pos_resize must be one of'),
        ({'blocks.1.attn.relative_position_bias_table': 44}, dict(img_size=128, patch_size=8), 'a bias table of a'),
        ({'patch_embed.proj': nn.Identity()}, dict(img_size=128, patch_size=8), 'in_channels'),
    ],
    ids=str,
)
def test_set_input_size_is_all_or_nothing(changes, size, error):
    model = beit(use_abs_pos_emb=True)
    for name, value in changes.items():
        owner, _, attribute = name.rpartition('.')
        value = nn.Parameter(torch.zeros(value, 2)) if isinstance(value, int) else value
        setattr(model.get_submodule(owner), attribute, value)

    def state():
        embed = model.patch_embed
        sizes = embed.img_size, embed.patch_size, embed.grid_size, embed.num_patches, model.window_size
        return sizes, model.feature_info, {name: id(parameter) for name, parameter in model.named_parameters()}

    before = state()
    with pytest.raises((ValueError, AttributeError), match=error):
        model.set_input_size(**size)
    assert state() == before
