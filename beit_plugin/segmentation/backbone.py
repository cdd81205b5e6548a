"""BEiT as a backbone: feature maps of chosen blocks, as they are or as a pyramid, as maps or as token sequences.

Two ways to say which: ``out_indices`` counts blocks from 0, as timm, unilm and mmsegmentation do; ``out_features`` uses
the stage names of transformers' ``BeitBackbone``, where ``stem`` is the embeddings and ``stage3`` the output of three
blocks. So ``out_indices=(3, 5)`` and ``out_features=('stage4', 'stage6')`` are the same.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..models.beit import Beit
from ..models.embed import tokens_to_map
from .pyramid import FeaturePyramid

__all__ = ['BackboneOutput', 'BeitBackbone', 'pyramid_indices', 'resolve_stages']

PYRAMID_LEVELS = 4


class BackboneOutput(NamedTuple):
    """What a backbone run gives; what was not asked for is empty."""

    feature_maps: tuple[Tensor, ...]  # B, C, h, w each, or B, N, C
    hidden_states: tuple[Tensor, ...]  # L + 1 times B, N, C
    attentions: tuple[Tensor, ...]  # L times B, K, N, N


def pyramid_indices(depth: int) -> tuple[int, int, int, int]:
    """The four blocks that a pyramid reads by default: (3, 5, 7, 11) of 12, (7, 11, 15, 23) of 24, as unilm's.

    Raises:
        ValueError: fewer than four blocks.
    """
    if depth < PYRAMID_LEVELS:
        raise ValueError(f'a pyramid reads {PYRAMID_LEVELS} blocks, the model has {depth}; name them by out_indices')
    first, second, third = depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1
    return first, max(second, first + 1), max(third, first + 2), depth - 1


def resolve_stages(
    depth: int,
    out_indices: int | Sequence[int] | None = None,
    out_features: Sequence[str] | None = None,
) -> tuple[int, ...]:
    """Stages (number of blocks run) that the two ways of asking mean; the last block where neither is given.

    Raises:
        ValueError: an index or name that the model does not have, or both given and not the same.
    """
    by_index = by_name = None
    if out_indices in ((), []) or out_features in ((), []):
        raise ValueError('out_indices and out_features must name at least one stage; leave them out for the last one')
    if out_indices is not None:
        indices = tuple(out_indices) if isinstance(out_indices, Iterable) else (out_indices,)
        if not all(isinstance(i, Integral) for i in indices):
            raise ValueError(
                f'out_indices are numbers of blocks, the first is 0, got {out_indices!r}; name stages by out_features'
            )
        wrong = [i for i in indices if not -depth <= i < depth]
        if wrong:
            raise ValueError(
                f'out_indices {wrong} do not exist: the model has {depth} blocks, so 0 to {depth - 1} or -{depth} to -1'
            )
        by_index = tuple(i % depth + 1 for i in indices)
    if out_features is not None:
        out_features = (out_features,) if isinstance(out_features, str) else out_features
        names = {'stem': 0} | {f'stage{i}': i for i in range(1, depth + 1)}
        wrong = [name for name in out_features if name not in names]
        if wrong:
            raise ValueError(f"out_features {wrong} do not exist: the model has 'stem' and 'stage1' to 'stage{depth}'")
        by_name = tuple(names[name] for name in out_features)
    if by_index is not None and by_name is not None and by_index != by_name:
        raise ValueError(
            f'out_indices {out_indices} (0-based blocks) and out_features {out_features} name different stages; '
            'give one of them'
        )
    return by_index or by_name or (depth,)


class BeitBackbone(Beit):
    """BEiT encoder that returns feature maps.

    Args:
        out_indices: 0-based blocks whose outputs to return; negative from the end; the last by default, with
            ``add_fpn`` those of ``pyramid_indices``.
        out_features: the same by stage name: ``stem``, ``stage1``, ...
        add_fpn: turn exactly four outputs into maps of strides 4, 8, 16 and 32 pixels, for patches of 16 or 8; for
            others into maps of 4, 2, 1 and 0.5 times the grid.
        reshape_hidden_states: return maps (B, C, h, w); False gives token sequences (B, N, C) with [CLS], as
            transformers does.
        final_norm: normalise the output of the last block.
        fpn_norm: makes the pyramid's norm layer from a channel count.
        kwargs: those of ``Beit``, less the classifier's.

    Raises:
        ValueError: stages that do not exist, or a pyramid of other than four maps or of token sequences.
    """

    def __init__(
        self,
        *,
        out_indices: int | Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
        add_fpn: bool = False,
        reshape_hidden_states: bool = True,
        final_norm: bool = False,
        fpn_norm: Any = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = {'num_classes': 0, 'global_pool': '', **kwargs}
        super().__init__(device=device, dtype=dtype, **kwargs)
        depth = len(self.blocks)
        if add_fpn and out_indices is None and out_features is None:
            out_indices = pyramid_indices(depth)
        self.stages = resolve_stages(depth, out_indices, out_features)
        self.out_indices = tuple(stage - 1 for stage in self.stages)  # as it was built; a checkpoint may change stages
        if add_fpn and len(self.stages) != PYRAMID_LEVELS:
            raise ValueError(f'add_fpn needs exactly {PYRAMID_LEVELS} out_indices, got {len(self.stages)}')
        if add_fpn and not reshape_hidden_states:
            raise ValueError('add_fpn works on maps; it needs reshape_hidden_states=True')
        self.reshape_hidden_states = reshape_hidden_states
        if not final_norm:
            self.norm = nn.Identity()
        self.fpn = None
        if add_fpn:
            rescales = (2, 1, 0.5, 0.25) if self.patch_embed.feat_ratio() == 8 else (4, 2, 1, 0.5)
            self.fpn = FeaturePyramid(self.embed_dim, rescales, fpn_norm, device=device, dtype=dtype)
        self.levels = tuple(range(len(self.stages)))  # of the pyramid, that are there
        self.feature_info = self._describe_features()

    def _describe_features(self) -> list[dict[str, Any]]:
        fpn = getattr(self, 'fpn', None)  # the encoder's constructor asks before there is one
        if fpn is None:
            return super()._describe_features()
        patch = self.patch_embed.feat_ratio()
        return [
            dict(module=f'fpn.{i}', num_chs=self.embed_dim, reduction=int(patch / scale))
            for i, scale in enumerate(fpn.rescales)
        ]

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output map."""
        return (self.embed_dim,) * len(self.stages)

    def forward_backbone(
        self,
        x: Tensor,
        bool_masked_pos: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BackboneOutput:
        """The backbone with all its outputs; arguments as ``Beit.encode``."""
        depth = len(self.blocks)
        full = output_hidden_states or output_attentions
        stages = range(depth + 1) if output_hidden_states else self.stages
        last = None if full else max(self.stages)
        _, grid, states, attentions = self.run_blocks(x, bool_masked_pos, head_mask, stages, output_attentions, last)
        maps = [self.norm(states[stage]) if stage == depth else states[stage] for stage in self.stages]
        if self.reshape_hidden_states:
            maps = [tokens_to_map(tokens, grid) for tokens in maps]
        if self.fpn is not None:
            maps = self.fpn(maps, image_size=tuple(x.shape[2:]), patch_size=self.patch_embed.patch_size)
        return BackboneOutput(tuple(maps), tuple(states.values()) if output_hidden_states else (), tuple(attentions))

    def forward(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (B, in_chans, H, W) to the tuple of feature maps."""
        return self.forward_backbone(x, bool_masked_pos).feature_maps

    def forward_intermediates(self, x: Tensor, indices: int | list[int] | None = None, **kwargs: Any) -> Any:
        """With a pyramid, ``indices`` choose its levels (0 the finest); else as ``Beit.forward_intermediates``."""
        if self.fpn is None:
            return super().forward_intermediates(x, indices, **kwargs)
        if kwargs.get('output_fmt', 'NCHW') != 'NCHW' or not kwargs.get('intermediates_only', False):
            raise ValueError("a model with add_fpn gives maps only: use output_fmt='NCHW' and intermediates_only=True")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        if not set(take) <= set(self.levels):
            raise ValueError(f'got levels {take}, but only {self.levels} of the pyramid were kept')
        maps = self.forward(x)
        return [maps[self.levels.index(i)] for i in take]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the chosen maps do not need: blocks, levels of the pyramid, the classifier.

        Levels keep their numbers, by which hosts that build a model again ask for them.
        """
        if self.fpn is None:
            return super().prune_intermediate_layers(indices, prune_norm, prune_head)
        take, _ = feature_take_indices(len(self.feature_info), indices)
        keep = sorted(set(take))
        self.fpn.keep_levels(keep)
        self.stages = tuple(self.stages[i] for i in keep)
        self.levels = tuple(keep)
        del self.blocks[max(self.stages) :]
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        return take
