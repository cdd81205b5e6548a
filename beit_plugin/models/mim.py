"""Masked image modelling: BEiT predicts the visual tokens of patches that it does not see.

Papers:
    BEiT, https://arxiv.org/abs/2106.08254, section 2.3
    BEiT v2, https://arxiv.org/abs/2208.06366, section 2.3: a second prediction through the [CLS] token
Reference: https://github.com/microsoft/unilm (MIT licence), ``beit/modeling_pretrain.py`` at 2312c6f and
``beit2/modeling_pretrain.py`` at 80d673a. Parameter names are unilm's. Written anew; what differs from the reference:
    * the loss is part of the model, and an empty mask gives 0 instead of NaN;
    * the extra blocks of v2 start from the same distribution as the others; the reference builds them after it has
      initialised the rest, so that they keep PyTorch's default, which it then rescales;
    * norm and head are always shared by both predictions of v2, as in every published run.

Shapes: B batch, C channels, H W pixels, h w grid, N = 1 + h*w tokens, M masked patches of the whole batch, K heads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .beit import Beit
from .block import Block, PositionBias
from .deferred_check import DeferredCheck, LabelCheck

__all__ = ['BeitForMaskedImageModeling', 'BeitV2ForMaskedImageModeling', 'MIMOutput', 'masked_positions']

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MIMOutput(NamedTuple):
    """What a masked image model gives; the last two are v2's."""

    loss: Tensor | None  # scalar, float32 or wider, the sum over the branches; None without labels
    logits: Tensor  # M, vocab_size for the masked patches, or B, h*w, vocab_size for all
    cls_pt_loss: Tensor | None = None  # the part of the loss that comes from the [CLS] branch
    cls_pt_logits: Tensor | None = None  # of the [CLS] branch, shaped as logits


def masked_positions(mask: Tensor, count: int | None = None) -> Tensor:
    """Where a mask of any shape is True, as indices (M,) into it flattened, ascending.

    Args:
        mask: bool.
        count: M, where it is known. Then nothing waits for a GPU, and ``torch.compile`` need not break its graph.
    """
    flat = mask.flatten()
    if count is None:
        return flat.nonzero().squeeze(1)
    return flat.logical_not().to(torch.uint8).argsort(stable=True)[:count]


def _refuse_pooling(global_pool: str | None) -> None:
    if global_pool:
        raise ValueError(f'patches are predicted one by one, so global_pool must be left out, got {global_pool!r}')


class BeitForMaskedImageModeling(Beit):
    """BEiT with a linear layer that predicts visual tokens (v1).

    The form is that of pre-training: a mask token, one position bias for all layers, a final norm, no classifier. So
    is the start: unlike in fine-tuning (``Beit``), all normals, the patch kernel's too, are cut at one ``init_std``.

    Args:
        vocab_size: number of visual tokens; 0 for no head.
        kwargs: those of ``Beit``, less the classifier's; ``drop_rate`` is dropout before the head.

    Raises:
        ValueError: a negative vocabulary, or what ``Beit`` raises.
    """

    def __init__(self, *, vocab_size: int = 8192, **kwargs: Any) -> None:
        _refuse_pooling(kwargs.pop('global_pool', None))
        kwargs = {'use_mask_token': True, 'use_rel_pos_bias': False, 'use_shared_rel_pos_bias': True, **kwargs}
        super().__init__(num_classes=vocab_size, global_pool='', use_fc_norm=False, **kwargs)
        self._guard = LabelCheck('use the tokenizer that the model was built for, or set vocab_size to its vocabulary')
        self._counted = DeferredCheck()  # at the numbers of masked patches

    def _init_head(self, num_classes: int, *args: Any, **dd: Any) -> None:
        super()._init_head(0, *args, **dd)
        self._set_head(num_classes, **dd)

    def _set_head(self, vocab_size: int, **dd: Any) -> None:
        if vocab_size < 0:
            raise ValueError(f'vocab_size must be the number of visual tokens, or 0 for no head, got {vocab_size}')
        self.num_classes = vocab_size
        self.lm_head = nn.Linear(self.embed_dim, vocab_size, **dd) if vocab_size else nn.Identity()

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialisation of pre-training; see ``Beit.init_weights``."""
        super().init_weights(needs_reset)
        self._draw_layer(self.patch_embed.proj)

    def _draw(self, tensor: Tensor) -> None:
        trunc_normal_(tensor, std=self.init_std, a=-self.init_std, b=self.init_std)

    def _draw_layer(self, layer: nn.Module) -> None:
        for name, parameter in layer.named_parameters():
            nn.init.zeros_(parameter) if name == 'bias' else self._draw(parameter)

    def get_classifier(self) -> nn.Module:
        """The layer that predicts visual tokens."""
        return self.lm_head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the model a new, untrained head for another vocabulary, on its own device and in its own dtype.

        Args:
            num_classes: number of visual tokens; 0 for no head, then the logits are the normalised patch tokens.
            global_pool: only None or empty; each patch is predicted for itself.

        Raises:
            ValueError: another pooling, or a negative vocabulary.
        """
        _refuse_pooling(global_pool)
        self._set_head(num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
        self._draw_layer(self.lm_head)
        self.lm_head.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens (B, N, C) to logits (B, h*w, vocab_size) of all patches, or to the patch tokens."""
        x = x[:, self.num_prefix_tokens :]
        return x if pre_logits else self.lm_head(self.head_drop(x))

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        all_logits: bool = False,
    ) -> MIMOutput:
        """Predicts visual tokens; with labels, also the loss.

        Args:
            pixel_values: (B, in_chans, H, W), normalised, any H and W of at least one patch.
            bool_masked_pos: (B, h*w) or (B, h, w) bool, True where a patch is hidden; any number per image, also none.
            labels: integers from 0 to vocab_size - 1: (M,) tokens of the masked patches, image by image in row-major
                order, or (B, h*w) or (B, h, w) tokens of all patches, of which the masked ones count.
            all_logits: run the head on all patches even if there is a mask.

        Returns:
            Logits of the masked patches (M, vocab_size) if there is a mask, else of all patches. The loss is the mean
            cross-entropy of the masked patches, in v2 that of both branches added; 0, with a graph, if there are none.

        Raises:
            ValueError: a mask or labels of a wrong shape or dtype, labels without a mask or without a head, another
                number of labels than of masked patches, or labels that are no token (on CUDA the last two are reported
                in the next step, see ``LabelCheck``, so as not to wait for the device; compiled, they make the loss
                NaN).
        """
        if labels is not None and bool_masked_pos is None:
            raise ValueError('got labels without bool_masked_pos; labels belong to masked patches, so give the mask')
        if labels is not None and not self.num_classes:
            raise ValueError('got labels, but the model has no head; give it one with reset_classifier')
        index = targets = None
        if isinstance(bool_masked_pos, Tensor) and not (all_logits and labels is None):
            # first of all: CUDA may wait here for the number of patches, and torch.compile breaks its graph
            index = masked_positions(bool_masked_pos, self._known_count(bool_masked_pos, labels))  # M
        x, grid = self.embed(pixel_values, bool_masked_pos)
        if labels is not None and bool_masked_pos is not None and index is not None:
            tokens = self._token_map(labels, bool_masked_pos.flatten(1), grid, index)  # B, h*w
            targets = tokens.flatten().index_select(0, index)  # M
        wrong = None
        if targets is not None and bool_masked_pos is not None and torch.compiler.is_compiling():
            # nothing can be reported there: the loss of what is wrong is NaN
            wrong = ((targets < 0) | (targets >= self.num_classes)).any() | (bool_masked_pos.sum() != len(targets))
            targets = targets.clamp(0, self.num_classes - 1)
        branches = self._branches(x, self.position_bias(grid, x))
        loss, logits = self._predict(branches[0], index, targets, all_logits)
        if loss is not None and wrong is not None:
            loss = loss.masked_fill(wrong, float('nan'))
        if len(branches) == 1:
            return MIMOutput(loss, logits)
        cls_pt_loss, cls_pt_logits = self._predict(branches[1], index, targets, all_logits)
        total = None if loss is None or cls_pt_loss is None else loss + cls_pt_loss
        return MIMOutput(total, logits, cls_pt_loss, cls_pt_logits)

    def _branches(self, x: Tensor, bias: PositionBias) -> list[Tensor]:
        """Embedded tokens (B, N, C) to those that each prediction is made from, before the norm."""
        return [self.run_layers(self.blocks, x, bias)[0]]

    def _predict(
        self, x: Tensor, index: Tensor | None, targets: Tensor | None, all_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        x = self.norm(x)[:, self.num_prefix_tokens :]  # B, h*w, C
        if index is not None and not all_logits:
            x = x.flatten(0, 1).index_select(0, index)  # M, C
        logits = self.lm_head(self.head_drop(x))
        if index is None or targets is None:
            return None, logits
        picked = logits.flatten(0, 1).index_select(0, index) if all_logits else logits  # M, vocab_size
        picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
        return F.cross_entropy(picked, targets, reduction='sum') / max(len(targets), 1), logits

    def _known_count(self, mask: Tensor, labels: Tensor | None) -> int | None:
        """M, if the labels tell and asking would take a wait; whether they are right is seen in the next step."""
        listed = isinstance(labels, Tensor) and labels.ndim == 1 and labels.dtype in _INTEGERS
        if not mask.is_cuda or labels is None or not listed or len(labels) > mask.numel():
            return None
        if not torch.compiler.is_compiling():
            last = self._counted.collect()
            hidden, given = (0, 0) if last is None else (int(last[0]), last[1])
            if hidden != given:
                raise ValueError(
                    f'labels must have shape ({hidden},) for the {hidden} masked patches of the batch before, got '
                    f'({given},); take them from the tokens of the same images with tokens[bool_masked_pos]'
                )
            self._counted.send(mask.sum(), len(labels))
        return len(labels)

    def _token_map(self, labels: Tensor, mask: Tensor, grid: tuple[int, int], index: Tensor) -> Tensor:
        """Labels of any form to checked tokens (B, h*w), 0 where no patch is masked."""
        B, (h, w), num_masked = len(mask), grid, len(index)
        kind = f'{labels.dtype} of shape {tuple(labels.shape)}' if isinstance(labels, Tensor) else type(labels).__name__
        if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
            raise ValueError(f'labels must be a tensor of integers, got {kind}; give token indices, not logits')
        labels = labels.long()
        if labels.ndim == 1 and len(labels) == num_masked:
            tokens = labels.new_zeros(mask.numel()).scatter(0, index, labels).view_as(mask)
        elif tuple(labels.shape) in ((B, h * w), (B, h, w)):
            tokens = labels.reshape(B, h * w).masked_fill(~mask, 0)
        else:
            raise ValueError(
                f'labels must have shape ({num_masked},) for the {num_masked} masked patches of this batch, or '
                f'({B}, {h * w}) or ({B}, {h}, {w}) for all its patches, got {kind}; take them from the tokens of the '
                'same images with tokens[bool_masked_pos]'
            )
        return self._guard(tokens, self.num_classes, ignore_index=None)


class BeitV2ForMaskedImageModeling(BeitForMaskedImageModeling):
    """BEiT v2: a second prediction that has to get what it knows of the image from the [CLS] token.

    The last [CLS] token joins the patch tokens of an early block, runs through a few more blocks with the same position
    bias, and the same norm and head predict the same tokens.

    Args:
        depth: number of blocks.
        early_layers: number of blocks that the patch tokens have been through, as unilm counts: 9 takes the output of
            the ninth block. By default all but three: 9 of 12 (base), 21 of 24 (large), the published values.
            mmpretrain's ``out_indices=[-4, -1]`` (0-based: 8 and 11 of 12) takes the same block; ``early_layers=9``
            of its neck only sets drop path and initial scale of the extra blocks.
        head_layers: number of extra blocks; their stochastic depth goes on from block ``early_layers``.
        kwargs: those of ``BeitForMaskedImageModeling``.

    Raises:
        ValueError: an early block that does not exist, or no extra block.
    """

    def __init__(
        self, *, depth: int = 12, early_layers: int | None = None, head_layers: int = 2, **kwargs: Any
    ) -> None:
        self.early_layers = depth - 3 if early_layers is None else early_layers
        self.head_layers = head_layers
        if not 1 <= self.early_layers <= depth or head_layers < 1:
            raise ValueError(
                f'early_layers must be from 1 to the depth {depth} and head_layers at least 1, got '
                f'{self.early_layers} and {head_layers}'
            )
        super().__init__(depth=depth, **kwargs)

    def _init_blocks(self, make_block: Callable[..., Block], depth: int, drop_path_rate: float) -> None:
        super()._init_blocks(make_block, depth, drop_path_rate)
        first, last = self.early_layers, self.early_layers + self.head_layers
        rates = torch.linspace(0, drop_path_rate, max(depth, last), device='cpu').tolist()
        self.cls_pt_layers = nn.ModuleList(make_block(drop_path=rate) for rate in rates[first:last])

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialisation of pre-training; the extra blocks are scaled as the ones in whose place they stand."""
        super().init_weights(needs_reset)
        self._scale_blocks(self.cls_pt_layers, self.early_layers + 1, needs_reset)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As ``Beit``'s; the [CLS] branch goes with the head, or with the block that it reads."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.blocks) < self.early_layers:
            del self.cls_pt_layers[:]
        return take

    def _branches(self, x: Tensor, bias: PositionBias) -> list[Tensor]:
        x, states, _ = self.run_layers(self.blocks, x, bias, stages=(self.early_layers,))
        if not len(self.cls_pt_layers):
            return [x]
        y = torch.cat((x[:, :1], states[self.early_layers][:, 1:]), dim=1)  # B, N, C
        return [x, self.run_layers(self.cls_pt_layers, y, bias)[0]]
