"""Stand-in for the compiled part of mmcv (``mmcv._ext``), so that ``mmcv-lite`` is enough.

`install` registers an import finder; the ops themselves are imported when ``mmcv._ext`` is first imported.
Argument names and orders are those with which mmcv 2.1.0's ``mmcv/ops/*.py`` call the compiled functions: outputs are
filled in place unless a docstring says that they are returned. All code here is ours, on torchvision and PyTorch.
"""

from .finder import install

__all__ = ['install']
