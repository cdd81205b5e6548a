"""The 27 implemented ops by the names under which mmcv asks for them."""

from collections.abc import Callable
from typing import Any

from .boxes import bbox_overlaps, nms, nms_match, softnms
from .carafe import carafe_backward, carafe_forward, carafe_naive_backward, carafe_naive_forward
from .deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .masked_conv import masked_col2im_forward, masked_im2col_forward
from .ms_deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from .psa_mask import psamask_backward, psamask_forward
from .roi_align import roi_align_backward, roi_align_forward
from .roi_pool import roi_pool_backward, roi_pool_forward

OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        nms,
        softnms,
        nms_match,
        bbox_overlaps,
        roi_align_forward,
        roi_align_backward,
        roi_pool_forward,
        roi_pool_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        softmax_focal_loss_forward,
        softmax_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        carafe_forward,
        carafe_backward,
        carafe_naive_forward,
        carafe_naive_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
        masked_im2col_forward,
        masked_col2im_forward,
        psamask_forward,
        psamask_backward,
    )
}
