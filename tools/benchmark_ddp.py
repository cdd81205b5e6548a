#!/usr/bin/env python3
"""Images per second of training on several GPUs, of a segmentor or a masked image model: AdamW, DDP, SyncBN.

Run it with 1, 2, 4 ... processes and compare the lines; every process has its own batch, as in tools/train.py.
"""

import argparse
import os
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

from run_common import run

EXAMPLES = """examples:
  torchrun --nproc_per_node 1 tools/benchmark_ddp.py
  torchrun --nproc_per_node 4 tools/benchmark_ddp.py --variant large --batch 4
  torchrun --nproc_per_node 2 tools/benchmark_ddp.py --model mim --compile
  torchrun --nproc_per_node 2 tools/benchmark_ddp.py --variant tiny --size 64 --batch 2 --steps 5      on a CPU
"""
SIZES = {'segmentor': (640, 8), 'mim': (224, 128)}  # pixels, images
WARM_UP = 5  # steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--variant', choices=['tiny', 'small', 'base', 'large'], default='base', help='(default: base)')
    parser.add_argument('--model', choices=list(SIZES), default='segmentor', help='(default: segmentor)')
    parser.add_argument('--size', type=int, metavar='PIXELS', help='(default: segmentor 640, mim 224)')
    parser.add_argument('--batch', type=int, metavar='N', help='images of each process (default: segmentor 8, mim 128)')
    parser.add_argument('--compile', action='store_true', help='by torch.compile')
    parser.add_argument('--steps', type=int, default=30, metavar='N', help='to time, after 5 (default: 30)')
    args = parser.parse_args()
    args.size, args.batch = args.size or SIZES[args.model][0], args.batch or SIZES[args.model][1]
    return args


def main() -> None:
    args = parse_args()
    import torch
    from benchmark_models import CLASSES, MASKED, VOCABULARY
    from torch import distributed, nn

    from beit_plugin.data.masking import RandomMasking
    from beit_plugin.models.beit import VARIANTS
    from beit_plugin.models.mim import BeitForMaskedImageModeling
    from beit_plugin.segmentation.segmentor import build_segmentor
    from beit_plugin.segmentation.sync_batch_norm import SyncBatchNorm

    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    cuda = torch.cuda.is_available()
    device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0))) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    options: dict[str, Any] = dict(img_size=(args.size, args.size), **VARIANTS[args.variant])
    model: nn.Module
    with device:
        inputs = [torch.randn(args.batch, 3, args.size, args.size)]
        if args.model == 'segmentor':
            model = build_segmentor(CLASSES, **options)
            inputs.append(torch.randint(CLASSES, (args.batch, args.size, args.size)))
        else:
            model = BeitForMaskedImageModeling(vocab_size=VOCABULARY, **options)
            grid = args.size // 16
            masking = RandomMasking(grid, round(MASKED * grid**2))
            masks = masking(args.batch, torch.Generator().manual_seed(rank)).to(device)
            inputs += [masks, torch.randint(VOCABULARY, (int(masks.sum()),))]
    train = model
    if world > 1:
        distributed.init_process_group('nccl' if cuda else 'gloo')
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, SyncBatchNorm(norm.num_features, device=device))
        train = nn.parallel.DistributedDataParallel(
            model, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True,
            broadcast_buffers=False,  # as mmengine has it: SyncBN's are alike
        )  # fmt: skip
    step_model = torch.compile(train) if args.compile else train
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ends = []  # of the steps; none waits for a GPU (mmengine does without BEiTRunAheadHook)
    for _ in range(WARM_UP + args.steps + 1):
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_model(*inputs)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(perf_counter())
    if cuda:
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(ends)]
    else:
        times = [b - a for a, b in pairwise(ends)]
    step = median(times[WARM_UP:])  # seconds
    if rank == 0:
        memory = f', peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB' if cuda else ''
        name = torch.cuda.get_device_name() if cuda else 'CPU'
        what = f'BEiT-{args.variant} {args.model}' + ', compiled' * args.compile
        print(
            f'{world} x {name}, {what}, {args.size} px, {args.batch} images each: '
            f'{1e3 * step:.1f} ms a step, {world * args.batch / step:.1f} images/s{memory}'
        )


if __name__ == '__main__':
    run(main)
