"""Masked image modelling and VQ-KD in OpenMMLab."""
