"""What timm knows of each model and of its published weights: one entry for every name and tag.

The weights are timm's conversions of the official fine-tuned ones, Microsoft's files of the pre-trained ones and of the
ADE20K segmentors, and those that OpenMMLab trained; all dialects are read as they are (``checkpoints``).
"""

import re
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs

__all__ = ['default_cfgs']

V1: dict[str, Any] = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
V2: dict[str, Any] = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)


def _cfg(hf_hub_id: str | None = None, size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        'hf_hub_id': hf_hub_id,
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': None,
        'crop_pct': 0.9 if size == 224 else 1.0,
        'interpolation': 'bicubic',
        'fixed_input_size': False,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **V1,
        **kwargs,
    }


def _mim_cfg(hf_hub_id: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return _cfg(hf_hub_id, **{'num_classes': 8192, 'classifier': 'lm_head', **kwargs})


def _upernet_cfg(hf_hub_id: str | None = None, **kwargs: Any) -> dict[str, Any]:
    classifiers = ('decode_head.conv_seg', 'auxiliary_head.conv_seg')  # both are new for other classes
    layers = dict(first_conv='backbone.patch_embed.proj', classifier=classifiers)
    return _cfg(hf_hub_id, size=640, num_classes=150, **layers, **V2, **kwargs)


# the files of OpenMMLab's model zoos (mmpretrain 1.2.0 configs/beit*/metafile.yml, mmsegmentation 1.2.2
# configs/beit/metafile.yaml); each name ends in the beginning of its sha256, which the loader checks
_OPENMMLAB = 'https://download.openmmlab.com'
_MMSELFSUP_V1 = 'beit_vit-base-p16_8xb256-amp-coslr-300e_in1k'
_MMSELFSUP_V2 = 'beitv2_vit-base-p16_8xb256-amp-coslr-300e_in1k'
_MMSEG_BASE = 'upernet_beit-base_8x2_640x640_160k_ade20k'
_MMSEG_LARGE = 'upernet_beit-large_fp16_8x1_640x640_160k_ade20k'

# segmentors and v2 take ImageNet's mean and std, v1 0.5; pre-trained encoders have no classifier
_cfgs: dict[str, Any] = {
    'beit_plugin_tiny_patch16_224': _cfg(),
    'beit_plugin_small_patch16_224': _cfg(),
    'beit_plugin_base_patch16_224.in22k_ft_in22k_in1k': _cfg('timm/beit_base_patch16_224.in22k_ft_in22k_in1k'),
    'beit_plugin_base_patch16_224.in22k_ft_in22k': _cfg('timm/beit_base_patch16_224.in22k_ft_in22k', num_classes=21841),
    'beit_plugin_base_patch16_224.in22k': _cfg('microsoft/beit-base-patch16-224-pt22k', num_classes=0),
    'beit_plugin_base_patch16_384.in22k_ft_in22k_in1k': _cfg('timm/beit_base_patch16_384.in22k_ft_in22k_in1k', 384),
    'beit_plugin_large_patch16_224.in22k_ft_in22k_in1k': _cfg('timm/beit_large_patch16_224.in22k_ft_in22k_in1k'),
    'beit_plugin_large_patch16_224.in22k_ft_in22k': _cfg(
        'timm/beit_large_patch16_224.in22k_ft_in22k', num_classes=21841
    ),
    'beit_plugin_large_patch16_224.in22k': _cfg('microsoft/beit-large-patch16-224-pt22k', num_classes=0),
    'beit_plugin_large_patch16_384.in22k_ft_in22k_in1k': _cfg('timm/beit_large_patch16_384.in22k_ft_in22k_in1k', 384),
    'beit_plugin_large_patch16_512.in22k_ft_in22k_in1k': _cfg('timm/beit_large_patch16_512.in22k_ft_in22k_in1k', 512),
    **{f'beit_plugin_{size}_patch16_224_mim': _mim_cfg() for size in ('tiny', 'small')},
    'beit_plugin_base_patch16_224_mim.in22k': _mim_cfg('microsoft/beit-base-patch16-224-pt22k'),
    'beit_plugin_base_patch16_224_mim.in1k': _mim_cfg(
        url=f'{_OPENMMLAB}/mmselfsup/1.x/beit/{_MMSELFSUP_V1}/{_MMSELFSUP_V1}_20221128-ab79e626.pth', **V2
    ),
    'beit_plugin_large_patch16_224_mim.in22k': _mim_cfg('microsoft/beit-large-patch16-224-pt22k'),
    'beitv2_plugin_base_patch16_224_mim.in1k': _mim_cfg(
        url=f'{_OPENMMLAB}/mmselfsup/1.x/beitv2/{_MMSELFSUP_V2}/{_MMSELFSUP_V2}_20221212-a157be30.pth', **V2
    ),
    'beitv2_plugin_large_patch16_224_mim': _mim_cfg(**V2),
    **{f'beit_plugin_{size}_patch16_640_upernet': _upernet_cfg() for size in ('tiny', 'small')},
    'beit_plugin_base_patch16_640_upernet.in22k_ft_in22k_ft_ade20k': _upernet_cfg(
        'microsoft/beit-base-finetuned-ade-640-640'
    ),
    'beit_plugin_base_patch16_640_upernet.in22k_ft_ade20k_mmseg': _upernet_cfg(
        url=f'{_OPENMMLAB}/mmsegmentation/v0.5/beit/{_MMSEG_BASE}/{_MMSEG_BASE}-eead221d.pth'
    ),
    'beit_plugin_large_patch16_640_upernet.in22k_ft_in22k_ft_ade20k': _upernet_cfg(
        'microsoft/beit-large-finetuned-ade-640-640'
    ),
    'beit_plugin_large_patch16_640_upernet.in22k_ft_ade20k_mmseg': _upernet_cfg(
        url=f'{_OPENMMLAB}/mmsegmentation/v0.5/beit/{_MMSEG_LARGE}/{_MMSEG_LARGE}-8fc0dd5d.pth'
    ),
    'beitv2_plugin_base_patch16_224.in1k_ft_in22k_in1k': _cfg('timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k', **V2),
    'beitv2_plugin_base_patch16_224.in1k_ft_in1k': _cfg('timm/beitv2_base_patch16_224.in1k_ft_in1k', **V2),
    'beitv2_plugin_base_patch16_224.in1k_ft_in22k': _cfg(
        'timm/beitv2_base_patch16_224.in1k_ft_in22k', num_classes=21841, **V2
    ),
    'beitv2_plugin_large_patch16_224.in1k_ft_in22k_in1k': _cfg(
        'timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k', crop_pct=0.95, **V2
    ),
    'beitv2_plugin_large_patch16_224.in1k_ft_in1k': _cfg(
        'timm/beitv2_large_patch16_224.in1k_ft_in1k', crop_pct=0.95, **V2
    ),
    'beitv2_plugin_large_patch16_224.in1k_ft_in22k': _cfg(
        'timm/beitv2_large_patch16_224.in1k_ft_in22k', num_classes=21841, **V2
    ),
}
# the same weights for the models that give a pyramid
_cfgs.update({name.replace('_224', '_224_fpn'): cfg for name, cfg in _cfgs.items() if re.search(r'_224(\.|$)', name)})
default_cfgs = generate_default_cfgs(_cfgs)
