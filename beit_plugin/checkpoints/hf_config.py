"""The configuration of transformers' BEiT (``BeitConfig``, ``config.json``) as arguments of our models, and back.

Source: transformers 5.24, ``models/beit/modeling_beit.py``, and the files that its 4.x releases wrote. What is one
option on both sides is a row in ``hf_options``; here is what depends on several.

Left out, for a configuration cannot say it and no weight depends on it: ``rel_pos_resize`` (transformers always resizes
bilinearly), ``attn_backend``, and the scaling of initial weights (``head_init_scale`` and that of deep blocks).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .convert import some
from .errors import CheckpointError, brief
from .hf_options import ENCODER, OF_TASK, ROWS, Task, is_whole, stage_names

__all__ = ['HFConfig', 'read_config', 'read_json', 'write_config']

_NESTED = 20  # levels of a JSON file; those of transformers have 3

_ARCHITECTURES: dict[Task, str] = {
    'encoder': 'BeitModel',
    'classifier': 'BeitForImageClassification',
    'mim': 'BeitForMaskedImageModeling',
    'segmentor': 'BeitForSemanticSegmentation',
    'backbone': 'BeitBackbone',
}
# what every configuration of transformers may hold beside the options of its model; it is kept as it is
_COMMON = frozenset(
    'architectures model_type transformers_version id2label label2id num_labels problem_type dtype torch_dtype '
    '_name_or_path _commit_hash _attn_implementation_autoset attn_implementation output_attentions return_dict '
    'output_hidden_states torchscript use_bfloat16 chunk_size_feed_forward is_encoder_decoder gradient_checkpointing '
    'finetuning_task'.split()
)


class HFConfig(NamedTuple):
    """A configuration of transformers, read.

    Attributes:
        task: what the model does, by ``architectures``; ``encoder`` where they are missing or not BEiT's.
        arguments: keyword arguments of our model of that task: ``Beit`` (encoder, classifier), ``BeitBackbone``,
            ``BeitForMaskedImageModeling`` (mim), ``build_segmentor``.
        raw: the configuration as it was, for ``write_config``: labels, dtype, options that the task has no use for.
    """

    task: Task
    arguments: dict[str, Any]
    raw: dict[str, Any]

    @property
    def taps(self) -> tuple[int, ...] | None:
        """Blocks whose outputs a segmentor or backbone reads, from 0, -1 for the embeddings; None for others."""
        if 'out_indices' in self.arguments:
            return self.arguments['out_indices']
        names = self.arguments.get('out_features')
        return names and tuple(int(name.replace('stem', 'stage0').removeprefix('stage')) - 1 for name in names)


def read_config(source: str | Path | Mapping[str, Any], strict: bool = True) -> HFConfig:
    """Reads a configuration; options that it leaves out have the defaults of ``BeitConfig``.

    Args:
        source: a ``config.json``, the folder that it lies in, or its contents.
        strict: whether options that transformers' BEiT does not have are an error; where only weights are wanted they
            mean nothing.

    Raises:
        CheckpointError: no such file, cut off, of another model, an option that transformers' BEiT does not have or a
            value that it cannot take, or one that our model of the task cannot take.
    """
    raw = dict(source) if isinstance(source, Mapping) else _load(Path(source))
    options, _ = _options(raw, strict)
    names = raw.get('architectures') or []
    if not isinstance(names, list | tuple):
        raise CheckpointError(f'architectures must be a list of names, got {brief(names)}')
    known: list[Task] = [task for task, name in _ARCHITECTURES.items() if name in names]
    task = known[0] if known else 'encoder'
    arguments = _arguments(options, task)
    num_labels = _num_labels(raw)
    if task in ('classifier', 'segmentor'):
        arguments['num_classes'] = num_labels
    elif task == 'encoder':
        arguments['num_classes'] = 0
    return HFConfig(task, arguments, raw)


def write_config(model: nn.Module, raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Makes the configuration with which transformers builds the same model: what ``config.json`` would hold.

    Args:
        model: one of ours (see ``HFConfig.arguments``); only read.
        raw: ``HFConfig.raw`` of the configuration that it came from. It gives what the model cannot know (names of
            labels, options of other tasks), and how to write a value where there are several ways.

    Raises:
        CheckpointError: not one of our models, or it has something that transformers has no option for.
    """
    given, rest = _options(raw or {})
    task = _task_of(model)
    encoder: Any = model.backbone if task == 'segmentor' else model
    if not len(encoder.blocks):
        raise CheckpointError('a model without blocks has no configuration')
    _refuse(model, encoder, task)
    own = dict(given)
    for row in ENCODER + OF_TASK[task]:
        values = list(row.get(encoder if row in ENCODER else model))
        if any(value != values[0] for value in values):
            raise CheckpointError(f'{row.theirs} is one value for the whole model in transformers, but here {values}')
        if values:
            own[row.theirs] = float(values[0]) if isinstance(row.default, float) else values[0]
    depth = own['num_hidden_layers']
    if ROWS['out_indices'] not in OF_TASK[task] and depth != given['num_hidden_layers']:
        own.update(out_features=None, out_indices=None, add_fpn=False)  # of another model: its stages are not ours
    if own['out_indices'] is None or own['out_features'] is None:
        stages = _stages(own)
        own.update(out_indices=stages, out_features=[stage_names(depth)[i] for i in stages])
    meaning = _arguments(own, task)
    for name, value in given.items():
        if name in (raw or {}) and value not in (None, own[name]) and _means({**own, name: value}, task, meaning):
            own[name] = value
    if task in ('classifier', 'segmentor') and (raw is None or _num_labels(rest) != model.num_classes):
        rest.pop('num_labels', None)
        names = [f'LABEL_{i}' for i in range(int(model.num_classes))]  # type: ignore
        rest['id2label'] = {str(i): name for i, name in enumerate(names)}
        rest['label2id'] = {name: i for i, name in enumerate(names)}
    described = {'architectures': [_ARCHITECTURES[task]], 'model_type': 'beit', 'stage_names': stage_names(depth)}
    return {**rest, **own, **described}


def _load(path: Path) -> dict[str, Any]:
    path = path / 'config.json' if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist; give a config.json, its folder or its contents')
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: cut off, no JSON, no object, or nested far deeper than transformers nests.
    """
    try:
        loaded = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{path} is cut off or no JSON ({error}); fetch or save it again') from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f'{path} holds a {type(loaded).__name__}, expected an object with names')
    if _is_deeper(loaded, _NESTED):
        raise CheckpointError(f'{path} nests more than {_NESTED} levels, so it is none of transformers; fetch it again')
    return loaded


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


def _options(raw: Mapping[str, Any], strict: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """All options of a configuration, and what else it holds."""
    if raw.get('model_type', 'beit') != 'beit':
        raise CheckpointError(f"this is the configuration of model_type {brief(raw['model_type'])}, not of 'beit'")
    found = {name: value for name, value in raw.items() if name not in ('stage_names', 'segmentation_indices')}
    if found.get('out_indices') is None and 'segmentation_indices' in raw:
        found['out_indices'] = raw['segmentation_indices']  # its name in some 4.x releases
    unknown = [str(name) for name in found if name not in ROWS and name not in _COMMON]
    if strict and unknown:
        raise CheckpointError(f"{some(unknown)}: transformers' BEiT has no such option; correct or remove it")
    options = {name: found.get(name, row.default) for name, row in ROWS.items()}
    return options, {name: value for name, value in found.items() if name not in ROWS}


def _num_labels(raw: Mapping[str, Any]) -> int:
    labels, number = raw.get('id2label'), raw.get('num_labels')
    if not isinstance(labels, Mapping | None) or not (number is None or is_whole(number, 0)):
        got = f'{brief(labels)}, {brief(number)}'
        raise CheckpointError(f'id2label must name labels and num_labels be their number, got {got}')
    counted = number if labels is None else len(labels)
    if number is not None and number != counted:
        raise CheckpointError(f'num_labels is {number}, but id2label has {counted}')
    return 2 if counted is None else counted  # 2: as transformers


def _stages(options: Mapping[str, Any]) -> list[int]:
    """Stages by number, 0 for the stem, that both ways of naming them mean; the last one where neither does."""
    depth, names, indices = (options[name] for name in ('num_hidden_layers', 'out_features', 'out_indices'))
    known = stage_names(depth)
    wrong = [name for name in names or () if name not in known]
    wrong += [i for i in indices or () if not -depth - 1 <= i <= depth]
    if wrong:
        raise CheckpointError(
            f'out_features or out_indices has {brief(wrong)}, but stages are stem (0) to stage{depth}'
        )
    by_name = None if names is None else [known.index(name) for name in names]
    by_index = None if indices is None else [i % (depth + 1) for i in indices]
    stages = by_index if by_index is not None else by_name if by_name is not None else [depth]
    if by_name not in (None, stages):
        raise CheckpointError(f'out_features {brief(names)} and out_indices {brief(indices)} are not the same stages')
    if stages != sorted(set(stages)):
        raise CheckpointError(
            f'transformers takes each stage once and in ascending order, but these are {brief(stages)}'
        )
    return stages


def _arguments(options: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What all options mean for a task, by our names; raises CheckpointError where they mean nothing."""
    read = {}
    for name, row in ROWS.items():
        try:
            read[name] = row.read(options[name])
        except ValueError as error:
            raise CheckpointError(f'{name} must be {error}, got {brief(options[name])}') from None
    arguments = {ours: read[row.theirs] for row in ENCODER + OF_TASK[task] for ours in row.ours.split()}
    arguments['mlp_ratio'] = read['intermediate_size'] / read['hidden_size']
    # transformers does not see what lies beyond the last whole patch, ours would pad it to a patch
    arguments['img_size'] = tuple(s // p * p for s, p in zip(read['image_size'], read['patch_size'], strict=True))
    if 0 in arguments['img_size']:
        raise CheckpointError(f'image_size {options["image_size"]} is less than a patch of {options["patch_size"]}')
    stages, depth = _stages(options), read['num_hidden_layers']
    if len(stages) != 4 and (read['add_fpn'] or task == 'segmentor'):
        raise CheckpointError(f'a pyramid needs exactly 4 out_indices, got {brief(options["out_indices"])}')
    if task == 'mim' and read['use_mean_pooling'] == 'token':
        raise CheckpointError('without use_mean_pooling transformers normalises twice before its MIM head, ours once')
    if task == 'backbone':
        arguments['out_features'] = tuple(stage_names(depth)[i] for i in stages)
        if read['add_fpn'] and max(read['patch_size']) == 8:
            raise CheckpointError('add_fpn with patches of 8: transformers makes strides 2 to 16 of them, ours 4 to 32')
    if task == 'segmentor':
        # theirs reads hidden_states[i - 1], the first of them the embeddings: 2 is block 0, and 0 wraps to the last
        blocks_run = [(i - 1) % (depth + 1) for i in stages]
        if 0 in blocks_run:
            arguments['out_features'] = tuple(stage_names(depth)[i] for i in blocks_run)
        else:
            arguments['out_indices'] = tuple(i - 1 for i in blocks_run)
        arguments['decoder_drop_rate'] = 0.0  # their heads have none
    return arguments


def _means(options: Mapping[str, Any], task: Task, meaning: dict[str, Any]) -> bool:
    try:
        return _arguments(options, task) == meaning
    except CheckpointError:
        return False


def _task_of(model: Any) -> Task:
    if hasattr(model, 'pyramid'):  # mmsegmentation's has a neck
        return 'segmentor'
    if not hasattr(model, 'rel_pos_resize'):  # timm's Beit has none
        raise CheckpointError(f'a {type(model).__name__} is none of the models that transformers and we have')
    if hasattr(model, 'lm_head'):
        return 'mim'
    return 'backbone' if hasattr(model, 'stages') else 'classifier' if model.num_classes else 'encoder'


def _refuse(model: Any, encoder: Any, task: Task) -> None:
    """Names everything in a model that no option of transformers can say."""
    embed, norms = encoder.patch_embed, [not isinstance(norm, nn.Identity) for norm in (encoder.norm, encoder.fc_norm)]
    found = {
        'patch_norm': not isinstance(embed.norm, nn.Identity),
        'qkv_bias=False': any(block.attn.q_bias is None for block in encoder.blocks),
        f'img_size={embed.img_size}, no multiple of the patch': any(
            s % p for s, p in zip(embed.img_size, embed.patch_size, strict=True)
        ),
        f'drop_rate={encoder.head_drop.p}': encoder.num_classes and encoder.head_drop.p > 0,
        'the [CLS] branch of BEiT v2': len(getattr(model, 'cls_pt_layers', ())) > 0,
        'a MIM head without the one norm before it': task == 'mim' and norms != [True, False],
    }
    if task in ('backbone', 'segmentor'):
        pyramid = encoder.fpn if task == 'backbone' else model.pyramid
        found['a final norm (final_norm, use_fc_norm) of feature maps'] = any(norms)
        found['a classifier of feature maps'] = encoder.num_classes > 0
        if pyramid is not None:
            found[f'a pyramid of {pyramid.rescales} times the grid'] = pyramid.rescales != (4, 2, 1, 0.5)
            if 4 in pyramid.rescales:
                norm = pyramid.upsample_4x[1]
                found['another norm than BatchNorm (eps 1e-5) in the pyramid'] = not _is_batch_norm(norm)
    if task == 'segmentor':
        head, auxiliary = model.decode_head, model.auxiliary_head
        heads = [head] if auxiliary is None else [head, auxiliary]
        widths = (head.conv_seg.in_channels, *head.level_channels)
        layers = [layer for layer in model.modules() if hasattr(layer, 'norm_name')]
        last = len(encoder.blocks)
        found |= {
            f'block {last - 1}, the last, in out_indices (its segmentor reads hidden_states[i - 1])': (
                last in encoder.stages[1:]
            ),
            f'channels={widths[0]} beside embed_dim={encoder.embed_dim}': any(w != encoder.embed_dim for w in widths),
            'align_corners=True': head.align_corners,
            f'decoder_drop_rate={head.dropout.p}': any(h.dropout.p > 0 for h in heads),
            'another norm than BatchNorm (eps 1e-5) in the heads': not all(_is_batch_norm(x.norm) for x in layers),
            'another activation than ReLU in the heads': not all(isinstance(x.activate, nn.ReLU) for x in layers),
        }
        if auxiliary is not None:
            convs = [x.conv for x in (*auxiliary.convs, *([auxiliary.conv_cat] if auxiliary.conv_cat else []))]
            found |= {
                f'auxiliary_index={model.auxiliary_index}': model.auxiliary_index != 2,
                'kernels other than 3 in the auxiliary head': any(c.kernel_size != (3, 3) for c in convs),
                'dilation in the auxiliary head': any(c.dilation != (1, 1) for c in convs),
                'heads of different classes': auxiliary.conv_seg.out_channels != head.conv_seg.out_channels,
            }
    if any(found.values()):
        named = ', '.join(name for name, is_so in found.items() if is_so)
        raise CheckpointError(f"transformers' BEiT has no option for {named}")


def _is_batch_norm(norm: Any) -> bool:
    return isinstance(norm, _BatchNorm) and norm.eps == 1e-5
