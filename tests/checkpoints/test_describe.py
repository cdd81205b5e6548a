"""What a checkpoint is said to hold, and the one sentence for each that is odd."""

import pytest
import torch
from checkpoints.peers import CLASSES, VOCABULARY, backbone, beit, mim, mim_v2, segmentor

from beit_plugin.checkpoints import CheckpointError, convert
from beit_plugin.checkpoints.describe import describe, tap_rule, taps_in

TABLE = 'blocks.0.attn.relative_position_bias_table'
SHARED = 'rel_pos_bias.relative_position_bias_table'
POSITIONS = dict(use_rel_pos_bias=False, use_abs_pos_emb=True)


@pytest.mark.parametrize(
    ('make', 'model', 'told'),
    [
        (lambda: beit(num_classes=CLASSES, in_chans=1, qkv_bias=False, init_values=None, patch_norm=True), 'Beit',
         dict(embed_dim=16, depth=5, num_heads=2, mlp_ratio=2.0, in_chans=1, qkv_bias=False, init_values=None,
              patch_norm=True, num_classes=CLASSES, global_pool='avg', patch_size=(16, 16), img_size=(32, 32))),
        (lambda: beit(global_pool='token'), 'Beit', dict(num_classes=0, global_pool='token', qkv_bias=True)),
        (lambda: beit(patch_size=(8, 16), img_size=(16, 32)), 'Beit', dict(patch_size=(8, 16), img_size=(16, 32))),
        (mim, 'BeitForMaskedImageModeling',
         dict(vocab_size=VOCABULARY, use_mask_token=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
        (lambda: mim_v2(head_layers=3), 'BeitV2ForMaskedImageModeling', dict(vocab_size=VOCABULARY, head_layers=3)),
        (lambda: backbone(add_fpn=True, final_norm=True), 'BeitBackbone', dict(add_fpn=True, final_norm=True)),
        (backbone, 'BeitBackbone', dict(add_fpn=False, final_norm=False)),
        (lambda: segmentor(channels=8, auxiliary_num_convs=2, out_indices=(0, 1, 2, 4)), 'build_segmentor',
         dict(num_classes=CLASSES, channels=8, use_auxiliary_head=True, auxiliary_channels=6, auxiliary_num_convs=2,
              auxiliary_concat_input=True, out_indices=(0, 1, 2, 4))),
        (lambda: segmentor(use_auxiliary_head=False, out_features=['stem', 'stage1', 'stage2', 'stage5']),
         'build_segmentor', dict(use_auxiliary_head=False, out_features=('stem', 'stage1', 'stage2', 'stage5'))),
    ],
)  # fmt: skip
def test_arguments_of_our_models(make, model, told):
    what = describe(make().state_dict())
    assert what.model == model and not what.untold
    assert {name: what.arguments.get(name) for name in told} == told


def test_taps():
    model = segmentor(out_indices=(0, 1, 2, 4))
    assert describe(model.state_dict()).taps == (0, 1, 2, 4)
    assert describe(convert(model.state_dict(), to='mmseg')).taps is None
    assert describe(segmentor(out_features=['stem', 'stage1', 'stage2', 'stage5']).state_dict()).taps == (-1, 0, 1, 4)


def test_how_dialects_count():
    """The published out_indices of transformers, [3, 5, 7, 11], are the outputs of blocks 1, 3, 5, 9."""
    assert taps_in((1, 3, 5, 9), 12, 'transformers') == taps_in((3, 5, 7, 11), 12, 'mmseg') == [3, 5, 7, 11]
    assert taps_in((-1, 0, 1, 2), 12, 'transformers') == [1, 2, 3, 4]
    assert taps_in((-1, 0, 1, 2), 12, 'unilm') is None  # no number for the embeddings
    assert taps_in((3, 5, 7, 11), 12, 'transformers') is None  # nor there for the last block
    assert (
        tap_rule('transformers') == 'out_indices=[3, 5, 7, 11] of transformers are blocks (1, 3, 5, 9), counted from 0'
    )
    assert tap_rule('unilm') == 'out_indices=[3, 5, 7, 11] of unilm are blocks (3, 5, 7, 11), counted from 0'


def test_what_no_weight_tells():
    what = describe(beit(use_rel_pos_bias=False).state_dict())
    assert what.untold == ('num_heads',) and 'num_heads' not in what.arguments and what.grid is None
    what = describe(segmentor(pool_scales=(1, 2)).state_dict())
    assert what.untold == ('pool_scales',) and 'pool_scales' not in what.arguments


@pytest.mark.parametrize(
    ('size', 'options', 'grid'),
    [
        ((32, 32), POSITIONS, None), ((48, 48), POSITIONS, None), ((32, 48), POSITIONS, (2, 3)),
        ((48, 32), POSITIONS, (3, 2)), ((64, 16), POSITIONS, (4, 1)), ((48, 48), {}, None), ((32, 48), {}, (2, 3)),
        ((32, 48), {'use_abs_pos_emb': True}, (2, 3)),
    ],
)  # fmt: skip
def test_grid(size, options, grid):
    state = beit(img_size=size, **options).state_dict()
    what = describe(state, grid)
    assert what.grid == (size[0] // 16, size[1] // 16) and what.arguments['img_size'] == size


def test_the_grid_of_index_buffers():
    state = convert(beit(img_size=(32, 48)).state_dict(), to='unilm', grid=(2, 3))
    assert describe(state).grid == (2, 3)


@pytest.mark.parametrize(
    ('options', 'size', 'grid', 'sentence'),
    [
        (POSITIONS, (32, 48), None, r'pos_embed .*\(1, 7, 16\), .* not of a square grid; give .*grid=\(h, w\)'),
        (POSITIONS, (32, 48), (2, 4), r'got shape \(1, 7, 16\), .* not of the 2x4 grid that was given'),
        (POSITIONS, (32, 32), (2, 3), r'got shape \(1, 5, 16\), .* not of the 2x3 grid that was given'),
        (POSITIONS, (32, 48), (-2, -3), r'grid must be the \(h, w\) .*, each at least 1, got \(-2, -3\)'),
        ({}, (32, 48), None, r'a bias table of 18 rows is of no square grid; give the grid'),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_told(options, size, grid, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        describe(dict(beit(img_size=size, **options).state_dict()), grid)


def test_table_and_positions_of_two_grids():
    state = beit(use_abs_pos_emb=True).state_dict() | {'pos_embed': torch.ones(1, 10, 16)}
    with pytest.raises(CheckpointError, match=r'pos_embed .* got shape \(1, 10, 16\), which is not of a 2x2 grid'):
        describe(state)


@pytest.mark.parametrize(
    ('name', 'tensor', 'got', 'expected'),
    [
        ('pos_embed', torch.ones(5), r'\(5,\)', '3 dimensions, none of them 0'),
        ('pos_embed', torch.ones(1, 0, 16), r'\(1, 0, 16\)', '3 dimensions, none of them 0'),
        ('pos_embed', torch.ones(1, 1, 16), r'\(1, 1, 16\)', r'1 \+ h \* w tokens'),
        ('head.weight', torch.tensor(1.0), r'\(\)', '2 dimensions'),
        (TABLE, torch.ones(12), r'\(12,\)', '2 dimensions'),
        (TABLE, torch.ones(12, 0), r'\(12, 0\)', '2 dimensions'),
        (SHARED, torch.tensor(1.0), r'\(\)', '2 dimensions'),
        ('blocks.0.gamma_1', torch.ones(16, dtype=torch.int64), 'torch.int64', 'floating point numbers'),
        ('blocks.0.gamma_1', torch.ones(16, device='meta'), 'on meta', 'plain tensor'),
        ('blocks.0.gamma_1', torch.ones(16).to_sparse(), 'torch.sparse_coo', 'plain tensor'),
        ('blocks.0.gamma_1', torch.ones(1, 16), r'\(1, 16\)', '1 dimension, not 0'),
        ('patch_embed.proj.weight', torch.ones(16, 3, 16, 0), r'\(16, 3, 16, 0\)', '4 dimensions, none of them 0'),
        ('patch_embed.proj.weight', torch.ones(16), r'\(16,\)', '4 dimensions'),
        ('patch_embed.proj.weight', None, 'nothing', '4 dimensions'),
        ('blocks.0.mlp.fc1.weight', torch.ones(32), r'\(32,\)', '2 dimensions'),
    ],
)
def test_odd_tensors(name, tensor, got, expected):
    options = POSITIONS if name == 'pos_embed' else {'use_shared_rel_pos_bias': name == SHARED}
    state = beit(num_classes=CLASSES, **options).state_dict()
    state = {**state, name: tensor} if tensor is not None else {n: t for n, t in state.items() if n != name}
    with pytest.raises(CheckpointError, match=rf'expected {name} .*{expected}.*, got .*{got}'):
        describe(state)


@pytest.mark.parametrize(
    ('make', 'name', 'tensor'),
    [
        (segmentor, 'decode_head.conv_seg.weight', torch.ones(7)),
        (segmentor, 'auxiliary_head.conv_seg.weight', torch.tensor(1.0)),
        (mim, 'lm_head.weight', torch.ones(11)),
        (segmentor, '_extra_state', torch.tensor([1, 2, 3])),
        (segmentor, '_extra_state', torch.tensor([1, 2, 3, 6])),
        (segmentor, '_extra_state', torch.tensor([1.0, 2.0, 3.0, 4.0])),
        (segmentor, '_extra_state', torch.tensor([1, 2, 3, 4], device='meta')),
    ],
)
def test_odd_tensors_of_heads(make, name, tensor):
    with pytest.raises(CheckpointError, match=f'expected {name} '):
        describe({**make().state_dict(), name: tensor})


def test_a_layer_scale_of_zeros_is_one():
    state = beit().state_dict()
    state['blocks.0.gamma_1'] = torch.zeros(16)
    assert describe(state).arguments['init_values']
