"""Checkpoints are whole or not there; those that are torn are passed over, and the others are used with a message."""

import itertools
import logging
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub, MMLogger
from resume_common import compare, run, start

from beit_plugin.checkpoints import CheckpointError
from beit_plugin.mm.training import resume
from beit_plugin.mm.training.resume import BEiTResumeHook, point_to_readable


@pytest.fixture
def warned():
    """mmengine's warnings; its loggers hand nothing on."""
    logger = MMLogger.get_current_instance()
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: messages.append(entry.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def overwrite(offset: int, content: bytes) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        with open(path, 'rb+') as file:
            file.seek(offset)
            file.write(content)

    return change


class Call:
    """Pickles as the call of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch ran',)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    'empty': (lambda path: os.truncate(path, 0), 'is empty'),
    'a few bytes': (lambda path: os.truncate(path, 100), 'is cut off, damaged or no checkpoint file'),
    'half': (lambda path: os.truncate(path, path.stat().st_size // 2), 'is cut off, damaged or no checkpoint file'),
    'all but a byte': (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        'is cut off, damaged or no checkpoint file',
    ),
    # a power cut before the disk had all of it
    'zeros in a tensor': (lambda path: overwrite(path.stat().st_size // 2, bytes(4096))(path), 'is cut off, damaged'),
    'zeros at the start': (overwrite(0, bytes(4096)), 'is cut off, damaged or no checkpoint file'),
    'text': (lambda path: path.write_text('nothing'), 'is cut off, damaged or no checkpoint file'),
    'not there': (lambda path: path.unlink(), 'does not exist'),
    'weights': (lambda path: torch.save({'state_dict': {'x': torch.ones(1)}}, path), 'has no meta'),
    'a list': (lambda path: torch.save([1], path), 'has no meta'),
    'code': (lambda path: torch.save({'meta': Call()}, path), r'holds \w+.system, which is neither'),
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A training of six iterations with a checkpoint every two."""
    folder = tmp_path_factory.mktemp('trainings') / 'finished'
    run(folder, loop='iterations', length=6, every=2)
    return folder


@pytest.fixture
def work_dir(finished, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.chdir(tmp_path)
    copied = shutil.copytree(finished, tmp_path / 'work')
    Path(copied, 'last_checkpoint').write_text(str(copied / 'iter_6.pth'))
    return copied


def last(work_dir: Path, **options: Any) -> str:
    """The name of the checkpoint that a training would resume from."""
    point_to_readable(work_dir, options.get('folder', work_dir), 'iter_{}.pth')
    return Path((work_dir / 'last_checkpoint').read_text()).name


class TestTorn:
    def test_nothing_is_wrong(self, work_dir, warned):
        before = (work_dir / 'last_checkpoint').stat().st_mtime_ns
        assert last(work_dir) == 'iter_6.pth' and not warned
        assert (work_dir / 'last_checkpoint').stat().st_mtime_ns == before

    @pytest.mark.parametrize(('damage', 'reason'), DAMAGES.values(), ids=DAMAGES)
    def test_the_one_before_is_used(self, work_dir, warned, damage, reason):
        damage(work_dir / 'iter_6.pth')
        assert last(work_dir) == 'iter_4.pth' and len(warned) == 2
        assert re.match(f'checkpoint passed over: {work_dir}/iter_6.pth {reason}', warned[0])
        assert warned[1] == f'resuming from {work_dir}/iter_4.pth, the last checkpoint that can be read'
        assert not Path('ran').exists()

    def test_the_last_that_can_be_read(self, work_dir):
        shutil.copy(work_dir / 'iter_6.pth', work_dir / 'iter_10.pth')  # of a longer training before
        for name in ('iter_6.pth', 'iter_4.pth'):
            os.truncate(work_dir / name, 1000)
        assert last(work_dir) == 'iter_2.pth'

    @pytest.mark.parametrize('said', [None, '', '\0' * 40, '/elsewhere/iter_4.pth'])
    def test_a_torn_pointer_or_a_folder_that_was_moved(self, work_dir, said):
        pointer = work_dir / 'last_checkpoint'
        pointer.unlink() if said is None else pointer.write_text(said)
        shutil.copy(work_dir / 'iter_6.pth', work_dir / 'iter_10.pth')  # ten is more than six
        assert last(work_dir) == 'iter_10.pth'

    def test_none_can_be_read(self, work_dir, warned):
        for path in work_dir.glob('*.pth'):
            os.truncate(path, 1000)
        with pytest.raises(
            CheckpointError, match=r'none of the 3 checkpoints in \S+work can be read \(\S+iter_6.pth is'
        ):
            last(work_dir)
        assert len(warned) == 3

    def test_not_ours_to_judge(self, work_dir, tmp_path):
        pointer = work_dir / 'last_checkpoint'
        for said in ('s3://bucket/iter_6.pth', str(tmp_path)):  # another storage; DeepSpeed's folder
            pointer.write_text(said)
            last(work_dir)
            assert pointer.read_text() == said

    def test_a_training_that_died_before_its_first_checkpoint(self, tmp_path):
        point_to_readable(tmp_path, tmp_path / 'no_such', 'iter_{}.pth')
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(('out_dir', 'processes'), [('', 1), ('out', 1), ('', 2)])
    def test_resumed(self, tmp_path, out_dir, processes):
        whole, torn = tmp_path / 'whole', tmp_path / 'torn'
        options = dict(loop='iterations', length=8, every=2, processes=processes if processes > 1 else None)
        if out_dir:
            options['checkpoint'] = dict(out_dir=str(tmp_path / out_dir))
        run(whole, **options)
        run(torn, dies=True, **options, die='iteration 6')
        saved = Path((torn / 'last_checkpoint').read_text())
        assert saved == tmp_path / out_dir / 'torn/iter_6.pth'
        os.truncate(saved, 5000)
        run(torn, **options)
        compare(whole, torn, processes)
        log = ''.join(path.read_text() for path in torn.glob('*/*.log'))
        assert f'{saved} is cut off' in log and f'resuming from {saved.with_name("iter_4.pth")}' in log

    def test_every_process_fails(self, work_dir):
        for path in work_dir.glob('*.pth'):
            os.truncate(path, 1000)
        running = start(work_dir, loop='iterations', processes=2)
        for process in running:
            process.join(60)
        assert [process.exitcode for process in running] == [3, 3]


class TestParts:
    def test_batches_are_sent_to_workers_without_seeding(self):
        batch = resume._Batch([3, 1, 2], (5, 1, 0, 7))
        before = torch.get_rng_state()
        sent = pickle.loads(pickle.dumps(batch))
        assert torch.equal(torch.get_rng_state(), before)
        assert list(sent) == [3, 1, 2] and len(sent) == 3
        drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
        assert list(batch) == [3, 1, 2]
        assert drawn == [random.random(), np.random.rand(), torch.rand(1).item()] and len(set(drawn)) == 3

    @pytest.mark.parametrize(('loop', 'size'), [({}, 3), ({'dataloader_iterator': None}, 3), ({}, 4)])
    def test_every_batch_has_its_own_numbers(self, monkeypatch, loop, size):
        monkeypatch.setattr(resume, 'get_rank', lambda: 2)
        data = range(size * 4)

        def keys(iteration: int, epoch: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
            loader = DataLoader(data, batch_size=size, sampler=DefaultSampler(data, seed=0))
            hub = MessageHub.get_instance(f'test_{loop}_{size}')
            train_loop = SimpleNamespace(dataloader=loader, **loop)
            resume._start_loader(
                SimpleNamespace(train_loop=train_loop, message_hub=hub, iter=iteration, epoch=epoch, seed=5)
            )
            while True:
                loader.sampler.set_epoch(epoch)  # mmengine's DistSamplerSeedHook, which iteration-based loops see once
                for batch in loader.batch_sampler:
                    yield batch.key, batch[:]
                epoch += 1

        whole = list(itertools.islice(keys(0, 0), 12))
        assert [key for key, _ in whole] == [(5, 1, 2, iteration) for iteration in range(12)]
        assert len({tuple(batch) for _, batch in whole}) == 12  # other orders in other passes
        for iteration in range(12):
            epoch = 0 if loop else iteration // 4
            assert list(itertools.islice(keys(iteration, epoch), 12 - iteration)) == whole[iteration:]

    def test_what_is_outdated_goes_after_the_next_is_there(self, tmp_path):
        old, new = tmp_path / 'a/old', tmp_path / 'a/new'
        resume._AtomicBackend().put(b'1', old)
        for path in (old, new):
            resume._AtomicBackend().remove(path)  # mmengine makes a backend anew for every file
        assert old.exists()
        resume._AtomicBackend().put(b'2', str(new))
        assert [path.name for path in (tmp_path / 'a').iterdir()] == ['new'] and new.read_bytes() == b'2'

    @pytest.mark.parametrize(
        'options', [dict(out_dir='s3://bucket'), dict(backend_args=dict(backend='local')), dict(file_client_args={})]
    )
    def test_what_a_configuration_says_stays(self, options):
        hook = CheckpointHook(**options)
        BEiTResumeHook().before_run(SimpleNamespace(hooks=[hook], _resume=False))
        assert hook.backend_args == options.get('backend_args')

    def test_a_batch_sampler_made_by_hand_starts_anew(self):
        batches = SimpleNamespace(_aspect_ratio_buckets=[[1, 2], [3]])  # of mmdetection
        loader = SimpleNamespace(batch_sampler=batches)
        assert resume._new_batch_sampler(SimpleNamespace(_train_dataloader=loader), loader, None) is batches
        assert batches._aspect_ratio_buckets == [[], []]

    def test_data_without_batches(self):
        loop = SimpleNamespace(dataloader=DataLoader([1, 2], batch_size=None))
        with pytest.raises(ValueError, match='needs a train_dataloader with a batch_size'):
            resume._start_loader(SimpleNamespace(train_loop=loop, message_hub=None))

    def test_less_than_a_batch(self):
        loader = DataLoader([1, 2], batch_size=3, drop_last=True)
        with pytest.raises(ValueError, match='less than one batch'):
            next(iter(resume._Batches(loader.batch_sampler, loader.sampler, (0,), 0, 0, endless=True)))
