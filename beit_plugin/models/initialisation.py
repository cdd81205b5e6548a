"""How a BEiT encoder starts (arXiv:2106.08254): a mixin of ``Beit``, which reads without it.

Reference: unilm ``beit/modeling_finetune.py``, ``_init_weights`` and ``fix_init_weight``.
"""

from collections.abc import Iterable
from typing import cast

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .block import Block

__all__ = ['OfficialInitialisation']


class OfficialInitialisation(nn.Module):
    """Initial weights of ``Beit``, which brings what is only declared here."""

    cls_token: nn.Parameter
    mask_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    blocks: nn.ModuleList
    head: nn.Module
    init_std: float
    head_init_scale: float

    depth_scaled = True
    """Whether the output projections of block i, from 1, start smaller by the square root of 2 i."""

    def init_weights(self, needs_reset: bool = True) -> None:
        """Official initialisation: truncated normal, depth-scaled output projections, zero bias tables.

        Args:
            needs_reset: also reset what its constructor has already set (norms, convolutions, layer scale, tables);
                for a model that was built on the meta device.
        """
        for name, module in self.named_modules():
            if needs_reset and name and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, nn.Linear):
                self._draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                self._draw(token)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if needs_reset and name.endswith(('q_bias', 'v_bias', 'relative_position_bias_table')):
                    parameter.zero_()
            self._scale_blocks(self.blocks, 1, needs_reset)
            if isinstance(self.head, nn.Linear) and self.head_init_scale:
                self.head.weight.mul_(self.head_init_scale)

    def _draw(self, tensor: Tensor) -> None:
        trunc_normal_(tensor, std=self.init_std)

    @torch.no_grad()
    def _scale_blocks(self, blocks: Iterable[nn.Module], first: int, needs_reset: bool) -> None:
        for i, block in enumerate(cast(Iterable[Block], blocks), start=first):
            for gamma in (block.gamma_1, block.gamma_2):
                if needs_reset and gamma is not None:
                    gamma.fill_(block.init_values or 0.0)
            if self.depth_scaled:
                block.attn.proj.weight.div_((2.0 * i) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * i) ** 0.5)
