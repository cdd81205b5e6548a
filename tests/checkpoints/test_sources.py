"""Where a checkpoint may come from, and that a write which is killed leaves the old file."""

import functools
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from checkpoints.peers import beit

from beit_plugin.checkpoints import CheckpointError, load, save
from beit_plugin.checkpoints.files import read_state_dict, write_state_dict
from beit_plugin.checkpoints.sources import read_source

STATE = {'a.weight': torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An HTTP server of a folder; returns the folder and its URL."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f'http://127.0.0.1:{running.server_port}'
        running.shutdown()
        thread.join()


def test_url(server, tmp_path):
    folder, url = server
    write_state_dict(STATE, folder / 'x.pth')
    assert torch.equal(read_source(f'{url}/x.pth?sv=1').state_dict['a.weight'], STATE['a.weight'])
    assert len(list((tmp_path / 'cache/hub/checkpoints').rglob('x.pth'))) == 1
    with pytest.raises(CheckpointError, match=r'/none.pth cannot be fetched: HTTP Error 404'):
        read_source(f'{url}/none.pth')
    with pytest.raises(CheckpointError, match='cannot be fetched'):
        read_source('http://127.0.0.1:1/x2.pth')


def test_url_with_a_checksum(server, tmp_path):
    folder, url = server
    write_state_dict(STATE, folder / 'x.pth')
    digest = hashlib.sha256((folder / 'x.pth').read_bytes()).hexdigest()
    (folder / 'x.pth').rename(folder / f'beit_2022-{digest[:8]}.pth')
    assert read_source(f'{url}/beit_2022-{digest[:8]}.pth').state_dict.keys() == STATE.keys()
    (folder / 'beit-a0000000.pth').write_bytes((folder / f'beit_2022-{digest[:8]}.pth').read_bytes())
    with pytest.raises(CheckpointError, match='cannot be fetched: invalid hash value'):
        read_source(f'{url}/beit-a0000000.pth')
    assert not list((tmp_path / 'cache').rglob('beit-a0000000*'))


def test_files_of_one_name_and_names_with_a_date(server):
    """On the hub all files are called model.safetensors; eight digits are a date, not a checksum."""
    folder, url = server
    for value in (1.0, 2.0):
        (folder / str(value)).mkdir()
        write_state_dict({'a': torch.tensor([value])}, folder / str(value) / 'model.safetensors')
    for value in (1.0, 2.0, 1.0):
        assert read_source(f'{url}/{value}/model.safetensors').state_dict['a'] == value
    write_state_dict(STATE, folder / 'beit-20220101.pth')
    assert read_source(f'{url}/beit-20220101.pth').state_dict.keys() == STATE.keys()


class TestHub:
    """The library that fetches is replaced: nothing can be fetched where the tests run."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        asked = []

        def fetch(repository, name):
            asked.append((repository, name))
            if not (tmp_path / name).is_file():
                raise EntryNotFoundError(f'404: {name} is not in {repository}\nmore')
            return str(tmp_path / name)

        monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fetch)
        return asked

    @pytest.mark.parametrize('hub_id', ['microsoft/beit-base', 'hf-hub:microsoft/beit-base'])
    @pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
    def test_weights_and_configuration(self, hub, tmp_path, hub_id, name):
        write_state_dict(STATE, tmp_path / name)
        (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'beit', 'image_size': [64, 96]}))
        source = read_source(hub_id)
        assert source.name == hub_id and source.grid == (4, 6) and source.state_dict.keys() == STATE.keys()
        assert {repository for repository, _ in hub} == {'microsoft/beit-base'}

    def test_id_with_a_dot_and_an_option_that_means_nothing(self, hub, tmp_path):
        write_state_dict(STATE, tmp_path / 'model.safetensors')
        (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'beit', '_num_labels': 3, 'max_length': 20}))
        assert read_source('timm/beit_base_patch16_224.in22k_ft_in22k_in1k').grid == (14, 14)
        assert hub[0][0] == 'timm/beit_base_patch16_224.in22k_ft_in22k_in1k'

    def test_configuration_of_timm_is_none_of_ours(self, hub, tmp_path):
        write_state_dict(STATE, tmp_path / 'model.safetensors')
        (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'beit_base_patch16_224'}))
        assert read_source('timm/beit_base').config is None

    def test_no_weights(self, hub):
        with pytest.raises(
            CheckpointError, match=r'timm/none is no file or folder here, and the hub did not give it \(404'
        ):
            read_source('timm/none')

    def test_no_network(self, monkeypatch):
        import huggingface_hub

        def fail(*_):
            raise OSError('no route to host')

        monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
        with pytest.raises(
            CheckpointError, match=r'the hub did not give it \(no route to host\); check the path or the id'
        ):
            read_source('timm/beit')


@pytest.mark.parametrize('source', ['none.pth', 'some/folder/none.pth', 'none'])
def test_a_path_that_is_not_there(source):
    with pytest.raises(CheckpointError, match='does not exist; give the path of a checkpoint file'):
        read_source(source)


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    torch.save({'blocks.0.norm1.weight': torch.zeros(1).expand(10**12)}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='it would become far larger than the file'):
        read_source(tmp_path / 'x.pth')


def test_broken_configuration_and_index(tmp_path):
    write_state_dict(STATE, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"model_type": "be')
    with pytest.raises(CheckpointError, match=r'config.json is cut off or no JSON'):
        read_source(tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'other.safetensors')
    for content in ('{}', '{"weight_map": {}}', '{"weight_map": 3}'):
        (tmp_path / 'model.safetensors.index.json').write_text(content)
        with pytest.raises(CheckpointError, match='is no list of checkpoint files'):
            read_source(tmp_path)


def test_save_that_cannot_be(tmp_path):
    model = beit()
    with pytest.raises(
        CheckpointError, match=r'x is no name of a checkpoint file; end it in one of \.safetensors, \.pth'
    ):
        save(model, tmp_path / 'x', dialect='timm')
    with pytest.raises(CheckpointError, match='an encoder of timm has no place for mask_token'):
        save(beit(use_mask_token=True), tmp_path / 'x.pth', dialect='timm')
    with pytest.raises(OSError, match='No such file or directory'):
        save(model, tmp_path / 'nowhere/x.pth')
    assert os.listdir(tmp_path) == []


WRITER = """
import sys, torch
from beit_plugin.checkpoints.files import write_state_dict
state = {'a': torch.full((4_000_000,), float(sys.argv[2]))}
print('go', flush=True)
while True:
    write_state_dict(state, sys.argv[1])
"""


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors'])
def test_a_killed_write_leaves_a_whole_file(name, tmp_path):
    path = tmp_path / name
    write_state_dict({'a': torch.zeros(4_000_000)}, path)
    for value, delay in enumerate((0.0, 0.013, 0.05, 0.11), start=1):
        process = subprocess.Popen([sys.executable, '-c', WRITER, path, str(value)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'go\n'
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = read_state_dict(path)['a']
        assert len(found) == 4_000_000 and (found == found[0]).all()


def test_wrappers_and_prefixes(tmp_path):
    """Averaged weights win, as in timm; what DistributedDataParallel and torch.compile put before names goes."""
    model = beit()
    state = model.state_dict()
    ema = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for wrapped in (
        {'state_dict': state, 'state_dict_ema': ema},
        {'model': state, 'model_ema': {f'module.{n}': t for n, t in ema.items()}},
        {'model': {'module': {f'_orig_mod.module.{n}': t for n, t in ema.items()}}, 'optimizer': {'state': {}}},
    ):
        torch.save(wrapped, tmp_path / 'x.pth')
        twin = beit()
        load(twin, tmp_path / 'x.pth')
        assert torch.equal(twin.cls_token, ema['cls_token'])
