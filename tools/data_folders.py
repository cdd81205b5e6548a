"""Folders of images and labels: recognise the layout, read or infer the classes, report what is wrong in one sentence.

    ROOT/images/training    ROOT/annotations/training     ADE20K: label 0 is "other" and ignored
    ROOT/images/train       ROOT/annotations/train        the same with short names
    ROOT/images             ROOT/masks                    no split: one image in five is kept for validation

`labels/` and `masks/` may stand for `annotations/`. `ROOT/classes.json` may hold `classes` (names), `palette` (RGB) and
`reduce_zero_label`; without it the classes are counted in the labels.
"""

import colorsys
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LABEL_FOLDERS = ('annotations', 'labels', 'masks')
SPLITS = (('training', 'validation'), ('train', 'val'))
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'}
IGNORED = 255  # mmsegmentation reads labels as 8 bit, so no value lies above
VAL_SHARE = 0.2
EXIF_ORIENTATION = 0x0112  # 5 to 8: the image lies on its side
# what Pillow raises for a damaged file; SyntaxError is its word for a broken PNG
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(Exception):
    """Something about the user's data, in one sentence that says what to do."""


@dataclass(frozen=True)
class Folders:
    """A data set as mmsegmentation's `BaseSegDataset` wants it; paths are relative to `root`."""

    root: Path
    images: dict[str, str]  # 'train' and 'val' -> folder
    labels: dict[str, str]
    names: dict[str, list[str]]  # 'train' and 'val' -> names without suffix, below their folder
    image_suffix: str
    label_suffix: str
    split_by_us: bool  # both splits share one folder, so lists of names tell them apart
    classes: list[str]
    palette: list[list[int]]
    reduce_zero_label: bool


def files_below(folder: Path, suffixes: set[str]) -> list[str]:
    """Paths of the files in and below a folder that end so, relative to it, without hidden ones; links are followed."""
    from beit_plugin.data.image_list import folders_below

    files = (Path(where, name) for where, names in folders_below(folder) for name in names)
    kept = (file for file in files if file.suffix.lower() in suffixes and file.name[0] != '.')  # macOS: ._x
    kept = (file for file in kept if not file.is_fifo())  # reading it may never end
    return sorted(str(file.relative_to(folder)) for file in kept)


def read_label(path: Path) -> np.ndarray:
    """A label image as H, W class numbers.

    Raises:
        DataError: not an image, in colour, or with values that are no 8 bit class numbers.
    """
    try:
        with Image.open(path) as file:
            label = np.asarray(file)
    except UNREADABLE as error:
        raise DataError(f'{path} cannot be read as a label image: {error}') from error
    if label.ndim != 2:
        raise DataError(f'{path} is a colour image of shape {label.shape}: labels have one channel of class numbers.')
    if label.dtype.kind == 'f':
        raise DataError(f'{path} holds {label.dtype} values: labels are integer class numbers.')
    outside = label[(label < 0) | (label > IGNORED)] if label.dtype.itemsize > 1 else label[:0]
    if outside.size:
        raise DataError(f'{path} has label {outside[0]}: labels are 0 to {IGNORED - 1}, and {IGNORED} is ignored.')
    return label


def image_size(path: Path, turn: bool) -> tuple[tuple[int, int], bool]:
    """Height and width of an image, turned by its EXIF data if `turn`, and whether it was; every byte is read.

    Raises:
        DataError: not an image, or a damaged one.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = turn and file.getexif().get(EXIF_ORIENTATION, 1) >= 5
            file.draft('L', (1, 1))  # a JPEG is decoded at an eighth of its size, which also meets its end
            file.load()
    except UNREADABLE as error:
        raise DataError(f'{path} cannot be read as an image: {error}') from error
    return ((width, height) if turned else (height, width)), turned


def label_values(pairs: Iterable[tuple[Path, Path]], turn: bool = True) -> dict[int, Path]:
    """Every value in the labels of these pairs of image and label, with the first label that has it.

    Args:
        pairs: of paths.
        turn: whether training turns images by their EXIF data.

    Raises:
        DataError: a file cannot be read, image and label differ in size, or have a side of a single pixel.
    """
    found: dict[int, Path] = {}
    for image, path in pairs:
        label = read_label(path)
        size, turned = image_size(image, turn)
        if label.shape != size:
            remedy = (
                ' (after its EXIF rotation): they must have one size; where labels belong to images as stored, '
                "load these by color_type='color_ignore_orientation'."
                if turned
                else ': they must have one size.'
            )
            raise DataError(
                f'{path} is {label.shape[1]} x {label.shape[0]} pixels, but its image {image} is {size[1]} x {size[0]}'
                f'{remedy}'
            )
        if min(size) < 2:  # mmsegmentation drops such a side of the label when it reads it
            raise DataError(f'{image} is {size[1]} x {size[0]} pixels, expected at least 2 x 2: enlarge or remove it.')
        for value in np.unique(label):
            found.setdefault(int(value), path)
    return found


def check_values(found: dict[int, Path], num_classes: int, reduce_zero_label: bool) -> None:
    """Raises DataError when a value is neither a class nor ignored; the sentence names a file and all such values."""
    first = 1 if reduce_zero_label else 0
    allowed = set(range(num_classes + first)) | {IGNORED}
    wrong = sorted(set(found) - allowed)
    if wrong:
        zero = ' and 0 (ignored)' if reduce_zero_label else ''
        others = f'; the labels also hold {wrong[1:]}' if len(wrong) > 1 else ''
        raise DataError(
            f'{found[wrong[0]]} has label {wrong[0]}, which is no class: expected {first} to '
            f'{num_classes + first - 1}{zero} or {IGNORED} (ignored){others}.'
        )


def _label_suffix(image_names: list[str], label_names: set[str]) -> str:
    """What label files add to the image's name, such as `.png` or `_mask.png`."""
    stem = image_names[0]
    candidates = {name[len(stem) :] for name in label_names if name.startswith(stem)} or {'.png'}
    # of images 1 and 10, label 10.png also begins with 1: the ending that serves most images is the right one
    return max(sorted(candidates), key=lambda suffix: sum(name + suffix in label_names for name in image_names))


def _require_labels(image_names: list[str], label_names: set[str], suffix: str, where: Path) -> None:
    missing = [name + suffix for name in image_names if name + suffix not in label_names]
    if missing:
        raise DataError(f'{len(missing)} of {len(image_names)} images have no label: {where / missing[0]} is missing.')


def _one_suffix(files: dict[str, list[str]], folder: Path) -> str:
    for part, names in files.items():
        if not names:
            raise DataError(f'{folder}{part} holds no images ({", ".join(sorted(IMAGE_SUFFIXES))}).')
    suffixes = {Path(name).suffix for names in files.values() for name in names}
    if len(suffixes) > 1:
        raise DataError(f'{folder} mixes {" and ".join(sorted(suffixes))}: convert the images to one format.')
    return suffixes.pop()


def colours(count: int) -> list[list[int]]:
    """RGB colours that differ from their neighbours."""
    golden = 0.618034  # of a turn: neighbours in number are far apart in hue
    return [
        [round(255 * c) for c in colorsys.hsv_to_rgb(i * golden % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.25 * (i % 3 == 2))]
        for i in range(count)
    ]


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(c) is int and 0 <= c <= 255 for c in value)


def _read_classes(file: Path) -> dict[str, Any]:
    """What classes.json holds, each entry of the right type."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f'{file} is not valid JSON: {error}') from error
    if not isinstance(content, dict) or not isinstance(content.get('classes'), list) or not content['classes']:
        raise DataError(f'{file} has no list of names under "classes".')
    if not isinstance(content.get('reduce_zero_label', False), bool):
        raise DataError(
            f'{file} has {content["reduce_zero_label"]!r} under "reduce_zero_label": expected true or false.'
        )
    palette = content.get('palette', colours(len(content['classes'])))
    wrong = [entry for entry in palette if not _is_colour(entry)] if isinstance(palette, list) else [palette]
    if wrong:
        raise DataError(f'{file} has {wrong[0]!r} under "palette": a colour is a list of three integers from 0 to 255.')
    if len(palette) != len(content['classes']):
        raise DataError(f'{file} has {len(content["classes"])} classes but {len(palette)} colours under "palette".')
    return content


def _classes(root: Path, found: dict[int, Path], ade_layout: bool) -> dict[str, Any]:
    """Names, palette and treatment of zero, from classes.json if there is one, else from the labels."""
    largest = max((value for value in found if value != IGNORED), default=-1)
    if set(found) == {0, IGNORED}:
        raise DataError(
            f'the labels of {root} hold 0 and {IGNORED} alone, and {IGNORED} is ignored: write 1 for the object.'
        )
    file = root / 'classes.json'
    if file.is_file():
        content = _read_classes(file)
        classes = [str(name) for name in content['classes']]
        reduce_zero = content.get('reduce_zero_label', largest == len(classes))
        palette = content.get('palette', colours(len(classes)))
        check_values(found, len(classes), reduce_zero)
    else:
        reduce_zero = ade_layout
        classes = [f'class {i}' for i in range(1 if reduce_zero else 0, largest + 1)]
        palette = colours(len(classes))
    if len(classes) < 2:
        hint = '; label 0 counts as "other" here, see reduce_zero_label in classes.json' if reduce_zero else ''
        raise DataError(f'the labels of {root} hold {len(classes)} class(es), expected at least 2{hint}.')
    return {'classes': classes, 'palette': palette, 'reduce_zero_label': reduce_zero}


def detect(root: Path, seed: int = 0) -> Folders:
    """Recognise the layout below `root`, check that every image has a label, and find the classes.

    Args:
        root: folder that holds `images/` and one of `annotations/`, `labels/`, `masks/`.
        seed: of the split into training and validation where the folders have none.

    Raises:
        DataError: what is missing or wrong.
    """
    root = root.expanduser().resolve()
    if not root.is_dir():
        raise DataError(f'the data root {root} does not exist.')
    if not (root / 'images').is_dir():
        raise DataError(f'the data root {root} has no folder images/.')
    label_folder = next((name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
    if label_folder is None:
        raise DataError(
            f'the data root {root} has no labels: expected a folder '
            f'{", ".join(name + "/" for name in LABEL_FOLDERS[:-1])} or {LABEL_FOLDERS[-1]}/.'
        )
    split = next((pair for pair in SPLITS if all((root / 'images' / name).is_dir() for name in pair)), None)
    parts = [f'/{name}' for name in split] if split else ['']

    files = {part: files_below(root / f'images{part}', IMAGE_SUFFIXES) for part in parts}
    image_suffix = _one_suffix(files, root / 'images')
    image_names = {part: [name.removesuffix(image_suffix) for name in files[part]] for part in parts}
    label_suffix = ''
    for part in parts:
        label_dir = root / f'{label_folder}{part}'
        if not label_dir.is_dir():
            raise DataError(f'{root}/images{part} has no labels: {label_dir} does not exist.')
        label_names = set(files_below(label_dir, IMAGE_SUFFIXES))
        label_suffix = label_suffix or _label_suffix(image_names[part], label_names)
        _require_labels(image_names[part], label_names, label_suffix, label_dir)

    found = label_values(
        (root / f'images{part}' / (name + image_suffix), root / f'{label_folder}{part}' / (name + label_suffix))
        for part in parts
        for name in image_names[part]
    )
    names = dict(zip(('train', 'val'), image_names.values(), strict=False))
    if split is None:
        mixed = image_names['']
        if len(mixed) < 2:
            raise DataError(f'{root} has one image, expected at least 2: one to train on and one to validate on.')
        spaced = next((name for name in mixed if name != name.strip() or len(name.splitlines()) > 1), None)
        if spaced is not None:
            raise DataError(
                f'{root}/images has an image named {spaced + image_suffix!r}: rename it, since a list of names cannot '
                'hold spaces at the ends or line breaks.'
            )
        random.Random(seed).shuffle(mixed)
        val = max(1, round(VAL_SHARE * len(mixed)))
        names = {'train': sorted(mixed[val:]), 'val': sorted(mixed[:val])}
    return Folders(
        root=root,
        images={key: f'images{part}' for key, part in zip(('train', 'val'), parts * 2, strict=False)},
        labels={key: f'{label_folder}{part}' for key, part in zip(('train', 'val'), parts * 2, strict=False)},
        names=names,
        image_suffix=image_suffix,
        label_suffix=label_suffix,
        split_by_us=split is None,
        **_classes(root, found, ade_layout=split == SPLITS[0]),
    )


def use_folders(cfg: Any, folders: Folders, work_dir: Path) -> None:
    """Point an mmengine configuration at the folders: data sets, classes and the widths of the heads.

    Where the split is ours, its lists of names go to `work_dir`.
    """
    for key, loader in (('train', cfg.train_dataloader), ('val', cfg.val_dataloader), ('val', cfg.test_dataloader)):
        dataset = dict(
            type='BaseSegDataset',
            data_root=str(folders.root),
            data_prefix=dict(img_path=folders.images[key], seg_map_path=folders.labels[key]),
            img_suffix=folders.image_suffix,
            seg_map_suffix=folders.label_suffix,
            reduce_zero_label=folders.reduce_zero_label,
            metainfo=dict(classes=folders.classes, palette=folders.palette),
            pipeline=loader.dataset.pipeline,
        )
        for step in dataset['pipeline']:
            if 'num_classes' in step:  # of BEiTLoadAnnotations
                step['num_classes'] = len(folders.classes)
        if folders.split_by_us:
            work_dir.mkdir(parents=True, exist_ok=True)
            listing = (work_dir / f'{key}.txt').resolve()
            listing.write_text('\n'.join(folders.names[key]) + '\n')
            dataset['ann_file'] = str(listing)
        loader.dataset = dataset
    for head in (cfg.model.decode_head, cfg.model.get('auxiliary_head')):
        if head is not None:
            head.num_classes = len(folders.classes)
