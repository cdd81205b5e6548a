"""VQ-KD, the tokenizer of BEiT v2, of any teacher in timm; here CLIP ViT-B/16, 100 epochs of ImageNet-1k.

Paper     BEiT v2 (arXiv:2208.06366), section 2.2
Recipe    microsoft/unilm 80d673a, beit2/TOKENIZER.md and run_vqkd_training.py: 8 GPUs x 64 images, AdamW 2e-4 (5e-5
          for 128), betas 0.9 and 0.99, weight decay 1e-4, 10 epochs of warm-up, cosine to 1e-5, crops of at least 8
          percent, no colour jitter, 8192 codes of 32 numbers from k-means, a decoder of 3 blocks
Command   IMAGES=DIR torchrun --nproc_per_node 8 tools/train.py configs/mim/vqkd-base.py --launcher pytorch
          --teacher NAME takes another timm model, and --cfg-options model.teacher.weights=FILE its weights from a file
Hardware  8 V100 of 32 GB there; not run here
Published 97 percent of the codebook in use (beit2/TOKENIZER.md)
"""

_base_ = ['../_base_/mim_images.py', '../_base_/mim_runtime.py']

max_epochs = 100

model = dict(
    type='BEiTVQKD',
    tokenizer=dict(variant='base', img_size=224, patch_size=16, decoder_depth=3, vocab_size=8192, code_dim=32),
    teacher=dict(name='vit_base_patch16_clip_224.openai', weights='pretrained', through_classifier=True),
)
train_dataloader = dict(
    batch_size=64,
    collate_fn=dict(masking=None),
    dataset=dict(views=dict(token_size=None, color_jitter=0.0)),
)
optim_wrapper = dict(
    type='BEiTBF16OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.99), weight_decay=1e-4),  # for 512 images
    constructor='BEiTNoDecayConstructor',
)
param_scheduler = [
    dict(type='LinearLR', start_factor=5e-3, begin=0, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=10, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs)
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=20))
