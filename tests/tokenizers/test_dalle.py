"""The dVAE: its arithmetic written out a second time, precision, training mode. (Peers: parity/test_tokenizers.py.)"""

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from beit_plugin.tokenizers import DalleDecoder, DalleEncoder, DalleTokenizer, dalle
from beit_plugin.tokenizers.dalle import map_pixels, unmap_pixels


def conv(state, name, x):
    weight = state[f'{name}.weight']
    return F.conv2d(x, weight, state[f'{name}.bias'], padding=weight.shape[-1] // 2)


def block(state, name, x, gain):
    y = x
    for i in range(1, 5):
        y = conv(state, f'{name}.res_path.conv_{i}', y.relu())
    return (conv(state, f'{name}.id_path', x) if f'{name}.id_path.weight' in state else x) + gain * y


def network(state, x, between, blocks):
    """openai/DALL-E, encoder.py and decoder.py, step by step: ``between`` halves or doubles the map."""
    x = conv(state, 'blocks.input', x)
    for group in range(1, 5):
        for i in range(1, blocks + 1):
            x = block(state, f'blocks.group_{group}.block_{i}', x, 1 / (4 * blocks) ** 2)
        x = between(x) if group < 4 else x
    return conv(state, 'blocks.output.conv', x.relu())


@pytest.mark.parametrize('blocks', [1, 2])
def test_arithmetic(images, blocks):
    encoder = DalleEncoder(width=16, vocab_size=32, blocks_per_group=blocks)
    decoder = DalleDecoder(width=16, stem_width=8, vocab_size=32, blocks_per_group=blocks)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        if parameter.ndim == 1:
            parameter.data.normal_(std=0.3)
    tokenizer = DalleTokenizer(encoder, decoder)
    logits = network(encoder.state_dict(), 0.8 * images + 0.1, lambda x: F.max_pool2d(x, 2), blocks)
    assert relative_error(tokenizer.logits(images), logits) <= 1e-5
    assert torch.equal(tokenizer.encode(images), logits.argmax(1))

    one_hot = F.one_hot(logits.argmax(1), 32).permute(0, 3, 1, 2).float()
    statistics = network(decoder.state_dict(), one_hot, lambda x: F.interpolate(x, scale_factor=2), blocks)
    assert relative_error(decoder(logits.argmax(1)), statistics) <= 1e-5
    expected = ((statistics[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    assert relative_error(tokenizer.decode(logits.argmax(1)), expected) <= 1e-5


def test_pixels_there_and_back(images):
    assert relative_error(unmap_pixels(map_pixels(images)), images) <= 1e-6
    assert map_pixels(images).min() >= 0.1 and map_pixels(images).max() <= 0.9


def test_published_sizes():
    with torch.device('meta'):
        encoder, decoder = DalleEncoder(), DalleDecoder()
    # the sizes of encoder.pkl and decoder.pkl at four bytes each: 215 and 175 MB
    assert sum(p.numel() for p in encoder.parameters()) == 53786240
    assert sum(p.numel() for p in decoder.parameters()) == 43829766


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match='must share their tokens, got vocabularies of 32 and 16; take both from one'):
        DalleTokenizer(DalleEncoder(width=16, vocab_size=32), DalleDecoder(width=16, vocab_size=16))


def test_autocast_around_it_changes_nothing(make_dalle, images):
    tokenizer = make_dalle()
    logits, drawn = tokenizer.logits(images), tokenizer.decode(tokenizer.encode(images))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(tokenizer.logits(images), logits)
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), drawn)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(make_dalle, images, dtype):
    exact, half = make_dalle(), make_dalle(compute_dtype=dtype)
    logits, expected = half.logits(images), exact.logits(images)
    assert logits.dtype == torch.float32  # the layer of the vocabulary, as OpenAI's use_float16=False
    assert (
        0 < relative_error(logits, expected) < (5e-3 if dtype == torch.float16 else 5e-2)
    )  # the fixture takes the mean off
    tokens = exact.encode(images)
    assert relative_error(half.decode(tokens), exact.decode(tokens)) < 2e-2


def test_double_precision(make_dalle, images):
    exact, tokenizer = make_dalle().double(), make_dalle()
    assert exact.logits(images).dtype == torch.float64
    assert relative_error(tokenizer.logits(images), exact.logits(images)) < 1e-5


def test_gradients_reach_every_weight(make_dalle, images):
    tokenizer = make_dalle()
    tokenizer.logits(images).square().mean().backward()
    tokenizer.decoder(tokenizer.encode(images)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_computes_in_half_as_the_reference(make_dalle, images):
    expected = make_dalle().logits(images)
    assert 1e-6 < relative_error(make_dalle().cuda().logits(images.cuda()).cpu(), expected) < 5e-3
    exact = make_dalle(compute_dtype=torch.float32).cuda()
    assert relative_error(exact.logits(images.cuda()).cpu(), expected) < 5e-5


@pytest.mark.parametrize('size', [1e-30, 1e-3, 1, 1e4, 1e30])
def test_weights_are_two_halves(size):
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * size
    high, low, scale = dalle._halves(weight)
    assert {high.dtype, low.dtype} == {torch.float16}
    error = (high.double() + low.double()) / scale.double() - weight.double()
    assert error.abs().max() <= 2.0**-22 * weight.abs().max()
    high, low, scale = dalle._halves(torch.zeros(2, 2))
    assert high.eq(0).all() and low.eq(0).all() and scale.isfinite()


@pytest.mark.skipif(not torch.cuda.is_available() or not dalle._MIXED_PRODUCT, reason='needs CUDA and PyTorch 2.8')
def test_the_last_layer_by_halves_is_one_in_float32(make_dalle, images):
    """Trained logits are large; a map of a size that is no multiple of anything."""
    encoder = make_dalle(vocab_size=250).cuda().encoder
    conv = encoder.blocks.output.conv
    x = torch.randn(3, conv.in_channels, 5, 7, generator=torch.Generator().manual_seed(0)).mul(30).half().cuda()
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double())
    found = dalle._by_halves(x, conv)
    assert found.dtype == torch.float32 and relative_error(found, exact) < 1e-6
    with torch.no_grad():
        fast = encoder(map_pixels(images).cuda())
    # the logits are small beside what they are the difference of
    assert relative_error(fast, encoder(map_pixels(images).cuda()).detach()) < 1e-5
