"""What tools/train.py and tools/test.py make of configurations unlike ours: wrapped data, other parts and loops."""

import argparse
import copy
import importlib.util
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tools_common import SHAPES_CONFIG, cut, image_folder, turn

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable
from beit_plugin.mm.segmentation.transforms import DataFileError

from data_folders import DataError  # isort: skip
from run_common import _built, _run, evaluate, load_config, run, use_mixed_precision  # isort: skip
from run_options import check_options, check_pretrained, leave_whole  # isort: skip
from run_summary import length, memory, summary  # isort: skip
from run_data import check_data, report_left_out, set_on_error  # isort: skip


SHARDED = dict(type='BEiTFSDPStrategy')


def shapes_config(**options: Any) -> Any:
    """Our smallest configuration, with a model that takes no time to build."""
    from mmengine.config import Config

    cfg = Config.fromfile(SHAPES_CONFIG)
    cfg.model.backbone.update(embed_dims=16, num_heads=2)
    cfg.model.neck.embed_dim = 16
    cfg.model.decode_head.update(in_channels=[16] * 4, channels=8)
    cfg.model.auxiliary_head.update(in_channels=16, channels=8)
    cfg.work_dir = 'work'
    cfg.merge_from_dict(options)
    return cfg


def repeated(dataset: Any) -> dict[str, Any]:
    return dict(type='RepeatDataset', times=3, dataset=dataset)


def joined(dataset: Any) -> dict[str, Any]:
    return dict(type='ConcatDataset', datasets=[dataset, repeated(copy.deepcopy(dataset))])


@pytest.fixture
def data(tmp_path):
    """Five images for training, five for validation."""
    image_folder(tmp_path, ('training', 'validation'), values=(0, 1, 7))
    return tmp_path


@pytest.mark.usefixtures('mmseg_scope')
class TestData:
    @pytest.mark.parametrize(('wrap', 'count'), [(repeated, 5), (joined, 10)])
    def test_wrapped(self, data, wrap, count):
        cfg = shapes_config()
        cfg.train_dataloader.dataset.data_root = str(data)
        wrapped = wrap(cfg.train_dataloader.dataset)
        assert check_data(wrapped) == count
        (data / 'annotations/training/3.png').unlink()
        with pytest.raises(DataError, match='1 of 5 images have no label'):
            check_data(wrapped)

    def test_data_root_reaches_wrapped_data_and_skips_absent_loaders(self, data, tmp_path):
        cfg = shapes_config()
        cfg.train_dataloader.dataset = joined(cfg.train_dataloader.dataset)
        cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
        cfg.pop('test_dataloader')
        cfg.dump(tmp_path / 'cfg.py')
        arguments = dict(config=tmp_path / 'cfg.py', cfg_options=None, launcher='none', work_dir=None, data_root=data)
        cfg = load_config(argparse.Namespace(**arguments))
        assert check_data(cfg.train_dataloader.dataset) == 10
        with pytest.raises(DataError, match='has no test_dataloader: there is nothing to evaluate on'):
            evaluate(cfg, 'https://host/weights.pth', tta=False)

    def test_images_as_they_are_stored(self, data):
        """What the sentence about EXIF data advises is taken by the check before the run too."""
        turn(data / 'images/training/1.jpg')
        cfg = shapes_config()
        dataset = cfg.train_dataloader.dataset
        dataset.data_root = str(data)
        with pytest.raises(
            DataError, match=r"1.jpg is 40 x 48 \(after its EXIF .* color_type='color_ignore_orientation'"
        ):
            check_data(dataset)
        dataset.pipeline[0].color_type = 'color_ignore_orientation'
        assert check_data(dataset) == 5

    def test_mmsegmentations_own_augmentations_and_a_resume_past_the_end(self, data, tmp_path, capsys):
        from run_common import train

        cfg = shapes_config(work_dir=str(tmp_path / 'work'), **{'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2})
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(data)
            loader.update(num_workers=0, persistent_workers=False)
        cfg.train_dataloader.batch_size = 2
        cfg.default_hooks.checkpoint.interval = 2
        checkpoint, _, _ = train(copy.deepcopy(cfg))
        cfg.tta_model.type = 'SegTTAModel'  # averages the logits, which our configurations do without
        assert evaluate(cfg, checkpoint, tta=True)['mIoU'] >= 0
        cfg.update(resume=True, train_cfg=dict(cfg.train_cfg, max_iters=1))
        capsys.readouterr()
        train(cfg)
        assert (
            'nothing was trained: the checkpoint is that of 2, and the configuration ends at 1'
            in capsys.readouterr().out
        )

    def test_files_that_are_left_out(self, data, capsys):
        from mmseg.registry import DATASETS

        cfg = shapes_config()
        cfg.train_dataloader.dataset.data_root = str(data)
        wrapped = joined(cfg.train_dataloader.dataset)
        set_on_error(wrapped, 'skip')
        (data / 'annotations/training/3.png').unlink()
        assert check_data(wrapped) == 10
        dataset = DATASETS.build(wrapped)
        for _ in range(2):
            assert len([dataset[i] for i in range(len(dataset))]) == 20
        report_left_out(dataset)
        assert capsys.readouterr().out.endswith(f'1 file left out of training: {data / "annotations/training/3.png"}\n')
        for i in (0, 1, 2, 4):
            cut(data / f'images/training/{i}.jpg', 0.5)
        with pytest.raises(DataError, match=r'none of the 5 images of .* that were checked can be used'):
            check_data(wrapped)

    def test_stock_loading_cannot_leave_files_out(self):
        dataset = shapes_config().val_dataloader.dataset
        with pytest.raises(DataError, match='--on-error needs BEiTLoadImageFromFile and BEiTLoadAnnotations in the'):
            set_on_error(dataset, 'skip')

    def test_the_sentence_of_a_worker(self):
        def step():
            raise DataFileError(
                'Caught DataFileError in ...\nTraceback ...\nbeit_plugin.mm.x.DataFileError: a.jpg is bad\n'
            )

        with pytest.raises(DataError, match=r'^a\.jpg is bad\.$'):
            _run(step)

    def test_mixed_precision(self):
        cfg = shapes_config()
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='float16')
        use_mixed_precision(cfg, 'bfloat16')
        assert cfg.optim_wrapper.type == 'BEiTBF16OptimWrapper' and 'dtype' not in cfg.optim_wrapper

    @pytest.mark.parametrize('wrong', [dict(variant='tiny'), dict(type='BEiTX')])
    def test_parts_that_cannot_be_built(self, wrong, tmp_path):
        cfg = shapes_config()
        cfg.work_dir, cfg.experiment_name = str(tmp_path), tmp_path.name  # runs of one second would share a name
        cfg.model.backbone.update(wrong)
        with pytest.raises(
            DataError, match=r'^the configuration cannot be built: (BEiTBackbone|BEiTX) ?.*(variant|is not)'
        ):
            _built(cfg)

    def test_a_model_without_a_backbone_of_that_name(self):
        cfg = shapes_config()
        del cfg.model.backbone
        check_pretrained(cfg)


@pytest.mark.usefixtures('mmseg_scope')
class TestSummary:
    @staticmethod
    def lines(cfg: Any) -> dict[str, str]:
        from mmseg.registry import MODELS

        runner = SimpleNamespace(cfg=cfg, model=MODELS.build(copy.deepcopy(cfg.model)))
        text = summary(runner, {'training': 5})
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()}

    def test_ours(self):
        lines = self.lines(shapes_config())
        assert lines['model'].startswith('BEiTBackbone + BEiTPyramid + BEiTUPerHead, 0.')
        assert lines['resolution'] == 'crops of 96 x 96 px in training, windows in testing'
        assert lines['schedule'] == '400 iterations, effective batch 8, OptimWrapper'

    def test_memory(self):
        """Twice the images keep twice as much; what is recomputed is not kept."""
        from mmseg.registry import MODELS

        def found(batch, **backbone):
            cfg = shapes_config()
            cfg.train_dataloader.batch_size = batch
            cfg.model.backbone.update(backbone)
            return memory(cfg, MODELS.build(copy.deepcopy(cfg.model)).eval())

        model = MODELS.build(shapes_config().model)
        size = sum(parameter.numel() * 4 for parameter in model.parameters())
        states, kept = found(4)
        assert states == 4 * size
        assert found(8)[1] == pytest.approx(2 * kept, rel=0.02)
        assert found(4, with_cp=True)[1] < 0.8 * kept
        assert memory(shapes_config(), torch.nn.Identity()) is None
        text = self.lines(shapes_config())['memory']
        assert re.fullmatch(
            r'about \d\d MiB a process: \d MiB of weights and optimiser, \d\d MiB kept for the .*', text
        )

    def test_pyramid_in_the_backbone_and_no_other_parts(self):
        cfg = shapes_config()
        cfg.model.backbone.add_fpn = True
        cfg.model.update(neck=None, auxiliary_head=None)
        assert self.lines(cfg)['model'].startswith('BEiTBackbone + BEiTUPerHead, 0.')

    def test_several_decode_heads(self):
        cfg = shapes_config()
        point = dict(type='PointHead', in_channels=[16], in_index=[0], channels=8, num_fcs=1, num_classes=7)
        heads = [cfg.model.decode_head, dict(point, align_corners=False)]
        cfg.model.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=heads, auxiliary_head=None)
        lines = self.lines(cfg)
        assert 'BEiTUPerHead + PointHead' in lines['model'] and lines['classes'] == '7'

    @pytest.mark.parametrize(
        'preprocessor', [dict(type='SegDataPreProcessor', size_divisor=32), dict(type='BaseDataPreprocessor')]
    )
    def test_no_fixed_size(self, preprocessor):
        cfg = shapes_config()
        cfg.model.test_cfg.mode = 'whole'
        cfg.model.data_preprocessor = preprocessor
        assert self.lines(cfg)['resolution'] == 'sizes of the pipeline in training, whole images in testing'

    @pytest.mark.parametrize(
        ('train_cfg', 'words'),
        [
            (dict(type='EpochBasedTrainLoop', max_epochs=3), '3 epochs'),
            (dict(by_epoch=True, max_epochs=1), '1 epoch'),
            (dict(type='IterBasedTrainLoop', max_iters=20), '20 iterations'),
        ],
    )
    def test_length_in_epochs_and_iterations(self, train_cfg, words):
        cfg = shapes_config()
        cfg.train_cfg = train_cfg
        del cfg.optim_wrapper['type']  # mmengine has a default
        assert length(cfg) == words
        assert self.lines(cfg)['schedule'] == f'{words}, effective batch 8, OptimWrapper'


def test_processes_part_at_the_end():
    def main():
        torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)

    run(main)
    assert not torch.distributed.is_initialized()
    run(lambda: None)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(compile='yes'), "compile is True, or has options as compile.backend=eager, got 'yes'"),
        (dict(runner_type='FlexibleRunner', compile=True), 'compiles nothing under FlexibleRunner'),
        (dict(strategy=SHARDED, launcher='pytorch', custom_hooks=[dict(type='EMAHook')]), 'cannot average weights'),
        (dict(strategy=SHARDED), 'start it by torchrun --nproc_per_node N'),
    ],
)
def test_options_that_do_not_go_together(options, sentence):
    with pytest.raises(DataError, match=sentence):
        check_options(shapes_config(**options))
    check_options(shapes_config(compile=dict(backend='eager'), custom_hooks=[dict(type='EMAHook')]))
    check_options(shapes_config(runner_type='FlexibleRunner', strategy=dict(type='SingleDeviceStrategy')))


def test_sharded_models_are_evaluated_whole():
    cfg = shapes_config(runner_type='FlexibleRunner', strategy=SHARDED)
    leave_whole(cfg)
    assert 'runner_type' not in cfg and 'strategy' not in cfg


def test_what_our_models_say_is_a_sentence():
    """And what others say is left with its traceback."""
    from beit_plugin.data.masking import BlockMasking

    with pytest.raises(DataError, match='at most the 16 patches'):
        _run(lambda: BlockMasking((4, 4), 17)(1))
    with pytest.raises(ValueError, match='invalid literal'):
        _run(lambda: int('x'))
