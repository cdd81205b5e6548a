#!/usr/bin/env python3
"""Train one classifier by several attention backends and dtypes from the same start, and compare the losses.

DATA is an ImageFolder (one folder for each class), or holds one as train/. Every setting sees the same images in the
same order, cropped and flipped alike; a seed decides weights, order, crops and stochastic depth. Every setting is
trained with all seeds, for rounding alone sends single trainings different ways: a mean difference within two of its
standard errors is none. Writes curves.json and curves.png.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from data_folders import DataError
from run_common import positive, run

EXAMPLES = """examples:
  python tools/compare_training.py data/hymenoptera
  python tools/compare_training.py data/hymenoptera --seeds 8 --jobs 4        four at a time, where the CPU has cores
  python tools/compare_training.py data/hymenoptera --size 64 --steps 20 --settings eager:float32 sdpa:bfloat16
"""
BACKENDS, DTYPES = ('auto', 'eager', 'sdpa', 'fused'), ('float32', 'bfloat16', 'float16')
DROP_PATH, WEIGHT_DECAY = 0.1, 0.05  # BEiT's fine-tuning of the base model, unilm beit/README.md
LAST = 0.1  # share of the steps whose mean is the final loss
SMOOTHED = 1 / 15  # of the steps in the running mean of the plot


class Setting(NamedTuple):
    """How to train."""

    backend: str
    dtype: str

    def __str__(self) -> str:
        return ':'.join(self)


def setting(text: str) -> Setting:
    """'fused:bfloat16' to its parts."""
    backend, _, dtype = text.partition(':')
    if backend not in BACKENDS or dtype not in DTYPES:
        raise argparse.ArgumentTypeError(
            f'expected BACKEND:DTYPE of {", ".join(BACKENDS)} and {", ".join(DTYPES)}, got {text!r}'
        )
    return Setting(backend, dtype)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, metavar='DATA')
    parser.add_argument(
        '--settings', nargs='+', type=setting, metavar='BACKEND:DTYPE',
        default=[setting(text) for text in ('eager:float32', 'sdpa:bfloat16', 'fused:bfloat16')],
        help='the first is the reference (default: eager:float32 sdpa:bfloat16 fused:bfloat16)',
    )  # fmt: skip
    parser.add_argument('--model', default='beit_plugin_small_patch16_224', help='(default: %(default)s)')
    parser.add_argument('--steps', type=positive, default=300, help='(default: 300)')
    parser.add_argument('--batch-size', type=positive, default=32, help='(default: 32)')
    parser.add_argument('--lr', type=float, default=5e-4, help='peak of AdamW, warm-up 10 %%, cosine (default: 5e-4)')
    parser.add_argument('--seeds', type=positive, default=3, metavar='N', help='of each setting (default: 3)')
    parser.add_argument('--size', type=positive, default=224, metavar='PIXELS', help='(default: 224)')
    parser.add_argument('--device', default=None, help='default: cuda if there is one, else cpu')
    parser.add_argument('--workers', type=int, default=None, help='processes that load images (default: 8, on a CPU 0)')
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='trainings at a time (default: 1)')
    parser.add_argument('--out', type=Path, default=Path('training'), metavar='DIR')
    return parser.parse_args()


class Samples:
    """The images of a whole training, batch after batch, each cropped and flipped by random numbers of its own.

    So neither the number of workers nor what else draws random numbers changes them.
    """

    def __init__(self, images: Sequence[tuple[Any, int]], transform: Any, seed: int, count: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        rounds = -(-count // len(images))
        self.order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(rounds)])[:count]
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        import torch

        image, label = self.images[int(self.order[position])]
        number = self.seed * 2**32 + position
        with torch.random.fork_rng(devices=[]):  # the model's own draws go on as if nothing had been
            torch.default_generator.manual_seed(number)  # not the GPU's too, which draws the stochastic depth
            random.seed(number)  # timm's crops use Python's
            return self.transform(image), label


def read_images(root: Path, size: int) -> tuple[list[tuple[Any, int]], list[str]]:
    """All images with their labels, decoded once and shrunk to at most twice the size; and the classes."""
    from PIL import Image
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(root / 'train' if (root / 'train').is_dir() else root))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f'{root} is no ImageFolder: {error}') from error
    if len(folder.classes) < 2:
        raise DataError(f'{root} has one class only, {folder.classes[0]}; there is nothing to learn.')
    found = []
    for path, label in folder.samples:
        with Image.open(path) as image:
            image = image.convert('RGB')
        scale = 2 * size / min(image.size)
        if scale < 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        found.append((image, label))
    return found, folder.classes


def refuse_early(settings: Sequence[Setting], device: Any) -> None:
    """Raises DataError if the fused kernels were asked for and cannot run here."""
    import torch

    from beit_plugin.models.attention import fused_refusal

    for one in settings:
        reason = None
        if one.backend == 'fused':
            reason = fused_refusal(torch.empty(0, device=device, dtype=getattr(torch, one.dtype)), 64, 0.0)
        if reason is not None:
            raise DataError(f'{one} cannot run here: {reason}. Name other --settings.')


def make_model(args: argparse.Namespace, classes: int, backend: str) -> Any:
    """A model of the plugin, as timm makes it."""
    import timm

    import beit_plugin  # noqa: F401  registers

    if not timm.is_model(args.model) or '_plugin_' not in args.model:
        raise DataError(f"{args.model} is no model of the plugin; timm.list_models('beit*_plugin_*') has the names.")
    return timm.create_model(
        args.model, num_classes=classes, img_size=args.size, drop_path_rate=DROP_PATH, attn_backend=backend
    )


def train(
    args: argparse.Namespace, one: Setting, seed: int, images: Sequence[tuple[Any, int]], classes: int, device: Any
) -> dict[str, Any]:
    """One training; the loss of every step, and seconds a step without the first."""
    import torch
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    torch.manual_seed(seed)
    model = make_model(args, classes, one.backend).to(device).train()
    cfg = resolve_model_data_config(model)
    transform = create_transform(
        args.size, is_training=True, color_jitter=None, interpolation=cfg['interpolation'], mean=cfg['mean'],
        std=cfg['std'],
    )  # fmt: skip
    samples = Samples(images, transform, seed, args.steps * args.batch_size)
    workers = (min(8, os.cpu_count() or 1) if device.type == 'cuda' else 0) if args.workers is None else args.workers
    loader = DataLoader(samples, args.batch_size, num_workers=workers, pin_memory=device.type == 'cuda')  # type: ignore[arg-type]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=rest, weight_decay=0.0)], lr=args.lr
    )
    warm_up = max(1, args.steps // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, args.steps - warm_up))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    dtype = getattr(torch, one.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=one.dtype == 'float16')
    torch.manual_seed(seed)  # stochastic depth
    losses = []
    start = time.perf_counter()
    for i, (x, y) in enumerate(tqdm(loader, desc=f'{one} seed {seed}', mininterval=1)):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        loss = cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss.detach())  # read in the end: reading waits for the device
        if i == 0:
            losses[0].item()
            start = time.perf_counter()
    values = torch.stack(losses).tolist()
    seconds = (time.perf_counter() - start) / max(1, args.steps - 1)
    final = mean(values[-max(1, round(LAST * args.steps)) :])
    return dict(setting=str(one), seed=seed, final=final, seconds_per_step=seconds, losses=values)


def train_apart(args: argparse.Namespace, one: Setting, seed: int) -> dict[str, Any]:
    """``train`` in a process of its own."""
    import torch

    images, classes = read_images(args.data, args.size)
    return train(args, one, seed, images, len(classes), torch.device(args.device))


def by_setting(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each setting, the reference first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        found.setdefault(one['setting'], []).append(one)
    return found


def compare(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What the final losses say, one line for each setting; the setting of the first run is the reference.

    Others are compared with it seed by seed: the mean of the differences, and its standard error.
    """
    (name, reference), *others = by_setting(runs).items()
    expected = {one['seed']: one['final'] for one in reference}
    lines = [f'{name:<16} {_listed(expected)}']
    for name, trained in others:
        finals = {one['seed']: one['final'] for one in trained if one['seed'] in expected}
        differences = [final - expected[seed] for seed, final in finals.items()]
        average = mean(differences)
        verdict = 'one seed has no spread: use --seeds'
        if len(differences) > 1:
            error = stdev(differences) / math.sqrt(len(differences))
            verdict = f'standard error {error:.4f}: {"within" if abs(average) <= 2 * error else "BEYOND"} two of them'
        lines.append(f'{name:<16} {_listed(finals)}; mean difference {average:+.4f}, {verdict}')
    return lines


def _listed(finals: dict[int, float]) -> str:
    values = list(finals.values())
    spread = f', from lowest to highest {max(values) - min(values):.4f}' if len(values) > 1 else ''
    return f'mean {sum(values) / len(values):.4f} of ' + ', '.join(f'{value:.4f}' for value in values) + spread


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, up to ``window`` of them."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def plot(results: dict[str, Any], path: Path) -> None:
    """Smoothed losses: for each setting the mean of its seeds, and a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    runs, options = results['runs'], results['options']
    window = max(1, round(SMOOTHED * options['steps']))
    figure, axis = plt.subplots(figsize=(8, 5), layout='constrained')
    for i, (name, trained) in enumerate(by_setting(runs).items()):
        smooth = list(zip(*(running_mean(one['losses'], window) for one in trained), strict=True))
        steps = range(1, len(smooth) + 1)
        style = '-' if i == 0 else '--' if i == 1 else ':'
        axis.plot(steps, [sum(s) / len(s) for s in smooth], style, color=f'C{i}', label=name)
        if len(trained) > 1:
            axis.fill_between(steps, list(map(min, smooth)), list(map(max, smooth)), color=f'C{i}', alpha=0.15)
    seeds = f'mean and range of {options["seeds"]} seeds' if options['seeds'] > 1 else 'one seed'
    axis.set(xlabel='step', ylabel=f'training loss, mean of {window} steps; {seeds}')
    axis.set_title(f'{options["model"]}, {options["size"]} px, batch {options["batch_size"]}\n{results["machine"]}')
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    import torch
    from benchmark_report import hardware, versions

    device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    refuse_early(args.settings, device)
    images, classes = read_images(args.data, args.size)
    print(f'{len(images)} images of {", ".join(classes)}', flush=True)
    args.device = str(device)
    machine = hardware(args.device)
    options = {key: str(value) if key == 'data' else value for key, value in vars(args).items() if key != 'out'}
    options['settings'] = [str(one) for one in args.settings]
    results: dict[str, Any] = dict(
        date=str(date.today()), machine=machine['name'], hardware=machine, versions=versions(), options=options, runs=[]
    )
    # all settings with one seed after the other: what is cut short can still be compared
    todo = [(one, seed) for seed in range(args.seeds) for one in args.settings]
    args.out.mkdir(parents=True, exist_ok=True)
    runs: Any = (train(args, one, seed, images, len(classes), device) for one, seed in todo)
    if args.jobs > 1:
        pool = ProcessPoolExecutor(args.jobs, get_context('spawn'))
        runs = pool.map(train_apart, [args] * len(todo), *zip(*todo, strict=True))
    for trained in runs:
        results['runs'].append(trained)
        results['verdict'] = compare(results['runs'])
        (args.out / 'curves.json').write_text(json.dumps(results) + '\n')
    plot(results, args.out / 'curves.png')
    print('\n'.join(['', f'final loss, the mean of the last {LAST:.0%} of the steps:', *results['verdict']]))
    print(f'{args.out}/curves.json and .png')


if __name__ == '__main__':
    run(main)
