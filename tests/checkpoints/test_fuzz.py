"""Damaged checkpoints: never a silent partial load, and a failed load leaves the model as it was."""

import pytest
import torch
from checkpoints.peers import CLASSES, beit, mim, segmentor
from helpers import randomize
from hypothesis import given, settings
from hypothesis import strategies as st

from beit_plugin.checkpoints import CheckpointError, convert, detect, load
from beit_plugin.checkpoints.fit import own_names, part_of
from beit_plugin.checkpoints.tables import DIALECTS

MODELS = {
    'encoder': lambda: beit(),
    'classifier': lambda: beit(num_classes=CLASSES),
    'mim': lambda: mim(),
    'segmentor': lambda: segmentor(out_indices=(0, 2, 3, 4)),
}
HOSTS = [(task, name) for task in MODELS for name, dialect in DIALECTS.items() if task in dialect.layouts]
DROPPED = {'mmseg': ('fc_norm',), 'openmmlab': ('fc_norm',)}
SOURCES: dict[tuple[str, str], dict[str, torch.Tensor]] = {}


def source(task, dialect):
    if (task, dialect) not in SOURCES:
        drop = ('mask_token',) if dialect == 'timm' else DROPPED.get(dialect, ())
        SOURCES[task, dialect] = convert(randomize(MODELS[task]()).state_dict(), to=dialect, drop=drop)
    return dict(SOURCES[task, dialect])


@st.composite
def damage(draw, state):
    """A few changes to a checkpoint, and what was done."""
    names = sorted(state)
    done = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        if name not in state:
            continue
        tensor = state[name]
        kind = draw(
            st.sampled_from(['drop', 'rename', 'double', 'cut', 'turn', 'swap case', 'other number', 'integers'])
        )
        done.append((kind, name))
        if kind == 'drop':
            del state[name]
        elif kind == 'rename':
            position = draw(st.integers(0, len(name)))
            state[name[:position] + draw(st.sampled_from(['x', '.', '0', 'layer.', ''])) + name[position + 1 :]] = (
                state.pop(name)
            )
        elif kind == 'double':
            state[draw(st.sampled_from(['module.', 'x.', 'backbone.', 'beit.'])) + name] = tensor.clone()
        elif kind == 'cut':
            state[name] = tensor.flatten()[: max(tensor.numel() // 2, 1)].clone() if tensor.ndim else tensor[None]
        elif kind == 'turn':
            state[name] = tensor.flip(0).unsqueeze(-1) if tensor.ndim else tensor[None, None]
        elif kind == 'swap case':
            state[name.swapcase()] = state.pop(name)
        elif kind == 'integers':
            state[name] = tensor.to(torch.int32)
        else:
            state[name.replace('.1.', '.17.', 1)] = state.pop(name)
    return done


@settings(max_examples=60, deadline=None, derandomize=False)
@given(data=st.data())
@pytest.mark.parametrize('task', MODELS)
def test_all_or_nothing(task, data):
    dialect = data.draw(st.sampled_from([name for host, name in HOSTS if host == task]))
    state = source(task, dialect)
    whole = source(task, dialect)
    done = data.draw(damage(state))
    model = randomize(MODELS[task](), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        report = load(model, state)
    except CheckpointError as error:
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before), 'a failed load changed the model'
        assert '\n' not in str(error) and len(str(error)) < 700
        return
    # it loaded: then every parameter came from the undamaged file, or its part is missing there as a whole and said so
    after, own = model.state_dict(), own_names(model)
    reference = randomize(MODELS[task](), seed=2)
    load(reference, whole)
    expected = reference.state_dict()
    for ours, name in own.items():
        if part_of(ours) in report.fresh:
            assert torch.equal(after[name], before[name]), (name, done)
        elif ours != 'stages':
            assert torch.equal(after[name], expected[name]), (name, done)
    assert 'encoder' not in report.fresh
    assert report.loaded == sum(part_of(ours) not in report.fresh for ours in own)


@settings(max_examples=100, deadline=None)
@given(names=st.lists(st.text(max_size=60), max_size=20))
def test_names_of_anything(names):
    with pytest.raises(CheckpointError, match='no BEiT encoder of a known dialect'):
        detect({name: torch.zeros(1) for name in names})


def test_dropping_works_by_both_names():
    state = source('classifier', 'transformers')
    for drop in (('head',), ('classifier',), ('head.weight', 'head.bias')):
        model = randomize(beit(num_classes=3))
        before = model.head.weight.clone()
        report = load(model, state, drop=drop)
        assert torch.equal(model.head.weight, before) and report.fresh == ('head',)
    with pytest.raises(CheckpointError, match=r'head.weight is \(7, 16\) instead of \(3, 16\) \(another classifier'):
        load(beit(num_classes=3), state)
    with pytest.raises(CheckpointError, match="drop must be a sequence of names, got the string 'head'"):
        load(beit(num_classes=3), state, drop='head')


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(global_pool='token'), "trained without norm, which this model has; build it with global_pool='avg'"),
        (dict(depth=4), r'the model has no blocks.4.gamma_1'),
        (dict(depth=6), r'it lacks blocks.5.gamma_1'),
        (dict(embed_dim=8), r'cls_token is \(1, 1, 16\) instead of \(1, 1, 8\)'),
        (dict(use_abs_pos_emb=True), 'it lacks pos_embed'),
        (dict(use_rel_pos_bias=False), 'the model has no blocks.0.attn.relative_position_bias_table'),
    ],
)
def test_another_architecture(options, sentence):
    model = beit(num_classes=CLASSES, **options)
    with pytest.raises(CheckpointError, match=sentence):
        load(model, source('classifier', 'native'))


@pytest.mark.parametrize('to', ['nothing', ''])
def test_unknown_dialect(to):
    with pytest.raises(CheckpointError, match=f"unknown dialect '{to}'; known are timm, native, unilm"):
        convert(source('encoder', 'timm'), to=to)


def test_what_a_dialect_has_no_place_for():
    with pytest.raises(CheckpointError, match='timm has no mim, only encoder, classifier; name what to leave out'):
        convert(source('mim', 'native'), to='timm')
    with pytest.raises(CheckpointError, match='an encoder of timm has no place for mask_token; name'):
        convert(source('mim', 'native'), to='timm', drop=('lm_head',))
    with pytest.raises(CheckpointError, match='no table knows gate; name what to leave out'):
        convert({**source('encoder', 'timm'), 'gate': torch.ones(1)}, to='mmseg')


def test_models_of_others_are_sent_on():
    with pytest.raises(CheckpointError, match='Linear holds no encoder of beit_plugin; for a model of another package'):
        load(torch.nn.Linear(2, 2), source('encoder', 'timm'))
