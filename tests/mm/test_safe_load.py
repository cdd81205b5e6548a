"""Weights-only loading of mmengine's own checkpoints, and of nothing else."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from beit_plugin.mm.safe_load import allow_mmengine_checkpoints


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
        experiment_name=f'safe_load_{max_iters}',
    )


@pytest.fixture(autouse=True)
def allowed() -> None:
    allow_mmengine_checkpoints()


def save(tmp_path: Path, content: object) -> Path:
    path = tmp_path / 'checkpoint.pth'
    torch.save(content, path)
    return path


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


def test_calling_it_again_changes_nothing() -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    allow_mmengine_checkpoints()
    assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.parametrize('dtype', ['bool', 'int8', 'uint8', 'int32', 'int64', 'float16', 'float32', 'float64', '<U4'])
def test_numpy_arrays_and_scalars_come_back(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0, 1], [2, 3]]).astype(dtype)
    loaded = torch.load(save(tmp_path, {'array': array, 'scalar': array[1, 0], 'dtype': array.dtype}))
    assert loaded['array'].dtype == loaded['dtype'] == array.dtype
    assert np.array_equal(loaded['array'], array)
    assert loaded['scalar'] == array[1, 0] and type(loaded['scalar']) is type(array[1, 0])


@pytest.mark.parametrize('package', [b'numpy._core', b'numpy.core'])
def test_files_of_numpy_1_and_2_load(tmp_path: Path, package: bytes) -> None:
    # the legacy file format is a plain pickle, so the module name can be changed in place
    path = tmp_path / 'legacy.pth'
    torch.save({'array': np.arange(3.0), 'scalar': np.float64(2)}, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes().replace(b'cnumpy._core.', b'cnumpy.core.')
    assert written.count(b'cnumpy.core.multiarray\n') == 2
    path.write_bytes(written.replace(b'cnumpy.core.', b'c' + package + b'.'))
    loaded = torch.load(path, weights_only=True)
    assert loaded['array'].tolist() == [0, 1, 2] and loaded['scalar'] == 2


def test_the_arguments_of_a_tool_come_back(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, config='a.py')
    assert torch.load(save(tmp_path, {'args': arguments}))['args'] == arguments


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __call__(self) -> None:
        """Not called: pickle wants a callable where one call gives the function of another."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


HOSTILE = {
    'os.system': Call(os.system, 'true'),
    'eval': Call(eval, '1'),
    'other method': Call(getattr, HistoryBuffer, 'register_statistics'),
    'constructor': Call(getattr, HistoryBuffer, '__init__'),
    'other class': Call(getattr, np.ndarray, 'tofile'),
    'other owner': Call(getattr, argparse.Namespace, 'mean'),
    'method call': Call(Call(getattr, HistoryBuffer, 'mean'), None),
    'object array': np.array([Call(os.system, 'true')], dtype=object),
}


@pytest.mark.parametrize('hostile', HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, hostile: object) -> None:
    path = save(tmp_path, {'payload': hostile})
    with pytest.raises(Exception, match=r'Weights only load failed|a checkpoint may not look up'):
        torch.load(path)


def test_without_it_torch_refuses_the_same_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, {'losses': HistoryBuffer([1.0], [1])})
    allowed_before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with pytest.raises(Exception, match='HistoryBuffer'):
            torch.load(path)
    finally:
        torch.serialization.add_safe_globals(allowed_before)
