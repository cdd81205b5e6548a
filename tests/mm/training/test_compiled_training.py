"""mmengine's ``compile=True``: the same losses, and no graph that is compiled again in the second step or later."""

import importlib.util

import pytest
import torch
from tools_common import SHAPES_CONFIG, image_folder

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from pretraining_common import cache_file, config, pictures, pretrainer, tokenizer_file

STEPS = 4
GRAPHS = []  # that were compiled


def keep(graph, _):
    """A backend that compiles nothing."""
    GRAPHS.append(graph)
    return graph.forward


torch._dynamo.register_backend(keep, name='keep')


@HOOKS.register_module()
class GraphCount(Hook):
    """Notes the number of graphs after each step."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.message_hub.update_scalar('train/graphs', float(len(GRAPHS)))


@pytest.fixture
def mim(tmp_path):
    pictures(tmp_path / 'images')
    tokens = tokenizer_file(tmp_path / 'vqkd.pth')
    return config(tmp_path / 'images', tmp_path, pretrainer(tokens, v2=True), STEPS)


@pytest.fixture
def cached(mim, tmp_path):
    cache = cache_file(tmp_path / 'tokens.safetensors', tmp_path / 'images')
    mim['train_dataloader']['dataset']['token_cache'] = str(cache)
    return mim


@pytest.fixture
def segmentor(tmp_path, monkeypatch, mmseg_scope):
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    cfg = Config.fromfile(SHAPES_CONFIG)
    cfg.merge_from_dict({
        'work_dir': str(tmp_path), 'train_cfg': dict(max_iters=STEPS, val_interval=100),
        'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False,
        'train_dataloader.batch_size': 2, 'param_scheduler': None, 'val_cfg': None, 'val_dataloader': None,
        'val_evaluator': None, 'test_cfg': None, 'test_dataloader': None, 'test_evaluator': None,
    })  # fmt: skip
    return cfg.to_dict()


def train(cfg, name, **options):
    GRAPHS.clear()
    torch._dynamo.reset()
    cfg = dict(cfg, experiment_name=f'{name}_{options}', custom_hooks=[dict(type='GraphCount')], **options)
    cfg['visualizer'] = dict(type='Visualizer', name=cfg['experiment_name'], vis_backends=[])
    runner = Runner.from_cfg(Config(cfg))
    runner.train()
    return {key: runner.message_hub.get_scalar(f'train/{key}').data[0].tolist() for key in ('loss', 'graphs')}


@pytest.mark.parametrize('kind', ['mim', 'cached', 'segmentor'])
def test_compiled(kind, request, caplog):
    cfg = request.getfixturevalue(kind)
    found, expected = train(cfg, kind, compile=dict(backend='keep')), train(cfg, kind)
    assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5) and len(set(found['loss'])) == STEPS
    assert found['graphs'][0] >= 1 and found['graphs'] == found['graphs'][:1] * STEPS
    assert expected['graphs'] == [0] * STEPS and 'Graph break from' not in caplog.text
