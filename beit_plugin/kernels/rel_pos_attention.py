"""Triton kernels: attention with a learned relative position bias, forward and backward.

softmax(scale * q k^T + bias) v, where the bias of head K for query m and key n is one row of a table
(``models/relative_position.py``). Online softmax as FlashAttention-2 (arXiv:2307.08691). What is added: the bias is
never laid out for pairs of tokens, each score fetches its own from the table, which stays in the first cache; and the
gradient of the bias is summed over the batch and along the diagonals in registers, without atomics: the same inputs
give the same bits.

Order: here a token's number counts the patches row by row and then [CLS], so that two neighbours from an even number on
are in the same row of an even grid. A block of tokens beyond the last one reads [CLS] or the first patch again.

The table is lengthened (``table_kernel``) so that one subtraction finds the row of any pair of tokens, ``place of the
query - place of the key``: patch and patch meet in the table itself, and [CLS] or padding on either side have a stretch
of equal values each. Per head, with S = (h-1)*(2w-1) + w places of patches, 7*S rows:

    rows            query    key             rows            query    key
    0 .. 2S-2       patch    patch           4S-1 .. 5S-2    [CLS]    patch
    2S-1 .. 3S-2    patch    [CLS]           6S-2            [CLS]    [CLS]
    3S-1 .. 4S-2    patch    padding: -inf   7S-2            [CLS]    padding: -inf

A row has the values of two neighbours, which one load of 8 bytes fetches: those of keys n and n+1 in the first copy of
the table, those of queries m and m+1 in the second. On a grid of odd width each value is fetched by itself.

Layout: the fused projection qkv (B, N, 3, K, D) is read and its gradient written in place of three tensors; the output
is (B, N, K, D), so that neither side needs a copy. Scores are in units of log2(e), for the hardware has exp2.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1), V tokens and
padding up to a multiple of every block. Every pointer's shape stands beside it.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# (constants and tensors of a kernel are not what the types of Triton's functions say)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
PAIR_BYTES, FLOAT_BYTES = tl.constexpr(8), tl.constexpr(4)


@triton.jit
def _rows(base, index, stride, N, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of tokens (len(index), BLOCK_D), zero beyond D."""
    d = tl.arange(0, BLOCK_D)
    token = tl.where(index < N - P, index + P, 0)  # no mask: the bias or the statistics of padding make it count 0
    at = base + (token[:, None] * stride + d[None, :])
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=d[None, :] < D, other=0.0)


@triton.jit
def _store_rows(base, index, stride, value, N, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    token = tl.where(index < N - P, index + P, 0)
    at = base + (token[:, None] * stride + d[None, :])
    tl.store(at, value.to(base.dtype.element_ty), mask=(index[:, None] < N) & (d[None, :] < D))


# The four functions below load by assembly, in the layout in which the matrix units hold the scores: Triton would load
# in another one and exchange through shared memory. A thread holds neighbouring columns in pairs, hence pack=2.


@triton.jit
def _load_offsets(offsets, OF_PAIR: tl.constexpr, index, part: tl.constexpr, DIRECT: tl.constexpr):
    """Where tokens stand, or with ``OF_PAIR`` where that one of each pair stands whose number is ``part``."""
    if DIRECT:
        return tl.inline_asm_elementwise(
            'ld.global.nc.v2.b32 {$0, $1}, [$2];', '=r,=r,l,l', [offsets + index], dtype=tl.int32, is_pure=True, pack=2
        )
    return tl.load(offsets + (index // 2 * 2 + part if OF_PAIR else index))


@triton.jit
def _load_stats(stats, index, DIRECT: tl.constexpr):
    """Two numbers of each row."""
    if DIRECT:
        return tl.inline_asm_elementwise(
            'ld.global.nc.v4.f32 {$0, $2, $1, $3}, [$4];', '=f,=f,=f,=f,l,l', [stats + 2 * index],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    return tl.load(stats + 2 * index), tl.load(stats + 2 * index + 1)


@triton.jit
def _bias_by_key(places, query, offsets, n, PAIR: tl.constexpr, DIRECT: tl.constexpr):
    """Bias of queries, given their offsets (BLOCK_M,), and the keys n (BLOCK_N,)."""
    key = _load_offsets(offsets, PAIR and not DIRECT, n, 0, DIRECT)
    at = (places + query // FLOAT_BYTES)[:, None]
    if not DIRECT:
        return tl.load(at - key[None, :] // FLOAT_BYTES + (n[None, :] % 2 if PAIR else 0))
    if PAIR:
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 a;
            cvt.u64.u32 a, $4; sub.s64 a, $2, a;
            ld.global.nc.v2.f32 {$0, $1}, [a];
            }""",
            '=f,=f,l,l,r,r', [at, key[None, :]], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{
        .reg .b64 a;
        cvt.u64.u32 a, $2; sub.s64 a, $1, a;
        ld.global.nc.f32 $0, [a];
        }""",
        '=f,l,r', [at, key[None, :]], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _bias_by_query(places, key, offsets, m, PAIR: tl.constexpr, DIRECT: tl.constexpr):
    """Bias of keys, given their offsets (BLOCK_N,), and the queries m (BLOCK_M,); transposed."""
    query = _load_offsets(offsets, PAIR and not DIRECT, m, 1, DIRECT)
    at = (places - key // FLOAT_BYTES)[:, None]
    if not DIRECT:
        return tl.load(at + query[None, :] // FLOAT_BYTES + (m[None, :] % 2 if PAIR else 0))
    if PAIR:
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 a;
            cvt.u64.u32 a, $5; add.s64 a, $2, a;
            ld.global.nc.v2.f32 {$0, $1}, [a];
            }""",
            '=f,=f,l,l,r,r', [at, query[None, :]], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{
        .reg .b64 a;
        cvt.u64.u32 a, $2; add.s64 a, $1, a;
        ld.global.nc.f32 $0, [a];
        }""",
        '=f,l,r', [at, query[None, :]], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _value(table, row, head, S, R, K):
    """The value of a row of the lengthened table."""
    source = tl.minimum(tl.maximum(row, 0), R - 1)
    source = tl.where(row >= 2 * S - 1, R - 2, source)
    source = tl.where(row >= 4 * S - 1, R - 3, source)
    source = tl.where(row >= 6 * S - 2, R - 1, source)
    value = tl.load(table + source * K + head).to(tl.float32) * LOG2E
    padding = ((row >= 3 * S - 1) & (row < 4 * S - 1)) | (row >= 7 * S - 2)
    return tl.where(padding, float('-inf'), value)


@triton.jit(do_not_specialize=['N', 'w', 'S', 'R', 'V'])
def table_kernel(
    table,  # R, K
    places,  # 2, K, 7*S, 2: log2(e) * bias
    offsets,  # 2, V: of the keys and of the queries 8 * (2*S + place): in bytes, without a sign
    N,
    w,
    S,
    R,
    V,
    K,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lengthens the table, and numbers the places. Grid: (blocks of 7*S or V, K + 1, 2)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    by_query = tl.program_id(2)
    if head < K:
        value = _value(table, row, head, S, R, K)
        before = _value(table, row - 1, head, S, R, K)
        # [CLS] is the last key: its neighbour is padding
        last = ((row >= 2 * S - 1) & (row < 4 * S - 1)) | (row >= 6 * S - 2)
        after = tl.where(last, float('-inf'), before)
        at = places + ((by_query * K + head) * 7 * S + row) * 2
        tl.store(at, tl.where(by_query == 1, before, value), mask=row < 7 * S)
        tl.store(at + 1, tl.where(by_query == 1, value, after), mask=row < 7 * S)
    else:
        place = row + (w - 1) * (row // w)
        if by_query == 1:
            place = tl.where(row < N - P, place + S - 1, tl.where(row < N, 5 * S - 2, 5 * S - 1))
        else:
            place = tl.where(row < N - P, place, tl.where(row < N, -S, -2 * S))
        place += 2 * S  # so that none is negative
        tl.store(offsets + by_query * V + row, place * PAIR_BYTES, mask=row < V)


@triton.jit(do_not_specialize=['N', 'S', 'V'])
def forward_kernel(
    qkv,  # B, N, 3, K, D
    places,  # 2, K, 7*S, 2
    offsets,  # 2, V
    out,  # B, N, K, D
    lse,  # B, K, N: log2 of the sum of exp2 of the scores
    scale,
    N,
    K,
    S,
    V,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIR: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of queries of one head and image. Grid: (query blocks, K, B)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    base = qkv + b * stride_b + head * D
    q = _rows(base, m, stride_n, N, P, D, BLOCK_D)  # BLOCK_M, D
    places += head * 14 * S
    query = tl.load(offsets + V + m)
    highest = tl.full((BLOCK_M,), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        bias = _bias_by_key(places, query, offsets, n, PAIR, DIRECT)
        k = _rows(base + K * D, n, stride_n, N, P, D, BLOCK_D)  # BLOCK_N, D
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(base + 2 * K * D, n, stride_n, N, P, D, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision='ieee')
        highest = new
    at_out = out + b * N * K * D + head * D
    _store_rows(at_out, m, K * D, acc / total[:, None], N, P, D, BLOCK_D)
    tl.store(lse + (b * K + head) * N + m, highest + tl.log2(total), mask=m < N)


@triton.jit
def _store_cls(at, key, q, do, at_bias, normal, subtract, scale, m, N, K, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of the gradient of the bias of queries m with the key [CLS], which memory has first: see grad_q_kernel."""
    d = tl.arange(0, BLOCK_D)
    k = tl.load(key + d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(key + K * D + d, mask=d < D, other=0.0).to(tl.float32)
    scores = tl.sum(q.to(tl.float32) * k[None, :], 1) * (scale * LOG2E) + tl.load(at_bias)
    grad_weights = tl.sum(do.to(tl.float32) * v[None, :], 1)
    grad_scores = tl.exp2(scores - normal) * (grad_weights - subtract)
    tl.store(at, tl.sum(tl.where(m < N - 1, grad_scores, 0.0), 0))
    tl.store(at + 1, tl.sum(tl.where(m == N - 1, grad_scores, 0.0), 0))


@triton.jit(do_not_specialize=['N', 'S', 'V'])
def grad_q_kernel(
    qkv,  # B, N, 3, K, D
    places,  # 2, K, 7*S, 2
    offsets,  # 2, V
    out,  # B, N, K, D
    grad,  # B, N, K, D
    lse,  # B, K, N
    stats,  # B, K, V, 2: written, lse and the sum over D of out * grad, which the gradient of a softmax subtracts
    grad_qkv,  # B, N, 3, K, D contiguous; the part of q is written
    cls,  # K, B, query blocks, 2: written, sums of the gradient of the bias of the key [CLS]: of patches, and of [CLS]
    scale,
    N,
    K,
    S,
    V,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIR: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of queries. Grid: (query blocks, K, B)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at_b = b * N * K * D + head * D
    base = qkv + b * stride_b + head * D
    q = _rows(base, m, stride_n, N, P, D, BLOCK_D)  # BLOCK_M, D
    do = _rows(grad + at_b, m, K * D, N, P, D, BLOCK_D)
    o = _rows(out + at_b, m, K * D, N, P, D, BLOCK_D)
    subtract = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    # queries beyond N get the weight exp2(-inf) = 0
    normal = tl.load(lse + (b * K + head) * N + m, mask=m < N, other=float('inf'))
    at_stats = stats + ((b * K + head) * V + m) * 2
    tl.store(at_stats, normal)
    tl.store(at_stats + 1, subtract)
    places += head * 14 * S
    query = tl.load(offsets + V + m)
    if P:
        at_cls = cls + ((head * tl.num_programs(2) + b) * tl.num_programs(0) + tl.program_id(0)) * 2
        at_bias = places + (query - tl.load(offsets + N - 1)) // FLOAT_BYTES
        _store_cls(at_cls, base + K * D, q, do, at_bias, normal, subtract, scale, m, N, K, D, BLOCK_D)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        bias = _bias_by_key(places, query, offsets, n, PAIR, DIRECT)
        k = _rows(base + K * D, n, stride_n, N, P, D, BLOCK_D)  # BLOCK_N, D
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        weights = tl.exp2(scores - normal[:, None])
        v = _rows(base + 2 * K * D, n, stride_n, N, P, D, BLOCK_D)
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        grad_scores = weights * (grad_weights - subtract[:, None])
        grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision='ieee')
    _store_rows(grad_qkv + b * N * 3 * K * D + head * D, m, 3 * K * D, grad_q * scale, N, P, D, BLOCK_D)


@triton.jit(do_not_specialize=['N', 'S', 'V'])
def grad_kv_kernel(
    qkv,  # B, N, 3, K, D
    places,  # 2, K, 7*S, 2
    offsets,  # 2, V
    grad,  # B, N, K, D
    stats,  # B, K, V, 2
    grad_qkv,  # B, N, 3, K, D contiguous; the parts of k and v are written
    scale,
    N,
    K,
    S,
    V,
    stride_b,
    stride_n,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIR: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """One block of keys and values. Grid: (key blocks, K, B)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    base = qkv + b * stride_b + head * D
    k = _rows(base + K * D, n, stride_n, N, P, D, BLOCK_D)  # BLOCK_N, D
    v = _rows(base + 2 * K * D, n, stride_n, N, P, D, BLOCK_D)
    grad_base = grad + b * N * K * D + head * D
    stats += (b * K + head) * V * 2
    places += head * 14 * S
    if PAIR:
        places += K * 14 * S
    key = tl.load(offsets + n)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        bias = _bias_by_query(places, key, offsets + V, m, PAIR, DIRECT)
        normal, subtract = _load_stats(stats, m, DIRECT)
        q = _rows(base, m, stride_n, N, P, D, BLOCK_D)  # BLOCK_M, D
        scores = tl.dot(k, tl.trans(q), input_precision='ieee') * (scale * LOG2E) + bias  # BLOCK_N, BLOCK_M
        weights = tl.exp2(scores - normal[None, :])
        do = _rows(grad_base, m, K * D, N, P, D, BLOCK_D)
        grad_weights = tl.dot(v, tl.trans(do), input_precision='ieee')
        grad_v = tl.dot(weights.to(do.dtype), do, grad_v, input_precision='ieee')
        grad_scores = weights * (grad_weights - subtract[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision='ieee')
    at = grad_qkv + b * N * 3 * K * D + head * D
    _store_rows(at + K * D, n, 3 * K * D, grad_k * scale, N, P, D, BLOCK_D)
    _store_rows(at + 2 * K * D, n, 3 * K * D, grad_v, N, P, D, BLOCK_D)


@triton.jit
def _folded_rows(m, columns, period):
    """Where rows of the folded gradient of the bias begin."""
    m = m.to(tl.int64)
    return tl.where(m < period, m * columns, period.to(tl.int64) * columns + (m - period) * period)


@triton.jit(do_not_specialize=['B', 'N', 'S', 'V', 'splits'])
def grad_bias_kernel(
    qkv,  # B, N, 3, K, D
    places,  # 2, K, 7*S, 2
    offsets,  # 2, V
    grad,  # B, N, K, D
    stats,  # B, K, V, 2
    folded,  # splits, K, stride_head: see below
    scale,
    B,
    N,
    K,
    S,
    V,
    stride_b,
    stride_n,
    stride_head,
    columns,  # patches, padded
    period,
    splits,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIR: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """The gradient of one tile of the bias of patches, summed over the images and over all tiles with the same bias.

    Pairs of patches have the same bias if both are moved by the same number of whole rows of the grid. ``period`` is a
    multiple of the width and of both sides of a tile, so a tile moved by periods along the diagonal is a tile again.
    Only the first of each diagonal is kept: of the bias of M = h*w patches with each other its first ``period`` rows,
    (period, columns), and behind them the first ``period`` columns of the other rows, (M - period, period). A period of
    M or more keeps all.

    Grid: (tiles that are kept, K * splits). ``splits`` programs share the tiles of a diagonal and their images.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1) % K
    split = tl.program_id(1) // K
    patches = N - P
    tiles_m, tiles_n = tl.cdiv(patches, BLOCK_M), tl.cdiv(patches, BLOCK_N)
    period_m, period_n = period // BLOCK_M, period // BLOCK_N
    below = tile - period_m * tiles_n
    row = tl.where(below < 0, tile // tiles_n, period_m + below // period_n)
    column = tl.where(below < 0, tile % tiles_n, below % period_n)
    moves = tl.minimum((tiles_m - 1 - row) // period_m, (tiles_n - 1 - column) // period_n)
    each = tl.cdiv((moves + 1) * B, splits)
    first_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = _bias_by_key(places + head * 14 * S, tl.load(offsets + V + first_m), offsets, first_n, PAIR, DIRECT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(split * each, tl.minimum((split + 1) * each, (moves + 1) * B)):
        b = (i % B).to(tl.int64)
        m = first_m + i // B * period
        n = first_n + i // B * period
        base = qkv + b * stride_b + head * D
        at_stats = stats + ((b * K + head) * V + m) * 2
        # [CLS] and padding as queries get the weight exp2(-inf) = 0; as keys they are left out below
        normal = tl.load(at_stats, mask=m < patches, other=float('inf'))
        subtract = tl.load(at_stats + 1, mask=m < patches, other=0.0)
        q = _rows(base, m, stride_n, N, P, D, BLOCK_D)
        k = _rows(base + K * D, n, stride_n, N, P, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision='ieee') * (scale * LOG2E) + bias
        weights = tl.exp2(scores - normal[:, None])
        do = _rows(grad + b * N * K * D + head * D, m, K * D, N, P, D, BLOCK_D)
        v = _rows(base + 2 * K * D, n, stride_n, N, P, D, BLOCK_D)
        grad_weights = tl.dot(do, tl.trans(v), input_precision='ieee')
        acc += tl.where(n[None, :] < patches, weights * (grad_weights - subtract[:, None]), 0.0)
    at = folded + (split * K + head).to(tl.int64) * stride_head
    at += _folded_rows(first_m, columns, period)[:, None] + first_n[None, :]
    tl.store(at, acc.to(folded.dtype.element_ty), mask=(first_m[:, None] < patches) & (first_n[None, :] < patches))


@triton.jit(do_not_specialize=['splits', 'w', 'h'])
def table_sums_kernel(
    folded,  # splits, K, stride_head: see grad_bias_kernel
    cls,  # K, num_cls, 2: see grad_q_kernel
    grad_table,  # R, K
    splits,
    num_cls,
    K,
    h,
    w,
    stride_head,
    columns,
    period,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the pairs of patches that are equally far from each other, and the pairs with [CLS].

    Grid: (2*h - 1 vertical offsets and one more for [CLS], blocks of horizontal offsets, K).
    """
    program = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    width = 2 * w - 1
    if program < 2 * h - 1:
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        dy, dx = program - (h - 1), o - (w - 1)
        top = tl.maximum(dy, 0)
        rows = tl.minimum(tl.minimum(h, h + dy) - top, period // w)  # of the grid, of queries
        acc = tl.zeros((BLOCK_O,), tl.float32)
        base = folded + head * stride_head
        for _ in range(0, splits):
            for start in range(top * w, (top + rows) * w, BLOCK_R):
                m = start + tl.arange(0, BLOCK_R)
                key = (m % w)[:, None] - dx[None, :]  # column of the grid
                inside = (m < (top + rows) * w)[:, None] & (key >= 0) & (key < w)
                n = (m - dy * w)[:, None] - dx[None, :]
                at = base + _folded_rows(m, columns, period)[:, None] + n
                acc += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)
            base += K * stride_head
        at = grad_table + (program * width + o) * K + head
        tl.store(at, acc.to(grad_table.dtype.element_ty), mask=o < width)
    elif tl.program_id(1) == 0:
        by_patches = tl.zeros((BLOCK,), tl.float32)
        by_cls = tl.zeros((BLOCK,), tl.float32)
        if P:
            for start in range(0, num_cls, BLOCK):
                i = start + tl.arange(0, BLOCK)
                at = cls + (head * num_cls + i) * 2
                by_patches += tl.load(at, mask=i < num_cls, other=0.0)
                by_cls += tl.load(at + 1, mask=i < num_cls, other=0.0)
        both = tl.sum(by_cls)
        at = grad_table + (2 * h - 1) * width * K + head
        # the gradients of the scores of a query have the sum 0: what the patches get [CLS] loses
        tl.store(at, (-both).to(grad_table.dtype.element_ty))
        tl.store(at + K, tl.sum(by_patches).to(grad_table.dtype.element_ty))
        tl.store(at + 2 * K, both.to(grad_table.dtype.element_ty))
