"""Loading of images and labels for training that stops at a file it cannot use, or goes on without it, and names it.

What mmcv 2.1.0 and mmsegmentation 1.2.2 do with such files: a cut JPEG is half an image under OpenCV 4; 16 bit labels
are taken modulo 256; a label that is not turned as its image is, or has another size, is cropped at the wrong place or
ends the run in `torch.stack`; empty and very long images end it inside OpenCV. Few of their messages say which file.

For training pipelines: mmsegmentation's inference looks for the stock names in those of testing.
"""

import io
from collections.abc import Callable
from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.registry import TRANSFORMS
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from ..skipped_files import DataFileError, LeftOut, check_on_error

__all__ = ['BEiTLoadAnnotations', 'BEiTLoadImageFromFile', 'DataFileError']

IGNORED = 255  # mmsegmentation's label of the pixels that do not count
MIN_SIDE = 2  # pixels; mmsegmentation drops a side of one pixel from the label
TRIES = 1000  # at another image, before a training ends; mmengine's number
MAX_ASPECT = 100  # longer images lose their short side to rounding when they are resized


class _OnError:
    """What a loading transform does about a file that it cannot use: `raise` stops, `skip` takes another image."""

    def __init__(self, on_error: str, what: str) -> None:
        check_on_error(on_error)
        self.on_error = on_error
        self._left_out = LeftOut(what) if on_error == 'skip' else None
        self._failed_in_a_row = 0

    @property
    def left_out(self) -> dict[str, str]:
        """Files left out so far by all workers of this process's data loader, and why."""
        return {} if self._left_out is None else self._left_out.files()

    def _guarded(self, load: Callable[[dict[str, Any]], None], results: dict[str, Any], path: str) -> Any:
        """`results` after `load`; None for another image instead."""
        try:
            load(results)
        except DataFileError as error:
            if self._left_out is None:
                raise
            self._left_out.add(path, str(error))
            self._failed_in_a_row += 1
            if self._failed_in_a_row == TRIES:
                raise DataFileError(
                    f'none of {TRIES} {self._left_out.what}s in a row can be used; of the last one, {error}; check the '
                    'disk'
                ) from error
            return None
        self._failed_in_a_row = 0
        return results


@TRANSFORMS.register_module()
class BEiTLoadImageFromFile(_OnError, LoadImageFromFile):
    """mmcv's `LoadImageFromFile`, which refuses cut images, images of one row or column, and endless ones.

    Grey images, alpha channels and 16 bits per channel become 8 bit BGR, turned by their EXIF data, as in mmcv.

    Args:
        to_float32, color_type, imdecode_backend, backend_args: as `LoadImageFromFile`;
            `color_type='color_ignore_orientation'` where labels were drawn on images that were not turned.
        on_error: 'raise' stops the training with one sentence that names the file; 'skip' takes another image, at
            random, and logs each such file once.

    Raises:
        DataFileError: a file that is missing, damaged, below 2 x 2 pixels, or over 100 times longer than wide; from
            'skip', `TRIES` of them in a row.
        ValueError: another `on_error`.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = 'color',
        imdecode_backend: str = 'cv2',
        *,
        backend_args: dict[str, Any] | None = None,
        on_error: str = 'raise',
    ) -> None:
        _OnError.__init__(self, on_error, 'image')
        LoadImageFromFile.__init__(self, to_float32, color_type, imdecode_backend, backend_args=backend_args)

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Adds `img` (H, W, 3), `img_shape` and `ori_shape` to results with `img_path`; None for another image."""
        return self._guarded(self._load, results, results['img_path'])

    def _load(self, results: dict[str, Any]) -> None:
        path = results['img_path']
        try:
            content = fileio.get(path, backend_args=self.backend_args)
            if not content:
                raise ValueError('it is empty')
            _read_to_the_end(content)
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
        except Exception as error:  # each decoder has its own
            raise _unreadable(path, 'an image', error) from error
        if image is None:  # OpenCV's way to say no
            raise DataFileError(f'{path} cannot be read as an image: it is damaged, or of an unknown format')
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        height, width = results['ori_shape']
        if min(height, width) < MIN_SIDE:
            raise DataFileError(
                f'{path} is {width} x {height} pixels, expected at least {MIN_SIDE} x {MIN_SIDE}: enlarge or remove it'
            )
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise DataFileError(
                f'{path} is {width} x {height} pixels, and one side is over {MAX_ASPECT} times the other: cut it up'
            )


@TRANSFORMS.register_module()
class BEiTLoadAnnotations(_OnError, LoadAnnotations):
    """mmsegmentation's `LoadAnnotations`, which refuses labels that cannot be those of the image.

    Args:
        num_classes: refuse other values than 0 to `num_classes` - 1 and 255, after `reduce_zero_label`; None leaves
            that to the decode head, which can only stop.
        on_error: as `BEiTLoadImageFromFile`.
        kwargs: as `LoadAnnotations`.

    Raises:
        DataFileError: a file that is missing or damaged, in colour, of another size than the image, or with values
            that are no class.
        ValueError: another `on_error`.
    """

    def __init__(self, *, num_classes: int | None = None, on_error: str = 'raise', **kwargs: Any) -> None:
        _OnError.__init__(self, on_error, 'label')
        LoadAnnotations.__init__(self, **kwargs)
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Adds `gt_seg_map` (H, W) to results with `seg_map_path` and `ori_shape`; None for another image."""
        return self._guarded(self._load_seg_map, results, results['seg_map_path'])

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results['seg_map_path']
        try:
            self._check_channels(path)
            super()._load_seg_map(results)
        except DataFileError:
            raise
        except Exception as error:  # each decoder has its own
            raise _unreadable(path, 'a label image', error) from error
        label, size = results['gt_seg_map'], tuple(results['ori_shape'])
        if label.shape != size:
            turned = (
                "; if the image is turned by its EXIF data, color_type='color_ignore_orientation' of "
                'BEiTLoadImageFromFile reads it as it is stored'
            )
            raise DataFileError(
                f'{path} is {" x ".join(map(str, label.shape[::-1]))} pixels, but its image {results["img_path"]} is '
                f'{size[1]} x {size[0]}: they must have one size{turned if label.shape == size[::-1] else ""}'
            )
        if self.num_classes is not None:
            found = np.flatnonzero(np.bincount(label.ravel(), minlength=IGNORED + 1))
            wrong = found[(found >= self.num_classes) & (found != IGNORED)].tolist()
            if wrong:
                listed = ', '.join(map(str, wrong[:8])) + (', …' if len(wrong) > 8 else '')
                lowered = ', one below those in the file (reduce_zero_label)' if self.reduce_zero_label else ''
                raise DataFileError(
                    f'{path} has the labels {listed}{lowered}, but there are only the {self.num_classes} classes 0 to '
                    f'{self.num_classes - 1}, and {IGNORED} is ignored'
                )

    def _check_channels(self, path: str) -> None:
        """Refuses what mmsegmentation, which makes every label 8 bit, would change without a word."""
        with Image.open(io.BytesIO(fileio.get(path, backend_args=self.backend_args))) as file:
            if file.mode in ('1', 'L', 'P'):
                return
            if len(file.getbands()) > 1:
                raise DataFileError(f'{path} is in colour ({file.mode}): labels have one channel of class numbers')
            label = np.asarray(file)
        if label.dtype.kind == 'f':
            raise DataFileError(f'{path} holds {label.dtype} values: labels are integer class numbers')
        outside = label[(label < 0) | (label > IGNORED)]
        if outside.size:
            raise DataFileError(
                f'{path} has the label {outside[0]}: labels are 0 to {IGNORED - 1}, and {IGNORED} is ignored'
            )


def _unreadable(path: str, what: str, error: Exception) -> DataFileError:
    if isinstance(error, FileNotFoundError):
        return DataFileError(f'{path} does not exist')
    reason = ' '.join(str(error).split()).replace(path, 'the file') or type(error).__name__
    return DataFileError(f'{path} cannot be read as {what}: {reason}')


def _read_to_the_end(content: bytes) -> None:
    """Raises OSError for a JPEG that is cut: of all formats the one that OpenCV, up to 4, completes by itself."""
    if content.startswith(b'\xff\xd8'):
        with Image.open(io.BytesIO(content)) as file:
            file.draft('L', (1, 1))  # at an eighth of its size: every byte is read, in less time than OpenCV takes
            file.load()
