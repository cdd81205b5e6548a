"""Less work for the CPU around a Triton kernel, where a small model waits for the CPU.

Triton's launch looks at every argument, constant and option (about 15 us), and an operator of ``torch.library`` passes
through PyTorch's dispatcher in Python (about 30 us). Here a launch that has been made before goes to the compiled
kernel directly, and ``make_call`` takes a plain ``torch.autograd.Function`` for the operator where that serves as well.
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


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up (``triton.cdiv`` looks for constants of kernels first, and takes 5 us)."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is no less than n, as ``triton.next_power_of_2``."""
    return 1 << (n - 1).bit_length()


def _runs_eagerly(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing watches the operators that run: no compiler, no dispatch mode, no transform, no subclass.

    Nor may a tensor be other than its memory says: batched gradients have none, negated views another sign.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor) and not tensor.is_neg()


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
            direct = not torch.is_grad_enabled() and _runs_eagerly(t for t in (*grads, *saved) if t is not None)
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
