"""What the published ADE20K recipes share: 160k steps of 16 images; and what BEiT-L, and one GPU, change of a recipe.

Schedule  microsoft/unilm 8b57ed1, beit/semantic_segmentation/configs/beit/upernet/*_160k_*.py, and 80d673a, beit2/...:
          8 GPUs x 2 images, AdamW, linear warm-up of 1500 steps, then a straight line to 0
"""

max_iters = 160000
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),  # lr: in the recipe, for 16 images
    constructor='BEiTLayerDecayConstructor',
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=16000)

# BEiT-L, for `model = _base_.large` in a recipe
large = dict(
    backbone=dict(
        embed_dims=1024,
        num_layers=24,
        num_heads=16,
        out_indices=(7, 11, 15, 23),
        drop_path_rate=0.2,
        init_values=1e-6,  # replaced by the weights, which were trained from 1e-5
    ),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)

# one small GPU, for `globals().update(_base_.one_gpu)` in a variant: the same 160k steps of 16 images, of which 2 are
# in memory, with batch statistics of their own. mmengine counts iterations, and 8 make a step.
one_gpu = dict(
    model=dict(backbone=dict(with_cp=True)),
    train_dataloader=dict(batch_size=2),
    optim_wrapper=dict(type='BEiTBF16OptimWrapper', accumulative_counts=8),
    max_iters=8 * max_iters,
    param_scheduler=[
        dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=8 * 1500),
        dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=8 * 1500, end=8 * max_iters),
    ],
    train_cfg=dict(max_iters=8 * max_iters, val_interval=8 * 16000),
)
