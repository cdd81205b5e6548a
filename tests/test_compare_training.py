"""The comparison of trainings runs and writes what it says; what it measures is for no test."""

import json

import numpy as np
import pytest
import torch
from tools_common import tool, width, write


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('ants', 'bees'):
        for i in range(3):
            write(tmp_path / 'data/train' / name / f'{i}.jpg', rng.integers(0, 255, (40, 48, 3)))
    return tmp_path / 'data'


TINY = ('--model', 'beit_plugin_tiny_patch16_224', '--size', 32, '--batch-size', 2, '--device', 'cpu')


def test_compare_training(photographs, tmp_path):
    settings = ('--settings', 'eager:float32', 'sdpa:float32')
    said = tool(
        'compare_training', photographs, *TINY, '--steps', 2, '--seeds', 2, '--jobs', 2, *settings, cwd=tmp_path
    )
    results = json.loads((tmp_path / 'training/curves.json').read_text())
    first, other, seed, _ = results['runs']
    assert [(run['setting'], run['seed']) for run in results['runs']] == [
        ('eager:float32', 0), ('sdpa:float32', 0), ('eager:float32', 1), ('sdpa:float32', 1)
    ]  # fmt: skip
    assert all(len(run['losses']) == 2 for run in results['runs'])
    assert other['losses'] == pytest.approx(first['losses'], rel=1e-4)  # same start, images, crops, stochastic depth
    assert seed['losses'] != pytest.approx(first['losses'], rel=1e-4)
    assert 'standard error' in said and all(line in said for line in results['verdict'])
    assert width(tmp_path / 'training/curves.png') > 800


def test_verdict():
    from compare_training import compare

    finals = {('a', 0): 1.0, ('b', 0): 1.2, ('c', 0): 1.6, ('a', 1): 1.5, ('b', 1): 1.5, ('c', 1): 2.3, ('c', 2): 9.0}
    runs = [dict(setting=name, seed=seed, final=final) for (name, seed), final in finals.items()]
    first, b, c = compare(runs)
    assert 'mean 1.2500 of 1.0000, 1.5000, from lowest to highest 0.5000' in first
    assert '+0.1000, standard error 0.1000: within two' in b and '+0.7000, standard error 0.1000: BEYOND two' in c
    assert 'no spread' in compare(runs[:2])[1]
    assert '+0.2000' in compare(runs[:4])[1]  # stopped before the second seed of b


def test_samples_do_not_touch_the_models_random_numbers():
    from compare_training import Samples

    samples = Samples([(0, 0), (1, 1), (2, 0)], lambda image: (image, torch.rand(1).item()), seed=1, count=7)
    torch.manual_seed(3)
    drawn = [samples[i] for i in range(7)]
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(3))
    assert [samples[i] for i in reversed(range(7))] == drawn[::-1] and len(samples) == 7
    assert sorted(image for (image, _), _ in drawn[:3]) == [0, 1, 2]  # each once before any comes again


@pytest.mark.parametrize(
    ('args', 'reason', 'status'),
    [
        (('--settings', 'fused:bfloat16'), 'fused:bfloat16 cannot run here: they need a GPU', 1),
        (('--settings', 'flash:float32'), 'expected BACKEND:DTYPE', 2),
        (('--settings', 'sdpa:float32', '--model', 'resnet18'), 'is no model of the plugin', 1),
        (('--steps', 0), 'expected a number of at least 1', 2),
    ],
)
def test_compare_training_refuses(args, reason, status, photographs, tmp_path):
    assert reason in tool('compare_training', photographs, *TINY, *args, cwd=tmp_path, status=status)


def test_compare_training_needs_classes(tmp_path):
    from compare_training import read_images
    from data_folders import DataError

    write(tmp_path / 'one/ants/0.jpg', np.zeros((8, 8, 3)))
    with pytest.raises(DataError, match='is no ImageFolder'):
        read_images(tmp_path / 'none', 32)
    with pytest.raises(DataError, match='one class only'):
        read_images(tmp_path / 'one', 32)


def test_images_are_shrunk_once(photographs):
    from compare_training import read_images

    images, classes = read_images(photographs, 10)
    assert classes == ['ants', 'bees'] and [label for _, label in images] == [0, 0, 0, 1, 1, 1]
    assert {image.size for image, _ in images} == {(24, 20)}
    assert read_images(photographs, 32)[0][0][0].size == (48, 40)
