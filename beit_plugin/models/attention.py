"""Self-attention of BEiT (arXiv:2106.08254): query and value have a bias, key has none, scores get a position bias.

Parameter names are those of unilm ``beit/modeling_finetune.py`` and timm: ``qkv``, ``q_bias``, ``v_bias``, ``proj``,
``relative_position_bias_table``.

Shapes: B batch, N tokens, C channels, K heads, D head dim.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernel_support import (
    is_exporting,
    needs_forward_derivative,
    needs_transforms,
    triton_by_default,
    triton_is_interpreted,
    triton_refusal,
)
from .relative_position import BiasGeometry, bias_of, num_relative_distance, table_at
from .windows import Windows

__all__ = [
    'ATTENTION_BACKENDS',
    'Attention',
    'AttentionBackend',
    'attention',
    'attention_dtype',
    'choose_backend',
    'eager_attention',
    'fused_refusal',
]

AttentionBackend = Literal['auto', 'eager', 'sdpa', 'fused']
ATTENTION_BACKENDS: tuple[str, ...] = get_args(AttentionBackend)
HALF = (torch.float16, torch.bfloat16)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    head_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference: every step written out; in float64 it is what the other backends are measured against.

    Args:
        q, k, v: (B, K, N, D).
        bias: (K, N, N) added to the scaled scores.
        dropout: drops attention weights; a module shows them to its forward hooks.
        head_mask: (K,) factors of the attention weights, 0 switches a head off.

    Returns:
        The output (B, K, N, D) and the weights (B, K, N, N), after softmax, dropout and mask.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # B, K, N, N
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    weights = softmax(scores, q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    if head_mask is not None:
        weights = weights * head_mask.to(weights.dtype)[:, None, None]
    return weights @ v, weights


@torch.fx.wrap  # a node called "softmax", which timm's AttentionExtract looks for
def softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax of the last dimension, computed in float32 at least."""
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax(q k^T / sqrt(D) + bias) v by PyTorch's SDPA.

    (The fused kernels read the table instead of a bias; see ``Attention``.) In inference PyTorch itself takes cuDNN
    first where that is fastest and sound, Hopper and Blackwell with cuDNN above 9.15. No order of ours is set: with
    an older one it would bring back reads out of bounds (pytorch issue 169849), with a newer one change nothing.

    Arguments and shapes are those of ``eager_attention``; the result is (B, K, N, D).
    """
    # a bias of another dtype than the query's would be refused, or misread by cuDNN (pytorch issue 191612)
    mask = None if bias is None else bias.to(q.dtype)[None]  # 1, K, N, N
    backends: list[SDPBackend] = []
    if needs_forward_derivative():  # only the unfused form has one
        backends = [SDPBackend.MATH]
    elif mask is not None and _cudnn_would_differentiate(q, mask):
        backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if backends else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _cudnn_would_differentiate(q: Tensor, mask: Tensor) -> bool:
    """Whether PyTorch might take cuDNN where it must not: its gradient of q with a mask can be NaN.

    That happens when N % 128 == 64 (pytorch issue 196678). The size is not looked at: it may be open under a compiler,
    and with a mask that learns PyTorch never takes cuDNN, so this is about frozen tables only.
    """
    needs_gradient = torch.is_grad_enabled() and q.requires_grad and not mask.requires_grad
    return needs_gradient and q.device.type == 'cuda' and _cudnn_enabled()


@torch.compiler.assume_constant_result  # torch.compile takes no function of torch.backends that answers by a bool
def _cudnn_enabled() -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled()


def choose_backend(
    layers: Sequence['Attention'], x: Tensor, weights: bool = False
) -> Literal['eager', 'sdpa', 'fused']:
    """How the layers of a forward attend, if they have a table: decided here only, and once for all of them.

    ``auto`` is ``fused`` where the kernels are compiled for the GPU and attention computes in half precision: on an
    H200 attention alone was 1.2 to 3.4 times as fast as ``sdpa`` forward and 2.6 to 5.5 times with gradients, from 197
    tokens on (docs/benchmarks.md; a model that waits for the CPU, one image at a time, mostly gains nothing). It is
    ``sdpa`` elsewhere; so in exported programs, which shall run without this package, and for subclasses of tensors,
    which bring rules for PyTorch's operators only.

    Args:
        layers: those of the encoder, alike but for their modes.
        x: tokens (B, N, C) that the first layer gets, for device and dtype.
        weights: whether attention weights are returned or masked, which only ``eager`` can.

    Raises:
        ValueError: ``fused`` was asked for and cannot serve.
    """
    requested = layers[0].backend if layers else 'sdpa'
    if requested == 'eager' or weights:
        return 'eager'
    fused = requested == 'fused' and not isinstance(x, torch.fx.Proxy)  # a graph is for every device and dtype
    if fused or (requested == 'auto' and _fused_is_best(x)):
        dropout_p = layers[0].attn_drop.p if any(layer.training for layer in layers) else 0.0  # some may be frozen
        reason = fused_refusal(x, layers[0].head_dim, dropout_p)
        if reason is None:
            return 'fused'
        if requested == 'fused':
            raise ValueError(f"attn_backend='fused' cannot serve: {reason}; use attn_backend='auto'")
    return 'sdpa'


def _fused_is_best(x: Tensor) -> bool:
    """Whether the fused kernels, if they can run, are what ``auto`` means; see ``choose_backend``."""
    plain = type(x) is Tensor and not is_exporting()
    return plain and triton_by_default(x.device) and attention_dtype(x) in HALF


def fused_refusal(x: Tensor, head_dim: int, dropout_p: float) -> str | None:
    """Why the fused kernels cannot serve, or None if they can.

    Args:
        x: what attention is computed from, for its device and dtype.
        head_dim: D.
        dropout_p: dropout of the attention weights in this forward.
    """
    refusal = triton_refusal(x.device)
    if refusal is not None:
        return refusal
    dtype = attention_dtype(x)
    if dtype not in (*HALF, torch.float32):
        return f'they compute in float16, bfloat16 or float32, and the tensors are {dtype}'
    if dtype == torch.bfloat16 and triton_is_interpreted():  # it multiplies the bits as integers (Triton 3.8)
        return "Triton's interpreter cannot multiply bfloat16"
    if head_dim % 16 or head_dim > 128:
        return f'they take head dims that are multiples of 16 up to 128, and this model has {head_dim}'
    if dtype == torch.float32 and head_dim > 64 and x.device.type == 'cuda':
        memory = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >> 10
        if memory < 160:
            return f'in float32 with head dims above 64 they need 160 KiB of shared memory, and this GPU has {memory}'
    if dropout_p:
        return 'they have no dropout of the attention weights'
    if torch.jit.is_tracing():
        return 'TorchScript and ONNX cannot hold them'
    if needs_transforms():
        return 'they have no rules for the transforms of torch.func and no forward-mode derivative'
    return None


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the projection of tokens of this dtype gives, under autocast too."""
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype  # autocast leaves float64 alone
    return torch.get_autocast_dtype(kind)


@torch.compiler.assume_constant_result  # torch.compile of torch 2.11 cannot trace the question
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


class Attention(nn.Module):
    """Multi-head self-attention with a learned relative position bias of its own, a shared one, both or none.

    Args:
        dim: C, a multiple of ``num_heads``.
        num_heads: K.
        qkv_bias: learn a bias of query and value (the key's would not change the softmax).
        attn_drop, proj_drop: dropout of the attention weights and of the output, 0 to 1.
        window_size: (h, w) grid of this layer's bias table; None for no table.
        backend: one of ``ATTENTION_BACKENDS``.

    Raises:
        ValueError: ``dim`` is no multiple of ``num_heads``, or the backend is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        backend: AttentionBackend = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'embed_dim must be a multiple of num_heads, got {dim} and {num_heads} heads')
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f'attn_backend must be one of {", ".join(ATTENTION_BACKENDS)}, got {backend!r}')
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.q_bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if qkv_bias else None
        self.relative_position_bias_table = None
        if window_size is not None:
            rows = num_relative_distance(window_size)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads, device=device, dtype=dtype))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        geometry: BiasGeometry | None = None,
        shared_bias: Tensor | None = None,
        windows: Windows | None = None,
        head_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends over all tokens, or with ``windows`` over those of each window.

        Args:
            x: (B, N, C), N = 1 + h*w.
            geometry: how this layer's table is read at the grid of x, or of a window; needed if it has one. Without
                an index, the fused kernels run.
            shared_bias: (K, N, N) bias common to all layers; without an index, its table ((2h-1)*(2w-1)+3, K).
            windows: how the grid of x is cut; the shapes of the biases are then those of a window.
            head_mask: (K,) factors of the heads.
            return_weights: also return the attention weights (then computed by the eager reference).

        Returns:
            (B, N, C), and None or the weights (B, K, N, N), with windows (B, windows, K, 1+wh*ww, 1+wh*ww).
        """
        if windows is not None:  # before the projection, which makes three times as much to copy
            x = windows.split(x)
        B, N, C = x.shape
        qkv_bias = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))  # 3*C
        qkv = F.linear(x, self.qkv.weight, qkv_bias).reshape(B, N, 3, self.num_heads, self.head_dim)

        fused = geometry is not None and geometry.index is None and not return_weights and head_mask is None
        bias, table = shared_bias, self.relative_position_bias_table
        if table is not None and geometry is not None:
            if fused:
                own = table_at(table, geometry)
            else:
                dtype = qkv.dtype if bias is None else None  # a sum is rounded once, at its end
                own = bias_of(self, table, geometry, dtype)
            bias = own if bias is None else own + bias
        if fused and geometry is not None and bias is not None:
            from ..kernels.ops import attend  # not before it is needed: Triton looks for a GPU

            out = attend(qkv, bias, geometry.grid)  # B, N, K, D
            return self._project(out.flatten(2), windows), None
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, K, N, D
        weights = None
        if return_weights or head_mask is not None or self.backend == 'eager':
            out, weights = eager_attention(q, k, v, bias, self.attn_drop, head_mask)
        else:
            out = attention(q, k, v, bias, self.attn_drop.p if self.training else 0.0)
        out = out.transpose(1, 2)  # B, N, K, D; copied in an export, whose attention may be decomposed to other strides
        out = (out.clone(memory_format=torch.contiguous_format) if is_exporting() else out).reshape(B, N, C)
        if not return_weights:
            weights = None
        elif windows is not None:
            weights = weights.unflatten(0, (-1, windows.total()))  # B, windows, K, 1+wh*ww, 1+wh*ww
        return self._project(out, windows), weights

    def _project(self, x: Tensor, windows: Windows | None) -> Tensor:
        return self.proj_drop(self.proj(x if windows is None else windows.merge(x)))
