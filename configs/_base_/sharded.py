"""For models that are too large for one GPU: weights, gradients and the optimiser's state spread over all (FSDP).

A configuration of one line more: ``_base_ = ['RECIPE.py', '../_base_/sharded.py']``. Checkpoints are as without it.
"""

runner_type = 'FlexibleRunner'
strategy = dict(
    type='BEiTFSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', use_orig_params=True, auto_wrap_policy='beit_blocks'),
    state_dict_cfg='full',
)
