"""tools/slurm.py: what it refuses and submits, and real jobs of submitit's local executor that are interrupted."""

import contextlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
from conftest import ROOT, run
from test_pretrain import weights_equal

from tools import slurm
from util import misc

cloudpickle.register_pickle_by_value(slurm)  # as of a script that is run: the processes of a job need not find it


def submit(*words):
    """The command in this process; a CompletedProcess."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            misc.run(slurm.main, slurm.parse([str(word) for word in words]))
        except SystemExit as e:
            code = e.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


WRONG = {
    'flag of the script before the --': (['pretrain', '--batch_size', 8], [], '--batch_size 8; flags of the script stand'),
    'no such script': (['pretraining'], [], "'pretraining'"),
    'no such flag behind it': (['pretrain'], ['--batchsize', 8], 'unrecognized arguments: --batchsize'),
    'value out of range': (['pretrain'], ['--mask_ratio', 1], '1 is outside [0, 1)'),
    'nothing visible': (['pretrain'], ['--mask_ratio', 0.999], 'leaves 0 of 196 patches visible'),
    'size does not fit': (['pretrain'], ['--input_size', 225], '--input_size 225 is not a multiple of the patch size 16'),
    'size of a classifier': (['finetune'], ['--input_size', 225], '--input_size 225 is not a multiple of the patch size 16'),
    'mask without teacher': (['pretrain'], ['--attn_mask'], '--attn_mask needs the teacher'),
    'teacher absent': (['pretrain'], ['--use_clip', '--clip_path', 'nowhere.pt'], '--clip_path nowhere.pt is neither a file'),
    'checkpoint absent': (['finetune'], ['--finetune', 'nowhere.pth'], '--finetune: checkpoint nowhere.pth does not exist'),
    'batch of one': (['linprobe'], ['--batch_size', 1], '--batch_size 1: the batch norm'),
    'no data': (['pretrain'], ['--data_path', ''], '--data_path is missing'),
    'no such data set': (['pretrain'], ['--dataset', 'cifar'], '--dataset cifar: take'),
    'no output': (['pretrain'], ['--output_dir', ''], '--output_dir is empty'),
    'another checkpoint': (['pretrain'], ['--resume', __file__], 'a job goes on from the newest checkpoint in --output_dir'),
    'another launcher': (['pretrain'], ['--dist_on_itp'], 'leave them out'),
    'two machines here': (['pretrain', '--cluster', 'local', '--nodes', 2], [], '--nodes 2: --cluster local has one'),
    'no time to train': (['pretrain', '--hours', 0.5, '--save_seconds', 1800], [], '--save_seconds 1800 is as long as'),
    'no slurm': (['pretrain'], [], 'there is no Slurm here'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use_is_one_line_and_nothing_is_submitted(case, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    words, flags, message = WRONG[case]
    model = 'mae_vit_base_patch16' if words[0].startswith('pretrain') else 'vit_base_patch16'
    result = submit(*words, '--', '--model', model, '--data_path', '/on/the/nodes', '--output_dir', tmp_path / 'out', *flags)
    line, = result.stderr.splitlines()
    assert result.returncode in (1, 2) and line.startswith('error: ') and message in line
    assert not list(tmp_path.iterdir())


def test_batch_and_learning_rate_are_those_of_all_processes(tmp_path):
    flags = ['--data_path', '/on/the/nodes', '--output_dir', tmp_path, '--batch_size', 128]
    result = submit('pretrain', '--nodes', 2, '--gpus', 8, '--dry_run', '--', *flags, '--accum_iter', 2, '--blr', 1.5e-4)
    assert 'main_pretrain.py on 2 node(s) with 8 GPU(s) each' in result.stdout
    assert 'effective batch 4096 = 128 x accum_iter 2 x 16, lr 0.0024 (blr 0.00015)' in result.stdout
    assert f'All nodes have to see {tmp_path}, {ROOT}' in result.stdout and 'has checkpoints' not in result.stdout
    (tmp_path / 'checkpoint-last.pth').touch()
    result = submit('linprobe', '--gpus', 2, '--dry_run', '--', *flags, '--blr', 0.1, 0.05)
    assert 'lr 0.05 (blr 0.05)' in result.stdout and 'lr 0.1 (blr 0.1)' in result.stdout and 'has checkpoints' in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint-last.pth']


def test_what_would_be_submitted(tmp_path, monkeypatch):
    """There is no sbatch here: what submitit wrote for it stays in the folder. It looks for srun too, but does not run it."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'srun').touch(0o755)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    flags = ['--data_path', '/on/the/nodes', '--output_dir', tmp_path / 'out', '--batch_size', 128]
    result = submit('pretrain', '--nodes', 2, '--gpus', 4, '--hours', 36, '--partition', 'vision', '--mem_gb', 400,
                    '--sbatch', 'account=milan', 'exclusive', '--', *flags)
    line, = result.stderr.splitlines()
    assert line.startswith('error: the job could not be submitted') and 'sbatch' in line
    script, = (tmp_path / 'out' / 'slurm').glob('.submission_file_*.sh')
    lines = script.read_text().splitlines()
    for option in ('nodes=2', 'ntasks-per-node=4', 'gpus-per-node=4', 'cpus-per-task=10', 'mem=400GB', 'time=2160', 'exclusive',
                   'partition=vision', 'account=milan', 'job-name=pretrain', 'signal=USR1@300', 'requeue', 'open-mode=append'):
        assert f'#SBATCH --{option}' in lines
    assert any(line.startswith('srun ') and 'submitit.core._submit' in line for line in lines)
    pickled, = (tmp_path / 'out' / 'slurm').glob('*.pkl')
    submission = pickle.loads(pickled.read_bytes())
    expected = [sys.executable, '-u', str(ROOT / 'main_pretrain.py'), *map(str, flags), '--resume', 'auto', '--device', 'cuda']
    assert submission.function.command == expected and submission._timeout_countdown == 20
    assert submission._checkpoint_function().function.command == expected


@pytest.fixture
def flags(small_images):
    """3 epochs of 6 steps with two processes, a line after every step."""
    return ['--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--amp', 'fp32', '--batch_size', 2, '--data_path', small_images,
            '--num_workers', 0, '--blr', 0.05, '--epochs', 3, '--warmup_epochs', 1, '--print_freq', 1, '--log_dir', '',
            '--device', 'cpu', '--dist_timeout', 3]


def told(out, text, tell, number):
    """A started thread: once the first process of the job in ``out`` has said ``text``, the signal goes to tell(its number)."""
    def wait():
        for _ in range(2000):
            for log in (out / 'slurm').glob('*_0_log.out'):
                if text in log.read_text():
                    for pid in tell(int(log.name.split('_')[0])):
                        os.kill(pid, number)
                    return
            time.sleep(0.05)
    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def processes(job):
    return map(int, Path(f'/proc/{job}/task/{job}/children').read_text().split())


def logs(out):
    return [log.read_text() for log in sorted((out / 'slurm').glob('*_log.out'))]


def test_an_interrupted_job_saves_and_comes_back_once(flags, tmp_path):
    """The signal to both processes, as Slurm sends it: all save at one step, one requeue, and the same weights in the end."""
    words, out, whole = ['pretrain', '--cluster', 'local', '--gpus', 2, '--', *flags], tmp_path / 'out', tmp_path / 'whole'
    result = submit(*words, '--output_dir', whole)
    assert result.returncode == 0, result.stderr
    thread = told(out, 'Epoch [1] [2/6]', processes, signal.SIGUSR1)
    result = submit(*words, '--output_dir', out)
    thread.join()
    first, second = logs(out)
    assert result.returncode == 0, result.stderr + first
    said = ['Stopped by SIGUSR1 after epoch 1, step', 'Calling checkpoint method', 'Requeued job', 'Resumed from']
    assert [first.count(text) for text in said] == [1, 1, 1, 1] and 'Requeued' not in second, first + second
    assert [first.index(text) for text in said] == sorted(first.index(text) for text in said)
    assert 'Traceback' not in first + second
    assert weights_equal(whole / 'checkpoint-2.pth', out / 'checkpoint-2.pth')
    assert (whole / 'log.txt').read_text() == (out / 'log.txt').read_text()


def test_a_job_that_is_ended_saves_and_stays_away(flags, tmp_path):
    out = tmp_path / 'out'
    thread = told(out, 'Epoch [1] [ 2/12]', lambda job: [job], signal.SIGTERM)
    result = run(sys.executable, ROOT / 'tools' / 'slurm.py', 'pretrain', '--cluster', 'local', '--gpus', 1, '--', *flags,
                 '--epochs', 100, '--output_dir', out, cwd=tmp_path)
    thread.join()
    line, = result.stderr.splitlines()
    assert result.returncode == 1 and 'the job has not come to its end' in line
    log, = logs(out)
    assert log.count('Stopped by SIGTERM') == 1 and 'Requeued' not in log and 'Traceback' not in log, log
    assert (out / 'checkpoint-last.pth').exists()


def test_the_page_has_every_flag():
    page = (ROOT / 'docs' / 'clusters.md').read_text()
    for action in slurm.get_args_parser()._actions:
        assert all(f'`{option}`' in page for option in action.option_strings if option not in ('-h', '--help')), action.dest
    command, = re.findall(r'python tools/slurm\.py (.*\\\n.*)', page)
    assert slurm.parse(command.replace('\\\n', '').split()).hours == 48
