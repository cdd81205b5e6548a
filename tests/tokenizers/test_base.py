"""The protocol: what encode and decode take and give, and one clear sentence for everything else."""

import copy
import pickle

import pytest
import torch

from beit_plugin.tokenizers import DalleEncoder, DalleTokenizer, Tokenizer


@pytest.fixture(params=['dalle', 'vqkd'])
def tokenizer(request, make_dalle, make_vqkd):
    return make_dalle() if request.param == 'dalle' else make_vqkd().eval()


def test_protocol(tokenizer, images):
    tokens = tokenizer.encode(images)
    assert isinstance(tokenizer, Tokenizer)
    assert tokens.shape == (3, 4, 6) and tokens.dtype == torch.int64 and not tokens.requires_grad
    assert 0 <= tokens.min() and tokens.max() < tokenizer.vocab_size and len(tokens.unique()) > 4
    assert tokenizer.patch_size == (8, 8) and tokenizer.in_chans == 3
    assert tokenizer.encode(images[:, :, :16, :40]).shape == (3, 2, 5)
    assert tokenizer.encode(images[:0]).shape == (0, 4, 6)
    assert torch.equal(tokenizer.encode(images), tokens)
    assert torch.equal(tokenizer.encode(images[1:2])[0], tokens[1])


def test_input_sizes(make_dalle, make_vqkd):
    assert make_dalle().input_size == (112, 112)
    assert make_dalle(input_size=(64, 32)).input_size == (64, 32)
    assert make_vqkd().input_size == (32, 48)
    with pytest.raises(ValueError, match=r'input_size with sides that are multiples of the 8x8 patch, got 113x113'):
        make_dalle(input_size=113)
    with pytest.raises(ValueError, match='input_size must be one or two whole numbers'):
        DalleTokenizer(DalleEncoder(width=16, vocab_size=8), input_size='big')


WRONG = [
    (lambda x: x.numpy(), r'expected images as a torch tensor, got ndarray; use torch.as_tensor'),
    (lambda x: x[0], r'expected images of shape \(B, 3, H, W\), got \(3, 32, 48\); convert them to 3 channels'),
    (lambda x: x[:, :1], r'expected images of shape \(B, 3, H, W\), got \(3, 1, 32, 48\)'),
    (lambda x: (x * 255).byte(), r'expected images as floating point in \[0, 1\], got torch.uint8; divide bytes by'),
    (
        lambda x: x * 255,
        r'expected images with values in \[0, 1\], got 0.\d+ to 25\d.*; give them before normalisation',
    ),
    (lambda x: x * 2 - 1, r'values in \[0, 1\], got -\d.*clamp\(0, 1\)'),
    (lambda x: x.masked_fill(x > 0.9, float('nan')), r'values in \[0, 1\], got nan to nan'),
    (lambda x: x[..., :-1], r'images with sides that are multiples of the 8x8 patch, got 32x47 pixels; .* to 32x40'),
    (lambda x: x[..., :7, :], r'multiples of the 8x8 patch, got 7x48 pixels; resize or crop to 8x48'),
    (lambda x: x[..., :0], r'multiples of the 8x8 patch, got 32x0 pixels'),
]


@pytest.mark.parametrize('spoil, message', WRONG)
def test_wrong_images(tokenizer, images, spoil, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(spoil(images))


def test_what_rounding_adds_is_no_error(tokenizer, images):
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 1.0005, -0.0005
    tokenizer.encode(images)
    tokenizer.encode(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16))


def test_decode(make_dalle, make_vqkd, images):
    dalle = make_dalle()
    tokens = dalle.encode(images)
    drawn = dalle.decode(tokens.int())
    assert dalle.can_decode and drawn.shape == images.shape and drawn.dtype == torch.float32
    assert 0 <= drawn.min() and drawn.max() <= 1 and drawn.std() > 0
    for wrong, message in (
        (tokens.float(), r'expected tokens as integers of shape \(B, h, w\), got torch.float32 of shape \(3, 4, 6\)'),
        (tokens.flatten(1), r'got torch.int64 of shape \(3, 24\); give what encode returns'),
        (tokens.tolist(), "got <class 'list'>"),
        (tokens + 32, r'expected tokens from 0 to 31, got \d+ to \d+; decode them with the tokenizer that made them'),
        (tokens - 32, 'expected tokens from 0 to 31, got -'),
    ):
        with pytest.raises(ValueError, match=message):
            dalle.decode(wrong)
    assert dalle.decode(tokens[:0]).shape == (0, 3, 32, 48)
    for cannot in (make_dalle(decoder=False), make_vqkd()):
        assert not cannot.can_decode
        with pytest.raises(NotImplementedError, match=r'cannot draw its tokens \(can_decode is False\)'):
            cannot.decode(tokens)


def test_copies_and_pickles(tokenizer, images):
    tokens = tokenizer.encode(images)
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(twin.encode(images), tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_range_on_cuda_is_reported_at_once_and_then_in_the_next_step(tokenizer, images):
    tokenizer, x = tokenizer.cuda(), images.cuda()
    tokenizer._range = type(tokenizer._range)()  # the fixture has looked at images already
    twin = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match='values in'):
        twin.encode(x * 255)
    tokenizer.encode(x)
    tokenizer.encode(x * 255)
    twin = copy.deepcopy(tokenizer)
    with pytest.raises(ValueError, match='values in'):
        tokenizer.encode(x)
    tokenizer.encode(x)
    twin.encode(x)
