"""``BEiTSegmentor``: mmsegmentation's ``EncoderDecoder``, evaluated in batches of windows and in bounded memory.

Weights, training and results are those of mmsegmentation 1.2.2 (``models/segmentors/encoder_decoder.py``,
``base.py``), which runs one window after the other and adds each to maps of all images, padded to full size; then it
enlarges all classes of an image to the original size and takes the largest.

Legend: B images, C classes, H W pixels of the network's input, h w of the logits, which may be smaller.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from mmseg.utils import OptSampleList, SampleList
from torch import Tensor

from ...models.checks import height_and_width

__all__ = ['BEiTSegmentor', 'InferenceCfg']

SLICE = 2**23  # elements of the classes that are resized together: 32 MiB in float32
SLICES = 8  # of labels alone, so that even the classes of a small image are never together at its original size
WINDOW_PIXELS = 8 * 640 * 640  # of the windows that the network sees at once: BEiT's 640 pixels keep a GPU busy by 8


@dataclass(frozen=True)
class InferenceCfg:
    """What `test_cfg` of `BEiTSegmentor` may say.

    Args:
        mode: `whole` runs the network on the image as it is, `slide` on windows, whose logits are averaged.
        crop_size: of a window, (H, W) or one number, pixels; an image that is smaller makes a smaller window.
        stride: from one window to the next, likewise; the last one ends with the image.
        window_batch: windows, of all images and views, that the network sees at once; None for as many as have the
            pixels of 8 windows of 640 x 640.
        accumulate_on: where the sum of the windows and the kept logits are: `device`, or `host` for the memory of the
            CPU, if those of one image are too large for the GPU.
        keep_logits: put the logits of all classes at the original size into the results; False for labels alone. For
            test-time augmentation `SegTTAModel` needs them, `BEiTSegTTAModel` does not.
        pad_small: fill images that are smaller than a window up to its size with the preprocessor's `pad_val`, below
            and on the right, for networks of fixed size. That is mmsegmentation's result with
            `data_preprocessor=dict(test_cfg=dict(size=crop_size))`; other networks see no padding by default.

    Raises:
        ValueError: a value that is none of these, a window that is not given, or a stride that leaves pixels unseen.
    """

    mode: str = 'whole'
    crop_size: Any = None
    stride: Any = None
    window_batch: int | None = None
    accumulate_on: str = 'device'
    keep_logits: bool = True
    pad_small: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (('mode', ('whole', 'slide')), ('accumulate_on', ('device', 'host'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'test_cfg has {name}={getattr(self, name)!r}, expected {" or ".join(allowed)}')
        for name in ('keep_logits', 'pad_small'):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f'test_cfg has {name}={getattr(self, name)!r}, expected True or False')
        number = 1 if self.window_batch is None else self.window_batch
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ValueError(f'test_cfg has window_batch={number!r}, expected a whole number above 0, or None')
        if self.mode == 'whole':  # a config that changed the mode of its base has the other values still
            return
        for name in ('crop_size', 'stride'):
            if getattr(self, name) is None:
                raise ValueError(f"test_cfg has mode='slide' but no {name}: give it as (H, W) in pixels")
            object.__setattr__(self, name, height_and_width(f'test_cfg.{name}', getattr(self, name)))
        if any(stride > crop for stride, crop in zip(self.stride, self.crop_size, strict=True)):
            raise ValueError(
                f'test_cfg has stride={self.stride} and crop_size={self.crop_size}: windows that are further apart '
                'than they are large leave pixels unseen, so lower the stride to the crop size or less'
            )

    @classmethod
    def read(cls, test_cfg: Mapping[str, Any] | None) -> 'InferenceCfg':
        """The values of a `test_cfg`, checked.

        Raises:
            ValueError: an unknown key; see also the class.
        """
        test_cfg = test_cfg or {}
        known = [field.name for field in fields(cls)]
        unknown = [key for key in test_cfg if key not in known]
        if unknown:
            raise ValueError(f'test_cfg has {", ".join(map(repr, unknown))}, expected {", ".join(known)} only')
        return cls(**test_cfg)


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """First pixels of the windows along an axis; the last window is moved back until it ends with the image."""
    last = max(size - crop, 0)
    return [min(i * stride, last) for i in range(-(-last // stride) + 1)]


class _Cut(NamedTuple):
    """A batch of images of one size, cut into windows."""

    inputs: Tensor  # (B, channels, height, width), filled up where `pad_small` asks for it
    metas: list[dict[str, Any]]
    shape: torch.Size  # H, W, as they came
    size: torch.Size  # of a window
    places: list[tuple[slice, slice]]

    def count(self, device: torch.device) -> Tensor:
        """How many windows see each pixel (height, width)."""
        count = self.inputs.new_zeros(self.inputs.shape[2:], device=device)
        for rows, columns in self.places:
            count[rows, columns] += 1
        return count


def _cut(inputs: Tensor, metas: list[dict[str, Any]], cfg: InferenceCfg, pad_val: float) -> _Cut:
    shape, (crop_h, crop_w) = inputs.shape[2:], cfg.crop_size
    if cfg.pad_small:
        padding = (0, max(crop_w - shape[1], 0), 0, max(crop_h - shape[0], 0))
        inputs = F.pad(inputs, padding, value=pad_val)
    height, width = inputs.shape[2:]
    size = torch.Size((min(crop_h, height), min(crop_w, width)))
    tops, lefts = window_starts(height, crop_h, cfg.stride[0]), window_starts(width, crop_w, cfg.stride[1])
    places = [(slice(y, y + size[0]), slice(x, x + size[1])) for y in tops for x in lefts]
    return _Cut(inputs, metas, shape, size, places)


def _metas(inputs: Tensor, samples: OptSampleList) -> list[dict[str, Any]]:
    if samples is not None:
        return [sample.metainfo for sample in samples]
    size = inputs.shape[2:]
    return [{'ori_shape': size, 'img_shape': size, 'pad_shape': size, 'padding_size': [0] * 4}] * len(inputs)


@MODELS.register_module()
class BEiTSegmentor(EncoderDecoder):
    """Encoder, neck and heads, of mmsegmentation or of this package, with a lean evaluation.

    Args:
        args, kwargs: as `EncoderDecoder`; `test_cfg` may have what `InferenceCfg` lists.

    Raises:
        ValueError: see `InferenceCfg`; the `test_cfg` is read again in each evaluation, for it may be changed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        InferenceCfg.read(self.test_cfg)
        # what is inherited reads attributes of a ConfigDict
        self.test_cfg = ConfigDict({'mode': 'whole', **(self.test_cfg or {})})

    def predict(self, inputs: Tensor, data_samples: OptSampleList = None) -> SampleList:
        """Segments images.

        Args:
            inputs: (B, channels, H, W), as the preprocessor makes them.
            data_samples: one for each image, which the results are put into; None for new ones, whose results have
                the size of the inputs.

        Returns:
            The samples with `pred_sem_seg` (1, height, width) at the original size: int64 class numbers; for one output
            channel 0 or 1 in the dtype of the logits. With `keep_logits` also `seg_logits` (C, height, width).

        Raises:
            ValueError: see `InferenceCfg`; an image flipped in an unknown direction.
        """
        return list(self.predictions([(inputs, data_samples)]))

    def predictions(
        self, batches: Sequence[tuple[Tensor, OptSampleList]], keep_logits: bool | None = None
    ) -> Iterator[SegDataSample]:
        """The results of `predict` one after the other, each before the windows of the next are added up.

        Args:
            batches: arguments of `predict`; windows of all of them share batches.
            keep_logits: instead of that of the `test_cfg`.
        """
        cfg = InferenceCfg.read(self.test_cfg)
        if keep_logits is not None:
            cfg = replace(cfg, keep_logits=keep_logits)
        given = [(inputs, _metas(inputs, samples)) for inputs, samples in batches]
        if cfg.mode == 'slide':
            logits = self._slide([_cut(inputs, metas, cfg, self._pad_val) for inputs, metas in given], cfg)
        else:
            logits = (image for inputs, metas in given for image in self._network(inputs, metas))
        for inputs, samples in batches:
            for sample in [None] * len(inputs) if samples is None else samples:
                yield self._result(next(logits), inputs.shape[2:], cfg, inputs.device, sample)  # C, h, w

    def postprocess_result(self, seg_logits: Tensor, data_samples: OptSampleList = None) -> SampleList:
        """Logits (B, C, H, W) at the size of the network's input to the results of `predict`."""
        cfg = InferenceCfg.read(self.test_cfg)
        samples: Sequence[SegDataSample | None] = data_samples or [None] * len(seg_logits)
        return [
            self._result(image, seg_logits.shape[2:], cfg, seg_logits.device, sample)
            for image, sample in zip(seg_logits, samples, strict=True)
        ]

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """The averaged logits (B, C, H, W) of all images at once, which `predict` does without."""
        cfg = replace(InferenceCfg.read(self.test_cfg), mode='slide')
        cut = _cut(inputs, batch_img_metas, cfg, self._pad_val)
        return torch.stack([logits.clone() for logits in self._slide([cut], cfg)])

    @property
    def _pad_val(self) -> float:
        return getattr(self.data_preprocessor, 'pad_val', 0)

    def _network(self, inputs: Tensor, metas: list[dict[str, Any]]) -> Tensor:
        """Logits (B, C, h, w) as the head makes them, so that they can be enlarged in parts; or those of `predict`."""
        own = (
            (self.encode_decode, EncoderDecoder.encode_decode),
            (self.decode_head.predict, BaseDecodeHead.predict),
            (self.decode_head.predict_by_feat, BaseDecodeHead.predict_by_feat),
        )
        if any(getattr(method, '__func__', None) is not stock for method, stock in own):
            return self.encode_decode(inputs, metas)  # more happens there than that the logits are enlarged
        # class by class in memory, as they are enlarged, added up and compared; what enters is small
        return self.decode_head.forward(self.extract_feat(inputs)).contiguous()

    def _slide(self, cuts: Sequence[_Cut], cfg: InferenceCfg) -> Iterator[Tensor]:
        """The averaged logits (C, H, W) of each image; the next image's may be written into the same memory."""
        total = count = torch.empty(0)  # of the image that is added up
        windows = [(cut, i, place) for cut in cuts for i in range(len(cut.inputs)) for place in cut.places]
        for size, alike in groupby(windows, lambda window: window[0].size):
            together = list(alike)
            number = cfg.window_batch or max(1, WINDOW_PIXELS // math.prod(size))
            for first in range(0, len(together), number):
                batch = together[first : first + number]
                crops = torch.stack([cut.inputs[i, :, rows, columns] for cut, i, (rows, columns) in batch])
                # heads tell a window by the type of its size
                logits = self._network(crops, [{**cut.metas[i], 'img_shape': size} for cut, i, _ in batch])
                for (cut, _, place), window in zip(batch, logits, strict=True):
                    if place == cut.places[0]:
                        shape = (len(window), *cut.inputs.shape[2:])
                        memory = torch.device('cpu') if cfg.accumulate_on == 'host' else window.device
                        if total.shape != shape:
                            total, count = cut.inputs.new_zeros(shape, device=memory), cut.count(memory)
                        else:
                            total.zero_()
                    rows, columns = place
                    total[:, rows, columns] += self._resize(window, size).to(total.device)
                    if place == cut.places[-1]:
                        H, W = cut.shape
                        yield total.div_(count)[:, :H, :W]

    def _result(
        self, logits: Tensor, size: torch.Size, cfg: InferenceCfg, device: torch.device, sample: SegDataSample | None
    ) -> SegDataSample:
        """Puts the labels of one image, and its logits if they are wanted, into its sample.

        The classes are resized a few at a time, and the largest so far is remembered with its number. Each is computed
        as if all were resized together, but that on CPUs PyTorch rounds by the number of classes, in the last bit.

        Args:
            logits: (C, h, w).
            size: (H, W), what the head's logits are enlarged to first.
            cfg: asks for the logits, and says where they are kept.
            device: where the labels are made.
            sample: says how the image became the input; None for a new one.
        """
        meta = {} if sample is None else sample.metainfo
        sample = SegDataSample() if sample is None else sample
        classes = len(logits)
        pixels = max(math.prod(size), math.prod(meta.get('ori_shape', size)))
        step = max(1, min(classes if cfg.keep_logits else -(-classes // SLICES), SLICE // pixels))
        memory = torch.device('cpu') if cfg.accumulate_on == 'host' else device
        kept = best = label = None
        for first in range(0, classes, step):
            part = self._resize(logits[first : first + step].to(device), size)
            part = self._to_original(part, meta) if meta else part
            if classes == 1:
                part = part.sigmoid()
                label = (part > self.decode_head.threshold).to(part)
            else:
                value, number = part.max(0, keepdim=True)
                number = number + first
                if best is not None and label is not None:
                    wins = value > best  # of equal classes the first wins, as in argmax
                    value, number = torch.where(wins, value, best), torch.where(wins, number, label)
                best, label = value, number
            if cfg.keep_logits:
                if kept is None:
                    kept = part.new_empty((classes, *part.shape[1:]), device=memory)
                kept[first : first + step] = part
        found = {} if kept is None else {'seg_logits': PixelData(data=kept)}
        sample.set_data({**found, 'pred_sem_seg': PixelData(data=label)})
        return sample

    def _to_original(self, logits: Tensor, meta: Mapping[str, Any]) -> Tensor:
        """Logits (C, H, W) of an input to those of its image: without padding, flipped back, at the original size."""
        left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
        logits = logits[:, top : logits.shape[1] - bottom, left : logits.shape[2] - right]
        if meta.get('flip'):
            direction = meta.get('flip_direction')
            if direction not in ('horizontal', 'vertical'):
                raise ValueError(
                    f'the image is flipped in the direction {direction!r}, expected horizontal or vertical: '
                    'leave other directions out of the test pipeline'
                )
            logits = logits.flip(2 if direction == 'horizontal' else 1)
        return self._resize(logits, meta['ori_shape'])

    def _resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Bilinear, (C, h, w) to (C, *size)."""
        if tuple(logits.shape[1:]) == tuple(size):
            return logits
        return F.interpolate(logits[None], tuple(size), mode='bilinear', align_corners=self.align_corners)[0]
