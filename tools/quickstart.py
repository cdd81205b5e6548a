#!/usr/bin/env python3
"""The main job from nothing: make or read data, train a tiny BEiT-UPerNet, evaluate it at one and at six scales.

Same configuration, Runner and tools as every other run. `bash tools/quickstart.sh` calls this after it has set up the
environment, and takes the same arguments.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from quickstart_pretrain import merge_options, pretrain, shorten, step

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / 'configs/seg/beit-tiny_upernet_shapes.py'

EXAMPLES = """examples:
  bash tools/quickstart.sh                       shapes that it draws itself: about 3 minutes on 2 CPU cores
  bash tools/quickstart.sh --pretrain            masked image modelling first, and what it gains: below 10 minutes
  bash tools/quickstart.sh --data-root DIR       your images, in one of these layouts:

    DIR/images/training, DIR/images/validation, DIR/annotations/training, ...   ADE20K: label 0 is "other", ignored
    DIR/images/train, DIR/images/val, DIR/annotations/train, ...                label 0 is a class
    DIR/images, DIR/masks                          one image in five is kept for validation

  labels/ or masks/ may stand for annotations/. Labels are one-channel images of class numbers, 255 is ignored.
  DIR/classes.json may name the classes: {"classes": ["sky", "road"], "reduce_zero_label": false}
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data-root', type=Path, metavar='DIR', help='your data; without it, shapes are drawn')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=REPOSITORY / 'work_dirs/quickstart',
        metavar='DIR',
        help='where everything goes (default: work_dirs/quickstart)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        help='override anything in the configuration, such as train_cfg.max_iters=2000',
    )
    parser.add_argument(
        '--pretrain',
        action='store_true',
        help='train a tokenizer, pre-train without labels, fine-tune with few; against the same from random weights',
    )
    parser.add_argument(
        '--pretrain-options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        help='as --cfg-options, for the tokenizer and the pre-training',
    )
    return parser.parse_args()


def load_config(args: argparse.Namespace, work_dir: Path) -> Any:
    """The quickstart's configuration on the data at hand."""
    from data_folders import detect, use_folders

    folders = detect(args.data_root or REPOSITORY / 'data/shapes')
    from mmengine.config import Config  # after the folders: what is wrong there is said at once

    cfg = Config.fromfile(CONFIG)
    use_folders(cfg, folders, work_dir)
    if args.pretrain:
        shorten(cfg)
    merge_options(cfg, args.cfg_options)
    zero = ', label 0 is ignored' if folders.reduce_zero_label else ''
    train, val = (len(folders.names[key]) for key in ('train', 'val'))
    print(
        f'  {folders.root}: {train} training and {val} validation images, {len(folders.classes)} classes '
        f'({", ".join(folders.classes)}){zero}'
    )
    return cfg


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    import run_common
    from make_shapes import make_shapes

    run_common.require_mmseg()
    work_dir: Path = args.work_dir / 'pretrain' if args.pretrain else args.work_dir

    step(1, 'data', 6 if args.pretrain else 5)
    if args.data_root is None:
        make_shapes(REPOSITORY / 'data/shapes')
    cfg = load_config(args, work_dir)
    if args.pretrain:
        pretrain(cfg, work_dir, args.pretrain_options)
        return

    step(2, 'training', 5)
    cfg.work_dir = str(work_dir)
    checkpoint, *_ = run_common.train(cfg)

    scores = []
    for number, (name, tta) in enumerate((('single-scale', False), ('multi-scale and flip', True)), start=3):
        step(number, f'evaluation, {name}', 5)
        cfg.work_dir = str(work_dir / name.split()[0])
        scores.append(run_common.evaluate(cfg, checkpoint, tta)['mIoU'])

    step(5, 'pictures', 5)
    from plot_run import plot_curve, plot_overlay

    cfg.work_dir = str(work_dir)
    print(f'  {plot_curve(work_dir)}\n  {plot_overlay(cfg, checkpoint)}')
    print(f'  {checkpoint}\n  all of it took {(time.monotonic() - start) / 60:.1f} minutes')
    print(f'mIoU single-scale {scores[0]:.2f} multi-scale {scores[1]:.2f}')


if __name__ == '__main__':
    arguments = parse_args()  # before the imports of third parties: --help works on a bare python
    from run_common import run

    run(lambda: main(arguments))
