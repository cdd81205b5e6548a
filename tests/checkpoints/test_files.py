"""Checkpoint files: what is read, what is refused and how, and that a failed write loses nothing."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit_plugin.checkpoints import files
from beit_plugin.checkpoints.convert import CheckpointError
from beit_plugin.checkpoints.files import (
    is_damaged,
    open_wrappers,
    read_file,
    read_state_dict,
    remove_leftovers,
    write_atomically,
    write_state_dict,
)

STATE = {'a.weight': torch.randn(3, 5), 'a.bias': torch.randn(3, dtype=torch.float64), 'n': torch.tensor(7)}


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth', 'x.bin'])
def test_round_trip(tmp_path, name):
    write_state_dict(STATE, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name), STATE)
    assert os.listdir(tmp_path) == [name]


def test_views_and_shared_tensors_are_written(tmp_path):
    shared = torch.randn(4, 6)
    write_state_dict({'a': shared, 'b': shared, 'c': shared.t()}, tmp_path / 'x.safetensors')
    assert torch.equal(read_state_dict(tmp_path / 'x.safetensors')['c'], shared.t())


@pytest.mark.parametrize(
    'wrap', [lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': {'module': s}, 'epoch': 3}]
)
def test_wrappers_are_opened(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / 'x.pth')
    assert_same(read_state_dict(tmp_path / 'x.pth'), STATE)


@pytest.mark.parametrize(
    'loaded, sentence', [([1], 'holds a list, not a state dict'), ({'epoch': 1}, 'no tensors by name')]
)
def test_no_state_dict(loaded, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        open_wrappers(loaded, 'x.pth')


def test_missing_and_empty(tmp_path):
    with pytest.raises(CheckpointError, match='does not exist'):
        read_state_dict(tmp_path / 'x.pth')
    (tmp_path / 'x.pth').touch()
    with pytest.raises(CheckpointError, match='is empty'):
        read_state_dict(tmp_path / 'x.pth')


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.9])
def test_cut_off(tmp_path, name, share):
    write_state_dict(STATE, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: max(1, int(share * len(whole)))])
    with pytest.raises(CheckpointError, match='is cut off, damaged or no'):
        read_state_dict(tmp_path / name)


HUGE_HEADER = b'\xff' * 7 + b'\x7f{}'  # a safetensors header of eight exbibytes


@pytest.mark.parametrize('content', [b'hello', b'\x80\x02}q\x00.', b'\xff' * 100, HUGE_HEADER])
@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
def test_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ('save', 'sentence'),
    [
        (torch.save, r'holds posix.system, which is neither'),
        (
            lambda thing, path: path.write_bytes(pickle.dumps(thing['evil'])),
            r'holds posix.system, which is neither',
        ),
    ],
)
def test_hostile_pickle_is_not_run(tmp_path, save, sentence):
    save({'model': STATE['n'], 'evil': Hostile(tmp_path / 'ran')}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=sentence):
        read_state_dict(tmp_path / 'x.pth')
    assert not (tmp_path / 'ran').exists()


def test_whole_module_names_the_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'holds torch.nn.modules.linear.Linear, which is neither'):
        read_state_dict(tmp_path / 'x.pth')


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
def test_failed_write_keeps_the_old_file(tmp_path, name, monkeypatch):
    write_state_dict(STATE, tmp_path / name)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        write_state_dict({'other': torch.zeros(1)}, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name), STATE)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize('name', ['x.safetensors', 'x.pth'])
def test_a_full_disk_is_an_os_error(tmp_path, name):
    write_state_dict(STATE, tmp_path / name)
    script = f"""
import resource, signal, torch
from beit_plugin.checkpoints.files import write_state_dict
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))  # a larger file fails as on a full disk
try:
    write_state_dict({{'a': torch.zeros(100_000)}}, {str(tmp_path / name)!r})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf'.*{name} cannot be written: .+\n', done.stdout)
    assert_same(read_state_dict(tmp_path / name), STATE)
    assert os.listdir(tmp_path) == [name]


def test_all_that_a_file_holds_without_its_values(tmp_path):
    torch.save({'state_dict': STATE, 'epoch': 3}, tmp_path / 'x.pth')
    held = read_file(tmp_path / 'x.pth', with_values=False)
    assert held['epoch'] == 3 and held['state_dict'].keys() == STATE.keys()
    assert all(tensor.is_meta and tensor.shape == STATE[name].shape for name, tensor in held['state_dict'].items())


def test_checksums(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save({'a': torch.zeros(1000)}, path)
    assert not is_damaged(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert is_damaged(path)
    with pytest.raises(CheckpointError, match='damaged or no'):
        read_file(path)
    torch.save({'a': torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    assert not is_damaged(path) and not read_file(path)['a'].any()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'a': torch.zeros(1000)}, path)
        assert not is_damaged(path) and not read_file(path)['a'].any()
    finally:
        torch.serialization.set_crc32_options(before)


def test_what_a_killed_write_left_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.Path, 'unlink', lambda *_, **__: None)  # who is killed does not clear up
        patch.setattr(files.os, 'replace', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_atomically(tmp_path / 'iter_2.pth', lambda path: Path(path).write_bytes(b'half'))
    kept = ['.iter_2.pth', '.other.pth.abcdefgh', 'iter_2.pth.abcdefgh']
    for name in kept:
        (tmp_path / name).touch()
    assert len(os.listdir(tmp_path)) == 4
    remove_leftovers(tmp_path, 'iter_*.pth')
    assert sorted(os.listdir(tmp_path)) == kept
