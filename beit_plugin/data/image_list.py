"""Where images lie: files in folders, files on lists, members of tar archives; millions of them in little memory.

timm's readers of archives are made for labels and for extensions of their own, keep an object for each member, and pass
over where an archive is damaged, so this is written on Python's ``tarfile``.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .image_reading import ImageBytes

__all__ = ['ARCHIVE', 'LISTS', 'SUFFIXES', 'ImageList', 'folders_below']

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
LISTS = ('.txt', '.lst')
ARCHIVE = '.tar'
Places = list[tuple[int, int]]  # offset and size of members


class ImageList:
    """Images by their numbers, in the same order each time.

    Args:
        roots: one or several of: a folder, whose images are taken at any depth (``SUFFIXES``, hidden ones left out; the
            folders of classes of an ImageFolder too), or, where it holds none, those in its archives; a text file
            (``LISTS``, UTF-8) with a path on each line, relative to it; an archive (``ARCHIVE``, not compressed), whose
            members are read where they lie; links among them are left out.

    Raises:
        ValueError: a root that does not exist or holds no images, none at all, a list that is not UTF-8, or an archive
            that is compressed or damaged.
        OSError: a folder that may not be listed.
    """

    def __init__(self, roots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        names: list[bytes] = []
        self._archives: list[str] = []
        members = [np.empty((0, 4), np.int64)]  # image, archive, offset, size
        self._roots: list[tuple[int, bytes]] = []  # number of the first image, and where its folder lies
        for root in [roots] if isinstance(roots, (str, os.PathLike)) else roots:
            path = Path(root).expanduser()
            self._roots.append((len(names), os.fsencode(os.path.join(path if path.is_dir() else path.parent, ''))))
            files, archives = _find(path)
            before = len(names)
            names += map(os.fsencode, files)
            for archive in archives:
                inside, places = _members(archive)
                rows = [(len(names) + i, len(self._archives), *place) for i, place in enumerate(places)]
                members.append(np.array(rows, np.int64).reshape(-1, 4))
                names += [os.fsencode(f'{archive}/{name.lstrip("/")}') for name in inside]
                self._archives.append(archive)
            if len(names) == before:
                raise ValueError(
                    f'{path} holds no images ({", ".join(SUFFIXES)}) nor archives of some ({ARCHIVE}, not compressed): '
                    'give another folder, list or archive'
                )
        if not names:
            raise ValueError('got no folder and no list of images: give at least one')
        # one block of bytes: workers would copy a list of millions of strings, object by object, as they count them
        self._names = np.frombuffer(b''.join(names), np.uint8)
        self._ends = np.cumsum([len(name) for name in names])
        self._members = np.concatenate(members)

    def __len__(self) -> int:
        return len(self._ends)

    def _name(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._names[start : int(self._ends[index])].tobytes()

    def name(self, index: int) -> str:
        """File of an image; of a member of an archive ``ARCHIVE/member``."""
        return os.fsdecode(self._name(index))

    def source(self, index: int) -> str | ImageBytes:
        """What ``image_inputs.read_image`` reads an image from.

        Raises:
            ValueError: an archive that cannot be read any more.
        """
        name = self.name(index)
        row = int(np.searchsorted(self._members[:, 0], index))
        if row == len(self._members) or self._members[row, 0] != index:
            return name
        _, archive, offset, size = self._members[row].tolist()
        try:
            with open(self._archives[archive], 'rb') as file:  # anew each time: processes share no place in it
                file.seek(offset)
                return ImageBytes(file.read(size), name)
        except OSError as error:
            raise ValueError(f'image {name!r} cannot be read ({error.strerror}): fetch the archive again') from error

    def digest(self) -> str:
        """A number for the names and their order; the same wherever the folders lie."""
        found = hashlib.sha256()
        ends = [*(start for start, _ in self._roots[1:]), len(self)]
        for (start, folder), end in zip(self._roots, ends, strict=True):
            for index in range(start, end):
                found.update(self._name(index).removeprefix(folder) + b'\0')
        return found.hexdigest()


def folders_below(root: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Each folder at and below a root once, and the names in it that are no folders.

    Links to folders are followed, after all that lies below the root itself; they may lead back.

    Raises:
        OSError: the root cannot be listed.
    """
    os.scandir(root).close()  # os.walk passes over what it cannot list
    seen: set[tuple[int, int]] = set()
    starts = [os.fspath(root)]
    for start in starts:  # grows
        for folder, inner, names in os.walk(start):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                inner.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inner.sort()
            paths = [os.path.join(folder, name) for name in inner]
            starts += [path for path in paths if os.path.islink(path)]
            yield folder, names


def _find(path: Path) -> tuple[list[str], list[str]]:
    """Image files and archives of a root."""
    if path.is_dir():
        found = sorted(
            os.path.join(folder, name)
            for folder, names in folders_below(path)
            for name in names
            if name.lower().endswith((*SUFFIXES, ARCHIVE)) and not name.startswith('.')  # macOS writes ._x.jpg
        )
        files = [name for name in found if not name.lower().endswith(ARCHIVE)]
        return files, [] if files else found  # beside images an archive is where they came from
    if path.is_file() and path.suffix in LISTS:
        try:
            lines = path.read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f'the list {path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8'
            ) from error
        listed = [os.path.join(path.parent, line.strip()) for line in lines if line.strip()]
        if any(line.lower().endswith(ARCHIVE) for line in listed):
            raise ValueError(
                f'{path} lists archives ({ARCHIVE}): give these themselves, or the folder that they lie in'
            )
        return listed, []
    if path.is_file() and path.suffix.lower() == ARCHIVE:
        return [], [str(path)]
    kinds = f'neither a folder nor a list ({", ".join(LISTS)}) nor an archive ({ARCHIVE})'
    what = f'is {kinds}' if path.exists() else 'does not exist'
    raise ValueError(
        f'{path} {what}: give a folder of images or a text file with one path on each line, or an archive that is not '
        'compressed'
    )


def _members(archive: str) -> tuple[list[str], Places]:
    """Names of the images in an archive, and where they lie."""
    names: list[str] = []
    places: Places = []
    try:
        with tarfile.open(archive, 'r:') as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore  # it would keep an object for each
                name = os.path.basename(member.name)
                is_plain = member.isreg() and not member.issparse()
                if is_plain and name.lower().endswith(SUFFIXES) and not name.startswith('.'):
                    names.append(member.name)
                    places.append((member.offset_data, member.size))
            end = tar.offset
        # tarfile takes a bad header and any zeros for the end; behind that, tar fills up one record at most
        with open(archive, 'rb') as file:
            file.seek(end)
            rest = file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE + 1)
        if len(rest) < tarfile.BLOCKSIZE or len(rest) > tarfile.RECORDSIZE + tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError(f'no member and no end at byte {end}')
    except (tarfile.TarError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise ValueError(
            f'the archive {archive} is compressed or damaged ({reason}): uncompress it, or fetch it again'
        ) from error
    return names, places
