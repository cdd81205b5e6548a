"""Real runs, as a user starts them: mmsegmentation's own tools with our configurations, and ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tools_common import ROOT, SHAPES_CONFIG, cut, image_folder, width

from data_folders import DataError  # isort: skip
from make_shapes import make_shapes  # isort: skip

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def run(*args: object, cwd: Path, **env: str) -> str:
    """Output of this interpreter with these arguments; fails with it when the script does."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, **env},
    )
    # on the CPU a process of torchrun aborts now and then after its work is done: torch 2.14 ends with gloo's threads
    # running. What the work left behind is looked at afterwards in any case.
    ended = 'torch.distributed.run' in args and 'terminate called without an active exception' in done.stderr
    assert done.returncode == 0 or ended, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


SHORT = (
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'train_dataloader.batch_size=2',
    'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1',
    'param_scheduler.1.end=4',
)


@pytest.mark.slow
class TestRuns:
    def test_mmsegmentations_own_tools(self, tmp_path):
        import mmseg

        tools = Path(mmseg.__file__).parent / '.mim/tools'
        data, work = tmp_path / 'shapes', tmp_path / 'work'
        make_shapes(data, train=8, val=4)
        env = {'SHAPES_ROOT': str(data)}
        common = ('--work-dir', work, '--cfg-options', *SHORT)
        two_processes = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
        run(
            *two_processes,
            tools / 'train.py',
            SHAPES_CONFIG,
            '--launcher',
            'pytorch',
            *common,
            'env_cfg.dist_cfg.backend=gloo',
            cwd=tmp_path,
            **env,
        )
        resumed = run(
            tools / 'train.py', SHAPES_CONFIG, '--resume', *common, 'train_cfg.max_iters=6', cwd=tmp_path, **env
        )
        assert 'resumed epoch: 0, iter: 4' in resumed
        scores = []
        for tta in ([], ['--tta']):
            output = run(
                tools / 'test.py',
                SHAPES_CONFIG,
                work / 'iter_6.pth',
                '--work-dir',
                tmp_path / 'tested',
                *tta,
                cwd=tmp_path,
                **env,
            )
            scores.append(float(re.findall(r'mIoU: ([\d.]+)', output)[-1]))
        assert all(0 <= score < 100 for score in scores) and scores[0] != scores[1], scores

    def test_our_tools(self, tmp_path):
        image_folder(tmp_path / 'mine', ('',), 'masks')
        work = tmp_path / 'work'
        output = run(
            ROOT / 'tools/quickstart.py',
            '--data-root',
            'mine',
            '--work-dir',
            work,
            '--cfg-options',
            *SHORT,
            cwd=tmp_path,
        )
        single, multi = re.fullmatch(
            r'mIoU single-scale ([\d.]+) multi-scale ([\d.]+)', output.splitlines()[-1]
        ).groups()
        assert '4 training images, 1 validation images' in output and 'effective batch 2' in output
        assert "num_classes=3, type='BEiTLoadAnnotations'" in (work / SHAPES_CONFIG.name).read_text()
        assert 'System environment' not in output and 'System environment' in next(work.glob('*/*.log')).read_text()
        for name in ('curve.png', 'overlay.png'):
            assert width(work / name) > 500

        config = work / SHAPES_CONFIG.name  # the copy knows data, classes and options
        tested = run(ROOT / 'tools/test.py', config, work / 'iter_4.pth', '--out', tmp_path / 'maps', cwd=tmp_path)
        assert tested.splitlines()[-1].startswith(f'mIoU {float(single):.2f} (single-scale)')
        assert len(list((tmp_path / 'maps').glob('*.png'))) == 1
        self.wrong_checkpoints(config, work / 'iter_4.pth', tmp_path)
        trained = run(
            ROOT / 'tools/train.py',
            config,
            '--work-dir',
            work,
            '--resume',
            '--cfg-options',
            'train_cfg.max_iters=5',
            'train_cfg.val_interval=1',
            cwd=tmp_path,
        )
        assert re.match(r'mIoU [\d.]+ after 5 iterations, checkpoint .*iter_5.pth', trained.splitlines()[-1])
        again = run(ROOT / 'tools/test.py', config, work / 'iter_4.pth', cwd=tmp_path)  # the copy now says resume
        assert tested.splitlines()[-1].split()[:2] == again.splitlines()[-1].split()[:2] and 'resume' not in again
        assert float(multi) > 0

    def test_a_configuration_unlike_ours(self, tmp_path):
        image_folder(tmp_path / 'data', ('training', 'validation'), values=(0, 1, 7))
        (tmp_path / 'config.py').write_text(
            f"""_base_ = {str(SHAPES_CONFIG)!r}
model = dict(data_preprocessor=dict(size=None, size_divisor=32), backbone=dict(add_fpn=True), neck=None)
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1)
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler'),
    dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset={{{{_base_.train_dataloader.dataset}}}}),
)
val_dataloader = val_cfg = val_evaluator = None
test_evaluator = dict(iou_metrics=['mFscore'])
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)
"""
        )
        common = ('config.py', '--data-root', 'data', '--work-dir', 'work')
        trained = run(ROOT / 'tools/train.py', *common, cwd=tmp_path)
        assert 'BEiTBackbone + BEiTUPerHead, ' in trained and '  5 training images\n' in trained
        assert trained.splitlines()[-1] == (
            f'no mIoU after 1 epoch, checkpoint {tmp_path / "work" / "epoch_1.pth"}, curve work/curve.png'
        )
        tested = run(ROOT / 'tools/test.py', 'config.py', 'work/epoch_1.pth', *common[1:], cwd=tmp_path)
        assert re.match(r'aAcc [\d.]+, mFscore [\d.]+, .* \(single-scale\), checkpoint', tested.splitlines()[-1])
        options = ('--cfg-options', 'default_hooks.checkpoint=None')
        unsaved = run(ROOT / 'tools/train.py', *common[:-1], 'none', *options, cwd=tmp_path)
        assert unsaved.splitlines()[-1] == 'no mIoU after 1 epoch, no checkpoint in none, curve none/curve.png'

    def test_files_that_cannot_be_used(self, tmp_path):
        image_folder(tmp_path / 'data', ('training', 'validation'), values=(0, 1, 7))
        images, labels = (tmp_path / 'data' / part / 'training' for part in ('images', 'annotations'))
        cut(images / '1.jpg', 0.5)
        (labels / '3.png').unlink()
        skip = ('--data-root', 'data', '--work-dir', 'work', '--on-error', 'skip', '--amp', '--cfg-options', *SHORT)
        trained = run(ROOT / 'tools/train.py', SHAPES_CONFIG, *skip, cwd=tmp_path)
        assert trained.count('left out of training, ') == 2 and 'BEiTBF16OptimWrapper' in trained
        *_, summary, result = trained.splitlines()
        assert summary == '2 files left out of training: data/annotations/training/3.png, data/images/training/1.jpg'
        assert re.match(r'mIoU [\d.]+ after 4 iterations', result)

    @staticmethod
    def wrong_checkpoints(config: Path, good: Path, folder: Path) -> None:
        """Files that fit in part are refused, at one scale and with the augmentations around the model."""
        from mmengine.config import Config
        from run_common import evaluate

        import beit_plugin.mm  # noqa: F401, lets torch read the checkpoint
        from beit_plugin.checkpoints.files import read_state_dict

        whole = read_state_dict(good)
        wide = {name: torch.cat([p, p]) if name.endswith('conv_seg.bias') else p for name, p in whole.items()}
        cfg = Config.fromfile(config)
        cfg.work_dir = str(folder / 'refused')
        for tta, state, sentence in (
            (
                False,
                {n: p for n, p in whole.items() if n.startswith('backbone.')},
                r'parameters are missing \(.*, [.]{3}',
            ),
            (
                True,
                {**whole, 'decode_head.more': torch.ones(1)},
                r'1 parameters belong to no part .*\(decode_head.more\)',
            ),
            (True, wide, r'size mismatch for decode_head.conv_seg.bias.*\(and 1 more\)'),
            (False, {'x': 1}, 'holds no tensors by name'),
        ):
            torch.save(state, folder / 'wrong.pth')
            with pytest.raises(DataError, match=sentence) as caught:
                evaluate(cfg, folder / 'wrong.pth', tta)
            assert '\n' not in str(caught.value)

    @pytest.mark.parametrize(
        ('script', 'args', 'sentence'),
        [
            ('train.py', ['no_such.py'], 'no_such.py does not exist'),
            ('test.py', [SHAPES_CONFIG, 'no.pth'], 'the checkpoint no.pth does not exist'),
            ('quickstart.py', ['--data-root', 'nowhere'], 'nowhere does not exist'),
            ('plot_run.py', ['.'], 'no training log'),
            ('train.py', [SHAPES_CONFIG, '--cfg-options', 'foo'], "--cfg-options takes KEY=VALUE, got 'foo'"),
            ('make_shapes.py', ['/dev/null/shapes'], '/dev/null/shapes cannot be written'),
            pytest.param(
                'train.py',
                [SHAPES_CONFIG, '--amp', 'float16'],
                '--amp float16 needs a GPU',
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
            ),
        ],
    )
    def test_one_sentence(self, tmp_path, script, args, sentence):
        done = subprocess.run(
            [sys.executable, ROOT / 'tools' / script, *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=ENVIRONMENT,
        )
        assert done.returncode == 1
        assert done.stderr.strip().startswith('error: ') and len(done.stderr.strip().splitlines()) == 1
        assert sentence in done.stderr

    @pytest.mark.parametrize(
        'script', ['train.py', 'test.py', 'cache_tokens.py', 'quickstart.py', 'plot_run.py', 'make_shapes.py']
    )
    def test_help_has_an_example(self, script, tmp_path):
        assert re.search('[Ee]xample', run(ROOT / 'tools' / script, '--help', cwd=tmp_path))

    def test_help_on_a_bare_machine(self, tmp_path):
        bare = run('-S', ROOT / 'tools/quickstart.py', '--help', cwd=tmp_path)  # -S: no installed packages
        assert 'bash tools/quickstart.sh --data-root DIR' in bare
