"""Triton kernels: attention with a learned relative position bias, forward and backward.

softmax(scale * q k^T + bias) v, where the bias of head K for query m and key n is one row of a table:
``table[place(m) - place(n) + centre]`` for two patches of the grid, and one of the last three rows where [CLS] takes
part (``models/relative_position.py``). Online softmax as FlashAttention-2 (arXiv:2307.08691); what is added is the bias
and its gradient, which is summed over the batch in registers and then along the diagonals, without atomics: the same
inputs give the same bits.

Layout: the fused projection qkv (B, N, 3, K, D) is read and its gradient written in place of three tensors; the output
is (B, N, K, D), so that neither side needs a copy. Scores are in units of log2(e), for the hardware has exp2.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1).
Every pointer's shape stands beside it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _table_rows(m, n, w, centre, last, P: tl.constexpr):
    """Row of the table for each pair of a query m and a key n, which broadcast against each other."""
    m_patch = m - P
    n_patch = n - P
    m_place = (m_patch // w) * (2 * w - 1) + m_patch % w
    n_place = (n_patch // w) * (2 * w - 1) + n_patch % w
    rows = m_place - n_place + centre
    if P:
        rows = tl.where(m == 0, last - 2, rows)
        rows = tl.where(n == 0, tl.where(m == 0, last, last - 1), rows)
    return rows


@triton.jit
def bias_kernel(
    table,  # K, R
    bias,  # K, N, N padded to a multiple of BLOCK_N: log2(e) * bias, -inf in the padding
    N,
    w,
    centre,
    last,
    stride_table,
    stride_head,
    stride_row,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Lays the table out for every pair of tokens. Grid: (key blocks, query blocks, K)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2)
    inside = (m[:, None] < N) & (n[None, :] < N)
    rows = _table_rows(m[:, None], n[None, :], w, centre, last, P)
    value = tl.load(table + head * stride_table + rows, mask=inside, other=0.0).to(tl.float32) * LOG2E
    value = tl.where(n[None, :] < N, value, float('-inf'))
    place = bias + head.to(tl.int64) * stride_head + m[:, None].to(tl.int64) * stride_row + n[None, :]
    tl.store(place, value.to(bias.dtype.element_ty), mask=m[:, None] < N)


@triton.jit
def forward_kernel(
    qkv,  # B, N, 3, K, D
    bias,  # K, N, N padded
    out,  # B, N, K, D
    lse,  # B, K, N: log2 of the sum of exp2 of the scores
    scale,
    N,
    K,
    stride_qkv_b,
    stride_qkv_n,
    stride_head,
    stride_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head and image. Grid: (B, query blocks, K): images that share a bias run together."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d[None, :] < D
    base = qkv + b * stride_qkv_b + head * D
    in_m = m[:, None] < N
    q = tl.load(base + m[:, None].to(tl.int64) * stride_qkv_n + d[None, :], mask=in_m & in_d, other=0.0)  # BLOCK_M, D
    row_bias = bias + head * stride_head + m[:, None].to(tl.int64) * stride_row
    highest = tl.full((BLOCK_M,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at_n = base + n[:, None].to(tl.int64) * stride_qkv_n + d[None, :]
        in_n = (n[:, None] < N) & in_d
        k = tl.load(at_n + K * D, mask=in_n, other=0.0)  # BLOCK_N, D
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E)
        scores += tl.load(row_bias + n[None, :], mask=in_m, other=0.0).to(tl.float32)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(at_n + 2 * K * D, mask=in_n, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision='ieee')
        highest = new
    acc = acc / total[:, None]
    at_out = out + (b * N + m[:, None]) * (K * D) + head * D + d[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=in_m & in_d)
    tl.store(lse + (b * K + head) * N + m, highest + tl.log2(total), mask=m < N)


@triton.jit
def delta_kernel(
    out,  # B, N, K, D
    grad,  # B, N, K, D
    delta,  # B, K, N: sum over D of out * grad
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What the softmax's gradient subtracts. Grid: (query blocks, K, B)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = (b * N + m[:, None]) * (K * D) + head * D + d[None, :]
    inside = (m[:, None] < N) & (d[None, :] < D)
    product = tl.load(out + at, mask=inside, other=0.0).to(tl.float32) * tl.load(grad + at, mask=inside, other=0.0).to(
        tl.float32
    )
    tl.store(delta + (b * K + head) * N + m, tl.sum(product, 1), mask=m < N)


@triton.jit
def grad_kv_kernel(
    qkv,  # B, N, 3, K, D
    bias,  # K, N, N padded
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N
    grad_qkv,  # B, N, 3, K, D contiguous; the parts of k and v are written
    scale,
    N,
    K,
    stride_qkv_b,
    stride_qkv_n,
    stride_head,
    stride_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys and values. Grid: (B, key blocks, K)."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d[None, :] < D
    in_n = n[:, None] < N
    base = qkv + b * stride_qkv_b + head * D
    at_n = base + n[:, None].to(tl.int64) * stride_qkv_n + d[None, :]
    k = tl.load(at_n + K * D, mask=in_n & in_d, other=0.0)  # BLOCK_N, D
    v = tl.load(at_n + 2 * K * D, mask=in_n & in_d, other=0.0)
    # keys beyond N read the padding of the bias, which is -inf, as long as it has a column for them
    column_bias = bias + head * stride_head + n[:, None]
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        in_m = m < N
        inside = in_m[:, None] & in_d
        q = tl.load(base + m[:, None].to(tl.int64) * stride_qkv_n + d[None, :], mask=inside, other=0.0)  # BLOCK_M, D
        do = tl.load(grad + (b * N + m[:, None]) * (K * D) + head * D + d[None, :], mask=inside, other=0.0)
        row = (b * K + head) * N + m
        # queries beyond N get the weight exp2(-inf) = 0
        normal = tl.load(lse + row, mask=in_m, other=float('inf'))
        scores = tl.dot(k, tl.trans(q), input_precision='ieee') * (scale * LOG2E)  # BLOCK_N, BLOCK_M
        scores += tl.load(column_bias + m[None, :].to(tl.int64) * stride_row, mask=in_m[None, :], other=0.0).to(
            tl.float32
        )
        weights = tl.exp2(scores - normal[None, :])
        grad_v += tl.dot(weights.to(do.dtype), do, input_precision='ieee')
        grad_weights = tl.dot(v, tl.trans(do), input_precision='ieee')
        grad_scores = weights * (grad_weights - tl.load(delta + row, mask=in_m, other=0.0)[None, :])
        grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision='ieee')
    at = grad_qkv + (b * N + n[:, None]) * (3 * K * D) + head * D + d[None, :]
    tl.store(at + K * D, (grad_k * scale).to(grad_qkv.dtype.element_ty), mask=in_n & in_d)
    tl.store(at + 2 * K * D, grad_v.to(grad_qkv.dtype.element_ty), mask=in_n & in_d)


@triton.jit
def grad_q_kernel(
    qkv,  # B, N, 3, K, D
    bias,  # K, N, N padded
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N
    grad_qkv,  # B, N, 3, K, D contiguous; the part of q is written
    scale,
    N,
    K,
    stride_qkv_b,
    stride_qkv_n,
    stride_head,
    stride_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries. Grid: (B, query blocks, K)."""
    b = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_d = d[None, :] < D
    in_m = m[:, None] < N
    base = qkv + b * stride_qkv_b + head * D
    q = tl.load(base + m[:, None].to(tl.int64) * stride_qkv_n + d[None, :], mask=in_m & in_d, other=0.0)  # BLOCK_M, D
    do = tl.load(grad + (b * N + m[:, None]) * (K * D) + head * D + d[None, :], mask=in_m & in_d, other=0.0)
    row = (b * K + head) * N + m
    normal = tl.load(lse + row, mask=m < N, other=float('inf'))
    subtract = tl.load(delta + row, mask=m < N, other=0.0)
    row_bias = bias + head * stride_head + m[:, None].to(tl.int64) * stride_row
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at_n = base + n[:, None].to(tl.int64) * stride_qkv_n + d[None, :]
        in_n = (n[:, None] < N) & in_d
        k = tl.load(at_n + K * D, mask=in_n, other=0.0)  # BLOCK_N, D
        v = tl.load(at_n + 2 * K * D, mask=in_n, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E)
        scores += tl.load(row_bias + n[None, :], mask=in_m, other=0.0).to(tl.float32)
        weights = tl.exp2(scores - normal[:, None])
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        grad_scores = weights * (grad_weights - subtract[:, None])
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision='ieee')
    at = grad_qkv + (b * N + m[:, None]) * (3 * K * D) + head * D + d[None, :]
    tl.store(at, (grad_q * scale).to(grad_qkv.dtype.element_ty), mask=in_m & in_d)


@triton.jit
def grad_bias_kernel(
    qkv,  # B, N, 3, K, D
    bias,  # K, N, N padded
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N
    grad_bias,  # splits of the batch, K, N, N padded; may be the bias itself: a block is read before it is written
    scale,
    B,
    N,
    K,
    stride_qkv_b,
    stride_qkv_n,
    stride_head,
    stride_row,
    stride_split,
    per_split,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of one block of the bias, summed over the images. Grid: (query blocks * key blocks, K, splits)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_m = (m[:, None] < N) & (d[None, :] < D)
    in_n = (n[:, None] < N) & (d[None, :] < D)
    at_m = m[:, None].to(tl.int64) * stride_qkv_n + d[None, :]
    at_n = n[:, None].to(tl.int64) * stride_qkv_n + d[None, :]
    at_bias = head * stride_head + m[:, None].to(tl.int64) * stride_row + n[None, :]
    tile = tl.load(bias + at_bias, mask=m[:, None] < N, other=0.0).to(tl.float32)  # BLOCK_M, BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, per_split):
        b = split * per_split + i
        # an image beyond the last one counts nothing: its queries get the weight exp2(-inf) = 0
        real = b < B
        base = qkv + b * stride_qkv_b + head * D
        q = tl.load(base + at_m, mask=in_m & real, other=0.0)
        k = tl.load(base + at_n + K * D, mask=in_n & real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + tile
        row = (b * K + head) * N + m
        normal = tl.load(lse + row, mask=(m < N) & real, other=float('inf'))
        weights = tl.exp2(scores - normal[:, None])
        v = tl.load(base + at_n + 2 * K * D, mask=in_n & real, other=0.0)
        at_grad = (b * N + m[:, None]) * (K * D) + head * D + d[None, :]
        do = tl.load(grad + at_grad, mask=in_m & real, other=0.0)
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        acc += weights * (grad_weights - tl.load(delta + row, mask=(m < N) & real, other=0.0)[:, None])
    place = grad_bias + split * stride_split + at_bias
    tl.store(place, acc.to(grad_bias.dtype.element_ty), mask=(m[:, None] < N) & (n[None, :] < N))


@triton.jit
def row_sums_kernel(
    grad_bias,  # splits, K, N, N padded
    sums,  # K, h, h, 2*w - 1: for each row of queries, row of keys and horizontal offset
    splits,
    w,
    h,
    stride_split,
    stride_head,
    stride_row,
    P: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums along the diagonals of one w x w block. Grid: (h, h, K): row of keys, row of queries, head.

    Query x and offset o meet key x - o: for one query neighbouring offsets are neighbours in memory.
    """
    key_row, query_row = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    for first in range(0, 2 * w - 1, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)  # offset + w - 1
        acc = tl.zeros((BLOCK_O,), tl.float32)
        base = grad_bias + head * stride_head
        for _ in range(0, splits):
            for start in range(0, w, BLOCK_X):
                x = start + tl.arange(0, BLOCK_X)
                key = x[:, None] - (o[None, :] - (w - 1))
                inside = (x[:, None] < w) & (key >= 0) & (key < w)
                row = (P + query_row * w + x[:, None]).to(tl.int64) * stride_row
                value = tl.load(base + row + P + key_row * w + key, mask=inside, other=0.0)
                acc += tl.sum(value.to(tl.float32), 0)
            base += stride_split
        at = ((head * h + query_row) * h + key_row) * (2 * w - 1) + o
        tl.store(sums + at, acc, mask=o < 2 * w - 1)


@triton.jit
def column_sums_kernel(
    sums,  # K, h, h, 2*w - 1
    grad_table,  # K, R
    w,
    h,
    stride_table,
    BLOCK_Y: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Sums the rows of queries and keys that are equally far apart. Grid: (2*h - 1, blocks of offsets, K)."""
    dy = tl.program_id(0) - (h - 1)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    head = tl.program_id(2).to(tl.int64)
    width = 2 * w - 1
    acc = tl.zeros((BLOCK_O,), tl.float32)
    for start in range(0, h, BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        key = y[:, None] - dy
        inside = (y[:, None] < h) & (key >= 0) & (key < h) & (o[None, :] < width)
        acc += tl.sum(
            tl.load(sums + ((head * h + y[:, None]) * h + key) * width + o[None, :], mask=inside, other=0.0), 0
        )
    tl.store(grad_table + head * stride_table + tl.program_id(0) * width + o, acc, mask=o < width)
