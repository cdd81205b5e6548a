"""What is kept between forward passes (biases, indices, matrices) is never stale and never of a transform."""

import copy
import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import TINY, images, randomize, relative_error
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from beit_plugin.models import relative_position, resample
from beit_plugin.models.beit import Beit
from beit_plugin.models.relative_position import bias_of

TABLE = 'blocks.0.attn.relative_position_bias_table'
# pairs of grids with tables of one length among them
SIZES = [(48, 80), (80, 48), (64, 96), (96, 64), (48, 48), (16, 64)]


def beit(seed=0, **options):
    return randomize(Beit(**{**TINY, 'depth': 2, 'num_classes': 5, **options}), seed).eval()


def tables(model):
    return [block.attn.relative_position_bias_table for block in model.blocks]


def clear_caches():
    for function in (relative_position._cached_index, resample._cached_matrix, resample._cached_bilinear):
        function.cache_clear()


@contextmanager
def without_caches():
    """Everything is computed anew."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (relative_position, resample):
            patch.setattr(module, 'can_cache_tensors', lambda: False)
        yield


def set_data(model, draw):
    with torch.no_grad():
        for table in tables(model):
            draw.choice([
                lambda t: t.add_(0.5),
                lambda t: t.data.mul_(-1),
                lambda t: t[-4:].normal_(),
                lambda t: setattr(t, 'data', torch.randn_like(t)),
                lambda t: t.detach().numpy().fill(0.3) if t.dtype != torch.bfloat16 else None,
            ])(table)  # fmt: skip


def new_parameters(model, draw):
    for block in model.blocks:
        block.attn.relative_position_bias_table = nn.Parameter(torch.randn_like(tables(model)[0]))


def transpose_window(model, draw):
    model.patch_embed.set_input_size(model.patch_embed.img_size[::-1])


def resize(model, draw):
    model.set_input_size(draw.choice(SIZES))


def other_rule(model, draw):
    model.rel_pos_resize = draw.choice(resample.RESIZE_RULES)


def other_dtype(model, draw):
    model.to(draw.choice([torch.float32, torch.float64, torch.bfloat16]))


def other_windows(model, draw):
    model.attention_window = draw.choice([None, (2, 3), (3, 2), (2, 2)])
    for block in model.blocks:
        block.windowed = draw.random() < 0.5


def load(model, draw):
    model.load_state_dict({name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()})


def swap_blocks(model, draw):
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def train_a_step(model, draw):
    model.train()
    model(images(48, 80).to(tables(model)[0].dtype)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    model.zero_grad()
    model.eval()


CHANGES = [
    set_data, new_parameters, transpose_window, resize, other_rule, other_dtype, other_windows, load, swap_blocks,
    train_a_step,
]  # fmt: skip


@pytest.mark.parametrize('seed', range(2))
def test_no_change_leaves_a_stale_bias(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    clear_caches()
    models = [beit(), beit(1)]  # of the same shapes
    for _ in range(60):
        model = draw.choice(models)
        changes = draw.choices(CHANGES, k=draw.choice([0, 1, 1, 2]))
        for change in changes:
            change(model, draw)
        x = images(*draw.choice(SIZES)).to(tables(model)[0].dtype)
        mode = draw.choice([torch.no_grad, torch.inference_mode, nullcontext])
        amp = draw.random() < 0.2 and x.dtype == torch.float32
        with mode(), torch.autocast('cpu', torch.bfloat16, enabled=amp):
            got = model(x)
            with without_caches():
                expected = copy.deepcopy(model)(x)
        assert torch.equal(got, expected), [change.__name__ for change in changes]


class Subclass(torch.Tensor):
    pass


class Wrapping(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result.as_subclass(Subclass) if type(result) is torch.Tensor else result


def ensemble(model, x):
    models = [model, beit(1, depth=1).double()]
    stacked, _ = stack_module_state(models)
    return vmap(lambda state: functional_call(model, state, (x,)))(stacked), torch.stack([m(x) for m in models])


def gradients_of_each_sample(model, x):
    def loss(state, sample):
        return functional_call(model, state, (sample[None],)).square().sum()

    with torch.enable_grad():
        expected = [torch.autograd.grad(model(sample[None]).square().sum(), tables(model)[0])[0] for sample in x]
    return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), x)[TABLE], torch.stack(expected)


def along_a_table(derivative):
    def of_model(model, x):
        table = tables(model)[0].detach()
        direction = torch.randn_like(table)

        def forward(table):
            return functional_call(model, {TABLE: table}, (x,))

        slope = (forward(table + 1e-5 * direction) - forward(table - 1e-5 * direction)) / 2e-5
        return derivative(forward, table, direction), slope

    return of_model


def dual_numbers(forward, table, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward(forward_ad.make_dual(table, direction))).tangent


def inside(mode):
    def of_model(model, x):
        with mode():
            y = model(x)
        return y.as_subclass(torch.Tensor), model(x)

    return of_model


def without_values(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = model(x).shape
    return torch.ones(shape), torch.ones(model(x).shape)


TRANSFORMS = {
    'vmap over models': ensemble,
    'vmap of grad': gradients_of_each_sample,
    'jvp': along_a_table(lambda forward, table, direction: jvp(forward, (table,), (direction,))[1]),
    'forward AD': along_a_table(dual_numbers),
    'functionalize': lambda model, x: (functionalize(model)(x), model(x)),
    'make_fx': lambda model, x: (make_fx(model)(x)(x), model(x)),
    'torch.jit.trace': lambda model, x: (torch.jit.trace(model, x)(x), model(x)),
    'torch.export': lambda model, x: (torch.export.export(model, (x,)).module()(x), model(x)),
    'torch.compile': lambda model, x: (torch.compile(model, backend='aot_eager')(x), model(x)),
    'fake tensors': without_values,
    'dispatch mode': inside(lambda: FlopCounterMode(display=False)),
    'function mode': inside(Wrapping),
    'default device': inside(lambda: torch.device('meta')),
}


def is_plain(tensor):
    wrapped = torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return type(tensor) is torch.Tensor and not wrapped and not tensor.is_inference()


# torch.jit.trace is deprecated from torch 2.11 on; SDPA on the CPU has no rule for vmap, which falls back to a loop
@pytest.mark.filterwarnings('ignore:.torch.jit.* is deprecated', 'ignore:There is a performance drop')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('warm, backend', [(False, 'eager'), (True, 'auto')], ids=['cold', 'warm'])
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_transforms_are_right_and_leave_nothing_behind(transform, warm, backend):
    clear_caches()
    torch.compiler.reset()
    model, x = beit(attn_backend=backend, depth=1).double(), images(64, 96).double()
    with torch.no_grad():
        if warm:
            model(x)
        got, expected = TRANSFORMS[transform](model, x)
        assert relative_error(got, expected) < 1e-8
        again = model(x)
        with without_caches():
            assert torch.equal(again, copy.deepcopy(model)(x))
        geometry = relative_position.bias_geometry((3, 5), (4, 6), 'geometric', x.device)
        bias = bias_of(model.blocks[0].attn, tables(model)[0], geometry, x.dtype)
    assert all(map(is_plain, (bias, geometry.index, *geometry.matrices)))
