"""One file over HTTP: with progress, resumed after a broken connection, checked, and in place only when whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request

from filelock import FileLock
from tqdm import tqdm

CHUNK = 1 << 20


def download(url, path, sha256=None, attempts=5, pause=2.0, timeout=30.0):
    """``path``, after fetching ``url`` there unless it is already there and whole.

    The bytes go to ``path`` + '.part', which the next attempt continues, in this call or a later one. Processes that ask for the
    same file at once wait for the first of them.

    Args:
        sha256: hex digest, or its first digits, to check, on a file that is already there too; None: not checked.
        attempts: connections to try; pause: seconds between them; timeout: seconds without a byte until one is given up.

    Raises:
        OSError: not fetched after all attempts, or the checksum is wrong (the wrong bytes are deleted).
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with FileLock(path + '.lock'):
        if os.path.isfile(path):
            if sha256 is None or _digest(path).startswith(sha256):
                return path
            print(f'{path} has a wrong SHA-256 and is downloaded again')
        part = path + '.part'
        for attempt in range(1, attempts + 1):
            try:
                _fetch(url, part, timeout)
                break
            except (OSError, http.client.HTTPException) as e:
                permanent = isinstance(e, urllib.error.HTTPError) and 400 <= e.code < 500
                if permanent or attempt == attempts:
                    raise OSError(f'download of {url} failed: {e}; fetch it by other means and put it at {path}') from e
                print(f'Connection lost ({e}); attempt {attempt + 1} of {attempts} goes on from there')
                time.sleep(pause)
        if sha256 is not None and not _digest(part).startswith(sha256):
            os.remove(part)
            raise OSError(f'what {url} gave has a wrong SHA-256 and was deleted; expected {sha256}')
        os.replace(part, path)
    return path


def _fetch(url, part, timeout):
    """Bring ``part`` to the full length; ConnectionError if the connection ends early."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-', 'User-Agent': 'milan'})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: nothing is left to send, or what we have is longer than the file
            raise
        if have != _length_in(e.headers):
            os.remove(part)
            raise ConnectionError('the partial file did not fit and was deleted') from None
        return
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get('Content-Length')
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=os.path.basename(part).removesuffix('.part'))
        with bar, open(part, 'ab' if resumed else 'wb') as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    if total is not None and os.path.getsize(part) < total:
        raise ConnectionError(f'{os.path.getsize(part)} of {total} bytes received')


def _length_in(headers):
    """The full length that a 416 answer tells ('Content-Range: bytes */LENGTH'), or None."""
    length = headers.get('Content-Range', '').rpartition('/')[2]
    return int(length) if length.isdigit() else None


def _digest(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
