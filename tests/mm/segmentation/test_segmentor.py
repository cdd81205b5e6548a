"""`BEiTSegmentor` against mmsegmentation's `EncoderDecoder` with the same parts and weights."""

import copy
import importlib.util
from contextlib import nullcontext

import pytest
import torch
from helpers import images

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import segmentor_common  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from mmengine.structures import PixelData
from segmentor_common import (
    BINARY,
    CROP,
    PARTS,
    SIZES,
    SLIDE,
    WHOLE,
    assert_same,
    assert_same_results,
    at_threshold,
    batches,
    build,
    originals,
    pair,
    samples,
)

from beit_plugin.mm.segmentation import segmentor
from beit_plugin.mm.segmentation.segmentor import BEiTSegmentor, InferenceCfg

pytestmark = pytest.mark.usefixtures('mmseg_scope')


def test_registered_in_the_root():
    assert MODELS.get('BEiTSegmentor') is BEiTSegmentor


@pytest.mark.parametrize('parts', ['ours', 'stock', 'stock head with its own predict'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_slide(size, parts):
    stock, ours = pair(parts=parts)
    assert_same(stock, ours, images(*size), lambda: originals(size, (57, 70), (100, 90)))
    metas = [s.metainfo for s in originals(size, size, size)]
    with torch.no_grad():
        expected, got = (m.slide_inference(images(*size), metas) for m in (stock, ours))
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize('parts', ['ours', 'stock', 'stock head with its own predict'])
@pytest.mark.parametrize('size', SIZES[1:8:2], ids=str)
def test_whole(size, parts):
    assert_same(*pair(WHOLE, parts=parts), images(*size), lambda: originals(size, (57, 70), (100, 90)))


@pytest.mark.parametrize('seed', range(10))
def test_random_sizes(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width, *original = torch.randint(16, 150, (4,), generator=generator).tolist()
    for cfg in (SLIDE, WHOLE):
        size = (height, width)
        assert_same(*pair(cfg), images(*size, seed=seed), lambda size=size, o=original: originals(size, o, size))


@pytest.mark.parametrize('parts', PARTS)
def test_windows_run_in_batches(parts):
    stock, ours = pair(parts=parts, ours={'window_batch': 3})
    size = (80, 144)  # 2 x 3 windows an image
    stock_batches, our_batches = batches(stock), batches(ours)
    assert_same(stock, ours, images(*size), lambda: originals(size, size, size))
    assert stock_batches == [(2, 3, *CROP)] * 6
    assert our_batches == [(3, 3, *CROP)] * 4


@pytest.mark.parametrize('number, expected', [(1, [1] * 12), (5, [5, 5, 2]), (100, [12])])
def test_window_batch(number, expected):
    stock, ours = pair(ours={'window_batch': number, 'accumulate_on': 'host'})
    seen = batches(ours)
    assert_same(stock, ours, images(80, 144), lambda: originals((80, 144), (100, 130), (60, 70)))
    assert [shape[0] for shape in seen] == expected


def test_windows_have_the_pixels_of_eight_of_640(monkeypatch):
    assert segmentor.WINDOW_PIXELS == 8 * 640**2
    monkeypatch.setattr(segmentor, 'WINDOW_PIXELS', 5 * CROP[0] * CROP[1] + 7)
    ours = build('BEiTSegmentor', SLIDE)
    seen = batches(ours)
    ours.predict(images(80, 144), originals((80, 144), (100, 130), (60, 70)))
    assert [shape[0] for shape in seen] == [5, 5, 2]


FLIPS = [{}, {'flip': True, 'flip_direction': 'horizontal'}, {'flip': True, 'flip_direction': 'vertical'}]


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('keep_logits', [True, False])
@pytest.mark.parametrize('align_corners', [False, True])
def test_flip_padding_and_original_size(cfg, keep_logits, align_corners):
    stock, ours = pair(cfg, ours={'keep_logits': keep_logits}, align_corners=align_corners)
    metas = [{'ori_shape': (70, 123 - i), 'img_padding_size': (2 * i, 3, 1, i), **flip} for i, flip in enumerate(FLIPS)]
    got = assert_same(stock, ours, images(64, 90, batch=3), lambda: samples(*metas, size=(64, 90)))
    assert all(('seg_logits' in sample) == keep_logits for sample in got)


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('keep_logits', [True, False])
def test_one_channel(cfg, keep_logits):
    stock, ours = at_threshold(pair(cfg, ours={'keep_logits': keep_logits}, **BINARY), images(61, 90))
    got = assert_same(stock, ours, images(61, 90), lambda: originals((61, 90), (70, 50), (61, 90), **FLIPS[1]))
    assert 0.1 < got[0].pred_sem_seg.data.mean() < 0.9


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('options', [{}, BINARY], ids=['classes', 'one channel'])
def test_without_samples(cfg, options):
    stock, ours = pair(cfg, **options)
    assert_same(stock, ours, images(61, 90), lambda: None)


def test_stock_postprocessing_of_given_logits():
    stock, ours = pair()
    logits = images(40, 60, channels=11)
    metas = ({'ori_shape': (33, 44), **FLIPS[1]}, {'ori_shape': (80, 70), 'padding_size': [0, 8, 0, 4]})
    got, expected = (m.postprocess_result(logits, samples(*metas)) for m in (ours, stock))
    assert_same_results(got, expected)


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('preprocessor', [{'size': CROP, 'pad_val': 3}, {'size_divisor': 32}], ids=str)
def test_padding_by_the_preprocessor(cfg, preprocessor):
    stock, ours = pair(cfg, preprocessor={'test_cfg': preprocessor})
    for size in [(30, 70), (40, 50), (90, 130)]:
        data = {'inputs': [torch.randint(255, (3, *size))], 'data_samples': originals(size, (44, 71))}
        assert_same_results(ours.test_step(copy.deepcopy(data)), stock.test_step(data))


@pytest.mark.parametrize('parts', ['ours', 'mmsegmentation BEiT'])
@pytest.mark.parametrize('size', [(30, 20), (48, 30), (30, 100)], ids=str)
def test_pad_small_is_what_the_preprocessor_of_mmsegmentation_pads(size, parts):
    # mmsegmentation's BEiT takes images of one size only
    padded = {'size': CROP, 'pad_val': 3}
    stock = build('EncoderDecoder', SLIDE, parts, {'pad_val': 3, 'test_cfg': padded})
    ours = build('BEiTSegmentor', {**SLIDE, 'pad_small': True}, parts, {'pad_val': 3})
    data = {'inputs': [torch.randint(255, (3, *size))], 'data_samples': originals(size, (44, 71))}
    got, expected = ours.test_step(copy.deepcopy(data)), stock.test_step(data)
    for sample in (*got, *expected):
        sample.set_metainfo({'img_padding_size': None, 'pad_shape': None})  # theirs was padded before
    assert_same_results(got, expected)


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('mode', [torch.inference_mode, nullcontext], ids=['inference', 'gradients'])
def test_autocast(cfg, mode):
    stock, ours = pair(cfg, ours={'window_batch': 1})
    inputs = images(80, 144)
    with mode(), torch.autocast('cpu', torch.bfloat16):
        got, expected = (m.predict(inputs, originals((80, 144), (60, 70), (90, 99))) for m in (ours, stock))
        ours.test_cfg.keep_logits = False
        alone = ours.predict(inputs, originals((80, 144), (60, 70), (90, 99)))
    for g, e, a in zip(got, expected, alone, strict=True):
        assert g.seg_logits.data.dtype == e.seg_logits.data.dtype
        # bfloat16 has 8 bits, and batches are rounded in another way than images alone
        assert (g.seg_logits.data - e.seg_logits.data).abs().max() <= 0.02 * e.seg_logits.data.abs().max()
        assert torch.equal(a.pred_sem_seg.data, g.pred_sem_seg.data)


def test_loss_is_that_of_mmsegmentation():
    stock, ours = pair()
    labels = torch.randint(11, (2, 1, 48, 64))
    batch = originals((48, 64), (48, 64), (48, 64))
    for sample, label in zip(batch, labels, strict=True):
        sample.gt_sem_seg = PixelData(data=label)
    got, expected = (m.train().loss(images(48, 64), batch) for m in (ours, stock))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_takes_plain_dicts_and_changes_of_the_test_cfg():
    parts = {name: dict(part) for name, part in PARTS['ours'].items()}
    model = BEiTSegmentor(**parts, test_cfg=dict(SLIDE)).eval()
    seen = batches(model)
    with torch.no_grad():
        model.predict(images(48, 100))
        model.test_cfg.mode = 'whole'
        model.inference(images(48, 100), [{'ori_shape': (48, 100), 'img_shape': (48, 100)}] * 2)
    assert seen == [(4, 3, *CROP), (2, 3, 48, 100)]
    assert BEiTSegmentor(**{name: dict(part) for name, part in PARTS['ours'].items()}).test_cfg == {'mode': 'whole'}


@pytest.mark.parametrize(
    'test_cfg, sentence',
    [
        ({'mode': 'slides'}, "test_cfg has mode='slides', expected whole or slide"),
        ({'windows': 3}, "test_cfg has 'windows', expected mode, crop_size, .* only"),
        ({**SLIDE, 'stride': (32, 65)}, r'stride=\(32, 65\) and crop_size=\(48, 64\): .* so lower the stride'),
        ({'mode': 'slide', 'stride': 8}, r"has mode='slide' but no crop_size: give it as \(H, W\) in pixels"),
        ({'mode': 'slide', 'crop_size': 8}, 'but no stride'),
        ({**SLIDE, 'stride': (0, 8)}, r'test_cfg.stride must be one or two whole numbers \(H, W\)'),
        ({**SLIDE, 'window_batch': 0}, 'has window_batch=0, expected a whole number above 0'),
        ({**SLIDE, 'window_batch': True}, 'has window_batch=True, expected'),
        ({'accumulate_on': 'disk'}, "has accumulate_on='disk', expected device or host"),
        ({'keep_logits': 'no'}, "has keep_logits='no', expected True or False"),
    ],
)
def test_refuses(test_cfg, sentence):
    with pytest.raises(ValueError, match=sentence):
        InferenceCfg.read(test_cfg)
    with pytest.raises(ValueError, match=sentence):
        build('BEiTSegmentor', test_cfg)


def test_refuses_an_unknown_flip():
    model = build('BEiTSegmentor')
    with pytest.raises(ValueError, match="flipped in the direction 'diagonal', expected horizontal or vertical"):
        model.predict(images(48, 64), originals((48, 64), (9, 9), (9, 9), flip=True, flip_direction='diagonal'))
