"""``BEiTVQKD``: training of one's own tokenizer under mmengine's Runner, with any timm model as the teacher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.registry import MODELS
from torch import Tensor

from ...checkpoints.convert import some
from ...tokenizers import VQKD, Teacher, create_vqkd
from .frozen_companion import ModelWithAside

__all__ = ['BEiTVQKD', 'build_teacher']


def build_teacher(
    name: str,
    weights: str | None = 'pretrained',
    *,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    input_size: tuple[int, int] | None = None,
    through_classifier: bool = False,
    **options: Any,
) -> Teacher:
    """A timm model as the teacher.

    Args:
        name: of ``timm.create_model``; the published VQ-KD had CLIP ViT-B/16, with ``through_classifier``:
            ``vit_base_patch16_clip_224.openai``.
        weights: ``pretrained`` for the published ones, which timm downloads; a file; None for random ones, whose
            features still tell colours and textures apart.
        seed: of random weights; the same each time, so that a resumed training has the same teacher.
        mean, std, input_size, through_classifier: see ``Teacher``.
        options: of ``timm.create_model``, such as ``img_size``.

    Raises:
        ValueError: no model of that name, no such file, or weights that cannot be had.
    """
    pretrained = weights == 'pretrained'
    if not timm.is_model(name):
        raise ValueError(f'timm {timm.__version__} has no model {name!r} for a teacher; see timm.list_models()')
    if weights is not None and not pretrained and not Path(weights).is_file():
        raise ValueError(
            f"the teacher's weights {weights} do not exist; give a file, 'pretrained' for timm's own, or None for "
            'random ones'
        )
    options = {'num_classes': 0} | options if not through_classifier else options
    file = dict(pretrained_cfg_overlay=dict(file=weights)) if weights is not None and not pretrained else {}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=weights is not None, **file, **options)
        except Exception as error:  # of the hub, the network or the file: each has its own
            if weights is None:
                raise
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise ValueError(
                f'the teacher {name} could not be loaded ({reason}); give weights=FILE, or None for random ones'
            ) from error
        if weights is not None:
            drawn = []  # twice, to know what is drawn at all
            for number in (seed, seed + 1):
                torch.manual_seed(number)
                drawn.append(dict(timm.create_model(name, **options).named_parameters()))
            left = [
                key
                for key, value in model.named_parameters()
                if torch.equal(value, drawn[0][key]) and not torch.equal(value, drawn[1][key])
            ]
            if left:  # timm passes over names that do not fit
                raise ValueError(
                    f'the weights {weights} are not of the teacher {name}: they leave {some(left)} at random; give '
                    'those of that very model, or None for random ones'
                )
    return Teacher(model, mean=mean, std=std, input_size=input_size, through_classifier=through_classifier)


@MODELS.register_module()
class BEiTVQKD(ModelWithAside):
    """Trains a VQ-KD; ``tokenizers.load_tokenizer`` reads its checkpoints, as ``BEiTTokenizer`` of ``BEiTPretrainer``.

    Args:
        tokenizer: arguments of ``VQKD``; ``variant`` names the sizes of the encoder.
        teacher: arguments of ``build_teacher``, or a ``Teacher``; it moves with the model and is not saved with it.
        data_preprocessor: by default ``BEiTMIMDataPreprocessor``.

    Raises:
        ValueError: what ``VQKD`` and ``build_teacher`` raise.
    """

    def __init__(
        self,
        tokenizer: Mapping[str, Any],
        teacher: Mapping[str, Any] | Teacher,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(teacher if isinstance(teacher, Teacher) else build_teacher(**teacher), data_preprocessor)
        options = {'target_dim': self.teacher.dim, **tokenizer}
        variant = options.pop('variant', None)
        self.tokenizer = VQKD(**options) if variant is None else create_vqkd(variant, **options)

    @property
    def teacher(self) -> Teacher:
        """What the tokenizer learns from."""
        return self.aside

    def init_weights(self) -> None:
        """Nothing: the tokenizer was initialised as it was built."""

    def forward(
        self,
        inputs: Tensor,
        images: Tensor | None = None,
        mask: Tensor | None = None,
        mode: str = 'tensor',
        num_masked: int | None = None,
    ) -> Any:
        """One batch.

        Args:
            inputs: (B, C, H, W) normalised; of no use here.
            images: (B, C, H, W) in [0, 1].
            mask, num_masked: what a data loader of masked image modelling brings along; of no use either.
            mode: ``loss`` for the loss and, without gradient, its ``cosine`` and ``commitment`` parts, ``codebook``
                (share of the codes in use) and ``perplexity``; ``predict`` and ``tensor`` for the tokens (B, h, w).

        Raises:
            ValueError: no images, an unknown mode, or what ``VQKD`` raises.
        """
        if images is None or mode not in ('loss', 'predict', 'tensor'):
            raise ValueError(f"BEiTVQKD needs images, and mode 'loss', 'predict' or 'tensor', got {mode!r}")
        if mode != 'loss':
            return self.tokenizer.encode(images)
        grid = tuple(s // p for s, p in zip(images.shape[2:], self.tokenizer.patch_size, strict=True))
        found = self.tokenizer(images, self.teacher(images, grid))  # type: ignore[arg-type]
        return {
            'loss': found.loss,
            'cosine': found.cosine_loss,
            'commitment': found.commitment_loss,
            'codebook': found.usage,
            'perplexity': found.perplexity,
        }
