"""Convolution at the masked positions only (GA-RPN): gather the columns, multiply, put back.

Shapes: one image; C channels, H W pixels, kh kw kernel, M masked positions. Pure moves: exact in any dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Fill ``data_col`` with the zero-padded windows at the masked positions.

    Args:
        features: (1, C, H, W).
        mask_h_idx: (M), int64 rows of the output positions.
        mask_w_idx: (M), int64 columns.
        data_col: (C·kh·kw, M).
        kernel_h, kernel_w: window size.
        pad_h, pad_w: zero padding of the convolution (stride 1).
    """
    padded = F.pad(features[0], (pad_w, pad_w, pad_h, pad_h))  # C, H + 2 pad_h, W + 2 pad_w
    rows = mask_h_idx + torch.arange(kernel_h, device=features.device)[:, None, None]  # kh, 1, M
    columns = mask_w_idx + torch.arange(kernel_w, device=features.device)[:, None]  # kw, M
    data_col.copy_(padded[:, rows, columns].reshape(data_col.shape))  # C, kh, kw, M


def masked_col2im_forward(
    data_col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    output: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write the columns to the masked positions of ``output``; the other positions keep what they have.

    Args:
        data_col: (C, M).
        mask_h_idx: (M), int64 rows.
        mask_w_idx: (M), int64 columns.
        output: (1, C, H, W), where H, W, C are ``height``, ``width``, ``channels``.
    """
    output.view(channels, height, width)[:, mask_h_idx, mask_w_idx] = data_col
