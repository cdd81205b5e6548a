"""The work directory of a training: one at a time, old checkpoints are named, tests leave its configuration alone."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tools_common import ENV, ROOT, SHAPES_CONFIG, image_folder, tool

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config

from data_folders import DataError  # isort: skip
from plot_run import configuration, predict  # isort: skip
from predict_models import MMSegPredictor  # isort: skip
from run_common import evaluate, train  # isort: skip
from run_options import add_checks, open_config, set_on_nan  # isort: skip
from run_work_dir import LOCK, in_use  # isort: skip

CONFIG = f"""_base_ = {str(SHAPES_CONFIG)!r}
model = dict(
    backbone=dict(embed_dims=16, num_heads=2),
    neck=dict(embed_dim=16),
    decode_head=dict(in_channels=[16] * 4, channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """A configuration that trains in a second, and its data."""
    image_folder(tmp_path / 'data', ('training', 'validation'), values=(0, 1, 7), count=2)
    (tmp_path / 'config.py').write_text(CONFIG)
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path / 'data'))
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile('config.py')
    cfg.work_dir = 'work'
    return cfg


def leave_as_mmsegmentation(cfg, checkpoint):
    """What mmsegmentation's `test.py --tta` writes into the work directory."""
    cfg.load_from = str(checkpoint)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    cfg.dump('work/config.py')


@pytest.mark.slow
def test_copies_after_tests_with_augmentation(cfg):
    checkpoint, *_ = train(cfg)
    copied = Path('work/config.py')
    trained = copied.read_bytes()
    single, multi = (evaluate(open_config(copied), checkpoint, tta)['mIoU'] for tta in (False, True))
    assert single != multi and copied.read_bytes() == trained
    assert [b'BEiTSegTTAModel' in path.read_bytes() for path in sorted(Path('work').glob('*/config.py'))] == [True] * 2

    leave_as_mmsegmentation(open_config(copied), checkpoint)
    assert Config.fromfile(copied).model.type == 'BEiTSegTTAModel'
    again, first = open_config(copied), Config.fromfile('config.py')
    assert again.model == first.model and again.test_dataloader == first.test_dataloader and again.load_from is None
    assert evaluate(again, checkpoint, tta=False)['mIoU'] == single
    rows, _ = predict(*configuration(Path('work')), 1)
    assert len(rows[0]) == 3
    assert MMSegPredictor(copied, checkpoint, False, 'cpu').segments


def test_a_copy_without_the_pipeline(cfg):
    Path('work').mkdir()
    leave_as_mmsegmentation(cfg, 'iter_4.pth')
    text = Path('work/config.py').read_text()
    Path('work/config.py').write_text(text.replace('test_pipeline = ', 'other_pipeline = '))
    with pytest.raises(DataError, match='left by a test with --tta and has no test_pipeline: give the configuration'):
        open_config('work/config.py')


HOLDER = """
import os, sys, time
sys.path[:0] = {paths}
from types import SimpleNamespace
from run_work_dir import in_use
with in_use(SimpleNamespace(work_dir='work', get=lambda *_: None)):
    if os.fork() == 0:  # a worker outlives its training for some seconds
        time.sleep(30)
    print('holds', flush=True)
    time.sleep(60)
"""


def folder(**values):
    return SimpleNamespace(work_dir='work', get=lambda key, default=None: values.get(key, default))


def test_one_training_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(ROOT / 'tools')]
    holder = subprocess.Popen(
        [sys.executable, '-c', HOLDER.format(paths=paths)], stdout=subprocess.PIPE, env=ENV, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b'holds\n'
        with pytest.raises(
            DataError, match=rf'^a training is running in work \(process {holder.pid} on .*\): wait for it, or name'
        ), in_use(folder()):  # fmt: skip
            pass
        with monkeypatch.context() as patch:
            patch.setenv('RANK', '1')  # of one training the first process alone asks
            with in_use(folder(launcher='pytorch')):
                pass
        holder.kill()
        holder.wait()
        with in_use(folder()):
            assert (tmp_path / 'work' / LOCK).read_text().startswith(f'process {os.getpid()} on ')
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_checkpoints_of_an_earlier_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with in_use(folder()):
        pass
    for age, name in ((9, 'iter_20.pth'), (5, 'iter_10.pth')):
        (tmp_path / 'work' / name).write_bytes(b'')
        os.utime(tmp_path / 'work' / name, (time.time() - age,) * 2)
    with in_use(folder(resume=True)):
        pass
    assert capsys.readouterr().out == ''
    with in_use(folder()):
        pass
    assert 'holds 2 checkpoints of an earlier training, the last is iter_10.pth: this' in capsys.readouterr().out
    Path('work').rename('old')
    Path('work').write_text('')
    with pytest.raises(DataError, match='work directory work cannot be written'), in_use(folder()):
        pass


@pytest.mark.slow
def test_a_training_of_nan_ends_with_status_1(cfg):
    options = (
        '--cfg-options',
        'optim_wrapper.optimizer.lr=1e30',
        'optim_wrapper.clip_grad=None',
        'param_scheduler=None',
    )
    common = ('--data-root', 'data', '--work-dir', 'work')
    error = tool('train', 'config.py', *common, *options, cwd=Path.cwd(), status=1)
    *_, last = error.splitlines()
    assert last.startswith('error: the loss is not finite in iteration 2 (loss nan, ') and '--on-nan continue' in last
    assert not list(Path('work').glob('*.pth'))


@pytest.mark.parametrize(
    ('hooks', 'added'),
    [
        (None, ['BEiTClassCheckHook', 'BEiTInvalidLossHook']),
        (dict(classes=None), ['BEiTInvalidLossHook']),  # left out on purpose
        (dict(classes=dict(type='BEiTClassCheckHook'), invalid_loss=dict(type='BEiTInvalidLossHook')), []),
    ],
)
def test_checks_are_added_once(hooks, added):
    found = []
    add_checks(SimpleNamespace(cfg=Config(dict(default_hooks=hooks)), register_hook=found.append))
    assert [hook['type'] for hook in found] == added
    cfg = Config(dict(default_hooks=hooks))
    set_on_nan(cfg, 'continue')
    assert cfg.default_hooks.invalid_loss == dict(type='BEiTInvalidLossHook', on_nan='continue')


def test_classes_of_heads_and_data(cfg):
    for part in ('decode_head', 'auxiliary_head'):
        cfg.model[part].num_classes = 150
    with pytest.raises(
        DataError, match=r'model.decode_head.num_classes=150 and .* names 7 classes .* set num_classes=7'
    ):
        train(cfg)
