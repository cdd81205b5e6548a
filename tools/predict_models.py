"""Models that tools/predict.py asks: a segmentor of mmsegmentation's configuration, or any model of timm.

Legend: B images, C classes, H W pixels.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data_folders import DataError, colours
from PIL import Image
from run_common import WARNING_NOISE, load_weights
from run_failures import require_file
from run_options import open_config

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of BEiT's multi-scale evaluation, each also mirrored
SIZES = ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')  # that the name of a model tells
ATTENTION_TOKENS = 4096  # of an image whose attention is drawn: weights take heads * tokens^2 numbers


def read_image(path: Path) -> Image.Image:
    """An image as the image processor sees it: RGB, turned by its EXIF data; ValueError with a sentence."""
    from beit_plugin.data.image_reading import read_rgb

    return read_rgb(path, 'the image')


def _of_checkpoint(name: str, checkpoint: Path) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that a checkpoint of one of our models tells, such as its number of classes.

    Raises:
        DataError: it cannot be read.
    """
    from inspect_checkpoint import stated

    from beit_plugin.checkpoints import CheckpointError
    from beit_plugin.checkpoints.describe import describe
    from beit_plugin.checkpoints.sources import read_source

    try:
        source = read_source(checkpoint)
    except CheckpointError as error:
        raise DataError(f'{error}.') from error
    if '_plugin_' not in name:
        return {}
    try:
        told = stated(describe(source.state_dict, source.grid), source.config)
    except CheckpointError as error:
        raise DataError(f'{checkpoint} is no checkpoint of {name}: {error}.') from error
    return {key: value for key, value in told.items() if key not in SIZES and value is not ...}


@dataclass
class Predictor:
    """A model, its classes and how to ask it.

    Attributes:
        model: on its device, in evaluation mode.
        classes: a name for each class.
        palette: (C, 3) bytes.
        segments: whether it gives a class for each pixel; else for each image.
    """

    model: Any
    classes: list[str]
    palette: np.ndarray
    segments: bool
    device: Any

    def label_map(self, path: Path, image: Image.Image) -> np.ndarray:
        """Class numbers (H, W) of the pixels of an image, given as its file and as ``read_image`` has it."""
        raise NotImplementedError

    def probabilities(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        """Probabilities (C) of each image."""
        raise NotImplementedError

    def normalised(self, image: Image.Image) -> Any:
        """The tensor (1, 3, H, W) that the encoder takes."""
        raise NotImplementedError

    def attentions(self, image: Image.Image) -> tuple[Image.Image, list[Any], tuple[int, int]]:
        """An image, shrunk where its tokens are too many, the attention weights (K, N, N) of all blocks, its grid."""
        import torch

        from beit_plugin import Beit

        encoder = next((m for m in self.model.modules() if isinstance(m, Beit)), None)
        if encoder is None:
            raise DataError('--attention needs an encoder of this plugin, and the model has none.')
        patch_h, patch_w = encoder.patch_embed.patch_size
        scale = (ATTENTION_TOKENS * patch_h * patch_w / (image.width * image.height)) ** 0.5
        if scale < 1:
            size = (max(patch_w, int(image.width * scale)), max(patch_h, int(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        with torch.inference_mode():
            _, grid, _, attentions = encoder.run_blocks(self.normalised(image), output_attentions=True)
        return image, [weights[0].float().cpu() if weights.ndim == 4 else None for weights in attentions], grid


class MMSegPredictor(Predictor):
    """A segmentor by mmsegmentation's configuration, with its test pipeline or its multi-scale one."""

    def __init__(self, config: Path, checkpoint: Path, multi_scale: bool, device: str | None) -> None:
        from mmengine.dataset import Compose
        from mmengine.device import get_device
        from mmengine.registry import MODELS, init_default_scope

        import beit_plugin.mm  # noqa: F401  registers
        from beit_plugin.checkpoints.files import read_file

        require_file(config, '--config')
        require_file(checkpoint, '--checkpoint')
        for message in WARNING_NOISE:
            warnings.filterwarnings('ignore', message=message)
        cfg = open_config(config)
        init_default_scope('mmseg')
        if multi_scale and 'tta_pipeline' not in cfg:
            raise DataError('the configuration has no tta_pipeline, so --multi-scale cannot run.')
        cfg.model.pop('pretrained', None)
        cfg.model.backbone.pop('pretrained', None)
        model = MODELS.build(cfg.model)
        load_weights(model, checkpoint)
        held = read_file(checkpoint, with_values=False)
        meta = (held.get('meta') or {}).get('dataset_meta') or cfg.test_dataloader.dataset.get('metainfo') or {}
        count = model.decode_head.num_classes
        classes, palette = named(list(meta.get('classes') or ()), meta.get('palette'), count)
        device = device or get_device()
        super().__init__(model.to(device).eval(), classes, palette, True, device)
        self.pipeline = Compose(_without_labels(cfg.tta_pipeline if multi_scale else cfg.test_pipeline))
        self.tester = MODELS.build({**cfg.tta_model, 'module': model}).eval() if multi_scale else model

    def label_map(self, path: Path, image: Image.Image) -> np.ndarray:
        import torch
        from mmengine.dataset import pseudo_collate

        try:
            batch = pseudo_collate([self.pipeline(dict(img_path=str(path)))])
        except Exception as error:
            if 'inv_scale' not in str(error):  # OpenCV's word for it
                raise
            size = f'{image.height} x {image.width} (H x W)'
            raise ValueError(
                f'scaled by the test pipeline, an image of {size} pixels has a side of none: crop it'
            ) from error
        with torch.inference_mode():
            result = self.tester.test_step(batch)[0]
        return result.pred_sem_seg.data[0].cpu().numpy().astype(np.int64)

    def normalised(self, image: Image.Image) -> Any:
        import torch

        pixels = torch.from_numpy(np.asarray(image)[..., ::-1].copy()).permute(2, 0, 1)  # BGR, as its loader gives
        data = self.model.data_preprocessor(dict(inputs=[pixels], data_samples=None), False)
        return data['inputs']


def _without_labels(pipeline: Any) -> list[Any]:
    """A test pipeline that does not look for labels, also inside its augmentations."""
    kept = []
    for step in copy.deepcopy(list(pipeline)):
        if isinstance(step, list):
            step = _without_labels(step)
            if step:
                kept.append(step)
        elif 'LoadAnnotations' not in str(step['type']):
            if 'transforms' in step:
                step['transforms'] = _without_labels(step['transforms'])
            kept.append(step)
    return kept


class TimmPredictor(Predictor):
    """A classifier or segmentor by its name in timm, with the image statistics of its configuration."""

    def __init__(
        self, name: str, checkpoint: Path | None, labels: Path | None, multi_scale: bool, device: str | None
    ) -> None:
        import timm
        import torch
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        import beit_plugin  # noqa: F401  registers
        from beit_plugin.segmentation.segmentor import BeitSegmentor

        if not timm.is_model(name):
            raise DataError(f"--model {name} is no model of timm; timm.list_models('*beit*') names ours.")
        if checkpoint is not None:
            require_file(checkpoint, '--checkpoint')
        try:
            if checkpoint is None:
                model = timm.create_model(name, pretrained=True)
            else:
                model = timm.create_model(name, checkpoint_path=str(checkpoint), **_of_checkpoint(name, checkpoint))
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            lines = [line.strip().rstrip('.') for line in str(error).splitlines()]
            if checkpoint is None:
                raise DataError(f'{name} got no weights, name a --checkpoint: {lines[0]}.') from error
            more = f' (and {len(lines) - 2} more)' if len(lines) > 2 else ''  # below the headline, one for a parameter
            raise DataError(f'{checkpoint} does not fit {name}: {lines[:2][-1]}{more}.') from error
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        self.data = resolve_model_data_config(model)
        self.transform = create_transform(**self.data, is_training=False)
        classes, palette = named(_read_names(labels, model.num_classes), None, model.num_classes)
        super().__init__(model.to(device).eval(), classes, palette, isinstance(model, BeitSegmentor), device)
        self.multi_scale = multi_scale

    def normalised(self, image: Image.Image) -> Any:
        import torch
        from torchvision.transforms.v2.functional import normalize, pil_to_tensor

        pixels = normalize(pil_to_tensor(image).float() / 255, self.data['mean'], self.data['std'])
        return torch.as_tensor(pixels, device=self.device)[None]

    def label_map(self, path: Path, image: Image.Image) -> np.ndarray:
        import torch
        from torch.nn.functional import interpolate

        total: Any = 0
        with torch.inference_mode():
            for ratio in RATIOS if self.multi_scale else (1.0,):
                size = tuple(max(16, round(side * ratio)) for side in image.size)
                x = self.normalised(image.resize(size, Image.Resampling.BICUBIC) if ratio != 1 else image)
                for mirrored in (False, True) if self.multi_scale else (False,):
                    logits = self.model(x.flip(3) if mirrored else x)
                    logits = interpolate(logits.float(), image.size[::-1], mode='bilinear')
                    total = total + (logits.flip(3) if mirrored else logits).softmax(1)
        return total[0].argmax(0).cpu().numpy()

    def probabilities(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        import torch

        x = torch.stack([self.transform(image) for image in images]).to(self.device)
        with torch.inference_mode():
            return list(self.model(x).float().softmax(1).cpu().numpy())


def _read_names(labels: Path | None, count: int) -> list[str]:
    """Names of the classes: lines of a file, ImageNet's for 1000, or none."""
    if labels is not None:
        require_file(labels, '--labels')
        try:
            names = labels.read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f'--labels {labels} is not UTF-8: save it as UTF-8.') from error
        if len(names) != count:
            raise DataError(f'--labels {labels} has {len(names)} lines, but the model has {count} classes.')
        return names
    if count == 1000:
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return []


def named(classes: list[str], palette: Any, count: int) -> tuple[list[str], np.ndarray]:
    """Names and colours for all classes: those that are given, and made-up ones."""
    names = classes if len(classes) == count else [f'class {i}' for i in range(count)]
    given = palette is not None and len(palette) == count
    return names, np.asarray(palette if given else colours(count), np.uint8)
