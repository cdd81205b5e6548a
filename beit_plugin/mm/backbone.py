"""``BEiTBackbone``: the encoder under the argument names of mmsegmentation's ``BEiT``, for every OpenMMLab host.

A config changes one word. What mmsegmentation 1.2.2's class cannot do is added: any image size and shape, the pyramid
inside, stage names, every checkpoint dialect, gradient checkpointing.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from mmcv.cnn import build_activation_layer
from mmengine.logging import print_log
from mmengine.model import initialize
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints import CheckpointError, load
from ..checkpoints.fit import accept_any_dialect
from ..checkpoints.sources import read_source
from ..models.block import Block, activation
from ..models.resample import ResizeRule
from ..segmentation.backbone import BeitBackbone
from .loading import NECK
from .segmentation.norm import SYNC_BN, NormFactory

__all__ = ['BEiTBackbone']

# what mmengine's own PretrainedInit takes, and what a checkpoint of BEiT may need in addition
_PRETRAINED = ('type', 'checkpoint', 'prefix', 'map_location', 'grid', 'drop')


def _layer_norm_eps(norm_cfg: dict[str, Any]) -> float:
    known = isinstance(norm_cfg, Mapping) and set(norm_cfg) <= {'type', 'eps', 'requires_grad'}
    if not known or norm_cfg.get('type') != 'LN' or not norm_cfg.get('requires_grad', True):
        raise ValueError(f"BEiT normalises with LayerNorm: norm_cfg must be dict(type='LN', eps=...), got {norm_cfg}")
    return norm_cfg.get('eps', 1e-5)  # the default of torch, which mmsegmentation's class uses


def _build_activation(act_cfg: Mapping[str, Any]) -> nn.Module:
    if not isinstance(act_cfg, Mapping) or 'type' not in act_cfg:
        raise ValueError(f"act_cfg must be a dict with a type, such as dict(type='GELU'), got {act_cfg!r}")
    cfg = dict(act_cfg)
    with MODELS.switch_scope_and_registry(None) as registry:
        known = inspect.isclass(cfg['type']) or registry.get(cfg['type']) is not None
    if known:
        return build_activation_layer(cfg)
    name = cfg.pop('type')
    try:
        layer = activation(name.lower())
    except ValueError as error:
        raise ValueError(f'act_cfg names the activation {name!r}, which neither mmcv nor timm knows') from error
    return layer(**cfg)


def _initialisers(init_cfg: Any) -> list[Mapping[str, Any]]:
    """The dicts of an ``init_cfg``, checked; mmengine itself looks at them when weights are initialised."""
    cfgs = list(init_cfg) if isinstance(init_cfg, (list, tuple)) else [init_cfg] if init_cfg else []
    for cfg in cfgs:
        if not isinstance(cfg, Mapping) or 'type' not in cfg:
            raise TypeError(
                f"init_cfg is {init_cfg!r}, expected a dict such as dict(type='Pretrained', checkpoint='FILE'), or a "
                'list of dicts'
            )
        if cfg['type'] != 'Pretrained':
            continue
        if not isinstance(cfg.get('checkpoint'), str):
            raise ValueError(f"init_cfg of type 'Pretrained' needs checkpoint='FILE', got {cfg}")
        unknown = [key for key in cfg if key not in _PRETRAINED]
        if unknown:
            raise ValueError(
                f"init_cfg of type 'Pretrained' takes {', '.join(_PRETRAINED[1:])}, not {', '.join(map(str, unknown))}"
            )
    return cfgs


def _take_pyramid(
    model: Any,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    *_: Any,
) -> None:
    """Before a state dict is loaded: where the model has no neck, the pyramid inside takes that of the checkpoint."""
    neck = metadata.get(NECK, {})
    if getattr(model, 'fpn', None) is None or not neck.keys() <= set(unexpected):
        return
    for name, tensor in neck.items():
        unexpected.remove(name)
        state_dict[f'{prefix}fpn.{name.removeprefix("neck.")}'] = tensor


@MODELS.register_module()
class BEiTBackbone(BeitBackbone):
    """BEiT feature maps for necks and heads.

    Args:
        img_size: native size in pixels, int or (H, W); it fixes the stored bias tables, not the inputs.
        patch_size, in_channels, embed_dims, num_layers, num_heads, mlp_ratio, out_indices, attn_drop_rate,
            drop_path_rate, init_values: as mmsegmentation's ``BEiT``.
        qv_bias: learn biases of query and value.
        norm_cfg: ``dict(type='LN', eps=...)``.
        act_cfg: ``dict(type='GELU')`` or another activation that mmcv or timm knows, with its arguments.
        patch_norm, final_norm: LayerNorm after the patch embedding, after the last block.
        num_fcs: layers of the MLP; only 2.
        norm_eval: keep norm layers in eval mode while training.
        pretrained, init_cfg: a checkpoint of any dialect, given the short or the long way, which takes mmengine's
            ``prefix`` and the ``grid`` and ``drop`` of ``checkpoints.load`` too; mmengine's other initialisers work.
        use_rel_pos_bias, use_shared_rel_pos_bias: bias tables of each layer, or one for all (not both).
        use_abs_pos_emb, use_mask_token, rel_pos_resize, window_size, global_blocks, attn_backend, pos_drop_rate,
            proj_drop_rate, init_std: as ``models.beit.Beit``.
        out_features, add_fpn, reshape_hidden_states: as ``models.backbone.BeitBackbone``.
        fpn_norm_cfg: norm of the pyramid inside.
        with_cp: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: an option that BEiT does not have, or options that exclude each other; an ``init_cfg`` of type
            'Pretrained' without a checkpoint or with an unknown key.
        TypeError: ``pretrained`` or ``init_cfg`` of another type.
    """

    depth_scaled = False

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dims: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        out_indices: int | Sequence[int] | None = None,
        qv_bias: bool = True,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict[str, Any] = {'type': 'LN'},  # noqa: B006, read only
        act_cfg: dict[str, Any] = {'type': 'GELU'},  # noqa: B006, read only
        patch_norm: bool = False,
        final_norm: bool = False,
        num_fcs: int = 2,
        norm_eval: bool = False,
        pretrained: str | None = None,
        init_values: float | None = 0.1,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        use_abs_pos_emb: bool = False,
        use_mask_token: bool = False,
        rel_pos_resize: ResizeRule = 'geometric',
        window_size: int | tuple[int, int] | None = None,
        global_blocks: Sequence[int] | None = None,
        attn_backend: str = 'auto',
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        init_std: float = 0.02,
        out_features: Sequence[str] | None = None,
        add_fpn: bool = False,
        reshape_hidden_states: bool = True,
        fpn_norm_cfg: Mapping[str, Any] = SYNC_BN,
        with_cp: bool = False,
    ) -> None:
        if num_fcs != 2:
            raise ValueError(f'the MLP of BEiT has two layers, got num_fcs={num_fcs}; leave it out')
        if use_rel_pos_bias and use_shared_rel_pos_bias:
            raise ValueError(
                'use_rel_pos_bias and use_shared_rel_pos_bias exclude each other here, as in mmpretrain; '
                'set use_rel_pos_bias=False for the shared table of pre-training'
            )
        if pretrained is not None and init_cfg is not None:
            raise ValueError('give a checkpoint by pretrained or by init_cfg, not by both')
        if not isinstance(pretrained, str | None):  # mmsegmentation raises a TypeError too
            raise TypeError(f'pretrained is {pretrained!r}, expected a file, URL or hub id as a str, or None')
        _initialisers(init_cfg)
        super().__init__(
            # mmsegmentation takes a list of one number as well
            img_size=tuple(img_size) * 2 if isinstance(img_size, Sequence) and len(img_size) == 1 else img_size,
            patch_size=patch_size,
            in_chans=in_channels,
            embed_dim=embed_dims,
            depth=num_layers,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            out_indices=out_indices,
            out_features=out_features,
            qkv_bias=qv_bias,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=_layer_norm_eps(norm_cfg),
            patch_norm=patch_norm,
            final_norm=final_norm,
            init_values=init_values,
            init_std=init_std,
            use_rel_pos_bias=use_rel_pos_bias,
            use_shared_rel_pos_bias=use_shared_rel_pos_bias,
            use_abs_pos_emb=use_abs_pos_emb,
            use_mask_token=use_mask_token,
            rel_pos_resize=rel_pos_resize,
            window_size=window_size,
            global_blocks=global_blocks,
            attn_backend=attn_backend,
            add_fpn=add_fpn,
            reshape_hidden_states=reshape_hidden_states,
            fpn_norm=NormFactory(fpn_norm_cfg),
        )
        # mmsegmentation's layer decay constructors know blocks by this name only
        self.layers = cast(nn.ModuleList, self._modules.pop('blocks'))
        for block in cast(list[Block], self.layers):
            block.mlp.act = _build_activation(act_cfg)
        self.set_grad_checkpointing(with_cp)
        self.embed_dims, self.num_layers = embed_dims, num_layers  # mmpretrain's models read the first
        self.norm_eval = norm_eval
        self.init_cfg = dict(type='Pretrained', checkpoint=pretrained) if pretrained else init_cfg
        self.register_load_state_dict_pre_hook(_take_pyramid)
        accept_any_dialect(self)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The transformer blocks, under the name that the encoder uses."""
        return self.layers

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises, and loads the checkpoint of ``pretrained`` or ``init_cfg`` if there is one.

        A fresh backbone is drawn as mmsegmentation's ``BEiT``, which differs from the paper's: output projections are
        not made smaller with the depth (``depth_scaled``), and the patch embedding is larger.

        Raises:
            CheckpointError: the checkpoint lacks a parameter of this backbone or has one that no part of BEiT owns.
            TypeError, ValueError: an ``init_cfg`` that was changed to what the constructor refuses.
        """
        super().init_weights(needs_reset)
        nn.init.kaiming_normal_(self.patch_embed.proj.weight, nonlinearity='relu')
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        # the encoder's constructor initialises before there is an init_cfg
        for cfg in _initialisers(getattr(self, 'init_cfg', None)):
            if cfg['type'] == 'Pretrained':
                self._load_pretrained(cfg)
            else:
                initialize(self, cfg)

    def _load_pretrained(self, cfg: Mapping[str, Any]) -> None:
        checkpoint, prefix, grid = cfg['checkpoint'], cfg.get('prefix'), cfg.get('grid')
        # mmengine knows further schemes, such as open-mmlab:// and petrel://
        known = urlparse(checkpoint).scheme in ('', 'http', 'https') or Path(checkpoint).exists()
        source: Any = checkpoint if known else CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        if prefix:  # as mmengine's PretrainedInit: the rest belongs to other parts of a larger model
            prefix = prefix.rstrip('.') + '.'
            whole = read_source(source)
            source = {name.removeprefix(prefix): t for name, t in whole.state_dict.items() if name.startswith(prefix)}
            grid = grid or whole.grid
        try:
            report = load(self, source, drop=cfg.get('drop') or (), grid=grid)
        except CheckpointError as error:
            hint = '' if prefix else "; prefix='backbone.' in init_cfg takes only the backbone of a larger model"
            raise CheckpointError(f'{error}{hint}' if checkpoint in str(error) else f'{checkpoint}: {error}') from error
        print_log(f'BEiTBackbone: {report}', logger='current')

    def train(self, mode: bool = True) -> 'BEiTBackbone':
        """Sets the mode; with ``norm_eval`` the norm layers stay in eval mode."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                    module.eval()
        return self

    def forward(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) of any size to the tuple of maps (B, embed_dims, h, w)."""
        return super().forward(x, bool_masked_pos)
