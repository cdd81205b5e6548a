"""The dtype in which the ops compute."""

from functools import reduce

import torch
from torch import Tensor


def at_least_fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast all tensors to their common dtype, or to fp32 where that is narrower.

    torchvision has no kernels for bf16, nor for fp16 on CPU, and coordinates of a few hundred pixels need more than
    the 8 to 11 bits of these dtypes.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)
