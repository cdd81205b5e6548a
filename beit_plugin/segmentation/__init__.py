"""Segmentation in plain torch: feature maps, pyramids, heads, losses, the segmentor."""
