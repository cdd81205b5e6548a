"""Sigmoid and softmax focal loss (Lin et al., arXiv:1708.02002), and their gradients in closed form.

Shapes: N rows, C classes. All outputs are fp of the caller, filled in place, and not yet multiplied by the incoming
gradient. Formulas as in mmcv 2.1.0 ``csrc/common/cuda/{sigmoid,softmax}_focal_loss_cuda_kernel.cuh``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_fp32


def _row_weights(weight: Tensor, target: Tensor, outside: float) -> Tensor | float:
    """Class weight of every row (N), `outside` for labels that are no class; 1 when `weight` (C) is empty."""
    if weight.numel() == 0:
        return 1.0
    inside = (target >= 0) & (target < len(weight))
    return torch.where(inside, weight[target.clamp(0, len(weight) - 1)], outside)


def _as_column(row_weights: Tensor | float) -> Tensor | float:
    return row_weights[:, None] if isinstance(row_weights, Tensor) else row_weights


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` with the loss of every row and class.

    Args:
        input: (N, C), logits.
        target: (N), int64 labels; any label outside 0 to C - 1 means background.
        weight: (C) or empty; a row is weighted by its own label, a background row by 1.
        output: (N, C).
        gamma: focusing exponent.
        alpha: weight of the positive term; the negative one has 1 - alpha.
    """
    (logits,) = at_least_fp32(input)
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    signed = torch.where(positive, logits, -logits)  # the negative term is the positive one of -x
    balance = torch.where(positive, alpha, 1 - alpha)
    loss = -balance * torch.sigmoid(-signed) ** gamma * F.logsigmoid(signed)
    output.copy_(loss * _as_column(_row_weights(weight, target, outside=1.0)))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` (N, C) with d loss / d logit of `sigmoid_focal_loss_forward`, whose arguments it takes."""
    (logits,) = at_least_fp32(input)
    positive = target[:, None] == torch.arange(logits.shape[1], device=target.device)
    signed = torch.where(positive, logits, -logits)
    balance = torch.where(positive, -alpha, 1 - alpha)  # the sign turns d/d(-x) back into d/dx
    p, q = torch.sigmoid(signed), torch.sigmoid(-signed)
    grad = balance * q**gamma * (q - gamma * p * F.logsigmoid(signed))
    grad_input.copy_(grad * _as_column(_row_weights(weight, target, outside=1.0)))


def _target_probability(softmax: Tensor, target: Tensor) -> Tensor:
    """Probability (N) of every row's label; of class 0 where the label is negative (callers mask these rows)."""
    return softmax.gather(1, target.clamp(min=0)[:, None])[:, 0]


def softmax_focal_loss_forward(
    input_softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``output`` with the loss of every row.

    Args:
        input_softmax: (N, C), the softmax of the logits.
        target: (N), int64 labels below C; rows with negative labels give 0.
        weight: (C) or empty.
        output: (N).
        gamma: focusing exponent.
        alpha: factor of the whole loss.
    """
    (softmax,) = at_least_fp32(input_softmax)
    p = _target_probability(softmax, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=torch.finfo(p.dtype).tiny).log()
    loss = loss * _row_weights(weight, target, outside=0.0)
    output.copy_(torch.where(target >= 0, loss, 0))


def softmax_focal_loss_backward(
    input_softmax: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill ``grad_input`` with d loss / d logit of `softmax_focal_loss_forward`, whose arguments it takes.

    Args:
        buff: (N), receives p · d loss / d p, where p is the probability of the row's label.
        grad_input: (N, C).
    """
    (softmax,) = at_least_fp32(input_softmax)
    p = _target_probability(softmax, target)
    q = 1 - p
    # at p = 1 the product is 0 in the limit, but (1 - p) ** (gamma - 1) is infinite for gamma < 1
    focus = torch.where(q > 0, q, 1) ** (gamma - 1) * p * p.clamp(min=torch.finfo(p.dtype).tiny).log()
    slope = alpha * (gamma * focus - q**gamma) * _row_weights(weight, target, outside=0.0)
    slope = torch.where(target >= 0, slope, 0)
    buff.copy_(slope)
    is_label = target[:, None] == torch.arange(softmax.shape[1], device=target.device)
    grad_input.copy_(slope[:, None] * (is_label.to(softmax.dtype) - softmax))
