"""Options of the image processor: for a call, at construction, in files and dicts of transformers, and refusals."""

import json
import re

import numpy as np
import pytest
import torch
from image_common import PHOTO, PIL, chw, processor

from beit_plugin.data.image_processor import BeitFeatureExtractor, BeitImageProcessor


class TestOptions:
    def test_for_one_call(self):
        other = BeitImageProcessor(size=24, do_center_crop=False, image_mean=0.3, image_std=(0.2, 0.3, 0.4), resample=2)
        overrides = dict(size=24, do_center_crop=False, image_mean=[0.3], image_std=[0.2, 0.3, 0.4], resample=2)
        before = processor.to_dict()
        assert torch.equal(processor(PIL, **overrides).pixel_values, other(PIL).pixel_values)
        assert processor.to_dict() == before
        assert torch.equal(processor(PIL, size=None, resample=None).pixel_values, processor(PIL).pixel_values)

    def test_changed_for_good(self):
        changed = BeitImageProcessor()
        changed.size, changed.do_center_crop = 24, False
        assert changed(PIL).pixel_values.shape == (1, 3, 24, 24)
        changed.size = 'large'
        with pytest.raises(ValueError, match=r"^size is 'large', expected pixels"):
            changed(PIL)

    def test_defaults_are_those_of_the_documentation(self):
        assert BeitImageProcessor().to_dict() == dict(
            do_resize=True, size={'height': 256, 'width': 256}, resample=3, do_center_crop=True,
            crop_size={'height': 224, 'width': 224}, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
            image_mean=[0.5] * 3, image_std=[0.5] * 3, do_reduce_labels=False, do_convert_rgb=True,
            image_processor_type='BeitImageProcessor',
        )  # fmt: skip
        assert BeitFeatureExtractor is BeitImageProcessor


# what transformers 4.18 wrote for microsoft's segmentors
OLD_FILE = dict(
    crop_size=640, do_center_crop=False, do_normalize=True, do_resize=True, image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225], feature_extractor_type='BeitFeatureExtractor', reduce_labels=True, resample=2,
    size=640,
)  # fmt: skip


class TestFiles:
    def test_each_way_that_transformers_has(self, tmp_path):
        options = dict(
            size={'height': 20, 'width': 20}, crop_size={'height': 18, 'width': 18}, do_center_crop=None,
            image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.5, 0.5],
        )  # fmt: skip
        given = BeitImageProcessor(**options)
        assert {name: getattr(given, name) for name in options} == options
        given.to_json_file(tmp_path / 'any.json')
        for got in (
            BeitImageProcessor.from_dict(given.to_dict()),
            BeitImageProcessor.from_dict(json.loads(given.to_json_string())),
            BeitImageProcessor.from_dict({**options, 'size': 7}, size=20, do_normalize=None),
            BeitImageProcessor.from_json_file(tmp_path / 'any.json'),
            BeitImageProcessor.from_pretrained(tmp_path / 'any.json'),
        ):
            assert got == given
        assert {*options, 'do_reduce_labels', 'device'} <= set(BeitImageProcessor.valid_kwargs.__annotations__)

    def test_none_at_construction(self):
        nothing = dict.fromkeys(['size', 'crop_size', 'resample', 'image_mean', 'rescale_factor', 'backend'])
        assert BeitImageProcessor(**nothing, do_convert_rgb=None) == BeitImageProcessor()
        switches = dict.fromkeys(['do_resize', 'do_center_crop', 'do_rescale', 'do_normalize', 'do_reduce_labels'])
        got = BeitImageProcessor.from_dict(BeitImageProcessor(**switches).to_dict())
        assert {name: getattr(got, name) for name in switches} == switches
        assert torch.equal(got(PHOTO).pixel_values[0], torch.from_numpy(chw(PHOTO).copy()))

    def test_written_and_read(self, tmp_path):
        given = BeitImageProcessor(size={'shortest_edge': 40}, resample=np.int64(1), image_mean=0.4)
        path = tmp_path / 'new' / 'folder' / 'preprocessor_config.json'
        assert given.save_pretrained(path.parent) == [str(path)]
        for source in (path, str(path.parent)):
            assert BeitImageProcessor.from_pretrained(source).to_dict() == given.to_dict()
        got = BeitImageProcessor.from_pretrained(path, backend='pil', size=8, resample=None)
        assert (got.backend, got.size, got.resample) == ('pil', {'height': 8, 'width': 8}, 1)

    def test_of_the_feature_extractor(self, tmp_path):
        path = tmp_path / 'preprocessor_config.json'
        path.write_text(json.dumps(OLD_FILE))
        got = BeitImageProcessor.from_pretrained(tmp_path)
        expected = BeitImageProcessor(
            size=640, crop_size=640, do_center_crop=False, image_mean=OLD_FILE['image_mean'],
            image_std=OLD_FILE['image_std'], do_reduce_labels=True, resample=2,
        )  # fmt: skip
        assert got == expected
        path.write_text(json.dumps({**OLD_FILE, 'do_reduce_labels': False, 'device': None, 'default_to_square': True}))
        assert not BeitImageProcessor.from_pretrained(path).do_reduce_labels

    def test_on_the_hub(self, tmp_path, monkeypatch):
        given = BeitImageProcessor(size=30)
        files = {('microsoft/beit', 'preprocessor_config.json'): given.save_pretrained(tmp_path)[0]}
        monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *file: files[file])
        assert BeitImageProcessor.from_pretrained('microsoft/beit') == given
        monkeypatch.setattr('huggingface_hub.hf_hub_download', lambda *file: open('/no/such'))  # an OSError
        with pytest.raises(ValueError, match=r'^no/one is no file .* did not give its preprocessor_config.json \(.*No'):
            BeitImageProcessor.from_pretrained('no/one')

    @pytest.mark.parametrize(
        'text, message',
        [
            (None, 'does not exist: give a preprocessor_config.json, the folder that it lies in, or a hub id'),
            ('', 'is cut off or no JSON .*: fetch or save it again'),
            ('{"size": 2', 'is cut off or no JSON'),
            ('[' * 9999, 'is cut off or no JSON'),
            ('{"size": %s}' % ('[' * 500 + ']' * 500), r': size is \[+\.\.\.\]+, expected pixels'),
            ('{"size": 1000000000}', ': size is 1000000000, expected whole numbers of pixels from 1 to 16384'),
            ('{"crop_size": [16, 20000]}', r': crop_size is \[16, 20000\], expected whole numbers of pixels'),
            ('{"rescale_factor": 1%s}' % ('0' * 400), ': rescale_factor is 1.*, expected a number above 0'),
            (b'\xff\xfe\x00', 'is cut off or no JSON'),
            ('[1]', 'holds a list, expected options by name: fetch or save it again'),
            (
                '{"image_processor_type": "CLIPImageProcessor"}',
                ': these are the options of CLIPImageProcessor, expected',
            ),
            ('{"do_pad": true}', ': do_pad is True, expected False: correct it or leave it out'),
            ('{"sise": 3}', ': sise is no option of the image processor: did you mean size'),
            ('{"size": {"height": 3}}', ": size is {'height': 3}, expected pixels: an int"),
            ('{"image_std": [1, 0]}', r': image_std is \[1.0, 0.0\], expected numbers above 0'),
            ('{"rescale_factor": NaN}', ': rescale_factor is nan, expected a number above 0'),
        ],
    )
    def test_bad(self, tmp_path, text, message):
        path = tmp_path / 'preprocessor_config.json'
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=f'^{re.escape(str(path))} ?{message}'):
            BeitImageProcessor.from_pretrained(path)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(do_resiz=False), r'do_resiz is no option of the image processor: did you mean do_resize\?'),
        (dict(colour=1), r'colour is no option of the image processor: expected one of do_resize, size, '),
        (dict(do_resize=1), r'do_resize is 1, expected True or False: correct it or leave it out'),
        (dict(size=0), r'size is 0, expected whole numbers of pixels from 1 to 16384'),
        (dict(size=2.5), r'size is 2\.5, expected pixels: an int, \(height, width\), or a dict with'),
        (dict(size=(1, 2, 3)), r'size is \(1, 2, 3\), expected pixels'),
        (dict(size={'width': 3}), r"size is \{'width': 3\}, expected pixels"),
        (dict(crop_size={'shortest_edge': 3}), r"crop_size is .* dict with \['height', 'width'\]: correct"),
        (dict(crop_size=True), r'crop_size is True, expected whole numbers'),
        (dict(resample=9), r"resample is 9, expected the number of a filter of Pillow's, \[0, "),
        (dict(resample=True), r'resample is True, expected the number'),
        (dict(resample='bicubic'), r"resample is 'bicubic', expected the number"),
        (dict(rescale_factor=0), r'rescale_factor is 0, expected a number above 0'),
        (dict(image_mean='grey'), r"image_mean is 'grey', expected a number, or one for each channel"),
        (dict(image_mean=[]), r'image_mean is \[\], expected a number, or one for each channel'),
        (dict(image_std=0), r'image_std is \[0.0\], expected numbers above 0'),
        (dict(backend='cv2'), r"backend is 'cv2', expected 'torch' or 'pil'"),
        (dict(return_tensors='tf'), r"return_tensors is 'tf', expected 'pt', 'np', 'jax' or None: correct it"),
    ],
    ids=str,
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=f'^{message}') as error:
        processor(PIL, **options)
    assert '\n' not in str(error.value)
