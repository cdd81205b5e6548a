"""Less work for the CPU around a Triton kernel, where a small model waits for the CPU.

Triton's launch looks at every argument, constant and option (about 15 us), and an operator of ``torch.library`` passes
through PyTorch's dispatcher in Python (about 30 us). Here a launch that has been made before goes to the compiled
kernel directly, and ``runs_eagerly`` tells where a plain ``torch.autograd.Function`` serves as well as the operator.
"""

from typing import Any

import torch
import triton
from torch import Tensor, nn

__all__ = ['Launcher', 'ceil_div', 'power_of_2', 'runs_eagerly']

MAX_INT32 = 2**31 - 1
# compiled kernels of Triton 3.2, that of torch 2.6, are launched without the constants
REUSES_COMPILED = tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 3)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up (``triton.cdiv`` looks for constants of kernels first, and takes 5 us)."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is no less than n, as ``triton.next_power_of_2``."""
    return 1 << (n - 1).bit_length()


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether nothing watches the operators that run: no compiler, no dispatch mode, no transform, no subclass.

    Nor may a tensor be other than its memory says: batched gradients have none, negated views another sign.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(t is None or _is_plain(t) for t in tensors)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor) and not tensor.is_neg()


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel for: dtype and alignment of tensors, divisibility and range of integers."""
    kind = type(argument)
    if kind is int:
        return argument % 16 == 0, argument == 1, argument > MAX_INT32
    if kind is float or argument is None:
        return kind
    return argument.dtype, argument.data_ptr() % 16 == 0


class Launcher:
    """A kernel with constants and options, which differ from those of other launchers of the same kernel.

    Args:
        kernel: made by ``triton.jit``; the constants come last in its signature.
        constants: its ``tl.constexpr`` arguments.
        options: num_warps and the like.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> None:
        self.kernel = kernel
        self.keywords = {**constants, **options}
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches on the current device.

        Args:
            grid: programs along the three axes.
            arguments: all that are not constants, in the order of the signature.
        """
        key = (torch.cuda.current_device() if torch.cuda.is_initialized() else None, *map(_kind, arguments))
        compiled = self.compiled.get(key)
        if compiled is None:
            made = self.kernel[grid](*arguments, **self.keywords)
            self.compiled[key] = made if REUSES_COMPILED else None  # the interpreter, too, makes None
        else:
            compiled[grid](*arguments, *self.values)
