"""Every peer, every task: its checkpoint in its own format gives its outputs in our model, and goes back."""

import importlib.util

import pytest
import torch
from checkpoints.peers import PEERS, build, disk_state
from helpers import images, relative_error

from beit_plugin.checkpoints import convert, detect, load, save
from beit_plugin.checkpoints.files import read_state_dict

CASES = [
    pytest.param(
        case,
        id=name,
        marks=[
            pytest.mark.skipif(importlib.util.find_spec(need) is None, reason=f"pip install 'beit-plugin[{need}]'")
            for need in case.needs
        ],
    )
    for name, case in PEERS.items()
]


def state_of(case, theirs, folder):
    return disk_state(theirs, folder) if case.dialect == 'transformers' else theirs.state_dict()


@pytest.mark.parametrize('case', CASES)
def test_loads_and_goes_back(case, tmp_path):
    theirs, ours = build(case)
    x = images(32, 32)
    expected = case.run_theirs(theirs, x)
    state = state_of(case, theirs, tmp_path)
    found = detect(state)
    assert (found.task, found.unknown) == (case.task, ())
    report = load(ours, tmp_path if case.dialect == 'transformers' else state)
    assert report.loaded and not report.fresh
    got = case.run_ours(ours, x)
    assert len(got) == len(expected)
    assert max(map(relative_error, got, expected)) <= 1e-5

    # and back, into another model of theirs
    path = tmp_path / 'back.safetensors'
    save(ours, path, dialect=case.dialect, drop=case.drop)
    written = read_state_dict(path)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state), 'not bit-equal'
    if case.dialect == 'transformers':
        save(ours, tmp_path / 'folder', dialect='transformers')
        other, info = type(theirs).from_pretrained(tmp_path / 'folder', output_loading_info=True)
        assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
        other.eval()
    else:
        other = build(case)[0]
        other.load_state_dict(written, strict=True)
    assert max(map(relative_error, case.run_theirs(other, x), expected)) <= 1e-6


@pytest.mark.parametrize('case', CASES)
def test_every_other_dialect_and_back_is_the_same_file(case, tmp_path):
    """The tables alone: bit-equal tensors under the exact names, whatever dialect lies between."""
    theirs, _ = build(case)
    state = state_of(case, theirs, tmp_path)
    hosts = {
        'encoder': ('timm', 'native', 'unilm', 'transformers', 'transformers-v5', 'mmpretrain', 'openmmlab'),
        'classifier': ('timm', 'native', 'unilm', 'transformers', 'transformers-v5', 'mmpretrain'),
        'mim': ('native', 'unilm'),
        'backbone': ('native', 'unilm', 'openmmlab', 'transformers', 'transformers-v5'),
        'segmentor': ('native', 'unilm', 'openmmlab', 'mmseg', 'transformers', 'transformers-v5'),
    }[case.task]
    tried = 0
    for host in hosts:
        names = detect(state).task
        if names == 'encoder' and 'mask_token' in str(list(state)) and host == 'timm':
            continue  # timm has no mask token
        if host == 'openmmlab' and any('fc_norm' in n or 'pooler' in n or n.startswith('ln2') for n in state):
            continue  # a backbone has no pooling
        between = convert(state, to=host)
        again = convert(between, to=case.dialect)
        assert again.keys() == state.keys(), host
        assert all(torch.equal(again[name], state[name]) for name in state), host
        tried += 1
    assert tried >= 2
