"""tools/predict.py: what it writes and says about images that are fine, and about those that are not."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tools_common import SHAPES_CONFIG, cut, turn, width, write

import beit_plugin  # noqa: F401  registers

import predict  # isort: skip
import run_common  # isort: skip
import run_failures  # isort: skip
from predict_models import TimmPredictor, named, read_image  # isort: skip
from predict_pictures import shares  # isort: skip
from data_folders import DataError  # isort: skip

CLASSIFIER = 'beit_plugin_tiny_patch16_224'
needs_mmseg = pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason='needs the extra beit-plugin[mmseg]')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Images of several kinds, two that are broken, and one of floating point numbers."""
    root = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    for name, shape in {
        'a.png': (40, 60, 3),
        'sub/a.png': (33, 70),
        'rgba.png': (50, 48, 4),
        'turned.jpg': (30, 80, 3),
    }.items():
        write(root / name, rng.integers(0, 255, shape))
    turn(root / 'turned.jpg')
    write(root / 'cut.jpg', rng.integers(0, 255, (60, 60, 3)))
    cut(root / 'cut.jpg', 0.5)
    (root / 'text.png').write_text('no image')
    Image.fromarray(rng.random((20, 30)).astype(np.float32)).save(root / 'float.tif')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'classifier.pth'
    torch.save(timm.create_model(CLASSIFIER, num_classes=1000).state_dict(), path)
    return path


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Configuration and random checkpoint of a tiny segmentor."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    import beit_plugin.mm  # noqa: F401

    root = tmp_path_factory.mktemp('segmentor')
    (root / 'config.py').write_text(
        f'_base_ = {str(SHAPES_CONFIG)!r}\n'
        'model = dict(backbone=dict(embed_dims=16, num_heads=2), neck=dict(embed_dim=16),\n'
        '    decode_head=dict(in_channels=[16] * 4, channels=8), auxiliary_head=dict(in_channels=16, channels=8))\n'
    )
    cfg = Config.fromfile(root / 'config.py')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    meta = dict(dataset_meta=cfg.test_dataloader.dataset.metainfo.to_dict())  # mmengine saves it
    torch.save(dict(state_dict=model.state_dict(), meta=meta), root / 'weights.pth')
    return '--config', root / 'config.py', '--checkpoint', root / 'weights.pth'


def call(monkeypatch, capsys, out: Path, *args: object) -> tuple[dict, str, str]:
    """Numbers, output, and the sentence about failures."""
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, args), '--out', str(out), '--device', 'cpu'])
    said = ''
    try:
        predict.main()
    except DataError as error:
        said = str(error)
    return json.loads((out / 'predictions.json').read_text()), capsys.readouterr().out, said


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def check_failures(numbers, said, folder):
    assert set(numbers['failed']) == {str(folder / name) for name in ('cut.jpg', 'text.png', 'float.tif')}
    assert said.startswith('3 of 7 images could not be used: ')
    assert all(words in said for words in ('truncated', 'cannot identify', 'float.tif (the image holds torch.float32'))


def files(numbers, folder):
    """Names of what was written, by image."""
    assert all(found['input'] == path for path, found in numbers['images'].items())
    return {str(Path(path).relative_to(folder)): found['files'] for path, found in numbers['images'].items()}


def test_classifier(folder, weights, tmp_path, monkeypatch, capsys):
    args = (folder, '--model', CLASSIFIER, '--checkpoint', weights, '--top', 3, '--attention', '11:2', '0')
    numbers, output, said = call(monkeypatch, capsys, tmp_path, *args)
    check_failures(numbers, said, folder)
    assert len(numbers['images']) == 4 and '4 of 7 images' in output
    for found in numbers['images'].values():
        values = [one['probability'] for one in found['top']]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert not found['top'][0]['name'].startswith('class')  # ImageNet's
    expected = {'a.png': 'a', 'sub/a.png': 'a_2', 'rgba.png': 'rgba', 'turned.jpg': 'turned'}
    assert files(numbers, folder) == {image: {'attention': f'{name}_attention.png'} for image, name in expected.items()}
    assert {path.name for path in tmp_path.glob('*.png')} == {f'{name}_attention.png' for name in expected.values()}
    assert width(tmp_path / 'a_attention.png') > 500  # four panels


def test_a_checkpoint_tells_its_classes(tmp_path, monkeypatch, capsys):
    """Of two classes, pooled as [CLS]; 16 bits are seen as the image processor sees them; a thin image has no maps."""
    torch.save(timm.create_model(CLASSIFIER, num_classes=2, global_pool='token').state_dict(), tmp_path / 'two.pth')
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    write(tmp_path / 'in/a.png', np.random.default_rng(0).integers(0, 255, (3, 80, 3)))
    Image.fromarray(np.full((40, 40), 2**15, np.uint16)).save(tmp_path / 'in/b.png')
    assert np.array_equal(np.unique(np.asarray(read_image(tmp_path / 'in/b.png'))), [128])
    args = (tmp_path / 'in', '--model', CLASSIFIER, '--checkpoint', tmp_path / 'two.pth', '--attention', '0:0')
    numbers, output, said = call(monkeypatch, capsys, tmp_path / 'out', *args, '--labels', tmp_path / 'names.txt')
    assert {one['name'] for found in numbers['images'].values() for one in found['top']} == {'ant', 'bee'}
    assert '2 of 2 images' in output and re.match(r'1 of 2 .*a.png \(no attention maps: expected images of at', said)
    assert [path.name for path in (tmp_path / 'out').glob('*.png')] == ['b_attention.png']


def test_one_image_does_not_spoil_its_batch(folder, weights, tmp_path, monkeypatch, capsys):
    probabilities = TimmPredictor.probabilities

    def picky(self, images):
        if any(image.size == (48, 50) for image in images):  # rgba.png
            raise RuntimeError('too much')
        return probabilities(self, images)

    monkeypatch.setattr(TimmPredictor, 'probabilities', picky)
    numbers, _, said = call(monkeypatch, capsys, tmp_path, folder, '--model', CLASSIFIER, '--checkpoint', weights)
    assert len(numbers['images']) == 3 and 'rgba.png (too much)' in said
    assert list(files(numbers, folder).values()) == [{}] * 3


@needs_mmseg
def test_a_picture_that_cannot_be_written(segmentor, folder, tmp_path, monkeypatch, capsys):
    (tmp_path / 'a_overlay.png').mkdir()
    numbers, _, said = call(monkeypatch, capsys, tmp_path, folder / 'a.png', folder / 'rgba.png', *segmentor)
    assert re.match(r'1 of 2 images could not be used: .*a.png \(.*Is a directory', said)
    assert files(numbers, folder) == {
        'a.png': {'classes': 'a_classes.png'},
        'rgba.png': {'classes': 'rgba_classes.png', 'overlay': 'rgba_overlay.png'},
    }


def test_interrupted(folder, weights, tmp_path, monkeypatch, capsys):
    """What was found is written."""
    seen = []

    def stop(predictor, images, top, results):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        results.add(next(iter(images)), top=[])

    monkeypatch.setattr(predict, 'classify', stop)
    args = [str(folder), '--model', CLASSIFIER, '--checkpoint', str(weights), '--batch-size', '1', '--device', 'cpu']
    monkeypatch.setattr(sys, 'argv', ['predict.py', *args, '--out', str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_common.run(predict.main)
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith('interrupted\n')
    assert len(json.loads((tmp_path / 'predictions.json').read_text())['images']) == 1


@needs_mmseg
@pytest.mark.parametrize('more', [(), ('--multi-scale', '--attention')])
def test_mmsegmentation(segmentor, folder, tmp_path, monkeypatch, capsys, more):
    numbers, output, said = call(monkeypatch, capsys, tmp_path, folder, *segmentor, *more)
    check_failures(numbers, said, folder)
    assert len(numbers['images']) == 4 and f'{folder}/turned.jpg: ' in output
    for found in numbers['images'].values():
        assert sum(found['classes'].values()) == pytest.approx(1)
    drawn = ('classes', 'overlay', *(['attention'] if '--attention' in more else ()))
    assert files(numbers, folder)['sub/a.png'] == {kind: f'a_2_{kind}.png' for kind in drawn}
    shapes = {name: pixels(tmp_path / f'{name}_classes.png').shape for name in ('a', 'rgba', 'turned')}
    assert shapes == {'a': (40, 60), 'rgba': (50, 48), 'turned': (80, 30)}
    assert width(tmp_path / 'a_overlay.png') == 1200
    assert (tmp_path / 'a_attention.png').exists() == ('--attention' in more)


@needs_mmseg
def test_an_image_that_a_pipeline_scales_to_nothing(segmentor, tmp_path, monkeypatch):
    folder = tmp_path / 'photos'
    folder.mkdir()
    Image.new('RGB', (5000, 1)).save(folder / 'long.png')
    monkeypatch.setattr(sys, 'argv', ['predict.py', str(folder), *map(str, segmentor), '--out', str(tmp_path / 'out')])
    with pytest.raises(SystemExit) as stopped:
        run_common.run(predict.main)
    assert 'long.png (scaled by the test pipeline, an image of 1 x 5000 (H x W) pixels has' in str(stopped.value.code)


@needs_mmseg
def test_labels_are_those_of_the_evaluation(segmentor, folder, tmp_path, monkeypatch, capsys):
    from mmseg.apis import inference_model, init_model

    call(monkeypatch, capsys, tmp_path, folder / 'a.png', *segmentor)
    model = init_model(str(segmentor[1]), str(segmentor[3]), device='cpu')
    expected = inference_model(model, str(folder / 'a.png')).pred_sem_seg.data[0].numpy()
    assert np.array_equal(pixels(tmp_path / 'a_classes.png'), expected)


@pytest.mark.parametrize('more', [(), ('--multi-scale',)])
def test_segmentor_of_timm(tmp_path, monkeypatch, capsys, folder, more):
    name = 'beit_plugin_tiny_patch16_upernet'
    make = timm.create_model
    small = dict(num_classes=300, depth=4, embed_dim=32, num_heads=2, img_size=32, channels=8)
    monkeypatch.setattr(timm, 'is_model', lambda name: True)

    def tiny(name, **options):
        options.pop('pretrained', None)
        return make('beit_plugin_base_patch16_640_upernet', **small)

    monkeypatch.setattr(timm, 'create_model', tiny)
    numbers, _, said = call(monkeypatch, capsys, tmp_path, folder / 'a.png', folder / 'sub', '--model', name, *more)
    assert not said and len(numbers['images']) == 2
    assert pixels(tmp_path / 'a_2_classes.png').shape == (33, 70)
    assert all(key.startswith('class ') for found in numbers['images'].values() for key in found['classes'])


@pytest.mark.parametrize(
    ('args', 'reason'),
    [
        (('--attention', '12'), 'the model has the blocks 0 to 11'),
        (('--attention', '2:3'), 'the block has the heads 0 to 2'),
        (('--multi-scale',), 'is a classifier'),
        (('--labels', 'none.txt'), '--labels none.txt does not exist'),
        (('--device', 'none'), '--device none: Expected one of cpu'),
        (('--labels', 'latin.txt'), '--labels latin.txt is not UTF-8'),
        (('--out', 'latin.txt'), r'--out latin.txt cannot be written to \(it is a file\): give another folder'),
        (('--out', '/proc/none'), '--out /proc/none cannot be written to'),
        (('--checkpoint', '.'), '--checkpoint . is a folder, expected a file'),
        (('--model', 'beit_none'), 'is no model of timm'),
        (('--checkpoint', 'none.pth'), '--checkpoint none.pth does not exist'),
        (('--checkpoint', __file__), 'is cut off, damaged or no checkpoint file'),
        (
            ('--model', 'beit_plugin_base_patch16_224'),
            r'does not fit beit_plugin_base_patch16_224: size mismatch for .*more',
        ),
    ],
)
def test_refuses(args, reason, folder, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
    start = ['predict.py', str(folder / 'a.png'), '--model', CLASSIFIER, '--checkpoint', str(weights)]
    monkeypatch.setattr(sys, 'argv', [*start, '--device', 'cpu', *args])
    with pytest.raises(DataError, match=reason):
        predict.main()


def test_without_matplotlib(folder, weights, tmp_path, monkeypatch):
    """Of an installation for timm alone; no image is to blame."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(run_failures, 'find_spec', lambda name: None if name == 'matplotlib' else find_spec(name))
    start = ['predict.py', str(folder), '--model', CLASSIFIER, '--checkpoint', str(weights), '--attention']
    monkeypatch.setattr(sys, 'argv', [*start, '--device', 'cpu', '--out', str(tmp_path)])
    with pytest.raises(DataError, match='drawing needs matplotlib: pip install matplotlib'):
        predict.main()
    assert not list(tmp_path.iterdir())


def test_inputs(tmp_path):
    with pytest.raises(DataError, match='none does not exist'):
        predict.find_images([tmp_path / 'none'], tmp_path)
    with pytest.raises(DataError, match='no images in'):
        predict.find_images([tmp_path], tmp_path)
    write(tmp_path / 'a.png', np.zeros((4, 4)))
    write(tmp_path / 'out/a_overlay.png', np.zeros((4, 4)))  # of an earlier run
    (tmp_path / 'back').symlink_to(tmp_path)
    assert predict.find_images([tmp_path], tmp_path / 'out') == [tmp_path / 'a.png']
    assert predict.find_images([tmp_path / 'out'], tmp_path / 'out') == [tmp_path / 'out/a_overlay.png']


def test_no_two_images_share_an_output():
    paths = [Path(name) for name in ('a.jpg', 'a.png', 'a_2.jpg', 'b/A.jpg', 'b/c.jpg')]
    assert list(predict.names(paths).values()) == ['a', 'a_2', 'a_2_2', 'A_3', 'c']


def test_paths_are_shown_in_a_line():
    assert [predict.shown(path) for path in ('ü ä.jpg', 'a\nb', 'a\udcff')] == ['ü ä.jpg', r"'a\nb'", r"'a\udcff'"]


@pytest.mark.parametrize(
    ('args', 'reason'),
    [
        (('--config', 'c.py'), '--config needs --checkpoint'),
        (('--model', 'x', '--attention', '1:'), 'expected BLOCK or BLOCK:HEAD'),
        (('--model', 'x', '--top', '0'), 'expected a number of at least 1'),
    ],
)
def test_refuses_arguments(args, reason, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['predict.py', 'a.png', *args])
    with pytest.raises(SystemExit):
        predict.parse_args()
    assert reason in capsys.readouterr().err


def test_names_and_colours():
    names, palette = named(['a', 'b'], None, 3)  # not as many as the model has
    assert (
        names == ['class 0', 'class 1', 'class 2'] and palette.shape == (3, 3) and len(np.unique(palette, axis=0)) == 3
    )
    given = [[1, 2, 3], [4, 5, 6]]
    assert named(['a', 'b'], given, 2)[1].tolist() == given
    assert shares(np.array([[0, 2], [2, 2]]), ['a', 'b', 'c']) == {'c': 0.75, 'a': 0.25}
