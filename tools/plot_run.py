#!/usr/bin/env python3
"""Pictures of a training run: curve.png (loss and mIoU) and overlay.png (image, ground truth, prediction).

WORK_DIR is what tools/train.py or mmsegmentation's train.py wrote; the pictures go there. The overlay needs the data,
the last checkpoint and the copy of the configuration that training left there. Several WORK_DIRs, of the same data,
share one picture, comparison.png in the first of them: losses, mIoU against the time of training, and predictions.
"""

import argparse
import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import run_common
from data_folders import IGNORED, DataError, read_label
from PIL import Image
from run_options import open_config

CURVE, OVERLAY, COMPARISON = 'curve.png', 'overlay.png', 'comparison.png'
OPACITY = 0.75  # of the class colours over the grey image
COLUMN = 2.7  # inches


def read_scalars(work_dir: Path) -> list[dict[str, float]]:
    """Logged rows of all starts of a run, in the order of their steps.

    A later start wins from its first step on: a resumed run continues the curve, a new one replaces it.
    """
    rows: list[dict[str, float]] = []
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        lines = file.read_text().splitlines()
        if lines and not lines[-1].endswith('}'):
            lines.pop()  # the training was killed while it wrote
        new = [row for row in map(json.loads, lines) if row.get('step')]
        if new:
            rows = [row for row in rows if row['step'] < new[0]['step']] + new
    if not rows:
        raise DataError(f'{work_dir} holds no training log (*/vis_data/scalars.json).')
    return rows


def plot_curve(work_dir: Path) -> Path:
    """Loss over the iterations, and mIoU where it was measured; returns the picture's path.

    Raises:
        DataError: no loss was logged.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows = read_scalars(work_dir)
    losses = [(row['step'], row['loss']) for row in rows if 'loss' in row]
    scores = [(row['step'], row['mIoU']) for row in rows if 'mIoU' in row]
    if not losses:
        raise DataError(
            f'{work_dir} has no loss in its training log: it is written every default_hooks.logger.interval.'
        )
    figure, axis = plt.subplots(figsize=(8, 4.5), layout='constrained')
    axis.plot(*zip(*losses, strict=True), color='tab:blue', label='training loss')
    highest = max((loss for _, loss in losses if math.isfinite(loss)), default=1)
    axis.set(xlabel='iteration', ylabel='loss', ylim=(0, 1.05 * highest), title=work_dir.name)
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


def predict(cfg: Any, checkpoint: Path, count: int) -> tuple[list[list[np.ndarray]], Any]:
    """Image, ground truth and single-scale prediction of `count` validation images; and the data set."""
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
        rows.append([image, paint(image, truth, palette), paint(image, prediction, palette)])
    return rows, dataset


def draw(figure: Any, rows: list[list[np.ndarray]], titles: list[str], dataset: Any) -> None:
    """Panels of equal rows, and the legend of the classes, in a figure or a part of one."""
    from matplotlib.patches import Patch

    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axis, panel in zip(axes.flat, itertools.chain(*rows), strict=True):
        axis.imshow(panel)
        axis.axis('off')
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    palette = np.array(dataset.metainfo['palette'], np.uint8)
    patches = [Patch(color=c / 255, label=n) for c, n in zip(palette, dataset.metainfo['classes'], strict=True)]
    patches.append(Patch(color='black', label='ignored'))
    figure.legend(handles=patches, loc='outside lower center', ncols=min(6, len(patches)), fontsize='small')


def height_of(rows: list[list[np.ndarray]]) -> float:
    """Inches that the panels take."""
    tallest = max(image.shape[0] / image.shape[1] for image, *_ in rows)
    return min(1.2, tallest) * COLUMN * len(rows) + 1


def plot_overlay(cfg: Any, checkpoint: Path, count: int = 6) -> Path:
    """Image, ground truth and prediction of `count` validation images; returns the picture's path."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    rows, dataset = predict(cfg, checkpoint, count)
    figure = plt.figure(figsize=(3 * COLUMN, height_of(rows)), layout='constrained')
    draw(figure, rows, ['image', 'ground truth', 'prediction'], dataset)
    path = Path(cfg.work_dir) / OVERLAY
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def minutes(rows: list[dict[str, float]]) -> dict[int, float]:
    """Minutes of training up to each logged step, from the seconds per iteration that were logged; no validation."""
    found, before, total = {0: 0.0}, 0, 0.0
    for row in rows:
        if 'time' in row and 'loss' in row:
            step = int(row['step'])
            total += (step - before) * row['time'] / 60
            before = step
            found[step] = total
    return found


def plot_comparison(work_dirs: list[Path], count: int) -> Path:
    """Curves of several runs, and their predictions side by side; returns the picture's path."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    names = [path.name for path in work_dirs]
    rows: list[list[np.ndarray]] = []
    dataset = None
    for path in work_dirs if count else []:
        found, dataset = predict(*configuration(path), count)
        rows = [[*row, new[2]] for row, new in zip(rows, found, strict=True)] if rows else found
    high = 4.0  # inches of the curves
    size = ((2 + len(names)) * COLUMN, high + (height_of(rows) if rows else 0))
    figure = plt.figure(figsize=size, layout='constrained')
    parts = figure.subfigures(2, 1, height_ratios=[high, height_of(rows)]) if rows else [figure]
    left, right = parts[0].subplots(1, 2)
    for path in work_dirs:
        scalars = read_scalars(path)
        clock = minutes(scalars)
        losses = [(row['step'], row['loss']) for row in scalars if 'loss' in row]
        left.plot(*zip(*losses, strict=True), label=path.name)
        scores = [(clock[max(step for step in clock if step <= row['step'])], row['mIoU']) for row in scalars
                  if 'mIoU' in row]  # fmt: skip
        if scores:
            right.plot(*zip(*scores, strict=True), marker='o', label=f'{path.name}: {scores[-1][1]:.1f}')
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    right.set(xlabel='minutes of training, without validation', ylabel='validation mIoU (%)', xlim=(0, None))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    if rows:
        draw(parts[1], rows, ['image', 'ground truth', *names], dataset)
    path = work_dirs[0] / COMPARISON
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def configuration(work_dir: Path) -> tuple[Any, Path]:
    """Configuration and last checkpoint that a training left.

    Raises:
        DataError: they are not there.
    """
    configs, last = sorted(work_dir.glob('*.py')), work_dir / 'last_checkpoint'
    if len(configs) != 1 or not last.is_file():
        raise DataError(f'{work_dir} must hold one configuration and a checkpoint for the overlay: use --images 0.')
    cfg = open_config(configs[0])
    cfg.work_dir = str(work_dir)
    return cfg, Path(last.read_text().strip())


def main() -> None:
    run_common.require_mmseg()
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Examples:\n  python tools/plot_run.py work_dirs/beit-tiny_upernet_shapes --images 8\n'
        '  python tools/plot_run.py work_dirs/ours work_dirs/theirs',
    )
    parser.add_argument('work_dirs', type=Path, nargs='+', metavar='WORK_DIR')
    parser.add_argument(
        '--images',
        type=int,
        default=6,
        metavar='N',
        help='validation images in the overlay (default: 6; 0: no overlay)',
    )
    args = parser.parse_args()
    if len(args.work_dirs) > 1:
        print(plot_comparison(args.work_dirs, max(0, args.images)))
        return
    print(plot_curve(args.work_dirs[0]))
    if args.images > 0:
        print(plot_overlay(*configuration(args.work_dirs[0]), args.images))


if __name__ == '__main__':
    run_common.run(main)
