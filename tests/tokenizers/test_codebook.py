"""The codebook: nearest codes, averages by hand, k-means, unused codes, statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from beit_plugin.tokenizers import codebook
from beit_plugin.tokenizers.codebook import Codebook


def features(batch=2, dim=4, h=3, w=5, seed=0):
    return torch.randn(batch, dim, h, w, generator=torch.Generator().manual_seed(seed))


def flat(z):
    return F.normalize(z, dim=1).permute(0, 2, 3, 1).flatten(0, 2)


def test_nearest_of_codes_of_any_length(monkeypatch):
    book = Codebook(7, 4)
    book.weight.mul_(torch.rand(7, 1) + 0.5)
    z = flat(features())
    expected = torch.cdist(z.double(), book.weight.double()).argmin(1)
    assert torch.equal(book.nearest(z), expected) and len(expected.unique()) > 3
    monkeypatch.setattr(codebook, '_SCORES', 20)  # two features at a time
    assert torch.equal(book.nearest(z), expected)


def test_nearest_under_autocast():
    book, z = Codebook(500, 4), flat(features(h=30, w=40))
    expected = book.nearest(z)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(book.nearest(z), expected)


def test_a_step_by_hand():
    book = Codebook(6, 4, decay=0.9, kmeans_iters=0, revive=False)
    before, z = book.weight.clone(), features()
    quantized = book(z)
    rows, ids = flat(z), quantized.tokens.flatten()
    for code in range(6):
        mine = rows[ids == code]
        expected = before[code]
        if len(mine):
            expected = F.normalize(0.9 * expected + 0.1 * F.normalize(mine.sum(0), dim=0), dim=0)
        assert torch.allclose(book.weight[code], expected, atol=1e-6)
        assert book.cluster_size[code] == pytest.approx(0.1 * len(mine), rel=1e-5)
        assert book.unused_steps[code] == (0 if len(mine) else 101)
    assert quantized.loss == pytest.approx(F.mse_loss(before[ids], rows).item(), rel=1e-5)
    assert torch.allclose(quantized.codes.permute(0, 2, 3, 1).flatten(0, 2), before[ids], atol=1e-6)


def test_gradient_passes_as_if_there_were_no_codes():
    book, z = Codebook(6, 4, kmeans_iters=0), features().requires_grad_()
    codes = book(z).codes
    upstream = torch.randn_like(codes)
    codes.backward(upstream)
    got, z.grad = z.grad, None
    F.normalize(z, dim=1).backward(upstream)
    assert torch.equal(got, z.grad)


def test_evaluation_changes_nothing():
    book = Codebook(6, 4).eval()
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book(features())
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())


def test_kmeans_finds_clusters_in_the_first_batch():
    centres = F.normalize(torch.randn(8, 16), dim=1)
    z = centres[torch.arange(400) % 8] + 0.05 * torch.randn(400, 16)
    book = Codebook(8, 16)
    assert not book.initialized
    ids = book(z.t().reshape(1, 16, 20, 20)).tokens.flatten()
    found = (book.weight @ centres.t()).max(0).values
    assert book.initialized and (found > 0.99).sum() >= 6  # two that started in one cluster stay there
    means = torch.stack([F.normalize(z, dim=1)[ids == code].sum(0) for code in range(8)])
    assert torch.allclose(book.weight, F.normalize(means, dim=1), atol=1e-5)  # it has converged
    weight = book.weight.clone()
    book(z.t().reshape(1, 16, 20, 20))
    assert relative_error(book.weight, weight) < 0.01  # no second start


def test_more_codes_than_features():
    book = Codebook(64, 4)
    assert book(features()).tokens.unique().numel() == 30  # each feature has a code of its own
    assert torch.allclose(book.weight.norm(dim=1), torch.ones(64), atol=1e-5)


def test_unused_codes_are_replaced_after_the_window():
    book = Codebook(10, 4, kmeans_iters=0, window=5)
    away = -F.normalize(features().mean((0, 2, 3)), dim=0)
    z = 0.1 * features() - away[None, :, None, None]  # all features on one side
    book.weight.copy_(F.normalize(away + 0.01 * torch.randn(10, 4), dim=1))
    book.weight[0] = -away
    used = []
    for _ in range(12):
        book(z)
        used.append(book.usage().item())
    assert used[:5] == pytest.approx([0.1] * 5)
    assert used[-1] > 0.5
    alone = Codebook(10, 4, kmeans_iters=0, window=5, revive=False)
    alone.weight.copy_(F.normalize(away + 0.01 * torch.randn(10, 4), dim=1))
    alone.weight[0] = -away
    for _ in range(12):
        alone(z)
    assert alone.usage() == pytest.approx(0.1)


def test_usage_forgets():
    book = Codebook(4, 2, kmeans_iters=0, window=3, revive=False)
    book.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
    assert book.usage() == 0
    book(torch.tensor([1.0, 0]).view(1, 2, 1, 1))
    for expected in (0.5, 0.5, 0.25, 0.25):
        book(torch.tensor([-1.0, 0]).view(1, 2, 1, 1))
        assert book.usage() == expected


def test_perplexity():
    book = Codebook(4, 2)
    assert book.perplexity() == 1
    book.cluster_size.copy_(torch.tensor([3.0, 3, 3, 3]))
    assert book.perplexity() == pytest.approx(4)
    book.cluster_size.copy_(torch.tensor([1.0, 3, 0, 0]))
    assert book.perplexity() == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_features_that_are_not_finite_stay_out():
    book = Codebook(6, 4, window=2)
    book(features())
    z = features(seed=1)
    z[0, 1, 2, 3] = float('inf')
    z[1, 0] = float('nan')
    z[0, 2, 1:] = float('nan')
    for _ in range(4):
        book(z)  # five features are left
    assert all(value.isfinite().all() for value in book.state_dict().values())
    assert torch.allclose(book.weight.norm(dim=1), torch.ones(6), atol=1e-5)
    assert book.cluster_size.sum() < 2  # of 100 steps' average: one with 30, four with 5


def test_resuming_is_exact():
    def run(book, steps):
        for step in steps:
            torch.manual_seed(step)
            book(features(seed=step))
        return book

    whole = run(Codebook(20, 4, window=3), range(10))
    half = run(Codebook(20, 4, window=3), range(5))
    other = Codebook(20, 4, window=3)
    other(features(seed=77))  # what was there before is forgotten
    other.load_state_dict(half.state_dict())
    run(other, range(5, 10))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in whole.state_dict().items())


def test_loading_an_unset_codebook_starts_anew():
    book, fresh = Codebook(6, 4), Codebook(6, 4)
    book(features())
    book.load_state_dict(fresh.state_dict())
    book(features())
    assert book.initialized and not torch.allclose(book.weight, fresh.weight, atol=0.1)


@pytest.mark.parametrize('wrong', [dict(vocab_size=1), dict(dim=0), dict(window=0), dict(decay=1.0), dict(decay=-0.1)])
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match=r'a codebook needs vocab_size >= 2.* got '):
        Codebook(**{'vocab_size': 6, 'dim': 4, **wrong})


def test_empty_batch():
    book = Codebook(6, 4)
    with pytest.raises(ValueError, match='cannot learn from a batch without images'):
        book(features()[:0])
    assert book.eval()(features()[:0]).tokens.shape == (0, 3, 5)
