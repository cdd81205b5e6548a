"""BEiT-B + UPerNet on ADE20K at 512 px, from weights that were pre-trained only: no labels before these.

Paper     BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254
Recipe    microsoft/unilm 86f74f0, beit/semantic_segmentation/configs/beit/upernet/
          upernet_beit_base_12_512_slide_160k_ade20k_pt.py: batch 16, 160k iterations
Weights   beit_base_patch16_224_pt22k.pth at pretrain/ or by BEIT_BASE_PT22K_WEIGHTS (any dialect; resized to 512 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images
Expected  not published for these weights; 45.6 from pre-training on ImageNet-1k (the paper)
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = [
    '../_base_/upernet_beit_512.py',
    '../_base_/ade20k_512.py',
    '../_base_/ade20k_160k.py',
    '../_base_/runtime.py',
]

model = dict(backbone=dict(pretrained='{{$BEIT_BASE_PT22K_WEIGHTS:pretrain/beit_base_patch16_224_pt22k.pth}}'))
optim_wrapper = dict(optimizer=dict(lr=7e-4), paramwise_cfg=dict(num_layers=12, decay_rate=0.65))
