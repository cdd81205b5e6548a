import importlib.util

import pytest
import torch
from torch import nn

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from beit_plugin.mm.segmentation.decode_head import BEiTFCNHead, BEiTUPerHead
from beit_plugin.mm.segmentation.norm import BEiTSyncBN

LEVELS = [(8, 12), (4, 6), (2, 3), (1, 2)]


def head(**options):
    arguments = {
        'in_channels': [4, 5, 6, 7],
        'in_index': [0, 1, 2, 3],
        'channels': 6,
        'num_classes': 5,
        'norm_cfg': {'type': 'SyncBN', 'requires_grad': True},
        'loss_decode': {'type': 'CrossEntropyLoss', 'avg_non_ignore': True},
    }
    return BEiTUPerHead(**{**arguments, **options})


def maps():
    return [torch.randn(2, c, *size) for c, size in zip((4, 5, 6, 7), LEVELS, strict=True)]


def samples(labels, paths=('a.png', 'b.png')):
    made = []
    for label, path in zip(labels, paths, strict=True):
        sample = SegDataSample(metainfo={} if path is None else {'img_path': path})
        sample.gt_sem_seg = PixelData(data=label[None])
        made.append(sample)
    return made


def test_registered_in_the_root():
    assert MODELS.get('BEiTUPerHead') is BEiTUPerHead


def test_default_norm_trains_on_the_cpu():
    model = head()
    assert isinstance(model.bottleneck.norm, BEiTSyncBN)
    losses = model.loss(maps(), samples(torch.randint(5, (2, 32, 48))), {})
    losses['loss_ce'].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_in_index_selects_levels():
    inputs = maps()
    model = head(in_channels=[4, 6], in_index=[0, 2]).eval()
    assert torch.equal(model(inputs), model([inputs[0], None, inputs[2]]))


def test_activation():
    assert isinstance(head(act_cfg={'type': 'GELU'}).bottleneck.activate, nn.GELU)
    assert isinstance(head(act_cfg=None).bottleneck.activate, nn.Identity)


@pytest.mark.parametrize('cfg', [{'type': 'DCN'}, {'type': 'Conv2d', 'groups': 2}])
def test_refuses_another_convolution(cfg):
    with pytest.raises(ValueError, match=r"got conv_cfg=.*, expected None or dict\(type='Conv2d'\)"):
        head(conv_cfg=cfg)


def test_accepts_the_plain_convolution_by_name():
    assert head(conv_cfg={'type': 'Conv2d'}).conv_cfg == {'type': 'Conv2d'}


def test_refuses_an_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'chanels'"):
        head(chanels=6)


def test_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="got norm type 'XN', which is not registered"):
        head(norm_cfg={'type': 'XN'})


@pytest.mark.parametrize('paths, name', [(('a.png', 'b.png'), 'b.png'), ((None, None), '1 of the batch')])
def test_names_the_image_and_its_wrong_labels(paths, name):
    labels = torch.randint(5, (2, 32, 48))
    labels[0, :4] = 255
    labels[1, 3, :2] = torch.tensor([7, 150])
    sentence = rf'image {name} has the labels 7, 150, but there are only the 5 classes 0 to 4; .*reduce_zero_label'
    with pytest.raises(ValueError, match=sentence):
        head().loss(maps(), samples(labels, paths), {})
    alone = BEiTFCNHead(in_channels=4, in_index=0, channels=6, num_classes=5, norm_cfg={'type': 'SyncBN'})
    assert isinstance(alone.convs[0].norm, BEiTSyncBN)
    with pytest.raises(ValueError, match=sentence):
        alone.loss(maps(), samples(labels, paths), {})


@pytest.mark.parametrize('classes', [1, 2])
def test_one_output_tells_two_classes_apart(classes):
    model = head(
        num_classes=classes,
        out_channels=1,
        threshold=0.5,
        loss_decode={'type': 'CrossEntropyLoss', 'use_sigmoid': True, 'avg_non_ignore': True},
    )
    losses = model.loss(maps(), samples(torch.randint(2, (2, 32, 48))), {})
    assert losses['loss_ce'].isfinite()
    with pytest.raises(ValueError, match='has the labels 2, but there are only the 2 classes 0 to 1'):
        model.loss(maps(), samples(torch.full((2, 32, 48), 2)), {})
    losses = model.loss(maps(), samples(torch.full((2, 32, 48), 255)), {})
    assert losses['loss_ce'].item() == 0 and losses['loss_ce'].requires_grad and losses['acc_seg'].shape == (1,)


def test_everything_ignored_gives_a_finite_loss():
    losses = head().loss(maps(), samples(torch.full((2, 32, 48), 255)), {})
    assert losses['loss_ce'].item() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_cuda_an_auxiliary_head_sees_no_wrong_labels():
    model = head().cuda()
    inputs = [x.cuda() for x in maps()]
    labels = torch.zeros(2, 32, 48, dtype=torch.long, device='cuda')
    labels[1, 3, 4] = 77
    batch = samples(labels)
    assert model.loss(inputs, batch, {})['loss_ce'].isfinite()
    assert [int(sample.gt_sem_seg.data.max()) for sample in batch] == [0, 255]
    with pytest.raises(ValueError, match=r'image b.png has the labels 77'):
        model.loss(inputs, samples(torch.zeros_like(labels)), {})
