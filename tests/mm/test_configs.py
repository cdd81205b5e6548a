"""Every file of configs/seg against what its source publishes: sizes, rates, steps, weights, pipelines."""

import importlib.util
import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import MODELS, TRANSFORMS

pytestmark = pytest.mark.usefixtures('mmseg_scope')

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob('configs/seg/*.py'))
PARTS = ['BEiTBackbone', 'BEiTPyramid', 'BEiTUPerHead', 'BEiTFCNHead']
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
STEPS, BATCH, WARM_UP = 160000, 16, 1500  # of every ADE20K recipe


class Recipe(NamedTuple):
    """What microsoft/unilm has under beit/semantic_segmentation and beit2/semantic_segmentation (2312c6f, 80d673a)."""

    size: int
    stride: int
    lr: float
    decay: float
    drop_path: float
    weights: str


RECIPES = {
    'beit-base_upernet_ade20k-640': Recipe(640, 426, 3e-5, 0.9, 0.1, 'beit_base_patch16_224_pt22k_ft22k'),
    'beit-large_upernet_ade20k-640': Recipe(640, 426, 2e-5, 0.95, 0.2, 'beit_large_patch16_224_pt22k_ft22k'),
    'beit-base_upernet_ade20k-512_pt22k': Recipe(512, 341, 7e-4, 0.65, 0.1, 'beit_base_patch16_224_pt22k'),
    'beit-base_upernet_ade20k-640_pt22k': Recipe(640, 426, 7e-4, 0.65, 0.1, 'beit_base_patch16_224_pt22k'),  # ours
    'beit-large_upernet_ade20k-640_pt22k': Recipe(640, 426, 4e-5, 0.9, 0.2, 'beit_large_patch16_224_pt22k'),  # ours
    'beitv2-base_upernet_ade20k-512': Recipe(512, 341, 5e-5, 0.85, 0.15, 'beitv2_base_patch16_224_pt1k_ft21k'),
    'beitv2-base_upernet_ade20k-512_pt1k': Recipe(512, 341, 5e-5, 0.75, 0.15, 'beitv2_base_patch16_224_pt1k'),
    'beitv2-large_upernet_ade20k-512': Recipe(512, 341, 3e-5, 0.9, 0.2, 'beitv2_large_patch16_224_pt1k_ft21k'),
    'beitv2-large_upernet_ade20k-512_pt1k': Recipe(512, 341, 4e-5, 0.9, 0.2, 'beitv2_large_patch16_224_pt1k'),
}
ADE20K = sorted({*RECIPES, *(f'{name}_1gpu' for name in RECIPES)})


def read(name):
    return Config.fromfile(ROOT / f'configs/seg/{name}.py')


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for path in CONFIGS:
        for variable in re.findall(r'{{\$(\w+)', path.read_text()):
            monkeypatch.delenv(variable, raising=False)


def test_every_recipe_is_here():
    others = {'beit-base_upernet_camvid', 'beit-tiny_upernet_shapes'}
    assert {path.stem for path in CONFIGS} == {*ADE20K, *others}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_parses_and_builds(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()  # what a work directory keeps
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    parts = (model.backbone, model.neck, model.decode_head, model.auxiliary_head)
    assert [type(part).__name__ for part in parts] == PARTS
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters == cfg.max_iters
    text = path.read_text()
    words = ('Paper', 'Hardware', 'python tools/test.py') if '_1gpu' not in path.stem else ('Recipe', 'Hardware')
    assert all(word in text for word in words)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_pipelines(path):
    cfg = Config.fromfile(path)
    train, test = cfg.train_dataloader.dataset.pipeline, cfg.val_dataloader.dataset.pipeline
    assert cfg.test_dataloader.to_dict() == cfg.val_dataloader.to_dict()
    for pipeline in (train, test, cfg.tta_pipeline):
        assert all(TRANSFORMS.build(step) for step in pipeline)
    crop = tuple(cfg.model.data_preprocessor.size)
    assert crop == tuple(cfg.model.backbone.img_size) == tuple(cfg.model.test_cfg.crop_size)
    assert crop == next(step.crop_size for step in train if step.type == 'RandomCrop')
    assert train[1].num_classes == cfg.model.decode_head.num_classes
    scale = train[2].scale
    assert train[2].type == 'RandomResize' and scale[0] == 4 * scale[1] == 4 * test[1].scale[1]
    resizes, flips, *_ = cfg.tta_pipeline[1].transforms
    assert [step.scale for step in resizes] == [tuple(int(side * ratio) for side in scale) for ratio in RATIOS]
    assert [step.prob for step in flips] == [0.0, 1.0]


@pytest.mark.parametrize('name', ADE20K)
class TestADE20K:
    def test_settings(self, name):
        recipe, cfg = RECIPES[name.removesuffix('_1gpu')], read(name)
        model, large = cfg.model, '-large_' in name
        assert model.backbone.pretrained == f'pretrain/{recipe.weights}.pth'
        assert tuple(model.backbone.img_size) == (recipe.size, recipe.size)
        assert (model.test_cfg.mode, model.test_cfg.stride) == ('slide', (recipe.stride, recipe.stride))
        assert model.backbone.drop_path_rate == recipe.drop_path
        assert model.backbone.init_values == (1e-6 if large else 0.1)
        assert model.backbone.out_indices == ((7, 11, 15, 23) if large else (3, 5, 7, 11))
        assert model.data_preprocessor.mean == [123.675, 116.28, 103.53]
        assert cfg.train_dataloader.dataset.pipeline[2].scale == (4 * recipe.size, recipe.size)

    def test_rates_of_all_parameters(self, name):
        recipe, cfg = RECIPES[name.removesuffix('_1gpu')], read(name)
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        # million, unilm beit/README.md; at 512 px the bias tables are smaller
        published = 441 if '-large_' in name else 163
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - published) < 1
        depth = len(model.backbone.layers)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        assert type(wrapper.optimizer) is torch.optim.AdamW and wrapper.optimizer.defaults['betas'] == (0.9, 0.999)
        groups = {name: group for group in wrapper.optimizer.param_groups for name in group['param_names']}
        assert groups.keys() == dict(model.named_parameters()).keys()
        for parameter, group in groups.items():
            block = re.match(r'backbone\.layers\.(\d+)\.', parameter)
            inside = parameter.startswith('backbone.')
            steps = depth - int(block[1]) if block else depth + 1 if inside else 0
            assert group['lr'] == pytest.approx(recipe.lr * recipe.decay**steps), parameter
            decayed = model.get_parameter(parameter).ndim > 1
            assert group['weight_decay'] == (0.05 if decayed else 0.0), parameter

    def test_steps_and_images(self, name):
        cfg, gpus = read(name), 1 if name.endswith('_1gpu') else 8
        accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
        assert cfg.train_dataloader.batch_size * gpus * accumulated == BATCH
        assert cfg.train_cfg.max_iters == STEPS * accumulated
        warm_up, decay = cfg.param_scheduler
        assert (warm_up.begin, warm_up.end, warm_up.start_factor) == (0, WARM_UP * accumulated, 1e-6)
        assert (decay.begin, decay.end, decay.power, decay.eta_min) == (warm_up.end, cfg.train_cfg.max_iters, 1.0, 0.0)

    def test_weights_are_in_the_table(self, name):
        page = (ROOT / 'docs/checkpoints.md').read_text()
        files = {file for text in re.findall(r'`(beit[^`]+\.pth)`', page) for file in braces(text)}
        assert read(name).model.backbone.pretrained.removeprefix('pretrain/') in files


def braces(text):
    """'a_{b,c}' to ['a_b', 'a_c'], as a shell does."""
    parts = [part.split(',') if i % 2 else [part] for i, part in enumerate(re.split(r'[{}]', text))]
    return [''.join(choice) for choice in product(*parts)]


@pytest.mark.parametrize('name', RECIPES)
def test_one_gpu_changes_nothing_else(name):
    recipe, variant = read(name), read(f'{name}_1gpu')
    assert variant.model.backbone.pop('with_cp') is True and variant.optim_wrapper.type == 'BEiTBF16OptimWrapper'
    for cfg in (recipe, variant):
        for key in ('type', 'accumulative_counts'):
            cfg.optim_wrapper.pop(key, None)
        cfg.train_dataloader.pop('batch_size')
        for key in ('max_iters', 'param_scheduler', 'train_cfg'):
            cfg.pop(key)
    assert variant.to_dict() == recipe.to_dict()


def test_index():
    index = yaml.safe_load((ROOT / 'configs/model-index.yml').read_text())
    models = [model for file in index['Import'] for model in yaml.safe_load((ROOT / file).read_text())['Models']]
    assert {model['Config'] for model in models} == {str(path.relative_to(ROOT)) for path in CONFIGS}
    for model in models:
        cfg = Config.fromfile(ROOT / model['Config'])
        assert model['Name'] == Path(model['Config']).stem and 'Results' not in model
        for number in re.findall(r'\d\d\.\d', str(model['Metadata'].get('Published mIoU, not reproduced here', ''))):
            assert number in Path(cfg.filename).read_text()
