"""`quickstart.sh --pretrain`: a tokenizer, masked image modelling with it, and what that does for a segmentor.

All training images are seen without labels first. Then two segmentors learn from the labels of a few of them, in as
many steps: one from the pre-trained weights, one from random ones.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / 'configs/mim/vqkd-tiny_shapes.py'
PRETRAINING = REPOSITORY / 'configs/mim/beit-tiny_shapes.py'
LABELLED = 40  # images, of which the labels are used
STEPS = 150  # of each segmentor
NAMES = ('pre-trained', 'from scratch')


def shorten(cfg: Any) -> None:
    """Give a segmentor the steps of the comparison; its rate is the one that suits random weights."""
    cfg.train_cfg.update(max_iters=STEPS, val_interval=STEPS // 3)
    cfg.param_scheduler[1].end = STEPS
    cfg.default_hooks.checkpoint.interval = STEPS


def step(number: int, text: str, of: int) -> None:
    """A headline on the console."""
    print(f'\n[{number}/{of}] {text}', flush=True)


def merge_options(cfg: Any, options: list[str]) -> None:
    """KEY=VALUE arguments into a configuration, read as --cfg-options of the other tools."""
    from mmengine.config import DictAction
    from run_common import key_value

    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='*', type=key_value, action=DictAction, default={})
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)


def pretrain(cfg: Any, work_dir: Path, options: list[str]) -> None:
    """All of it; `cfg` is the segmentor on its data.

    Args:
        cfg: configuration of the segmentor, with `train_dataloader` on the data.
        work_dir: where the runs go, one folder each.
        options: KEY=VALUE for the pre-training alone, of --cfg-options.
    """
    import run_common
    from plot_run import plot_comparison, plot_curve, read_scalars

    start = time.monotonic()
    images = Path(cfg.train_dataloader.dataset.data_root, cfg.train_dataloader.dataset.data_prefix.img_path)
    step(2, 'tokenizer: a VQ-KD, which learns from a network of random weights', 6)
    tokenizer = _train(_configuration(TOKENIZER, images, work_dir / 'tokenizer', options))

    step(3, 'pre-training: masked image modelling, without labels', 6)
    pretraining = _configuration(PRETRAINING, images, work_dir / 'pretraining', options)
    pretraining.model.tokenizer.source = str(tokenizer)
    weights = _train(pretraining)
    plot_curve(work_dir / 'pretraining')

    few = _few_labels(cfg, work_dir)
    scores = []
    for number, (name, file) in enumerate(zip(NAMES, (str(weights), None), strict=True), start=4):
        step(number, f'segmentor {name}, labels of {few} images', 6)
        segmentor = copy.deepcopy(cfg)
        segmentor.model.backbone.pretrained = file
        segmentor.work_dir = str(work_dir / name.replace(' ', '-'))
        scores.append(run_common.train(segmentor)[2])

    step(6, 'pictures', 6)
    pictures = sorted((work_dir / 'pretraining/pictures').iterdir(), key=lambda path: path.stat().st_mtime)
    print(f'  {pictures[-1]}\n  {plot_comparison([work_dir / name.replace(" ", "-") for name in NAMES], 4)}')
    for name in NAMES:
        rows = [row for row in read_scalars(work_dir / name.replace(' ', '-')) if 'mIoU' in row]
        print(f'  {name}: mIoU ' + ', '.join(f'{row["mIoU"]:.2f} after {row["step"]:.0f} steps' for row in rows))
    print(f'  {weights}\n  all of it took {(time.monotonic() - start) / 60:.1f} minutes')
    print('mIoU ' + ' '.join(f'{name} {score:.2f}' for name, score in zip(NAMES, scores, strict=True)))


def _configuration(path: Path, images: Path, work_dir: Path, options: list[str]) -> Any:
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    cfg.work_dir, cfg.launcher = str(work_dir), 'none'
    cfg.train_dataloader.dataset.data_root = str(images)
    merge_options(cfg, options)
    return cfg


def _train(cfg: Any) -> Path:
    """The checkpoint of a training, and its result on the console."""
    import run_common
    from data_folders import DataError

    checkpoint, result, _ = run_common.train(cfg)
    if checkpoint is None:
        raise DataError(f'the training in {cfg.work_dir} left no checkpoint.')
    print(f'  {result}')
    return checkpoint


def _few_labels(cfg: Any, work_dir: Path) -> int:
    """Lets the segmentor learn from a part of the training images, in few steps; returns their number."""
    from mmseg.registry import DATASETS
    from run_common import scope_of

    dataset = cfg.train_dataloader.dataset
    with scope_of(cfg):
        pairs = DATASETS.build({**dataset, 'pipeline': [], 'lazy_init': True}).load_data_list()
    root = Path(dataset.data_root, dataset.data_prefix.img_path)
    suffix = dataset.get('img_suffix', '.jpg')
    names = [str(Path(pair['img_path']).relative_to(root)).removesuffix(suffix) for pair in pairs]
    chosen = names[:: max(len(names) // LABELLED, 1)][:LABELLED]
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / 'labelled.txt').write_text('\n'.join(chosen) + '\n')
    dataset.ann_file = str((work_dir / 'labelled.txt').resolve())
    return len(chosen)
