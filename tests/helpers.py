"""Helpers shared by the tests: processes, error lines, checkpoints, reference cases, images."""

import argparse
import builtins
import contextlib
import http.server
import importlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from util.cli import run as run_main

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent
SHARED = ROOT.parent / 'shared'  # reference numbers and real images, not part of the repository

TINY_CLIP = dict(
    embed_dim=48,
    image_resolution=64,
    vision_layers=2,
    vision_width=128,
    vision_patch_size=8,
    context_length=16,
    vocab_size=512,
    transformer_width=64,
    transformer_heads=1,
    transformer_layers=1,
)

torch.set_num_threads(1)  # pytest runs as many workers as there are cores


# ---- processes ----


def _environment(env=None):
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})}


def run(*command, cwd=ROOT, env=None, timeout=300):
    """Run a command and return its CompletedProcess, with its output as text.

    Fails the test if the command takes longer than ``timeout`` seconds, after killing it and all
    processes that it started.
    """
    command = [str(c) for c in command]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=_environment(env),
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f'timed out after {timeout} s: {" ".join(command)}\n{out}\n{err}')
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def start(*command, log, env=None):
    """Start a command in its own process group; append its output to the file ``log``."""
    with open(log, 'a') as f:
        return subprocess.Popen(
            [str(c) for c in command],
            cwd=ROOT,
            env=_environment(env),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=f,
            stderr=subprocess.STDOUT,
        )


def wait_for(text, log, process, seconds=200):
    """Wait until ``text`` appears in the file ``log`` of a process that start() returned."""
    begin = time.monotonic()
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - begin < seconds, log.read_text()
        time.sleep(0.05)


def wait(process, log, seconds=200):
    """Wait for a process that start() returned and return its exit status.

    Fails the test after ``seconds``, and kills the process and all that it started.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f'still running after {seconds} s: {log.read_text()}')


def main_module(name):
    """Import a script or tool by name: a package runs its __main__."""
    module = importlib.import_module(name)
    return importlib.import_module(f'{name}.__main__') if hasattr(module, '__path__') else module


def script(name):
    """Return a function that runs the script ``name`` ('main_pretrain', 'tools.knn') with flags.

    It returns a CompletedProcess. With a launcher, an environment or another keyword argument of
    run() it starts real processes. Otherwise it runs the script in this process, which is faster
    because it saves the imports.
    """
    name = name.replace('/', '.')

    def start_script(*flags, launcher=None, **kwargs):
        if launcher or kwargs:
            target = ('-m', name) if '.' in name else (ROOT / f'{name}.py',)
            return run(*(launcher or (sys.executable,)), *target, *flags, **kwargs)
        module = main_module(name)
        out, err, code, builtin_print = io.StringIO(), io.StringIO(), 0, builtins.print
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_main(module.main, module.get_args_parser().parse_args([str(f) for f in flags]))
            except SystemExit as e:
                code = e.code or 0
            finally:
                builtins.print = builtin_print  # the scripts replace it
        return subprocess.CompletedProcess([name, *flags], code, out.getvalue(), err.getvalue())

    return start_script


pretrain, finetune, linprobe = map(script, ('main_pretrain', 'main_finetune', 'main_linprobe'))


def torchrun(processes):
    """Return the start of a command line that runs a script in ``processes`` processes."""
    flags = ('--standalone', f'--nproc_per_node={processes}')
    return (sys.executable, '-m', 'torch.distributed.run', *flags)


def launch(processes, *flags):
    """Like torchrun() with the older launcher, which passes --local-rank without --use_env."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    flags = (f'--master_port={port}', f'--nproc_per_node={processes}', *flags)
    return (sys.executable, '-m', 'torch.distributed.launch', *flags)


# ---- results ----


def ok(result):
    """Assert that a run succeeded and return its stdout."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def one_error_line(result, *words):
    """Assert that a run failed with exactly one error line that contains all ``words``; return it.

    Its exit status is 1 or 2, there is no traceback, and stderr holds one line that starts with
    'error: ' and nothing else except the note that the CPU is used, notes on skipped steps and
    files, and the report of a launcher of several processes.
    """
    assert result.returncode in (1, 2), (result.returncode, result.stdout, result.stderr)
    launched = any('torch.distributed' in str(c) for c in result.args)
    err = result.stderr.split('torch/distributed')[0] if launched else result.stderr
    assert 'Traceback' not in result.stdout + err, result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    if launched:  # ranks may notice that another one has failed
        errors = [line for line in errors if 'another process' not in line]
    assert len(errors) == 1, result.stderr
    if not launched:
        lines = [line for line in err.splitlines() if line.strip() and line not in errors]
        assert all(map(NOTES.match, lines)), result.stderr
    for word in words:
        assert str(word) in errors[0], (word, errors[0])
    return errors[0]


# Lines on stderr that are allowed next to the error: notes on single steps, images and files, and
# progress bars.
NOTES = re.compile(
    r'No CUDA GPU|Skipped|Cannot read|Not saved|Connection lost|'
    r'.*(it/s|B/s|s/it|\?)\]|.*\d+%\|'
)


def log_records(folder, name='log.txt'):
    """Return the records of a file with one JSON dict per line: log.txt has one per epoch."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def checkpoint(path):
    """Load a checkpoint with PyTorch alone, without the checks and conversions of the code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True)


def same(a, b):
    """Return whether two nested structures are equal bit for bit, including the order of keys."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights_equal(a, b):
    """Return whether two checkpoints hold the same weights and optimizer state, bit for bit."""
    a, b = checkpoint(a), checkpoint(b)
    assert a['model'] and a['optimizer']['state'], 'nothing to compare'
    return same(a['model'], b['model']) and same(a['optimizer']['state'], b['optimizer']['state'])


# ---- files ----


def golden(name):
    """Return a reference case as a dict, with its JSON entries decoded; skip if it is not here."""
    for folder in (TESTS / 'golden', SHARED / 'golden'):
        if (folder / f'{name}.npz').exists():
            with np.load(folder / f'{name}.npz') as f:
                return {k: json.loads(str(v)) if v.dtype.kind == 'U' else v for k, v in f.items()}
    pytest.skip(f'reference case {name} is too large for the repository and ../shared is not here')


def draw_photo(path, seed, size):
    """Draw an image with some content, instead of a photograph. ``seed``: an int or a tuple."""
    rng = np.random.default_rng(zlib.crc32(repr(seed).encode()))
    image = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    image = image.resize(size, Image.BICUBIC)
    box = [size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2]
    ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.integers(0, 255, 3).tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def openai_state_dict(model):
    """Return the weights of a CLIP in the mix of float16 and float32 of OpenAI's files.

    The three sizes that these files carry are included.
    """
    half = 'conv1.weight in_proj_weight in_proj_bias out_proj.weight out_proj.bias c_fc.weight'
    half += ' c_fc.bias c_proj.weight c_proj.bias text_projection visual.proj'
    half = tuple(half.split())
    state_dict = {k: v.half() if k.endswith(half) else v for k, v in model.state_dict().items()}
    return {
        **state_dict,
        'input_resolution': torch.tensor(model.visual.input_resolution),
        'context_length': torch.tensor(model.context_length),
        'vocab_size': torch.tensor(model.vocab_size),
    }


class _Holder(torch.nn.Module):
    """A tree of modules without code that holds tensors under dotted names."""

    def forward(self, x: torch.Tensor):
        return x


def save_archive(model, path):
    """Save a CLIP in the format of OpenAI's files: a TorchScript archive of float16 weights."""
    root = _Holder()
    for name, tensor in openai_state_dict(model).items():
        if not tensor.is_floating_point():
            root.register_buffer(name, tensor)
            continue
        module, (*path_to_leaf, leaf) = root, name.split('.')
        for part in path_to_leaf:
            if part not in module._modules:
                module.add_module(part, _Holder())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.script(root).save(str(path))


# ---- a file server ----

CONTENT = bytes(range(256)) * 20_000  # 5 MB


class Handler(http.server.BaseHTTPRequestHandler):
    """Send a server's ``content``, as a whole or from an offset, or fail as the path says."""

    def do_GET(self):
        server, start = self.server, 0
        server.requests.append((self.path, self.headers.get('Range')))
        if self.path.startswith('/missing'):
            return self.send_error(404)
        if self.path.startswith('/elsewhere'):
            self.send_response(302)
            self.send_header('Location', server.location)
            return self.end_headers()
        if self.path.startswith('/endless'):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(100_000))
        if server.ranges and self.headers.get('Range'):
            start = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
        if start >= len(server.content):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(server.content)}')
            return self.end_headers()
        self.send_response(206 if server.ranges else 200)
        body = server.content[start:]
        self.send_header('Content-Length', server.length or str(len(body)))
        if server.part:
            self.send_header('Content-Range', server.part)
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """An HTTP server on the loopback interface that sends ``content`` and can break connections.

    cuts: the number of bytes that each of the next connections sends before it breaks.
    requests: (path, Range header) of every request so far.
    """

    def __init__(self, ranges=True):
        super().__init__(('127.0.0.1', 0), Handler)
        self.ranges, self.cuts, self.requests, self.content = ranges, [], [], CONTENT
        self.location = self.length = self.part = ''

    def url(self, path='file.bin'):
        return f'http://127.0.0.1:{self.server_port}/{path}'
