"""Attention within windows: against loops in float64, against attention over everything, under compilers, errors."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import TINY, gradients, images, needs_cpp_compiler, randomize, relative_error, weighted_sum

from beit_plugin.models.beit import Beit
from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
from beit_plugin.models.relative_position import relative_position_index
from beit_plugin.models.resample import resize_rel_pos_bias_table
from beit_plugin.models.windows import Windows, cut_windows, resolve_global_blocks
from beit_plugin.segmentation.backbone import BeitBackbone

SIZES = {**TINY, 'embed_dim': 32, 'depth': 4, 'num_classes': 3}  # head dim 16, native grid 3 x 5
WINDOW = dict(window_size=(2, 3), global_blocks=(1, 3))
FORMS = {
    'own tables': dict(),
    'shared table': dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'both': dict(use_shared_rel_pos_bias=True),
    'positions': dict(use_rel_pos_bias=False, use_abs_pos_emb=True),
}
# grids of 3 x 5, which the window does not divide; 4 x 6, which it does; 5 x 3, 1 x 6: narrower than the window; 2 x 3
IMAGES = [(48, 80), (64, 96), (70, 33), (16, 96), (32, 48)]


def beit(cls=Beit, **options):
    return randomize(cls(**{**SIZES, **WINDOW, **options}))


def starts(length, size):
    """Where windows begin along an axis; the last one ends at its end."""
    return sorted({min(start, length - size) for start in range(0, length, size)})


def by_loops(model, x, windowed=(0, 2)):
    """Tokens before the final norm, one window at a time, on none of the code under test."""
    x, (h, w) = model.embed(x)
    B, _, C = x.shape
    heads = model.blocks[0].attn.num_heads
    for i, block in enumerate(model.blocks):
        wh, ww = (min(2, h), min(3, w)) if i in windowed else (h, w)
        bias, index = 0, relative_position_index(wh, ww)
        for owner in (block.attn, model.rel_pos_bias):
            table = None if owner is None else owner.relative_position_bias_table
            if table is not None:
                table = resize_rel_pos_bias_table(table, model.window_size, (wh, ww), model.rel_pos_resize)
                bias = bias + table[index].permute(2, 0, 1)
        y = block.norm1(x)
        qkv_bias = torch.cat((block.attn.q_bias, torch.zeros(C).to(y), block.attn.v_bias))
        qkv = F.linear(y, block.attn.qkv.weight, qkv_bias).view(B, -1, 3, heads, C // heads)
        out, cls_tokens = {}, []
        for top in starts(h, wh):
            for left in starts(w, ww):
                places = [1 + (top + r) * w + left + c for r in range(wh) for c in range(ww)]
                q, k, v = qkv[:, [0, *places]].permute(2, 0, 3, 1, 4)
                weights = (q @ k.transpose(2, 3) * (C // heads) ** -0.5 + bias).softmax(-1)
                tokens = (weights @ v).transpose(1, 2).flatten(2)
                cls_tokens.append(tokens[:, 0])
                for place, token in zip(places, tokens[:, 1:].unbind(1), strict=True):
                    out.setdefault(place, token)  # the first window that has it
        out[0] = torch.stack(cls_tokens).mean(0)
        y = block.attn.proj(torch.stack([out[place] for place in range(1 + h * w)], 1))
        x = x + block.gamma_1 * y
        x = x + block.gamma_2 * block.mlp(block.norm2(x))
    return x


def check_against_loops(backend, dtype, tolerance, form, size):
    exact = beit(**FORMS[form]).double()
    x = images(*size).double()
    expected = exact.forward_head(exact.norm(by_loops(exact, x)))
    weighted_sum(expected).backward()
    reference = gradients(exact)
    model = beit(**FORMS[form], attn_backend=backend).to(dtype)
    got = model(x.to(dtype))
    assert relative_error(got, expected) <= tolerance
    weighted_sum(got).backward()
    errors = {name: relative_error(g, reference[name]) for name, g in gradients(model).items()}
    assert max(errors.values()) <= tolerance, max(errors, key=errors.get)


@pytest.mark.parametrize('size', IMAGES)
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('backend', ['eager', 'sdpa'])
def test_against_loops_in_float64(backend, form, size):
    check_against_loops(backend, torch.float64, 1e-12, form, size)


@pytest.mark.parametrize('form, size', [('own tables', (48, 80)), ('shared table', (70, 33)), ('both', (64, 96))])
def test_kernels_against_loops(form, size):
    check_against_loops('fused', torch.float32, 2e-5, form, size)  # rounding through four blocks and back


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 5e-2), (torch.float16, 8e-3)])
def test_autocast(dtype, tolerance):
    model, x = beit().eval(), images(70, 90)
    with torch.autocast('cpu', dtype):
        tokens = model.run_blocks(x)[0]
    assert tokens.dtype == dtype and relative_error(tokens, model.run_blocks(x)[0]) < tolerance


@pytest.mark.parametrize('window', [(5, 6), (9, 9), 7])
@pytest.mark.parametrize('size', [(48, 80), (70, 90)])
def test_window_that_covers_the_grid_is_attention_over_everything(window, size):
    windowed, plain = beit(window_size=window), beit(window_size=None, global_blocks=None)
    assert torch.equal(windowed(images(*size)), plain(images(*size)))


def test_all_blocks_global_is_attention_over_everything():
    windowed, plain = beit(global_blocks=range(4)), beit(window_size=None, global_blocks=None)
    assert torch.equal(windowed(images(70, 33)), plain(images(70, 33)))


def test_window_of_the_native_grid_reads_the_table_as_it_is():
    model = beit(window_size=(3, 5))
    x, grid = model.embed(images(96, 160))
    bias = model.position_bias(grid, x)
    assert bias.windowed.geometry.matrices is None and bias.full.geometry.matrices is not None
    assert bias.windowed.windows == Windows((6, 10), (3, 5)) and bias.windowed.windows.counts() == (2, 2)


@pytest.mark.parametrize('grid, size', [((7, 5), (3, 2)), ((6, 4), (3, 2)), ((3, 9), (3, 4)), ((4, 4), (4, 1))])
def test_merge_inverts_split(grid, size):
    windows = cut_windows(grid, size)
    x = torch.randn(2, 1 + grid[0] * grid[1], 3, requires_grad=True)
    parts = windows.split(x)
    assert parts.shape == (2 * windows.total(), 1 + size[0] * size[1], 3)
    whole = windows.merge(parts)
    torch.testing.assert_close(whole, x)
    whole.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    rows = windows.split(x[:, :, :1].detach())[:, 1:, 0]
    assert len(rows.unique()) == 2 * grid[0] * grid[1]  # nothing is left out, nothing comes from elsewhere


@pytest.mark.parametrize('form', ['own tables', 'shared table'])
def test_gradient_checkpointing_changes_nothing(form):
    results = []
    for enable in (False, True):
        model = beit(**FORMS[form], drop_path_rate=0.4, attn_drop_rate=0.2).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        output = model(images(70, 33))
        weighted_sum(output).backward()
        results.append([output, *gradients(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def fresh_compiler():
    """Else a size of an earlier test makes this one open, which takes long to trace."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_without_a_graph_break(fresh_compiler):
    model = beit(depth=2, global_blocks=(1,))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    for m in (model, compiled):
        weighted_sum(m(images(70, 33))).backward()
    expected, got = gradients(model), gradients(compiled._orig_mod)
    assert max(relative_error(got[name], expected[name]) for name in expected) < 1e-5


def test_compiles_once_for_sizes_alike(fresh_compiler):
    model = beit(depth=1, global_blocks=()).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in [(80, 112), (112, 160)]:  # multiples of the patch but not of the window
        with torch.no_grad():
            assert relative_error(compiled(images(*size)), model(images(*size))) < 1e-5, size
    assert counter.frame_count == 1


@needs_cpp_compiler
def test_compiles_with_inductor(fresh_compiler):
    model = beit(depth=1, global_blocks=()).eval()
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(images(48, 80)), model(images(48, 80))) < 1e-5


def test_exports_at_one_size_and_at_open_ones():
    model = beit(depth=2, global_blocks=(1,)).eval()
    program = torch.export.export(model, (images(70, 33),), strict=False)
    assert relative_error(program.module()(images(70, 33)), model(images(70, 33))) < 1e-6
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (images(100, 150),), dynamic_shapes=(dynamic,), strict=False)
    assert not any('beit_plugin' in str(node.target) for node in program.graph.nodes)
    for size in [(100, 150), (64, 96), (70, 130)]:
        assert relative_error(program.module()(images(*size)), model(images(*size))) < 1e-5, size


def test_attentions_are_those_of_the_windows():
    model = beit().eval()
    output = model.encode(images(48, 80), output_attentions=True)
    # 2 x 2 windows of 2 x 3 in a grid of 3 x 5
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 2, 7, 7), (2, 2, 16, 16)] * 2
    assert all(torch.allclose(a.sum(-1), torch.ones(1)) for a in output.attentions)
    assert relative_error(output.last_hidden_state, model.forward_features(images(48, 80))) < 1e-5
    off = model.encode(images(48, 80), head_mask=torch.tensor([1.0, 0.0]), output_attentions=True).attentions
    assert all((a[..., 1, :, :] == 0).all() for a in off)


@pytest.mark.parametrize('cls', [BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling])
def test_masked_image_models(cls):
    sizes = {name: value for name, value in SIZES.items() if name != 'num_classes'}
    model, plain = (randomize(cls(**sizes, **windows, vocab_size=9)) for windows in (WINDOW, {}))
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    assert relative_error(model(images(48, 80), mask).logits, plain(images(48, 80), mask).logits) > 1e-3
    states = model.run_blocks(images(48, 80), mask)[0]
    assert torch.equal(model(images(48, 80), mask).logits, model.forward_head(model.norm(states))[mask.flatten(1)])


def test_backbone_and_pruned_blocks():
    maps = beit(BeitBackbone, out_indices=(0, 1, 2, 3), add_fpn=True).eval()(images(70, 33))
    assert [tuple(y.shape[2:]) for y in maps] == [(18, 9), (9, 5), (5, 3), (2, 1)]
    model = beit().eval()
    expected = model.forward_intermediates(images(70, 33), [1], intermediates_only=True)[0]
    model.prune_intermediate_layers([1])
    assert torch.equal(model.forward_intermediates(images(70, 33), [1], intermediates_only=True)[0], expected)


def test_an_image_does_not_see_the_others():
    model = beit().eval()
    x = images(70, 90)
    both = model.run_blocks(x)[0]
    assert relative_error(both[1:], model.run_blocks(x[1:])[0]) < 1e-6


@pytest.mark.parametrize(
    'depth, expected', [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (6, (0, 2, 3, 5)), (2, (0, 1)), (1, (0,))]
)
def test_default_global_blocks(depth, expected):
    assert resolve_global_blocks(None, depth, (14, 14)) == expected


def test_global_blocks_by_number():
    assert resolve_global_blocks({-1, 3}, 12, (14, 14)) == (3, 11) and resolve_global_blocks((), 12, (1, 1)) == ()
    model = beit(global_blocks=(-1,))
    assert model.global_blocks == (3,) and [b.windowed for b in model.blocks] == [True, True, True, False]


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(window_size=0), r'window_size must be one or two whole numbers \(h, w\) of patches above 0, got 0'),
        (dict(window_size=(2, 3, 4)), r'got \(2, 3, 4\); use 14 for the tables of 224 pixels'),
        (dict(window_size=2.5), 'got 2.5'),
        (dict(window_size=None), r'got global_blocks=\(1, 3\) without a window_size'),
        (
            dict(global_blocks=(1, 4)),
            r'global_blocks \[4\] do not exist: the model has 4 blocks, so give numbers from 0',
        ),
        (dict(global_blocks=('last',)), r"global_blocks \['last'\] do not exist"),
    ],
)
def test_error_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        beit(**options)
