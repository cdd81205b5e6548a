"""A moving average of the weights, which evaluation and checkpoints use; no published recipe has it.

    _base_ = ['./beit-base_upernet_ade20k-640.py', '../_base_/ema.py']

The training goes on from its own weights, which the checkpoints hold as `ema_state_dict`. The batch statistics are
averaged with the weights (`update_buffers`): those of the last batches belong to other weights.
"""

custom_hooks = [
    dict(
        type='EMAHook',
        momentum=0.0002,  # share of the new weights: an average over some 5000 steps
        interval=1,  # iterations; with gradient accumulation its accumulative_counts
        update_buffers=True,
    )
]
