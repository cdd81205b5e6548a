"""From the same start, a training of ours is mmsegmentation's: the recipe's optimiser, step after step."""

import importlib.util
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

CONFIG = Path(__file__).parents[2] / 'configs/seg/beit-base_upernet_camvid.py'
STOCK = {
    'type': 'EncoderDecoder',
    'backbone': {'type': 'BEiT'},
    'neck': {'type': 'Feature2Pyramid'},
    'decode_head': {'type': 'UPerHead'},
    'auxiliary_head': {'type': 'FCNHead'},
}
SIZE = (64, 96)
WIDTH = 48

pytestmark = pytest.mark.usefixtures('mmseg_scope')


def build(changes):
    """The recipe's model, small and without what draws at random, and its optimiser."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({'model': changes})
    model = cfg.model
    model.data_preprocessor.size = SIZE
    model.backbone.update(embed_dims=WIDTH, num_heads=3, num_layers=4, out_indices=(0, 1, 2, 3), img_size=SIZE)
    model.backbone.drop_path_rate = 0.0
    model.neck.embed_dim = WIDTH
    model.decode_head.update(in_channels=[WIDTH] * 4, channels=32, dropout_ratio=0.0)
    model.auxiliary_head.update(in_channels=WIDTH, channels=16, dropout_ratio=0.0)
    built = MODELS.build(model)
    built.init_weights()
    return built, cfg.optim_wrapper


def batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs, samples = [], []
    for _ in range(2):
        label = torch.randint(11, (1, 4, 6), generator=generator).float()
        label = torch.nn.functional.interpolate(label[None], SIZE)[0].long()
        noise = torch.randint(64, (3, *SIZE), generator=generator)
        inputs.append((16 * label + noise).byte())  # so that there is something to learn
        label[torch.rand(label.shape, generator=generator) < 0.1] = 255
        sample = SegDataSample(metainfo={'img_shape': SIZE, 'ori_shape': SIZE})
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    return {'inputs': inputs, 'data_samples': samples}


def train(model, optim_wrapper, steps):
    wrapper = build_optim_wrapper(model.train(), optim_wrapper)
    losses = [model.train_step(batch(step % 2), wrapper) for step in range(steps)]
    return torch.tensor([[float(part[key].detach()) for key in ('decode.loss_ce', 'aux.loss_ce')] for part in losses])


def test_losses_step_after_step(tmp_path):
    stock, optim_wrapper = build(STOCK)
    torch.save({'state_dict': stock.state_dict()}, tmp_path / 'start.pth')
    ours, _ = build({})
    load_checkpoint(ours, str(tmp_path / 'start.pth'), strict=True)
    expected = train(stock, optim_wrapper, 20)
    got = train(ours, optim_wrapper, 20)
    assert expected[-1, 0] < expected[0, 0] - 0.05  # it learns
    error = (got - expected).abs() / expected
    assert (error[:8] <= 1e-5).all()
    assert (error <= 1e-3).all()  # AdamW divides by the size of a gradient, rounding of those near 0 too
