"""BEiT-L + UPerNet on ADE20K at 640 px, from ImageNet-22k weights; multi-scale with flip by --tta.

Paper     BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254, Table 4 and appendix
Recipe    microsoft/unilm 8b57ed1, beit/semantic_segmentation/configs/beit/upernet/
          upernet_beit_large_24_640_slide_160k_ade20k_pt2ft.py: batch 8 x 2 accumulated, 320k iterations = 160k updates.
          mmsegmentation 1.2.2 ends the schedule at iteration 160k and trains the second half with a rate of 0; here, as
          published, it ends with the training.
Weights   beit_large_patch16_224_pt22k_ft22k.pth at pretrain/ or by BEIT_LARGE_WEIGHTS (any dialect; resized to 640 px)
Commands  torchrun --nproc_per_node 8 tools/train.py THIS_FILE --launcher pytorch --amp float16
          python tools/test.py THIS_FILE CHECKPOINT [--tta]
Hardware  8 GPUs x 1 image; mmsegmentation needs 22.64 GB on each of 8 V100 (its metafile)
Expected  mIoU 56.7 single-scale, 57.0 multi-scale (unilm); mmsegmentation's own training 56.33, 56.84
Data      ADE20K_ROOT=.../ADEChallengeData2016, or --data-root
"""

_base_ = './beit-base_upernet_ade20k-640.py'

model = _base_.large
model.backbone.pretrained = '{{$BEIT_LARGE_WEIGHTS:pretrain/beit_large_patch16_224_pt22k_ft22k.pth}}'

train_dataloader = dict(batch_size=1)
max_iters = 320000
optim_wrapper = dict(optimizer=dict(lr=2e-5), paramwise_cfg=dict(num_layers=24, decay_rate=0.95), accumulative_counts=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=3000),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=3000, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
