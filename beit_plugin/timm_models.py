"""Registers the models in timm: importing this module is enough for ``timm.create_model('beit_plugin_...')``.

timm keys a registering module by the last part of its name, so it must not be called ``beit``.
"""

import logging
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .checkpoints.files import open_wrappers
from .checkpoints.fit import accept_any_dialect, translate
from .models.backbone import BeitBackbone, pyramid_indices, resolve_stages
from .models.beit import VARIANTS, Beit
from .models.pyramid import FeaturePyramid
from .models.segmentation_loss import SegmentationLoss
from .models.segmentor import BeitSegmentor
from .models.upernet import FCNHead, UPerNetHead

_logger = logging.getLogger(__name__)

__all__: list[str] = []  # register_model appends the entry points

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


# segmentors and v2 take ImageNet's mean and std, v1 0.5; the weights are timm's conversions of the official fine-tuned
# ones and Microsoft's of the pre-trained ones, which have no classifier
default_cfgs = generate_default_cfgs(
    {
        'beit_plugin_tiny_patch16_224': _cfg(),
        'beit_plugin_small_patch16_224': _cfg(),
        'beit_plugin_base_patch16_224.in22k_ft_in22k_in1k': _cfg('timm/beit_base_patch16_224.in22k_ft_in22k_in1k'),
        'beit_plugin_base_patch16_224.in22k_ft_in22k': _cfg(
            'timm/beit_base_patch16_224.in22k_ft_in22k', num_classes=21841
        ),
        'beit_plugin_base_patch16_224.in22k': _cfg('microsoft/beit-base-patch16-224-pt22k', num_classes=0),
        'beit_plugin_base_patch16_384.in22k_ft_in22k_in1k': _cfg('timm/beit_base_patch16_384.in22k_ft_in22k_in1k', 384),
        'beit_plugin_large_patch16_224.in22k_ft_in22k_in1k': _cfg('timm/beit_large_patch16_224.in22k_ft_in22k_in1k'),
        'beit_plugin_large_patch16_224.in22k_ft_in22k': _cfg(
            'timm/beit_large_patch16_224.in22k_ft_in22k', num_classes=21841
        ),
        'beit_plugin_large_patch16_224.in22k': _cfg('microsoft/beit-large-patch16-224-pt22k', num_classes=0),
        'beit_plugin_large_patch16_384.in22k_ft_in22k_in1k': _cfg(
            'timm/beit_large_patch16_384.in22k_ft_in22k_in1k', 384
        ),
        'beit_plugin_large_patch16_512.in22k_ft_in22k_in1k': _cfg(
            'timm/beit_large_patch16_512.in22k_ft_in22k_in1k', 512
        ),
        **{
            f'beit_plugin_{size}_patch16_640_upernet': _cfg(
                size=640,
                num_classes=150,
                first_conv='backbone.patch_embed.proj',
                classifier='decode_head.conv_seg',
                **V2,
            )
            for size in VARIANTS
        },
        'beitv2_plugin_base_patch16_224.in1k_ft_in22k_in1k': _cfg(
            'timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k', **V2
        ),
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
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Takes a published file of any dialect to the names and sizes of ``model``.

    A norm that the file does not have keeps its initial values: pre-trained weights know the final norm of their own
    head only, so fine-tuning with mean pooling starts its norm anew, as the official code does.
    """
    state_dict = open_wrappers(state_dict, 'the checkpoint')
    own = model.state_dict()
    if isinstance(model, BeitSegmentor):
        if any(name.startswith('decode_head.') for name in state_dict):
            return state_dict
        fitted, rest = translate(state_dict, model.backbone)
        _logger.info('the heads and the pyramid are left at their initial values, for the file is an encoder')
        heads = {name: own[name] for name in own if not name.startswith('backbone.')}
        return {**heads, **{f'backbone.{name}': tensor for name, tensor in fitted.items()}, **rest}
    fitted, rest = translate(state_dict, model)
    fresh = {name: own[name] for name in own if name.startswith(('norm.', 'fc_norm.')) and name not in fitted}
    if fresh:
        _logger.info('left at their initial values, for the file does not have them: %s', ', '.join(fresh))
    return {**fitted, **fresh, **rest}


def _create(variant: str, size: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    args = {**VARIANTS[size], **model_args, **kwargs}
    taps = args.pop('out_indices', None)
    if 'out_features' in args:
        taps = [stage - 1 for stage in resolve_stages(args['depth'], taps, args.pop('out_features'))]
        if -1 in taps:
            raise ValueError("timm counts blocks, so 'stem' cannot be one of out_features here; use BeitBackbone")
    output_fmt = 'NCHW' if args.pop('reshape_hidden_states', True) else 'NLC'
    add_fpn = args.pop('add_fpn', False)
    if add_fpn and not args.get('features_only', False):
        raise ValueError('add_fpn makes feature maps; it needs features_only=True')
    # out_indices name blocks; with a pyramid these are what it reads, and its four levels are what comes out
    level_or_block = (0, 1, 2, 3) if add_fpn else min(3, args['depth']) if taps is None else taps

    def build(**model_kwargs: Any) -> nn.Module:
        model = BeitBackbone(out_indices=taps, add_fpn=True, **model_kwargs) if add_fpn else Beit(**model_kwargs)
        accept_any_dialect(model)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'feature_cls': 'getter', 'out_indices': level_or_block, 'output_fmt': output_fmt},
        **args,
    )


def _create_segmentor(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if kwargs.pop('features_only', False):
        raise ValueError(f'{variant} is a segmentor; for feature maps use features_only=True with an encoder')

    def build(
        num_classes: int = 150,
        channels: int | None = None,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        decoder_drop_rate: float = 0.1,
        use_auxiliary_head: bool = True,
        auxiliary_channels: int = 256,
        auxiliary_num_convs: int = 1,
        auxiliary_concat_input: bool = False,
        auxiliary_loss_weight: float = 0.4,
        semantic_loss_ignore_index: int = 255,
        out_indices: tuple[int, ...] | None = None,
        **encoder_kwargs: Any,
    ) -> nn.Module:
        taps = pyramid_indices(encoder_kwargs['depth']) if out_indices is None else out_indices
        if len(taps) != 4:
            raise ValueError(f'a segmentor needs exactly 4 out_indices, got {len(taps)}')
        backbone = BeitBackbone(out_indices=taps, **encoder_kwargs)
        accept_any_dialect(backbone)
        dim = backbone.embed_dim
        dd: dict[str, Any] = {'device': encoder_kwargs.get('device'), 'dtype': encoder_kwargs.get('dtype')}
        auxiliary_head = FCNHead(
            dim,
            auxiliary_channels,
            num_classes,
            num_convs=auxiliary_num_convs,
            concat_input=auxiliary_concat_input,
            dropout=decoder_drop_rate,
            **dd,
        )
        return BeitSegmentor(
            backbone=backbone,
            pyramid=FeaturePyramid(dim, **dd),
            decode_head=UPerNetHead(
                [dim] * 4, channels or dim, num_classes, pool_scales=pool_scales, dropout=decoder_drop_rate, **dd
            ),
            auxiliary_head=auxiliary_head if use_auxiliary_head else None,
            loss=SegmentationLoss(semantic_loss_ignore_index, auxiliary_loss_weight),
            patch_size=backbone.patch_embed.patch_size,
        )

    args = {**VARIANTS[size], 'img_size': 640, **kwargs}
    return build_model_with_cfg(build, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **args)


@register_model
def beit_plugin_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT tiny, 224 pixels, patch 16."""
    return _create('beit_plugin_tiny_patch16_224', 'tiny', pretrained, {}, kwargs)


@register_model
def beit_plugin_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT small, 224 pixels, patch 16."""
    return _create('beit_plugin_small_patch16_224', 'small', pretrained, {}, kwargs)


@register_model
def beit_plugin_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT base, 224 pixels, patch 16."""
    return _create('beit_plugin_base_patch16_224', 'base', pretrained, {}, kwargs)


@register_model
def beit_plugin_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT base, 384 pixels, patch 16."""
    return _create('beit_plugin_base_patch16_384', 'base', pretrained, dict(img_size=384), kwargs)


@register_model
def beit_plugin_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large, 224 pixels, patch 16."""
    return _create('beit_plugin_large_patch16_224', 'large', pretrained, {}, kwargs)


@register_model
def beit_plugin_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large, 384 pixels, patch 16."""
    return _create('beit_plugin_large_patch16_384', 'large', pretrained, dict(img_size=384), kwargs)


@register_model
def beit_plugin_large_patch16_512(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large, 512 pixels, patch 16."""
    return _create('beit_plugin_large_patch16_512', 'large', pretrained, dict(img_size=512), kwargs)


@register_model
def beitv2_plugin_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 base, 224 pixels, patch 16. The layer scale starts at 1e-5 (unilm ``beit2``)."""
    return _create('beitv2_plugin_base_patch16_224', 'base', pretrained, dict(init_values=1e-5), kwargs)


@register_model
def beitv2_plugin_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 large, 224 pixels, patch 16."""
    return _create('beitv2_plugin_large_patch16_224', 'large', pretrained, {}, kwargs)


@register_model
def beit_plugin_tiny_patch16_640_upernet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT tiny with pyramid, UPerNet head and FCN auxiliary head, 640 pixels, 150 classes (ADE20K)."""
    return _create_segmentor('beit_plugin_tiny_patch16_640_upernet', 'tiny', pretrained, kwargs)


@register_model
def beit_plugin_small_patch16_640_upernet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT small with pyramid, UPerNet head and FCN auxiliary head, 640 pixels, 150 classes (ADE20K)."""
    return _create_segmentor('beit_plugin_small_patch16_640_upernet', 'small', pretrained, kwargs)


@register_model
def beit_plugin_base_patch16_640_upernet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT base with pyramid, UPerNet head and FCN auxiliary head, 640 pixels, 150 classes (ADE20K)."""
    return _create_segmentor('beit_plugin_base_patch16_640_upernet', 'base', pretrained, kwargs)


@register_model
def beit_plugin_large_patch16_640_upernet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large with pyramid, UPerNet head and FCN auxiliary head, 640 pixels, 150 classes (ADE20K)."""
    return _create_segmentor('beit_plugin_large_patch16_640_upernet', 'large', pretrained, kwargs)
