"""Models that are too large for one GPU: torch's FullyShardedDataParallel by mmengine's FlexibleRunner.

In a configuration, as in ``configs/_base_/sharded.py``: ``runner_type='FlexibleRunner'`` and
``strategy=dict(type='BEiTFSDPStrategy', ...)``.
"""

from functools import partial
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.block import Block
from .aside import ModelWithAside

__all__ = ['BEiTFSDPStrategy', 'beit_blocks']


@FUNCTIONS.register_module()
def beit_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An ``auto_wrap_policy``: the weights of one block at a time are gathered, those of the rest once."""
    return recurse or isinstance(module, Block)


def _clip_norm(model: Any, _: list[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    return model.clip_grad_norm_(max_norm, norm_type)


@STRATEGIES.register_module()
class BEiTFSDPStrategy(FSDPStrategy):
    """mmengine's ``FSDPStrategy``, with its arguments, made to train as without it; over gloo it runs on CPUs too.

    What mmengine 0.10.7 does otherwise:
        * weights are already cut to pieces of one dimension when the optimiser is built, and what has one dimension is
          not decayed;
        * each process clips its pieces by their own norm, so that parts of one weight are scaled differently;
        * a training cannot be resumed, for torch has changed the order of the arguments that it calls;
        * weights are moved to the GPU one by one, and those of a tokenizer or teacher, which it does not see, are not.
    """

    def _wrap_model(self, model: nn.Module) -> Any:
        if not torch.cuda.is_available():
            self.model_wrapper = {'device_id': torch.device('cpu'), **(self.model_wrapper or {})}
            self.optim_state_dict_config.offload_to_cpu = False  # what is there already torch would not copy
        for module in model.modules():
            if isinstance(module, ModelWithAside):
                module.aside.to(get_device())
        return super()._wrap_model(model)

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        assert isinstance(model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            wrapper: Any = super().build_optim_wrapper(optim_wrapper, model)
        if wrapper.clip_grad_kwargs and wrapper.clip_func is nn.utils.clip_grad_norm_:
            wrapper.clip_func = partial(_clip_norm, model)
        return wrapper

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        found = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=state_dict
        )
        self.optim_wrapper.load_state_dict(found)
