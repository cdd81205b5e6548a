"""Small masked image models and their inputs."""

import torch
from helpers import TINY, images, randomize

from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling

V1, V2 = BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
VOCAB = 11
SIZES = [((48, 80), (3, 5)), ((70, 33), (5, 3))]  # native and another, neither square


def build(cls=V1, **options):
    return cls(**{**TINY, 'vocab_size': VOCAB, **({'early_layers': 2} if cls is V2 else {}), **options})


def model_of(cls=V1, **options):
    return randomize(build(cls, **options)).eval()


def batch(size=(48, 80), grid=(3, 5)):
    """Images, a mask that hides another number of patches in each, tokens of all patches."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, *grid, generator=generator) < 0.4
    assert 0 < mask[0].sum() != mask[1].sum() > 0
    return images(*size), mask, torch.randint(VOCAB, mask.shape, generator=generator)


def logits_of(output):
    return [logits for logits in (output.logits, output.cls_pt_logits) if logits is not None]


X, MASK, TOKENS = batch()
M = int(MASK.sum())
