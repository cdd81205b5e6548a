"""Resizing of bias tables and positions against the official rule, timm and transformers."""

import math

import numpy as np
import pytest
import torch
from helpers import relative_error
from timm.layers import resample_abs_pos_embed
from timm.layers import resize_rel_pos_bias_table as timm_resize

from beit_plugin.models.resample import (
    RESIZE_RULES,
    axis_matrix,
    resize_abs_pos_embed,
    resize_matrices,
    resize_rel_pos_bias_table,
)

CPU = torch.device('cpu')
GRIDS = [
    ((14, 14), (24, 24)),
    ((14, 14), (32, 32)),
    ((14, 14), (40, 40)),
    ((14, 14), (20, 36)),
    ((24, 24), (14, 14)),
    ((9, 14), (23, 7)),
    ((40, 6), (6, 40)),
    ((14, 14), (1, 15)),
    ((3, 2), (5, 4)),
]


def rows(grid):
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def random_table(grid, heads=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(grid))
    return torch.randn(rows(grid), heads, generator=generator, dtype=dtype)


def official_axis(old, new):
    """Places of the old offsets, by the loop of unilm beit/run_class_finetuning.py."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2.0
        gp = (1.0 - q ** (old - 1)) / (1.0 - q)
        if gp > new - 1:
            right = q
        else:
            left = q
    places, place = [], 1.0
    for i in range(old - 1):
        places.append(place)
        place += q ** (i + 1)
    return [-p for p in reversed(places)] + [0.0] + places


def official_resize(table, old, new):
    """unilm's loader: a cubic interpolating spline per head, evaluated at the whole offsets of the new grid."""
    interpolate = pytest.importorskip('scipy.interpolate', reason="needs the extra: pip install 'beit-plugin[test]'")
    y, x = official_axis(old[0], new[0]), official_axis(old[1], new[1])
    dy, dx = np.arange(-(new[0] - 1), new[0]), np.arange(-(new[1] - 1), new[1])
    heads = []
    for values in table[:-3].T.numpy():
        z = values.reshape(len(y), len(x))
        spline = interpolate.RectBivariateSpline(y, x, z, kx=min(3, len(y) - 1), ky=min(3, len(x) - 1), s=0)
        heads.append(torch.from_numpy(spline(dy, dx)).flatten())
    return torch.cat((torch.stack(heads, 1), table[-3:]))


@pytest.mark.parametrize('old, new', GRIDS)
def test_geometric_is_the_official_rule(old, new):
    table = random_table(old)
    expected = official_resize(table, old, new)
    assert relative_error(resize_rel_pos_bias_table(table, old, new), expected) <= 1e-6
    single = resize_rel_pos_bias_table(table.float(), old, new)
    assert single.dtype == torch.float32
    assert relative_error(single, expected) <= 1e-6


@pytest.mark.parametrize('old, new', GRIDS)
def test_linear_is_timms_rule(old, new):
    table = random_table(old, dtype=torch.float32)
    expected = timm_resize(table, new, (rows(new), table.shape[1]), old_window_size=old)
    # timm computes the places in float32; far from the centre of a large grid that shifts them by 1e-6
    assert relative_error(resize_rel_pos_bias_table(table, old, new, 'linear'), expected) <= 2e-5


def hf_bias(table, old, new):
    modeling = pytest.importorskip(
        'transformers.models.beit.modeling_beit', reason="needs the extra: pip install 'beit-plugin[test]'"
    )
    from transformers import BeitConfig

    config = BeitConfig(image_size=(16 * old[0], 16 * old[1]), num_attention_heads=table.shape[1], hidden_size=12)
    module = modeling.BeitRelativePositionBias(config)
    module.relative_position_bias_table.data = table
    return module(new)[0].detach()


def bias(table, grid):
    from timm.models.beit import gen_relative_position_index

    return table[gen_relative_position_index(grid)].permute(2, 0, 1)


@pytest.mark.parametrize('old, new', [((7, 7), (7, 7)), ((7, 7), (12, 5)), ((10, 10), (4, 4)), ((3, 3), (8, 9))])
def test_bilinear_is_transformers_rule_on_square_base_windows(old, new):
    table = random_table(old)
    ours = bias(resize_rel_pos_bias_table(table, old, new, 'bilinear'), new)
    assert relative_error(ours, hf_bias(table, old, new)) <= 1e-6


def test_transformers_is_wrong_on_a_base_window_that_is_not_square():
    # it reads the (h, w) table as (w, h), so that even the identity resize changes the bias; ours does not follow
    grid = (14, 20)
    table = random_table(grid, dtype=torch.float32)
    assert (hf_bias(table, grid, grid) - bias(table, grid)).abs().max() > 3
    assert torch.equal(resize_rel_pos_bias_table(table, grid, grid, 'bilinear'), table)


def test_rules_on_a_smooth_table():
    # how much each rule moves the bias of near offsets from 14 to 40 patches; the axis matters more than the kernel
    offsets = torch.arange(-13, 14, dtype=torch.float64).abs()
    table = torch.exp(-(offsets[:, None] + offsets[None, :]) / 3).reshape(-1, 1)  # 27*27, 1
    table = torch.cat((table, table.new_zeros(3, 1)))
    near = {}
    for rule in RESIZE_RULES:
        resized = resize_rel_pos_bias_table(table, (14, 14), (40, 40), rule)[:-3].reshape(79, 79)
        near[rule] = [round(resized[39, 39 + offset].item(), 3) for offset in (1, 4)]
    assert [round(math.exp(-offset / 3), 3) for offset in (1, 4)] == [0.717, 0.264]
    assert near == {'geometric': [0.717, 0.33], 'linear': [0.717, 0.337], 'bilinear': [0.903, 0.642]}


@pytest.mark.parametrize('rule', RESIZE_RULES)
def test_equal_grids_give_the_table_itself(rule):
    table = random_table((5, 9), dtype=torch.float32)
    assert resize_rel_pos_bias_table(table, (5, 9), (5, 9), rule) is table
    assert resize_matrices((5, 9), (5, 9), rule, CPU) is None
    assert torch.equal(axis_matrix(5, 5, rule, CPU, torch.float64), torch.eye(9).double())
    # one axis stays: each of its rows is resized by itself
    wider = resize_rel_pos_bias_table(table, (5, 9), (5, 12), rule)[:-3].reshape(9, 23, 3)
    row = torch.cat((table[:-3].reshape(9, 17, 3)[4], table[-3:]))
    assert relative_error(resize_rel_pos_bias_table(row, (1, 9), (1, 12), rule)[:-3], wider[4]) < 1e-6


@pytest.mark.parametrize('rule', RESIZE_RULES)
@pytest.mark.parametrize('old, new', [(14, 40), (14, 9), (2, 11), (1, 4), (6, 1)])
def test_matrices_keep_constants_and_symmetry(rule, old, new):
    matrix = axis_matrix(old, new, rule, CPU, torch.float64)
    assert matrix.shape == (2 * new - 1, 2 * old - 1)
    torch.testing.assert_close(matrix.sum(1), torch.ones(2 * new - 1, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(matrix.flip(0, 1), matrix, atol=1e-9, rtol=0)


@pytest.mark.parametrize('rule', RESIZE_RULES)
def test_differentiable_in_float64(rule):
    table = random_table((3, 4), heads=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: resize_rel_pos_bias_table(t, (3, 4), (5, 2), rule), table)


def test_cls_rows_stay():
    table = random_table((4, 6), dtype=torch.float32)
    assert torch.equal(resize_rel_pos_bias_table(table, (4, 6), (9, 5))[-3:], table[-3:])


def test_shrinking_by_the_geometric_rule_crops_near_the_centre():
    # the ratio reaches its floor of 1.01: the outermost old offsets lie beyond the new grid and are not used
    matrix = axis_matrix(24, 14, 'geometric', CPU, torch.float64)
    assert matrix[:, :8].abs().max() < 2e-2 and matrix[:, -8:].abs().max() < 2e-2
    offsets = torch.arange(-23, 24, dtype=torch.float64)
    nearest = matrix @ offsets
    assert nearest[13].abs() < 1e-9 and nearest[-1] < 13


def test_there_and_back_loses_information():
    table = 0.5 * random_table((14, 14))
    back = resize_rel_pos_bias_table(resize_rel_pos_bias_table(table, (14, 14), (40, 40)), (40, 40), (14, 14))
    assert (back - table).abs().max() > 0.5  # so every resize starts from the stored table


@pytest.mark.parametrize('old, new', [((14, 14), (14, 14)), ((6, 9), (13, 4)), ((9, 6), (6, 9)), ((3, 5), (40, 41))])
def test_positions_are_timms(old, new):
    positions = torch.randn(1, 1 + old[0] * old[1], 8)
    expected = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1)
    assert relative_error(resize_abs_pos_embed(positions, old, new), expected) <= 1e-5


def test_positions_at_the_stored_grid_are_the_stored_ones():
    positions = torch.randn(1, 16, 8)
    assert resize_abs_pos_embed(positions, (3, 5), (3, 5)) is positions


def test_a_map_made_in_inference_mode_serves_a_later_training_step():
    grid = (3, 29)  # a size that no other test asks for, so that the cache is filled here
    table = random_table((3, 4), dtype=torch.float32).requires_grad_()
    with torch.inference_mode():
        resize_rel_pos_bias_table(table, (3, 4), grid)
    resize_rel_pos_bias_table(table, (3, 4), grid).square().sum().backward()
    assert table.grad is not None and table.grad.isfinite().all()
    assert not any(m.is_inference() for m in resize_matrices((3, 4), grid, 'geometric', CPU))


@pytest.mark.parametrize('rule', [*RESIZE_RULES, 'positions'])
def test_custom_operator_is_well_formed(rule):
    torch.library.opcheck(torch.ops.beit_plugin.axis_matrix.default, (5, 9, rule, CPU, torch.float64))
    made = torch.ops.beit_plugin.axis_matrix(5, 9, rule, CPU, torch.float64)
    assert torch.equal(made, axis_matrix(5, 9, rule, CPU, torch.float64))
    made.zero_()  # what compiled code writes into its result must not reach the cache
    assert torch.ops.beit_plugin.axis_matrix(5, 9, rule, CPU, torch.float64).abs().sum() > 0


def test_half_precision_and_meta_tables():
    table = random_table((4, 6), dtype=torch.float32)
    half = resize_rel_pos_bias_table(table.bfloat16(), (4, 6), (7, 5))
    assert half.dtype == torch.bfloat16
    assert relative_error(half, resize_rel_pos_bias_table(table, (4, 6), (7, 5))) < 1e-2
    assert resize_rel_pos_bias_table(table.to('meta'), (4, 6), (7, 5)).shape == (rows((7, 5)), 3)


def test_error_sentences():
    table = random_table((4, 6))
    sentence = r'a bias table of a 6x6 grid has shape \(124, heads\), got \(80, 3\); give the grid that the table was'
    with pytest.raises(ValueError, match=sentence):
        resize_rel_pos_bias_table(table, (6, 6), (4, 4))
    with pytest.raises(ValueError, match=r"rel_pos_resize must be one of geometric, linear, bilinear, got 'cubic'"):
        resize_rel_pos_bias_table(table, (4, 6), (4, 4), 'cubic')
