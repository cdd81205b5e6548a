"""BEiT-B v1, masked image modelling with DALL-E's tokens, 800 epochs of ImageNet-1k.

Paper     BEiT (arXiv:2106.08254), section 2.5
Recipe    microsoft/unilm 9a6a8a1, beit/README.md, "Pre-training BEiT-base on ImageNet-1k", and 03380c8,
          beit/run_beit_pretraining.py: 16 GPUs x 128 images, AdamW 1.5e-3, betas 0.9 and 0.98, weight decay 0.05, 10
          epochs of warm-up, cosine to 1e-5, clip 3, drop path 0.1. On ImageNet-22k: 150 epochs, mean and std 127.5
Command   IMAGES=DIR torchrun --nnodes 2 --nproc_per_node 8 tools/train.py configs/mim/beit-base_dalle.py
          --launcher pytorch
          On fewer GPUs --cfg-options optim_wrapper.accumulative_counts=N keeps the 2048 images of a step
Tokenizer OpenAI's encoder, fetched at the first start; --tokenizer DIR for a folder with encoder.pkl
Hardware  16 V100 of 32 GB there; not run here
Published ImageNet-1k fine-tuned top-1 83.7 from ImageNet-22k (beit/README.md)
"""

_base_ = ['../_base_/mim_images.py', '../_base_/mim_runtime.py']

max_epochs = 800

model = dict(
    type='BEiTPretrainer',
    backbone=dict(variant='base', img_size=224, patch_size=16, drop_path_rate=0.1),
    head=dict(type='BEiTMIMHead'),
    tokenizer=dict(type='BEiTTokenizer', source='{{$TOKENIZER:dalle}}'),
    data_preprocessor=dict(
        type='BEiTMIMDataPreprocessor',
        mean=[123.675, 116.28, 103.53],  # --imagenet_default_mean_and_std
        std=[58.395, 57.12, 57.375],
    ),
)
optim_wrapper = dict(
    type='BEiTBF16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05),  # for 2048 images
    constructor='BEiTNoDecayConstructor',
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=10, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs)
default_hooks = dict(
    picture=dict(type='BEiTMIMPictureHook', interval=5000),
    checkpoint=dict(by_epoch=True, interval=20),
)
