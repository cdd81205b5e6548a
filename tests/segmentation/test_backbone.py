"""Feature maps: which, in what form, and what comes along."""

import math

import pytest
import torch
from helpers import TINY, images, randomize, relative_error
from torch import nn

from beit_plugin.models.embed import tokens_to_map
from beit_plugin.segmentation.backbone import BeitBackbone, pyramid_indices, resolve_stages

X = images(48, 80)


def backbone(**options):
    return randomize(BeitBackbone(**{**TINY, **options})).eval()


def states(model, x=X):
    return model.run_blocks(x, stages=range(5))[2]


@pytest.mark.parametrize(
    'options, stages',
    [
        (dict(), (4,)),
        (dict(out_indices=1), (2,)),
        (dict(out_indices=-1), (4,)),
        (dict(out_indices=(0, 2)), (1, 3)),
        (dict(out_indices=[-4, -1]), (1, 4)),
        (dict(out_features=('stem', 'stage2', 'stage4')), (0, 2, 4)),
        (dict(out_features=['stage3'], out_indices=[2]), (3,)),
        (dict(out_features=['stage4'], out_indices=-1), (4,)),
    ],
)
def test_stages(options, stages):
    model = backbone(**options)
    maps, expected = model(X), states(model)
    assert model.stages == stages and model.out_channels == (16,) * len(stages)
    assert len(maps) == len(stages)
    for got, stage in zip(maps, stages, strict=True):
        assert got.shape == (2, 16, 3, 5) and torch.equal(got, tokens_to_map(expected[stage], (3, 5)))


def test_maps_keep_the_order_that_was_asked_for():
    assert resolve_stages(4, (3, 0)) == (4, 1) and resolve_stages(4, None, ('stage3', 'stem')) == (3, 0)


def test_blocks_after_the_last_stage_do_not_run():
    model = backbone(out_indices=(0, 1))
    model.blocks[2] = model.blocks[3] = nn.Identity()  # would fail if called
    assert len(model(X)) == 2


@pytest.mark.parametrize('final_norm', [True, False])
def test_final_norm_is_for_the_output_of_the_last_block(final_norm):
    model = backbone(out_indices=(2, 3), final_norm=final_norm)
    assert isinstance(model.norm, nn.LayerNorm if final_norm else nn.Identity)
    maps, expected = model(X), states(model)
    assert torch.equal(maps[0], tokens_to_map(expected[3], (3, 5)))
    assert torch.equal(maps[1], tokens_to_map(model.norm(expected[4]), (3, 5)))


def test_no_parameter_is_left_without_a_gradient():
    # DistributedDataParallel with find_unused_parameters=False needs that
    for options in (dict(), dict(final_norm=True), dict(add_fpn=True), dict(reshape_hidden_states=False)):
        model = backbone(**options)
        sum(y.square().sum() for y in model(X)).backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None], options


def test_token_sequences():
    model = backbone(out_features=('stem', 'stage4'), reshape_hidden_states=False)
    expected = states(model)
    assert [tuple(y.shape) for y in model(X)] == [(2, 16, 16)] * 2
    assert torch.equal(model(X)[0], expected[0]) and torch.equal(model(X)[1], expected[4])


@pytest.mark.parametrize('size', [(48, 80), (64, 64), (70, 33), (47, 161), (17, 32)])
def test_pyramid_levels_of_any_size(size):
    model = backbone(add_fpn=True, out_indices=(0, 1, 2, 3))
    maps = model(images(*size))
    grid = [math.ceil(s / 16) for s in size]
    expected = [tuple(math.ceil(s / stride) for s in size) for stride in (4, 8, 16)]
    expected.append(tuple(g // 2 for g in grid))
    assert [tuple(y.shape[2:]) for y in maps] == expected
    assert [info['reduction'] for info in model.feature_info] == [4, 8, 16, 32]
    expected_maps = model.fpn([tokens_to_map(states(model, images(*size))[i], tuple(grid)) for i in range(1, 5)])
    for got, whole in zip(maps, expected_maps, strict=True):
        assert torch.equal(got, whole[..., : got.shape[2], : got.shape[3]])


def test_pyramid_reads_the_published_blocks():
    assert pyramid_indices(12) == (3, 5, 7, 11) and pyramid_indices(24) == (7, 11, 15, 23)
    model = BeitBackbone(**{**TINY, 'depth': 12}, add_fpn=True, device='meta')
    assert model.stages == (4, 6, 8, 12)
    assert backbone(add_fpn=True, out_indices=(0, 0, 1, 3)).stages == (1, 1, 2, 4)


def test_pyramid_of_a_single_row_of_patches():
    assert [tuple(y.shape[2:]) for y in backbone(add_fpn=True)(images(16, 32))[:3]] == [(4, 8), (2, 4), (1, 2)]


def test_pyramid_norm():
    model = backbone(add_fpn=True, fpn_norm=nn.SyncBatchNorm)
    assert isinstance(model.fpn.upsample_4x[1], nn.SyncBatchNorm)


@pytest.mark.parametrize('patch, strides', [(16, [4, 8, 16, 32]), (8, [4, 8, 16, 32]), (32, [8, 16, 32, 64])])
def test_pyramid_strides(patch, strides):
    model = backbone(add_fpn=True, patch_size=patch)
    assert [info['reduction'] for info in model.feature_info] == strides
    maps = model(images(128, 64))
    assert [(128 // y.shape[2], 64 // y.shape[3]) for y in maps[:3]] == [(s, s) for s in strides[:3]]


def test_pyramid_of_a_single_patch_when_compiled():
    compiled = torch.compile(backbone(add_fpn=True), backend='aot_eager', fullgraph=True)
    for size in ((64, 64), (16, 16)):
        assert compiled(images(*size))[0].shape[2:] == (size[0] // 4, size[1] // 4)


def test_one_stage_name():
    assert backbone(out_features='stage3').stages == (3,)


def test_pyramid_keeps_its_strides_when_the_native_size_changes():
    model = backbone(add_fpn=True)
    model.set_input_size(img_size=(64, 96))
    assert [info['reduction'] for info in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.parametrize('options', [dict(), dict(add_fpn=True), dict(reshape_hidden_states=False, out_indices=(0, 1))])
def test_hidden_states_and_attentions_on_request(options):
    model = backbone(**options, use_mask_token=True)
    mask = torch.rand(2, 15) < 0.5
    bare = model.forward_backbone(X, mask)
    assert bare.hidden_states == () and bare.attentions == ()
    full = model.forward_backbone(X, mask, output_attentions=True, output_hidden_states=True)
    assert [tuple(s.shape) for s in full.hidden_states] == [(2, 16, 16)] * 5
    assert [tuple(a.shape) for a in full.attentions] == [(2, 2, 16, 16)] * 4
    for a, b in zip(bare.feature_maps, full.feature_maps, strict=True):
        assert relative_error(a, b) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model(X, mask), bare.feature_maps, strict=True))
    assert len(model.forward_backbone(X, output_hidden_states=True).hidden_states) == 5
    head_mask = torch.tensor([0.0, 1.0])
    masked = model.forward_backbone(X, mask, head_mask, output_attentions=True)
    assert all(not a[:, 0].any() for a in masked.attentions)


def test_forward_intermediates_of_a_pyramid_counts_levels():
    model = backbone(add_fpn=True)
    maps = model(X)
    chosen = model.forward_intermediates(X, [0, 3], intermediates_only=True)
    assert torch.equal(chosen[0], maps[0]) and torch.equal(chosen[1], maps[3])
    with pytest.raises(ValueError, match="gives maps only: use output_fmt='NCHW' and intermediates_only=True"):
        model.forward_intermediates(X, [0])


def test_pruning():
    model = backbone(add_fpn=True, out_indices=(0, 0, 1, 2))
    maps = model(X)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2] and len(model.blocks) == 2
    assert all(torch.equal(a, b) for a, b in zip(model(X), maps[1:3], strict=True))
    assert not list(model.head.parameters())
    (kept,) = model.forward_intermediates(X, [2], intermediates_only=True)
    assert torch.equal(kept, maps[2])
    with pytest.raises(ValueError, match=r'got levels \[0\], but only \(1, 2\) of the pyramid were kept'):
        model.forward_intermediates(X, [0], intermediates_only=True)
    model = backbone(out_indices=(0, 1))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1] and len(model.blocks) == 2 and len(model(X)) == 2


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(out_indices=(1, 4)), r'out_indices \[4\] do not exist: the model has 4 blocks, so 0 to 3 or -4 to -1'),
        (dict(out_indices=-5), r'out_indices \[-5\] do not exist'),
        (dict(out_features=('stem', 'stage5')), r"out_features \['stage5'\] do not exist: .* 'stage1' to 'stage4'"),
        (dict(out_indices=(0,), out_features=('stage2',)), 'name different stages; give one of them'),
        (dict(add_fpn=True, out_indices=(0, 1, 2)), 'add_fpn needs exactly 4 out_indices, got 3'),
        (dict(add_fpn=True, out_features=('stem',)), 'add_fpn needs exactly 4 out_indices, got 1'),
        (dict(add_fpn=True, reshape_hidden_states=False), 'add_fpn works on maps; it needs reshape_hidden_states=True'),
    ],
)
def test_error_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        backbone(**options)


def test_a_pyramid_needs_a_first_third():
    with pytest.raises(ValueError, match='a pyramid reads 4 blocks, the model has 2'):
        pyramid_indices(2)
    assert [pyramid_indices(depth) for depth in (4, 6, 12, 24)] == [
        (0, 1, 2, 3),
        (1, 2, 3, 5),
        (3, 5, 7, 11),
        (7, 11, 15, 23),
    ]


@pytest.mark.parametrize('options', [dict(out_indices=()), dict(out_features=[])])
def test_no_stage_at_all_is_refused(options):
    with pytest.raises(ValueError, match='out_'):
        backbone(**options)


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'add_fpm'"):
        backbone(add_fpm=True)
