import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_scope():
    """A Runner leaves its scope behind, and with it the next test would look for its classes in the wrong registry."""
    yield
    if 'mmengine.registry' in sys.modules:
        from mmengine.registry import DefaultScope

        DefaultScope._instance_dict.clear()
