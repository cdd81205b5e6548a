import pytest
import torch
from torch import nn

from beit_plugin.segmentation.loss import SegmentationLoss
from beit_plugin.segmentation.pyramid import FeaturePyramid
from beit_plugin.segmentation.segmentor import BeitSegmentor
from beit_plugin.segmentation.upernet import FCNHead, UPerNetHead


class Patches(nn.Module):
    """Stands for an encoder: four maps at the stride of its patches, images padded to whole patches."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch
        self.embed = nn.Conv2d(3, 4, patch, patch)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = self.embed(nn.functional.pad(x, (0, -width % self.patch, 0, -height % self.patch)))
        return [x, x.sin(), x.cos(), x.tanh()]


def segmentor(auxiliary=True, patch=16, rescales=(4, 2, 1, 0.5), **options):
    return BeitSegmentor(
        backbone=Patches(patch),
        pyramid=FeaturePyramid(4, rescales),
        decode_head=UPerNetHead([4] * 4, 6, 5, pool_scales=(1, 2), dropout=0.0),
        auxiliary_head=FCNHead(4, 3, 5, dropout=0.0) if auxiliary else None,
        patch_size=patch,
        **options,
    )


@pytest.mark.parametrize('size', [(64, 64), (64, 96), (70, 33), (225, 47)])
@pytest.mark.parametrize('patch, rescales', [(16, (4, 2, 1, 0.5)), (8, (2, 1, 0.5, 0.25))])
def test_logits_at_a_quarter_of_any_size(size, patch, rescales):
    model = segmentor(patch=patch, rescales=rescales).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize('auxiliary', [True, False])
def test_loss_comes_with_the_logits_and_reaches_every_parameter(auxiliary):
    model = segmentor(auxiliary)
    loss, logits = model(torch.randn(2, 3, 64, 80), torch.randint(5, (2, 64, 80)))
    loss.backward()
    assert loss.ndim == 0 and logits.shape == (2, 5, 16, 20)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_auxiliary_head_reads_its_level():
    model = segmentor(loss=SegmentationLoss(aux_weight=1.0), auxiliary_index=2).eval()
    image, labels = torch.randn(2, 3, 64, 80), torch.randint(5, (2, 64, 80))
    loss, logits = model(image, labels)
    auxiliary = model.auxiliary_head(model.backbone(image)[2])
    torch.testing.assert_close(loss, SegmentationLoss(aux_weight=1.0)(logits, labels, auxiliary))


def test_labels_may_have_another_size_than_the_image():
    loss, _ = segmentor().eval()(torch.randn(2, 3, 64, 80), torch.randint(5, (2, 100, 31)))
    assert loss.isfinite()


def test_classifier():
    model = segmentor()
    assert model.num_classes == 5 and model.get_classifier() is model.decode_head.conv_seg
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.auxiliary_head.conv_seg.out_channels == 7
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape[1] == 7
    plain = segmentor(auxiliary=False)
    plain.reset_classifier(2)
    assert plain.num_classes == 2


def test_parts_are_given_by_name():
    with pytest.raises(TypeError, match='positional'):
        BeitSegmentor(Patches(16))


def test_training_step_compiles_without_a_graph_break():
    model = segmentor().train()
    image, labels = torch.randn(2, 3, 64, 80), torch.randint(5, (2, 64, 80))
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(image, labels), model(image, labels))
