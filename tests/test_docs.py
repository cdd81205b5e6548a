"""What the pages say about code is so."""

import re
from itertools import product
from pathlib import Path

import pytest
import timm

import beit_plugin  # noqa: F401  registers
from beit_plugin.checkpoints.tables import DIALECTS

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
PAGE = (ROOT / 'docs/checkpoints.md').read_text()
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


def versions():
    """The table of README: newest and oldest tested version of each distribution, lower case."""
    found = {}
    for row in re.findall(r'^\|(.*)\|$', README.partition('\n## Versions')[2], re.MULTILINE):
        names, newest, oldest = (re.sub(r'\(.*?\)', '', cell).split(' / ') for cell in row.split('|')[:3])
        for name, new, old in zip(names, newest, oldest, strict=False):
            found[name.strip().lower()] = new.strip(), old.strip()
    return {name: pair for name, pair in found.items() if pair[0][:1].isdigit()}


def test_versions_of_readme_are_those_of_pyproject():
    """Lower bounds are the oldest tested; the newest are not compared, since each release of a host would fail this."""
    project = (ROOT / 'pyproject.toml').read_text()
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    bounds['python'] = re.search(r'requires-python = ">=([\d.]+)', project).group(1)
    bounds['mmdetection'] = bounds['mmdet']
    oldest = {name: old for name, (_, old) in versions().items() if old and name in bounds}
    assert {'python', 'torch', 'timm', 'mmsegmentation', 'mmcv-lite', 'mmdetection', 'mmpretrain'} <= set(oldest)
    assert oldest == {name: bounds[name] for name in oldest}


def test_sources_cite_the_newest_tested_versions():
    """Of one major version a host is cited in one release; older ones are named where they differ."""
    newest = {name.removesuffix('-lite'): new for name, (new, _) in versions().items()}
    hosts = [name for name in newest if name not in ('python', 'torch')]
    texts = {path: path.read_text() for folder in ('beit_plugin', 'configs') for path in (ROOT / folder).rglob('*.py')}
    for path, text in {**texts, ROOT / 'README.md': README}.items():
        for host, version in re.findall(rf'\b({"|".join(hosts)})(?:-lite)? (\d+(?:\.\d+)+)', text):
            if version.split('.')[0] == newest[host].split('.')[0]:
                assert version == newest[host], f'{path.name} cites {host} {version}, README tests {newest[host]}'


@pytest.mark.parametrize(
    'config, page, pattern',
    [
        ('seg/beit-tiny_upernet_shapes.py', 'README.md', r'mIoU ([\d.]+) single-scale, ([\d.]+) multi-scale'),
        (
            'mim/beit-tiny_shapes.py',
            'docs/pretraining.md',
            r'accuracy (?:of )?(\d+) percent,.*most frequent token\D*(\d+)',
        ),
    ],
)
def test_figures_of_the_quickstart_are_those_of_its_config(config, page, pattern):
    measured = re.search(r'^Measured .*', (ROOT / 'configs' / config).read_text(), re.MULTILINE).group()
    in_config, in_page = (re.search(pattern, text).groups() for text in (measured, (ROOT / page).read_text()))
    assert in_page == in_config
