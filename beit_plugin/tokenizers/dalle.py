"""The discrete VAE of DALL-E, whose tokens BEiT v1 predicts.

Papers:
    DALL-E, Ramesh et al., https://arxiv.org/abs/2102.12092, appendix A
    BEiT, https://arxiv.org/abs/2106.08254, section 2.2: 8192 tokens, images of 112 pixels for a grid of 14x14
Reference: https://github.com/openai/DALL-E at 5be4b23 (``dall_e/encoder.py``, ``decoder.py``, ``utils.py``). Module
names are OpenAI's, its ``w`` and ``b`` are ``weight`` and ``bias``. Written anew; what differs from the reference:
    * images come in [0, 1], the pixel mapping is part of the tokenizer;
    * the first convolution of the decoder, over one-hot tokens, is the lookup that it amounts to.

Shapes: B batch, C channels, H W pixels, h w grid of tokens, V vocabulary.
"""

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.checks import height_and_width
from .base import Tokenizer, without_autocast

__all__ = ['DalleDecoder', 'DalleEncoder', 'DalleTokenizer', 'map_pixels', 'unmap_pixels']

LOGIT_LAPLACE_EPS = 0.1  # dall_e/utils.py
GROUPS = 4  # of blocks; between them the image is halved, so that a token stands for 8x8 pixels
PATCH = 2 ** (GROUPS - 1)
_MIXED_PRODUCT = 'dtype' in torch.ops.aten.mm.overloads()  # torch.mm(..., out_dtype=), from PyTorch 2.8 on


def map_pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] to the range in which the dVAE was trained, [0.1, 0.9]."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS


def unmap_pixels(x: Tensor) -> Tensor:
    """What the decoder gives after a sigmoid to images in [0, 1]."""
    return ((x - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)


def _conv(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(n_in, n_out, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(conv.weight, std=(n_in * kernel**2) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class _Block(nn.Module):
    """Residual block of four convolutions with the kernels given, the residual branch scaled by ``gain``."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = n_out // 4
        self.gain = gain
        self.id_path = _conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (n_in, hidden, hidden, hidden, n_out)
        for i, kernel in enumerate(kernels):
            layers[f'relu_{i + 1}'] = nn.ReLU(inplace=i > 0)  # the input is read by the other path too
            layers[f'conv_{i + 1}'] = _conv(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.gain)


def _groups(
    widths: list[int], blocks: int, kernels: tuple[int, int, int, int], between: str, layer: nn.Module
) -> dict[str, nn.Module]:
    """The groups of blocks from ``widths[0]`` to ``widths[-1]`` channels, ``layer`` behind each but the last."""
    gain = 1 / (GROUPS * blocks) ** 2
    groups: dict[str, nn.Module] = {}
    for i, width in enumerate(widths[1:]):
        group: OrderedDict[str, nn.Module] = OrderedDict(
            (f'block_{k + 1}', _Block(width if k else widths[i], width, kernels, gain)) for k in range(blocks)
        )
        if i < GROUPS - 1:
            group[between] = layer
        groups[f'group_{i + 1}'] = nn.Sequential(group)
    return groups


class _DallePart(nn.Module):
    """Convolutions in half precision, as OpenAI runs them on GPUs; the layer that meets the vocabulary in float32.

    Args:
        stem, groups, head: first layer, what ``_groups`` gives, last layer.
        compute_dtype: of the convolutions; None for OpenAI's rule, float16 on CUDA and the weights' dtype elsewhere.
    """

    def __init__(
        self, stem: nn.Conv2d, groups: dict[str, nn.Module], head: nn.Conv2d, compute_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        output = nn.Sequential(OrderedDict([('relu', nn.ReLU()), ('conv', head)]))
        self.blocks = nn.Sequential(OrderedDict([('input', stem), *groups.items(), ('output', output)]))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the order that Tensor Cores read

    def _autocast(self, x: Tensor) -> AbstractContextManager:
        dtype = torch.float16 if self.compute_dtype is None and x.is_cuda else self.compute_dtype
        if dtype in (None, torch.float32) or x.dtype == torch.float64:
            return without_autocast(x)  # not even that of the training around, which may be bfloat16
        return torch.autocast(x.device.type, dtype)


def _halves(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 to float16 ``high`` and ``low`` and ``scale`` with (high + low) / scale = weight to some 22 bits.

    The scale keeps the second half, about 2**-12 of the first, in float16's range.
    """
    scale = torch.exp2(torch.floor(14 - torch.log2(weight.abs().amax().clamp_min(2.0**-100))))
    scaled = weight * scale
    high = scaled.half()
    return high, (scaled - high).half(), scale


def _by_halves(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of float16 maps (B, C, h, w) with float32 weights, float32 result, on the matrix units.

    As one product of both halves of the weights, which is added up in float32: as exact as a float32 convolution, in
    the time of the one in TF32 that PyTorch takes by default.
    """
    high, low, scale = _halves(conv.weight.flatten(1))
    rows = x.permute(0, 2, 3, 1)  # B, h, w, C
    product = torch.mm(torch.cat([rows, rows], 3).flatten(0, 2), torch.cat([high, low], 1).t(), out_dtype=torch.float32)
    logits = torch.addcmul(conv.bias, product, 1 / scale)  # type: ignore[arg-type]
    return logits.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)


class DalleEncoder(_DallePart):
    """Encoder of the dVAE.

    Args:
        in_chans: channels of the images.
        width: channels of the first group, doubled in each other.
        blocks_per_group: blocks in each of the four groups.
        vocab_size: V.
        compute_dtype: see ``_DallePart``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        width: int = 256,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.in_chans, self.vocab_size = in_chans, vocab_size
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        groups = _groups(widths, blocks_per_group, (3, 3, 3, 1), 'pool', nn.MaxPool2d(2))
        super().__init__(_conv(in_chans, width, 7), groups, _conv(8 * width, vocab_size, 1), compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) after ``map_pixels`` to logits (B, V, h, w), h = H / 8, w = W / 8."""
        x = x.to(self.blocks[0].weight.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        with self._autocast(x):
            y = self.blocks[:-1](x)
        output = self.blocks[-1]
        halves = (y.dtype, x.dtype) == (torch.float16, torch.float32) and y.is_cuda and _MIXED_PRODUCT
        with without_autocast(x):
            if halves and not torch.is_grad_enabled():
                return _by_halves(output.relu(y), output.conv)  # type: ignore[operator,arg-type]
            return output(y.to(x.dtype))


class DalleDecoder(_DallePart):
    """Decoder of the dVAE.

    Args:
        out_chans: channels of the images.
        width: channels of the last group; the first has eight times as many.
        stem_width: channels of the embedded tokens.
        blocks_per_group: blocks in each of the four groups.
        vocab_size: V.
        compute_dtype: see ``_DallePart``.
    """

    def __init__(
        self,
        out_chans: int = 3,
        width: int = 256,
        stem_width: int = 128,
        blocks_per_group: int = 2,
        vocab_size: int = 8192,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.out_chans, self.vocab_size = out_chans, vocab_size
        widths = [stem_width, 8 * width, 4 * width, 2 * width, width]
        groups = _groups(widths, blocks_per_group, (1, 3, 3, 3), 'upsample', nn.Upsample(scale_factor=2))
        # mean and logarithmic scale of a logit-Laplace distribution for each channel
        super().__init__(_conv(vocab_size, stem_width, 1), groups, _conv(width, 2 * out_chans, 1), compute_dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, h, w) to the statistics of the pixels (B, 2 * out_chans, 8 * h, 8 * w), means first."""
        stem = cast(nn.Conv2d, self.blocks[0])
        x = F.embedding(tokens.long(), stem.weight.flatten(1).t())  # B, h, w, C
        x = (x + stem.bias).permute(0, 3, 1, 2)  # type: ignore[operator]  # B, C, h, w as channels_last
        with self._autocast(x):
            return self.blocks[1:](x).to(x.dtype)


class DalleTokenizer(Tokenizer):
    """The dVAE as a tokenizer of 8x8 patches.

    Args:
        encoder: gives the tokens.
        decoder: draws them; None for a tokenizer that cannot.
        input_size: pixels, one or two numbers; 112 is the second view of BEiT v1's pre-training, whose 14x14 tokens
            belong to the patches of the same crop at 224. OpenAI trained at 256.

    Raises:
        ValueError: encoder and decoder of different vocabularies, or a size that is no multiple of 8.
    """

    def __init__(
        self, encoder: DalleEncoder, decoder: DalleDecoder | None = None, input_size: int | tuple[int, int] = 112
    ) -> None:
        size = height_and_width('input_size', input_size)
        super().__init__(encoder.vocab_size, size, (PATCH, PATCH), encoder.in_chans)
        if decoder is not None and decoder.vocab_size != encoder.vocab_size:
            raise ValueError(
                f'encoder and decoder must share their tokens, got vocabularies of {encoder.vocab_size} and '
                f'{decoder.vocab_size}; take both from one release'
            )
        self.encoder = encoder
        self.decoder = decoder

    @property
    def can_decode(self) -> bool:  # type: ignore[override]
        """Whether there is a decoder."""
        return self.decoder is not None

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) in [0, 1] to the logits of all tokens (B, V, h, w); raises as ``encode``."""
        self.check_images(images)
        return self.encoder(map_pixels(images))

    def _tokens(self, images: Tensor) -> Tensor:
        return self.encoder(map_pixels(images)).argmax(1)

    def _images(self, tokens: Tensor) -> Tensor:
        if self.decoder is None:
            return super()._images(tokens)
        statistics = self.decoder(tokens)
        return unmap_pixels(statistics[:, : self.decoder.out_chans].float().sigmoid())
