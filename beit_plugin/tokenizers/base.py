"""What every visual tokenizer does: images in [0, 1] to a grid of token ids and, where it can, back.

Shapes: B batch, C channels, H W pixels, h w grid of tokens.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..models.deferred_check import DeferredCheck

__all__ = ['Tokenizer', 'without_autocast']

_SLACK = 1e-3  # what rounding, half precision's too, may add to the range of the pixels
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For what decides between tokens: half precision has too few digits to tell near ones apart."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class Tokenizer(nn.Module, ABC):
    """The protocol of visual tokenizers; what trains, draws or caches tokens knows no more of one than this.

    Args:
        vocab_size: number of tokens; ids are 0 to vocab_size - 1.
        input_size: (H, W) pixels that it was trained for; any multiple of the patch will do.
        patch_size: (H, W) pixels that become one token.
        in_chans: channels of the images.

    A tokenizer brings ``_tokens``; one that can also draw has ``can_decode`` True and brings ``_images``.
    """

    can_decode = False

    def __init__(
        self, vocab_size: int, input_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self._range = _RangeGuard()
        self._check_size('input_size', *input_size)

    @abstractmethod
    def _tokens(self, images: Tensor) -> Tensor:
        """Checked images (B, C, H, W) to ids (B, h, w) int64."""

    def _images(self, tokens: Tensor) -> Tensor:
        """Checked ids (B, h, w) to images (B, C, H, W) in [0, 1]."""
        raise NotImplementedError(
            f'{type(self).__name__} cannot draw its tokens (can_decode is False); use a tokenizer with a decoder of '
            'images, such as the dVAE of DALL-E with its decoder loaded'
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images to token ids; nothing about the tokenizer changes, also while it is in training mode.

        Args:
            images: (B, in_chans, H, W) floating point in [0, 1], not normalised; H and W multiples of the patch.

        Returns:
            (B, h, w) int64 with h = H / patch, w = W / patch.

        Raises:
            ValueError: see ``check_images``.
        """
        self.check_images(images)
        return self._tokens(images)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Token ids to images.

        Args:
            tokens: (B, h, w) integers from 0 to vocab_size - 1.

        Returns:
            (B, in_chans, H, W) float32 in [0, 1] with H = h * patch, W = w * patch.

        Raises:
            NotImplementedError: the tokenizer has no decoder of images; ``can_decode`` says so beforehand.
            ValueError: tokens of another shape or dtype, or out of range.
        """
        if self.can_decode:
            self.check_tokens(tokens)
        return self._images(tokens)

    def check_images(self, images: Tensor) -> None:
        """Raises ValueError for images that are no tensor of (B, in_chans, H, W) floating point values in [0, 1].

        On CUDA the range of the first batch is reported at once and that of later ones in the next call, so that the
        CPU need not wait for the GPU in every step.
        """
        if not isinstance(images, Tensor):
            raise ValueError(
                f'expected images as a torch tensor, got {type(images).__name__}; use torch.as_tensor, or '
                'torchvision.transforms.functional.pil_to_tensor(image) / 255'
            )
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f'expected images of shape (B, {self.in_chans}, H, W), got {tuple(images.shape)}; convert them to '
                f'{self.in_chans} channels, and add a dimension of 1 to a single image'
            )
        if not images.is_floating_point():
            raise ValueError(f'expected images as floating point in [0, 1], got {images.dtype}; divide bytes by 255')
        self._check_size('images', *images.shape[2:])
        self._range(images)

    def _check_size(self, what: str, H: int, W: int) -> None:
        ph, pw = self.patch_size
        if H % ph or W % pw or not H or not W:
            lower, right = max(H // ph, 1) * ph, max(W // pw, 1) * pw
            raise ValueError(
                f'expected {what} with sides that are multiples of the {ph}x{pw} patch, got {H}x{W} pixels; resize or '
                f'crop to {lower}x{right}, or to the {self.input_size[0]}x{self.input_size[1]} of the tokenizer'
            )

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises ValueError for tokens that are no tensor of (B, h, w) integers from 0 to vocab_size - 1."""
        if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS or tokens.ndim != 3:
            kind = f'{tokens.dtype} of shape {tuple(tokens.shape)}' if isinstance(tokens, Tensor) else type(tokens)
            raise ValueError(f'expected tokens as integers of shape (B, h, w), got {kind}; give what encode returns')
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < self.vocab_size):
            raise ValueError(
                f'expected tokens from 0 to {self.vocab_size - 1}, got {int(tokens.min())} to {int(tokens.max())}; '
                'decode them with the tokenizer that made them'
            )


class _RangeGuard:
    """Finds pixels outside of [0, 1] without a wait for the GPU in every step; see ``Tokenizer.check_images``."""

    def __init__(self) -> None:
        self._later = DeferredCheck()
        self._seen = False

    def __call__(self, images: Tensor) -> None:
        if torch.compiler.is_compiling() or not images.numel() or images.is_meta:
            return
        extremes = torch.stack(torch.aminmax(images.detach())).float()  # of a NaN both are NaN
        if not images.is_cuda or not self._seen:
            self._seen = True
            self._raise_if(extremes)
            return
        last = self._later.collect()
        if last is not None:
            self._raise_if(last[0])
        self._later.send(extremes)

    @staticmethod
    def _raise_if(extremes: Tensor) -> None:
        low, high = extremes.tolist()
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise ValueError(
                f'expected images with values in [0, 1], got {low:.4g} to {high:.4g}; give them before normalisation, '
                'divide values up to 255 by 255, and clamp(0, 1) what a resize has overshot'
            )
