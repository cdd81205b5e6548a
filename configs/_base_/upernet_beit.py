"""BEiT-B + pyramid + UPerNet + FCN auxiliary head at 640 px, 150 classes (Table 4 of arXiv:2106.08254).

Sizes and heads are those of microsoft/unilm 2312c6f, beit/semantic_segmentation/configs/_base_/models/upernet_beit.py.
"""

norm_cfg = dict(type='SyncBN', requires_grad=True)  # batch statistics over all processes; of one, plain batch norm

model = dict(
    type='BEiTSegmentor',
    data_preprocessor=dict(
        type='BEiTSegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],  # ImageNet's, as in every published BEiT segmentor; v1 pre-training has 127.5
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(640, 640),
    ),
    backbone=dict(
        type='BEiTBackbone',
        img_size=(640, 640),
        patch_size=16,
        embed_dims=768,
        num_layers=12,
        num_heads=12,
        mlp_ratio=4,
        out_indices=(3, 5, 7, 11),
        qv_bias=True,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
        init_values=0.1,
    ),
    neck=dict(type='BEiTPyramid', embed_dim=768, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type='BEiTUPerHead',
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type='BEiTFCNHead',
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426), keep_logits=False),  # labels are enough
)
