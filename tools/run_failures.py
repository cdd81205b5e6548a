"""What ends a tool, in one sentence: files and folders that cannot be used, and processes that died."""

import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data_folders import DataError

_WORKER = re.compile(r'DataLoader worker \(pid\S* .*?\) (?:is killed by signal: (.+?)\.|exited unexpectedly)')


def make_folder(folder: Path, option: str) -> None:
    """Make a folder for results, unless it is there.

    Raises:
        DataError: no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = 'it is a file' if folder.is_file() else error.strerror
        raise DataError(f'{option} {folder} cannot be written to ({why}): give another folder.') from error


def require_file(path: Path, option: str) -> None:
    """Raises DataError where an argument names no file."""
    if not path.is_file():
        raise DataError(f'{option} {path} {"is a folder, expected a file" if path.is_dir() else "does not exist"}.')


def require_matplotlib(purpose: str) -> None:
    """Raises DataError unless matplotlib is installed."""
    if find_spec('matplotlib') is None:
        raise DataError(f'{purpose} needs matplotlib: pip install matplotlib.')


def exit_for(error: BaseException) -> None:
    """End the process with a sentence and status 1, after Ctrl-C with 130; return for an error that needs a traceback.

    mmengine raises a SyntaxError for whatever comes while it formats a configuration, so what came before it counts.
    """
    chain = list(_causes(error))
    if any(isinstance(cause, KeyboardInterrupt) for cause in chain):
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    if isinstance(error, DataError):
        sys.exit(f'error: {error}')
    died = next(filter(None, (_WORKER.match(str(cause)) for cause in reversed(chain))), None)
    if died:
        how = f'was killed by the signal {died[1]}' if died[1] else 'died'
        sys.exit(
            f'error: a process that loads data {how}: if memory ran out, take fewer of them (num_workers) or smaller '
            'batches; if shared memory did, raise its limit (--shm-size of Docker).'
        )
    if isinstance(error, OSError):
        sys.exit(f'error: {_without_number(error)}.')


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and one after the other those that it came from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _without_number(error: OSError) -> str:
    """The message of the operating system, with the name of the file."""
    if error.strerror:
        return f'{error.filename}: {error.strerror}' if error.filename else error.strerror
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]  # a worker sends its traceback as the text
    return re.sub(r'^\w+Error: |\[Errno \d+\] ', '', last)
