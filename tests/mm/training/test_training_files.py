"""mmengine's own checkpoints stay readable; what may be in them is tested in tests/checkpoints/test_stand_ins.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

from mmengine.dataset import InfiniteSampler
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import CheckpointLoader, IterBasedTrainLoop, Runner

import beit_plugin.mm  # noqa: F401
from beit_plugin.checkpoints import CheckpointError


class Model(BaseModel):
    """One weight, a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: list[torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
        return {'loss': self.layer(torch.stack(inputs)).square().mean()}


def make_runner(work_dir: Path, max_iters: int, resume: bool) -> Runner:
    model = Model()
    dataset = [{'inputs': row} for row in torch.eye(2)]
    hooks = dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
    )
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(dataset=dataset, sampler=dict(type=InfiniteSampler, shuffle=False), batch_size=2),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)),
        train_cfg=dict(type=IterBasedTrainLoop, max_iters=max_iters),
        default_hooks=hooks,
        resume=resume,
        experiment_name=f'training_files_{max_iters}',
    )


def test_a_runner_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    make_runner(tmp_path, max_iters=2, resume=False).train()
    checkpoint = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    losses = checkpoint['message_hub']['log_scalars']['train/loss']
    assert isinstance(losses, HistoryBuffer)
    assert len(losses.data[0]) == 2
    assert losses.statistics('mean') == losses.mean()

    runner = make_runner(tmp_path, max_iters=4, resume=True)
    runner.train()
    assert runner.iter == 4
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 4


def test_mmengine_loads_nothing_damaged(tmp_path: Path) -> None:
    path = tmp_path / 'x.pth'
    torch.save({'layer.weight': torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'x.pth is damaged: its checksums do not fit'):
        CheckpointLoader.load_checkpoint(str(path))
