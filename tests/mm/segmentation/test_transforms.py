"""Loading for training: files that cannot be used are named, and end the run or are left out; odd ones are read."""

import gc
import importlib.util
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tools_common import cut, image_folder, turn, write, write16

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

import mmcv
from mmengine.logging import MMLogger
from mmseg.datasets import BaseSegDataset
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from beit_plugin.mm.segmentation import transforms
from beit_plugin.mm.segmentation.transforms import BEiTLoadAnnotations, BEiTLoadImageFromFile, DataFileError

pytestmark = pytest.mark.usefixtures('mmseg_scope')

IMAGE, LABEL = 'images/0.jpg', 'masks/0.png'


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def save(path, array, form):
    Image.fromarray(array).save(path, form)


def label(value):
    return lambda root: write(root / LABEL, np.full((40, 48), value))


def sides(*size):
    def change(root):
        write(root / IMAGE, noise(*size, 3))
        write(root / LABEL, np.ones(size))

    return change


def both(root):
    """Image and label of another size than each other, and neither of the other turned."""
    write(root / LABEL, np.ones((20, 20)))


BAD = {  # what is done to the files, and what is said about it
    'cut JPEG': (lambda root: cut(root / IMAGE, 0.6), r'0\.jpg cannot be read as an image: image file is truncated'),
    'empty': (lambda root: cut(root / IMAGE, 0), r'0\.jpg cannot be read as an image: it is empty'),
    'no image': (lambda root: (root / IMAGE).write_text('x' * 99), r'0\.jpg cannot be read as an image: it is damaged'),
    'image missing': (lambda root: (root / IMAGE).unlink(), r'0\.jpg does not exist$'),
    '1 x 1': (sides(1, 1), r'0\.jpg is 1 x 1 pixels, expected at least 2 x 2: enlarge or remove it'),
    '1 x 5000': (sides(1, 5000), r'0\.jpg is 5000 x 1 pixels, expected at least 2 x 2'),
    '5000 x 2': (sides(5000, 2), r'0\.jpg is 2 x 5000 pixels, and one side is over 100 times the other: cut it up'),
    'turned': (lambda root: turn(root / IMAGE), r"0\.png is 48 x 40 .*0\.jpg is 40 x 48: .*'color_ignore_orientation'"),
    'other size': (both, r'0\.png is 20 x 20 pixels, but its image .*0\.jpg is 48 x 40: they must have one size$'),
    'cut label': (lambda root: cut(root / LABEL, 0.7), r'0\.png cannot be read as a label image: .*truncated'),
    'label missing': (lambda root: (root / LABEL).unlink(), r'0\.png does not exist$'),
    'no class': (label(9), r'0\.png has the labels 9, but there are only the 3 classes 0 to 2, and 255 is ignored'),
    '16 bit label': (
        lambda root: write16(root / LABEL, 257),
        r'0\.png has the label 257: labels are 0 to 254',
    ),
    'float label': (
        lambda root: save(root / LABEL, np.full((40, 48), 0.5, np.float32), 'TIFF'),
        r'0\.png holds float32 values: labels are integer class numbers',
    ),
    'colour label': (
        lambda root: write(root / LABEL, noise(40, 48, 3)),
        r'0\.png is in colour \(RGB\): labels have',
    ),
}


def pipeline(**options):
    return [BEiTLoadImageFromFile(**options), BEiTLoadAnnotations(num_classes=3, **options)]


def load(root, steps, reduce_zero_label=False):
    results = dict(
        img_path=str(root / IMAGE), seg_map_path=str(root / LABEL), reduce_zero_label=reduce_zero_label, seg_fields=[]
    )
    for step in steps:
        results = step(results)
        if results is None:
            return None
    return results


@pytest.fixture
def root(tmp_path):
    """Five images of 48 x 40 px with the labels 0 to 2."""
    image_folder(tmp_path, ('',), 'masks')
    return tmp_path


@pytest.fixture
def messages(caplog):
    """What mmengine's current logger says."""
    logger = MMLogger.get_instance('transforms')
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('case', BAD)
class TestBadFiles:
    def test_stop(self, root, case):
        change, sentence = BAD[case]
        change(root)
        with pytest.raises(DataFileError, match=sentence) as caught:
            load(root, pipeline())
        assert '\n' not in str(caught.value) and str(root) in str(caught.value)

    def test_go_on(self, root, case, messages):
        change, _ = BAD[case]
        change(root)
        steps = pipeline(on_error='skip')
        for _ in range(2):
            assert load(root, steps) is None
        assert len(messages()) == 1 and str(root) in messages()[0]
        files = {path for step in steps for path in step.left_out}
        assert len(files) == 1 and files <= {str(root / IMAGE), str(root / LABEL)}


class TestOddFiles:
    def test_nothing_wrong(self, root):
        stock = mmcv.imread(root / IMAGE)
        results = load(root, pipeline())
        assert np.array_equal(results['img'], stock) and results['img'].dtype == np.uint8
        assert results['img_shape'] == results['ori_shape'] == results['gt_seg_map'].shape == (40, 48)
        assert results['gt_seg_map'].dtype == np.uint8 and results['seg_fields'] == ['gt_seg_map']
        assert load(root, [BEiTLoadImageFromFile(to_float32=True)])['img'].dtype == np.float32

    def test_grey(self, root):
        grey = noise(40, 48)
        save(root / IMAGE, grey, 'PNG')
        assert np.array_equal(load(root, pipeline())['img'], np.dstack([grey] * 3))

    @pytest.mark.parametrize('backend', ['cv2', 'pillow'])
    def test_alpha_is_left_out(self, root, backend):
        rgba = noise(40, 48, 4)
        save(root / IMAGE, rgba, 'PNG')
        assert np.array_equal(load(root, pipeline()[:1])['img'], rgba[..., 2::-1])

    def test_16_bit(self, root):
        deep = noise(40, 48, dtype=np.uint16)
        save(root / IMAGE, deep, 'PNG')
        got = load(root, pipeline())['img']
        assert got.dtype == np.uint8 and np.abs(got[..., 0].astype(int) - deep / 257).max() <= 1

    def test_turned_with_its_label(self, root):
        upright = np.zeros((48, 40))
        write(root / LABEL, upright)
        turn(root / IMAGE)
        assert load(root, pipeline())['img'].shape == (48, 40, 3)

    def test_turned_but_labelled_as_stored(self, root):
        turn(root / IMAGE)
        steps = [BEiTLoadImageFromFile(color_type='color_ignore_orientation'), BEiTLoadAnnotations()]
        assert load(root, steps)['img'].shape == (40, 48, 3)

    def test_labels_of_other_kinds(self, root):
        expected = load(root, pipeline())['gt_seg_map']
        classes = Image.fromarray(expected)
        for kind in (classes.convert('P'), Image.fromarray(expected.astype(np.uint16))):
            kind.save(root / LABEL)
            assert np.array_equal(load(root, pipeline())['gt_seg_map'], expected), kind.mode

    def test_zero_and_255_are_no_class(self, root):
        label(255)(root)
        assert (load(root, pipeline())['gt_seg_map'] == 255).all()
        label(0)(root)
        assert (load(root, pipeline(), reduce_zero_label=True)['gt_seg_map'] == 255).all()
        label(4)(root)
        with pytest.raises(DataFileError, match=r'has the labels 3, one below those in the file \(reduce_zero_label\)'):
            load(root, pipeline(), reduce_zero_label=True)

    def test_many_wrong_labels(self, root):
        write(root / LABEL, np.arange(40 * 48).reshape(40, 48) % 100)
        with pytest.raises(DataFileError, match='the labels 3, 4, 5, 6, 7, 8, 9, 10, …, but'):
            load(root, pipeline())

    def test_a_decoder_that_completes_what_is_cut(self, root, monkeypatch):
        """OpenCV 4.10 makes up the rest of a JPEG, without a word."""
        cut(root / IMAGE, 0.6)
        monkeypatch.setattr(mmcv, 'imfrombytes', lambda *_, **__: np.zeros((40, 48, 3), np.uint8))
        with pytest.raises(DataFileError, match='truncated'):
            load(root, pipeline())

    def test_all_are_gone(self, root, monkeypatch):
        """The training ends with a sentence of its own, not with mmengine's after as many tries."""
        monkeypatch.setattr(transforms, 'TRIES', 3)
        load = BEiTLoadImageFromFile(on_error='skip')
        there = dict(img_path=str(next((root / 'images').rglob('*.jpg'))))
        for _ in range(2):  # an image that can be used begins the count anew
            assert load(dict(img_path='gone.jpg')) is None and load(dict(img_path='gone.jpg')) is None
            assert load(there) is not None
        shutil.rmtree(load._left_out._folder)  # by a system that tidies up
        assert load.left_out == {}
        assert load(dict(img_path='gone.jpg')) is None and load(dict(img_path='gone.jpg')) is None
        with pytest.raises(DataFileError, match='none of 3 images in a row can be used; of the last one, gone'):
            load(dict(img_path='gone.jpg'))
        assert list(load.left_out) == ['gone.jpg']

    def test_unknown_action(self):
        for kind in (BEiTLoadImageFromFile, BEiTLoadAnnotations):
            with pytest.raises(ValueError, match=r"got on_error='ignore', expected 'raise' or 'skip'"):
                kind(on_error='ignore')


def dataset(root, on_error, **options):
    steps = [dict(type=f'BEiT{kind}', on_error=on_error) for kind in ('LoadImageFromFile', 'LoadAnnotations')]
    return BaseSegDataset(
        data_root=str(root), data_prefix=dict(img_path='images', seg_map_path='masks'), pipeline=steps, **options
    )


def loader(data):
    """Every image three times, by two workers."""
    return DataLoader(data, 1, sampler=[*range(5)] * 3, num_workers=2, multiprocessing_context='fork', collate_fn=list)


class TestWorkers:
    def test_each_file_is_named_once(self, root, capfd):
        cut(root / 'images/1.jpg', 0.5)
        (root / 'masks/3.png').unlink()
        MMLogger.get_instance('workers')
        data = dataset(root, 'skip')
        seen = [sample['img_path'] for batch in loader(data) for sample in batch]
        assert len(seen) == 15 and {Path(path).stem for path in seen} == {'0', '2', '4'}
        printed = capfd.readouterr().out
        assert printed.count('left out of training') == 2
        assert printed.count('1.jpg cannot be read') == printed.count('3.png does not exist') == 1
        image, annotation = data.pipeline.transforms
        assert list(image.left_out) == [str(root / 'images/1.jpg')] and 'truncated' in image.left_out.popitem()[1]
        assert list(annotation.left_out) == [str(root / 'masks/3.png')]

    def test_stop(self, root):
        cut(root / 'images/1.jpg', 0.5)
        with pytest.raises(DataFileError, match=r'1\.jpg cannot be read') as caught:
            dataset(root, 'raise')[1]
        worker = ExceptionWrapper((caught.type, caught.value, caught.tb), 'in a worker')  # as DataLoader hands it over
        with pytest.raises(DataFileError, match=r'(?s)in a worker.*1\.jpg cannot be read'):
            worker.reraise()

    def test_nothing_left(self, root):
        for i in range(5):
            cut(root / f'images/{i}.jpg', 0.5)
        with pytest.raises(Exception, match='Cannot find valid image after 3'):
            dataset(root, 'skip', max_refetch=3)[0]

    def test_copies_share_the_list_that_ends_with_the_original(self, root):
        cut(root / IMAGE, 0.5)
        step = BEiTLoadImageFromFile(on_error='skip')
        copy = pickle.loads(pickle.dumps(step))  # as a worker that is spawned gets it
        assert load(root, [copy]) is None and list(step.left_out) == list(copy.left_out) == [str(root / IMAGE)]
        folder = step._left_out._folder
        del copy
        gc.collect()
        assert folder.is_dir()
        del step
        gc.collect()
        assert not folder.exists()


def test_the_log_says_warning_in_the_first_process(root, caplog):
    logger = MMLogger.get_instance('levels')
    logger.addHandler(caplog.handler)
    cut(root / IMAGE, 0.5)
    load(root, pipeline(on_error='skip'))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    logger.removeHandler(caplog.handler)
