"""What the parity tests of pyramid and heads share."""

import torch
from torch import nn

# grids in patches; 37x53 is odd in every direction at every level
GRIDS = [(4, 4), (4, 6), (37, 53)]


def randomise(module, seed=0):
    """Draw all weights and all BatchNorm statistics at random, so that no term is hidden by a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.normal_(0, fan_in**-0.5, generator=generator)
    return module


def pyramid_maps(grid, channels=8, batch=2, rescales=(4, 2, 1, 0.5)):
    """Levels as a pyramid makes them."""
    return [torch.randn(batch, channels, int(grid[0] * r), int(grid[1] * r)) for r in rescales]


def _assert_same(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)
    assert error <= 1e-5, f'{what}: relative error {error:.2e}'


def assert_parity(ours: nn.Module, theirs: nn.Module, inputs, rename=lambda name: name):
    """Compare outputs, gradients of all inputs and parameters, and BatchNorm statistics of two modules.

    Args:
        ours: called with the list of maps.
        theirs: likewise.
        inputs: list of maps.
        rename: their parameter name to ours.
    """
    results = []
    for module in (ours, theirs):
        maps = [x.clone().requires_grad_() for x in inputs]
        outputs = module(maps)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        # weights that differ everywhere: a plain sum has no gradient through BatchNorm
        sum((y * torch.linspace(-1, 1, y.numel()).view_as(y).sin()).sum() for y in outputs).backward()
        results.append((outputs, maps))
    (our_outputs, our_maps), (their_outputs, their_maps) = results
    for i, (a, b) in enumerate(zip(our_outputs, their_outputs, strict=True)):
        _assert_same(a, b, f'output {i}')
    for i, (a, b) in enumerate(zip(our_maps, their_maps, strict=True)):
        assert (a.grad is None) == (b.grad is None), f'gradient of map {i}'
        if a.grad is not None:
            _assert_same(a.grad, b.grad, f'gradient of map {i}')
    assert_same_gradients(ours, theirs, rename)
    own_state = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        _assert_same(own_state[rename(name)].float(), tensor.float(), name)


def assert_same_gradients(ours, theirs, rename=lambda name: name):
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        _assert_same(own[rename(name)].grad, parameter.grad, f'gradient of {name}')


def load_renamed(ours, theirs, rename):
    ours.load_state_dict({rename(name): tensor for name, tensor in theirs.state_dict().items()}, strict=True)
