"""Lets mmengine's ``pytorch`` launcher start on machines without CUDA (two gloo processes, for tests and laptops).

mmengine 0.10.7 calls `torch.cuda.set_device` before it creates the process group, whatever the backend
(``mmengine/dist/utils.py``, `_init_dist_pytorch`). The config must do the rest: ``env_cfg.dist_cfg.backend='gloo'``
and ``model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)``.
"""

from typing import Any

import mmengine.dist.utils
import torch

_init_dist_pytorch = mmengine.dist.utils._init_dist_pytorch


def _init_dist_without_cuda(*args: Any, **kwargs: Any) -> None:
    """Run mmengine's initialisation with a `torch.cuda.set_device` that does nothing."""
    set_device = torch.cuda.set_device
    torch.cuda.set_device = lambda device: None
    try:
        _init_dist_pytorch(*args, **kwargs)
    finally:
        torch.cuda.set_device = set_device


def allow_cpu_launch() -> None:
    """Guard mmengine's ``pytorch`` launcher where CUDA is not available; elsewhere, or called again, do nothing."""
    if not torch.cuda.is_available():
        mmengine.dist.utils._init_dist_pytorch = _init_dist_without_cuda
