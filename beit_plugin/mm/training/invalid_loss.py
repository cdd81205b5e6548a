"""``BEiTInvalidLossHook``: a training whose loss is NaN or infinite stops before it replaces its good checkpoints."""

from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ...checkpoints.convert import some
from ...models.deferred_check import DeferredCheck

__all__ = ['BEiTInvalidLossHook', 'InvalidLossError']


class InvalidLossError(FloatingPointError):
    """The loss or the weights of a training are NaN or infinite; the message names the last good checkpoint."""


@HOOKS.register_module()
class BEiTInvalidLossHook(Hook):
    """Stops a training at the first loss that is NaN or infinite, in all processes.

    One line in a configuration: ``default_hooks = dict(invalid_loss=dict(type='BEiTInvalidLossHook'))``.

    The loss of a GPU is read one step later, so that no step waits for it. Before a checkpoint is written and before a
    validation, loss and weights are checked at once: a NaN gradient makes the weights NaN while the loss of its own
    step is finite. So every checkpoint holds finite weights, and good ones are not rotated away. Gradients are not
    checked: a dynamic loss scale overflows them on purpose, and others show in the weights.

    Args:
        on_nan: `raise`, or `continue` with a single warning.

    Raises:
        InvalidLossError: the loss or the weights are not finite.
        ValueError: an unknown `on_nan`.
    """

    priority = 'LOW'  # after the line of the log, before CheckpointHook

    def __init__(self, on_nan: str = 'raise') -> None:
        if on_nan not in ('raise', 'continue'):
            raise ValueError(f"got on_nan={on_nan!r}, expected 'raise' or 'continue'")
        self.on_nan = on_nan
        self._later = DeferredCheck()
        self._trained = 0  # iterations at the last look
        self.found: str | None = None  # what was not finite, where the training goes on

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self.found:
            return
        self._trained = runner.iter + 1
        self._check_loss(runner, self._later.collect())  # of the iteration before
        losses = {name: x for name, x in (outputs or {}).items() if 'loss' in name and isinstance(x, Tensor)}
        if losses:
            values = torch.stack([x.detach().float().mean() for x in losses.values()])
            wrong = (~values.isfinite()).any()[None].float()
            all_reduce(wrong, 'max')
            about = (self._trained, list(losses))
            if values.is_cuda:
                self._later.send(torch.cat([wrong, values]), about)
            else:
                self._check_loss(runner, (torch.cat([wrong, values]), about))
        if _saves_now(runner):
            self._check_now(runner)

    def after_train_epoch(self, runner: Any) -> None:
        self._check_now(runner)

    def before_val(self, runner: Any) -> None:
        self._check_now(runner)

    def _check_now(self, runner: Any) -> None:
        if self.found or not self._trained:  # validation alone
            return
        self._check_loss(runner, self._later.collect())
        parameters = {name.removeprefix('module.'): x for name, x in runner.model.named_parameters()}
        wrong = torch.stack([~parameter.isfinite().all() for parameter in parameters.values()])
        anywhere = wrong.any()[None].float()  # models in pieces: each process has others
        all_reduce(anywhere, 'max')
        if anywhere.item():
            names = some(name for name, is_wrong in zip(parameters, wrong.tolist(), strict=True) if is_wrong)
            self._report(runner, f'weights are not finite after iteration {self._trained} ({names or "of a process"})')

    def _check_loss(self, runner: Any, sent: tuple[Tensor, tuple[int, list[str]]] | None) -> None:
        if sent is None or not sent[0][0]:
            return
        values, (iteration, names) = sent[0][1:], sent[1]
        listed = ', '.join(f'{name} {value:.4g}' for name, value in zip(names, values.tolist(), strict=True))
        if values.isfinite().all():
            listed = 'of another process'
        self._report(runner, f'the loss is not finite in iteration {iteration} ({listed})')

    def _report(self, runner: Any, what: str) -> None:
        if self.found:
            return
        if self.on_nan == 'continue':
            self.found = what
            runner.logger.warning(f'{what}; going on without further checks, as on_nan asks')
            return
        last = runner.message_hub.get_info('last_ckpt')  # a resumed training has that of its checkpoint
        where = f'the last good checkpoint is {last}' if last else 'no checkpoint has been written yet'
        raise InvalidLossError(
            f'{what}; {where}; lower the learning rate (optim_wrapper.optimizer.lr), clip the gradients '
            '(optim_wrapper.clip_grad) or check the data; to go on anyway: --on-nan continue of tools/train.py, or '
            "on_nan='continue' of BEiTInvalidLossHook"
        )


def _saves_now(runner: Any) -> bool:
    """Whether CheckpointHook is about to write a checkpoint of this iteration."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and not hook.by_epoch]
    return any(
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or (hook.save_last and hook.is_last_train_iter(runner))
        for hook in hooks
    )
