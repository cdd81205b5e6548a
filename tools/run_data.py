"""The data sets of a configuration: inside wrappers, checked before a run, and the files that a run leaves out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_folders import DataError, check_values, label_values
from run_mim import DATASET, count_images

MAX_LABELS_CHECKED = 1000  # per data set with their images, spread evenly: some seconds
CAN_SKIP = ('BEiTLoadImageFromFile', 'BEiTLoadAnnotations')


def data_sets(dataset_cfg: Any) -> Iterator[Any]:
    """The data sets inside the wrappers of mmengine and mmsegmentation, which repeat, join or mix them."""
    inner = [dataset_cfg['dataset']] if 'dataset' in dataset_cfg else dataset_cfg.get('datasets')
    if inner is None:
        yield dataset_cfg
    for cfg in inner or ():
        yield from data_sets(cfg)


def set_data_root(cfg: Any, root: Path) -> None:
    """Let all data sets of a configuration read from another folder, and metrics with a file in the old one."""
    for part in ('train', 'val', 'test'):
        loader, metrics = cfg.get(f'{part}_dataloader'), cfg.get(f'{part}_evaluator')
        for dataset in data_sets(loader.dataset) if loader else ():
            for metric in metrics if isinstance(metrics, list) else [metrics or {}]:
                file = Path(metric.get('ann_file') or '')
                if dataset.get('data_root') and file.is_relative_to(dataset.data_root):
                    metric['ann_file'] = str(root / file.relative_to(dataset.data_root))
            dataset.data_root = str(root)


def _loading_steps(dataset_cfg: Any) -> list[Any]:
    """Those steps of a data set's pipeline that can go on without a file."""
    return [step for step in dataset_cfg.get('pipeline', ()) if step['type'] in CAN_SKIP]


def set_on_error(dataset_cfg: Any, on_error: str) -> None:
    """Let every data set inside `dataset_cfg` stop at files that cannot be used, or go on.

    Raises:
        DataError: a pipeline without our loading.
    """
    for dataset in data_sets(dataset_cfg):
        if dataset['type'] == DATASET:
            dataset['on_error'] = on_error
            continue
        steps = _loading_steps(dataset)
        if len(steps) < 2:
            raise DataError(f'--on-error needs {" and ".join(CAN_SKIP)} in the training pipeline.')
        for step in steps:
            step.on_error = on_error


def check_data(dataset_cfg: Any) -> int:
    """Number of images of a data set of segmentation, of detection, or of ours, or of all in a wrapper, each once.

    Raises:
        DataError: folders, images or labels are missing or damaged, or labels are outside the classes; where the
            pipeline skips such files, only if none is left.
    """
    return sum(map(_check_one, data_sets(dataset_cfg)))


def _check_one(dataset_cfg: Any) -> int:
    if dataset_cfg['type'] == DATASET:
        return count_images(dataset_cfg)
    root = Path(dataset_cfg.get('data_root') or '.')
    if not root.is_dir():
        raise DataError(f'the data root {root} does not exist: give it by --data-root DIR.')
    from mmseg.registry import DATASETS

    dataset = DATASETS.build({**dataset_cfg, 'pipeline': [], 'lazy_init': True})
    if 'seg_map_path' not in dataset.data_prefix:
        return _check_annotations(dataset)
    for key, what in (('img_path', 'images'), ('seg_map_path', 'labels')):
        if not Path(dataset.data_prefix[key]).is_dir():
            raise DataError(f'the data root {root} has no {what}: {dataset.data_prefix[key]} does not exist.')
    pairs = dataset.load_data_list()
    if not pairs:
        raise DataError(f'{dataset.data_prefix["img_path"]} holds no *{dataset.img_suffix} images.')
    turn = not any('ignore_orientation' in step.get('color_type', '') for step in dataset_cfg.get('pipeline', ()))
    checked = pairs[:: -(-len(pairs) // MAX_LABELS_CHECKED)]
    if any(step.get('on_error') == 'skip' for step in _loading_steps(dataset_cfg)):
        usable = [pair for pair in checked if _can_be_used(pair, dataset, turn)]
        if not usable:
            raise DataError(f'none of the {len(checked)} images of {root} that were checked can be used.')
        return len(pairs)
    missing = [pair['seg_map_path'] for pair in pairs if not Path(pair['seg_map_path']).is_file()]
    if missing:
        raise DataError(f'{len(missing)} of {len(pairs)} images have no label: {missing[0]} is missing.')
    _check_pairs(checked, dataset, turn)
    return len(pairs)


def _check_annotations(dataset: Any) -> int:
    """Number of images of a data set whose labels are in a file, such as mmdetection's."""
    try:
        files = [image['img_path'] for image in dataset.load_data_list()]
    except (ValueError, KeyError) as error:
        raise DataError(
            f'{dataset.ann_file} holds no annotations of a {type(dataset).__name__} ({error!r}).'
        ) from error
    if not files:
        raise DataError(f'{dataset.ann_file} names no images.')
    missing = [] if getattr(dataset, 'backend_args', None) else [file for file in files if not Path(file).is_file()]
    if missing:
        raise DataError(f'{len(missing)} of {len(files)} images do not exist, such as {missing[0]}.')
    return len(files)


def _check_pairs(pairs: list[Any], dataset: Any, turn: bool) -> None:
    """With `turn` images are turned by their EXIF data."""
    found = label_values(((Path(pair['img_path']), Path(pair['seg_map_path'])) for pair in pairs), turn)
    check_values(found, len(dataset.metainfo['classes']), dataset.reduce_zero_label)


def _can_be_used(pair: Any, dataset: Any, turn: bool) -> bool:
    try:
        _check_pairs([pair], dataset, turn)
    except DataError:
        return False
    return True


def report_left_out(dataset: Any) -> None:
    """Print how many files a training went on without, those of all processes together."""
    from mmengine.dist import all_gather_object, is_main_process

    files: dict[str, str] = {}
    for found in all_gather_object(_left_out(dataset)):
        files.update(found)
    if files and is_main_process():
        plural = '' if len(files) == 1 else 's'
        print(f'{len(files)} file{plural} left out of training: {", ".join(sorted(files))}')


def _left_out(dataset: Any) -> dict[str, str]:
    inner = [dataset.dataset] if hasattr(dataset, 'dataset') else getattr(dataset, 'datasets', None)
    if inner is None and hasattr(dataset, 'left_out'):
        return dataset.left_out
    if inner is None:
        steps = dataset.pipeline.transforms
        return {path: why for step in steps for path, why in getattr(step, 'left_out', {}).items()}
    return {path: why for part in inner for path, why in _left_out(part).items()}
