"""Where a result comes from: command, versions, commit and machine of every start of a run."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]


def available_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def describe_machine():
    info = Path('/proc/cpuinfo')
    model = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    return {'cpu': model[1] if model else platform.processor(), 'cores': available_cores(),
            'threads': torch.get_num_threads(), 'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def describe_versions():
    return {'python': platform.python_version(), 'torch': torch.__version__, 'cuda': torch.version.cuda,
            'torchvision': torchvision.__version__, 'timm': timm.__version__}


def describe_commit():
    """The commit of this repository, with '-dirty' where files differ from it; None outside of git."""
    command = ['git', 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def restarts():
    """How often torchrun has restarted this process."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def run_id():
    """What the processes of a run keep when torchrun restarts them: its --rdzv_id, or else the launcher's own process."""
    given = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return given if given != 'none' else f'{platform.node()} {os.getppid()}'


def describe_start(args):
    """All of that in a dict for JSON: a line of starts.txt."""
    return {
        'time': datetime.datetime.now().astimezone().isoformat(), 'run_id': run_id(), 'restarts': restarts(),
        'command': shlex.join(sys.argv), 'commit': describe_commit(), 'versions': describe_versions(), 'host': platform.node(),
        'machine': describe_machine(), 'world_size': args.world_size, 'args': vars(args)}


def first_start(output_dir):
    """When this run_id first wrote to output_dir/starts.txt, in seconds since 1970; None: it did not come so far."""
    try:
        with open(os.path.join(output_dir, 'starts.txt'), encoding='utf-8') as f:
            times = [start['time'] for start in map(json.loads, f) if start['run_id'] == run_id()]
        return datetime.datetime.fromisoformat(times[0]).timestamp() if times else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
