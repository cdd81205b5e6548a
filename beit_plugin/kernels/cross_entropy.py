"""Triton kernels: softmax cross-entropy of bilinearly resized logits, which exist in registers only.

Four neighbouring logits are the corners of a cell, and all pixels of the labels in the cell are interpolated between
them: a cell's corners are loaded once for its pixels. Beyond the outermost logits there is half a cell on each side,
whose corners are the same logit twice. In the backward pass a logit gathers from its four cells, which computes each
softmax four times, but needs no atomics: the same inputs give the same bits.

Legend: B batch, K classes, h w pixels of the logits, H W those of the labels. Every pointer's shape stands beside it.
S pixels of a cell at a time, SX of them in a row; X cells or logits of a row. Exponentials are to base two.
"""

import triton
import triton.language as tl

# the types of Triton's functions are wider than what they give here
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _at(place, scale, ALIGN: tl.constexpr):
    """Where a place of the resized axis lies on the old one, by PyTorch's rule, also beyond its ends."""
    return place * scale if ALIGN else (place + 0.5) * scale - 0.5


@triton.jit
def _first(cell, scale, count, ALIGN: tl.constexpr):
    """The first of `count` places of the resized axis that lies in a cell of the old one, or behind it."""
    shift = 0.0 if ALIGN else 0.5
    guess = tl.ceil((cell + shift) / scale - shift)
    guess = tl.minimum(tl.maximum(guess, 0.0), count).to(tl.int32)
    # where a place falls between two cells, rounding decides
    guess = tl.where(tl.floor(_at(guess - 1, scale, ALIGN)) >= cell, guess - 1, guess)
    guess = tl.where(tl.floor(_at(guess, scale, ALIGN)) < cell, guess + 1, guess)
    return tl.maximum(guess, 0)


@triton.jit
def _pixels(
    cell_y, cell_x, skip_y, skip_x, scale_y, scale_x, H, W,
    ALIGN: tl.constexpr, S: tl.constexpr, SX: tl.constexpr,
):  # fmt: skip
    """Some pixels of the cells: places in the image, shares of the lower and right corners, what exists (S, X)."""
    part = tl.arange(0, S)
    row = _first(cell_y, scale_y, H, ALIGN) + skip_y + part // SX
    column = (_first(cell_x, scale_x, W, ALIGN) + skip_x)[None, :] + (part % SX)[:, None]
    at_y, at_x = _at(row, scale_y, ALIGN), _at(column, scale_x, ALIGN)
    exists = ((row < H) & (tl.floor(at_y) == cell_y))[:, None] & (column < W) & (tl.floor(at_x) == cell_x[None, :])
    return row[:, None] * W + column, (at_y - cell_y)[:, None], at_x - cell_x[None, :], exists


@triton.jit
def _corner(logits, y, x, k, K, h, w, stride_y, stride_x, stride_k):
    """Logits (X, classes) of a row, by the nearest where there is none; times log2(e)."""
    y, x = tl.minimum(tl.maximum(y, 0), h - 1), tl.minimum(tl.maximum(x, 0), w - 1)
    at = y * stride_y + (x * stride_x)[:, None] + (k * stride_k)[None, :]
    return tl.load(logits + at, mask=(k < K)[None, :], other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _value(logits, cell_y, cell_x, down, right, k, K, h, w, stride_y, stride_x, stride_k):
    """Resized logits (S, X, classes), times log2(e)."""
    a = _corner(logits, cell_y, cell_x, k, K, h, w, stride_y, stride_x, stride_k)
    b = _corner(logits, cell_y, cell_x + 1, k, K, h, w, stride_y, stride_x, stride_k)
    c = _corner(logits, cell_y + 1, cell_x, k, K, h, w, stride_y, stride_x, stride_k)
    d = _corner(logits, cell_y + 1, cell_x + 1, k, K, h, w, stride_y, stride_x, stride_k)
    right, down = right[:, :, None], down[:, :, None]
    above = a[None, :, :] + right * (b - a)[None, :, :]
    slope = (c - a)[None, :, :] + right * ((d - c) - (b - a))[None, :, :]
    return above + down * slope


@triton.jit
def forward_kernel(
    logits,  # B, K, h, w
    labels,  # B, H, W
    class_weight,  # K; None: 1
    lse,  # B, H, W: log of the sum of exponentials
    losses,  # B, grid rows, grid columns: sums over the program's pixels
    rights,  # B, grid rows, grid columns: pixels whose largest logit is that of their label
    ignored,
    scale_y,
    scale_x,
    chunks_y,  # programs for the pixels of a cell
    chunks_x,
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
    S: tl.constexpr,
    SX: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some pixels of some cells of a row. Grid: (blocks of w + 1 cells * chunks_x, (h + 1) * chunks_y, B)."""
    image = tl.program_id(2).to(tl.int64)
    cell_x = tl.program_id(0) // chunks_x * BLOCK_X - 1 + tl.arange(0, BLOCK_X)
    cell_y = tl.program_id(1) // chunks_y - 1
    skip_y, skip_x = tl.program_id(1) % chunks_y * (S // SX), tl.program_id(0) % chunks_x * SX
    at, down, right, exists = _pixels(cell_y, cell_x, skip_y, skip_x, scale_y, scale_x, H, W, ALIGN, S, SX)
    at += image * H * W
    label = tl.load(labels + at, mask=exists, other=ignored).to(tl.int32)
    counts = exists & (label != ignored)
    wrong = counts & ((label < 0) | (label >= K))  # no class: nothing is read for them, and their loss is NaN
    counts &= (label >= 0) & (label < K)
    label = tl.where(counts, label, 0)
    first = logits + image * stride_b
    # each thread goes through its own classes; all meet at the end
    largest = tl.full((S, BLOCK_X, BLOCK_K), -1e38, tl.float32)
    total = tl.zeros((S, BLOCK_X, BLOCK_K), tl.float32)
    own = tl.zeros((S, BLOCK_X, BLOCK_K), tl.float32)  # the logit of the label
    best = tl.zeros((S, BLOCK_X, BLOCK_K), tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = _value(first, cell_y, cell_x, down, right, k, K, h, w, stride_y, stride_x, stride_k)
        value = tl.where((k < K)[None, None, :], value, -1e38)
        own += tl.where(k[None, None, :] == label[:, :, None], value, 0.0)
        best = tl.where(value > largest, k[None, None, :], best)
        higher = tl.maximum(largest, value)
        total = total * tl.exp2(largest - higher) + tl.exp2(value - higher)
        largest = higher
    top = tl.max(largest, 2)
    choice = tl.min(tl.where(largest == top[:, :, None], best, K), 2)  # of equal ones the first
    normaliser = top + tl.log2(tl.sum(total * tl.exp2(largest - top[:, :, None]), 2))
    tl.store(lse + at, normaliser / LOG2E, mask=exists)
    loss = (normaliser - tl.sum(own, 2)) / LOG2E
    if class_weight is not None:
        loss *= tl.load(class_weight + label, mask=counts, other=0.0)
    program = (image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    loss = tl.where(wrong, float('nan'), tl.where(counts, loss, 0.0))
    tl.store(losses + program, tl.sum(tl.sum(loss, 0), 0))
    tl.store(rights + program, tl.sum(tl.sum((counts & (choice == label)).to(tl.int32), 0), 0))


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
    chunks_y,  # parts that the pixels of a cell are gone through in
    chunks_x,
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
    S: tl.constexpr,
    SX: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Some logits of a row and some classes. Grid: (class blocks * column blocks, h, B)."""
    y, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    class_blocks = tl.cdiv(K, BLOCK_K)
    x = tl.program_id(0) // class_blocks * BLOCK_X + tl.arange(0, BLOCK_X)
    k = tl.program_id(0) % class_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    first = logits + image * stride_b
    found = tl.zeros((BLOCK_X, BLOCK_K), tl.float32)
    for corner in range(0, 4):  # of the cells, that the logits are
        above, left = 1 - corner // 2, 1 - corner % 2
        cell_y, cell_x = y - above, x - left
        for chunk in range(0, chunks_y * chunks_x):
            skip_y, skip_x = chunk // chunks_x * (S // SX), chunk % chunks_x * SX
            at, down, right, exists = _pixels(cell_y, cell_x, skip_y, skip_x, scale_y, scale_x, H, W, ALIGN, S, SX)
            at += image * H * W
            label = tl.load(labels + at, mask=exists, other=ignored).to(tl.int32)
            counts = exists & (label != ignored) & (label >= 0) & (label < K)
            share_y = tl.where(above == 1, down, 1.0 - down)
            share_y = tl.where((cell_y < 0) | (cell_y == h - 1), 1.0, share_y)
            share_x = tl.where(left == 1, right, 1.0 - right)
            share_x = tl.where(((cell_x < 0) | (cell_x == w - 1))[None, :], 1.0, share_x)
            factor = tl.where(counts, share_y * share_x, 0.0)
            if class_weight is not None:
                factor *= tl.load(class_weight + label, mask=counts, other=0.0)
            normaliser = tl.load(lse + at, mask=exists, other=float('inf')) * LOG2E
            value = _value(first, cell_y, cell_x, down, right, k, K, h, w, stride_y, stride_x, stride_k)
            slope = tl.exp2(value - normaliser[:, :, None])
            slope -= (k[None, None, :] == label[:, :, None]).to(tl.float32)
            found += tl.sum(slope * factor[:, :, None], 0)
    found *= tl.load(grad)
    mask = (x < w)[:, None] & (k < K)[None, :]
    at = image * stride_b + y * stride_y + (x * stride_x)[:, None] + (k * stride_k)[None, :]
    tl.store(grad_logits + at, found.to(grad_logits.dtype.element_ty), mask=mask)
