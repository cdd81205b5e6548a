"""Transformer block of BEiT (arXiv:2106.08254): pre-norm, layer scale (arXiv:2103.17239), stochastic depth.

Shapes: B batch, N tokens, C channels, K heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, get_act_layer
from torch import Tensor, nn

from .attention import Attention, AttentionBackend
from .relative_position import BiasGeometry

__all__ = ['Block', 'activation']


def activation(name: str | Callable) -> Callable[..., Any]:
    """A factory of activation layers.

    Args:
        name: ``gelu``, ``relu``, ``selu``, ``gelu_new`` or another name that timm knows; a module class, also with
            arguments bound by ``functools.partial``; a function.

    Raises:
        ValueError: an unknown name, or nothing that can be called.
    """
    if isinstance(name, str):
        try:
            # gelu_new is the tanh approximation, in the words of transformers
            layer = get_act_layer({'gelu_new': 'gelu_tanh'}.get(name, name))
        except KeyError:
            layer = None
        if layer is None:
            raise ValueError(f'act_layer must be an activation that timm knows (gelu, relu, selu, ...), got {name!r}')
        return layer
    if not callable(name):
        raise ValueError(f'act_layer must be the name of an activation, a module class or a function, got {name!r}')
    makes_modules = isinstance(name.func if isinstance(name, partial) else name, type)
    return name if makes_modules else partial(_Function, name)


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth.

    Args:
        dim, num_heads, window_size and the rest: see ``Attention``.
        mlp_ratio: hidden size of the MLP divided by ``dim``.
        drop_path: probability that a sample skips a branch in training.
        init_values: start of the layer scale; None or 0 for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[..., Any] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        window_size: tuple[int, int] | None = None,
        attn_backend: AttentionBackend = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, attn_backend, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        # the reference drops the output of the MLP only, not its hidden layer
        self.mlp = Mlp(dim, round(dim * mlp_ratio), act_layer=act_layer, drop=(0.0, proj_drop), **dd)  # type: ignore
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.init_values = init_values
        self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values), **dd)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values), **dd)) if init_values else None

    def forward(
        self,
        x: Tensor,
        geometry: BiasGeometry | None = None,
        shared_bias: Tensor | None = None,
        head_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results as those of ``Attention.forward``."""
        y, weights = self.attn(self.norm1(x), geometry, shared_bias, head_mask, return_weights)
        x = x + self.drop_path1(self._scale(y, self.gamma_1, x.dtype))
        y = self.mlp(self.norm2(x))
        x = x + self.drop_path2(self._scale(y, self.gamma_2, x.dtype))
        return x, weights

    @staticmethod
    def _scale(y: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
        return y.to(dtype) if gamma is None else y.to(dtype) * gamma.to(dtype)
