"""What tools/benchmark.py measures: attention by several means, and whole encoders of ours and of the peers.

A case is a name, a function that makes a step, and what a step is; the tool times all cases of a size in one run.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16


class Case(NamedTuple):
    """One thing to time.

    Attributes:
        name: how the table calls it.
        forward: runs once, without gradients.
        train: runs forward and backward once; gradients are dropped between the runs.
        parameters: what gets gradients.
    """

    name: str
    forward: Callable[[], Any]
    train: Callable[[], Any]
    parameters: list[Tensor]


def _backward(forward: Callable[[], Tensor], grad: Tensor) -> Callable[[], None]:
    return lambda: forward().backward(grad)


def attention_cases(
    side: int, batch: int, heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Attention on a square image of ``side`` pixels, from the fused projection to (B, N, K, D).

    The bound is flash attention without a bias; timm's way gathers the table (N*N, K) and transposes it; ours are the
    two backends of ``models/attention.py``. Each trains the projection and the table.
    """
    from beit_plugin.models.attention import attention, fused_refusal
    from beit_plugin.models.relative_position import bias_geometry, gather_bias, num_relative_distance

    size = side // PATCH
    grid = size, size
    tokens = 1 + size * size
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
    table = torch.randn(num_relative_distance(grid), heads, device=device, requires_grad=True)
    grad = torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype)
    geometry = bias_geometry(grid, grid, 'geometric', torch.device(device))
    index = geometry.index
    assert index is not None
    plain = index[:, :tokens].contiguous()  # N, N

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def flash() -> Tensor:
        return F.scaled_dot_product_attention(*parts()).transpose(1, 2)

    def timm() -> Tensor:
        bias = table[plain.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()  # K, N, N
        return F.scaled_dot_product_attention(*parts(), attn_mask=bias.to(dtype)[None]).transpose(1, 2)

    def sdpa() -> Tensor:
        return attention(*parts(), gather_bias(table, geometry)).transpose(1, 2)

    def fused() -> Tensor:
        from beit_plugin.kernels.ops import attend

        return attend(qkv, table, grid)

    yield Case('no bias (bound)', flash, _backward(flash, grad), [qkv])
    yield Case("timm's way", timm, _backward(timm, grad), [qkv, table])
    yield Case('ours, sdpa', sdpa, _backward(sdpa, grad), [qkv, table])
    if fused_refusal(qkv, head_dim, 0.0) is None:
        yield Case('ours, fused', fused, _backward(fused, grad), [qkv, table])


# names as in timm; sizes of BEiT base and large
SIZES = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3),
    'base': dict(embed_dim=768, depth=12, num_heads=12),
    'large': dict(embed_dim=1024, depth=24, num_heads=16),
}


def _ours(side: int, size: dict[str, int], backend: str) -> nn.Module:
    from beit_plugin import Beit

    return Beit(img_size=side, num_classes=0, global_pool='', attn_backend=backend, **size)  # type: ignore[arg-type]


def _timm(side: int, size: dict[str, int]) -> nn.Module:
    from timm.models.beit import Beit as TimmBeit

    return TimmBeit(
        img_size=side,
        num_classes=0,
        global_pool='',
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        **size,
    )


def _vit(side: int, size: dict[str, int]) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=side, num_classes=0, global_pool='', init_values=0.1, **size)


def _transformers(side: int, size: dict[str, int]) -> nn.Module:
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        image_size=side, hidden_size=size['embed_dim'], num_hidden_layers=size['depth'],
        num_attention_heads=size['num_heads'], intermediate_size=4 * size['embed_dim'], drop_path_rate=0.0,
        use_relative_position_bias=True, use_mean_pooling=False,
    )  # fmt: skip
    return _LastHidden(BeitModel(config, add_pooling_layer=False))


def _mmseg(side: int, size: dict[str, int]) -> nn.Module:
    import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

    # isort: split
    from mmseg.models.backbones import BEiT

    return BEiT(
        img_size=(side, side), embed_dims=size['embed_dim'], num_layers=size['depth'], num_heads=size['num_heads'],
        out_indices=[size['depth'] - 1], init_values=0.1,
    )  # fmt: skip


class _LastHidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


def encoder_models(variant: str, side: int) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and constructors of the encoders to compare; peers that are not installed are left out."""
    size = SIZES[variant]
    yield 'timm ViT, no bias (bound)', lambda: _vit(side, size)
    yield 'timm Beit', lambda: _timm(side, size)
    if find_spec('transformers'):
        yield 'transformers', lambda: _transformers(side, size)
    if find_spec('mmseg'):
        yield 'mmsegmentation', lambda: _mmseg(side, size)
    yield 'ours, sdpa', lambda: _ours(side, size, 'sdpa')
    yield 'ours, fused', lambda: _ours(side, size, 'fused')


def encoder_case(name: str, model: nn.Module, side: int, batch: int, device: str, dtype: torch.dtype) -> Case:
    """An encoder in mixed precision: inference, and a training step without the optimiser."""
    model = model.to(device)
    x = torch.randn(batch, 3, side, side, device=device)

    def run() -> Tensor:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            out = model(x)
        return out[-1] if isinstance(out, list | tuple) else out

    def forward() -> Tensor:
        model.eval()
        return run()

    def train() -> None:
        model.train()
        run().float().mean().backward()

    return Case(name, forward, train, list(model.parameters()))
