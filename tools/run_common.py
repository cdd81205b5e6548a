"""What the tools share: reading a configuration, checking its data, a quiet start of the Runner, a summary, the run."""

import argparse
import copy
import io
import itertools
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_data import check_data, data_sets, report_left_out, set_data_root
from run_failures import exit_for, make_folder
from run_mim import check_tokenizer, is_pretraining, result, sentence
from run_options import add_checks, check_batch, check_options, check_pretrained, leave_whole, open_config
from run_summary import inner, score, summary
from run_work_dir import evaluation_runner, in_use

_RUN_NUMBERS = itertools.count(1)
# mmengine opens with its whole environment, configuration and hooks; these stay in the log file
CONSOLE_NOISE = (
    'System environment:',
    'Config:\n',
    'Hooks will be executed',
    'Distributed training is not used',
    'decay: lr ',  # the groups of the optimiser: two lines for each layer
    'The prefix is not set in metric class',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)
OUR_OWN = (ValueError,)  # what our models raise for settings that do not fit, in a sentence
# mmsegmentation warns about its own code and defaults at every start, and in multi-scale testing at every image
WARNING_NOISE = (
    'The draw is False',
    '``build_loss`` would be deprecated',
    'Default ``avg_non_ignore`` is False',
    'The shape of value will convert',
    'FSDP.state_dict_type',  # mmengine's FSDPStrategy
    'Setting MKL_NUM_THREADS',  # mmengine, in several processes
    "'pin_memory' argument is set as true",  # PyTorch, where there is no GPU: the configurations are for those who have
)


class _Console(io.TextIOBase):
    """Passes records on, except the noise; the logger hands over each record in one call."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if not any(mark in text for mark in CONSOLE_NOISE):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


def require_mmseg() -> None:
    """Raises DataError unless the OpenMMLab extra is installed."""
    missing = [name for name in ('mmengine', 'mmcv', 'mmseg') if find_spec(name) is None]
    if missing:
        raise DataError(f"{' and '.join(missing)} not installed: pip install '.[mmseg]' in the folder of beit_plugin.")


def key_value(text: str) -> str:
    """An argument of --cfg-options; raises DataError when it is none."""
    if '=' not in text:
        raise DataError(f'--cfg-options takes KEY=VALUE, got {text!r}.')
    return text


def _at_least(lowest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f'expected a number of at least {lowest}, got {text!r}')
        return int(text)

    return number


positive, not_negative = _at_least(1), _at_least(0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that train and test share; they are those of mmsegmentation's tools, and --data-root."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', type=Path, metavar='DIR', help='default: work_dirs/ and the name of the CONFIG')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that change what a CONFIG says; see `read_config`."""
    from mmengine.config import DictAction

    parser.add_argument(
        '--data-root',
        type=Path,
        metavar='DIR',
        help='read the data of the configuration from here; the layout below stays',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=key_value,
        action=DictAction,
        metavar='KEY=VALUE',
        help='override anything in the configuration, such as train_dataloader.batch_size=8',
    )


def load_config(args: argparse.Namespace) -> Any:
    """The configuration of a run with the arguments applied.

    Raises:
        DataError: no such file.
    """
    cfg = read_config(args)
    cfg.launcher = args.launcher
    cfg.work_dir = str(args.work_dir or cfg.get('work_dir') or Path('work_dirs', Path(args.config).stem))
    return cfg


def read_config(args: argparse.Namespace) -> Any:
    """The configuration with the arguments of `add_config_arguments` applied.

    Raises:
        DataError: no such file.
    """
    cfg = open_config(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    return cfg


def use_mixed_precision(cfg: Any, dtype: str) -> None:
    """Make a configuration train under autocast; raises DataError for float16 without a GPU."""
    for key in ('dtype', 'loss_scale', 'use_fsdp'):  # of AmpOptimWrapper alone
        cfg.optim_wrapper.pop(key, None)
    if dtype == 'bfloat16':
        cfg.optim_wrapper.type = 'BEiTBF16OptimWrapper'
        return
    from mmengine.device import get_device

    if get_device() in ('cpu', 'mps'):  # mmengine's AmpOptimWrapper refuses both
        raise DataError('--amp float16 needs a GPU, and PyTorch finds none on this machine: take --amp bfloat16.')
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype)


def load_weights(model: Any, checkpoint: Path) -> None:
    """Load all parameters of the model from the file; raises DataError when it does not fit."""
    from beit_plugin.checkpoints.convert import CheckpointError, some
    from beit_plugin.checkpoints.files import read_state_dict

    try:
        state = {name.removeprefix('module.'): tensor for name, tensor in read_state_dict(checkpoint).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except CheckpointError as error:
        raise DataError(f'{error}.') from error
    except RuntimeError as error:
        sizes = [line.strip() for line in str(error).splitlines()[1:]]  # below the headline, one line per parameter
        more = f' (and {len(sizes) - 1} more)' if len(sizes) > 1 else ''
        raise DataError(f'{checkpoint} does not fit the configuration: {sizes[0].rstrip(".")}{more}.') from error
    parts = [
        f'{len(names)} parameters {what} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
        for what, names in (('are missing', missing), ('belong to no part of the model', unexpected))
        if names
    ]
    if parts:
        raise DataError(f'{checkpoint} does not fit the configuration: {" and ".join(parts)}.')
    wrong = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if wrong:
        raise DataError(f'{checkpoint} has weights that are not finite ({some(wrong)}): take an earlier checkpoint.')


def scope_of(cfg: Any) -> AbstractContextManager:
    """Where the names of a configuration are looked up; a training before it in this process may have left another."""
    from mmengine.registry import DefaultScope

    return DefaultScope.overwrite_default_scope(cfg.get('default_scope'))


def _built(cfg: Any) -> Any:
    """The Runner; raises DataError for arguments that a part of the configuration does not take, or unknown parts."""
    from mmengine.registry import RUNNERS

    try:
        return RUNNERS.build(cfg)
    except (TypeError, KeyError) as error:
        said = str(error.args[0]) if error.args else ''
        if 'unexpected keyword argument' not in said and 'is not in the' not in said:
            raise
        raise DataError(f'the configuration cannot be built: {said.rpartition(".py: ")[2].strip()}') from error


def _start(cfg: Any, counts: dict[str, int]) -> Any:
    """The Runner of the configuration, and its summary on the console."""
    from mmengine.dist import is_main_process

    make_folder(Path(cfg.work_dir), '--work-dir')
    number = next(_RUN_NUMBERS)
    if number > 1:
        # mmengine tells the runs of a process apart by the second only: short ones would share logger and log file
        cfg.experiment_name = f'{cfg.get("experiment_name", Path(cfg.filename).stem)}_{number}'
    for message in WARNING_NOISE:
        warnings.filterwarnings('ignore', message=message)
    with redirect_stdout(_Console(sys.stdout)):
        runner = _run(lambda: _built(cfg), OUR_OWN)
    add_checks(runner)
    if is_main_process() and not isinstance(runner.model, dict):  # FlexibleRunner builds it later
        print(summary(runner, counts), flush=True)
    return runner


def train(cfg: Any) -> tuple[Path | None, str, float | None]:
    """Train by mmengine's Runner; returns the last checkpoint, the result in words and the last mIoU, None for none."""
    with in_use(cfg):
        return _train(cfg)


def _train(cfg: Any) -> tuple[Path | None, str, float | None]:
    from beit_plugin.mm.training.run_ahead import end_workers

    loaders = {'training': cfg.train_dataloader, 'validation': cfg.get('val_dataloader')}
    with scope_of(cfg):
        counts = {name: check_data(loader.dataset) for name, loader in loaders.items() if loader}
    check_batch(cfg, counts['training'])
    check_options(cfg)
    check_tokenizer(cfg)
    check_pretrained(cfg)
    runner = _start(cfg, counts)
    try:
        _run(runner.train)
    finally:
        end_workers(runner)
    unit = 'epoch' if 'max_epochs' in cfg.train_cfg else 'iter'
    trained, wanted = getattr(runner, unit), cfg.train_cfg[f'max_{unit}s']
    if trained > wanted:
        print(f'nothing was trained: the checkpoint is that of {trained}, and the configuration ends at {wanted}.')
    report_left_out(runner.train_dataloader.dataset)
    last = Path(cfg.work_dir, 'last_checkpoint')
    checkpoint = Path(last.read_text().strip()) if last.is_file() else None
    scalars = runner.message_hub.log_scalars
    miou = scalars['val/mIoU'].current() if 'val/mIoU' in scalars else None
    words = result(cfg, scalars) if is_pretraining(cfg) else score(scalars)
    invalid = next(filter(None, (getattr(hook, 'found', None) for hook in runner.hooks)), None)
    return checkpoint, words if invalid is None else f'{invalid}, so do not trust: {words}', miou


def _run(step: Callable[[], Any], more: tuple[type[Exception], ...] = ()) -> Any:
    """Raises DataError with the sentence about a file that cannot be used, which a worker buries in its traceback."""
    from beit_plugin.checkpoints import CheckpointError
    from beit_plugin.mm.skipped_files import DataFileError
    from beit_plugin.mm.training.invalid_loss import InvalidLossError

    try:
        return step()
    except DataFileError as error:
        raise DataError(f'{str(error).strip().rpartition("DataFileError: ")[2]}.') from error
    except (CheckpointError, InvalidLossError, *more) as error:
        raise DataError(f'{sentence(error)}.') from error
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get('__name__', '').startswith('beit_plugin.'):
            raise
        raise DataError(f'{sentence(error)}.') from error  # what our models say of settings in their first step


def evaluate(cfg: Any, checkpoint: Path | str, tta: bool) -> dict[str, float]:
    """Metrics of a checkpoint on the test data, single-scale or with the configuration's augmentations (`tta`)."""
    is_file = '://' not in str(checkpoint)
    if is_file and not Path(checkpoint).is_file():
        raise DataError(f'the checkpoint {checkpoint} does not exist.')
    if not cfg.get('test_dataloader'):
        raise DataError('the configuration has no test_dataloader: there is nothing to evaluate on.')
    if tta and 'tta_pipeline' not in cfg:
        raise DataError('the configuration has no tta_pipeline, so --tta cannot run.')
    with scope_of(cfg):
        counts = {'test': check_data(cfg.test_dataloader.dataset)}
    cfg = copy.deepcopy(cfg)
    cfg.load_from = None if is_file else str(checkpoint)
    cfg.resume = False  # the copy of a resumed run says True, and would fetch the latest checkpoint instead
    leave_whole(cfg)
    if tta:
        for dataset in data_sets(cfg.test_dataloader.dataset):
            dataset.pipeline = cfg.tta_pipeline
        if cfg.tta_model.type.rpartition('.')[2] == 'SegTTAModel':  # mmsegmentation's averages the logits of the views
            cfg.model.test_cfg.keep_logits = True
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    cfg.runner_type = evaluation_runner(cfg.get('runner_type', 'Runner'))
    runner = _start(cfg, counts)
    if is_file:
        # mmengine would accept a file that fits in part or not at all
        load_weights(inner(runner.model), Path(checkpoint))
    return _run(runner.test)


def run(main: Callable[[], None]) -> None:
    """Call `main`; what is wrong with the user's data or set-up becomes one sentence and exit status 1, Ctrl-C 130."""
    try:
        main()
        distributed = sys.modules.get('torch.distributed')
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()  # or NCCL warns at the end, and gloo's threads may abort it
    except (Exception, KeyboardInterrupt) as error:
        exit_for(error)
        raise
