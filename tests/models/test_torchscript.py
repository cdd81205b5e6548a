"""TorchScript programs of `Beit` against the model that they come from."""

import io
import sys

import pytest
import torch
from helpers import images, randomize, relative_error
from torch import nn

from beit_plugin.models import torchscript as scripted
from beit_plugin.models.beit import Beit
from beit_plugin.segmentation.backbone import BeitBackbone

pytestmark = pytest.mark.skipif(sys.version_info >= (3, 14), reason='TorchScript ends with Python 3.13')

SMALL = dict(img_size=(48, 80), embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=7)
FORMS = {
    'v1': dict(),
    'token': dict(global_pool='token', init_values=None, qkv_bias=False),
    'all tokens': dict(global_pool='', num_classes=0),
    'shared': dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    'both tables': dict(use_shared_rel_pos_bias=True, rel_pos_resize='linear'),
    'positions alone': dict(use_rel_pos_bias=False, use_abs_pos_emb=True, patch_norm=True),
    'all positions': dict(use_abs_pos_emb=True, rel_pos_resize='bilinear', patch_size=(16, 8)),
}


@pytest.fixture(autouse=True)
def few_sides(monkeypatch):
    monkeypatch.setattr(scripted, 'MAX_SIDE', 12)


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize('form', FORMS)
def test_outputs_at_all_sizes(form):
    model = randomize(Beit(**{**SMALL, **FORMS[form]})).eval()
    program = torch.jit.script(model)
    loaded = saved_and_loaded(program)
    for size in ((48, 80), (80, 48), (16, 96), (33, 70)):
        x = images(*size)
        with torch.no_grad():
            expected = model(x)
            for got in (program(x), loaded(x), program(x[:1].repeat(3, 1, 1, 1))[:1]):
                assert relative_error(got, expected[: len(got)]) < 1e-5


def test_gradients_and_training():
    model = randomize(Beit(**SMALL, drop_path_rate=0.5, pos_drop_rate=0.1, attn_drop_rate=0.1, drop_rate=0.1))
    program = torch.jit.script(model)
    results = []
    for module in (model, program):
        torch.manual_seed(0)
        module(images(48, 80)).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert dict(program.named_parameters()).keys() == results[0].keys()
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) < 1e-4, name
    assert not torch.equal(program(images(48, 80)), program(images(48, 80)))
    program.eval()
    assert torch.equal(program(images(48, 80)), program(images(48, 80)))


def test_the_model_stays_as_it_was():
    model = Beit(**SMALL).eval()
    before = model(images(48, 80))
    torch.jit.script(model)
    assert torch.equal(model(images(48, 80)), before) and type(model.blocks[0]).__name__ == 'Block'


def test_what_does_not_fit():
    program = torch.jit.script(Beit(**SMALL).eval())
    with pytest.raises(torch.jit.Error, match='smaller than a patch: enlarge or pad it'):
        program(images(8, 80))
    with pytest.raises(
        torch.jit.Error, match='more patches a side than this program has matrices for: tile or shrink it'
    ):
        program(images(16, 16 * 13))
    with pytest.raises(ValueError, match=r'TorchScript cannot take a model with window_size; use torch\.export'):
        torch.jit.script(Beit(**SMALL, window_size=2))
    with pytest.raises(ValueError, match=r'TorchScript can take a Beit, not a BeitBackbone; use torch\.export'):
        torch.jit.script(BeitBackbone(**{**SMALL, 'num_classes': 0}, out_indices=(0, 1)))


def test_as_part_of_a_larger_model():
    model = nn.Sequential(randomize(Beit(**SMALL)), nn.Softmax(-1)).eval()
    expected = model(images(48, 80))
    assert relative_error(torch.jit.script(model)(images(48, 80)), expected) < 1e-5


@pytest.mark.parametrize('backend', ['auto', 'eager'])
def test_programs_of_graphs(backend):
    """Of torch.fx, which hold patches and (unless they are eager) blocks as they are, as timm's own tests ask for."""
    pytest.importorskip('torchvision')
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    model = randomize(Beit(**SMALL, attn_backend=backend)).eval()
    tracing = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    graph = create_feature_extractor(model, ['head'], tracer_kwargs=tracing)
    program = torch.jit.script(graph)
    for size in ((48, 80), (80, 48), (33, 70)):
        x = images(*size)
        assert relative_error(program(x)['head'], model(x)) < 1e-5
    program(x)['head'].square().sum().backward()
    got = model.blocks[0].attn.relative_position_bias_table.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert relative_error(got, model.blocks[0].attn.relative_position_bias_table.grad) < 1e-5
