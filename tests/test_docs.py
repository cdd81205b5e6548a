"""What the pages say about code is so."""

import re
from itertools import product
from pathlib import Path

import pytest
import timm

import beit_plugin  # noqa: F401  registers
from beit_plugin.checkpoints.tables import DIALECTS

PAGE = (Path(__file__).parents[1] / 'docs/checkpoints.md').read_text()
TASKS = ('encoder', 'classifier', 'mim', 'backbone', 'segmentor')


def expand(text):
    """'a_{b,c}' to ['a_b', 'a_c'], as a shell does."""
    parts = [part.split(',') for part in re.split(r'[{}]', text)]
    plain = [[','.join(part)] if i % 2 == 0 else part for i, part in enumerate(parts)]
    return [''.join(choice) for choice in product(*plain)]


def test_table_of_dialects():
    rows = re.findall(r'^\| `([\w-]+)` \|[^|]*\|([^\n]*)\|$', PAGE, re.MULTILINE)
    assert [name for name, _ in rows] == list(DIALECTS)
    for name, cells in rows:
        says = dict(zip(TASKS, (cell.strip() == 'r' for cell in cells.split('|')), strict=True))
        assert says == {task: task in DIALECTS[name].layouts for task in TASKS}, name


NAMES = sorted({name for text in re.findall(r'`(beit(?:v2)?_plugin_[^`]+)`', PAGE) for name in expand(text)})


@pytest.mark.parametrize('name', NAMES)
def test_names_and_tags(name):
    architecture, _, tag = name.partition('.')
    assert timm.is_model(architecture)
    if tag:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.tag == tag and (cfg.hf_hub_id or cfg.url)


def test_every_tag_is_on_the_page():
    tags = [name for name in timm.list_models('beit*_plugin_*', pretrained=True)]
    assert tags and set(tags) <= set(NAMES)
