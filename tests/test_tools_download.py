"""tools/download.py against a real HTTP server on the loopback, which breaks connections, and the real gdown."""

import hashlib
import io
import os
import re
import signal
import sys
import threading
import time
from functools import partial

import pytest
import torch
from conftest import run as run_process
from test_download import Handler, Server

import clip
import clip.clip as clip_module
from tools import download as tool
from util.formats import to_openmmlab
from util.misc import run


class RangeHandler(Handler):
    """Says, as Google Drive does and gdown wants to know, which part of the file it sends; slowly where the test wants time."""

    def end_headers(self):
        length = len(self.server.content)
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        if 0 < start < length:
            self.send_header('Content-Range', f'bytes {start}-{length - 1}/{length}')
        super().end_headers()
        time.sleep(self.server.delay)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Server() as server:
        server.RequestHandlerClass, server.delay = RangeHandler, 0
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        monkeypatch.setattr(tool, 'DRIVE', server.url('drive/{id}'))
        monkeypatch.setattr(tool, 'download', partial(tool.download, pause=0.01))
        yield server
        server.shutdown()


def contents(tensors, **more):
    """A checkpoint file's bytes, small whatever the shapes: every tensor is one number, repeated."""
    file = io.BytesIO()
    torch.save({**more, 'state_dict': {name: torch.zeros(()).expand(value.shape) for name, value in tensors.items()}}, file)
    return file.getvalue()


def released(name, **more):
    """What the file called ``name`` holds, as far as names and shapes go, and 4 MB beside that."""
    tensors = tool.FILES[name]['tensors']()
    if name.startswith('openmmlab'):
        tensors = to_openmmlab(tensors)
    return contents(tensors, optimizer=torch.rand(1_000_000), **more)


def serve_openmmlab(server, monkeypatch, name, content):
    """Make ``content`` what FILES[name]'s URL gives; the path it gets. The file's name tells its checksum, as theirs do."""
    server.content = content
    file = f'milan-{hashlib.sha256(content).hexdigest()[:8]}.pth'
    monkeypatch.setitem(tool.FILES[name], 'url', server.url(file))
    return file


def download(*names, output_dir):
    run(tool.main, tool.get_args_parser().parse_args([*names, '--output_dir', str(output_dir)]))


def fails(*names, output_dir, capsys):
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as e:
        download(*names, output_dir=output_dir)
    assert e.value.code == 1
    line, = re.findall('^error: .*$', capsys.readouterr().err, flags=re.MULTILINE)
    return line


def files(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock'))


# ---- OpenMMLab: a checksum in the name ----

@pytest.mark.parametrize('name', ['openmmlab_milan_vit_base', 'openmmlab_milan_vit_base_finetuned'])
def test_a_url(name, server, monkeypatch, tmp_path, capsys):
    file = serve_openmmlab(server, monkeypatch, name, released(name, meta={'epoch': 100}))
    server.cuts = [1_000_000]
    download(name, name, output_dir=tmp_path / 'new')
    out = capsys.readouterr().out
    assert 'attempt 2 of 5 goes on from there' in out
    assert re.findall('^.* is there and right.*$', out, flags=re.MULTILINE) == [
        f'{name} is there and right: --finetune {tmp_path}/new/{file}']  # the name was given twice
    assert (tmp_path / 'new' / file).read_bytes() == server.content
    assert [r for _, r in server.requests] == ['bytes=0-', 'bytes=1000000-']
    download(name, output_dir=tmp_path / 'new')
    assert len(server.requests) == 2 and files(tmp_path / 'new') == [file]


def test_wrong_checksum(server, monkeypatch, tmp_path, capsys):
    name = 'openmmlab_milan_vit_base'
    file = serve_openmmlab(server, monkeypatch, name, released(name))
    server.content = server.content[:-1] + b'x'
    assert f'{name}: what {server.url(file)} gave has a wrong SHA-256' in fails(name, output_dir=tmp_path, capsys=capsys)
    assert files(tmp_path) == []


def test_another_model_under_the_right_checksum(server, monkeypatch, tmp_path, capsys):
    name = 'openmmlab_milan_vit_base_finetuned'
    serve_openmmlab(server, monkeypatch, name, released('openmmlab_milan_vit_base'))
    error = fails(name, output_dir=tmp_path, capsys=capsys)
    assert f'what came for {name} is something else, and was deleted: ' in error and 'it has no fc_norm.weight' in error
    assert files(tmp_path) == []


def test_no_such_file_and_no_server(server, monkeypatch, tmp_path, capsys):
    name = 'openmmlab_milan_vit_base'
    monkeypatch.setitem(tool.FILES[name], 'url', server.url('missing/milan-00000000.pth'))
    assert '404' in fails(name, output_dir=tmp_path, capsys=capsys)
    monkeypatch.setitem(tool.FILES[name], 'url', 'http://127.0.0.1:9/milan-00000000.pth')
    error = fails(name, output_dir=tmp_path, capsys=capsys)
    assert error.startswith(f'error: {name}: download of ') and f'put it at {tmp_path}/milan-00000000.pth' in error


# ---- Google Drive ----

@pytest.mark.parametrize('name', ['milan_vit_base', 'milan_vit_large'])
def test_drive(name, server, tmp_path, capsys):
    server.content = released(name, epoch=399)
    server.cuts = [2**20]  # gdown keeps whole chunks, of 2**19 bytes
    download(name, output_dir=tmp_path)
    assert (tmp_path / f'{name}.pth').read_bytes() == server.content
    assert server.requests == [(f'/drive/{tool.FILES[name]["drive"]}', r) for r in (None, f'bytes={2**20}-')]
    download(name, output_dir=tmp_path)
    assert len(server.requests) == 2 and files(tmp_path) == [f'{name}.pth']


def test_drive_goes_on_where_an_earlier_call_was_ended(server, tmp_path, capsys):
    """A part that the server cannot go on from, because the file is no longer than it, is not stumbled over for ever."""
    server.content = released('milan_vit_base')
    for part, requests in [(server.content[:2_000_000], [None, 'bytes=2000000-']),
                           (b'x' * 9_000_000, [None, 'bytes=9000000-', None])]:
        server.requests.clear()
        (tmp_path / 'milan_vit_base.pth.uncheckedabcdefgh.part').write_bytes(part)
        download('milan_vit_base', output_dir=tmp_path)
        assert [r for _, r in server.requests] == requests
        assert (tmp_path / 'milan_vit_base.pth').read_bytes() == server.content
        (tmp_path / 'milan_vit_base.pth').unlink()


def test_drive_sends_a_page_or_nothing(server, tmp_path, capsys):
    server.content = b'<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>'
    error = fails('milan_vit_base', output_dir=tmp_path, capsys=capsys)
    by_hand = f'open {tool.DRIVE.format(id=tool.FILES["milan_vit_base"]["drive"])} in a browser and save the file as {tmp_path}/'
    assert 'Google Drive sent a web page in its place' in error and by_hand in error
    tool.DRIVE = server.url('missing/{id}')
    error = fails('milan_vit_base', output_dir=tmp_path, capsys=capsys)
    assert '404' in error and 'in a browser and save the file as' in error
    assert files(tmp_path) == []


def test_drive_without_gdown(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    error = fails('milan_vit_base', output_dir=tmp_path, capsys=capsys)
    assert 'for which gdown is needed: pip install gdown; or open http' in error
    server.content = released('milan_vit_base')
    (tmp_path / 'milan_vit_base.pth').write_bytes(server.content)
    download('milan_vit_base', output_dir=tmp_path)  # what a browser has saved there is fine
    assert not server.requests


@pytest.mark.parametrize('change, message', [
    (lambda t: t, 'decoder_blocks.0.attn.q.weight'),
    (lambda t: {**t, 'pos_embed': torch.zeros(1, 50, 768)}, 'pos_embed is [1, 50, 768] in it and should be [1, 197, 768]'),
    (lambda t: {**t, 'decoder_pred.weight': torch.zeros(512, 500)}, 'decoder_pred.weight is [500] in it and should be [512]'),
    (lambda t: None, 'cannot be read')], ids=['MAE', 'another size', 'another decoder', 'no checkpoint'])
def test_another_file_in_drives_place(change, message, server, tmp_path, capsys):
    """The file at hand is replaced only when the new one is right."""
    name = 'milan_vit_base'
    tensors = tool.FILES[name]['tensors']()
    if message.startswith('decoder_blocks'):
        tensors.pop(f'{message}')
    changed = change(tensors)
    server.content = contents(changed) if changed else b'text'
    (tmp_path / f'{name}.pth').write_bytes(b'older')
    error = fails(name, output_dir=tmp_path, capsys=capsys)
    assert f'what came for {name} is something else, and was deleted: ' in error and message in error
    assert files(tmp_path) == [f'{name}.pth'] and (tmp_path / f'{name}.pth').read_bytes() == b'older'
    server.content = contents({**tensors, **tool.FILES[name]['tensors'](), 'decoder_pred.weight': torch.zeros(768, 512),
                               'decoder_pred.bias': torch.zeros(768)})  # with a wider teacher it is as good
    download(name, output_dir=tmp_path)
    assert (tmp_path / f'{name}.pth').read_bytes() == server.content


# ---- CLIP ----

def test_clip_goes_where_it_is_loaded_from(server, monkeypatch, tmp_path, capsys):
    name = 'clip_vit_b32'
    server.content = released(name)
    monkeypatch.setattr(clip_module, '_URL', server.url('{sha256}/{file}'))
    monkeypatch.setitem(clip_module._MODELS, 'ViT-B/32', ('ViT-B-32.pt', hashlib.sha256(server.content).hexdigest(), []))
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(tool.main, tool.get_args_parser().parse_args([name]))
    path = tmp_path / '.cache' / 'clip' / 'ViT-B-32.pt'
    assert path.read_bytes() == server.content and len(server.requests) == 1
    assert clip_module.find('ViT-B/32') == str(path)
    assert f'{name} is there and right: --clip_path {path}' in capsys.readouterr().out


def test_another_clip_in_the_working_directory(monkeypatch, tiny_clip, tmp_path, capsys):
    """It is the user's: it is complained about and left alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'clip_vit_base_16.pth.tar').write_bytes(tiny_clip.read_bytes())
    error = fails('clip_vit_b16', output_dir=tmp_path, capsys=capsys)
    assert 'clip_vit_base_16.pth.tar is not clip_vit_b16: ' in error and files(tmp_path) == ['clip_vit_base_16.pth.tar']
    (tmp_path / 'clip_vit_base_16.pth.tar').write_bytes(b'text')
    assert 'clip_vit_base_16.pth.tar is not clip_vit_b16: ' in fails('clip_vit_b16', output_dir=tmp_path, capsys=capsys)


def test_the_whole_of_clip_is_known():
    """The sizes in the table build what clip.load would build from the file, and no name is missing."""
    entries = {file['clip']: file['tensors']() for file in tool.FILES.values() if 'clip' in file}
    assert list(entries) == clip.available_models()
    for name, tensors in entries.items():
        assert clip.build_model(tensors).state_dict().keys() == tensors.keys()
        assert tensors['visual.conv1.weight'].shape[-1] == int(re.search('/([0-9]+)', name)[1])


# ---- the command ----

def test_wrong_use(tmp_path, capsys):
    assert 'there is no milan_vit_hug to download: choose from milan_vit_base, ' in fails(
        'milan_vit_base', 'milan_vit_hug', output_dir=tmp_path, capsys=capsys)
    assert 'give a name: choose from milan_vit_base, ' in fails(output_dir=tmp_path, capsys=capsys)
    (tmp_path / 'file').touch()
    error = fails('milan_vit_base', output_dir=tmp_path / 'file' / 'folder', capsys=capsys)
    assert error == f'error: --output_dir {tmp_path}/file/folder cannot be written to: [Errno 20] Not a directory: ' \
                    f"'{tmp_path}/file/folder'"


def test_the_list():
    result = run_process(sys.executable, 'tools/download.py', '--list')
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.partition('\n\n')[0].splitlines()
    assert re.split('  +', head) == ['name', 'what it is', 'parameters', 'as float32', 'source', 'published top-1, %']
    rows = {row[0]: row[2:] for row in (re.split('  +', row) for row in rows)}
    assert rows.keys() == tool.FILES.keys()
    assert rows['milan_vit_base'] == ['111.8 M', '447 MB', 'drive.google.com', '85.4 fine-tuned (paper)']
    assert rows['openmmlab_milan_vit_base'][2:] == ['download.openmmlab.com', '85.3 fine-tuned, 78.9 linear (OpenMMLab)']
    assert rows['openmmlab_milan_vit_base_finetuned'][0] == '86.6 M'  # what torchvision and timm say of ViT-B/16
    assert rows['clip_vit_l14'] == ['427.6 M', '1,710 MB', 'openaipublic.azureedge.net', '-']
    assert rows['milan_vit_large'][-1] == '-'


def test_nothing_comes_unencrypted():
    urls = [tool.DRIVE, clip_module._URL, *(file['url'] for file in tool.FILES.values() if 'url' in file)]
    assert len(urls) == 4 and all(url.startswith('https://') for url in urls)


def test_two_at_once(server, tmp_path, capsys):
    """The second waits for the first and finds the file."""
    server.content, server.delay = released('milan_vit_base'), 1
    both = [threading.Thread(target=download, args=['milan_vit_base'], kwargs=dict(output_dir=tmp_path)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert capsys.readouterr().out.count('milan_vit_base is there and right') == 2
    assert len(server.requests) == 1 and files(tmp_path) == ['milan_vit_base.pth']


def test_ctrl_c(server, tmp_path, capsys):
    server.content, server.delay = released('milan_vit_base'), 20

    def press():
        while not server.requests:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(SystemExit) as e:
        download('milan_vit_base', output_dir=tmp_path)
    assert e.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == 'interrupted'
    assert 'milan_vit_base.pth' not in files(tmp_path)
    server.delay = 0
    download('milan_vit_base', output_dir=tmp_path)
    assert files(tmp_path) == ['milan_vit_base.pth']
