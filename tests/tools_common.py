"""Made-up data for the tests of the tools, and the tools on the import path."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHAPES_CONFIG = ROOT / 'configs/seg/beit-tiny_upernet_shapes.py'
sys.path.insert(0, str(ROOT / 'tools'))


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def turn(path: Path) -> None:
    """Says in the file's EXIF data that the camera was held upright."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)


def write16(path: Path, value: int) -> None:
    Image.fromarray(np.full((40, 48), value, np.uint16)).save(path)


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def image_folder(
    root: Path,
    parts: tuple[str, ...],
    labels: str = 'annotations',
    values: tuple[int, ...] = (0, 1, 2),
    label_suffix: str = '.png',
    count: int = 5,
) -> None:
    """Images of noise whose labels are vertical stripes of `values`."""
    rng = np.random.default_rng(0)
    for part in parts:
        for i in range(count):
            write(root / 'images' / part / f'{i}.jpg', rng.integers(0, 255, (40, 48, 3)))
            stripes = np.repeat(np.array(values), -(-48 // len(values)))[:48]
            write(root / labels / part / f'{i}{label_suffix}', np.tile(stripes, (40, 1)))


ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'TRITON_INTERPRET': '0'}


def tool(name, *args, cwd, status=0):
    """Output of a tool that ends with this status; its errors where that is not 0."""
    done = subprocess.run(
        [sys.executable, ROOT / f'tools/{name}.py', *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=300, env=ENV,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout
