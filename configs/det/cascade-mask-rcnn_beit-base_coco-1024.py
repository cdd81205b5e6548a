"""BEiT-B + Cascade Mask R-CNN on COCO by ViTDet's recipe, from weights fine-tuned on ImageNet-22k.

Paper     ViTDet (arXiv:2203.16527), recipe and heads of detectron2's projects/ViTDet (3ed610f,
          configs/COCO/cascade_mask_rcnn_vitdet_b_100ep.py); BEiT (arXiv:2106.08254), weights
Commands  as mask-rcnn_beit-base_coco-1024.py
Hardware  8 GPUs x 8 images, as there
Published not reproduced here: ViT-B with MAE weights by this recipe 54.0 box AP, 46.7 mask AP (detectron2
          projects/ViTDet/README.md)
"""

_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/det_beit.py',
    '../_base_/coco_instance.py',
    '../_base_/vitdet_100e.py',
    '../_base_/det_runtime.py',
]

model = dict(**_base_.vitdet)
stages = [dict(stage, **_base_.box_head) for stage in _base_.model.roi_head.bbox_head]
model['roi_head'] = dict(model['roi_head'], bbox_head=stages)
