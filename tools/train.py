#!/usr/bin/env python3
"""Train a segmentor or a detector, or pre-train: mmengine's Runner with checks, a summary, a curve, the result last.

CONFIG is a file of configs/; mmsegmentation's own tools/train.py takes it as well (mmdetection's that of configs/det/),
and the same arguments. Those of configs/mim/ train a tokenizer, or a BEiT by masked image modelling, on images without
labels.
"""

import argparse
import os
from pathlib import Path

import run_common
from data_folders import DataError
from plot_run import plot_curve
from run_data import set_on_error
from run_mim import use_sources
from run_options import set_on_nan
from run_summary import length

EXAMPLES = """examples:
  python tools/train.py configs/seg/beit-tiny_upernet_shapes.py
  python tools/train.py configs/seg/beit-base_upernet_camvid.py --data-root DIR --amp
  python tools/train.py configs/mim/vqkd-base.py --data-root DIR --teacher vit_base_patch16_clip_224.openai
  python tools/train.py configs/mim/beitv2-base_vqkd.py --data-root DIR --tokenizer work_dirs/vqkd-base/epoch_100.pth
  python tools/train.py CONFIG --on-error skip               leave out images and labels that cannot be used, by name
  python tools/train.py CONFIG --resume                      go on from the last checkpoint of the work directory
  python tools/train.py CONFIG --cfg-options train_cfg.max_iters=1000 optim_wrapper.optimizer.lr=1e-4
  torchrun --nproc_per_node 8 tools/train.py CONFIG --launcher pytorch
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint of the work directory')
    parser.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        choices=['bfloat16', 'float16'],
        help='train in mixed precision (default of the option: bfloat16; float16 needs a GPU)',
    )
    parser.add_argument(
        '--on-error',
        choices=['raise', 'skip'],
        help='what to do about a training image or label that cannot be used: stop, or take another image '
        '(default: stop; without labels: take another)',
    )
    parser.add_argument(
        '--on-nan',
        choices=['raise', 'continue'],
        help='what to do about a loss that is NaN or infinite: stop and keep the last good checkpoint, or go on '
        '(default: stop)',
    )
    parser.add_argument('--tokenizer', metavar='FILE', help='tokenizer of a pre-training: a file or a published name')
    parser.add_argument('--teacher', metavar='NAME', help='timm model that a VQ-KD tokenizer learns from')
    run_common.add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    run_common.require_mmseg()
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = run_common.load_config(args)
    cfg.resume = args.resume
    use_sources(cfg, args.tokenizer, args.teacher)
    if args.amp:
        run_common.use_mixed_precision(cfg, args.amp)
    if args.on_error:
        set_on_error(cfg.train_dataloader.dataset, args.on_error)
    if args.on_nan:
        set_on_nan(cfg, args.on_nan)
    checkpoint, result, _ = run_common.train(cfg)
    if os.environ.get('RANK', '0') == '0':
        where = f'checkpoint {checkpoint}' if checkpoint else f'no checkpoint in {cfg.work_dir}'
        try:
            where += f', curve {plot_curve(Path(cfg.work_dir))}'
        except DataError:
            pass  # too short for a logged loss
        print(f'{result} after {length(cfg)}, {where}')


if __name__ == '__main__':
    run_common.run(main)
