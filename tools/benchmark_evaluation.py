"""What mmsegmentation's evaluation of an image costs, ours and stock; measured by tools/benchmark.py.

Models have random weights. Both get the image as the data loader gives it, and return labels at its own size. Legend:
B batch, C channels, H W pixels.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_cases import Case, Makers, Setting
from benchmark_models import import_mm, mmseg_segmentor, randomize_tables
from torch import Tensor

WINDOW = 640  # pixels, or the shorter side of the image; strides of two thirds: unilm beit/semantic_segmentation
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the published multi-scale evaluation, each also mirrored


def _model(s: Setting, ours: bool, augmented: bool) -> Any:
    from mmengine.config import ConfigDict
    from mmseg.registry import MODELS

    window = min(WINDOW, s.height, s.width)
    cfg = mmseg_segmentor(replace(s, height=window, width=window))
    preprocessor = dict(type='mmseg.SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    # mmsegmentation's BEiT takes windows of one size only, so that images that are smaller are padded, for both
    cfg['data_preprocessor'] = dict(preprocessor, bgr_to_rgb=True, test_cfg=dict(size=(window, window)))
    cfg['test_cfg'] = dict(mode='slide', crop_size=(window, window), stride=(window * 2 // 3, window * 2 // 3))
    if ours:
        cfg['type'] = 'BEiTSegmentor'
        cfg['backbone'] |= dict(type='BEiTBackbone', attn_backend=s.backends[0])
        cfg['neck']['type'], cfg['decode_head']['type'] = 'BEiTPyramid', 'BEiTUPerHead'
        cfg['test_cfg']['keep_logits'] = False
    with s.device:
        model = MODELS.build(ConfigDict(cfg))
    model.to(s.device)
    randomize_tables(model)
    if augmented:
        model = MODELS.build(dict(type='BEiTSegTTAModel' if ours else 'SegTTAModel', module=model))
    return model


def _views(s: Setting, augmented: bool) -> dict[str, Any]:
    """A batch of the data loader: images (3, H, W) of bytes, or for each of the views a list of them."""
    from mmseg.structures import SegDataSample

    images = torch.randint(256, (s.batch, 3, s.height, s.width), dtype=torch.uint8)
    inputs: list[list[Tensor]] = []
    samples: list[list[Any]] = []
    for ratio in RATIOS if augmented else (1.0,):
        size = (round(s.height * ratio), round(s.width * ratio))
        resized = F.interpolate(images.float(), size, mode='bilinear').round().to(torch.uint8)
        for flip in (False, True) if augmented else (False,):
            meta = dict(
                ori_shape=(s.height, s.width), img_shape=size, flip=flip, flip_direction='horizontal', img_path=''
            )  # fmt: skip
            inputs.append(list(resized.flip(3) if flip else resized))
            samples.append([SegDataSample(metainfo=meta) for _ in range(s.batch)])
    if augmented:
        return dict(inputs=inputs, data_samples=samples)
    return dict(inputs=inputs[0], data_samples=samples[0])


def evaluation_cases(s: Setting) -> Makers:
    """Images to labels, by windows, and by windows at six scales with flip."""

    def case(ours: bool, augmented: bool) -> Case:
        import_mm()
        model, data = _model(s, ours, augmented), _views(s, augmented)

        def evaluate(model: Any) -> None:
            with torch.autocast(s.device.type, s.dtype, enabled=s.dtype != torch.float32):
                model.test_step(_fresh(data))

        return Case(model, evaluate, None, [])

    return {
        f'{name}, {"multi-scale and flip" if augmented else "windows"}': (
            lambda ours=ours, augmented=augmented: case(ours, augmented)
        )
        for augmented in (False, True)
        for name, ours in (('mmsegmentation', False), ('ours', True))
    }


def _fresh(data: Any) -> Any:
    """The same with new samples, for the last call left its results in them."""
    if isinstance(data, dict):
        return {key: _fresh(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_fresh(item) for item in data]
    return data if isinstance(data, Tensor) else data.clone()
