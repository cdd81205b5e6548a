"""Weights spread over two processes train as whole ones: losses, norms, checkpoints, going on from one; pictures."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import torchrun

if importlib.util.find_spec('mmengine') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from pretraining_common import pictures, pretrainer, tokenizer, tokenizer_file
from tools_common import ROOT

from beit_plugin import checkpoints
from beit_plugin.mm.training.fsdp import BEiTFSDPStrategy, FSDPStrategy, _by_names, beit_blocks
from beit_plugin.models.block import Block
from beit_plugin.models.mim import BeitForMaskedImageModeling

SCRIPT = """
import json, shutil, sys
from pathlib import Path
sys.path[:0] = {paths}
import torch
torch.set_num_threads(1)
import beit_plugin.mm
from mmengine.config import Config
from mmengine.registry import MODELS, STRATEGIES
from mmengine.runner import FlexibleRunner
from beit_plugin.checkpoints import CheckpointError
from pretraining_common import PICTURE, config, pretrainer

folder, cuda = Path(sys.argv[1]), torch.cuda.device_count() >= 2

def train(kind, iterations, resume=False):
    model = pretrainer(folder / 'tokenizer.safetensors', data_preprocessor=dict(type='BEiTMIMDataPreprocessor'))
    cfg = config(folder / 'images', folder / kind, model, iterations, hooks=PICTURE)
    cfg['optim_wrapper']['clip_grad'] = dict(max_norm=0.5)
    whole = dict(type='DDPStrategy', model_wrapper=dict(type='MMDistributedDataParallel'))
    cfg['env_cfg'] = dict(dist_cfg=dict(backend='nccl' if cuda else 'gloo'))
    if not cuda:
        whole['model_wrapper']['device_ids'] = None
    sharded = Config.fromfile({base!r}).strategy.to_dict()
    cfg.update(launcher='pytorch', resume=resume, strategy=whole if kind == 'whole' else sharded)
    runner = FlexibleRunner.from_cfg(Config(cfg))
    runner.train()
    found = {{name: runner.message_hub.get_scalar('train/' + name).data[0].tolist() for name in ('loss', 'grad_norm')}}
    own = sum(p.numel() for p in runner.model.parameters())
    (folder / f'{{kind}}{{torch.distributed.get_rank()}}.json').write_text(json.dumps(dict(found, own=own)))

train('whole', 4)
train('sharded', 2)
train('sharded', 4, resume=True)
rank = torch.distributed.get_rank()
if rank == 0:
    (folder / 'from_whole').mkdir()
    shutil.copy(folder / 'whole/iter_2.pth', folder / 'from_whole/iter_2.pth')
    (folder / 'from_whole/last_checkpoint').write_text(str(folder / 'from_whole/iter_2.pth'))
torch.distributed.barrier()
train('from_whole', 4, resume=True)

backbone = MODELS.build(dict(type='BEiTBackbone', embed_dims=16, num_layers=3, num_heads=2, patch_size=8, img_size=32))
state = {{name: value + 1 for name, value in backbone.state_dict().items() if value.ndim}}
strategy = STRATEGIES.build(Config.fromfile({base!r}).strategy)
strategy.model = strategy._wrap_model(backbone)
strategy.load_model_state_dict(state)
found = strategy.model.state_dict()
assert rank or all(torch.equal(found[name].cpu(), value) for name, value in state.items())
said = []
table = 'layers.1.attn.relative_position_bias_table'
renamed = {{name.replace('layers', 'blocks'): value for name, value in state.items()}}
for other in ({{**state, table: state[table][:9]}}, renamed):
    try:
        strategy.load_model_state_dict(other)
    except CheckpointError as error:
        said.append(str(error))
(folder / f'said{{rank}}').write_text(chr(10).join(said))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope='module')
def trainings(tmp_path_factory):
    """Four steps by whole weights; by sharded ones two, and by another Runner two more."""
    folder = tmp_path_factory.mktemp('sharded')
    pictures(folder / 'images')
    tokenizer_file(folder / 'tokenizer.safetensors')
    script = folder / 'script.py'
    paths = [str(ROOT / 'tests'), str(ROOT)]
    script.write_text(SCRIPT.format(paths=paths, base=str(ROOT / 'configs/_base_/sharded.py')))
    torchrun(script, folder)
    return folder


def read(folder, kind):
    return [json.loads((folder / f'{kind}{rank}.json').read_text()) for rank in range(2)]


def test_losses_and_norms(trainings):
    for rank, (whole, sharded) in enumerate(zip(read(trainings, 'whole'), read(trainings, 'sharded'), strict=True)):
        first = 2 * rank  # numbers of steps before are those of the checkpoint, which are the first process's
        for name in ('loss', 'grad_norm'):
            assert len(sharded[name]) == 4 and sharded[name][first:] == pytest.approx(whole[name][first:], rel=1e-5)
        assert whole['grad_norm'][0] > 0.5  # it is clipped
    assert sum(one['own'] for one in read(trainings, 'sharded')) < 1.1 * read(trainings, 'whole')[0]['own']


def test_from_a_training_with_whole_weights(trainings):
    for whole, found in zip(read(trainings, 'whole'), read(trainings, 'from_whole'), strict=True):
        assert found['loss'][2:] == pytest.approx(whole['loss'][2:], rel=1e-5)
    unnamed = dict(state={0: {}}, param_groups=[dict(params=[0])])
    with pytest.raises(checkpoints.CheckpointError, match='does not say which weights its numbers are of'):
        _by_names(unnamed)


def test_backbones_take_their_own_names_only(trainings):
    for rank in range(2):
        size, names = (trainings / f'said{rank}').read_text().splitlines()
        assert 'lacks layers.1.attn.relative_position_bias_table, or has them in other shapes; give it as pre' in size
        assert 'loads its own checkpoints only' in names and 'layers.0.' in names


def test_started_alone():
    with pytest.raises(ValueError, match='spreads weights over processes, and was started without: use torchrun'):
        object.__new__(BEiTFSDPStrategy)._wrap_model(Block(8, 2))


def test_checkpoints(trainings):
    paths = (trainings / kind / 'iter_4.pth' for kind in ('whole', 'sharded'))
    whole, sharded = (torch.load(path, map_location='cpu', weights_only=True) for path in paths)
    weights = {name.removeprefix('module.'): value for name, value in whole['state_dict'].items()}
    assert sharded['state_dict'].keys() == weights.keys()
    assert max((sharded['state_dict'][name] - value).abs().max() for name, value in weights.items()) < 1e-5
    groups = whole['optimizer']['param_groups'], sharded['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups[0]] == [group['weight_decay'] for group in groups[1]] == [0.05, 0]
    assert sharded['optimizer']['base_param_settings'] == whole['optimizer']['base_param_settings']
    names = [name for group in groups[0] for name in group['param_names']]
    for number, name in enumerate(names):
        for kind in ('exp_avg', 'exp_avg_sq'):
            expected, found = (state['optimizer']['state'] for state in (whole, sharded))
            found = found[name.removeprefix('module.')][kind]
            assert torch.allclose(found, expected[number][kind].view_as(found), atol=1e-7), (name, kind)
    model = BeitForMaskedImageModeling(
        vocab_size=13, img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0
    )
    assert not checkpoints.load(model, trainings / 'sharded/iter_4.pth').fresh
    name = 'blocks.1.attn.qkv.weight'
    assert torch.equal(model.state_dict()[name], sharded['state_dict'][f'model.{name}'])


def test_pictures(trainings):
    assert (trainings / 'sharded/pictures/iter_3.png').read_bytes()[:4] == b'\x89PNG'


def test_tokenizer_goes_to_the_gpu(monkeypatch, process_group):
    monkeypatch.setattr('beit_plugin.mm.training.fsdp.get_device', lambda: 'meta')
    monkeypatch.setattr(FSDPStrategy, '_wrap_model', lambda self, model: model)
    model = MODELS.build(pretrainer(tokenizer()))
    strategy = object.__new__(BEiTFSDPStrategy)
    strategy.model_wrapper, strategy.optim_state_dict_config = None, SimpleNamespace()
    assert strategy._wrap_model(model) is model
    assert all(weight.is_meta for weight in model.tokenizer.parameters()) and not next(model.parameters()).is_meta


def test_blocks_are_the_units():
    block = Block(8, 2)
    assert beit_blocks(block, False, 1) and not beit_blocks(block.mlp, False, 1) and beit_blocks(block.mlp, True, 1)
