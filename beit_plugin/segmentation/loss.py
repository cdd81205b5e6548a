"""Segmentation loss.

It is that of `BeitForSemanticSegmentation` in transformers 5.24 (`ForSemanticSegmentationLoss`), but finite when
every pixel is ignored. Legend: B batch, H W pixels of the labels, h w pixels of the logits.
"""

from torch import Tensor, nn

from ..models.deferred_check import LabelCheck
from .upsampled_cross_entropy import upsampled_cross_entropy


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
        self._guard = LabelCheck(f'give pixels of no class the ignore index {ignore_index} or raise num_classes')

    def forward(self, logits: Tensor, labels: Tensor, aux_logits: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            logits: (B, classes, h, w), two classes or more.
            labels: (B, H, W) integers.
            aux_logits: (B, classes, h', w') of the auxiliary head.

        Returns:
            a scalar, float32 or wider; 0, with a graph, when every pixel is ignored.

        Raises:
            ValueError: one class, labels of the wrong shape or type, or labels that are no class (see `LabelCheck`).
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
