"""The options of the image processor: their defaults, what they may be, and `preprocessor_config.json`.

Names, forms of sizes and the file are those of `BeitImageProcessor` in transformers 5.24; the defaults are those of its
documentation up to 4.57 (256 px, then the central 224 px). Since 5.0 it resizes to 224 px at once.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from PIL import Image

__all__ = ['CONFIG_NAME', 'ImageOptions', 'resized_size']

Backend = Literal['torch', 'pil']
Size = int | Sequence[int] | Mapping[str, int]
Options = TypeVar('Options', bound='ImageOptions')
CONFIG_NAME = 'preprocessor_config.json'
_LONGEST = 1 << 14  # pixels of a side: 16384 x 16384 RGB images take 3 GiB as float32
_HUB_ID = re.compile(r'[\w.-]+/(?!.*\.json$)[\w.-]+')
_SQUARE = ({'height', 'width'},)
_SIZES = (*_SQUARE, {'shortest_edge'}, {'shortest_edge', 'longest_edge'}, {'max_height', 'max_width'})
# what files of transformers hold beside our options: names, which mean nothing here, and what has one value for BEiT
_NAMES = ('image_processor_type', 'feature_extractor_type', 'processor_class', 'auto_map', '_valid_processor_keys')
_FIXED = {'default_to_square': True, 'data_format': 'channels_first', 'do_pad': False}
# where None is False; in do_convert_rgb, null in many files, it says nothing
_SWITCHES = ('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize', 'do_reduce_labels')
_CLASSES = ('BeitImageProcessor', 'BeitImageProcessorFast', 'BeitImageProcessorPil', 'BeitFeatureExtractor')


@dataclass(kw_only=True)
class ImageOptions:
    """What is done to an image.

    None stands for the default, except in `do_resize`, `do_center_crop`, `do_rescale`, `do_normalize` and
    `do_reduce_labels`, where it means False and stays None, as in transformers.

    Args:
        do_resize: resize to ``size`` with ``resample``.
        size: pixels: ``{'height', 'width'}``, or an int for a square, or (H, W); keeping the aspect,
            ``{'shortest_edge'}``, with ``'longest_edge'`` as its limit or without, or ``{'max_height', 'max_width'}``.
        resample: a filter by Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        do_center_crop: cut ``crop_size`` from the middle; smaller images get a black border.
        crop_size: pixels, in the first three forms of ``size``.
        do_rescale: multiply by ``rescale_factor``.
        rescale_factor: above 0.
        do_normalize: subtract ``image_mean`` and divide by ``image_std``.
        image_mean, image_std: a number, or one for each channel, of rescaled images.
        do_reduce_labels: 0 becomes 255 (ignored), 255 stays, others become one less: ADE20K, where 0 is no class.
        do_convert_rgb: make RGB of every image; False keeps the channels, for models of other channels.
        backend: 'torch' for speed; 'pil' for the bits of Pillow, one grey level away here and there. Filters that
            PyTorch does not have always go through Pillow.

    Raises:
        ValueError: a value that an option cannot have.
    """

    do_resize: bool | None = True
    size: Size = 256
    resample: int = 3
    do_center_crop: bool | None = True
    crop_size: Size = 224
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5)
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5)
    do_reduce_labels: bool | None = False
    do_convert_rgb: bool = True
    backend: Backend = 'torch'

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name not in _SWITCHES:
                setattr(self, field.name, field.default)
            elif field.name.startswith('do_') and not isinstance(value, bool | None):
                raise _wrong(field.name, value, 'True or False')
        self.size = _size(self.size, 'size', _SIZES)
        self.crop_size = _size(self.crop_size, 'crop_size', _SQUARE)
        filters = sorted(int(filter) for filter in Image.Resampling)
        if isinstance(self.resample, bool) or self.resample not in filters:
            raise _wrong('resample', self.resample, f"the number of a filter of Pillow's, {filters}")
        self.resample = int(self.resample)  # of an enum, which is no JSON
        if not _is_number(self.rescale_factor) or self.rescale_factor <= 0:
            raise _wrong('rescale_factor', self.rescale_factor, 'a number above 0')
        self.image_mean = _numbers(self.image_mean, 'image_mean')
        self.image_std = _numbers(self.image_std, 'image_std')
        if min(self.image_std) <= 0:
            raise _wrong('image_std', self.image_std, 'numbers above 0')
        if self.backend not in get_args(Backend):
            raise _wrong('backend', self.backend, ' or '.join(map(repr, get_args(Backend))))

    @classmethod
    def from_pretrained(cls: type[Options], source: str | os.PathLike[str], **overrides: Any) -> Options:
        """Reads a ``preprocessor_config.json`` that transformers or ``save_pretrained`` wrote.

        Args:
            source: the file, the folder that it lies in, or a hub id (``microsoft/beit-base-patch16-224``).
            overrides: options that count more than the file's.

        Raises:
            ValueError: no such file, not to be fetched, cut off, of another model, or with options or values that we do
                not have.
        """
        path = Path(source)
        if not path.exists() and _HUB_ID.fullmatch(os.fspath(source)):
            path = _from_hub(os.fspath(source))
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f'{path} does not exist: give a {CONFIG_NAME}, the folder that it lies in, or a hub id')
        return cls.from_json_file(path).with_options(overrides)

    @classmethod
    def from_json_file(cls: type[Options], path: str | os.PathLike[str]) -> Options:
        """Reads a file as `from_pretrained` does, with its errors; its name may be any."""
        path = Path(path)
        try:
            found = json.loads(path.read_text(encoding='utf-8'))
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path} is cut off or no JSON ({error}): fetch or save it again') from error
        if not isinstance(found, dict):
            raise ValueError(f'{path} holds a {type(found).__name__}, expected options by name: fetch or save it again')
        try:
            return cls.from_dict(found)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error

    @classmethod
    def from_dict(cls: type[Options], options: Mapping[str, Any], **overrides: Any) -> Options:
        """Reads options as transformers or `to_dict` names them.

        Args:
            options: may also hold what a ``preprocessor_config.json`` has beside the options.
            overrides: options that count more.

        Raises:
            ValueError: options of another model, an unknown one, or a value that one cannot have.
        """
        read = _of_transformers(options)
        cls._check_names(read)
        return cls(**read).with_options(overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes a ``preprocessor_config.json`` that transformers reads too, and returns its path in a list."""
        path = os.path.join(folder, CONFIG_NAME)
        os.makedirs(folder, exist_ok=True)
        self.to_json_file(path)
        return [path]

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `save_pretrained` writes, under any name."""
        Path(path).write_text(self.to_json_string(), encoding='utf-8')

    def to_json_string(self) -> str:
        """What `to_json_file` writes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + '\n'

    def to_dict(self) -> dict[str, Any]:
        """The options as transformers writes them; ``backend`` says how, not what, and is not among them."""
        options = asdict(self)
        del options['backend']
        return {**options, 'image_processor_type': 'BeitImageProcessor'}

    def with_options(self: Options, changed: Mapping[str, Any]) -> Options:
        """A copy with other options; None leaves one as it is.

        Raises:
            ValueError: an unknown option, or a value that one cannot have.
        """
        self._check_names(changed)
        return replace(self, **{name: value for name, value in changed.items() if value is not None})

    @classmethod
    def _check_names(cls, options: Iterable[str]) -> None:
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                close = get_close_matches(name, names, 1)
                hint = f'did you mean {close[0]}?' if close else f'expected one of {", ".join(names)}'
                raise ValueError(f'{name} is no option of the image processor: {hint}')


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, CONFIG_NAME))
    except (OSError, ValueError) as error:  # the library's errors are of these kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f'{hub_id} is no file or folder here, and the hub did not give its {CONFIG_NAME} ({reason}): check the id'
        ) from error


def resized_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """(H, W) that ``size`` makes of an image, at least 1 x 1; rounded as transformers 5.24 does.

    (Its `get_resize_output_image_size` and `get_size_with_aspect_ratio`; without a limit also as torchvision's Resize.)
    """
    if 'height' in size:
        return size['height'], size['width']
    if 'max_height' in size:
        scale = min(size['max_height'] / height, size['max_width'] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    short, long = sorted((height, width))
    edge: float = size['shortest_edge']
    if long / short * edge > size.get('longest_edge', math.inf):
        edge = size['longest_edge'] * short / long
    if round(edge) == short:
        return height, width
    other, edge = max(1, int(edge * long / short)), max(1, round(edge))
    return (edge, other) if height <= width else (other, edge)


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f'{name} is {reprlib.repr(value)}, expected {expected}: correct it or leave it out')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38  # as float32


def _numbers(value: Any, name: str) -> list[float]:
    values: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    if not values or not all(map(_is_number, values)):
        raise _wrong(name, value, 'a number, or one for each channel')
    return list(map(float, values))  # transformers refuses whole numbers in a file


def _size(value: Any, name: str, forms: tuple[set[str], ...]) -> dict[str, int]:
    """A size in any form, as a dict."""
    pair = (value, value) if isinstance(value, Integral) else value
    if isinstance(pair, list | tuple) and len(pair) == 2:
        pair = dict(zip(('height', 'width'), pair, strict=True))
    if not isinstance(pair, Mapping) or set(pair) not in forms:
        listed = ' or '.join(str(sorted(form)) for form in forms)
        raise _wrong(name, value, f'pixels: an int, (height, width), or a dict with {listed}')
    if not all(isinstance(x, Integral) and not isinstance(x, bool) and 0 < int(x) <= _LONGEST for x in pair.values()):
        raise _wrong(name, value, f'whole numbers of pixels from 1 to {_LONGEST}')
    return {side: int(x) for side, x in pair.items()}


def _of_transformers(found: Mapping[str, Any]) -> dict[str, Any]:
    """Our options in a file of transformers, those that have another name in older ones too."""
    kind = found.get('image_processor_type') or found.get('feature_extractor_type') or _CLASSES[0]
    if kind not in _CLASSES:
        raise ValueError(f'these are the options of {kind}, expected those of {_CLASSES[0]}: give a file of BEiT')
    options = {
        name: value for name, value in found.items() if name not in _NAMES and (value is not None or name in _SWITCHES)
    }
    for name, value in _FIXED.items():
        if options.pop(name, value) != value:
            raise _wrong(name, found[name], repr(value))
    if 'reduce_labels' in options:  # its name until transformers 4.27
        reduce_labels = options.pop('reduce_labels')
        if options.get('do_reduce_labels') is None:
            options['do_reduce_labels'] = reduce_labels
    return options
