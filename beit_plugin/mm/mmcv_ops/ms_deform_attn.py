"""Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv:2010.04159).

Shapes: B batch, S tokens of all levels, K heads, D head dim, Q queries, L levels, P points.
One level at a time, and the backward recomputes it, so that at most B·K·D·Q·P sampled values exist at once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_fp32


def _attend_level(tokens: Tensor, size: tuple[int, int], locations: Tensor, weights: Tensor) -> Tensor:
    """Attend to one level.

    Args:
        tokens: (B, h·w, K, D).
        size: h, w.
        locations: (B, Q, K, P, 2) as (x, y), 0 to 1 over the level.
        weights: (B, Q, K, P).

    Returns:
        (B, Q, K, D).
    """
    maps = tokens.permute(0, 2, 3, 1).reshape(-1, tokens.shape[3], *size)  # B·K, D, h, w
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # B·K, Q, P, 2
    sampled = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)  # B·K, D, Q, P
    attended = (sampled * weights.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)  # B·K, D, Q
    return attended.unflatten(0, (tokens.shape[0], -1)).permute(0, 3, 1, 2)


def _levels(value_spatial_shapes: Tensor, value_level_start_index: Tensor) -> list[tuple[tuple[int, int], slice]]:
    """Size (h, w) and token range of every level."""
    shapes, starts = value_spatial_shapes.tolist(), value_level_start_index.tolist()
    return [((h, w), slice(start, start + h * w)) for (h, w), start in zip(shapes, starts, strict=True)]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return the attended values (B, Q, K·D), in the dtype of `value`.

    Args:
        value: (B, S, K, D).
        value_spatial_shapes: (L, 2), int64 h, w of every level.
        value_level_start_index: (L), int64 first token of every level.
        sampling_locations: (B, Q, K, L, P, 2) as (x, y), 0 to 1 over the level; 0 beyond it.
        attention_weights: (B, Q, K, L, P).
        im2col_step: images per kernel launch of the compiled op; has no effect on the result.
    """
    tokens, locations, weights = at_least_fp32(value, sampling_locations, attention_weights)
    output = tokens.new_zeros(tokens.shape[0], locations.shape[1], *tokens.shape[2:])  # B, Q, K, D
    for level, (size, span) in enumerate(_levels(value_spatial_shapes, value_level_start_index)):
        output += _attend_level(tokens[:, span], size, locations[:, :, :, level], weights[:, :, :, level])
    return output.flatten(2).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the gradients of `ms_deform_attn_forward`, whose arguments it takes.

    Args:
        grad_output: (B, Q, K·D).
        grad_value: (B, S, K, D).
        grad_sampling_loc: (B, Q, K, L, P, 2).
        grad_attn_weight: (B, Q, K, L, P).
    """
    tokens, locations, weights, grad = at_least_fp32(value, sampling_locations, attention_weights, grad_output)
    grad = grad.unflatten(2, tokens.shape[2:])  # B, Q, K, D
    for level, (size, span) in enumerate(_levels(value_spatial_shapes, value_level_start_index)):
        parts = (tokens[:, span], locations[:, :, :, level], weights[:, :, :, level])
        level_tokens, level_locations, level_weights = leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            output = _attend_level(level_tokens, size, level_locations, level_weights)
        level_grads = torch.autograd.grad(output, leaves, grad)
        grad_value[:, span] = level_grads[0].to(grad_value.dtype)
        grad_sampling_loc[:, :, :, level] = level_grads[1].to(grad_sampling_loc.dtype)
        grad_attn_weight[:, :, :, level] = level_grads[2].to(grad_attn_weight.dtype)
