"""The import finder that answers for ``mmcv._ext`` when no compiled one exists."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

EXT_NAME = 'mmcv._ext'


class _MissingOp:
    """A compiled op that the stand-in lacks: it exists (mmcv asks with ``hasattr``) but raises when called."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f'the op {self.__name__!r} is not among those that beit_plugin implements for mmcv-lite: '
            'install the full package `mmcv` with its compiled ops to use it'
        )


def _missing_op(name: str) -> _MissingOp:
    if name.startswith('__'):  # the import machinery and inspect probe these
        raise AttributeError(f'module {EXT_NAME!r} has no attribute {name!r}')
    return _MissingOp(name)


class _ExtLoader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        from .table import OPS  # torchvision loads with the first use of mmcv.ops, not with the finder

        module.__doc__ = 'The compiled ops of mmcv on torchvision and PyTorch, by beit_plugin.'
        vars(module).update(OPS, __getattr__=_missing_op)


class _ExtFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != EXT_NAME:
            return None
        return ModuleSpec(fullname, _ExtLoader(), origin=__package__)


_FINDER = _ExtFinder()


def install() -> None:
    """Make ``import mmcv._ext`` work with ``mmcv-lite``; calling it again changes nothing.

    The finder goes last in `sys.meta_path`, so that a really compiled ``mmcv._ext`` is found before it. Imports
    nothing of mmcv.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
