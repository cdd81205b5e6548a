"""What ``torch.jit.script`` makes of ``Beit``: the same parameters by the same names, in operations that it knows.

TorchScript compiles neither caches nor kernels, so each module has a plain twin here, which shares its layers. A
program cannot compute how tables are resized, so it brings the matrices for sides of up to ``MAX_SIDE`` patches.

The modules that are taken are typed `Any`: their files import this one.

Shapes: B batch, C channels, h w grid, N = 1 + h*w tokens, K heads, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit._builtins import _register_builtin

from .relative_position import bias_geometry, gather_bias, relative_position_index
from .resample import apply_positions, apply_resize, axis_matrix

# what a class says of its attributes TorchScript takes for their types, and refines none of them: so it says nothing
# pyright: reportArgumentType=false, reportIndexIssue=false

__all__ = ['ScriptedBeit', 'ScriptedBlock', 'ScriptedPatchEmbed']

MAX_SIDE = 128  # patches: 2048 pixels


class _Attention(nn.Module):
    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout_p = attn.num_heads, attn.head_dim, attn.attn_drop.p
        self.qkv, self.proj, self.proj_drop = attn.qkv, attn.proj, attn.proj_drop
        for name in ('q_bias', 'v_bias', 'relative_position_bias_table'):
            self.register_parameter(name, getattr(attn, name))

    def forward(self, x: Tensor, index: Tensor, to_y: Tensor, to_x: Tensor, shared_bias: Tensor | None) -> Tensor:
        B, N, C = x.shape
        qkv_bias: Tensor | None = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))  # 3*C
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(B, N, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, K, N, D
        bias = shared_bias
        if self.relative_position_bias_table is not None:
            own = _bias(self.relative_position_bias_table, index, to_y, to_x)
            bias = own if bias is None else own + bias
        mask = None if bias is None else bias.to(q.dtype)[None]  # 1, K, N, N
        out = F.scaled_dot_product_attention(q, k, v, mask, self.dropout_p if self.training else 0.0)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, C)))


def _bias(table: Tensor, index: Tensor, to_y: Tensor, to_x: Tensor) -> Tensor:
    """The bias (K, N, N) of a stored table at the grid of the index."""
    table = apply_resize(table, (to_y, to_x))
    return table.t().contiguous().index_select(1, index.reshape(-1)).reshape(-1, index.shape[0], index.shape[1])


class _Block(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = block.norm1, _Attention(block.attn), block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2
        for name in ('gamma_1', 'gamma_2'):
            self.register_parameter(name, getattr(block, name))

    def forward(self, x: Tensor, index: Tensor, to_y: Tensor, to_x: Tensor, shared_bias: Tensor | None) -> Tensor:
        y = self.attn(self.norm1(x), index, to_y, to_x, shared_bias).to(x.dtype)
        if self.gamma_1 is not None:
            y = y * self.gamma_1.to(x.dtype)
        x = x + self.drop_path1(y)
        y = self.mlp(self.norm2(x)).to(x.dtype)
        if self.gamma_2 is not None:
            y = y * self.gamma_2.to(x.dtype)
        return x + self.drop_path2(y)


class ScriptedBlock(nn.Module):
    """A block by itself, as programs of torch.fx call it."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = _Block(block)

    def forward(
        self,
        x: Tensor,
        geometry: tuple[Tensor, Tensor, Tensor] | None = None,
        shared_bias: Tensor | None = None,
        windows: Tensor | None = None,
        head_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert geometry is not None and windows is None and head_mask is None and not return_weights
        weights: Tensor | None = None
        return self.block(x, geometry[0], geometry[1], geometry[2], shared_bias), weights


@torch.library.custom_op('beit_plugin::bias_geometry', mutates_args=())
def _geometry_op(
    window_size: Sequence[int], grid: Sequence[int], rule: str, device: torch.device, with_index: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Index and matrices of ``bias_geometry``, which a program of torch.fx calls when it is compiled."""
    (old_h, old_w), (h, w) = window_size, grid
    found = bias_geometry((old_h, old_w), (h, w), rule, device)
    to_y, to_x = found.matrices or (torch.eye(2 * side - 1, dtype=torch.float32, device=device) for side in (h, w))
    assert found.index is not None
    return found.index[:, : 1 + h * w].clone(), to_y.clone(), to_x.clone()


def _gather_bias(table: Tensor, geometry: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """``gather_bias``, which such a program calls for the blocks that it does not hold as they are."""
    return _bias(table, *geometry).to(dtype or table.dtype)


torch.library.define(
    'beit_plugin::gather_bias',
    '(Tensor table, (Tensor, Tensor, Tensor) geometry, ScalarType? dtype=None) -> Tensor',
)
torch.library.impl('beit_plugin::gather_bias', 'CompositeImplicitAutograd', _gather_bias)

_register_builtin(bias_geometry, 'beit_plugin::bias_geometry')
_register_builtin(gather_bias, 'beit_plugin::gather_bias')


class ScriptedPatchEmbed(nn.Module):
    def __init__(self, embed: Any) -> None:
        super().__init__()
        self.patch_h, self.patch_w = embed.patch_size
        self.proj, self.norm = embed.proj, embed.norm

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2], x.shape[3]
        if H < self.patch_h or W < self.patch_w:
            raise ValueError('the image is smaller than a patch: enlarge or pad it')
        x = F.pad(x, [0, -W % self.patch_w, 0, -H % self.patch_h])
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # B, h, w, C


class _SharedBias(nn.Module):
    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.relative_position_bias_table = table

    def forward(self, index: Tensor, to_y: Tensor, to_x: Tensor) -> Tensor:
        return _bias(self.relative_position_bias_table, index, to_y, to_x)


def _matrices(old: int, rule: str, device: torch.device) -> Tensor:
    """Maps from an axis of ``old`` patches to 1, 2, ... ``MAX_SIDE`` patches, one below the other."""
    dtype = torch.float32 if device.type == 'mps' else torch.float64  # which mps does not have
    cpu = torch.device('cpu')
    return torch.cat([axis_matrix(old, new, rule, cpu, dtype) for new in range(1, MAX_SIDE + 1)]).to(device)


class ScriptedBeit(nn.Module):
    """Images (B, in_chans, H, W) of up to ``MAX_SIDE`` patches a side to logits (B, num_classes), as ``Beit``.

    Args:
        model: an encoder without windows; its parameters are shared.

    Raises:
        ValueError: the model attends within windows.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if model.attention_window is not None:
            raise ValueError(
                'TorchScript cannot take a model with window_size; use torch.export, or build it without windows'
            )
        self.global_pool, self.max_side = model.global_pool, MAX_SIDE
        self.patch_embed, self.pos_drop = ScriptedPatchEmbed(model.patch_embed), model.pos_drop
        self.blocks = nn.ModuleList(_Block(block) for block in model.blocks)
        self.norm, self.fc_norm, self.head_drop, self.head = model.norm, model.fc_norm, model.head_drop, model.head
        self.cls_token = model.cls_token
        self.register_parameter('pos_embed', model.pos_embed)
        shared = model.rel_pos_bias
        self.rel_pos_bias = None if shared is None else _SharedBias(shared.relative_position_bias_table)
        rules = {'table': model.rel_pos_resize}
        if model.pos_embed is not None:
            rules['positions'] = 'positions'
        for kind, rule in rules.items():
            made = {side: _matrices(side, rule, model.cls_token.device) for side in set(model.window_size)}
            for axis, side in zip('yx', model.window_size, strict=True):  # a square program keeps them once
                self.register_buffer(f'{kind}_to_{axis}', made[side], persistent=False)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # B, h, w, C
        B, h, w, _ = x.shape
        if h > self.max_side or w > self.max_side:
            raise ValueError('the image has more patches a side than this program has matrices for: tile or shrink it')
        x = torch.cat((self.cls_token.to(x.dtype).expand(B, -1, -1), x.flatten(1, 2)), dim=1)  # B, N, C
        if self.pos_embed is not None:
            to_y = self.positions_to_y[h * (h - 1) // 2 : h * (h + 1) // 2]  # rows: 1, 2, 3, ...
            to_x = self.positions_to_x[w * (w - 1) // 2 : w * (w + 1) // 2]
            x = x + apply_positions(self.pos_embed, (to_y, to_x)).to(x.dtype)
        x = self.pos_drop(x)
        index = relative_position_index(h, w, x.device)
        to_y = self.table_to_y[(h - 1) * (h - 1) : h * h]  # rows: 1, 3, 5, ...
        to_x = self.table_to_x[(w - 1) * (w - 1) : w * w]
        shared_bias: Tensor | None = None
        if self.rel_pos_bias is not None:
            shared_bias = self.rel_pos_bias(index, to_y, to_x)
        for block in self.blocks:
            x = block(x, index, to_y, to_x, shared_bias)
        x = self.norm(x)
        if self.global_pool == 'avg':
            x = x[:, 1:].mean(dim=1)
        elif self.global_pool == 'token':
            x = x[:, 0]
        return self.head(self.head_drop(self.fc_norm(x)))
