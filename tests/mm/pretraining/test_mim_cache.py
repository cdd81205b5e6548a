"""Pre-trainings with kept tokens: bit for bit those with a tokenizer on the same views, and what is refused."""

from unittest import mock

import pytest
import torch

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

import beit_plugin.mm  # noqa: F401  registers

# isort: split

from mmengine.registry import MODELS
from pretraining_common import (
    MASKING,
    PICTURE,
    SIZE,
    cache_file,
    config,
    pictures,
    pretrainer,
    run,
    state,
    tokenizer,
    tokenizer_file,
    vqkd,
)
from resume_common import same

from beit_plugin.data.mim_views import mim_collate
from beit_plugin.mm.skipped_files import DataFileError
from beit_plugin.tokenizers import VQKD

HOOKS = dict(tokens=dict(type='BEiTTokenCacheHook'), **PICTURE)


@pytest.fixture
def root(tmp_path):
    return pictures(tmp_path / 'data')


@pytest.fixture
def cache(root, tmp_path):
    return str(cache_file(tmp_path / 'tokens.safetensors', root))


def train(root, work, iterations=6, model=None, **options):
    """The Runner, and how often the tokenizer ran."""
    model = model or pretrainer(tokenizer_file(root.parent / 'vqkd.pth'), True)
    cfg = config(root, work, model, iterations, hooks=HOOKS, **options)
    with mock.patch.object(VQKD, '_tokens', autospec=True, side_effect=VQKD._tokens) as calls:
        return run(cfg), calls.call_count


class TestTraining:
    def test_is_that_with_the_tokenizer_on_the_same_views(self, root, cache, tmp_path):
        plain, often = train(root, tmp_path / 'plain', data=dict(num_views=2, seed=4))
        cached, seldom = train(root, tmp_path / 'cached', data=dict(token_cache=cache))
        assert same(plain.model.state_dict(), cached.model.state_dict())
        assert (often, seldom) == (6 + 2, 1 + 2)  # pictures after iterations 3 and 6; one look before the training
        pair = [(tmp_path / name / 'pictures/iter_6.png').read_bytes() for name in ('plain', 'cached')]
        assert pair[0] == pair[1]

    def test_resumes_exactly(self, root, cache, tmp_path):
        options = dict(data=dict(token_cache=cache), workers=1)
        train(root, tmp_path / 'whole', 6, **options)
        train(root, tmp_path / 'parts', 4, **options)
        torch.manual_seed(99)
        train(root, tmp_path / 'parts', 6, **options, resume=True)
        whole, parts = (state(tmp_path / name, 6) for name in ('whole', 'parts'))
        assert same(whole['state_dict'], parts['state_dict'])

    def test_unreadable_images_are_left_out(self, root, cache, tmp_path):
        (root / 'class1/3.png').write_bytes(b'')
        runner, _ = train(root, tmp_path / 'work', 9, data=dict(token_cache=cache))
        assert list(runner.train_dataloader.dataset.left_out) == [f'{root}/class1/3.png']
        with pytest.raises(DataFileError, match=r'class1/3.png. cannot be read as an image'):
            train(root, tmp_path / 'work', 9, data=dict(token_cache=cache, on_error='raise'))


class TestRefused:
    def refuse(self, root, work, sentence, cache, model=None):
        with pytest.raises(DataFileError, match=sentence) as caught:
            train(root, work, model=model, data=dict(token_cache=cache))
        assert '\n' not in str(caught.value)

    def test_another_vocabulary(self, root, tmp_path):
        path = str(cache_file(tmp_path / 'tokens.safetensors', root, vocab_size=20))
        self.refuse(root, tmp_path, 'tokens of VQKD, 20 of them, and the tokenizer of the model has 13: take', path)

    def test_other_weights(self, root, cache, tmp_path):
        other = pretrainer(tokenizer_file(tmp_path / 'other.pth', seed=1))
        self.refuse(root, tmp_path, r'only \d+% of those looked at are those of the tokenizer of the mod', cache, other)
        coarse = pretrainer(tokenizer_file(tmp_path / 'coarse.pth', patch_size=16))
        self.refuse(root, tmp_path, 'and only 0% of those looked at', cache, coarse)

    def test_images_that_have_changed(self, root, cache, tmp_path):
        for first, second in (('class0/0.png', 'class0/2.png'), ('class0/4.png', 'class1/1.png')):
            contents = [(root / name).read_bytes() for name in (first, second)]
            for name, content in zip((second, first), contents, strict=True):
                (root / name).write_bytes(content)
        self.refuse(root, tmp_path, r'only \d+% of those looked at', cache)

    def test_a_model_that_takes_none(self, root, cache, tmp_path):
        self.refuse(root, tmp_path, 'token_cache is for BEiTPretrainer, got BEiTVQKD: leave it out', cache, vqkd())

    def test_a_file_of_other_images(self, root, cache, tmp_path):
        (root / 'class1/3.png').unlink()
        self.refuse(root, tmp_path, 'holds tokens of other images, the number of images is 6 there and 5', cache)


class TestModel:
    def batch(self, tokens):
        generator = torch.Generator().manual_seed(7)
        pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        samples = [dict(inputs=image, tokens=ids) for image, ids in zip(pixels, tokens, strict=True)]
        return mim_collate(samples, MASKING, generator)

    def test_tokens_in_place_of_images(self):
        model = MODELS.build(pretrainer(tokenizer())).eval()
        given = self.batch(torch.arange(32).view(2, 4, 4) % 13)
        data = model.data_preprocessor(given)
        assert data.keys() == {'inputs', 'mask', 'num_masked', 'tokens'}
        assert torch.equal(model(**data, mode='predict')[0], given['tokens'])
        images = dict(images=torch.rand(2, 3, SIZE, SIZE))
        assert model(**data, mode='loss')['loss'] == model(**data, **images, mode='loss')['loss']

    def test_values_are_looked_at_once(self):
        model = MODELS.build(pretrainer(tokenizer()))
        data = model.data_preprocessor(self.batch(torch.zeros(2, 4, 4, dtype=torch.int64)))
        with mock.patch.object(VQKD, 'check_tokens', autospec=True) as looks:
            for _ in range(3):
                model(**data, mode='loss')
        assert looks.call_count == 1

    @pytest.mark.parametrize(
        ('tokens', 'sentence'),
        [
            (torch.full((2, 4, 4), 13), 'expected tokens from 0 to 12, got 13 to 13'),
            (torch.zeros(2, 4, 4), r'expected tokens as integers of shape \(B, h, w\), got torch.float32'),
            (
                torch.zeros(2, 2, 3, dtype=torch.int64),
                r'gives 2 x 3 tokens .* 16 x 24 pixels, but the masks have 4 x 4 .* to \(32, 32\), and make the',
            ),
        ],
    )
    def test_sentences(self, tokens, sentence):
        model = MODELS.build(pretrainer(tokenizer()))
        with pytest.raises(ValueError, match=sentence):
            model(**model.data_preprocessor(self.batch(tokens)), mode='loss')
