"""What tools/benchmark.py measures: a case, what it depends on, and the cases of attention alone.

Legend: B batch, H W pixels, h w grid, N = 1 + h*w tokens, K heads, D head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16


class Case(NamedTuple):
    """One thing to time.

    Attributes:
        call: a model or a function; what torch.compile takes.
        forward: runs it once, given ``call`` or what torch.compile made of it.
        train: likewise, forward and backward; None for what is no step of a training.
        parameters: what gets gradients.
    """

    call: Callable[..., Any]
    forward: Callable[[Callable[..., Any]], Any]
    train: Callable[[Callable[..., Any]], Any] | None
    parameters: list[Tensor]

    def switch(self, training: bool) -> None:
        """Training or inference mode, where there is such a thing."""
        if isinstance(self.call, nn.Module):
            self.call.train(training)


Makers = dict[str, Callable[[], Case]]  # by the name in the table; what is not measured is not made


@dataclass
class Setting:
    """What the cases of one size depend on."""

    height: int  # pixels
    width: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    backends: list[str]  # attn_backend of ours
    variant: str = 'base'  # size of the model
    heads: int = 12  # attention alone
    head_dim: int = 64

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) patches."""
        return self.height // PATCH, self.width // PATCH

    @property
    def tokens(self) -> int:
        """N."""
        return 1 + self.grid[0] * self.grid[1]

    def randn(self, *shape: int) -> Tensor:
        """In the dtype of attention; zeros would run faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def attention_flops(s: Setting, training: bool) -> float:
    """4 B K N N D forward, 2.5 times as much backward: how FlashAttention counts, so with its second q k^T."""
    return 4.0 * s.batch * s.heads * s.tokens**2 * s.head_dim * (3.5 if training else 1)


def attention_cases(s: Setting) -> Makers:
    """Attention from the fused projection (B, N, 3, K, D) to (B, N, K, D), with the gradient of projection and table.

    The bound has neither a bias nor a projection: q, k and v are tensors of their own, so it does not pay for writing
    their gradients into one. The second row does, as timm's ViT. Both are held to flash attention where there is one.
    timm's way gathers the table to (N*N, K) and transposes it.
    """
    from beit_plugin.models.attention import attention, eager_attention, fused_refusal
    from beit_plugin.models.relative_position import bias_geometry, gather_bias, num_relative_distance

    B, N, K, D = s.batch, s.tokens, s.heads, s.head_dim
    has_flash = s.device.type == 'cuda' and s.dtype in (torch.float16, torch.bfloat16)

    def flash_only() -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if has_flash else nullcontext()

    def parts(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, K, N, D

    def case(function: Callable[..., Tensor], inputs: list[Tensor], held: Callable[[], Any] = nullcontext) -> Case:
        grad = s.randn(B, N, K, D)

        def forward(call: Callable[..., Tensor]) -> Tensor:
            with held():
                return call(*inputs)

        return Case(function, forward, lambda call: forward(call).backward(grad), inputs)

    def projection() -> Tensor:
        return s.randn(B, N, 3, K, D).requires_grad_()

    def with_table(function: Callable[..., Tensor]) -> Case:
        rows = num_relative_distance(s.grid)
        return case(function, [projection(), torch.randn(rows, K, device=s.device, requires_grad=True)])

    def bound() -> Case:
        def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        return case(flash, [s.randn(B, N, K, D).requires_grad_() for _ in range(3)], flash_only)

    def projected() -> Case:
        def flash(qkv: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*parts(qkv)).transpose(1, 2)

        return case(flash, [projection()], flash_only)

    def timm() -> Case:
        geometry = bias_geometry(s.grid, s.grid, 'geometric', s.device)
        assert geometry.index is not None
        index = geometry.index[:, :N].reshape(-1)  # N*N

        def gathered(qkv: Tensor, table: Tensor) -> Tensor:
            bias = table[index].view(N, N, -1).permute(2, 0, 1).contiguous()  # K, N, N
            return F.scaled_dot_product_attention(*parts(qkv), attn_mask=bias.to(s.dtype)[None]).transpose(1, 2)

        return with_table(gathered)

    def unfused(backend: str) -> Case:
        geometry = bias_geometry(s.grid, s.grid, 'geometric', s.device)

        def ours(qkv: Tensor, table: Tensor) -> Tensor:
            q, k, v = parts(qkv)
            bias = gather_bias(table, geometry, s.dtype)
            out = eager_attention(q, k, v, bias)[0] if backend == 'eager' else attention(q, k, v, bias)
            return out.transpose(1, 2)

        return with_table(ours)

    def fused() -> Case:
        reason = fused_refusal(torch.empty(0, device=s.device, dtype=s.dtype), D, 0.0)
        if reason is not None:
            raise ValueError(reason)
        from beit_plugin.kernels.ops import attend

        def ours(qkv: Tensor, table: Tensor) -> Tensor:
            return attend(qkv, table, s.grid)

        return with_table(ours)

    makers: Makers = {
        'no bias (bound)': bound, 'no bias, from the projection': projected, "timm's way": timm
    }  # fmt: skip
    for backend in s.backends:
        makers[f'ours, {backend}'] = fused if backend == 'fused' else lambda b=backend: unfused(b)
    return makers
