"""Pyramid, heads, loss and segmentor against transformers' BEiT."""

import importlib.util
import re

import pytest
import torch
from heads_common import GRIDS, assert_parity, assert_same_gradients, load_renamed, pyramid_maps, randomise
from torch import nn

from beit_plugin.models.embed import tokens_to_map
from beit_plugin.segmentation.loss import SegmentationLoss
from beit_plugin.segmentation.pyramid import FeaturePyramid
from beit_plugin.segmentation.segmentor import BeitSegmentor, build_segmentor
from beit_plugin.segmentation.upernet import FCNHead, UPerNetHead

if importlib.util.find_spec('transformers') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[test]'", allow_module_level=True)

from safetensors.torch import load_file, save_file
from transformers import BeitConfig, BeitForSemanticSegmentation, PreTrainedModel
from transformers.loss.loss_utils import ForSemanticSegmentationLoss
from transformers.models.beit.modeling_beit import BeitFCNHead, BeitFPNNeck, BeitUperHead

RENAMES = [
    (r'^psp_modules\.blocks\.(\d+)\.conv\.', r'psp_modules.\1.1.'),
    (r'^psp_bottleneck\.', 'bottleneck.'),
    (r'^fpn1\.conv_transpose1\.', 'upsample_4x.0.'),
    (r'^fpn1\.normalization\.', 'upsample_4x.1.'),
    (r'^fpn1\.conv_transpose2\.', 'upsample_4x.3.'),
    (r'^fpn2\.', 'upsample_2x.0.'),
    (r'\.convolution\.', '.conv.'),
    (r'\.normalization\.', '.bn.'),
    (r'^classifier\.', 'conv_seg.'),
]


def rename(name):
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def config(**options):
    return BeitConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=64,
        num_labels=5,
        out_indices=[1, 2, 3, 4],
        auxiliary_channels=6,
        drop_path_rate=0.0,
        **options,
    )


def pair(ours, theirs, training):
    theirs = randomise(theirs).train(training)
    load_renamed(ours, theirs, rename)
    return ours.train(training), theirs


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grid', GRIDS)
def test_pyramid(grid, training):
    ours, theirs = pair(FeaturePyramid(8), BeitFPNNeck(config()), training)
    assert_parity(ours, theirs, [torch.randn(2, 8, *grid) for _ in range(4)], rename)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('pool_scales', [(1, 2, 3, 6), (1, 4)])
def test_decode_head(grid, training, pool_scales):
    ours = UPerNetHead([8] * 4, 8, 5, pool_scales=pool_scales, dropout=0.0)
    assert_parity(*pair(ours, BeitUperHead(config(pool_scales=pool_scales)), training), pyramid_maps(grid), rename)


class Select(nn.Module):
    """Our auxiliary head takes its map; theirs picks it from the list."""

    def __init__(self, head, index):
        super().__init__()
        self.head, self.index = head, index

    def forward(self, maps):
        return self.head(maps[self.index])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('num_convs, concat_input', [(1, False), (2, True)])
def test_auxiliary_head(training, num_convs, concat_input):
    ours = FCNHead(8, 6, 5, num_convs=num_convs, concat_input=concat_input, dropout=0.0)
    theirs = BeitFCNHead(config(auxiliary_num_convs=num_convs, auxiliary_concat_input=concat_input), in_index=2)
    ours, theirs = pair(ours, theirs, training)
    assert_parity(Select(ours, 2), theirs, pyramid_maps((5, 7)), lambda name: f'head.{rename(name)}')


@pytest.mark.parametrize('auxiliary', [True, False])
@pytest.mark.parametrize('size', [(48, 64), (37, 53)])
def test_loss(size, auxiliary):
    labels = torch.randint(5, (2, *size))
    labels[torch.rand(labels.shape) < 0.3] = 255
    gradients = []
    for loss in (
        lambda x, y: ForSemanticSegmentationLoss(x, labels, 255, auxiliary_logits=y, auxiliary_loss_weight=0.4),
        lambda x, y: SegmentationLoss()(x, labels, y),
    ):
        torch.manual_seed(0)
        logits = torch.randn(2, 5, 12, 16, requires_grad=True)
        other = torch.randn(2, 5, 3, 4, requires_grad=True)
        value = loss(logits, other if auxiliary else None)
        value.backward()
        gradients.append((value.detach(), logits.grad, *([other.grad] if auxiliary else [])))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


class Tapped(nn.Module):
    """Their encoder, with its maps taken where their segmentor takes them (facts: one block early)."""

    def __init__(self, beit, indices):
        super().__init__()
        self.beit, self.indices = beit, indices

    def forward(self, x):
        grid = (x.shape[-2] // 16, x.shape[-1] // 16)
        states = self.beit(x, output_hidden_states=True).hidden_states
        return [tokens_to_map(states[i - 1], grid) for i in self.indices]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_segmentor(size, training):
    theirs = randomise(BeitForSemanticSegmentation(config())).train(training)
    pyramid = FeaturePyramid(8)
    decode, auxiliary = UPerNetHead([8] * 4, 8, 5, dropout=0.0), FCNHead(8, 6, 5, dropout=0.0)
    for ours, part in ((pyramid, theirs.fpn), (decode, theirs.decode_head), (auxiliary, theirs.auxiliary_head)):
        load_renamed(ours, part, rename)
    tapped = Tapped(theirs.beit, theirs.config.out_indices)
    model = BeitSegmentor(backbone=tapped, pyramid=pyramid, decode_head=decode, auxiliary_head=auxiliary)
    model.train(training)
    model.double(), theirs.double()
    image, labels = torch.randn(2, 3, *size).double(), torch.randint(5, (2, *size))
    labels[:, :9] = 255
    expected = theirs(image, labels=labels)
    loss, logits = model(image, labels)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5 * expected.logits.abs().max().item())
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    loss.backward()
    expected.loss.backward()
    for ours, part in ((pyramid, theirs.fpn), (decode, theirs.decode_head), (auxiliary, theirs.auxiliary_head)):
        assert_same_gradients(ours, part, rename)


class Wrapped(PreTrainedModel):
    config_class = BeitConfig

    def __init__(self, config):
        super().__init__(config)
        sizes = dict(img_size=32, embed_dim=16, depth=4, num_heads=2, channels=8, auxiliary_channels=8)
        self.segmentor = build_segmentor(**sizes, pool_scales=(1,))
        self.post_init()


@pytest.mark.parametrize('file', ['ours', 'without stages', 'one weight'])
def test_from_pretrained_misses_weights_only(tmp_path, file):
    model = Wrapped(config())
    model.segmentor.backbone.stages = noted = (1, 1, 2, 4)
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    state = load_file(path)
    if file != 'ours':
        del state['segmentor._extra_state']
    if file == 'one weight':
        state = dict([state.popitem()])
    save_file(state, path, metadata={'format': 'pt'})
    loaded, report = Wrapped.from_pretrained(tmp_path, output_loading_info=True)
    weights = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert set(report['missing_keys']) == weights - state.keys() and not report['unexpected_keys']
    assert loaded.segmentor.backbone.stages == (noted if file == 'ours' else (1, 2, 3, 4))  # else as it is built
