#!/usr/bin/env python3
"""Say what a checkpoint is: dialect, task, sizes, resolution, heads, and what it loads into.

SRC is a file, a folder of transformers, a URL or a hub id. Nothing in it is executed.
"""

import argparse
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_common import run

EXAMPLES = """examples:
  python tools/inspect_checkpoint.py beit_base_patch16_224_pt22k.pth
  python tools/inspect_checkpoint.py microsoft/beit-base-finetuned-ade-640-640
  python tools/inspect_checkpoint.py work_dirs/beit-base_upernet_camvid/iter_1200.pth
"""


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


def uses(what: Any, source: Any) -> list[str]:
    """Lines of code that load it."""
    arguments, name, task = what.arguments, source.name, what.task
    size = variant_of(arguments)
    lines = []
    if size is not None and arguments['patch_size'] == (16, 16):
        ending = {'segmentor': '_patch16_640_upernet', 'mim': '_patch16_224_mim'}.get(task, '_patch16_224')
        version = 'v2' if 'cls_pt_layers' in what.parts else ''
        stated = {**arguments, **({} if source.config is None else source.config.arguments)}
        if 'vocab_size' in stated:
            stated['num_classes'] = stated['vocab_size']  # timm's word for the outputs of a model
        wanted = ('img_size', 'num_classes', 'global_pool', *(('out_indices',) if task == 'segmentor' else ()))
        options = ''.join(f', {key}={stated[key]!r}' for key in wanted if key in stated)
        create = f"timm.create_model('beit{version}_plugin_{size}{ending}'{options}"
        if Path(name).is_file():
            lines.append(f"{create}, checkpoint_path='{name}')")
        else:
            lines.append(f"beit_plugin.checkpoints.load({create}), '{name}')")
    if task == 'segmentor':
        lines.append(f"load_from = '{name}'  # EncoderDecoder of BEiTBackbone, BEiTPyramid, BEiTUPerHead and FCNHead")
    if Path(name).exists() or '://' in name:
        lines.append(f"dict(type='BEiTBackbone', ..., init_cfg=dict(type='Pretrained', checkpoint='{name}'))")
    return lines or [f"beit_plugin.checkpoints.load(Beit(...), '{name}')  # no size that has a name"]


def main() -> None:
    args = parse_args()
    from beit_plugin.checkpoints import CheckpointError
    from beit_plugin.checkpoints.describe import describe
    from beit_plugin.checkpoints.sources import read_source

    try:
        source = read_source(args.source)
        what = describe(source.state_dict, tuple(args.grid) if args.grid else source.grid)
    except CheckpointError as error:
        raise DataError(f'{error}.') from error
    arguments = what.arguments
    size = variant_of(arguments)
    heads = arguments.get('num_heads', 'not told (no bias table):')
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
    if source.config is not None and source.config.taps is not None:
        rows['taps'] = f'outputs of blocks {source.config.taps}, counted from 0'
    if what.unknown:
        rows['unknown'] = f'{len(what.unknown)} tensors that no table knows: {", ".join(what.unknown[:4])}'
    for name, value in rows.items():
        print(f'{name:<12}{value}')
    print('loads into')
    for line in uses(what, source):
        print(f'  {line}')


if __name__ == '__main__':
    run(main)
