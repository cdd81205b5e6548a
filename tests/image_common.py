"""Images that look to a filter like photographs, and label maps of them."""

import numpy as np
from PIL import Image


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3), uint8: smooth areas, sharp edges, grain, and all of the range from black to white."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    smooth += 90 * (label_map(height, width, 2, seed)[..., None] - 0.5)  # an object before a background
    return np.clip(smooth * 1.3 - 30 + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def label_map(height: int, width: int, classes: int, seed: int = 0) -> np.ndarray:
    """(height, width), uint8: areas of the classes 0 to ``classes`` - 1."""
    coarse = np.random.default_rng(seed).integers(0, classes, (7, 9), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
