"""Registers the plugin in OpenMMLab: ``custom_imports = dict(imports=['beit_plugin.mm'], allow_failed_imports=False)``.

The classes go to mmengine's root registries, so configs of mmseg, mmdet and mmpretrain find them without a scope.
Importing this also makes mmcv-lite enough, and lets mmengine's launcher start without CUDA and its loaders read BEiT
segmentors of every dialect.
"""

import pkgutil
from importlib.util import find_spec

_MISSING = [name for name in ('mmengine', 'mmcv') if find_spec(name) is None]
if _MISSING:
    raise ImportError(
        f'beit_plugin.mm needs {" and ".join(_MISSING)}, which the OpenMMLab extra brings: '
        "pip install '.[mmseg]' (or '.[mmdet]' for detectors) in the folder of beit_plugin",
        name=_MISSING[0],
    )

from . import mmcv_ops  # noqa: E402

mmcv_ops.install()  # before anything that imports mmcv.ops

from mmengine.utils.dl_utils import mmcv_full_available  # noqa: E402

if not hasattr(pkgutil, 'find_loader') and 'find_loader' in mmcv_full_available.__code__.co_names:
    raise ImportError('this mmengine calls pkgutil.find_loader, which Python 3.14 removed; use Python 3.10 to 3.13')

from .host_patches.cpu_dist import allow_cpu_launch  # noqa: E402
from .host_patches.mmpretrain import skip_broken_multimodal  # noqa: E402
from .loading import read_every_dialect  # noqa: E402

allow_cpu_launch()
read_every_dialect()
skip_broken_multimodal()

from .backbone import BEiTBackbone  # noqa: E402
from .pretraining.data import BEiTImages, BEiTMIMDataPreprocessor  # noqa: E402
from .pretraining.hooks import BEiTMIMPictureHook, BEiTThroughputHook, BEiTTokenCacheHook  # noqa: E402
from .pretraining.mim import BEiTMIMHead, BEiTPretrainer  # noqa: E402
from .pretraining.vqkd import BEiTVQKD  # noqa: E402
from .segmentation.neck import BEiTPyramid, BEiTSimplePyramid  # noqa: E402
from .training.amp import BEiTBF16OptimWrapper  # noqa: E402
from .training.class_check import BEiTClassCheckHook  # noqa: E402
from .training.fsdp import BEiTFSDPStrategy  # noqa: E402
from .training.invalid_loss import BEiTInvalidLossHook  # noqa: E402
from .training.optim import BEiTLayerDecayConstructor, BEiTNoDecayConstructor, leave_optimizers_uncompiled  # noqa: E402
from .training.resume import BEiTResumeHook  # noqa: E402
from .training.run_ahead import BEiTRunAheadHook, allow_pinned_samples  # noqa: E402

allow_pinned_samples()
leave_optimizers_uncompiled()

__all__ = [
    'BEiTBF16OptimWrapper',
    'BEiTBackbone',
    'BEiTClassCheckHook',
    'BEiTFSDPStrategy',
    'BEiTImages',
    'BEiTInvalidLossHook',
    'BEiTLayerDecayConstructor',
    'BEiTMIMDataPreprocessor',
    'BEiTMIMHead',
    'BEiTMIMPictureHook',
    'BEiTNoDecayConstructor',
    'BEiTPretrainer',
    'BEiTPyramid',
    'BEiTResumeHook',
    'BEiTRunAheadHook',
    'BEiTSimplePyramid',
    'BEiTThroughputHook',
    'BEiTTokenCacheHook',
    'BEiTVQKD',
]

if find_spec('mmseg') is not None:  # detectors need no segmentation heads and labels
    from .segmentation.data_preprocessor import BEiTSegDataPreProcessor as BEiTSegDataPreProcessor
    from .segmentation.decode_head import BEiTFCNHead as BEiTFCNHead
    from .segmentation.decode_head import BEiTUPerHead as BEiTUPerHead
    from .segmentation.segmentor import BEiTSegmentor as BEiTSegmentor
    from .segmentation.transforms import BEiTLoadAnnotations as BEiTLoadAnnotations
    from .segmentation.transforms import BEiTLoadImageFromFile as BEiTLoadImageFromFile
    from .segmentation.tta import BEiTSegTTAModel as BEiTSegTTAModel

    __all__ += [
        'BEiTFCNHead',
        'BEiTLoadAnnotations',
        'BEiTLoadImageFromFile',
        'BEiTSegDataPreProcessor',
        'BEiTSegTTAModel',
        'BEiTSegmentor',
        'BEiTUPerHead',
    ]
