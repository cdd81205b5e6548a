#!/usr/bin/env python3
"""Say what a checkpoint is: dialect, task, sizes, resolution, heads, and what it loads into.

SRC is a file, a folder of transformers, a URL or a hub id. Nothing in it is executed.
"""

import argparse
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


def uses(task: str, arguments: dict[str, Any], source: str) -> list[str]:
    """Lines of code that load it."""
    size = variant_of(arguments)
    lines = [f"dict(type='BEiTBackbone', ..., init_cfg=dict(type='Pretrained', checkpoint='{source}'))"]
    patch = arguments['patch_size']
    if task == 'segmentor':
        lines.insert(0, f"load_from = '{source}'  # EncoderDecoder of BEiTBackbone, BEiTPyramid, BEiTUPerHead, FCNHead")
    if size is not None and patch == (16, 16):
        ending = {'segmentor': '_patch16_640_upernet', 'mim': '_patch16_224_mim'}.get(task, '_patch16_224')
        options = ''.join(
            f', {name}={arguments[name]!r}' for name in ('img_size', 'num_classes', 'global_pool') if name in arguments
        )
        lines.insert(0, f"timm.create_model('beit_plugin_{size}{ending}', checkpoint_path='{source}'{options})")
    return lines


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
    heads = arguments.get('num_heads', 'not told: it has no bias table')
    rows = {
        'dialect': what.dialect + (f', under the prefix {what.prefix!r}' if what.prefix else ''),
        'task': what.task,
        'size': f'{size or "none of the published"}: width {arguments["embed_dim"]}, {arguments["depth"]} blocks, '
        f'{heads} heads, MLP x{arguments["mlp_ratio"]:g}, {what.parameters / 1e6:.1f} M values',
        'resolution': 'any: nothing in it depends on the grid'
        if what.grid is None
        else '{}x{} patches of {}x{}, {}x{} pixels'.format(*what.grid, *arguments['patch_size'], *arguments['img_size']),
        'position': ', '.join(n[4:] for n in arguments if n.startswith('use_') and 'pos' in n and arguments[n]) or 'none',
        'parts': ', '.join(f'{part} ({count} tensors)' for part, count in what.parts.items()) or 'encoder only',
        'outputs': str(arguments.get('num_classes') or arguments.get('vocab_size') or 'none'),
    }
    if source.config is not None and 'out_indices' in source.config.arguments:
        rows['taps'] = f'outputs of blocks {source.config.arguments["out_indices"]}, counted from 0'
    if what.unknown:
        rows['unknown'] = f'{len(what.unknown)} tensors that no table knows: {", ".join(what.unknown[:4])}'
    for name, value in rows.items():
        print(f'{name:<12}{value}')
    print('loads into')
    for line in uses(what.task, arguments, args.source):
        print(f'  {line}')


if __name__ == '__main__':
    run(main)
