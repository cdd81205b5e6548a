"""Files that a training cannot use: the sentence about one, and the list of those that it goes on without."""

import hashlib
import logging
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import print_log

__all__ = ['DataFileError', 'LeftOut', 'check_on_error']


class DataFileError(ValueError):
    """A file that cannot be trained on, in one sentence that names it."""


def check_on_error(on_error: str) -> None:
    """Raises ValueError for what is neither 'raise' nor 'skip'."""
    if on_error not in ('raise', 'skip'):
        raise ValueError(f"got on_error={on_error!r}, expected 'raise' or 'skip'")


class LeftOut:
    """Files that were left out, each once, whichever worker of a data loader met it.

    Workers are processes of their own, so the files are kept in a folder: one entry for each, whose creation succeeds
    once. It lives as long as the object in the process that made it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._folder = Path(tempfile.mkdtemp(prefix='beit_plugin_left_out_'))
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def add(self, path: str, reason: str) -> None:
        """Remember and log a file, unless it is known."""
        self._folder.mkdir(exist_ok=True)  # systems remove temporary folders that nobody uses for days
        try:
            with open(self._folder / hashlib.sha1(os.fsencode(path)).hexdigest(), 'xb') as entry:
                entry.write(os.fsencode(f'{path}\n{reason}'))
        except FileExistsError:
            return
        count = sum(1 for _ in self._folder.iterdir())
        # of the processes beside the first mmengine shows errors only
        level = logging.WARNING if is_main_process() else logging.ERROR
        print_log(f'left out of training, {self.what} {count}: {reason}', logger='current', level=level)

    def files(self) -> dict[str, str]:
        """Paths and reasons."""
        entries = sorted(os.fsdecode(entry.read_bytes()).partition('\n') for entry in self._folder.glob('*'))
        return {path: reason for path, _, reason in entries}


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a worker has a copy of the object, and outlives it
        shutil.rmtree(folder, ignore_errors=True)
