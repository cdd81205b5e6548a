r"""BEiT-B + Mask R-CNN from scratch on a few COCO photographs: shows in minutes whether the whole chain learns.

Paper     ViTDet (arXiv:2203.16527) for pyramid and heads; the schedule is ours, made to overfit
Commands  COCO_MINI_ROOT=DIR python -m beit_plugin MMDET/tools/train.py configs/det/mask-rcnn_beit-base_coco-mini.py
          COCO_MINI_ROOT=DIR python -m beit_plugin MMDET/tools/test.py configs/det/mask-rcnn_beit-base_coco-mini.py \
              CHECKPOINT --show-dir pictures
          (MMDET is mmdetection's folder; without its sources, site-packages/mmdet/.mim)
Data      images/train/*.jpg and annotations/instances_train.json in COCO's format, here 70 photographs with a long side
          of 480 pixels. Tested on the same images, which it is to learn by heart
Hardware  one H200: 0.27 s a step, 10 GB
Measured  60 of the 70 photographs, 1000 steps (train_cfg.max_iters=1000 param_scheduler.1.end=1000
          optim_wrapper.type=BEiTBF16OptimWrapper), torch 2.11, 2026-11-29: box AP 70.9, mask AP 56.0 on these 60, and
          0.0 on the other ten
"""

_base_ = ['./mask-rcnn_beit-base_coco-1024.py']

data_root = '{{$COCO_MINI_ROOT:data/coco_mini}}'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(480, 480), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = dict(type='Resize', scale=(480, 480), keep_ratio=True)
train_set = dict(
    data_root=data_root, ann_file='annotations/instances_train.json', data_prefix=dict(img='images/train/')
)
max_iters = 1500

model = dict(backbone=dict(pretrained=None, drop_path_rate=0.0))
train_dataloader = dict(
    batch_size=8, dataset=dict(**train_set, filter_cfg=dict(filter_empty_gt=True, min_size=1), pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=2, dataset=dict(**train_set, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_train.json')
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=1.0),  # from scratch: every layer at the full rate
    clip_grad=dict(max_norm=3.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=100, end=max_iters),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
randomness = dict(seed=0)
