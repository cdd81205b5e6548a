"""Images and label maps in all the forms that people have them in, as the image processor reads them."""

import io

import numpy as np
import pytest
import torch
from image_common import AS_IS, LABEL, PHOTO, PIL, chw, label_map, photograph, pixels, processor, saved
from PIL import ExifTags, Image, ImageOps

GREY = np.asarray(PIL.convert('L'))


def backwards(array):
    """The same values at negative strides."""
    return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]


SAME = {
    'NumPy, channels last': PHOTO,
    'NumPy, channels first': chw(PHOTO),
    'torch, channels last': torch.from_numpy(PHOTO),
    'torch, channels first': torch.from_numpy(chw(PHOTO)),
    'list': [PIL],
    'tuple': (PHOTO,),
    'nested lists': [[PIL], []],
    'batch': PHOTO[None],
    'batch of tensors': torch.from_numpy(chw(PHOTO[None])),
    'list of batches': [PHOTO[None]],
    'int64': PHOTO.astype(np.int64),
    'uint32': PHOTO.astype(np.uint32),
    '16 bits': PHOTO.astype(np.uint16) * 257,
    '16 bits, big endian': (PHOTO.astype(np.uint16) << 8).astype('>u2'),
    '16 bits, torch': torch.from_numpy(PHOTO.astype(np.uint16) * 257),
    'opaque RGBA': PIL.convert('RGBA'),
    'opaque RGBA, array': np.asarray(PIL.convert('RGBA')),
    'PNG': saved(PIL),
    'read only': np.asarray(PIL),
    'negative strides': backwards(PHOTO),
}


@pytest.mark.parametrize('form', SAME)
def test_every_form_of_an_image_gives_the_same_bits(form):
    given = SAME[form]
    before = np.array(given, copy=True) if isinstance(given, np.ndarray) else None
    got = processor(given).pixel_values
    assert got.shape == (1, 3, 32, 32) and got.dtype == torch.float32
    assert torch.equal(got, processor(PIL).pixel_values)
    if before is not None:
        assert np.array_equal(given, before), 'the given array was changed'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floating_point_images(dtype):
    # 0 to 255, and 0 to 1 for those who say so; neither rounded to grey levels nor cut at black and white
    faint = PHOTO // 2 + 64
    image = torch.from_numpy(chw(faint)).to(dtype).requires_grad_()
    expected = processor(faint).pixel_values
    for given, options in ((image, {}), (image / 255, dict(do_rescale=False))):
        error = (processor(given, **options).pixel_values - expected).abs().max() * 127.5  # in grey levels
        assert error <= (2 if dtype == torch.bfloat16 else 1)
    same = processor(image / 255, rescale_factor=1.0).pixel_values  # 1 rescales nothing, so these are no mistake
    assert torch.equal(same, processor(image / 255, do_rescale=False).pixel_values)


def test_files(tmp_path):
    paths = [tmp_path / name for name in ('a.png', 'b.jpg', 'c.tif')]
    for path in paths:
        PIL.save(path)
    for path in paths:
        expected = processor(Image.open(path)).pixel_values
        assert torch.equal(processor(path).pixel_values, expected)
        assert torch.equal(processor([str(path)]).pixel_values, expected)
    frames = [Image.fromarray(np.full((8, 9, 3), x, np.uint8)) for x in (10, 20)]
    frames[0].save(tmp_path / 'frames.tif', save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / 'frames.tif').unique().tolist() == [10]  # the first; the file is closed (or it warns)


TO_RGB = {  # what Pillow itself makes RGB of without loss
    'L': PIL.convert('L'),
    '1': PIL.convert('1'),
    'P': PIL.quantize(50),
    'CMYK': PIL.convert('CMYK'),
    'YCbCr': PIL.convert('YCbCr'),
    'HSV': PIL.convert('HSV'),
    'CMYK JPEG': saved(PIL.convert('CMYK'), 'JPEG'),
}


class TestChannels:
    @pytest.mark.parametrize('mode', TO_RGB)
    def test_modes_of_pillow(self, mode):
        assert np.array_equal(pixels(TO_RGB[mode]), chw(np.asarray(TO_RGB[mode].convert('RGB'))))

    @pytest.mark.parametrize('grey', [GREY, GREY[None], GREY[..., None], torch.tensor(GREY)[None, None]])
    def test_grey(self, grey):
        assert np.array_equal(pixels(grey), np.stack([GREY] * 3))
        assert np.array_equal(pixels(grey, do_convert_rgb=False), GREY[None])

    def test_grey_of_16_bits(self):
        deep = GREY.astype(np.uint16) * 257
        for form in (Image.fromarray(deep), saved(Image.fromarray(deep)), deep, saved(Image.fromarray(deep), 'TIFF')):
            assert np.array_equal(pixels(form), np.stack([GREY] * 3))

    def test_grey_of_32_bits_and_floats(self):
        # Pillow's own conversion of these modes would cut all above 255
        assert np.array_equal(pixels(Image.fromarray(GREY.astype(np.int32)))[0], GREY)
        assert np.array_equal(pixels(Image.fromarray(GREY.astype(np.float32) + 0.25))[0], GREY + np.float32(0.25))

    def test_true_is_white(self):
        assert np.array_equal(pixels(GREY > 99)[0], np.where(GREY > 99, 255, 0))

    def test_transparency_lies_on_white(self):
        alpha = label_map(60, 84, 256, 3)
        rgba = np.dstack([PHOTO, alpha])
        expected = PHOTO * (alpha[..., None] / 255) + 255 - alpha[..., None]
        for form in (rgba, chw(rgba), torch.from_numpy(rgba), Image.fromarray(rgba), saved(Image.fromarray(rgba))):
            assert np.abs(pixels(form).numpy() - chw(expected)).max() <= 0.51
        assert np.abs(pixels(rgba / 255).numpy() - chw(expected) / 255).max() < 1e-6
        assert np.abs(pixels(rgba.astype(float), do_rescale=True).numpy() - chw(expected) / 255).max() < 1e-6

    def test_transparent_palette_and_grey(self):
        palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert('P')
        palette.putpalette([9, 9, 9, 50, 60, 70])
        assert pixels(saved(palette, transparency=0))[:, 0].T.tolist() == [[255] * 3, [50, 60, 70]]
        assert pixels(saved(Image.fromarray(np.array([[[9, 0], [40, 255]]], np.uint8))))[0].tolist() == [[255, 40]]

    @pytest.mark.parametrize('backend', ['torch', 'pil'])
    @pytest.mark.parametrize('channels', [1, 2, 3, 4, 13])
    def test_models_of_other_channels(self, channels, backend):
        image = np.stack([photograph(60, 84, i)[..., 0] for i in range(channels)])  # channels, 60, 84
        mean, std = np.linspace(0.2, 0.8, channels), np.linspace(0.1, 0.4, channels)
        options = dict(do_convert_rgb=False, input_data_format='channels_first', backend=backend)
        for given in (image, image.astype(np.float32)):
            got = processor(given, image_mean=mean, image_std=std, **options).pixel_values[0]
            for i in range(channels):
                alone = processor(given[i], image_mean=mean[i], image_std=std[i], **options).pixel_values[0, 0]
                assert (got[i] - alone).abs().max() <= 1.01 / 255 / std[i]

    def test_palettes_have_no_channels_of_their_own(self):
        assert torch.equal(pixels(PIL.quantize(9), do_convert_rgb=False), pixels(PIL.quantize(9)))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / 'turned.png'
    PIL.save(path, exif=exif)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert turned.shape == ((60, 84, 3) if orientation <= 4 else (84, 60, 3))
    for form in (path, Image.open(path)):
        assert np.array_equal(pixels(form), chw(turned))
    assert np.array_equal(pixels(np.array(Image.open(path))), chw(PHOTO))  # the way to have it as it is stored
    label = np.zeros(turned.shape[:2], np.uint8)
    assert processor(path, label).labels.shape == (1, 32, 32)


class TestLayouts:
    def test_that_is_told(self):
        image = photograph(60, 3)  # 60, 3, 3: which of the last two?
        expected = chw(image)
        assert np.array_equal(pixels(image, input_data_format='channels_last'), expected)
        assert np.array_equal(pixels(expected, input_data_format='channels_first'), expected)
        narrow = photograph(3, 84)  # 3, 84, 3
        assert np.array_equal(pixels(narrow, input_data_format='channels_last'), chw(narrow))

    def test_without_channels(self):
        batch = np.stack([GREY, GREY // 2])
        got = processor(batch, **AS_IS, input_data_format='none').pixel_values
        assert np.array_equal(got, np.stack([[x] * 3 for x in batch]))

    def test_of_results(self):
        first = processor([PIL, PHOTO]).pixel_values
        last = processor([PIL, PHOTO], data_format='channels_last').pixel_values
        assert last.shape == (2, 32, 32, 3) and torch.equal(last.permute(0, 3, 1, 2), first)
        options = dict(do_convert_rgb=False, image_mean=0.5, image_std=0.5)
        grey = processor(GREY, **options).pixel_values
        assert torch.equal(processor(GREY, data_format='none', **options).pixel_values, grey[:, 0])
        listed = processor([PIL], data_format='channels_last', return_tensors=None).pixel_values
        assert torch.equal(listed[0], last[0])


def test_forms_of_label_maps():
    palette = Image.fromarray(LABEL)
    palette.putpalette(list(range(30)))
    deep = LABEL.astype(np.uint16) * 300
    forms = {
        'list': ([LABEL], LABEL),
        'batch': (torch.from_numpy(LABEL)[None], LABEL),
        'Pillow': (Image.fromarray(LABEL), LABEL),
        'palette': (saved(palette), LABEL),
        'bits': (Image.fromarray(LABEL > 3), LABEL > 3),
        'bool': (LABEL > 3, LABEL > 3),
        '16 bits': (saved(Image.fromarray(deep)), deep),
        '16 bits, array': (deep, deep),
        'negative': (LABEL.astype(int) - 100, LABEL.astype(int) - 100),
    }
    for name, (given, expected) in forms.items():
        assert np.array_equal(processor(PIL, given, **AS_IS).labels[0], expected), name


REFUSED = {
    'nothing': ([], 'images is empty: give at least one image'),
    'no image': ('a string', r"images 'a string' does not exist: give the path of an image"),
    'None': (
        [PIL, None],
        r'images\[1\] is of type NoneType, expected a file name, a Pillow image, a NumPy array or a tensor: c',
    ),
    'numbers': ([[1, 2]], r'images\[0\]\[0\] is of type int, expected a file name'),
    'one dimension': (
        PHOTO[0, 0],
        r'images has shape \(3,\), expected \(H, W\), \(C, H, W\) or \(H, W, C\): give single',
    ),
    'five dimensions': (PHOTO[None, None], r'images has shape \(1, 1, 60, 84, 3\), expected'),
    'both layouts': (
        PHOTO[:3],
        r'images of shape \(3, 84, 3\) could be channels first or last: pass input_data_format=',
    ),
    'neither layout': (
        [np.zeros((5, 6, 7), np.uint8)],
        r'images\[0\] of shape \(5, 6, 7\) has no dimension of 1, 3 or 4',
    ),
    'empty': (PHOTO[:0], r'images is 0 x 84 pixels with 3 channels, so there is nothing to see'),
    'empty, Pillow': ([Image.new('RGB', (0, 5))], r'images\[0\] is 5 x 0 pixels with 3 channels'),
    'NaN': (np.full((4, 5), np.nan), r'images has values that are not finite: replace NaN'),
    'infinite': (torch.full((4, 5), torch.inf), r'images has values that are not finite: replace NaN'),
    'rescaled before': (
        PHOTO / 255.0,
        r'images has values from 0 to 1, which would be rescaled a second time, by 0\.00392',
    ),
    'above 255': (
        PHOTO.astype(int) * 2,
        r'images has values from 0 to 510, expected 0 to 255: give 16 bit images as uint16',
    ),
    'below 0': (torch.full((4, 5), -1), r'images has values from -1 to -1, expected 0 to 255'),
    'complex': (PHOTO.astype(complex), r'images holds complex128 values, expected numbers'),
    'complex tensor': (torch.zeros(4, 5, dtype=torch.complex64), r'images holds torch.complex64 values'),
    'text': (np.array([['a', 'b']]), r'images holds <U1 values, expected numbers'),
    'premultiplied': (Image.new('La', (4, 5)), r'images is a Pillow image of mode La: convert it to RGB'),
}


def one_sentence(error):
    text = str(error.value)
    assert '\n' not in text and len(text) < 300
    return text


if np.dtype(np.longdouble).itemsize > 8:  # not on every machine
    REFUSED['long doubles'] = (PHOTO.astype(np.longdouble), r'images holds float\d+ values, expected numbers')


@pytest.mark.parametrize('case', REFUSED)
def test_refused_images(case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=f'^{message}') as error:
        processor(given)
    one_sentence(error)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(input_data_format='channels_first'), r'images has 60 channels, expected 1, 3 or 4 to make RGB of: pass'),
        (dict(input_data_format='HWC'), r"input_data_format is 'HWC', expected channels_first, channels_last, none"),
        (dict(data_format='HWC'), r"data_format is 'HWC', expected channels_first"),
        (dict(data_format='none'), r"images has 3 channels, but data_format='none' has room for one: name another"),
        (dict(image_mean=[1, 2]), r'images has 3 channels, but image_mean 2 numbers: give one for each'),
        (dict(image_std=[1, 2]), r'images has 3 channels, but image_std 2 numbers: give one for each'),
        (dict(segmentation_maps=LABEL.T), r'segmentation_maps is 84 x 60 .* 60 x 84: .*, or give np.array\(image\)'),
        (dict(segmentation_maps=LABEL[1:]), r'segmentation_maps is 59 x 84 pixels, but images 60 x 84: give both in'),
        (dict(segmentation_maps=[LABEL] * 2), r'there are 1 images, but 2 segmentation_maps: give one \(H'),
        (dict(segmentation_maps=[None]), r'segmentation_maps\[0\] is of type NoneType, expected a file name'),
        (dict(segmentation_maps=[PIL]), r'segmentation_maps\[0\] is a Pillow image of mode RGB: labels have one'),
        (dict(segmentation_maps=LABEL / 2), r'segmentation_maps holds torch.float64 values: labels are class numbers'),
        (dict(segmentation_maps=[PHOTO]), r'there are 1 images, but 60 segmentation_maps'),
        (dict(segmentation_maps=LABEL[0]), r'segmentation_maps has shape \(84,\), expected \(H, W\): give one'),
        (dict(segmentation_maps=LABEL.astype(int) << 40), r'segmentation_maps holds values from 0 to 65970697'),
        (dict(segmentation_maps=LABEL.astype(int) - 1, do_reduce_labels=True), r'segmentation_maps has labels outside'),
    ],
)  # fmt: skip
def test_refused_calls(options, message):
    with pytest.raises(ValueError, match=f'^{message}') as error:
        processor(PHOTO, **options)
    one_sentence(error)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / 'cut.jpg'
    PIL.save(path)
    path.write_bytes(path.read_bytes()[:-400])
    opened = Image.open(io.BytesIO(path.read_bytes()))
    for given, name in ((path, r"images '.*cut\.jpg'"), ([PIL, opened], r'images\[1\]')):
        with pytest.raises(
            ValueError, match=rf'^{name} cannot be read as an image \(.*truncated.*\): fetch or save it again'
        ):
            processor(given)
    path.write_bytes(b'no image')
    with pytest.raises(ValueError, match=r"^images '.*cut\.jpg' cannot be read as an image \(cannot identify"):
        processor(path)
    with pytest.raises(ValueError, match=r"^images '.*' cannot be read as an image \(.*directory"):
        processor(tmp_path)


def test_any_array_is_processed_or_refused_in_one_sentence():
    generator = np.random.default_rng(0)
    dtypes = [np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.float16, np.float64, np.bool_]
    seen = {True: 0, False: 0}
    for i in range(400):
        dims = generator.integers(1, 5)
        shape = generator.choice([0, 1, 2, 3, 4, 7, 20], dims, p=[0.04, 0.1, 0.06, 0.25, 0.1, 0.2, 0.25])
        array = (generator.random(shape) * 300 - 10).astype(dtypes[i % len(dtypes)])
        try:
            given = torch.from_numpy(array) if i % 3 == 0 else array
            got = processor(given, do_convert_rgb=bool(i % 2), image_mean=0.5, image_std=0.5)
        except ValueError as error:
            assert '\n' not in str(error) and str(error).startswith('images'), error
            seen[False] += 1
        else:
            assert got.pixel_values.shape[2:] == (32, 32) and got.pixel_values.isfinite().all()
            seen[True] += 1
    assert min(seen.values()) > 50, seen
