"""Segmentation in OpenMMLab: heads, neck, segmentor, data, test-time augmentation."""
