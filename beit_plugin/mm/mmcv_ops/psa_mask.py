"""Point-wise spatial attention masks (Zhao et al., PSANet, ECCV 2018).

Every position (y, x) of an h by w map predicts a mask of hm by wm relative offsets. ``distribute`` (type 1) lays the
mask of (y, x) around (y, x): row y·w + x of the result; ``collect`` (type 0) is its transpose.
Shapes: B batch, h w feature grid, hm wm mask. Pure moves: exact in any dtype.
"""

import torch
from torch import Tensor

_COLLECT = 0


def _offsets(size: int, half: int, device: torch.device) -> Tensor:
    """Mask index (size, size) along one axis at which position j (column) keeps its value for position i (row)."""
    positions = torch.arange(size, device=device)
    return positions[:, None] - positions + half


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``output`` with the masks laid out over the whole map, 0 beyond their reach.

    Args:
        input: (B, hm·wm, h, w).
        output: (B, h·w, h, w).
        psa_type: 0 collect, 1 distribute.
        num_: B.
        h_feature, w_feature: h, w.
        h_mask, w_mask: hm, wm.
        half_h_mask, half_w_mask: mask index of offset 0.
    """
    rows = _offsets(h_feature, half_h_mask, input.device)[:, None, :, None]  # h', 1, h, 1
    columns = _offsets(w_feature, half_w_mask, input.device)[:, None, :]  # w', 1, w
    inside = (rows >= 0) & (rows < h_mask) & (columns >= 0) & (columns < w_mask)  # h', w', h, w
    index = (rows * w_mask + columns).where(inside, 0).view(h_feature * w_feature, h_feature, w_feature)
    collected = input.gather(1, index.expand(num_, -1, -1, -1))
    collected.masked_fill_(~inside.view_as(index), 0)
    if psa_type == _COLLECT:
        output.copy_(collected)
    else:
        output.copy_(collected.flatten(2).transpose(1, 2).view_as(output))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Fill ``grad_input`` (B, hm·wm, h, w) from ``grad_output`` (B, h·w, h, w); arguments as in `psamask_forward`."""
    device = grad_output.device
    if psa_type != _COLLECT:
        grad_output = grad_output.flatten(2).transpose(1, 2).reshape(grad_output.shape)
    rows = torch.arange(h_mask, device=device)[:, None] - half_h_mask + torch.arange(h_feature, device=device)
    columns = torch.arange(w_mask, device=device)[:, None] - half_w_mask + torch.arange(w_feature, device=device)
    rows, columns = rows[:, None, :, None], columns[:, None, :]  # hm, 1, h, 1 and wm, 1, w
    inside = (rows >= 0) & (rows < h_feature) & (columns >= 0) & (columns < w_feature)  # hm, wm, h, w
    index = (rows * w_feature + columns).where(inside, 0).view(h_mask * w_mask, h_feature, w_feature)
    grad = grad_output.gather(1, index.expand(num_, -1, -1, -1))
    grad_input.copy_(grad.masked_fill_(~inside.view_as(index), 0))
