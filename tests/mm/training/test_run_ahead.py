"""The hook that lets the CPU run ahead of the GPU: what is logged is what mmengine logs, and nothing waits."""

import copy
import importlib.util
import json
import multiprocessing
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tools_common import SHAPES_CONFIG, image_folder

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from beit_plugin.mm.training import run_ahead
from beit_plugin.mm.training.run_ahead import LateMessageHub

STEPS = 5


@pytest.fixture
def late(monkeypatch):
    """A hub to which every tensor counts as one on the GPU."""
    monkeypatch.setattr(LateMessageHub, '_is_late', staticmethod(lambda value: isinstance(value, torch.Tensor)))
    hub = MessageHub('late')
    LateMessageHub.take_over(hub)
    return hub


def feed(hub):
    for step in range(4):
        hub.update_scalar('loss', torch.tensor(0.1) * step)
        hub.update_scalar('hits', torch.tensor([step]))
        hub.update_scalar('rate', 0.5 * step)
    hub.update_scalar('loss', 7.0)  # not a tensor: still after those that wait
    hub.update_scalar('loss', torch.tensor(8.0, dtype=torch.float64), 3)


def histories(hub):
    return {name: [values.tolist() for values in buffer.data] for name, buffer in hub.log_scalars.items()}


def test_numbers_are_mmengines(late):
    hub = MessageHub('stock')
    feed(hub)
    feed(late)
    assert late._waiting and histories(late) == histories(hub) and not late._waiting


def test_numbers_as_they_were(late):
    """What is logged may change in place before it is fetched."""
    average = torch.zeros(1)
    for _ in range(3):
        late.update_scalar('average', average.add_(1))
    assert late.get_scalar('average').data[0].tolist() == [1, 2, 3]


def test_order_and_buffers_are_mmengines(late):
    hub = MessageHub('stock')
    for one in (hub, late):
        held = None
        for step in range(3):
            one.update_scalar('loss', torch.tensor(float(step)))
            one.update_scalar('hits', torch.tensor(step))
            one.update_scalar('rate', 0.5)
            held = held or one.get_scalar('loss')
        assert list(one.log_scalars) == ['loss', 'hits', 'rate']
        assert held.data[0].tolist() == [0, 1, 2] and one.get_scalar('hits').data[0].dtype == int
    with pytest.raises(AssertionError):
        late.update_scalar('loss', torch.zeros(2))


def test_a_stock_hub_takes_all_of_a_late_one(late):
    late.update_scalar('loss', torch.tensor(1.0))
    hub = MessageHub('stock')
    hub.load_state_dict(late)
    assert hub.get_scalar('loss').current() == 1
    copies = copy.deepcopy(late), pickle.loads(pickle.dumps(late))
    late.update_scalar('loss', torch.tensor(2.0))
    assert [one.get_scalar('loss').current() for one in (*copies, late)] == [1, 1, 2]


def test_what_is_read_is_fetched(late):
    feed(late)
    assert late.get_scalar('rate').current() == 1.5 and late._waiting  # nothing of that name waits
    assert late.get_scalar('loss').current() == 8 and not late._waiting
    late.update_scalar('loss', torch.tensor(9.0))
    other = MessageHub('other')
    other.load_state_dict(late.state_dict())
    assert other.get_scalar('loss').current() == 9
    with pytest.raises(KeyError, match='nothing is not found'):
        late.get_scalar('nothing')


def test_not_too_many_wait(late, monkeypatch):
    monkeypatch.setattr(run_ahead, '_MOST_WAITING', 3)
    for step in range(5):
        late.update_scalar('loss', torch.tensor(float(step)))
    assert len(late._waiting) == 2 and late.get_scalar('loss').data[0].tolist() == [0, 1, 2, 3, 4]


def test_keys_keep_whether_they_are_resumed(late):
    late.update_scalar('loss', torch.tensor(1.0), resumed=False)
    with pytest.raises(AssertionError, match='resumed'):
        late.update_scalar('loss', torch.tensor(1.0))
    assert 'loss' not in late.state_dict()['log_scalars'] and late.get_scalar('loss').current() == 1


def test_labels_go_to_pinned_memory(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor + 1)
    labels = PixelData(data=torch.zeros(1, 2, 3, dtype=torch.int64))
    sample = SegDataSample(gt_sem_seg=labels, metainfo=dict(img_path='a.png'))
    found = sample.pin_memory()
    assert type(found) is SegDataSample and found.img_path == 'a.png' and found.gt_sem_seg.data.eq(1).all()
    assert sample.gt_sem_seg.data.eq(0).all()


@pytest.mark.parametrize('swaps', [dict(bgr_to_rgb=True), dict(rgb_to_bgr=True), {}])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('channels', [3, 1])
def test_preprocessed_as_by_mmsegmentation(swaps, training, channels):
    from mmseg.models import SegDataPreProcessor

    size = dict(size=(12, 12)) if training else {}
    colours = dict(mean=[1.5] * channels, std=[2.0] * channels)
    ours, stock = (
        make(**colours, **swaps, **size) for make in (beit_plugin.mm.BEiTSegDataPreProcessor, SegDataPreProcessor)
    )
    sides = ((8, 12), (12, 10)) if training else ((8, 12), (8, 12))
    data = dict(
        inputs=[torch.randint(256, (channels, *side), dtype=torch.uint8) for side in sides],
        data_samples=[SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, *side, dtype=int))) for side in sides],
    )
    found, expected = ours(data, training), stock(data, training)
    assert torch.equal(found['inputs'], expected['inputs']) and len(found['data_samples']) == 2
    for a, b in zip(found['data_samples'], expected['data_samples'], strict=True):
        assert torch.equal(a.gt_sem_seg.data, b.gt_sem_seg.data) and a.metainfo == b.metainfo


def test_samples_without_classes():
    data = dict(
        inputs=[torch.zeros(3, 8, 8, dtype=torch.uint8)],
        data_samples=[SegDataSample(gt_depth_map=PixelData(data=torch.ones(1, 8, 8)))],
    )
    found = beit_plugin.mm.BEiTSegDataPreProcessor(mean=[0.0] * 3, std=[1.0] * 3, size=(8, 8))(data, True)
    assert found['data_samples'][0].gt_depth_map.data.eq(1).all()


def test_workers_end_with_the_run():
    loader = torch.utils.data.DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)
    runner = SimpleNamespace(_train_loop=SimpleNamespace(dataloader=loader), _val_loop=None, _test_loop=dict(type='A'))
    before = set(multiprocessing.active_children())
    assert len(list(loader)) == 4 and len(set(multiprocessing.active_children()) - before) == 1
    run_ahead.BEiTRunAheadHook().after_run(runner)
    assert set(multiprocessing.active_children()) <= before
    assert len(list(loader)) == 4  # asked again
    run_ahead.end_workers(runner)


class Watch(Hook):
    """Makes every wait for the GPU an error from the third step on; the lines of the log, which come later, wait.

    Where there is no GPU, fetching a number is such a wait.
    """

    priority = 'NORMAL'  # of after_train_iter: behind those that note losses, ahead of the log

    def __init__(self, monkeypatch):
        self.mode, self.steps = 'default', 0
        if torch.cuda.is_available():
            self.set_mode = torch.cuda.set_sync_debug_mode
            return
        self.set_mode, fetch = partial(setattr, self, 'mode'), LateMessageHub._fetch

        def watched(hub):
            if self.mode == 'error' and hub._waiting:
                raise RuntimeError('called a synchronizing CUDA operation')
            fetch(hub)

        monkeypatch.setattr(LateMessageHub, '_fetch', watched)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.set_mode('error' if runner.iter >= 2 else 'default')  # kernels are compiled before
        self.steps += runner.iter >= 2

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.set_mode('default')


class Waiting(Hook):
    """How many numbers wait behind each step."""

    priority = 'VERY_LOW'

    def __init__(self, found):
        self.found = found

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.found.append(len(getattr(runner.message_hub, '_waiting', ())))


def train(folder, ahead, *hooks, **options):
    """Numbers that a short training logs, those in its checkpoint, and how many waited behind each step."""
    cfg = Config.fromfile(SHAPES_CONFIG)
    cfg.merge_from_dict({
        'work_dir': str(folder), 'experiment_name': folder.name, 'visualizer.name': folder.name,
        'train_cfg': dict(max_iters=STEPS, val_interval=100), 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False, 'train_dataloader.batch_size': 2, 'param_scheduler': None,
        'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None, 'test_cfg': None, 'test_dataloader': None,
        'test_evaluator': None, 'default_hooks.logger.interval': STEPS, 'default_hooks.checkpoint.interval': STEPS,
        'optim_wrapper.type': 'BEiTBF16OptimWrapper', **options,
    })  # fmt: skip
    if not ahead:
        cfg.default_hooks.pop('run_ahead')
    waiting = []
    runner = Runner.from_cfg(cfg)
    for hook in (Waiting(waiting), *hooks):
        runner.register_hook(hook)
    runner.train()
    lines = next(Path(folder).glob('*/vis_data/scalars.json')).read_text().splitlines()
    kept = torch.load(folder / f'iter_{STEPS}.pth', weights_only=False)
    noted = {name: buffer.data[0].tolist() for name, buffer in kept['message_hub']['log_scalars'].items()}
    timed = ('time', 'data_time', 'memory')
    logged = {name: value for name, value in json.loads(lines[-1]).items() if name not in timed}
    return logged, {name: values for name, values in noted.items() if name.partition('/')[2] not in timed}, waiting


@pytest.mark.usefixtures('mmseg_scope')
def test_training_logs_the_same(tmp_path, monkeypatch):
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    if not torch.cuda.is_available():
        monkeypatch.setattr(LateMessageHub, '_is_late', staticmethod(lambda value: isinstance(value, torch.Tensor)))
    logged, noted, waiting = train(tmp_path / 'ahead', True)
    assert len(noted['train/loss']) == len(noted['train/grad_norm']) == STEPS and {'loss', 'grad_norm'} <= set(logged)
    first = waiting[0]
    # it logs after the last step, and once after a few, so that one sees that it runs
    assert first >= 4 and waiting == [first, 2 * first, 0, first, 0]
    if torch.cuda.is_available():
        return  # not bit for bit there
    assert (logged, noted, [0] * STEPS) == train(tmp_path / 'stock', False)


@pytest.mark.usefixtures('mmseg_scope')
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch):
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    monkeypatch.setenv('SHAPES_ROOT', str(tmp_path))
    if not torch.cuda.is_available():
        monkeypatch.setattr(LateMessageHub, '_is_late', staticmethod(lambda value: isinstance(value, torch.Tensor)))
    watch = Watch(monkeypatch)
    try:
        train(tmp_path / 'watched', True, watch, **{'train_dataloader.pin_memory': torch.cuda.is_available()})
    finally:
        watch.set_mode('default')
    assert watch.steps == STEPS - 2
