#!/usr/bin/env python3
"""Pictures of a training run: curve.png (loss and mIoU) and overlay.png (image, ground truth, prediction).

WORK_DIR is what tools/train.py or mmsegmentation's train.py wrote; the pictures go there. The overlay needs the data,
the last checkpoint and the copy of the configuration that training left there.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import run_common
from data_folders import IGNORED, DataError, read_label
from PIL import Image

CURVE, OVERLAY = 'curve.png', 'overlay.png'
OPACITY = 0.75  # of the class colours over the grey image
COLUMN = 2.7  # inches


def read_scalars(work_dir: Path) -> list[dict[str, float]]:
    """Logged rows of all starts of a run, in the order of their steps.

    A later start wins from its first step on: a resumed run continues the curve, a new one replaces it.
    """
    rows: list[dict[str, float]] = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        new = [row for row in map(json.loads, file.read_text().splitlines()) if row.get('step')]
        if new:
            rows = [row for row in rows if row['step'] < new[0]['step']] + new
    if not rows:
        raise DataError(f'{work_dir} holds no training log (*/vis_data/scalars.json).')
    return rows


def plot_curve(work_dir: Path) -> Path:
    """Loss over the iterations, and mIoU where it was measured; returns the picture's path."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = read_scalars(work_dir)
    losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
    scores = [(row['step'], row['mIoU']) for row in rows if 'mIoU' in row]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout='constrained')
    axis.plot(*zip(*losses, strict=True), color='tab:blue', label='training loss')
    axis.set(xlabel='iteration', ylabel='loss', ylim=(0, None), title=work_dir.name)
    lines = list(axis.lines)
    if scores:
        right = axis.twinx()
        lines += right.plot(*zip(*scores, strict=True), color='tab:orange', marker='o', label='validation mIoU')
        right.set(ylabel='mIoU (%)', ylim=(0, 100))
        right.annotate(f'{scores[-1][1]:.1f}', scores[-1], (-6, 8), textcoords='offset points', ha='right')
    figure.legend(handles=lines, loc='outside lower center', ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(work_dir / CURVE, dpi=120)
    plt.close(figure)
    return work_dir / CURVE


def paint(image: np.ndarray, label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Class colours over the brightness of an image (H, W, 3); ignored pixels are black."""
    grey = image.mean(axis=2, keepdims=True)  # the image's own colours would mix with those of the legend
    painted = (1 - OPACITY) * grey + OPACITY * palette[np.minimum(label, len(palette) - 1)]
    painted[label == IGNORED] = 0
    return painted.astype(np.uint8)


def plot_overlay(cfg: Any, checkpoint: Path, count: int = 6) -> Path:
    """Image, ground truth and single-scale prediction of `count` validation images; returns the picture's path."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch
    from mmengine.device import get_device
    from mmseg.apis import inference_model, init_model
    from mmseg.registry import DATASETS

    model = init_model(copy.deepcopy(cfg), str(checkpoint), device=get_device())
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, 'pipeline': [], 'lazy_init': True})
    pairs = dataset.load_data_list()
    chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)]
    palette = np.array(dataset.metainfo['palette'], np.uint8)

    rows = []
    for pair in chosen:
        with Image.open(pair['img_path']) as file:
            image = np.asarray(file.convert('RGB'))
        truth = read_label(Path(pair['seg_map_path'])).astype(np.int64)
        if dataset.reduce_zero_label:
            truth = np.where((truth == 0) | (truth == IGNORED), IGNORED, truth - 1)
        prediction = inference_model(model, pair['img_path']).pred_sem_seg.data[0].cpu().numpy()
        rows.append((image, paint(image, truth, palette), paint(image, prediction, palette)))

    tallest = max(image.shape[0] / image.shape[1] for image, *_ in rows)
    size = (3 * COLUMN, min(1.2, tallest) * COLUMN * len(rows) + 1)
    figure, axes = plt.subplots(len(rows), 3, figsize=size, squeeze=False, layout='constrained')
    for axis, panel in zip(axes.flat, itertools.chain(*rows), strict=True):
        axis.imshow(panel)
        axis.axis('off')
    for axis, title in zip(axes[0], ('image', 'ground truth', 'prediction'), strict=True):
        axis.set_title(title)
    patches = [Patch(color=c / 255, label=n) for c, n in zip(palette, dataset.metainfo['classes'], strict=True)]
    patches.append(Patch(color='black', label='ignored'))
    figure.legend(handles=patches, loc='outside lower center', ncols=min(6, len(patches)), fontsize='small')
    path = Path(cfg.work_dir) / OVERLAY
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def main() -> None:
    run_common.require_mmseg()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Example: python tools/plot_run.py work_dirs/beit-tiny_upernet_shapes --images 8',
    )
    parser.add_argument('work_dir', type=Path, metavar='WORK_DIR')
    parser.add_argument(
        '--images',
        type=int,
        default=6,
        metavar='N',
        help='validation images in the overlay (default: 6; 0: no overlay)',
    )
    args = parser.parse_args()
    print(plot_curve(args.work_dir))
    if args.images > 0:
        from mmengine.config import Config

        configs, last = sorted(args.work_dir.glob('*.py')), args.work_dir / 'last_checkpoint'
        if len(configs) != 1 or not last.is_file():
            raise DataError(
                f'{args.work_dir} must hold one configuration and a checkpoint for the overlay: use --images 0.'
            )
        cfg = Config.fromfile(configs[0])
        cfg.work_dir = str(args.work_dir)
        print(plot_overlay(cfg, Path(last.read_text().strip()), args.images))


if __name__ == '__main__':
    run_common.run(main)
