"""Questions about the run: can Triton kernels run here, may a module be computed otherwise, may a tensor be cached."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    'can_cache_tensors',
    'is_exporting',
    'is_open',
    'is_plain',
    'needs_forward_derivative',
    'needs_transforms',
    'plain_tensors',
    'triton_by_default',
    'triton_is_interpreted',
    'triton_refusal',
]


# a compiler takes the answers of these functions as constants: it cannot trace how Triton and its driver are found
@torch.compiler.assume_constant_result
def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of a device, or None if they can.

    They need an NVIDIA GPU of compute capability 8.0 or later, or Triton's interpreter (``TRITON_INTERPRET=1``), and a
    Triton that starts: it builds a stub for the driver with the C compiler of the machine.
    """
    return _refusal(device, triton_is_interpreted())


@torch.compiler.assume_constant_result
def triton_by_default(device: torch.device) -> bool:
    """Whether kernels that can run here are also fast: compiled for a GPU. The interpreter is there for tests."""
    return device.type == 'cuda' and not triton_is_interpreted()


@torch.compiler.assume_constant_result
def triton_is_interpreted() -> bool:
    """Whether Triton kernels run in Python on the CPU, by ``TRITON_INTERPRET=1``."""
    return os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')  # the words of Triton


def is_exporting() -> bool:
    """Whether ``torch.export`` traces. Its programs shall run without this package, so without its operators."""
    # the flag, for torch.compile of torch 2.11 takes torch.compiler.is_exporting() for true
    if hasattr(torch.compiler, '_is_exporting_flag'):
        return torch.compiler._is_exporting_flag
    # torch 2.6 has neither; there a strict export looks like torch.compile
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_open(*sizes: int) -> bool:
    """Whether ``torch.export`` leaves one of the sizes to the run of its program, which has one form for all."""
    return is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Makes plain tensors inside, which any later call may use: constants to tracers, not changed by modes."""
    # no torch function first: an export would record what no_grad sets, and ONNX cannot take that.
    # no inference mode: its tensors could not take part in a later training step.
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        state = torch._C._get_tracing_state()
        if state is None:  # it cannot be set while a dispatch mode or another tracer is active
            yield
            return
        torch._C._set_tracing_state(None)  # pyright: ignore
        try:
            yield
        finally:
            torch._C._set_tracing_state(state)  # pyright: ignore


def can_cache_tensors() -> bool:
    """False under a compiler, a dispatch mode or a transform: tensors made there may be wrapped or have no values."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or needs_transforms())


def needs_transforms() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work; the kernels have no rules."""
    return torch._C._are_functorch_transforms_active() or needs_forward_derivative()


def needs_forward_derivative() -> bool:
    """Whether forward-mode differentiation is at work."""
    return forward_ad._current_level >= 0


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling the module would run the forward of one of these classes, and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # torch 2.6 has no function that tells of hooks on all modules
    kinds = ('forward_pre', 'forward', 'backward_pre', 'backward')
    everywhere = any(getattr(global_hooks, f'_global_{kind}_hooks') for kind in kinds)
    # accelerate replaces forward in the instance, and Module.compile sets what is called in its place
    replaced = 'forward' in module.__dict__ or module._compiled_call_impl is not None
    return type(module) in classes and not replaced and not any(hooks) and not everywhere


@cache
def _refusal(device: torch.device, interpreted: bool) -> str | None:
    if find_spec('triton') is None:
        return 'Triton is not installed'
    if interpreted and device.type in ('cpu', 'cuda'):
        return None
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
        return f'they need a GPU of compute capability 8.0 or later, and the tensors are on {device}'
    if torch.version.hip is not None:
        return 'they are written for NVIDIA GPUs, and this PyTorch is built for those of AMD'
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers of Python, no libcuda: each fails in its own way
        return f'Triton does not start on this machine ({type(error).__name__}: {error})'
    return None
