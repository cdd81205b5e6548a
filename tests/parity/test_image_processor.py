"""The image processor against transformers (both backends), timm's transforms and mmsegmentation's pipeline.

Each of our backends has the bits of the peers that resize by the same library, but for the last ones of float32. The
two libraries are one grey level apart, and further where a filter overshoots black or white: both cut after each of
their two passes, and Pillow (13.0) begins with the vertical one where that is less work.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
from image_common import LABEL, PHOTO, chw, label_map, photograph
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

if importlib.util.find_spec('transformers') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[test]'", allow_module_level=True)

from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width
from transformers.models.beit.image_processing_beit import BeitImageProcessor as HFTorchvision
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil as HFPil

from beit_plugin.data.image_processor import BeitImageProcessor
from beit_plugin.data.image_processor_options import resized_size

PEERS = {'torch': HFTorchvision(), 'pil': HFPil()}
PHOTOS = [PHOTO, photograph(97, 53, 1), photograph(61, 61, 2), photograph(40, 150, 3)]
GREY_LEVEL = 1 / 127.5  # at a std of 0.5
ROUNDING = 2e-6
DEFAULTS = dict(size=48, crop_size=40, do_center_crop=True)
SETTINGS = {
    'as documented': {},
    'no crop': dict(do_center_crop=False),
    'larger': dict(size=(130, 170), do_center_crop=False),
    'bilinear': dict(resample=2),
    'bilinear, larger': dict(resample=2, size=140, crop_size=130),
    'short side': dict(size={'shortest_edge': 44}),
    'short side, limited': dict(size={'shortest_edge': 44, 'longest_edge': 60}, do_center_crop=False),
    'inside': dict(size={'max_height': 40, 'max_width': 60}, do_center_crop=False),
    'odd crop': dict(size=(47, 60), crop_size=(32, 33)),
    'only a crop': dict(do_resize=False, crop_size=(32, 39)),
    'border': dict(size=(30, 35), crop_size=(40, 45)),
    'crop and border': dict(size=(30, 65), crop_size=(40, 32)),
    'odd border': dict(do_resize=False, crop_size=(201, 191)),
    'odd crop and border': dict(size=(30, 65), crop_size=(41, 32)),
    'not rescaled': dict(do_rescale=False, image_mean=[100.0, 120.0, 130.0], image_std=[127.5] * 3),
    'not normalised': dict(do_normalize=False),
    'nothing but the size': dict(do_normalize=False, do_rescale=False),
    'another range': dict(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
    'ImageNet': dict(image_mean=list(IMAGENET_DEFAULT_MEAN), image_std=list(IMAGENET_DEFAULT_STD)),
}

HALVED = ('odd border', 'odd crop and border')  # elsewhere by the other backend


def both(backend, *inputs, **options):
    """Results of ours and of transformers' with one backend."""
    options = {**DEFAULTS, **options}
    ours, theirs = BeitImageProcessor(backend=backend), PEERS[backend]
    return ours(*inputs, **options), theirs(*inputs, return_tensors='pt', **options)


def difference(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return (got.double() - expected).abs().max().item()


@pytest.mark.parametrize('backend', PEERS)
class TestTransformers:
    @pytest.mark.parametrize('setting', SETTINGS)
    def test_settings(self, setting, backend):
        for image in PHOTOS:
            got, expected = both(backend, image, **SETTINGS[setting])
            assert difference(got.pixel_values, expected.pixel_values) <= ROUNDING

    @pytest.mark.parametrize('setting', [setting for setting in SETTINGS if setting not in HALVED])
    def test_the_other_backend_is_one_grey_level_away(self, setting, backend):
        other = BeitImageProcessor(backend='pil' if backend == 'torch' else 'torch')
        for image in PHOTOS:
            faint = image // 2 + 64  # see above
            _, expected = both(backend, faint, **SETTINGS[setting])
            got = other(faint, **{**DEFAULTS, **SETTINGS[setting]}).pixel_values
            raw = got.max() > 50  # values from 0 to 255
            level = 1 if raw else GREY_LEVEL * max(1, 0.5 / 0.224)
            assert difference(got, expected.pixel_values) <= level + ROUNDING

    def test_forms_and_mixed_sizes(self, backend):
        for form in (Image.fromarray, np.asarray, chw, torch.from_numpy, lambda x: torch.from_numpy(chw(x))):
            images = [form(photo) for photo in PHOTOS]
            for given in (images, images[1], images[::-1] * 2):
                got, expected = both(backend, given)
                assert difference(got.pixel_values, expected.pixel_values) <= ROUNDING

    @pytest.mark.parametrize('mode', ['L', '1', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr'])
    def test_modes_made_rgb(self, mode, backend):
        image = Image.fromarray(PHOTO)
        if 'A' in mode:
            image.putalpha(Image.fromarray(label_map(60, 84, 256)))
        forms = [image.convert(mode)]
        if mode in ('L', 'RGBA'):
            array = np.atleast_3d(np.array(forms[0]))  # theirs takes no array (H, W)
            forms += [array, torch.from_numpy(array), chw(array)]
        for form in forms:
            got, expected = both(backend, form, do_convert_rgb=True, do_resize=False)
            # what is transparent is mixed with white in other arithmetics
            level = GREY_LEVEL if 'A' in mode else 0
            assert difference(got.pixel_values, expected.pixel_values) <= ROUNDING + level

    @pytest.mark.parametrize('reduce', [False, True])
    @pytest.mark.parametrize(
        'size', [dict(), dict(size=(57, 91), do_center_crop=False), dict(do_resize=False)], ids=str
    )
    def test_labels(self, size, reduce, backend):
        labels = [LABEL * 30, label_map(97, 53, 256)]  # 0 to 180, and up to 255
        for form in (Image.fromarray, lambda x: torch.from_numpy(x).clone(), np.array):
            given = [form(label) for label in labels]
            kept = [form(label) for label in labels]  # theirs writes into the arrays that it is given
            options = dict(resample=0, do_reduce_labels=reduce, **size)
            ours = BeitImageProcessor(backend=backend)(PHOTOS[:2], kept, **{**DEFAULTS, **options})
            theirs = PEERS[backend](PHOTOS[:2], given, return_tensors='pt', **{**DEFAULTS, **options})
            assert difference(ours.labels, theirs.labels) == 0

    def test_labels_where_theirs_makes_up_classes(self, backend):
        label = np.where(LABEL > 3, 149, 1).astype(np.uint8)
        got, expected = both(backend, PHOTO, label)
        assert len(expected.labels.unique()) > 9 and got.labels.unique().tolist() == [1, 149]

    def test_class_maps(self, backend):
        logits = torch.randn(2, 20, 12, 17)
        for targets in (None, [(30, 40), (12, 17)]):
            arguments = (type('Outputs', (), dict(logits=logits)), targets)
            ours, theirs = (x.post_process_semantic_segmentation for x in (BeitImageProcessor(), PEERS[backend]))
            assert all(map(torch.equal, ours(*arguments), theirs(*arguments)))
            for got, expected in zip(ours(*arguments, True), theirs(*arguments, True), strict=True):
                assert torch.equal(got.segmentation, expected.segmentation)
                assert torch.equal(got.segmentation_scores, expected.segmentation_scores)

    def test_files(self, backend, tmp_path):
        options = dict(size={'height': 40, 'width': 50}, image_mean=[0.1, 0.2, 0.3], do_reduce_labels=True, resample=2)
        theirs = type(PEERS[backend])(**options)
        theirs.save_pretrained(tmp_path)
        ours = BeitImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert {**json.loads(theirs.to_json_string()), 'do_convert_rgb': True} == ours.to_dict()
        ours.image_std = 1  # a number for all channels, and a whole one
        read = type(theirs).from_json_file(*ours.save_pretrained(tmp_path))
        assert difference(ours(PHOTO).pixel_values, read(PHOTO, return_tensors='pt').pixel_values) <= ROUNDING


def test_sizes_that_keep_the_aspect():
    for height, width, edge, limit in np.random.default_rng(0).integers(1, 90, (5000, 4)).tolist():
        sizes = (height, width)
        plain = get_resize_output_image_size(np.empty((3, *sizes)), edge, False, input_data_format='channels_first')
        assert resized_size({'shortest_edge': edge}, *sizes) == plain
        for longest in (limit, max(sizes)):  # also where nothing is left to do
            expected = get_size_with_aspect_ratio(sizes, edge, longest)
            got = resized_size({'shortest_edge': edge, 'longest_edge': longest}, *sizes)
            assert got == tuple(max(1, x) for x in expected)
        expected = get_image_size_for_max_height_width(sizes, edge, limit)
        assert resized_size({'max_height': edge, 'max_width': limit}, *sizes) == tuple(max(1, x) for x in expected)


@pytest.mark.parametrize('resample', [1, 4, 5])
def test_filters_of_pillow_alone(resample):
    for backend in PEERS:
        got = BeitImageProcessor(backend=backend)(PHOTO, resample=resample, **DEFAULTS).pixel_values
        expected = PEERS['pil'](PHOTO, resample=resample, return_tensors='pt', **DEFAULTS).pixel_values
        assert difference(got, expected) <= ROUNDING


def test_floating_point_images_are_not_cut():
    image = torch.from_numpy(chw(PHOTO)) / 255
    got, expected = both('torch', image, do_rescale=False)
    assert difference(got.pixel_values, expected.pixel_values) <= ROUNDING


TIMM = {  # arguments of create_transform, and the same for ours
    'squash, all of it': (dict(crop_pct=1.0, crop_mode='squash'), dict(size=48, do_center_crop=False)),
    'squash': (dict(crop_pct=0.75, crop_mode='squash'), dict(size=64, crop_size=48)),
    'center': (dict(crop_pct=0.9), dict(size={'shortest_edge': 53}, crop_size=48)),
    'bilinear': (
        dict(crop_pct=0.9, interpolation='bilinear'),
        dict(size={'shortest_edge': 53}, crop_size=48, resample=2),
    ),
    'Lanczos': (
        dict(crop_pct=0.9, interpolation='lanczos'),
        dict(size={'shortest_edge': 53}, crop_size=48, resample=1),
    ),
}


@pytest.mark.parametrize('setting', TIMM)
def test_timm(setting):
    theirs, ours = TIMM[setting]
    scale = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    transform = create_transform(48, **{'interpolation': 'bicubic', **scale, **theirs})
    for size in ((60, 84), (97, 53), (61, 61), (40, 148)):
        image = Image.fromarray(photograph(*size))
        expected = transform(image)[None]
        options = dict(image_mean=scale['mean'], image_std=scale['std'], **ours)
        got = BeitImageProcessor(backend='pil', **options)(image).pixel_values
        assert difference(got, expected) <= ROUNDING, size
        faint = Image.fromarray(np.asarray(image) // 2 + 64)
        got = BeitImageProcessor(**options)(faint).pixel_values
        assert difference(got, transform(faint)[None]) <= 1 / 255 / min(scale['std']) + ROUNDING


def test_where_the_middle_of_timm_is_another():
    transform = create_transform(48, interpolation='bicubic', crop_pct=1.0, mean=0.5, std=0.5)
    for width, step in ((49, 0), (50, 0), (51, 1), (52, 0), (53, 0), (55, 1)):  # it rounds halves to even
        image = Image.fromarray(photograph(48, width))
        ours = BeitImageProcessor(do_resize=False, crop_size=48)(image).pixel_values[0]
        assert difference(ours[..., step:], transform(image)[..., : 48 - step]) <= ROUNDING


@pytest.mark.skipif(
    importlib.util.find_spec('mmseg') is None, reason="needs the extra: pip install 'beit-plugin[mmseg]'"
)
@pytest.mark.parametrize('interpolation, resample', [('bicubic', 3), ('bilinear', 2)])
def test_mmseg(tmp_path, interpolation, resample, request):
    import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

    request.getfixturevalue('mmseg_scope')
    from mmcv.transforms import Compose
    from mmseg.models import SegDataPreProcessor

    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    load = [
        dict(type='LoadImageFromFile', imdecode_backend='pillow'),
        dict(type='LoadAnnotations', imdecode_backend='pillow'),
    ]
    resize = dict(type='Resize', scale=(56, 48), keep_ratio=False, interpolation=interpolation, backend='pillow')
    steps = Compose([*load, resize, dict(type='PackSegInputs')])
    preprocess = SegDataPreProcessor(mean=mean, std=std, bgr_to_rgb=True)
    options = dict(size=(48, 56), resample=resample, do_center_crop=False, do_reduce_labels=True)
    ours = BeitImageProcessor(image_mean=np.array(mean) / 255, image_std=np.array(std) / 255, **options)
    for image in PHOTOS:
        label = label_map(*image.shape[:2], 256)
        paths = dict(img_path=str(tmp_path / 'image.png'), seg_map_path=str(tmp_path / 'label.png'))
        for array, path in zip((image, label), paths.values(), strict=True):
            Image.fromarray(array).save(path)
        found = steps(dict(paths, seg_fields=[], reduce_zero_label=True))
        data = preprocess(dict(inputs=[found['inputs']], data_samples=[found['data_samples']]))
        got = ours(*paths.values(), backend='pil')
        assert difference(got.pixel_values, data['inputs']) <= ROUNDING
        assert torch.equal(got.labels[0], data['data_samples'][0].gt_sem_seg.data[0].long())
