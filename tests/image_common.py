"""Images that look to a filter like photographs, label maps of them, and what tests of the image processor share."""

import io

import numpy as np
from PIL import Image

from beit_plugin.data.image_processor import BeitImageProcessor


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
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


def chw(array: np.ndarray) -> np.ndarray:
    """Channels last to channels first."""
    return np.ascontiguousarray(np.moveaxis(array, -1, -3))


def saved(image: Image.Image, form: str = 'PNG', **options: object) -> Image.Image:
    """The image as it comes from a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


PHOTO = photograph(60, 84)
PIL = Image.fromarray(PHOTO)
LABEL = label_map(60, 84, 7)
AS_IS = dict(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
processor = BeitImageProcessor(size=(40, 48), crop_size=32)


def pixels(image, **options):
    """(C, H, W) of one image as they are read."""
    return processor(image, **{**AS_IS, **options}).pixel_values[0]
