"""Every file of configs/mim against what its source publishes."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec('mmengine') is None or importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  registers

# isort: split

from mmengine.config import Config
from mmengine.registry import FUNCTIONS, HOOKS, MODELS
from pretraining_common import tokenizer

from beit_plugin.data.mim_views import TwoViews, mim_collate
from beit_plugin.tokenizers import PUBLISHED

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(ROOT.glob('configs/mim/*.py'))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for path in [*CONFIGS, ROOT / 'configs/_base_/mim_images.py']:
        for variable in re.findall(r'{{\$(\w+)', path.read_text()):
            monkeypatch.delenv(variable, raising=False)


def read(name):
    return Config.fromfile(ROOT / f'configs/mim/{name}.py')


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_parses_and_builds(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'copy.py')
    assert Config.fromfile(tmp_path / 'copy.py').to_dict() == cfg.to_dict()  # what a work directory keeps
    views = TwoViews(**cfg.train_dataloader.dataset.views)
    if cfg.model.type == 'BEiTVQKD':
        cfg.model.teacher.update(weights=None)
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        patch, what = model.tokenizer.patch_size, model.tokenizer
        assert not cfg.train_dataloader.collate_fn.get('masking')
    else:
        with torch.device('meta'):
            model = MODELS.build({**cfg.model, 'tokenizer': tokenizer()})
        patch, what = model.model.patch_embed.patch_size, model.model
        masking = cfg.train_dataloader.collate_fn.masking
        batch = mim_collate([dict(inputs=torch.zeros(3, *views.size))] * 2, masking)
        assert batch['mask'].shape[1:] == what.window_size
        assert batch['mask'].flatten(1).sum(1).tolist() == [masking.num_masking_patches] * 2
    assert views.size[0] % patch[0] == 0
    for hook in cfg.default_hooks.values():
        assert HOOKS.build(hook)
    assert FUNCTIONS.get(cfg.train_dataloader.collate_fn.type) is mim_collate
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert cfg.param_scheduler[-1].end == length
    assert all(word in path.read_text() for word in ('Paper', 'Command', 'Hardware', 'tools/train.py'))


class TestPublished:
    def test_v1(self):
        cfg = read('beit-base_dalle')
        optimizer, (warm_up, cosine) = cfg.optim_wrapper.optimizer, cfg.param_scheduler
        assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1.5e-3, (0.9, 0.98), 0.05)
        assert cfg.optim_wrapper.clip_grad.max_norm == 3.0 and cfg.train_dataloader.batch_size * 16 == 2048
        assert (warm_up.end, cosine.begin, cosine.end, cosine.eta_min) == (10, 10, 800, 1e-5)
        assert cfg.train_cfg.max_epochs == 800 and cfg.model.tokenizer.source in PUBLISHED
        assert cfg.model.backbone.to_dict() == dict(variant='base', img_size=224, patch_size=16, drop_path_rate=0.1)
        views = cfg.train_dataloader.dataset.views
        assert (views['size'], views.token_size, views.color_jitter, views.scale) == (224, 112, 0.4, (0.08, 1.0))
        masking = cfg.train_dataloader.collate_fn.masking
        assert masking.to_dict() == dict(grid=(14, 14), num_masking_patches=75, min_num_patches=16, min_aspect=0.3)

    def test_v2(self):
        cfg = read('beitv2-base_vqkd')
        assert cfg.model.backbone.drop_path_rate == 0.0 and cfg.train_cfg.max_epochs == 300
        assert cfg.param_scheduler[0].end == 10 and cfg.param_scheduler[1].begin == 10
        assert (cfg.model.head.head_layers, cfg.model.head.early_layers) == (2, 9)
        views = cfg.train_dataloader.dataset.views
        assert (views.token_size, views.scale) == (None, (0.2, 1.0)) and cfg.model.tokenizer.source in PUBLISHED

    def test_tokenizer(self):
        cfg = read('vqkd-base')
        optimizer = cfg.optim_wrapper.optimizer
        assert optimizer.lr == 5e-5 * 512 / 128 and cfg.train_dataloader.batch_size * 8 == 512
        assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.99), 1e-4)
        assert (cfg.model.tokenizer.vocab_size, cfg.model.tokenizer.code_dim, cfg.model.tokenizer.decoder_depth) == (
            8192,
            32,
            3,
        )
        views = cfg.train_dataloader.dataset.views
        assert (views.color_jitter, views.scale) == (0.0, (0.08, 1.0))
