"""Pictures that tools/predict.py writes: class colours over an image with a legend, and attention maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

OPACITY = 0.6  # of the class colours
LEGEND = 12  # classes named, the largest first
COLUMN = 2.4  # inches of an attention map


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    return plt


def shares(label: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Share of the pixels of each class that is there, largest first."""
    counts = np.bincount(label.ravel(), minlength=len(classes))
    order = [i for i in np.argsort(-counts, kind='stable') if counts[i]]
    return {classes[i]: float(counts[i] / label.size) for i in order}


def overlay(image: Image.Image, label: np.ndarray, classes: Sequence[str], palette: np.ndarray, path: Path) -> None:
    """The image beside itself under the class colours, and the largest classes by name."""
    plt = _pyplot()
    from matplotlib.patches import Patch

    pixels = np.asarray(image)
    painted = ((1 - OPACITY) * pixels + OPACITY * palette[label]).astype(np.uint8)
    found = shares(label, classes)
    aspect = pixels.shape[0] / pixels.shape[1]
    figure, axes = plt.subplots(1, 2, figsize=(12, max(2.0, min(12.0, 6 * aspect)) + 1), layout='constrained')
    for axis, panel in zip(axes, (pixels, painted), strict=True):
        axis.imshow(panel)
        axis.axis('off')
    numbers = {name: i for i, name in reversed(list(enumerate(classes)))}
    patches = [
        Patch(color=palette[numbers[name]] / 255, label=f'{name} {100 * share:.1f} %')
        for name, share in list(found.items())[:LEGEND]
    ]
    if len(found) > LEGEND:
        patches.append(Patch(color='none', label=f'and {len(found) - LEGEND} more'))
    figure.legend(handles=patches, loc='outside lower center', ncols=min(6, len(patches)), fontsize='small')
    figure.savefig(path, dpi=100)
    plt.close(figure)


def attention_maps(
    image: Image.Image, weights: Sequence[Any], grid: tuple[int, int], chosen: Sequence[tuple[int, int]], path: Path
) -> None:
    """How strongly [CLS] looks at each patch, over the grey image; a panel for each chosen block and head.

    Colours go from the least to the most of a panel; its title says the most, as a multiple of equal attention.
    """
    plt = _pyplot()
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    aspect = image.height / image.width
    size = (columns * COLUMN, rows * (max(0.2, min(5.0, aspect)) * COLUMN + 0.3))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout='constrained')
    extent = (0, image.width, image.height, 0)
    for axis in axes.flat:
        axis.axis('off')
    for axis, (block, head) in zip(axes.flat, chosen, strict=False):
        seen = weights[block][head, 0, 1:].reshape(grid).numpy()
        axis.imshow(image.convert('L'), cmap='gray', extent=extent)
        axis.imshow(seen, cmap='inferno', alpha=0.65, interpolation='bilinear', extent=extent)
        axis.set_title(f'block {block}, head {head}: up to {seen.max() * seen.size:.1f}x', fontsize='small')
    figure.suptitle('bright: what [CLS] looks at', fontsize='small')
    figure.savefig(path, dpi=160)
    plt.close(figure)
