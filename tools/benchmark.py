#!/usr/bin/env python3
"""Time our attention and encoder against the peers in one run: medians, peak memory, ratios to the one without a bias.

Writes a table (results.md), the numbers (results.json) and a plot of time and memory against the number of tokens
(results.png) to the folder --out. Runs on a GPU, or on the CPU at sizes that it can bear.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

from run_common import run

EXAMPLES = """examples:
  python tools/benchmark.py attention --out bench                                 224, 640 and 1024 px
  python tools/benchmark.py attention --sizes 224:128 384:64 640:16 --dtype float16
  python tools/benchmark.py encoder --variant base --sizes 224:128 640:16 --compile
  python tools/benchmark.py encoder --variant tiny --sizes 224:2 --dtype float32  on a CPU
"""
DEFAULT_SIZES = ['224:128', '640:16', '1024:4']


def size(text: str) -> tuple[int, int]:
    """'640:16' to (640, 16)."""
    side, _, batch = text.partition(':')
    if not (side.isdecimal() and batch.isdecimal() and int(side) % 16 == 0 and int(side) and int(batch)):
        raise argparse.ArgumentTypeError(f'expected PIXELS:BATCH with a multiple of 16 pixels, got {text!r}')
    return int(side), int(batch)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=['attention', 'encoder'])
    parser.add_argument(
        '--sizes', nargs='+', type=size, default=[size(s) for s in DEFAULT_SIZES], metavar='PIXELS:BATCH'
    )
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    parser.add_argument('--heads', type=int, default=12, help='of attention')
    parser.add_argument('--head-dim', type=int, default=64, help='of attention')
    parser.add_argument('--variant', choices=['tiny', 'base', 'large'], default='base', help='of encoder')
    parser.add_argument('--compile', action='store_true', help='encoder: through torch.compile')
    parser.add_argument('--seconds', type=float, default=1.0, help='time to spend on each number (default: 1)')
    parser.add_argument('--device', default=None, help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', type=Path, default=Path('benchmark'), metavar='DIR')
    return parser.parse_args()


class Clock:
    """Medians of a step's time in ms, and the memory that it takes beyond what was there."""

    def __init__(self, device: str, seconds: float) -> None:
        import torch

        self.torch, self.cuda, self.seconds = torch, device.startswith('cuda'), seconds

    def _once(self, step: Any) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end)

    def measure(self, step: Any, reset: Any) -> tuple[float, float]:
        """(median ms, peak MiB above what was allocated before); memory is 0 on the CPU."""
        for _ in range(3 if self.cuda else 1):  # compiles, tunes and fills caches
            reset()
            step()
        reset()
        memory = 0.0
        if self.cuda:
            self.torch.cuda.synchronize()
            self.torch.cuda.reset_peak_memory_stats()
            before = self.torch.cuda.memory_allocated()
            step()
            memory = (self.torch.cuda.max_memory_allocated() - before) / 2**20
        times: list[float] = []
        end = time.monotonic() + self.seconds
        while len(times) < 5 or (time.monotonic() < end and len(times) < 1000):
            reset()
            times.append(self._once(step))
        return statistics.median(times), memory


def measure_case(case: Any, clock: Clock, torch: Any) -> dict[str, float]:
    """Forward and training step of a case."""

    def reset() -> None:
        for parameter in case.parameters:
            parameter.grad = None

    with torch.no_grad():
        forward, forward_memory = clock.measure(case.forward, reset)
    train, train_memory = clock.measure(case.train, reset)
    reset()
    return dict(forward_ms=forward, train_ms=train, forward_mib=forward_memory, train_mib=train_memory)


def cases(args: argparse.Namespace, side: int, batch: int, device: str, torch: Any) -> Any:
    """Makes one case after the other; an encoder that does not fit or cannot run is a case with a reason."""
    from benchmark_cases import attention_cases, encoder_case, encoder_models

    dtype = getattr(torch, args.dtype)
    if args.what == 'attention':
        yield from attention_cases(side, batch, args.heads, args.head_dim, device, dtype)
        return
    for name, make in encoder_models(args.variant, side):
        case = encoder_case(name, make(), side, batch, device, dtype)
        if args.compile:
            case = case._replace(forward=torch.compile(case.forward), train=torch.compile(case.train))
        yield case


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers, with what they were measured on."""
    import torch

    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    clock = Clock(device, args.seconds)
    rows: list[dict[str, Any]] = []
    for side, batch in args.sizes:
        for case in cases(args, side, batch, device, torch):
            row: dict[str, Any] = dict(pixels=side, batch=batch, tokens=1 + (side // 16) ** 2, name=case.name)
            try:
                row |= measure_case(case, clock, torch)
                print(
                    f'{side:>5} px x{batch:<4}{case.name:<28}forward {row["forward_ms"]:9.3f} ms   '
                    f'training {row["train_ms"]:9.3f} ms   peak {row["train_mib"]:8.0f} MiB',
                    flush=True,
                )
            except (RuntimeError, ValueError) as error:  # out of memory, a size or device that it does not take
                row['failed'] = str(error).splitlines()[0]
                print(f'{side:>5} px x{batch:<4}{case.name:<28}{row["failed"]}', flush=True)
            rows.append(row)
            del case
            if device.startswith('cuda'):
                torch.cuda.empty_cache()
    machine = torch.cuda.get_device_name() if device.startswith('cuda') else f'{platform.machine()} CPU'
    options = {key: str(value) for key, value in vars(args).items() if key not in ('sizes', 'out')}
    return dict(
        date=str(date.today()), machine=machine, threads=torch.get_num_threads(), torch=torch.__version__,
        options=options, rows=rows,
    )  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, with ratios to the first case of each size."""
    lines = [
        f'{results["options"]["what"]}, {results["options"]["dtype"]}, {results["machine"]}, torch {results["torch"]}, '
        f'{results["date"]}; medians; in brackets the multiple of the first of each size.',
        '',
        '| pixels, batch | | forward, ms | forward + backward, ms | peak above the inputs, MiB |',
        '|---|---|---|---|---|',
    ]
    bounds = {(row['pixels'], row['batch']): row for row in reversed(results['rows']) if 'failed' not in row}
    for row in results['rows']:
        where = f'| {row["pixels"]}, {row["batch"]} | {row["name"]} |'
        if 'failed' in row:
            lines.append(f'{where} {row["failed"]} | | |')
            continue
        bound = bounds[row['pixels'], row['batch']]
        cells = [f'{row[key]:.3f} ({row[key] / bound[key]:.2f}x)' for key in ('forward_ms', 'train_ms')]
        lines.append(f'{where} {cells[0]} | {cells[1]} | {row["train_mib"]:.0f} |')
    return '\n'.join(lines) + '\n'


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory per image against tokens, both axes logarithmic."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    rows = [row for row in results['rows'] if 'failed' not in row]
    for axis, key, label in ((axes[0], 'train_ms', 'forward + backward, ms per image'), (axes[1], 'train_mib', 'MiB')):
        for name in dict.fromkeys(row['name'] for row in rows):
            points = sorted((r['tokens'], r[key] / r['batch']) for r in rows if r['name'] == name and r[key] > 0)
            axis.plot(*zip(*points, strict=True), marker='o', label=name) if points else None
        axis.set(xscale='log', yscale='log', xlabel='tokens', ylabel=label)
        axis.grid(True, which='both', alpha=0.3)
    axes[1].set_ylabel('peak memory above the inputs, MiB per image')
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f'{results["options"]["what"]}, {results["options"]["dtype"]}, {results["machine"]}, {results["date"]}'
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    results = benchmark(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out / 'results.md').write_text(table(results))
    plot(results, args.out / 'results.png')
    print(f'\n{table(results)}\n{args.out}/results.md, .json and .png')


if __name__ == '__main__':
    run(main)
