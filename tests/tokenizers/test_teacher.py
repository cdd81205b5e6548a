"""Models of timm as teachers: tokens and maps of every form to one vector for each token."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import nn

import beit_plugin  # noqa: F401  registers
from beit_plugin.tokenizers import Teacher

SMALL = dict(img_size=(32, 48), embed_dim=32, depth=1, num_heads=2, num_classes=7)


def vit(name='vit_tiny_patch16_224', patch_size=8, **options):
    return timm.create_model(name, **{**SMALL, 'patch_size': patch_size, **options})


def normalised(images, model):
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ('mean', 'std'))
    return (images - mean) / std


def test_a_vit(images):
    model = vit()
    got = Teacher(model)(images, (4, 6))
    assert relative_error(got, model.forward_features(normalised(images, model))[:, 1:]) <= 1e-6
    assert not got.requires_grad


def test_norm_after_the_pooling_and_registers(images):
    model = vit('vit_tiny_patch16_224', global_pool='avg', reg_tokens=2)
    nn.init.normal_(model.fc_norm.weight)
    teacher = Teacher(model)
    expected = model.fc_norm(model.forward_features(normalised(images, model))[:, 3:])
    assert isinstance(model.norm, nn.Identity) and relative_error(teacher(images, (4, 6)), expected) <= 1e-6


def test_clip_through_its_projection(images):
    model = vit('vit_base_patch16_clip_224.openai')
    teacher = Teacher(model, through_classifier=True)
    expected = model.head(model.forward_features(normalised(images, model))[:, 1:])
    assert teacher.dim == 7 and relative_error(teacher(images, (4, 6)), expected) <= 1e-6
    assert teacher.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert Teacher(model).dim == 32


@pytest.mark.parametrize(
    'name, options',
    [
        ('beit_plugin_tiny_patch16_224', dict(img_size=(32, 48), embed_dim=32, depth=1, num_heads=2, patch_size=8)),
        ('resnet10t', {}),
        ('swin_tiny_patch4_window7_224', dict(img_size=(64, 96), embed_dim=16, depths=(1, 1), num_heads=(1, 2))),
    ],
)
def test_other_models(images, name, options):
    model = timm.create_model(name, **options)
    teacher = Teacher(model, **({} if options else dict(input_size=(64, 96))))
    got = teacher(images, (4, 6))
    assert got.shape == (3, 24, teacher.dim)
    # each vector is that of its own place: change the lower right corner, and the upper left one changes least
    changed = images.clone()
    changed[:, :, 24:, 40:] = 1 - changed[:, :, 24:, 40:]
    difference = (teacher(changed, (4, 6)) - got).norm(dim=2).mean(0)
    assert difference[-1] > 2 * difference[0]


def test_other_grids_and_sizes(images):
    model = vit()
    teacher = Teacher(model)
    maps = model.forward_features(normalised(images, model))[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    coarse = F.interpolate(maps, (2, 3), mode='bilinear', antialias=True).flatten(2).transpose(1, 2)
    assert relative_error(teacher(images, (2, 3)), coarse) <= 1e-6
    large = F.interpolate(images, (64, 96), mode='bicubic')
    assert teacher.input_size == (32, 48)
    assert relative_error(teacher(large, (4, 6)), teacher(images, (4, 6))) < 0.5
    patches = Teacher(vit(patch_size=4))  # a finer grid than the one asked for
    assert patches(images, (4, 6)).shape == (3, 24, 32)


def test_it_stays_frozen(images):
    teacher = Teacher(vit(drop_path_rate=0.9, proj_drop_rate=0.5))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(teacher(images, (4, 6)), teacher(images, (4, 6)))


class Odd(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        self.output = output

    def forward_features(self, _):
        return self.output


def test_what_cannot_teach(images):
    with pytest.raises(
        ValueError, match=r'needs forward_features, and Linear has none; give a model of timm.create_mo'
    ):
        Teacher(nn.Linear(3, 3))
    silent = Odd(None)
    silent.pretrained_cfg = None
    with pytest.raises(ValueError, match=r'Odd does not say how it normalises images .* give mean=\.\.\. and std='):
        Teacher(silent)
    assert Teacher(silent, mean=(0, 0, 0), std=(1, 1, 1)).input_size is None
    for output, got in ((torch.zeros(3, 23, 8), r'\(3, 23, 8\)'), (torch.zeros(3, 8), r'\(3, 8\)'), ([1], 'list')):
        with pytest.raises(ValueError, match=rf'tokens \(B, 0 \+ h\*w, C\) or a map, got {got} for images of 32x48'):
            Teacher(Odd(output))(images, (4, 6))
