import importlib.util

import pytest
import torch
from torch import nn

if importlib.util.find_spec('mmcv') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmcv.ops importable

# isort: split

from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from beit_plugin.mm.segmentation.neck import BEiTPyramid
from beit_plugin.mm.segmentation.norm import BEiTSyncBN, NormFactory


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet', 'mmengine'])
def test_every_scope_finds_the_neck(scope):
    if scope != 'mmengine' and importlib.util.find_spec(scope) is None:
        pytest.skip(f'{scope} is not installed')
    registry = MODELS if scope == 'mmengine' else importlib.import_module(f'{scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(scope):
        neck = registry.build({'type': 'BEiTPyramid', 'embed_dim': 4})
    assert isinstance(neck, BEiTPyramid) and isinstance(neck.upsample_4x[1], BEiTSyncBN)


def test_norm_options():
    cfg = {'type': 'SyncBN', 'requires_grad': False, 'eps': 0.25, 'momentum': 0.5}
    norm = BEiTPyramid(4, norm_cfg=cfg).upsample_4x[1]
    assert norm.eps == 0.25 and norm.momentum == 0.5
    assert not any(p.requires_grad for p in norm.parameters())


@pytest.mark.parametrize(
    'cfg, kind, name',
    [
        ({'type': 'SyncBN'}, BEiTSyncBN, 'bn'),
        ({'type': 'BN', 'requires_grad': True}, nn.BatchNorm2d, 'bn'),
        ({'type': 'GN', 'num_groups': 2}, nn.GroupNorm, 'gn'),
        ({'type': nn.InstanceNorm2d}, nn.InstanceNorm2d, 'in'),
    ],
)
def test_norm_types(cfg, kind, name):
    factory = NormFactory(cfg)
    assert factory.name == name and type(factory(4)) is kind
    assert factory(4, dtype=torch.float64).eps == 1e-5


def test_norm_device_and_dtype():
    norm = NormFactory({'type': 'SyncBN'})(4, device='meta', dtype=torch.float64)
    assert norm.weight.is_meta and norm.weight.dtype == torch.float64


def test_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match=r"got norm type 'BatchNorma', which is not registered; use 'SyncBN'"):
        NormFactory({'type': 'BatchNorma'})


@pytest.mark.parametrize('cfg', [None, 'BN', {'eps': 1e-5}])
def test_refuses_a_config_without_type(cfg):
    with pytest.raises(ValueError, match=r'got norm_cfg=.*, expected a dict with a type'):
        BEiTPyramid(4, norm_cfg=cfg)


def test_sync_bn_trains_on_the_cpu_in_a_process_group(process_group):
    x = torch.randn(2, 4, 3, 5)
    with pytest.raises(ValueError, match='expected input tensor to be on GPU'):
        nn.SyncBatchNorm(4)(x)  # the reason for our own
    ours, plain = NormFactory({'type': 'SyncBN'})(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_mean, plain.running_mean) and torch.equal(ours.running_var, plain.running_var)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_mmengine_reverts_our_sync_bn():
    pyramid = revert_sync_batchnorm(BEiTPyramid(4))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in pyramid.modules())
    assert pyramid([torch.randn(2, 4, 3, 5)] * 4)[0].shape == (2, 4, 12, 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_sync_bn_on_cuda():
    x = torch.randn(2, 4, 3, 5, device='cuda')
    ours, plain = NormFactory({'type': 'SyncBN'})(4).cuda(), nn.BatchNorm2d(4).cuda()
    torch.testing.assert_close(ours(x), plain(x))
