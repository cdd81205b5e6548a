"""What the tools know of pre-training: its data and tokenizer before a run, the summary, the result."""

from pathlib import Path
from typing import Any

from data_folders import DataError

DATASET = 'BEiTImages'
MODELS = ('BEiTPretrainer', 'BEiTVQKD')
LOGGED = {'BEiTPretrainer': 'token accuracy {acc:.1%} (most frequent token {top_token:.1%})',
          'BEiTVQKD': 'codebook {codebook:.1%} in use, perplexity {perplexity:.0f}'}  # fmt: skip


def is_pretraining(cfg: Any) -> bool:
    """Whether a configuration trains one of our models without labels."""
    return cfg.model.type in MODELS


def count_images(dataset_cfg: Any) -> int:
    """Number of images of a data set without labels.

    Raises:
        DataError: a folder, list or archive that is not there, empty or damaged, or a file of tokens of others.
    """
    from mmengine.registry import DATASETS

    import beit_plugin.mm  # noqa: F401  registers

    try:
        return len(DATASETS.build(dict(dataset_cfg)))
    except ValueError as error:
        hint = '' if dataset_cfg.get('token_cache') else ' (by --data-root)'
        raise DataError(f'{sentence(error)}{hint}.') from error


def use_sources(cfg: Any, tokenizer: str | None, teacher: str | None) -> None:
    """Put a tokenizer or a teacher from the command line into the configuration.

    Raises:
        DataError: the configuration has no place for it.
    """
    for option, part, given in (('--tokenizer', 'tokenizer', tokenizer), ('--teacher', 'teacher', teacher)):
        if given is None:
            continue
        if part not in cfg.model or cfg.model.type != MODELS[option == '--teacher']:
            raise DataError(f'{option} is for configurations of {MODELS[option == "--teacher"]}, got {cfg.model.type}.')
        if part == 'tokenizer':
            cfg.model.tokenizer.source = tokenizer
        elif teacher != cfg.model.teacher.name:  # who names another one wants it as it was published
            cfg.model.teacher = dict(name=teacher, weights='pretrained')


def check_tokenizer(cfg: Any) -> None:
    """Raises DataError when the tokenizer of a configuration is a file that is not there."""
    source = cfg.model.get('tokenizer', {}).get('source')
    if not isinstance(source, str) or '://' in source or Path(source).exists():
        return
    if Path(source).suffix or '/' in source:
        raise DataError(
            f'the tokenizer {source} does not exist: give a file, or the name of a published one, by --tokenizer; '
            'configs/mim/vqkd-*.py train one.'
        )


def sentence(error: Exception) -> str:
    """The message of an error without what mmengine puts before it."""
    return str(error).rpartition('.py: ')[2].strip().rstrip('.')


def summary(cfg: Any, module: Any) -> list[str]:
    """Lines about the model and its tokens."""
    if cfg.model.type == 'BEiTVQKD':
        tokenizer, what = module.tokenizer, f'taught by {type(module.teacher.model).__name__}'
        model = f'{type(tokenizer).__name__}, {millions(tokenizer)}, {what} ({millions(module.teacher)})'
    else:
        tokenizer = module.tokenizer
        model = f'{type(module.model).__name__}, {millions(module.model)}'
    views = cfg.train_dataloader.dataset.get('views', {})
    token_size = views.get('token_size', 112) or views.get('size', 224)
    lines = [
        f'model       {model}',
        f'tokens      {tokenizer.vocab_size} of {type(tokenizer).__name__}, patches of '
        f'{" x ".join(map(str, tokenizer.patch_size))} px of images of {token_size} px',
    ]
    cache = cfg.train_dataloader.dataset.get('token_cache')
    if cache:
        lines.append(f'            read from {cache}: the tokenizer does not run')
    masking = cfg.train_dataloader.get('collate_fn', {}).get('masking')
    if masking and cfg.model.type == 'BEiTPretrainer':
        grid = masking['grid']
        h, w = (grid, grid) if isinstance(grid, int) else grid
        lines.append(f'masks       {masking["num_masking_patches"]} of {h * w} patches')
    return lines


def millions(module: Any) -> str:
    """Number of the parameters, in words."""
    return f'{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters'


def result(cfg: Any, scalars: Any) -> str:
    """What the last batches were like, in words."""
    names = ('loss', 'acc', 'top_token', 'codebook', 'perplexity')
    found = {name: scalars[f'train/{name}'].mean(50) for name in names if f'train/{name}' in scalars}
    try:
        return f'loss {found["loss"]:.3f}, {LOGGED[cfg.model.type].format(**found)}'
    except KeyError:  # it had nothing left to do
        return 'no loss'
