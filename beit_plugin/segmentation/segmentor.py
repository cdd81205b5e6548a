"""Semantic segmentation: a BEiT encoder, its pyramid, a UPerNet head and, for training, an FCN head, in plain torch.

The model of BEiT (arXiv:2106.08254) on ADE20K, and of `BeitForSemanticSegmentation` in transformers, with two
differences: the encoder decides which blocks are tapped, and images of any size are allowed. The parts are built by
the caller. Legend: B batch, H W pixels.
"""

import logging
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..models.relative_position import note_grid
from .backbone import BeitBackbone, pyramid_indices
from .loss import SegmentationLoss
from .pyramid import FeaturePyramid
from .upernet import FCNHead, UPerNetHead

_logger = logging.getLogger(__name__)


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
        keep_stages: read the blocks that the backbone was built with, also after a checkpoint was loaded that was
            trained on others; by default the checkpoint decides (segmentors of transformers count in another way).
    """

    # read by `from_pretrained` of transformers 5: the stages are no weight, and a file without them is complete
    _keys_to_ignore_on_load_missing = (r'(^|\.)_extra_state$',)

    def __init__(
        self,
        *,
        backbone: BeitBackbone,
        pyramid: FeaturePyramid,
        decode_head: UPerNetHead,
        auxiliary_head: FCNHead | None = None,
        loss: SegmentationLoss | None = None,
        patch_size: int | tuple[int, int] = 16,
        auxiliary_index: int = 2,
        keep_stages: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = pyramid
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.loss = SegmentationLoss() if loss is None else loss
        self.patch_size = patch_size
        self.auxiliary_index = auxiliary_index
        self.keep_stages = keep_stages
        self.register_state_dict_post_hook(note_grid)

    def get_extra_state(self) -> Tensor:
        """The stages that the backbone returns; in the state dict, for the weights mean nothing without them."""
        return torch.tensor(self.backbone.stages)

    def set_extra_state(self, state: Tensor) -> None:
        """Returns the stages of a checkpoint from now on, unless ``keep_stages`` forbids it.

        Raises:
            ValueError: the backbone does not have them.
        """
        stages, depth = tuple(state.tolist()), len(self.backbone.blocks)
        if len(stages) != len(self.backbone.stages) or not all(0 <= stage <= depth for stage in stages):
            raise ValueError(f'the checkpoint reads the stages {stages} (blocks run) of a backbone of {depth} blocks')
        if stages != self.backbone.stages:
            use = self.backbone.stages if self.keep_stages else stages
            _logger.warning(
                'the checkpoint was trained on the outputs of blocks %s (counted from 0), this model was built for %s; '
                'it reads %s now. Naming out_indices at construction overrides the checkpoint.',
                *(tuple(stage - 1 for stage in s) for s in (stages, self.backbone.stages, use)),
            )
            self.backbone.stages = use

    @property
    def num_classes(self) -> int:
        """Number of classes of the decode head."""
        return self.decode_head.conv_seg.out_channels

    # what timm's optimiser factories and trainers ask of a model: it concerns the encoder or the last convolution

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of the encoder's blocks."""
        return self.backbone.feature_info

    def get_classifier(self) -> nn.Module:
        """The last convolution of the decode head."""
        return self.decode_head.conv_seg

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give both heads a fresh last convolution.

        Args:
            num_classes: new number of classes, at least 1.
            global_pool: only None or empty; a segmentor pools nothing.

        Raises:
            ValueError: another pooling.
        """
        if global_pool:
            raise ValueError(f'a segmentor pools nothing, so global_pool must be left out, got {global_pool!r}')
        self.decode_head.reset_classifier(num_classes)
        if self.auxiliary_head is not None:
            self.auxiliary_head.reset_classifier(num_classes)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the encoder's native size for good; see `TimmInterface.set_input_size`."""
        self.backbone.set_input_size(img_size, patch_size)
        self.patch_size = self.backbone.patch_embed.patch_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The encoder's parameters that are not decayed."""
        return {f'backbone.{name}' for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer ids of the encoder for layer-wise learning rate decay; the heads come after all of it."""
        stem = r'^backbone\.(?:cls_token|mask_token|pos_embed|patch_embed)'
        return dict(stem=stem, blocks=[(r'^backbone\.blocks\.(\d+)', None)])

    def init_non_persistent_buffers(self) -> None:
        """There are none; timm calls this after it has filled a model made on the meta device."""

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Outputs of chosen blocks of the encoder; see `TimmInterface.forward_intermediates`."""
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def forward_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, channels, H, W) to the four levels of the pyramid."""
        return self.pyramid(self.backbone(x), tuple(x.shape[-2:]), self.patch_size)

    def forward_head(self, levels: tuple[Tensor, ...]) -> Tensor:
        """Levels of the pyramid to logits (B, classes, h, w)."""
        return self.decode_head(levels)

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
        levels = self.forward_features(pixel_values)
        logits = self.forward_head(levels)
        if labels is None:
            return logits
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(levels[self.auxiliary_index])
        return self.loss(logits, labels, auxiliary), logits


def build_segmentor(
    num_classes: int = 150,
    channels: int | None = None,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    decoder_drop_rate: float = 0.1,
    use_auxiliary_head: bool = True,
    auxiliary_channels: int = 256,
    auxiliary_num_convs: int = 1,
    auxiliary_concat_input: bool = False,
    auxiliary_loss_weight: float = 0.4,
    semantic_loss_ignore_index: int = 255,
    out_indices: Sequence[int] | None = None,
    out_features: Sequence[str] | None = None,
    **encoder_kwargs: Any,
) -> BeitSegmentor:
    """Assembles the segmentor of BeitForSemanticSegmentation: its options, and its defaults where the encoder has none.

    Args:
        num_classes: classes of both heads.
        channels: width of the decode head; by default that of the encoder.
        pool_scales: sides of the grids that the coarsest map is pooled to.
        decoder_drop_rate: dropout before both classifiers.
        use_auxiliary_head, auxiliary_channels, auxiliary_num_convs, auxiliary_concat_input: the FCN head.
        auxiliary_loss_weight, semantic_loss_ignore_index: the loss.
        out_indices, out_features: four blocks to read, as `BeitBackbone` takes them; by default those of
            `pyramid_indices`, or what a checkpoint was trained on.
        encoder_kwargs: those of `Beit`.

    Raises:
        ValueError: other than four blocks, or see the parts.
    """
    named = out_indices is not None or out_features is not None
    if not named:
        out_indices = pyramid_indices(encoder_kwargs.get('depth', 12))
    backbone = BeitBackbone(out_indices=out_indices, out_features=out_features, **encoder_kwargs)
    if len(backbone.stages) != 4:
        raise ValueError(f'a segmentor needs exactly 4 out_indices, got {len(backbone.stages)}')
    dim = backbone.embed_dim
    dd: dict[str, Any] = {'device': encoder_kwargs.get('device'), 'dtype': encoder_kwargs.get('dtype')}
    auxiliary_head = None
    if use_auxiliary_head:
        auxiliary_head = FCNHead(
            dim,
            auxiliary_channels,
            num_classes,
            num_convs=auxiliary_num_convs,
            concat_input=auxiliary_concat_input,
            dropout=decoder_drop_rate,
            **dd,
        )
    return BeitSegmentor(
        backbone=backbone,
        pyramid=FeaturePyramid(dim, **dd),
        decode_head=UPerNetHead(
            [dim] * 4, channels or dim, num_classes, pool_scales=pool_scales, dropout=decoder_drop_rate, **dd
        ),
        auxiliary_head=auxiliary_head,
        loss=SegmentationLoss(semantic_loss_ignore_index, auxiliary_loss_weight),
        patch_size=backbone.patch_embed.patch_size,
        keep_stages=named,
    )
