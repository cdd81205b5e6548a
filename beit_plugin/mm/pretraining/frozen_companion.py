"""A frozen model beside the one that is trained: it is not saved, trained, averaged or wrapped with it."""

from typing import Any

from mmengine.model import BaseModel
from torch import nn

__all__ = ['ModelWithAside']


class _Aside:
    """Holds a module out of sight of the module that has this; frozen and set to evaluation mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> '_Aside':
        return self  # mmengine's EMAHook copies the model


class ModelWithAside(BaseModel):
    """What an mmengine runner trains, and a frozen module that follows it from device to device.

    Args:
        frozen: the module.
        data_preprocessor: by default ``BEiTMIMDataPreprocessor``.
    """

    def __init__(self, frozen: nn.Module, data_preprocessor: dict[str, Any] | None) -> None:
        super().__init__(data_preprocessor or dict(type='BEiTMIMDataPreprocessor'))
        self._aside = _Aside(frozen)

    @property
    def aside(self) -> Any:
        """The frozen module."""
        return self._aside.module

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.aside._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)
