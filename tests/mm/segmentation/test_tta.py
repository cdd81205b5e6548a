"""`BEiTSegTTAModel` against mmsegmentation's `SegTTAModel`."""

import copy
import importlib.util
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import images

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import segmentor_common  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors import SegTTAModel
from segmentor_common import BINARY, SLIDE, WHOLE, assert_same_results, at_threshold, batches, build, pair, samples

from beit_plugin.mm.segmentation import tta
from beit_plugin.mm.segmentation.tta import BEiTSegTTAModel

pytestmark = pytest.mark.usefixtures('mmseg_scope')

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # unilm's and mmsegmentation's, each with its mirror image
FLIPS = ({'flip': False, 'flip_direction': None}, {'flip': True, 'flip_direction': 'horizontal'})


def views(size=(60, 82), original=(57, 101), batch=1, ratios=RATIOS, flips=FLIPS):
    """What mmcv's TestTimeAug and the collating make of images: lists of views of lists of images."""
    pictures = (images(*size, batch=batch) * 60 + 120).clamp(0, 255)
    data = {'inputs': [], 'data_samples': []}
    for ratio in ratios:
        new = [int(side * ratio) for side in size]
        scaled = F.interpolate(pictures, new, mode='bilinear', align_corners=False).byte()
        for flip in flips:
            mirrored = scaled.flip(3 if flip['flip_direction'] == 'horizontal' else 2) if flip['flip'] else scaled
            view = samples(*[{'ori_shape': original, **flip}] * batch, size=tuple(new))
            for sample in view:
                sample.gt_sem_seg = PixelData(data=torch.zeros(1, *original, dtype=torch.long))
            data['inputs'].append(list(mirrored))
            data['data_samples'].append(view)
    return data


class Means(SegTTAModel):
    """mmsegmentation's, with the mean probabilities that its labels are made of."""

    def merge_preds(self, data_samples_list):
        self.means = [torch.stack([s.seg_logits.data.softmax(0) for s in v]).mean(0) for v in data_samples_list]
        return super().merge_preds(data_samples_list)


def assert_same_labels(got, expected, means):
    for g, e, mean in zip(got, expected, means, strict=True):
        assert g.pred_sem_seg.data.shape == e.pred_sem_seg.data.shape
        wrong = (g.pred_sem_seg.data != e.pred_sem_seg.data)[0]
        top = mean.topk(2, 0).values
        assert not wrong.any() or (wrong.float().mean() < 1e-3 and (top[0] - top[1])[wrong].max() < 1e-5)


def test_registered_in_the_root():
    assert MODELS.get('BEiTSegTTAModel') is BEiTSegTTAModel


@torch.no_grad()
@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('size', [(60, 82), (41, 33), (97, 64)], ids=str)
def test_six_ratios_and_flips(cfg, size):
    stock, ours = pair(cfg)
    data = views(size, batch=2)
    theirs = Means(stock)
    expected = theirs.test_step(copy.deepcopy(data))
    in_stock = SegTTAModel(ours).test_step(copy.deepcopy(data))
    model = BEiTSegTTAModel(ours)
    got = model.test_step(copy.deepcopy(data))
    for result in (in_stock, got):
        assert_same_labels(result, expected, theirs.means)
        for g, e in zip(result, expected, strict=True):
            assert g.metainfo == e.metainfo
            assert torch.equal(g.gt_sem_seg.data, e.gt_sem_seg.data)
            assert (g.seg_logits.data - e.seg_logits.data).abs().max() <= 1e-6 * e.seg_logits.data.abs().max()
    for mean, truth in zip(model._average(copy.deepcopy(data))[1], theirs.means, strict=True):
        assert (mean - truth).abs().max() < 1e-5


@torch.no_grad()
def test_one_pass_for_each_scale():
    ours = build('BEiTSegmentor', WHOLE)
    seen = batches(ours)
    SegTTAModel(ours).test_step(views((64, 96)))
    assert [shape[0] for shape in seen] == [1] * 12
    seen.clear()
    BEiTSegTTAModel(ours).test_step(views((64, 96)))
    assert seen == [(2, 3, int(64 * ratio), int(96 * ratio)) for ratio in RATIOS]


@torch.no_grad()
def test_windows_of_both_flips_share_batches():
    ours = build('BEiTSegmentor', {**SLIDE, 'window_batch': 4})
    seen = batches(ours)
    BEiTSegTTAModel(ours).test_step(views((80, 104), ratios=(1.0,)))  # 2 x 2 windows, twice
    assert [shape[0] for shape in seen] == [4, 4]


@torch.no_grad()
@pytest.mark.parametrize('number', [None, 7])
def test_windows_of_all_scales_share_batches(number):
    """What is smaller than a window is filled up, as mmsegmentation's own BEiT needs it."""
    stock, ours = pair(SLIDE, ours={'window_batch': number}, preprocessor={'test_cfg': {'size': SLIDE['crop_size']}})
    data = views((60, 82), batch=2)
    theirs = Means(stock)
    in_stock, in_ours = batches(stock), batches(ours)
    expected = theirs.test_step(copy.deepcopy(data))
    model = BEiTSegTTAModel(ours)
    got = model.test_step(copy.deepcopy(data))
    windows = sum(shape[0] for shape in in_stock)
    assert {shape[1:] for shape in in_ours} == {(3, *SLIDE['crop_size'])}
    full, rest = divmod(windows, number or windows)
    assert [shape[0] for shape in in_ours] == [number or windows] * full + [rest] * bool(rest)
    assert_same_labels(got, expected, theirs.means)
    for mean, truth in zip(model._average(data)[1], theirs.means, strict=True):
        assert (mean - truth).abs().max() < 1e-5


@torch.no_grad()
def test_views_of_equal_size_that_are_apart():
    stock, ours = pair(WHOLE)
    data = views(ratios=(1.0, 0.5, 1.0), flips=(*FLIPS, {'flip': True, 'flip_direction': 'vertical'}))
    theirs = Means(stock)
    expected = theirs.test_step(copy.deepcopy(data))
    seen = batches(ours)
    got = BEiTSegTTAModel(ours).test_step(data)
    assert [shape[0] for shape in seen] == [6, 3]
    assert_same_labels(got, expected, theirs.means)
    assert got[0].metainfo == expected[0].metainfo


@torch.no_grad()
def test_takes_mmsegmentations_segmentor():
    stock = build('EncoderDecoder')
    theirs = Means(stock)
    expected = theirs.test_step(views())
    got = BEiTSegTTAModel(stock).test_step(views())
    assert_same_labels(got, expected, theirs.means)
    error = (got[0].seg_logits.data - expected[0].seg_logits.data).abs().max()
    assert error <= 1e-6 * expected[0].seg_logits.data.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    'kind, by_name', [('BaseDataPreprocessor', True), ('BaseDataPreprocessor', False), ('ImgDataPreprocessor', True)]
)
def test_views_that_are_tensors(kind, by_name):
    """As mmengine's `default_collate` makes them, with preprocessors that leave them so; None is the first of them."""
    ours = build('BEiTSegmentor', WHOLE)
    ours.data_preprocessor = MODELS.build({'type': kind})
    data = views(batch=2)
    data['inputs'] = [(torch.stack(view) - 120) / 60 for view in data['inputs']]
    data = data if by_name else list(data.values())
    theirs = Means(ours)
    expected = theirs.test_step(copy.deepcopy(data))
    assert_same_labels(BEiTSegTTAModel(ours).test_step(data), expected, theirs.means)


@torch.no_grad()
def test_one_channel_has_one_sigmoid():
    data = views()
    ours = build('BEiTSegmentor', WHOLE, **BINARY)
    at_threshold([ours], ours.data_preprocessor({'inputs': data['inputs'][4]})['inputs'])
    single = [ours.test_step({key: value[view] for key, value in copy.deepcopy(data).items()}) for view in range(12)]
    mean = torch.stack([sample[0].seg_logits.data for sample in single]).mean(0)
    got = BEiTSegTTAModel(ours).test_step(data)[0].pred_sem_seg.data
    assert got.dtype == mean.dtype and 0.1 < got.mean() < 0.9
    assert ((got != (mean > 0.3)) & ((mean - 0.3).abs() > 1e-5)).sum() == 0


@torch.no_grad()
def test_labels_alone():
    ours = build('BEiTSegmentor', WHOLE)
    expected = BEiTSegTTAModel(ours).test_step(views())
    ours.test_cfg.keep_logits = False
    got = BEiTSegTTAModel(ours).test_step(views())
    assert 'seg_logits' in expected[0] and 'seg_logits' not in got[0]
    assert torch.equal(got[0].pred_sem_seg.data, expected[0].pred_sem_seg.data)


@torch.no_grad()
def test_without_paths_and_labels():
    data = views(ratios=(1.0,))
    for (sample,) in data['data_samples']:
        del sample.gt_sem_seg, sample.img_path
    (got,) = BEiTSegTTAModel(build('BEiTSegmentor')).test_step(data)
    assert 'img_path' not in got and 'gt_sem_seg' not in got


@torch.no_grad()
def test_holds_the_logits_of_one_view_at_a_time(monkeypatch):
    alive, most = [], []
    add = tta._add_probabilities

    def spy(total, logits):
        alive.append(weakref.ref(logits))
        most.append(sum(ref() is not None for ref in alive))
        return add(total, logits)

    monkeypatch.setattr(tta, '_add_probabilities', spy)
    BEiTSegTTAModel(build('BEiTSegmentor')).test_step(views())
    assert most == [1] * 12


def test_results_of_the_segmentor_are_mmsegmentations_for_each_view():
    stock, ours = pair(SLIDE)
    data = views()
    for view in range(12):
        single = {key: value[view] for key, value in data.items()}
        with torch.no_grad():
            got, expected = (model.test_step(copy.deepcopy(single)) for model in (ours, stock))
        assert_same_results(got, expected)
