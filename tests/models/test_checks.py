"""Wrong values of constructors: one sentence each, which names the argument."""

import numpy as np
import pytest
from helpers import TINY

from beit_plugin.models.beit import Beit
from beit_plugin.models.checks import height_and_width
from beit_plugin.segmentation.backbone import BeitBackbone, resolve_stages


@pytest.mark.parametrize(
    'value, expected',
    [(7, (7, 7)), ((3, 5), (3, 5)), ([3, 5], (3, 5)), (np.int64(7), (7, 7)), ((np.int64(3), 5), (3, 5))],
)
def test_sizes(value, expected):
    assert height_and_width('img_size', value) == expected


@pytest.mark.parametrize('value', [0, -16, (16, 0), 64.0, (64.0, 64.0), '224', '64', None, (64,), (64, 64, 3), ()])
@pytest.mark.parametrize('name', ['img_size', 'patch_size'])
def test_wrong_sizes(name, value):
    with pytest.raises(ValueError, match=rf'{name} must be one or two whole numbers \(H, W\) of pixels above 0, got '):
        Beit(**{**TINY, name: value})


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(in_chans=0), 'in_chans must be at least 1, got 0'),
        (dict(init_std=0), 'init_std must be above 0, got 0; the published models start with 0.02'),
        (dict(init_std=-0.1), 'init_std must be above 0, got -0.1'),
        (dict(drop_rate=1), 'drop_rate must be at least 0 and below 1, got 1'),
        (dict(pos_drop_rate=-0.1), 'pos_drop_rate must be at least 0 and below 1, got -0.1'),
        (dict(proj_drop_rate=1.5), 'proj_drop_rate must be at least 0'),
        (dict(attn_drop_rate=1.5), 'attn_drop_rate must be at least 0'),
        (dict(drop_path_rate=1.0), 'drop_path_rate must be at least 0'),
    ],
)
def test_wrong_numbers(options, sentence):
    with pytest.raises(ValueError, match=f'^{sentence}'):
        Beit(**TINY, **options)


@pytest.mark.parametrize('value', [('stage1',), 'stage1', (0, 'stage1'), 1.5])
def test_stage_names_belong_in_out_features(value):
    with pytest.raises(ValueError, match=r'out_indices are numbers of blocks, .*got .*; name stages by out_features'):
        BeitBackbone(**TINY, out_indices=value)
    assert resolve_stages(4, range(1, 2)) == (2,)
