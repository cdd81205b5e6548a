"""Trainings of a few steps by mmengine's Runner on the CPU: averaged weights, bfloat16, crops without labels."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from tools_common import ROOT, SHAPES_CONFIG, cut, image_folder, write

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from beit_plugin.mm.segmentation.transforms import DataFileError

pytestmark = pytest.mark.usefixtures('mmseg_scope')

NAMES = itertools.count()
MOMENTUM = 0.25
OPTIONS = {
    'model.backbone.embed_dims': 16,
    'model.backbone.num_heads': 2,
    'model.neck.embed_dim': 16,
    'model.decode_head': dict(in_channels=[16] * 4, channels=8, dropout_ratio=0.0),
    'model.auxiliary_head': dict(in_channels=16, channels=8, dropout_ratio=0.0),
    'train_dataloader': dict(batch_size=2, num_workers=0, persistent_workers=False),
    'val_dataloader': dict(num_workers=0, persistent_workers=False),
    'test_dataloader': dict(num_workers=0, persistent_workers=False),
    'train_cfg': dict(max_iters=4, val_interval=4),
    'default_hooks': dict(checkpoint=dict(interval=2), logger=dict(interval=1)),
    'param_scheduler': None,
    'visualizer.vis_backends': [],
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Five images for training, five for validation."""
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    return tmp_path


def config(tmp_path, text='', bases='', **options):
    """The tiny configuration with more bases, lines and options; names of options have _ for the first dot."""
    path = tmp_path / f'config_{next(NAMES)}.py'
    path.write_text(f'_base_ = [{str(SHAPES_CONFIG)!r}, {bases}]\n{text}\n')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({**OPTIONS, **options})
    cfg.experiment_name = path.stem  # two loggers of one name would be one
    return cfg


def run(cfg, work_dir, *hooks):
    cfg.work_dir = str(work_dir)
    runner = Runner.from_cfg(cfg)
    for hook in hooks:
        runner.register_hook(hook, priority='LOWEST')
    runner.train()
    return runner


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Watch(Hook):
    """Weights after every step, and those that are evaluated."""

    def __init__(self):
        self.steps, self.evaluated = [], None

    def after_train_iter(self, runner, *args, **kwargs):
        self.steps.append(weights(runner.model))

    def before_val_iter(self, runner, *args, **kwargs):
        self.evaluated = weights(runner.model)


def average(steps, momentum):
    """The moving average of floating-point tensors, from the first."""
    found = {name: tensor.clone() for name, tensor in steps[0].items()}
    for state in steps[1:]:
        for name, tensor in state.items():
            if tensor.is_floating_point():
                found[name] += momentum * (tensor - found[name])
    return found


def same(got, expected, exactly=True):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            equal = torch.equal(got[name], tensor) if exactly else torch.allclose(got[name], tensor, atol=1e-5)
            assert equal, name


class TestEMA:
    BASE = repr(str(ROOT / 'configs/_base_/ema.py'))
    TEXT = f'custom_hooks = [dict(_base_.custom_hooks[0], momentum={MOMENTUM})]'

    def test_average_is_evaluated_saved_and_resumed(self, data, tmp_path):
        assert Config.fromfile(ROOT / 'configs/_base_/ema.py').custom_hooks[0].update_buffers
        watch = Watch()
        work = tmp_path / 'work'
        runner = run(config(tmp_path, self.TEXT, self.BASE), work, watch)
        expected = average(watch.steps, MOMENTUM)
        name = (
            'decode_head.fusion.bn.running_mean' if False else next(n for n in expected if n.endswith('running_mean'))
        )
        assert not torch.equal(expected[name], watch.steps[-1][name])  # batch statistics move, and are averaged
        same(watch.evaluated, expected, exactly=False)
        same(weights(runner.model), watch.steps[-1])  # the training goes on from its own

        saved = torch.load(work / 'iter_4.pth', weights_only=True)
        same(saved['state_dict'], expected, exactly=False)
        same(
            {n.removeprefix('module.'): t for n, t in saved['ema_state_dict'].items() if n != 'steps'}, watch.steps[-1]
        )
        assert saved['ema_state_dict']['steps'] == 4

        (work / 'last_checkpoint').write_text(str(work / 'iter_2.pth'))
        again = Watch()
        resumed = run(config(tmp_path, self.TEXT, self.BASE, resume=True), work, again)
        assert len(again.steps) == 2
        same(weights(resumed.model), watch.steps[-1], exactly=False)
        same(again.evaluated, watch.evaluated, exactly=False)

    def test_our_test_tool_reads_the_average(self, data, tmp_path):
        from run_common import evaluate

        cfg = config(tmp_path, self.TEXT, self.BASE)
        runner = run(cfg, tmp_path / 'work')
        score = runner.message_hub.get_scalar('val/mIoU').current()
        fresh = config(tmp_path, self.TEXT, self.BASE)
        fresh.work_dir = str(tmp_path / 'tested')
        assert evaluate(fresh, tmp_path / 'work/iter_4.pth', tta=False)['mIoU'] == pytest.approx(score)


BF16 = dict(type='BEiTBF16OptimWrapper', accumulative_counts=2)


class TestBF16:
    def test_trains_and_resumes(self, data, tmp_path):
        watch, again = Watch(), Watch()
        cfg = config(tmp_path, optim_wrapper=BF16)
        cfg.model.backbone.with_cp = True
        runner = run(cfg, tmp_path / 'work', watch)
        first, second, third, fourth = (state['backbone.cls_token'] for state in watch.steps)
        assert not torch.equal(first, second) and torch.equal(second, third) and not torch.equal(third, fourth)
        losses = runner.message_hub.get_scalar('train/loss').data[0]
        assert np.isfinite(losses).all()
        (tmp_path / 'work/last_checkpoint').write_text(str(tmp_path / 'work/iter_2.pth'))
        resumed = run(config(tmp_path, optim_wrapper=BF16, resume=True), tmp_path / 'work', again)
        same(weights(resumed.model), weights(runner.model), exactly=False)

    def test_loss_is_near_that_of_float32(self, data, tmp_path):
        losses = []
        for wrapper in ({}, dict(type='BEiTBF16OptimWrapper')):
            cfg = config(tmp_path, optim_wrapper=wrapper)
            cfg.train_cfg.max_iters = 1
            runner = run(cfg, tmp_path / f'work_{len(losses)}')
            losses.append(runner.message_hub.get_scalar('train/loss').current())
        assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


class TestBadFiles:
    """No tool of ours has looked at the files before."""

    def test_stop(self, data, tmp_path):
        cut(data / 'images/training/1.jpg', 0.5)
        cfg = config(tmp_path)
        cfg.train_cfg.max_iters = 9  # of 2 images: all five are met
        with pytest.raises(DataFileError, match=r'1\.jpg cannot be read as an image'):
            run(cfg, tmp_path / 'work')

    def test_go_on(self, data, tmp_path):
        cut(data / 'images/training/1.jpg', 0.5)
        cfg = config(tmp_path)
        for step in cfg.train_dataloader.dataset.pipeline[:2]:
            step.on_error = 'skip'
        cfg.train_cfg.max_iters = 9
        runner = run(cfg, tmp_path / 'work')
        assert runner.iter == 9 and (tmp_path / 'work/iter_8.pth').is_file()
        log = next((tmp_path / 'work').glob('*/*.log')).read_text()
        assert log.count('left out of training, image 1: ') == 1


HEADS = {
    'ours': ('BEiTUPerHead', 'BEiTFCNHead'),
    'stock': ('UPerHead', 'FCNHead'),
}


class TestCropsWithoutLabels:
    @pytest.mark.parametrize('bf16', [False, True])
    @pytest.mark.parametrize('avg_non_ignore', [False, True])
    @pytest.mark.parametrize('heads', HEADS)
    def test_loss_and_gradients_are_finite(self, tmp_path, heads, avg_non_ignore, bf16):
        cfg = config(tmp_path)
        for part, kind in zip(('decode_head', 'auxiliary_head'), HEADS[heads], strict=True):
            cfg.model[part].type = kind
            cfg.model[part].loss_decode.avg_non_ignore = avg_non_ignore
        model = MODELS.build(cfg.model).train()
        data = model.data_preprocessor(batch(255), training=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            losses = model.loss(data['inputs'], data['data_samples'])
        total, _ = model.parse_losses(losses)
        total.backward()
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in losses.values()) and total == 0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_a_training_goes_through_them(self, data, tmp_path):
        for i in range(5):
            write(data / f'annotations/training/{i}.png', np.full((40, 48), 255 if i % 2 else 0))
        runner = run(config(tmp_path), tmp_path / 'work')
        assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def batch(value):
    from mmengine.structures import PixelData

    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(96, 96)))
        sample.gt_sem_seg = PixelData(data=torch.full((1, 96, 96), value))
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8) for _ in range(2)], data_samples=samples)
