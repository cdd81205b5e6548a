"""`python -m beit_plugin SCRIPT`: the script cannot tell, the plugin is there first, and spawned processes have it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import torchrun

from beit_plugin.__main__ import USAGE, main
from beit_plugin._script import _prepare

ROOT = Path(__file__).parents[1]
MM_IS_INSTALLED = all(find_spec(name) for name in ('mmengine', 'mmcv'))
needs_mm = pytest.mark.skipif(not MM_IS_INSTALLED, reason='needs the extra beit-plugin[mmseg]')

PROBE = """
import json, sys
extra = {}
if sys.argv[1] == 'ours':
    import timm
    extra['models'] = timm.is_model('beit_plugin_base_patch16_224')
print(json.dumps(dict(
    argv=sys.argv[2:], path=sys.path[0], name=__name__, file=__file__, package=__package__, doc=__doc__,
    loader=type(__loader__).__name__, main=sys.modules['__main__'].__file__, **extra,
)))
"""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `main` replace what it replaces in this process, and put it back; OpenMMLab stays unimported."""
    for name in ('__main__', '__mp_main__'):
        monkeypatch.setitem(sys.modules, name, sys.modules['__main__'])
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv('BEIT_PLUGIN_SCRIPT', '')
    monkeypatch.setattr('beit_plugin._script._prepare', lambda: None)


def write(folder: Path, text: str, name: str = 'script.py') -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_python(
    *arguments: object, cwd: Path, path: Sequence[Path] = (ROOT,), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter on one thread, with the folders of `path` to import from."""
    search = os.pathsep.join(map(str, path))
    environment = {**os.environ, 'PYTHONPATH': search, 'OMP_NUM_THREADS': '1', **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=300)


WARNING = (
    'beit_plugin: warning: OpenMMLab is installed but cannot be used (TypeError: NoneType takes no arguments); '
    'only the timm models are registered\n'
)


def break_openmmlab(folder: Path) -> Path:
    """Put packages that cannot be imported into a folder, which also keeps the processes quick."""
    for name in ('mmengine', 'mmcv'):
        write(folder, 'raise TypeError("NoneType takes no arguments\\nsecond line")', f'{name}/__init__.py')
    return folder


@pytest.mark.parametrize('arguments, status, stream', [([], 2, 'err'), (['--help'], 0, 'out'), (['-h'], 0, 'out')])
def test_usage(arguments: list[str], status: int, stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert getattr(captured, stream) == USAGE
    assert captured.out + captured.err == USAGE


@pytest.mark.parametrize('name, reason', [('absent.py', 'No such file or directory'), ('.', 'Is a directory')])
def test_a_script_that_cannot_be_read(name: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, '--option']) == 2
    assert capsys.readouterr().err == f'beit_plugin: cannot open the script {name!r}: {reason}\n'


@pytest.mark.usefixtures('in_process')
@pytest.mark.parametrize('code, status', [('3', 3), ('"a reason"', 'a reason'), ('', None)])
def test_the_scripts_exit_passes_through(tmp_path: Path, code: str, status: object) -> None:
    script = write(tmp_path, f'import sys\nsys.exit({code})\n')
    with pytest.raises(SystemExit) as exit_info:
        main([str(script)])
    assert exit_info.value.code == status


@pytest.mark.usefixtures('in_process')
def test_the_scripts_error_passes_through_with_its_line(tmp_path: Path) -> None:
    script = write(tmp_path, '# -*- coding: latin-1 -*-\n\nraise FileNotFoundError("mine")\n')
    with pytest.raises(FileNotFoundError, match='mine') as error_info:
        main([str(script)])
    last = error_info.traceback[-1]
    assert (Path(last.path), last.lineno) == (script, 2)  # counted from 0


@pytest.mark.usefixtures('in_process')
def test_the_script_is_main_and_sees_no_future_of_ours(tmp_path: Path) -> None:
    script = write(tmp_path, 'class A: pass\nassert __name__ == "__main__"\nif __name__ == "__main__": ran = A\n')
    assert main([str(script)]) == 0
    module = sys.modules['__main__']
    assert module.ran.__module__ == '__main__'
    assert module.__file__ == str(script)


def test_the_script_cannot_tell_and_the_plugin_is_there_first(tmp_path: Path) -> None:
    write(tmp_path, PROBE, 'tools/probe.py')
    (tmp_path / 'link.py').symlink_to('tools/probe.py')
    (tmp_path / 'work').mkdir()
    plain = run_python('../link.py', 'plain', '-h', 'b c', cwd=tmp_path / 'work')
    path = (break_openmmlab(tmp_path / 'broken'), ROOT)
    ours = run_python('-m', 'beit_plugin', '../link.py', 'ours', '-h', 'b c', cwd=tmp_path / 'work', path=path)
    assert plain.returncode == ours.returncode == 0, plain.stderr + ours.stderr
    seen = json.loads(ours.stdout.splitlines()[-1])
    assert seen.pop('models')
    assert seen == json.loads(plain.stdout)


def test_without_openmmlab_nothing_is_imported_or_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, 'mmengine', None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, 'beit_plugin.mm', raising=False)
    _prepare()
    assert 'beit_plugin.mm' not in sys.modules
    assert capsys.readouterr() == ('', '')


SPAWN = """
import concurrent.futures, multiprocessing, os, sys
import timm

class Answer:
    def __init__(self):
        self.values = __name__, timm.is_model('beit_plugin_base_patch16_224')

def grandchild():
    return Answer()

def child():
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return Answer(), pool.apply(grandchild)

if __name__ == '__main__':
    os.chdir('/')  # a relative argv[0] must not matter any more
    sys.argv[:] = ['changed']
    context = multiprocessing.get_context('forkserver')
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for answer in pool.submit(child).result():
            print(type(answer) is Answer, *answer.values)
"""


def test_spawned_processes_have_the_plugin_and_a_broken_openmmlab_is_one_line(tmp_path: Path) -> None:
    script = write(tmp_path, SPAWN)
    # from a source tree: `-m` finds the package in the working directory, which the script's folder then replaces
    broken = break_openmmlab(tmp_path / 'broken')
    result = run_python('-m', 'beit_plugin', os.path.relpath(script, ROOT), cwd=ROOT, path=[broken])
    assert (result.returncode, result.stderr) == (0, WARNING)  # from the first process only
    assert result.stdout.splitlines() == ['True __mp_main__ True'] * 2


SPAWN_MM = """
import sys
import torch

class Probe(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        assert type(self) is sys.modules['__main__'].Probe
        import mmcv.ops  # the finder is there
        return 'beit_plugin.mm' in sys.modules

if __name__ == '__main__':
    loader = torch.utils.data.DataLoader(Probe(), num_workers=1, multiprocessing_context='spawn')
    print('beit_plugin.mm' in sys.modules, next(iter(loader)))
"""


@needs_mm
def test_openmmlab_is_there_first_and_in_spawned_workers(tmp_path: Path) -> None:
    result = run_python('-m', 'beit_plugin', write(tmp_path, SPAWN_MM), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == 'True tensor([True])'


TORCHRUN = """
import os, sys
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, inputs, mode):
        return {'loss': self.layer(torch.stack(inputs)).square().mean()}

if __name__ == '__main__':
    model = Model()
    runner = Runner(
        model=model,
        work_dir=sys.argv[1],
        train_dataloader=dict(
            dataset=[{'inputs': row} for row in torch.eye(2)], sampler=dict(type=InfiniteSampler), batch_size=1
        ),
        optim_wrapper=OptimWrapper(torch.optim.SGD(model.parameters(), 0.1)),
        train_cfg=dict(type=IterBasedTrainLoop, max_iters=2),
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
    )
    runner.train()
    weight = model.layer.weight.detach().clone()
    torch.distributed.broadcast(weight, 0)
    same = bool((weight == model.layer.weight).all())
    sys.stdout.write(f"rank {os.environ['RANK']} same {same}\\n")  # one write: both ranks share the stream
    sys.stdout.flush()
    torch.distributed.barrier()
    del runner, model  # gloo's threads must end before the process does, or torch 2.14 aborts now and then
    torch.distributed.destroy_process_group()
"""


@needs_mm
def test_torchrun_with_two_cpu_processes(tmp_path: Path) -> None:
    script = write(tmp_path, TORCHRUN)
    said = torchrun('-m', 'beit_plugin', script, tmp_path / 'out', cwd=tmp_path, CUDA_VISIBLE_DEVICES='')
    ranks = sorted(line for line in said.splitlines() if line.startswith('rank'))
    assert ranks == ['rank 0 same True', 'rank 1 same True']
