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
# what a module may import; the longest prefix that fits its dotted name counts. Ours is written without 'beit_plugin'.
# timm's private helpers are the ones that every model of timm itself uses.
ALLOWED = {
    'models': {'torch', 'timm.layers', 'timm.models._features', 'models'},
    'models.attention': {
        'torch', 'models.kernel_support', 'models.relative_position', 'models.resample', 'models.windows', 'kernels',
    },
    'models.block': {'torch', 'timm.layers', 'models', 'kernels'},
    'models.kernel_support': {'torch', 'triton'},
    'models.relative_position': {'torch', 'models.kernel_support', 'models.resample'},
    'models.resample': {'torch', 'models.kernel_support'},
    'models.upsampled_loss': {'torch', 'models.kernel_support', 'models.resample', 'kernels'},
    'kernels': {'torch', 'triton', 'kernels'},
    'tokenizers': {'torch', 'timm.layers', 'models', 'tokenizers', 'checkpoints'},
    'tokenizers.picture': {'torch', 'numpy', 'PIL', 'tokenizers'},
    'checkpoints': {
        'torch', 'timm.layers', 'safetensors', 'numpy', 'huggingface_hub', 'models.resample',
        'models.relative_position', 'checkpoints',
    },
    'masking': {'torch', 'numpy'},
    'mim_data': {
        'torch', 'torchvision', 'numpy', 'PIL', 'image_inputs', 'image_list', 'masking', 'models.checks', 'token_cache',
    },
    'image_list': {'numpy', 'image_inputs'},
    'token_cache': {'torch', 'safetensors', 'checkpoints'},
    'image_inputs': {'torch', 'numpy', 'PIL'},
    'image_options': {'PIL', 'huggingface_hub'},
    'image_processor': {'torch', 'numpy', 'PIL', 'image_inputs', 'image_options'},
    'timm_models': {'torch', 'timm', 'models', 'checkpoints', 'timm_cfgs'},
    'timm_cfgs': {'timm'},
    'mm': {
        'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'mm', 'models', 'checkpoints', 'tokenizers', 'masking',
        'mim_data', *OPENMMLAB,
    },
    '': {'torch', 'timm', 'models', 'timm_models', '_script', 'image_processor', 'mm'},  # __init__, __main__, _script
}  # fmt: skip


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


def rule(name):
    fits = [key for key in ALLOWED if key and (name == key or name.startswith(f'{key}.'))]
    return ALLOWED[max(fits, key=len, default='')]


@pytest.mark.parametrize('path', MODULES, ids=dotted)
def test_who_imports_whom(path):
    allowed = rule(dotted(path))
    for name in imports(path):
        top = name.partition('.')[0]
        if top in sys.stdlib_module_names or not name:
            continue
        assert any(name == a or name.startswith(f'{a}.') for a in allowed), f'{path.name} may not import {name}'


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_length_and_no_machine_paths(path):
    text = path.read_text()
    limit = 330 if 'kernels' not in path.parts else 1000
    assert len(text.splitlines()) <= limit, f'more than {limit} lines: split by concept'
    found = re.findall(r'(?:/work/|/home/|/root/|/tmp/)[\w./-]*', text)
    assert not found or path == Path(__file__), f'paths of one machine: {found}'


def test_rules_bite():
    # the checks above would be worth nothing if imports_of() missed a form of import
    source = 'import mmseg.apis\nfrom ..mm.optim import a\nfrom . import beit\nfrom .. import timm_models\n'
    names = set(imports_of(source, ['beit_plugin', 'models']))
    assert names == {'mmseg.apis', 'mm.optim', 'models.beit', 'timm_models'}
    allowed = rule('models.made_up')
    assert not any(n == a or n.startswith(f'{a}.') for n in names - {'models.beit'} for a in allowed)


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
