"""Semantic segmentation: a BEiT encoder, its pyramid, a UPerNet head and, for training, an FCN head, in plain torch.

The model of BEiT (arXiv:2106.08254) on ADE20K, and of `BeitForSemanticSegmentation` in transformers, with two
differences: the encoder decides which blocks are tapped, and images of any size are allowed. The parts are built by
the caller. Legend: B batch, H W pixels.
"""

from typing import overload

from torch import Tensor, nn

from .pyramid import FeaturePyramid
from .segmentation_loss import SegmentationLoss
from .upernet import FCNHead, UPerNetHead


class BeitSegmentor(nn.Module):
    """Images to class scores at a quarter of their resolution.

    Args:
        backbone: called with images (B, channels, H, W), returns one map (B, C, ceil(H / patch), ceil(W / patch)) per
            level of the pyramid.
        pyramid: turns these maps into the levels that the heads read.
        decode_head: reads all levels.
        auxiliary_head: reads the level `auxiliary_index` when a loss is asked for; None for none.
        loss: the loss of both heads.
        patch_size: stride of the backbone's maps, pixels.
        auxiliary_index: level that the auxiliary head reads; 2 is the one at the patches' own stride.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        pyramid: FeaturePyramid,
        decode_head: UPerNetHead,
        auxiliary_head: FCNHead | None = None,
        loss: SegmentationLoss | None = None,
        patch_size: int | tuple[int, int] = 16,
        auxiliary_index: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.loss = SegmentationLoss() if loss is None else loss
        self.patch_size = patch_size
        self.auxiliary_index = auxiliary_index

    @property
    def num_classes(self) -> int:
        """Number of classes of the decode head."""
        return self.decode_head.conv_seg.out_channels

    def get_classifier(self) -> nn.Module:
        """The last convolution of the decode head, as timm's trainers ask for it."""
        return self.decode_head.conv_seg

    def reset_classifier(self, num_classes: int) -> None:
        """Give both heads a fresh last convolution.

        Args:
            num_classes: new number of classes, at least 1.
        """
        self.decode_head.reset_classifier(num_classes)
        if self.auxiliary_head is not None:
            self.auxiliary_head.reset_classifier(num_classes)

    @overload
    def forward(self, pixel_values: Tensor, labels: None = None) -> Tensor: ...

    @overload
    def forward(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Segment images; with labels, also their loss.

        Args:
            pixel_values: (B, channels, H, W), normalised.
            labels: (B, H, W) class indices of the pixels, any size; the ignore index of the loss where unknown.

        Returns:
            logits (B, classes, ceil(H / 4), ceil(W / 4)) for patches of 16; with labels the pair (loss, logits).

        Raises:
            ValueError: see `FeaturePyramid`, `UPerNetHead` and `SegmentationLoss`.
        """
        height, width = pixel_values.shape[-2:]
        levels = self.pyramid(self.backbone(pixel_values), (height, width), self.patch_size)
        logits = self.decode_head(levels)
        if labels is None:
            return logits
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(levels[self.auxiliary_index])
        return self.loss(logits, labels, auxiliary), logits
