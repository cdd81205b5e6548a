"""Pictures of tokens."""

import numpy as np
import pytest
import torch

from beit_plugin.tokenizers import VQKD
from beit_plugin.tokenizers.base import Tokenizer
from beit_plugin.tokenizers.picture import hide, side_by_side, token_colours, token_images, with_titles


class Grey(Tokenizer):
    """Eight greys, one a patch of 4 pixels."""

    can_decode = True

    def __init__(self):
        super().__init__(8, (8, 8), (4, 4), 3)

    def _tokens(self, images):
        return (images.mean(1)[:, ::4, ::4] * 7).round().long()

    def _images(self, tokens):
        return (tokens[:, None] / 7).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


def vqkd(**options):
    return VQKD(
        img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, vocab_size=40, **{'code_dim': 6, **options}
    )


def test_decoded_where_it_can():
    tokens = torch.tensor([[[0, 7], [3, 3]]])
    found = token_images(Grey(), tokens, (8, 8))
    assert torch.equal(found, Grey().decode(tokens)) and token_images(Grey(), tokens, (20, 24)).shape == (1, 3, 20, 24)


@pytest.mark.parametrize('code_dim', [6, 2])
def test_near_codes_have_near_colours(code_dim):
    tokenizer = vqkd(code_dim=code_dim)
    colours, codes = token_colours(tokenizer), tokenizer.quantize.weight
    assert colours.shape == (40, 3) and colours.min() >= 0 and colours.max() <= 1
    near = torch.cdist(codes, codes).flatten().argsort()[40:140]  # pairs at the smallest distances, themselves left out
    far = torch.cdist(codes, codes).flatten().argsort()[-100:]
    distances = torch.cdist(colours, colours).flatten()
    assert distances[near].mean() < 0.7 * distances[far].mean()
    assert torch.equal(colours, token_colours(tokenizer))


def test_a_colour_a_token_elsewhere():
    tokenizer = Grey()
    tokenizer.can_decode = False
    found = token_images(tokenizer, torch.tensor([[[0, 7], [3, 3]]]), (4, 4))
    colours = token_colours(tokenizer)
    assert torch.equal(found[0, :, 0, 0], colours[0]) and torch.equal(found[0, :, 3, 3], colours[3])
    assert len(colours.unique(dim=0)) == 8


def test_panels():
    images, mask = torch.ones(2, 3, 8, 8), torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[1, 0, 1] = True
    seen = hide(images, mask)
    assert torch.equal(seen[0], images[0]) and (seen[1, :, :4, 4:] == 0.5).all() and (seen[1, :, 4:] == 1).all()
    picture = side_by_side([torch.zeros(2, 3, 8, 8), seen])
    assert picture.shape == (2 * 12, 2 * 12, 3) and picture.dtype == torch.uint8
    assert (picture[2:10, 2:10] == 0).all() and (picture[12 + 2 : 12 + 6, 12 + 6 : 12 + 10] == 128).all()
    titled = with_titles(picture, ('a', 'b'))
    assert np.array_equal(titled[16:], picture.numpy()) and (titled[:16] < 255).any()
