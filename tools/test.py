#!/usr/bin/env python3
"""Evaluate a checkpoint: mmengine's Runner with checks of the data before, and the result in the last line.

CONFIG is a file of configs/, or the copy that training left in its work directory (with its data root and options).
CHECKPOINT is a file or a URL. Single-scale by default; --tta averages six scales and their mirror images.
"""

import argparse
import os

import run_common

EXAMPLES = """examples:
  python tools/test.py configs/seg/beit-tiny_upernet_shapes.py work_dirs/beit-tiny_upernet_shapes/iter_400.pth
  python tools/test.py CONFIG CHECKPOINT --tta --amp
  python tools/test.py CONFIG CHECKPOINT --out predictions      write the class maps as PNG
  python tools/test.py CONFIG CHECKPOINT --data-root DIR
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('checkpoint', metavar='CHECKPOINT')
    parser.add_argument('--tta', action='store_true', help='six scales and mirror images (test-time augmentation)')
    parser.add_argument('--out', metavar='DIR', help='write the predicted class maps here')
    parser.add_argument('--amp', action='store_true', help='in half precision: float16 on a GPU, bfloat16 on a CPU')
    run_common.add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    run_common.require_mmseg()
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = run_common.load_config(args)
    if args.out:
        cfg.test_evaluator.update(output_dir=args.out)
    if args.amp:
        cfg.test_cfg.fp16 = True  # what mmengine calls it
    metrics = run_common.evaluate(cfg, args.checkpoint, args.tta)
    if os.environ.get('RANK', '0') == '0':
        how = 'multi-scale and flip' if args.tta else 'single-scale'
        names = ['mIoU'] if 'mIoU' in metrics else metrics  # the evaluator may measure others, or write maps only
        scores = ', '.join(f'{name} {metrics[name]:.2f}' for name in names) or 'no metrics'
        print(f'{scores} ({how}), checkpoint {args.checkpoint}, log in {cfg.work_dir}')


if __name__ == '__main__':
    run_common.run(main)
