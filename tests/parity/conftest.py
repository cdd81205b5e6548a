import importlib
import importlib.util

import pytest


@pytest.fixture(scope='session')
def mmpretrain():
    """The package, with its models; skips without it."""
    if not all(map(importlib.util.find_spec, ('mmpretrain', 'einops', 'mat4py', 'modelindex', 'importlib_metadata'))):
        pytest.skip("needs pip install 'mmpretrain==1.2.0' model-index 'importlib_metadata<9'")
    importlib.import_module('beit_plugin.mm')  # first: makes mmpretrain importable
    importlib.import_module('mmpretrain.models')
    return importlib.import_module('mmpretrain')
