"""What one wants to know of a pre-training: images per second, pictures of what it predicts, are kept tokens right."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.visualization import LocalVisBackend
from PIL import Image
from torch.distributed.fsdp import FullyShardedDataParallel

from ...data.mim_views import ImageFiles
from ...tokenizers import Tokenizer
from ...tokenizers.picture import hide, side_by_side, token_images, with_titles
from ..skipped_files import DataFileError
from .mim import BEiTPretrainer

__all__ = ['BEiTMIMPictureHook', 'BEiTThroughputHook', 'BEiTTokenCacheHook']

_LOOKED_AT = 4  # images whose tokens are made anew
_ALIKE = 0.9  # share of tokens; near ones differ between devices and precisions
TITLES = ('image', 'seen', 'predicted', 'tokens')


@HOOKS.register_module()
class BEiTThroughputHook(Hook):
    """Logs ``images_per_s`` of all processes, and ``data_share``, the share of the time spent on waiting for data.

    From the times of mmengine's ``IterTimerHook``; those of the CPU, which is as fast as the GPU over many steps.
    """

    priority = 'NORMAL'  # after IterTimerHook, which is registered first, and before the logger

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        hub = runner.message_hub
        try:
            seconds = max(hub.get_scalar('train/time').current(), 1e-9)
        except KeyError:  # IterTimerHook was left out
            return
        hub.update_scalar('train/images_per_s', len(data_batch['inputs']) * get_world_size() / seconds)
        hub.update_scalar('train/data_share', hub.get_scalar('train/data_time').current() / seconds)


@HOOKS.register_module()
class BEiTMIMPictureHook(Hook):
    """Writes ``pictures/iter_N.png`` into the work directory; TensorBoard and the like get the picture too.

    A row for each image, always the same ones under the same mask: the image; what the model sees of it; the tokens,
    predicted where it does not see; the tokens of the tokenizer. Tokens are decoded where the tokenizer can, else they
    have a colour each.

    Args:
        interval: iterations between pictures; there is also one after the last iteration.
        num_images: rows.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, interval: int = 1000, num_images: int = 4) -> None:
        if interval < 1 or num_images < 1:
            raise ValueError(f'interval and num_images must be at least 1, got {interval} and {num_images}')
        self.interval, self.num_images = interval, num_images

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if not is_main_process() and not isinstance(runner.model, FullyShardedDataParallel):
            return
        if self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters:
            self._draw(runner)

    def _draw(self, runner: Any) -> None:
        batch = self._batch(runner.train_dataloader)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        was_training = model.training
        model.eval()
        try:
            data = model.data_preprocessor(batch)
            with torch.no_grad(), runner.optim_wrapper.optim_context(model):
                # whose weights are spread over all processes, all have to ask
                asked = runner.model if isinstance(runner.model, FullyShardedDataParallel) else model
                tokens, predicted = asked(**data, mode='predict')
        finally:
            model.train(was_training)
        if not is_main_process():
            return
        seen = batch['inputs'].float() / 255
        mask = batch['mask']
        guess = torch.where(mask, predicted.cpu(), tokens.cpu())
        pictures = [token_images(model.tokenizer, ids, tuple(seen.shape[2:])) for ids in (guess, tokens)]  # type: ignore
        picture = with_titles(side_by_side([seen, hide(seen, mask), *pictures]), TITLES)
        step = runner.iter + 1
        path = Path(runner.work_dir, 'pictures', f'iter_{step}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        for backend in runner.visualizer._vis_backends.values():
            if not isinstance(backend, LocalVisBackend):
                backend.add_image('masked_image_modelling', picture, step)

    def _batch(self, loader: Any) -> dict[str, torch.Tensor]:
        dataset: ImageFiles = loader.dataset
        samples = [dataset.views.center(image) for _, image in islice(_readable(dataset), self.num_images)]
        with torch.random.fork_rng([]):  # the training draws as if there were no picture
            torch.manual_seed(0)
            return loader.collate_fn(samples)


def _readable(dataset: ImageFiles) -> Iterator[tuple[int, Image.Image]]:
    """The images from the first on with their numbers; the training says so when it meets a file that is none."""
    for index in range(len(dataset)):
        try:
            image = dataset.image(index)
        except ValueError:
            continue
        yield index, image


@HOOKS.register_module()
class BEiTTokenCacheHook(Hook):
    """Looks before a training whether a ``token_cache`` of the data set is of the tokenizer of the model.

    The first images are tokenised anew, so that other weights, images that have changed, and random numbers of another
    version of torch are found too.

    Raises:
        DataFileError: at the start, another vocabulary, other tokens, or a model that takes none.
    """

    def before_train(self, runner: Any) -> None:
        dataset: ImageFiles = runner.train_dataloader.dataset
        cache = getattr(dataset, 'token_cache', None)
        if cache is None:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, BEiTPretrainer):
            raise DataFileError(f'token_cache is for BEiTPretrainer, got {type(model).__name__}: leave it out')
        tokenizer = model.tokenizer
        made = f'{cache.path} holds tokens of {cache.tokenizer}'
        if cache.vocab_size != tokenizer.vocab_size:
            raise DataFileError(
                f'{made}, {cache.vocab_size} of them, and the tokenizer of the model has {tokenizer.vocab_size}: take '
                'the same tokenizer, or make the file anew'
            )
        share = _share_alike(dataset, tokenizer, next(model.parameters()).device)
        if share < _ALIKE:
            raise DataFileError(
                f'{made}, and only {share:.0%} of those looked at are those of the tokenizer of the model: take the '
                'same tokenizer, or make the file anew'
            )


def _share_alike(dataset: ImageFiles, tokenizer: Tokenizer, device: torch.device) -> float:
    """Share of the kept tokens of the first images that the tokenizer gives too; 1 where no image can be looked at."""
    assert dataset.token_cache is not None
    kept, views = [], []
    for index, image in _readable(dataset):
        tokens = dataset.token_cache.tokens(index, 0)
        if tokens is not None:
            kept.append(tokens)
            views.append(dataset.views.token_view(dataset.crop(image, index, 0)))
        if len(kept) == _LOOKED_AT:
            break
    if not kept:
        return 1.0
    found = tokenizer.encode(torch.stack(views).to(device).float() / 255)
    expected = torch.stack(kept)
    return (found.cpu() == expected).float().mean().item() if found.shape == expected.shape else 0.0
