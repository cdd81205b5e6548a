"""What the parity tests of pyramid and heads share."""

import copy

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


def _error(got, expected, what):
    assert got.shape == expected.shape, what
    return float(
        (got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    )  # a bias before BatchNorm has none


def _run(module: nn.Module, inputs, rename):
    """Outputs, gradients of all inputs and parameters, and BatchNorm statistics, by name."""
    maps = [x.clone().requires_grad_() for x in inputs]
    outputs = module(maps)
    outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
    # weights that differ everywhere: a plain sum has no gradient through BatchNorm
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin() for y in outputs]
    sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True)).backward()
    found = {f'output {i}': y.detach() for i, y in enumerate(outputs)}
    found.update({f'gradient of map {i}': x.grad for i, x in enumerate(maps) if x.grad is not None})
    found.update({f'gradient of {rename(name)}': parameter.grad for name, parameter in module.named_parameters()})
    found.update({rename(name): buffer for name, buffer in module.named_buffers()})
    return found


def assert_parity(ours: nn.Module, theirs: nn.Module, inputs, rename=lambda name: name):
    """Compare outputs, gradients and statistics of two modules.

    In float64 they are equal. In float32 ours are within 1e-5 of these, or where rounding is magnified (by BatchNorm of
    two values, for one), within three times the peer's own error.

    Args:
        ours: called with the list of maps.
        theirs: likewise.
        inputs: list of maps.
        rename: their parameter name to ours.
    """
    exact_inputs = [x.double() for x in inputs]
    exact = _run(copy.deepcopy(theirs).double(), exact_inputs, rename)
    ours_exact = _run(copy.deepcopy(ours).double(), exact_inputs, lambda name: name)
    got, expected = _run(ours, inputs, lambda name: name), _run(theirs, inputs, rename)
    assert got.keys() == ours_exact.keys() == exact.keys() == expected.keys()
    for name, value in exact.items():
        error = _error(ours_exact[name], value, name)
        assert error <= 1e-9, f'{name}: relative error {error:.2e} in float64'
        error, theirs_error = (_error(found[name], value, name) for found in (got, expected))
        assert error <= max(1e-5, 3 * theirs_error), f'{name}: relative error {error:.2e}, theirs {theirs_error:.2e}'


def assert_same_gradients(ours, theirs, rename=lambda name: name):
    """Of two modules in float64."""
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        error = _error(own[rename(name)].grad, parameter.grad, name)
        assert error <= 1e-9, f'gradient of {name}: relative error {error:.2e}'


def load_renamed(ours, theirs, rename):
    ours.load_state_dict({rename(name): tensor for name, tensor in theirs.state_dict().items()}, strict=True)
