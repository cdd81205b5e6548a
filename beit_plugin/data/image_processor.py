"""Images in any form to the tensors of a model, and its logits to class maps: what transformers' BEiT processors do.

With equal options backend 'torch' has the bits of `BeitImageProcessor` in transformers 5.24 on torchvision, backend
'pil' those of its `BeitImageProcessorPil`, of timm's transforms and of mmsegmentation's pipeline with Pillow (but for
the last bits of float32). Between the two lies one grey level here and there; more where a filter overshoots black or
white, for Pillow may begin with the other axis, and each pass is cut. On purpose different here:

- the defaults, see `image_options`;
- class numbers of label maps are never mixed: the nearest pixel counts (transformers takes the filter of the image, so
  that between the classes 1 and 149 lies class 75), and beyond the border of a label map lies 255 (there class 0);
- every image becomes RGB unless told otherwise (there only when told), images of 16 bits too, and all Pillow images
  are turned by their EXIF data (there only files);
- what cannot be right is refused: values that were already rescaled, layouts that cannot be told, unknown options.

The middle of an image is transformers': timm's lies one pixel further where the sides differ by 3, 7, 11, ... pixels.
Images are resized by the call of PyTorch that torchvision makes for tensors, or by Pillow; torchvision is not needed.
Legend: B batch, C channels, H W pixels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .image_processor_options import ImageOptions, resized_size
from .image_reading import Layout, check_layout, flatten, read_image, read_label

__all__ = ['BatchFeature', 'BeitFeatureExtractor', 'BeitImageProcessor']

IGNORED = 255  # the label of the pixels that do not count: semantic_loss_ignore_index of BEiT
CLASSES_AT_A_TIME = 16  # fits into caches
# PyTorch's filters by Pillow's numbers; its plain 'nearest' takes another pixel than the one below the centre
_TORCH_MODES = {0: 'nearest-exact', 2: 'bilinear', 3: 'bicubic'}


class BatchFeature(dict[str, Any]):
    """Results by name, as items and as attributes, for ``model(**features)``."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f'there is no {name!r} here, only {", ".join(self)}')
        return self[name]

    @property
    def data(self) -> 'BatchFeature':
        """The results themselves: transformers keeps them in an attribute of this name."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> 'BatchFeature':
        """Moves the tensors in place and returns itself; arguments as ``torch.Tensor.to``.

        A dtype applies to floating-point tensors only; other values stay unchanged.
        """
        first = args[0] if args else kwargs.get('device')
        device = None if isinstance(first, torch.dtype) else first

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(moved, value))
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            return value.to(device, non_blocking=kwargs.get('non_blocking', False))

        self.update({name: moved(value) for name, value in self.items()})
        return self


BeitImageProcessorKwargs = TypedDict(
    'BeitImageProcessorKwargs',
    {field.name: field.type for field in fields(ImageOptions)}  # type: ignore
    | dict(input_data_format=str, data_format=str, device=str, return_tensors=str, disable_grouping=bool),
    total=False,
)


class BeitImageProcessor(ImageOptions):
    """Images and label maps to tensors. Options as ``ImageOptions``; each can be another one for one call.

    Attributes:
        valid_kwargs: the options of a call by name, with their types, which transformers' processors ask for.
    """

    valid_kwargs = BeitImageProcessorKwargs

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: Literal['pt', 'np', 'jax'] | None = 'pt',
        input_data_format: Layout | None = None,
        data_format: Layout = 'channels_first',
        device: str | torch.device | int | None = None,
        disable_grouping: bool | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Makes the input of a model, and its labels.

        Args:
            images: file names, Pillow images, arrays or tensors; one, a list, or a batch in an array.
            segmentation_maps: as many label maps, in the same forms, each of the size of its image.
            return_tensors: 'pt' for PyTorch, 'np' for NumPy, 'jax' for JAX where it is installed; None for a list with
                a tensor for each image, which may be of different sizes.
            input_data_format: layout of arrays; by default told by their shapes. 'none' is (H, W).
            data_format: layout of the results; 'none' is (B, H, W), for images of one channel.
            device: where the resulting tensors go; they are made on the CPU. Arrays stay there.
            disable_grouping: has no effect. transformers resizes images of one size together, here each is alone.
            overrides: options for this call.

        Returns:
            ``pixel_values`` (B, C, H, W), float32, or uint8 where values stay as they are; with label maps ``labels``
            (B, H, W), int64 (int32 in JAX), too. In memory of their own.

        Raises:
            ValueError: see ``read_image`` and ``read_label``; an unknown option or value; no image; more or fewer label
                maps than images, or of other sizes; results of different sizes in one batch.
            ImportError: no JAX.
        """
        options = self.with_options(overrides)
        check_layout(input_data_format, 'input_data_format')
        check_layout(data_format, 'data_format')
        if return_tensors not in ('pt', 'np', 'jax', None):
            raise ValueError(f"return_tensors is {return_tensors!r}, expected 'pt', 'np', 'jax' or None: correct it")
        sizes, pixels = [], []
        for name, item in flatten(images, 'images', 2 if input_data_format == 'none' else 3):
            rescaled_by = options.rescale_factor if options.do_rescale else None
            image = read_image(item, name, input_data_format, options.do_convert_rgb, rescaled_by)
            options._check_channels(len(image), name, data_format)
            sizes.append((name, tuple(image.shape[1:])))
            pixels.append(options._fit(image, options.resample, border=0))
        if not pixels:
            raise ValueError('images is empty: give at least one image')
        found = {'pixel_values': options._values(pixels, return_tensors is not None)}
        if segmentation_maps is not None:
            labels = options._labels(segmentation_maps, sizes)
            found['labels'] = labels if return_tensors is None else torch.stack(labels)
        found['pixel_values'] = _to_layout(found['pixel_values'], data_format)
        if return_tensors in ('np', 'jax'):
            found = {name: np.asarray(x) for name, x in found.items()}
        if return_tensors == 'jax':
            jax_numpy = _import_jax_numpy()
            found = {name: jax_numpy.asarray(x) for name, x in found.items()}
        return BatchFeature(found).to(device)

    __call__ = preprocess

    @staticmethod
    def post_process_semantic_segmentation(
        outputs: Any,
        target_sizes: Iterable[Sequence[int]] | Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Makes class maps of the output of a segmentor.

        Args:
            outputs: logits (B, classes, h, w), or something that has them as ``logits``.
            target_sizes: (H, W) for each image, to which its logits are resized bilinearly; by default they stay.
            return_segmentation_scores: give the resized logits too.

        Returns:
            For each image its classes (H, W), int64; with scores a ``BatchFeature`` of these as ``segmentation`` and
            of ``segmentation_scores`` (classes, H, W).

        Raises:
            ValueError: no logits, or not one size for each image.
        """
        logits = getattr(outputs, 'logits', outputs)
        if not isinstance(logits, Tensor) or logits.ndim != 4:
            got = f'shape {tuple(logits.shape)}' if isinstance(logits, Tensor) else f'type {type(logits).__name__}'
            raise ValueError(f'got {got}, expected logits (B, classes, h, w): give the output of a segmentor')
        native = tuple(logits.shape[2:])
        given = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
        try:
            sizes = [native] * len(logits) if given is None else [tuple(map(int, size)) for size in given]
        except (TypeError, ValueError):
            sizes = []
        if len(sizes) != len(logits) or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f'target_sizes is {given}, expected (H, W) above 0 for each of the {len(logits)} images')
        found = []
        for scores, size in zip(logits, sizes, strict=True):
            if return_segmentation_scores:
                scores = _enlarge(scores, size)
                found.append(BatchFeature(segmentation=scores.argmax(0), segmentation_scores=scores))
            else:
                found.append(_classes(scores, size))
        return found

    def _check_channels(self, channels: int, name: str, data_format: Layout) -> None:
        """Before the work: whether an image fits the numbers for each channel, and the layout of the result."""
        for option in ('image_mean', 'image_std') if self.do_normalize else ():
            if (numbers := len(getattr(self, option))) not in (1, channels):
                raise ValueError(f'{name} has {channels} channels, but {option} {numbers} numbers: give one for each')
        if data_format == 'none' and channels != 1:
            raise ValueError(f"{name} has {channels} channels, but data_format='none' has room for one: name another")

    def _fit(self, image: Tensor, resample: int, border: int) -> Tensor:
        """Resizes and crops (C, H, W)."""
        if self.do_resize:
            image = _resize(image, resized_size(self.size, *image.shape[1:]), resample, self.backend)  # type: ignore
        if not self.do_center_crop:
            return image
        height, width = self.crop_size['height'], self.crop_size['width']  # type: ignore
        # halves as in transformers' variants; where the image is larger they are negative, and pad() cuts
        half = math.ceil if self.backend == 'pil' else int
        top, left = half((height - image.shape[1]) / 2), half((width - image.shape[2]) / 2)
        edges = (left, width - image.shape[2] - left, top, height - image.shape[1] - top)
        return F.pad(image, edges, value=border) if any(edges) else image

    def _values(self, pixels: list[Tensor], stack: bool) -> Tensor | list[Tensor]:
        """Rescales and normalises images (C, H, W); one tensor (B, C, H, W), or as many."""
        shapes = sorted({tuple(image.shape) for image in pixels})
        if stack and len(shapes) > 1:
            raise ValueError(
                f'the images end with the shapes {", ".join(map(str, shapes))}, which are no batch: turn on do_resize '
                'to a height and width, or do_center_crop, or take a list with return_tensors=None'
            )
        is_float = self.do_rescale or self.do_normalize or any(image.dtype != torch.uint8 for image in pixels)
        dtype = torch.float32 if is_float else torch.uint8
        if stack:  # every image is written to its place at once, which spares a pass over the memory
            results = torch.empty((len(pixels), *shapes[0]), dtype=dtype)
        else:
            results = [torch.empty(image.shape, dtype=dtype) for image in pixels]
        unit = 1 / self.rescale_factor if self.do_rescale else 1.0
        mean, std = (torch.tensor(x).view(-1, 1, 1) * unit for x in (self.image_mean, self.image_std))
        for image, result in zip(pixels, results, strict=True):
            result.copy_(image)
            if self.do_normalize:
                result.sub_(mean).div_(std)
            elif self.do_rescale:
                result.mul_(self.rescale_factor)
        return results

    def _labels(self, maps: Any, images: list[tuple[str, tuple[int, ...]]]) -> list[Tensor]:
        """Label maps (H, W) of images of these names and sizes."""
        given = list(flatten(maps, 'segmentation_maps', 2))
        if len(given) != len(images):
            raise ValueError(
                f'there are {len(images)} images, but {len(given)} segmentation_maps: give one (H, W) for each'
            )
        labels = []
        for (name, item), (image, size) in zip(given, images, strict=True):
            label = read_label(item, name)
            if label.shape != size:
                turned = ', or give np.array(image), which its EXIF data does not turn'
                raise ValueError(
                    f'{name} is {label.shape[0]} x {label.shape[1]} pixels, but {image} {size[0]} x {size[1]}: give '
                    f'both in one size{turned if label.shape == size[::-1] else ""}'
                )
            if self.do_reduce_labels:
                if label.dtype != torch.uint8:
                    raise ValueError(f'{name} has labels outside of 0 to 255: do_reduce_labels needs 255 for ignored')
                label = (label - 1).masked_fill_(label == IGNORED, IGNORED)  # of 8 bits: 0 - 1 is 255
            labels.append(self._fit(label[None], Image.Resampling.NEAREST, border=IGNORED)[0].long())
        return labels


BeitFeatureExtractor = BeitImageProcessor  # its name in transformers up to 4.25, which code and files still have


def _resize(image: Tensor, size: tuple[int, int], resample: int, backend: str) -> Tensor:
    """(C, H, W) to (C, *size) in the same dtype; antialiased, but for nearest."""
    if tuple(image.shape[1:]) == size:
        return image
    mode = _TORCH_MODES.get(resample)
    if backend == 'torch' and mode is not None and image.dtype in (torch.uint8, torch.float32):
        return F.interpolate(image[None], size, mode=mode, antialias=mode != 'nearest-exact')[0]
    # Pillow has 8 bits in three channels; other numbers, and other channels, one at a time
    is_rgb = image.dtype == torch.uint8 and len(image) == 3
    parts = [Image.fromarray(x.numpy()) for x in ([image.permute(1, 2, 0)] if is_rgb else image)]
    resized = [torch.from_numpy(np.array(part.resize((size[1], size[0]), resample))) for part in parts]
    return resized[0].permute(2, 0, 1) if is_rgb else torch.stack(resized)


def _enlarge(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    same = tuple(scores.shape[1:]) == size
    return scores if same else F.interpolate(scores[None], size, mode='bilinear', align_corners=False)[0]


def _classes(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """``_enlarge(scores, size).argmax(0)`` by a few classes at a time: all 150 of a 12 MP photograph are 7 GB."""
    best, number = _enlarge(scores[:CLASSES_AT_A_TIME], size).max(0)
    for first in range(CLASSES_AT_A_TIME, len(scores), CLASSES_AT_A_TIME):
        value, index = _enlarge(scores[first : first + CLASSES_AT_A_TIME], size).max(0)
        wins = value > best  # of equal classes the first wins, as in argmax
        best, number = torch.where(wins, value, best), torch.where(wins, index + first, number)
    return number


def _to_layout(images: Any, layout: Layout) -> Any:
    """Images (B, C, H, W), or a list of (C, H, W), in another layout."""
    if isinstance(images, list):
        return [_to_layout(image, layout) for image in images]
    return images.squeeze(-3) if layout == 'none' else images.movedim(-3, -1) if layout == 'channels_last' else images


def _import_jax_numpy() -> Any:
    try:
        return import_module('jax.numpy')
    except ImportError as error:
        raise ImportError("return_tensors='jax' needs JAX: pip install jax, or take 'np', which it reads") from error
