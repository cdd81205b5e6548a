"""What tests of several folders share."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

CXX = os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')  # as torch.compile looks for it
needs_cpp_compiler = pytest.mark.skipif(
    not shutil.which(CXX) or not Path(sysconfig.get_path('include'), 'Python.h').is_file(),
    reason=f"torch.compile needs a C++ compiler ({CXX}) and Python's headers (Debian: g++ and python3-dev)",
)

# small, not square, and with the head dim (64) of the published models
SIZES = dict(img_size=(64, 96), embed_dim=128, depth=3, num_heads=2, mlp_ratio=2.0)
# where only shapes and plumbing matter
TINY = dict(img_size=(48, 80), embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter and buffer at random, so that no term is hidden by a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in state.items():
            if not tensor.is_floating_point() or name.endswith('k_bias'):
                continue  # counters and indices; BEiT has no key bias, timm keeps a buffer of zeros in its place
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2.0, generator=generator)
                continue
            fan_in = tensor[0].numel() if tensor.ndim > 1 and min(tensor.shape[:2]) > 1 else 1
            is_table = name.endswith('relative_position_bias_table')
            std = 1.0 if is_table else 0.3 if fan_in == 1 else fan_in**-0.5
            tensor.normal_(0.0, std, generator=generator)
            if tensor.ndim == 1 and not name.endswith(('bias', 'running_mean')):
                tensor += 0.7  # norms and layer scales
    return model


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected value; infinite for NaN, which ``max`` and ``<`` would overlook."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    got, expected = got.detach().double(), expected.detach().double()
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    return float('inf') if error != error else error


def worst(got: Iterable[Tensor | None], expected: Iterable[Tensor]) -> float:
    """The largest ``relative_error`` of several tensors, less those that were not asked for."""
    return max(relative_error(a, b) for a, b in zip(got, expected, strict=True) if a is not None)


def weighted_sum(*outputs: Tensor) -> Tensor:
    """A scalar whose gradient is different at every element of every output."""
    total = outputs[0].new_zeros(())
    for i, x in enumerate(outputs):
        total = total + (x * torch.linspace(-3 - i, 3, x.numel(), dtype=x.dtype).sin().view_as(x)).sum()
    return total


def torchrun(*args: object, dies: bool = False, **options: object) -> str:
    """Output of a script, and its arguments, in two processes; fails with their errors, or where none died but should.

    Args:
        args: after those of torchrun.
        dies: whether a process shall fail.
        options: ``cwd``, and variables of the environment in capitals.
    """
    launcher = ['-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    env = {**os.environ, **{key: str(value) for key, value in options.items() if key.isupper()}}
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, args)], capture_output=True, text=True, timeout=300, env=env,
        cwd=options.get('cwd'),  # type: ignore[call-overload]
    )  # fmt: skip
    # with gloo's threads running torch 2.14 aborts now and then at the end of a process, after its work is done
    ended = done.returncode == 0 or 'terminate called without an active exception' in done.stderr
    assert done.returncode if dies else ended, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def images(*size: int, batch: int = 2, channels: int = 3, seed: int = 1) -> Tensor:
    """(batch, channels, H, W), the same on every call."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, and a message for those that have none."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), [n for n, g in found.items() if g is None]
    return found
