"""Synchronised batch norm in two processes against plain batch norm of the whole batch, in float64."""

import pytest
import torch
from helpers import relative_error, torchrun
from torch import nn

from beit_plugin.segmentation.sync_batch_norm import SyncBatchNorm

GPUS = torch.cuda.device_count()
SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from beit_plugin.segmentation.sync_batch_norm import SyncBatchNorm

cuda = sys.argv[1] == 'cuda'
dist.init_process_group('nccl' if cuda else 'gloo')
rank = dist.get_rank()
device = torch.device('cuda', rank) if cuda else torch.device('cpu')
if cuda:
    torch.cuda.set_device(device)

def close(a, b):
    error = (a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-9)
    assert error < (1e-4 if cuda else 1e-12), error

for shape, layout, options in (
    ((5, 4, 3, 6), torch.contiguous_format, {}),
    ((5, 4, 3, 6), torch.channels_last, dict(momentum=0.3, eps=0.1)),
    ((5, 4), torch.contiguous_format, dict(momentum=None)),
    ((5, 4, 7), torch.contiguous_format, dict(affine=False)),
    ((5, 4, 3, 6), torch.contiguous_format, dict(track_running_stats=False)),
):
    torch.manual_seed(7)
    dtype = torch.float32 if cuda else torch.float64  # the kernels of PyTorch have statistics in float32
    x = (3 + 2 * torch.randn(shape, dtype=dtype)).to(device, memory_format=layout).requires_grad_()
    weights = torch.randn(shape, dtype=dtype).to(device)
    plain = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4, **options).to(device, dtype)
    if plain.affine:
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    synchronised = SyncBatchNorm(4, **options).to(device, dtype)
    synchronised.load_state_dict(plain.state_dict())
    mine = slice(0, 2) if rank == 0 else slice(2, 5)  # two images, and three
    for _ in range(2):
        expected = plain(x)
        own = x[mine].detach().contiguous(memory_format=layout).requires_grad_()
        got = synchronised(own)
        close(got, expected[mine])
    for a, b in zip(synchronised.buffers(), plain.buffers()):
        close(a.double(), b.double())
    (expected * weights).sum().backward()
    (got * weights[mine]).sum().backward()
    close(own.grad, x.grad[mine])
    for a, b in zip(synchronised.parameters(), plain.parameters()):
        dist.all_reduce(a.grad)  # as DistributedDataParallel does, but for the mean
        close(a.grad, b.grad)
    if plain.track_running_stats:
        close(synchronised.eval()(own), plain.eval()(x)[mine])
    elif rank == 0:  # alone
        close(synchronised.eval()(own), plain.eval()(own))
try:
    synchronised.train()(torch.empty(0, 4, 3, 6, device=device))
except ValueError as error:
    assert 'got an empty batch of shape (0, 4, 3, 6)' in str(error)
# torch's own is refused on the CPU
net = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4)).to(device)
model = DistributedDataParallel(net, device_ids=[device.index] if cuda else None)
model(torch.randn(2, 3, 5, 7, device=device)).square().sum().backward()
assert net[0].weight.grad.abs().sum() > 0
print('rank', rank, 'done', flush=True)
dist.barrier()
del model  # gloo's threads must end before the process does, or torch 2.14 aborts now and then
dist.destroy_process_group()
"""


@pytest.mark.skipif(GPUS == 1, reason='needs two GPUs, or none')
def test_two_processes(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    assert torchrun(script, 'cuda' if GPUS else 'cpu').count('done') == 2


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_its_arithmetic_in_one_process(dtype, layout, process_group, monkeypatch):
    """On a GPU: the kernels that processes would share; on a CPU in half precision."""
    device = 'cuda' if GPUS else 'cpu'
    monkeypatch.setattr(SyncBatchNorm, '_is_synchronised', lambda self: True)
    if GPUS:
        monkeypatch.setattr(torch.distributed, 'all_reduce', lambda *args, **kwargs: None)  # gloo knows no GPU
    x = (2 * torch.randn(3, 5, 4, 7) + 1).to(device, dtype, memory_format=layout)
    modules = [SyncBatchNorm(5).to(device), nn.BatchNorm2d(5).to(device).double()]
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    outputs = [module(leaf) for module, leaf in zip(modules, leaves, strict=True)]
    weights = torch.randn_like(x)
    grads = [
        torch.autograd.grad(out, [leaf, *module.parameters()], weights.to(out))
        for module, leaf, out in zip(modules, leaves, outputs, strict=True)
    ]
    assert outputs[0].dtype == dtype and outputs[0].is_contiguous(memory_format=layout)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(outputs[0].double(), outputs[1]) <= tolerance
    assert all(relative_error(a.double(), b) <= tolerance for a, b in zip(*grads, strict=True))
    assert relative_error(modules[0].running_var.double(), modules[1].running_var) <= 1e-5


def test_alone_it_is_batch_norm():
    x = torch.randn(2, 4, 3, 5)
    ours, plain = SyncBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), plain(x)) and torch.equal(ours.running_var, plain.running_var)
    with pytest.raises(ValueError, match=r'got 1 axes, expected \(batch, channels, ...\)'):
        ours(torch.randn(4))
