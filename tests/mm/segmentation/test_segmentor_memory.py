"""How much `BEiTSegmentor` holds, beside mmsegmentation's `EncoderDecoder`."""

import importlib.util
import weakref

import pytest
import torch
from helpers import images
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

from segmentor_common import SLIDE, WHOLE, assert_same, build, originals, pair

from beit_plugin.mm.segmentation import segmentor

pytestmark = pytest.mark.usefixtures('mmseg_scope')


class Watch(TorchDispatchMode):
    """Element counts of the largest result of an operation, and of the most results above `floor` alive at a time."""

    def __init__(self, floor=0):
        super().__init__()
        self.floor, self.largest, self.most, self.alive = floor, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.floor:
                    self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
                    storages = {ref().untyped_storage().data_ptr() for ref in self.alive}
                    self.most = max(self.most, len(storages))
        return out


@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('slices, classes', [(2**23, 2), (2000, 1)])
def test_labels_alone_never_hold_all_classes_at_the_original_size(cfg, slices, classes, monkeypatch):
    monkeypatch.setattr(segmentor, 'SLICE', slices)
    size, original = (60, 80), (240, 320)
    stock, ours = pair(cfg, ours={'keep_logits': False})
    assert_same(stock, ours, images(*size), lambda: originals(size, original, (300, 200)))
    largest = {}
    for name, model in (('stock', stock), ('ours', ours)):
        with torch.inference_mode(), Watch() as watch:
            model.predict(images(*size), originals(size, original, original))
        largest[name] = watch.largest
    assert largest['stock'] >= 11 * 240 * 320
    assert largest['ours'] == classes * 240 * 320


def test_whole_labels_are_not_made_from_all_classes_at_the_input_size_either():
    ours = build('BEiTSegmentor', {**WHOLE, 'keep_logits': False}, num_classes=40)
    with torch.inference_mode(), Watch() as watch:
        ours.predict(images(240, 320, batch=1), originals((240, 320), (240, 320)))
    assert watch.largest < 40 * 240 * 320 / 3  # there are larger maps than logits within the network


def test_slide_adds_up_one_image_at_a_time():
    size = (200, 300)
    most = {}
    for kind, more in (('EncoderDecoder', {}), ('BEiTSegmentor', {'keep_logits': False, 'window_batch': 2})):
        with torch.inference_mode(), Watch(floor=11 * 200 * 300) as watch:
            build(kind, {**SLIDE, **more}).predict(images(*size, batch=3), originals(size, *[(50, 60)] * 3))
        most[kind] = (watch.largest, watch.most)
    assert most['BEiTSegmentor'] == (11 * 200 * 300, 1)
    assert most['EncoderDecoder'][0] == 3 * 11 * 200 * 300


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('cfg', [SLIDE, WHOLE], ids=['slide', 'whole'])
@pytest.mark.parametrize('place, device', [('host', 'cpu'), ('device', 'cuda')])
def test_place_of_sums_and_logits(cfg, place, device):
    stock, ours = (model.cuda() for model in pair(cfg, ours={'accumulate_on': place}))
    inputs = images(97, 131).cuda()
    with torch.no_grad():
        got, expected = (m.predict(inputs, originals((97, 131), (60, 70), (200, 90))) for m in (ours, stock))
    for g, e in zip(got, expected, strict=True):
        assert (g.seg_logits.data.device.type, g.pred_sem_seg.data.device.type) == (device, 'cuda')
        assert (g.seg_logits.data.cuda() - e.seg_logits.data).abs().max() < 1e-4
