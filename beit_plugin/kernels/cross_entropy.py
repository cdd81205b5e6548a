"""Triton kernels: softmax cross-entropy of bilinearly resized logits, which exist in registers only.

A pixel of the labels reads the four logits around it for each class. In the backward pass a small logit gathers from
the pixels that read it, which computes each softmax up to four times, but needs no atomics: the same inputs give the
same bits.

Legend: B batch, K classes, h w pixels of the logits, H W those of the labels. Every pointer's shape stands beside it.
"""

import triton
import triton.language as tl


@triton.jit
def _source(place, scale, old, ALIGN: tl.constexpr):
    """Where a place of the resized axis lies on the old one; PyTorch's rule, held within the axis."""
    at = place * scale if ALIGN else (place + 0.5) * scale - 0.5
    return tl.minimum(tl.maximum(at, 0.0), old - 1.0)


@triton.jit
def _resized(logits, at_y, at_x, inside, k, K, h, w, stride_k, stride_y, stride_x):
    """Logits (pixels, classes) at places between the old pixels."""
    y0, x0 = at_y.to(tl.int32), at_x.to(tl.int32)
    y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
    down, right = at_y - y0, (at_x - x0)[:, None]
    mask = inside[:, None] & (k < K)[None, :]
    channel = (k * stride_k)[None, :]
    top, bottom = logits + y0 * stride_y + channel, logits + y1 * stride_y + channel
    left, beside = (x0 * stride_x)[:, None], (x1 * stride_x)[:, None]
    above = tl.load(top + left, mask=mask, other=0.0).to(tl.float32) * (1.0 - right)
    above += tl.load(top + beside, mask=mask, other=0.0).to(tl.float32) * right
    below = tl.load(bottom + left, mask=mask, other=0.0).to(tl.float32) * (1.0 - right)
    below += tl.load(bottom + beside, mask=mask, other=0.0).to(tl.float32) * right
    return above * (1.0 - down) + below * down


@triton.jit
def forward_kernel(
    logits,  # B, K, h, w
    labels,  # B, H, W
    class_weight,  # K; None: 1
    lse,  # B, H, W: log of the sum of exponentials
    losses,  # B, H, column blocks: sums over the block
    rights,  # B, H, column blocks: pixels whose largest logit is that of their label
    ignored,
    scale_y,
    scale_x,
    K,
    h,
    w,
    H,
    W,
    stride_b,
    stride_k,
    stride_y,
    stride_x,
    ALIGN: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some pixels of a row. Grid: (column blocks, H, B)."""
    row, image = tl.program_id(1), tl.program_id(2)
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = x < W
    at = (image.to(tl.int64) * H + row) * W + x
    label = tl.load(labels + at, mask=inside, other=0).to(tl.int32)
    counts = inside & (label != ignored)
    at_y, at_x = _source(row, scale_y, h, ALIGN), _source(x, scale_x, w, ALIGN)
    first = logits + image.to(tl.int64) * stride_b
    largest = tl.full((BLOCK_X,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    own = tl.zeros((BLOCK_X,), tl.float32)  # the logit of the label
    best = tl.zeros((BLOCK_X,), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = _resized(first, at_y, at_x, inside, k, K, h, w, stride_k, stride_y, stride_x)
        value = tl.where((k < K)[None, :], value, float('-inf'))
        own += tl.sum(tl.where(k[None, :] == label[:, None], value, 0.0), 1)
        top = tl.max(value, 1)
        best = tl.where(top > largest, start + tl.argmax(value, 1), best)
        higher = tl.maximum(largest, top)
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher[:, None]), 1)
        largest = higher
    normaliser = largest + tl.log(total)
    tl.store(lse + at, normaliser, mask=inside)
    loss = normaliser - own
    if class_weight is not None:
        loss *= tl.load(class_weight + label, mask=counts, other=0.0)
    block = (image * H + row) * tl.num_programs(0) + tl.program_id(0)
    tl.store(losses + block, tl.sum(tl.where(counts, loss, 0.0), 0))
    tl.store(rights + block, tl.sum((counts & (best == label)).to(tl.int32), 0))


@triton.jit
def backward_kernel(
    grad,  # scalar
    logits,  # B, K, h, w
    labels,  # B, H, W
    class_weight,  # K; None: 1
    lse,  # B, H, W
    grad_logits,  # B, K, h, w, strides of the logits
    ignored,
    scale_y,
    scale_x,
    reach_x,  # pixels of a row of the labels that may read one logit
    K,
    h,
    w,
    H,
    W,
    stride_b,
    stride_k,
    stride_y,
    stride_x,
    ALIGN: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some logits of a row and some classes. Grid: (column blocks * class blocks, h, B)."""
    blocks = tl.cdiv(w, BLOCK_X)
    y, image = tl.program_id(1), tl.program_id(2)
    x = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    k = tl.program_id(0) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    shift = 0.0 if ALIGN else 0.5
    # the pixels between the neighbours of y, and one more on each side, whichever way that is rounded
    top = tl.minimum(tl.maximum((y - 1 + shift) / scale_y - shift - 1.0, 0.0), H).to(tl.int32)
    bottom = tl.minimum((y + 1 + shift) / scale_y - shift + 3.0, H).to(tl.int32)
    top = tl.where(y == 0, 0, top)
    bottom = tl.where(y == h - 1, H, bottom)
    left = tl.minimum(tl.maximum((x - 1 + shift) / scale_x - shift - 1.0, 0.0), W).to(tl.int32)
    left = tl.where(x == 0, 0, left)
    first = logits + image.to(tl.int64) * stride_b
    found = tl.zeros((BLOCK_X, BLOCK_K), tl.float32)
    for row in range(top, bottom):
        at_y = _source(row, scale_y, h, ALIGN)
        share_y = tl.maximum(1.0 - tl.abs(at_y - y), 0.0)
        for step in range(0, reach_x):
            column = left + step
            inside = (column < W) & (x < w)
            at = (image.to(tl.int64) * H + row) * W + column
            label = tl.load(labels + at, mask=inside, other=0).to(tl.int32)
            at_x = _source(column, scale_x, w, ALIGN)
            factor = share_y * tl.maximum(1.0 - tl.abs(at_x - x), 0.0)
            counts = inside & (label != ignored)
            if class_weight is not None:
                factor *= tl.load(class_weight + label, mask=counts, other=0.0)
            value = _resized(first, at_y, at_x, inside, k, K, h, w, stride_k, stride_y, stride_x)
            normaliser = tl.load(lse + at, mask=inside, other=0.0)
            softmax = tl.exp(value - normaliser[:, None])
            slope = softmax - (k[None, :] == label[:, None]).to(tl.float32)
            found += slope * tl.where(counts, factor, 0.0)[:, None]
    found *= tl.load(grad)
    mask = (x < w)[:, None] & (k < K)[None, :]
    at = image.to(tl.int64) * stride_b + (y * stride_y + x * stride_x)[:, None] + (k * stride_k)[None, :]
    tl.store(grad_logits + at, found.to(grad_logits.dtype.element_ty), mask=mask)
