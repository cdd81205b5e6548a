#!/usr/bin/env python3
"""Segment or classify images, and look at the result.

A segmentor writes for each image NAME_overlay.png (the image, and the class colours over it) and NAME_classes.png (a
class number for each pixel); a classifier prints the most likely classes. An image that cannot be used does not stop
the others: it is named at the end, and the exit status is 1.

predictions.json in the output folder has all results:
  images   for each image by its path as it was given or found:
           input     this path
           files     what was written, relative to the output folder: any of overlay, classes, attention
           classes   of a segmentor: the share of the pixels of each class that is there, by name, largest first
           top       of a classifier: a list of name and probability, most likely first
  failed   why, for each image by its path that cannot be used or lacks one of its files
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import run_common
from data_folders import IMAGE_SUFFIXES, DataError, files_below
from run_common import positive
from run_failures import make_folder, require_matplotlib

EXAMPLES = """examples:
  python tools/predict.py photos --config configs/seg/beit-base_upernet_ade20k-640.py --checkpoint iter_160000.pth
  python tools/predict.py a.jpg b.png --config CONFIG --checkpoint CHECKPOINT --multi-scale
  python tools/predict.py photos --model beit_plugin_base_patch16_224.in22k_ft_in22k_in1k
  python tools/predict.py a.jpg --model beit_plugin_base_patch16_224 --checkpoint FILE --attention 11 5:0 5:3
"""
NUMBERS = 'predictions.json'
MOST_NAMED = 20  # failures at the end; the file has all


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


def find_images(inputs: Sequence[Path], out: Path) -> list[Path]:
    """The images that were named, and those of folders and below them, but for what an earlier run wrote to `out`.

    Raises:
        DataError: a path does not exist, or there are no images.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            below = [path / name for name in files_below(path, IMAGE_SUFFIXES)]
            is_inside = path.resolve() in out.resolve().parents
            found.extend(file for file in below if not (is_inside and out.resolve() in file.resolve().parents))
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f'{path} does not exist.')
    if not found:
        raise DataError(f'no images in {", ".join(map(str, inputs))}: {", ".join(sorted(IMAGE_SUFFIXES))} are read.')
    return list(dict.fromkeys(found))


def names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the outputs of each image: its own without suffix, with a number where two would have the same."""
    found: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        numbered = (path.stem if count == 1 else f'{path.stem}_{count}' for count in itertools.count(1))
        found[path] = next(name for name in numbered if name.casefold() not in taken)  # some disks know no case
        taken.add(found[path].casefold())
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


@dataclass
class Results:
    """What predictions.json holds.

    Attributes:
        out: folder of all that is written.
        names: of the outputs, by image.
        images: numbers and files, by the path of the image.
        failed: why not, by the path of the image.
    """

    out: Path
    names: dict[Path, str]
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def failing(self, path: Path, what: str = '') -> Iterator[None]:
        """Let the others go on where this image fails; DataError is about all of them."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # decoders, pipelines and models each have their own
            lines = str(error).replace(f' {str(path)!r}', '').strip().splitlines() or [type(error).__name__]
            self.failed.setdefault(str(path), f'{what}{lines[0][:200]}')

    def add(self, path: Path, **numbers: Any) -> None:
        """Numbers of an image."""
        self.images[str(path)] = dict(input=str(path), files={}, **numbers)

    @contextmanager
    def file(self, path: Path, kind: str) -> Iterator[Path]:
        """Where to write a file of an image; it is noted when it is written."""
        target = self.out / f'{self.names[path]}_{kind}.png'
        yield target
        self.images[str(path)]['files'][kind] = target.name

    def write(self) -> None:
        """Write predictions.json."""
        text = json.dumps(dict(images=self.images, failed=self.failed), indent=1)
        (self.out / NUMBERS).write_text(text + '\n')


def segment(predictor: Any, path: Path, image: Any, results: Results) -> None:
    """Shares of the classes of an image, its class map and its overlay."""
    import numpy as np
    from PIL import Image
    from predict_pictures import overlay, shares

    label = predictor.label_map(path, image)
    if label.shape != (image.height, image.width):
        raise ValueError(f'the model segmented {label.shape} pixels of an image of {image.height} x {image.width}')
    results.add(path, classes=shares(label, predictor.classes))
    with results.file(path, 'classes') as target:
        Image.fromarray(label.astype(np.uint8 if len(predictor.classes) <= 256 else np.uint16)).save(target)
    with results.file(path, 'overlay') as target:
        overlay(image, label, predictor.classes, predictor.palette, target)


def classify(predictor: Any, images: dict[Path, Any], top: int, results: Results) -> None:
    """The most likely classes of each image."""
    import numpy as np

    for path, probabilities in zip(images, predictor.probabilities(list(images.values())), strict=True):
        order = np.argsort(-probabilities)[:top]
        best = [dict(name=predictor.classes[i], probability=float(probabilities[i])) for i in order]
        results.add(path, top=best)


def draw_attention(predictor: Any, path: Path, image: Any, wanted: Any, results: Results) -> None:
    """What [CLS] looks at in an image."""
    from predict_pictures import attention_maps

    image, weights, grid = predictor.attentions(image)
    with results.file(path, 'attention') as target:
        attention_maps(image, weights, grid, chosen_heads(wanted, weights), target)


def predict(args: argparse.Namespace, paths: Sequence[Path], results: Results) -> None:
    """Adds numbers and files, and why images failed."""
    import torch
    from predict_models import MMSegPredictor, Predictor, TimmPredictor, read_image
    from tqdm import tqdm

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise DataError(f'--device {args.device}: {str(error).splitlines()[0].rstrip(".")}.') from error
    if args.config:
        run_common.require_mmseg()
        predictor: Predictor = MMSegPredictor(args.config, args.checkpoint, args.multi_scale, args.device)
    else:
        predictor = TimmPredictor(args.model, args.checkpoint, args.labels, args.multi_scale, args.device)
    if args.multi_scale and not predictor.segments:
        raise DataError(f'--multi-scale is for segmentors, and {args.model} is a classifier.')
    if predictor.segments or args.attention is not None:
        require_matplotlib('drawing')
    size = 1 if predictor.segments else args.batch_size
    with tqdm(total=len(paths), unit='image') as bar:
        for first in range(0, len(paths), size):
            batch = paths[first : first + size]
            images = {}
            for path in batch:
                with results.failing(path):
                    images[path] = read_image(path)
            if not predictor.segments:
                with suppress(Exception):  # a single image may be the reason: each is asked alone below
                    classify(predictor, images, args.top, results)
            for path, image in images.items():
                with results.failing(path):
                    if predictor.segments:
                        segment(predictor, path, image, results)
                    elif str(path) not in results.images:
                        classify(predictor, {path: image}, args.top, results)
            known = [path for path in images if str(path) in results.images]
            for path in known if args.attention is not None else ():
                with results.failing(path, 'no attention maps: '):
                    draw_attention(predictor, path, images[path], args.attention, results)
            bar.update(len(batch))


def shown(path: str) -> str:
    """A path in one line that every terminal can show."""
    return path if path.isprintable() else ascii(path)


def main() -> None:
    args = parse_args()
    paths = find_images(args.inputs, args.out)
    make_folder(args.out, '--out')
    results = Results(args.out, names(paths))
    try:
        predict(args, paths, results)
    finally:  # also when it is interrupted
        if results.images or results.failed:  # else those of an earlier run stay
            results.write()
    for path, numbers in results.images.items():
        best = numbers.get('top') or [
            dict(name=k, probability=v) for k, v in list(numbers['classes'].items())[: args.top]
        ]
        print(f'{shown(path)}: ' + ', '.join(f'{one["name"]} {100 * one["probability"]:.1f} %' for one in best))
    print(f'{len(results.images)} of {len(paths)} images, results in {args.out}')
    if results.failed:
        listed = [f'{shown(path)} ({why})' for path, why in list(results.failed.items())[:MOST_NAMED]]
        more = len(results.failed) - len(listed)
        rest = f'; and {more} more in {args.out / NUMBERS}' if more else ''
        raise DataError(f'{len(results.failed)} of {len(paths)} images could not be used: {"; ".join(listed)}{rest}.')


if __name__ == '__main__':
    run_common.run(main)
