"""Which layer a parameter belongs to and whether it is decayed: one rule for timm and OpenMMLab.

Layer ids are those of unilm ``beit/optim_factory.py`` and of mmsegmentation 1.2.2's ``get_layer_id_for_vit``.
"""

import re

from torch import nn

__all__ = ['layer_id', 'no_weight_decay']

_STEM = re.compile(r'^(cls_token|mask_token|pos_embed|patch_embed)(\.|$)')
_BLOCK = re.compile(r'^(?:blocks|layers)\.(\d+)\.')


def layer_id(name: str, num_layers: int) -> int:
    """Layer of a parameter, for a learning rate of ``lr * decay ** (num_layers + 1 - layer_id)``.

    Args:
        name: parameter name within the encoder, e.g. ``blocks.3.attn.proj.weight``.
        num_layers: blocks of the encoder.

    Returns:
        0 for tokens, positions and patch embedding, ``i + 1`` for block ``i``, ``num_layers + 1`` for what follows the
        blocks and for a bias table that all of them share (as the official code has it).
    """
    if _STEM.match(name):
        return 0
    block = _BLOCK.match(name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters of more than one dimension that are not decayed: tokens, positions and bias tables.

    Bias tables as in timm; unilm and mmsegmentation decay them, and so does our OpenMMLab constructor by default.
    """
    ends = ('cls_token', 'mask_token', 'pos_embed', 'relative_position_bias_table')
    return {name for name, _ in model.named_parameters() if name.endswith(ends)}
