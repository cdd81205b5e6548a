"""Batch norm with the statistics of all processes, on every device.

`torch.nn.SyncBatchNorm` (torch 2.14) refuses CPU tensors, and on a GPU its forward makes the CPU wait for the GPU in
every layer, to look for processes whose batch is empty; a segmentor has fourteen such layers. Here an empty batch is an
error, and nothing waits. On a GPU the statistics are those of PyTorch's own kernels.

Legend: B batch, C channels, P processes, n values of a channel in this process.
"""

from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['SyncBatchNorm']


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.BatchNorm2d`, also for other numbers of axes, over the batches of all processes.

    None of torch's synchronised classes, for `DistributedDataParallel` refuses models on the CPU that hold one. In
    evaluation, without a process group, and with one process it is plain batch norm.

    Raises:
        ValueError: no channel axis, or an empty batch, which the other processes would wait for.
    """

    process_group: Any = None  # all processes, on GPUs by a group of this module's own

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f'got {input.ndim} axes, expected (batch, channels, ...)')

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to the same shape."""
        if not self._is_synchronised():
            return super().forward(input)
        self._check_input_dim(input)
        if input.numel() == 0:
            raise ValueError(f'got an empty batch of shape {tuple(input.shape)}; give every process at least one image')
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        group = self.process_group
        if group is None and input.is_cuda and not torch.compiler.is_compiling():
            group = _own_group()
        out: Any = _Synchronised.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum, group
        )
        return out

    def _is_synchronised(self) -> bool:
        if not self.training:  # also without running statistics: processes may evaluate different numbers of images
            return False
        if not distributed.is_available() or not distributed.is_initialized():
            return False
        return distributed.get_world_size(self.process_group) > 1


_own_groups: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by the group of all processes, which may end


def _own_group() -> Any:
    """All processes once more: in one group sums are made one after the other.

    A batch norm in the backward pass would wait until the gradients that `DistributedDataParallel` has of later layers
    are summed, and the GPU with it. All processes come here at the same layer of the same step.
    """
    everybody = distributed.group.WORLD
    if everybody not in _own_groups:
        _own_groups[everybody] = distributed.new_group(timeout=_timeout(everybody))
    return _own_groups[everybody]


def _timeout(group: Any) -> timedelta | None:
    """For how long a group waits; None, the default of its kind, where torch does not tell."""
    device = torch.device('cuda' if distributed.get_backend(group) == 'nccl' else 'cpu')
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def _gathered(own: Tensor, group: Any) -> Tensor:
    """The rows (P, length) of all processes."""
    if distributed.get_backend(group) == 'nccl':
        rows = own.new_empty(distributed.get_world_size(group), len(own))
        distributed.all_gather_into_tensor(rows, own, group=group)
        return rows
    # by a sum, which every backend has
    rows = own.new_zeros(distributed.get_world_size(group), len(own))
    rows[distributed.get_rank(group)] = own
    distributed.all_reduce(rows, group=group)
    return rows


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(C) to the shape that multiplies (B, C, ...)."""
    return values.view(-1, *(1,) * (like.ndim - 2))


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        group: Any,
    ) -> Tensor:
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous()
        count = x.numel() // x.shape[1]
        if x.is_cuda:
            mean, spread = torch.batch_norm_stats(x, eps)  # spread: 1 / standard deviation
        else:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            spread, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0)
        found = _gathered(torch.cat([mean, spread, mean.new_full((1,), count)]), group)
        means, spreads, counts = found.split([len(mean), len(mean), 1], 1)  # P, C; P, C; P, 1
        if x.is_cuda:
            mean, inverse = torch.batch_norm_gather_stats_with_counts(
                x, means, spreads, running_mean, running_var, momentum, eps, counts.flatten()
            )
            out = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        else:
            total = counts.sum()
            mean = (means * counts).sum(0) / total
            variance = ((spreads + (means - mean).square()) * counts).sum(0) / total
            inverse = (variance + eps).rsqrt()
            if running_mean is not None and running_var is not None:
                running_mean.lerp_(mean.to(running_mean), momentum)
                running_var.lerp_((variance * (total / (total - 1))).to(running_var), momentum)
            scale = inverse if weight is None else inverse * weight
            shift = -mean * scale if bias is None else bias - mean * scale
            out = (x * _column(scale, x) + _column(shift, x)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, inverse, counts.to(torch.int32))
        ctx.group = group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, counts = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        # in the layout of x, or PyTorch's kernels would read one of them wrongly
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if x.is_cuda:
            total, moment, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
                grad, x, mean, inverse, weight, True, wanted[1], wanted[2]
            )
        else:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            total = grad.sum(axes, dtype=mean.dtype)
            moment = (grad * (x - _column(mean, x))).sum(axes, dtype=mean.dtype)
            grad_weight, grad_bias = moment * inverse, total
        grad_x = None
        if wanted[0]:
            sums = torch.cat([total, moment])
            distributed.all_reduce(sums, group=ctx.group)
            total, moment = sums.chunk(2)
            if x.is_cuda:
                grad_x = torch.batch_norm_backward_elemt(
                    grad, x, mean, inverse, weight, total, moment, counts.flatten()
                )
            else:
                count = counts.sum()
                scale = inverse if weight is None else inverse * weight
                slope = _column(moment * inverse.square() / count, x)
                grad_x = grad - _column(total / count, x) - (x - _column(mean, x)) * slope
                grad_x = (grad_x * _column(scale, x)).to(x.dtype)
        return grad_x, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None, *(None,) * 5
