"""Runs a script as ``__main__`` with the plugin in place, in this process and in those that the script spawns.

A process started by `multiprocessing`'s spawn or forkserver method first re-imports the parent's main module, by the
name in its ``__spec__`` if it has one. The main module that `run` creates names this file there, so that the child
runs it as ``__mp_main__``: the plugin comes first, then the script, then the unpickling.
"""

import builtins
import importlib.util
import os
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

# children find the script here: sys.argv and the working directory may have changed before they start
_SCRIPT_VARIABLE = 'BEIT_PLUGIN_SCRIPT'


def _prepare() -> None:
    """Register with OpenMMLab if it is installed; importing this package has already registered with timm."""
    if importlib.util.find_spec('mmengine') is None:
        return
    try:
        import beit_plugin.mm  # noqa: F401
    except Exception as error:  # a broken host must not keep scripts of other hosts from running
        if __name__ != '__mp_main__':  # say it once, not in every worker
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            print(
                f'beit_plugin: warning: OpenMMLab is installed but cannot be used ({reason}); '
                'only the timm models are registered',
                file=sys.stderr,
            )


def run(path: str, source: bytes) -> None:
    """Run a script as `python SCRIPT ARGS…` would, after registering the plugin; `sys.argv` is already the script's.

    Args:
        path: absolute path of the script.
        source: its text.

    Raises:
        Whatever the script raises, SystemExit included.
    """
    os.environ[_SCRIPT_VARIABLE] = path
    _replace_first_path(os.path.dirname(os.path.realpath(path)))
    _prepare()

    main = ModuleType('__main__')
    main.__file__ = path
    main.__loader__ = SourceFileLoader('__main__', path)
    main.__spec__ = importlib.util.find_spec(__name__)
    vars(main).update(__builtins__=builtins, __cached__=None)
    # multiprocessing names the parent's main so in what children send back; it aliased ours when it was imported
    sys.modules['__main__'] = sys.modules['__mp_main__'] = main
    exec(compile(source, path, 'exec', dont_inherit=True), vars(main))


def _replace_first_path(folder: str) -> None:
    """Put the script's folder where ``-m`` has put the working directory; keep this package importable."""
    if getattr(sys.flags, 'safe_path', False):  # python -P (3.11) adds neither
        return
    sys.path[0] = folder
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if root not in map(os.path.abspath, sys.path):  # run from a source tree: spawned processes need it
        sys.path.append(root)


if __name__ == '__mp_main__':
    _prepare()
    _names = runpy.run_path(os.environ[_SCRIPT_VARIABLE], run_name=__name__)
    # __spec__ stays ours, so that processes spawned by this one come here again
    globals().update((name, value) for name, value in _names.items() if name != '__spec__')
