#!/usr/bin/env python3
"""Segment or classify images, and look at the result.

A segmentor writes for each image NAME_overlay.png (the image, and the class colours over it) and NAME_classes.png (a
class number for each pixel); a classifier prints the most likely classes. predictions.json has the numbers of both.
Images that cannot be used are named at the end, and make the exit status 1.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import run_common
from data_folders import IMAGE_SUFFIXES, UNREADABLE, DataError, files_below
from run_common import positive

EXAMPLES = """examples:
  python tools/predict.py photos --config configs/seg/beit-base_upernet_ade20k-640.py --checkpoint iter_160000.pth
  python tools/predict.py a.jpg b.png --config CONFIG --checkpoint CHECKPOINT --multi-scale
  python tools/predict.py photos --model beit_plugin_base_patch16_224.in22k_ft_in22k_in1k
  python tools/predict.py a.jpg --model beit_plugin_base_patch16_224 --checkpoint FILE --attention 11 5:0 5:3
"""
NUMBERS = 'predictions.json'


def attention(text: str) -> tuple[int, int | None]:
    """'11' to (11, None), all heads of block 11; '11:3' to (11, 3)."""
    block, _, head = text.partition(':')
    if not block.isdecimal() or not (head.isdecimal() or text == block):
        raise argparse.ArgumentTypeError(f'expected BLOCK or BLOCK:HEAD, counted from 0, got {text!r}')
    return int(block), int(head) if head else None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('inputs', nargs='+', type=Path, metavar='IMAGE_OR_FOLDER')
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument('--config', type=Path, metavar='FILE', help='of mmsegmentation; needs --checkpoint')
    kind.add_argument('--model', metavar='NAME', help='of timm: a classifier, or a segmentor (..._upernet)')
    parser.add_argument(
        '--checkpoint', type=Path, metavar='FILE', help='weights (with --model default: published ones)'
    )
    parser.add_argument('--multi-scale', action='store_true', help='segmentors: six scales and mirror images')
    parser.add_argument('--labels', type=Path, metavar='FILE', help='with --model: names of the classes, a line each')
    parser.add_argument('--top', type=positive, default=5, metavar='N', help='classes that a classifier names (5)')
    parser.add_argument('--batch-size', type=positive, default=16, metavar='N', help='of a classifier (default: 16)')
    parser.add_argument(
        '--attention', nargs='*', type=attention, metavar='BLOCK[:HEAD]',
        help='also draw what [CLS] looks at in these blocks and heads (without any: in the last block)',
    )  # fmt: skip
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--out', type=Path, default=Path('predictions'), metavar='DIR', help='(default: predictions)')
    args = parser.parse_args()
    if args.config and args.checkpoint is None:
        parser.error('--config needs --checkpoint: a segmentor without trained weights says nothing')
    return args


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """The images that were named, and those of folders and below them.

    Raises:
        DataError: a path does not exist, or there are no images.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found.extend(path / name for name in files_below(path, IMAGE_SUFFIXES))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f'{path} does not exist.')
    if not found:
        raise DataError(f'no images in {", ".join(map(str, inputs))}: {", ".join(sorted(IMAGE_SUFFIXES))} are read.')
    return list(dict.fromkeys(found))


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the outputs of each image: its own without suffix, with a number where two have the same."""
    taken: dict[str, int] = {}
    found = {}
    for path in paths:
        count = taken[path.stem] = taken.get(path.stem, 0) + 1
        found[path] = path.stem if count == 1 else f'{path.stem}_{count}'
    return found


def chosen_heads(wanted: Sequence[tuple[int, int | None]], weights: Sequence[Any]) -> list[tuple[int, int]]:
    """Blocks and heads to draw.

    Raises:
        DataError: the model has no such block or head, or the block sees windows only.
    """
    found = []
    for block, head in wanted or [(len(weights) - 1, None)]:
        if block >= len(weights):
            raise DataError(f'--attention {block}: the model has the blocks 0 to {len(weights) - 1}.')
        if weights[block] is None:
            raise DataError(f'--attention {block}: this block sees windows, not the image; name a global one.')
        heads = len(weights[block])
        if head is not None and head >= heads:
            raise DataError(f'--attention {block}:{head}: the block has the heads 0 to {heads - 1}.')
        found.extend((block, one) for one in (range(heads) if head is None else [head]))
    return found


def reason(error: Exception) -> str:
    """What was wrong with an image, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def segment(predictor: Any, path: Path, image: Any, name: str, out: Path) -> dict[str, Any]:
    """Writes overlay and class map of an image to a folder; returns its numbers."""
    import numpy as np
    from PIL import Image
    from predict_pictures import overlay, shares

    label = predictor.label_map(path, image)
    if label.shape != (image.height, image.width):
        raise ValueError(f'the model segmented {label.shape} pixels of an image of {image.height} x {image.width}')
    overlay(image, label, predictor.classes, predictor.palette, out / f'{name}_overlay.png')
    classes = Image.fromarray(label.astype(np.uint8 if len(predictor.classes) <= 256 else np.uint16))
    classes.save(out / f'{name}_classes.png')
    return dict(classes=shares(label, predictor.classes))


def classify(predictor: Any, images: Sequence[Any], top: int) -> Iterator[dict[str, Any]]:
    """The most likely classes of each image."""
    import numpy as np

    for probabilities in predictor.probabilities(images):
        order = np.argsort(-probabilities)[:top]
        yield dict(top=[dict(name=predictor.classes[i], probability=float(probabilities[i])) for i in order])


def predict(args: argparse.Namespace, found: dict[str, Any], failed: dict[str, str]) -> None:
    """Adds numbers by path, and why images failed."""
    from predict_models import MMSegPredictor, Predictor, TimmPredictor, read_image
    from predict_pictures import attention_maps
    from tqdm import tqdm

    paths = find_images(args.inputs)
    if args.config:
        run_common.require_mmseg()
        predictor: Predictor = MMSegPredictor(args.config, args.checkpoint, args.multi_scale, args.device)
    else:
        predictor = TimmPredictor(args.model, args.checkpoint, args.labels, args.multi_scale, args.device)
    if args.multi_scale and not predictor.segments:
        raise DataError(f'--multi-scale is for segmentors, and {args.model} is a classifier.')
    args.out.mkdir(parents=True, exist_ok=True)
    outputs = names(paths)
    size = 1 if predictor.segments else args.batch_size
    with tqdm(total=len(paths), unit='image') as bar:
        for first in range(0, len(paths), size):
            batch = {}
            for path in paths[first : first + size]:
                try:
                    batch[path] = read_image(path)
                except UNREADABLE as error:
                    failed[str(path)] = reason(error)
            try:
                if predictor.segments:
                    for path, image in batch.items():
                        found[str(path)] = segment(predictor, path, image, outputs[path], args.out)
                elif batch:
                    found |= zip(map(str, batch), classify(predictor, list(batch.values()), args.top), strict=True)
            except DataError:
                raise
            except Exception as error:  # whatever a pipeline makes of one image, the others go on
                failed |= {str(path): reason(error) for path in batch if str(path) not in found}
            for path, image in batch.items() if args.attention is not None else ():
                try:
                    image, weights, grid = predictor.attentions(image)
                    target = args.out / f'{outputs[path]}_attention.png'
                    attention_maps(image, weights, grid, chosen_heads(args.attention, weights), target)
                except DataError:
                    raise
                except Exception as error:
                    failed.setdefault(str(path), f'no attention maps: {reason(error)}')
            bar.update(len(paths[first : first + size]))


def main() -> None:
    args = parse_args()
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    try:
        predict(args, found, failed)
    finally:  # also when it is interrupted
        if args.out.is_dir():
            (args.out / NUMBERS).write_text(json.dumps(dict(images=found, failed=failed), indent=1) + '\n')
    for path, numbers in found.items():
        best = numbers.get('top') or [
            dict(name=k, probability=v) for k, v in list(numbers['classes'].items())[: args.top]
        ]
        print(f'{path}: ' + ', '.join(f'{one["name"]} {100 * one["probability"]:.1f} %' for one in best))
    print(f'{len(found)} of {len(found.keys() | failed.keys())} images, results in {args.out}')
    if failed:
        listed = '; '.join(f'{path} ({why})' for path, why in failed.items())
        raise DataError(f'{len(failed)} of {len(found.keys() | failed.keys())} images could not be used: {listed}.')


if __name__ == '__main__':
    run_common.run(main)
