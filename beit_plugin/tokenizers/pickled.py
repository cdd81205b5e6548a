"""Whole modules in pickles, as OpenAI published its dVAE: their tensors are read, nothing of the modules is run.

For each class of the published files a stand-in keeps the tensors of the module by name and forgets everything else. So
the files read as state dicts; a pickle that names any other class or function is refused by ``checkpoints.files``.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ['MODULE_STAND_INS']

_MOST_TENSORS, _LONGEST_NAME = 1000, 200  # the encoder has 86, of 50 characters


class _Tensors(dict[str, Tensor]):
    """Stands for a module: a state dict, filled when the pickle hands over the module's attributes."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        for kind in ('_parameters', '_buffers'):
            self._add('', {name: tensor for name, tensor in state[kind].items() if isinstance(tensor, Tensor)})
        for name, child in state['_modules'].items():  # pickles finish the children first
            if isinstance(child, _Tensors):
                self._add(f'{name}.', child)

    def _add(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        longest = max(map(len, tensors), default=0) + len(prefix)
        if len(self) + len(tensors) > _MOST_TENSORS or longest > _LONGEST_NAME:
            raise ValueError('a module with so many tensors, or such long names, is no dVAE')
        self.update((prefix + name, tensor) for name, tensor in tensors.items())


# what https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl hold: openai/DALL-E at 5be4b23 on torch 1.7
MODULE_STAND_INS: dict[str, type] = dict.fromkeys(
    (
        'dall_e.encoder.Encoder',
        'dall_e.encoder.EncoderBlock',
        'dall_e.decoder.Decoder',
        'dall_e.decoder.DecoderBlock',
        'dall_e.utils.Conv2d',
        'torch.nn.modules.activation.ReLU',
        'torch.nn.modules.container.Sequential',
        'torch.nn.modules.linear.Identity',
        'torch.nn.modules.pooling.MaxPool2d',
        'torch.nn.modules.upsampling.Upsample',
    ),
    _Tensors,
)
