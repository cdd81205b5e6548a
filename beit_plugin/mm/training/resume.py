"""A training that was killed at any moment goes on bit for bit as if it had not been.

What mmengine 0.10.7 does: a resumed training draws other random numbers (stochastic depth, dropout; in epochs also the
augmentations), loads every image again that it has seen, writes checkpoints in place, forgets the validation that was
due when the process died, and ends in a traceback where the last checkpoint is torn.

Here random numbers are a function of seed and iteration. So none has to be stored, and neither the workers nor their
number matter. Equal numbers need equal arithmetic: the CPU, or deterministic kernels. DistributedDataParallel sums the
gradients of three and more processes in an order that it settles in the first iteration of a process.
"""

import itertools
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import broadcast_object_list, get_rank, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, HOOKS
from torch.utils.data import DataLoader, Sampler

from ...checkpoints import CheckpointError
from ...checkpoints.files import read_file, remove_leftovers, write_atomically

__all__ = ['BEiTResumeHook']

_STEP, _DATA = 0, 1  # what random numbers are for; first in their key, after the seed
_NEEDED = ('meta', 'state_dict', 'message_hub')  # of a checkpoint, by mmengine's `Runner.resume`
_SAMPLER_SEED, _VALIDATED = 'beit_plugin_sampler_seed', 'beit_plugin_validated'  # in the message hub


def _seed(*key: int) -> None:
    """Seeds Python, NumPy and torch on all devices by numbers, not negative, that name a moment of the training."""
    for_python, for_numpy, for_torch = np.random.SeedSequence(key).generate_state(3, np.uint64)
    random.seed(int(for_python))
    np.random.seed([int(for_numpy) & 0xFFFFFFFF, int(for_numpy) >> 32])
    torch.manual_seed(int(for_torch))


class _Batch(list[int]):
    """The indices of a batch; who goes through them to load it, a worker or the training itself, first seeds by `key`.

    They are all that a DataLoader hands to the process that loads.
    """

    def __init__(self, indices: Iterable[int], key: tuple[int, ...]) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator[int]:
        _seed(*self.key)
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Batch, (self[:], self.key)  # pickle's own way goes through them, in the process that trains


class _Batches(Sampler[list[int]]):
    """The batches of a data loader from an iteration on, each with the key of its random numbers.

    Args:
        batches: of a data loader; what they come from starts anew with every ``iter``.
        sampler: what orders the data.
        key: the numbers before that of the iteration.
        iteration: that of the first batch.
        skip: batches that the first pass leaves out.
        endless: begin a next pass at the end of one, as iteration-based loops do.
    """

    def __init__(
        self, batches: Any, sampler: Any, key: tuple[int, ...], iteration: int, skip: int, endless: bool
    ) -> None:
        self.batches, self.sampler = batches, sampler
        self.batch_size = getattr(batches, 'batch_size', None)
        self.key, self.iteration, self.skip, self.endless = key, iteration, skip, endless

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in itertools.count() if self.endless else [None]:
            if epoch and hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            batch = None
            for batch in self.batches:
                if self.skip:
                    self.skip -= 1
                    continue
                yield _Batch(batch, (*self.key, self.iteration))
                self.iteration += 1
            if batch is None:
                raise ValueError('the training data are less than one batch')

    def __len__(self) -> int:
        return len(self.batches)


def _sampler(loader: DataLoader) -> Any:
    """What orders the data; a loader that was built with a batch sampler has it in there."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


class _AtomicBackend(LocalBackend):
    """Files that are whole or not there; one that is outdated goes when the next is on the disk.

    mmengine's CheckpointHook removes the old checkpoint before it writes the new one.
    """

    _outdated: ClassVar[list[Path]] = []  # mmengine makes a backend anew for every file

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: Path(temporary).write_bytes(obj))
        while self._outdated:
            old = self._outdated.pop()
            if old != path:
                old.unlink(missing_ok=True)

    def remove(self, filepath: str | Path) -> None:
        self._outdated.append(Path(filepath))


register_backend('beit_plugin_atomic', _AtomicBackend, force=True)


def _why_not(path: Path) -> str | None:
    """Why a training cannot go on from a file; None where it can."""
    try:
        if path.is_dir():  # DeepSpeed's
            return None
        held = read_file(path)
    except CheckpointError as error:
        return str(error).partition(';')[0]  # without the advice
    missing = [name for name in _NEEDED if name not in held] if isinstance(held, dict) else _NEEDED
    return f'{path} has no {missing[0]}, so it is no checkpoint of a training' if missing else None


def _numbered(folder: Path, template: str) -> dict[Path, int]:
    """The checkpoints of a folder, and the iterations or epochs in their names."""
    before, after = map(re.escape, template.split('{}'))
    matches = {path: re.fullmatch(f'{before}(\\d+){after}', path.name) for path in folder.glob('*')}
    return {path: int(match[1]) for path, match in matches.items() if match}


def point_to_readable(work_dir: Path, folder: Path, template: str) -> None:
    """Lets ``last_checkpoint``, which mmengine resumes from, name the last checkpoint that can be read, with a warning.

    Without checkpoints nothing happens: a training that died before the first one starts again.

    Args:
        work_dir: where ``last_checkpoint`` is.
        folder: where the checkpoints are.
        template: their names, with ``{}`` for the number.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    pointer = work_dir / 'last_checkpoint'
    # empty where its writing was cut off
    said = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    if '://' in said:  # not on a disk of ours
        return
    named = Path(said) if said else None
    found = _numbered(folder, template)
    limit = found[named] if named in found else math.inf  # what is later than that is of another training
    paths = sorted((path for path in found if found[path] < limit), key=found.__getitem__, reverse=True)
    reasons = []
    for path in [named, *paths] if named else paths:
        reason = _why_not(path)
        if reason is None:
            if path != named:
                print_log(f'resuming from {path}, the last checkpoint that can be read', 'current', logging.WARNING)
                write_atomically(pointer, lambda temporary: Path(temporary).write_text(str(path)))  # noqa: B023
            return
        print_log(f'checkpoint passed over: {reason}', 'current', logging.WARNING)
        reasons.append(reason)
    if reasons:
        raise CheckpointError(
            f'none of the {len(reasons)} checkpoints in {folder} can be read ({reasons[0]}), so the training cannot '
            'be resumed; start it anew'
        )


def _new_batch_sampler(runner: Any, loader: DataLoader, sampler: Any) -> Any:
    """That of the configuration as it began.

    Workers that have started have drawn from the one that is there, and mmdetection's AspectRatioBatchSampler, left
    alone in the middle of a batch, never completes another one of that aspect ratio.
    """
    cfg = getattr(runner, '_train_dataloader', None)
    cfg = cfg if isinstance(cfg, Mapping) else {}
    given = cfg.get('batch_sampler')
    if not isinstance(given, Mapping):
        batches: Any = loader.batch_sampler
        if hasattr(batches, '_aspect_ratio_buckets'):  # mmdetection's, made by hand
            batches._aspect_ratio_buckets = [[] for _ in batches._aspect_ratio_buckets]
        return batches
    return DATA_SAMPLERS.build(dict(given), default_args=dict(sampler=sampler, batch_size=cfg['batch_size']))


def _start_loader(runner: Any) -> bool:
    """Lets the loader of the training begin where the training does; whether that is not within an epoch."""
    loop, hub = runner.train_loop, runner.message_hub
    loader: DataLoader = loop.dataloader
    if loader.batch_sampler is None:
        raise ValueError('BEiTResumeHook needs a train_dataloader with a batch_size or a batch_sampler')
    sampler = _sampler(loader)
    if hasattr(sampler, 'seed'):
        # a configuration without a seed draws one at every start, and its sampler has it before mmengine resumes
        seed = hub.get_info(_SAMPLER_SEED, sampler.seed) if runner.iter else sampler.seed
        hub.update_info(_SAMPLER_SEED, seed)
        sampler.seed = seed
        if isinstance(sampler, InfiniteSampler):  # has drawn for the first workers, and would go on from there
            InfiniteSampler.__init__(sampler, sampler.dataset, sampler.shuffle, seed)
    endless = hasattr(loop, 'dataloader_iterator')
    skip = runner.iter if endless else runner.iter - runner.epoch * len(loader)
    if not 0 <= skip <= len(loader) and not endless:  # resumed with another number of batches
        skip = 0
    batches = _new_batch_sampler(runner, loader, sampler)
    batches = _Batches(batches, sampler, (runner.seed, _DATA, get_rank()), runner.iter, skip, endless)
    # by vars, for a DataLoader does not let go of its batch sampler; workers that have started draw from the old one
    vars(loader).update(batch_sampler=batches, _iterator=None)
    if endless:  # the loop first drops as many batches as it has seen
        loop.dataloader_iterator = itertools.chain(itertools.repeat(None, runner.iter), loader)
    return endless or not skip


def _is_validation_due(runner: Any) -> bool:
    """Whether the loops of mmengine, which save before they validate, would do this where the training begins."""
    loop = runner.train_loop
    in_epochs = not hasattr(loop, 'dataloader_iterator')
    done, total = (runner.epoch, loop.max_epochs) if in_epochs else (runner.iter, loop.max_iters)
    if not done or runner.val_loop is None or runner.message_hub.get_info(_VALIDATED) == runner.iter:
        return False
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == total)


@HOOKS.register_module()
class BEiTResumeHook(Hook):
    """One line in a configuration: ``default_hooks = dict(resume=dict(type='BEiTResumeHook'))``.

    Every iteration is seeded, in the data loader and before the step, so the losses of a resumed training are those of
    one that ran through (see the top of this file). The data that was seen is skipped, not loaded. Checkpoints of
    mmengine's CheckpointHook on a local disk are written atomically, and ``resume=True`` takes the last one that can be
    read. mmengine writes them before the validation of the same iteration: this comes first where a training resumes.

    Not restored: gradients that are accumulated but not applied (let the interval of checkpoints be a multiple of
    ``accumulative_counts``), and what a transform or a data set remembers of earlier images.

    Raises:
        CheckpointError: at the start, where ``resume=True`` finds checkpoints and none that can be read.
        ValueError: the training data come without batches, or are less than one.
    """

    priority = 'LOWEST'  # before_train: when the others are ready; before_train_iter: right before the step

    def before_run(self, runner: Any) -> None:
        hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        for hook in hooks:
            if hook.backend_args is None and hook.file_client_args is None and '://' not in str(hook.out_dir):
                hook.backend_args = {'backend': 'beit_plugin_atomic'}
        if not hooks or not runner._resume or runner._load_from is not None:
            return
        told: list[CheckpointError | None] = [None]
        if is_main_process():
            try:
                work_dir, folder = Path(runner.work_dir), Path(hooks[0].out_dir or runner.work_dir)
                if folder != work_dir:
                    folder /= work_dir.name  # as mmengine does later
                point_to_readable(work_dir, folder, hooks[0].filename_tmpl)
            except CheckpointError as error:
                told = [error]
        broadcast_object_list(told)  # the others wait, and fail as well
        if told[0] is not None:
            raise told[0]

    def before_train(self, runner: Any) -> None:
        for hook in runner.hooks:
            if is_main_process() and isinstance(hook, CheckpointHook):
                remove_leftovers(Path(hook.out_dir), f'*{hook.filename_tmpl.format("*")}')
        if _start_loader(runner) and _is_validation_due(runner):
            runner.logger.info('Validating first: the checkpoint was written before this was due')
            runner.val_loop.run()

    def before_val(self, runner: Any) -> None:
        runner.message_hub.update_info(_VALIDATED, runner.iter)  # now, for a best checkpoint is saved at the end of it

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        _seed(runner.seed, _STEP, runner.iter)
