"""BEiT for timm and OpenMMLab."""

__version__ = '0.1.0'
