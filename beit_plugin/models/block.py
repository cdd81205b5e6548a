"""Transformer block of BEiT (arXiv:2106.08254): pre-norm, layer scale (arXiv:2103.17239), stochastic depth.

Shapes: B batch, N tokens, C channels, K heads.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import DropPath, LayerNorm, Mlp, get_act_layer
from torch import Tensor, nn

from .attention import Attention, AttentionBackend, attention_dtype
from .kernel_support import is_exporting, is_plain, needs_transforms, triton_by_default, triton_refusal
from .relative_position import BiasGeometry
from .windows import Windows

__all__ = ['Block', 'BlockBias', 'PositionBias', 'activation', 'run_on_kernels', 'take_kernels']


class BlockBias(NamedTuple):
    """What a block gets to know of positions: arguments of ``Attention.forward``."""

    geometry: BiasGeometry | None
    shared_bias: Tensor | None
    windows: Windows | None = None


class PositionBias(NamedTuple):
    """The same for all blocks of an encoder."""

    full: BlockBias
    windowed: BlockBias  # of blocks that attend within windows; where these cover the grid, as ``full``


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


def _is_plain_norm(module: nn.Module, channels: int) -> bool:
    if not is_plain(module, nn.LayerNorm, LayerNorm):
        return False
    norm = cast(nn.LayerNorm, module)
    return tuple(norm.normalized_shape) == (channels,) and norm.bias is not None


def _draw_keep(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Factors of the branches of a batch (B,), with the random numbers that ``DropPath`` would draw; None for 1."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    keep_prob = 1 - drop_path.drop_prob
    keep = x.new_empty(x.shape[0], dtype=torch.float32).bernoulli_(keep_prob)
    return keep.div_(keep_prob) if keep_prob > 0.0 and drop_path.scale_by_keep else keep


class Block(nn.Module):
    """Pre-norm transformer block with layer scale and stochastic depth.

    Args:
        dim, num_heads, window_size and the rest: see ``Attention``.
        mlp_ratio: hidden size of the MLP divided by ``dim``.
        drop_path: probability that a sample skips a branch in training.
        init_values: start of the layer scale; None or 0 for none.
        windowed: the encoder shall give this block windows; it is all the same to the block itself.
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
        windowed: bool = False,
        attn_backend: AttentionBackend = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        self.windowed = windowed
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
        windows: Windows | None = None,
        head_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results as those of ``Attention.forward``."""
        if head_mask is None and not return_weights and self.takes_kernels(x):
            return run_on_kernels([self], x, [BlockBias(geometry, shared_bias, windows)])[0], None
        y, weights = self.attn(self.norm1(x), geometry, shared_bias, windows, head_mask, return_weights)
        x = x + self.drop_path1(self._scale(y, self.gamma_1, x.dtype))
        y = self.mlp(self.norm2(x))
        x = x + self.drop_path2(self._scale(y, self.gamma_2, x.dtype))
        return x, weights

    def __prepare_scriptable__(self) -> nn.Module:
        """For programs of torch.fx, which hold it as it is; see ``torchscript``."""
        from .torchscript import ScriptedBlock

        return ScriptedBlock(self)

    def takes_kernels(self, x: Tensor) -> bool:
        """Whether norms, layer scales and residual sums of these tokens shall run as Triton kernels.

        Exported programs shall run without this package. A module that does more than its class says, by hooks or
        another forward, is called as it is.
        """
        backend = getattr(self.attn, 'backend', None)  # it may be wrapped
        if type(x) is not Tensor or is_exporting() or torch.jit.is_tracing() or needs_transforms():
            return False
        if backend != 'fused' and not (backend == 'auto' and triton_by_default(x.device)):
            return False
        norms = all(_is_plain_norm(norm, x.shape[-1]) for norm in (self.norm1, self.norm2))
        paths = all(is_plain(drop_path, nn.Identity, DropPath) for drop_path in (self.drop_path1, self.drop_path2))
        if not norms or not paths or triton_refusal(x.device) is not None:
            return False
        from ..kernels.residual_ops import DTYPES, MAX_CHANNELS  # not before needed, as in Attention

        return x.dtype in DTYPES and x.shape[-1] <= MAX_CHANNELS

    @staticmethod
    def _scale(y: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
        return y.to(dtype) if gamma is None else y.to(dtype) * gamma.to(dtype)


_FORWARD = Block.forward  # others may have been put in its place


def take_kernels(blocks: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether ``run_on_kernels`` does all that calling these blocks, one or more, one after the other would do."""
    for block in blocks:  # no generator, which torch.compile would have to look into
        if not is_plain(block, Block) or Block.forward is not _FORWARD or not cast(Block, block).takes_kernels(x):
            return False
    return len(blocks) > 0  # without any, nothing needs the kernels


def _begins_to_learn(norm: nn.LayerNorm, *before: Tensor | None) -> bool:
    """Whether the norm has a gradient and nothing before it: what frozen blocks give shall not need one either."""
    if not torch.is_grad_enabled() or not (norm.weight.requires_grad or norm.bias.requires_grad):
        return False
    return not any(tensor is not None and tensor.requires_grad for tensor in before)


def run_on_kernels(
    blocks: Sequence[Block], x: Tensor, biases: Iterable[BlockBias], wanted: Container[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """Blocks on the Triton kernels, the last sum of each together with the first norm of the next.

    Args:
        blocks: each of which ``takes_kernels``.
        x: (B, N, C).
        biases: one for each block.
        wanted: after how many of the blocks the tokens are also returned.

    Returns:
        (B, N, C), and the tokens by the number of blocks behind them.
    """
    from ..kernels.residual_ops import add_norm, layer_norm, scaled_add  # not before needed, as in Attention

    dtype = attention_dtype(x)  # what the linear layers would cast to
    states: dict[int, Tensor] = {}
    branch = None  # of the block before, with its layer scale and factors: yet to be added to x
    for i, (block, bias) in enumerate(zip(blocks, biases, strict=True)):
        norm1, norm2 = cast(nn.LayerNorm, block.norm1), cast(nn.LayerNorm, block.norm2)
        if branch is not None and _begins_to_learn(norm1, x, *branch):
            x, branch = scaled_add(x, *branch), None
        if branch is None:
            normed = layer_norm(x, norm1.weight, norm1.bias, norm1.eps, dtype)
        else:
            x, normed = add_norm(x, *branch, norm1.weight, norm1.bias, norm1.eps, dtype)
        if i in wanted:
            states[i] = x
        y, _ = block.attn(normed, *bias)
        keep = _draw_keep(block.drop_path1, x)
        x, normed = add_norm(x, y, block.gamma_1, keep, norm2.weight, norm2.bias, norm2.eps, dtype)
        branch = block.mlp(normed), block.gamma_2, _draw_keep(block.drop_path2, x)
    if branch is not None:
        x = scaled_add(x, *branch)
    if len(blocks) in wanted:
        states[len(blocks)] = x
    return x, states
