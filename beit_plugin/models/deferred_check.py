"""Checks of CUDA tensors that do not synchronize: the result is read one step later."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ['DeferredCheck', 'LabelCheck']


class DeferredCheck:
    """Copies CUDA tensors to the host asynchronously; they are read one step later without synchronizing."""

    def __init__(self) -> None:
        self._pending: tuple[torch.cuda.Event, Tensor, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # an event can neither be copied nor pickled, and models are both (weight averaging, checkpoints)
        return {'_pending': None}

    def send(self, numbers: Tensor, about: Any = None) -> None:
        """Start to copy a CUDA tensor to the host; `about` comes back with it."""
        copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copy.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(numbers.device))  # which need not be the current GPU's
        self._pending = arrived, copy, about

    def collect(self) -> tuple[Tensor, Any] | None:
        """Return the tensor sent last, on the CPU, and its `about`; None if there is none."""
        if self._pending is None:
            return None
        arrived, numbers, about = self._pending
        self._pending = None
        arrived.synchronize()
        return numbers, about


class _Batch(NamedTuple):
    labels: Tensor
    wrong: Tensor
    num_classes: int
    names: Sequence[str]


class LabelCheck:
    """Raise an error for labels that are not a class, before a kernel reads out of bounds.

    On the CPU the error is immediate. On CUDA that would synchronize in every step, so wrong labels are ignored in
    their own step and reported in the next one; without this check they end the process with a device-side assert.
    In compiled code nothing is checked: there the loss of such labels is NaN, see `upsampled_cross_entropy`.

    Args:
        hint: what the user can do, the end of the sentence.
    """

    def __init__(self, hint: str) -> None:
        self.hint = hint
        self._later = DeferredCheck()

    def __call__(
        self, labels: Tensor, num_classes: int, ignore_index: int | None, names: Sequence[str] | None = None
    ) -> Tensor:
        """Check one batch.

        Args:
            labels: (B, ...) integers; classes are 0 to `num_classes` - 1.
            num_classes: number of classes.
            ignore_index: label of the pixels that do not count; None when all count.
            names: one name per image for the report, by default its place in the batch.

        Returns:
            the labels; on CUDA with those that are no class set to `ignore_index`, or to 0 without one.

        Raises:
            ValueError: an image of this batch (on CUDA, of the one before) has a label that is no class.
        """
        if torch.compiler.is_compiling():
            return labels
        wrong = (labels < 0) | (labels >= num_classes)
        if ignore_index is not None:
            wrong &= labels != ignore_index
        names = [f'{i} of the batch' for i in range(len(labels))] if names is None else names
        batch = _Batch(labels, wrong, num_classes, names)
        if not labels.is_cuda:
            self._raise_if(wrong.any(), batch)
            return labels
        last = self._later.collect()
        if last is not None:
            self._raise_if(*last)
        self._later.send(wrong.any(), batch)
        return labels.masked_fill(wrong, 0 if ignore_index is None else ignore_index)

    def _raise_if(self, found: Tensor, batch: _Batch) -> None:
        if not found:
            return
        first = int(batch.wrong.flatten(1).any(1).nonzero()[0])
        values = batch.labels[first][batch.wrong[first]].unique().tolist()
        listed = ', '.join(map(str, values[:8])) + (', …' if len(values) > 8 else '')
        raise ValueError(
            f'image {batch.names[first]} has the labels {listed}, but there are only the {batch.num_classes} classes '
            f'0 to {batch.num_classes - 1}; {self.hint}'
        )
