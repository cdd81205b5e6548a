"""What lets the CPU prepare the next step of a training under mmengine while the GPU still computes this one.

mmengine 0.10.7 waits for the GPU several times in each step: for the batch, which is copied from memory that can be
swapped out; for the norm of the gradients; and for each loss that it writes down, though nobody reads them before the
next line of the log. Until the queue of the GPU has filled again, it waits for the CPU. What is logged stays the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseDataPreprocessor, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement
from torch import Tensor

__all__ = ['BEiTRunAheadHook', 'LateMessageHub', 'allow_pinned_samples', 'end_workers']

_MOST_WAITING = 2000  # numbers, before they are fetched without being asked for


class LateMessageHub(MessageHub):
    """mmengine's message hub that fetches numbers from the GPU all at once, when one of them is asked for.

    A hub that is there becomes one by ``LateMessageHub.take_over``.
    """

    _waiting: list[tuple[str, Tensor, int]]

    @classmethod
    def take_over(cls, hub: MessageHub) -> None:
        """Makes a hub one of these; it stays the object that everybody knows."""
        if type(hub) is MessageHub:
            hub.__class__ = cls
            hub._waiting = []  # type: ignore[attr-defined]

    @staticmethod
    def _is_late(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_cuda

    @property
    def _log_scalars(self) -> Any:  # what mmengine's methods read
        self._fetch()
        return vars(self)['_log_scalars']

    @_log_scalars.setter
    def _log_scalars(self, buffers: Any) -> None:
        vars(self)['_log_scalars'] = buffers

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """As mmengine's; a number on the GPU is kept there for the time being, as it is now."""
        if self._is_late(value) and value.numel() == 1 and isinstance(count, int):
            self._set_resumed_keys(key, resumed)
            vars(self)['_log_scalars'].setdefault(key, HistoryBuffer())  # its place among the others
            self._waiting.append((key, value.detach().clone().reshape(()), count))
            if len(self._waiting) >= _MOST_WAITING:
                self._fetch()
            return
        with self._others_waiting(key):
            super().update_scalar(key, value, count, resumed)

    def get_scalar(self, key: str) -> HistoryBuffer:
        """As mmengine's; fetches only where numbers of that name are on the GPU."""
        with self._others_waiting(key):
            return super().get_scalar(key)

    @contextmanager
    def _others_waiting(self, key: str) -> Iterator[None]:
        """Lets mmengine's methods at one name without fetching all of the others."""
        if any(name == key for name, _, _ in self._waiting):
            self._fetch()
        waiting, self._waiting = self._waiting, []
        try:
            yield
        finally:
            self._waiting = waiting

    def _fetch(self) -> None:
        waiting, self._waiting = self._waiting, []
        values: list[Any] = [None] * len(waiting)
        kinds = {(tensor.dtype, tensor.device) for _, tensor, _ in waiting}
        for kind in kinds:
            places = [i for i, (_, tensor, _) in enumerate(waiting) if (tensor.dtype, tensor.device) == kind]
            for place, value in zip(places, torch.stack([waiting[i][1] for i in places]).tolist(), strict=True):
                values[place] = value
        buffers = vars(self)['_log_scalars']
        for (key, _, count), value in zip(waiting, values, strict=True):
            if len(buffers[key].data[0]):
                buffers[key].update(value, count)
            else:
                buffers[key] = HistoryBuffer([value], [count])  # as mmengine begins one, of its kind of number


@HOOKS.register_module()
class BEiTRunAheadHook(Hook):
    """Keeps mmengine's training loop from waiting for the GPU in each step.

    Batches are copied without waiting, which takes ``pin_memory=True`` of the data loader (mmdetection's boxes wait as
    before); losses and the norm of the gradients (of ``BEiTBF16OptimWrapper``) are fetched for the lines of the log and
    for checkpoints only. ``BEiTInvalidLossHook`` sees a loss of NaN one step later.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        LateMessageHub.take_over(runner.message_hub)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        preprocessor = getattr(model, 'data_preprocessor', None)
        if isinstance(preprocessor, BaseDataPreprocessor) and torch.cuda.is_available():
            preprocessor._non_blocking = True

    def after_train(self, runner: Any) -> None:
        runner.message_hub.log_scalars  # noqa: B018  fetches what waits: the model may now go from the GPU

    def after_run(self, runner: Any) -> None:
        end_workers(runner)


def end_workers(runner: Any) -> None:
    """Ends the processes of the data loaders of a Runner; a loader that is asked again starts new ones.

    Where they are persistent and fill pinned memory, torch 2.11 waits for each of them for five seconds when Python
    ends, since nobody has told them to.
    """
    for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
        loader: Any = getattr(loop, 'dataloader', None)
        iterator: Any = getattr(loader, '_iterator', None)
        if hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()
            loader._iterator = None


def allow_pinned_samples() -> None:
    """Lets ``pin_memory=True`` of a data loader reach the labels in mmengine's data elements, which it passes over."""

    def pin_memory(self: BaseDataElement, *args: Any) -> BaseDataElement:
        """A copy whose tensors are in memory that is not swapped out, from which a GPU copies by itself."""
        pinned = self.new()
        for name, value in self.items():
            if hasattr(value, 'pin_memory'):
                pinned.set_data({name: value.pin_memory(*args)})
        return pinned

    if not hasattr(BaseDataElement, 'pin_memory'):
        BaseDataElement.pin_memory = pin_memory  # type: ignore[attr-defined]
