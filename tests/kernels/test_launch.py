"""Launches that go past Triton: what it compiles a kernel for decides which compiled one runs, and how it is called."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton')

from beit_plugin.kernels.launch import MAX_INT32, Launcher

POINTER = torch.zeros(64, dtype=torch.int8)
ELSEWHERE = SimpleNamespace(dtype=torch.int8, data_ptr=POINTER.data_ptr, get_device=lambda: 1)


class Compiled:
    """As Triton's, of 3.3 and later."""

    function, packed_metadata = 'function', 'metadata'

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)


class Kernel:
    """As one of ``triton.jit``, with the compiled ones in the order in which they were asked for."""

    arg_names = ('x', 'n', 'scale', 'BLOCK')

    def __init__(self):
        self.made = []

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            self.made.append((Compiled(), grid, arguments, keywords))
            return self.made[-1][0]

        return launch


@pytest.fixture
def launcher(monkeypatch):
    device = SimpleNamespace(now=0)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: device.now)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda index: f'stream {index}', raising=False)
    launcher = Launcher(Kernel(), dict(BLOCK=32), dict(num_warps=4))
    launcher.reuses, launcher.device = True, device
    return launcher


def test_first_by_triton_then_directly(launcher):
    launcher((1, 2, 3), POINTER, 5, 0.5)
    [(compiled, grid, arguments, keywords)] = launcher.kernel.made
    assert grid == (1, 2, 3) and arguments[0] is POINTER and arguments[1:] == (5, 0.5)
    assert keywords == dict(BLOCK=32, num_warps=4) and not compiled.runs
    launcher((4, 5, 6), POINTER, 7, 0.25)
    assert len(launcher.kernel.made) == 1
    nothing = (None, None, None)
    assert compiled.runs == [(4, 5, 6, 'stream 0', 'function', 'metadata', *nothing, POINTER.data_ptr(), 7, 0.25, 32)]


@pytest.mark.parametrize(
    'x, n, scale',
    [
        (POINTER.view(torch.int16), 5, 0.5),
        (POINTER[1:], 5, 0.5),  # not aligned
        (ELSEWHERE, 5, 0.5),
        (None, 5, 0.5),
        (POINTER, 16, 0.5),
        (POINTER, 1, 0.5),
        (POINTER, MAX_INT32 + 2, 0.5),
        (POINTER, 5, None),
    ],
)
def test_what_is_compiled_anew(launcher, x, n, scale):
    launcher((1, 1, 1), POINTER, 5, 0.5)
    for _ in range(2):
        launcher((1, 1, 1), x, n, scale)
    assert len(launcher.kernel.made) == 2 and len(launcher.kernel.made[1][0].runs) == 1
    launcher.device.now = 1  # a kernel is loaded for each device
    launcher((1, 1, 1), POINTER, 5, 0.5)
    assert len(launcher.kernel.made) == 3 and not launcher.kernel.made[0][0].runs


def test_the_interpreter_runs_every_time(launcher):
    launcher.reuses = False
    for _ in range(2):
        launcher((1, 1, 1), POINTER, 5, 0.5)
    assert len(launcher.kernel.made) == 2 and not launcher.compiled
