"""BEiT: BERT pre-training of image transformers.

Papers:
    BEiT, Bao, Dong, Piao, Wei, https://arxiv.org/abs/2106.08254
    BEiT v2, Peng, Dong, Bao, Ye, Wei, https://arxiv.org/abs/2208.06366
Reference: https://github.com/microsoft/unilm, ``beit`` and ``beit2`` (MIT licence). Parameter names are unilm's, which
timm 1.0.31 shares. Written anew; what differs from the reference:
    * every image size, at construction and at run time: bias tables and positions are resized on the way, the stored
      ones stay as they are;
    * the tokens keep the dtype of the patch embedding: under autocast neither [CLS], mask, positions nor layer scale
      promote them to float32.

Shapes: B batch, C channels, H W pixels, h w grid, N = 1 + h*w tokens, K heads, L layers.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionBackend, attention_dtype, choose_backend
from .block import Block, BlockBias, PositionBias, activation, run_on_kernels, take_kernels
from .checks import check_numbers, head_mask_by_layer
from .embed import BeitPatchEmbed, check_mask
from .relative_position import RelativePositionBias, bias_geometry, note_grid
from .resample import ResizeRule, check_rule, resize_abs_pos_embed
from .timm_interface import TimmInterface
from .windows import Windows, cut_windows, resolve_global_blocks, resolve_window

__all__ = ['VARIANTS', 'Beit', 'BeitOutput']

# torch.fx shall not look into them; timm_models tells it so of modules
for _name in ('attention_dtype', 'bias_geometry', 'resize_abs_pos_embed'):
    torch.fx.wrap(_name)

# tiny and small: DeiT (arXiv:2012.12877) table 1; base and large: ViT (arXiv:2010.11929) table 1, with the layer
# scales of the commands in unilm beit/README.md
VARIANTS: dict[str, dict[str, Any]] = {
    'tiny': dict(embed_dim=192, depth=12, num_heads=3, init_values=0.1),
    'small': dict(embed_dim=384, depth=12, num_heads=6, init_values=0.1),
    'base': dict(embed_dim=768, depth=12, num_heads=12, init_values=0.1),
    'large': dict(embed_dim=1024, depth=24, num_heads=16, init_values=1e-5),
}


class BeitOutput(NamedTuple):
    """What an encoder run gives; what was not asked for is empty."""

    last_hidden_state: Tensor  # B, N, C
    pooler_output: Tensor | None  # B, C
    hidden_states: tuple[Tensor, ...]  # L + 1 times B, N, C: the embeddings and the output of every block
    attentions: tuple[Tensor, ...]  # L times B, K, N, N, after softmax; of windows B, windows, K, 1+wh*ww, 1+wh*ww
    grid: tuple[int, int]  # h, w


class Beit(TimmInterface):
    """BEiT encoder and classifier.

    Args:
        img_size, patch_size: native size and patch, pixels, int or (H, W); images of other sizes are welcome.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: ``avg`` (mean of the patch tokens), ``token`` ([CLS]) or empty (all tokens).
        embed_dim, depth, num_heads, mlp_ratio: sizes; ``VARIANTS`` has the published ones.
        qkv_bias: learn biases of query and value.
        act_layer: activation of the MLP, a name or a callable.
        norm_eps: LayerNorm epsilon; the published weights were trained with 1e-6.
        init_values: start of the layer scale (0.1 base, 1e-5 large); None or 0 for none.
        init_std: standard deviation of the truncated normal initialisation.
        head_init_scale: factor of the classifier's initial weights.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the classifier, of the embeddings, of
            the outputs of attention and MLP, of the attention weights; 0 to 1.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        use_mask_token: have a learned mask token, which ``bool_masked_pos`` needs.
        use_abs_pos_emb: learned absolute positions.
        use_rel_pos_bias: a relative position bias table in each layer.
        use_shared_rel_pos_bias: one such table for all layers (the form of pre-training).
        use_fc_norm: normalise after the pooling instead of before; by default for ``avg``.
        patch_norm: LayerNorm after the patch projection.
        rel_pos_resize: how bias tables are read at other sizes: ``geometric`` (official), ``linear``, ``bilinear``.
        window_size: attend within windows of this many patches, int or (h, w), in all but the global blocks; a window
            reads its layer's table as an image of its size does. None for attention over the whole image.
        global_blocks: 0-based blocks without windows; by default the last one of each quarter. See ``windows``.
        attn_backend: ``auto``, ``eager``, ``sdpa`` or ``fused`` (Triton kernels); see ``attention.choose_backend``.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown option value.
    """

    depth_scaled = True
    """Whether the output projections of block i, from 1, start smaller by the square root of 2 i."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        act_layer: str | Callable = 'gelu',
        norm_eps: float = 1e-6,
        init_values: float | None = 0.1,
        init_std: float = 0.02,
        head_init_scale: float = 0.001,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_mask_token: bool = False,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        use_fc_norm: bool | None = None,
        patch_norm: bool = False,
        rel_pos_resize: ResizeRule = 'geometric',
        window_size: int | tuple[int, int] | None = None,
        global_blocks: Sequence[int] | None = None,
        attn_backend: AttentionBackend = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rule(rel_pos_resize)
        check_numbers(
            in_chans,
            init_std,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        norm_layer = partial(LayerNorm, eps=norm_eps)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.rel_pos_resize = rel_pos_resize
        self.init_std, self.head_init_scale = init_std, head_init_scale
        self.grad_checkpointing = False
        self.attention_window = resolve_window(window_size)
        self.global_blocks = resolve_global_blocks(global_blocks, depth, self.attention_window)

        self.patch_embed = BeitPatchEmbed(
            img_size, patch_size, in_chans, embed_dim, norm_layer if patch_norm else None, **dd
        )
        native = self.window_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd)) if use_mask_token else None
        num_tokens = 1 + native[0] * native[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim, **dd)) if use_abs_pos_emb else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.use_rel_pos_bias = use_rel_pos_bias
        self.rel_pos_bias = RelativePositionBias(native, num_heads, **dd) if use_shared_rel_pos_bias else None

        make_block = partial(
            Block,
            embed_dim,
            num_heads,
            mlp_ratio,
            qkv_bias,
            proj_drop_rate,
            attn_drop_rate,
            init_values=init_values,
            act_layer=activation(act_layer),
            norm_layer=norm_layer,
            window_size=native if use_rel_pos_bias else None,
            attn_backend=attn_backend,
            **dd,
        )
        self._init_blocks(make_block, depth, drop_path_rate)
        self._init_head(num_classes, global_pool, use_fc_norm, drop_rate, norm_layer, **dd)
        self.init_weights(needs_reset=False)
        self.register_state_dict_post_hook(note_grid)

    def _init_blocks(self, make_block: Callable[..., Block], depth: int, drop_path_rate: float) -> None:
        rates = torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()
        self.blocks = nn.ModuleList(
            make_block(drop_path=rate, windowed=i not in self.global_blocks) for i, rate in enumerate(rates)
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """(h, w) grid in patches of the native size, which the stored tables belong to."""
        return self.patch_embed.grid_size

    def embed(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Images to tokens.

        Args:
            x: (B, in_chans, H, W).
            bool_masked_pos: (B, h*w) or (B, h, w) bool, True where the mask token replaces the patch.

        Returns:
            (B, N, C) in the dtype of the patch projection, and the grid (h, w).
        """
        x = self.patch_embed(x)  # B, h, w, C
        B, h, w, _ = x.shape
        if torch.jit.is_tracing():  # a trace, and so a file of ONNX, is for one grid, whose tables are its constants
            h, w = int(h), int(w)
            x = x.split([h], 1)[0].split([w], 2)[0]  # refuses another
        x = x.flatten(1, 2)  # B, h*w, C
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError('bool_masked_pos needs a mask token; build the model with use_mask_token=True')
            mask = check_mask(bool_masked_pos, B, (h, w))
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.to(x.dtype).expand(B, -1, -1), x), dim=1)  # B, N, C
        if self.pos_embed is not None:
            x = x + resize_abs_pos_embed(self.pos_embed, self.window_size, (h, w)).to(x.dtype)
        return self.pos_drop(x), (h, w)

    def run_blocks(
        self,
        x: Tensor,
        bool_masked_pos: Tensor | None = None,
        head_mask: Tensor | None = None,
        stages: Iterable[int] = (),
        output_attentions: bool = False,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, tuple[int, int], dict[int, Tensor], list[Tensor]]:
        """Images through the blocks, without the final norm: what every host calls in the end.

        Args:
            x, bool_masked_pos, head_mask, output_attentions: see ``encode``.
            stages: hidden states to keep, by the number of blocks run (0: the embeddings).
            num_blocks: stop after so many blocks.

        Returns:
            Tokens (B, N, C), the grid (h, w), the states by stage, the attention weights by block.
        """
        heads = cast(Block, self.blocks[0]).attn.num_heads if len(self.blocks) else 0
        masks = head_mask_by_layer(head_mask, len(self.blocks), heads)
        x, grid = self.embed(x, bool_masked_pos)
        bias = self.position_bias(grid, x, weights=head_mask is not None or output_attentions)
        x, states, attentions = self.run_layers(self.blocks[:num_blocks], x, bias, masks, stages, output_attentions)
        return x, grid, states, attentions

    def position_bias(self, grid: tuple[int, int], x: Tensor, weights: bool = False) -> PositionBias:
        """How blocks read their tables at an (h, w) grid and in its windows, and the bias they share.

        ``x`` gives device and dtype; ``weights``: they are returned or masked. Blocks may have been cut out (Identity).
        """
        full = self._bias_at(grid, x, weights)
        windows = cut_windows(grid, self.attention_window)
        return PositionBias(full, full if windows is None else self._bias_at(windows.size, x, weights, windows))

    def _bias_at(self, grid: tuple[int, int], x: Tensor, weights: bool, windows: Windows | None = None) -> BlockBias:
        geometry = None
        if self.use_rel_pos_bias or self.rel_pos_bias is not None:
            chosen = choose_backend([cast(Block, b).attn for b in self.blocks if hasattr(b, 'attn')], x, weights)
            geometry = bias_geometry(self.window_size, grid, self.rel_pos_resize, x.device, chosen != 'fused')
        dtype = None if self.use_rel_pos_bias else attention_dtype(x)  # once for all layers, if it is added to no other
        return BlockBias(geometry, None if self.rel_pos_bias is None else self.rel_pos_bias(geometry, dtype), windows)

    def run_layers(
        self,
        blocks: Iterable[nn.Module],
        x: Tensor,
        bias: PositionBias,
        head_masks: Sequence[Tensor] = (),
        stages: Iterable[int] = (),
        output_attentions: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor], list[Tensor]]:
        """Tokens (B, N, C) through some blocks, with what ``position_bias`` gives; the rest as ``run_blocks``."""
        blocks, wanted = list(blocks), set(stages)
        recompute = self.grad_checkpointing and self.training
        biases = [bias.windowed if getattr(block, 'windowed', False) else bias.full for block in blocks]
        if not (recompute or head_masks or output_attentions) and take_kernels(blocks, x):
            return *run_on_kernels(cast(list[Block], blocks), x, biases, wanted), []
        states = {0: x} if 0 in wanted else {}
        attentions = []
        for i, block in enumerate(blocks):
            args = (x, *biases[i], head_masks[i] if head_masks else None, output_attentions)
            x, weights = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
            if i + 1 in wanted:
                states[i + 1] = x
            if output_attentions:
                attentions.append(weights)
        return x, states, attentions

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead of this module; see ``torchscript``."""
        from .torchscript import ScriptedBeit  # nobody else needs it

        if type(self) is not Beit:
            raise ValueError(f'TorchScript can take a Beit, not a {type(self).__name__}; use torch.export')
        return ScriptedBeit(self)

    def encode(
        self,
        x: Tensor,
        bool_masked_pos: Tensor | None = None,
        head_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> BeitOutput:
        """The encoder with all its inputs and outputs, as transformers' ``BeitModel``.

        Args:
            x: (B, in_chans, H, W), any H and W of at least one patch.
            bool_masked_pos: (B, h*w) or (B, h, w) bool, True where the mask token replaces the patch.
            head_mask: (K,) or (L, K) factors of the attention weights, 0 switches a head off.
            interpolate_pos_encoding: False refuses images of another than the native size.
            output_attentions, output_hidden_states: fill these fields of the result.

        Raises:
            ValueError: an input of a wrong shape, dtype or size.
        """
        native, got = tuple(self.patch_embed.img_size), tuple(x.shape[2:])
        if not interpolate_pos_encoding and got != native:
            raise ValueError(f'interpolate_pos_encoding=False needs images of the native {native} pixels, got {got}')
        stages = range(len(self.blocks) + 1) if output_hidden_states else ()
        x, grid, states, attentions = self.run_blocks(x, bool_masked_pos, head_mask, stages, output_attentions)
        x = self.norm(x)
        pooled = self.forward_head(x, pre_logits=True) if self.global_pool else None
        return BeitOutput(x, pooled, tuple(states.values()), tuple(attentions), grid)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Official initialisation: truncated normal, depth-scaled output projections, zero bias tables.

        Source: unilm ``beit/modeling_finetune.py``, ``_init_weights`` and ``fix_init_weight``.

        Args:
            needs_reset: also reset what its constructor has already set (norms, convolutions, layer scale, tables);
                for a model that was built on the meta device.
        """
        for name, module in self.named_modules():
            if needs_reset and name and hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]
            if isinstance(module, nn.Linear):
                self._draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token, self.pos_embed):
            if token is not None:
                self._draw(token)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if needs_reset and name.endswith(('q_bias', 'v_bias', 'relative_position_bias_table')):
                    parameter.zero_()
            self._scale_blocks(self.blocks, 1, needs_reset)
            if isinstance(self.head, nn.Linear) and self.head_init_scale:
                self.head.weight.mul_(self.head_init_scale)

    def _draw(self, tensor: Tensor) -> None:
        trunc_normal_(tensor, std=self.init_std)

    @torch.no_grad()
    def _scale_blocks(self, blocks: Iterable[nn.Module], first: int, needs_reset: bool) -> None:
        for i, block in enumerate(cast(Iterable[Block], blocks), start=first):
            for gamma in (block.gamma_1, block.gamma_2):
                if needs_reset and gamma is not None:
                    gamma.fill_(block.init_values or 0.0)
            if self.depth_scaled:
                block.attn.proj.weight.div_((2.0 * i) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * i) ** 0.5)
