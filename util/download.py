"""One file over HTTPS: with progress, resumed after a broken connection, checked, and in place only when whole."""

import hashlib
import http.client
import ipaddress
import os
import time
import urllib.error
import urllib.parse
import urllib.request

from filelock import FileLock
from tqdm import tqdm

CHUNK = 1 << 20


class Refused(OSError):
    """What is no better on the next attempt."""


def download(url, path, sha256=None, attempts=5, pause=2.0, timeout=30.0, limit=1 << 34):
    """``path``, after fetching ``url`` there unless it is already there and whole.

    The bytes go to ``path`` + '.part', which the next attempt continues, in this call or a later one. Processes that ask for the
    same file at once wait for the first of them. Where the file is there and whole, nothing is written: its folder may be
    read-only.

    Args:
        url: https, also of what it redirects to; http is taken from this machine alone.
        sha256: hex digest, or its first digits, to check, on a file that is already there too; None: not checked.
        attempts: connections to try; pause: seconds between them; timeout: seconds without a byte until one is given up.
        limit: bytes beyond which it cannot be the right file.

    Raises:
        OSError: not fetched after all attempts, too large, or the checksum is wrong (the wrong bytes are deleted).
    """
    if _whole(path, sha256):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with FileLock(path + '.lock'):
        if _whole(path, sha256):
            return path
        if os.path.isfile(path):
            print(f'{path} has a wrong SHA-256 and is downloaded again')
        part = path + '.part'
        for attempt in range(1, attempts + 1):
            try:
                _fetch(url, part, timeout, limit)
                break
            except (OSError, http.client.HTTPException) as e:
                permanent = isinstance(e, Refused) or isinstance(e, urllib.error.HTTPError) and 300 <= e.code < 500
                if permanent or attempt == attempts:
                    raise OSError(f'download of {url} failed: {e}; fetch it by other means and put it at {path}') from e
                print(f'Connection lost ({e}); attempt {attempt + 1} of {attempts} goes on from there')
                time.sleep(pause)
        if sha256 is not None and not _digest(part).startswith(sha256):
            os.remove(part)
            raise OSError(f'what {url} gave has a wrong SHA-256 and was deleted; expected {sha256}')
        os.replace(part, path)
    return path


def _whole(path, sha256):
    return os.path.isfile(path) and (sha256 is None or _digest(path).startswith(sha256))


def _check_url(url):
    """Refused unless nobody on the way can change what ``url`` gives."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != 'https' and not (parts.scheme == 'http' and _is_this_machine(parts.hostname)):
        raise Refused(f'{url[:200]} is not https')


def _is_this_machine(host):
    try:
        return host == 'localhost' or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        _check_url(url)
        return super().redirect_request(request, response, code, message, headers, url)


def _fetch(url, part, timeout, limit):
    """Bring ``part`` to the full length; ConnectionError if the connection ends early."""
    _check_url(url)
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-', 'User-Agent': 'milan'})
    try:
        response = urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: nothing is left to send, or what we have is longer than the file
            raise
        if have != _length_in(e.headers):
            os.remove(part)
            raise ConnectionError('the partial file did not fit and was deleted') from None
        return
    with response:
        resumed = response.status == 206
        start = response.headers.get('Content-Range', f'bytes {have}-').partition('-')[0]
        if resumed and start != f'bytes {have}':
            os.remove(part)
            raise ConnectionError('another part came than was asked for; the partial file was deleted')
        have = have if resumed else 0
        length = response.headers.get('Content-Length', '')
        total = have + int(length) if length.isdigit() else None
        bar = tqdm(total=total, initial=have, unit='B', unit_scale=True, desc=os.path.basename(part).removesuffix('.part'))
        with bar, open(part, 'ab' if resumed else 'wb') as f:
            while (total or have) <= limit and (chunk := response.read(CHUNK)):
                f.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    if (total or have) > limit:
        os.remove(part)
        raise Refused(f'it is larger than {limit:,} bytes, and so another file')
    if total is not None and have < total:
        raise ConnectionError(f'{have} of {total} bytes received')


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
