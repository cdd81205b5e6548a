"""``BEiTSegDataPreProcessor``: mmsegmentation's, without a wait for the GPU for each image."""

from typing import Any

import torch
from mmengine.registry import MODELS
from mmseg.models import SegDataPreProcessor

__all__ = ['BEiTSegDataPreProcessor']


@MODELS.register_module()
class BEiTSegDataPreProcessor(SegDataPreProcessor):
    """mmsegmentation's, with its arguments and its results.

    That of mmsegmentation 1.2.2 swaps red and blue by a list of channels, which PyTorch copies to the GPU for each
    image, and waits until that has got there. ``torch.compile`` leaves this one out: images have many sizes before they
    are padded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._swaps, self.channel_conversion = self.channel_conversion, False

    @torch.compiler.disable
    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """As ``SegDataPreProcessor.forward``."""
        data = dict(self.cast_data(data))  # type: ignore[arg-type]
        images = data['inputs']
        if self._swaps and images[0].shape[0] == 3:
            data['inputs'] = [image.flip(0) for image in images]
        done = super().forward(data, training)
        if training:
            for sample in done['data_samples']:
                if 'gt_sem_seg' in sample:  # a dimension of one has any stride, for each of which it would compile
                    sample.gt_sem_seg.data = sample.gt_sem_seg.data.squeeze(0).unsqueeze(0)
        return done
