"""bfloat16 training on every device, the CPU included.

mmengine 0.10.7's ``AmpOptimWrapper`` refuses to start without a GPU, warns on current torch (``torch.cuda.amp``), and
scales the loss, which bfloat16 does not need: it has the exponents of float32. Scaling also makes the CPU wait for the
GPU in every step, to learn whether a gradient overflowed; and so does writing down the norm of the gradients, which is
left to the message hub here (``BEiTRunAheadHook``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

__all__ = ['BEiTBF16OptimWrapper']


@OPTIM_WRAPPERS.register_module()
class BEiTBF16OptimWrapper(OptimWrapper):
    """mmengine's ``OptimWrapper``, with its arguments, that runs the forward pass under autocast to bfloat16.

    Weights, gradients and the state of the optimiser stay in float32. A training goes on from a checkpoint that
    ``AmpOptimWrapper`` wrote, and the other way round.

    Raises:
        RuntimeError: in the first iteration, where the GPU cannot compute in bfloat16.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast on the device of ``model``, and no exchange of gradients until the last of the accumulated ones."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield

    def _clip_grad(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        gradients = [p for p in parameters if p.requires_grad and p.grad is not None]  # as mmengine has it
        clip, options = cast(Any, self.clip_func), cast(dict[str, Any], self.clip_grad_kwargs)
        norm = clip(gradients, **options) if gradients else None
        if norm is not None:  # as of clip_grad_value_
            self.message_hub.update_scalar(f'train/{self.grad_name}', norm)
