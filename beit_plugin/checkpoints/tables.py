"""The rename tables: one per dialect; the way back is derived from it.

A row is (their name, our name). ``{i}`` stands for a number, ``{p}`` for weight or bias, ``{b}`` for what a batch norm
holds, ``{n}`` for what mmcv calls a norm layer. Our side may end in ``#q``, ``#k`` or ``#v``: that third of a fused
tensor. None: dropped on purpose, the model makes it anew.

Our names, whatever the model: those of ``Beit`` for the encoder and its task heads (``head``, ``lm_head``,
``cls_pt_layers``), ``pyramid.``, ``decode_head.`` and ``auxiliary_head.`` for the parts of a segmentor.
"""

from typing import NamedTuple

__all__ = ['DIALECTS', 'PARTS', 'TASKS', 'Dialect', 'Layout', 'Row']

Row = tuple[str, str | None]

# what a checkpoint or a model may have for one task and another be without; all else is the encoder
PARTS = (
    'mask_token', 'norm', 'fc_norm', 'head', 'lm_head', 'cls_pt_layers', 'pyramid', 'decode_head', 'auxiliary_head',
    'stages',
)  # fmt: skip
TASKS = ('encoder', 'classifier', 'mim', 'backbone', 'segmentor')


class Layout(NamedTuple):
    """How a dialect arranges the model of one task.

    Attributes:
        prefix: what stands before the names of the encoder.
        rows: names outside the encoder, written out in full.
        dropped: beginnings of names that belong to something else, such as the tokenizer of a pre-training.
    """

    prefix: str = ''
    rows: tuple[Row, ...] = ()
    dropped: tuple[str, ...] = ()


class Dialect(NamedTuple):
    """A way of naming the parameters of a BEiT.

    Attributes:
        name: what users call it.
        signature: a name that every encoder of the dialect has; what stands before it is the prefix.
        rows: the rename table of the encoder.
        layouts: by task; tasks that the dialect does not have are left out. ``mim v2`` is for those that arrange v2
            in another way than v1.
        leftovers: encoder rows that are read but never written.
        index: the host insists on the index buffer beside every bias table.
        tap_offset: how many blocks have run before the map that ``out_indices`` of its segmentor calls 0. It is 1
            where they count blocks from 0, and -1 in transformers, whose ``BeitForSemanticSegmentation`` reads
            ``hidden_states[i - 1]`` with the embeddings as the first of them.
    """

    name: str
    signature: str
    rows: tuple[Row, ...]
    layouts: dict[str, Layout]
    leftovers: tuple[Row, ...] = ()
    index: bool = False
    tap_offset: int = 1


_TABLE, _INDEX = 'relative_position_bias_table', 'relative_position_index'


def _under(prefix: str, rows: tuple[Row, ...], ours: str = '') -> tuple[Row, ...]:
    return tuple((prefix + row, None if target is None else ours + target) for row, target in rows)


# --- parts of a segmentor -------------------------------------------------------------------------------------------

# mmsegmentation 1.2.2, Feature2Pyramid; ours has the same names
_PYRAMID: tuple[Row, ...] = tuple(
    (name, name) for name in ('upsample_4x.0.{p}', 'upsample_4x.1.{b}', 'upsample_4x.3.{p}', 'upsample_2x.0.{p}')
)
# unilm beit/semantic_segmentation/backbone/beit.py, and transformers on disk
_FPN: tuple[Row, ...] = tuple(
    (theirs.replace('upsample_4x', 'fpn1').replace('upsample_2x', 'fpn2'), ours) for theirs, ours in _PYRAMID
)
_HF_FPN: tuple[Row, ...] = (
    ('fpn.fpn1.conv_transpose1.{p}', 'upsample_4x.0.{p}'),
    ('fpn.fpn1.normalization.{b}', 'upsample_4x.1.{b}'),
    ('fpn.fpn1.conv_transpose2.{p}', 'upsample_4x.3.{p}'),
    ('fpn.fpn2.{p}', 'upsample_2x.0.{p}'),
)
# ConvModules of mmsegmentation's UPerHead and FCNHead, and the same blocks in transformers
_UPER_BLOCKS = (
    ('psp_modules.{i}.1', 'psp_modules.blocks.{i}.conv'),
    ('bottleneck', 'psp_bottleneck'),
    ('lateral_convs.{i}', 'lateral_convs.{i}'),
    ('fpn_convs.{i}', 'fpn_convs.{i}'),
    ('fpn_bottleneck', 'fpn_bottleneck'),
)
_FCN_BLOCKS = (('convs.{i}', 'convs.{i}'), ('conv_cat', 'conv_cat'))


def _heads(conv: str, norm: str, classifier: str, hf_blocks: bool) -> tuple[Row, ...]:
    """Rows of decode head and auxiliary head, whose blocks hold a convolution and a norm of these names."""
    rows: list[Row] = []
    for head, blocks in (('decode_head', _UPER_BLOCKS), ('auxiliary_head', _FCN_BLOCKS)):
        for ours, hf in blocks:
            theirs = hf if hf_blocks else ours
            rows += [
                (f'{head}.{theirs}.{conv}.{{p}}', f'{head}.{ours}.conv.{{p}}'),
                (f'{head}.{theirs}.{norm}.{{b}}', f'{head}.{ours}.{"bn" if hf_blocks else norm}.{{b}}'),
            ]
        rows.append((f'{head}.{classifier}.{{p}}', f'{head}.conv_seg.{{p}}'))
    return tuple(rows)


_MMSEG_HEADS = _heads('conv', '{n}', 'conv_seg', False)
_HF_HEADS = _heads('convolution', 'normalization', 'classifier', True)
# on disk the blocks keep mmsegmentation's names, their classifier does not
_HF_DISK_HEADS = tuple((row.replace('{n}', 'bn').replace('conv_seg', 'classifier'), str(ours).replace('{n}', 'bn'))
                       for row, ours in _MMSEG_HEADS)  # fmt: skip

# --- our own names, unilm's and timm's -------------------------------------------------------------------------------

_BLOCK: tuple[Row, ...] = tuple(
    (name, name)
    for name in (
        'gamma_1', 'gamma_2', 'norm1.{p}', 'norm2.{p}', 'attn.q_bias', 'attn.k_bias', 'attn.v_bias', 'attn.qkv.weight',
        'attn.proj.{p}', f'attn.{_TABLE}', 'mlp.fc1.{p}', 'mlp.fc2.{p}',
    )
)  # fmt: skip
_STEM: tuple[Row, ...] = tuple(
    (name, name) for name in ('cls_token', 'pos_embed', 'patch_embed.proj.{p}', f'rel_pos_bias.{_TABLE}', 'norm.{p}')
)
_CLASSIFIER: tuple[Row, ...] = (('fc_norm.{p}', 'fc_norm.{p}'), ('head.{p}', 'head.{p}'))
# unilm beit2/modeling_pretrain.py: cls_pt_layers is the [CLS] branch of v2
_MIM: tuple[Row, ...] = (
    ('mask_token', 'mask_token'),
    ('lm_head.{p}', 'lm_head.{p}'),
    *_under('cls_pt_layers.{i}.', _BLOCK, 'cls_pt_layers.{i}.'),
)
_TIMM: tuple[Row, ...] = (*_STEM, *_CLASSIFIER, *_under('blocks.{i}.', _BLOCK, 'blocks.{i}.'))
_NATIVE: tuple[Row, ...] = (*_TIMM, *_MIM, ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'))
_UNILM: tuple[Row, ...] = (
    *_TIMM,
    *_MIM,
    (f'blocks.{{i}}.attn.{_INDEX}', None),
    (f'cls_pt_layers.{{i}}.attn.{_INDEX}', None),
    (f'rel_pos_bias.{_INDEX}', None),
    *_under('', _FPN, 'pyramid.'),
)
# BEiTBackbone holds its blocks as ``layers``, the name that mmsegmentation's layer decay looks for
_OPENMMLAB: tuple[Row, ...] = (
    *_STEM,
    ('mask_token', 'mask_token'),
    ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
    *_under('layers.{i}.', _BLOCK, 'blocks.{i}.'),
)

# --- OpenMMLab: mmsegmentation 1.2.2 and mmpretrain 1.2.0, each models/backbones/beit.py ------------------------------

_MM_BLOCK: tuple[Row, ...] = (
    ('gamma_1', 'gamma_1'),
    ('gamma_2', 'gamma_2'),
    ('ln1.{p}', 'norm1.{p}'),
    ('ln2.{p}', 'norm2.{p}'),
    ('attn.q_bias', 'attn.q_bias'),
    ('attn.v_bias', 'attn.v_bias'),
    ('attn.qkv.weight', 'attn.qkv.weight'),
    ('attn.proj.{p}', 'attn.proj.{p}'),
    (f'attn.{_TABLE}', f'attn.{_TABLE}'),
    ('ffn.layers.0.0.{p}', 'mlp.fc1.{p}'),
    ('ffn.layers.1.{p}', 'mlp.fc2.{p}'),
)
_MMSEG: tuple[Row, ...] = (
    ('cls_token', 'cls_token'),
    ('patch_embed.projection.{p}', 'patch_embed.proj.{p}'),
    ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
    ('ln1.{p}', 'norm.{p}'),
    *_under('layers.{i}.', _MM_BLOCK, 'blocks.{i}.'),
    (f'layers.{{i}}.attn.{_INDEX}', None),
)
# mmsegmentation's tools/model_converters/beit2mmseg.py writes the patch embedding twice and renames only the blocks
_BEIT2MMSEG: tuple[Row, ...] = (
    ('patch_embed.proj.{p}', None),
    (f'rel_pos_bias.{_INDEX}', None),
    *(row for row in (*_STEM, *_CLASSIFIER, *_MIM) if not row[0].startswith(('cls_token', 'patch_embed', 'cls_pt'))),
)
_MMPRETRAIN: tuple[Row, ...] = (
    *_MMSEG,
    ('pos_embed', 'pos_embed'),
    ('mask_token', 'mask_token'),
    ('ln2.{p}', 'fc_norm.{p}'),
    (f'rel_pos_bias.{_TABLE}', f'rel_pos_bias.{_TABLE}'),
    (f'rel_pos_bias.{_INDEX}', None),
)
_MMPRETRAIN_MIM: tuple[Row, ...] = (('head.cls_head.{p}', 'lm_head.{p}'),)
_MMPRETRAIN_V2: tuple[Row, ...] = (
    *_MMPRETRAIN_MIM,
    ('neck.norm.{p}', 'norm.{p}'),  # BEiTV2Neck has the final norm
    *_under('neck.patch_aggregation.{i}.', _MM_BLOCK, 'cls_pt_layers.{i}.'),
    (f'neck.patch_aggregation.{{i}}.attn.{_INDEX}', None),
)

# --- transformers 5.24 modeling_beit.py, in memory and on disk (hub files and what save_pretrained writes) -----------

_HF_STEM: tuple[Row, ...] = (
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.mask_token', 'mask_token'),
    ('embeddings.position_embeddings', 'pos_embed'),
    ('embeddings.patch_embeddings.projection.{p}', 'patch_embed.proj.{p}'),
    ('layernorm.{p}', 'norm.{p}'),
    ('pooler.layernorm.{p}', 'fc_norm.{p}'),
)
_HF_BLOCK: tuple[Row, ...] = (
    ('lambda_1', 'gamma_1'),
    ('lambda_2', 'gamma_2'),
    ('layernorm_before.{p}', 'norm1.{p}'),
    ('layernorm_after.{p}', 'norm2.{p}'),
)
_HF_V5: tuple[Row, ...] = (
    *_HF_STEM,
    (f'shared_position_bias.{_TABLE}', f'rel_pos_bias.{_TABLE}'),
    *_under('layers.{i}.', _HF_BLOCK, 'blocks.{i}.'),
    *((f'layers.{{i}}.attention.{x}_proj.weight', f'blocks.{{i}}.attn.qkv.weight#{x}') for x in 'qkv'),
    *((f'layers.{{i}}.attention.{x}_proj.bias', f'blocks.{{i}}.attn.{x}_bias') for x in 'qkv'),
    ('layers.{i}.attention.o_proj.{p}', 'blocks.{i}.attn.proj.{p}'),
    ('layers.{i}.mlp.fc1.{p}', 'blocks.{i}.mlp.fc1.{p}'),
    ('layers.{i}.mlp.fc2.{p}', 'blocks.{i}.mlp.fc2.{p}'),
    (f'layers.{{i}}.relative_position_bias.{_TABLE}', f'blocks.{{i}}.attn.{_TABLE}'),
)
_LAYER = 'encoder.layer.{i}.'
_SELF = f'{_LAYER}attention.attention.'
_HF_PARTS = {'q': 'query', 'k': 'key', 'v': 'value'}
_HF_DISK: tuple[Row, ...] = (
    *_HF_STEM,
    (f'encoder.relative_position_bias.{_TABLE}', f'rel_pos_bias.{_TABLE}'),
    (f'encoder.relative_position_bias.{_INDEX}', None),
    *_under(_LAYER, _HF_BLOCK, 'blocks.{i}.'),
    *((f'{_SELF}{name}.weight', f'blocks.{{i}}.attn.qkv.weight#{x}') for x, name in _HF_PARTS.items()),
    *((f'{_SELF}{name}.bias', f'blocks.{{i}}.attn.{x}_bias') for x, name in _HF_PARTS.items()),
    (f'{_LAYER}attention.output.dense.{{p}}', 'blocks.{i}.attn.proj.{p}'),
    (f'{_LAYER}intermediate.dense.{{p}}', 'blocks.{i}.mlp.fc1.{p}'),
    (f'{_LAYER}output.dense.{{p}}', 'blocks.{i}.mlp.fc2.{p}'),
    (f'{_SELF}relative_position_bias.{_TABLE}', f'blocks.{{i}}.attn.{_TABLE}'),
    (f'{_SELF}relative_position_bias.{_INDEX}', None),
)


def _hf_layouts(backbone_prefix: str, fpn: tuple[Row, ...], heads: tuple[Row, ...]) -> dict[str, Layout]:
    pyramid = _under('', fpn, 'pyramid.')
    return {
        'encoder': Layout(),
        'classifier': Layout('beit.', (('classifier.{p}', 'head.{p}'),)),
        # the norm of BeitForMaskedImageModeling stands outside of its encoder
        'mim': Layout('beit.', (('layernorm.{p}', 'norm.{p}'), ('lm_head.{p}', 'lm_head.{p}'))),
        'backbone': Layout(backbone_prefix, pyramid),
        'segmentor': Layout('beit.', (*pyramid, *heads)),
    }


_ONE = {task: Layout() for task in ('encoder', 'classifier', 'mim')}
_NECK = (*_under('neck.', _PYRAMID, 'pyramid.'), *_MMSEG_HEADS)
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect('timm', 'blocks.{i}.norm1.weight', _TIMM, {task: Layout() for task in ('encoder', 'classifier')}),
        Dialect(
            'native',
            'blocks.{i}.norm1.weight',
            _NATIVE,
            {
                **_ONE,
                'backbone': Layout('', _under('fpn.', _PYRAMID, 'pyramid.')),
                'segmentor': Layout(
                    'backbone.',
                    (*_under('pyramid.', _PYRAMID, 'pyramid.'), *_MMSEG_HEADS, ('_extra_state', 'stages')),
                ),
            },
        ),
        Dialect(
            'unilm',
            'blocks.{i}.norm1.weight',
            _UNILM,
            {**_ONE, 'backbone': Layout(), 'segmentor': Layout('backbone.', _MMSEG_HEADS)},
            index=True,
        ),
        Dialect(
            'openmmlab',
            'layers.{i}.norm1.weight',
            _OPENMMLAB,
            {
                'encoder': Layout(),
                'backbone': Layout('', _under('fpn.', _PYRAMID, 'pyramid.')),
                # the pyramid may be in the backbone (add_fpn) instead of the neck
                'segmentor': Layout('backbone.', (*_NECK, *_under('backbone.fpn.', _PYRAMID, 'pyramid.'))),
            },
        ),
        Dialect(
            'mmseg',
            'layers.{i}.ln1.weight',
            _MMSEG,
            {'encoder': Layout(), 'segmentor': Layout('backbone.', _NECK)},
            _BEIT2MMSEG,
            index=True,
        ),
        Dialect(
            'mmpretrain',
            'layers.{i}.ln1.weight',
            _MMPRETRAIN,
            {
                'encoder': Layout(),
                'classifier': Layout('backbone.', (('head.fc.{p}', 'head.{p}'),)),
                'mim': Layout('backbone.', _MMPRETRAIN_MIM, ('target_generator.',)),
                'mim v2': Layout('backbone.', _MMPRETRAIN_V2, ('target_generator.',)),
            },
            index=True,
        ),
        Dialect(
            'transformers',
            'encoder.layer.{i}.layernorm_before.weight',
            _HF_DISK,
            _hf_layouts('', _FPN, _HF_DISK_HEADS),
            tap_offset=-1,
        ),
        Dialect(
            'transformers-v5',
            'layers.{i}.layernorm_before.weight',
            _HF_V5,
            _hf_layouts('beit.', _HF_FPN, _HF_HEADS),
            tap_offset=-1,
        ),
    )
}
