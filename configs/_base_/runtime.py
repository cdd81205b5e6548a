"""What every configuration shares: registration, hooks, logs and the wrapper for several processes."""

custom_imports = dict(imports=['beit_plugin.mm'], allow_failed_imports=False)
default_scope = 'mmseg'

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),  # on CPUs: --cfg-options env_cfg.dist_cfg.backend=gloo
)

# device_ids None lets DDP take models that live on the CPU as well; mmengine would fill in the local rank
model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=16000, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
    run_ahead=dict(type='BEiTRunAheadHook'),  # the CPU does not wait for the GPU in each step
    classes=dict(type='BEiTClassCheckHook'),  # heads and data sets have the same number of classes
    invalid_loss=dict(type='BEiTInvalidLossHook'),  # stop at a loss of NaN; on_nan='continue': go on
    resume=dict(type='BEiTResumeHook'),  # a killed training goes on as if it had not been
)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
tta_model = dict(type='BEiTSegTTAModel')
load_from = None
resume = False
