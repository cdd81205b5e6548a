"""VQ-KD, the tokenizer of BEiT v2: its tokens tell what a teacher sees in a patch, not what colours it has.

Paper: BEiT v2, https://arxiv.org/abs/2208.06366, section 2.2 and appendix A.
Reference: https://github.com/microsoft/unilm (MIT licence), ``beit2/modeling_vqkd.py`` at 80d673a; names of modules are
its, less those inside the quantizer. Written anew; what differs from the reference:
    * encoder and decoder are the ``Beit`` of this package: any image size, its attention;
    * the teacher stands outside (``Teacher``), so that it is neither saved nor wrapped with the tokenizer;
    * what ``codebook`` lists.

Shapes: B batch, C channels, H W pixels, h w grid of tokens, D code dim, F channels of the teacher.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..models.beit import VARIANTS, Beit
from ..models.checks import height_and_width
from ..models.layer_decay import no_weight_decay
from .base import Tokenizer, without_autocast
from .codebook import Codebook

__all__ = ['VQKD', 'VQKDOutput', 'create_vqkd']


class VQKDOutput(NamedTuple):
    """What a training step of VQ-KD gives; all but the loss are for reports and carry no gradient."""

    loss: Tensor  # scalar float32: cosine_loss + beta * commitment_loss
    cosine_loss: Tensor  # 1 - cosine of prediction and teacher, mean over the patches: 0 (same direction) to 2
    commitment_loss: Tensor  # mean squared distance of the features from their codes
    usage: Tensor  # share of the codes chosen of late, see Codebook.usage
    perplexity: Tensor  # see Codebook.perplexity
    tokens: Tensor  # B, h, w int64


class VQKD(Tokenizer):
    """Tokenizer of BEiT v2; called like a model, it trains.

    Images go through the encoder to one vector a patch, the nearest code of the codebook is its token, and a small
    decoder has to tell from the tokens alone what the teacher sees. The gradient passes from the codes to the encoder
    as if they were its output; the codes follow the encoder by averages.

    It learns rightly in several processes: the statistics of the codebook are summed over ``torch.distributed``'s
    default group, so that all hold the same codebook.

    Args:
        img_size, patch_size: native size and patch, pixels, one or two numbers each.
        in_chans: channels of the images.
        embed_dim, depth, num_heads: sizes of the encoder; those of ``base`` are the published ones.
        decoder_depth: blocks of the decoder, 1 or 3 in the published ones; 0 for a tokenizer that cannot be trained.
        target_dim: F; 512 for CLIP's projected tokens, else the teacher's width.
        vocab_size, code_dim: number of codes and D.
        beta: weight of the commitment loss.
        decay, kmeans_iters, window, revive: of the ``Codebook``.
        kwargs: those of ``Beit``, for encoder and decoder, such as ``attn_backend`` and ``drop_path_rate``.

    Raises:
        ValueError: numbers out of range, or what ``Beit`` raises.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_depth: int = 1,
        target_dim: int = 512,
        vocab_size: int = 8192,
        code_dim: int = 32,
        beta: float = 1.0,
        decay: float = 0.99,
        kmeans_iters: int = 10,
        window: int = 100,
        revive: bool = True,
        **kwargs: Any,
    ) -> None:
        size, patch = height_and_width('img_size', img_size), height_and_width('patch_size', patch_size)
        super().__init__(vocab_size, size, patch, in_chans)
        if decoder_depth < 0 or target_dim < 1 or beta < 0:
            raise ValueError(
                'VQKD needs decoder_depth >= 0, target_dim >= 1 and beta >= 0, got '
                f'{decoder_depth}, {target_dim} and {beta}'
            )
        form = dict(use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=None)  # of the published tokenizers
        sizes = dict(embed_dim=embed_dim, num_heads=num_heads, num_classes=0, global_pool='', use_fc_norm=False)
        common: dict[str, Any] = dict(**{**form, **kwargs}, **sizes)
        self.target_dim, self.beta = target_dim, beta
        self.encoder = Beit(size, patch, in_chans, depth=depth, **common)
        self.encode_task_layer = _task_layer(embed_dim, code_dim)
        self.quantize = Codebook(vocab_size, code_dim, decay, kmeans_iters, window, revive)
        self.decoder = self.decode_task_layer = None
        if decoder_depth:
            self.decoder = Beit(self.encoder.window_size, 1, code_dim, depth=decoder_depth, **common)
            self.decode_task_layer = _task_layer(embed_dim, target_dim)
        # what the shapes of a checkpoint do not tell: native grid and attention heads
        self.register_buffer('geometry', torch.tensor((*self.encoder.window_size, num_heads)))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) in [0, 1] to what is quantized (B, D, h, w), in the dtype of the weights."""
        pixels = images.to(self.encoder.cls_token.dtype) * 2 - 1
        x, grid, _, _ = self.encoder.run_blocks(pixels)
        x = self.encoder.norm(x)[:, 1:]  # B, h*w, C
        with without_autocast(x):
            z = self.encode_task_layer(x.to(self.encode_task_layer[0].weight.dtype))  # B, h*w, D
        return z.transpose(1, 2).unflatten(2, grid)

    def predict(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) to the features that the teacher is thought to have (B, h*w, F).

        Raises:
            ValueError: the tokenizer has no decoder.
        """
        if self.decoder is None or self.decode_task_layer is None:
            raise ValueError(
                'this VQKD has no decoder, so it can give tokens but not be trained; build it with decoder_depth >= 1, '
                'or load a checkpoint that has one'
            )
        return self.decode_task_layer(self.decoder.forward_features(codes)[:, 1:])

    def predict_tokens(self, tokens: Tensor) -> Tensor:
        """Token ids (B, h, w) to the features that the teacher is thought to have (B, h*w, F); raises as ``predict``.

        That is all that these tokens decode to: they do not tell the colours that an image would need.
        """
        self.check_tokens(tokens)
        return self.predict(F.embedding(tokens.long(), self.quantize.weight).permute(0, 3, 1, 2))

    def forward(self, images: Tensor, target: Tensor) -> VQKDOutput:
        """A step of training; in training mode the codebook learns at once, the rest by the gradient of the loss.

        Args:
            images: (B, in_chans, H, W) floating point in [0, 1]; H and W multiples of the patch.
            target: (B, h*w, F) the teacher's features of the same images, see ``Teacher``.

        Raises:
            ValueError: see ``check_images``; a target of another shape; no decoder.
        """
        self.check_images(images)
        B, (h, w) = len(images), (s // p for s, p in zip(images.shape[2:], self.patch_size, strict=True))
        if tuple(target.shape) != (B, h * w, self.target_dim):
            raise ValueError(
                f"expected the teacher's features as ({B}, {h * w}, {self.target_dim}) for this batch, got "
                f'{tuple(target.shape)}; take them from Teacher(model)(images, grid=({h}, {w})), and build VQKD with '
                'target_dim=teacher.dim'
            )
        codes, commitment, tokens = self.quantize(self.features(images))
        cosine = 1 - F.cosine_similarity(self.predict(codes).float(), target.detach().float(), dim=2).mean()
        return VQKDOutput(
            cosine + self.beta * commitment,
            cosine.detach(),
            commitment.detach(),
            self.quantize.usage(),
            self.quantize.perplexity(),
            tokens,
        )

    def _tokens(self, images: Tensor) -> Tensor:
        was_training = self.encoder.training
        if was_training:  # stochastic depth would make the tokens random
            self.encoder.eval()
        try:
            z = self.features(images)
        finally:
            self.encoder.train(was_training)
        B, _, h, w = z.shape
        return self.quantize.nearest(F.normalize(z, dim=1).permute(0, 2, 3, 1).flatten(0, 2)).view(B, h, w)

    @torch.jit.ignore  # type: ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers must not decay; see ``Beit.no_weight_decay``."""
        return no_weight_decay(self)


def _task_layer(dim: int, out_dim: int) -> nn.Sequential:
    first, last = nn.Linear(dim, dim), nn.Linear(dim, out_dim)
    for layer in (first, last):
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), last)


def create_vqkd(variant: str, **options: Any) -> VQKD:
    """An untrained VQ-KD tokenizer with an encoder of one of the published sizes.

    Args:
        variant: a key of ``models.beit.VARIANTS``; all published VQ-KD are ``base``.
        options: those of ``VQKD``.

    Raises:
        ValueError: an unknown variant, or what ``VQKD`` raises.
    """
    if variant not in VARIANTS:
        raise ValueError(f'unknown VQKD variant {variant!r}; known are {", ".join(VARIANTS)}')
    sizes = {name: VARIANTS[variant][name] for name in ('embed_dim', 'depth', 'num_heads')}
    return VQKD(**{**sizes, **options})
