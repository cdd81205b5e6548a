"""The rename tables: one per dialect; the way back is derived from it.

A row is (their name, our name). ``{i}`` stands for a layer number, ``{p}`` for ``weight`` or ``bias``. Our side may end
in ``#q``, ``#k`` or ``#v``: that third of a fused tensor. None: dropped on purpose, the model makes it anew.
"""

from typing import NamedTuple

__all__ = ['DIALECTS', 'Dialect', 'Row']

Row = tuple[str, str | None]


class Dialect(NamedTuple):
    """A way of naming the parameters of a BEiT encoder.

    Attributes:
        name: what users call it.
        signature: a name that every checkpoint of the dialect has and no other dialect's; it tells the dialect, and
            what stands before it is the prefix of the encoder.
        rows: the rename table of the encoder.
        task_rows: what task models of the dialect hold beside the encoder, by its full name there.
    """

    name: str
    signature: str
    rows: tuple[Row, ...]
    task_rows: tuple[Row, ...] = ()


_SAME = tuple(
    (name, name)
    for name in (
        'cls_token',
        'mask_token',
        'pos_embed',
        'patch_embed.proj.{p}',
        'patch_embed.norm.{p}',
        'rel_pos_bias.relative_position_bias_table',
        'blocks.{i}.gamma_1',
        'blocks.{i}.gamma_2',
        'blocks.{i}.norm1.{p}',
        'blocks.{i}.norm2.{p}',
        'blocks.{i}.attn.q_bias',
        'blocks.{i}.attn.k_bias',
        'blocks.{i}.attn.v_bias',
        'blocks.{i}.attn.qkv.weight',
        'blocks.{i}.attn.proj.{p}',
        'blocks.{i}.attn.relative_position_bias_table',
        'blocks.{i}.mlp.fc1.{p}',
        'blocks.{i}.mlp.fc2.{p}',
        'norm.{p}',
        'fc_norm.{p}',
        'head.{p}',
        'lm_head.{p}',
    )
)

# ours, unilm's and timm's encoder agree to the letter; the index is a buffer of older checkpoints
_NATIVE: tuple[Row, ...] = (
    *_SAME,
    ('blocks.{i}.attn.relative_position_index', None),
    ('rel_pos_bias.relative_position_index', None),
)

# BEiTBackbone holds its blocks as ``layers``, the name that mmsegmentation's layer decay looks for
_OPENMMLAB_NATIVE: tuple[Row, ...] = tuple((theirs.replace('blocks.', 'layers.', 1), ours) for theirs, ours in _NATIVE)

# mmsegmentation 1.2.2, mmseg/models/backbones/beit.py
_MMSEG: tuple[Row, ...] = (
    ('cls_token', 'cls_token'),
    ('patch_embed.projection.{p}', 'patch_embed.proj.{p}'),
    ('patch_embed.norm.{p}', 'patch_embed.norm.{p}'),
    ('layers.{i}.gamma_1', 'blocks.{i}.gamma_1'),
    ('layers.{i}.gamma_2', 'blocks.{i}.gamma_2'),
    ('layers.{i}.ln1.{p}', 'blocks.{i}.norm1.{p}'),
    ('layers.{i}.ln2.{p}', 'blocks.{i}.norm2.{p}'),
    ('layers.{i}.attn.q_bias', 'blocks.{i}.attn.q_bias'),
    ('layers.{i}.attn.v_bias', 'blocks.{i}.attn.v_bias'),
    ('layers.{i}.attn.qkv.weight', 'blocks.{i}.attn.qkv.weight'),
    ('layers.{i}.attn.proj.{p}', 'blocks.{i}.attn.proj.{p}'),
    ('layers.{i}.attn.relative_position_bias_table', 'blocks.{i}.attn.relative_position_bias_table'),
    ('layers.{i}.attn.relative_position_index', None),
    ('layers.{i}.ffn.layers.0.0.{p}', 'blocks.{i}.mlp.fc1.{p}'),
    ('layers.{i}.ffn.layers.1.{p}', 'blocks.{i}.mlp.fc2.{p}'),
    ('ln1.{p}', 'norm.{p}'),
)

_HF_EMBEDDINGS: tuple[Row, ...] = (
    ('embeddings.cls_token', 'cls_token'),
    ('embeddings.mask_token', 'mask_token'),
    ('embeddings.position_embeddings', 'pos_embed'),
    ('embeddings.patch_embeddings.projection.{p}', 'patch_embed.proj.{p}'),
    ('layernorm.{p}', 'norm.{p}'),
    ('pooler.layernorm.{p}', 'fc_norm.{p}'),
)

# BeitForImageClassification, and BeitForMaskedImageModeling with a final norm of its own
_HF_TASKS: tuple[Row, ...] = (
    ('classifier.{p}', 'head.{p}'),
    ('layernorm.{p}', 'norm.{p}'),
    ('lm_head.{p}', 'lm_head.{p}'),
)

# transformers 5.23, modeling_beit.py, as in memory
_HF_V5: tuple[Row, ...] = (
    *_HF_EMBEDDINGS,
    ('shared_position_bias.relative_position_bias_table', 'rel_pos_bias.relative_position_bias_table'),
    ('layers.{i}.lambda_1', 'blocks.{i}.gamma_1'),
    ('layers.{i}.lambda_2', 'blocks.{i}.gamma_2'),
    ('layers.{i}.layernorm_before.{p}', 'blocks.{i}.norm1.{p}'),
    ('layers.{i}.layernorm_after.{p}', 'blocks.{i}.norm2.{p}'),
    ('layers.{i}.attention.q_proj.weight', 'blocks.{i}.attn.qkv.weight#q'),
    ('layers.{i}.attention.k_proj.weight', 'blocks.{i}.attn.qkv.weight#k'),
    ('layers.{i}.attention.v_proj.weight', 'blocks.{i}.attn.qkv.weight#v'),
    ('layers.{i}.attention.q_proj.bias', 'blocks.{i}.attn.q_bias'),
    ('layers.{i}.attention.v_proj.bias', 'blocks.{i}.attn.v_bias'),
    ('layers.{i}.attention.o_proj.{p}', 'blocks.{i}.attn.proj.{p}'),
    ('layers.{i}.mlp.fc1.{p}', 'blocks.{i}.mlp.fc1.{p}'),
    ('layers.{i}.mlp.fc2.{p}', 'blocks.{i}.mlp.fc2.{p}'),
    (
        'layers.{i}.relative_position_bias.relative_position_bias_table',
        'blocks.{i}.attn.relative_position_bias_table',
    ),
)

# the same models on disk: hub files and what save_pretrained writes
_HF_DISK: tuple[Row, ...] = (
    *_HF_EMBEDDINGS,
    ('encoder.relative_position_bias.relative_position_bias_table', 'rel_pos_bias.relative_position_bias_table'),
    ('encoder.relative_position_bias.relative_position_index', None),
    ('encoder.layer.{i}.lambda_1', 'blocks.{i}.gamma_1'),
    ('encoder.layer.{i}.lambda_2', 'blocks.{i}.gamma_2'),
    ('encoder.layer.{i}.layernorm_before.{p}', 'blocks.{i}.norm1.{p}'),
    ('encoder.layer.{i}.layernorm_after.{p}', 'blocks.{i}.norm2.{p}'),
    ('encoder.layer.{i}.attention.attention.query.weight', 'blocks.{i}.attn.qkv.weight#q'),
    ('encoder.layer.{i}.attention.attention.key.weight', 'blocks.{i}.attn.qkv.weight#k'),
    ('encoder.layer.{i}.attention.attention.value.weight', 'blocks.{i}.attn.qkv.weight#v'),
    ('encoder.layer.{i}.attention.attention.query.bias', 'blocks.{i}.attn.q_bias'),
    ('encoder.layer.{i}.attention.attention.value.bias', 'blocks.{i}.attn.v_bias'),
    ('encoder.layer.{i}.attention.output.dense.{p}', 'blocks.{i}.attn.proj.{p}'),
    ('encoder.layer.{i}.intermediate.dense.{p}', 'blocks.{i}.mlp.fc1.{p}'),
    ('encoder.layer.{i}.output.dense.{p}', 'blocks.{i}.mlp.fc2.{p}'),
    (
        'encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_bias_table',
        'blocks.{i}.attn.relative_position_bias_table',
    ),
    ('encoder.layer.{i}.attention.attention.relative_position_bias.relative_position_index', None),
)

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect('native', 'blocks.{i}.norm1.weight', _NATIVE),
        Dialect('native-openmmlab', 'layers.{i}.norm1.weight', _OPENMMLAB_NATIVE),
        Dialect('mmseg', 'layers.{i}.ln1.weight', _MMSEG),
        Dialect('transformers', 'layers.{i}.layernorm_before.weight', _HF_V5, _HF_TASKS),
        Dialect('transformers-disk', 'encoder.layer.{i}.layernorm_before.weight', _HF_DISK, _HF_TASKS),
    )
}
