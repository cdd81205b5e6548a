"""BEiT v2-B + UPerNet on ADE20K at 512 px, from weights that were also fine-tuned on ImageNet-21k.

Paper     BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv:2208.06366
Recipe    microsoft/unilm 80d673a, beit2/semantic_segmentation/configs/beit/upernet/
          upernet_beit_base_12_512_slide_160k_21ktoade20k.py: batch 16, 160k iterations
Weights   beitv2_base_patch16_224_pt1k_ft21k.pth at pretrain/ or by BEITV2_BASE_WEIGHTS (any dialect; resized to 512 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images
Expected  mIoU 53.5 single-scale (unilm, beit2/README.md)
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = [
    '../_base_/upernet_beit_512.py',
    '../_base_/ade20k_512.py',
    '../_base_/ade20k_160k.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        drop_path_rate=0.15,
        pretrained='{{$BEITV2_BASE_WEIGHTS:pretrain/beitv2_base_patch16_224_pt1k_ft21k.pth}}',
    )
)
optim_wrapper = dict(optimizer=dict(lr=5e-5), paramwise_cfg=dict(num_layers=12, decay_rate=0.85))
