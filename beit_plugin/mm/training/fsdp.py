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

from ...checkpoints import CheckpointError
from ...checkpoints.convert import some
from ...models.block import Block
from ..pretraining.frozen_companion import ModelWithAside

__all__ = ['BEiTFSDPStrategy', 'beit_blocks']

_WHOLE = 'module.'  # before the names of a DistributedDataParallel


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
        * a training cannot be resumed, for torch has changed the order of the arguments that it calls; nor can one with
          whole weights, and the rate that is logged as ``base_lr`` is lost;
        * of a checkpoint with other names nothing is loaded, without a word;
        * weights are moved to the GPU one by one, and those of a tokenizer or teacher, which it does not see, are not.

    Raises:
        ValueError: it was not started by torchrun, or the like.
        CheckpointError: a checkpoint that lacks weights of the model by its own names and shapes (other dialects and
            sizes are for ``pretrained=``), or to resume from an optimiser that does not name its weights.
    """

    def _wrap_model(self, model: nn.Module) -> Any:
        if not torch.distributed.is_initialized():
            raise ValueError(
                'BEiTFSDPStrategy spreads weights over processes, and was started without: use torchrun '
                '--nproc_per_node N and --launcher pytorch, or leave _base_/sharded.py out'
            )
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}  # spread they have none
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

    def load_model_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]
        state_dict = {name.removeprefix(_WHOLE): tensor for name, tensor in state_dict.items()}
        wrong = [
            name for name, shape in self._shapes.items() if name not in state_dict or state_dict[name].shape != shape
        ]
        if wrong:
            raise CheckpointError(
                'a model whose weights are spread over processes loads its own checkpoints only, and this one lacks '
                f'{some(wrong)}, or has them in other shapes; give it as pretrained=, which is loaded before the '
                'weights are spread'
            )
        super().load_model_state_dict(state_dict, **kwargs)

    def optim_state_dict(self) -> dict[str, Any]:
        state_dict = super().optim_state_dict()
        return {**state_dict, 'base_param_settings': self.optim_wrapper.state_dict()['base_param_settings']}

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        settings = {name: state_dict[name] for name in ('base_param_settings',) if name in state_dict}
        found = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model, optim=self.optim_wrapper.optimizer, optim_state_dict=_by_names(state_dict)
        )
        self.optim_wrapper.load_state_dict({**found, **settings})


def _by_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser with weights by their names, as FSDP has it; elsewhere they have numbers."""
    groups, states = state_dict['param_groups'], state_dict['state']
    if all(isinstance(key, str) for key in states):
        return {'state': states, 'param_groups': groups}
    if not all(len(group.get('param_names', ())) == len(group['params']) for group in groups):
        raise CheckpointError(
            'the optimiser of the checkpoint does not say which weights its numbers are of, as those of '
            'BEiTNoDecayConstructor and BEiTLayerDecayConstructor do; start from its weights by load_from instead'
        )
    names = {
        number: name.removeprefix(_WHOLE)
        for group in groups
        for number, name in zip(group['params'], group['param_names'], strict=True)
    }
    return {
        'state': {names[number]: state for number, state in states.items()},
        'param_groups': [{**group, 'params': [names[number] for number in group['params']]} for group in groups],
    }
