"""Downloads from a real local HTTP server that breaks connections."""

import hashlib
import os
import tempfile
import threading

import pytest

import clip.clip as clip_module
from tests.helpers import CONTENT, Server
from util.download import download

SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=[True, False], ids=['with ranges', 'without ranges'])
def server(request):
    with Server(ranges=request.param) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download(server, tmp_path):
    path = tmp_path / 'folder' / 'file.bin'
    assert download(server.url(), str(path), SHA256) == str(path)
    assert path.read_bytes() == CONTENT
    assert not path.with_suffix('.bin.part').exists()
    download(server.url(), str(path), SHA256)
    assert len(server.requests) == 1  # the complete file is not requested again


def test_resumes_after_broken_connections(server, tmp_path, capsys):
    path = tmp_path / 'file.bin'
    server.cuts = [1_000_000, 2_000_000]
    download(server.url(), str(path), SHA256, pause=0.01)
    assert path.read_bytes() == CONTENT
    if server.ranges:
        assert [r for _, r in server.requests] == ['bytes=0-', 'bytes=1000000-', 'bytes=3000000-']
    assert 'attempt 3 of 5' in capsys.readouterr().out


def test_later_call_resumes(server, tmp_path):
    path = tmp_path / 'file.bin'
    server.cuts = [3_000_000]
    with pytest.raises(OSError, match='file.bin'):
        download(server.url(), str(path), SHA256, attempts=1)
    assert not path.exists()
    download(server.url(), str(path), SHA256, attempts=1)
    assert path.read_bytes() == CONTENT


def test_partial_file_that_is_complete_or_too_long(server, tmp_path):
    for extra in (b'', b'xx'):
        path = tmp_path / f'file{len(extra)}.bin'
        (tmp_path / f'{path.name}.part').write_bytes(CONTENT + extra)
        download(server.url(), str(path), SHA256, pause=0.01)
        assert path.read_bytes() == CONTENT


def test_wrong_checksum(server, tmp_path):
    path = tmp_path / 'file.bin'
    with pytest.raises(OSError, match='wrong SHA-256'):
        download(server.url(), str(path), '0' * 64)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith('.lock')] == []


def test_damaged_file_is_replaced(server, tmp_path):
    path = tmp_path / 'file.bin'
    path.write_bytes(b'damaged')
    download(server.url(), str(path), SHA256)
    assert path.read_bytes() == CONTENT


def test_missing_file_is_not_tried_again(server, tmp_path):
    with pytest.raises(OSError, match='404'):
        download(server.url('missing'), str(tmp_path / 'file.bin'))
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    with pytest.raises(OSError, match='failed'):
        download('http://127.0.0.1:9/file', str(tmp_path / 'file'), attempts=2, pause=0.01)


UNENCRYPTED = [
    'http://192.0.2.1/x',
    'http://localhost.example/x',
    'http://127.0.0.1@192.0.2.1/x',
    'ftp://127.0.0.1/x',
    'file:///etc/hostname',
    'data:,x',
]


@pytest.mark.parametrize('url', [*UNENCRYPTED, 'http:///x', '/etc/hostname', ''])
def test_unencrypted_urls_are_refused(url, tmp_path):
    with pytest.raises(OSError, match='not https|unknown url type|no host'):
        download(url, str(tmp_path / 'file'), attempts=1)


@pytest.mark.parametrize('url', UNENCRYPTED)
def test_redirects_to_unencrypted_urls_are_refused(url, server, tmp_path):
    server.location = url
    with pytest.raises(OSError, match='is not https|is not allowed'):
        download(server.url('elsewhere'), str(tmp_path / 'file'))
    assert len(server.requests) == 1 and not (tmp_path / 'file').exists()


def test_redirect(server, tmp_path):
    server.location = server.url('file.bin')
    download(server.url('elsewhere'), str(tmp_path / 'file'), SHA256)
    assert (tmp_path / 'file').read_bytes() == CONTENT


def test_file_larger_than_the_limit(server, tmp_path):
    """Detected by the announced length, or else when that much has arrived."""
    for name in ('file.bin', 'endless'):
        with pytest.raises(OSError, match='larger than 2,000,000 bytes'):
            download(server.url(name), str(tmp_path / name), limit=2_000_000)
        assert [p.name for p in tmp_path.iterdir() if not p.name.endswith('.lock')] == []
    assert len(server.requests) == 2
    download(server.url(), str(tmp_path / 'file.bin'), SHA256, limit=len(CONTENT))


@pytest.mark.parametrize('length', ['-5', 'many', '5, 5'])
def test_invalid_content_length(length, server, tmp_path):
    server.length = length
    download(server.url(), str(tmp_path / 'file.bin'), SHA256)
    assert (tmp_path / 'file.bin').read_bytes() == CONTENT


def test_server_sends_another_range(tmp_path):
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        (tmp_path / 'file.bin.part').write_bytes(CONTENT[:1000])
        server.part = f'bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}'
        download(server.url(), str(tmp_path / 'file.bin'), SHA256, pause=0.01)
        assert (tmp_path / 'file.bin').read_bytes() == CONTENT
        assert [r for _, r in server.requests] == ['bytes=1000-', 'bytes=0-']
        server.shutdown()


@pytest.mark.skipif(not hasattr(os, 'seteuid'), reason='no users here')
def test_complete_file_in_a_read_only_folder(server):
    """Runs as another user than root, whom permissions do not stop."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'file.bin')
        download(server.url(), path, SHA256)
        os.remove(f'{path}.lock')
        os.chmod(folder, 0o555)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            assert download(server.url(), path, SHA256) == path
            with pytest.raises(PermissionError):
                download(server.url(), f'{path}.other', SHA256)
        finally:
            os.seteuid(me)
            os.chmod(folder, 0o755)
    assert len(server.requests) == 1


def test_clip_by_name(server, tmp_path, monkeypatch, tiny_clip):
    """clip.load('ViT-B/16') downloads into the cache, then reads the cache."""
    server.content = tiny_clip.read_bytes()
    monkeypatch.setattr(clip_module, '_URL', server.url('{sha256}/{file}'))
    monkeypatch.setitem(
        clip_module._MODELS,
        'ViT-B/16',
        ('ViT-B-16.pt', hashlib.sha256(server.content).hexdigest(), []),
    )
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        model, _ = clip_module.load('ViT-B/16', 'cpu')
        assert model.visual.grid_size == 8
    assert (tmp_path / '.cache' / 'clip' / 'ViT-B-16.pt').exists()
    assert len(server.requests) == 1
