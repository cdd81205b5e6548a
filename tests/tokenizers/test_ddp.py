"""VQ-KD in two gloo processes on the CPU: one codebook, and the same as one process has from all the images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import torchrun

SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from beit_plugin.tokenizers import VQKD

torch.set_num_threads(1)
dist.init_process_group('gloo')
rank = dist.get_rank()
SIZES = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=1, num_heads=2, target_dim=8, code_dim=4)
data = torch.Generator().manual_seed(1)
images, target = torch.rand(4, 3, 32, 48, generator=data), torch.randn(4, 24, 8, generator=data)


def run(wrap, mine, steps, **options):
    torch.manual_seed(0)
    model = VQKD(**SIZES, vocab_size=64, **options)
    torch.manual_seed(100 + rank)  # as workers have: each draws other features
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        out = wrapped(images[mine], target[mine])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return model, out


def ddp(model):
    return DistributedDataParallel(model, broadcast_buffers=False)  # the codebooks must agree by themselves


def everywhere(tensor):
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.contiguous())
    return parts


# the processes have different numbers of images
mine = slice(0, 1) if rank == 0 else slice(1, 4)
model, out = run(ddp, mine, 6, window=2, decay=0.8)
for name, value in model.quantize.state_dict().items():
    a, b = everywhere(value.float())
    assert torch.equal(a, b), name
assert model.quantize.initialized and (model.quantize.unused_steps > 0).any()
assert torch.allclose(model.quantize.weight.norm(dim=1), torch.ones(64), atol=1e-5)  # also what came in just now
assert (model.quantize.unused_steps % 2 == 0).sum() > (model.quantize.unused_steps == 0).sum()
assert torch.equal(*everywhere(out.usage)) and torch.equal(*everywhere(out.perplexity))
DistributedDataParallel(model)(images[mine], target[mine]).loss.backward()  # buffers broadcast, the default
features = everywhere(model.quantize.weight[model.quantize.unused_steps == 0])
assert torch.equal(*features)

# nothing random: as one process with all images
half = slice(2 * rank, 2 * rank + 2)
model, _ = run(ddp, half, 4, kmeans_iters=0, revive=False)
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
print('rank', rank, 'done')
dist.barrier()
del model, out  # gloo's threads must end before the process does, or torch 2.14 aborts now and then
dist.destroy_process_group()
"""
ALONE = SCRIPT.replace("dist.init_process_group('gloo')", '').replace('dist.get_rank()', '0')
ALONE = ALONE[: ALONE.index('# the processes have')] + (
    'model, _ = run(lambda model: model, slice(0, 4), 4, kmeans_iters=0, revive=False)\n'
    'torch.save(model.state_dict(), sys.argv[1])\n'
)


@pytest.mark.skipif(not torch.distributed.is_available(), reason='this PyTorch is built without torch.distributed')
def test_two_processes(tmp_path):
    root = Path(__file__).parents[2]
    env = {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(root)}
    for name, source in (('two', SCRIPT), ('one', ALONE)):
        (tmp_path / f'{name}.py').write_text(source)
    assert torchrun(tmp_path / 'two.py', tmp_path / 'two.pt', **env).count('done') == 2
    alone = [sys.executable, '-W', 'ignore', tmp_path / 'one.py', tmp_path / 'one.pt']
    subprocess.run(alone, check=True, timeout=200, env={**os.environ, **env})
    two, one = (torch.load(tmp_path / f'{name}.pt', weights_only=True) for name in ('two', 'one'))
    assert two.keys() == one.keys()
    for name, value in two.items():
        assert torch.allclose(value.double(), one[name].double(), rtol=1e-4, atol=1e-5), name
