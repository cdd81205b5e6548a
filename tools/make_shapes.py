#!/usr/bin/env python3
"""Make the shapes data set: textured geometric objects with exact labels, in ADE20K layout.

    DIR/images/{training,validation}/00000.jpg        RGB, 96 to 160 px a side, mostly not square
    DIR/annotations/{training,validation}/00000.png   8 bit: 0 other (ignored), 1 background, 2 circle, 3 triangle, ...
    DIR/classes.json                                  class names, palette, checksum; written last

A class is an outline with a typical hue, from which single objects stray into the hue of another class. Texture,
brightness, size, position and rotation are random, objects hide one another and leave the picture. Thin strokes belong
to no class and carry label 0, so that mmsegmentation's `reduce_zero_label` is used.
"""

import argparse
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PALETTE = {
    'background': (70, 70, 70),
    'circle': (230, 60, 60),
    'triangle': (70, 160, 250),
    'square': (250, 190, 40),
    'ring': (90, 200, 90),
    'cross': (180, 100, 230),
    'star': (250, 130, 180),
}
CLASSES = tuple(PALETTE)
SPLITS = ('training', 'validation')
MIN_SIDE, MAX_SIDE = 96, 160
HUE_SPREAD = 0.035  # in turns; the hues of two classes are 1/6 apart, so one object in 60 has its neighbour's colour


def polygon(points: int, inner: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Membership test of a star with `points` tips at radius 1 and notches at radius `inner`."""
    half = np.pi / points
    notch_x, notch_y = inner * np.cos(half), inner * np.sin(half)

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        radius = np.hypot(x, y)
        angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)  # one half sector: from a tip to a notch
        px, py = radius * np.cos(angle), radius * np.sin(angle)
        return (px - 1) * notch_y - py * (notch_x - 1) <= 0

    return inside


INSIDE = {
    'circle': lambda x, y: np.hypot(x, y) <= 0.9,
    'triangle': polygon(3, 0.5),
    'square': polygon(4, np.cos(np.pi / 4)),
    'ring': lambda x, y: np.abs(np.hypot(x, y) - 0.7) <= 0.25,
    'cross': lambda x, y: (np.minimum(np.abs(x), np.abs(y)) <= 0.26) & (np.maximum(np.abs(x), np.abs(y)) <= 0.95),
    'star': polygon(5, 0.5),
}


def colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in [0, 1]; `hue` in turns."""
    phase = (hue + np.array([0, 1 / 3, 2 / 3])) * 2 * np.pi
    return value * (1 - saturation * (0.5 - 0.5 * np.cos(phase)))


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, hue: float, saturation: float) -> np.ndarray:
    """Two colours mixed by a random pattern at the pixel positions x, y; returns H, W, 3 in [0, 1]."""
    period, angle, phase = rng.uniform(5, 14), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    u = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase
    v = (y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period
    patterns = (
        lambda: np.sin(u) > 0,  # stripes
        lambda: (np.sin(u) > 0) ^ (np.sin(v) > 0),  # checks
        lambda: np.cos(u) + np.cos(v) > 0.8,  # dots
        lambda: 0.5 + 0.5 * np.sin(u / 4 + np.sin(v / 3)),  # soft waves
    )
    mix = patterns[rng.integers(len(patterns))]().astype(float)[..., None]
    first = colour(hue, saturation, rng.uniform(0.55, 1.0))
    second = first * rng.uniform(0.6, 0.85)  # the same hue, darker: an object stays one thing
    return first * mix + second * (1 - mix)


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image H, W, 3 uint8 and label H, W uint8."""
    height, width = rng.integers(MIN_SIDE, MAX_SIDE + 1, size=2)
    y, x = np.mgrid[:height, :width].astype(float)
    image = texture(rng, x, y, rng.random(), saturation=0.25)
    label = np.full((height, width), 1 + CLASSES.index('background'), np.uint8)

    side = min(height, width)
    placed: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(3, 7)):
        radius = rng.uniform(0.24, 0.40) * side
        cx, cy = rng.uniform(0.5 * radius, width - 0.5 * radius), rng.uniform(0.5 * radius, height - 0.5 * radius)
        if any(np.hypot(cx - px, cy - py) < 0.8 * (radius + pr) for px, py, pr in placed):
            continue
        placed.append((cx, cy, radius))
        name = CLASSES[rng.integers(1, len(CLASSES))]
        angle = rng.uniform(0, 2 * np.pi)
        u, v = (x - cx) / radius, (y - cy) / radius
        mask = INSIDE[name](u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle))
        hue = CLASSES.index(name) / (len(CLASSES) - 1) + rng.normal(0, HUE_SPREAD)
        image[mask] = texture(rng, x, y, hue, saturation=0.9)[mask]
        label[mask] = 1 + CLASSES.index(name)

    if rng.random() < 0.3:
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.3, 0.3) * side
        distance = (x - width / 2) * np.cos(angle) + (y - height / 2) * np.sin(angle) - offset
        stroke = np.abs(distance) <= 1
        image[stroke] = colour(rng.random(), 0.5, 0.2)
        label[stroke] = 0

    image = image + rng.normal(0, 0.03, size=image.shape)
    return (image.clip(0, 1) * 255).astype(np.uint8), label


def encode(array: np.ndarray, suffix: str) -> bytes:
    """Bytes of an image file; the same array gives the same bytes with one version of Pillow."""
    buffer = io.BytesIO()
    if suffix == '.jpg':
        Image.fromarray(array).save(buffer, 'JPEG', quality=92, subsampling=0)
    else:
        Image.fromarray(array).save(buffer, 'PNG')
    return buffer.getvalue()


def file_names(counts: dict[str, int]) -> list[str]:
    """Every image and label of the set, relative to its root, in the order of the checksum."""
    return [
        f'{folder}/{split}/{i:05d}{suffix}'
        for split in SPLITS
        for i in range(counts[split])
        for folder, suffix in (('images', '.jpg'), ('annotations', '.png'))
    ]


def checksum(root: Path, names: list[str]) -> str:
    """SHA-256 over the files, or the empty string when one is missing."""
    digest = hashlib.sha256()
    for name in names:
        if not (root / name).is_file():
            return ''
        digest.update(name.encode() + (root / name).read_bytes())
    return digest.hexdigest()


def make_shapes(root: Path, seed: int = 0, train: int = 400, val: int = 80) -> bool:
    """Write the set below `root` unless it is there already, complete and unaltered.

    Returns True when files were written. Raises SystemExit when `root` holds something else or cannot be written.
    """
    counts = dict(zip(SPLITS, (train, val), strict=True))
    recipe = {'tool': 'make_shapes', 'seed': seed, **counts}
    names = file_names(counts)
    manifest, started = root / 'classes.json', root / 'unfinished.json'
    if manifest.is_file():
        found = json.loads(manifest.read_text())
        if found.get('recipe') != recipe:
            raise SystemExit(
                f'error: {root} holds another data set ({found.get("recipe", "not made by this tool")}): '
                'give another folder, or remove it.'
            )
        if found['sha256'] == checksum(root, names):
            return False
    elif root.is_dir() and any(root.iterdir()) and not started.is_file():
        raise SystemExit(f'error: {root} is not empty and was not made by this tool: give another folder.')

    try:
        root.mkdir(parents=True, exist_ok=True)
        started.write_text(json.dumps(recipe))  # marks a half-written set as ours until the manifest is there
    except OSError as error:
        raise SystemExit(f'error: {root} cannot be written: {error.strerror}.') from error
    manifest.unlink(missing_ok=True)
    for folder in ('images', 'annotations'):
        for split in SPLITS:
            (root / folder / split).mkdir(parents=True, exist_ok=True)
            for old in (root / folder / split).iterdir():
                old.unlink()
    for s, split in enumerate(SPLITS):
        for i in range(counts[split]):
            image, label = draw(np.random.default_rng([seed, s, i]))  # an image depends on its own index only
            (root / f'images/{split}/{i:05d}.jpg').write_bytes(encode(image, '.jpg'))
            (root / f'annotations/{split}/{i:05d}.png').write_bytes(encode(label, '.png'))
    content = {
        'classes': CLASSES,
        'palette': list(PALETTE.values()),
        'reduce_zero_label': True,
        'recipe': recipe,
        'sha256': checksum(root, names),
    }
    part = root / 'classes.json.part'
    part.write_text(json.dumps(content, indent=1) + '\n')
    os.replace(part, manifest)
    started.unlink()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Example: python tools/make_shapes.py data/shapes\n'
        'The same seed and counts give the same bytes (with one version of NumPy and Pillow). Run again on a\n'
        'complete set, it writes nothing; an interrupted or altered set is noticed and made anew.',
    )
    parser.add_argument(
        'root',
        type=Path,
        nargs='?',
        default=Path('data/shapes'),
        metavar='DIR',
        help='folder to write (default: data/shapes)',
    )
    parser.add_argument('--seed', type=int, default=0, help='another seed is another set of scenes (default: 0)')
    parser.add_argument('--train', type=int, default=400, metavar='N', help='training images (default: 400)')
    parser.add_argument('--val', type=int, default=80, metavar='N', help='validation images (default: 80)')
    args = parser.parse_args()
    if args.train < 1 or args.val < 1:
        parser.error('--train and --val must be at least 1.')
    written = make_shapes(args.root, args.seed, args.train, args.val)
    state = 'made' if written else 'already complete'
    print(f'{args.root}: {args.train} training and {args.val} validation images of {len(CLASSES)} classes, {state}')


if __name__ == '__main__':
    main()
