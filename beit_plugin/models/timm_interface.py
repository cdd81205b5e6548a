"""The methods that timm's trainers, feature extractors and optimiser factories call on a model (timm 1.0.31).

A mixin of ``Beit``, apart from it so that the encoder reads without them. Shapes: see ``beit.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .embed import BeitPatchEmbed, tokens_to_map
from .layer_decay import no_weight_decay
from .resample import ResizeRule, resize_abs_pos_embed, resize_rel_pos_bias_table

__all__ = ['TimmInterface']

POOLS = ('', 'avg', 'token')


def _check_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise ValueError(f"global_pool must be 'avg', 'token' or '', got {global_pool!r}")
    return global_pool


class TimmInterface(nn.Module):
    """Head, features and bookkeeping of ``Beit``, which brings what is only declared here."""

    patch_embed: BeitPatchEmbed
    cls_token: nn.Parameter
    pos_embed: nn.Parameter | None
    blocks: nn.ModuleList
    embed_dim: int
    num_prefix_tokens: int
    window_size: tuple[int, int]
    rel_pos_resize: ResizeRule
    run_blocks: Callable[..., tuple[Tensor, tuple[int, int], dict[int, Tensor], list[Tensor]]]

    def _init_head(
        self,
        num_classes: int,
        global_pool: str,
        use_fc_norm: bool | None,
        drop_rate: float,
        norm_layer: Callable[..., nn.Module],
        **dd: Any,
    ) -> None:
        self.num_classes = num_classes
        self.global_pool = _check_pool(global_pool)
        use_fc_norm = global_pool == 'avg' if use_fc_norm is None else use_fc_norm
        self.norm = nn.Identity() if use_fc_norm else norm_layer(self.embed_dim, **dd)
        self.fc_norm = norm_layer(self.embed_dim, **dd) if use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.feature_info = self._describe_features()

    def _describe_features(self) -> list[dict[str, Any]]:
        common = dict(num_chs=self.embed_dim, reduction=self.patch_embed.feat_ratio())
        return [dict(module=f'blocks.{i}', **common) for i in range(len(self.blocks))]

    def forward_features(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, N, C), after the final norm if there is one."""
        return self.norm(self.run_blocks(x, bool_masked_pos)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) to logits (B, num_classes), or to the pooled features (B, C)."""
        if self.global_pool:
            x = x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == 'avg' else x[:, 0]
        x = self.fc_norm(x)
        return x if pre_logits else self.head(self.head_drop(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks.

        Args:
            x: (B, in_chans, H, W).
            indices: 0-based blocks; an int for the last so many; None for all.
            return_prefix_tokens: give pairs of a map and its [CLS] token (B, 1, C).
            norm: apply the final norm to each.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: ``NCHW`` for (B, C, h, w) or ``NLC`` for (B, h*w, C).
            intermediates_only: leave the final tokens out.

        Returns:
            The list of features, or (tokens (B, N, C), that list).

        Raises:
            ValueError: an unknown format.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        stages = [i + 1 for i in take]
        x, grid, states, _ = self.run_blocks(x, stages=stages, num_blocks=last + 1 if stop_early else None)
        outputs = [self.norm(states[stage]) if norm else states[stage] for stage in stages]
        features: list[Any] = [tokens_to_map(y, grid) if output_fmt == 'NCHW' else y[:, 1:] for y in outputs]
        if return_prefix_tokens:
            features = [(feature, y[:, :1]) for feature, y in zip(features, outputs, strict=True)]
        return features if intermediates_only else (self.norm(x), features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the chosen intermediate outputs do not need; returns their 0-based block indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        del self.blocks[last + 1 :]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, '')
        return take

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a new, untrained classifier on its own device and in its own dtype; 0 classes for none."""
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
            if hasattr(self, '_traits'):  # timm >= 1.0.28 writes how to build the model again; the norm stays in place
                known = getattr(self, '_model_args', {})
                self._model_args = dict(known, use_fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self.num_classes = num_classes
        like = self.cls_token
        self.head = (
            nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else (nn.Identity())
        )
        self.head.train(self.training)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Changes the native size for good: resizes the stored patch kernel, positions and bias tables.

        Running at another size needs none of this, and loses nothing; this is for training on at a new size. After an
        error nothing has changed.

        Raises:
            ValueError: a size that is not one or two whole numbers above 0, or an image smaller than a patch.
        """
        old, new = self.window_size, self.patch_embed.grid_at(img_size, patch_size)
        resized: list[tuple[nn.Module, str, nn.Parameter]] = []
        if new != old:
            if self.pos_embed is not None:
                positions = resize_abs_pos_embed(self.pos_embed.detach(), old, new)
                resized.append((self, 'pos_embed', nn.Parameter(positions, self.pos_embed.requires_grad)))
            for owner in self.modules():
                name = 'relative_position_bias_table'
                table = getattr(owner, name, None)
                if isinstance(table, nn.Parameter):
                    rows = resize_rel_pos_bias_table(table.detach(), old, new, self.rel_pos_resize)
                    resized.append((owner, name, nn.Parameter(rows, table.requires_grad)))
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        for owner, name, parameter in resized:
            setattr(owner, name, parameter)
        self.feature_info = self._describe_features()
        if hasattr(self, '_traits'):  # timm >= 1.0.28 reads the current input size there
            self._traits = dict(self._traits, img_size=tuple(self.patch_embed.img_size))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers must not decay; it leaves out those of one dimension by itself."""
        return no_weight_decay(self)

    @torch.jit.ignore  # type: ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer ids for timm's layer-wise learning rate decay: the rule of ``param_groups.layer_id``."""
        return dict(
            stem=r'^cls_token|^mask_token|^pos_embed|^patch_embed',
            blocks=[(r'^(?:blocks|layers)\.(\d+)', None)],  # what matches nothing comes last, at the full rate
        )

    def init_non_persistent_buffers(self) -> None:
        """There are none; timm calls this after it has filled a model made on the meta device."""
