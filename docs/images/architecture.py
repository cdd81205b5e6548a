"""Draws architecture.png: `python docs/images/architecture.py`, with matplotlib."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, GREEN, ORANGE, GREY = '#dbe9f6', '#e0f0dc', '#fbe8d3', '#eeeeee'


def box(axes, x, y, width, height, title, text='', colour=GREY):
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.8', facecolor=colour, edgecolor='#555555'
    )
    axes.add_patch(patch)
    lines = text.count('\n') + 1 if text else 0
    top = y + height / 2 + 1.15 * lines
    axes.text(x + width / 2, top, title, ha='center', va='center', fontsize=10, weight='bold')
    if text:
        axes.text(x + width / 2, top - 1.3, text, ha='center', va='top', fontsize=8.5, linespacing=1.4)


def arrow(axes, start, end, style='-|>'):
    axes.annotate('', end, start, arrowprops=dict(arrowstyle=style, color='#333333', lw=1.3))


def main():
    figure, axes = plt.subplots(figsize=(11.5, 6.6))
    axes.set(xlim=(0, 115), ylim=(0, 66))
    axes.axis('off')

    axes.text(1, 63.5, 'hosts', fontsize=9, color='#555555')
    box(axes, 1, 55, 25, 7, 'timm', 'create_model, train.py', ORANGE)
    box(axes, 30, 55, 25, 7, 'mmsegmentation', 'Runner, TTA', ORANGE)
    box(axes, 59, 55, 25, 7, 'mmdet, torchvision', 'backbones', ORANGE)
    box(axes, 88, 55, 26, 7, 'mmengine', 'pre-training', ORANGE)
    box(axes, 1, 45, 25, 6, 'timm_models.py', '', GREY)
    box(axes, 30, 45, 84, 6, 'mm/', 'BEiTBackbone, heads, BEiTSegmentor, BEiTPretrainer, BEiTVQKD, mmcv_ops', GREY)
    for x in (13.5, 42.5, 71.5, 101):
        arrow(axes, (x, 55), (x, 51.2))

    axes.text(15, 41.2, 'models/: plain torch', fontsize=9, color='#555555')
    box(axes, 1, 20, 25, 19, 'embed.py', 'patches of any image size\n[CLS], mask token\npositions, resized', BLUE)
    box(
        axes, 30, 20, 37, 19, 'beit.py, block.py, attention.py',
        'L blocks: attention with a learned\nbias, MLP, layer scale\n'
        'bias tables read at any grid:\nresample.py, relative_position.py', BLUE,
    )  # fmt: skip
    arrow(axes, (26, 29.5), (30, 29.5))
    box(axes, 71, 33.5, 43, 5.5, 'classifier', '', GREEN)
    box(axes, 71, 26.5, 43, 5.5, 'pyramid.py  →  upernet.py, detectors', '', GREEN)
    box(axes, 71, 20, 43, 5, 'mim.py: visual tokens of masked patches', '', GREEN)
    for y in (36.2, 29.2, 22.5):
        arrow(axes, (67, 29.5), (71, y))
    for x in (13.5, 48.5, 92):
        arrow(axes, (x, 45), (x, 39.2))

    box(axes, 1, 4, 25, 11, 'checkpoints/', 'five dialects, one table each,\nresized to the model', GREY)
    box(axes, 30, 4, 37, 11, 'kernels/', 'Triton: attention that reads the table,\nresiduals and norms, loss', GREY)
    box(axes, 71, 4, 20, 11, 'masking.py', 'block-wise masks', GREY)
    box(axes, 94, 4, 20, 11, 'tokenizers/', 'DALL-E, VQ-KD:\nwhat mim.py predicts', GREY)
    arrow(axes, (13.5, 15), (13.5, 19.8))
    arrow(axes, (48.5, 15), (48.5, 19.8), '<|-')
    arrow(axes, (81, 15), (81, 19.8))
    arrow(axes, (104, 15), (104, 19.8))
    figure.savefig(Path(__file__).with_suffix('.png'), dpi=110, bbox_inches='tight', pad_inches=0.1)


if __name__ == '__main__':
    main()
