"""A frozen vision model as the teacher of VQ-KD: images in, one vector for each token out.

The reference, unilm ``beit2/modeling_vqkd.py`` at 80d673a, has two teachers written into it, CLIP and DINO ViT-B/16;
this takes any model with the methods of timm's.

Shapes: B batch, C channels, H W pixels, h w grid, N tokens, F channels of the teacher.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Teacher']


class Teacher(nn.Module):
    """Adapter that asks a timm model what it sees in each patch.

    It stays in evaluation mode and asks for no gradient. Keep it outside of the module that is trained, so that it is
    neither saved nor wrapped with it.

    Args:
        model: a timm model, or any module with ``forward_features`` that gives tokens (B, N, C) or a map: (B, C, h, w),
            or (B, h, w, C) where its ``output_fmt`` is NHWC.
        mean, std: of its normalisation, one number a channel, for images in [0, 1]; by default those of the model's
            ``pretrained_cfg``.
        input_size: (H, W) pixels that it gets; by default those that the model was built for. Images of other sizes
            are resized.
        through_classifier: give each token through the model's last layer; unilm's CLIP teacher does, and then F is
            512.

    Raises:
        ValueError: no ``forward_features``, or nothing says how the model wants its images.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: tuple[int, int] | None = None,
        through_classifier: bool = False,
    ) -> None:
        super().__init__()
        if not hasattr(model, 'forward_features'):
            raise ValueError(
                f'a teacher needs forward_features, and {type(model).__name__} has none; give a model of '
                'timm.create_model'
            )
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        mean = cfg.get('mean') if mean is None else mean
        std = cfg.get('std') if std is None else std
        if mean is None or std is None:
            raise ValueError(
                f'{type(model).__name__} does not say how it normalises images (it has no pretrained_cfg); give '
                'mean=... and std=...'
            )
        self.model = model.eval().requires_grad_(False)
        self.input_size = _input_size(model, cfg) if input_size is None else input_size
        self.through_classifier = through_classifier
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(tuple(values)).view(1, -1, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """F, the ``target_dim`` of the tokenizer."""
        return int(getattr(self.model, 'num_classes' if self.through_classifier else 'num_features'))

    def train(self, mode: bool = True) -> 'Teacher':
        """Stays in evaluation mode: a teacher that drops paths would teach noise."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the model sees.

        Args:
            images: (B, C, H, W) floating point in [0, 1].
            grid: (h, w) of the tokens to be taught; a model with another grid of its own is resized to it.

        Returns:
            (B, h*w, F).

        Raises:
            ValueError: the model gives something that is no tokens and no map.
        """
        size = tuple(images.shape[2:])
        if self.input_size is not None and size != self.input_size:
            images = F.interpolate(images, self.input_size, mode='bicubic', antialias=True).clamp(0, 1)
            size = self.input_size
        maps = self._maps(self.model.forward_features((images - self.mean) / self.std), size)  # type: ignore[operator]
        if tuple(maps.shape[2:]) != tuple(grid):
            maps = F.interpolate(maps.float(), tuple(grid), mode='bilinear', antialias=True)
        return maps.flatten(2).transpose(1, 2)  # B, h*w, F

    def _maps(self, x: Any, size: tuple[int, ...]) -> Tensor:
        """Output of ``forward_features`` for images of (H, W) pixels to maps (B, F, h, w)."""
        prefix = int(getattr(self.model, 'num_prefix_tokens', 0))
        if isinstance(x, Tensor) and x.ndim == 3:
            x = x[:, prefix:]
            h = max(round(sqrt(x.shape[1] * size[0] / size[1])), 1)
            if h * (x.shape[1] // h) == x.shape[1]:
                return self._finish(x).transpose(1, 2).unflatten(2, (h, -1))
        elif isinstance(x, Tensor) and x.ndim == 4:
            x = x if str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NHWC') else x.permute(0, 2, 3, 1)
            return self._finish(x).permute(0, 3, 1, 2)
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f'forward_features of {type(self.model).__name__} must give tokens (B, {prefix} + h*w, C) or a map, got '
            f'{got} for images of {size[0]}x{size[1]} pixels; take another teacher, or wrap it in a module that does'
        )

    def _finish(self, x: Tensor) -> Tensor:
        """Features (..., C) through what a model that pools does after it: its norm and, if wanted, its last layer."""
        x = self.model.fc_norm(x) if isinstance(getattr(self.model, 'fc_norm', None), nn.Module) else x  # type: ignore
        return self.model.get_classifier()(x) if self.through_classifier else x  # type: ignore[operator]


def _input_size(model: nn.Module, cfg: Any) -> tuple[int, int] | None:
    """(H, W) pixels that a model was built for; None where it does not say."""
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or (cfg.get('input_size') or ())[-2:]
    return (int(size[0]), int(size[1])) if size else None
