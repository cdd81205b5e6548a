"""What pre-training and the training of tokenizers share: no validation, TensorBoard, images per second."""

_base_ = './runtime.py'

default_scope = 'mmengine'
default_hooks = dict(
    _delete_=True,  # of segmentation
    timer=dict(type='IterTimerHook'),
    throughput=dict(type='BEiTThroughputHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    tokens=dict(type='BEiTTokenCacheHook'),  # where the data set has a token_cache: is it of this tokenizer?
    invalid_loss=dict(type='BEiTInvalidLossHook'),  # stop at a loss of NaN; on_nan='continue': go on
    run_ahead=dict(type='BEiTRunAheadHook'),
    resume=dict(type='BEiTResumeHook'),  # a killed training goes on as if it had not been
)
visualizer = dict(
    _delete_=True,
    type='Visualizer',
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
)
log_processor = dict(
    custom_cfg=[  # of the last 50 iterations; one batch is noise
        dict(data_src=name, method_name='mean', window_size=50)
        for name in ('acc', 'cls_acc', 'cls_part', 'top_token', 'codebook', 'images_per_s', 'data_share')
    ]
)
val_cfg = None
test_cfg = None
tta_model = None
