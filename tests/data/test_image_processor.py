"""The image processor by itself: sizes, values, label maps, class maps."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_common import AS_IS, LABEL, PHOTO, PIL, chw, photograph, pixels, processor
from PIL import Image

from beit_plugin.data.image_processor import BatchFeature


class TestResults:
    def test_mixed_sizes_are_one_batch(self):
        images = [PIL, photograph(33, 51, 1), torch.from_numpy(chw(photograph(128, 64, 2))), PHOTO[..., 0]]
        together = processor(images).pixel_values
        assert together.shape == (4, 3, 32, 32)
        assert torch.equal(together, torch.cat([processor(x).pixel_values for x in images]))

    def test_lists_of_mixed_sizes(self):
        images, labels = [PIL, photograph(33, 51)], [LABEL, LABEL[:33, :51]]
        got = processor(images, labels, return_tensors=None, do_resize=False, do_center_crop=False)
        assert [tuple(x.shape) for x in got.pixel_values] == [(3, 60, 84), (3, 33, 51)]
        assert [tuple(x.shape) for x in got.labels] == [(60, 84), (33, 51)]

    def test_kinds_of_tensors(self):
        expected = processor(PIL, LABEL)
        got = processor(PIL, LABEL, return_tensors='np')
        assert isinstance(got.pixel_values, np.ndarray) and got.labels.dtype == np.int64
        assert np.array_equal(got.pixel_values, expected.pixel_values) and np.array_equal(got.labels, expected.labels)

    def test_jax(self, monkeypatch):
        fake = types.ModuleType('jax.numpy')
        fake.asarray = lambda x: ('jax', x)
        monkeypatch.setitem(sys.modules, 'jax', types.ModuleType('jax'))
        monkeypatch.setitem(sys.modules, 'jax.numpy', fake)
        kind, value = processor(PIL, return_tensors='jax').pixel_values
        assert kind == 'jax' and isinstance(value, np.ndarray)
        monkeypatch.setitem(sys.modules, 'jax.numpy', None)
        with pytest.raises(ImportError, match=r"^return_tensors='jax' needs JAX: pip install jax, or take 'np'"):
            processor(PIL, return_tensors='jax')

    def test_values(self):
        raw = pixels(PIL)
        assert raw.dtype == torch.uint8 and np.array_equal(raw, chw(PHOTO))
        assert torch.equal(pixels(PIL, do_rescale=True), raw * (1 / 255))
        mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([2.0, 3, 4]).view(3, 1, 1)
        got = pixels(PIL, do_normalize=True, image_mean=[10, 20, 30], image_std=(2, 3, 4))
        assert torch.equal(got, (raw - mean) / std)
        got = pixels(PIL, do_rescale=True, do_normalize=True, rescale_factor=1 / 127.5, image_mean=1, image_std=1)
        assert (got - (raw / 127.5 - 1)).abs().max() < 1e-6

    def test_memory_of_their_own(self):
        image, label = PHOTO.copy(), LABEL.copy()
        got = processor(image, label, **AS_IS, do_reduce_labels=True)
        got.pixel_values.zero_()
        got.labels.zero_()
        assert np.array_equal(image, PHOTO) and np.array_equal(label, LABEL)

    def test_feature(self):
        got = processor(PIL, LABEL).to('cpu', torch.bfloat16)
        assert got.pixel_values.dtype == torch.bfloat16 and got.labels.dtype == torch.int64
        assert got['labels'] is got.labels and list(dict(**got)) == ['pixel_values', 'labels']
        assert torch.equal(pickle.loads(pickle.dumps(got)).labels, got.labels)
        with pytest.raises(AttributeError, match="there is no 'label' here, only pixel_values, labels"):
            _ = got.label

    @pytest.mark.parametrize(
        'args, kwargs, device, dtype',
        [
            ((torch.float16,), {}, 'cpu', torch.float16),
            (('cpu', torch.bfloat16), {}, 'cpu', torch.bfloat16),
            (('meta',), {}, 'meta', torch.float32),
            ((torch.device('meta'), torch.float16), {}, 'meta', torch.float16),
            ((), dict(device='meta', dtype=torch.float64, non_blocking=True), 'meta', torch.float64),
        ],
    )
    def test_moved_and_cast_as_in_transformers(self, args, kwargs, device, dtype):
        for return_tensors in ('pt', None):
            got = processor(PIL, LABEL, return_tensors=return_tensors)
            got.update(input_ids=torch.ones(2, dtype=torch.int64), names=['a'])
            assert got.to(*args, **kwargs) is got and got.data['names'] == ['a']
            floats, numbers = (got.pixel_values, got.labels) if return_tensors else (got.pixel_values[0], got.labels[0])
            assert (floats.device.type, floats.dtype) == (device, dtype)
            assert {(x.device.type, x.dtype) for x in (numbers, got.input_ids)} == {(device, torch.int64)}

    def test_a_device_after_a_dtype_is_a_type_error(self):
        with pytest.raises(TypeError):
            processor(PIL).to(torch.bfloat16, 'cpu')

    def test_arguments_of_a_call_in_transformers(self):
        got = processor([PIL], LABEL, device='meta', disable_grouping=True)
        assert got.pixel_values.is_meta and got.labels.is_meta
        assert isinstance(processor(PIL, device='meta', return_tensors='np').pixel_values, np.ndarray)


class TestSizes:
    FORMS = (  # of a 60 x 84 image
        (32, (32, 32)),
        ((32, 48), (32, 48)),
        ({'height': 20, 'width': 100}, (20, 100)),
        ({'shortest_edge': 30}, (30, 42)),
        ({'shortest_edge': 60}, (60, 84)),
        ({'shortest_edge': 120, 'longest_edge': 126}, (90, 126)),
        ({'max_height': 30, 'max_width': 200}, (30, 42)),
    )

    @pytest.mark.parametrize('size, expected', FORMS, ids=str)
    def test_forms(self, size, expected):
        got = processor(PIL, LABEL, size=size, do_center_crop=False)
        assert (got.pixel_values.shape[2:], got.labels.shape[1:]) == (expected, expected)
        turned = processor(np.rot90(PHOTO).copy(), size=size, do_center_crop=False).pixel_values
        assert turned.shape[2:] == (expected if 'shortest_edge' not in str(size) else expected[::-1]) or 'max' in str(
            size
        )

    def test_thin_images_keep_a_pixel(self):
        for size in ({'max_height': 16, 'max_width': 16}, {'shortest_edge': 16, 'longest_edge': 16}):
            got = processor(PHOTO[:1], input_data_format='channels_last', size=size).pixel_values
            assert got.shape == (1, 3, 32, 32)

    @pytest.mark.parametrize('crop', [(40, 60), (41, 61), (70, 90), (71, 91), (40, 91), (71, 60), (60, 84)], ids=str)
    def test_center_crop(self, crop):
        got = processor(PIL, LABEL, do_resize=False, crop_size=crop, do_normalize=False, do_rescale=False)
        height, width = crop
        top, left = abs(height - 60) // 2, abs(width - 84) // 2
        for array, found, border in ((PHOTO, got.pixel_values[0].permute(1, 2, 0), 0), (LABEL, got.labels[0], 255)):
            cut = array[top : top + height] if height < 60 else array
            cut = cut[:, left : left + width] if width < 84 else cut
            expected = np.full((height, width, *array.shape[2:]), border)
            y, x = top * (height > 60), left * (width > 84)
            expected[y : y + len(cut), x : x + cut.shape[1]] = cut
            assert np.array_equal(found, expected)

    @pytest.mark.parametrize('resample', range(6))
    def test_filters_through_either_backend(self, resample):
        ours, pillow = (pixels(PIL, do_resize=True, resample=resample, backend=x).int() for x in ('torch', 'pil'))
        assert np.array_equal(pillow, chw(np.asarray(PIL.resize((48, 40), resample))))
        if resample:  # nearest: the two round in another direction where two pixels are equally near
            assert (ours - pillow).abs().max() <= 1


class TestLabels:
    def test_reduced(self):
        label = np.array([[0, 1, 2], [150, 254, 255]], np.uint8)
        for form in (label, torch.from_numpy(label).long(), Image.fromarray(label), label.astype(np.int16)):
            got = processor(
                PHOTO[:2, :3], form, **AS_IS, do_reduce_labels=True, input_data_format='channels_last'
            ).labels
            assert got.tolist() == [[[255, 0, 1], [149, 253, 255]]] and got.dtype == torch.int64

    @pytest.mark.parametrize('resample', [0, 1, 3])
    def test_no_class_is_made_up(self, resample):
        label = np.where(LABEL > 3, 149, 1).astype(np.uint8)
        got = processor(PIL, label, resample=resample, do_reduce_labels=True).labels
        assert got.unique().tolist() == [0, 148]

    def test_the_pixel_below_the_centre(self):
        label = np.arange(60 * 84).reshape(60, 84)  # more than 8 bits
        got = processor(PIL, label, size=(20, 28), do_center_crop=False).labels[0]
        assert np.array_equal(got, label[1::3, 1::3])
        assert (
            processor(PIL, LABEL, size=(20, 28), do_center_crop=False)
            .labels[0]
            .equal(torch.from_numpy(LABEL[1::3, 1::3]).long())
        )

    def test_each_beside_its_image(self):
        images, labels = [PIL, photograph(33, 51)], [LABEL, LABEL[:33, :51]]
        got = processor(images, labels)
        for i in range(2):
            alone = processor(images[i], labels[i])
            assert torch.equal(got.labels[i], alone.labels[0]) and torch.equal(
                got.pixel_values[i], alone.pixel_values[0]
            )


class TestClassMaps:
    LOGITS = torch.randn(2, 37, 9, 13, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize('targets', [[(20, 31), (5, 7)], [(9, 13), [18, 26]], torch.tensor([[9, 13], [40, 50]])])
    @pytest.mark.parametrize('form', [lambda x: x, lambda x: types.SimpleNamespace(logits=x)])
    def test_at_target_sizes(self, form, targets):
        outputs = form(self.LOGITS)
        maps = processor.post_process_semantic_segmentation(outputs, targets)
        scored = processor.post_process_semantic_segmentation(outputs, targets, return_segmentation_scores=True)
        for i, (height, width) in enumerate(map(tuple, targets)):
            size = (int(height), int(width))
            scores = F.interpolate(self.LOGITS[i : i + 1], size, mode='bilinear', align_corners=False)[0]
            assert maps[i].shape == size and maps[i].dtype == torch.int64
            assert torch.equal(maps[i], scores.argmax(0)) and torch.equal(scored[i].segmentation, maps[i])
            assert isinstance(scored[i], BatchFeature) and torch.equal(scored[i].segmentation_scores, scores)

    def test_at_their_own_size(self):
        assert torch.equal(
            torch.stack(processor.post_process_semantic_segmentation(self.LOGITS)), self.LOGITS.argmax(1)
        )

    def test_of_equal_classes_the_first_wins(self):
        assert not processor.post_process_semantic_segmentation(torch.zeros(1, 40, 4, 4), [(9, 9)])[0].any()

    @pytest.mark.parametrize(
        'outputs, targets, message',
        [
            (
                torch.zeros(2, 3, 4),
                None,
                r'got shape \(2, 3, 4\), expected logits \(B, classes, h, w\): give the output',
            ),
            ([1], None, 'got type list, expected logits'),
            (LOGITS, [(3, 4)], r'target_sizes is \[\(3, 4\)\], expected \(H, W\) above 0 for each of the 2 images'),
            (LOGITS, [(3, 4), (3, 0)], 'target_sizes is'),
            (LOGITS, [(3, 4), (3,)], 'target_sizes is'),
            (LOGITS, (3, 4), r'target_sizes is \(3, 4\), expected \(H, W\)'),
            (LOGITS, ['ab', 'cd'], 'target_sizes is'),
        ],
    )
    def test_refused(self, outputs, targets, message):
        with pytest.raises(ValueError, match=f'^{message}'):
            processor.post_process_semantic_segmentation(outputs, targets)


def test_different_sizes_are_no_batch():
    options = dict(do_resize=False, do_center_crop=False)
    with pytest.raises(
        ValueError, match=r'^the images end with the shapes \(3, 33, 51\), \(3, 60, 84\), which are no batch'
    ):
        processor([PIL, photograph(33, 51)], **options)
