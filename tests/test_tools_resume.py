"""tools/train.py --resume after a kill: the same losses and last line; a sentence where nothing can be read."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tools_common import ROOT, SHAPES_CONFIG, image_folder

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

from data_folders import DataError  # isort: skip
from run_common import train  # isort: skip

ITERATIONS = 20
CONFIG = f"""_base_ = {str(SHAPES_CONFIG)!r}
model = dict(
    backbone=dict(embed_dims=16, num_heads=2, drop_path_rate=0.3),
    neck=dict(embed_dim=16),
    decode_head=dict(in_channels=[16] * 4, channels=8),
    auxiliary_head=dict(in_channels=16, channels=8),
)
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters={ITERATIONS}, val_interval=10)
default_hooks = dict(
    resume=dict(type='BEiTResumeHook'), logger=dict(interval=1), checkpoint=dict(interval=3, max_keep_ckpts=3)
)
log_processor = dict(window_size=1)
"""


@pytest.fixture
def config(tmp_path):
    image_folder(tmp_path / 'data', ('training', 'validation'), values=(0, 1, 7))
    (tmp_path / 'config.py').write_text(CONFIG)
    return tmp_path / 'config.py'


def losses(work_dir: Path) -> set[tuple[int, float]]:
    """All that were logged, by all starts."""
    lines = [line for path in work_dir.glob('*/vis_data/scalars.json') for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines if line.endswith('}')]  # the last one may be cut off
    return {(row['step'], row['loss']) for row in rows if 'loss' in row}


def start(config: Path, work_dir: Path, kill_at: int | None = None) -> str:
    """The last line of a training, or of what it wrote before it was killed, once a loss of this step was logged."""
    command = [sys.executable, ROOT / 'tools/train.py', config, '--data-root', 'data', '--work-dir', work_dir]
    with open(work_dir.with_suffix('.out'), 'w+') as output:
        process = subprocess.Popen(
            [*command, '--resume'],
            cwd=config.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)},
        )
        while kill_at and process.poll() is None and max(losses(work_dir), default=(0,))[0] < kill_at:
            time.sleep(0.01)
        if kill_at:
            process.kill()
        code = process.wait()
        output.seek(0)
        text = output.read()
    assert code == (-signal.SIGKILL if kill_at else 0), text[-3000:]
    return text.splitlines()[-1] if text else ''


@pytest.mark.slow
def test_killed(config):
    whole, killed = config.parent / 'whole', config.parent / 'killed'
    seed = time.time_ns() % 10**6
    steps = sorted(random.Random(seed).sample(range(1, ITERATIONS), 2))
    print(f'killed at steps {steps}, of seed {seed}')
    expected = start(config, whole)
    for step in steps:
        start(config, killed, kill_at=step)
    last_line = start(config, killed)
    assert re.fullmatch(
        r'mIoU [\d.]+ after 20 iterations, checkpoint .*/killed/iter_20.pth, curve .*/killed/curve.png', last_line
    )
    assert last_line == expected.replace(str(whole), str(killed))
    assert losses(killed) == losses(whole) and len(losses(whole)) == ITERATIONS


def test_none_can_be_read(config, monkeypatch):
    from mmengine.config import Config

    monkeypatch.chdir(config.parent)
    cfg = Config.fromfile(config)
    cfg.update(work_dir='work', resume=True, launcher='none', val_dataloader=None, val_cfg=None, val_evaluator=None)
    cfg.train_dataloader.dataset.data_root = 'data'
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    folder = config.parent / 'work'
    folder.mkdir()
    for name in ('iter_3.pth', 'iter_6.pth'):
        (folder / name).write_bytes(b'')
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_6.pth'))
    with pytest.raises(DataError, match=r'none of the 2 checkpoints in \S+work can be read \(\S+iter_6.pth is empty'):
        train(cfg)
