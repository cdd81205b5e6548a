"""Quickstart: a tiny VQ-KD tokenizer for the drawn shapes, taught by a network of random weights.

Paper     BEiT v2 (arXiv:2208.06366), section 2.2, for the method; sizes and teacher are ours, made for two CPU cores.
          Nothing is downloaded: the random features of the teacher tell colours and textures apart.
Command   python tools/train.py configs/mim/vqkd-tiny_shapes.py
Data      tools/make_shapes.py; another folder of images by SHAPES_IMAGES or --data-root
Hardware  2 CPU cores; a minute
"""

_base_ = '../_base_/mim_runtime.py'

data_root = '{{$SHAPES_IMAGES:data/shapes/images/training}}'
size = 96  # px
max_iters = 200

model = dict(
    type='BEiTVQKD',
    tokenizer=dict(
        img_size=size,
        patch_size=8,
        embed_dim=96,
        depth=2,
        num_heads=3,
        decoder_depth=1,
        vocab_size=128,
        code_dim=16,
        window=50,
    ),
    # it sees a quarter of the pixels: where textures are gone, tokens tell colours and outlines
    teacher=dict(name='vit_tiny_patch16_224', weights=None, img_size=size // 4, patch_size=2, depth=1),
)
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='beit_mim_collate'),
    dataset=dict(
        type='BEiTImages',
        data_root=data_root,
        views=dict(size=size, token_size=None, color_jitter=0.0, scale=(0.3, 1.0)),
    ),
)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4),
    constructor='BEiTNoDecayConstructor',
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=20, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters + 1)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters))
randomness = dict(seed=0)
