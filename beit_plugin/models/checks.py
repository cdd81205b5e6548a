"""Values of constructors and inputs: what is wrong with one becomes a sentence that names it.

Shapes: K heads, L layers.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

__all__ = ['check_numbers', 'head_mask_by_layer', 'height_and_width']


def height_and_width(name: str, value: Any) -> tuple[int, int]:
    """A size of one or two numbers as (H, W).

    Raises:
        ValueError: other than one or two whole numbers above 0.
    """
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(f'{name} must be one or two whole numbers (H, W) of pixels above 0, got {value!r}')
    return int(sides[0]), int(sides[1])


def check_numbers(in_chans: int, init_std: float, **rates: float) -> None:
    """Checks what torch would accept, or refuse in other words.

    Raises:
        ValueError: no channel, no spread of the initial weights, or a drop rate outside of 0 to 1.
    """
    if in_chans < 1:
        raise ValueError(f'in_chans must be at least 1, got {in_chans}')
    if not init_std > 0:
        raise ValueError(f'init_std must be above 0, got {init_std}; the published models start with 0.02')
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f'{name} must be at least 0 and below 1, got {rate}')


def head_mask_by_layer(head_mask: Tensor | None, depth: int, num_heads: int) -> list[Tensor]:
    """The factors (K,) of each layer's heads, nothing where there are none.

    Args:
        head_mask: (K,) or (L, K), None for no factors.
        depth, num_heads: L and K of the model.

    Raises:
        ValueError: no tensor, or of another shape.
    """
    if head_mask is None:
        return []
    if not isinstance(head_mask, Tensor):
        raise ValueError(f'head_mask must be a torch tensor, got {type(head_mask).__name__}; use torch.as_tensor')
    if tuple(head_mask.shape) not in ((num_heads,), (depth, num_heads)):
        raise ValueError(
            f'head_mask must have shape ({num_heads},) or ({depth}, {num_heads}), got {tuple(head_mask.shape)}'
        )
    return list(head_mask.expand(depth, num_heads))
