"""ADE20K at 512 px: as at 640 px, with short side 512 and crops of 512.

Source    mmsegmentation 0.11.0 configs/_base_/datasets/ade20k.py, which the recipes of unilm at 512 px name
"""

_base_ = './ade20k_640.py'

scale = (2048, 512)  # long side at most, short side

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
train_pipeline[3].crop_size = (512, 512)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=tuple(int(s * r) for s in scale), keep_ratio=True)
    for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
