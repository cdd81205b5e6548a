"""Resizing of what is tied to a patch grid: relative position bias tables and absolute positions; maps, as a matrix.

(Patch kernels go through ``timm.layers.resample_patch_embed``, which does the same by least squares.)

The three rules of a bias table differ in where they put the old offsets on the new grid and how they read between them:

=============  =====================================  ============  ==========================================
rule           axis of the old offsets                kernel        source
=============  =====================================  ============  ==========================================
``geometric``  geometric series, ratio by bisection   cubic spline  BEiT, unilm ``beit/run_class_finetuning.py``
``linear``     the same                               linear        timm 1.0.31 ``resize_rel_pos_bias_table``
``bilinear``   uniform, pixel centres                 linear        transformers 5.24 ``BeitRelativePositionBias``
=============  =====================================  ============  ==========================================

Each is linear in the table and separable, so a resize is ``W_y . T . W_x^T`` with one small matrix per axis.

Shapes: h, w grid in patches; K heads; S = 2 * size - 1 offsets along an axis.
"""

from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_support import can_cache_tensors, is_exporting, is_open, plain_tensors

__all__ = [
    'RESIZE_RULES',
    'ResizeRule',
    'bilinear_matrix',
    'resize_abs_pos_embed',
    'resize_matrices',
    'resize_rel_pos_bias_table',
]

ResizeRule = Literal['geometric', 'linear', 'bilinear']
RESIZE_RULES: tuple[str, ...] = get_args(ResizeRule)
RATIOS = (1.01, 1.5)  # the search interval of the official code
HALVINGS = 19  # until the interval is below 1e-6, the official tolerance
NUM_CLS_ROWS = 3  # the last rows of a table: [CLS] to token, token to [CLS], [CLS] to [CLS]


def _geometric_offsets(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Places the ``2 * old - 1`` old offsets on the new axis, denser near 0: sums of a geometric series.

    Returns:
        (2 * old - 1,), increasing and symmetric around 0; the outermost one stands near ``new - 1``.
    """
    exponents = torch.arange(old - 1, device=device, dtype=dtype)  # old-1
    ratio = (_open_ratio if isinstance(new, torch.SymInt) else _ratio)(exponents, new)
    positive = torch.cumsum(ratio**exponents, 0) if old > 1 else exponents  # old-1
    return torch.cat((-positive.flip(0), positive.new_zeros(1), positive))  # 2*old-1


def _ratio(exponents: Tensor, new: int) -> Tensor:
    """Ratio of the series whose sum is nearest to ``new - 1``, by the bisection of the official code."""
    low, high = exponents.new_full((), RATIOS[0]), exponents.new_full((), RATIOS[1])
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        too_far = (ratio**exponents).sum() > new - 1
        low, high = torch.where(too_far, low, ratio), torch.where(too_far, ratio, high)
    return ratio  # the one that was tried last, not the middle of the final interval


def _open_ratio(exponents: Tensor, new: torch.SymInt) -> Tensor:
    """``_ratio`` for exported programs, where 19 halvings would be most of the graph: many ratios are tried at once."""
    low, step = RATIOS[0], RATIOS[1] - RATIOS[0]
    below = exponents.new_zeros(())
    for halvings in (HALVINGS - HALVINGS // 2, HALVINGS // 2):
        low, step = low + step * below, step / 2**halvings
        ratios = low + step * torch.arange(1, 2**halvings, device=exponents.device, dtype=exponents.dtype)
        below = ((ratios[:, None] ** exponents).sum(1) <= new - 1).to(exponents.dtype).sum()
    return low + step * (below + 1 - below % 2)  # of the two ends of the interval, the one that was tried last


def _spline_basis(x: Tensor, knots: Tensor, degree: int) -> Tensor:
    """B-spline basis by Cox and de Boor: (len(x), len(knots) - degree - 1)."""
    left, right = knots[:-1], knots[1:]
    tiny = torch.finfo(knots.dtype).tiny
    last = torch.arange(left.shape[0], device=x.device) == left.shape[0] - degree - 1
    x = x[:, None]
    # the last non-empty interval is closed on the right, so that the end point belongs to it
    basis = ((x >= left) & ((x < right) | (last & (x <= right)))).to(knots.dtype)  # n, len(knots)-1
    for k in range(1, degree + 1):
        rise = knots[k:-1] - knots[: -k - 1]
        fall = knots[k + 1 :] - knots[1:-k]
        up = torch.where(rise > 0, (x - knots[: -k - 1]) / rise.clamp(min=tiny), 0.0)
        down = torch.where(fall > 0, (knots[k + 1 :] - x) / fall.clamp(min=tiny), 0.0)
        basis = up * basis[:, :-1] + down * basis[:, 1:]
    return basis


def _inverse(matrix: Tensor) -> Tensor:
    """Inverse of a spline basis (n, n) at its own points, by Newton's iteration: ONNX has no solver."""
    double_eye = 2 * torch.eye(matrix.shape[0], device=matrix.device, dtype=matrix.dtype)
    inverse = double_eye / (2 * matrix.diagonal())
    for _ in range(9):  # each squares I - matrix @ inverse, whose spectral radius starts at 0.82 or less
        inverse = inverse @ (double_eye - matrix @ inverse)
    return inverse


def _interpolation_matrix(points: Tensor, x: Tensor, degree: int) -> Tensor:
    """Values at ``points`` to values at ``x`` by an interpolating spline (not-a-knot ends, as FITPACK with s=0).

    ``x`` is clamped to the range of the points, as FITPACK does, so nothing is extrapolated.

    Returns:
        (len(x), len(points)).
    """
    n = points.shape[0]
    if n == 1:
        return points.new_ones(x.shape[0], 1)
    degree = min(degree, n - 1)
    ends = (degree + 1) // 2
    inner = points[ends : n - ends] if degree % 2 else points[:0]  # degree 2 only happens with three points
    knots = torch.cat((points[:1].expand(degree + 1), inner, points[-1:].expand(degree + 1)))
    x = torch.minimum(torch.maximum(x, points[0]), points[-1])
    basis = _spline_basis(torch.cat((points, x)), knots, degree)  # n+len(x), n
    at_points, at_x = basis[:n], basis[n:]
    if is_open(x.shape[0]):
        return at_x @ _inverse(at_points)
    # solve_ex does not wait for the device to report a singular matrix; a spline basis at its own points is regular
    return torch.linalg.solve_ex(at_points, at_x, left=False)[0]


def _matrix_shape(old: int, new: int, rule: str) -> tuple[int, int]:
    return (new, old) if rule == 'positions' else (2 * new - 1, 2 * old - 1)


def axis_matrix(old: int, new: int, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The linear map that takes one axis from ``old`` to ``new`` patches: of a bias table, or of absolute positions.

    Made of tensor operations only, so that ``torch.export`` keeps it right for a dynamic ``new``.

    Args:
        rule: one of ``RESIZE_RULES`` for the offsets of a bias table, or ``positions``.

    Returns:
        (2 * new - 1, 2 * old - 1), for positions (new, old); the identity when the sizes are equal.
    """
    rows, columns = _matrix_shape(old, new, rule)
    places = torch.arange(rows, device=device, dtype=dtype)
    if rule == 'positions':
        # an image whose columns are unit vectors; in float32 where ONNX Runtime may resize it
        basis = torch.eye(old, device=device, dtype=torch.float32 if isinstance(new, torch.SymInt) else dtype)
        matrix = F.interpolate(basis[None, None], size=(new, old), mode='bicubic', antialias=True)[0, 0].to(dtype)
    elif rule == 'bilinear':
        old_points = torch.arange(columns, device=device, dtype=dtype)
        x = (places + 0.5) * (columns / rows) - 0.5  # pixel centres, align_corners=False
        matrix = _interpolation_matrix(old_points, x, 1)
    else:
        old_points = _geometric_offsets(old, new, device, dtype)
        matrix = _interpolation_matrix(old_points, places - (new - 1), 3 if rule == 'geometric' else 1)
    if isinstance(new, torch.SymInt):  # which size it will be is known only when the exported program runs
        same = places.new_full((), 1.0) * new == old
        return torch.where(same, torch.eye(rows, columns, device=device, dtype=dtype), matrix)
    return torch.eye(rows, device=device, dtype=dtype) if new == old else matrix


def bilinear_matrix(old: int, new: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What ``F.interpolate(mode='bilinear')`` does along one axis, as a linear map (new, old); kept for the next call.

    The weights are computed in float32, or in float64 for a result in float64, as PyTorch does.
    """
    return (_cached_bilinear if can_cache_tensors() else _bilinear_matrix)(old, new, align_corners, device, dtype)


def _bilinear_matrix(old: int, new: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    basis = torch.eye(old, device=device, dtype=torch.promote_types(dtype, torch.float32))[None]  # a row for each place
    return F.interpolate(basis, size=new, mode='linear', align_corners=align_corners)[0].t().contiguous().to(dtype)


@lru_cache(maxsize=256)
def _cached_bilinear(old: int, new: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    with plain_tensors():
        return _bilinear_matrix(old, new, align_corners, device, dtype)


@lru_cache(maxsize=256)
def _cached_matrix(old: int, new: int, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    with plain_tensors():
        return axis_matrix(old, new, rule, torch.device('cpu'), dtype).contiguous().to(device)


@torch.library.custom_op('beit_plugin::axis_matrix', mutates_args=())
def _axis_matrix_op(old: int, new: int, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    # compiled code calls this and is spared the hundred small operations; it may write into what it gets, so clone
    return _cached_matrix(old, new, rule, device, dtype).clone()


@_axis_matrix_op.register_fake
def _(old: int, new: int, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.empty(_matrix_shape(old, new, rule), device=device, dtype=dtype)


def _axis_in_graph(old: int, new: int, rule: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    # an axis whose size is known is a constant, as in a program for one size
    make = axis_matrix if torch.compiler.is_dynamo_compiling() or isinstance(new, torch.SymInt) else _cached_matrix
    return make(old, new, rule, device, dtype)


def resize_matrices(
    old: tuple[int, int], new: tuple[int, int], rule: str, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The two maps of a resize, cached by size; None when there is nothing to do.

    Args:
        old: (h, w) of the grid that the parameter belongs to.
        new: (h, w) wanted.
        rule: see ``axis_matrix``.

    Returns:
        The maps of the vertical and the horizontal axis in float64 (float32 on devices that have no float64).
    """
    dtype = torch.float32 if device.type == 'mps' else torch.float64
    traced_by_dynamo = torch.compiler.is_dynamo_compiling()
    exporting = is_exporting()
    # comparing a size that an export leaves open would tie the program to the answer
    symbolic = exporting and (isinstance(new[0], torch.SymInt) or isinstance(new[1], torch.SymInt))
    if not symbolic and tuple(old) == tuple(new):
        return None
    if traced_by_dynamo or symbolic:  # no operation of our own may stay in an exported program
        make = _axis_in_graph if exporting else _axis_matrix_op
    else:  # of an exported program for one size it is a constant: ONNX could not hold what it is made of
        make = _cached_matrix if exporting or can_cache_tensors() else axis_matrix
    return make(old[0], new[0], rule, device, dtype), make(old[1], new[1], rule, device, dtype)


def resize_abs_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute positions (1, 1 + h*w, C) of one grid for another: bicubic, antialiased where it shrinks, [CLS] kept.

    The result of ``timm.layers.resample_abs_pos_embed`` (timm 1.0.31), but as a linear map and for sizes that
    ``torch.export`` leaves open; at the stored grid the positions come back untouched.
    """
    matrices = resize_matrices(old, new, 'positions', pos_embed.device)
    return pos_embed if matrices is None else apply_positions(pos_embed, matrices)


def apply_positions(pos_embed: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Resizes positions (1, 1 + h*w, C) by two maps."""
    to_y, to_x = matrices
    patches = pos_embed[0, 1:].to(to_y.dtype).reshape(to_y.shape[1], -1)  # h, w*C
    patches = (to_y @ patches).reshape(to_y.shape[0], to_x.shape[1], -1)  # h', w, C
    patches = (to_x @ patches).reshape(1, to_y.shape[0] * to_x.shape[0], -1)  # 1, h'*w', C
    return torch.cat((pos_embed[:, :1], patches.to(pos_embed.dtype)), dim=1)


def apply_resize(table: Tensor, matrices: tuple[Tensor, Tensor]) -> Tensor:
    """Resizes a table (S_y * S_x + 3, K) by two maps; the [CLS] rows stay as they are.

    The product is taken in the dtype of the maps: float64 costs nothing at this size, and autocast leaves it alone.
    """
    to_y, to_x = matrices
    heads = table.shape[1]
    rows = to_y.shape[1] * to_x.shape[1]  # of patches; TorchScript, which compiles this too, knows no NUM_CLS_ROWS
    patch_rows = table[:rows].to(to_y.dtype).reshape(to_y.shape[1], to_x.shape[1] * heads)
    resized = to_y @ patch_rows  # S_y', S_x*K
    resized = resized.reshape(to_y.shape[0], to_x.shape[1], heads).permute(0, 2, 1) @ to_x.t()  # S_y', K, S_x'
    resized = resized.permute(0, 2, 1).reshape(-1, heads).to(table.dtype)  # S_y'*S_x', K
    return torch.cat((resized, table[rows:]))


def resize_rel_pos_bias_table(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], rule: ResizeRule = 'geometric'
) -> Tensor:
    """Takes a bias table from one grid to another.

    Always start from the stored table: a resize loses information, so do not chain them.

    Args:
        table: ((2h-1)*(2w-1)+3, K), the last three rows for [CLS].
        old: (h, w) of the table's grid in patches.
        new: (h, w) of the wanted grid.
        rule: see the top of this module.

    Returns:
        ((2h'-1)*(2w'-1)+3, K), differentiable in ``table``; ``table`` itself when the grids are equal.

    Raises:
        ValueError: the table does not fit ``old``, or the rule is unknown.
    """
    check_rule(rule)
    expected = (2 * old[0] - 1) * (2 * old[1] - 1) + NUM_CLS_ROWS
    if table.ndim != 2 or table.shape[0] != expected:
        raise ValueError(
            f'a bias table of a {old[0]}x{old[1]} grid has shape ({expected}, heads), got {tuple(table.shape)}; '
            'give the grid that the table was trained on'
        )
    if table.is_meta:
        return table.new_empty((2 * new[0] - 1) * (2 * new[1] - 1) + NUM_CLS_ROWS, table.shape[1])
    matrices = resize_matrices(old, new, rule, table.device)
    return table if matrices is None else apply_resize(table, matrices)


def check_rule(rule: str) -> None:
    """Raises a ValueError that lists the known rules when ``rule`` is none of them."""
    if rule not in RESIZE_RULES:
        raise ValueError(f'rel_pos_resize must be one of {", ".join(RESIZE_RULES)}, got {rule!r}')
