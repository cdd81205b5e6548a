#!/usr/bin/env python3
"""Write the visual tokens of fixed views of all images to one file, once, for trainings without the tokenizer.

CONFIG is a file of configs/mim/ that trains a BEiT: its images, views and tokenizer are taken. Each image gets a number
of random views (crop, colours, mirror), the same in every epoch of every training that uses the file, in place of a new
one each time. Images that cannot be read are named, and have no tokens: a training takes another in their place.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run_common
from data_folders import DataError
from run_common import not_negative, positive
from run_mim import DATASET, MODELS, check_tokenizer, sentence, use_sources

EXAMPLES = """examples:
  python tools/cache_tokens.py configs/mim/beit-base_dalle.py --data-root DIR --views 8 --out tokens.safetensors
  python tools/cache_tokens.py configs/mim/beitv2-base_vqkd.py --tokenizer vqkd.pth --views 8 --out tokens.safetensors
  then: python tools/train.py CONFIG ... --cfg-options train_dataloader.dataset.token_cache=tokens.safetensors
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='to write; ends in .safetensors')
    parser.add_argument('--tokenizer', metavar='FILE', help='a file or a published name')
    parser.add_argument(
        '--views', type=positive, metavar='K', help="of each image (default: the configuration's num_views, or 1)"
    )
    parser.add_argument(
        '--seed', type=not_negative, metavar='N', help="of the views (default: the configuration's, or 0)"
    )
    parser.add_argument('--device', metavar='NAME', help='default: the GPU, where there is one')
    parser.add_argument('--batch', type=positive, default=128, metavar='N', help='views at a time (default: 128)')
    parser.add_argument(
        '--workers', type=not_negative, metavar='N', help='processes that load (default: one for each core, at most 16)'
    )
    run_common.add_config_arguments(parser)
    return parser.parse_args()


def build(cfg: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """The images in fixed views, and the tokenizer of a configuration on its device."""
    import torch
    from mmengine.registry import DATASETS
    from mmengine.registry import MODELS as REGISTRY

    import beit_plugin.mm  # noqa: F401  registers
    from beit_plugin.checkpoints import CheckpointError

    given = dict(cfg.train_dataloader.dataset)
    views = {'num_views': args.views or given.get('num_views') or 1}
    views['seed'] = given.get('seed') or 0 if args.seed is None else args.seed
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        dataset = DATASETS.build({**given, **views, 'token_cache': None})
        tokenizer = REGISTRY.build(dict(cfg.model.tokenizer)).to(device)
    except (ValueError, CheckpointError) as error:
        raise DataError(f'{sentence(error)}.') from error
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise DataError(f'--device {device}: {str(error).splitlines()[0].rstrip(".")}.') from error
    return dataset, tokenizer


def tokenised(dataset: Any, tokenizer: Any, args: argparse.Namespace, grid: tuple[int, int]) -> Iterator[Any]:
    """Tokens (B, views, h, w) of one image after the other, and which of them are of one; shows how far it is."""
    import torch
    from tqdm import tqdm

    from beit_plugin.data.mim_views import AllViews

    device = next(tokenizer.parameters()).device
    views = dataset.num_views
    loader = torch.utils.data.DataLoader(
        AllViews(dataset),
        max(args.batch // views, 1),
        num_workers=min(os.cpu_count() or 1, 16) if args.workers is None else args.workers,
        collate_fn=list,
    )
    broken = []
    with tqdm(total=len(dataset), unit='image') as bar:
        for samples in loader:
            tokens = torch.zeros(len(samples), views, *grid, dtype=torch.int64)
            there = torch.tensor([pixels is not None for _, pixels, _ in samples])
            for index, pixels, reason in samples:
                if pixels is None:
                    broken.append(dataset.path(index))
                    bar.write(f'left out: {reason}')
            if there.any():
                batch = torch.cat([pixels for _, pixels, _ in samples if pixels is not None])
                parts = [tokenizer.encode(part.to(device).float() / 255) for part in batch.split(args.batch)]
                tokens[there] = torch.cat(parts).cpu().unflatten(0, (-1, views))
            yield tokens, there
            bar.update(len(samples))
    if len(broken) == len(dataset):
        raise DataError(f'none of the {len(dataset)} images can be read, such as {broken[0]}: give others.')
    if broken:
        print(f'{len(broken)} image{"" if len(broken) == 1 else "s"} without tokens: {", ".join(broken)}')


def main() -> None:
    run_common.require_mmseg()
    args = parse_args()
    if args.out.suffix != '.safetensors' or not args.out.absolute().parent.is_dir():
        raise DataError(f'--out needs a name that ends in .safetensors in a folder that is there, got {args.out}.')
    cfg = run_common.read_config(args)
    if cfg.model.type != MODELS[0] or cfg.train_dataloader.dataset.type != DATASET:
        raise DataError(f'{args.config} does not train a {MODELS[0]} on {DATASET}: give one of configs/mim/beit*.py.')
    use_sources(cfg, args.tokenizer, None)
    check_tokenizer(cfg)
    dataset, tokenizer = build(cfg, args)
    from beit_plugin.data.token_cache import write_token_cache

    about = dataset.about_tokens(dataset.num_views, dataset.seed)
    about['vocab_size'] = tokenizer.vocab_size
    about['tokenizer'] = f'{type(tokenizer).__name__} {cfg.model.tokenizer.get("source", "")}'.rstrip()
    grid = tuple(side // patch for side, patch in zip(about['token_size'], tokenizer.patch_size, strict=True))
    try:
        write_token_cache(args.out, tokenised(dataset, tokenizer, args, grid), grid, about)
    except ValueError as error:  # sizes that the tokenizer does not take
        raise DataError(f'{sentence(error)}.') from error
    except OSError as error:
        raise DataError(f'{args.out} cannot be written: {error.strerror}.') from error
    views = f'{dataset.num_views} view{"s" * (dataset.num_views > 1)}'
    print(
        f'{args.out}: {views} of {len(dataset)} images, {grid[0]} x {grid[1]} tokens each of '
        f'{tokenizer.vocab_size}, {args.out.stat().st_size:,} bytes'
    )


if __name__ == '__main__':
    run_common.run(main)
