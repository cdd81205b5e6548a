"""Images without labels for mmengine's data loaders, and what their batches become on the device."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, FUNCTIONS, MODELS
from torch import Tensor

from ...data.mim_views import ImageFiles, TwoViews, mim_collate
from ..skipped_files import DataFileError, LeftOut, check_on_error

__all__ = ['BEiTImages', 'BEiTMIMDataPreprocessor']

FUNCTIONS.register_module(name='beit_mim_collate')(mim_collate)


@DATASETS.register_module()
class BEiTImages(ImageFiles):
    """Folders and lists of images, each in the views of masked image modelling.

    Args:
        data_root: one or several folders, lists or archives, see ``image_list.ImageList``.
        views: arguments of ``mim_data.TwoViews``.
        on_error: 'skip' takes another image, at random, in place of one that cannot be read, and logs each such file
            once; 'raise' stops the training with one sentence that names it.
        num_views, seed, token_cache: see ``mim_data.ImageFiles``.

    Raises:
        DataFileError: nothing there, or a cache of other images or views; from 'raise', a file that cannot be read.
        ValueError: what ``TwoViews`` raises, or another ``on_error``.
    """

    metainfo: ClassVar[dict[str, Any]] = {}  # mmengine asks for it

    def __init__(
        self,
        data_root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        views: Mapping[str, Any] | None = None,
        on_error: str = 'skip',
        num_views: int | None = None,
        seed: int | None = None,
        token_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        check_on_error(on_error)
        self._left_out = LeftOut('image') if on_error == 'skip' else None
        made = TwoViews(**(views or {}))
        try:
            on_broken = None if self._left_out is None else self._left_out.add
            super().__init__(data_root, made, on_broken, num_views, seed, token_cache)
        except ValueError as error:
            raise DataFileError(str(error)) from error

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        try:
            return super().__getitem__(index)
        except ValueError as error:
            raise DataFileError(str(error)) from error

    @property
    def left_out(self) -> dict[str, str]:
        """Files left out so far by all workers of this process's data loader, and why."""
        return {} if self._left_out is None else self._left_out.files()


@MODELS.register_module()
class BEiTMIMDataPreprocessor(BaseDataPreprocessor):
    """Batches of ``beit_mim_collate`` to what the models of ``mm.mim`` and ``mm.vqkd`` take, on their device.

    Args:
        mean, std: of the encoder's images, 0 to 255, one number a channel; v1 127.5, v2 ImageNet's.
        non_blocking: do not wait for the copy to the device; with ``pin_memory`` of the data loader.

    Raises:
        ValueError: another number of means than of deviations, or a deviation that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (127.5, 127.5, 127.5),
        std: Sequence[float] = (127.5, 127.5, 127.5),
        non_blocking: bool = True,
    ) -> None:
        super().__init__(non_blocking)
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f'mean and std must be as many numbers, std above 0, got {tuple(mean)} and {tuple(std)}')
        for name, values in (('mean', mean), ('std', std)):
            self.register_buffer(name, Tensor(list(values)).view(-1, 1, 1), persistent=False)

    @torch.compiler.disable  # a count on the CPU breaks its graph, with twenty lines of a warning
    def forward(self, data: dict[str, Tensor], training: bool = False) -> dict[str, Any]:
        """A batch for the model.

        Args:
            data: ``inputs`` and maybe ``token_view`` (B, C, H, W) uint8, maybe ``mask`` (B, h, w) bool and ``tokens``
                (B, h, w).
            training: of no effect.

        Returns:
            ``inputs`` normalised, and without ``tokens`` ``images`` in [0, 1] as tokenizers want them, both float32;
            ``mask`` and ``tokens`` as they are, and ``num_masked``, how many patches a mask on the CPU hides.
        """
        mask = data.get('mask')
        on_cpu = isinstance(mask, Tensor) and not mask.is_cuda
        known = {'num_masked': int(mask.sum())} if on_cpu else {}  # type: ignore[union-attr]  # later it takes a wait
        data = dict(self.cast_data(data))  # type: ignore[arg-type]
        view = data.pop('token_view', data['inputs'])
        images = {} if 'tokens' in data else {'images': view.float() / 255}
        return {**data, **known, **images, 'inputs': (data['inputs'].float() - self.mean) / self.std}
