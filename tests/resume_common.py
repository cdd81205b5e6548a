"""Trainings that die and go on: a tiny model with every kind of random number, in processes that can be killed."""

import io
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn

from beit_plugin.checkpoints import CheckpointError
from beit_plugin.mm.training import resume
from beit_plugin.models.beit import Beit

CPU = {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}  # the environment of all that shall be equal bit for bit
COUNT = 11  # images; no multiple of the batch, so that passes end within a batch
BATCH = 2


class Images(torch.utils.data.Dataset):
    """Noise that is augmented with the random numbers of Python, NumPy and torch, or single colours."""

    def __init__(self, augmented: bool) -> None:
        self.augmented = augmented

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((3, 32, 32), index / COUNT)
        if self.augmented:
            image += random.random() * torch.randn(3, 32, 32) + float(np.random.rand())
        return {'inputs': image, 'label': index}


class ByKind:
    """Batches of even or of odd images, collected as mmdetection's AspectRatioBatchSampler does."""

    def __init__(self, sampler: Any, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.kinds: list[list[int]] = [[], []]

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.sampler:
            batch = self.kinds[index % 2]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch[:]
                del batch[:]  # not where this ends at the line before

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size


class Model(BaseModel):
    """A BEiT classifier with stochastic depth and dropout, and the running statistics of batch norm where asked for.

    On the CPU every process has statistics of its own, and a checkpoint those of the first process.
    """

    def __init__(self, running: bool) -> None:
        super().__init__()
        sizes = dict(img_size=32, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=COUNT)
        self.net = Beit(**sizes, drop_path_rate=0.3, drop_rate=0.2, proj_drop_rate=0.1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=running)

    def forward(self, inputs: list[Tensor], label: Tensor, mode: str) -> Any:
        loss = nn.functional.cross_entropy(self.net(self.norm(torch.stack(list(inputs)))), torch.as_tensor(label))
        return {'loss': loss} if mode == 'loss' else [loss]


class Loss(BaseMetric):
    """The loss in validation."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [sample.item() for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {'loss': sum(results) / len(results)}


class Record(Hook):
    """Writes every loss, and every metric, as soon as it is known; tells where the process is to die."""

    def __init__(self, path: Path, pause: float, die: str) -> None:
        self.path, self.pause, self.die = path, pause, die

    def write(self, *words: object) -> None:
        with open(f'{self.path}.{os.environ.get("RANK", 0)}', 'a') as file:
            file.write(' '.join(map(str, words)) + '\n')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        rate = runner.optim_wrapper.get_lr()['lr'][0]
        self.write('loss', runner.iter, outputs['loss'].item().hex(), rate.hex())
        time.sleep(self.pause)
        if self.die == f'iteration {runner.iter}':
            os.kill(os.getpid(), signal.SIGKILL)

    def before_val(self, runner: Any) -> None:
        if self.die == f'validation {runner.iter}':
            os.kill(os.getpid(), signal.SIGKILL)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self.write('metric', runner.iter, metrics['loss'].hex())


def die_writing(where: str, count: int) -> None:
    """Kills this process in the `count`-th checkpoint: in the middle of it, or before or after it gets its name."""
    calls = iter(range(1, 1000))
    real = resume.write_atomically

    def write(path: Path, fill: Callable[[str], object]) -> None:
        dies = path.suffix == '.pth' and next(calls) == count

        def torn(temporary: str) -> None:
            fill(temporary)
            if dies and where == 'half':
                os.truncate(temporary, Path(temporary).stat().st_size // 2)
            if dies and where != 'after':
                os.kill(os.getpid(), signal.SIGKILL)

        real(path, torn)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    resume.write_atomically = write


def train(work_dir: Path, options: Mapping[str, Any], rank: int = 0, port: int = 0) -> None:
    """Trains to the end, or until it dies; always with ``resume``.

    Options: ``loop`` (iterations, passes, epochs), ``workers``, ``by_kind`` (see `ByKind`), ``seed``, ``length``,
    ``every`` (iterations or epochs between checkpoints) and ``by_epoch`` of checkpoints, ``pause`` (seconds), ``die``,
    ``writing`` (see `die_writing`), ``processes``, ``plateau``; ``hooks``, ``checkpoint`` and ``wrapper`` for more of
    each; ``hook`` False for none.
    The exit status is 3 where no checkpoint can be read.
    """
    torch.set_num_threads(1)
    np.random.seed()  # a forked process has the state of its parent
    get = options.get
    if get('processes'):
        address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=get('processes'))
        os.environ.update({name: str(value) for name, value in dict(address, RANK=rank, LOCAL_RANK=rank).items()})
    if get('writing'):
        die_writing(*get('writing'))
    epochs = get('loop') == 'epochs'
    by_epoch = get('by_epoch', epochs)
    length = get('length', 4 if epochs else 20)
    sampler = dict(type=InfiniteSampler if get('loop') == 'iterations' else DefaultSampler, shuffle=True)
    workers = get('workers', 0)
    loader = dict(batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
    by_kind = dict(batch_sampler=dict(type=ByKind)) if get('by_kind') else {}
    checkpoint = dict(type='CheckpointHook', interval=get('every', 1 if epochs else 4), by_epoch=by_epoch)
    schedulers = [dict(type='PolyLR', by_epoch=False, begin=0, end=40)]
    if get('plateau'):
        schedulers.append(dict(type='ReduceOnPlateauLR', monitor='loss', patience=0, rule='less', threshold=9))
    torch.manual_seed(0)  # weights are drawn before the Runner, so that those without a seed are the same
    runner = Runner(
        model=Model(running=not get('processes')),
        work_dir=str(work_dir),
        experiment_name=work_dir.name,
        train_dataloader=dict(loader, dataset=Images(augmented=True), sampler=sampler, **by_kind),
        train_cfg=dict(type=EpochBasedTrainLoop, max_epochs=length)
        if epochs
        else dict(type=IterBasedTrainLoop, max_iters=length, val_interval=4),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01), **get('wrapper', {})),
        param_scheduler=schedulers,
        val_dataloader=dict(loader, dataset=Images(augmented=False), sampler=dict(type=DefaultSampler, shuffle=False)),
        val_cfg=dict(),
        val_evaluator=dict(type=Loss),
        default_hooks=dict(
            checkpoint=dict(checkpoint, **get('checkpoint', {})),
            **({'resume': dict(type='BEiTResumeHook')} if get('hook', True) else {}),
        ),
        custom_hooks=[Record(work_dir / 'record', get('pause', 0.0), get('die', '')), *get('hooks', [])],
        randomness=dict(seed=get('seed', 5)),
        launcher='pytorch' if get('processes') else 'none',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
        log_processor=dict(by_epoch=epochs),
        log_level='WARNING',
        resume=True,
    )
    try:
        runner.train()
    except CheckpointError:
        sys.exit(3)
    if get('processes'):
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(('127.0.0.1', 0))
        return opened.getsockname()[1]


def _context() -> Any:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['beit_plugin.mm', 'mmengine.evaluator'])  # takes ten seconds, once
    return context


def start(work_dir: Path, **options: Any) -> list[Any]:
    """Processes that train, one for each of ``processes``."""
    work_dir.mkdir(exist_ok=True)
    port = free_port()
    ranks = range(options.get('processes') or 1)
    running = [_context().Process(target=train, args=(work_dir, options, rank, port)) for rank in ranks]
    with mock.patch.dict(os.environ, CPU):  # the server keeps the environment that it is started in
        for process in running:
            process.start()
    return running


def run(work_dir: Path, dies: bool = False, **options: Any) -> None:
    """Trains in other processes; one of several that dies takes the others with it, as under torchrun."""
    running = start(work_dir, **options)
    if dies:
        assert multiprocessing.connection.wait([process.sentinel for process in running], 100)
        kill(running)
    for process in running:
        process.join(100)
    codes = [process.exitcode for process in running]
    kill(running)  # what hangs
    assert -signal.SIGKILL in codes if dies else set(codes) == {0}, codes


def kill(running: list[Any]) -> None:
    for process in running:
        process.kill()
        process.join(100)


def record(work_dir: Path, rank: int = 0) -> list[str]:
    """All that a training recorded over its lives, in the order of the iterations; a repetition must be the same."""
    path = Path(f'{work_dir / "record"}.{rank}')
    text = path.read_text() if path.is_file() else ''
    lines = dict.fromkeys(text[: text.rfind('\n') + 1].splitlines())
    return sorted(lines, key=lambda line: (int(line.split()[1]), line))


def weights(work_dir: Path) -> tuple[dict[str, Tensor], Any]:
    """Parameters and the state of the optimiser at the end."""
    checkpoint = torch.load((work_dir / 'last_checkpoint').read_text(), weights_only=True)
    return checkpoint['state_dict'], checkpoint['optimizer']


def same(one: Any, other: Any) -> bool:
    """Whether nested tensors and numbers are equal bit for bit."""
    buffers = [io.BytesIO(), io.BytesIO()]
    for value, buffer in zip((one, other), buffers, strict=True):
        torch.save(value, buffer)
    return buffers[0].getvalue() == buffers[1].getvalue()


def compare(whole: Path, killed: Path, processes: int = 1) -> None:
    for rank in range(processes):
        different = set(record(killed, rank)) ^ set(record(whole, rank))
        assert not different, sorted(different)
    for one, other in zip(weights(whole), weights(killed), strict=True):
        assert same(one, other)
    assert not list(killed.glob('.*'))  # what was being written is cleared away
