"""Every file of configs/det against what its source publishes, and one of them run by mmengine from end to end."""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tools_common import ROOT

if importlib.util.find_spec('mmdet') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmdet]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmdet importable

# isort: split

from mmdet.registry import MODELS, TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

import run_common  # isort: skip
from data_folders import DataError  # isort: skip
from run_data import set_data_root  # isort: skip

CONFIGS = sorted(ROOT.glob('configs/det/*.py'))


@pytest.fixture(autouse=True)
def _mmdet_scope(_default_scope, monkeypatch):
    register_all_modules(init_default_scope=True)
    for variable in ('COCO_ROOT', 'COCO_MINI_ROOT'):
        monkeypatch.delenv(variable, raising=False)


def read(name):
    return Config.fromfile(ROOT / f'configs/det/{name}.py')


def test_every_recipe_is_here():
    mask, cascade = 'mask-rcnn_beit-base_coco', 'cascade-mask-rcnn_beit-base_coco'
    assert {path.stem for path in CONFIGS} == {f'{mask}-1024', f'{cascade}-1024', f'{mask}-800_3x', f'{mask}-mini'}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_parses_and_builds(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()  # what a work directory keeps
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    # detectron2 7699f2e, configs/common/models/mask_rcnn_vitdet.py
    assert model.backbone.attention_window == (14, 14) == model.backbone.window_size
    assert model.backbone.global_blocks == (2, 5, 8, 11)
    assert model.neck.rescales == (4, 2, 1, 0.5) and model.neck.out_channels == 256 and model.neck.num_outs == 5
    assert len(model.rpn_head.rpn_conv) == 2
    boxes, masks = model.roi_head.bbox_head, model.roi_head.mask_head
    boxes, masks = (list(x) if isinstance(x, torch.nn.ModuleList) else [x] for x in (boxes, masks))
    assert len(boxes) == len(masks) == (3 if 'cascade' in path.stem else 1)
    for head, convs in [(h, h.shared_convs) for h in boxes] + [(h, h.convs) for h in masks]:
        assert len(convs) == 4 and {type(c.norm).__name__ for c in convs} == {'BEiTLN2d'} and head.num_classes == 80
    assert all(len(head.shared_fcs) == 1 for head in boxes)
    for pipeline in (cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline):
        assert all(TRANSFORMS.build(step) for step in pipeline)
    assert cfg.test_dataloader.to_dict() == cfg.val_dataloader.to_dict()
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters == cfg.max_iters
    assert all(word in path.read_text() for word in ('Paper', 'Commands', 'Hardware'))


@pytest.mark.parametrize('name', ['mask-rcnn_beit-base_coco-1024', 'cascade-mask-rcnn_beit-base_coco-1024'])
def test_recipe_of_vitdet(name):
    """detectron2 5d5c195, projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py."""
    cfg = read(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert (cfg.max_iters, cfg.train_dataloader.batch_size) == (184375, 64 // 8)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.end, warm_up.start_factor, steps.milestones, steps.gamma) == (250, 1e-3, [163889, 177546], 0.1)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    groups = {name: group for group in wrapper.optimizer.param_groups for name in group['param_names']}
    assert groups.keys() == dict(model.named_parameters()).keys()
    for parameter, group in groups.items():
        block = re.match(r'backbone\.layers\.(\d+)\.', parameter)
        depth = int(block[1]) + 1 if block else 0 if parameter.startswith('backbone.') else 13
        assert group['lr'] == pytest.approx(1e-4 * 0.7 ** (13 - depth)), parameter
        assert group['weight_decay'] == (0.1 if model.get_parameter(parameter).ndim > 1 else 0.0), parameter


def test_recipe_of_mimdet():
    """hustvl/MIMDet 2265d85, configs/mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py."""
    cfg = read('mask-rcnn_beit-base_coco-800_3x')
    epoch = 120000 // 64
    assert cfg.max_iters == 36 * epoch and cfg.param_scheduler[1].milestones == [27 * epoch, 33 * epoch]
    assert cfg.optim_wrapper.optimizer.lr == 8e-5 * 64 / 16 and cfg.optim_wrapper.optimizer.weight_decay == 0.1
    assert cfg.val_dataloader.dataset.pipeline[1].scale == (1333, 800)


@pytest.fixture
def photographs(tmp_path):
    """Two drawn images in the layout of coco_mini, an object each."""
    generator = np.random.default_rng(0)
    (tmp_path / 'images/train').mkdir(parents=True)
    (tmp_path / 'annotations').mkdir()
    pictures, objects = [], []
    for i, (width, height) in enumerate([(96, 64), (64, 90)]):
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        pixels[10:40, 10:50] = (200, 30, 30)
        Image.fromarray(pixels).save(tmp_path / f'images/train/{i}.jpg')
        pictures.append(dict(id=i, file_name=f'{i}.jpg', width=width, height=height))
        polygon = [10, 10, 50, 10, 50, 40, 10, 40]
        objects.append(
            dict(
                id=i + 1, image_id=i, category_id=1, iscrowd=0, bbox=[10, 10, 40, 30], area=1200, segmentation=[polygon]
            )
        )
    from mmdet.datasets import CocoDataset

    names = [dict(id=i + 1, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'])]
    content = dict(images=pictures, annotations=objects, categories=names)
    (tmp_path / 'annotations/instances_train.json').write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def small(photographs, tmp_path, monkeypatch):
    """The smallest recipe on them, with a tiny model, for two steps."""
    monkeypatch.setenv('COCO_MINI_ROOT', str(photographs))
    cfg = read('mask-rcnn_beit-base_coco-mini')
    cfg.work_dir = str(tmp_path / 'work')
    cfg.train_dataloader.pin_memory = torch.cuda.is_available()
    cfg.model.backbone.update(
        img_size=64, embed_dims=16, num_layers=4, num_heads=2, window_size=2, global_blocks=(1, 3)
    )
    cfg.model.neck.in_channels = 16
    cfg.model.roi_head.bbox_head.fc_out_channels = 16
    cfg.model.rpn_head.num_convs = 1
    cfg.model.train_cfg.rpn_proposal.max_per_img = 20
    cfg.model.train_cfg.rcnn.sampler.num = 16
    cfg.model.test_cfg.rpn.max_per_img = 10
    for pipeline in (cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline):
        next(step for step in pipeline if step.type == 'Resize').scale = (96, 96)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.test_dataloader = cfg.val_dataloader
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.logger.interval = 1
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    return cfg


def test_trains_and_evaluates(small, tmp_path):
    runner = Runner.from_cfg(small)
    before = runner.model.backbone.layers[0].attn.qkv.weight.clone()
    runner.train()
    scalars = [json.loads(line) for line in next((tmp_path / 'work').rglob('scalars.json')).read_text().splitlines()]
    assert len([line for line in scalars if line.get('loss', float('nan')) > 0]) == 2
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= {name for line in scalars for name in line}
    assert not torch.equal(runner.model.backbone.layers[0].attn.qkv.weight, before)


def test_our_tool_trains_them_too(small, photographs, tmp_path, capsys):
    small.default_hooks.checkpoint.interval = 2
    set_data_root(small, photographs)
    assert small.val_evaluator.ann_file == str(photographs / 'annotations/instances_train.json')
    checkpoint, result, _ = run_common.train(small)
    assert checkpoint == tmp_path / 'work/iter_2.pth' and re.match(r'bbox_mAP -?[\d.]+, segm_mAP', result)
    said = capsys.readouterr().out
    assert 'MaskRCNN of BEiTBackbone + BEiTSimplePyramid, ' in said and '2 training images, 2 validation images' in said
    assert 'coco/bbox_mAP' in run_common.evaluate(small, checkpoint, tta=False)
    (photographs / 'images/train/1.jpg').unlink()
    with pytest.raises(DataError, match=r'1 of 2 images do not exist, such as .*1\.jpg'):
        run_common.train(small)
    (photographs / 'annotations/instances_train.json').write_text('{')
    with pytest.raises(DataError, match='holds no annotations of a CocoDataset'):
        run_common.train(small)
