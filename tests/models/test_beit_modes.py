"""Gradient checkpointing, autocast, torch.compile, torch.export, the meta device, tracing."""

import copy

import pytest
import torch
from helpers import TINY, gradients, images, needs_cpp_compiler, randomize, relative_error, weighted_sum
from torch import nn

from beit_plugin.models.beit import Beit
from beit_plugin.segmentation.backbone import BeitBackbone

ALL = dict(use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True)


def beit(**options):
    return randomize(Beit(**{**TINY, 'depth': 2, 'num_classes': 7, **options})).eval()


def mask(grid=(3, 5)):
    return torch.rand(2, *grid, generator=torch.Generator().manual_seed(0)) < 0.4


@pytest.mark.parametrize('size', [(48, 80), (70, 33)])
def test_gradient_checkpointing_changes_nothing(size):
    x, results = images(*size), []
    for enable in (False, True):
        model = beit(drop_path_rate=0.4, attn_drop_rate=0.2, proj_drop_rate=0.2, **ALL).train()
        model.set_grad_checkpointing(enable)
        model.mask_token.requires_grad_(False)
        torch.manual_seed(0)
        output = model(x)
        weighted_sum(output).backward()
        results.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_recomputes_the_blocks():
    model = beit().train()
    runs = []
    model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for enable, expected in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        runs.clear()
        model(images(48, 80)).sum().backward()
        assert len(runs) == expected
    model.eval()
    runs.clear()
    model(images(48, 80)).sum().backward()
    assert len(runs) == 1


@pytest.mark.parametrize('size, grid', [((48, 80), (3, 5)), ((70, 33), (5, 3))])
@pytest.mark.parametrize('masked', [True, False])
# 8 and 11 bits of mantissa through two blocks
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 5e-2), (torch.float16, 8e-3)])
def test_residual_stream_keeps_the_autocast_dtype(dtype, tolerance, masked, size, grid):
    model = beit(**ALL)
    x, hidden = images(*size), mask(grid) if masked else None
    exact = model.encode(x, hidden, output_hidden_states=True)
    with torch.autocast('cpu', dtype):
        output = model.encode(x, hidden, output_hidden_states=True)
    assert {s.dtype for s in output.hidden_states} == {dtype}
    assert relative_error(output.hidden_states[-1], exact.hidden_states[-1]) < tolerance


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_trains_float32_parameters(dtype):
    model = beit(**ALL).train()
    with torch.autocast('cpu', dtype):
        loss = weighted_sum(model.encode(images(70, 33), mask((5, 3))).pooler_output.float())
    loss.backward()
    names = {n for n, p in model.named_parameters() if p.grad is None}
    assert names == {'head.weight', 'head.bias'}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_a_whole_model_in_bfloat16():
    model = beit(**ALL)
    exact = model(images(70, 33))
    low = copy.deepcopy(model).bfloat16()(images(70, 33).bfloat16())
    assert low.dtype == torch.bfloat16 and relative_error(low, exact) < 5e-2


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = beit(**{**ALL, 'depth': 1})
    compiled = torch.compile(lambda x, m: model.encode(x, m)[0], fullgraph=True, backend='eager')
    for size, grid in [((48, 80), (3, 5)), ((64, 33), (4, 3)), ((20, 112), (2, 7))]:  # the second makes it dynamic
        x, hidden = images(*size), mask(grid)
        assert relative_error(compiled(x, hidden), model.encode(x, hidden)[0]) < 1e-6, size


def test_training_step_compiles_without_a_graph_break():
    torch._dynamo.reset()
    plain = beit(use_abs_pos_emb=True, depth=1).train()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in [(48, 80), (64, 33)]:
        for m, call in ((plain, plain), (model, compiled)):
            m.zero_grad()
            weighted_sum(call(images(*size))).backward()
        expected, got = gradients(plain), gradients(model)
        assert max(relative_error(got[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.slow
@needs_cpp_compiler
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x = beit(depth=1).requires_grad_(False), images(64, 33)  # another size: with the operator that resizes
    assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize('options', [dict(), dict(use_abs_pos_emb=True, use_shared_rel_pos_bias=True)])
def test_export_with_dynamic_batch_height_and_width(options):
    model = beit(**options, depth=1)
    Dim = torch.export.Dim
    dynamic = {0: Dim('batch', min=1), 2: Dim('height', min=17), 3: Dim('width', min=17)}
    program = torch.export.export(model, (images(70, 90),), dynamic_shapes=(dynamic,))
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes)  # runs without this package
    run = program.module()
    # the example; native; smaller and larger; no multiple of the patch; one patch high
    for batch, *size in [(2, 70, 90), (2, 48, 80), (1, 33, 47), (3, 128, 64), (2, 17, 200), (1, 48, 96), (1, 32, 80)]:
        x = images(*size, batch=batch)
        assert relative_error(run(x), model(x)) < 1e-5, (batch, size)


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('size', [(48, 80), (70, 33)])
def test_export_at_one_size(size, strict):
    if strict and not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('torch 2.6 does not tell a strict export from torch.compile')
    model = beit(**ALL, depth=1)
    program = torch.export.export(model, (images(*size),), strict=strict)
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(images(*size)), model(images(*size))) < 1e-6


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # sizes become constants of the trace
def test_traces():
    model = beit(use_abs_pos_emb=True)
    for size in [(48, 80), (70, 33)]:  # mmengine counts FLOPs by tracing
        traced = torch.jit.trace(model, images(*size), check_trace=False)
        assert relative_error(traced(images(*size)), model(images(*size))) < 1e-6
    assert model(images(48, 80)).requires_grad


@pytest.mark.parametrize('make', [lambda: Beit(**TINY, **ALL), lambda: BeitBackbone(**TINY, **ALL, add_fpn=True)])
def test_meta_device_then_init_weights(make):
    with torch.device('meta'):
        model = make()
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device='cpu')
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(99)
    model.init_weights()
    reference = make()
    for (name, got), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        got, expected = got.double(), expected.double()
        if expected.numel() > 100 and expected.std() > 0:  # drawn at random
            assert got.std().item() == pytest.approx(expected.std().item(), rel=0.3), name
        elif not expected.any() or (expected == expected.flatten()[0]).all():
            assert torch.equal(got, expected), name
        assert got.abs().max() < 10, name
    result = model.eval()(images(70, 33))
    assert all(y.isfinite().all() for y in (result if isinstance(result, tuple) else (result,)))


def test_device_argument_makes_no_real_tensor():
    model = Beit(**TINY, **ALL, device='meta', dtype=torch.bfloat16)
    assert {(p.is_meta, p.dtype) for p in model.parameters()} == {(True, torch.bfloat16)}
    assert model(torch.empty(2, 3, 70, 33, device='meta', dtype=torch.bfloat16)).shape == (2, 1000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_on_cuda(dtype):
    model = beit(**{**ALL, 'embed_dim': 128})
    for size, grid in [((48, 80), (3, 5)), ((70, 33), (5, 3))]:
        x, hidden = images(*size), mask(grid)
        expected = model.cpu().encode(x, hidden, output_hidden_states=True)
        model.cuda()
        got = model.encode(x.cuda(), hidden.cuda(), output_hidden_states=True)
        assert relative_error(got[0].cpu(), expected[0]) < 1e-3  # TF32 off: order of sums
        with torch.autocast('cuda', dtype):
            low = model.encode(x.cuda(), hidden.cuda(), output_hidden_states=True)
        assert {s.dtype for s in low.hidden_states} == {dtype}
        assert relative_error(low[0].cpu(), expected[0]) < 5e-2


def test_no_state_is_shared_between_models():
    first, second = beit(), beit()
    nn.init.zeros_(first.blocks[0].attn.relative_position_bias_table)
    assert second.blocks[0].attn.relative_position_bias_table.abs().sum() > 0
