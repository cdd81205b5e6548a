"""Layer-wise learning rate decay for every OpenMMLab host that has one of our encoders in it.

mmsegmentation 1.2.2's constructors work on our backbone too (its blocks are called ``layers`` for their sake), but only
where the encoder is called ``backbone`` and the class name contains ``BEiT``. This one finds the encoder itself, so it
also serves detectors and pre-trainers, and it refuses a model in which nothing would be decayed.
"""

from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ...models.beit import Beit
from ...models.layer_decay import layer_id, no_weight_decay

__all__ = ['BEiTLayerDecayConstructor', 'BEiTNoDecayConstructor', 'leave_optimizers_uncompiled']


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BEiTLayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Learning rate ``lr * decay_rate ** (num_layers + 1 - layer)``; what is no encoder gets the full ``lr``.

    One-dimensional parameters and biases are not decayed, everything else is: for a stock model the groups are those of
    mmsegmentation's ``LearningRateDecayOptimizerConstructor``, parameter by parameter.

    Args of ``paramwise_cfg``:
        decay_rate: factor per layer, above 0, at most 1.
        num_layers: blocks of the encoder; read from the model if left out.

    Raises:
        ValueError: an unknown setting, no encoder in the model, or ``num_layers`` that is not the encoder's.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        unknown = set(paramwise_cfg) - {'decay_rate', 'num_layers'}
        if unknown or not 0 < paramwise_cfg.get('decay_rate', 0) <= 1:
            raise ValueError(
                'paramwise_cfg of BEiTLayerDecayConstructor takes decay_rate (above 0, at most 1) and num_layers, '
                f'got {paramwise_cfg}'
            )
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends the parameter groups of ``module`` to ``params``."""
        encoders = {name: child for name, child in module.named_modules() if isinstance(child, Beit)}
        if not encoders:
            raise ValueError(
                f'{type(module).__name__} has no BEiT encoder of this plugin, so nothing would be decayed; '
                "use type='BEiTBackbone' or another constructor"
            )
        depths = {len(encoder.blocks) for encoder in encoders.values()}
        num_layers = self.paramwise_cfg.get('num_layers', max(depths))
        if depths != {num_layers}:
            raise ValueError(f'paramwise_cfg says num_layers={num_layers}, the encoder has {sorted(depths)} blocks')

        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = num_layers + 1
            for encoder in encoders:
                prefix = f'{encoder}.' if encoder else ''
                if name.startswith(prefix):
                    layer = layer_id(name.removeprefix(prefix), num_layers)
            decayed = parameter.ndim > 1 and not name.endswith('.bias')
            group_name = f'layer_{layer}_{"decay" if decayed else "no_decay"}'
            if group_name not in groups:
                scale = self.paramwise_cfg['decay_rate'] ** (num_layers + 1 - layer)
                groups[group_name] = {
                    'params': [],
                    'param_names': [],
                    'lr_scale': scale,
                    'group_name': group_name,
                    'lr': scale * self.base_lr,
                }
                if not decayed:
                    groups[group_name]['weight_decay'] = 0.0
                elif self.base_wd is not None:  # else the optimiser's own default holds
                    groups[group_name]['weight_decay'] = self.base_wd
            groups[group_name]['params'].append(parameter)
            groups[group_name]['param_names'].append(name)
        for name, group in groups.items():
            print_log(
                f'{name}: lr {group["lr"]:.3g}, weight decay {group.get("weight_decay", "by default")}, '
                f'{len(group["params"])} tensors',
                logger='current',
            )
        params.extend(groups.values())


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class BEiTNoDecayConstructor(DefaultOptimWrapperConstructor):
    """The full rate for all, as in pre-training; no decay of what ``param_groups`` names, of biases and norms.

    What has one dimension, and tokens, positions and bias tables. unilm's pre-training decays the mask token and the
    tables.

    Raises:
        ValueError: any ``paramwise_cfg``.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        if paramwise_cfg:
            raise ValueError(f'BEiTNoDecayConstructor takes no paramwise_cfg, got {paramwise_cfg}; leave it out')
        super().__init__(optim_wrapper_cfg, {'rule': 'param_groups'})  # mmengine asks add_params only if there is one

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Appends two groups, one without decay, to ``params``."""
        exempt = no_weight_decay(module)
        groups: dict[str, dict[str, Any]] = {'decay': {}, 'no_decay': {'weight_decay': 0.0}}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.ndim > 1 and not name.endswith('.bias') and name not in exempt
                group = groups['decay' if decayed else 'no_decay']
                group.setdefault('params', []).append(parameter)
                group.setdefault('param_names', []).append(name)
        params.extend({'group_name': name, **group} for name, group in groups.items() if 'params' in group)


def leave_optimizers_uncompiled() -> None:
    """Lets mmengine's ``compile=True`` train: it compiles the model and its losses then, not what follows them.

    mmengine 0.10.7 hands the whole step to ``torch.compile``. torch 2.14 ends in an internal error at an optimiser that
    one of OpenMMLab's constructors made, whose groups are a kind of dictionaries of their own.
    """
    OptimWrapper.update_params = torch.compiler.disable(OptimWrapper.update_params)  # type: ignore[method-assign]
