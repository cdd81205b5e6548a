"""BEiTPretrainer and BEiTMIMHead: the numbers of models/mim.py, tokens from aside, what is refused."""

import copy

import pytest
import torch

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

import beit_plugin.mm  # noqa: F401  registers

# isort: split

from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from pretraining_common import BACKBONE, MASKING, SIZE, VOCAB, pretrainer, tokenizer, tokenizer_file, vqkd

from beit_plugin.checkpoints import CheckpointError
from beit_plugin.data.mim_views import mim_collate
from beit_plugin.mm.pretraining.hooks import BEiTMIMPictureHook
from beit_plugin.models.layer_decay import no_weight_decay
from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling


def build(v2=False, **options):
    model = MODELS.build(pretrainer(tokenizer(), v2, **options))
    model.init_weights()
    return model


def batch(count=3):
    generator = torch.Generator().manual_seed(7)
    samples = [
        dict(inputs=torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8))
        for _ in range(count)
    ]
    return mim_collate(samples, MASKING, generator)


@pytest.mark.parametrize('v2', [False, True])
class TestLoss:
    def test_is_that_of_the_model_by_hand(self, v2):
        model = build(v2).eval()
        given = batch()
        data = model.data_preprocessor(given, True)
        found = model(**data, mode='loss')

        by_hand = BeitV2ForMaskedImageModeling if v2 else BeitForMaskedImageModeling
        layers = dict(early_layers=2, head_layers=2) if v2 else {}
        other = by_hand(vocab_size=VOCAB, **BACKBONE, **layers).eval()
        other.load_state_dict(model.model.state_dict())
        pixels = given['inputs'] / 255
        tokens = tokenizer().encode(pixels)
        output = other(pixels * 2 - 1, given['mask'], tokens[given['mask']])
        assert torch.allclose(found['loss'], output.loss, rtol=1e-6)
        right = (output.logits.argmax(1) == tokens[given['mask']]).float().mean()
        counts = torch.bincount(tokens[given['mask']], minlength=VOCAB)
        assert found['acc'] == right and found['top_token'] == counts.max() / counts.sum()
        assert found['codebook'] == len(tokens.unique()) / VOCAB
        assert set(found) == {'loss', 'acc', 'top_token', 'codebook'} | ({'cls_part', 'cls_acc'} if v2 else set())
        if v2:
            assert torch.allclose(found['cls_part'], output.cls_pt_loss, rtol=1e-6)
            assert found['cls_acc'] == (output.cls_pt_logits.argmax(1) == tokens[given['mask']]).float().mean()
        assert [name for name, value in found.items() if value.requires_grad] == ['loss']
        total, logged = model.parse_losses(found)
        assert total == found['loss'] == logged['loss']  # mmengine adds up all entries with "loss" in their name

    def test_gradients_are_those_of_the_model(self, v2):
        model = build(v2).eval()
        given = batch()
        model(**model.data_preprocessor(given), mode='loss')['loss'].backward()
        through_host = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        pixels = given['inputs'] / 255
        model.model(
            (given['inputs'].float() - 127.5) / 127.5, given['mask'], tokenizer().encode(pixels)
        ).loss.backward()
        assert len(through_host) > 20
        for name, parameter in model.named_parameters():
            assert torch.allclose(through_host[name], parameter.grad, atol=1e-7), name

    def test_nothing_is_hidden(self, v2):
        model = build(v2)
        given = batch()
        given['mask'][:] = False
        found = model(**model.data_preprocessor(given), mode='loss')
        found['loss'].backward()
        assert found['loss'] == 0 and found['acc'] == 0 and found['top_token'] == 0

    def test_start_is_that_of_pre_training(self, v2):
        model = build(v2)
        torch.manual_seed(0)
        model.init_weights()
        torch.manual_seed(0)
        other = copy.deepcopy(model.model)
        other.init_weights()
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.model.state_dict()[name]), name
        assert model.model.patch_embed.proj.weight.abs().max() <= 0.02 + 1e-6


class TestModel:
    def test_all_patches_and_pictures(self):
        model = build().eval()
        data = model.data_preprocessor(batch())
        assert model(data['inputs']).shape == (3, 16, VOCAB)
        tokens, predicted = model(**data, mode='predict')
        expected = model.model(data['inputs'], data['mask'], all_logits=True).logits.argmax(-1)
        assert torch.equal(predicted, expected.view(3, 4, 4)) and torch.equal(
            tokens, model.tokenizer.encode(data['images'])
        )

    def test_the_tokenizer_stands_aside(self):
        model = build()
        names = set(model.state_dict())
        assert names == {f'model.{name}' for name in model.model.state_dict()}
        assert not any(name.startswith('tokens') for name, _ in model.named_modules())
        assert copy.deepcopy(model).tokenizer is model.tokenizer  # as mmengine's average of the weights does
        before = copy.deepcopy(model.tokenizer.state_dict())
        model.train()
        model(**model.data_preprocessor(batch()), mode='loss')
        assert not model.tokenizer.training
        for name, value in model.tokenizer.state_dict().items():
            assert torch.equal(value, before[name])
        model.to(torch.float64)
        assert model.tokenizer.encoder.cls_token.dtype == torch.float64
        assert model.to('meta').tokenizer.encoder.cls_token.is_meta

    def test_a_view_of_its_own(self):
        model = build()
        given = batch()
        given['token_view'] = given['inputs'].roll(5, 3)
        data = model.data_preprocessor(given)
        assert torch.equal(data['images'], given['token_view'] / 255)
        assert torch.equal(data['inputs'], (given['inputs'].float() - 127.5) / 127.5)
        assert set(data) == {'inputs', 'images', 'mask', 'num_masked'}
        assert data['num_masked'] == given['mask'].sum()

    def test_goes_on_from_a_checkpoint(self, tmp_path):
        first, v2 = build(), build(True)
        torch.save({'state_dict': first.state_dict(), 'meta': {}, 'message_hub': {}}, tmp_path / 'first.pth')
        second = build(pretrained=str(tmp_path / 'first.pth'))
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name
        torch.save(v2.state_dict(), tmp_path / 'v2.pth')
        assert torch.equal(build(True, pretrained=str(tmp_path / 'v2.pth')).model.cls_pt_layers[0].attn.qkv.weight,
                           v2.model.cls_pt_layers[0].attn.qkv.weight)  # fmt: skip

    def test_sizes_by_name(self):
        with torch.device('meta'):
            model = MODELS.build(dict(pretrainer(tokenizer()), backbone=dict(variant='small')))
        assert (model.model.embed_dim, model.model.num_classes) == (384, VOCAB)

    @pytest.mark.parametrize('cfg', [pretrainer(tokenizer()), pretrainer(tokenizer(), True), vqkd()])
    def test_no_decay_is_the_one_rule(self, cfg):
        model = MODELS.build(cfg)
        wrapper = build_optim_wrapper(
            model, dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5), constructor='BEiTNoDecayConstructor')
        )
        groups = {name: group for group in wrapper.optimizer.param_groups for name in group['param_names']}
        assert groups.keys() == dict(model.named_parameters()).keys()
        exempt = no_weight_decay(model)
        assert any('cls_token' in name for name in exempt)
        for name, group in groups.items():
            plain = name in exempt or model.get_parameter(name).ndim < 2
            assert (group['lr'], group['weight_decay']) == (0.1, 0.0 if plain else 0.5), name


class TestSentences:
    @pytest.mark.parametrize(
        ('change', 'sentence'),
        [
            (dict(head=dict(vocab_size=VOCAB + 1)), 'vocab_size=14 and the tokenizer 13 tokens; leave vocab_size out'),
            (dict(head=dict(head_layers=-1)), 'head_layers at least 0, got None and -1'),
            (dict(head=dict(early_layers=2)), 'got early_layers=2 without head_layers; BEiT v2 has head_layers=2'),
            (dict(backbone=dict(variant='huge')), "unknown variant 'huge' of BEiT; known are tiny, small, base, large"),
        ],
    )
    def test_model(self, change, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            MODELS.build({**pretrainer(tokenizer()), **change})
        assert '\n' not in str(caught.value)

    @pytest.mark.parametrize(
        ('change', 'sentence'),
        [
            (lambda data: data.pop('mask'), 'needs mask and images; let it be made by collate_fn'),
            (lambda data: data.update(mode='losses'), "mode must be 'loss', 'predict' or 'tensor', got 'losses'"),
            (
                lambda data: data.update(images=torch.rand(3, 3, 16, 16)),
                r'gives 2 x 2 tokens of images of 16 x 16 pixels, but the masks have 4 x 4 .* to \(32, 32\)',
            ),
            (
                lambda data: data.update(inputs=torch.rand(3, 3, 24, 16), images=torch.rand(3, 3, 24, 16)),
                r'the images have 3 x 2 patches, but the masks have 4 x 4; set grid of the masking to \(3, 2\)',
            ),
            (lambda data: data.update(images=data['images'] * 255), r'expected images with values in \[0, 1\]'),
        ],
    )
    def test_batch(self, change, sentence):
        model = build()
        data = dict(model.data_preprocessor(batch()), mode='loss')
        change(data)
        with pytest.raises(ValueError, match=sentence) as caught:
            model(**data)
        assert '\n' not in str(caught.value)

    def test_tokenizer(self, tmp_path):
        for source, sentence in (('nothing', "unknown tokenizer 'nothing'"), (tmp_path / 'x.pth', 'x.pth')):
            with pytest.raises(CheckpointError, match=sentence):
                MODELS.build(pretrainer(dict(type='BEiTTokenizer', source=str(source))))
        model = MODELS.build(pretrainer(tokenizer_file(tmp_path / 'vqkd.safetensors')))
        assert model.tokenizer.vocab_size == VOCAB

    def test_parts(self):
        with pytest.raises(ValueError, match='as many numbers, std above 0'):
            MODELS.build(dict(type='BEiTMIMDataPreprocessor', std=(1.0, 0.0, 1.0)))
        with pytest.raises(ValueError, match='interval and num_images must be at least 1, got 0'):
            BEiTMIMPictureHook(interval=0)
        with pytest.raises(ValueError, match='takes no paramwise_cfg'):
            cfg = dict(optimizer=dict(type='AdamW'), constructor='BEiTNoDecayConstructor', paramwise_cfg=dict(a=1))
            build_optim_wrapper(build(), cfg)
