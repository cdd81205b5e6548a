r"""BEiT-B + Mask R-CNN on COCO by ViTDet's recipe, from weights fine-tuned on ImageNet-22k.

Paper     ViTDet (arXiv:2203.16527), recipe and heads of detectron2's projects/ViTDet; BEiT (arXiv:2106.08254), weights
Commands  COCO_ROOT=DIR torchrun --nproc_per_node 8 -m beit_plugin MMDET/tools/train.py \
              configs/det/mask-rcnn_beit-base_coco-1024.py --launcher pytorch
          COCO_ROOT=DIR python -m beit_plugin MMDET/tools/test.py \
              configs/det/mask-rcnn_beit-base_coco-1024.py CHECKPOINT
          (MMDET is mmdetection's folder; without its sources, site-packages/mmdet/.mim)
Hardware  8 GPUs x 8 images; fewer at a time: train_dataloader.batch_size=4 optim_wrapper.accumulative_counts=2, which
          doubles the iterations that make a step; model.backbone.with_cp=True recomputes blocks to save memory
Published not reproduced here: ViT-B with MAE weights by this recipe 51.6 box AP, 45.9 mask AP (detectron2
          projects/ViTDet/README.md)
"""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/det_beit.py',
    '../_base_/coco_instance.py',
    '../_base_/vitdet_100e.py',
    '../_base_/det_runtime.py',
]

model = dict(**_base_.vitdet)
model['roi_head'] = dict(model['roi_head'], bbox_head=_base_.box_head)
