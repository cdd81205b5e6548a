"""Checkpoint files are data: what timm and mmengine store comes back, and nothing else that a pickle can say."""

import argparse
import itertools
import os
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import pytest
import torch
from checkpoints.fuzz_pickles import run
from checkpoints.pickle_grammar import archive, call, integer, name, text

import beit_plugin  # noqa: F401  registers the stand-ins
from beit_plugin.checkpoints import CheckpointError, stand_ins
from beit_plugin.checkpoints.files import is_damaged, read_file, read_state_dict
from beit_plugin.checkpoints.stand_ins import register_stand_ins

READERS = {'ours': read_file, 'torch': lambda path: torch.load(path, weights_only=True)}
both = pytest.mark.parametrize('read', READERS.values(), ids=READERS)


def save(tmp_path: Path, content: object, **options: object) -> Path:
    path = tmp_path / 'checkpoint.pth'
    torch.save(content, path, **options)
    return path


def test_registering_again_changes_nothing() -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    register_stand_ins()
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_nothing_real_is_allowed() -> None:
    allowed = [entry[0] if isinstance(entry, tuple) else entry for entry in torch.serialization.get_safe_globals()]
    assert not {np.ndarray, np.dtype, argparse.Namespace, getattr} & set(allowed)
    ours = [value for value in allowed if value.__module__ == stand_ins.__name__]
    assert len(set(ours)) == 8  # four classes, four functions


@both
@pytest.mark.parametrize('dtype', ['bool', 'int8', 'uint8', 'int32', 'int64', 'float16', 'float32', '>f4', 'float64'])
def test_numpy_arrays_and_scalars_come_back(tmp_path: Path, dtype: str, read) -> None:
    array = np.asfortranarray(np.array([[0, 1], [2, 3]]).astype(dtype))
    content = {'array': array, 'scalar': array[1, 0]}
    loaded = read(save(tmp_path, content))
    assert np.array_equal(loaded['array'], array)
    assert loaded['array'].dtype == array.dtype.newbyteorder('=')  # NumPy swaps the bytes too
    assert loaded['scalar'] == array[1, 0] and type(loaded['scalar']) is type(array[1, 0])
    again = torch.load(save(tmp_path, loaded), weights_only=False)  # saved again, it is NumPy's own
    assert type(again['array']) is np.ndarray and np.array_equal(again['array'], array)


@both
@pytest.mark.parametrize('package', [b'numpy._core', b'numpy.core'])
def test_files_of_numpy_1_and_2_load(tmp_path: Path, package: bytes, read) -> None:
    # the legacy file format is a plain pickle, so the module name can be changed in place
    content = {'array': np.arange(3.0), 'scalar': np.float64(2)}
    path = save(tmp_path, content, _use_new_zipfile_serialization=False)
    written = path.read_bytes().replace(b'cnumpy._core.', b'cnumpy.core.')
    assert written.count(b'cnumpy.core.multiarray\n') == 2
    path.write_bytes(written.replace(b'cnumpy.core.', b'c' + package + b'.'))
    loaded = read(path)
    assert loaded['array'].tolist() == [0, 1, 2] and loaded['scalar'] == 2


@both
def test_the_arguments_of_a_tool_come_back(tmp_path: Path, read) -> None:
    arguments = argparse.Namespace(lr=0.1, config='a.py')
    loaded = read(save(tmp_path, {'args': arguments}))['args']
    assert type(loaded) is argparse.Namespace and loaded == arguments


@both
def test_history_buffers_come_back_where_mmengine_is_loaded(tmp_path: Path, read) -> None:
    history = pytest.importorskip('mmengine.logging', reason='needs the extra mmseg').HistoryBuffer
    loaded = read(save(tmp_path, {'loss': history([1.0, 3.0], [1, 1])}))['loss']
    assert type(loaded) is history and loaded.statistics('mean') == 2
    loaded.update(5.0)
    assert loaded.data[0].tolist() == [1, 3, 5]


@pytest.mark.parametrize('real', list(itertools.product([False, True], repeat=3)))
def test_beside_those_who_allow_the_real_ones(tmp_path: Path, real, monkeypatch) -> None:
    # as transformers' Trainer does while it reads random states: of two entries of one name torch takes any
    reconstruct = np.empty(0).__reduce__()[0]
    named = {f'{reconstruct.__module__}.{reconstruct.__name__}': reconstruct, 'numpy.ndarray': np.ndarray,
             'numpy.dtype': np.dtype}  # fmt: skip
    unpickler = sys.modules['torch._weights_only_unpickler']
    with torch.serialization.safe_globals([*named.values(), type(np.dtype('u4'))]):
        allowed = unpickler._get_user_allowed_globals()
        ours = dict(zip(named, (stand_ins._reconstruct, stand_ins.PlainArray, stand_ins._process_dtype), strict=True))
        chosen = {key: named[key] if is_real else ours[key] for key, is_real in zip(named, real, strict=True)}
        monkeypatch.setattr(unpickler, '_get_user_allowed_globals', lambda: {**allowed, **chosen})
        loaded = torch.load(save(tmp_path, np.arange(4, dtype='u4')), weights_only=True)
    assert loaded.tolist() == [0, 1, 2, 3] and loaded.dtype == np.uint32


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __call__(self) -> None:
        """Not called: pickle wants a callable where one call gives the function of another."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


CALLS = {
    'os.system': Call(os.system, 'true'),
    'eval': Call(eval, '1'),
    'class of NumPy': Call(getattr, np.ndarray, 'tofile'),
    'other owner': Call(getattr, argparse.Namespace, 'mean'),
    'object array': np.array([Call(os.system, 'true')], dtype=object),
    'text array': np.array(['a']),
    'record array': np.zeros(2, dtype=[('a', 'f4')]),
    'date': np.datetime64('2026-01-01'),
}


@both
@pytest.mark.parametrize('hostile', CALLS.values(), ids=CALLS)
def test_calls_are_refused(tmp_path: Path, hostile: object, read) -> None:
    with pytest.raises((CheckpointError, UnpicklingError)):
        read(save(tmp_path, {'payload': hostile}))


def data(content: bytes) -> bytes:
    return call(name('_codecs.encode'), text(content.decode('latin1')), text('latin1'))


def group(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


HISTORY = name('mmengine.logging.history_buffer.HistoryBuffer')
EMPTY = call(name('numpy._core.multiarray._reconstruct'), name('numpy.ndarray'), group(integer(0)), data(b'b'))
FLOATS = call(name('numpy.dtype'), text('f8'), b'\x89', b'\x88')
STATE = (integer(3), text('<'), b'N', b'N', b'N', integer(-1), integer(-1), integer(0))
FILLED = group(integer(1), group(integer(1)), FLOATS + group(*STATE) + b'b', b'\x89', data(bytes(8)))
HOSTILE = {
    'bytes as object pointers': call(name('numpy.ndarray'), group(integer(1)), text('O'), data(b'A' * 8)),
    'bytes as an array by NEWOBJ': name('numpy.ndarray')
    + group(group(integer(1)), text('O'), data(b'A' * 8))
    + b'\x81',
    'object dtype': call(name('numpy.dtype'), text('O'), b'\x89', b'\x88'),
    'flags of a dtype': FLOATS + group(*STATE[:-1], integer(63)) + b'b',
    'size of a dtype': FLOATS + group(*STATE[:5], integer(1 << 20), integer(1), integer(0)) + b'b',
    'beyond the bytes': EMPTY + group(integer(1), group(integer(9)), FLOATS, b'\x89', data(bytes(8))) + b'b',
    'negative shape': EMPTY + group(integer(1), group(integer(-1)), FLOATS, b'\x89', data(bytes(8))) + b'b',
    'a second state': EMPTY + FILLED + b'b' + FILLED + b'b',
    'number from too few bytes': call(name('numpy._core.multiarray.scalar'), FLOATS, data(bytes(4))),
    'array as a type': call(name('numpy._core.multiarray._reconstruct'), name('argparse.Namespace'), b')', data(b'b')),
    'constructor of HistoryBuffer': call(name('builtins.getattr'), HISTORY, text('__init__')),
    'state of a class': HISTORY + b'}' + text('mean') + b'Nsb',
    'state that is no dict': name('argparse.Namespace') + b')\x81' + group(b'N', b'N') + b'b',
}


@both
@pytest.mark.parametrize('content', HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_are_refused(tmp_path: Path, content: bytes, read) -> None:
    path = tmp_path / 'x.pth'
    path.write_bytes(archive(b'\x80\x02' + content + b'.'))
    with pytest.raises((CheckpointError, UnpicklingError)):
        read(path)


@both
def test_a_state_does_not_replace_methods(tmp_path: Path, read) -> None:
    history = pytest.importorskip('mmengine.logging', reason='needs the extra mmseg').HistoryBuffer
    before = {**vars(history), 'methods': dict(history([], [])._statistics_methods)}
    filled = EMPTY + FILLED + b'b'
    state = {'statistics_methods': b'}' + text('mean') + name('torch.device') + b's', '_log_history': filled,
             '_count_history': filled, 'max_length': integer(9), 'mean': b'N'}  # fmt: skip
    pairs = b''.join(text(key) + value + b's' for key, value in state.items())
    path = tmp_path / 'x.pth'
    path.write_bytes(archive(b'\x80\x02' + HISTORY + b')\x81}' + pairs + b'b.'))
    assert read(path).max() == 0
    assert {**vars(history), 'methods': dict(history._statistics_methods)} == before


NESTED = b')' + b'\x85' * 300_000  # a tuple in a tuple in a tuple ...
STORAGE = group(text('storage'), name('torch.FloatStorage'), text('0'), text('cpu'), integer(4)) + b'Q'
SHAPE, STRIDE = group(integer(10**6), integer(10**6)), group(integer(0), integer(0))
TENSOR = call(name('torch._utils._rebuild_tensor'), STORAGE, integer(0), SHAPE, STRIDE)
FILLING = {
    'bytearray': call(name('builtins.bytearray'), integer(10**12)),
    'tensor of any size': call(name('torch.FloatTensor'), integer(10**12)),
    'storage of any size': call(name('torch.storage.UntypedStorage'), integer(10**12)),
    'expanded tensor': TENSOR,
    'nested keys': b'}' + NESTED + b'Ns',
    'nested members': call(name('builtins.set'), b']' + NESTED + b'a'),
    'one text many times': text('a' * 10**6) + b'q\x010]'
    + b''.join(call(name('_codecs.encode'), b'h\x01', text('latin1')) + b'a' for _ in range(200)),
    'one list many times': b']q\x01(' + b'N' * 10**5 + b'e0]' + b''.join(
        call(name('collections.Counter'), b'h\x01') + b'a' for _ in range(200)),
    'enormous sizes': call(name('torch._utils._rebuild_tensor'), STORAGE, integer(0),
                           b'(' + b'\x8b' + (5000).to_bytes(4, 'little') + b'\x7f' * 5000 + b't', group(integer(1))),
    'keys of one hash': b'}(' + b''.join(integer(k * (2**61 - 1)) + b'N' for k in range(2, 2000)) + b'u',
    'many objects': b'](' + b'}' * 1_200_000 + b'e',
}  # fmt: skip


@pytest.mark.parametrize('content', FILLING.values(), ids=FILLING)
def test_files_that_would_fill_memory_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'x.pth'
    path.write_bytes(archive(b'\x80\x02' + content + b'.'))
    with pytest.raises(CheckpointError, match=r'x.pth (is cut off, damaged|holds )'):
        read_file(path)


def test_a_counter_holds_what_is_set(tmp_path: Path) -> None:
    path = tmp_path / 'x.pth'
    path.write_bytes(archive(b'\x80\x02' + call(name('collections.Counter')) + text('k') + NESTED + b's.'))
    assert list(read_file(path)) == ['k']  # the value is not hashed


def test_long_prefixes_end(tmp_path: Path) -> None:
    path = save(tmp_path, {'module.' * 50_000 + 'w': torch.zeros(1)})
    assert len(next(iter(read_state_dict(path)))) > 300_000  # a few are taken off


@pytest.mark.parametrize('view', [lambda x: x.conj(), lambda x: x.conj().imag], ids=['conjugated', 'negated'])
def test_lazy_views_are_refused(tmp_path: Path, view) -> None:
    with pytest.raises(CheckpointError, match=r'resolve_conj'):
        read_file(save(tmp_path, {'a': view(torch.randn(3, dtype=torch.complex64))}))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, {'a': torch.zeros(10**6)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry))
    with pytest.raises(CheckpointError, match='it is a compressed archive'):
        read_file(tmp_path / 'x.pth')


def test_every_bit_counts(tmp_path: Path) -> None:
    state = {'a.weight': torch.randn(30, 20), 'a.bias': torch.randn(30), 'n': torch.tensor(7)}
    path = save(tmp_path, state)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        position = int(generator.integers(len(whole)))
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = read_file(path)
        except CheckpointError:
            continue
        assert not is_damaged(path)
        # in the padding between the records
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_all_that_torch_saves(tmp_path: Path, legacy: bool, protocol: int) -> None:
    base = torch.randn(6, 4)
    state = {
        **{str(dtype): torch.ones(3, 2).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
        **{str(dtype): torch.arange(3).to(dtype) for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)},
        'parameter': torch.nn.Parameter(base), 'turned': base.t(), 'part': base[2:, 1:3], 'empty': torch.zeros(0, 3),
        'scalar': torch.tensor(2.5), 'buffer': torch.nn.Buffer(base) if hasattr(torch.nn, 'Buffer') else base,
    }  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    content = {'state': state, 'module': module.state_dict(), 'size': base.size(), 'set': {1, 2}, 'epoch': 10**20}
    options = dict(_use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    loaded = read_file(save(tmp_path, content, **options))
    for key, value in {**state, **content['module']}.items():
        found = {**loaded['state'], **loaded['module']}[key]
        assert found.dtype == value.dtype and torch.equal(found, value.detach()), key
    assert loaded['module']._metadata == content['module']._metadata
    assert {key: loaded[key] for key in ('size', 'set', 'epoch')} == {k: content[k] for k in ('size', 'set', 'epoch')}
    shared = loaded['state']
    shared['parameter'][2, 1] = 9
    assert shared['part'][0, 0] == 9  # tensors that share memory share it again


@pytest.mark.slow
def test_random_pickles() -> None:
    assert run(300) == []
