"""``BEiTClassCheckHook``: the heads of a model and its data sets have the same number of classes, or nothing starts."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

__all__ = ['BEiTClassCheckHook', 'ClassCountError', 'check_classes']

# where mmsegmentation, mmdetection and mmpretrain keep heads that tell the classes of the data set apart
_HEADS = ('decode_head', 'auxiliary_head', 'bbox_head', 'mask_head', 'roi_head.bbox_head', 'roi_head.mask_head', 'head')


class ClassCountError(ValueError):
    """Heads and data set disagree about the number of classes."""


@HOOKS.register_module()
class BEiTClassCheckHook(Hook):
    """Compares the classes of heads and data sets before the first step.

    One line in a configuration: ``default_hooks = dict(classes=dict(type='BEiTClassCheckHook'))``. See `check_classes`.

    Raises:
        ClassCountError: at the start.
    """

    def before_train(self, runner: Any) -> None:
        check_classes(runner.model, runner.train_dataloader.dataset)
        if runner.val_loop is not None:  # now, not hours later
            check_classes(runner.model, runner.val_dataloader.dataset)

    def before_val(self, runner: Any) -> None:
        check_classes(runner.model, runner.val_dataloader.dataset)

    def before_test(self, runner: Any) -> None:
        check_classes(runner.model, runner.test_dataloader.dataset)


def check_classes(model: Any, dataset: Any) -> None:
    """Compare the heads of a segmentor, detector or classifier with the names in the `metainfo` of a data set.

    Not compared: data sets that name no classes, region proposals, regression, auxiliary heads of one output channel
    (edges), and detectors that find classes by text.

    Raises:
        ClassCountError: their numbers differ.
    """
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if not names:
        return
    if isinstance(names, str):
        raise ClassCountError(
            f'{type(dataset).__name__} has the text {names!r} as its classes, expected a list of names: '
            f'metainfo=dict(classes=[{names!r}])'
        )
    while hasattr(model, 'module'):
        model = model.module
    if hasattr(model, 'language_model'):
        return
    wrong = {place: head.num_classes for place, head in _heads(model) if len(names) not in _counts(place, head, names)}
    if wrong:
        found = ' and '.join(f'{place}.num_classes={count}' for place, count in wrong.items())
        first = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
        raise ClassCountError(
            f'the configuration has {found}, but {type(dataset).__name__} names {len(names)} classes ({first}): set '
            f'num_classes={len(names)}, or name the classes of your labels by metainfo=dict(classes=[...]) of the data '
            'set'
        )


def _heads(model: Any) -> Iterator[tuple[str, Any]]:
    """The heads of a model that have classes, and their places in a configuration."""
    for place in _HEADS:
        part = reduce(lambda module, name: getattr(module, name, None), place.split('.'), model)
        several = isinstance(part, nn.ModuleList)
        for index, head in enumerate(part if several else [part]):
            # mmdetection's RPN calls its only head, which tells objects from background, a bbox_head
            if isinstance(getattr(head, 'num_classes', None), int) and 'RPN' not in type(head).__name__:
                yield f'model.{place}.{index}' if several else f'model.{place}', head


def _counts(place: str, head: Any, names: Any) -> set[int]:
    """The numbers of class names that a head can be meant for."""
    if getattr(head, 'out_channels', None) != 1 or not hasattr(head, 'loss_decode'):
        return {head.num_classes}
    losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    is_binary = any(getattr(loss, 'use_sigmoid', False) for loss in losses)
    if 'auxiliary' in place or not is_binary:
        return {len(names)}
    return {head.num_classes, 2}  # a threshold tells two classes apart
