"""Images without labels, any number of folders and lists, one crop in two views, 75 of 14 x 14 patches hidden.

Recipe    microsoft/unilm 03380c8, beit/datasets.py and beit/README.md: colour jitter 0.4, mirror images, crops of 8 to
          100 percent of the area, 224 px bicubic for the patches, 112 px Lanczos for the tokenizer, 75 patches hidden
          in blocks of at least 16
"""

data_root = '{{$IMAGES:data/images}}'  # a folder, a list (.txt) of files, an archive (.tar), or [several of them]

train_dataloader = dict(
    batch_size=128,
    num_workers=16,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(
        type='beit_mim_collate', masking=dict(grid=(14, 14), num_masking_patches=75, min_num_patches=16, min_aspect=0.3)
    ),
    dataset=dict(
        type='BEiTImages',
        data_root=data_root,
        views=dict(size=224, token_size=112, color_jitter=0.4, hflip=0.5, scale=(0.08, 1.0)),
        on_error='skip',  # name a file that cannot be read, and go on
    ),
)
