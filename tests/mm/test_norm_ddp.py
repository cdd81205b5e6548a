"""The synchronised norm in two gloo processes on the CPU, inside DDP, which refuses torch's own there."""

import subprocess
import sys

import pytest

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

SCRIPT = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from beit_plugin.mm.norm import BEiTSyncBN
dist.init_process_group('gloo')
model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 1), BEiTSyncBN(4)))
model(torch.randn(2, 3, 5, 7)).square().sum().backward()
assert model.module[0].weight.grad.abs().sum() > 0
print('rank', dist.get_rank(), 'done')
dist.barrier()
del model  # gloo's threads must end before the process does, or torch 2.14 aborts now and then
dist.destroy_process_group()
"""


def test_ddp_takes_it(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    command = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    done = subprocess.run([*command, '-m', 'beit_plugin', str(script)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('done') == 2
