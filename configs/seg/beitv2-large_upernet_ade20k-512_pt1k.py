"""BEiT v2-L + UPerNet on ADE20K at 512 px, from weights that were pre-trained only: no labels before these.

Paper     BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv:2208.06366
Recipe    microsoft/unilm 80d673a, beit2/semantic_segmentation/configs/beit/upernet/
          upernet_beit_large_24_512_slide_160k_ade20k.py: batch 16, 160k iterations
Weights   beitv2_large_patch16_224_pt1k.pth at pretrain/ or by BEITV2_LARGE_PT1K_WEIGHTS (any dialect; resized)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images
Expected  mIoU 56.7 single-scale (unilm, beit2/README.md)
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = './beitv2-large_upernet_ade20k-512.py'

model = dict(backbone=dict(pretrained='{{$BEITV2_LARGE_PT1K_WEIGHTS:pretrain/beitv2_large_patch16_224_pt1k.pth}}'))
optim_wrapper = dict(optimizer=dict(lr=4e-5))
