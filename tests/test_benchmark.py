"""The benchmark and the comparison of trainings run and write what they say; what they measure is for no test."""

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import needs_cpp_compiler, relative_error
from tools_common import tool, width


def bench(*args, cwd, status=0):
    quick = ('--device', 'cpu', '--dtype', 'float32', '--seconds', '0.01')
    return tool('benchmark', *args, *quick, cwd=cwd, status=status)


def read(folder):
    return json.loads((folder / 'results.json').read_text())


def test_attention(tmp_path):
    said = bench('attention', '--sizes', '32:2', '64x32:1', '64:1', '--heads', '2', cwd=tmp_path)
    folder = tmp_path / 'benchmark'
    results = read(folder)
    names = ('no bias (bound)', 'no bias, from the projection', "timm's way", 'ours, sdpa', 'ours, fused')
    assert [(row['tokens'], row['name']) for row in results['rows']] == [(n, k) for n in (5, 9, 17) for k in names]
    for row in results['rows']:
        if row['name'] == 'ours, fused':
            assert 'need a GPU' in row['failed']  # said, not left out
            continue
        for key in ('forward', 'train'):
            part = row[key]
            assert 0 < part['p10'] <= part['ms'] <= part['p90'] and part['runs'] >= 5
        share = row['train']['tflops'] / results['ceilings']['float32']['tflops']
        assert row['train']['share'] == pytest.approx(share)
    counted = 3.5 * 4 * 1 * 2 * 17**2 * 64  # B K N N D
    train = results['rows'][-2]['train']
    assert train['tflops'] * train['ms'] * 1e9 == pytest.approx(counted)
    assert results['hardware']['cores'] and results['versions']['timm'] and results['versions']['torch']
    page = (folder / 'results.md').read_text()
    assert page in said and '| 64x32, 1 | 9 | no bias (bound) | ' in page and '(1.00x)' in page
    assert results['hardware']['name'] in page and 'Time per image grows as N^a' in page
    assert width(folder / 'results.png') > 800

    (folder / 'results.png').unlink()
    assert page in tool('benchmark_report', folder / 'results.json', cwd=tmp_path)
    assert width(folder / 'results.png') > 800


@needs_cpp_compiler
def test_compiled(tmp_path):
    args = ('--sizes', '32:1', '--heads', '1', '--compile', 'off', 'default', '--only', 'bound', 'ours, sdpa')
    bench('attention', *args, cwd=tmp_path)
    rows = read(tmp_path / 'benchmark')['rows']
    assert [row['compile'] for row in rows] == ['off', 'off', 'default', 'default']
    assert not any('failed' in row for row in rows) and [row['graph_breaks'] for row in rows[2:]] == [0, 0]
    assert 'ours, sdpa, compiled (default)' in (tmp_path / 'benchmark/results.md').read_text()


PEERS = {'transformers': 'transformers', 'mmsegmentation': 'mmseg', 'mmpretrain': 'mmpretrain'}
MODELS = {
    'encoder': ['timm ViT, no bias (bound)', 'timm Beit', 'transformers', 'mmsegmentation'],
    'segmentor': ['ours, no bias (bound)', 'transformers', 'mmsegmentation'],
    'pyramid': ['timm ViT, no bias (bound)', 'timm Beit', 'mmsegmentation'],
    'mim': ['ours, no bias (bound)', 'timm Beit', 'transformers', 'mmpretrain'],
}


@pytest.mark.parametrize('what', MODELS)
def test_models(what, tmp_path):
    bench(what, '--variant', 'tiny', '--sizes', '32x64:2', '--out', 'here', cwd=tmp_path)
    rows = {row['name']: row for row in read(tmp_path / 'here')['rows']}
    expected = [name for name in MODELS[what] if importlib.util.find_spec(PEERS.get(name, 'timm'))]
    with_tokens = ['ours, sdpa, with dVAE', 'ours, fused, with dVAE'] if what == 'mim' else []
    assert list(rows) == [*expected, 'ours, sdpa', 'ours, fused', *with_tokens]
    for name in ('ours, fused', *with_tokens[1:]):
        assert 'need a GPU' in rows.pop(name)['failed']
    assert not [row['failed'] for row in rows.values() if 'failed' in row]
    for row in rows.values():
        assert row['train']['images_per_s'] == pytest.approx(2e3 / row['train']['ms'])
    assert '| images/s | TFLOP/s |' in (tmp_path / 'here/results.md').read_text()
    assert width(tmp_path / 'here/results.png') > 800


@pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason="needs the extra: 'beit-plugin[mmseg]'")
def test_evaluation(tmp_path):
    bench('evaluation', '--variant', 'tiny', '--sizes', '32x64:1', '--only', 'windows', cwd=tmp_path)
    rows = read(tmp_path / 'benchmark')['rows']
    assert [row['name'] for row in rows] == ['mmsegmentation, windows', 'ours, windows']
    for row in rows:
        assert row['forward']['images_per_s'] == pytest.approx(1e3 / row['forward']['ms']) and 'train' not in row
    assert '| labels, ms | images/s | peak, labels, MiB |' in (tmp_path / 'benchmark/results.md').read_text()
    assert width(tmp_path / 'benchmark/results.png') > 400


@pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason="needs the extra: 'beit-plugin[mmseg]'")
def test_operators(tmp_path):
    bench('ops', '--sizes', '64x128:1', '--only', 'RoIAlign', 'NMS', cwd=tmp_path)
    rows = {row['name']: row for row in read(tmp_path / 'benchmark')['rows']}
    assert list(rows) == ['RoIAlign, torchvision', 'RoIAlign, ours', 'NMS, torchvision', 'NMS, ours']
    assert not [row['failed'] for row in rows.values() if 'failed' in row] and 'train' not in rows['NMS, ours']
    page = (tmp_path / 'benchmark/results.md').read_text()
    assert page.count('torchvision | ') == page.count('ours | ') == 2
    ratio = rows['NMS, ours']['forward']['ms'] / rows['NMS, torchvision']['forward']['ms']
    assert f'({ratio:.2f}x)' in page  # to the row of the same operator


def test_all_operators_agree():
    pytest.importorskip('mmengine', reason="needs the extra: 'beit-plugin[mmseg]'")
    import benchmark_ops

    for theirs, ours in pairwise(benchmark_ops.ops_cases(replace(setting(), height=128, width=64)).items()):
        if ours[0].partition(', ')[0] != theirs[0].partition(', ')[0]:
            continue
        found = []
        for _, make in (theirs, ours):
            torch.manual_seed(0)
            case = make()
            out = case.forward(case.call)
            found.append(out[1] if isinstance(out, tuple) else out)
        assert found[0].shape == found[1].shape
        assert relative_error(*found) < 1e-5, ours[0]


@pytest.mark.parametrize('augmented', [False, True])
def test_evaluations_agree(augmented):
    pytest.importorskip('mmengine', reason="needs the extra: 'beit-plugin[mmseg]'")
    import benchmark_evaluation
    import benchmark_models
    from mmseg.structures import SegDataSample

    benchmark_models.import_mm()
    s = setting()
    stock, ours = (benchmark_evaluation._model(s, ours, augmented) for ours in (False, True))
    ours.load_state_dict(stock.state_dict())
    data = benchmark_evaluation._views(s, augmented)
    results = [model.eval().test_step(benchmark_evaluation._fresh(data)) for model in (stock, ours)]
    assert all(isinstance(sample, SegDataSample) for sample in results[0]) and len(results[0]) == 3
    for a, b in zip(*results, strict=True):
        assert a.pred_sem_seg.data.shape == (1, 64, 32)
        assert (a.pred_sem_seg.data == b.pred_sem_seg.data).float().mean() > 0.999


@pytest.mark.parametrize('model', ['segmentor', 'mim'])
def test_steps_of_a_training(model, tmp_path):
    args = ('--variant', 'tiny', '--size', '64', '--batch', '2', '--steps', '1', '--model', model)
    assert f'1 x CPU, BEiT-tiny {model}, 64 px, 2 images each: ' in tool('benchmark_ddp', *args, cwd=tmp_path)


def setting(**options):
    import benchmark_cases

    common = dict(height=64, width=32, batch=3, dtype=torch.float32, device=torch.device('cpu'), backends=['sdpa'])
    return benchmark_cases.Setting(**common, variant='tiny', **options)


def test_operations():
    import benchmark_models

    N, C = 9, 192
    linear = 2 * (N - 1) * 3 * 256 * C + 12 * 24 * N * C * C
    forward = 3 * (linear + 12 * 4 * N * N * C)
    assert benchmark_models.model_flops('encoder', setting(), False) == forward
    images = 3 * 2 * (N - 1) * 3 * 256 * C  # they need no gradient
    assert benchmark_models.model_flops('encoder', setting(), True) == 3 * forward - images
    head = 3 * 2 * 3 * C * 8192  # 75 of 196 patches are 3 of 8
    assert benchmark_models.model_flops('mim', setting(), False) == forward + head
    assert benchmark_models.model_flops('segmentor', setting(), True) > 2.5 * forward


def test_attention_cases_agree():
    # what is timed as the same computes the same: timm's way, ours by each backend
    import benchmark_cases

    s = setting(heads=2, head_dim=16)
    s.backends = ['sdpa', 'eager']
    outputs, gradients = [], []
    inputs = [torch.randn(3, 9, 3, 2, 16), torch.randn(7 * 3 + 3, 2)]
    grad = torch.randn(3, 9, 2, 16)
    for name in ("timm's way", 'ours, sdpa', 'ours, eager'):
        case = benchmark_cases.attention_cases(s)[name]()
        given = [x.clone().requires_grad_() for x in inputs]
        out = case.call(*given)
        out.backward(grad)
        outputs.append(out)
        gradients.append([x.grad for x in given])
    for out, both in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outputs[0], rtol=1e-4, atol=1e-5)
        for got, expected in zip(both, gradients[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_exponent():
    from benchmark_report import exponent

    assert exponent([(n, 3 * n**1.7) for n in (197, 577, 1025)]) == pytest.approx(1.7)
    assert exponent([(197, 1), (577, 2)]) is None
    assert exponent([(197, 1), (577, 2), (577, 3)]) is None


class FakeGPU:
    """A GPU on which time passes only where it is told to; events read its clock in order."""

    def __init__(self, monkeypatch, slow_runs=0):
        self.now, self.slow_runs, self.sleeps = 0.0, slow_runs, []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = gpu.now

            def query(self):
                gpu.slow_runs -= 1
                return gpu.slow_runs >= 0

            def elapsed_time(self, end):
                return end.time - self.time

        def sleep(cycles):
            self.sleeps.append(cycles)
            self.now += 100

        fake = SimpleNamespace(Event=Event, synchronize=lambda: None, _sleep=sleep)
        monkeypatch.setattr(torch, 'cuda', fake)

    def step(self):
        self.now += 2

    def reset(self):
        self.now += 0


def clock(isolated):
    from benchmark_clock import Clock

    made = Clock(torch.device('cpu'), 1e-6, isolated)
    made.cuda, made.flushed = True, torch.ones(4) if isolated else None
    return made


def test_isolated_times(monkeypatch):
    gpu = FakeGPU(monkeypatch, slow_runs=2)
    got = clock(True).measure(gpu.step, gpu.reset, memory=False)
    assert (got['ms'], got['runs'], got['waited']) == (2, 5, 0)  # without the sleep
    assert len(gpu.sleeps) == 7  # the two runs that the CPU was late for are run again, after a longer sleep
    assert [b / a for a, b in pairwise(gpu.sleeps)] == pytest.approx([2, 2, 1, 1, 1, 1], rel=1e-3)


def test_a_cpu_that_is_never_in_time_is_reported(monkeypatch):
    gpu = FakeGPU(monkeypatch, slow_runs=1000)
    assert clock(True).measure(gpu.step, gpu.reset, memory=False)['waited'] == 5


def test_times_in_a_row(monkeypatch):
    gpu = FakeGPU(monkeypatch)
    got = clock(False).measure(gpu.step, gpu.reset, memory=False)
    assert (got['ms'], got['runs'], got['waited'], gpu.sleeps) == (2, 5, None, [])


@pytest.mark.parametrize('text', ['640', '650:2', '0:1', 'a:b', '640:0', '640x:1', '640x480x16:1', '640x100:1'])
def test_sizes(text, tmp_path):
    assert 'expected PIXELS:BATCH or HxW:BATCH with multiples of 16 pixels' in bench(
        'attention', '--sizes', text, cwd=tmp_path, status=2
    )


def test_only_and_skip():
    from benchmark import chosen
    from data_folders import DataError

    rows = dict.fromkeys(['no bias (bound)', "timm's way", 'ours, sdpa', 'ours, fused'])
    assert list(chosen(rows, ['OURS', 'bound'], ['fused'])) == ['no bias (bound)', 'ours, sdpa']
    assert chosen(rows, [], []) == rows
    with pytest.raises(DataError, match='--only typo is no part of a row; there are: no bias'):
        chosen(rows, ['ours', 'typo'], [])
    with pytest.raises(DataError, match='leave no row'):
        chosen(rows, ['sdpa'], ['ours', 'not installed'])


def test_nothing_measured(tmp_path):
    args = ('attention', '--sizes', '32:1', '--only', 'fused')
    assert 'nothing could be measured' in bench(*args, cwd=tmp_path, status=1)
    assert 'need a GPU' in read(tmp_path / 'benchmark')['rows'][0]['failed']
    assert 'no row that could be' in tool('benchmark_report', 'benchmark/results.json', cwd=tmp_path, status=1)
    assert 'cannot be read' in tool('benchmark_report', 'none.json', cwd=tmp_path, status=1)
    assert 'belongs to models' in bench(*args, '--backends', 'auto', cwd=tmp_path, status=2)
