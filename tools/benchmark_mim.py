"""Masked image models that tools/benchmark.py measures: ours, the peers' and timm's encoder with a head of its own."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from benchmark_cases import Case, Makers, Setting
from benchmark_models import VOCABULARY, Called, hf_config, import_mm, masked_patches, mm_sizes, model_case, sizes
from torch import Tensor, nn
from torch.nn import functional as F


class TimmMim(nn.Module):
    """timm's Beit, which has no mask, as one would pre-train it: the head runs on the masked patches."""

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        from timm.models.beit import Beit

        options = dict(use_abs_pos_emb=False, use_shared_rel_pos_bias=True, **size)
        self.encoder = Beit(num_classes=0, global_pool='', **options)
        self.mask_token = nn.Parameter(torch.zeros(size['embed_dim']))
        self.lm_head = nn.Linear(size['embed_dim'], VOCABULARY)

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        encoder: Any = self.encoder
        x = encoder.patch_embed(x)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat((encoder.cls_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        bias = encoder.rel_pos_bias()
        for block in encoder.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        return F.cross_entropy(self.lm_head(encoder.norm(x)[:, 1:][mask]), labels)


class Tokenized(nn.Module):
    """A masked image model that gets its labels from DALL-E's tokenizer, as BEiT v1 is trained."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from beit_plugin.tokenizers.dalle import DalleEncoder, DalleTokenizer

        self.model, self.tokenizer = model, DalleTokenizer(DalleEncoder()).eval().requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor, view: Tensor) -> Tensor:
        return self.model(x, mask, self.tokenizer.encode(view)).loss


def mim_cases(s: Setting) -> Makers:
    """Images and a mask to the loss of the visual tokens of 75 of 196 patches, one bias for all layers.

    transformers runs its head on all patches. mmpretrain's model is called at its backbone and its head, because the
    target would else be computed from a tokenizer. The bound is ours without a bias. Labels are at hand; "with dVAE"
    has them computed in every step, from a second view of the images.
    """
    h, w = s.grid
    count = masked_patches(s)
    chosen = torch.rand(s.batch, h * w, device=s.device).argsort(1)[:, :count]
    mask = torch.zeros(s.batch, h * w, dtype=torch.bool, device=s.device).scatter_(1, chosen, True)
    labels = torch.randint(VOCABULARY, (s.batch * count,), device=s.device)  # M
    targets = (mask, labels)

    def case(make: Callable[[], nn.Module], call: Callable[..., Tensor]) -> Case:
        return model_case(lambda: Called(make(), call), s, targets, targets)

    def built(**options: Any) -> nn.Module:
        from beit_plugin.models.mim import BeitForMaskedImageModeling

        return BeitForMaskedImageModeling(vocab_size=VOCABULARY, **options, **sizes(s))

    def ours(**options: Any) -> Case:
        return case(lambda: built(**options), lambda m, x, *y: m(x, *y).loss)

    def tokenized(backend: str) -> Case:
        view = torch.rand(s.batch, 3, 8 * h, 8 * w, device=s.device)  # a token for each patch
        return model_case(lambda: Tokenized(built(attn_backend=backend)), s, (mask, view), (mask, view))

    def transformers() -> Case:
        from transformers import BeitForMaskedImageModeling

        config = hf_config(s, use_mask_token=True, use_shared_relative_position_bias=True, vocab_size=VOCABULARY)
        return case(
            lambda: BeitForMaskedImageModeling(config), lambda m, x, y, z: m(x, bool_masked_pos=y, labels=z).loss
        )

    def mmpretrain() -> Case:
        import_mm()
        from mmpretrain.registry import MODELS

        size = sizes(s)
        arch = dict(mm_sizes(s), feedforward_channels=4 * size['embed_dim'])
        backbone = dict(
            type='BEiTPretrainViT', arch=arch, img_size=(s.height, s.width), drop_path_rate=0.0, final_norm=True,
            out_type='raw', layer_scale_init_value=size['init_values'],
        )  # fmt: skip
        head = dict(
            type='BEiTV1Head', embed_dims=size['embed_dim'], num_embed=VOCABULARY, loss=dict(type='CrossEntropyLoss')
        )

        def call(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            features = model['backbone'](x, y)[0][:, 1:]  # type: ignore[index]
            head = model['head']  # type: ignore[index]
            return head.loss_module(head.cls_head(features[y]), z)

        return case(lambda: nn.ModuleDict(dict(backbone=MODELS.build(backbone), head=MODELS.build(head))), call)

    makers: Makers = {'ours, no bias (bound)': lambda: ours(use_shared_rel_pos_bias=False, attn_backend='sdpa')}
    makers['timm Beit'] = lambda: model_case(lambda: TimmMim(sizes(s)), s, targets, targets)
    makers |= {'transformers': transformers} if find_spec('transformers') else {}
    makers |= {'mmpretrain': mmpretrain} if find_spec('mmpretrain') else {}
    makers |= {f'ours, {backend}': (lambda b=backend: ours(attn_backend=b)) for backend in s.backends}
    return makers | {f'ours, {backend}, with dVAE': (lambda b=backend: tokenized(b)) for backend in s.backends}
