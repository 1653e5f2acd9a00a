"""Run metadata for reproducibility: command, versions, commit and machine of every start."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torchvision


def available_cores() -> int:
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count()


def describe_machine() -> dict[str, object]:
    info = Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
    models = [x.partition(': ')[2] for x in info.splitlines() if x.startswith('model name')]
    return {
        'cpu': (models or [platform.processor()])[0],
        'cores': available_cores(),
        'threads': torch.get_num_threads(),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def describe_versions() -> dict[str, str | None]:
    return {
        'python': platform.python_version(),
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'torchvision': torchvision.__version__,
        'timm': timm.__version__,
    }


def describe_commit() -> str | None:
    """Return the commit of this repository, with '-dirty' if files differ. None without git."""
    command = ['git', 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    options = {'cwd': Path(__file__).parent, 'stderr': subprocess.DEVNULL, 'timeout': 20}
    try:
        return subprocess.check_output(command, text=True, **options).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def restart_count() -> int:
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def run_id() -> str:
    """Return an id that survives torchrun's restarts: --rdzv_id, or the launcher's host and PID."""
    given = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return given if given != 'none' else f'{platform.node()} {os.getppid()}'


def describe_start(flags: dict[str, object]) -> dict[str, object]:
    """Return a line of starts.txt: all of the above, and the flags with their resolved values."""
    return {
        'time': datetime.datetime.now().astimezone().isoformat(),
        'run_id': run_id(),
        'restarts': restart_count(),
        'command': shlex.join(sys.argv),
        'commit': describe_commit(),
        'versions': describe_versions(),
        'host': platform.node(),
        'machine': describe_machine(),
        'world_size': flags.get('world_size', 1),
        'args': flags,
    }


def first_start(output_dir: str) -> float:
    """Return when this run first wrote to starts.txt, in seconds since 1970; inf if never."""
    try:
        lines = Path(output_dir, 'starts.txt').read_text('utf-8').splitlines()
        times = [s['time'] for s in map(json.loads, lines) if s['run_id'] == run_id()]
        return datetime.datetime.fromisoformat(times[0]).timestamp()
    except (OSError, ValueError, LookupError, TypeError):
        return float('inf')
