"""The codebook of VQ-KD: directions that follow the features which choose them, by averages instead of gradients.

Paper: BEiT v2, https://arxiv.org/abs/2208.06366, section 2.2.
Reference: https://github.com/microsoft/unilm (MIT licence), ``beit2/norm_ema_quantizer.py`` at 80d673a. Written anew;
what differs from the reference:
    * several processes start from one k-means over all their features; the reference lets each process run its own,
      and their codebooks stay apart from then on;
    * codes that nothing chooses any more are replaced by features of the present batch;
    * only training changes the codebook or its statistics, and features that are not finite never enter it.

Shapes: B batch, D code dim, h w grid, T = B*h*w features, V codes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .base import without_autocast

__all__ = ['Codebook', 'Quantized']

_SCORES = 2**26  # elements of the (T, V) product that are in memory at once: 256 MiB


class Quantized(NamedTuple):
    """What a codebook makes of features."""

    codes: Tensor  # B, D, h, w: the chosen codes; the gradient goes to the features as if they were these
    loss: Tensor  # scalar: mean squared distance of the normalised features from their codes
    tokens: Tensor  # B, h, w int64


class Codebook(nn.Module):
    """Unit vectors and how much they are used.

    Args:
        vocab_size: V.
        dim: D.
        decay: how much of a code is kept in each step, 0 to 1.
        kmeans_iters: iterations of the k-means over the first batch from which training starts; 0 to start from random
            directions.
        window: steps after which a code that no feature has chosen counts as unused.
        revive: replace unused codes by features of the present batch, again after each ``window`` steps.

    Raises:
        ValueError: a number out of its range.
    """

    weight: Tensor  # V, D
    cluster_size: Tensor  # V: features that chose the code in a step, averaged as the codes are
    unused_steps: Tensor  # V: training steps since a feature last chose the code
    initialized: Tensor  # whether the codes are set

    def __init__(
        self,
        vocab_size: int = 8192,
        dim: int = 32,
        decay: float = 0.99,
        kmeans_iters: int = 10,
        window: int = 100,
        revive: bool = True,
    ) -> None:
        super().__init__()
        if vocab_size < 2 or dim < 1 or window < 1 or kmeans_iters < 0 or not 0 <= decay < 1:
            raise ValueError(
                'a codebook needs vocab_size >= 2, code_dim >= 1, window >= 1, kmeans_iters >= 0 and 0 <= decay < 1, '
                f'got {vocab_size}, {dim}, {window}, {kmeans_iters} and {decay}'
            )
        self.vocab_size, self.dim, self.decay = vocab_size, dim, decay
        self.kmeans_iters, self.window, self.revive = kmeans_iters, window, revive
        self.register_buffer('weight', F.normalize(torch.randn(vocab_size, dim), dim=1))
        self.register_buffer('cluster_size', torch.zeros(vocab_size))
        self.register_buffer('unused_steps', torch.full((vocab_size,), window))  # nothing has been used so far
        self.register_buffer('initialized', torch.tensor(kmeans_iters == 0))
        self._is_set = False  # what ``initialized`` said last; asking it again would wait for the GPU

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_set = False

    def usage(self) -> Tensor:
        """Share of the codes that a feature has chosen in the last ``window`` training steps, 0 to 1."""
        return (self.unused_steps < self.window).float().mean()

    def perplexity(self) -> Tensor:
        """Exponential of the entropy of the tokens of late: V if all are as frequent, 1 for one token or none yet."""
        share = self.cluster_size / self.cluster_size.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.special.entr(share).sum().exp()

    def nearest(self, z: Tensor) -> Tensor:
        """Ids (T,) of the codes nearest to features (T, D)."""
        return _nearest(z, self.weight)

    def forward(self, z: Tensor) -> Quantized:
        """Features (B, D, h, w) to their codes; in training mode the codebook learns from them.

        All processes must call it in the same steps.
        """
        B, _, h, w = z.shape
        z = F.normalize(z.to(self.weight.dtype), dim=1).permute(0, 2, 3, 1)  # B, h, w, D
        flat = z.detach().flatten(0, 2)  # T, D
        if self.training:
            self._start(flat)  # type: ignore
        tokens = self.nearest(flat)  # T
        codes = F.embedding(tokens, self.weight).view_as(z)  # B, h, w, D
        if self.training:
            self._learn(flat, tokens)  # type: ignore
        loss = F.mse_loss(z, codes)
        codes = z + (codes - z).detach()
        return Quantized(codes.permute(0, 3, 1, 2), loss, tokens.view(B, h, w))

    @torch.no_grad()
    @torch.compiler.disable  # collectives and random numbers; there is nothing to fuse
    def _start(self, z: Tensor) -> None:
        if self._is_set or bool(self.initialized):
            self._is_set = True
            return
        z, _ = _finite(z)
        means = _sum_over_processes(self._draw(z))
        for _ in range(self.kmeans_iters):
            tokens = _nearest(z, means)
            counts, sums, others = self._count(z, torch.ones_like(z[:, 0]), tokens, draw=True)
            # a mean that has lost all its features starts again from one of them
            means = F.normalize(torch.where(counts[:, None] > 0, sums, others), dim=1)
        self.weight.copy_(means)
        self.initialized.fill_(True)
        self._is_set = True

    @torch.no_grad()
    @torch.compiler.disable
    def _learn(self, z: Tensor, tokens: Tensor) -> None:
        z, counted = _finite(z)
        counts, sums, others = self._count(z, counted, tokens, draw=self.revive)
        chosen = counts > 0
        self.cluster_size.lerp_(counts, 1 - self.decay)
        means = torch.where(chosen[:, None], F.normalize(sums, dim=1), self.weight)
        self.weight.copy_(F.normalize(self.weight.lerp(means, 1 - self.decay), dim=1))
        self.unused_steps.add_(1).masked_fill_(chosen, 0)
        if self.revive:
            dead = ~chosen & (self.unused_steps % self.window == 0) & others.any(1)
            self.weight.copy_(torch.where(dead[:, None], others, self.weight))

    def _count(self, z: Tensor, counted: Tensor, tokens: Tensor, draw: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Of all processes: features of each code (V,), their sum (V, D) and, if wanted, V features drawn (V, D)."""
        parts = z.new_zeros(self.vocab_size, 1 + self.dim)
        parts.index_add_(0, tokens, torch.cat((counted[:, None], z), 1))
        parts = _sum_over_processes(torch.cat((parts, self._draw(z)), 1) if draw else parts)  # one exchange for all
        return parts[:, 0], parts[:, 1 : 1 + self.dim], parts[:, 1 + self.dim :]

    def _draw(self, z: Tensor) -> Tensor:
        """This process' part of V features drawn at random (V, D), zeros in the places of the other processes."""
        if not len(z):
            raise ValueError('a codebook cannot learn from a batch without images; leave empty batches out')
        drawn = z[torch.randint(len(z), (self.vocab_size,), device=z.device)]
        rank, world = _place()
        mine = torch.arange(self.vocab_size, device=z.device) % world == rank
        return drawn * mine[:, None]


def _nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Ids (T,) of the codes (V, D) at the smallest distance from z (T, D), of codes of any length."""
    shift = codes.square().sum(1) * -0.5  # V; |z|^2 is common to all codes
    rows = max(_SCORES // len(codes), 1)
    with without_autocast(z):
        return torch.cat([torch.addmm(shift, part, codes.t()).argmax(1) for part in z.split(rows)])


def _finite(z: Tensor) -> tuple[Tensor, Tensor]:
    """Features (T, D) with zeros in the place of those that are not finite, and 1 for those that are, else 0 (T,)."""
    finite = z.isfinite().all(1)
    return torch.where(finite[:, None], z, 0.0), finite.to(z.dtype)


def _place() -> tuple[int, int]:
    """Number of this process and of all."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over the processes, the same to the last bit in each of them."""
    if _place()[1] > 1:
        dist.all_reduce(x)
    return x
