"""The work directory of a training: in use by one at a time, its old checkpoints, its copy of the configuration."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_folders import DataError

LOCK = '.training.lock'
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}  # where launchers say it


@contextmanager
def in_use(cfg: Any) -> Iterator[None]:
    """Keep other trainings out of the work directory; say so where it holds checkpoints of an earlier one.

    The first process holds a POSIX lock, which ends with it however it ends, and which forked workers do not inherit.

    Raises:
        DataError: another training runs there, or the directory cannot be written.
    """
    rank = RANKS.get(cfg.get('launcher', 'none'))
    if rank is not None and os.environ.get(rank, '0') != '0':
        yield
        return
    folder = Path(cfg.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, 'a+')
    except OSError as error:
        raise DataError(f'the work directory {folder} cannot be written ({error.strerror}): name another.') from error
    with file:
        _lock(file, folder)
        if not cfg.get('resume'):
            _report_checkpoints(folder)
        yield


def _lock(file: Any, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise DataError(
            f'a training is running in {folder} ({file.read().strip()}): wait for it, or name another folder by '
            '--work-dir.'
        ) from error
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()


def _report_checkpoints(folder: Path) -> None:
    left = sorted((path for kind in ('iter', 'epoch') for path in folder.glob(f'{kind}_*.pth')), key=os.path.getmtime)
    if left:
        print(
            f'{folder} holds {len(left)} checkpoint{"" if len(left) == 1 else "s"} of an earlier training, the last is '
            f'{left[-1].name}: this training starts anew and replaces files of the same name; --resume would go on.'
        )


def evaluation_runner(name: str) -> str:
    """A Runner, by its name, that writes its configuration beside its log: that in the work directory was trained."""
    from mmengine.registry import RUNNERS

    class EvaluationRunner(RUNNERS.get(name)):  # type: ignore[misc]
        def dump_config(self) -> None:
            self.cfg.dump(Path(self.log_dir, Path(self.cfg.filename or 'config.py').name))

    RUNNERS.register_module(module=EvaluationRunner, force=True)
    return EvaluationRunner.__name__
