"""BEiT-B + UPerNet at 512 px: windows of 512 px, every 341 px in testing.

Source    microsoft/unilm 80d673a, beit2/semantic_segmentation/configs/beit/upernet/upernet_beit_base_12_512_slide_*.py
"""

_base_ = './upernet_beit.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(img_size=(512, 512)),
    test_cfg=dict(crop_size=(512, 512), stride=(341, 341)),
)
