"""A training that turns NaN stops in all processes, and the last good checkpoint is still there."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from helpers import torchrun
from tools_common import ROOT

if importlib.util.find_spec('mmengine') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: registers

# isort: split

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import nn

from beit_plugin.mm.training.invalid_loss import BEiTInvalidLossHook, InvalidLossError

NUMBERS = itertools.count()


class Toy(BaseModel):
    """A weight whose loss, or gradient, is NaN in one iteration; in process `rank` only."""

    def __init__(self, loss_at: int = 0, gradient_at: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.loss_at, self.gradient_at, self.step = loss_at, gradient_at, 0
        self.is_bad = rank == (torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)

    def forward(self, mode='loss', **data):
        if mode != 'loss':
            return [{}]
        self.step += 1
        loss = (self.weight - 0.5) ** 2
        if self.is_bad and self.step == self.loss_at:
            loss = loss * float('nan')
        if self.is_bad and self.step == self.gradient_at:
            loss = loss + (self.weight * 0).sqrt()  # 0, with the gradient 0 * inf
        return dict(loss_toy=loss, accuracy=loss.new_tensor(float('inf')))


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(x=index)


class Validated(Hook):
    """Iterations after which there was a validation."""

    def __init__(self):
        self.at = []

    def before_val_epoch(self, runner):
        self.at.append(runner.iter)


def train(work: Path, model: dict, epochs: bool = False, **options) -> list[int]:
    """Train for 8 iterations, with a checkpoint in every second one, two of them kept; returns the validated ones."""
    if 'Toy' not in MODELS:
        for registry, part in ((MODELS, Toy), (DATASETS, Numbers)):
            registry.register_module(module=part)
    sampler = dict(type='DefaultSampler' if epochs else 'InfiniteSampler', shuffle=True)
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='Numbers'), sampler=sampler)
    checked = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False))
    hook = dict(type='BEiTInvalidLossHook', on_nan=options.pop('on_nan', 'raise'))
    cfg = Config(dict(
        model=dict(type='Toy', **model), work_dir=str(work), experiment_name=f'toy_{next(NUMBERS)}',
        train_dataloader=loader, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=4) if epochs else dict(by_epoch=False, max_iters=8, val_interval=3),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=epochs, interval=1 if epochs else 2, max_keep_ckpts=2),
            invalid_loss=hook,
        ),
        default_scope='mmengine', log_level='WARNING', **options,
    ))  # fmt: skip
    if not epochs:
        cfg.update(val_dataloader=checked, val_cfg={}, val_evaluator=[])
    runner = Runner.from_cfg(cfg)
    validated = Validated()
    runner.register_hook(validated)
    runner.train()
    return validated.at


CASES = {
    'loss between checkpoints': (dict(loss_at=7), False, 'loss is not finite in iteration 7 (loss nan, ', 'iter', 4, 6),
    'loss at a checkpoint': (dict(loss_at=6), False, 'loss is not finite in iteration 6 (loss nan, ', 'iter', 2, 4),
    'gradient at a checkpoint': (dict(gradient_at=6), False, 'not finite after iteration 6 (weight)', 'iter', 2, 4),
    'gradient at a validation': (dict(gradient_at=3), False, 'not finite after iteration 3 (weight)', 'iter', 2),
    'gradient at the end': (dict(gradient_at=8), False, 'not finite after iteration 8 (weight)', 'iter', 4, 6),
    'at once': (dict(loss_at=1), False, 'iteration 1 (loss nan, loss_toy nan); no checkpoint has been', 'iter'),
    'epochs': (dict(gradient_at=6), True, 'weights are not finite after iteration 6 (weight)', 'epoch', 1, 2),
}


@pytest.mark.parametrize('case', CASES)
def test_the_last_good_checkpoint_is_kept(case, tmp_path):
    model, epochs, words, unit, *kept = CASES[case]
    with pytest.raises(InvalidLossError) as caught:
        train(tmp_path, model, epochs)
    assert words in str(caught.value) and '--on-nan continue' in str(caught.value)
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == [f'{unit}_{number}.pth' for number in kept]
    if kept:
        last = str(tmp_path / f'{unit}_{kept[-1]}.pth')
        assert (tmp_path / 'last_checkpoint').read_text() == last and f'checkpoint is {last};' in str(caught.value)


def test_a_resumed_training_knows_its_checkpoint(tmp_path):
    with pytest.raises(InvalidLossError, match=r'iteration 7 .*iter_6\.pth;'):
        train(tmp_path, dict(loss_at=7))
    with pytest.raises(InvalidLossError, match=r'iteration 7 .*last good checkpoint is \S+iter_6\.pth;'):
        train(tmp_path, dict(loss_at=1), resume=True)


def test_going_on(tmp_path):
    assert train(tmp_path, dict(loss_at=3), on_nan='continue') == [3, 6, 8]
    assert (tmp_path / 'iter_8.pth').is_file()
    assert next(tmp_path.glob('*/*.log')).read_text().count('going on without further checks') == 1
    with pytest.raises(ValueError, match="got on_nan='skip', expected 'raise' or 'continue'"):
        BEiTInvalidLossHook('skip')


def test_losses_that_are_finite(tmp_path):
    """What is no loss may be infinite."""
    assert train(tmp_path, {}) == [3, 6, 8]


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {paths}
import torch
import test_invalid_loss

folder, rank = Path(sys.argv[1]), None
cuda = torch.cuda.device_count() >= 2
options = dict(env_cfg=dict(dist_cfg=dict(backend='nccl' if cuda else 'gloo')), launcher='pytorch')
options['model_wrapper_cfg'] = dict(type='MMDistributedDataParallel', device_ids=None)
for name, model in dict(loss=dict(loss_at=5), gradient=dict(gradient_at=6)).items():
    try:
        test_invalid_loss.train(folder / name, dict(model, rank=1), **options)
    except test_invalid_loss.InvalidLossError as error:
        (folder / f'{{name}}{{torch.distributed.get_rank()}}').write_text(str(error))
torch.distributed.destroy_process_group()
"""


def test_all_processes_stop(tmp_path):
    """The loss of the second process alone is NaN."""
    (tmp_path / 'script.py').write_text(
        SCRIPT.format(paths=[str(Path(__file__).parent), str(ROOT / 'tests'), str(ROOT)])
    )
    torchrun(tmp_path / 'script.py', tmp_path)
    for name, words in (
        ('loss', 'in iteration 5 ('),
        ('gradient', 'weights are not finite after iteration 6 (weight)'),
    ):
        assert all(words in (tmp_path / f'{name}{rank}').read_text() for rank in range(2))
        assert ('of another process' in (tmp_path / f'{name}0').read_text()) == (name == 'loss')
        assert f'{tmp_path / name / "iter_4.pth"};' in (tmp_path / f'{name}1').read_text()
        assert sorted(path.name for path in (tmp_path / name).glob('*.pth')) == ['iter_2.pth', 'iter_4.pth']
