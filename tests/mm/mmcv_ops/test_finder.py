"""The import finder for mmcv._ext: what it serves, what it refuses, and that it yields to a compiled module."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install
from beit_plugin.mm.mmcv_ops.finder import _FINDER
from beit_plugin.mm.mmcv_ops.table import OPS

ROOT = Path(__file__).parents[3]
FINDER_FILE = ROOT / 'beit_plugin/mm/mmcv_ops/finder.py'


def run_python(code: str, *, path: Path) -> str:
    """Run code in a new interpreter with `path` in front of sys.path, and return what it prints."""
    setup = f'import sys; sys.path.insert(0, {str(path)!r})\n'
    result = subprocess.run([sys.executable, '-c', setup + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_install_puts_one_finder_last() -> None:
    install()
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
    assert sys.meta_path.count(_FINDER) == 1


def test_27_ops_exist_and_have_their_own_names() -> None:
    assert len(OPS) == 27
    assert all(op.__name__ == name for name, op in OPS.items())


def test_finder_answers_for_no_other_module() -> None:
    assert _FINDER.find_spec('mmcv._ext_other', None) is None
    assert _FINDER.find_spec('_ext', None) is None


def test_mmengine_sees_a_full_mmcv() -> None:
    install()
    dl_utils = importlib.import_module('mmengine.utils.dl_utils')
    assert dl_utils.mmcv_full_available()
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec is not None and spec.name == 'mmcv._ext'


def test_says_which_python_mmengine_needs(tmp_path: Path) -> None:
    """mmengine 0.10.7 imports on Python 3.14 and fails when it makes an optimizer."""
    code = """
import pkgutil
vars(pkgutil).pop('find_loader', None)
try:
    import beit_plugin.mm
except ImportError as error:
    print(error)
"""
    assert 'use Python 3.10 to 3.13' in run_python(code, path=tmp_path)


def test_a_missing_op_exists_and_says_who_has_it_when_called() -> None:
    install()
    ext = importlib.import_module('mmcv._ext')
    assert hasattr(ext, 'nms_rotated')
    with pytest.raises(NotImplementedError, match=r"^the op 'nms_rotated' .* the full package `mmcv` .*$"):
        ext.nms_rotated(None, iou_threshold=0.5)
    assert not hasattr(ext, '__path__')


def test_a_missing_op_raises_through_mmcv() -> None:
    install()
    ops = importlib.import_module('mmcv.ops')
    torch = importlib.import_module('torch')
    with pytest.raises(NotImplementedError, match='box_iou_rotated'):
        ops.box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))


def test_a_compiled_ext_is_found_first(tmp_path: Path) -> None:
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / '_ext.py').write_text('nms = "compiled"\n')
    # the finder file alone: the rest of the plugin needs more of mmcv than this one has
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('finder', {str(FINDER_FILE)!r})
finder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(finder)
finder.install()
import mmcv._ext
print(mmcv._ext.nms)
"""
    assert run_python(code, path=tmp_path) == 'compiled\n'


def test_mmseg_and_mmdet_import_through_it() -> None:
    install()
    for name in ('mmseg.apis', 'mmdet.apis'):
        host = name.partition('.')[0]
        pytest.importorskip(host, reason=f'needs the extra beit-plugin[{host}]')
        importlib.import_module(name)
    assert sys.modules['mmcv._ext'].__spec__.origin == 'beit_plugin.mm.mmcv_ops'
