"""Downloads from a real HTTP server on the loopback, one that breaks connections."""

import hashlib
import http.server
import threading

import pytest

import clip.clip as clip_module
from util.download import download

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; ``cuts`` holds how many bytes each of the next connections sends before it breaks."""

    def __init__(self, ranges=True):
        super().__init__(('127.0.0.1', 0), Handler)
        self.ranges, self.cuts, self.requests, self.content = ranges, [], [], CONTENT

    def url(self, path='file.bin'):
        return f'http://127.0.0.1:{self.server_port}/{path}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, start = self.server, 0
        server.requests.append((self.path, self.headers.get('Range')))
        if self.path.startswith('/missing'):
            return self.send_error(404)
        if server.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
        if start >= len(server.content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(server.content)}')
            return self.end_headers()
        self.send_response(206 if server.ranges else 200)
        body = server.content[start:]
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args):
        pass


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
    assert len(server.requests) == 1  # whole and checked: not asked for again


def test_resumes_after_broken_connections(server, tmp_path, capsys):
    path = tmp_path / 'file.bin'
    server.cuts = [1_000_000, 2_000_000]
    download(server.url(), str(path), SHA256, pause=0.01)
    assert path.read_bytes() == CONTENT
    if server.ranges:
        assert [r for _, r in server.requests] == ['bytes=0-', 'bytes=1000000-', 'bytes=3000000-']
    assert 'attempt 3 of 5' in capsys.readouterr().out


def test_a_later_call_goes_on(server, tmp_path):
    path = tmp_path / 'file.bin'
    server.cuts = [3_000_000]
    with pytest.raises(OSError, match='fetch it by other means'):
        download(server.url(), str(path), SHA256, attempts=1)
    assert not path.exists()
    download(server.url(), str(path), SHA256, attempts=1)
    assert path.read_bytes() == CONTENT


def test_a_partial_file_that_is_whole_or_too_long(server, tmp_path):
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


def test_a_damaged_copy_is_replaced(server, tmp_path):
    path = tmp_path / 'file.bin'
    path.write_bytes(b'damaged')
    download(server.url(), str(path), SHA256)
    assert path.read_bytes() == CONTENT


def test_missing_is_final(server, tmp_path):
    with pytest.raises(OSError, match='404'):
        download(server.url('missing'), str(tmp_path / 'file.bin'))
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    with pytest.raises(OSError, match='failed'):
        download('http://127.0.0.1:9/file', str(tmp_path / 'file'), attempts=2, pause=0.01)


def test_clip_by_name(server, tmp_path, monkeypatch, tiny_clip):
    """clip.load('ViT-B/16') from the server into the cache, then from the cache."""
    server.content = tiny_clip.read_bytes()
    monkeypatch.setattr(clip_module, '_URL', server.url('{sha256}/{file}'))
    monkeypatch.setitem(clip_module._MODELS, 'ViT-B/16', ('ViT-B-16.pt', hashlib.sha256(server.content).hexdigest(), []))
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        model, _ = clip_module.load('ViT-B/16', 'cpu')
        assert model.visual.grid_size == 8
    assert (tmp_path / '.cache' / 'clip' / 'ViT-B-16.pt').exists()
    assert len(server.requests) == 1
