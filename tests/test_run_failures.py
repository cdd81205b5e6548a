"""How a tool ends: one sentence and a status for what users and machines do, a traceback for errors of a program."""

import importlib.util
import os
import signal

import pytest
import tools_common  # noqa: F401  puts tools/ on the path
import torch

from data_folders import DataError  # isort: skip
from run_common import run  # isort: skip
from run_failures import make_folder  # isort: skip

needs_mmengine = pytest.mark.skipif(importlib.util.find_spec('mmengine') is None, reason='needs mmengine')


def ctrl_c_in_a_save():
    """As while a checkpoint is written: torch fails to close what was not finished."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError('unexpected pos 64 vs 0')


def formatting(monkeypatch, error):
    from mmengine.config import Config, config

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(config, 'FormatCode', fail)
    return Config(dict(a=1)).pretty_text


class Images(torch.utils.data.Dataset):
    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.act()


def loading(act):
    list(torch.utils.data.DataLoader(Images(act), num_workers=1))


@pytest.mark.parametrize(
    ('step', 'status'),
    [
        (lambda: (_ for _ in ()).throw(DataError('no images.')), 'error: no images.'),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt), 130),
        (ctrl_c_in_a_save, 130),
        (lambda: open('none/a.txt'), 'error: none/a.txt: No such file or directory.'),
        (lambda: (_ for _ in ()).throw(OSError(28, 'No space left on device')), 'error: No space left on device.'),
        (lambda: loading(lambda: open('gone.jpg')), "error: No such file or directory: 'gone.jpg'."),
        (
            lambda: loading(lambda: os.kill(os.getpid(), signal.SIGKILL)),
            'error: a process that loads data was killed by the signal Killed: if memory ran out, take fewer of them',
        ),
        (lambda: loading(lambda: os._exit(3)), 'error: a process that loads data died: if memory ran out'),
    ],
)
def test_one_sentence(step, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(step)
    code = stopped.value.code
    assert code == status or (isinstance(code, str) and code.startswith(str(status)) and '\n' not in code)
    assert capsys.readouterr().err == ('interrupted\n' if status == 130 else '')


@needs_mmengine
@pytest.mark.parametrize(
    ('error', 'status'),
    [
        (KeyboardInterrupt(), 130),
        (
            RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
            'error: a process that loads data was',
        ),
    ],
)
def test_while_mmengine_formats_a_configuration(error, status, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        run(lambda: formatting(monkeypatch, error))
    assert stopped.value.code == status or stopped.value.code.startswith(status)


def test_an_error_of_a_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


def test_folders_for_results(tmp_path):
    make_folder(tmp_path / 'a/b', '--out')
    assert not list((tmp_path / 'a/b').iterdir())
    (tmp_path / 'file').touch()
    for path, why in (('file', 'it is a file'), ('file/a', 'Not a directory')):
        with pytest.raises(DataError, match=rf'--out .*{path} cannot be written to \({why}\)'):
            make_folder(tmp_path / path, '--out')
