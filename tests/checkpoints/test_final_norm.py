"""The norm at the end of an encoder belongs to it: a checkpoint without it is refused, unless the head is new too."""

import pytest
import timm
from checkpoints.peers import DEPTH, DIM, HEADS, backbone, beit, mim

import beit_plugin  # noqa: F401  registers
from beit_plugin.checkpoints import CheckpointError, load
from beit_plugin.timm_models import checkpoint_filter_fn

SIZES = dict(img_size=32, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)
NAME = 'beit_plugin_base_patch16_224'


@pytest.mark.parametrize(
    'make, source, drop',
    [
        (lambda: beit(global_pool='token'), lambda: beit(global_pool='token'), ()),
        (
            lambda: beit(global_pool='token', num_classes=3),
            lambda: beit(global_pool='token', num_classes=3),
            ('head',),
        ),
        (lambda: backbone(final_norm=True), lambda: beit(num_classes=3), ()),  # mean-pooled: has another norm
    ],
)
def test_a_final_norm_that_is_missing(make, source, drop):
    state = {name: tensor for name, tensor in source().state_dict().items() if not name.startswith('norm.')}
    with pytest.raises(CheckpointError, match=r'it lacks norm\.weight, norm\.bias; name what to leave out by drop='):
        load(make(), state, drop=drop)
    assert 'norm' in load(make(), state, drop=(*drop, 'norm')).fresh


def test_a_final_norm_starts_anew_with_its_head():
    """As the mean-pooled weights of a classifier have none, and the head to be trained comes after it."""
    report = load(mim(use_shared_rel_pos_bias=False, use_rel_pos_bias=True), beit(num_classes=3).state_dict())
    assert {'norm', 'lm_head'} <= set(report.fresh)


def test_a_missing_norm_through_the_hosts():
    model = timm.create_model(NAME, **SIZES, num_classes=0, global_pool='token')
    whole = mim(use_shared_rel_pos_bias=False, use_rel_pos_bias=True).state_dict()
    state = {name: tensor for name, tensor in whole.items() if not name.startswith('norm.')}
    with pytest.raises(RuntimeError, match=r'Missing key.*norm\.weight'):
        model.load_state_dict(state)
    encoder = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('norm.')}
    with pytest.raises(CheckpointError, match=r'does not fit Beit: it lacks norm\.weight, norm\.bias'):
        checkpoint_filter_fn(encoder, model)
