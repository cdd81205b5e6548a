"""BEiT-B + UPerNet on ADE20K at 640 px, from weights that were pre-trained only: no labels before these.

Paper     BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254
Recipe    ours: the sizes of the fine-tuned recipe at 640 px, the rates of the published one at 512 px
          (beit-base_upernet_ade20k-512_pt22k.py)
Weights   beit_base_patch16_224_pt22k.pth at pretrain/ or by BEIT_BASE_PT22K_WEIGHTS (any dialect; resized to 640 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 2 images
Expected  not published
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = './beit-base_upernet_ade20k-640.py'

model = dict(backbone=dict(pretrained='{{$BEIT_BASE_PT22K_WEIGHTS:pretrain/beit_base_patch16_224_pt22k.pth}}'))
optim_wrapper = dict(optimizer=dict(lr=7e-4), paramwise_cfg=dict(decay_rate=0.65))
