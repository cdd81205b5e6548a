"""BEiT-L + UPerNet on ADE20K at 640 px, from weights that were pre-trained only: no labels before these.

Paper     BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254
Recipe    ours: the sizes and steps of the fine-tuned recipe at 640 px, and the rates with which the same authors train
          the pre-trained BEiT v2-L at 512 px (beitv2-large_upernet_ade20k-512_pt1k.py); for v1-L none are published
Weights   beit_large_patch16_224_pt22k.pth at pretrain/ or by BEIT_LARGE_PT22K_WEIGHTS (any dialect; resized to 640 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 1 image
Expected  not published
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = './beit-large_upernet_ade20k-640.py'

model = dict(backbone=dict(pretrained='{{$BEIT_LARGE_PT22K_WEIGHTS:pretrain/beit_large_patch16_224_pt22k.pth}}'))
optim_wrapper = dict(optimizer=dict(lr=4e-5), paramwise_cfg=dict(decay_rate=0.9))
