"""Models of every peer with random weights, each in the format that its own library writes.

`PEERS` maps 'dialect/task' to a case: how theirs is built, ours, how both run, and how theirs takes a checkpoint back.
All are tiny, on a grid of 2x2 patches unless said otherwise, which is the least that has four pyramid levels.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn

DIM, DEPTH, HEADS, CLASSES, VOCABULARY, SIZE = 16, 5, 2, 7, 11, 32
SMALL = dict(img_size=SIZE, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)
TAPS = (0, 2, 3, 4)
MASK = torch.tensor([[True, False, True, True], [False, False, True, False]])


@dataclass
class Case:
    """One peer model and ours.

    Attributes:
        theirs: builds the peer.
        ours: builds our model.
        run_theirs, run_ours: model and images (2, 3, SIZE, SIZE) to a list of outputs that must agree.
        dialect: what `save` writes for it.
        task: what `detect` must say.
        drop: our names that the peer has no place for.
        needs: libraries that it is made of.
        back: loads a checkpoint of the dialect into the peer, by its own strict means.
    """

    theirs: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]
    run_theirs: Callable[[nn.Module, Tensor], list[Tensor]]
    run_ours: Callable[[nn.Module, Tensor], list[Tensor]]
    dialect: str
    task: str
    drop: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    back: Callable[[nn.Module, dict[str, Tensor]], Any] = field(
        default=lambda model, state: model.load_state_dict(state, strict=True)
    )


def beit(**options):
    from beit_plugin import Beit

    return Beit(**{**SMALL, 'num_classes': 0, **options})


def mim(**options):
    from beit_plugin.models.mim import BeitForMaskedImageModeling

    return BeitForMaskedImageModeling(**{**SMALL, 'vocab_size': VOCABULARY, **options})


def mim_v2(**options):
    from beit_plugin.models.mim import BeitV2ForMaskedImageModeling

    return BeitV2ForMaskedImageModeling(**{**SMALL, 'vocab_size': VOCABULARY, 'early_layers': 3, **options})


def segmentor(**options):
    from beit_plugin.segmentation.segmentor import build_segmentor

    options = {**SMALL, 'num_classes': CLASSES, 'auxiliary_channels': 6, 'auxiliary_concat_input': True,
               'decoder_drop_rate': 0.0, **options}  # fmt: skip
    return build_segmentor(**options)


def backbone(**options):
    from beit_plugin import BeitBackbone

    return BeitBackbone(**{**SMALL, 'out_indices': TAPS, **options})


def all_logits(model, x):
    out = model(x, MASK, all_logits=True)
    return [out.logits] if out.cls_pt_logits is None else [out.logits, out.cls_pt_logits]


def outputs(model, x):
    out = model(x)
    return list(out) if isinstance(out, list | tuple) else [out]


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_beit(**options):
    from timm.models.beit import Beit as TimmBeit

    options = {'num_classes': 0, 'init_values': 0.1, 'use_abs_pos_emb': False, 'use_rel_pos_bias': True, **options}
    return TimmBeit(**{**SMALL, **options})


def _timm(task, **options):
    return Case(
        lambda: timm_beit(**options), lambda: beit(**options), outputs, outputs, 'timm', task, drop=('mask_token',)
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def hf_config(**options):
    from transformers import BeitConfig

    return BeitConfig(**{
        **dict(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=2 * DIM,
               image_size=SIZE, layer_norm_eps=1e-6, vocab_size=VOCABULARY, num_labels=CLASSES, auxiliary_channels=6,
               auxiliary_concat_input=True, out_indices=[2, 3, 4, 5], use_relative_position_bias=True),
        **options,
    })  # fmt: skip


def _hf(name, task, ours, run, dialect, run_ours=outputs, **options):
    def theirs():
        import transformers
        from transformers.models.beit import modeling_beit

        cls = getattr(modeling_beit, name) if name == 'BeitBackbone' else getattr(transformers, name)
        return cls(hf_config(**options))

    return Case(theirs, ours, run, run_ours, dialect, task, needs=('transformers',))


def _hf_cases(dialect):
    shared = dict(use_relative_position_bias=False, use_shared_relative_position_bias=True, use_mask_token=True)
    return {
        f'{dialect}/encoder': _hf(
            'BeitModel', 'encoder', beit, lambda m, x: [m(x).pooler_output], dialect
        ),
        f'{dialect}/encoder with everything': _hf(
            'BeitModel', 'encoder',
            lambda: beit(global_pool='token', use_shared_rel_pos_bias=True, use_mask_token=True, use_abs_pos_emb=True),
            lambda m, x: [m(x, bool_masked_pos=MASK).last_hidden_state], dialect,
            lambda m, x: [m.encode(x, MASK).last_hidden_state],
            use_mean_pooling=False, use_absolute_position_embeddings=True,
            **{**shared, 'use_relative_position_bias': True},
        ),
        f'{dialect}/classifier': _hf(
            'BeitForImageClassification', 'classifier', lambda: beit(num_classes=CLASSES), lambda m, x: [m(x).logits],
            dialect,
        ),
        f'{dialect}/classifier of [CLS]': _hf(
            'BeitForImageClassification', 'classifier', lambda: beit(num_classes=CLASSES, global_pool='token'),
            lambda m, x: [m(x).logits], dialect, use_mean_pooling=False,
        ),
        f'{dialect}/mim': _hf(
            'BeitForMaskedImageModeling', 'mim', mim, lambda m, x: [m(x, bool_masked_pos=MASK).logits], dialect,
            all_logits, **shared,
        ),
        f'{dialect}/backbone': _hf(
            'BeitBackbone', 'backbone', lambda: backbone(out_features=['stage2', 'stage3', 'stage4', 'stage5'],
                                                         out_indices=None, add_fpn=True),
            lambda m, x: list(m(x).feature_maps), dialect, add_fpn=True,
        ),
        # hidden_states[i - 1], so that 2, 3, 4, 5 are the outputs of blocks 0, 1, 2, 3
        f'{dialect}/segmentor': _hf(
            'BeitForSemanticSegmentation', 'segmentor', lambda: segmentor(out_indices=(0, 1, 2, 3)),
            lambda m, x: [m(x).logits], dialect,
        ),
    }  # fmt: skip


# --- OpenMMLab -------------------------------------------------------------------------------------------------------


def mmseg_backbone(**options):
    import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

    # isort: split
    from mmseg.models.backbones import BEiT

    return BEiT(**{
        **dict(img_size=(SIZE, SIZE), embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, mlp_ratio=2, out_indices=TAPS,
               norm_cfg=dict(type='LN', eps=1e-6), init_values=0.1),
        **options,
    })  # fmt: skip


def mmseg_segmentor(ours=False, **options):
    """mmsegmentation's EncoderDecoder, with its own parts or with ours."""
    import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

    # isort: split
    from mmengine.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    bn = dict(type='BN')
    head = dict(channels=DIM, num_classes=CLASSES, norm_cfg=bn, dropout_ratio=0.0, align_corners=False,
                loss_decode=dict(type='mmseg.CrossEntropyLoss'))  # fmt: skip
    names = ('BEiTBackbone', 'BEiTPyramid', 'BEiTUPerHead') if ours else (
        'mmseg.BEiT', 'mmseg.Feature2Pyramid', 'mmseg.UPerHead')  # fmt: skip
    return MODELS.build(dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor'),
        backbone=dict(type=names[0], img_size=(SIZE, SIZE), embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS,
                      mlp_ratio=2, out_indices=TAPS, norm_cfg=dict(type='LN', eps=1e-6), **options),
        neck=dict(type=names[1], embed_dim=DIM, rescales=[4, 2, 1, 0.5], norm_cfg=bn),
        decode_head=dict(type=names[2], in_channels=[DIM] * 4, in_index=[0, 1, 2, 3], **head),
        auxiliary_head=dict(type='mmseg.FCNHead', in_channels=DIM, in_index=2, num_convs=1, concat_input=True,
                            **{**head, 'channels': 6}),
        test_cfg=dict(mode='whole'),
    ))  # fmt: skip


def raw_logits(model, x):
    return [model(x, mode='tensor')]


def mmpretrain_vit(name='BEiTViT', **options):
    import beit_plugin.mm  # noqa: F401  first: makes mmpretrain importable

    # isort: split
    import mmpretrain.models
    from mmpretrain.models.selfsup.beit import BEiTPretrainViT

    cls = BEiTPretrainViT if name == 'BEiTPretrainViT' else mmpretrain.models.BEiTViT
    arch = dict(embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=2 * DIM)
    return cls(**{'arch': arch, 'img_size': SIZE, 'layer_scale_init_value': 0.1, **options})


class MMClassifier(nn.Module):
    """Names and function of mmpretrain's ImageClassifier."""

    def __init__(self):
        super().__init__()
        self.backbone = mmpretrain_vit()
        from mmpretrain.models.heads import LinearClsHead

        self.head = LinearClsHead(num_classes=CLASSES, in_channels=DIM)

    def forward(self, x):
        return self.head(self.backbone(x))


class MMPretrainer(nn.Module):
    """Names and function of mmpretrain's self-supervisor BEiT, v1 or v2, less the tokenizer."""

    def __init__(self, v2):
        super().__init__()
        taps = [2, DEPTH - 1] if v2 else [DEPTH - 1]
        self.backbone = mmpretrain_vit('BEiTPretrainViT', final_norm=not v2, out_indices=taps)
        from mmpretrain.models.heads import BEiTV1Head, BEiTV2Head
        from mmpretrain.models.necks import BEiTV2Neck

        loss = dict(type='mmpretrain.CrossEntropyLoss')
        arch = dict(embed_dims=DIM, num_layers=DEPTH, depth=DEPTH, num_heads=HEADS, feedforward_channels=2 * DIM)
        if v2:
            self.neck = BEiTV2Neck(num_layers=2, early_layers=3, backbone_arch=arch, layer_scale_init_value=0.1)
        self.head = (BEiTV2Head if v2 else BEiTV1Head)(embed_dims=DIM, num_embed=VOCABULARY, loss=loss)

    def forward(self, x):
        features = self.backbone(x, MASK)
        if hasattr(self, 'neck'):
            features = self.neck(features, rel_pos_bias=self.backbone.shared_rel_pos_bias)
            return [self.head.cls_head(y) for y in features]
        return [self.head.cls_head(features[0][:, 1:])]


MM = ('mmseg', 'mmpretrain')
PEERS: dict[str, Case] = {
    'timm/encoder': _timm('encoder'),
    'timm/encoder, shared table': _timm('encoder', use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'timm/encoder, absolute positions': _timm('encoder', use_rel_pos_bias=False, use_abs_pos_emb=True),
    'timm/classifier': _timm('classifier', num_classes=CLASSES),
    'timm/classifier of [CLS]': _timm('classifier', num_classes=CLASSES, global_pool='token'),
    **_hf_cases('transformers'),
    **_hf_cases('transformers-v5'),
    'mmseg/encoder': Case(
        mmseg_backbone, backbone, outputs, outputs, 'mmseg', 'encoder', needs=('mmseg',)
    ),
    'mmseg/segmentor': Case(
        mmseg_segmentor, lambda: segmentor(out_indices=TAPS), raw_logits, outputs, 'mmseg', 'segmentor',
        needs=('mmseg',),
    ),
    'mmseg/segmentor into EncoderDecoder': Case(
        mmseg_segmentor, lambda: mmseg_segmentor(ours=True), raw_logits, raw_logits, 'mmseg', 'segmentor',
        needs=('mmseg',),
    ),
    'mmpretrain/encoder': Case(mmpretrain_vit, beit, outputs, outputs, 'mmpretrain', 'encoder', needs=MM),
    'mmpretrain/classifier': Case(
        MMClassifier, lambda: beit(num_classes=CLASSES), outputs, outputs, 'mmpretrain', 'classifier', needs=MM
    ),
    'mmpretrain/mim': Case(lambda: MMPretrainer(False), mim, outputs, all_logits, 'mmpretrain', 'mim', needs=MM),
    'mmpretrain/mim v2': Case(lambda: MMPretrainer(True), mim_v2, outputs, all_logits, 'mmpretrain', 'mim', needs=MM),
}  # fmt: skip


def build(case: Case) -> tuple[nn.Module, nn.Module]:
    """Theirs with random weights, and ours with other ones."""
    theirs, ours = randomize(case.theirs()), randomize(case.ours(), seed=1)
    theirs.eval()  # mmsegmentation's returns None
    ours.eval()
    return theirs, ours


def disk_state(model: nn.Module, folder) -> dict[str, Tensor]:
    """What transformers writes to disk."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / 'model.safetensors')


def written(name, folder):
    """A peer of random weights, and the file it wrote."""
    case = PEERS[name]
    for need in case.needs:
        if importlib.util.find_spec(need) is None:
            pytest.skip(f"pip install 'beit-plugin[{need}]'")
    theirs, _ = build(case)
    if case.dialect == 'transformers':
        disk_state(theirs, folder)
        return case, theirs, folder / 'model.safetensors'
    torch.save(theirs.state_dict(), folder / 'theirs.pth')
    return case, theirs, folder / 'theirs.pth'
