#!/usr/bin/env python3
"""Table and plot of what tools/benchmark.py measured; draws them anew from a results.json, also an unfinished one."""

import argparse
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_common import run

PACKAGES = (
    'torch', 'triton', 'timm', 'transformers', 'mmsegmentation', 'mmpretrain', 'mmengine', 'mmcv', 'mmcv-lite', 'numpy',
)  # fmt: skip
UNCOUNTED = ('evaluation', 'ops')  # what has no number of operations
LONGEST_REASON = 160  # characters in a table; the JSON has all
Row = dict[str, Any]


def versions() -> dict[str, str]:
    """Of Python, this package, CUDA and every package that took part, as far as installed."""
    import torch

    import beit_plugin

    found = {'python': platform.python_version(), 'beit_plugin': beit_plugin.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found['torch'] = torch.__version__  # with the build
    if torch.cuda.is_available():
        found |= {'cuda': str(torch.version.cuda), 'cudnn': str(torch.backends.cudnn.version())}
    return found


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    """What it runs on; ``name`` is one line for headings."""
    import torch

    cpu = dict(cpu=_cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(), system=platform.platform())
    if not device.startswith('cuda'):
        return dict(name=f'{cpu["cpu"]} ({cpu["threads"]} of {cpu["cores"]} cores)', **cpu)
    gpu = torch.cuda.get_device_properties(device)
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        driver = []
    return dict(
        name=f'{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)', capability=f'{gpu.major}.{gpu.minor}',
        multiprocessors=gpu.multi_processor_count, driver=driver[0] if driver else None, **cpu,
    )  # fmt: skip


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """a of time = c * N^a by least squares of the logarithms; None with fewer than three different N.

    Args:
        points: (N, time).
    """
    logs = [(math.log(n), math.log(t)) for n, t in points]
    if len({x for x, _ in logs}) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def measured(results: Row) -> list[Row]:
    """Rows that did not fail."""
    return [row for row in results['rows'] if 'failed' not in row]


def _several(results: Row, key: str) -> bool:
    return len({row[key] for row in results['rows']}) > 1


def label(results: Row, row: Row) -> str:
    """Name of a row, with dtype and compilation where they differ between rows."""
    name = row['name']
    if _several(results, 'dtype'):
        name += f', {row["dtype"]}'
    if row['compile'] != 'off':
        name += f', compiled ({row["compile"]})'
    return name


def curves(results: Row, key: str, value: str) -> dict[str, list[tuple[int, float]]]:
    """(N, value per image) by label; ``key`` is forward or train, ``value`` ms or mib."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in measured(results):
        if key in row and row[key][value]:
            found.setdefault(label(results, row), []).append((row['tokens'], row[key][value] / row['batch']))
    return {name: sorted(points) for name, points in found.items()}


def _group(row: Row) -> tuple[Any, ...]:
    return (*row['pixels'], row['batch'], row['dtype'], row['compile'], row.get('group', ''))


def _times(value: float | None, bound: float | None, digits: int) -> str:
    """A number and in brackets its multiple of the bound's."""
    if value is None:
        return '-'
    return f'{value:.{digits}f}' + (f' ({value / bound:.2f}x)' if bound else '')


def _heading(results: Row) -> list[str]:
    options = results['options']
    what = options['what']
    of = f'{options["heads"]} heads of {options["head_dim"]}' if what == 'attention' else f'BEiT-{options["variant"]}'
    of = 'of mmcv' if what == 'ops' else of
    ceilings = [f'{c["tflops"]:.3g} TFLOP/s {name} ({c["n"]}^3)' for name, c in results['ceilings'].items()]
    packages = ', '.join(f'{name} {number}' for name, number in results['versions'].items())
    alike = 'operator, size' if what == 'ops' else 'size'
    notes = (
        f'Medians; in brackets the multiple of the first row of the same {alike}, dtype and compilation. '
        f'Measured matmul ceiling: {", ".join(ceilings)}; % is the share of it. '
    )
    if what == 'attention':
        notes += 'On a GPU in half precision the rows without a bias are held to flash attention.'
    elif what == 'ops':
        notes += 'torchvision gets float32, to which autocast casts for it.'
    elif what == 'evaluation':
        notes += 'Images come from the memory of the CPU. Memory is the peak above the weights.'
    else:
        notes += (
            'Training is forward and backward without an optimiser. TFLOP/s: the same operations for all rows of a '
            'size. Memory is the peak above weights and inputs, with gradients; CUDA graphs keep theirs: not told.'
        )
    lines = [f'{what}, {of}, {results["hardware"]["name"]}, {results["date"]}.', packages + '.', notes]
    return [line for text in lines for line in (text, '')]


def table(results: Row) -> str:
    """All rows as Markdown, with hardware, versions, the ceiling, and the exponents of time against N."""
    what = results['options']['what']
    models, parts = what not in ('attention', 'ops'), {'forward': 'forward', 'train': 'forward + backward'}
    if models:
        parts = {'forward': 'inference', 'train': 'training'}
    if what == 'evaluation':
        parts = {'forward': 'labels'}
    last = list(parts)[-1]
    columns = ['pixels, batch', 'N', '']
    for name in parts.values():
        columns += [f'{name}, ms', *(['images/s'] if models else []), *([] if what in UNCOUNTED else ['TFLOP/s'])]
    columns.append(f'peak, {parts[last]}, MiB' if models else 'peak above the inputs, MiB')
    lines = [*_heading(results), f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    first: dict[Any, Row] = {}
    for row in results['rows']:
        height, width = row['pixels']
        size = f'{height}' if height == width else f'{height}x{width}'
        cells = [f'{size}, {row["batch"]}', str(row['tokens']), label(results, row)]
        if 'failed' in row:
            cells += [row['failed'].replace('|', '/')[:LONGEST_REASON]] + [''] * (len(columns) - 4)
        else:
            bound = first.setdefault(_group(row), row)
            for key in parts:
                if key not in row:
                    cells.append('-')
                    continue
                part = row[key]
                cells.append(_times(part['ms'], bound[key]['ms'], 3))
                cells += [f'{part["images_per_s"]:.4g}'] if models else []
                cells += [f'{part["tflops"]:.3g} ({100 * part["share"]:.0f} %)'] if 'tflops' in part else []
            peak = last if last in row else 'forward'
            cells.append(_times(row[peak]['mib'], bound[peak]['mib'], 0))
        lines.append(f'| {" | ".join(cells)} |')
    fits = [
        f'{name}: {", ".join(f"{a:.2f}" for a in powers if a is not None)}'
        for name, points in curves(results, 'train', 'ms').items()
        if (powers := [exponent(curves(results, 'forward', 'ms')[name]), exponent(points)])[1] is not None
    ]
    if fits:
        lines += ['', f'Time per image grows as N^a, a forward and training: {"; ".join(fits)}.']
    return '\n'.join(lines) + '\n'


def plot(results: Row, path: Path) -> None:
    """Time and peak memory per image against N, both axes logarithmic; the bound is dashed."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    panels = [
        ('forward', 'ms', 'forward, ms per image'),
        ('train', 'ms', 'forward + backward, ms per image'),
        ('train', 'mib', 'peak memory, forward + backward,\nMiB per image above weights and inputs'),
    ]
    panels = [panel for panel in panels if curves(results, *panel[:2])]
    colours = {name: f'C{i}' for i, name in enumerate(curves(results, 'forward', 'ms'))}
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5.5), layout='constrained', squeeze=False)
    for axis, (key, value, text) in zip(axes[0], panels, strict=True):
        for name, points in curves(results, key, value).items():
            power = exponent(points) if value == 'ms' else None
            style = dict(color=colours[name], linestyle='--' if '(bound)' in name else '-')
            said = name if power is None else f'{name}: $N^{{{power:.2f}}}$'
            axis.plot(*zip(*points, strict=True), marker='o', label=said, **style)
        axis.set(xscale='log', yscale='log', xlabel='tokens N', ylabel=text)
        tokens = sorted({row['tokens'] for row in measured(results)})
        axis.set_xticks(tokens, [str(n) for n in tokens])
        axis.xaxis.set_minor_formatter(NullFormatter())
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter('{x:g}')
        axis.yaxis.set_minor_formatter('{x:g}' if high < 10 * low else NullFormatter())
        axis.grid(True, which='both', alpha=0.3)
        axis.legend(fontsize=8)
    options = results['options']
    dtypes = ', '.join(dict.fromkeys(row['dtype'] for row in results['rows']))
    of = '' if options['what'] == 'attention' else f' BEiT-{options["variant"]}'
    figure.suptitle(f'{options["what"]}{of}, {dtypes}, {results["hardware"]["name"]}, {results["date"]}')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_table(results: Row, folder: Path) -> None:
    """results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
    (folder / 'results.md').write_text(table(results))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='Example: python tools/benchmark_report.py benchmark/results.json',
    )
    parser.add_argument('results', type=Path, metavar='JSON', help='results.json; table and plot go beside it')
    args = parser.parse_args()
    try:
        results = json.loads(args.results.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f'{args.results} cannot be read: {error}.') from error
    if not measured(results):
        raise DataError(f'{args.results} has no row that could be measured.')
    write_table(results, args.results.parent)
    plot(results, args.results.with_name('results.png'))
    print(table(results))


if __name__ == '__main__':
    run(main)
