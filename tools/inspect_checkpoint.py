#!/usr/bin/env python3
"""Say what a checkpoint is: dialect, task, sizes, resolution, heads, and what it loads into.

SRC is a file, a folder of transformers, a URL or a hub id. Nothing in it is executed.
"""

import argparse
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_common import run

EXAMPLES = """examples:
  python tools/inspect_checkpoint.py beit_base_patch16_224_pt22k.pth
  python tools/inspect_checkpoint.py microsoft/beit-base-finetuned-ade-640-640
  python tools/inspect_checkpoint.py work_dirs/beit-base_upernet_camvid/iter_1200.pth
"""

MODULES = {
    'Beit': 'beit_plugin',
    'BeitBackbone': 'beit_plugin',
    'BeitForMaskedImageModeling': 'beit_plugin.models.mim',
    'BeitV2ForMaskedImageModeling': 'beit_plugin.models.mim',
    'build_segmentor': 'beit_plugin.segmentation.segmentor',
}
# defaults of Beit that the signature of a model does not show to be others there
PRESET: dict[str, dict[str, Any]] = {
    'BeitForMaskedImageModeling': dict(use_mask_token=True, use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'BeitBackbone': dict(num_classes=0, global_pool=''),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', metavar='SRC')
    parser.add_argument(
        '--grid', nargs=2, type=int, metavar=('H', 'W'), help='patches of its native size, where that was not square'
    )
    return parser.parse_args()


def variant_of(arguments: dict[str, Any]) -> str | None:
    """The published size that these arguments are of."""
    from beit_plugin import VARIANTS

    same = ('embed_dim', 'depth')
    return next((n for n, v in VARIANTS.items() if all(v[key] == arguments[key] for key in same)), None)


def timm_name(what: Any) -> str | None:
    """The model of timm that has its form and patches; others are built by their class."""
    import timm

    size = variant_of(what.arguments)
    endings = {
        'Beit': '_patch16_224',
        'BeitForMaskedImageModeling': '_patch16_224_mim',
        'BeitV2ForMaskedImageModeling': '_patch16_224_mim',
        'build_segmentor': '_patch16_640_upernet',
    }
    if size is None or what.arguments['patch_size'] != (16, 16) or what.model not in endings:
        return None
    name = f'beit{"v2" if "V2" in what.model else ""}_plugin_{size}{endings[what.model]}'
    return name if timm.is_model(name) else None  # not every size is there in v2


def stated(what: Any, config: Any) -> dict[str, Any]:
    """All arguments that are known; `...` for what one must know to load it."""
    from beit_plugin.checkpoints.describe import all_arguments

    told = all_arguments(what, config)
    if told.pop('init_values') in (None, 0):  # else where training ended says nothing of where it started
        told['init_values'] = 0.0  # timm.create_model passes no None on
    return {name: ... for name in what.untold} | told


def options(what: Any, config: Any, name: str | None) -> str:
    """What to state in a call of the model of timm, or of the class, for it differs from what would be built else."""
    from beit_plugin import VARIANTS, Beit

    make = getattr(import_module(MODULES[what.model]), what.model)
    calls = reversed(make.__mro__[:-1] if isinstance(make, type) else (make, Beit))  # less object
    defaults = {n: p.default for call in calls for n, p in signature(call).parameters.items()}
    defaults |= PRESET.get(what.model.replace('V2', ''), {})
    arguments = stated(what, config)
    defaults['channels'] = arguments['embed_dim']  # its None
    if name is not None:
        defaults |= VARIANTS[str(variant_of(arguments))] | ({'img_size': 640} if name.endswith('_upernet') else {})
        if arguments.get('num_heads') is ...:
            del arguments['num_heads']  # the published size tells it
    said = []
    for key, value in arguments.items():
        default = defaults[key]
        if isinstance(value, tuple) and isinstance(default, int):
            default = (default, default)
        if value != default:
            key = 'num_classes' if name is not None and key == 'vocab_size' else key  # timm's word for all outputs
            said.append(f'{key}={"..." if value is ... else repr(value)}')
    return ', '.join(said)


def uses(what: Any, source: Any) -> list[str]:
    """Lines of code that load it."""
    path, name = source.name, timm_name(what)
    arguments = options(what, source.config, name)
    lines = []
    create = f'{MODULES[what.model]}.{what.model}({arguments})'
    if name is not None:
        create = f'timm.create_model({", ".join(filter(None, (repr(name), arguments)))})'
    if name is not None and Path(path).is_file():
        lines.append(f'{create[:-1]}, checkpoint_path={path!r})')
    else:
        is_told = what.grid is None or source.grid is not None or what.grid[0] == what.grid[1]
        grid = '' if is_told else f', grid={what.grid}'
        lines.append(f'beit_plugin.checkpoints.load(model := {create}, {path!r}{grid})')
    if what.task == 'segmentor':
        lines.append(
            f"load_from = '{path}'  # EncoderDecoder of BEiTBackbone, BEiTPyramid, BEiTUPerHead and BEiTFCNHead"
        )
    if Path(path).exists() or '://' in path:
        lines.append(f"dict(type='BEiTBackbone', ..., init_cfg=dict(type='Pretrained', checkpoint='{path}'))")
    return lines


def main() -> None:
    args = parse_args()
    from beit_plugin.checkpoints import CheckpointError
    from beit_plugin.checkpoints.describe import describe, tap_rule
    from beit_plugin.checkpoints.sources import read_source

    try:
        source = read_source(args.source)
        what = describe(source.state_dict, tuple(args.grid) if args.grid else source.grid)
    except CheckpointError as error:
        raise DataError(f'{error}.') from error
    arguments = what.arguments
    size = variant_of(arguments)
    heads = stated(what, source.config).get('num_heads', ...)
    heads = 'an unknown number of' if heads is ... else heads
    pixels = '{}x{} patches of {}x{}, {}x{} pixels'
    tables = ('use_rel_pos_bias', 'use_shared_rel_pos_bias', 'use_abs_pos_emb')
    rows = {
        'dialect': what.dialect + (f', under the prefix {what.prefix!r}' if what.prefix else ''),
        'task': what.task,
        'size': f'{size or "none of the published"}: width {arguments["embed_dim"]}, {arguments["depth"]} blocks, '
        f'{heads} heads, MLP x{arguments["mlp_ratio"]:g}, {what.parameters / 1e6:.1f} M values',
        'resolution': 'any: nothing in it depends on the grid'
        if what.grid is None
        else pixels.format(*what.grid, *arguments['patch_size'], *arguments['img_size']),
        'position': ', '.join(name.removeprefix('use_') for name in tables if arguments[name]) or 'none',
        'parts': ', '.join(f'{part} ({count} tensor{"s" * (count > 1)})' for part, count in what.parts.items())
        or 'encoder only',
        'outputs': str(arguments.get('num_classes') or arguments.get('vocab_size') or 'none'),
    }
    taps = what.taps if source.config is None or source.config.taps is None else source.config.taps
    if taps is not None:
        rows['taps'] = f'outputs of blocks {taps}, counted from 0'
    elif what.task == 'segmentor':
        rows['taps'] = f'not said by the weights; {tap_rule(what.dialect)}'
    untold = [name for name, value in stated(what, source.config).items() if value is ...]
    if untold:
        rows['not told'] = f'{", ".join(untold)}: no weight says it'
    if what.unknown:
        rows['unknown'] = f'{len(what.unknown)} tensors that no table knows: {", ".join(what.unknown[:4])}'
    for name, value in rows.items():
        print(f'{name:<12}{value}')
    print('loads into')
    for line in uses(what, source):
        print(f'  {line}')


if __name__ == '__main__':
    run(main)
