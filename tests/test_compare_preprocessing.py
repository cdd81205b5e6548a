"""tools/compare_preprocessing.py on drawn images."""

import importlib.util

import numpy as np
import pytest
from PIL import Image
from tools_common import tool


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('mmseg', 'transformers'))), reason='needs mmsegmentation and transformers'
)
def test_table(tmp_path):
    generator = np.random.default_rng(0)
    for i, size in enumerate(((40, 30), (90, 120))):
        Image.fromarray(generator.integers(64, 192, (*size, 3), dtype=np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / 'broken.png').write_bytes(b'no image')
    said = tool('compare_preprocessing', tmp_path, '--size', 64, cwd=tmp_path, status=1)
    assert 'error: 1 of 3 images were left out: ' in said and 'broken.png (' in said
    (tmp_path / 'broken.png').unlink()
    title, _, _, *rows = tool('compare_preprocessing', tmp_path, '--size', 64, cwd=tmp_path).splitlines()
    assert title.startswith('2 images, 64 x 64 pixels')
    largest = {name.strip(): float(cell) for _, name, _, cell, *_ in (row.split('|') for row in rows)}
    opencv = largest.pop('mmsegmentation, OpenCV')
    names = {'transformers, torchvision', 'transformers, Pillow', 'timm', 'mmsegmentation, Pillow'}
    assert largest.keys() == names and max(largest.values()) <= 1
    assert opencv > 20  # it takes every third pixel of noise, the others average


def test_nothing_there(tmp_path):
    said = tool('compare_preprocessing', tmp_path / 'absent', cwd=tmp_path, status=1)
    assert said == f'error: the folder {tmp_path / "absent"} does not exist.\n'
