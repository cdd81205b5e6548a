"""Masks: the official rule's distribution, exact numbers, where the random numbers come from, errors."""

import importlib.util
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from beit_plugin.data.masking import BlockMasking, RandomMasking


def torch_generator(seed):
    return torch.Generator().manual_seed(seed)


GENERATORS = [np.random.default_rng, torch_generator]
SETTINGS = [
    ((14, 14), 75, {}),  # the published one
    ((9, 21), 90, dict(min_num_patches=6, max_num_patches=40, min_aspect=0.4, max_aspect=1.5)),  # two words to a row
]


class Official:
    """BEiT's rule for one image at a time, in plain Python; ``source`` is Python's ``random`` or has its methods.

    Random numbers are drawn in the order of the released code, so that the same seed gives the same masks.
    """

    def __init__(self, grid, num, source, *, min_num_patches=16, max_num_patches=None, min_aspect=0.3, max_aspect=None):
        self.grid, self.num, self.source = grid, num, source
        self.smallest, self.largest = min_num_patches, max_num_patches or num
        self.log_aspect = math.log(min_aspect), math.log(max_aspect or 1 / min_aspect)

    def blocks(self):
        """BEiT v1's mask and its number of blocks."""
        mask, missing, num_blocks = np.zeros(self.grid, dtype=int), self.num, 0
        while missing > 0:
            hidden = self.add_block(mask, min(missing, self.largest))
            if not hidden:
                break
            missing -= hidden
            num_blocks += 1
        return mask, num_blocks

    def add_block(self, mask, limit):
        for _ in range(10):
            area = self.source.uniform(self.smallest, limit)
            aspect = math.exp(self.source.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.grid[0] or width >= self.grid[1]:
                continue
            top = self.source.randint(0, self.grid[0] - height)
            left = self.source.randint(0, self.grid[1] - width)
            new = height * width - mask[top : top + height, left : left + width].sum()
            if not 0 < new <= limit:
                continue
            for y in range(top, top + height):
                for x in range(left, left + width):
                    if mask[y, x] == 0:
                        mask[y, x] = 1
            return int(new)
        return 0

    def __call__(self):
        """BEiT v2's mask: the missing patches are drawn among the visible ones."""
        mask, _ = self.blocks()
        visible = np.argwhere(mask == 0).tolist()
        for y, x in self.source.sample(visible, self.num - int(mask.sum())):
            mask[y, x] = 1
        return mask


def official(grid, num, options, amount=5000):
    rule = Official(grid, num, random.Random(0), **options)
    return tuple(map(np.stack, zip(*(rule.blocks() for _ in range(amount)), strict=True)))


def ours(grid, num, options, amount=16000, at_once=16000):
    rule, generator = BlockMasking(grid, num, **options), np.random.default_rng(0)
    parts = [rule.blocks(at_once, generator) for _ in range(amount // at_once)]
    return tuple(torch.cat(part).numpy() for part in zip(*parts, strict=True))


def borders(masks):
    """Pairs of neighbours of which one is hidden, in every image: how compact a mask is."""
    masks = masks.astype(int)
    return abs(np.diff(masks, axis=1)).sum((1, 2)) + abs(np.diff(masks, axis=2)).sum((1, 2))


def p_of_counts(got, expected):
    """Chi-square test that two samples of whole numbers have one distribution; rare values go with their neighbours."""
    table = np.stack([np.bincount(x, minlength=max(got.max(), expected.max()) + 1) for x in (got, expected)])
    bins, current = [], np.zeros(2)
    for column in table.T:
        current = current + column
        if current[1] >= 15:
            bins.append(current)
            current = np.zeros(2)
    bins[-1] = bins[-1] + current
    assert len(bins) > 1, 'one value alone compares nothing'
    return stats.chi2_contingency(np.stack(bins)).pvalue


def p_of_patches(got, expected):
    """Chi-square test that every patch is hidden as often; patches of an image depend on each other."""
    got, expected = (x.reshape(len(x), -1).astype(float) for x in (got, expected))
    difference = got.mean(0) - expected.mean(0)
    covariance = np.cov(np.concatenate((got, expected)).T) * (1 / len(got) + 1 / len(expected))
    rank = np.linalg.matrix_rank(covariance, hermitian=True)
    return stats.chi2.sf(difference @ np.linalg.pinv(covariance, hermitian=True) @ difference, rank)


def p_values(got, expected):
    (masks, blocks), (expected_masks, expected_blocks) = got, expected
    return {
        'blocks': p_of_counts(blocks, expected_blocks),
        'size': p_of_counts(masks.sum((1, 2)), expected_masks.sum((1, 2))),
        'border': p_of_counts(borders(masks), borders(expected_masks)),
        'patches': p_of_patches(masks, expected_masks),
    }


@pytest.mark.parametrize('grid, num, options', SETTINGS)
def test_distribution(grid, num, options):
    expected = official(grid, num, options)
    # as many attempts a round as there are, and as few
    for amount, at_once in ((16000, 16000), (4000, 20)):
        found = p_values(ours(grid, num, options, amount, at_once), expected)
        assert min(found.values()) > 1e-4, (at_once, found)


def test_distribution_sees_other_rules(monkeypatch):
    # the test above would be worth nothing if rules that are a little different passed it
    grid, num, options = SETTINGS[0]
    expected = official(grid, num, options)
    masks, blocks = ours(grid, num, options)
    shifted = np.roll(masks, 1, axis=2)
    rarer = masks.copy()
    rarer[:, 7, 7] &= np.arange(len(masks)) % 8 > 0
    wrong = {
        'smaller blocks': ours(grid, num, dict(min_num_patches=13)),
        'rounder blocks': ours(grid, num, dict(min_aspect=0.4)),
        'no large blocks': ours(grid, num, dict(max_num_patches=70)),
        'other places': (shifted, blocks),
        'one patch less often': (rarer, blocks),
        'filled up': (BlockMasking(grid, num)(16000, np.random.default_rng(0)).numpy(), blocks),
    }
    for attempts in (8, 13):
        monkeypatch.setattr('beit_plugin.data.masking._ATTEMPTS', attempts)
        wrong[f'{attempts} attempts'] = ours(grid, num, options)
    found = {name: min(p_values(sample, expected).values()) for name, sample in wrong.items()}
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize('grid, num, options', SETTINGS)
def test_distribution_of_exact_masks(grid, num, options):
    rule = Official(grid, num, random.Random(1), **options)
    expected = np.stack([rule() for _ in range(4000)])
    masks = BlockMasking(grid, num, **options)(16000, np.random.default_rng(1)).numpy()
    assert (masks.sum((1, 2)) == num).all() and (expected.sum((1, 2)) == num).all()
    assert p_of_patches(masks, expected) > 1e-4
    assert p_of_counts(borders(masks), borders(expected)) > 1e-4


def test_missing_patches_are_any_of_the_visible():
    rule = BlockMasking(14, 75)
    before, _ = rule.blocks(20000, np.random.default_rng(2))
    after = rule(20000, np.random.default_rng(2))
    assert (after | before).equal(after)
    visible, filled = ~before.flatten(1), (after & ~before).flatten(1)
    one = filled.sum(1) == 1
    assert one.float().mean() > 0.1  # of the images; about half of those that are filled up
    rank = visible.cumsum(1)[one][filled[one]] - 1  # of 122, the number of visible patches
    assert stats.chisquare(np.bincount(rank.numpy(), minlength=122)).pvalue > 1e-4


def test_random_masks_are_any_of_all():
    masks = RandomMasking((2, 3), 2)(15000, np.random.default_rng(3)).flatten(1).numpy()
    counts = [masks[:, pair].all(1).sum() for pair in itertools.combinations(range(6), 2)]
    assert sum(counts) == 15000 and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.skipif(importlib.util.find_spec('transformers') is None, reason='needs transformers')
@pytest.mark.parametrize('grid, num, options', [*SETTINGS, ((5, 30), 30, dict(min_num_patches=4))])
def test_the_reference_is_the_official_rule(grid, num, options):
    from transformers.models.flava.image_processing_flava import FlavaMaskingGenerator  # the same rule, line by line

    named = {
        'mask_group_min_patches': options.get('min_num_patches', 16),
        'mask_group_max_patches': options.get('max_num_patches'),
        'mask_group_min_aspect_ratio': options.get('min_aspect', 0.3),
        'mask_group_max_aspect_ratio': options.get('max_aspect'),
    }
    peer, rule = FlavaMaskingGenerator(grid, num, **named), Official(grid, num, random, **options)
    state = random.getstate()
    for seed in range(20):
        random.seed(seed)
        expected = peer()
        random.seed(seed)
        assert np.array_equal(rule.blocks()[0], expected.numpy())
    random.setstate(state)


@pytest.mark.parametrize('make', GENERATORS)
@pytest.mark.parametrize('amount', [0, 1, 7, 300])
@pytest.mark.parametrize(
    'masking',
    [
        BlockMasking(14, 75),
        BlockMasking((14, 14), 196),  # what no block can hide is filled up
        BlockMasking((3, 16), 9, min_num_patches=4, min_aspect=0.2),
        BlockMasking((40, 17), 300, max_num_patches=500),
        BlockMasking((33, 7), 16, min_aspect=1.0),
        RandomMasking((5, 3), 6),
        RandomMasking(4, 0),
        RandomMasking((1, 7), 7),
    ],
    ids=lambda masking: f'{type(masking).__name__}-{masking.grid}',
)
def test_exact_number(masking, amount, make):
    masks = masking(amount, make(0))
    assert masks.shape == (amount, *masking.grid) and masks.dtype == torch.bool and masks.is_contiguous()
    assert (masks.sum((1, 2)) == masking.num_masking_patches).all()
    if isinstance(masking, BlockMasking):
        masks, num_blocks = masking.blocks(amount, make(0))
        assert (masks.sum((1, 2)) <= masking.num_masking_patches).all()
        assert num_blocks.shape == (amount,) and (num_blocks > 0).equal(masks.any(2).any(1))


def test_a_single_block():
    # smallest area, largest area and number agree: a block of the asked number and shape, or none
    masks, num_blocks = BlockMasking((7, 20), 16, max_num_patches=16, min_aspect=0.25, max_aspect=0.25).blocks(
        500, np.random.default_rng(0)
    )
    assert (num_blocks == 1).all()
    assert (masks.any(2).sum(1) == 2).all() and (masks.any(1).sum(1) == 8).all()
    assert masks.any(0).all()  # the last row and column too


@pytest.mark.parametrize('make', GENERATORS)
@pytest.mark.parametrize('masking', [BlockMasking((9, 14), 40), RandomMasking((9, 14), 40)])
def test_the_same_state_gives_the_same_masks(masking, make):
    first, second = make(5), make(5)
    before = [random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()]
    masks = [masking(6, first) for _ in range(4)]
    assert before == [random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()]
    assert not masks[0].equal(masks[1]) and not masks[0].equal(masking(6, make(6)))

    # interrupted after two calls: the state is stored, and the masking goes to another process
    assert all(masking(6, second).equal(mask) for mask in masks[:2])
    resumed = pickle.loads(pickle.dumps(masking))
    if isinstance(second, torch.Generator):
        third = torch.Generator()
        third.set_state(second.get_state())
    else:
        third = np.random.default_rng()
        third.bit_generator.state = second.bit_generator.state
    assert all(resumed(6, third).equal(mask) for mask in masks[2:])


def test_places_and_steps_have_streams_of_their_own():
    # what the module's docstring recommends: nothing is stored, step 7 of any worker can be drawn first
    masking = BlockMasking(14, 75)
    places = list(itertools.product([0, 1], [0, 1], [0, 1], [6, 7]))  # seed, rank, worker, step
    masks = {place: masking(2, np.random.default_rng(place)) for place in places}
    assert len({mask.numpy().tobytes() for mask in masks.values()}) == len(places)
    assert all(masking(2, np.random.default_rng(place)).equal(masks[place]) for place in reversed(places))


class Collate:
    masking = BlockMasking(14, 75)

    def __call__(self, items):
        return self.masking(len(items), torch.default_generator)


def test_workers_of_a_data_loader():
    def epoch(seed):
        loader = torch.utils.data.DataLoader(
            range(12), 3, num_workers=2, collate_fn=Collate(), generator=torch.Generator().manual_seed(seed)
        )
        return torch.cat(list(loader))

    masks = epoch(0)
    assert len({mask.numpy().tobytes() for mask in masks}) == 12  # workers and batches differ
    assert epoch(0).equal(masks) and not epoch(1).equal(masks)


@pytest.mark.parametrize(
    'arguments, options, message',
    [
        ((0, 75), {}, r'grid must be one or two whole numbers \(h, w\) of patches above 0, got 0'),
        (((14, 14, 3), 75), {}, r'grid must be .* got \(14, 14, 3\)'),
        (('14', 75), {}, "grid must be .* got '14'"),
        ((14, 0.4), {}, r'num_masking_patches must be a whole number .*\(a number of patches, not .*, got 0.4'),
        (((14, 10), 150), {}, 'num_masking_patches must be at most the 140 patches of a grid of 14 x 10, got 150'),
        ((14, 15), {}, 'num_masking_patches must be at least min_num_patches, which is 16, got 15; hide more'),
        ((14, 75), dict(min_num_patches=0), 'min_num_patches must be a whole number of at least 1, got 0'),
        ((14, 75), dict(max_num_patches=12), r'max_num_patches must be .* at least 16 \(min_num_patches\).* got 12'),
        ((14, 75), dict(min_aspect=0), r'min_aspect must be a number above 0 \(.*\), got 0'),
        ((14, 75), dict(min_aspect=math.nan), 'min_aspect must be a number above 0 .* got nan'),
        ((14, 75), dict(max_aspect=0.2), r'max_aspect must be a number of at least 0.3 \(min_aspect\), got 0.2'),
        ((14, 75), dict(min_aspect=2), 'max_aspect must be .* got None, which stands for 1 / min_aspect, 0.5'),
        (((2, 30), 20), {}, 'a block of min_num_patches 16 patches .* lower and narrower than the grid, got .* 2 x 30'),
        (((30, 2), 20), {}, 'a block of min_num_patches 16 patches .* lower and narrower than the grid, got .* 30 x 2'),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        BlockMasking(*arguments, **options)


@pytest.mark.parametrize('masking', [BlockMasking(14, 75), RandomMasking(14, 75)])
def test_errors_of_a_call(masking):
    with pytest.raises(ValueError, match='num_images must be a whole number of at least 0, got -1'):
        masking(-1, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r'generator must be .* got builtins.int; numpy.random.default_rng\(\(seed'):
        masking(2, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_errors_of_a_generator_on_another_device():
    with pytest.raises(ValueError, match=r'generator must be .* got torch\._C\.Generator on cuda'):
        BlockMasking(14, 75)(2, torch.Generator('cuda'))
