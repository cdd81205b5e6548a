"""The drawn data set, the folders of users, the pictures and the configurations."""

import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tools_common import ROOT, SHAPES_CONFIG, cut, image_folder, turn, width, write, write16

from data_folders import DataError, check_values, colours, detect, read_label  # isort: skip
from make_shapes import CLASSES, make_shapes  # isort: skip
from plot_run import minutes, plot_comparison, plot_curve, read_scalars  # isort: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('script', ['test.sh', 'quickstart.sh'])
def test_no_python_that_works(script, tmp_path):
    for name in ('bash', 'dirname'):
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / 'python3').write_text('#!/bin/sh\nexit 1\n')  # the answer of every other version
    (tmp_path / 'python3').chmod(0o755)
    command = ['bash', ROOT / 'tools' / script]
    done = subprocess.run(command, env={'PATH': str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('error: no Python 3.10, 3.11, 3.12 or 3.13 found')


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
        with pytest.raises(SystemExit, match='shapes cannot be written'):
            make_shapes(tmp_path / 'mine/photo.png/shapes', train=2, val=1)


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

    @pytest.mark.parametrize(
        ('change', 'sentence'),
        [
            (lambda root: root.rename(root.with_name('moved')), 'does not exist'),
            (lambda root: (root / 'images').rename(root / 'pictures'), 'has no folder images/'),
            (
                lambda root: (root / 'annotations').rename(root / 'other'),
                'has no labels: expected a folder annotations/',
            ),
            (lambda root: (root / 'annotations/val').rename(root / 'val'), 'annotations/val does not exist'),
            (lambda root: [p.unlink() for p in (root / 'images/train').iterdir()], 'holds no images'),
            (lambda root: (root / 'annotations/train/3.png').unlink(), '1 of 5 images have no label.*3.png is missing'),
            (lambda root: (root / 'annotations/val/4.png').unlink(), '1 of 5 images have no label.*4.png is missing'),
            (lambda root: (root / 'images/val/4.jpg').rename(root / 'images/val/4.png'), 'mixes .jpg and .png'),
            (lambda root: [p.rename(p.with_suffix('.png')) for p in (root / 'images/val').iterdir()], 'mixes'),
            (lambda root: write(root / 'annotations/val/2.png', np.zeros((4, 4, 3))), '2.png is a colour image'),
            (lambda root: (root / 'annotations/val/2.png').write_bytes(b'no image'), '2.png cannot be read'),
            (lambda root: cut(root / 'images/val/2.jpg', 0.7), '2.jpg cannot be read as an image: .*truncated'),
            (
                lambda root: write(root / 'annotations/val/2.png', np.zeros((40, 44))),
                '2.png is 44 x 40 pixels, but its image .*val/2.jpg is 48 x 40',
            ),
            (
                lambda root: [write(p, np.zeros((1, 48))) for p in root.glob('*/val/2.*')],
                'val/2.jpg is 48 x 1 pixels, expected at least 2 x 2: enlarge or remove it',
            ),
            (lambda root: turn(root / 'images/val/2.jpg'), '2.png is 48 x 40 pixels, but its image .*2.jpg is 40 x 48'),
            (lambda root: write16(root / 'annotations/val/2.png', 256), '2.png has label 256: labels are 0 to 254'),
            (
                lambda root: [write(p, np.tile((0, 255), (40, 24))) for p in root.glob('annotations/*/*.png')],
                'hold 0 and 255 alone, and 255 is ignored: write 1 for the object',
            ),
        ],
    )
    def test_one_sentence(self, tmp_path, change, sentence):
        root = tmp_path / 'data'
        image_folder(root, ('train', 'val'))
        change(root)
        with pytest.raises(DataError, match=sentence) as caught:
            detect(root)
        assert '\n' not in str(caught.value)

    @pytest.mark.parametrize(
        ('content', 'sentence'),
        [
            ('{"classes": ["a", "b"], "reduce_zero_label": false}', '0.png has label 2, .*: expected 0 to 1'),
            ('{"classes": ["a",', 'classes.json is not valid JSON'),
            ('{"names": ["a"]}', 'no list of names'),
            ('{"classes": "ab"}', 'no list of names'),
            ('{"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}', '3 classes but 1 colours'),
            ('{"classes": ["a"], "palette": [[0, 0, 256]]}', r'has \[0, 0, 256\] under "palette": a colour is a list'),
            ('{"classes": ["a"], "palette": "red"}', "has 'red' under .palette."),
            ('{"classes": ["a"], "reduce_zero_label": "no"}', "has 'no' under .reduce_zero_label."),
        ],
    )
    def test_classes_file(self, tmp_path, content, sentence):
        image_folder(tmp_path, ('train', 'val'))
        (tmp_path / 'classes.json').write_text(content)
        with pytest.raises(DataError, match=sentence) as caught:
            detect(tmp_path)
        assert '\n' not in str(caught.value)

    def test_hidden_files_are_no_images(self, tmp_path):
        image_folder(tmp_path, ('train', 'val'))
        (tmp_path / 'images/train/._0.jpg').write_bytes(b'of macOS')
        assert len(detect(tmp_path).names['train']) == 5

    @pytest.mark.parametrize('name', [' 0', '0 ', '0\n1'])
    def test_names_that_no_list_can_hold(self, tmp_path, name):
        image_folder(tmp_path, ('',))
        for folder, suffix in (('images', '.jpg'), ('annotations', '.png')):
            (tmp_path / folder / f'0{suffix}').rename(tmp_path / folder / f'{name}{suffix}')
        with pytest.raises(DataError, match='rename it'):
            detect(tmp_path)

    def test_values_of_16_bit_files(self, tmp_path):
        write16(tmp_path / 'a.png', 255)
        assert np.unique(read_label(tmp_path / 'a.png')).tolist() == [255]
        Image.new('F', (48, 40)).save(tmp_path / 'a.tif')
        with pytest.raises(DataError, match='holds float32 values'):
            read_label(tmp_path / 'a.tif')

    def test_one_class_is_not_enough(self, tmp_path):
        image_folder(tmp_path, ('training', 'validation'), values=(0, 1))
        with pytest.raises(DataError, match='label 0 counts as "other" here'):
            detect(tmp_path)

    def test_one_image_is_not_enough(self, tmp_path):
        image_folder(tmp_path, ('',), count=1)
        with pytest.raises(DataError, match='one image'):
            detect(tmp_path)

    def test_all_wrong_values_are_named(self):
        with pytest.raises(DataError, match=r'a.png has label 3.*expected 1 to 2 and 0 \(ignored\).*also hold \[9\]'):
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

    def test_killed_while_it_wrote(self, tmp_path):
        self.log(tmp_path, '1', [{'loss': 9.0, 'step': 10}])
        with open(tmp_path / '1/vis_data/scalars.json', 'a') as file:
            file.write('\n{"loss": 8.0, "st')
        assert read_scalars(tmp_path) == [{'loss': 9.0, 'step': 10}]

    def test_compared_runs(self, tmp_path):
        for name, seconds in (('a', 3.0), ('b', 6.0)):
            rows = [{'loss': 5.0 / step, 'step': step, 'time': seconds} for step in (10, 20)]
            self.log(tmp_path / name, '1', [*rows, {'mIoU': 50.0, 'step': 20}])
        assert minutes(read_scalars(tmp_path / 'b')) == {0: 0.0, 10: 1.0, 20: 2.0}
        picture = plot_comparison([tmp_path / 'a', tmp_path / 'b'], 0)
        assert picture == tmp_path / 'a/comparison.png' and width(picture) > 800

    def test_without_a_log(self, tmp_path):
        with pytest.raises(DataError, match='no training log'):
            read_scalars(tmp_path)


class TestConfigs:
    @pytest.mark.parametrize(
        ('change', 'sentence'),
        [
            (lambda root: root.rename(root.with_name('moved')), 'data root .* does not exist: give it by --data-root'),
            (
                lambda root: (root / 'images').rename(root / 'pictures'),
                'has no images: .*images/training does not exist',
            ),
            (
                lambda root: (root / 'annotations').rename(root / 'masks'),
                'has no labels: .*annotations/training does not',
            ),
            (lambda root: [p.unlink() for p in (root / 'images/training').iterdir()], 'holds no [*].jpg images'),
            (lambda root: (root / 'annotations/training/3.png').unlink(), '1 of 5 images have no label: .*3.png'),
            (
                lambda root: write(root / 'annotations/training/3.png', np.full((40, 48), 9)),
                '3.png has label 9.*1 to 7 and 0',
            ),
        ],
    )
    def test_data_of_a_config(self, tmp_path, change, sentence):
        from mmengine.config import Config
        from run_data import check_data

        root = tmp_path / 'data'
        image_folder(root, ('training', 'validation'), values=(0, 1, 7))
        dataset = Config.fromfile(SHAPES_CONFIG).train_dataloader.dataset
        dataset.data_root = str(root)
        assert check_data(dataset) == 5
        change(root)
        with pytest.raises(DataError, match=sentence):
            check_data(dataset)

    def test_missing_weights(self):
        from mmengine.config import Config
        from run_options import check_pretrained

        for name, variable in (
            ('beit-large_upernet_ade20k-640', 'BEIT_LARGE_WEIGHTS'),
            ('beit-base_upernet_ade20k-640_pt22k_1gpu', 'BEIT_BASE_PT22K_WEIGHTS'),  # named in a file below
        ):
            with pytest.raises(DataError, match=f'name it by the environment variable {variable} or'):
                check_pretrained(Config.fromfile(ROOT / f'configs/seg/{name}.py'))
        cfg = Config.fromfile(ROOT / 'configs/seg/beit-base_upernet_ade20k-640.py')
        for file, sentence in (
            ('no.pth', 'no.pth do not exist: name it by the environment variable BEIT_BASE_WEIGHTS or by --cfg-opt'),
            (None, None),
            ('https://host/weights.pth', None),
        ):
            cfg.model.backbone.pretrained = file
            with pytest.raises(DataError, match=sentence) if sentence else nullcontext():
                check_pretrained(cfg)

    @pytest.mark.skipif('CAMVID_ROOT' not in os.environ, reason='CAMVID_ROOT does not name a CamVid folder')
    def test_camvid_is_complete(self):
        from mmengine.config import Config
        from run_data import check_data

        cfg = Config.fromfile(ROOT / 'configs/seg/beit-base_upernet_camvid.py')
        loaders = (cfg.train_dataloader, cfg.val_dataloader)
        assert [check_data(loader.dataset) for loader in loaders] == [367, 101]
