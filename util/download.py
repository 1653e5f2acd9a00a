"""Download a file over HTTPS: with progress, resumed after broken connections, and verified."""

import hashlib
import http.client
import os
import time
import urllib.request

from filelock import FileLock
from tqdm import tqdm

CHUNK = 1 << 20


def download(
    url: str,
    path: str,
    sha256: str | None = None,
    attempts: int = 5,
    pause: float = 2.0,
    limit: int = 1 << 34,
) -> str:
    """Download ``url`` to ``path`` unless the complete file is already there.

    The content goes to ``path`` + '.part', which later attempts and calls continue. Processes
    that need the same file wait for the first of them. Nothing is written if the file is
    complete: its folder may be read-only.

    Args:
        url: https, also after redirects; http only from this machine.
        sha256: expected SHA-256 in hex, or its first digits; None: not checked. A file that is
            already there is checked as well.
        attempts: number of connections to try.
        pause: seconds between attempts.
        limit: maximum size in bytes; a larger file cannot be the right one.

    Returns:
        ``path``.

    Raises:
        OSError: if all attempts failed, or the file is too large or has another SHA-256. The
            wrong content is deleted.
    """
    if _is_complete(path, sha256):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    part = f'{path}.part'
    with FileLock(f'{path}.lock'):
        if _is_complete(path, sha256):
            return path
        if os.path.isfile(path):
            print(f'{path} has a wrong SHA-256 and is downloaded again')
        for attempt in range(1, attempts + 1):
            try:
                _fetch(url, part, limit)
                break
            except (OSError, http.client.HTTPException, ValueError) as e:
                if (
                    isinstance(e, PermissionError | ValueError)
                    or attempt == attempts
                    or 300 <= getattr(e, 'code', 0) < 500
                ):
                    raise OSError(
                        f'download of {url} failed: {e}; save the file as {path} by other means'
                    ) from e
                print(f'Connection lost ({e}); resuming, attempt {attempt + 1} of {attempts}')
                time.sleep(pause)
        if not _is_complete(part, sha256):
            os.remove(part)
            raise OSError(f'{url} has a wrong SHA-256 and was deleted; expected {sha256}')
        os.replace(part, path)
    return path


def _is_complete(path, sha256):
    if not os.path.isfile(path):
        return False
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while sha256 and (chunk := f.read(CHUNK)):
            digest.update(chunk)
    return not sha256 or digest.hexdigest().startswith(sha256)


# Only https is accepted, and http from this machine. Called for every request and redirect.
class _Secure(urllib.request.BaseHandler):
    def default_open(self, request: urllib.request.Request) -> None:
        parts = urllib.parse.urlsplit(request.full_url)
        local = parts.hostname in ('localhost', '127.0.0.1', '::1')
        if parts.scheme != 'https' and not (parts.scheme == 'http' and local):
            raise PermissionError(f'{request.full_url[:200]} is not https')

    # Status 416: nothing is left to send, or our part is longer than the file. _fetch decides.
    def http_error_416(
        self, request: urllib.request.Request, response: http.client.HTTPResponse, *details: object
    ) -> http.client.HTTPResponse:
        return response


# Complete the file ``part``. PermissionError: a failure that is permanent; ConnectionError: the
# connection ended early.
def _fetch(url, part, limit):
    size = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(
        url, headers={'Range': f'bytes={size}-', 'User-Agent': 'milan'}
    )
    # the timeout is for a connection that sends nothing
    with urllib.request.build_opener(_Secure).open(request, timeout=30) as response:
        sent = response.headers.get('Content-Range', f'bytes {size}-')
        if response.status == 416 and sent == f'bytes */{size}':
            return
        if (
            response.status == 416
            or response.status == 206
            and not sent.startswith(f'bytes {size}-')
        ):
            os.remove(part)
            raise ConnectionError('the partial file is not part of this file and was deleted')
        size = size if response.status == 206 else 0  # else the server sends the whole file
        total = None if response.length is None else size + response.length
        with (
            open(part, 'ab' if size else 'wb') as f,
            tqdm(
                total=total,
                initial=size,
                unit='B',
                unit_scale=True,
                desc=os.path.basename(part).removesuffix('.part'),
            ) as bar,
        ):
            while (total or f.tell()) <= limit and (chunk := response.read(CHUNK)):
                bar.update(f.write(chunk))
            size = f.tell()
    if (total or size) > limit:
        os.remove(part)
        raise PermissionError(f'it is larger than {limit:,} bytes, so it is not the expected file')
    if size < (total or 0):
        raise ConnectionError(f'{size} of {total} bytes received')
