"""Less work for the CPU around a Triton kernel, where a small model waits for the CPU.

Triton's launch looks at every argument, constant and option (about 15 us), and an operator of ``torch.library`` passes
through PyTorch's dispatcher in Python (about 30 us). Here a launch that has been made before goes to the compiled
kernel directly, by addresses, as PyTorch's own compiler launches; profilers that hook into Triton's launches (Proton)
see the first of each alone, those of CUDA see all. And ``make_call`` takes a plain ``torch.autograd.Function`` for the
operator where that serves as well.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ['DTYPES', 'MAX_INT32', 'Launcher', 'ceil_div', 'make_call', 'power_of_2']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels read
MAX_INT32 = 2**31 - 1
# compiled kernels of Triton 3.2, that of torch 2.6, are launched without the constants
REUSES_COMPILED = tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 3)
_PLAIN = (Tensor, nn.Parameter)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up (``triton.cdiv`` looks for constants of kernels first, and takes 5 us)."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is no less than n, as ``triton.next_power_of_2``."""
    return 1 << (n - 1).bit_length()


def _runs_eagerly(tensors: Iterable[Any]) -> bool:
    """Whether nothing watches the operators that run: no compiler, no dispatch mode, no transform, no subclass.

    Nor may a tensor be other than its memory says: batched gradients have none, negated views another sign. What is no
    tensor but None is passed over.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # first of all: a compiler cannot trace the others
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:  # no generators: this runs for every kernel
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not torch._C._has_storage(tensor) or tensor.is_neg():
            return False
    return True


def make_call(
    forward: Callable[..., Any],
    run_forward: Callable[..., Any],
    backward: Callable[..., Any],
    run_backward: Callable[..., Any],
    save: Callable[..., None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """A differentiable function that is an operator where something watches operators, and else runs directly.

    Args:
        forward, backward: the operators, of ``torch.library.custom_op``; forward's derivative is registered here.
        run_forward, run_backward: what they run; may give None for a result that is not wanted.
        save: of (ctx, inputs, outputs): keeps what the derivative needs.
        differentiate: of (backward, ctx, saved tensors, gradients of the outputs): gradients of the inputs.

    Returns:
        A function of forward's arguments that gives its outputs.
    """

    def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return differentiate(backward, ctx, ctx.saved_tensors, *grads)

    forward.register_autograd(derivative, setup_context=save)  # type: ignore[attr-defined]

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Any, ...]:
            outputs = run_forward(*inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # once: under checkpointing they are given out once
            # with gradients of gradients wanted the operator says that it has none
            direct = not torch.is_grad_enabled() and _runs_eagerly((*grads, *saved))
            return differentiate(run_backward if direct else backward, ctx, saved, *grads)

    def call(*inputs: Any) -> tuple[Any, ...]:
        tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
        # PyTorch itself would leave the tangents out without a word
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError('the Triton kernels have no forward-mode derivative, and an input has a tangent')
        if not _runs_eagerly(tensors):
            return forward(*inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return Direct.apply(*inputs)  # type: ignore[return-value]
        return run_forward(*inputs)

    return call


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
        self.reuses = REUSES_COMPILED and isinstance(kernel, triton.JITFunction)  # else it is interpreted
        self.compiled: dict[Any, Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launches on the current device.

        Args:
            grid: programs along the three axes.
            arguments: all that are not constants, in the order of the signature: tensors, None, int and float.
        """
        if not self.reuses:
            self.kernel[grid](*arguments, **self.keywords)
            return
        device = torch.cuda.current_device()
        # what Triton compiles a kernel for: dtype and alignment of tensors, divisibility and range of integers
        key: list[Any] = [device]
        values: list[Any] = []  # as the compiled kernel takes them; of tensors it would ask the driver for each address
        for argument in arguments:
            kind = type(argument)
            if kind is int:
                key.append((argument % 16 == 0) + 2 * (argument == 1) + 4 * (argument > MAX_INT32))
            elif kind is float or argument is None:
                key.append(kind)
            else:
                address = argument.data_ptr()
                # the device, so that Triton sees the first of a tensor that is elsewhere, and refuses it
                key.append((argument.dtype, argument.get_device(), address % 16 == 0))
                argument = address
            values.append(argument)
        found = self.compiled.get(tuple(key))
        if found is None:
            self.compiled[tuple(key)] = self.kernel[grid](*arguments, **self.keywords)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        # the three None: data about the launch, and functions before and after it, which profilers of Triton may set
        found.run(*grid, stream, found.function, found.packed_metadata, None, None, None, *values, *self.values)
