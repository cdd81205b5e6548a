"""Options, inputs and outputs of the encoder; test_beit_sizes.py and test_beit_modes.py have sizes and compilers."""

import math
from functools import partial

import pytest
import torch
from helpers import TINY, images, randomize, relative_error, weighted_sum
from timm.models import beit as timm_beit
from torch import nn
from torch.nn import functional as F

from beit_plugin.models.beit import VARIANTS, Beit
from beit_plugin.models.layer_decay import layer_id, no_weight_decay
from beit_plugin.models.relative_position import bias_geometry

GRID = (3, 5)
X = images(48, 80)


def beit(**options):
    return randomize(Beit(**{**TINY, 'num_classes': 7, **options})).eval()


def twin(model, **options):
    """A model of other options with the same weights, as far as it has them."""
    other = Beit(**{**TINY, 'num_classes': 7, **options}).eval()
    names = set(other.state_dict())
    other.load_state_dict({n: t for n, t in model.state_dict().items() if n in names}, strict=True)
    return other


def test_published_sizes():
    for name, sizes in VARIANTS.items():
        with torch.device('meta'):
            ours = Beit(**sizes, num_classes=0)
            theirs = timm_beit.Beit(**sizes, num_classes=0, use_rel_pos_bias=True, use_abs_pos_emb=False)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()), name
    assert VARIANTS['base']['embed_dim'] == 768 and VARIANTS['large']['depth'] == 24


@pytest.mark.parametrize(
    'name, function',
    [
        ('gelu', F.gelu),
        ('relu', F.relu),
        ('selu', F.selu),
        ('gelu_new', lambda x: F.gelu(x, approximate='tanh')),
        (nn.SiLU, F.silu),
        (partial(nn.GELU, approximate='tanh'), partial(F.gelu, approximate='tanh')),
        (partial(F.leaky_relu, negative_slope=0.3), partial(F.leaky_relu, negative_slope=0.3)),
        (torch.tanh, torch.tanh),
    ],
)
def test_activations(name, function):
    model = beit(act_layer=name)
    mlp, x = model.blocks[1].mlp, torch.randn(2, 6, 16)
    torch.testing.assert_close(mlp(x), mlp.fc2(function(mlp.fc1(x))))


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"act_layer must be an activation that timm knows .*, got 'foo'"):
        beit(act_layer='foo')
    with pytest.raises(ValueError, match='name of an activation, a module class or a function, got None'):
        beit(act_layer=None)


def test_norm_eps():
    assert Beit(**TINY).blocks[0].norm1.eps == 1e-6
    model = beit(norm_eps=1e-2, patch_norm=True, global_pool='token')
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 2 and {n.eps for n in norms} == {1e-2}
    assert relative_error(twin(model, patch_norm=True, global_pool='token')(X), model(X)) > 1e-4


@pytest.mark.parametrize('option', ['drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_dropouts_act_in_training_only(option):
    plain = beit()
    model = twin(plain, **{option: 0.5})
    assert torch.equal(model(X), plain(X))
    model.train()
    x = X.repeat(4, 1, 1, 1)

    def run(seed):
        torch.manual_seed(seed)
        return model(x)

    assert torch.equal(run(0), run(0)) and relative_error(run(0), run(1)) > 1e-3


def test_dropout_rates_arrive_where_they_belong():
    model = beit(drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.3, attn_drop_rate=0.4, drop_path_rate=0.6)
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    for block in model.blocks:
        assert (block.attn.proj_drop.p, block.attn.attn_drop.p) == (0.3, 0.4)
        assert (block.mlp.drop1.p, block.mlp.drop2.p) == (0.0, 0.3)  # the reference spares the hidden layer
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert rates == pytest.approx([getattr(block.drop_path2, 'drop_prob', 0.0) for block in model.blocks])


def test_initialisation():
    model = Beit(
        **{**TINY, 'embed_dim': 128}, num_classes=200, init_std=0.05, use_mask_token=True, use_abs_pos_emb=True
    )
    for i, block in enumerate(model.blocks, start=1):
        for linear, scale in (
            (block.attn.qkv, 1),
            (block.mlp.fc1, 1),
            (block.attn.proj, math.sqrt(2 * i)),
            (block.mlp.fc2, math.sqrt(2 * i)),
        ):
            assert linear.weight.std().item() == pytest.approx(0.05 / scale, rel=0.05)
            assert linear.bias is None or not linear.bias.any()
        assert not any(p.any() for p in (block.attn.q_bias, block.attn.v_bias, block.attn.relative_position_bias_table))
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
    assert model.pos_embed.std().item() == pytest.approx(0.05, rel=0.1)
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.05, rel=0.3)
    assert model.head.weight.std().item() == pytest.approx(0.05 * 0.001, rel=0.05)
    assert Beit(**TINY, head_init_scale=1.0).head.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize('value', [0, 0.0, None])
def test_no_layer_scale(value):
    model = beit(init_values=value)
    assert not any('gamma' in name for name, _ in model.named_parameters())
    scaled = Beit(**TINY, num_classes=7, init_values=1.0).eval()
    scaled.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(scaled(X), model(X))


def test_a_whole_number_as_layer_scale():
    gamma = Beit(**TINY, init_values=1).blocks[0].gamma_1
    assert gamma.dtype == torch.float32 and gamma.requires_grad and (gamma == 1).all()


@pytest.mark.parametrize('shape', [(2, 15), (2, 3, 5)])
def test_mask_token_replaces_the_masked_patches(shape):
    model = beit(use_mask_token=True, use_abs_pos_emb=True)
    mask = torch.rand(shape) < 0.4
    tokens, grid = model.embed(X, mask)
    plain, _ = model.embed(X)
    flat = mask.reshape(2, 15)
    positions = model.pos_embed[0, 1:].expand(2, -1, -1)
    assert grid == GRID
    torch.testing.assert_close(tokens[:, 1:][flat], (model.mask_token[0] + positions)[flat])
    assert torch.equal(tokens[:, 1:][~flat], plain[:, 1:][~flat]) and torch.equal(tokens[:, 0], plain[:, 0])
    # what stands under a mask has no influence at all
    other = X.clone()
    pixels = mask.reshape(2, 1, 3, 5).repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(X)
    other[pixels] = 9.0
    assert torch.equal(model.encode(other, mask)[0], model.encode(X, mask)[0])
    assert torch.equal(model.encode(X, torch.zeros(shape, dtype=torch.bool))[0], model.encode(X)[0])
    assert torch.equal(model.forward_features(X, mask), model.encode(X, mask)[0])


def test_absolute_positions():
    model = beit(use_abs_pos_emb=True, use_rel_pos_bias=False)
    without = twin(model, use_rel_pos_bias=False)
    assert model.pos_embed.shape == (1, 16, 16)
    torch.testing.assert_close(model.embed(X)[0], without.embed(X)[0] + model.pos_embed)


@pytest.mark.parametrize('own', [True, False])
@pytest.mark.parametrize('shared', [True, False])
def test_bias_tables_of_each_layer_and_shared(own, shared):
    model = beit(use_rel_pos_bias=own, use_shared_rel_pos_bias=shared)
    tables = {n: p for n, p in model.named_parameters() if n.endswith('relative_position_bias_table')}
    assert {p.shape for p in tables.values()} <= {(5 * 9 + 3, 2)}
    assert len(tables) == 4 * own + shared
    weighted_sum(model(X)).backward()
    assert all(p.grad.abs().sum() > 0 for p in tables.values())
    if own and not shared:  # a shared table is the same as equal tables in all layers
        other = beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
        values = dict(other.state_dict())
        table = values.pop('rel_pos_bias.relative_position_bias_table')
        model.load_state_dict(values | {name: table for name in tables})
        assert relative_error(model(X), other(X)) < 1e-5


@pytest.mark.parametrize('pool', ['avg', 'token', ''])
def test_pooling(pool):
    model = beit(global_pool=pool)
    output = model.encode(X)
    tokens = model.run_blocks(X)[0]
    if pool == 'avg':  # mean of the patches, then the norm
        assert torch.equal(output.last_hidden_state, tokens)
        torch.testing.assert_close(output.pooler_output, model.fc_norm(tokens[:, 1:].mean(1)))
    else:
        assert torch.equal(output.last_hidden_state, model.norm(tokens)) and isinstance(model.fc_norm, nn.Identity)
        pooled = output.last_hidden_state[:, 0]
        assert output.pooler_output is None if pool == '' else torch.equal(output.pooler_output, pooled)
    expected = model.head(output.last_hidden_state if pool == '' else output.pooler_output)
    assert torch.equal(model(X), expected)


def test_use_fc_norm_overrides_the_place_of_the_norm():
    model = beit(global_pool='avg', use_fc_norm=False)
    tokens = model.norm(model.run_blocks(X)[0])
    torch.testing.assert_close(model.encode(X).pooler_output, tokens[:, 1:].mean(1))


def test_outputs_on_request():
    model = beit()
    bare = model.encode(X)
    assert bare.hidden_states == () and bare.attentions == () and bare.grid == GRID
    full = model.encode(X, output_attentions=True, output_hidden_states=True)
    assert [s.shape for s in full.hidden_states] == [(2, 16, 16)] * 5
    assert [a.shape for a in full.attentions] == [(2, 2, 16, 16)] * 4
    for weights in full.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16))
    assert torch.equal(full.hidden_states[0], model.embed(X)[0])
    assert torch.equal(full.hidden_states[-1], full.last_hidden_state)  # with mean pooling there is no final norm
    assert relative_error(full.last_hidden_state, bare.last_hidden_state) < 1e-5  # eager against sdpa
    for i, block in enumerate(model.blocks):  # state i + 1 is what block i makes of state i
        geometry = bias_geometry(GRID, GRID, 'geometric', X.device)
        torch.testing.assert_close(block(full.hidden_states[i], geometry)[0], full.hidden_states[i + 1])


def test_head_mask():
    model = beit()
    per_head = torch.tensor([1.0, 0.0])
    per_layer = torch.ones(4, 2)
    per_layer[2, 1] = 0
    weights = model.encode(X, head_mask=per_layer, output_attentions=True).attentions
    for layer, w in enumerate(weights):
        assert (w[:, 1].abs().sum() == 0) == (layer == 2) and w[:, 0].abs().sum() > 0
    same = model.encode(X, head_mask=per_head.expand(4, 2))[0]
    assert torch.equal(model.encode(X, head_mask=per_head)[0], same)
    assert relative_error(model.encode(X, head_mask=torch.ones(2))[0], model.encode(X)[0]) < 1e-5
    assert relative_error(same, model.encode(X)[0]) > 1e-3


def test_interpolate_pos_encoding_false_holds_the_native_size():
    model = beit()
    assert torch.equal(model.encode(X, interpolate_pos_encoding=False)[0], model.encode(X)[0])
    with pytest.raises(ValueError, match=r'needs images of the native \(48, 80\) pixels, got \(80, 48\)'):
        model.encode(images(80, 48), interpolate_pos_encoding=False)


@pytest.mark.parametrize('channels', [1, 4])
def test_other_channel_counts(channels):
    assert beit(in_chans=channels)(images(48, 80, channels=channels)).shape == (2, 7)


@pytest.mark.parametrize(
    'call, sentence',
    [
        (lambda: beit()(images(48, 80, channels=4)), r'images of shape \(B, 3, H, W\), got \(2, 4, 48, 80\); con'),
        (lambda: beit()(X[0]), r'expected images of shape \(B, 3, H, W\), got \(3, 48, 80\)'),
        (lambda: beit()(images(15, 80)), r'of at least one 16x16 patch, got 15x80 pixels; enlarge or pad'),
        (lambda: beit(img_size=(8, 80)), r'img_size must be at least one 16x16 patch, got \(8, 80\)'),
        (lambda: beit(embed_dim=15), 'embed_dim must be a multiple of num_heads, got 15 and 2 heads'),
        (lambda: beit(global_pool='max'), r"global_pool must be 'avg', 'token' or '', got 'max'"),
        (lambda: beit(rel_pos_resize='cubic'), 'rel_pos_resize must be one of geometric, linear, bilinear'),
        (lambda: beit(attn_backend='flash'), 'attn_backend must be one of auto, eager, sdpa'),
        (lambda: beit().encode(X, torch.ones(2, 15).bool()), 'needs a mask token; build the model with use_'),
        (
            lambda: beit(use_mask_token=True).encode(X, torch.ones(2, 15)),
            r'must have dtype torch.bool, got torch.float',
        ),
        (
            lambda: beit(use_mask_token=True).encode(X, torch.ones(2, 16).bool()),
            r'must have shape \(2, 15\) or \(2, 3, 5\) for this batch of 3x5-patch images, got \(2, 16\)',
        ),
        (lambda: beit(use_mask_token=True).encode(X, torch.ones(2, 5, 3).bool()), r'got \(2, 5, 3\)'),
        (
            lambda: beit().encode(X, head_mask=torch.ones(3)),
            r'head_mask must have shape \(2,\) or \(4, 2\), got \(3,\)',
        ),
    ],
)
def test_error_sentences(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        Beit(dropout=0.1)


def test_layer_ids():
    model = Beit(**TINY, use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True, global_pool='token')
    ids = {name: layer_id(name, 4) for name, _ in model.named_parameters()}
    stem = {n for n, i in ids.items() if i == 0}
    assert stem == {'cls_token', 'mask_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    rest = {n for n, i in ids.items() if i == 5}
    assert rest == {'rel_pos_bias.relative_position_bias_table', 'norm.weight', 'norm.bias', 'head.weight', 'head.bias'}
    assert all(ids[n] == int(n.split('.')[1]) + 1 for n in ids.keys() - stem - rest)
    assert layer_id('layers.11.attn.q_bias', 12) == 12 and layer_id('cls_tokenizer.weight', 12) == 13


def test_no_weight_decay_names_tokens_positions_and_tables():
    model = Beit(**TINY, use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True)
    tables = {f'blocks.{i}.attn.relative_position_bias_table' for i in range(4)}
    expected = {'cls_token', 'mask_token', 'pos_embed', 'rel_pos_bias.relative_position_bias_table'} | tables
    assert no_weight_decay(model) == model.no_weight_decay() == expected
