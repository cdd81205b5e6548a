"""Triton kernels: layer scale, stochastic depth, residual sum and LayerNorm in one pass, forward and backward.

sum = x + keep * gamma * y, normed = LayerNorm(sum). What a launch leaves out is None, and costs nothing: no y, only the
norm; no norm, only the sum. Arithmetic is float32; the sum is rounded once, and the norm reads the rounded sum, as the
layers after it do. The gradients of the parameters are added up by each program over its rows and then over the
programs, without atomics: the same inputs give the same bits.

Legend: B batch, N tokens, C channels, R = B*N rows. Every pointer's shape stands beside it.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=('R', 'N'))
def forward_kernel(
    x,  # R, C
    y,  # R, C; None: nothing is added
    gamma,  # C; None: 1
    keep,  # B; None: 1
    weight,  # C; None: no norm
    bias,  # C; None: no norm
    total,  # R, C: the sum; None without y
    normed,  # R, C; None: no norm
    stats,  # 2, R: mean and 1 / standard deviation; None: no norm
    R,
    N,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Some rows. Grid: (row blocks,)."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    in_r, in_c = row < R, c < C
    inside = in_r[:, None] & in_c[None, :]
    at = row[:, None].to(tl.int64) * C + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # BLOCK_R, BLOCK_C
    if normed is not None:  # now, for after the sums over the channels it would be waited for
        scale = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)
        shift = tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if gamma is not None:
            branch *= tl.load(gamma + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
        if keep is not None:
            branch *= tl.load(keep + row // N, mask=in_r, other=0.0)[:, None]
        rounded = (value + branch).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if normed is not None:
        mean = tl.sum(value, 1) / C
        centred = tl.where(in_c[None, :], value - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        out = centred * rstd[:, None] * scale[None, :] + shift[None, :]
        tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)
        tl.store(stats + row, mean, mask=in_r)
        tl.store(stats + R + row, rstd, mask=in_r)


@triton.jit(do_not_specialize=('R', 'N'))
def backward_kernel(
    grad_total,  # R, C; None: 0
    grad_normed,  # R, C; None: no norm
    total,  # R, C: what was normalised; None: no norm
    stats,  # 2, R; None: no norm
    weight,  # C; None: no norm
    y,  # R, C; None: the gradient of gamma is not wanted
    gamma,  # C; None: 1
    keep,  # B; None: 1
    grad_x,  # R, C; None: not wanted
    grad_y,  # R, C; None: not wanted
    partials,  # 3, programs, C: this program's part of the gradients of gamma, weight and bias; None: not wanted
    R,
    N,
    AFFINE: tl.constexpr,  # the gradients of weight and bias are wanted
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every so many rows, for the parameters' gradients are added up in registers. Grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)
    in_c = c < C
    if grad_normed is not None:
        scale = tl.load(weight + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if grad_y is not None and gamma is not None:
        factor = tl.load(gamma + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    gamma_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    weight_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(program * BLOCK_R, R, programs * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_r = row < R
        inside = in_r[:, None] & in_c[None, :]
        at = row[:, None].to(tl.int64) * C + c[None, :]
        grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)  # of the sum
        if grad_total is not None:
            grad = tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
        if y is not None:  # all loads come first: after the sums over the channels they would be waited for
            branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if keep is not None:
            kept = tl.load(keep + row // N, mask=in_r, other=0.0)[:, None]
        if grad_normed is not None:
            grad_out = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(stats + row, mask=in_r, other=0.0)[:, None]
            rstd = tl.load(stats + R + row, mask=in_r, other=0.0)[:, None]
            standard = (tl.load(total + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            scaled = grad_out * scale  # 0 outside, whatever the mean is there
            slope = tl.sum(scaled * standard, 1) / C
            offset = tl.sum(scaled, 1) / C
            grad += (scaled - offset[:, None] - standard * slope[:, None]) * rstd
            if AFFINE:
                weight_sum += grad_out * standard
                bias_sum += grad_out
        if grad_x is not None:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if keep is not None:
            grad *= kept
        if y is not None:
            gamma_sum += grad * branch
        if grad_y is not None:
            if gamma is not None:
                grad *= factor
            tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=inside)
    place = program * C + c
    if y is not None:
        tl.store(partials + place, tl.sum(gamma_sum, 0), mask=in_c)
    if AFFINE:
        tl.store(partials + programs * C + place, tl.sum(weight_sum, 0), mask=in_c)
        tl.store(partials + 2 * programs * C + place, tl.sum(bias_sum, 0), mask=in_c)


@triton.jit
def sums_kernel(
    partials,  # 3, programs, C
    grad_gamma,  # C; None: not wanted
    grad_weight,  # C; None: not wanted
    grad_bias,  # C; None: not wanted
    programs,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds up what the programs found. Grid: (channel blocks, how many gradients are wanted)."""
    part = tl.program_id(1)
    if grad_gamma is None:
        part += 1
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, programs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = (part * programs + p[:, None]) * C + c[None, :]
        acc += tl.load(partials + at, mask=(p[:, None] < programs) & in_c[None, :], other=0.0)
    total = tl.sum(acc, 0)
    if grad_gamma is not None:
        if part == 0:
            tl.store(grad_gamma + c, total.to(grad_gamma.dtype.element_ty), mask=in_c)
    if grad_weight is not None:
        if part == 1:
            tl.store(grad_weight + c, total.to(grad_weight.dtype.element_ty), mask=in_c)
        if part == 2:
            tl.store(grad_bias + c, total.to(grad_bias.dtype.element_ty), mask=in_c)
