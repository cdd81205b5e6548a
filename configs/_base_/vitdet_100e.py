"""ViTDet's schedule: 184375 steps of 64 images, 100 epochs of COCO.

Schedule  detectron2 5d5c195, projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py: AdamW at 1e-4 with weight decay
          0.1, layer decay 0.7, warm-up of 250 steps from a thousandth, a tenth at 163889 and again at 177546 steps,
          mixed precision. There biases are decayed too; here, as everywhere in this package, they are not
"""

max_iters = 184375
optim_wrapper = dict(
    type='BEiTBF16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor='BEiTLayerDecayConstructor',
    paramwise_cfg=dict(decay_rate=0.7),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=False, begin=0, end=max_iters, milestones=[163889, 177546], gamma=0.1),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=20000)
