"""A frozen model beside the one that is trained: it is not saved, trained, averaged or wrapped with it."""

from typing import Any

from torch import nn

__all__ = ['Aside']


class Aside:
    """Holds a module out of sight of the module that has this.

    Args:
        module: frozen and set to evaluation mode here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Aside':
        return self  # mmengine's EMAHook copies the model
