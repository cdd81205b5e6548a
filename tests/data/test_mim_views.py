"""Files, the two views of a crop, masks of a batch."""

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining_common import pictures

from beit_plugin.data.masking import BlockMasking
from beit_plugin.data.mim_views import AllViews, ImageFiles, TwoViews, mim_collate

PLAIN = dict(color_jitter=0.0, hflip=0.0)


def slope(width=90, height=60):
    """Red grows to the right, green downwards: a pixel tells where it was."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), np.full_like(x, 90)], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


class TestViews:
    def test_both_are_of_one_crop(self):
        views = TwoViews(64, 32, **PLAIN)
        for seed in range(5):
            torch.manual_seed(seed)
            sample = views(slope())
            large, small = sample['inputs'].float(), sample['token_view'].float()
            assert large.shape == (3, 64, 64) and small.shape == (3, 32, 32) and sample['inputs'].dtype == torch.uint8
            assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().max() < 6

    def test_another_crop_each_time_and_the_same_by_the_same_seed(self):
        views = TwoViews(32, None)
        torch.manual_seed(0)
        first, second = views(slope()), views(slope())
        torch.manual_seed(0)
        again = views(slope())
        assert torch.equal(first['inputs'], again['inputs']) and not torch.equal(first['inputs'], second['inputs'])
        assert 'token_view' not in first

    def test_scale_is_the_share_of_the_area(self):
        shares = []
        views = TwoViews(32, None, scale=(0.2, 0.5), **PLAIN)
        for _ in range(200):
            red, green = views(slope(200, 200))['inputs'][:2].float()
            shares.append(((red.max() - red.min()) * (green.max() - green.min()) / 255**2).item())
        assert 0.15 < min(shares) < 0.25 and 0.43 < max(shares) < 0.53

    def test_mirror_images_and_colours(self):
        mirrored = TwoViews(32, None, color_jitter=0.0, hflip=1.0)(slope())['inputs'][0].float()
        assert (mirrored[:, 0] > mirrored[:, -1]).all()
        torch.manual_seed(0)
        plain = TwoViews(32, None, **PLAIN)(slope())['inputs'][2]
        changed = TwoViews(32, None, color_jitter=0.4, hflip=0.0)(slope())['inputs'][2]
        assert plain.unique().tolist() == [90] and changed.float().mean() != 90

    def test_one_tensor_where_both_would_be_equal(self):
        assert 'token_view' not in TwoViews(32, 32, token_interpolation='bicubic')(slope())
        assert 'token_view' in TwoViews(32, 32, token_interpolation='lanczos')(slope())

    def test_center(self):
        sample = TwoViews((32, 64), (16, 32)).center(slope(90, 60))
        red, green, _ = sample['inputs'].float()
        assert sample['inputs'].shape == (3, 32, 64) and sample['token_view'].shape == (3, 16, 32)
        assert red.min() < 4 and red.max() > 251  # the whole width, and the middle of the height
        assert abs(green.min() + green.max() - 255) < 4 and green.min() > 20

    @pytest.mark.parametrize(
        ('options', 'sentence'),
        [
            (dict(size=0), 'size must be one or two whole numbers'),
            (dict(interpolation='cubic'), "interpolation must be one of bilinear, bicubic, lanczos, got 'cubic'"),
            (dict(scale=(0.0, 1.0)), r'scale must be two shares .* got \(0.0, 1.0\)'),
            (dict(color_jitter=2.0), 'color_jitter and hflip must be from 0 to 1, got 2.0'),
        ],
    )
    def test_sentences(self, options, sentence):
        with pytest.raises(ValueError, match=sentence) as caught:
            TwoViews(**options)
        assert '\n' not in str(caught.value)


class TestFiles:
    def test_broken_ones(self, tmp_path):
        root = pictures(tmp_path, 3)
        (root / 'class0/0.png').write_bytes((root / 'class0/0.png').read_bytes()[:200])
        met = {}
        files = ImageFiles(root, TwoViews(16, None), met.__setitem__)
        assert files[0]['inputs'].shape == (3, 16, 16)
        assert list(met) == [str(root / 'class0/0.png')] and 'cannot be read as an image' in met[str(files.path(0))]
        with pytest.raises(ValueError, match=r"image '\S+class0/0.png' cannot be read as an image"):
            ImageFiles(root, TwoViews(16, None))[0]
        for path in root.rglob('*.png'):
            path.write_bytes(b'')
        with pytest.raises(ValueError, match='none of 100 images in a row can be read, the last one is'):
            files[1]

    @pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', 'I;16'])
    def test_other_modes_become_rgb(self, tmp_path, mode):
        path = tmp_path / ('a.tif' if mode in ('CMYK', 'I;16') else 'a.png')
        image = Image.fromarray(np.full((20, 20), 40000, np.uint16)) if mode == 'I;16' else slope(20, 20).convert(mode)
        image.save(path)
        sample = ImageFiles(tmp_path, TwoViews(16, None, **PLAIN))[0]
        assert sample['inputs'].shape == (3, 16, 16)
        if mode == 'I;16':
            assert sample['inputs'].unique().tolist() == [40000 >> 8]

    def test_floats_are_refused(self, tmp_path):
        Image.new('F', (8, 8), 0.5).save(tmp_path / 'a.tif')
        with pytest.raises(ValueError, match=r'a.tif. holds torch.float32 values: save it with 8 bits'):
            ImageFiles(tmp_path, TwoViews(16, None))[0]


class TestFixedViews:
    def files(self, root, **options):
        return ImageFiles(root, TwoViews(16, 8), **{'num_views': 2, 'seed': 5, **options})

    def test_are_the_same_in_every_process_and_epoch(self, tmp_path):
        files = self.files(pictures(tmp_path, 3), num_views=1)
        torch.manual_seed(0)
        first = [files[i] for i in range(3)]
        loader = torch.utils.data.DataLoader(files, 1, num_workers=2)
        for epoch in range(2):
            torch.manual_seed(epoch + 1)
            for sample, batch in zip(first, loader, strict=True):
                for name in ('inputs', 'token_view'):
                    assert torch.equal(batch[name][0], sample[name])
        assert not torch.equal(first[0]['inputs'], self.files(tmp_path, num_views=1, seed=6)[0]['inputs'])

    def test_one_of_them_is_taken_at_random(self, tmp_path):
        files = self.files(pictures(tmp_path, 2))
        seen = [{files[i]['inputs'].numpy().tobytes() for _ in range(20)} for i in range(2)]
        assert [len(views) for views in seen] == [2, 2] and not seen[0] & seen[1]
        tokens = [view for i in range(2) for view in AllViews(files)[i][1]]
        found = {files[i]['token_view'].numpy().tobytes() for i in range(2) for _ in range(20)}
        assert found == {view.numpy().tobytes() for view in tokens}

    def test_nothing_else_becomes_less_random(self, tmp_path):
        files = self.files(pictures(tmp_path, 1))
        torch.manual_seed(1)
        torch.randint(2, ())
        expected = torch.rand(3)
        torch.manual_seed(1)
        files[0]
        assert torch.equal(torch.rand(3), expected)

    def test_all_of_an_image(self, tmp_path):
        files = self.files(pictures(tmp_path, 2), num_views=3)
        (tmp_path / 'class1/1.png').write_bytes(b'')
        index, pixels, reason = AllViews(files)[0]
        assert (index, pixels.shape, pixels.dtype, reason) == (0, (3, 3, 8, 8), torch.uint8, '')
        index, pixels, reason = AllViews(files)[1]
        assert (index, pixels) == (1, None) and '1.png' in reason

    @pytest.mark.parametrize(
        ('options', 'sentence'),
        [
            (dict(num_views=0), 'num_views must be at least 1 and seed at least 0, got 0 and 5'),
            (dict(seed=-1), 'seed at least 0, got 2 and -1'),
            (dict(num_views=None), 'got seed=5, which is of fixed views: give their number as num_views'),
        ],
    )
    def test_sentences(self, tmp_path, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            self.files(pictures(tmp_path, 1), **options)


class TestCollate:
    SAMPLES = [dict(inputs=torch.full((3, 8, 8), i, dtype=torch.uint8)) for i in range(5)]  # noqa: RUF012
    MASKING = dict(grid=(14, 14), num_masking_patches=75)  # noqa: RUF012

    def test_masks_are_those_of_the_generator(self):
        torch.manual_seed(4)
        batch = mim_collate(self.SAMPLES, self.MASKING)
        expected = BlockMasking(14, 75)(5, torch.Generator().manual_seed(4))
        assert torch.equal(batch['mask'], expected) and batch['mask'].flatten(1).sum(1).tolist() == [75] * 5
        assert batch['inputs'][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
        again = mim_collate(self.SAMPLES, self.MASKING, torch.Generator().manual_seed(4))
        assert torch.equal(again['mask'], expected)

    def test_without_blocks_and_without_masks(self):
        batch = mim_collate(self.SAMPLES, dict(grid=[2, 3], num_masking_patches=2, blockwise=False))
        assert batch['mask'].shape == (5, 2, 3) and batch['mask'].flatten(1).sum(1).tolist() == [2] * 5
        assert 'mask' not in mim_collate(self.SAMPLES)

    def test_workers_draw_their_own(self):
        loader = torch.utils.data.DataLoader(
            self.SAMPLES * 4, 5, num_workers=2, collate_fn=lambda samples: mim_collate(samples, self.MASKING)
        )
        masks = [batch['mask'] for batch in loader]
        assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)


def test_masks_are_drawn_on_the_cpu_under_another_default_device():
    with torch.device('meta'):
        assert BlockMasking(14, 75)(1, torch.Generator()).sum() == 75
