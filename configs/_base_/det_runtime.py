"""What detectors share: mmdetection's scope, its pictures, its logs by iteration."""

_base_ = './runtime.py'

default_scope = 'mmdet'
env_cfg = dict(cudnn_benchmark=False)  # the number of proposals changes: each would be measured anew
default_hooks = dict(
    checkpoint=dict(interval=5000),
    visualization=dict(_delete_=True, type='DetVisualizationHook'),
)
visualizer = dict(type='DetLocalVisualizer')
tta_model = None
