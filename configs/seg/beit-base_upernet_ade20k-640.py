"""BEiT-B + UPerNet on ADE20K at 640 px, from ImageNet-22k weights; multi-scale with flip by --tta.

Paper     BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254, Table 4 and appendix
Recipe    microsoft/unilm 8b57ed1, beit/semantic_segmentation/configs/beit/upernet/
          upernet_beit_base_12_640_slide_160k_ade20k_pt2ft.py: batch 16, 160k iterations
Weights   beit_base_patch16_224_pt22k_ft22k.pth at pretrain/ or by BEIT_BASE_WEIGHTS (any dialect; resized to 640 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images; mmsegmentation needs 15.88 GB on each of 8 V100 (its metafile)
Expected  mIoU 53.6 single-scale, 54.2 multi-scale (unilm); mmsegmentation's own training 53.08, 53.84
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = [
    '../_base_/upernet_beit.py',
    '../_base_/ade20k_640.py',
    '../_base_/ade20k_160k.py',
    '../_base_/runtime.py',
]

model = dict(backbone=dict(pretrained='{{$BEIT_BASE_WEIGHTS:pretrain/beit_base_patch16_224_pt22k_ft22k.pth}}'))
optim_wrapper = dict(optimizer=dict(lr=3e-5), paramwise_cfg=dict(num_layers=12, decay_rate=0.9))
