"""The benchmark runs and writes what it says; what it measures is for no test."""

import json
import os
import subprocess
import sys

import pytest
from tools_common import ROOT, width


def bench(*args, cwd, status=0):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/benchmark.py', *args, '--device', 'cpu', '--dtype', 'float32'],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), 'TRITON_INTERPRET': '0'},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def test_attention(tmp_path):
    said = bench('attention', '--sizes', '32:2', '64:1', '--heads', '2', '--seconds', '0.01', cwd=tmp_path)
    rows = json.loads((tmp_path / 'benchmark/results.json').read_text())['rows']
    assert [(row['pixels'], row['name']) for row in rows] == [
        (side, name) for side in (32, 64) for name in ('no bias (bound)', "timm's way", 'ours, sdpa')
    ]
    assert all(row['forward_ms'] > 0 and row['train_ms'] > 0 for row in rows)
    page = (tmp_path / 'benchmark/results.md').read_text()
    assert page in said and '| 64, 1 | no bias (bound) | ' in page and '(1.00x)' in page
    assert width(tmp_path / 'benchmark/results.png') > 800


def test_encoder(tmp_path):
    bench('encoder', '--variant', 'tiny', '--sizes', '32:1', '--seconds', '0.01', '--out', 'here', cwd=tmp_path)
    rows = {row['name']: row for row in json.loads((tmp_path / 'here/results.json').read_text())['rows']}
    assert {'timm ViT, no bias (bound)', 'timm Beit', 'ours, sdpa', 'ours, fused'} <= set(rows)
    assert 'need a GPU' in rows['ours, fused']['failed']  # said, not left out
    assert all('failed' not in row for name, row in rows.items() if name != 'ours, fused')


@pytest.mark.parametrize('text', ['640', '650:2', '0:1', 'a:b', '640:0'])
def test_sizes(text, tmp_path):
    assert 'expected PIXELS:BATCH with a multiple of 16 pixels' in bench(
        'attention', '--sizes', text, cwd=tmp_path, status=2
    )
