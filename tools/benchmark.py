#!/usr/bin/env python3
"""Time our attention, models and evaluation against the peers, and models against a ViT without a bias, in one run.

`attention` is that alone; `encoder`, `pyramid`, `segmentor` and `mim` are whole models, `evaluation` that of
mmsegmentation, `ops` the operators of mmcv against torchvision's (of --sizes they take the images' size).

Writes the numbers (results.json, after every row), a table (results.md) and a plot of time and memory against the
number of tokens (results.png) to the folder --out. Runs on a GPU, or on the CPU at sizes that it can bear. What fails
(out of memory, not for this device) is a row that says why.
"""

import argparse
import gc
import sys
import traceback
import warnings
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_common import WARNING_NOISE, run

EXAMPLES = """examples:
  python tools/benchmark.py attention --out bench                                  224, 640 and 1024 px
  python tools/benchmark.py attention --sizes 224:128 640x480:16 1536:2 --dtype bfloat16 float16
  python tools/benchmark.py encoder --sizes 224:128 640:16 --compile off default reduce-overhead
  python tools/benchmark.py encoder --variant large --sizes 512:16 --skip mmseg --seconds 2
  python tools/benchmark.py pyramid --sizes 1024:4                                 as detectors train it
  python tools/benchmark.py segmentor --sizes 640:8 --only ours transformers
  python tools/benchmark.py evaluation --sizes 1024x2048:1 --backends auto         with mmsegmentation
  python tools/benchmark.py mim --backends auto
  python tools/benchmark.py ops --dtype float32 bfloat16                           of mmcv, against torchvision's
  python tools/benchmark.py encoder --variant tiny --sizes 224:2 --dtype float32   on a CPU
"""
DEFAULT_SIZES = {
    'attention': '224:128 640:16 1024:4', 'encoder': '224:128 640:16 1024:4', 'pyramid': '1024:2 1024:8',
    'segmentor': '640:8', 'mim': '224:128', 'evaluation': '1024x2048:1', 'ops': '800x1344:2',
}  # fmt: skip
COMPILE = ('off', 'default', 'max-autotune', 'reduce-overhead')
PEERS = {
    'encoder': ('transformers', 'mmseg'), 'pyramid': ('mmseg',), 'segmentor': ('transformers', 'mmseg'),
    'mim': ('transformers', 'mmpretrain'),
}  # fmt: skip
NAMES = {'forward': 'forward', 'train': 'training'}
GRAPHS = ('max-autotune', 'reduce-overhead')  # of these, those that record CUDA graphs


def size(text: str) -> tuple[int, int, int]:
    """'640:16' to (640, 640, 16), '640x480:16' to (640, 480, 16)."""
    pixels, _, batch = text.partition(':')
    sides = pixels.split('x')
    numbers = [int(n) for n in (*sides, batch) if n.isdecimal()]
    if len(numbers) != len(sides) + 1 or len(sides) > 2 or not all(numbers) or any(n % 16 for n in numbers[:-1]):
        raise argparse.ArgumentTypeError(
            f'expected PIXELS:BATCH or HxW:BATCH with multiples of 16 pixels, got {text!r}'
        )
    return numbers[0], numbers[-2], numbers[-1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=list(DEFAULT_SIZES))
    parser.add_argument(
        '--sizes', nargs='+', type=size, metavar='PIXELS:BATCH', help='or HxW:BATCH, multiples of 16 pixels'
    )
    parser.add_argument('--dtype', nargs='+', choices=['bfloat16', 'float16', 'float32'], default=['bfloat16'])
    parser.add_argument(
        '--compile', nargs='+', choices=COMPILE, default=['off'], metavar='MODE',
        help=f'one or several of {", ".join(COMPILE)} (default: off)',
    )  # fmt: skip
    parser.add_argument(
        '--backends', nargs='+', choices=['sdpa', 'fused', 'auto', 'eager'], default=['sdpa', 'fused'],
        metavar='NAME', help='attn_backend of ours: sdpa, fused, auto, eager (default: sdpa fused)',
    )  # fmt: skip
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help='rows whose names contain one of these')
    parser.add_argument('--skip', nargs='+', default=[], metavar='NAME', help='no rows whose names contain one')
    parser.add_argument('--heads', type=int, default=12, help='of attention (default: 12)')
    parser.add_argument('--head-dim', type=int, default=64, help='of attention (default: 64)')
    parser.add_argument(
        '--variant', choices=['tiny', 'small', 'base', 'large'], default='base', help='of the models (default: base)'
    )
    parser.add_argument('--seconds', type=float, default=1.0, help='time to spend on each number (default: 1)')
    parser.add_argument('--device', default=None, help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', type=Path, default=Path('benchmark'), metavar='DIR')
    args = parser.parse_args()
    args.sizes = args.sizes or [size(text) for text in DEFAULT_SIZES[args.what].split()]
    if args.what in ('evaluation', 'ops') and find_spec('mmseg') is None:
        parser.error(f"{args.what} needs OpenMMLab: pip install 'beit-plugin[mmseg]'")
    if args.what == 'attention' and 'auto' in args.backends:
        parser.error('--backends auto belongs to models; attention is measured by backend')
    return args


def chosen(makers: dict[str, Any], only: list[str], skip: list[str]) -> dict[str, Any]:
    """The rows that --only and --skip leave."""

    def has(name: str, parts: list[str]) -> bool:
        return any(part.lower() in name.lower() for part in parts)

    unknown = [part for part in only if not any(has(name, [part]) for name in makers)]
    if unknown:
        raise DataError(f'--only {" ".join(unknown)} is no part of a row; there are: {"; ".join(makers)}.')
    kept = {name: make for name, make in makers.items() if (has(name, only) or not only) and not has(name, skip)}
    if not kept:
        raise DataError('--only and --skip leave no row.')
    return kept


def measure(case: Any, clock: Any, mode: str) -> dict[str, Any]:
    """Forward and training step of a case; see ``Clock.measure`` for the numbers."""
    import torch
    from benchmark_clock import WARM_UP, WARM_UP_COMPILED

    call, graphs = case.call, mode in GRAPHS
    if mode != 'off':
        # else the cases of other sizes and backends, which share their code, would run into the limit of recompilations
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        call = torch.compile(call, mode=None if mode == 'default' else mode, dynamic=False)

    def reset() -> None:
        for parameter in case.parameters:
            parameter.grad = None
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()

    options = dict(warm_up=WARM_UP if mode == 'off' else WARM_UP_COMPILED, memory=not graphs)
    case.switch(training=False)
    with torch.no_grad():
        forward = clock.measure(lambda: case.forward(call), reset, **options)
    row = dict(forward=forward)
    if case.train is not None:
        train = case.train
        case.switch(training=True)
        row['train'] = clock.measure(lambda: train(call), reset, **options)
    if mode != 'off':
        row['graph_breaks'] = sum(torch._dynamo.utils.counters['graph_break'].values())
    return row


def measure_row(
    make: Any, clock: Any, mode: str, flops: dict[str, float], ceiling: float, batch: int
) -> dict[str, Any]:
    """``measure`` with rates; what fails gives its reason instead, so that one row does not cost the others."""
    import torch

    try:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of the row before; in here, because it fails if that row broke the GPU's context
        row = measure(make(), clock, mode)
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = lines[0] if lines else 'no reason given'
        if not isinstance(error, RuntimeError | ValueError):
            said = f'{type(error).__name__}: {said}'
        row = dict(failed=said, traceback=traceback.format_exc()[-3000:])
    else:
        for key in ('forward', 'train'):
            if key in row:
                row[key]['images_per_s'] = batch / row[key]['ms'] * 1e3
            if key in flops:
                tflops = flops[key] / row[key]['ms'] / 1e9
                row[key] |= dict(tflops=tflops, share=tflops / ceiling)
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the console."""
    height, width = row['pixels']
    start = f'{height}x{width} x{row["batch"]:<4}{row["dtype"]}, compile {row["compile"]:<8} {row["name"]:<30}'
    if 'failed' in row:
        return start + row['failed']
    told = [f'{name} {row[key]["ms"]:9.3f} ms' for key, name in NAMES.items() if key in row]
    mib = row.get('train', row['forward'])['mib']
    return start + '   '.join(told if mib is None else [*told, f'peak {mib:8.0f} MiB'])


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers, with what they were measured on; written after each row."""
    import benchmark_cases
    import benchmark_evaluation
    import benchmark_mim
    import benchmark_models
    import benchmark_ops
    import benchmark_report
    import torch
    from benchmark_clock import Clock, matmul_ceiling

    for message in (*WARNING_NOISE, 'torch.meshgrid'):
        warnings.filterwarnings('ignore', message=message)
    torch.manual_seed(0)
    device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    attention, ops = args.what == 'attention', args.what == 'ops'
    modules = dict(attention=benchmark_cases, evaluation=benchmark_evaluation, mim=benchmark_mim, ops=benchmark_ops)
    cases = getattr(modules.get(args.what, benchmark_models), f'{args.what}_cases')
    results: dict[str, Any] = dict(
        date=str(date.today()), command=' '.join(sys.argv[1:]), hardware=benchmark_report.hardware(str(device)),
        versions=benchmark_report.versions(), ceilings={}, rows=[],
        options={key: value for key, value in vars(args).items() if key != 'out'},
    )  # fmt: skip
    settings = [
        benchmark_cases.Setting(
            height, width, batch, getattr(torch, name), device, args.backends, args.variant, args.heads, args.head_dim
        )
        for name in args.dtype
        for height, width, batch in args.sizes
    ]
    chosen(cases(settings[0]), args.only, args.skip)  # a wrong name is told before the first measurement
    absent = [name for name in PEERS.get(args.what, ()) if find_spec(name) is None]
    if absent:
        print(f'left out, for not installed: {", ".join(absent)}', flush=True)
    clock = Clock(device, args.seconds, isolated=attention or ops)
    for setting in settings:
        name = str(setting.dtype).removeprefix('torch.')
        if name not in results['ceilings']:
            n, tflops = matmul_ceiling(device, setting.dtype)
            results['ceilings'][name] = dict(n=n, tflops=tflops)
        count = benchmark_cases.attention_flops if attention else partial(benchmark_models.model_flops, args.what)
        counted = [] if args.what in benchmark_report.UNCOUNTED else NAMES
        flops = {key: count(setting, training=key == 'train') for key in counted}
        makers = chosen(cases(setting), args.only, args.skip)
        for mode, (label, make) in product(args.compile, makers.items()):
            row = dict(
                pixels=[setting.height, setting.width], batch=setting.batch, tokens=setting.tokens, dtype=name,
                compile=mode, name=label, group=label.partition(',')[0] if ops else '',
            )  # fmt: skip
            row |= measure_row(make, clock, mode, flops, results['ceilings'][name]['tflops'], setting.batch)
            results['rows'].append(row)
            print(line(row), flush=True)
            benchmark_report.write_table(results, args.out)
    return results


def main() -> None:
    args = parse_args()
    results = benchmark(args)
    from benchmark_report import measured, plot, table

    if not measured(results):
        raise DataError(f'nothing could be measured; {args.out}/results.json has the reasons.')
    plot(results, args.out / 'results.png')
    print(f'\n{table(results)}\n{args.out}/results.md, .json and .png')


if __name__ == '__main__':
    run(main)
