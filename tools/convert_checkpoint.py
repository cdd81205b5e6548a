#!/usr/bin/env python3
"""Take a checkpoint from any dialect to another; no step that our own models need, for they read all of them.

SRC is a file, a folder of transformers, a URL or a hub id. DST is a file, safetensors by that suffix; with
`--to transformers` it may be a folder, which `from_pretrained` reads (weights and configuration).
"""

import argparse
from pathlib import Path
from typing import Any

from data_folders import DataError
from run_common import run

DIALECTS = 'native, timm, unilm, openmmlab (our parts in mmseg), mmseg, mmpretrain, transformers, transformers-v5'
EXAMPLES = """examples:
  python tools/convert_checkpoint.py beit_base_patch16_640_pt22k_ft22ktoade20k.pth ade.pth --to mmseg
  python tools/convert_checkpoint.py iter_160000.pth FOLDER --to transformers --out-indices 1 3 5 9
  python tools/convert_checkpoint.py microsoft/beit-base-patch16-224-pt22k beit.pth --to timm --drop mask_token lm_head
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', metavar='SRC')
    parser.add_argument('target', metavar='DST', type=Path)
    parser.add_argument('--to', required=True, metavar='DIALECT', help=f'one of {DIALECTS}')
    parser.add_argument('--drop', nargs='+', default=[], metavar='NAME', help='leave out, such as head or decode_head')
    parser.add_argument(
        '--grid', nargs=2, type=int, metavar=('H', 'W'), help='patches of its native size, where that was not square'
    )
    parser.add_argument(
        '--out-indices',
        nargs=4,
        type=int,
        metavar='N',
        help='for the folder of a segmentor: blocks that it reads, counted from 0, where SRC does not say it',
    )
    parser.add_argument('--num-heads', type=int, metavar='K', help='for a folder, where no bias table tells it')
    return parser.parse_args()


def build(name: str, arguments: dict[str, Any]) -> Any:
    """Our model, by what ``describe`` calls it."""
    from beit_plugin import Beit, BeitBackbone
    from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
    from beit_plugin.segmentation.segmentor import build_segmentor

    makes = (Beit, BeitBackbone, BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling, build_segmentor)
    return {make.__name__: make for make in makes}[name](**arguments)


def write_folder(args: argparse.Namespace, source: Any) -> tuple[int, ...] | None:
    """Weights and configuration, by way of a model that holds both; returns the blocks that a segmentor reads."""
    from beit_plugin.checkpoints import load, save
    from beit_plugin.checkpoints.describe import all_arguments, describe

    what = describe(source.state_dict, tuple(args.grid) if args.grid else source.grid)
    arguments = all_arguments(what, source.config)
    if source.config is None:
        heads = args.num_heads or arguments.get('num_heads')
        if heads is None:
            raise DataError('the checkpoint has no bias table that tells the number of heads: give it by --num-heads.')
        arguments['num_heads'] = heads
        if what.task == 'segmentor':
            arguments['decoder_drop_rate'] = 0.0  # the heads of transformers have no dropout
            if args.out_indices:
                arguments.pop('out_features', None)
                arguments['out_indices'] = tuple(args.out_indices)
    try:
        model = build(what.model, arguments)
    except ValueError as error:
        raise DataError(f'{source.name} makes no model: {error}.') from error
    report = load(model, source.state_dict, drop=args.drop, grid=what.grid)
    raw = None if source.config is None else source.config.raw
    save(model, args.target, dialect=args.to, drop=args.drop, config=raw)
    return report.out_indices


def said_of_taps(taps: tuple[int, ...] | None, depth: int, dialect: str, to: str | None) -> str:
    """Which blocks a segmentor of a dialect reads, and how the one that it became counts them; None for no such."""
    from beit_plugin.checkpoints.describe import tap_rule, taps_in

    if taps is None:
        said = f'the out_indices of its configuration say which blocks it reads, not the weights: {tap_rule(dialect)}'
        rule = '' if to is None else tap_rule(to)
        return f'{said}; {rule}' if to != dialect and rule else said
    said = f'it reads the outputs of blocks {taps}, counted from 0'
    if to is None:
        return said
    numbers = taps_in(taps, depth, to)
    return f'{said}: ' + (f'no out_indices of {to} say this' if numbers is None else f'out_indices={numbers} of {to}')


def main() -> None:
    args = parse_args()
    import torch

    from beit_plugin.checkpoints import CheckpointError, convert, detect
    from beit_plugin.checkpoints.convert import depth_of, read_names
    from beit_plugin.checkpoints.describe import taps_of
    from beit_plugin.checkpoints.files import SUFFIXES, is_file_name, write_state_dict
    from beit_plugin.checkpoints.sources import read_source

    try:
        source = read_source(args.source)
        found = detect(source.state_dict)
        taps = taps_of(source.state_dict, found) if source.config is None else source.config.taps
        task = found.task
        if is_file_name(args.target):
            grid = tuple(args.grid) if args.grid else source.grid
            state = convert(source.state_dict, to=args.to, drop=args.drop, grid=grid)
            task = detect(state).task
            is_noted = args.to == 'native' and task == 'segmentor' and not {'stages', '_extra_state'} & set(args.drop)
            if is_noted and taps is not None:
                state['_extra_state'] = torch.tensor(taps) + 1  # the note of our segmentors: how many blocks have run
            metadata = {'dialect': args.to, **({'grid': '{}x{}'.format(*grid)} if grid else {})}
            write_state_dict(state, args.target, metadata)
        elif args.to == 'transformers':
            taps = write_folder(args, source)
        else:
            raise DataError(f'{args.target} is no name of a file: end it in one of {", ".join(SUFFIXES)}.')
    except CheckpointError as error:
        raise DataError(f'{error}.'.replace('leave out by drop=', 'leave out by --drop')) from error
    except OSError as error:
        raise DataError(f'{args.target} cannot be written: {error.strerror}.') from error
    print(f'{args.target}: the {found.task} of {found.dialect} as {args.to}')
    if found.task == 'segmentor':
        depth = depth_of(name for name in read_names(source.state_dict, found).values() if name is not None)
        print(said_of_taps(taps, depth, found.dialect, args.to if task == 'segmentor' else None))


if __name__ == '__main__':
    run(main)
