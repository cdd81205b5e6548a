"""Pre-trainings of a few steps by mmengine's Runner: logs, pictures, bad files, resuming, processes, hand-over."""

import json
import logging
import multiprocessing
import os
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from helpers import images

pytest.importorskip('mmengine', reason='needs the extra beit-plugin[mmseg]')

import beit_plugin.mm  # noqa: F401  registers

# isort: split

from mmengine.registry import MODELS
from PIL import Image
from pretraining_common import (
    BACKBONE,
    PICTURE,
    TEACHER,
    VOCAB,
    VQ,
    config,
    pictures,
    pretrainer,
    run,
    state,
    tokenizer,
    tokenizer_file,
    train_in_process,
    vqkd,
)
from resume_common import CPU, free_port, same

from beit_plugin import checkpoints
from beit_plugin.mm.pretraining.vqkd import build_teacher
from beit_plugin.mm.skipped_files import DataFileError
from beit_plugin.tokenizers import load_tokenizer


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
    return tokenizer_file(tmp_path_factory.mktemp('tokenizer') / 'vqkd.pth')


@pytest.fixture(scope='module', params=['v1', 'v2'])
def saved(request, root, tokens, tmp_path_factory):
    """The checkpoint of a pre-training, and its model."""
    work = tmp_path_factory.mktemp(request.param)
    runner = run(config(root, work, pretrainer(tokens, request.param == 'v2'), 2))
    return work / 'iter_2.pth', runner.model.model.eval()


def logged(work_dir):
    lines = [
        line for path in sorted(work_dir.glob('*/vis_data/scalars.json')) for line in path.read_text().splitlines()
    ]
    return [json.loads(line) for line in lines]


class TestRuns:
    @pytest.mark.parametrize('wrapper', [{}, dict(type='BEiTBF16OptimWrapper', accumulative_counts=2)])
    @pytest.mark.parametrize('v2', [False, True])
    def test_logs_and_learns(self, root, tokens, tmp_path, v2, wrapper):
        cfg = config(root, tmp_path, pretrainer(tokens, v2), 4)
        cfg['optim_wrapper'].update(wrapper)
        before = MODELS.build(dict(cfg['model'])).state_dict()
        runner = run(cfg)
        rows = logged(tmp_path)
        names = {'loss', 'acc', 'top_token', 'codebook', 'images_per_s', 'data_share', 'data_time', 'grad_norm', 'lr'}
        for row in rows:
            missing = names - set(row) - ({'grad_norm'} if wrapper and row['step'] % 2 else set())
            assert not missing and np.isfinite(row['loss'])
            assert 0 <= row['acc'] <= 1 and 1 / VOCAB <= row['top_token'] <= 1 and 0 <= row['data_share'] < 1
        assert len(rows) == 4 and (('cls_part' in rows[0]) == v2)
        assert not torch.equal(runner.model.state_dict()['model.lm_head.weight'], before['model.lm_head.weight'])
        assert state(tmp_path, 4)['state_dict'].keys() == before.keys()

    def test_tensorboard(self, root, tokens, tmp_path):
        pytest.importorskip('tensorboard', reason='needs tensorboard')
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
        cfg = config(root, tmp_path, pretrainer(tokens), 3, hooks=PICTURE)
        runner = run(dict(cfg, visualizer=dict(type='Visualizer', vis_backends=backends, name=tmp_path.name)))
        runner.visualizer.close()
        events = EventAccumulator(str(next(tmp_path.glob('*/vis_data'))))
        events.Reload()
        assert {'loss', 'acc', 'top_token', 'codebook', 'images_per_s', 'data_time'} <= set(events.Tags()['scalars'])
        assert events.Tags()['images'] == ['masked_image_modelling']
        assert [scalar.step for scalar in events.Scalars('acc')] == [1, 2, 3]

    def test_average_of_the_weights(self, root, tokens, tmp_path):
        ema = dict(ema=dict(type='EMAHook', momentum=0.5, update_buffers=True))
        run(config(root, tmp_path, pretrainer(tokens), 4, hooks=ema))
        saved = state(tmp_path, 4)
        own = {
            name.removeprefix('module.'): value for name, value in saved['ema_state_dict'].items() if name != 'steps'
        }
        assert own.keys() == saved['state_dict'].keys()
        assert not torch.equal(own['model.cls_token'], saved['state_dict']['model.cls_token'])

    def test_pictures(self, root, tokens, tmp_path):
        cfg = config(root, tmp_path, pretrainer(tokens), 4, hooks=PICTURE)
        plain = config(root, tmp_path / 'plain', pretrainer(tokens), 4)
        runner, other = run(cfg), run(plain)
        assert sorted(path.name for path in (tmp_path / 'pictures').iterdir()) == ['iter_3.png', 'iter_4.png']
        with Image.open(tmp_path / 'pictures/iter_4.png') as file:
            found = np.asarray(file.convert('RGB'))
        assert found.shape == (16 + 2 * 36, 4 * 36, 3)
        image, seen = found[18:50, 2:34], found[18:50, 38:70]
        expected = runner.train_dataloader.dataset.views.center(runner.train_dataloader.dataset.image(0))['inputs']
        assert np.array_equal(image, expected.permute(1, 2, 0).numpy())
        hidden = (seen == 128).all(2)
        assert hidden.sum() >= 6 * 64 and np.array_equal(seen[~hidden], image[~hidden])
        for name, value in runner.model.state_dict().items():  # who looks changes nothing
            assert torch.equal(value, other.model.state_dict()[name]), name


class TestBadFiles:
    def test_are_named_and_left_out(self, tmp_path, tokens, caplog):
        root = pictures(tmp_path / 'data')
        (root / 'class1/3.png').write_bytes(b'')
        (root / 'class0/2.png').write_bytes((root / 'class0/2.png').read_bytes()[:300])
        cfg = config(root, tmp_path / 'work', pretrainer(tokens), 9)
        with mock.patch('beit_plugin.mm.skipped_files.print_log') as log:
            runner = run(cfg)
        assert sorted(runner.train_dataloader.dataset.left_out) == [f'{root}/class0/2.png', f'{root}/class1/3.png']
        words = [call.args[0] for call in log.call_args_list]
        assert [word[: len('left out of training, image 1: image ')] for word in words] == [
            f'left out of training, image {i}: image ' for i in (1, 2)
        ]
        assert all(call.kwargs['level'] == logging.WARNING for call in log.call_args_list)

    def test_stop(self, tmp_path, tokens):
        root = pictures(tmp_path / 'data')
        (root / 'class1/3.png').write_bytes(b'')
        with pytest.raises(DataFileError, match=r"image '\S+class1/3.png' cannot be read as an image"):
            run(config(root, tmp_path / 'work', pretrainer(tokens), 9, data=dict(on_error='raise')))

    def test_none_there(self, tmp_path, tokens):
        with pytest.raises(DataFileError, match=r'nowhere does not exist: give a folder of images'):
            run(config(tmp_path / 'nowhere', tmp_path / 'work', pretrainer(tokens)))
        with pytest.raises(ValueError, match="got on_error='ignore', expected 'raise' or 'skip'"):
            run(config(tmp_path, tmp_path / 'work', pretrainer(tokens), data=dict(on_error='ignore')))


class TestResume:
    @pytest.mark.parametrize('model', ['v1', 'v2 with a broken file and a worker', 'vqkd'])
    def test_is_exact(self, tmp_path, tokens, model):
        root = pictures(tmp_path / 'data')
        if 'broken' in model:
            (root / 'class1/3.png').write_bytes(b'')
        cfg = vqkd() if model == 'vqkd' else pretrainer(tokens, v2='v2' in model)
        options = dict(workers='worker' in model) | (dict(hooks=PICTURE) if model == 'v1' else {})
        run(config(root, tmp_path / 'whole', cfg, 6, **options))
        run(config(root, tmp_path / 'parts', cfg, 4, **options))
        torch.manual_seed(99)  # a new process would be in another state
        run(config(root, tmp_path / 'parts', cfg, 6, **options, resume=True))
        whole, parts = (state(tmp_path / name, 6) for name in ('whole', 'parts'))
        assert same(whole['state_dict'], parts['state_dict'])
        assert same(whole['optimizer']['state'], parts['optimizer']['state'])
        assert whole['optimizer']['param_groups'] == parts['optimizer']['param_groups']
        losses = [[(row['step'], row['loss']) for row in logged(tmp_path / name)] for name in ('whole', 'parts')]
        assert losses[0] == losses[1] and len(losses[0]) == 6


class TestProcesses:
    @pytest.mark.parametrize('model', ['v2', 'vqkd'])
    def test_two(self, root, tokens, tmp_path, model):
        """Different images and masks, the same weights and the same codebook."""
        cfg = config(root, tmp_path / 'work', vqkd() if model == 'vqkd' else pretrainer(tokens, True), 3)
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['beit_plugin.mm', 'mmengine.evaluator'])
        port = free_port()
        running = [context.Process(target=train_in_process, args=(cfg, rank, 2, port, tmp_path)) for rank in (0, 1)]
        with mock.patch.dict(os.environ, CPU):
            for process in running:
                process.start()
        for process in running:
            process.join(200)
        codes = [process.exitcode for process in running]
        for process in running:
            process.kill()
        assert codes == [0, 0]
        one, two = (torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in (0, 1))
        assert not torch.equal(one['inputs'], two['inputs']) and not torch.equal(one['mask'], two['mask'])
        assert one['state'].keys() == two['state'].keys() and len(one['state']) > 20
        for name, value in one['state'].items():
            assert torch.equal(value, two['state'][name]), name


class TestHandOver:
    """What a pre-training saved loads as it is where a pre-trained BEiT is wanted."""

    @staticmethod
    def check(encoder, model):
        """Its features, with the shared table in each of its blocks."""
        encoder.eval()
        pixels = images(32, 32)
        with torch.no_grad():
            expected, _ = model.run_layers(model.blocks, *embedded(model, pixels))[:2]
            found, _ = encoder.run_layers(encoder.blocks, *embedded(encoder, pixels))[:2]
        assert torch.allclose(found, expected, atol=1e-5)
        table = model.rel_pos_bias.relative_position_bias_table
        for block in encoder.blocks:
            tables = [value for name, value in block.named_parameters() if name.endswith('bias_table')]
            assert len(tables) == 1 and torch.equal(tables[0], table)

    def test_classifier(self, saved):
        file, model = saved
        options = dict(**BACKBONE, num_classes=3)
        self.check(timm.create_model('beit_plugin_base_patch16_224', **options, checkpoint_path=str(file)), model)
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
        self.check(timm.create_model('beit_plugin_base_patch16_224', **options, **overlay), model)

    def test_backbone_of_segmentors_and_detectors(self, saved):
        file, model = saved
        sizes = dict(img_size=32, patch_size=8, embed_dims=16, num_layers=3, num_heads=2, mlp_ratio=2.0)
        sizes['norm_cfg'] = dict(type='LN', eps=1e-6)
        for way in (dict(pretrained=str(file)), dict(init_cfg=dict(type='Pretrained', checkpoint=str(file)))):
            backbone = MODELS.build(dict(type='BEiTBackbone', **sizes, **way))
            backbone.init_weights()
            self.check(backbone, model)

    def test_to_every_dialect(self, saved, tmp_path):
        file, model = saved
        copy = MODELS.build(pretrainer(tokenizer(), hasattr(model, 'cls_pt_layers'))).model
        checkpoints.load(copy, file)
        for name, value in model.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value), name
        for dialect in ('unilm', 'mmpretrain'):
            checkpoints.save(copy, tmp_path / f'{dialect}.pth', dialect=dialect)
            again = MODELS.build(pretrainer(tokenizer(), hasattr(model, 'cls_pt_layers'))).model
            checkpoints.load(again, tmp_path / f'{dialect}.pth')
            assert torch.equal(again.lm_head.weight, model.lm_head.weight)

    def test_tokenizer(self, root, tmp_path):
        runner = run(config(root, tmp_path, vqkd(), 3))
        found = logged(tmp_path)[-1]
        assert {'loss', 'cosine', 'commitment', 'codebook', 'perplexity'} <= set(found)
        loaded = load_tokenizer(tmp_path / 'iter_3.pth')
        pixels = torch.rand(2, 3, 32, 32)
        assert torch.equal(loaded.encode(pixels), runner.model.tokenizer.encode(pixels))
        assert not any(name.startswith('taught') for name in runner.model.state_dict())
        run(config(root, tmp_path / 'mim', pretrainer(tmp_path / 'iter_3.pth'), 1))


class TestTeacher:
    def test_random_weights_are_the_same_each_time(self):
        one, two, other = build_teacher(**TEACHER), build_teacher(**TEACHER), build_teacher(**TEACHER, seed=1)
        pixels = torch.rand(2, 3, 32, 32)
        assert torch.equal(one(pixels, (4, 4)), two(pixels, (4, 4)))
        assert not torch.equal(one(pixels, (4, 4)), other(pixels, (4, 4)))

    def test_a_file(self, tmp_path):
        options = {name: value for name, value in TEACHER.items() if name not in ('name', 'weights')}
        torch.manual_seed(5)  # other weights than those of the teacher's seed
        torch.save(timm.create_model('vit_tiny_patch16_224', **options).state_dict(), tmp_path / 'vit.pth')
        teacher = build_teacher(**{**TEACHER, 'weights': str(tmp_path / 'vit.pth')})
        saved = torch.load(tmp_path / 'vit.pth', weights_only=True)
        assert torch.equal(teacher.model.patch_embed.proj.weight, saved['patch_embed.proj.weight'])
        part = {name: value for name, value in saved.items() if name != 'blocks.0.attn.qkv.weight'}
        cases = ((part, 'they leave blocks.0.attn.qkv.weight at random'), ({'a': saved['norm.bias']}, 'cls_token'))
        for other, left in cases:
            torch.save(other, tmp_path / 'other.pth')
            with pytest.raises(ValueError, match=f'are not of the teacher vit_tiny_patch16_224: .*{left}'):
                build_teacher(**{**TEACHER, 'weights': str(tmp_path / 'other.pth')})

    @pytest.mark.parametrize(
        ('change', 'sentence'),
        [
            (dict(name='vit_of_mine'), "has no model 'vit_of_mine' for a teacher"),
            (dict(weights='no.pth'), 'weights no.pth do not exist; give a file'),
        ],
    )
    def test_sentences(self, change, sentence):
        with pytest.raises(ValueError, match=sentence):
            build_teacher(**{**TEACHER, **change})

    def test_what_cannot_be_fetched(self, monkeypatch):
        def create(*args, **kwargs):
            raise OSError('no network\nhere')

        monkeypatch.setattr(timm, 'create_model', create)
        with pytest.raises(ValueError, match=r'could not be loaded \(no network here\); give weights=FILE, or None'):
            build_teacher(**{**TEACHER, 'weights': 'pretrained'})

    def test_images_are_needed(self):
        model = MODELS.build(vqkd())
        with pytest.raises(ValueError, match="needs images, and mode 'loss', 'predict' or 'tensor', got 'losses'"):
            model(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), mode='losses')
        assert model(inputs=torch.rand(1, 3, 32, 32), images=torch.rand(1, 3, 32, 32)).shape == (1, 4, 4)
        assert VQ['vocab_size'] == model.tokenizer.vocab_size


def embedded(encoder, pixels):
    x, grid = encoder.embed(pixels)
    return x, encoder.position_bias(grid, x)
