"""What detectors share: mmdetection's scope, its pictures, its logs by iteration."""

_base_ = './runtime.py'

default_scope = 'mmdet'
default_hooks = dict(
    checkpoint=dict(interval=5000),
    visualization=dict(_delete_=True, type='DetVisualizationHook'),
)
visualizer = dict(type='DetLocalVisualizer')
tta_model = None
