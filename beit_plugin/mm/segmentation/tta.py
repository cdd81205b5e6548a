"""``BEiTSegTTAModel``: mmsegmentation's ``SegTTAModel`` with one pass of the network for all views of one size.

Test-time augmentation shows the network the image at several scales, as it is and mirrored. mmsegmentation 1.2.2
(``models/segmentors/seg_tta.py``) runs view after view and keeps all classes of every view at the original size until
the last; here the views of a scale are one batch, the windows of all scales share batches, and each view is added up
and forgotten.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors import SegTTAModel
from mmseg.utils import SampleList
from torch import Tensor

from .segmentor import BEiTSegmentor

__all__ = ['BEiTSegTTAModel']


@MODELS.register_module()
class BEiTSegTTAModel(SegTTAModel):
    """The labels of the probabilities, averaged over the views; arguments and results of mmsegmentation's class.

    Difference: for one output channel mmsegmentation takes the sigmoid twice, so that nearly every pixel is above the
    threshold; here once.
    """

    module: Any

    def test_step(self, data: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]]) -> SampleList:
        """Segments a batch.

        Args:
            data: `inputs` and `data_samples` by name or in this order, with one entry for each view: a list with one
                for each image, or for `inputs` a tensor (images, channels, height, width) as `default_collate` does.

        Returns:
            For each image the sample of its last view, with `pred_sem_seg` (1, height, width) of all views, and the
            path and the labels of the first; `seg_logits`, unless the `test_cfg` of a `BEiTSegmentor` does without,
            are those of the last view, as in mmsegmentation.
        """
        if not isinstance(data, Mapping):
            data = dict(zip(('inputs', 'data_samples'), data, strict=True))
        samples, means = self._average(data)
        keep_logits = (self.module.test_cfg or {}).get('keep_logits', True)
        for sample, mean, first in zip(samples, means, data['data_samples'][0], strict=True):
            if len(mean) == 1:
                label = (mean > self.module.decode_head.threshold).to(mean)
            else:
                label = mean.argmax(0, keepdim=True)
            sample.set_data({'pred_sem_seg': PixelData(data=label)})
            if 'gt_sem_seg' in first:
                sample.set_data({'gt_sem_seg': first.gt_sem_seg.to(label.device)})
            if 'img_path' in first:
                sample.set_metainfo({'img_path': first.img_path})
            if not keep_logits:
                del sample.seg_logits
        return samples

    def _average(self, data: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[Tensor]]:
        """Each image's sample of the last view, and the mean probabilities (C, height, width) of its views."""
        inputs, data_samples = data['inputs'], data['data_samples']
        views, images = len(inputs), len(inputs[0])
        passes: dict[tuple[torch.Size, ...], list[int]] = {}
        for view in range(views):
            passes.setdefault(tuple(image.shape for image in inputs[view]), []).append(view)
        batches = [
            {
                'inputs': _join([inputs[view] for view in together]),
                'data_samples': [sample for view in together for sample in data_samples[view]],
            }
            for together in passes.values()
        ]
        places = [(view, image) for together in passes.values() for view in together for image in range(images)]
        last: list[Any] = [None] * images
        totals: list[Tensor | None] = [None] * images
        for (view, image), sample in zip(places, self._results(batches), strict=True):
            totals[image] = _add_probabilities(totals[image], sample.seg_logits.data)
            if view == views - 1:
                last[image] = sample
            else:
                del sample.seg_logits  # the batch holds its samples to the end
        return last, [total / views for total in totals if total is not None]

    def _results(self, batches: Sequence[dict[str, Any]]) -> Iterator[Any]:
        """Samples with logits; those of `BEiTSegmentor` one after the other."""
        if not isinstance(self.module, BEiTSegmentor):
            return chain.from_iterable(map(self.module.test_step, batches))
        ready = [self.module.data_preprocessor(batch, False) for batch in batches]
        return self.module.predictions([(one['inputs'], one['data_samples']) for one in ready], keep_logits=True)


def _join(views: list[Any]) -> Any:
    """The images of several views; tensors stay one, since mmengine's `BaseDataPreprocessor` does not stack lists."""
    return torch.cat(views) if isinstance(views[0], Tensor) else list(chain.from_iterable(views))


def _add_probabilities(total: Tensor | None, logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # one channel has been through its sigmoid already
    probabilities = logits.softmax(0, dtype=dtype) if len(logits) > 1 else logits.to(dtype)
    return probabilities if total is None else total.add_(probabilities)
