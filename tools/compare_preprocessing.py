#!/usr/bin/env python3
"""Do the hosts see the same pixels? BeitImageProcessor against transformers, timm and mmsegmentation on your images.

Each prepares every image for a square model by the same settings: RGB, resized to it bicubically, normalised by
ImageNet's statistics. The table has the differences in grey levels (0 to 255).
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_folders import IMAGE_SUFFIXES, UNREADABLE, DataError, files_below
from run_common import positive, require_mmseg, run

EXAMPLES = """examples:
  python tools/compare_preprocessing.py data/hymenoptera
  python tools/compare_preprocessing.py photos --size 640
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folder', type=Path, help='of images')
    parser.add_argument('--size', type=positive, default=224, metavar='PIXELS', help='(default: 224)')
    return parser.parse_args()


def hosts(size: int) -> Iterator[tuple[str, str, Callable[[Path, Any], Any]]]:
    """Name, the backend of ours that it is compared with, and what makes (3, size, size) of a file and its image."""
    from mmcv.transforms import Compose
    from mmengine.registry import init_default_scope
    from mmseg.models import SegDataPreProcessor
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
    from transformers import BeitImageProcessor, BeitImageProcessorPil

    scale: dict[str, Any] = dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    options = dict(size=dict(height=size, width=size), do_center_crop=False, **scale)
    for name, backend, cls in (
        ('transformers, torchvision', 'torch', BeitImageProcessor),
        ('transformers, Pillow', 'pil', BeitImageProcessorPil),
    ):
        processor = cls(**options)
        yield name, backend, lambda _, image, p=processor: p(image, return_tensors='pt').pixel_values[0]
    transform = create_transform(
        size, interpolation='bicubic', crop_pct=1.0, crop_mode='squash', mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )  # fmt: skip
    yield 'timm', 'pil', lambda _, image: transform(image)
    init_default_scope('mmseg')
    mean, std = ([255 * value for value in values] for values in scale.values())
    preprocess = SegDataPreProcessor(mean=mean, std=std, bgr_to_rgb=True)
    for backend, library in (('pillow', 'Pillow'), ('cv2', 'OpenCV')):
        resize = dict(type='Resize', scale=(size, size), keep_ratio=False, interpolation='bicubic', backend=backend)
        steps = Compose([dict(type='LoadImageFromFile', imdecode_backend=backend), resize, dict(type='PackSegInputs')])

        def prepare(path: Path, _: Any, steps: Any = steps) -> Any:
            found = steps(dict(img_path=str(path)))
            return preprocess(dict(inputs=[found['inputs']], data_samples=[found['data_samples']]))['inputs'][0]

        yield f'mmsegmentation, {library}', 'pil', prepare


def main() -> None:
    args = parse_args()
    if not args.folder.is_dir():
        raise DataError(f'the folder {args.folder} does not exist.')
    require_mmseg()
    if find_spec('transformers') is None:
        raise DataError('transformers, one of the peers, is not installed: pip install transformers.')
    warnings.filterwarnings('ignore')  # of the peers, while they are imported
    import torch
    from predict_models import read_image
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from tqdm import tqdm

    import beit_plugin.mm  # noqa: F401  makes mmseg importable
    from beit_plugin import BeitImageProcessor

    std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]
    scale: dict[str, Any] = dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    processors = {
        backend: BeitImageProcessor(backend=backend, size=args.size, do_center_crop=False, **scale)
        for backend in ('torch', 'pil')
    }
    peers = list(hosts(args.size))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name, *_ in peers}
    paths = [args.folder / name for name in files_below(args.folder, IMAGE_SUFFIXES)]
    failed = []
    for path in tqdm(paths, unit='image'):
        try:
            image = read_image(path)
        except UNREADABLE as error:
            failed.append(f'{path} ({error})')
            continue
        ours = {backend: processor(image).pixel_values[0] for backend, processor in processors.items()}
        for name, backend, prepare in peers:
            levels = (255 * std * (ours[backend] - prepare(path, image))).abs()
            found[name].append((levels.max().item(), levels.mean().item(), (levels > 0.5).float().mean().item()))
    if not any(found.values()):
        raise DataError(f'{args.folder} holds no image that can be read ({", ".join(sorted(IMAGE_SUFFIXES))}).')
    print(f'{len(found[peers[0][0]])} images, {args.size} x {args.size} pixels, differences in grey levels')
    print('| | ours | largest | mean | pixels that differ, % |\n|---|---|---|---|---|')
    for name, backend, _ in peers:
        largest, mean, share = (torch.tensor(values) for values in zip(*found[name], strict=True))
        print(f'| {name} | {backend} | {largest.max():.2f} | {mean.mean():.4f} | {100 * share.mean():.3f} |')
    if failed:
        raise DataError(f'{len(failed)} of {len(paths)} images were left out: {"; ".join(failed)}.')


if __name__ == '__main__':
    run(main)
