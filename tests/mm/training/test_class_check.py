"""Heads and data sets with other numbers of classes do not train; whatever has good reasons to differ does."""

import importlib.util
from types import SimpleNamespace

import pytest
from tools_common import SHAPES_CONFIG, image_folder

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.dataset import ConcatDataset
from mmengine.runner import Runner
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from torch import nn

from beit_plugin.mm.training.class_check import ClassCountError, check_classes


class Part(nn.Module):
    """A module with these attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class RPNHead(Part):
    pass


def one_channel(num_classes, use_sigmoid=True):
    return Part(num_classes=num_classes, out_channels=1, loss_decode=Part(use_sigmoid=use_sigmoid))


def heads(*counts):
    return nn.ModuleList(Part(num_classes=count) for count in counts)


def named(count):
    return SimpleNamespace(metainfo=dict(classes=[f'class {i}' for i in range(count)]))


SEVEN = Part(num_classes=7)
CASES = [  # model, names of the data set, what is wrong
    (dict(decode_head=SEVEN, auxiliary_head=SEVEN), 7, ()),
    (dict(decode_head=SEVEN, auxiliary_head=Part(num_classes=3)), 7, ['model.auxiliary_head.num_classes=3']),
    (dict(decode_head=SEVEN), 150, ['model.decode_head.num_classes=7', 'names 150 classes', 'num_classes=150']),
    (dict(decode_head=heads(7, 3), auxiliary_head=heads(7, 7)), 7, ['model.decode_head.1.num_classes=3']),
    (dict(module=Part(decode_head=SEVEN)), 6, ['model.decode_head.num_classes=7']),  # DDP, or test-time augmentation
    (dict(decode_head=one_channel(2)), 2, ()),
    (dict(decode_head=one_channel(1)), 2, ()),
    (dict(decode_head=one_channel(2)), 7, ['model.decode_head.num_classes=2']),
    (dict(decode_head=one_channel(1, use_sigmoid=False)), 40, ()),  # depth
    (dict(decode_head=SEVEN, auxiliary_head=one_channel(2)), 7, ()),  # edges
    (dict(rpn_head=RPNHead(num_classes=1), bbox_head=Part(num_classes=80)), 80, ()),
    (dict(bbox_head=RPNHead(num_classes=1)), 80, ()),
    (dict(bbox_head=Part(num_classes=80)), 3, ['model.bbox_head.num_classes=80']),
    (dict(bbox_head=Part(num_classes=80), language_model=Part()), 1203, ()),
    (dict(roi_head=Part(bbox_head=heads(3, 80), mask_head=Part(num_classes=80))), 80, ['roi_head.bbox_head.0.num']),
    (dict(roi_head=Part(bbox_head=Part(num_classes=80), mask_head=Part(num_classes=3))), 80, ['roi_head.mask_head']),
    (dict(head=Part(num_classes=10)), 1000, ['model.head.num_classes=10']),
    (dict(head=Part(), neck=None), 1000, ()),
]


@pytest.mark.parametrize(('parts', 'count', 'words'), CASES)
def test_counts(parts, count, words):
    if not words:
        check_classes(Part(**parts), named(count))
        return
    with pytest.raises(ClassCountError) as caught:
        check_classes(Part(**parts), named(count))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize('dataset', [object(), SimpleNamespace(metainfo={}), SimpleNamespace(metainfo=None)])
def test_data_without_names(dataset):
    check_classes(Part(decode_head=SEVEN), dataset)


def test_real_data_sets(tmp_path):
    """ADE20K's label 0 is no class and has no name."""
    image_folder(tmp_path, ('',), 'masks')
    folders = dict(data_root=str(tmp_path), data_prefix=dict(img_path='images', seg_map_path='masks'))
    joined = ConcatDataset([ADE20KDataset(**folders), ADE20KDataset(**folders)])
    check_classes(Part(decode_head=Part(num_classes=150)), joined)
    with pytest.raises(ClassCountError, match=r'ConcatDataset names 150 classes \(wall, building, sky, \.\.\.\)'):
        check_classes(Part(decode_head=Part(num_classes=3)), joined)
    check_classes(Part(decode_head=Part(num_classes=3)), BaseSegDataset(**folders))
    with pytest.raises(ClassCountError, match=r"has the text 'car' as its classes, .*metainfo=dict\(classes=\['car'\]"):
        check_classes(Part(decode_head=SEVEN), SimpleNamespace(metainfo=dict(classes='car')))


@pytest.mark.usefixtures('mmseg_scope')
@pytest.mark.filterwarnings('ignore:The draw is False', 'ignore:``build_loss``')
@pytest.mark.parametrize('part', ['train', 'val', 'test'])
def test_nothing_starts(part, tmp_path, monkeypatch):
    """Under mmengine's Runner alone; labels are 0 to 6 and fit, but seven names do not fit eight classes."""
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    cfg = Config.fromfile(SHAPES_CONFIG)
    small, width = dict(embed_dims=16, num_heads=2), [16] * 4
    cfg.merge_from_dict({
        'model.backbone': small, 'model.neck.embed_dim': 16, 'model.decode_head': dict(in_channels=width, channels=8),
        'model.auxiliary_head': dict(in_channels=16, channels=8), 'visualizer.vis_backends': [],
        'work_dir': str(tmp_path / 'work'), 'experiment_name': f'classes_{part}',
    })  # fmt: skip
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    more = (*cfg.classes, 'moon')
    wrong = cfg.val_dataloader if part == 'val' else cfg[f'{part}_dataloader']
    wrong.dataset.metainfo = dict(classes=more, palette=[[0, 0, 0]] * len(more))
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ClassCountError, match=r'BaseSegDataset names 8 classes .*set num_classes=8'):
        (runner.test if part == 'test' else runner.train)()
    assert not list((tmp_path / 'work').glob('*.pth'))
