"""Traces and files of ONNX: right at the size they were made for, and refused at another; or made for all sizes."""

import importlib.util

import pytest
import torch
from helpers import TINY, images, randomize, relative_error

from beit_plugin import Beit
from beit_plugin.segmentation.segmentor import build_segmentor

NEEDS_ONNX = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxruntime', 'onnxscript')),
    reason="needs pip install 'beit-plugin[test]'",
)
traces = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants of the trace


def model(**options):
    return randomize(Beit(num_classes=10, embed_dim=128, depth=2, num_heads=2, **options)).eval()


def session_of(file):
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])


def run(file, x):
    session = session_of(file) if isinstance(file, str) else file
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@traces
@pytest.mark.parametrize('native', [64, 224])
@pytest.mark.parametrize('grad', [False, True])
def test_a_trace_passes_its_own_check(native, grad):
    net, x = model(img_size=native), images(64, 64)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(net, x)
    assert relative_error(traced(x), net(x)) <= 1e-6
    assert relative_error(traced(images(50, 60)), net(images(50, 60))) <= 1e-6  # padded to the same grid
    with pytest.raises(RuntimeError):
        traced(images(48, 64))


@NEEDS_ONNX
@traces
# timm's onnx_export.py still uses the older exporter
@pytest.mark.filterwarnings('ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning')
@pytest.mark.parametrize(('native', 'size'), [(64, (64, 64)), (224, (64, 96)), (224, (50, 70))])
def test_the_exporter_by_traces(native, size, tmp_path):
    net, x = model(img_size=native), images(*size)
    file = str(tmp_path / 'model.onnx')
    axes = {'images': {0: 'batch', 2: 'height', 3: 'width'}}
    torch.onnx.export(net, (x,), file, input_names=['images'], dynamic_axes=axes, dynamo=False)
    assert relative_error(run(file, x), net(x)) <= 1e-5
    assert relative_error(run(file, images(*size)[:1]), net(images(*size)[:1])) <= 1e-5
    for other in ((16, 16), (32, 32), (96, 64), (65, 66) if size == (64, 64) else (64, 128)):
        with pytest.raises(Exception, match='Non-zero status code'):
            run(file, images(*other))


@NEEDS_ONNX
@pytest.mark.parametrize(('native', 'size'), [(64, (64, 64)), (224, (64, 96))])
def test_the_exporter_by_torch_export(native, size, tmp_path):
    net, x = model(img_size=native), images(*size)
    file = str(tmp_path / 'model.onnx')
    torch.onnx.export(net, (x,), file, dynamo=True, verbose=False)
    assert relative_error(run(file, x), net(x)) <= 1e-5


FREE_SIZES = {
    'classifier': lambda: Beit(**{**TINY, 'depth': 2}, num_classes=7, use_abs_pos_emb=True),
    'segmentor': lambda: build_segmentor(num_classes=5, channels=8, auxiliary_channels=8, **TINY),
}


@NEEDS_ONNX
@pytest.mark.slow
# the exporter of torch 2.11 stops at _linalg_solve_ex
@pytest.mark.skipif(torch.__version__ < '2.14', reason='needs the exporter of torch 2.14')
@pytest.mark.parametrize('name', FREE_SIZES)
@torch.no_grad()
def test_free_batch_height_and_width(name, tmp_path):
    net, file = randomize(FREE_SIZES[name]()).eval(), str(tmp_path / 'model.onnx')
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    torch.onnx.export(net, (images(100, 150),), file, dynamo=True, dynamic_shapes=(free,), verbose=False)
    session = session_of(file)
    multiples = [(16 * side, 16 * side) for side in range(1, 17)]
    for size in [*multiples, (64, 16), (17, 211), (101, 50), (384, 64), (131, 199)]:
        x = images(*size, batch=1 + size[0] % 3)
        assert relative_error(run(session, x), net(x)) <= 1e-5, size
