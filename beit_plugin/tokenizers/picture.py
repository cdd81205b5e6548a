"""Pictures of tokens: decoded where the tokenizer can, else one colour a token.

Shapes: B images, C channels, H W pixels, h w grid of tokens, V vocabulary, D code dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .base import Tokenizer
from .vqkd import VQKD

__all__ = ['hide', 'side_by_side', 'token_colours', 'token_images', 'with_titles']

_HIDDEN = 0.5  # grey of what the model does not see
_GAP = 2  # white pixels between panels
_TITLE = 16  # pixels above them


def token_colours(tokenizer: Tokenizer) -> Tensor:
    """RGB in [0, 1] for each token (V, 3): near codes of a VQ-KD look alike, other tokens have random colours."""
    if not isinstance(tokenizer, VQKD):
        return torch.rand(tokenizer.vocab_size, 3, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.quantize.weight.detach().double().cpu()  # V, D
    codes = codes - codes.mean(0)
    axes = torch.linalg.eigh(codes.T @ codes).eigenvectors[:, -3:].flip(1)  # D, 3: the directions of most variance
    axes = F.pad(axes, (0, 3 - axes.shape[1]))
    axes = axes * torch.where(axes.sum(0) < 0, -1.0, 1.0)  # an eigenvector has no sign of its own
    places = (codes @ axes).argsort(0).argsort(0)  # V, 3: ranks, so that the colours are spread evenly
    return (places / max(len(codes) - 1, 1)).float()


@torch.no_grad()
def token_images(tokenizer: Tokenizer, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures of tokens.

    Args:
        tokenizer: that gave them.
        tokens: (B, h, w).
        size: (H, W) pixels.

    Returns:
        (B, 3, H, W) float32 in [0, 1] on the CPU.
    """
    if tokenizer.can_decode and tokenizer.in_chans == 3:
        weight = next(tokenizer.parameters(), tokens)
        images = tokenizer.decode(tokens.to(weight.device)).float().cpu()
        return F.interpolate(images, size, mode='bilinear', antialias=True).clamp(0, 1)
    colours = token_colours(tokenizer)[tokens.cpu()]  # B, h, w, 3
    return F.interpolate(colours.permute(0, 3, 1, 2), size, mode='nearest')


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] with the patches that the mask (B, h, w) hides in grey."""
    hidden = F.interpolate(mask[:, None].float(), images.shape[2:], mode='nearest')
    return images * (1 - hidden) + _HIDDEN * hidden


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Columns of B images (B, 3, H, W) in [0, 1], a row for each image, to one picture (height, width, 3) uint8."""
    padded = F.pad(torch.stack(columns, 1), (_GAP, _GAP, _GAP, _GAP), value=1.0)  # B, columns, 3, H+, W+
    picture = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # B*H+, columns*W+, 3
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def with_titles(picture: Tensor, titles: Sequence[str]) -> np.ndarray:
    """A picture of ``side_by_side`` (height, width, 3) with a word above each of its columns, uint8."""
    height, width, _ = picture.shape
    canvas = Image.new('RGB', (width, _TITLE + height), 'white')
    canvas.paste(Image.fromarray(picture.numpy()), (0, _TITLE))
    pen = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        pen.text((i * width // len(titles) + _GAP, _GAP), title, fill='black')
    return np.array(canvas)
