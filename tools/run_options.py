"""Configurations that cannot train as they say, which mmengine would pass over or end in a traceback at."""

import os
import re
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_data import data_sets

CHECKS = {'classes': 'BEiTClassCheckHook', 'invalid_loss': 'BEiTInvalidLossHook'}  # and their names in default_hooks
FLEXIBLE = 'FlexibleRunner'
SHARDED = 'FSDPStrategy'  # and ours, BEiTFSDPStrategy
EMA = 'EMAHook'


def open_config(path: Path | str) -> Any:
    """The configuration of a file, as it was trained.

    mmsegmentation's test.py replaces the copy in the work directory; with --tta by one that holds the model inside a
    wrapper, the pipeline of the views, and its checkpoint as `load_from`. These are undone.

    Raises:
        DataError: no such file, or nothing to undo the pipeline by.
    """
    from mmengine.config import Config

    if not Path(path).is_file():
        raise DataError(f'{path} does not exist: give a file of configs/.')
    cfg = Config.fromfile(path)
    if 'module' not in (cfg.get('model') or {}):
        return cfg
    pipeline = cfg.get('test_pipeline')
    if pipeline is None:
        raise DataError(
            f'{path} was left by a test with --tta and has no test_pipeline: give the configuration of the training.'
        )
    cfg.model = cfg.model.module
    cfg.load_from = None
    for dataset in data_sets(cfg.test_dataloader.dataset):
        dataset.pipeline = pipeline
    return cfg


def set_on_nan(cfg: Any, on_nan: str) -> None:
    """Let a training stop at a loss that is not finite, or go on."""
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    cfg.default_hooks.invalid_loss = dict(type=CHECKS['invalid_loss'], on_nan=on_nan)


def add_checks(runner: Any) -> None:
    """Add the hooks that check classes and losses, unless default_hooks has them, or None.

    To the Runner, not to its configuration: the copy of one that knows no `beit_plugin.mm` stays good for others.
    """
    named = runner.cfg.get('default_hooks') or {}
    for name, kind in CHECKS.items():
        if name not in named:
            runner.register_hook(dict(type=kind))


def check_options(cfg: Any) -> None:
    """Raises DataError for a training that would not be the one that the configuration asks for."""
    compiled = cfg.get('compile')
    if compiled is not None and not isinstance(compiled, (bool, dict)):
        raise DataError(f'compile is True, or has options as compile.backend=eager, got {compiled!r}.')
    if cfg.get('runner_type') == FLEXIBLE and compiled:
        raise DataError(
            f'mmengine compiles nothing under {FLEXIBLE}: leave compile or runner_type (_base_/sharded.py) out.'
        )
    if not str((cfg.get('strategy') or {}).get('type')).endswith(SHARDED):
        return
    hooks = [*(cfg.get('custom_hooks') or ()), *(cfg.get('default_hooks') or {}).values()]
    if any(hook and hook.get('type') == EMA for hook in hooks):
        raise DataError(f'{EMA} cannot average weights that are spread: leave it or _base_/sharded.py out.')
    if cfg.get('launcher', 'none') == 'none':
        raise DataError(
            'the configuration spreads weights over processes: start it by torchrun --nproc_per_node N '
            'tools/train.py CONFIG --launcher pytorch.'
        )


def check_batch(cfg: Any, count: int) -> None:
    """Raises DataError when the images do not fill one batch of each process, and the rest of a pass is left out."""
    loader = cfg.train_dataloader
    endless = 'InfiniteSampler' in str(loader.get('sampler', {}).get('type'))
    processes = int(os.environ.get('WORLD_SIZE', 1)) if cfg.get('launcher', 'none') != 'none' else 1
    if loader.get('drop_last') and not endless and count < loader.batch_size * processes:
        raise DataError(
            f'{count} training images do not fill a batch of {loader.batch_size} in each of {processes} processes: '
            'take --cfg-options train_dataloader.batch_size=N.'
        )


def check_pretrained(cfg: Any) -> None:
    """Raises DataError when the weights that the backbone starts from are a file that is not there."""
    file = cfg.model.get('backbone', {}).get('pretrained')
    if file is None or '://' in file or Path(file).is_file():
        return
    # the text of a file stands behind that of its base
    variables = re.findall(r'pretrained ?= ?[\'"]{{\$(\w+)', cfg.text)
    named = f'name it by the environment variable {variables[-1]} or' if variables else 'name it'
    raise DataError(
        f'the pre-trained weights {file} do not exist: {named} by --cfg-options model.backbone.pretrained=FILE '
        '(None: start from random weights).'
    )


def leave_whole(cfg: Any) -> None:
    """Let a model be evaluated as if it had been trained with whole weights: its checkpoints are the same."""
    if cfg.get('runner_type') == FLEXIBLE:
        cfg.pop('runner_type')
        cfg.pop('strategy', None)
