"""Whether the Triton kernels can run on a device."""

import os
from functools import cache
from importlib.util import find_spec

import torch

__all__ = ['triton_refusal']


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of a device, or None if they can.

    They need a GPU of compute capability 8.0 or later, or Triton's interpreter (``TRITON_INTERPRET=1``), and a Triton
    that starts: it builds a stub for the driver with the C compiler of the machine.
    """
    return _refusal(device, os.environ.get('TRITON_INTERPRET') == '1')


@cache
def _refusal(device: torch.device, interpreted: bool) -> str | None:
    if find_spec('triton') is None:
        return 'Triton is not installed'
    if interpreted:
        return None
    if device.type != 'cuda' or torch.cuda.get_device_capability(device) < (8, 0):
        return f'they need a GPU of compute capability 8.0 or later, and the tensors are on {device}'
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers of Python, no libcuda: each fails in its own way
        return f'Triton does not start on this machine ({type(error).__name__}: {error})'
    return None
