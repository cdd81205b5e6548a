"""The recipes of configs/cls against timm: models, optimiser groups, schedule."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

import beit_plugin  # noqa: F401  registers

RECIPES = sorted((Path(__file__).parents[1] / 'configs/cls').glob('*.yaml'))
SMALL = dict(embed_dim=16, num_heads=2)  # the depth is the recipe's


def test_there_are_recipes():
    assert len(RECIPES) == 11


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    text = path.read_text()
    recipe = yaml.safe_load(text)
    weights = recipe['model'] if recipe.get('pretrained') else None
    assert weights in timm.list_pretrained('beit*_plugin_*') or re.search(r'--pretrained-path FILE\n', text)
    assert ('beitv2' in path.stem) == recipe['model'].startswith('beitv2')
    gpus, batch, accumulated, total = re.search(
        r'(\d+) GPUs x (\d+) images(?: x (\d+) accumulated)?: keep the product at (\d+)', text
    ).groups()
    assert int(batch) == recipe['batch_size'] and int(accumulated or 1) == recipe.get('grad_accum_steps', 1)
    assert int(gpus) * int(batch) * int(accumulated or 1) == int(total)
    assert re.search(r'# Expected  top-1 8\d\.\d ', text)

    model = timm.create_model(
        recipe['model'], num_classes=10, img_size=recipe.get('img_size'), drop_path_rate=recipe['drop_path'], **SMALL
    )
    size = recipe.get('img_size', 224)
    assert model.patch_embed.img_size == (size, size)
    options = {key: recipe[key] for key in ('opt', 'lr', 'weight_decay', 'layer_decay')}
    optimizer = create_optimizer_v2(model, **options)
    depth, scales = len(model.blocks), {group['lr_scale'] for group in optimizer.param_groups}
    assert min(scales) == pytest.approx(recipe['layer_decay'] ** (depth + 1)) and max(scales) == 1
    assert isinstance(optimizer, torch.optim.AdamW)

    steps = 10
    names = ('sched', 'warmup_epochs', 'warmup_lr', 'min_lr', 'cooldown_epochs')
    schedule, epochs = create_scheduler_v2(
        optimizer, num_epochs=recipe['epochs'], updates_per_epoch=steps, step_on_epochs=not recipe['sched_on_updates'],
        **{key: recipe[key] for key in names},
    )  # fmt: skip
    assert epochs == recipe['epochs']
    highest = 0.0
    for update in range(epochs * steps):
        schedule.step_update(update)
        last = max(group['lr'] for group in optimizer.param_groups)
        highest = max(highest, last)
    assert highest == pytest.approx(recipe['lr'], rel=0.05) and last < 0.01 * highest + recipe['min_lr']
