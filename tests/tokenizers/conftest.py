"""Small tokenizers, none of them square. (Fixtures, because a module in a folder of this name could not be imported:
transformers brings a package called tokenizers.)"""

import pytest
import torch
from helpers import randomize

from beit_plugin.tokenizers import VQKD, DalleDecoder, DalleEncoder, DalleTokenizer

SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.0, target_dim=16)
CODES = dict(vocab_size=40, code_dim=8)


@pytest.fixture
def make_vqkd():
    """Builds a VQKD with random weights, in training mode; ``plain`` leaves those of the constructor."""

    def make(plain=False, **options):
        model = VQKD(**{**SIZES, **CODES, **options})
        if not plain:
            randomize(model.encoder)
            if model.decoder is not None:
                randomize(model.decoder, seed=1)
        return model

    return make


@pytest.fixture
def make_dalle(images):
    """Builds a dVAE with random weights, its logits shifted so that no token outdoes the others everywhere."""

    def make(decoder=True, vocab_size=32, compute_dtype=None, **options):
        torch.manual_seed(0)
        encoder = DalleEncoder(width=16, vocab_size=vocab_size, compute_dtype=compute_dtype)
        decoding = DalleDecoder(width=16, stem_width=8, vocab_size=vocab_size, compute_dtype=compute_dtype)
        tokenizer = DalleTokenizer(encoder, decoding if decoder else None, **options).eval()
        encoder.compute_dtype = None
        encoder.blocks.output.conv.bias.data.sub_(tokenizer.logits(images).mean((0, 2, 3)))
        encoder.compute_dtype = compute_dtype
        return tokenizer

    return make


@pytest.fixture
def images():
    """(B, 3, 32, 48) in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(3, 3, 4, 6, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.7 * coarse + 0.3 * torch.rand(3, 3, 32, 48, generator=generator)
