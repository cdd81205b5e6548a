#!/usr/bin/env python3
"""Masked image modelling written out: timm's model, optimiser and schedule, a plain loop, one process.

For reading, and for changing by hand; tools/train.py with configs/mim/ does the same with logs, pictures, resuming,
several GPUs and bad files left out.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

EXAMPLES = """examples:
  python tools/pretrain_loop.py IMAGES --tokenizer vqkd.pth --model beit_plugin_small_patch16_224_mim --epochs 100
  python tools/pretrain_loop.py IMAGES --tokenizer dalle --token-size 112   v1: its tokenizer has its own view
  then: timm.create_model('beit_plugin_small_patch16_224', num_classes=10, checkpoint_path='mim.pth')
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', metavar='IMAGES', help='a folder, a list (.txt) of files, or a .tar')
    parser.add_argument('--tokenizer', required=True, metavar='FILE', help='a file or a published name')
    parser.add_argument('--token-size', type=int, metavar='PX', help="the tokenizer's view (default: the model's)")
    parser.add_argument('--model', default='beit_plugin_base_patch16_224_mim', metavar='NAME', help="timm's name")
    parser.add_argument('--img-size', type=int, default=224, metavar='PX')
    parser.add_argument('--patch-size', type=int, default=16, metavar='PX', help="as the tokenizer's (default: 16)")
    parser.add_argument('--mask-share', type=float, default=0.383, metavar='X', help='75 of 196 (default)')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--epochs', type=int, default=100, metavar='N')
    parser.add_argument('--lr', type=float, default=1.5e-3, help='for 2048 images (default: 1.5e-3)')
    parser.add_argument('--workers', type=int, default=8, metavar='N')
    parser.add_argument('--out', type=Path, default=Path('mim.pth'), metavar='FILE', help='(default: mim.pth)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    import timm
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    import beit_plugin  # noqa: F401  registers the models
    from beit_plugin.checkpoints import save
    from beit_plugin.data.mim_views import ImageFiles, TwoViews, mim_collate
    from beit_plugin.tokenizers import load_tokenizer

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    tokenizer = load_tokenizer(args.tokenizer).to(device)
    sizes = dict(img_size=args.img_size, patch_size=args.patch_size)
    model = timm.create_model(args.model, num_classes=tokenizer.vocab_size, drop_path_rate=0.1, **sizes)
    model.to(device).train()
    grid = model.window_size
    masking = dict(grid=grid, num_masking_patches=round(args.mask_share * grid[0] * grid[1]))
    if masking['num_masking_patches'] < 16:  # the smallest block of BEiT
        masking['min_num_patches'] = max(masking['num_masking_patches'] // 4, 1)
    loader = torch.utils.data.DataLoader(
        ImageFiles(args.images, TwoViews(args.img_size, args.token_size), on_broken=lambda path, why: print(why)),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=device.type == 'cuda',
        collate_fn=partial(mim_collate, masking=masking),
    )
    optimizer = create_optimizer_v2(model, opt='adamw', lr=args.lr * args.batch_size / 2048, weight_decay=0.05)
    steps = args.epochs * len(loader)
    if not steps:
        sys.exit(f'error: {len(loader.dataset)} images do not fill a batch: take --batch-size N')
    scheduler = CosineLRScheduler(optimizer, steps, lr_min=1e-5, warmup_t=steps // 20, warmup_lr_init=1e-6)
    step, start = 0, time.monotonic()
    for epoch in range(args.epochs):
        for batch in loader:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            tokens = tokenizer.encode(batch.get('token_view', batch['inputs']) / 255)  # B, h, w
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                output = model(batch['inputs'] / 127.5 - 1, batch['mask'], tokens)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            scheduler.step(step)
        right = (output.logits.argmax(1) == tokens[batch['mask']]).float().mean()
        speed = f'{step * args.batch_size / (time.monotonic() - start):.0f} images/s'
        print(f'epoch {epoch + 1}: loss {output.loss:.3f}, token accuracy {right:.1%}, {speed}', flush=True)
        save(model, args.out, dialect='native')


if __name__ == '__main__':
    try:
        main()
    except ValueError as error:
        sys.exit(f'error: {error}')
