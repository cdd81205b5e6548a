"""Files of tokens: what they hold, what they must be of."""

import json
import pickle

import pytest
import torch
from pretraining_common import SIZE, VOCAB, cache_file, pictures, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit_plugin.data.mim_views import ImageFiles, TwoViews
from beit_plugin.data.token_cache import TokenCache, write_token_cache

VIEWS = TwoViews(SIZE, None)


@pytest.fixture
def root(tmp_path):
    return pictures(tmp_path / 'data', 4)


@pytest.fixture
def cache(root, tmp_path):
    return cache_file(tmp_path / 'tokens.safetensors', root)


def test_are_those_of_the_tokenizer(root, cache):
    plain, cached = ImageFiles(root, VIEWS, num_views=2, seed=4), ImageFiles(root, VIEWS, token_cache=cache)
    assert (cached.num_views, cached.seed) == (2, 4)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        expected = plain[seed % 4]
        torch.manual_seed(seed)
        sample = cached[seed % 4]
        assert sample.keys() == {'inputs', 'tokens'} and torch.equal(sample['inputs'], expected['inputs'])
        assert sample['tokens'].dtype == torch.int64
        assert torch.equal(sample['tokens'], tokenizer().encode(expected['inputs'][None] / 255)[0])
        seen.add(sample['tokens'].numpy().tobytes())
    assert len(seen) > 4


def test_workers_and_other_processes(root, cache):
    files = ImageFiles(root, VIEWS, token_cache=cache)
    files.token_cache.tokens(0, 0)  # mapped here, before the workers are there
    copy = pickle.loads(pickle.dumps(files))
    expected = {TokenCache(cache).tokens(i, view).numpy().tobytes() for i in range(4) for view in range(2)}
    for loaded in (files, copy):
        found = [batch['tokens'][0] for batch in torch.utils.data.DataLoader(loaded, 1, num_workers=2)]
        assert len(found) == 4 and {tokens.numpy().tobytes() for tokens in found} <= expected


def test_format(cache, tmp_path):
    with safe_open(cache, 'pt') as file:
        assert file.get_slice('tokens').get_shape() == [4, 2, 4, 4] and file.get_slice('tokens').get_dtype() == 'U16'
    assert load_file(cache)['present'].tolist() == [1] * 4
    about = {'images': 1, 'num_views': 1, 'seed': 0, 'vocab_size': (1 << 16) + 1, 'tokenizer': 'large'}
    tokens = torch.tensor([[[[0, 1 << 16]]]])
    write_token_cache(tmp_path / 'large.safetensors', [(tokens, torch.tensor([True]))], (1, 2), about)
    assert torch.equal(TokenCache(tmp_path / 'large.safetensors').tokens(0, 0), tokens[0, 0])


def test_a_file_appears_whole_or_not_at_all(root, tmp_path):
    def batches():
        yield torch.zeros(1, 1, 2, 2), torch.tensor([True])
        raise KeyboardInterrupt

    about = {'images': 2, 'num_views': 1, 'vocab_size': 4}
    with pytest.raises(KeyboardInterrupt):
        write_token_cache(tmp_path / 'tokens.safetensors', batches(), (2, 2), about)
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_images_without_tokens_are_replaced(root, tmp_path):
    whole = (root / 'class1/3.png').read_bytes()
    (root / 'class1/3.png').write_bytes(b'')
    cache = cache_file(tmp_path / 'tokens.safetensors', root)
    (root / 'class1/3.png').write_bytes(whole)
    (root / 'class0/0.png').write_bytes(b'broken later')
    met = {}
    files = ImageFiles(root, VIEWS, met.__setitem__, token_cache=cache)
    for index in range(4):
        sample = files[index]
        assert torch.equal(sample['tokens'], tokenizer().encode(sample['inputs'][None] / 255)[0])
    assert sorted(met) == [f'{root}/class0/0.png', f'{root}/class1/3.png']
    assert 'has no tokens in' in met[f'{root}/class1/3.png'] and 'cannot be read' in met[f'{root}/class0/0.png']


@pytest.mark.parametrize(
    ('views', 'options', 'sentence'),
    [
        (
            dict(scale=(0.5, 1.0)),
            {},
            r'other views, scale=\[0.08, 1.0\], and the data set has scale=\[0.5, 1.0\]: make',
        ),
        (dict(token_size=16), {}, r'token_size=\[32, 32\], token_interpolation=bicubic, and .* token_size=\[16, 16\]'),
        ({}, dict(num_views=3), 'num_views=2, and the data set has num_views=3'),
        ({}, dict(seed=1), 'seed=4, and the data set has seed=1'),
    ],
)
def test_other_views(root, cache, views, options, sentence):
    made = TwoViews(**{'size': SIZE, 'token_size': None, **views})
    with pytest.raises(ValueError, match=sentence) as caught:
        ImageFiles(root, made, token_cache=cache, **options)
    assert '\n' not in str(caught.value)


SAID = {'images': 2, 'num_views': 1, 'seed': 0, 'vocab_size': 8, 'tokenizer': 'small'}


@pytest.mark.parametrize(
    ('said', 'tensors', 'sentence'),
    [
        ('{"num_views": 1', {}, 'says what it holds in broken JSON'),
        ('[' * 10**5, {}, 'says what it holds in broken JSON'),
        ('[1]', {}, 'does not say num_views, seed, vocab_size, tokenizer of its tokens'),
        ({**SAID, 'vocab_size': '8', 'seed': True}, {}, 'does not say seed, vocab_size of its tokens'),
        (
            {**SAID, 'num_views': 10**9},
            {},
            r'has tokens of shape \[2, 1, 2, 2\] .*, expected \(2 images, 1000000000 views',
        ),
        (SAID, {'present': torch.ones(3, dtype=torch.uint8)}, r'expected \(3 images, 1 views, h, w\)'),
        (SAID, {'present': torch.ones(2, 1, dtype=torch.uint8)}, 'has tokens of shape'),
        (SAID, {'tokens': torch.zeros(2, 1, 2, 2)}, 'dtype F32, expected'),
        (SAID, {'tokens': torch.zeros(2, 1, 4, dtype=torch.int32)}, 'has tokens of shape'),
    ],
    ids=range(9),
)
def test_files_that_contradict_themselves(said, tensors, sentence, tmp_path):
    path = tmp_path / 'x.safetensors'
    whole = {
        'tokens': torch.zeros(2, 1, 2, 2, dtype=torch.int32),
        'present': torch.ones(2, dtype=torch.uint8),
        **tensors,
    }
    save_file(whole, path, {'beit_plugin_tokens': said if isinstance(said, str) else json.dumps(said)})
    with pytest.raises(ValueError, match=sentence):
        TokenCache(path)


@pytest.mark.parametrize('token', [-1, 8, 10**6])
def test_numbers_that_are_no_tokens(token, tmp_path):
    tokens = torch.tensor([[[[0, 7]]], [[[0, token]]]], dtype=torch.int32)
    whole = {'tokens': tokens, 'present': torch.ones(2, dtype=torch.uint8)}
    save_file(whole, tmp_path / 'x.safetensors', {'beit_plugin_tokens': json.dumps(SAID)})
    cache = TokenCache(tmp_path / 'x.safetensors')
    assert cache.tokens(0, 0).tolist() == [[0, 7]]
    with pytest.raises(ValueError, match='has tokens that are none of its 8: make the file anew'):
        cache.tokens(1, 0)


def test_views_of_the_encoder_may_change(root, tmp_path):
    """The tokens are of the crop and of the tokenizer's size."""
    cache = cache_file(tmp_path / 'tokens.safetensors', root)
    larger = TwoViews(2 * SIZE, SIZE, token_interpolation='bicubic')
    sample = ImageFiles(root, larger, token_cache=cache, num_views=2, seed=4)[0]
    assert sample.keys() == {'inputs', 'tokens'} and sample['inputs'].shape[1:] == (2 * SIZE, 2 * SIZE)


def test_other_images(root, cache, tmp_path):
    root.rename(tmp_path / 'moved')
    moved = tmp_path / 'moved'
    assert 'tokens' in ImageFiles(moved, VIEWS, token_cache=cache)[0]
    (moved / 'class0/0.png').rename(moved / 'class0/1.png')
    with pytest.raises(
        ValueError, match=r'of other images, the digest of the names of the images is \w+ there and \w+'
    ):
        ImageFiles(moved, VIEWS, token_cache=cache)
    (moved / 'class0/1.png').unlink()
    with pytest.raises(ValueError, match='of other images, the number of images is 4 there and 3 in the data set'):
        ImageFiles(moved, VIEWS, token_cache=cache)


def test_files_that_are_none(cache, tmp_path):
    with pytest.raises(ValueError, match=r'tokens nowhere.safetensors does not exist: make it with'):
        TokenCache('nowhere.safetensors')
    save_file({'weight': torch.zeros(VOCAB)}, tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match=r'model.safetensors is no file of tokens: give one that'):
        TokenCache(tmp_path / 'model.safetensors')
    content = cache.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 6, 0):
        cache.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r'is cut off or no safetensors file \(.+\): make it anew') as caught:
            TokenCache(cache)
        assert '\n' not in str(caught.value)
