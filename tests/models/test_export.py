"""Programs of torch.export with free batch, height and width: right at every size that README promises."""

import pytest
import torch
from helpers import TINY, images, randomize, relative_error

from beit_plugin.models.beit import Beit
from beit_plugin.models.mim import BeitForMaskedImageModeling
from beit_plugin.segmentation.backbone import BeitBackbone
from beit_plugin.segmentation.segmentor import build_segmentor

FREE = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
SMALL_PATCHES = dict(img_size=(24, 40), patch_size=8)
# patch; fewest patches a side: with one fewer a map of the model has one row, a case that PyTorch keeps apart
MODELS = {
    'classifier': (lambda: Beit(**TINY, num_classes=7), 16, 2),
    'pyramid of small patches': (lambda: BeitBackbone(**{**TINY, **SMALL_PATCHES}, add_fpn=True), 8, 8),
    'segmentor': (lambda: build_segmentor(num_classes=5, channels=8, auxiliary_channels=8, **TINY), 16, 4),
}


def outputs(result):
    return result if isinstance(result, (tuple, list)) else (result,)


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_every_size(name):
    make, patch, fewest = MODELS[name]
    model = randomize(make()).eval()
    program = torch.export.export(model, (images(100, 150),), dynamic_shapes=(FREE,), strict=False)
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes)  # runs without this package
    run = program.module()
    least = (fewest - 1) * patch + 1  # the last patch may be a single row of pixels
    multiples = [(side * patch, side * patch) for side in range(fewest, 17)]
    for size in [*multiples, (least, least), (least, 211), (101, least + 2), (384, fewest * patch), (131, 199)]:
        x = images(*size, batch=1 + size[0] % 3)
        for got, expected in zip(outputs(run(x)), outputs(model(x)), strict=True):
            assert relative_error(got, expected) <= 1e-5, size
    with pytest.raises((AssertionError, RuntimeError)):
        run(images(least, least - 1))


@torch.no_grad()
def test_masked_patches():
    model = randomize(BeitForMaskedImageModeling(**{**TINY, 'depth': 2}, vocab_size=9)).eval()
    masks = {axis: torch.export.Dim.DYNAMIC for axis in range(3)}

    def inputs(*grid, height, width, batch=2):
        generator = torch.Generator().manual_seed(0)
        return images(height, width, batch=batch), torch.rand(batch, *grid, generator=generator) < 0.4

    example = inputs(7, 10, height=100, width=150)
    run = torch.export.export(model, example, dynamic_shapes=(FREE, masks), strict=False).module()
    for other in (inputs(4, 4, height=64, width=64), inputs(2, 13, height=31, width=200, batch=3)):
        assert relative_error(run(*other).logits, model(*other).logits) <= 1e-5


@torch.no_grad()
def test_one_free_side():
    model = randomize(Beit(**{**TINY, 'depth': 1}, num_classes=7)).eval()
    dynamic = {3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (images(100, 150),), dynamic_shapes=(dynamic,), strict=False)
    assert not any('linalg' in str(node.target) for node in program.graph.nodes)  # ONNX has no solver
    for width in (80, 96, 211):
        assert relative_error(program.module()(images(100, width)), model(images(100, width))) <= 1e-5
