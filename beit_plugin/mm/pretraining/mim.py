"""``BEiTPretrainer`` and ``BEiTMIMHead``: masked image modelling of BEiT v1 and v2 under mmengine's Runner.

The model is the one of ``models.mim``; here it gets its tokens, and the training what it logs. Its checkpoints load as
they are where a pre-trained BEiT is wanted: the tokenizer is not in them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor

from ...checkpoints import load
from ...models.beit import VARIANTS
from ...models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling, MIMOutput, masked_positions
from ...tokenizers import Tokenizer, load_tokenizer
from .frozen_companion import ModelWithAside

__all__ = ['BEiTMIMHead', 'BEiTPretrainer']

MODELS.register_module(name='BEiTTokenizer')(load_tokenizer)


@MODELS.register_module()
class BEiTMIMHead:
    """What is predicted, and what of it is logged; its layers are those of the model that it makes.

    Args:
        vocab_size: number of visual tokens; None for those of the tokenizer.
        head_layers: 0 for BEiT v1; the extra blocks on the [CLS] token of BEiT v2, whose number is 2.
        early_layers: blocks before the one whose patch tokens these see; see ``BeitV2ForMaskedImageModeling``.

    Raises:
        ValueError: a number below 0, or ``early_layers`` without extra blocks.
    """

    def __init__(self, vocab_size: int | None = None, head_layers: int = 0, early_layers: int | None = None) -> None:
        if head_layers < 0 or (vocab_size is not None and vocab_size < 1):
            raise ValueError(
                f'vocab_size must be at least 1 and head_layers at least 0, got {vocab_size} and {head_layers}'
            )
        if early_layers is not None and not head_layers:
            raise ValueError(f'got early_layers={early_layers} without head_layers; BEiT v2 has head_layers=2')
        self.vocab_size, self.head_layers, self.early_layers = vocab_size, head_layers, early_layers

    def model(self, vocab_size: int, backbone: Mapping[str, Any]) -> BeitForMaskedImageModeling:
        """The model with this head and the arguments of the encoder."""
        if not self.head_layers:
            return BeitForMaskedImageModeling(vocab_size=vocab_size, **backbone)
        layers = dict(head_layers=self.head_layers, early_layers=self.early_layers)
        return BeitV2ForMaskedImageModeling(vocab_size=vocab_size, **layers, **backbone)  # type: ignore[arg-type]

    @staticmethod
    def losses(output: MIMOutput, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss and what tells how it does, all scalars.

        Args:
            output: of the model, with labels and without ``all_logits``.
            tokens: (B, h, w) of all patches.
            targets: (M,) of the masked patches.

        Returns:
            ``loss``, the only entry with a gradient; ``acc``, share of the masked patches whose token is predicted;
            ``top_token``, that of the most frequent token among them, which is what guessing gets; ``codebook``, share
            of the vocabulary in the tokens of the batch; of v2 also ``cls_part`` of the loss and ``cls_acc``.
        """
        assert output.loss is not None
        found = {'loss': output.loss}
        with torch.no_grad():
            count = max(len(targets), 1)
            vocab = output.logits.shape[-1]
            found['acc'] = (output.logits.argmax(-1) == targets).sum() / count
            found['top_token'] = _counts(targets, vocab).max() / count
            found['codebook'] = (_counts(tokens.long(), vocab) > 0).float().mean()
            if output.cls_pt_loss is not None and output.cls_pt_logits is not None:
                found['cls_part'] = output.cls_pt_loss.detach()
                found['cls_acc'] = (output.cls_pt_logits.argmax(-1) == targets).sum() / count
        return found


@MODELS.register_module()
class BEiTPretrainer(ModelWithAside):
    """Masked image modelling.

    Args:
        backbone: arguments of ``models.beit.Beit``; ``variant`` names sizes in ``VARIANTS``.
        tokenizer: gives the tokens; ``dict(type='BEiTTokenizer', source=...)`` with the arguments of
            ``tokenizers.load_tokenizer``, or a ``Tokenizer``. It moves with the model but is not trained, saved,
            averaged or wrapped with it.
        head: arguments of ``BEiTMIMHead``.
        pretrained: a checkpoint of masked image modelling, of any dialect, to go on from.
        data_preprocessor: ``dict(type='BEiTMIMDataPreprocessor', ...)``.

    Raises:
        ValueError: an unknown variant, a vocabulary that is not the tokenizer's, or what ``Beit`` raises.
        CheckpointError: no tokenizer there; from ``init_weights``, a checkpoint that does not fit.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        tokenizer: Mapping[str, Any] | Tokenizer,
        head: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        frozen = tokenizer if isinstance(tokenizer, Tokenizer) else MODELS.build(dict(tokenizer))
        super().__init__(frozen, data_preprocessor)
        self.pretrained = pretrained
        self.head: BEiTMIMHead = MODELS.build({'type': 'BEiTMIMHead', **(head or {})})
        vocab_size = self.head.vocab_size or self.tokenizer.vocab_size
        if vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f'the head has vocab_size={vocab_size} and the tokenizer {self.tokenizer.vocab_size} tokens; leave '
                'vocab_size out, or take the tokenizer that the head is for'
            )
        self.model = self.head.model(vocab_size, backbone_arguments(backbone))
        self._looked = False  # at known tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """What gives the tokens."""
        return self.aside

    def init_weights(self) -> None:
        """Initialises, and loads the checkpoint of ``pretrained`` if there is one."""
        self.model.init_weights()
        if self.pretrained is not None:
            print_log(f'BEiTPretrainer: {load(self.model, self.pretrained)}', logger='current')

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        images: Tensor | None = None,
        mode: str = 'tensor',
        tokens: Tensor | None = None,
        num_masked: int | None = None,
    ) -> Any:
        """One batch.

        Args:
            inputs: (B, C, H, W) normalised, for the encoder.
            mask: (B, h, w) bool, True where a patch is hidden.
            images: (B, C, H', W') in [0, 1], for the tokenizer: the same crop, of any size that gives h x w tokens.
            mode: ``loss`` for what ``BEiTMIMHead.losses`` gives; ``predict`` for the tokens of all patches, those of
                the tokenizer and those that the model predicts behind the mask, (B, h, w) each; ``tensor`` for the
                logits, see ``BeitForMaskedImageModeling``.
            tokens: (B, h, w), where they are known; the tokenizer then does not run.
            num_masked: M, patches that the mask hides; where it is given, no step waits for the GPU.

        Raises:
            ValueError: no mask, or neither images nor tokens, where they are needed, another grid of tokens than of
                patches, tokens out of range in the first batch, an unknown mode, or what model and tokenizer raise.
        """
        if mode == 'tensor':
            return self.model(inputs, mask).logits
        if mode not in ('loss', 'predict'):
            raise ValueError(f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")
        if mask is None or (images is None and tokens is None):
            raise ValueError(
                'a batch for masked image modelling needs mask and images; let it be made by '
                "collate_fn=dict(type='beit_mim_collate', masking=dict(...)) and BEiTMIMDataPreprocessor"
            )
        ids = self._tokens(images, tokens)
        if mask.shape == ids.flatten(1).shape:
            mask = mask.view_as(ids)
        if mask.ndim != 3:
            raise ValueError(f'expected a mask of shape (B, h, w) or (B, h*w), got {tuple(mask.shape)}')
        if ids.shape != mask.shape:
            (th, tw), (h, w) = ids.shape[1:], mask.shape[1:]
            patches = tuple(n // p for n, p in zip(inputs.shape[2:], self.model.patch_embed.patch_size, strict=True))
            if patches != (h, w):
                raise ValueError(
                    f'the images have {patches[0]} x {patches[1]} patches, but the masks have {h} x {w}; set grid of '
                    f'the masking to {patches}'
                )
            ph, pw = self.tokenizer.patch_size
            H, W = th * ph, tw * pw
            again = '' if tokens is None else ', and make the tokens anew'
            raise ValueError(
                f'the tokenizer gives {th} x {tw} tokens of images of {H} x {W} pixels, but the masks have {h} x {w} '
                f"patches; set token_size of the data set's views to {(h * ph, w * pw)}{again}"
            )
        if mode == 'predict':
            return ids, self.model(inputs, mask, all_logits=True).logits.argmax(-1).view_as(ids)
        index = masked_positions(mask, num_masked if mask.is_cuda else None)  # M
        targets = ids.flatten().index_select(0, index).long()
        return self.head.losses(self.model(inputs, mask, targets), ids, targets)

    def _tokens(self, images: Tensor | None, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            assert images is not None
            return self.tokenizer.encode(images)
        if not self._looked and not torch.compiler.is_compiling():  # once: a GPU must be waited for
            self.tokenizer.check_tokens(tokens)
            self._looked = True
        return tokens


def backbone_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Beit``, with the sizes of the ``variant`` that they name.

    Raises:
        ValueError: an unknown variant.
    """
    options = dict(given)
    variant = options.pop('variant', None)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f'unknown variant {variant!r} of BEiT; known are {", ".join(VARIANTS)}')
    return {**VARIANTS.get(variant or '', {}), **options}


def _counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token occurs (vocab_size,) float32; unlike ``bincount`` without a wait for the GPU."""
    ones = torch.ones(tokens.numel(), device=tokens.device)
    return torch.zeros(vocab_size, device=tokens.device).index_add_(0, tokens.flatten(), ones)
