"""Random hostile pickles against everything that reads checkpoint files: nothing may crash, run, change or fill memory.

    python tests/checkpoints/fuzz_pickles.py --files 20000

Each file is a random pickle over the names that a load can reach: calls (REDUCE, NEWOBJ), states (BUILD), items and
memoised objects, partly as the real writers nest them and then mutated. It is read in a process of its own batch by
this package's reader and by `torch.load(weights_only=True)` with the plugin imported, and what comes out is used.
Files are reproducible: their number is the seed.
"""

import argparse
import collections
import faulthandler
import gc
import importlib
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where pytest looks for helpers
from checkpoints.pickle_grammar import ALLOCATING, CANARY, OURS, REFUSED, TORCHS, Pickles, archive

BATCH = 500
MEMORY = 1 << 30  # bytes that a process may take beside what it has after its imports


def watched() -> Iterator[tuple[str, object]]:
    """What a load must not change: attributes of the classes and modules that files can name."""
    modules = (
        'builtins', 'argparse', 'collections', 'numpy', 'torch', 'torch._utils', 'torch.serialization', 'torch.nn',
        'torch._weights_only_unpickler', 'beit_plugin', 'beit_plugin.checkpoints.stand_ins',
        'beit_plugin.checkpoints.torch_files', 'beit_plugin.checkpoints.unpickle', 'mmengine.logging.history_buffer',
    )  # fmt: skip
    for module in (sys.modules[each] for each in modules if each in sys.modules):
        yield module.__name__, module
        for key, value in list(vars(module).items()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                yield f'{module.__name__}.{key}', value


def snapshot() -> dict[str, int]:
    state = {}
    for owner, thing in watched():
        for key, value in list(vars(thing).items()):
            if key not in ('__warningregistry__', '_last_value') and not key.startswith('_abc'):
                state[f'{owner}.{key}'] = id(value)
                if isinstance(value, dict) and owner.startswith('mmengine'):
                    state |= {f'{owner}.{key}[{inner!r}]': id(one) for inner, one in value.items()}
    return state


def use(thing: object, depth: int = 0) -> None:
    """Read what a file gave: memory that is not its own would show."""
    if depth > 5:
        return
    if isinstance(thing, torch.Tensor) and thing.numel() < 1e6 and thing.layout is torch.strided:
        thing.detach().clone().sum()
    elif isinstance(thing, np.ndarray | np.generic):
        np.array(thing).sum()
        str(thing)
    elif isinstance(thing, dict | argparse.Namespace):
        for value in list((vars(thing) if isinstance(thing, argparse.Namespace) else thing).values())[:50]:
            use(value, depth + 1)
    elif isinstance(thing, list | tuple):
        for value in thing[:50]:
            use(value, depth + 1)
    elif type(thing).__name__ == 'HistoryBuffer':
        for values in thing.data:
            np.array(values).sum()


def work(first: int, count: int, target: str) -> None:
    """Read files one after the other; the number of each goes out before, so that a crash names it."""
    faulthandler.enable()
    import beit_plugin  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for host in ('beit_plugin.mm', 'mmengine.logging.history_buffer') if target == 'torch' else ():
            if importlib.util.find_spec('mmengine'):
                importlib.import_module(host)
    from beit_plugin.checkpoints import CheckpointError
    from beit_plugin.checkpoints.files import read_file

    if 'mmengine.logging.history_buffer' in sys.modules:
        sys.modules['mmengine.logging.history_buffer'].HistoryBuffer()  # sets the defaults of its class
    names = (*OURS, *TORCHS, *REFUSED, *(ALLOCATING if target == 'ours' else ()))
    before, started = snapshot(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    tally: dict[str, int] = collections.Counter()
    path = Path('x.pth')
    warnings.simplefilter('ignore')
    for seed in range(first, first + count):
        print('file', seed, flush=True)
        path.write_bytes(archive(Pickles(seed, names).one()))
        try:
            if target == 'ours':
                loaded = read_file(path)
            else:
                loaded = torch.load(path, weights_only=True)
            use(loaded)
            tally['loaded'] += 1
            del loaded
        except CheckpointError:
            tally['refused'] += 1
        except MemoryError:
            print('finding', seed, 'memory', flush=True)
        except Exception:
            tally['refused'] += 1
            if target == 'ours':
                print('finding', seed, 'another error than CheckpointError', flush=True)
        if seed % 50 == 0:
            gc.collect()
        if Path(CANARY).exists():
            print('finding', seed, 'ran', flush=True)
            Path(CANARY).unlink()
        after = snapshot()
        if after != before:
            changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
            print('finding', seed, f'changed {changed[:3]}', flush=True)
            before = after
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started
    print('done', tally['loaded'], tally['refused'], growth >> 10, flush=True)


def run(files: int, first: int = 0, report: bool = False) -> list[str]:
    """Read so many files by each reader; returns what was found, and prints a summary where asked to."""
    findings: list[str] = []
    for target in ('ours', 'torch'):
        loaded = refused = growth = 0
        at, end = first, first + files
        while at < end:
            count = min(BATCH, end - at)
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(Path(__file__).resolve()), '--worker', str(at), str(count), target]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            lines = done.stdout.splitlines()
            findings += [f'{target}: {line}' for line in lines if line.startswith('finding')]
            last = lines[-1] if lines else ''
            if last.startswith('done'):
                numbers = list(map(int, last.split()[1:]))
                loaded, refused, growth = loaded + numbers[0], refused + numbers[1], max(growth, numbers[2])
                at += count
            else:
                seed = int(last.split()[1]) if last.startswith('file') else at
                findings.append(f'{target}: file {seed} ended the process ({done.returncode}): {done.stderr[-500:]}')
                at = seed + 1
            if report and sys.stderr.isatty():
                print(f'\r{target}: {at - first} of {files} files', end='', file=sys.stderr)
        if report:
            print(f'{target}: {files} files, {loaded} loaded, {refused} refused, {growth} MiB more at the most')
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--files', type=int, default=20000)
    parser.add_argument('--first', type=int, default=0, help='number of the first file')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(int(args.worker[0]), int(args.worker[1]), args.worker[2])
        return
    findings = run(args.files, args.first, report=True)
    print('\n'.join(findings) or 'no crash, nothing run, nothing changed, no memory filled')
    sys.exit(bool(findings))


if __name__ == '__main__':
    main()
