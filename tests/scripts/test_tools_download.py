"""tools/download.py and models_released.py, with a local HTTP server that breaks connections."""

import hashlib
import io
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

import clip
import clip.clip as clip_module
import models_released
import tools.download  # noqa: F401 (before the tests replace the URLs that it imports)
from models_released import FILES, fetch
from tests.helpers import Handler, Server, ok, one_error_line, script
from util.checkpoints.key_names import to_openmmlab

tool = script('tools.download')


class RangeHandler(Handler):
    """Send Content-Range as Google Drive does, which gdown checks, after ``server.delay`` s."""

    def end_headers(self):
        length = len(self.server.content)
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if 0 < start < length:
            self.send_header('Content-Range', f'bytes {start}-{length - 1}/{length}')
        super().end_headers()
        time.sleep(self.server.delay)


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        server.RequestHandlerClass, server.delay = RangeHandler, 0
        quick = partial(models_released.download, pause=0.01)
        monkeypatch.setattr(models_released, 'DRIVE', server.url('drive/{id}'))
        monkeypatch.setattr(models_released, 'download', quick)
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def checkpoint_bytes(tensors, **more):
    """Return a checkpoint file in which every tensor is one number, expanded to its shape."""
    file = io.BytesIO()
    state_dict = {name: torch.zeros(()).expand(x.shape) for name, x in tensors.items()}
    torch.save({**more, 'state_dict': state_dict}, file)
    return file.getvalue()


def released(name, **more):
    """Return a file with the tensors of FILES[name], and 3 MB of other content."""
    tensors = FILES[name].tensors()
    if name.startswith('openmmlab'):
        tensors = to_openmmlab(tensors)
    return checkpoint_bytes(tensors, optimizer=torch.rand(750_000), **more)


def set_url(monkeypatch, name, url):
    monkeypatch.setitem(FILES, name, replace(FILES[name], url=url))


def serve_openmmlab(server, monkeypatch, name, content):
    """Serve ``content`` as FILES[name] and return the name of the file, with its checksum."""
    server.content = content
    file = f'milan-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    set_url(monkeypatch, name, server.url(file))
    return file


def download(*names, folder):
    return tool(*names, '--output_dir', folder)


def drive_error(result, *words):
    """Assert that there is one error line with these words; gdown prints other lines."""
    (line,) = re.findall('^error: .*$', result.stderr, flags=re.MULTILINE)
    assert result.returncode == 1 and all(str(word) in line for word in words), line


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock'))


# ---- OpenMMLab: the file name has a checksum ----


@pytest.mark.parametrize('name', ['openmmlab_milan_vit_base', 'openmmlab_milan_vit_base_finetuned'])
def test_url_is_resumed_and_not_downloaded_twice(name, server, monkeypatch, tmp_path):
    file = serve_openmmlab(server, monkeypatch, name, released(name, meta={'epoch': 100}))
    server.cuts = [1_000_000]
    out = ok(download(name, name, folder=tmp_path / 'new'))
    assert out.count(f'--finetune {tmp_path}/new/{file}\n') == 1  # the name was given twice
    assert (tmp_path / 'new' / file).read_bytes() == server.content
    assert [r for _, r in server.requests] == ['bytes=0-', 'bytes=1000000-']
    ok(download(name, folder=tmp_path / 'new'))
    assert len(server.requests) == 2 and files(tmp_path / 'new') == [file]


def test_wrong_checksum(server, monkeypatch, tmp_path):
    name = 'openmmlab_milan_vit_base'
    file = serve_openmmlab(server, monkeypatch, name, released(name))
    server.content = server.content[:-1] + b'x'
    one_error_line(download(name, folder=tmp_path), name, server.url(file), 'SHA-256')
    assert files(tmp_path) == []


def test_another_model_with_the_right_checksum(server, monkeypatch, tmp_path):
    name = 'openmmlab_milan_vit_base_finetuned'
    serve_openmmlab(server, monkeypatch, name, released('openmmlab_milan_vit_base'))
    one_error_line(download(name, folder=tmp_path), name, 'deleted', 'fc_norm.weight')
    assert files(tmp_path) == []


def test_missing_file_and_missing_server(server, monkeypatch, tmp_path):
    name = 'openmmlab_milan_vit_base'
    for url, words in (
        (server.url('missing/milan-00000000.pth'), ['404']),
        ('http://127.0.0.1:9/milan-00000000.pth', [f'{tmp_path}/milan-00000000.pth']),
    ):
        set_url(monkeypatch, name, url)
        one_error_line(download(name, folder=tmp_path), name, *words)


# ---- Google Drive ----


@pytest.mark.parametrize('name', ['milan_vit_base', 'milan_vit_large'])
def test_drive_is_resumed_and_not_downloaded_twice(name, server, tmp_path):
    server.content = released(name, epoch=399)
    server.cuts = [2**20]  # gdown keeps whole chunks of 2**19 bytes
    ok(download(name, folder=tmp_path))
    assert (tmp_path / f'{name}.pth').read_bytes() == server.content
    path = f'/drive/{FILES[name].drive_id}'
    assert server.requests == [(path, None), (path, f'bytes={2**20}-')]
    ok(download(name, folder=tmp_path))
    assert len(server.requests) == 2 and files(tmp_path) == [f'{name}.pth']


def test_drive_with_a_partial_file(server, tmp_path):
    """Resume the partial file of an earlier call; start again if it is longer than the file."""
    server.content = released('milan_vit_base')
    for part, requests in [
        (server.content[:2_000_000], [None, 'bytes=2000000-']),
        (b'x' * 9_000_000, [None, 'bytes=9000000-', None]),
    ]:
        server.requests.clear()
        (tmp_path / 'milan_vit_base.pth.uncheckedabcdefgh.part').write_bytes(part)
        ok(download('milan_vit_base', folder=tmp_path))
        assert [r for _, r in server.requests] == requests
        assert (tmp_path / 'milan_vit_base.pth').read_bytes() == server.content
        (tmp_path / 'milan_vit_base.pth').unlink()


def test_drive_sends_a_web_page_or_404(server, monkeypatch, tmp_path):
    server.content = b'<!DOCTYPE html><html><head><title>Quota exceeded</title></head></html>'
    url = models_released.DRIVE.format(id=FILES['milan_vit_base'].drive_id)
    result = download('milan_vit_base', folder=tmp_path)
    drive_error(result, 'web page', url, tmp_path / 'milan_vit_base.pth')
    monkeypatch.setattr(models_released, 'DRIVE', server.url('missing/{id}'))
    drive_error(download('milan_vit_base', folder=tmp_path), '404', 'browser')
    assert files(tmp_path) == []


def test_drive_without_gdown(server, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    one_error_line(download('milan_vit_base', folder=tmp_path), 'pip install gdown', 'http')
    server.content = released('milan_vit_base')
    (tmp_path / 'milan_vit_base.pth').write_bytes(server.content)
    ok(download('milan_vit_base', folder=tmp_path))  # a file saved by a browser is accepted
    assert not server.requests


DECODER_QUERY = 'decoder_blocks.0.attn.q.weight'
WRONG = {
    'MAE': (lambda t: {k: v for k, v in t.items() if k != DECODER_QUERY}, [DECODER_QUERY]),
    'size': (
        lambda t: {**t, 'pos_embed': torch.zeros(1, 50, 768)},
        ['pos_embed', '[1, 50, 768]', '[1, 197, 768]'],
    ),
    'decoder': (
        lambda t: {**t, 'decoder_pred.weight': torch.zeros(512, 500)},
        ['decoder_pred.weight', '[500]', '[512]'],
    ),
    'not a checkpoint': (None, ['cannot be read']),
}


@pytest.mark.parametrize('case', WRONG)
def test_drive_sends_another_file(case, server, tmp_path):
    """The present file is replaced only if the new one is right."""
    change, words = WRONG[case]
    path = tmp_path / 'milan_vit_base.pth'
    tensors = FILES['milan_vit_base'].tensors()
    server.content = checkpoint_bytes(change(tensors)) if change else b'text'
    path.write_bytes(b'older')
    drive_error(download('milan_vit_base', folder=tmp_path), 'milan_vit_base', 'deleted', *words)
    assert files(tmp_path) == ['milan_vit_base.pth'] and path.read_bytes() == b'older'


def test_any_number_of_teacher_features_is_accepted(server, tmp_path):
    (tmp_path / 'milan_vit_base.pth').write_bytes(b'older')
    wider = {'decoder_pred.weight': torch.zeros(768, 512), 'decoder_pred.bias': torch.zeros(768)}
    server.content = checkpoint_bytes({**FILES['milan_vit_base'].tensors(), **wider})
    ok(download('milan_vit_base', folder=tmp_path))
    assert (tmp_path / 'milan_vit_base.pth').read_bytes() == server.content


# ---- CLIP ----


def test_clip_goes_where_it_is_loaded_from(server, monkeypatch, tmp_path):
    server.content = released('clip_vit_b32')
    entry = ('ViT-B-32.pt', hashlib.sha256(server.content).hexdigest(), [])
    monkeypatch.setattr(clip_module, '_URL', server.url('{sha256}/{file}'))
    monkeypatch.setitem(clip_module._MODELS, 'ViT-B/32', entry)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / '.cache' / 'clip' / 'ViT-B-32.pt'
    for _ in range(2):
        assert f'--clip_path {path}\n' in ok(tool('clip_vit_b32'))
    assert path.read_bytes() == server.content and len(server.requests) == 1
    assert clip_module.find('ViT-B/32') == str(path)


def test_wrong_clip_in_the_working_directory(monkeypatch, tiny_clip, tmp_path):
    """It belongs to the user: it is an error, but the file is not deleted."""
    monkeypatch.chdir(tmp_path)
    file = 'clip_vit_base_16.pth.tar'
    for content in (tiny_clip.read_bytes(), b'text'):
        (tmp_path / file).write_bytes(content)
        one_error_line(download('clip_vit_b16', folder=tmp_path), file, 'clip_vit_b16')
        assert files(tmp_path) == [file]


def test_sizes_of_clip():
    """The table has the sizes that clip.load reads from the files, and no name is missing."""
    entries = {file.clip_name: file.tensors() for file in FILES.values() if file.clip_name}
    assert list(entries) == clip.available_models()
    for name, tensors in entries.items():
        with torch.device('meta'):
            assert clip.build_model(tensors).state_dict().keys() == tensors.keys()
        assert tensors['visual.conv1.weight'].shape[-1] == int(re.search('/([0-9]+)', name)[1])


# ---- the command ----


def test_wrong_use(tmp_path):
    one_error_line(download('milan_vit_hug', folder=tmp_path), 'milan_vit_hug', 'milan_vit_base')
    one_error_line(download(folder=tmp_path), 'milan_vit_base')
    (tmp_path / 'file').touch()
    folder = tmp_path / 'file' / 'folder'
    one_error_line(download('milan_vit_base', folder=folder), f'--output_dir {folder}')


def test_list():
    head, *lines = ok(tool('--list')).partition('\n\n')[0].splitlines()
    assert 'parameters' in head and 'source' in head
    rows = {name: rest for name, _, *rest in (re.split('  +', line) for line in lines)}
    assert rows.keys() == FILES.keys()
    drive, openmmlab = 'drive.google.com', 'download.openmmlab.com'
    assert rows['milan_vit_base'] == ['111.8 M', '447 MB', drive, '85.4 fine-tuned (paper)']
    assert rows['milan_vit_large'][2:] == [drive, '-']
    top1 = '85.3 fine-tuned, 78.9 linear (OpenMMLab)'
    assert rows['openmmlab_milan_vit_base'][2:] == [openmmlab, top1]
    assert rows['openmmlab_milan_vit_base_finetuned'][0] == '86.6 M'  # torchvision's ViT-B/16
    assert rows['clip_vit_l14'] == ['427.6 M', '1,710 MB', 'openaipublic.azureedge.net', '-']


def test_all_urls_are_https():
    urls = [models_released.DRIVE, clip_module._URL, *(f.url for f in FILES.values() if f.url)]
    assert len(urls) == 4 and all(url.startswith('https://') for url in urls)


def test_two_downloads_at_once(server, tmp_path):
    """The second one waits for the first and finds the file."""
    server.content, server.delay, paths = released('milan_vit_base'), 0.5, []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch('milan_vit_base', str(tmp_path))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [f'{tmp_path}/milan_vit_base.pth'] * 2
    assert len(server.requests) == 1 and files(tmp_path) == ['milan_vit_base.pth']


@pytest.fixture
def ctrl_c():
    """Handle SIGINT as in a terminal. Processes in the background of a script ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c(server, ctrl_c, tmp_path):
    server.content, server.delay = released('milan_vit_base'), 20

    def press():
        while not server.requests:
            time.sleep(0.01)
        ctrl_c()

    threading.Thread(target=press).start()
    result = download('milan_vit_base', folder=tmp_path)
    assert result.returncode == 130 and 'Traceback' not in result.stderr
    assert 'milan_vit_base.pth' not in files(tmp_path)
    server.delay = 0
    ok(download('milan_vit_base', folder=tmp_path))
    assert files(tmp_path) == ['milan_vit_base.pth']
