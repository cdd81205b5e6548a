"""The recipe of the same name without _1gpu, on one GPU: batch 2, 8 times a step, bfloat16, checkpointing.

Recipe    the same 160k steps of 16 images, but batch statistics of 2; where 16 images fit, take the other file and
          --cfg-options train_dataloader.batch_size=16
Command   python tools/train.py THIS_FILE
Hardware  one GPU of 14 GB: 8.7 GiB at most (H200, torch 2.11)
"""

_base_ = './beitv2-large_upernet_ade20k-512.py'

globals().update(_base_.one_gpu)
