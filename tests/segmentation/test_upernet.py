import pytest
import torch
from torch import nn

from beit_plugin.segmentation.upernet import ConvNormAct, FCNHead, UPerNetHead

LEVELS = [(16, 24), (8, 12), (4, 6), (2, 3)]


def maps(channels=(4, 5, 6, 7), sizes=LEVELS, batch=2, **options):
    return [torch.randn(batch, c, *s, **options) for c, s in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize('sizes', [LEVELS, [(9, 7), (5, 4), (3, 2), (1, 1)], [(37, 53), (18, 27), (9, 13), (4, 6)]])
@pytest.mark.parametrize('pool_scales', [(1, 2, 3, 6), (1,), (2, 5)])
def test_logits_have_the_finest_resolution(sizes, pool_scales):
    head = UPerNetHead((4, 5, 6, 7), 3, 11, pool_scales=pool_scales).eval()
    assert head(maps(sizes=sizes)).shape == (2, 11, *sizes[0])


@pytest.mark.parametrize('levels', [1, 2, 5])
def test_any_number_of_levels(levels):
    sizes = [(32, 48), *LEVELS][:levels]
    inputs = [torch.randn(2, 4, *size) for size in sizes]
    head = UPerNetHead([4] * levels, 6, 3)
    assert len(head.lateral_convs) == levels - 1
    assert head(inputs).shape == (2, 3, *sizes[0])


def test_every_parameter_and_map_gets_a_gradient():
    head = UPerNetHead((4, 5, 6, 7), 6, 3, dropout=0.0)
    inputs = maps(requires_grad=True)
    head(inputs).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in [*inputs, *head.parameters()])


def test_align_corners_changes_the_numbers():
    inputs = maps()
    plain = UPerNetHead((4, 5, 6, 7), 6, 3).eval()
    aligned = UPerNetHead((4, 5, 6, 7), 6, 3, align_corners=True).eval()
    aligned.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(inputs), aligned(inputs))


@pytest.mark.parametrize('head', [UPerNetHead((4, 5, 6, 7), 6, 3, dropout=0.5), FCNHead(4, 6, 3, dropout=0.5)])
def test_dropout_drops_channels_in_training_only(head):
    inputs = maps() if isinstance(head, UPerNetHead) else maps()[0]
    head.requires_grad_(False)
    assert not torch.equal(head(inputs), head(inputs))
    head.eval()
    assert torch.equal(head(inputs), head(inputs))


@pytest.mark.parametrize('num_convs', [1, 3])
@pytest.mark.parametrize('concat_input', [False, True])
def test_fcn_head_layers(num_convs, concat_input):
    head = FCNHead(4, 6, 3, num_convs=num_convs, concat_input=concat_input)
    convs = {name.removesuffix('.conv.weight') for name in head.state_dict() if name.endswith('.conv.weight')}
    assert convs == {f'convs.{i}' for i in range(num_convs)} | ({'conv_cat'} if concat_input else set())
    assert head(torch.randn(2, 4, 5, 7)).shape == (2, 3, 5, 7)


def test_fcn_head_without_convolutions():
    head = FCNHead(4, 4, 3, num_convs=0, dropout=0.0)
    x = torch.randn(2, 4, 5, 7)
    assert torch.equal(head(x), head.conv_seg(x))
    with pytest.raises(ValueError, match='num_classes must be at least 1, got 0; a backbone with features_only'):
        FCNHead(4, 6, 0)
    with pytest.raises(ValueError, match=r'num_convs=0 with in_channels=4 and channels=6.*set channels=4 or num_convs'):
        FCNHead(4, 6, 3, num_convs=0)


def test_dilation_and_kernel_keep_the_size():
    head = FCNHead(4, 6, 3, num_convs=2, kernel_size=5, dilation=3, concat_input=True)
    assert head(torch.randn(2, 4, 6, 9)).shape == (2, 3, 6, 9)
    assert head.convs[0].conv.dilation == (3, 3) and head.conv_cat.conv.dilation == (1, 1)


@pytest.mark.parametrize('channels', [(4, 5, 6), (4, 5, 6, 8), (4, 5, 6, 7, 7)])
def test_refuses_other_maps(channels):
    head = UPerNetHead((4, 5, 6, 7), 6, 3)
    with pytest.raises(ValueError, match=r'got maps with channels \(4, 5, 6.*built for \(4, 5, 6, 7\); give it one'):
        head([torch.randn(1, c, 4, 4) for c in channels])


def test_block_without_norm_or_activation():
    block = ConvNormAct(3, 5, 3, norm_layer=None, act_layer=None)
    assert set(block.state_dict()) == {'conv.weight', 'conv.bias'} and block.norm is None
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(block(x), block.conv(x))


def test_block_starts_as_mmcv_does():
    block = ConvNormAct(64, 256, 3, norm_layer=None)
    assert block.conv.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert not block.conv.bias.any()
    leaky = ConvNormAct(64, 256, 3, act_layer=lambda: nn.LeakyReLU(1.0))
    assert leaky.conv.weight.std().item() == pytest.approx((1 / (256 * 9)) ** 0.5, rel=0.01)


def test_reset_classifier_keeps_device_and_dtype():
    head = FCNHead(4, 6, 3, dtype=torch.float64)
    head.reset_classifier(9)
    assert head.conv_seg.weight.shape == (9, 6, 1, 1) and head.conv_seg.weight.dtype == torch.float64


@pytest.mark.parametrize('make', [lambda dd: UPerNetHead((4, 5), 6, 3, **dd), lambda dd: FCNHead(4, 6, 3, **dd)])
def test_device_and_dtype(make):
    head = make({'device': 'meta', 'dtype': torch.float64})
    assert all(p.is_meta and p.dtype == torch.float64 for p in head.parameters())


def test_export_with_dynamic_size():
    head = UPerNetHead((4, 4), 6, 3).eval()
    dynamic = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    inputs = (maps((4, 4), [(16, 24), (8, 12)]),)
    program = torch.export.export(head, inputs, dynamic_shapes=([dynamic, dynamic],)).module()
    for sizes in [[(16, 24), (8, 12)], [(10, 31), (5, 15)]]:
        other = maps((4, 4), sizes, batch=3)
        torch.testing.assert_close(program(other), head(other))


@pytest.mark.parametrize('training', [False, True])
def test_compiles_without_a_graph_break(training):
    head = UPerNetHead((4, 5), 6, 3, dropout=0.0).train(training)
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend='eager')
    for sizes in [[(16, 24), (8, 12)], [(10, 31), (5, 15)]]:
        inputs = maps((4, 5), sizes)
        torch.testing.assert_close(compiled(inputs), head(inputs))


def test_bfloat16_autocast():
    head = UPerNetHead((4, 5, 6, 7), 6, 3)
    with torch.autocast('cpu', torch.bfloat16):
        logits = head(maps())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
