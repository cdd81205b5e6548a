"""Pre-training as a user starts it: a tokenizer, masked image modelling with it, and what is said when it cannot."""

import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import timm
import torch
from pretraining_common import pictures, tokenizer, tokenizer_file
from tools_common import ENV, ROOT, image_folder, width

if importlib.util.find_spec('mmseg') is None or importlib.util.find_spec('tensorboard') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

from mmengine.config import Config

from beit_plugin.data.mim_views import AllViews, ImageFiles, TwoViews
from beit_plugin.data.token_cache import TokenCache
from beit_plugin.tokenizers import Tokenizer

from data_folders import DataError  # isort: skip
from run_common import run  # isort: skip
from run_mim import check_tokenizer, result, sentence, use_sources  # isort: skip

SMALL = ('train_cfg.max_iters=4', 'train_dataloader.batch_size=2', 'default_hooks.checkpoint.interval=2')
SMALL += ('train_dataloader.dataset.views.size=32', 'default_hooks.logger.interval=2')
VQKD = ('model.tokenizer.img_size=32', 'model.tokenizer.embed_dim=12', 'model.teacher.img_size=32')
MIM = ('model.backbone.img_size=32', 'model.backbone.embed_dim=16', 'model.backbone.depth=2')
MIM += ('train_dataloader.collate_fn.masking.grid=(4,4)', 'train_dataloader.collate_fn.masking.num_masking_patches=8')


def tool(*args, cwd, status=0, name='train'):
    """Output of a tool in this process, which has imported all of it; its error where the status is not 0."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
        patch.chdir(cwd)
        main = (lambda: module.main(module.parse_args())) if name == 'quickstart' else module.main
        if not status:
            run(main)
            return out.getvalue()
        with pytest.raises(SystemExit) as ended:
            run(main)
    return str(ended.value.code)


def config(name):
    return Config.fromfile(ROOT / f'configs/mim/{name}.py')


def test_tokenizer_then_pre_training(tmp_path):
    root = pictures(tmp_path / 'data')
    (root / 'class1/3.png').write_bytes(b'')
    data = ('--data-root', root)
    trained = tool(
        ROOT / 'configs/mim/vqkd-tiny_shapes.py', *data, '--work-dir', 'vqkd', '--cfg-options', *SMALL, *VQKD,
        'train_cfg.max_iters=9', 'default_hooks.checkpoint.interval=9', cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r'model +VQKD, 0.\d M parameters, taught by VisionTransformer', trained)
    assert '6 training images' in trained
    *_, left_out, last = trained.splitlines()
    assert left_out == f'1 file left out of training: {root}/class1/3.png'
    assert re.match(
        r'loss [\d.]+, codebook [\d.]+% in use, perplexity \d+ after 9 iterations, checkpoint .*9.pth', last
    )
    common = ('--tokenizer', 'vqkd/iter_9.pth', '--work-dir', 'mim')
    options = ('--cfg-options', *SMALL, *MIM)
    mim = ROOT / 'configs/mim/beit-tiny_shapes.py'
    trained = tool(mim, *data, *common, '--amp', *options, cwd=tmp_path)
    assert re.search(r'model +BeitForMaskedImageModeling, ', trained) and 'masks       8 of 16 patches' in trained
    assert 'tokens      128 of VQKD, patches of 8 x 8 px of images of 32 px' in trained
    assert re.search(r'memory      about \d+ MiB a process: ', trained)
    last = trained.splitlines()[-1]
    assert re.match(r'loss [\d.]+, token accuracy [\d.]+% \(most frequent token [\d.]+%\) after 4 iterations', last)
    assert (tmp_path / 'mim/pictures/iter_4.png').is_file() and list(tmp_path.glob('mim/*/vis_data/events*'))
    resumed = tool(
        mim, *data, *common, '--resume', *options, 'train_cfg.max_iters=6', cwd=tmp_path
    )  # fmt: skip
    assert re.search(r'after 6 iterations, checkpoint .*mim/iter_6.pth', resumed.splitlines()[-1])
    flexible = ('runner_type=FlexibleRunner', 'strategy.type=SingleDeviceStrategy')
    resumed = tool(mim, *data, *common, '--resume', *options, 'train_cfg.max_iters=8', *flexible, cwd=tmp_path)
    assert re.search(r'after 8 iterations, checkpoint .*mim/iter_8.pth', resumed.splitlines()[-1])


def test_too_few_images_for_a_batch(tmp_path):
    root = pictures(tmp_path / 'data')
    common = ('--tokenizer', tokenizer_file(tmp_path / 'vqkd.pth'), '--data-root', root)
    said = tool(ROOT / 'configs/mim/beit-base_dalle.py', *common, cwd=tmp_path, status=1)
    assert said == (
        'error: 6 training images do not fill a batch of 128 in each of 1 processes: take --cfg-options '
        'train_dataloader.batch_size=N.'
    )


class TestTokenCache:
    def cache(self, root, *args, cwd, status=0):
        tokens = ('--tokenizer', tokenizer_file(cwd / 'vqkd.pth'), '--out', 'tokens.safetensors', '--workers', 0)
        options = ('--cfg-options', 'train_dataloader.dataset.views.size=32')
        mim = ROOT / 'configs/mim/beit-tiny_shapes.py'
        return tool(mim, '--data-root', root, *tokens, *args, *options, cwd=cwd, status=status, name='cache_tokens')

    def test_then_pre_training(self, tmp_path):
        root = pictures(tmp_path / 'data')
        (root / 'class1/3.png').write_bytes(b'')
        made = self.cache(root, '--views', 3, '--seed', 2, '--batch', 4, cwd=tmp_path)
        assert made.splitlines()[-2:] == [
            f'1 image without tokens: {root}/class1/3.png',
            'tokens.safetensors: 3 views of 6 images, 4 x 4 tokens each of 13, '
            f'{(tmp_path / "tokens.safetensors").stat().st_size:,} bytes',
        ]
        cache = TokenCache(tmp_path / 'tokens.safetensors')
        views = {**config('beit-tiny_shapes').train_dataloader.dataset.views, 'size': 32}
        files = ImageFiles(root, TwoViews(**views), num_views=3, seed=2)
        for index, pixels, _ in map(AllViews(files).__getitem__, range(6)):
            tokens = [cache.tokens(index, view) for view in range(3)]
            if pixels is None:
                assert tokens == [None] * 3 and files.path(index) == f'{root}/class1/3.png'
            else:
                assert torch.equal(torch.stack(tokens), tokenizer().encode(pixels / 255))
        assert (cache.tokenizer, cache.seed) == (f'VQKD {tmp_path}/vqkd.pth', 2)
        train = (ROOT / 'configs/mim/beit-tiny_shapes.py', '--work-dir', 'mim')
        options = ('--cfg-options', *SMALL, *MIM, 'train_dataloader.dataset.token_cache=tokens.safetensors')
        trained = tool(*train, '--data-root', root, '--tokenizer', 'vqkd.pth', *options, cwd=tmp_path)
        assert 'read from tokens.safetensors: the tokenizer does not run' in trained
        error = tool(
            *train, '--data-root', root / 'class0', '--tokenizer', 'vqkd.pth', *options, cwd=tmp_path, status=1
        )
        assert error.startswith(
            'error: tokens.safetensors holds tokens of other images, the number of images is 6 there'
        )
        assert error.endswith('or give what it was made of.')
        other = tokenizer_file(tmp_path / 'other.pth', seed=1)
        error = tool(*train, '--data-root', root, '--tokenizer', other, *options, cwd=tmp_path, status=1)
        assert re.match(r'error: tokens.safetensors holds tokens of VQKD \S+, and only \d+% of those looked at', error)

    def test_interrupted(self, tmp_path, monkeypatch, capsys):
        def encode(self, images):
            raise KeyboardInterrupt

        monkeypatch.setattr(Tokenizer, 'encode', encode)
        assert self.cache(pictures(tmp_path / 'data'), cwd=tmp_path, status=130) == '130'
        assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'vqkd.pth']

    @pytest.mark.parametrize(
        ('arguments', 'words'),
        [
            (('--data-root', 'nowhere'), 'nowhere does not exist: give a folder of images'),
            (
                ('--out', 'tokens.pth'),
                '--out needs a name that ends in .safetensors in a folder that is there, got tok',
            ),
            (('--out', 'no/a.safetensors'), 'in a folder that is there, got no/a.safetensors'),
            (('--device', 'abacus'), '--device abacus: Expected one of cpu'),
            (('--tokenizer', 'mine'), "unknown tokenizer 'mine': no file of that name is here"),
            (('--tokenizer', 'no.pth'), 'the tokenizer no.pth does not exist: give a file'),
            (('--data-root', 'broken'), 'none of the 2 images can be read, such as broken/class0/0.png: give others'),
        ],
    )
    def test_one_sentence(self, tmp_path, arguments, words):
        for path in pictures(tmp_path / 'broken', 2).rglob('*.png'):
            path.write_bytes(b'')
        error = self.cache(pictures(tmp_path / 'data', 2), *arguments, cwd=tmp_path, status=1)
        assert error.startswith('error: ') and len(error.splitlines()) == 1 and words in error and '.py: ' not in error
        assert not list(tmp_path.glob('*tokens*'))

    def test_another_configuration(self, tmp_path):
        error = tool(
            ROOT / 'configs/mim/vqkd-tiny_shapes.py', '--out', 'a.safetensors', cwd=tmp_path, status=1,
            name='cache_tokens',
        )  # fmt: skip
        assert (
            'vqkd-tiny_shapes.py does not train a BEiTPretrainer on BEiTImages: give one of configs/mim/beit*.py'
            in error
        )


@pytest.mark.slow
def test_quickstart(tmp_path):
    image_folder(tmp_path / 'data', ('training', 'validation'), values=(0, 1, 7))
    short = ('train_cfg.max_iters=2', 'train_dataloader.batch_size=2', 'default_hooks.checkpoint.interval=2')
    short += ('default_hooks.logger.interval=1',)
    output = tool(
        '--pretrain', '--data-root', 'data', '--work-dir', 'work', '--pretrain-options', *short,
        '--cfg-options', *short, 'train_cfg.val_interval=2', cwd=tmp_path, name='quickstart',
    )  # fmt: skip
    assert re.fullmatch(r'mIoU pre-trained [\d.]+ from scratch [\d.]+', output.splitlines()[-1])
    work = tmp_path / 'work/pretrain'
    assert (work / 'labelled.txt').read_text().split() == ['0', '1', '2', '3', '4']
    for name in ('pretraining/pictures/iter_2.png', 'pretraining/curve.png', 'pre-trained/comparison.png'):
        assert width(work / name) > 300
    copies = [Config.fromfile(next((work / name).glob('*.py'))) for name in ('pre-trained', 'from-scratch')]
    assert copies[0].model.backbone.pretrained == str(work / 'pretraining/iter_2.pth')
    assert copies[1].model.backbone.pretrained is None


def test_the_written_out_loop(tmp_path):
    pictures(tmp_path / 'data')
    tokens = tokenizer_file(tmp_path / 'vqkd.pth')
    sizes = ('--model', 'beit_plugin_tiny_patch16_224_mim', '--img-size', 32, '--patch-size', 8)
    run_length = ('--batch-size', 3, '--epochs', 2, '--workers', 0)
    output = tool('data', '--tokenizer', tokens, *sizes, *run_length, cwd=tmp_path, name='pretrain_loop')
    assert re.search(r'epoch 2: loss [\d.]+, token accuracy [\d.]+%, \d+ images/s', output)
    options = dict(img_size=32, patch_size=8, num_classes=4)
    timm.create_model('beit_plugin_tiny_patch16_224', **options, checkpoint_path=str(tmp_path / 'mim.pth'))
    assert len((ROOT / 'tools/pretrain_loop.py').read_text().splitlines()) < 100


@pytest.mark.slow  # mm/test_mim_training.py has two as well
def test_two_processes(tmp_path):
    root = pictures(tmp_path / 'data')
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [ROOT / 'tools/train.py', ROOT / 'configs/mim/beit-tiny_shapes.py', '--launcher', 'pytorch']
    command += ['--tokenizer', tokenizer_file(tmp_path / 'vqkd.pth'), '--data-root', root, '--work-dir', 'work']
    options = ['--cfg-options', *SMALL, *MIM, 'env_cfg.dist_cfg.backend=gloo']
    done = subprocess.run(
        [*map(str, command), *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENV
    )
    # a process of torch 2.14 aborts now and then after its work is done, with gloo's threads running
    aborted = 'terminate called without an active exception' in done.stderr
    assert done.returncode == 0 or aborted, done.stdout[-2000:] + done.stderr[-3000:]
    assert 'effective batch 4' in done.stdout and 'cpu, 1 threads, 2 process(es)' in done.stdout
    assert (tmp_path / 'work/iter_4.pth').is_file()


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['beit-tiny_shapes'], 'the tokenizer work_dirs/vqkd-tiny_shapes/iter_200.pth does not exist: give a file, or'),
        (['beit-tiny_shapes', '--teacher', 'x'], '--teacher is for configurations of BEiTVQKD, got BEiTPretrainer'),
        (['vqkd-tiny_shapes', '--tokenizer', 'x'], '--tokenizer is for configurations of BEiTPretrainer, got BEiTVQKD'),
        (['vqkd-tiny_shapes', '--teacher', 'x'], "has no model 'x' for a teacher"),
        (['beit-tiny_shapes', '--tokenizer', 'mine'], "unknown tokenizer 'mine': no file of that name is here"),
        (['vqkd-tiny_shapes', '--data-root', 'nowhere'], 'nowhere does not exist: give a folder of images'),
        (
            ['vqkd-tiny_shapes', '--cfg-options', 'model.tokenizer.vocab_size=1'],
            'a codebook needs vocab_size >= 2',
        ),
    ],
)
def test_one_sentence(arguments, words, tmp_path):
    name, *rest = arguments
    data = [] if '--data-root' in rest else ['--data-root', str(pictures(tmp_path / 'data', 2))]
    error = tool(ROOT / f'configs/mim/{name}.py', *data, *rest, cwd=tmp_path, status=1).strip()
    assert error.startswith('error: ') and len(error.splitlines()) == 1 and words in error and '.py: ' not in error


def test_sources_from_the_command_line():
    cfg = config('beit-tiny_shapes')
    use_sources(cfg, 'dalle', None)
    assert cfg.model.tokenizer.source == 'dalle'
    check_tokenizer(cfg)  # a published name: fetched when it is built
    cfg = config('vqkd-tiny_shapes')
    use_sources(cfg, None, 'vit_tiny_patch16_224')
    assert cfg.model.teacher.weights is None and cfg.model.teacher.depth == 1  # the one that is there already
    use_sources(cfg, None, 'resnet18')
    assert dict(cfg.model.teacher) == dict(name='resnet18', weights='pretrained')
    with pytest.raises(DataError, match='got BEiTVQKD'):
        use_sources(cfg, 'dalle', None)


def test_words():
    assert sentence(ValueError('class `A` in b/a.py: it is so.')) == sentence(ValueError('it is so')) == 'it is so'
    assert result(config('vqkd-tiny_shapes'), {}) == 'no loss'
