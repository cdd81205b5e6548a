"""Registers the models in timm: importing this module is enough for ``timm.create_model('beit_plugin_...')``.

timm keys a registering module by the last part of its name, so it must not be called ``beit``.
"""

import logging
from typing import Any

from timm.layers import use_fused_attn
from timm.models import build_model_with_cfg, register_model, register_notrace_module
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .checkpoints import CheckpointError
from .checkpoints.files import open_wrappers
from .checkpoints.fit import accept_any_dialect, fit, part_of
from .checkpoints.grids import metadata_of, noted_grid, with_grid, with_metadata
from .checkpoints.stand_ins import register_stand_ins
from .models.beit import VARIANTS, Beit
from .models.block import Block
from .models.embed import BeitPatchEmbed
from .models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
from .models.relative_position import RelativePositionBias
from .segmentation.backbone import BeitBackbone, resolve_stages
from .segmentation.segmentor import build_segmentor
from .timm_cfgs import default_cfgs as default_cfgs  # register_model reads them here

_logger = logging.getLogger(__name__)

__all__: list[str] = []  # register_model appends the entry points

register_stand_ins()  # timm reads checkpoint_path=, also mmengine's files, by itself


class _NotEager(type):
    def __instancecheck__(cls, module: object) -> bool:
        return isinstance(module, Block) and getattr(module.attn, 'backend', None) != 'eager'


class _OpaqueBlock(metaclass=_NotEager):
    """Any block, unless it is `eager`: graphs of `torch.fx` then hold its attention weights as nodes."""


for _leaf in (BeitPatchEmbed, _OpaqueBlock, RelativePositionBias):  # timm's torch.fx features do not look into them
    register_notrace_module(_leaf)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Takes a published file of any dialect to the names and sizes of ``model``.

    A norm that the file does not have keeps its initial values: pre-trained weights know the final norm of their own
    head only, so fine-tuning with mean pooling starts its norm anew, as the official code does.
    """
    opened = open_wrappers(state_dict, 'the checkpoint')
    fitted = fit(opened, model, noted_grid(opened) or _published_grid(opened, model), ask=True)
    own, current = fitted.own, model.state_dict()
    problems = fitted.complaints  # timm itself is not strict with another number of classes
    if problems:
        raise CheckpointError(f'the checkpoint does not fit {type(model).__name__}: {"; ".join(problems)}')
    # a classifier that is missing is an error, unless timm knows that it is to be another one
    fresh = [name for name in fitted.fresh if part_of(name) != 'head']
    if fresh:
        _logger.info('left at their initial values, for the file does not have them: %s', ', '.join(fresh))
    state = {**fitted.state, **{own[name]: current[own[name]] for name in fresh}}
    return with_metadata(state, metadata_of(current))


def _published_grid(state_dict: dict[str, Tensor], model: Any) -> tuple[int, int] | None:
    """The grid of the published weights that timm is loading; None for a file of the user's, which may be of any."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('file') or cfg.get('state_dict') or not cfg.get('input_size'):
        return None
    h, w = (size // 16 for size in cfg['input_size'][1:])  # all of them have patches of 16
    return noted_grid(with_grid(state_dict, (h, w)))


def _defaults(size: str) -> dict[str, Any]:
    """Arguments of a size; attention is `eager` where timm's `set_fused_attn(False)` asks for it."""
    return VARIANTS[size] if use_fused_attn() else {**VARIANTS[size], 'attn_backend': 'eager'}


def _create(
    variant: str,
    size: str,
    pretrained: bool,
    model_args: dict[str, Any],
    kwargs: dict[str, Any],
    levels: Any = (0, 1, 2, 3),
) -> nn.Module:
    args = {**_defaults(size), **model_args, **kwargs}
    taps = args.pop('out_indices', None)
    if 'out_features' in args:
        taps = [stage - 1 for stage in resolve_stages(args['depth'], taps, args.pop('out_features'))]
        if -1 in taps:
            raise ValueError("timm counts blocks, so 'stem' cannot be one of out_features here; use BeitBackbone")
    output_fmt = 'NCHW' if args.pop('reshape_hidden_states', True) else 'NLC'
    add_fpn = args.pop('add_fpn', False)
    if add_fpn and not args.get('features_only', False):
        raise ValueError('add_fpn makes feature maps; it needs features_only=True')
    # out_indices name blocks; with a pyramid these are what it reads, and its levels are what comes out
    level_or_block = levels if add_fpn else min(3, args['depth']) if taps is None else taps

    named = args.pop('return_dict', False)
    if named and not args.get('features_only', False):
        raise ValueError('return_dict gives feature maps by name; it needs features_only=True')

    def build(**model_kwargs: Any) -> nn.Module:
        model = BeitBackbone(out_indices=taps, add_fpn=True, **model_kwargs) if add_fpn else Beit(**model_kwargs)
        accept_any_dialect(model)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            'feature_cls': _NamedFeatures if named else 'getter',
            'out_indices': level_or_block,
            'output_fmt': output_fmt,
        },
        **args,
    )


class _NamedFeatures(FeatureGetterNet):
    """Maps by name, '0' the finest: what torchvision's detectors take."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(i): y for i, y in enumerate(super().forward(x))}


def _create_pyramid(
    variant: str, size: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    """``add_fpn`` for hosts that pass nothing but ``features_only`` and ``out_indices``, which here name levels.

    Without ``features_only`` it is the classifier that the maps belong to, as with timm's other names.
    """
    if not kwargs.get('features_only', False):
        return _create(variant, size, pretrained, model_args, kwargs)
    levels = kwargs.pop('out_indices', (0, 1, 2, 3))
    return _create(variant, size, pretrained, {**model_args, 'add_fpn': True}, kwargs, levels)


def _create_mim(
    variant: str, size: str, pretrained: bool, model_cls: type[nn.Module], kwargs: dict[str, Any]
) -> nn.Module:
    args = {**_defaults(size), **kwargs}

    def build(num_classes: int, **model_kwargs: Any) -> nn.Module:
        model = model_cls(**{'vocab_size': num_classes, **model_kwargs})  # timm's word for the outputs of a model
        accept_any_dialect(model)
        return model

    feature_cfg = {'feature_cls': 'getter', 'out_indices': min(3, args['depth'])}
    return build_model_with_cfg(
        build, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **args
    )


def _create_segmentor(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if kwargs.pop('features_only', False):
        raise ValueError(f'{variant} is a segmentor; for feature maps use features_only=True with an encoder')

    def build(**model_kwargs: Any) -> nn.Module:
        model = build_segmentor(**model_kwargs)
        accept_any_dialect(model)
        accept_any_dialect(model.backbone, nested=False)
        return model

    args = {**_defaults(size), 'img_size': 640, **kwargs}
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
def beit_plugin_tiny_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT tiny, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beit_plugin_tiny_patch16_224_fpn', 'tiny', pretrained, {}, kwargs)


@register_model
def beit_plugin_small_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT small, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beit_plugin_small_patch16_224_fpn', 'small', pretrained, {}, kwargs)


@register_model
def beit_plugin_base_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT base, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beit_plugin_base_patch16_224_fpn', 'base', pretrained, {}, kwargs)


@register_model
def beit_plugin_large_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beit_plugin_large_patch16_224_fpn', 'large', pretrained, {}, kwargs)


@register_model
def beitv2_plugin_base_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 base, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beitv2_plugin_base_patch16_224_fpn', 'base', pretrained, dict(init_values=1e-5), kwargs)


@register_model
def beitv2_plugin_large_patch16_224_fpn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 large, 224 pixels, patch 16, as a pyramid of maps at strides 4, 8, 16 and 32 (features_only=True)."""
    return _create_pyramid('beitv2_plugin_large_patch16_224_fpn', 'large', pretrained, {}, kwargs)


@register_model
def beit_plugin_tiny_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT tiny for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beit_plugin_tiny_patch16_224_mim', 'tiny', pretrained, BeitForMaskedImageModeling, kwargs)


@register_model
def beit_plugin_small_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT small for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beit_plugin_small_patch16_224_mim', 'small', pretrained, BeitForMaskedImageModeling, kwargs)


@register_model
def beit_plugin_base_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT base for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beit_plugin_base_patch16_224_mim', 'base', pretrained, BeitForMaskedImageModeling, kwargs)


@register_model
def beit_plugin_large_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT large for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beit_plugin_large_patch16_224_mim', 'large', pretrained, BeitForMaskedImageModeling, kwargs)


@register_model
def beitv2_plugin_base_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 base for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beitv2_plugin_base_patch16_224_mim', 'base', pretrained, BeitV2ForMaskedImageModeling, kwargs)


@register_model
def beitv2_plugin_large_patch16_224_mim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BEiT v2 large for masked image modelling, 224 pixels, patch 16, 8192 visual tokens."""
    return _create_mim('beitv2_plugin_large_patch16_224_mim', 'large', pretrained, BeitV2ForMaskedImageModeling, kwargs)


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
