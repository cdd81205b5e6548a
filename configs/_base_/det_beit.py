"""What detectors with a BEiT-B behind ViTDet's pyramid change of mmdetection's shipped models.

Settings  detectron2 7699f2e, configs/common/models/mask_rcnn_vitdet.py (ViTDet, arXiv:2203.16527, section 4 and A.2):
          windows of 14 patches but for blocks 2, 5, 8 and 11, simple pyramid, two convolutions in the RPN, four and a
          linear layer in the box head, LayerNorm in every head
Ours      the bias tables stay those of 224 pixels, which are 14 patches: windows read them as they were trained, the
          global blocks by the official resize. Images are padded to a multiple of 32, not to a square
"""

norm = dict(type='BEiTLN2d', eps=1e-6)
vitdet = dict(  # for `model = _base_.vitdet` and the like in a recipe
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],  # ImageNet's, as in every published BEiT segmentor; v1 pre-training has 127.5
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        _delete_=True,
        type='BEiTBackbone',
        img_size=224,
        patch_size=16,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        window_size=14,
        global_blocks=(2, 5, 8, 11),
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_values=0.1,
        pretrained='pretrain/beit_base_patch16_224_pt22k_ft22k.pth',
    ),
    neck=dict(_delete_=True, type='BEiTSimplePyramid', in_channels=768, out_channels=256, num_outs=5),
    rpn_head=dict(num_convs=2),
    roi_head=dict(mask_head=dict(norm_cfg=norm)),
)
box_head = dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm)
