"""The rules of the house that a program can check: who imports whom, file length, no machine paths."""

import ast
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'beit_plugin'
MODULES = sorted(PACKAGE.rglob('*.py'))
SOURCES = [p for folder in ('beit_plugin', 'tests', 'tools', 'configs') for p in sorted((ROOT / folder).rglob('*.py'))]
OPENMMLAB = {'mmengine', 'mmcv', 'mmseg', 'mmdet', 'mmpretrain'}
LIBRARIES = {'numpy', 'PIL', 'safetensors', 'huggingface_hub', 'torchvision'}
# rooms, from the ground: each imports rooms of lower floors only, itself, torch, and the libraries named here.
# timm's private helpers are the ones that every model of timm itself uses.
ROOMS = {
    'kernels': (0, {'triton'}),
    'models': (1, {'triton', 'timm.layers', 'timm.models._features'}),
    'segmentation': (2, {'timm.layers', 'timm.models._features'}),
    'checkpoints': (2, {'timm.layers', 'numpy', 'safetensors', 'huggingface_hub'}),
    'tokenizers': (3, {'timm.layers', 'numpy', 'PIL'}),
    'data': (3, LIBRARIES),
    'timm_cfgs': (3, {'timm'}),
    'timm_models': (4, {'timm'}),
    'mm': (5, {'timm', 'torchvision', 'numpy', 'PIL', *OPENMMLAB}),
    '_script': (6, set()),
    '': (7, {'timm'}),  # __init__, __main__
}


def dotted(path):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path):
    return imports_of(path.read_text(), ['beit_plugin', *path.relative_to(PACKAGE).parent.parts])


def imports_of(source, package):
    """Absolute names of everything that a source imports, those of this package without its name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = '.'.join([*base, *([node.module] if node.module else [])])
            # "from . import x" names a module, "from .x import y" a thing in it
            names = [start] if node.module else [f'{start}.{alias.name}' for alias in node.names]
        else:
            continue
        yield from (re.sub(r'^beit_plugin(\.|$)', '', name) for name in names)


def room(name):
    top = name.partition('.')[0]
    return top if top in ROOMS else ''


def refused(name, importer):
    """Whether a module of this package may not import a name."""
    top = name.partition('.')[0]
    if not name or top in sys.stdlib_module_names or top == 'torch':
        return False
    floor, libraries = ROOMS[room(importer)]
    if top in ROOMS:
        return room(importer) != top and ROOMS[top][0] >= floor
    return not any(name == library or name.startswith(f'{library}.') for library in libraries)


@pytest.mark.parametrize('path', MODULES, ids=dotted)
def test_who_imports_whom(path):
    wrong = [name for name in imports(path) if refused(name, dotted(path))]
    assert not wrong, f'{path.name} may not import {wrong}'


def test_no_circle_of_files():
    modules = {dotted(path): path for path in MODULES}
    names = {name: {other for other in imports(path) if other in modules} for name, path in modules.items()}
    left = {name: others - {name} for name, others in names.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f'these import each other: {sorted(left)}'


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_length_and_no_machine_paths(path):
    text = path.read_text()
    limit = 600
    assert len(text.splitlines()) <= limit, f'more than {limit} lines: split by concept'
    found = re.findall(r'(?:/work/|/home/|/root/|/tmp/)[\w./-]*', text)
    assert not found or path == Path(__file__), f'paths of one machine: {found}'


def test_rules_bite():
    # the checks above would be worth nothing if imports_of() missed a form of import
    source = 'import mmseg.apis\nfrom ..mm.optim import a\nfrom . import beit\nfrom .. import timm_models\n'
    names = set(imports_of(source, ['beit_plugin', 'models']))
    assert names == {'mmseg.apis', 'mm.optim', 'models.beit', 'timm_models'}
    assert {name for name in names if refused(name, 'models.made_up')} == names - {'models.beit'}


@pytest.mark.parametrize(
    ('module', 'ours'),
    [
        ('beit_plugin.models.beit', True), ('tests.models.test_beit', True), ('tools_common', True),
        ('run_common', True), ('mmseg.models', False), ('torch', False), ('beit_plugin_of_another', False),
    ],
)  # fmt: skip
def test_our_warnings_are_errors(module, ours):
    with pytest.raises(FutureWarning) if ours else nullcontext():
        warnings.warn_explicit('', FutureWarning, 'file.py', 1, module=module)


def test_sources_compile_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for path in SOURCES:
            compile(path.read_text(), path, 'exec')


def test_openmmlab_stays_in_its_folder():
    hosts = [p for p in MODULES if 'mm' not in p.relative_to(PACKAGE).parts]
    assert len(hosts) > 10
    for path in hosts:
        wrong = [n for n in imports(path) if n.partition('.')[0] in OPENMMLAB]
        assert not wrong, f'{path.relative_to(ROOT)} imports {wrong}'
