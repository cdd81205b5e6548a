"""BEiT v2-L + UPerNet on ADE20K at 512 px, from weights that were also fine-tuned on ImageNet-21k.

Paper     BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv:2208.06366
Recipe    microsoft/unilm 80d673a, beit2/semantic_segmentation/configs/beit/upernet/
          upernet_beit_large_24_512_slide_160k_21ktoade20k.py: batch 16, 160k iterations
Weights   beitv2_large_patch16_224_pt1k_ft21k.pth at pretrain/ or by BEITV2_LARGE_WEIGHTS (any dialect; resized)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images
Expected  mIoU 57.5 single-scale (unilm, beit2/README.md)
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = './beitv2-base_upernet_ade20k-512.py'

model = _base_.large
model.backbone.pretrained = '{{$BEITV2_LARGE_WEIGHTS:pretrain/beitv2_large_patch16_224_pt1k_ft21k.pth}}'
optim_wrapper = dict(optimizer=dict(lr=3e-5), paramwise_cfg=dict(num_layers=24, decay_rate=0.9))
