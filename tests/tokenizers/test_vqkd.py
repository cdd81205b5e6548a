"""VQ-KD: what a step gives, how it learns, and that encoding changes nothing. (Peers: parity/test_tokenizers.py.)"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import relative_error
from timm.optim import param_groups_weight_decay

from beit_plugin.models.beit import Beit
from beit_plugin.tokenizers import VQKD, Teacher, create_vqkd


def target(seed=5):
    return torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(seed))


def test_a_step_written_out(make_vqkd, images):
    model = make_vqkd(beta=0.5).eval()
    model.quantize.initialized.fill_(True)
    out = model(images, target())
    x = model.encoder.norm(model.encoder.run_blocks(images * 2 - 1)[0])[:, 1:]
    z = F.normalize(model.encode_task_layer(x), dim=2)
    ids = torch.cdist(z, model.quantize.weight).argmin(2)  # B, h*w
    assert torch.equal(ids, out.tokens.flatten(1)) and len(ids.unique()) > 4
    codes = model.quantize.weight[ids]
    y = model.decoder.run_blocks(codes.transpose(1, 2).unflatten(2, (4, 6)))[0]
    rec = model.decode_task_layer(model.decoder.norm(y)[:, 1:])
    cosine = (1 - (F.normalize(rec, dim=2) * F.normalize(target(), dim=2)).sum(2)).mean()
    assert relative_error(out.cosine_loss, cosine) <= 1e-5
    assert relative_error(out.commitment_loss, (z - codes).square().mean()) <= 1e-5
    assert relative_error(out.loss, cosine + 0.5 * (z - codes).square().mean()) <= 1e-5
    assert relative_error(model.predict_tokens(out.tokens), rec) <= 1e-5
    assert torch.equal(model.encode(images), out.tokens)


def test_it_is_the_encoder_of_this_package(make_vqkd):
    model = make_vqkd(attn_backend='eager')
    assert type(model.encoder) is Beit and type(model.decoder) is Beit
    assert {block.attn.backend for block in [*model.encoder.blocks, *model.decoder.blocks]} == {'eager'}
    assert model.decoder.window_size == model.encoder.window_size == (4, 6)


def test_published_sizes():
    with torch.device('meta'):
        model = create_vqkd('base', decoder_depth=3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes['encoder.pos_embed'] == shapes['decoder.pos_embed'] == (1, 197, 768)
    assert shapes['decoder.patch_embed.proj.weight'] == (768, 32, 1, 1)
    assert shapes['decode_task_layer.2.weight'] == (512, 768)
    assert len(model.encoder.blocks) == 12 and len(model.decoder.blocks) == 3
    assert model.input_size == (224, 224) and model.vocab_size == 8192


def test_every_parameter_learns(make_vqkd, images):
    model = make_vqkd()
    model(images, target()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.any() for g in gradients.values())


def test_reports_carry_no_gradient(make_vqkd, images):
    wanted = target().requires_grad_()
    out = make_vqkd()(images, wanted)
    out.loss.backward()
    assert wanted.grad is None
    assert [v.requires_grad for v in out] == [True] + [False] * 5
    assert 0 < out.usage <= 1 and 1 <= out.perplexity <= 40


class Colours(torch.nn.Module):
    """A teacher with something to teach: a random projection of the pixels of each patch."""

    def __init__(self):
        super().__init__()
        self.num_features, self.pretrained_cfg = 16, dict(mean=(0.5,) * 3, std=(0.3,) * 3)
        self.proj = torch.nn.Conv2d(3, 16, 8, 8, bias=False)

    def forward_features(self, x):
        return self.proj(x)


def train(model, pictures, steps=60):
    teacher, generator = Teacher(Colours()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 1e-4), lr=2e-3, betas=(0.9, 0.99))
    outputs = []
    for _ in range(steps):
        x = pictures[torch.randint(len(pictures), (8,), generator=generator)]
        out = model(x, teacher(x, (4, 6)))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        outputs.append(out)
    return outputs, F.normalize(teacher(pictures, (4, 6)), dim=2)


@pytest.mark.parametrize('kmeans_iters, revive', [(10, True), (0, True), (0, False)])
def test_training(make_vqkd, kmeans_iters, revive):
    coarse = torch.rand(32, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    pictures = F.interpolate(coarse, (32, 48))
    options = dict(vocab_size=128, decay=0.9, window=10, kmeans_iters=kmeans_iters, revive=revive)
    model = make_vqkd(plain=True, **options)
    outputs, seen = train(model, pictures)
    first, last = outputs[0], outputs[-1]
    assert 1 - seen.flatten(0, 1).mean(0).norm() > 0.9  # no constant prediction is any good
    assert first.loss > 0.9 and last.loss < 0.1
    used = model.eval().encode(pictures).unique().numel()
    if not kmeans_iters:
        assert first.usage < 0.3 and first.perplexity < 40
    if revive:  # of random directions most are never chosen, unless they are replaced
        assert last.usage > 0.9 and last.perplexity > 80 and used > 110 and last.loss < 0.03
    else:
        assert last.usage < 0.4 and used < 50


def test_encoding_is_not_training(make_vqkd, images):
    model = make_vqkd(drop_path_rate=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = model.encode(images)
    assert all(torch.equal(model.encode(images), tokens) for _ in range(3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.encoder.training and model.encoder.blocks[1].drop_path1.training
    assert torch.equal(model.eval().encode(images), tokens)


def test_an_error_while_encoding_leaves_the_mode(make_vqkd, images):
    model = make_vqkd()
    model.encoder.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode(images)
    assert model.encoder.training


def test_other_sizes_than_the_native(make_vqkd, images):
    model = make_vqkd()
    x = torch.cat((images, images), 3)  # 32, 96
    out = model(x, torch.randn(3, 48, 16))
    assert out.tokens.shape == (3, 4, 12)
    out.loss.backward()
    assert model.encoder.pos_embed.grad.any() and model.decoder.pos_embed.grad.any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(make_vqkd, images, dtype):
    model = make_vqkd(plain=True)
    with torch.autocast('cpu', dtype):
        out = model(images, target().to(dtype))
        tokens = model.encode(images)
    assert out.loss.dtype == torch.float32 and tokens.shape == (3, 4, 6)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.quantize.weight.dtype == torch.float32


def test_other_dtypes(make_vqkd, images):
    model = make_vqkd().eval()
    tokens, loss = model.encode(images), model(images, target()).loss
    double = copy.deepcopy(model).double()
    assert torch.equal(double.encode(images), tokens)
    assert relative_error(double(images, target()).loss, loss) < 1e-5
    half = copy.deepcopy(model).bfloat16()
    assert half.encode(images).shape == tokens.shape and half(images, target()).loss.dtype == torch.float32


def test_arguments_that_are_not_for_the_user(make_vqkd):
    with pytest.raises(TypeError, match='num_classes'):
        make_vqkd(num_classes=5)


def test_wrong_targets_and_numbers(make_vqkd, images):
    model = make_vqkd()
    message = r"teacher's features as \(3, 24, 16\) for this batch, got \(3, 24, 8\); .*grid=\(4, 6\)\), and build"
    with pytest.raises(ValueError, match=message):
        model(images, target()[..., :8])
    with pytest.raises(ValueError, match=r'values in \[0, 1\]'):
        model(images * 2 - 1, target())
    with pytest.raises(ValueError, match=r'no decoder, so it can give tokens but not be trained; build it with'):
        make_vqkd(decoder_depth=0)(images, target())
    with pytest.raises(ValueError, match='expected tokens from 0 to 39, got 40 to 40'):
        model.predict_tokens(torch.full((1, 4, 6), 40))
    for wrong in (dict(decoder_depth=-1), dict(target_dim=0), dict(beta=-1)):
        with pytest.raises(ValueError, match='VQKD needs decoder_depth >= 0'):
            make_vqkd(**wrong)
    with pytest.raises(ValueError, match=r"unknown VQKD variant 'huge'; known are tiny, small, base, large"):
        create_vqkd('huge')
    with pytest.raises(ValueError, match='input_size with sides that are multiples of the 16x16 patch, got 100x100'):
        VQKD(img_size=100)


def test_weight_decay_spares_tokens_and_positions(make_vqkd):
    model = make_vqkd()
    spared = {f'{part}.{name}' for part in ('encoder', 'decoder') for name in ('cls_token', 'pos_embed')}
    assert model.no_weight_decay() == spared
    assert 'quantize.weight' not in dict(model.named_parameters())  # averages, which no optimiser touches


def test_a_timm_model_teaches(make_vqkd, images):
    vit = timm.create_model('vit_tiny_patch16_224', patch_size=8, img_size=(32, 48), embed_dim=32, depth=1, num_heads=2)
    teacher = Teacher(vit)
    model = make_vqkd(target_dim=teacher.dim)
    assert model(images, teacher(images, grid=(4, 6))).loss.isfinite()
