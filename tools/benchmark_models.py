"""Whole models that tools/benchmark.py measures: encoders, with pyramids and segmentors, ours and the peers'.

All have random weights, random bias tables, no stochastic depth and no optimiser. Peers run as their libraries make
them; those that are not installed are left out. Legend: B batch, H W pixels, h w grid, N tokens, C channels.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from benchmark_cases import Case, Makers, Setting
from torch import Tensor, nn

CLASSES, VOCABULARY = 150, 8192  # ADE20K; DALL-E's tokens
MASKED = 75 / 196  # of the patches: BEiT, arXiv:2106.08254, section 2.3
TABLE_STD = 0.5  # of the random bias tables
BLOCKS = ((3, 5, 7, 11), (7, 11, 15, 23))  # that the pyramid reads, of 12 and of 24: published configurations


class Called(nn.Module):
    """A model called in a way of its own, so that all take (images) to a tensor and (images, targets) to a loss."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any) -> Tensor:
        return self.call(self.model, *args)


def sizes(s: Setting) -> dict[str, Any]:
    from beit_plugin.models.beit import VARIANTS

    return dict(img_size=(s.height, s.width), **VARIANTS[s.variant])


def masked_patches(s: Setting) -> int:
    """Of one image."""
    return max(1, round(MASKED * s.grid[0] * s.grid[1]))


def hf_config(s: Setting, **options: Any) -> Any:
    from transformers import BeitConfig

    size = sizes(s)
    # a square size as one number: the form of the published configurations
    image_size = s.height if s.height == s.width else (s.height, s.width)
    return BeitConfig(
        image_size=image_size, hidden_size=size['embed_dim'], num_hidden_layers=size['depth'],
        num_attention_heads=size['num_heads'], intermediate_size=4 * size['embed_dim'], drop_path_rate=0.0,
        layer_scale_init_value=size['init_values'], **options,
    )  # fmt: skip


def mm_sizes(s: Setting) -> dict[str, Any]:
    size = sizes(s)
    return dict(embed_dims=size['embed_dim'], num_layers=size['depth'], num_heads=size['num_heads'])


def import_mm() -> None:
    import beit_plugin.mm  # noqa: F401  makes mmseg and mmpretrain importable without a compiled mmcv


def _mmseg_backbone(s: Setting, out_indices: tuple[int, ...]) -> dict[str, Any]:
    return dict(
        type='BEiT', img_size=(s.height, s.width), out_indices=out_indices, init_values=sizes(s)['init_values'],
        norm_cfg=dict(type='LN', eps=1e-6), drop_path_rate=0.0, **mm_sizes(s),
    )  # fmt: skip


def randomize_tables(model: nn.Module) -> None:
    """Bias tables as a trained model has them, in place of zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('relative_position_bias_table'):  # the same name in all libraries
                parameter.normal_(std=TABLE_STD)


def mmseg_segmentor(s: Setting) -> dict[str, Any]:
    """Configuration of mmsegmentation's upernet_beit.py, whole images, for ADE20K's classes."""
    size = sizes(s)
    dim, blocks = size['embed_dim'], BLOCKS[size['depth'] == 24]
    norm_cfg = dict(type='BN', requires_grad=True)  # SyncBN of one process is this
    head = dict(num_classes=CLASSES, dropout_ratio=0.1, norm_cfg=norm_cfg, align_corners=False)
    return dict(
        type='EncoderDecoder',
        backbone=_mmseg_backbone(s, blocks),
        neck=dict(type='Feature2Pyramid', embed_dim=dim, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
        decode_head=dict(
            type='UPerHead', in_channels=[dim] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), channels=dim,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0), **head,
        ),
        auxiliary_head=dict(
            type='FCNHead', in_channels=dim, in_index=2, channels=256, num_convs=1, concat_input=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4), **head,
        ),
        test_cfg=dict(mode='whole'),
    )  # fmt: skip


def model_case(
    make: Callable[[], nn.Module], s: Setting, args: tuple[Any, ...] = (), targets: tuple[Any, ...] | None = None
) -> Case:
    """A model in mixed precision: inference, and forward and backward of its loss.

    Args:
        make: builds the model.
        args: what it gets in inference beside the images.
        targets: what it gets in training beside the images, to return the loss; None: it does not know a loss, and the
            mean of its output is one.
    """
    with s.device:  # initialised there, which the CPU would need seconds for
        model = make()
    model.to(s.device)
    randomize_tables(model)
    x = torch.randn(s.batch, 3, s.height, s.width, device=s.device)  # the loaders' dtype

    def run(call: Callable[..., Tensor], *rest: Any) -> Tensor:
        with torch.autocast(s.device.type, s.dtype, enabled=s.dtype != torch.float32):
            return call(x, *rest)

    def train(call: Callable[..., Tensor]) -> None:
        loss = run(call).float().mean() if targets is None else run(call, *targets)
        loss.backward()

    return Case(model, lambda call: run(call, *args), train, list(model.parameters()))


def _timm_vit(s: Setting) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=0, global_pool='', **sizes(s))


def _timm_beit(s: Setting) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(num_classes=0, global_pool='', use_abs_pos_emb=False, use_rel_pos_bias=True, **sizes(s))


def encoder_cases(s: Setting) -> Makers:
    """Images to all tokens after the last block."""

    def ours(backend: str) -> nn.Module:
        from beit_plugin import Beit

        return Beit(num_classes=0, global_pool='', attn_backend=backend, **sizes(s))  # type: ignore[arg-type]

    def transformers() -> nn.Module:
        from transformers import BeitModel

        config = hf_config(s, use_relative_position_bias=True, use_mean_pooling=False)
        return Called(BeitModel(config, add_pooling_layer=False), lambda m, x: m(x).last_hidden_state)

    def mmseg() -> nn.Module:
        import_mm()
        from mmseg.registry import MODELS

        return Called(MODELS.build(_mmseg_backbone(s, (sizes(s)['depth'] - 1,))), lambda m, x: m(x)[-1])

    models = {'timm ViT, no bias (bound)': lambda: _timm_vit(s), 'timm Beit': lambda: _timm_beit(s)}
    models |= {'transformers': transformers} if find_spec('transformers') else {}
    models |= {'mmsegmentation': mmseg} if find_spec('mmseg') else {}
    models |= {f'ours, {backend}': (lambda b=backend: ours(b)) for backend in s.backends}
    return {name: (lambda make=make: model_case(make, s)) for name, make in models.items()}


def pyramid_cases(s: Setting) -> Makers:
    """Images to four levels of strides 4 to 32, as a detector reads them; the loss is the sum of their means.

    timm's encoders get our pyramid, mmsegmentation's its own. All attention is global.
    """
    size = sizes(s)
    blocks = list(BLOCKS[size['depth'] == 24])

    def case(make: Callable[[], nn.Module], levels: Callable[[nn.Module, Tensor], Any]) -> Case:
        def call(model: nn.Module, x: Tensor, loss: bool = False) -> Any:
            maps = levels(model, x)
            return sum(level.float().mean() for level in maps) if loss else maps

        return model_case(lambda: Called(make(), call), s, targets=(True,))

    def timm(encoder: Callable[[Setting], nn.Module]) -> Case:
        from beit_plugin.segmentation.pyramid import FeaturePyramid

        def levels(model: nn.Module, x: Tensor) -> Any:
            maps = model['encoder'].forward_intermediates(x, indices=blocks, intermediates_only=True)  # type: ignore[index, operator]
            return model['pyramid'](maps)  # type: ignore[index, operator]

        return case(lambda: nn.ModuleDict(dict(encoder=encoder(s), pyramid=FeaturePyramid(size['embed_dim']))), levels)

    def mmseg() -> Case:
        import_mm()
        from mmseg.registry import MODELS

        neck = dict(type='Feature2Pyramid', embed_dim=size['embed_dim'], norm_cfg=dict(type='BN'))
        return case(
            lambda: nn.Sequential(MODELS.build(_mmseg_backbone(s, tuple(blocks))), MODELS.build(neck)),
            lambda m, x: m(x),
        )

    def ours(backend: str) -> Case:
        from beit_plugin.segmentation.backbone import BeitBackbone

        return case(
            lambda: BeitBackbone(out_indices=blocks, add_fpn=True, attn_backend=backend, **size),  # type: ignore[arg-type]
            lambda m, x: m(x),
        )

    makers: Makers = {
        'timm ViT, no bias (bound)': lambda: timm(_timm_vit),
        'timm Beit': lambda: timm(_timm_beit),
    }
    makers |= {'mmsegmentation': mmseg} if find_spec('mmseg') else {}
    return makers | {f'ours, {backend}': (lambda b=backend: ours(b)) for backend in s.backends}


def segmentor_cases(s: Setting) -> Makers:
    """Images to logits at a quarter of their size, and to the loss at their full size with the auxiliary head.

    The peers are transformers' BeitForSemanticSegmentation, whose inference runs the auxiliary head too, and
    mmsegmentation's upernet_beit.py, whose loss also counts its accuracy. The bound is ours without a bias.
    """
    size = sizes(s)
    blocks = BLOCKS[size['depth'] == 24]
    labels = torch.randint(CLASSES, (s.batch, s.height, s.width), device=s.device)

    def ours(**options: Any) -> Case:
        from beit_plugin.segmentation.segmentor import build_segmentor

        def call(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
            return model(x) if y is None else model(x, y)[0]

        return model_case(lambda: Called(build_segmentor(CLASSES, **options, **size), call), s, targets=(labels,))

    def transformers() -> Case:
        from transformers import BeitForSemanticSegmentation

        def call(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
            return model(x).logits if y is None else model(x, labels=y).loss

        config = hf_config(s, use_relative_position_bias=True, num_labels=CLASSES, out_indices=list(blocks))
        return model_case(lambda: Called(BeitForSemanticSegmentation(config), call), s, targets=(labels,))

    def mmseg() -> Case:
        import_mm()
        from mmengine.structures import PixelData
        from mmseg.registry import MODELS
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
        cfg = mmseg_segmentor(s)

        def call(model: nn.Module, x: Tensor, y: list[Any] | None = None) -> Tensor:
            if y is None:
                return model(x, mode='tensor')
            return sum(loss for name, loss in model(x, y, mode='loss').items() if 'loss' in name)  # type: ignore[return-value]

        return model_case(lambda: Called(MODELS.build(cfg), call), s, targets=(samples,))

    makers: Makers = {'ours, no bias (bound)': lambda: ours(use_rel_pos_bias=False, attn_backend='sdpa')}
    makers |= {'transformers': transformers} if find_spec('transformers') else {}
    makers |= {'mmsegmentation': mmseg} if find_spec('mmseg') else {}
    return makers | {f'ours, {backend}': (lambda b=backend: ours(attn_backend=b)) for backend in s.backends}


def model_flops(what: str, s: Setting, training: bool) -> float:
    """Matrix products and convolutions of our model, the same for all rows of a size.

    Counted by PyTorch on a model without memory (device meta) and with attention written out. The backward pass is
    counted once, so what a kernel computes a second time is not in it; nor are the gathered bias and its gradient.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from beit_plugin import Beit
    from beit_plugin.segmentation.backbone import BeitBackbone
    from beit_plugin.segmentation.segmentor import build_segmentor

    # in the mode of inference, because a batch of one image has no statistics
    options: dict[str, Any] = dict(use_rel_pos_bias=False, attn_backend='eager', device='meta', **sizes(s))
    x = torch.empty(1, 3, s.height, s.width, device='meta')
    if what == 'pyramid':
        backbone = BeitBackbone(add_fpn=True, **options).eval()

        def run() -> Tensor:
            return torch.stack([level.mean() for level in backbone(x)]).sum()
    elif what == 'segmentor':
        segmentor = build_segmentor(CLASSES, **options).eval()

        def run() -> Tensor:
            levels = segmentor.forward_features(x)
            logits = segmentor.forward_head(levels)
            if not training or segmentor.auxiliary_head is None:
                return logits.mean()
            return logits.mean() + segmentor.auxiliary_head(levels[segmentor.auxiliary_index]).mean()
    else:
        encoder = Beit(num_classes=0, global_pool='', **options).eval()

        def run() -> Tensor:
            return encoder(x).mean()

    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        out = run()
        if training:
            out.backward()
    flops = float(counter.get_total_flops())
    if what == 'mim':
        flops += 2.0 * masked_patches(s) * sizes(s)['embed_dim'] * VOCABULARY * (3 if training else 1)
    return flops * s.batch
