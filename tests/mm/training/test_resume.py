"""Trainings killed at any moment go on bit for bit."""

import random
import time
from pathlib import Path

import pytest
import torch
from helpers import torchrun

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

import resume_common
from resume_common import CPU, compare, kill, record, run, start

EMA = dict(type='EMAHook', momentum=0.1, update_buffers=True)
LOOPS = {
    'iterations': dict(loop='iterations'),
    'iterations, 2 workers': dict(loop='iterations', workers=2),
    'by kind, 2 workers': dict(loop='iterations', workers=2, by_kind=True),
    'passes, 1 worker': dict(loop='passes', workers=1, every=3),
    'epochs': dict(loop='epochs', length=5),
    'epochs, 2 workers': dict(loop='epochs', workers=2, length=5),
    'within epochs, 1 worker': dict(loop='epochs', workers=1, length=5, by_epoch=False, every=4),
    'two processes': dict(loop='iterations', workers=1, processes=2),
    # 2 is a divisor of the interval: no gradients are waiting where a checkpoint is written
    'much state': dict(
        loop='epochs',
        length=5,
        plateau=True,
        hooks=[EMA],
        wrapper=dict(accumulative_counts=2, clip_grad=dict(max_norm=1.0)),
        checkpoint=dict(save_best='loss', rule='less', max_keep_ckpts=1),
    ),
}


@pytest.fixture
def folders(tmp_path):
    return tmp_path / 'whole', tmp_path / 'killed'


class TestKilled:
    @pytest.mark.parametrize('options', LOOPS.values(), ids=LOOPS)
    def test_at_random_moments(self, folders, options):
        whole, killed = folders
        options = dict(options, pause=0.03)
        seed = time.time_ns() % 10**6
        print(f'delays drawn with random.Random({seed})')
        rng = random.Random(seed)
        run(whole, **options)
        lives = 0
        for _ in range(3):
            before = len(record(killed))
            running = start(killed, **options)
            until = time.monotonic() + 60
            while len(record(killed)) == before and running[0].is_alive() and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            lives += running[0].is_alive()
            kill(running)
        run(killed, **options)
        print(f'died {lives} times')
        assert lives
        compare(whole, killed, options.get('processes', 1))

    @pytest.mark.parametrize('keep', [1, 2])
    @pytest.mark.parametrize('where', ['half', 'before', 'after'])
    def test_in_the_middle_of_a_checkpoint(self, folders, where, keep):
        whole, killed = folders
        options = dict(loop='iterations', length=8, every=2, checkpoint=dict(max_keep_ckpts=keep))
        run(whole, **options)
        run(killed, dies=True, **options, writing=(where, 3))
        left = {path.name for path in killed.glob('*.pth')}
        assert left >= ({'iter_6.pth'} if where == 'after' else {'iter_4.pth'})
        assert len(list(killed.glob('.iter_6.pth.*'))) == (where != 'after')
        run(killed, **options)
        compare(whole, killed)
        assert len(list(killed.glob('*.pth'))) == keep

    def test_between_a_checkpoint_and_its_validation(self, folders):
        whole, killed = folders
        options = dict(loop='iterations', length=8, every=4, plateau=True)
        run(whole, **options)
        run(killed, dies=True, **options, die='validation 4')
        run(killed, dies=True, **options, die='validation 8')  # the last one
        assert not [line for line in record(killed) if line.startswith('metric 8')]
        run(killed, **options)
        compare(whole, killed)

    def test_without_a_seed(self, folders):
        whole, killed = folders
        options = dict(loop='iterations', length=8, every=2)
        run(killed, dies=True, **options, seed=None, die='iteration 4')
        run(killed, **options, seed=None)
        checkpoint = torch.load(killed / 'iter_8.pth', weights_only=True)
        run(whole, **options, seed=checkpoint['meta']['seed'])
        compare(whole, killed)

    @pytest.mark.parametrize('options', [dict(loop='epochs'), dict(loop='iterations', by_kind=True)])
    def test_the_workers_and_their_number_do_not_matter(self, tmp_path, options):
        for workers in (0, 1, 2):
            run(tmp_path / str(workers), workers=workers, **options)
        assert record(tmp_path / '0') == record(tmp_path / '1') == record(tmp_path / '2')

    @pytest.mark.parametrize('loop', ['iterations', 'epochs'])
    def test_without_the_hook_it_is_another_training(self, folders, loop):
        """Or the tests above would show nothing."""
        whole, killed = folders
        options = dict(loop=loop, workers=1, hook=False, every=1 if loop == 'epochs' else 4)
        run(whole, **options)
        run(killed, dies=True, **options, die='iteration 7')
        run(killed, **options)
        assert record(killed) != record(whole)

    @pytest.mark.slow
    def test_under_torchrun(self, folders):
        """In two starts: torchrun's own restarts hang or fail now and then with gloo (torch 2.14), without us too."""
        whole, killed = folders
        options = dict(loop='iterations', length=8, every=2, processes=2)
        run(whole, **options)
        killed.mkdir()
        script = killed / 'script.py'
        script.write_text(
            'import os, sys\n'
            'from pathlib import Path\n'
            'from resume_common import train\n'
            'rank = int(os.environ["RANK"])\n'
            "die = sys.argv[2] if rank == 1 else ''\n"
            f"train(Path(sys.argv[1]), dict({options}, die=die), rank, int(os.environ['MASTER_PORT']))\n"
        )
        for die in ('iteration 4', ''):
            torchrun(script, killed, die, dies=bool(die), **CPU, PYTHONPATH=Path(resume_common.__file__).parent)
        lines = Path(killed, 'record.1').read_text().splitlines()
        assert [sum(line.startswith(f'loss {i} ') for line in lines) for i in (3, 4)] == [1, 2]
        compare(whole, killed, 2)
