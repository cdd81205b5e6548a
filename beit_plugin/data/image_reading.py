"""Images and label maps in the forms that people have them in, to tensors of one form.

Forms: a file, a Pillow image, a NumPy array, a tensor; alone, in (nested) lists, arrays also as a batch. Every error is
a ValueError of one sentence that begins with the place of the image, as in ``images[3]``.

Legend: B batch, C channels, H W pixels.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

__all__ = ['LAYOUTS', 'ImageBytes', 'Layout', 'check_layout', 'flatten', 'read_image', 'read_label', 'read_rgb']

Layout = Literal['channels_first', 'channels_last', 'none']
LAYOUTS: tuple[str, ...] = get_args(Layout)
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA: what a layout is guessed by
_LABEL_MODES = ('1', 'L', 'P', 'I', 'I;16', 'I;16L', 'I;16B', 'I;16N')
_FORMS = 'a file name, a Pillow image, a NumPy array or a tensor'


class ImageBytes(BytesIO):
    """The bytes of an image file that lies within another file, and what to call it in messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __repr__(self) -> str:
        return repr(self.name)  # as of a path; Pillow's messages have it


def flatten(given: Any, name: str, dims: int) -> Iterator[tuple[str, Any]]:
    """One image after the other, each with its place for the errors.

    Args:
        given: one image, a batch in an array with one dimension more, or a list of these, nested or not.
        name: of the argument.
        dims: dimensions of the array of one image.
    """
    batched = isinstance(given, np.ndarray | Tensor) and given.ndim == dims + 1
    if batched or isinstance(given, list | tuple):
        for i, item in enumerate(given):
            yield from [(f'{name}[{i}]', item)] if batched else flatten(item, f'{name}[{i}]', dims)
    else:
        yield name, given


def check_layout(layout: str | None, name: str) -> None:
    """Raises a ValueError that lists the known layouts when ``layout`` is none of them, nor None."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'{name} is {layout!r}, expected {", ".join(LAYOUTS)}: correct it or leave it out')


def read_image(item: Any, name: str, layout: Layout | None, rgb: bool, rescale_factor: float | None) -> Tensor:
    """The pixels of one image.

    EXIF data turns Pillow images and files, as in mmcv and in transformers' loading of files. 16 bits become 8 by
    dropping the lower ones, as in OpenCV, True and False 255 and 0, as in Pillow.

    Args:
        item: one image; its file may be ``ImageBytes`` too.
        name: its place, for the errors.
        layout: of arrays; None finds it by a first or last dimension of 1, 3 or 4. Two dimensions are always H and W.
        rgb: make it three channels: grey is repeated, palettes are looked up, what is transparent lies on white.
        rescale_factor: what the values will be multiplied by; None for nothing.

    Returns:
        (C, H, W), uint8, or float32 where the image had floating point values; any strides, maybe of the given memory.

    Raises:
        ValueError: not an image, unreadable, empty, a layout that cannot be told, channels that do not become RGB,
            or values outside the range of pixels.
    """
    if isinstance(item, str | os.PathLike | ImageBytes | Image.Image):
        name = _with_file(item, name)
        pixels, layout = _pillow_pixels(_open(item, name), name, rgb), 'channels_last'
    else:
        pixels = item
    tensor = _channels_first(_as_tensor(pixels, name), name, layout)
    channels, height, width = tensor.shape
    if not tensor.numel():
        raise ValueError(f'{name} is {height} x {width} pixels with {channels} channels, so there is nothing to see')
    tensor = _pixel_values(tensor, name, rescale_factor)
    if not rgb or channels == 3:
        return tensor
    if channels == 1:
        return tensor.expand(3, -1, -1)
    if channels == 4:
        white = 255 if tensor.dtype == torch.uint8 else 1.0 if rescale_factor is None else 1 / rescale_factor
        alpha = tensor[3:] / white
        on_white = tensor[:3] * alpha + white * (1 - alpha)
        return on_white.round().to(torch.uint8) if tensor.dtype == torch.uint8 else on_white
    raise ValueError(
        f'{name} has {channels} channels, expected 1, 3 or 4 to make RGB of: pass do_convert_rgb=False for other models'
    )


def read_rgb(item: Any, name: str) -> Image.Image:
    """One image as 8 bit RGB.

    Args:
        item, name: as for ``read_image``.

    Raises:
        ValueError: what ``read_image`` raises, or floating point values, whose range nothing tells.
    """
    pixels = read_image(item, name, None, rgb=True, rescale_factor=None)
    if pixels.dtype != torch.uint8:
        raise ValueError(f'{_with_file(item, name)} holds {pixels.dtype} values: save it with 8 bits a channel')
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def read_label(item: Any, name: str) -> Tensor:
    """The class numbers of one label map.

    Args:
        item: one label map: a Pillow image or file of one channel (of a palette, its indices), an array (H, W).
        name: its place, for the errors.

    Returns:
        (H, W), uint8 where all are 0 to 255, else int32; maybe of the given memory.

    Raises:
        ValueError: not a label map, unreadable, in colour, not of integers, or not of two dimensions.
    """
    if isinstance(item, str | os.PathLike | Image.Image):
        name = _with_file(item, name)
        image = _open(item, name)
        if image.mode not in _LABEL_MODES:
            raise ValueError(f'{name} is a Pillow image of mode {image.mode}: labels have one channel of class numbers')
        item = np.array(image)
    label = _as_tensor(item, name)
    if label.ndim != 2 or not label.numel():
        raise ValueError(
            f'{name} has shape {tuple(label.shape)}, expected (H, W): give one class number for each pixel'
        )
    if label.is_floating_point():
        raise ValueError(f'{name} holds {label.dtype} values: labels are class numbers, so convert it to integers')
    if label.dtype == torch.uint8:
        return label
    label = label.to(torch.int64)  # NumPy's unsigned types have no comparisons in torch
    low, high = (int(x) for x in label.aminmax())
    limits = torch.iinfo(torch.int32)
    if low < limits.min or high > limits.max:
        raise ValueError(f'{name} holds values from {low} to {high}: no class has such a number, so look at its origin')
    return label.to(torch.uint8 if low >= 0 and high <= 255 else torch.int32)


def _with_file(source: Any, name: str) -> str:
    """The place of an image, and its file if it has one."""
    if isinstance(source, str | os.PathLike | ImageBytes):
        return f'{name} {source if isinstance(source, ImageBytes) else os.fspath(source)!r}'
    return name


def _open(source: Any, name: str) -> Image.Image:
    """A Pillow image, read to its end and turned as its EXIF data say."""
    if isinstance(source, str | os.PathLike) and (Path(source).is_fifo() or Path(source).is_char_device()):
        raise ValueError(f'{name} is no regular file and may never end: give the path of an image')
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            image.load()  # a file of several frames stays open after it, hence the with
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # asked first: exif_transpose always copies
        return ImageOps.exif_transpose(image) if turned else image
    except FileNotFoundError:
        raise ValueError(f'{name} does not exist: give the path of an image') from None
    except Image.DecompressionBombError as error:
        raise ValueError(f'{name} is too large ({error}): shrink or crop it') from error
    except Exception as error:  # each decoder has its own
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'{name} cannot be read as an image ({reason}): fetch or save it again') from error


def _pillow_pixels(image: Image.Image, name: str, rgb: bool) -> np.ndarray:
    """(H, W, C), or (H, W) for one channel."""
    deep = image.mode in ('I', 'F') or image.mode.startswith('I;16')  # Pillow would clip these to 0 to 255
    if not deep and (rgb or image.mode in ('P', 'PA', '1')):
        wanted = 'L' if image.mode == '1' else 'RGBA' if image.has_transparency_data else 'RGB'
        try:
            image = image if image.mode == wanted else image.convert(wanted)
        except ValueError as error:
            raise ValueError(f'{name} is a Pillow image of mode {image.mode}: convert it to RGB ({error})') from error
    return np.array(image)


def _as_tensor(array: Any, name: str) -> Tensor:
    """A tensor on the CPU that shares the array's memory where it can."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in 'buif' or array.dtype.itemsize > 8:
            raise ValueError(f'{name} holds {array.dtype} values, expected numbers: give integers or floats')
        array = array.astype(array.dtype.newbyteorder('='), copy=False)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):  # torch warns, or refuses
            array = array.copy()
        return torch.from_numpy(array)
    if not isinstance(array, Tensor):
        raise ValueError(f'{name} is of type {type(array).__name__}, expected {_FORMS}: convert it')
    if array.is_complex():
        raise ValueError(f'{name} holds {array.dtype} values, expected numbers: give integers or floats')
    if array.is_meta:
        raise ValueError(f'{name} is on the meta device, which has no values: give a tensor with pixels')
    return array.detach().cpu()


def _channels_first(tensor: Tensor, name: str, layout: Layout | None) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim != 3 or layout == 'none':
        wanted = '(H, W)' if layout == 'none' else '(H, W), (C, H, W) or (H, W, C)'
        raise ValueError(f'{name} has shape {shape}, expected {wanted}: give single images, a list or a batch of them')
    if layout is None:
        first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
        if first == last:
            said = 'could be channels first or last' if first else 'has no dimension of 1, 3 or 4 channels'
            raise ValueError(
                f"{name} of shape {shape} {said}: pass input_data_format='channels_first' or 'channels_last'"
            )
        layout = 'channels_first' if first else 'channels_last'
    return tensor if layout == 'channels_first' else tensor.permute(2, 0, 1)


def _pixel_values(tensor: Tensor, name: str, rescale_factor: float | None) -> Tensor:
    """The same as uint8 or float32; refuses what can be no pixels."""
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.dtype == torch.uint16:
        return (tensor.to(torch.int32) >> 8).to(torch.uint8)
    if tensor.is_floating_point():
        tensor = tensor.float()
        low, high = (float(x) for x in tensor.aminmax())
        if not np.isfinite(low + high):
            raise ValueError(f'{name} has values that are not finite: replace NaN and infinity before')
        if rescale_factor is not None and rescale_factor < 1 and low >= 0 and 0 < high <= 1:
            raise ValueError(
                f'{name} has values from {low:.3g} to {high:.3g}, which would be rescaled a second time, by '
                f'{rescale_factor:.3g}: pass do_rescale=False, or pixels from 0 to 255'
            )
        return tensor
    tensor = tensor.to(torch.int64)  # NumPy's unsigned types have no comparisons in torch
    low, high = (int(x) for x in tensor.aminmax())
    if low < 0 or high > 255:
        raise ValueError(f'{name} has values from {low} to {high}, expected 0 to 255: give 16 bit images as uint16')
    return tensor.to(torch.uint8)
