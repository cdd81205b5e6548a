"""bfloat16 training by our optimiser wrapper: on the CPU too, and with all that mmengine's wrappers do."""

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from torch import nn

if importlib.util.find_spec('mmengine') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  registers

# isort: split

from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS

from beit_plugin.mm.backbone import BEiTBackbone

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA'))]
SMALL = dict(img_size=(32, 48), embed_dims=16, num_layers=2, num_heads=2, mlp_ratio=2)


def wrap(model, lr=0.01, **options):
    """Our wrapper around AdamW, as a config builds it."""
    cfg = dict(type='BEiTBF16OptimWrapper', optimizer=dict(type='AdamW', lr=lr), **options)
    return build_optim_wrapper(model, cfg)


def step(wrapper, model, x):
    with wrapper.optim_context(model):
        y = model(x)
        loss = y.float().square().mean()
    wrapper.update_params(loss)
    return y, loss


def linear(device='cpu'):
    torch.manual_seed(0)
    return nn.Linear(8, 4).to(device), torch.randn(6, 8, device=device)


@pytest.mark.parametrize('device', DEVICES)
def test_only_the_forward_pass_is_in_bfloat16(device):
    model, x = linear(device)
    before = model.weight.detach().clone()
    wrapper = wrap(model)
    y, loss = step(wrapper, model, x)
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32
    state = wrapper.optimizer.state[model.weight]
    assert {model.weight.dtype, state['exp_avg'].dtype, state['exp_avg_sq'].dtype} == {torch.float32}
    assert not torch.equal(model.weight, before)
    assert model(x).dtype == torch.float32  # outside


@pytest.mark.parametrize('device', DEVICES)
def test_accumulated_gradients_are_those_of_the_whole_batch(device):
    whole, x = linear(device)
    parts, _ = linear(device)
    step(wrap(whole), whole, x)
    wrapper = wrap(parts, accumulative_counts=3)
    for i, part in enumerate(x.split(2)):
        before = parts.weight.detach().clone()
        step(wrapper, parts, part)
        assert torch.equal(parts.weight, before) is (i < 2)
    # AdamW's first step is lr times the sign of the gradient, which rounding may change where it is almost 0
    assert torch.allclose(wrapper.optimizer.state[parts.weight]['exp_avg'], _first(whole, x), rtol=0.02, atol=1e-4)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-4)


def _first(model, x):
    """AdamW's mean of one gradient, of the start of `model`."""
    fresh, _ = linear(x.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = fresh(x).float().square().mean()
    loss.backward()
    return 0.1 * fresh.weight.grad


def test_gradients_are_exchanged_once_a_step():
    class Distributed(nn.Linear):
        silent = 0

        @contextmanager
        def no_sync(self):
            Distributed.silent += 1
            yield

    model = Distributed(8, 4)
    wrapper = wrap(model, accumulative_counts=3)
    for _ in range(6):
        step(wrapper, model, torch.ones(2, 8))
    assert Distributed.silent == 4


def test_gradients_are_clipped():
    model, x = linear()
    wrapper = wrap(model, clip_grad=dict(max_norm=1e-3))
    with wrapper.optim_context(model):
        loss = model(100 * x).float().square().mean()
    wrapper.backward(loss)
    wrapper._clip_grad()
    total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert total == pytest.approx(1e-3, rel=1e-3)


def test_layer_decay():
    model = nn.ModuleDict({'backbone': BEiTBackbone(**SMALL), 'head': nn.Conv2d(16, 3, 1)})
    wrapper = wrap(
        model, 0.1, constructor='BEiTLayerDecayConstructor', paramwise_cfg=dict(num_layers=2, decay_rate=0.5)
    )
    assert type(wrapper) is OPTIM_WRAPPERS.get('BEiTBF16OptimWrapper')
    rates = {group['lr'] for group in wrapper.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.0125, 0.025, 0.05, 0.1])


@pytest.mark.parametrize('extra', [{}, {'loss_scaler': {'scale': 65536.0, 'growth_factor': 2.0}}])
def test_state_goes_on_also_from_amp_optim_wrapper(extra):
    model, x = linear()
    wrapper = wrap(model)
    step(wrapper, model, x)
    state = {**wrapper.state_dict(), **extra}
    again = wrap(nn.Linear(8, 4))
    again.load_state_dict(state)
    assert again.optimizer.state_dict()['state'][0]['step'] == 1
    assert torch.equal(
        again.optimizer.state_dict()['state'][0]['exp_avg'], wrapper.optimizer.state[model.weight]['exp_avg']
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_stock_wrapper_still_refuses_the_cpu():
    """The reason for ours; once this fails, look whether mmengine's is enough."""
    model, _ = linear()
    with pytest.raises(AssertionError, match='only available training'):
        AmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), 0.1), dtype='bfloat16')


def test_clips_as_mmengine_does():
    """The gradients of what was frozen in between stay as they are."""
    from mmengine.optim import OptimWrapper

    def gradients(kind):
        model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])
        wrapper = OPTIM_WRAPPERS.build(
            dict(type=kind, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clip_grad=dict(max_norm=1.0))
        )
        for parameter, value in zip(model, (1.0, 3.0), strict=True):
            parameter.grad = torch.full_like(parameter, value)
        model[1].requires_grad_(False)
        wrapper._clip_grad()
        norm = wrapper.message_hub.get_scalar('train/grad_norm').current()
        return [parameter.grad.tolist() for parameter in model], norm

    assert gradients('BEiTBF16OptimWrapper') == gradients(OptimWrapper)
