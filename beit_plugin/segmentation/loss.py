"""Segmentation loss, and the check that its labels are classes.

The loss is that of `BeitForSemanticSegmentation` in transformers 5.24 (`ForSemanticSegmentationLoss`), but finite when
every pixel is ignored. Legend: B batch, H W pixels of the labels, h w pixels of the logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.checks import LateLook
from .upsampled_cross_entropy import upsampled_cross_entropy


class _Batch(NamedTuple):
    labels: Tensor
    wrong: Tensor
    num_classes: int
    names: Sequence[str]


class LabelGuard:
    """Report labels that are no class, before a kernel reads out of bounds.

    On the CPU the report is immediate. On CUDA asking would make the CPU wait for the whole forward pass in every
    step, so wrong labels are ignored in their own step and reported in the next one, when the answer has long arrived;
    an out-of-bounds label would otherwise end the process with a device-side assert that names nothing. In compiled
    code nothing is checked: there the loss of such labels is NaN, see `upsampled_cross_entropy`.

    Args:
        hint: what the user can do, the end of the sentence.
    """

    def __init__(self, hint: str) -> None:
        self.hint = hint
        self._later = LateLook()

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


class SegmentationLoss(nn.Module):
    """Cross-entropy of the upsampled logits, averaged over the pixels that count, plus that of an auxiliary head.

    Args:
        ignore_index: label of the pixels that do not count.
        aux_weight: weight of the auxiliary head's loss.
    """

    def __init__(self, ignore_index: int = 255, aux_weight: float = 0.4) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.aux_weight = aux_weight
        self._guard = LabelGuard(f'give pixels of no class the ignore index {ignore_index} or raise num_classes')

    def forward(self, logits: Tensor, labels: Tensor, aux_logits: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            logits: (B, classes, h, w), two classes or more.
            labels: (B, H, W) integers.
            aux_logits: (B, classes, h', w') of the auxiliary head.

        Returns:
            a scalar, float32 or wider; 0, with a graph, when every pixel is ignored.

        Raises:
            ValueError: one class, labels of the wrong shape or type, or labels that are no class (see `LabelGuard`).
        """
        num_classes = logits.shape[1]
        if num_classes < 2:
            raise ValueError('got logits of one class, whose cross-entropy is always 0; use two classes or more')
        if labels.ndim != 3 or len(labels) != len(logits) or labels.is_floating_point():
            raise ValueError(
                f'got labels of shape {tuple(labels.shape)} and type {labels.dtype}, expected integers of shape '
                f'({len(logits)}, height, width); give one label map per image'
            )
        labels = self._guard(labels.long(), num_classes, self.ignore_index)
        loss = self._cross_entropy(logits, labels)
        if aux_logits is not None:
            loss = loss + self.aux_weight * self._cross_entropy(aux_logits, labels)
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, _ = upsampled_cross_entropy(logits, labels, ignore_index=self.ignore_index)
        return total / (labels != self.ignore_index).sum().clamp(min=1)
