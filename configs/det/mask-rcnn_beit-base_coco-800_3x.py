"""BEiT-B + Mask R-CNN on COCO at 1333x800 by MIMDet's schedule, 36 epochs, from weights fine-tuned on ImageNet-22k.

Paper     MIMDet (arXiv:2204.02964), schedule and augmentation of hustvl/MIMDet 2265d85,
          configs/mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py: AdamW at 3.2e-4 for 64 images,
          weight decay 0.1, no layer decay, drop path 0.1, warm-up of a quarter epoch, a tenth after epochs 27 and 33.
          Its sampled encoder, its decoder and the double rate of its heads are not here: backbone, pyramid and heads
          are those of mask-rcnn_beit-base_coco-1024.py
Commands  as mask-rcnn_beit-base_coco-1024.py
Hardware  8 GPUs x 8 images, as there
Published not reproduced here: MIMDet, ViT-B with MAE weights, half of the patches sampled: 51.5 box AP, 46.0 mask AP
          (README.md of hustvl/MIMDet)
"""

_base_ = './mask-rcnn_beit-base_coco-1024.py'

sides = (480, 512, 544, 576, 608, 640, 736, 768, 800)
resize = dict(type='RandomChoiceResize', scales=[(1333, side) for side in sides], keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(type='RandomChoiceResize', scales=[(4200, side) for side in (400, 500, 600)], keep_ratio=True),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    recompute_bbox=True,
                    allow_negative_crop=True,
                ),
                resize,
            ],
        ],
    ),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

epoch = 1875  # 120000 images, as MIMDet counts, by 64
max_iters = 36 * epoch
optim_wrapper = dict(optimizer=dict(lr=3.2e-4), paramwise_cfg=dict(decay_rate=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=epoch // 4),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[27 * epoch, 33 * epoch], gamma=0.1),
]
train_cfg = dict(max_iters=max_iters, val_interval=4 * epoch)
