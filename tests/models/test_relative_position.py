import pytest
import torch
from timm.models.beit import gen_relative_position_index

from beit_plugin.models.relative_position import (
    BiasGeometry,
    RelativePositionBias,
    bias_geometry,
    gather_bias,
    num_relative_distance,
    relative_position_index,
)
from beit_plugin.models.resample import resize_rel_pos_bias_table

CPU = torch.device('cpu')
GRIDS = [(14, 14), (2, 5), (5, 2), (1, 1), (1, 7), (9, 4), (24, 40)]


@pytest.mark.parametrize('grid', GRIDS)
def test_index_is_timms(grid):
    index = relative_position_index(*grid)
    assert torch.equal(index, gen_relative_position_index(grid))
    assert index.max() + 1 == num_relative_distance(grid)


def test_padding_columns_point_into_the_table():
    index = relative_position_index(2, 5, pad=5)
    assert index.shape == (11, 16)
    assert torch.equal(index[:, :11], relative_position_index(2, 5)) and not index[:, 11:].any()


def naive_bias(table, h, w):
    """Query, key and head in loops, by the words of the official code."""
    rows, heads = table.shape
    tokens = [None] + [(y, x) for y in range(h) for x in range(w)]
    bias = torch.empty(heads, len(tokens), len(tokens), dtype=table.dtype)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if query is None and key is None:
                row = rows - 1
            elif query is None:
                row = rows - 3  # [CLS] to token
            elif key is None:
                row = rows - 2  # token to [CLS]
            else:
                row = (query[0] - key[0] + h - 1) * (2 * w - 1) + query[1] - key[1] + w - 1
            bias[:, i, j] = table[row]
    return bias


@pytest.mark.parametrize('pad', [0, 3])
@pytest.mark.parametrize('h, w', [(2, 3), (4, 2), (1, 5)])
def test_gather_is_the_loops(h, w, pad):
    table = torch.randn(num_relative_distance((h, w)), 3)
    geometry = BiasGeometry((h, w), relative_position_index(h, w, pad=pad), None, ((h, w), 'geometric'))
    assert torch.equal(gather_bias(table, geometry), naive_bias(table, h, w))


@pytest.mark.parametrize('pad', [0, 5])
def test_gradient_is_summed_over_all_pairs_of_a_row(pad):
    h, w, heads = 3, 4, 2
    n = 1 + h * w
    table = torch.randn(num_relative_distance((h, w)), heads, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(heads, n, n, dtype=torch.float64)
    index = relative_position_index(h, w, pad=pad)
    gather_bias(table, BiasGeometry((h, w), index, None, ((h, w), 'geometric'))).backward(upstream)
    expected = torch.zeros_like(table)
    expected.index_add_(0, index[:, :n].flatten(), upstream.reshape(heads, -1).T)
    torch.testing.assert_close(table.grad, expected)


@pytest.mark.parametrize('rule', ['geometric', 'linear', 'bilinear'])
def test_another_grid_reads_the_resized_table(rule):
    stored = torch.randn(num_relative_distance((3, 5)), 2, requires_grad=True)
    geometry = bias_geometry((3, 5), (4, 2), rule, CPU)
    expected = naive_bias(resize_rel_pos_bias_table(stored.detach(), (3, 5), (4, 2), rule), 4, 2)
    got = gather_bias(stored, geometry)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    assert stored.grad.abs().sum() > 0


def test_native_grid_needs_no_resize_and_shares_its_index():
    geometry = bias_geometry((3, 5), (3, 5), 'geometric', CPU)
    assert geometry.matrices is None and geometry.grid == (3, 5)
    assert bias_geometry((4, 4), (3, 5), 'geometric', CPU).index is geometry.index


def test_large_grids_are_not_cached():
    first, second = (bias_geometry((45, 46), (45, 46), 'geometric', CPU).index for _ in range(2))
    assert first is not second and torch.equal(first, second)


def test_index_made_in_inference_mode_serves_a_later_training_step():
    with torch.inference_mode():
        geometry = bias_geometry((2, 23), (2, 23), 'geometric', CPU)  # a grid that no other test asks for
    assert not geometry.index.is_inference()
    table = torch.zeros(num_relative_distance((2, 23)), 1, requires_grad=True)
    gather_bias(table, geometry).sum().backward()
    assert table.grad.sum() == geometry.index.shape[0] ** 2


def test_shared_module():
    module = RelativePositionBias((2, 3), 4, dtype=torch.float64)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [('relative_position_bias_table', (18, 4))]
    torch.nn.init.normal_(module.relative_position_bias_table)
    geometry = bias_geometry((2, 3), (2, 3), 'geometric', CPU)
    assert torch.equal(module(geometry), naive_bias(module.relative_position_bias_table.detach(), 2, 3))
