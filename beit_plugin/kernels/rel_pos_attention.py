"""Triton kernels: attention with a learned relative position bias, forward and backward.

softmax(scale * q k^T + bias) v, where the bias of head K for query m and key n is one row of a table
(``models/relative_position.py``). Online softmax as FlashAttention-2 (arXiv:2307.08691). What is added: the bias is
never laid out for pairs of tokens, each score fetches its own from the table, which stays in the first cache; and the
gradient of the bias is summed over the batch in registers and then along the diagonals, without atomics: the same
inputs give the same bits.

The table is lengthened so that one subtraction finds the row of any pair, ``place of the query - place of the key``:
patch and patch meet in the table itself, and [CLS] or padding on either side have a stretch of equal values each. Per
head, with S = (h-1)*(2w-1) + w places of patches:

    rows            query    key
    0 .. 2S-2       patch    patch
    2S-1 .. 3S-2    patch    [CLS]
    3S-1 .. 4S-2    patch    padding: -inf
    4S-1 .. 5S-2    [CLS]    patch
    6S-2            [CLS]    [CLS]
    7S-2            [CLS]    padding: -inf

Layout: the fused projection qkv (B, N, 3, K, D) is read and its gradient written in place of three tensors; the output
is (B, N, K, D), so that neither side needs a copy. Scores are in units of log2(e), for the hardware has exp2. Tokens
beyond the last are read as the last one, so that no load has a mask.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1).
Every pointer's shape stands beside it.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _query_places(m, N, w, magic, S, P: tl.constexpr):
    """Places of queries; ``magic`` is 2**32 / w rounded up, for a division by multiplication."""
    patch = tl.minimum(m, N - 1) - P
    place = patch + (w - 1) * tl.umulhi(patch, magic) + S - 1
    if P:
        place = tl.where(m == 0, 5 * S - 2, place)
    return place


@triton.jit
def _key_places(n, N, w, magic, S, P: tl.constexpr):
    patch = n - P
    place = patch + (w - 1) * tl.umulhi(patch, magic)
    if P:
        place = tl.where(n == 0, -S, place)
    return tl.where(n < N, place, -2 * S)


@triton.jit
def _fetch(pointers, DIRECT: tl.constexpr):
    """Loads float32 into the layout of the pointers: Triton would choose another one and exchange through memory."""
    if DIRECT:
        return tl.inline_asm_elementwise(
            'ld.global.nc.f32 $0, [$1];', '=f,l', [pointers], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.load(pointers)


@triton.jit
def _rows(base, index, stride, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of tokens (len(index), BLOCK_D), zero beyond D."""
    d = tl.arange(0, BLOCK_D)
    at = base + tl.minimum(index, N - 1)[:, None].to(tl.int64) * stride + d[None, :]
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=d[None, :] < D, other=0.0)


@triton.jit(do_not_specialize=['S', 'R'])
def table_kernel(
    table,  # R, K
    places,  # K, 7*S: log2(e) * bias
    S,
    R,
    K,
    BLOCK: tl.constexpr,
):
    """Lengthens the table. Grid: (blocks, K)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    source = tl.minimum(row, R - 1)
    source = tl.where(row >= 2 * S - 1, R - 2, source)
    source = tl.where(row >= 4 * S - 1, R - 3, source)
    source = tl.where(row >= 5 * S - 1, R - 1, source)
    value = tl.load(table + source * K + head).to(tl.float32) * LOG2E
    padding = ((row >= 3 * S - 1) & (row < 4 * S - 1)) | (row >= 6 * S - 1)
    tl.store(places + head * 7 * S + row, tl.where(padding, float('-inf'), value), mask=row < 7 * S)


@triton.jit(do_not_specialize=['N', 'w', 'magic', 'S'])
def forward_kernel(
    qkv,  # B, N, 3, K, D
    places,  # K, 7*S
    out,  # B, N, K, D
    lse,  # B, K, N: log2 of the sum of exp2 of the scores
    scale,
    N,
    K,
    w,
    magic,
    S,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of queries of one head and image. Grid: (query blocks, K, B)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    base = qkv + b * stride_b + head * D
    q = _rows(base, m, stride_n, N, D, BLOCK_D)  # BLOCK_M, D
    row_bias = places + head * 7 * S + _query_places(m, N, w, magic, S, P)
    highest = tl.full((BLOCK_M,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        bias = _fetch(row_bias[:, None] - _key_places(n, N, w, magic, S, P)[None, :], DIRECT)
        k = _rows(base + K * D, n, stride_n, N, D, BLOCK_D)  # BLOCK_N, D
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(base + 2 * K * D, n, stride_n, N, D, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision='ieee')
        highest = new
    d = tl.arange(0, BLOCK_D)
    at = out + (b * N + m[:, None]) * (K * D) + head * D + d[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m[:, None] < N) & (d[None, :] < D))
    tl.store(lse + (b * K + head) * N + m, highest + tl.log2(total), mask=m < N)


@triton.jit(do_not_specialize=['N', 'w', 'magic', 'S'])
def grad_q_kernel(
    qkv,  # B, N, 3, K, D
    places,  # K, 7*S
    out,  # B, N, K, D
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N: written, sum over D of out * grad, which the gradient of a softmax subtracts
    grad_qkv,  # B, N, 3, K, D contiguous; the part of q is written
    scale,
    N,
    K,
    w,
    magic,
    S,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of queries. Grid: (query blocks, K, B)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at_b = b * N * K * D + head * D
    base = qkv + b * stride_b + head * D
    q = _rows(base, m, stride_n, N, D, BLOCK_D)  # BLOCK_M, D
    do = _rows(grad + at_b, m, K * D, N, D, BLOCK_D)
    o = _rows(out + at_b, m, K * D, N, D, BLOCK_D)
    subtract = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at_row = (b * K + head) * N
    tl.store(delta + at_row + m, subtract, mask=m < N)
    normal = tl.load(lse + at_row + tl.minimum(m, N - 1))
    row_bias = places + head * 7 * S + _query_places(m, N, w, magic, S, P)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        bias = _fetch(row_bias[:, None] - _key_places(n, N, w, magic, S, P)[None, :], DIRECT)
        k = _rows(base + K * D, n, stride_n, N, D, BLOCK_D)  # BLOCK_N, D
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        weights = tl.exp2(scores - normal[:, None])
        v = _rows(base + 2 * K * D, n, stride_n, N, D, BLOCK_D)
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        grad_scores = weights * (grad_weights - subtract[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision='ieee')
    d = tl.arange(0, BLOCK_D)
    at = grad_qkv + (b * N + m[:, None]) * (3 * K * D) + head * D + d[None, :]
    tl.store(at, (grad_q * scale).to(grad_qkv.dtype.element_ty), mask=(m[:, None] < N) & (d[None, :] < D))


@triton.jit(do_not_specialize=['N', 'w', 'magic', 'S'])
def grad_kv_kernel(
    qkv,  # B, N, 3, K, D
    places,  # K, 7*S
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N
    grad_qkv,  # B, N, 3, K, D contiguous; the parts of k and v are written
    scale,
    N,
    K,
    w,
    magic,
    S,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of keys and values. Grid: (key blocks, K, B)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    base = qkv + b * stride_b + head * D
    k = _rows(base + K * D, n, stride_n, N, D, BLOCK_D)  # BLOCK_N, D
    v = _rows(base + 2 * K * D, n, stride_n, N, D, BLOCK_D)
    grad_base = grad + b * N * K * D + head * D
    at_row = (b * K + head) * N
    column_bias = places + head * 7 * S - _key_places(n, N, w, magic, S, P)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row = at_row + tl.minimum(m, N - 1)
        bias = _fetch(column_bias[:, None] + _query_places(m, N, w, magic, S, P)[None, :], DIRECT)
        # queries beyond N get the weight exp2(-inf) = 0
        normal = tl.where(m < N, _fetch(lse + row, DIRECT), float('inf'))
        subtract = _fetch(delta + row, DIRECT)
        q = _rows(base, m, stride_n, N, D, BLOCK_D)  # BLOCK_M, D
        scores = tl.dot(k, tl.trans(q), input_precision='ieee') * (scale * LOG2E) + bias  # BLOCK_N, BLOCK_M
        weights = tl.exp2(scores - normal[None, :])
        do = _rows(grad_base, m, K * D, N, D, BLOCK_D)
        grad_weights = tl.dot(v, tl.trans(do), input_precision='ieee')
        grad_v = tl.dot(weights.to(do.dtype), do, grad_v, input_precision='ieee')
        grad_scores = weights * (grad_weights - subtract[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision='ieee')
    d = tl.arange(0, BLOCK_D)
    inside = (n[:, None] < N) & (d[None, :] < D)
    at = grad_qkv + (b * N + n[:, None]) * (3 * K * D) + head * D + d[None, :]
    tl.store(at + K * D, (grad_k * scale).to(grad_qkv.dtype.element_ty), mask=inside)
    tl.store(at + 2 * K * D, grad_v.to(grad_qkv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['B', 'N', 'w', 'magic', 'S', 'per_split'])
def grad_bias_kernel(
    qkv,  # B, N, 3, K, D
    places,  # K, 7*S
    grad,  # B, N, K, D
    lse,  # B, K, N
    delta,  # B, K, N
    grad_bias,  # splits of the batch, K, N, N padded
    scale,
    B,
    N,
    K,
    w,
    magic,
    S,
    stride_b,
    stride_n,
    stride_split,
    stride_head,
    stride_row,
    per_split,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """The gradient of one block of the bias, summed over the images. Grid: (key blocks, query blocks, K * splits)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(2) % K
    split = (tl.program_id(2) // K).to(tl.int64)
    first = split * per_split
    at_m = tl.minimum(m, N - 1)
    row_bias = places + head * 7 * S + _query_places(m, N, w, magic, S, P)
    bias = _fetch(row_bias[:, None] - _key_places(n, N, w, magic, S, P)[None, :], DIRECT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(0, tl.minimum(per_split, B - first)):
        b = first + i
        base = qkv + b * stride_b + head * D
        grad_base = grad + b * N * K * D + head * D
        row = (b * K + head) * N + at_m
        normal = _fetch(lse + row, DIRECT)
        subtract = _fetch(delta + row, DIRECT)
        q = _rows(base, m, stride_n, N, D, BLOCK_D)
        k = _rows(base + K * D, n, stride_n, N, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        weights = tl.exp2(scores - normal[:, None])
        do = _rows(grad_base, m, K * D, N, D, BLOCK_D)
        v = _rows(base + 2 * K * D, n, stride_n, N, D, BLOCK_D)
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        acc += weights * (grad_weights - subtract[:, None])
    at = grad_bias + split * stride_split + head.to(tl.int64) * stride_head
    at += m[:, None].to(tl.int64) * stride_row + n[None, :]
    tl.store(at, acc.to(grad_bias.dtype.element_ty), mask=(m[:, None] < N) & (n[None, :] < N))


@triton.jit(do_not_specialize=['splits', 'w', 'h'])
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


@triton.jit(do_not_specialize=['splits', 'N', 'w', 'h'])
def table_sums_kernel(
    sums,  # K, h, h, 2*w - 1
    grad_bias,  # splits, K, N, N padded
    grad_table,  # R, K
    splits,
    N,
    K,
    w,
    h,
    stride_split,
    stride_head,
    stride_row,
    P: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums rows of queries and keys that are equally far apart, and the pairs with [CLS].

    Grid: (2*h - 1 and one more for [CLS], blocks of offsets, K).
    """
    program = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    width = 2 * w - 1
    if program < 2 * h - 1:
        dy = program - (h - 1)
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        acc = tl.zeros((BLOCK_O,), tl.float32)
        for start in range(0, h, BLOCK_Y):
            y = start + tl.arange(0, BLOCK_Y)
            key = y[:, None] - dy
            inside = (y[:, None] < h) & (key >= 0) & (key < h) & (o[None, :] < width)
            at = ((head * h + y[:, None]) * h + key) * width + o[None, :]
            acc += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
        at = grad_table + (program * width + o) * K + head
        tl.store(at, acc.to(grad_table.dtype.element_ty), mask=o < width)
    elif tl.program_id(1) == 0:
        row = tl.zeros((BLOCK_N,), tl.float32)
        column = tl.zeros((BLOCK_N,), tl.float32)
        both = tl.zeros((1,), tl.float32)
        if P:
            base = grad_bias + head * stride_head
            for _ in range(0, splits):
                both += tl.load(base + tl.arange(0, 1)).to(tl.float32)
                for start in range(1, N, BLOCK_N):
                    n = start + tl.arange(0, BLOCK_N)
                    row += tl.load(base + n, mask=n < N, other=0.0).to(tl.float32)
                    column += tl.load(base + n.to(tl.int64) * stride_row, mask=n < N, other=0.0).to(tl.float32)
                base += stride_split
        at = grad_table + (2 * h - 1) * width * K + head
        tl.store(at, tl.sum(row).to(grad_table.dtype.element_ty))
        tl.store(at + K, tl.sum(column).to(grad_table.dtype.element_ty))
        tl.store(at + 2 * K + tl.arange(0, 1), both.to(grad_table.dtype.element_ty))
