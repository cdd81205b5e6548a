import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # the kernels then run in Triton's interpreter, which must be chosen before anything imports Triton
    os.environ.setdefault('TRITON_INTERPRET', '1')
torch.backends.cudnn.allow_tf32 = False  # float32 is compared with float32
torch.set_num_threads(1)  # the models are tiny: threads wait for each other longer than they work


ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    # tests and tools import each other by bare names
    ours = {'beit_plugin', 'tests', *(path.stem for part in ('tests', 'tools') for path in (ROOT / part).rglob('*.py'))}
    config.addinivalue_line('filterwarnings', rf'error:::({"|".join(sorted(ours))})(\.|$)')
    if not hasattr(config, 'workerinput') and importlib.util.find_spec('yapf'):
        import yapf  # noqa: F401  of mmengine: writes a file at its first import, which two processes must not do at once


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: 'slow' not in item.keywords)  # or the other process waits for them at the end


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


@pytest.fixture
def mmseg_scope(_default_scope):
    """mmsegmentation's classes by their bare names, as in a Runner."""
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)


@pytest.fixture
def process_group():
    """One of a single process, over gloo."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
