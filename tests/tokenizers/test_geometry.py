"""What a VQ-KD says of its grid and heads, beside what its weights say."""

import pytest
import torch

from beit_plugin.checkpoints import CheckpointError
from beit_plugin.tokenizers import load_tokenizer, save_tokenizer


@pytest.mark.parametrize(
    ('geometry', 'words'),
    [
        ((4, 6, 10**9), '1000000000 attention heads do not fit a VQ-KD of width 64'),
        ((4, 6, 0), 'geometry must be three whole numbers'), ((4, 6, -2), 'geometry must be three whole numbers'),
        ((4, 6), 'geometry must be three whole numbers'), ((4.0, 6.0, 2.0), 'geometry must be three whole numbers'),
        ((10**6, 10**6, 2), r'not of .* 1000000x1000000 grid'), ((6, 6, 2), 'not of .* 6x6 grid'),
    ],
)  # fmt: skip
def test_a_geometry_that_contradicts_the_weights(make_vqkd, geometry, words):
    state = {**make_vqkd().state_dict(), 'geometry': torch.tensor(geometry)}
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(state)


@pytest.mark.parametrize('dialect', ['unilm', 'mmpretrain'])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_files_for_others_state_the_grid(make_vqkd, dialect, suffix, tmp_path):
    """18x32 patches have as many positions as 24x24."""
    save_tokenizer(make_vqkd(img_size=(144, 256), num_heads=1), tmp_path / f'x.{suffix}', dialect)
    assert load_tokenizer(tmp_path / f'x.{suffix}').encoder.window_size == (18, 32)
