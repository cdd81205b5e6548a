"""Tiny pre-trainings: pictures, a tokenizer, configurations for mmengine's Runner."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import randomize
from PIL import Image

from beit_plugin.data.mim_views import AllViews, ImageFiles, TwoViews
from beit_plugin.data.token_cache import write_token_cache
from beit_plugin.tokenizers import VQKD, save_tokenizer

VOCAB = 13
SIZE = 32  # px; 4 x 4 patches of 8
BACKBONE = dict(img_size=SIZE, patch_size=8, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2.0)
VQ = dict(img_size=SIZE, patch_size=8, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, vocab_size=VOCAB, code_dim=4)
TEACHER = dict(name='vit_tiny_patch16_224', weights=None, img_size=SIZE, patch_size=8, depth=1, embed_dim=24)
MASKING = dict(grid=(4, 4), num_masking_patches=6, min_num_patches=2)
PICTURE = dict(picture=dict(type='BEiTMIMPictureHook', interval=3, num_images=2))  # of hooks
_NUMBERS = itertools.count()


def pictures(folder: Path, count: int = 6) -> Path:
    """Files of noise on coloured ground, in two folders of classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = rng.integers(0, 200, 3)
        Image.fromarray((colour + rng.integers(0, 55, (40, 48, 3))).astype(np.uint8)).save(path)
    return folder


def tokenizer(seed: int = 0, **options: Any) -> VQKD:
    model = VQKD(**{**VQ, 'target_dim': 6, **options})
    randomize(model, seed)
    return model.eval()


def tokenizer_file(path: Path, **options: Any) -> Path:
    save_tokenizer(tokenizer(**options), path)
    return path


def cache_file(path: Path, root: Path, num_views: int = 2, **about: Any) -> Path:
    """The tokens that ``tokenizer()`` gives of views as those of ``loader``; in words of the caller where given."""
    files = ImageFiles(root, TwoViews(SIZE, None), num_views=num_views, seed=4)
    model = tokenizer()

    def batches():
        for _, pixels, _ in map(AllViews(files).__getitem__, range(len(files))):
            shape = (1, num_views, 4, 4)
            tokens = torch.zeros(shape, dtype=torch.int64) if pixels is None else model.encode(pixels / 255).view(shape)
            yield tokens, torch.tensor([pixels is not None])

    said = {**files.about_tokens(num_views, 4), 'vocab_size': VOCAB, 'tokenizer': 'VQKD', **about}
    write_token_cache(path, batches(), (4, 4), said)
    return path


def loader(root: Path, **options: Any) -> dict[str, Any]:
    return dict(
        batch_size=2,
        num_workers=options.pop('workers', 0),
        sampler=dict(type='InfiniteSampler', shuffle=True),
        collate_fn=dict(type='beit_mim_collate', masking=MASKING),
        dataset=dict(type='BEiTImages', data_root=str(root), views=dict(size=SIZE, token_size=None), **options),
    )


def config(root: Path, work_dir: Path, model: dict[str, Any], iterations: int = 4, **options: Any) -> dict[str, Any]:
    """What Runner.from_cfg takes; options replace keys, those of ``hooks`` join the hooks."""
    workers, hooks, data = options.pop('workers', 0), options.pop('hooks', {}), options.pop('data', {})
    return dict(
        model=model,
        work_dir=str(work_dir),
        experiment_name=f'pretraining_{next(_NUMBERS)}',  # two loggers of one name would be one
        default_scope='mmengine',
        train_dataloader=loader(root, workers=workers, **data),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=1000),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.05),
            constructor='BEiTNoDecayConstructor',
            clip_grad=dict(max_norm=3.0),
        ),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            throughput=dict(type='BEiTThroughputHook'),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2),
            resume=dict(type='BEiTResumeHook'),
            **hooks,
        ),
        log_processor=dict(by_epoch=False, window_size=1),
        log_level='WARNING',
        randomness=dict(seed=3),
        **options,
    )


def pretrainer(source: Any, v2: bool = False, **options: Any) -> dict[str, Any]:
    head = dict(head_layers=2, early_layers=2) if v2 else {}
    tokens = dict(type='BEiTTokenizer', source=str(source)) if isinstance(source, Path) else source
    backbone = dict(BACKBONE, drop_path_rate=0.2)
    return dict(type='BEiTPretrainer', backbone=backbone, head=head, tokenizer=tokens, **options)


def vqkd(**options: Any) -> dict[str, Any]:
    return dict(type='BEiTVQKD', tokenizer=dict(VQ), teacher=dict(TEACHER), **options)


def run(cfg: dict[str, Any]) -> Any:
    """A Runner that has trained."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    runner = Runner.from_cfg(Config(cfg))
    runner.train()
    return runner


def state(work_dir: Path, iteration: int) -> dict[str, Any]:
    return torch.load(work_dir / f'iter_{iteration}.pth', weights_only=True)


def train_in_process(cfg: dict[str, Any], rank: int, world: int, port: int, out: Path) -> None:
    """One of several processes over gloo; writes what each had: images, masks, weights."""
    import beit_plugin.mm  # noqa: F401  registers

    torch.set_num_threads(1)
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank)
    os.environ.update({name: str(value) for name, value in address.items()})
    runner = run(
        dict(
            cfg,
            launcher='pytorch',
            env_cfg=dict(dist_cfg=dict(backend='gloo')),
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None),
        )
    )
    batch = next(iter(runner.train_dataloader))
    torch.save(dict(state=runner.model.module.state_dict(), **batch), out / f'rank{rank}.pth')
    torch.distributed.destroy_process_group()
