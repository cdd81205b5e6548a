"""The fused kernels under everything that calls a model in another way: compilers, recomputation, several processes.

The reference is always ``attn_backend='eager'`` without any of it.
"""

import copy
import io
import pickle

import pytest
import torch
from helpers import TINY, gradients, images, needs_cpp_compiler, randomize, relative_error, torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from beit_plugin import Beit
from beit_plugin.kernels import ops, residual_ops
from beit_plugin.models.relative_position import num_relative_distance

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SIZES = {**TINY, 'embed_dim': 32, 'num_heads': 2, 'depth': 2, 'num_classes': 3}  # head dim 16
GRID = (3, 5)


def pair(**options):
    backends = ('fused', 'eager')
    return [randomize(Beit(**{**SIZES, **options}, attn_backend=name)).to(DEVICE).train() for name in backends]


def image(*size):
    return images(*size).to(DEVICE)


def step(model, call, x):
    """Output and gradients of a training step."""
    model.zero_grad()
    output = call(x)
    output.float().square().sum().backward()
    return output.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def agree(got, expected, tolerance=1e-5):
    assert relative_error(got[0], expected[0]) <= tolerance
    errors = {name: relative_error(got[1][name], expected[1][name]) for name in expected[1]}
    assert max(errors.values()) <= tolerance, max(errors, key=errors.get)


@pytest.fixture
def operators():
    """Names of our operators that run; a compiled graph calls them too."""

    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == 'beit_plugin':
                self.calls.append((func, args))
            return func(*args, **(kwargs or {}))

    return Record()


@pytest.mark.parametrize(
    'backend', ['aot_eager', pytest.param('inductor', marks=[pytest.mark.slow, needs_cpp_compiler])]
)
@pytest.mark.parametrize('shared', [False, True])
def test_training_step_compiles_without_a_graph_break(backend, shared):
    """At one size, then at others: from the second on with sizes that are open."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fused, eager = pair(use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for size in [(48, 80), (64, 48), (96, 32)]:
        agree(step(fused, compiled, image(*size)), step(eager, eager, image(*size)))
    if backend == 'aot_eager':  # inductor ties its graphs to ranges of sizes, whichever the attention
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2


def test_compiles_in_mixed_precision():
    torch._dynamo.reset()
    fused, eager = pair()
    compiled, x = torch.compile(fused, fullgraph=True, backend='aot_eager'), image(48, 80)
    with torch.autocast(DEVICE, torch.float16):
        got = step(fused, compiled, x)
        plain = step(fused, fused, x)
    agree(got, plain, 5e-3)  # residual sums run in other kernels when compiled
    agree(got, step(eager, eager, x), 3e-2)  # 11 bits through two blocks


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mode', ['reduce-overhead', 'max-autotune'])
def test_modes_of_the_compiler(mode):
    """Both record CUDA graphs."""
    torch._dynamo.reset()
    fused, eager = pair(embed_dim=64)
    x = image(48, 80)
    compiled = torch.compile(fused, fullgraph=True, mode=mode)
    with torch.autocast('cuda', torch.bfloat16):
        expected = step(eager, eager, x)
        for _ in range(4):  # warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            agree(step(fused, compiled, x), expected, 1e-1)  # 8 bits through two blocks
        with torch.no_grad():
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                assert relative_error(compiled(x).clone(), expected[0]) <= 6e-2


@pytest.mark.parametrize('strict', [False, True])
def test_export_on_request_keeps_the_operator(strict):
    """What ``auto`` does is in test_dispatch.py."""
    if strict and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch 2.6 does not tell a strict export from torch.compile')
    fused, eager = (model.eval() for model in pair())
    program = torch.export.export(fused, (image(48, 80),), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if 'beit_plugin' in str(node.target)]
    assert names == ['beit_plugin.rel_pos_attention.default'] * 2
    assert relative_error(program.module()(image(48, 80)), eager(image(48, 80))) <= 2e-6


def test_export_with_open_sizes():
    fused, eager = (model.eval() for model in pair())
    Dim = torch.export.Dim
    dynamic = {0: Dim('batch', min=1), 2: Dim('height', min=17), 3: Dim('width', min=17)}
    run = torch.export.export(fused, (image(70, 90),), dynamic_shapes=(dynamic,)).module()
    for size in [(70, 90), (48, 80), (33, 100)]:
        assert relative_error(run(image(*size)), eager(image(*size))) <= 5e-6, size


@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.parametrize('size', [(48, 80), (64, 33)])
def test_checkpoint_around_the_model(size, use_reentrant, operators):
    fused, eager = pair()
    x = image(*size).requires_grad_()  # else the reentrant form gives no gradients
    with operators:
        got = step(fused, lambda x: checkpoint(fused, x, use_reentrant=use_reentrant), x)
    names = [func.name() for func, _ in operators.calls]
    assert names.count('beit_plugin::rel_pos_attention') == 4  # two layers, twice
    assert names.count('beit_plugin::rel_pos_attention_backward') == 2
    x.grad, got_x = None, x.grad
    agree(got, step(eager, eager, x))
    assert relative_error(got_x, x.grad) <= 1e-5


def test_copies_and_pickles():
    fused, _ = pair()
    x = image(48, 80)
    expected = step(fused, fused, x)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(saved, weights_only=False)):
        output, grads = step(copied, copied, x)
        assert torch.equal(output, expected[0])
        assert all(torch.equal(grads[name], gradient) for name, gradient in expected[1].items())


def test_half_of_the_parameters_frozen():
    fused, eager = pair()
    for model in (fused, eager):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_('qkv' in name or name.startswith('head'))
        model(image(48, 80)).square().sum().backward()
    for got, expected in zip(fused.parameters(), eager.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None) == (not got.requires_grad)
        assert got.grad is None or relative_error(got.grad, expected.grad) <= 1e-5


class TestRegistration:
    """The operators against what they say of themselves: shapes, aliases, derivatives, under tracing."""

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
    @pytest.mark.parametrize(('qkv_learns', 'table_learns'), [(True, True), (True, False), (False, True)])
    def test_attention(self, qkv_learns, table_learns, dtype, operators):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(2, 16, 3, 2, 16, generator=generator).to(DEVICE, dtype).requires_grad_(qkv_learns)
        table = torch.randn(num_relative_distance(GRID), 2, generator=generator).to(DEVICE)
        with operators:
            ops.attend(qkv, table.requires_grad_(table_learns), GRID).float().square().sum().backward()
        self.check(operators, 'rel_pos_attention', dtype)

    def test_residual(self, operators):
        x, y = (torch.randn(2, 9, 16, device=DEVICE, requires_grad=True) for _ in range(2))
        gamma, weight, bias = (torch.randn(16, device=DEVICE, requires_grad=True) for _ in range(3))
        keep = torch.tensor([2.0, 0.0], device=DEVICE)
        with operators:
            total, normed = residual_ops.add_norm(x, y, gamma, keep, weight, bias, 1e-5)
            (total.square().sum() + normed.square().sum()).backward()
        self.check(operators, 'residual', torch.float32)

    def check(self, operators, name, dtype):
        forward, backward = operators.calls
        assert forward[0].name() == f'beit_plugin::{name}' and backward[0].name() == f'beit_plugin::{name}_backward'
        close = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else {}
        torch.library.opcheck(forward[0], forward[1], **close)
        # it has no derivative of its own, so the check of derivatives gets tensors that want none
        torch.library.opcheck(backward[0], [t.detach() if isinstance(t, torch.Tensor) else t for t in backward[1]])


PROCESSES = """
import sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from beit_plugin import Beit

cuda, kind = torch.cuda.device_count() >= 2, sys.argv[1]
dist.init_process_group('nccl' if cuda else 'gloo')
rank = dist.get_rank()
device = torch.device('cuda', rank) if cuda else torch.device('cpu')
if cuda:
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False

def make(backend):
    torch.manual_seed(0)
    sizes = dict(img_size=(48, 80), embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=3)
    model = Beit(**sizes, attn_backend=backend, use_shared_rel_pos_bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)

images = torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(1)).to(device)
eager, fused = make('eager'), make('fused')
eager(images).square().mean().backward()
tolerance = 1e-5
if kind == 'ddp':
    model = DistributedDataParallel(fused)
else:
    half = kind == 'fsdp half'
    tolerance = 5e-2 if half else tolerance  # 11 bits
    policy = MixedPrecisionPolicy(torch.float16, torch.float32) if half else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (2,))
    for block in fused.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    model = fully_shard(fused, mesh=mesh, mp_policy=policy)
for _ in range(2):  # the second time the shards are gathered anew
    model.zero_grad()
    model(images[2 * rank : 2 * rank + 2]).float().square().mean().backward()
expected = dict(eager.named_parameters())
for name, parameter in fused.named_parameters():
    got = parameter.grad.full_tensor() if kind != 'ddp' else parameter.grad
    error = (got - expected[name].grad).abs().max() / expected[name].grad.abs().max()
    assert error <= tolerance, (name, error)
print('rank', rank, 'done')
dist.barrier()
del model, fused  # gloo's threads must end before the process does, or torch 2.14 aborts now and then
dist.destroy_process_group()
"""


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason='needs a GPU for each of two processes, or none at all')
@pytest.mark.parametrize('kind', ['ddp', 'fsdp', 'fsdp half'])
def test_two_processes(kind, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(PROCESSES)
    said = torchrun(script, kind, TRITON_INTERPRET=int(not torch.cuda.is_available()))
    assert said.count('done') == 2
