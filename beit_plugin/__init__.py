"""BEiT for timm and OpenMMLab.

``import beit_plugin`` registers the models in timm; ``import beit_plugin.mm`` (or ``custom_imports`` in a config)
registers the backbone, neck and heads in OpenMMLab.
"""

from . import timm_models as timm_models  # registers
from .data.image_processor import BeitImageProcessor
from .models.beit import VARIANTS, Beit, BeitOutput
from .segmentation.backbone import BackboneOutput, BeitBackbone

__version__ = '0.1.0'

__all__ = ['VARIANTS', 'BackboneOutput', 'Beit', 'BeitBackbone', 'BeitImageProcessor', 'BeitOutput', '__version__']
