"""The tools and configurations: the drawn data set, folders of users, and real runs through mmsegmentation's tools."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

from data_folders import DataError, check_values, colours, detect, read_label  # noqa: E402
from make_shapes import CLASSES, make_shapes  # noqa: E402
from plot_run import plot_curve, read_scalars  # noqa: E402

CONFIGS = sorted((ROOT / 'configs').glob('seg/*.py'))
SHAPES_CONFIG = ROOT / 'configs/seg/beit-tiny_upernet_shapes.py'


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def image_folder(root: Path, parts: tuple[str, ...], labels: str = 'annotations', values: tuple[int, ...] = (0, 1, 2),
                 label_suffix: str = '.png', count: int = 5) -> None:
    """Images of noise whose labels are vertical stripes of `values`."""
    rng = np.random.default_rng(0)
    for part in parts:
        for i in range(count):
            write(root / 'images' / part / f'{i}.jpg', rng.integers(0, 255, (40, 48, 3)))
            stripes = np.repeat(np.array(values), -(-48 // len(values)))[:48]
            write(root / labels / part / f'{i}{label_suffix}', np.tile(stripes, (40, 1)))


class TestMakeShapes:
    def test_same_seed_same_bytes(self, tmp_path):
        for name, seed in (('a', 3), ('b', 3), ('c', 4)):
            assert make_shapes(tmp_path / name, seed=seed, train=4, val=2)
        assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
        a, c = contents(tmp_path / 'a'), contents(tmp_path / 'c')
        assert all(a[name] != c[name] for name in a)

    def test_layout_and_labels(self, tmp_path):
        make_shapes(tmp_path, train=30, val=3)
        seen, sizes = set(), set()
        for path in sorted(tmp_path.glob('annotations/training/*.png')):
            label = read_label(path)
            with Image.open(tmp_path / 'images/training' / f'{path.stem}.jpg') as image:
                assert label.dtype == np.uint8 and label.shape == image.size[::-1] and image.mode == 'RGB'
                sizes.add(image.size)
            seen |= set(np.unique(label).tolist())
        assert seen == set(range(len(CLASSES) + 1))  # 0 is other
        assert any(w != h for w, h in sizes) and all(96 <= side <= 160 for size in sizes for side in size)
        folders = detect(tmp_path)
        assert folders.classes == list(CLASSES) and folders.reduce_zero_label
        assert [len(folders.names[key]) for key in ('train', 'val')] == [30, 3]

    def test_complete_set_is_left_alone(self, tmp_path):
        make_shapes(tmp_path, train=3, val=1)
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
        assert not make_shapes(tmp_path, train=3, val=1)
        assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}

    @pytest.mark.parametrize('damage', ['cut', 'removed', 'interrupted'])
    def test_damage_is_repaired(self, tmp_path, damage):
        make_shapes(tmp_path, train=3, val=1)
        whole = contents(tmp_path)
        victim = tmp_path / 'annotations/training/00001.png'
        if damage == 'cut':
            victim.write_bytes(victim.read_bytes()[:50])
        else:
            victim.unlink()
        if damage == 'interrupted':
            (tmp_path / 'classes.json').rename(tmp_path / 'unfinished.json')
        assert make_shapes(tmp_path, train=3, val=1)
        assert contents(tmp_path) == whole

    def test_other_data_is_not_overwritten(self, tmp_path):
        make_shapes(tmp_path / 'shapes', train=2, val=1)
        with pytest.raises(SystemExit, match='holds another data set'):
            make_shapes(tmp_path / 'shapes', seed=1, train=2, val=1)
        write(tmp_path / 'mine/photo.png', np.zeros((4, 4)))
        with pytest.raises(SystemExit, match='not made by this tool'):
            make_shapes(tmp_path / 'mine', train=2, val=1)


class TestFolders:
    @pytest.mark.parametrize('labels', ['annotations', 'labels', 'masks'])
    @pytest.mark.parametrize('parts', [('training', 'validation'), ('train', 'val'), ('',)])
    def test_layouts(self, tmp_path, parts, labels):
        image_folder(tmp_path, parts, labels)
        folders = detect(tmp_path)
        ade = parts[0] == 'training'
        assert folders.reduce_zero_label is ade
        assert folders.classes == (['class 1', 'class 2'] if ade else ['class 0', 'class 1', 'class 2'])
        assert (folders.image_suffix, folders.label_suffix) == ('.jpg', '.png')
        assert [len(folders.names[key]) for key in ('train', 'val')] == ([4, 1] if parts == ('',) else [5, 5])

    def test_split_is_seeded_and_has_no_overlap(self, tmp_path):
        image_folder(tmp_path, ('',), 'masks', count=20)
        first, again, other = detect(tmp_path), detect(tmp_path), detect(tmp_path, seed=1)
        assert first.names == again.names != other.names
        assert sorted(first.names['train'] + first.names['val']) == sorted(str(i) for i in range(20))
        assert len(first.names['val']) == 4

    def test_label_names_with_an_ending(self, tmp_path):
        image_folder(tmp_path, ('train', 'val'), label_suffix='_mask.png', count=11)  # 1.jpg is also a prefix of 10.jpg
        assert detect(tmp_path).label_suffix == '_mask.png'

    @pytest.mark.parametrize(('values', 'reduce_zero'), [((0, 1), False), ((0, 1, 2), True), ((1, 2, 255), True)])
    def test_zero_label_follows_from_the_names(self, tmp_path, values, reduce_zero):
        image_folder(tmp_path, ('train', 'val'), values=values)
        (tmp_path / 'classes.json').write_text(json.dumps({'classes': ['cat', 'dog']}))
        folders = detect(tmp_path)
        assert (folders.classes, folders.reduce_zero_label) == (['cat', 'dog'], reduce_zero)
        assert len(folders.palette) == 2

    @pytest.mark.parametrize(('change', 'sentence'), [
        (lambda root: root.rename(root.with_name('moved')), 'does not exist'),
        (lambda root: (root / 'images').rename(root / 'pictures'), 'has no folder images/'),
        (lambda root: (root / 'annotations').rename(root / 'other'), 'has no labels: expected a folder annotations/'),
        (lambda root: (root / 'annotations/val').rename(root / 'val'), 'annotations/val does not exist'),
        (lambda root: [p.unlink() for p in (root / 'images/train').iterdir()], 'holds no images'),
        (lambda root: (root / 'annotations/train/3.png').unlink(), '1 of 5 images have no label.*3.png is missing'),
        (lambda root: (root / 'annotations/val/4.png').unlink(), '1 of 5 images have no label.*4.png is missing'),
        (lambda root: (root / 'images/val/4.jpg').rename(root / 'images/val/4.png'), 'mixes .jpg and .png'),
        (lambda root: write(root / 'annotations/val/2.png', np.zeros((4, 4, 3))), '2.png is a colour image'),
        (lambda root: (root / 'annotations/val/2.png').write_bytes(b'no image'), '2.png cannot be read'),
        (lambda root: (root / 'classes.json').write_text('{"classes": ["a", "b"], "reduce_zero_label": false}'),
         '0.png has label 2, which is no class: expected 0 to 1'),
        (lambda root: (root / 'classes.json').write_text('{"names": ["a"]}'), 'no list of names'),
        (lambda root: (root / 'classes.json').write_text('{"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}'),
         '3 classes but 1 colours'),
    ])
    def test_one_sentence(self, tmp_path, change, sentence):
        root = tmp_path / 'data'
        image_folder(root, ('train', 'val'))
        change(root)
        with pytest.raises(DataError, match=sentence) as caught:
            detect(root)
        assert '\n' not in str(caught.value)

    def test_one_class_is_not_enough(self, tmp_path):
        image_folder(tmp_path, ('training', 'validation'), values=(0, 1))
        with pytest.raises(DataError, match='label 0 counts as "other" in this layout'):
            detect(tmp_path)

    def test_one_image_is_not_enough(self, tmp_path):
        image_folder(tmp_path, ('',), count=1)
        with pytest.raises(DataError, match='one image'):
            detect(tmp_path)

    def test_all_wrong_values_are_named(self):
        with pytest.raises(DataError, match=r'a.png has label 3.*expected 1 to 2 and 0 \(ignored\).*\[3, 9\]'):
            check_values({0: Path('b.png'), 9: Path('c.png'), 3: Path('a.png'), 255: Path('a.png')}, 2, True)

    def test_colours_differ(self):
        assert len({tuple(colour) for colour in colours(150)}) == 150


class TestPlots:
    @staticmethod
    def log(work_dir: Path, start: str, rows: list[dict]) -> None:
        file = work_dir / start / 'vis_data/scalars.json'
        file.parent.mkdir(parents=True)
        file.write_text('\n'.join(map(json.dumps, rows)))

    def test_resumed_and_restarted_runs(self, tmp_path):
        self.log(tmp_path, '1', [{'loss': 9.0, 'step': s} for s in (10, 20, 30)])
        self.log(tmp_path, '2', [{'loss': 3.0, 'step': 10}, {'loss': 2.0, 'step': 20}])  # started anew
        self.log(tmp_path, '3', [{'loss': 1.0, 'step': 20}, {'mIoU': 50.0, 'step': 20}])  # resumed from 10
        assert [(row['step'], row.get('loss')) for row in read_scalars(tmp_path)] == [(10, 3.0), (20, 1.0), (20, None)]
        assert width(plot_curve(tmp_path)) > 500

    def test_without_a_log(self, tmp_path):
        with pytest.raises(DataError, match='no training log'):
            read_scalars(tmp_path)


def tiny(cfg) -> None:
    """Shrinks the model of a configuration, so that building it takes no time."""
    cfg.model.backbone.update(embed_dims=24, num_heads=2, num_layers=4, out_indices=(0, 1, 2, 3), pretrained=None)
    cfg.model.neck.embed_dim = 24
    cfg.model.decode_head.update(in_channels=[24] * 4, channels=8)
    cfg.model.auxiliary_head.update(in_channels=24, channels=8)


class TestConfigs:
    @pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
    def test_builds(self, path):
        from mmengine.config import Config
        from mmengine.registry import init_default_scope

        cfg = Config.fromfile(path)
        init_default_scope(cfg.default_scope)
        from mmseg.registry import MODELS

        assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes
        assert len(cfg.tta_pipeline[1].transforms[0]) == 6 and len(cfg.tta_pipeline[1].transforms[1]) == 2
        assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
        if cfg.optim_wrapper.get('constructor') == 'BEiTLayerDecayConstructor':
            assert cfg.optim_wrapper.paramwise_cfg.num_layers == cfg.model.backbone.num_layers
        for word in ('Paper', 'python tools/test.py', 'Hardware'):
            assert word in path.read_text()
        tiny(cfg)
        for head in ('decode_head', 'auxiliary_head'):  # mmseg warns about its own default
            cfg.model[head].loss_decode.avg_non_ignore = False
        with pytest.warns(UserWarning, match='build_loss|avg_non_ignore'):
            model = MODELS.build(cfg.model)
        assert [type(part).__name__ for part in (model.backbone, model.neck, model.decode_head)] == [
            'BEiTBackbone', 'BEiTPyramid', 'BEiTUPerHead']

    def test_published_sizes(self):
        from mmengine.config import Config

        large = Config.fromfile(ROOT / 'configs/seg/beit-large_upernet_ade20k-640.py')
        assert large.model.backbone.out_indices == (7, 11, 15, 23) and large.model.decode_head.channels == 1024
        assert large.optim_wrapper.optimizer.lr == 2e-5 and large.optim_wrapper.optimizer.weight_decay == 0.05
        assert large.optim_wrapper.accumulative_counts * large.train_dataloader.batch_size == 2
        assert large.param_scheduler[0].end == 3000 and large.train_cfg.val_interval == 16000

    @pytest.mark.parametrize(('change', 'sentence'), [
        (lambda root: root.rename(root.with_name('moved')), 'data root .* does not exist: give it by --data-root'),
        (lambda root: (root / 'images').rename(root / 'pictures'), 'has no images: .*images/training does not exist'),
        (lambda root: (root / 'annotations').rename(root / 'masks'), 'has no labels: .*annotations/training does not'),
        (lambda root: [p.unlink() for p in (root / 'images/training').iterdir()], 'holds no [*].jpg images'),
        (lambda root: (root / 'annotations/training/3.png').unlink(), '1 of 5 images have no label: .*3.png'),
        (lambda root: write(root / 'annotations/training/3.png', np.full((4, 4), 9)), '3.png has label 9.* 1 to 7 and 0'),
    ])
    def test_data_of_a_config(self, tmp_path, change, sentence):
        from mmengine.config import Config
        from run_common import check_data

        root = tmp_path / 'data'
        image_folder(root, ('training', 'validation'), values=(0, 1, 7))
        dataset = Config.fromfile(SHAPES_CONFIG).train_dataloader.dataset
        dataset.data_root = str(root)
        assert check_data(dataset) == 5
        change(root)
        with pytest.raises(DataError, match=sentence):
            check_data(dataset)

    @pytest.mark.skipif('CAMVID_ROOT' not in os.environ, reason='CAMVID_ROOT does not name a CamVid folder')
    def test_camvid_is_complete(self):
        from mmengine.config import Config
        from run_common import check_data

        cfg = Config.fromfile(ROOT / 'configs/seg/beit-base_upernet_camvid.py')
        loaders = (cfg.train_dataloader, cfg.val_dataloader)
        assert [check_data(loader.dataset) for loader in loaders] == [367, 101]


ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def run(script: Path | str, *args: object, cwd: Path, **env: str) -> str:
    """Output of a script run by this interpreter; fails with it when the script does."""
    done = subprocess.run([sys.executable, str(script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**ENVIRONMENT, **env})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


SHORT = (
    'train_cfg.max_iters=4',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
    'train_dataloader.batch_size=2',
    'param_scheduler.0.end=1',
    'param_scheduler.1.begin=1',
    'param_scheduler.1.end=4',
)


class TestRuns:
    def test_mmsegmentations_own_tools(self, tmp_path):
        import mmseg

        tools = Path(mmseg.__file__).parent / '.mim/tools'
        data, work = tmp_path / 'shapes', tmp_path / 'work'
        make_shapes(data, train=8, val=4)
        env = {'SHAPES_ROOT': str(data)}
        common = ('--work-dir', work, '--cfg-options', *SHORT)
        run(tools / 'train.py', SHAPES_CONFIG, *common, cwd=tmp_path, **env)
        resumed = run(tools / 'train.py', SHAPES_CONFIG, '--resume', *common, 'train_cfg.max_iters=6', cwd=tmp_path,
                      **env)
        assert 'resumed epoch: 0, iter: 4' in resumed
        scores = []
        for tta in ([], ['--tta']):
            output = run(tools / 'test.py', SHAPES_CONFIG, work / 'iter_6.pth', '--work-dir', tmp_path / 'tested', *tta,
                         cwd=tmp_path, **env)
            scores.append(float(re.findall(r'mIoU: ([\d.]+)', output)[-1]))
        assert all(0 < score < 100 for score in scores) and scores[0] != scores[1]

    def test_our_tools(self, tmp_path):
        image_folder(tmp_path / 'mine', ('',), 'masks')
        work = tmp_path / 'work'
        output = run(ROOT / 'tools/quickstart.py', '--data-root', 'mine', '--work-dir', work, '--cfg-options', *SHORT,
                     cwd=tmp_path)
        single, multi = re.fullmatch(r'mIoU single-scale ([\d.]+) multi-scale ([\d.]+)',
                                     output.splitlines()[-1]).groups()
        assert '4 training images, 1 validation images' in output and 'effective batch 2' in output
        assert 'System environment' not in output and 'System environment' in next(work.glob('*/*.log')).read_text()
        for name in ('curve.png', 'overlay.png'):
            assert width(work / name) > 500

        config = work / SHAPES_CONFIG.name  # the copy knows data, classes and options
        tested = run(ROOT / 'tools/test.py', config, work / 'iter_4.pth', '--out', tmp_path / 'maps', cwd=tmp_path)
        assert tested.splitlines()[-1].startswith(f'mIoU {float(single):.2f} (single-scale)')
        assert len(list((tmp_path / 'maps').glob('*.png'))) == 1
        trained = run(ROOT / 'tools/train.py', config, '--work-dir', work, '--resume', '--cfg-options',
                      'train_cfg.max_iters=5', 'train_cfg.val_interval=1', cwd=tmp_path)
        assert re.match(r'mIoU [\d.]+ after 5 iterations, checkpoint .*iter_5.pth', trained.splitlines()[-1])
        assert float(multi) > 0

    @pytest.mark.parametrize(('script', 'args', 'sentence'), [
        ('train.py', ['no_such.py'], 'no_such.py does not exist'),
        ('test.py', [SHAPES_CONFIG, 'no.pth'], 'the checkpoint no.pth does not exist'),
        ('quickstart.py', ['--data-root', 'nowhere'], 'nowhere does not exist'),
        ('plot_run.py', ['.'], 'no training log'),
    ])
    def test_one_sentence(self, tmp_path, script, args, sentence):
        done = subprocess.run([sys.executable, ROOT / 'tools' / script, *args], cwd=tmp_path, capture_output=True,
                              text=True, timeout=120, env=ENVIRONMENT)
        assert done.returncode == 1
        assert done.stderr.strip().startswith('error: ') and len(done.stderr.strip().splitlines()) == 1
        assert sentence in done.stderr

    @pytest.mark.parametrize('script', ['train.py', 'test.py', 'quickstart.py', 'plot_run.py', 'make_shapes.py'])
    def test_help_has_an_example(self, script, tmp_path):
        assert re.search('[Ee]xample', run(ROOT / 'tools' / script, '--help', cwd=tmp_path))
