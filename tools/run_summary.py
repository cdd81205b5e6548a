"""What a run says of itself before it starts, an estimate of its memory among it."""

import itertools
from contextlib import nullcontext
from typing import Any

from run_mim import is_pretraining, millions
from run_mim import summary as pretraining


def length(cfg: Any) -> str:
    """How long a configuration trains, in words."""
    count, what = cfg.train_cfg.get('max_epochs'), 'epoch'
    if count is None:
        count, what = cfg.train_cfg.max_iters, 'iteration'
    return f'{count} {what}{"" if count == 1 else "s"}'


def inner(model: Any) -> Any:
    """The segmentor without DDP and test-time augmentation around it."""
    while hasattr(model, 'module'):
        model = model.module
    return model


def kept_bytes(module: Any, images: tuple[int, ...], amp: bool, **options: Any) -> int:
    """What autograd keeps of a model's forward pass, found on tensors without memory.

    Args:
        module: takes images (B, 3, H, W) of the shape ``images``, and the options.
        amp: under autocast to bfloat16.
    """
    import torch
    from mmengine.device import get_device
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call

    device, kept = get_device(), {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x  # held, or another could take its place
        return x

    # recomputed blocks keep what they are given
    blocks = [block for part in module.modules() if getattr(part, 'grad_checkpointing', False) for block in part.blocks]
    hooks = [block.register_forward_pre_hook(lambda _, arguments: [keep(arguments[0])] and None) for block in blocks]
    training = module.training
    try:
        with FakeTensorMode() as mode:
            state = {
                name: torch.empty_like(mode.from_tensor(x), device=device, requires_grad=x.requires_grad)
                for name, x in itertools.chain(module.named_parameters(), module.named_buffers())
            }
            autocast = torch.autocast(device, torch.bfloat16) if amp else nullcontext()
            with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = functional_call(module.train(), state, (torch.empty(*images, device=device),), options)
            own = {x.untyped_storage()._cdata for x in state.values()}
            held = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
            del out  # not before: it holds what was kept
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return held


def size_of(number: int) -> str:
    """Bytes in words."""
    return f'{number / 2**30:.1f} GiB' if number >= 2**30 else f'{number / 2**20:.0f} MiB'


def memory(cfg: Any, module: Any) -> tuple[int, int] | None:
    """Estimate of what a training holds in each process, in bytes: weights and optimiser; activations.

    None where the configuration fixes no size of images, of a tokenizer, or where the model cannot run without values.
    """
    options: dict[str, Any] = {}
    if is_pretraining(cfg):  # the head on all patches stands for that on the masked ones and the loss
        size = (cfg.train_dataloader.dataset.get('views', {}).get('size', 224),) * 2
        module = module.model if cfg.model.type == 'BEiTPretrainer' else None
    else:
        size, options = getattr(getattr(module, 'data_preprocessor', None), 'size', None), dict(mode='tensor')
    if size is None or module is None:
        return None
    images = (cfg.train_dataloader.batch_size, 3, *size)
    amp = cfg.optim_wrapper.get('type') in ('BEiTBF16OptimWrapper', 'AmpOptimWrapper')
    recomputing = [part for part in module.modules() if getattr(part, 'grad_checkpointing', False)]
    try:
        held = kept_bytes(module, images, amp, **options)
        for part in recomputing:
            part.grad_checkpointing = False
        if recomputing:  # and in the backward pass those of one block
            held += kept_bytes(module, images, amp, **options) // sum(len(part.blocks) for part in recomputing)
    except Exception:  # whatever other people's modules do; a training does not stop for an estimate
        return None
    finally:
        for part in recomputing:
            part.grad_checkpointing = True
    weights = sum(x.numel() * x.element_size() for x in module.parameters())
    learned = sum(x.numel() * x.element_size() for x in module.parameters() if x.requires_grad)
    moments = 2 if 'Adam' in cfg.optim_wrapper.optimizer.type else 1
    averages = sum('EMA' in hook.type for hook in cfg.get('custom_hooks') or ())
    return weights * (1 + averages) + learned * (1 + moments), held


def _parts(module: Any) -> list[Any]:
    """What an image goes through in a segmentor, as far as it has them; a cascade has several heads."""
    from torch.nn import ModuleList

    found = [getattr(module, name, None) for name in ('backbone', 'neck', 'decode_head')]
    lists = [part if isinstance(part, ModuleList) else [part] for part in found if part is not None]
    return list(itertools.chain(*lists))


def summary(runner: Any, counts: dict[str, int]) -> str:
    """What is about to run, in lines: model, resolution, data, schedule, memory, device, where it goes."""
    import torch
    from mmengine.device import get_device
    from mmengine.dist import get_world_size

    cfg = runner.cfg
    module = inner(runner.model)
    device = get_device()
    if device == 'cuda':
        device = torch.cuda.get_device_name()
    else:
        device += f', {torch.get_num_threads()} threads'
    if is_pretraining(cfg):
        lines = pretraining(cfg, module)
    else:
        lines = _segmentor(module) if hasattr(module, 'decode_head') else _detector(module)
    lines.append(f'data        {", ".join(f"{count} {name} images" for name, count in counts.items())}')
    if 'training' in counts:
        batch = cfg.train_dataloader.batch_size * get_world_size() * cfg.optim_wrapper.get('accumulative_counts', 1)
        lines.append(
            f'schedule    {length(cfg)}, effective batch {batch}, '
            f'{cfg.optim_wrapper.get("type", "OptimWrapper")} {cfg.optim_wrapper.get("dtype", "")}'.rstrip()
        )
        needed = memory(cfg, module)
        if needed is not None:
            whole, states, kept = map(size_of, (sum(needed), *needed))
            lines.append(
                f'memory      about {whole} a process: {states} of weights and optimiser, {kept} kept for the gradients'
            )
    lines += [f'device      {device}, {get_world_size()} process(es)', f'output      {cfg.work_dir}']
    return '\n'.join(f'  {line}' for line in lines)


def score(scalars: Any) -> str:
    """The last mIoU of a segmentor, or average precisions of a detector, in words."""
    if 'val/mIoU' in scalars:
        return f'mIoU {scalars["val/mIoU"].current():.2f}'
    precisions = {name.rpartition('/')[2]: values for name, values in scalars.items() if name.endswith('_mAP')}
    return ', '.join(f'{name} {values.current():.3f}' for name, values in precisions.items()) or 'no mIoU'


def _detector(module: Any) -> list[str]:
    """Lines about a model of mmdetection."""
    parts = ' + '.join(type(part).__name__ for part in _parts(module))
    return [f'model       {type(module).__name__} of {parts}, {millions(module)}']


def _segmentor(module: Any) -> list[str]:
    """Lines about a segmentor."""
    parts = _parts(module)
    size = getattr(module.data_preprocessor, 'size', None)
    trained = f'crops of {" x ".join(map(str, size))} px' if size else 'sizes of the pipeline'
    tested = 'windows' if module.test_cfg.mode == 'slide' else 'whole images'
    return [
        f'model       {" + ".join(type(part).__name__ for part in parts)}, {millions(module)}',
        f'classes     {parts[-1].num_classes}',
        f'resolution  {trained} in training, {tested} in testing',
    ]
