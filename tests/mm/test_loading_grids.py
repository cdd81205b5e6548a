"""mmengine's own loaders on files of another grid: tables of 25x41 patches are as long as those of 32x32."""

import importlib.util

import pytest
import torch
from checkpoints.peers import DEPTH, DIM, HEADS, TAPS, segmentor
from checkpoints.peers import mmseg_segmentor as encoder_decoder
from helpers import randomize

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, save_checkpoint, weights_to_cpu

from beit_plugin.checkpoints import save
from beit_plugin.models.resample import resize_rel_pos_bias_table

BACKBONE = dict(type='BEiTBackbone', embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, mlp_ratio=2, out_indices=TAPS)
WIDE, SQUARE = (400, 656), 512


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('dialect', ['native', 'openmmlab', 'unilm', 'transformers'])
def test_the_grid_of_a_file_counts(dialect, suffix, tmp_path):
    theirs = randomize(segmentor(img_size=WIDE, out_indices=(0, 1, 2, 3), channels=DIM))
    save(theirs, tmp_path / f'x.{suffix}', dialect=dialect)
    model = encoder_decoder(ours=True)
    model.backbone = MODELS.build({**BACKBONE, 'img_size': SQUARE})
    load_checkpoint(model, str(tmp_path / f'x.{suffix}'), map_location='cpu')
    name = 'blocks.0.attn.relative_position_bias_table'
    table = model.backbone.state_dict()[name.replace('blocks', 'layers')]
    expected = resize_rel_pos_bias_table(theirs.backbone.state_dict()[name], (25, 41), (32, 32), 'geometric')
    assert torch.equal(table, expected)


def test_what_mmengine_saves_states_the_grid(tmp_path):
    theirs = randomize(MODELS.build({**BACKBONE, 'img_size': WIDE}))
    save_checkpoint({'state_dict': weights_to_cpu(get_state_dict(theirs)), 'meta': {}}, str(tmp_path / 'x.pth'))
    model = MODELS.build({**BACKBONE, 'img_size': SQUARE})
    load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
    name = 'layers.0.attn.relative_position_bias_table'
    expected = resize_rel_pos_bias_table(theirs.state_dict()[name], (25, 41), (32, 32), 'geometric')
    assert torch.equal(model.state_dict()[name], expected)
