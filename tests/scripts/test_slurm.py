"""tools/slurm.py: checks, the submitted job, and interrupted jobs of submitit's local executor."""

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import pytest
import submitit

import main_pretrain
from tests.helpers import ROOT, log_records, ok, one_error_line, run
from tools import slurm
from util.cli import run as run_main

# as if it were run as a script: the processes of a job need not find the module
cloudpickle.register_pickle_by_value(slurm)


def submit(*words):
    """Run the command in this process and return its CompletedProcess."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(slurm.main, slurm.parse([str(word) for word in words]))
        except SystemExit as e:
            code = e.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


# flags before the --, flags after it, words of the error line
WRONG = {
    'flag of the script before the --': (['pretrain', '--batch_size', 8], [], ['--batch_size 8']),
    'script': (['pretraining'], [], ["'pretraining'"]),
    'flag': (['pretrain'], ['--batchsize', 8], ['--batchsize']),
    'range': (['pretrain'], ['--mask_ratio', 1], ['--mask_ratio', '1']),
    'no visible patch': (['pretrain'], ['--mask_ratio', 0.999], ['--mask_ratio 0.999']),
    'size': (['pretrain'], ['--input_size', 225], ['--input_size 225', '16']),
    'size of a classifier': (['finetune'], ['--input_size', 225], ['--input_size 225', '16']),
    'no teacher': (['pretrain'], ['--attn_mask'], ['--attn_mask']),
    'missing teacher': (['pretrain'], ['--use_clip', '--clip_path', 'nowhere.pt'], ['nowhere.pt']),
    'missing checkpoint': (['finetune'], ['--finetune', 'nowhere.pth'], ['nowhere.pth']),
    'batch of one': (['linprobe'], ['--batch_size', 1], ['--batch_size 1']),
    'no data': (['pretrain'], ['--data_path', ''], ['--data_path']),
    'data set': (['pretrain'], ['--dataset', 'cifar'], ['--dataset cifar']),
    'no output': (['pretrain'], ['--output_dir', ''], ['--output_dir']),
    'checkpoint elsewhere': (['pretrain'], ['--resume', __file__], ['--resume', '--output_dir']),
    'another launcher': (['pretrain'], ['--dist_on_itp'], ['--dist_on_itp']),
    'local nodes': (['pretrain', '--cluster', 'local', '--nodes', 2], [], ['--nodes 2']),
    'time': (['pretrain', '--hours', 0.5, '--save_seconds', 1800], [], ['--save_seconds 1800']),
    'no Slurm': (['pretrain'], [], ['Slurm', '--cluster local']),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, tmp_path, monkeypatch):
    """Nothing is submitted."""
    monkeypatch.setenv('PATH', str(tmp_path))
    words, flags, expected = WRONG[case]
    model = 'mae_vit_base_patch16' if words[0].startswith('pretrain') else 'vit_base_patch16'
    common = ['--model', model, '--data_path', '/data', '--output_dir', tmp_path / 'out']
    one_error_line(submit(*words, '--', *common, *flags), *expected)
    assert not list(tmp_path.iterdir())


def test_batch_and_learning_rate_are_those_of_all_processes(tmp_path):
    common = ['--data_path', '/data', '--output_dir', tmp_path, '--batch_size', 128]
    flags = ['--accum_iter', 2, '--blr', 1.5e-4]
    job = ['--nodes', 2, '--gpus', 8, '--dry_run']
    out = ok(submit('pretrain', *job, '--', *common, *flags))
    assert 'main_pretrain.py on 2 node(s) with 8 GPU(s) each' in out
    assert 'effective batch 4096 = 128 x accum_iter 2 x 16, lr 0.0024 (blr 0.00015)' in out
    assert str(tmp_path) in out and str(ROOT) in out and 'checkpoints' not in out
    (tmp_path / 'checkpoint-last.pth').touch()
    job = ['--gpus', 2, '--dry_run']
    out = ok(submit('linprobe', *job, '--', *common, '--blr', 0.1, 0.05))
    for text in ('lr 0.05 (blr 0.05)', 'lr 0.1 (blr 0.1)', f'{tmp_path} has checkpoints'):
        assert text in out
    out = ok(submit('linprobe', *job, '--', *common, '--probe', 'attentive'))
    assert 'lr 0.0005 (blr 0.0005)' in out
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoint-last.pth']


OPTIONS = """nodes=2 ntasks-per-node=4 gpus-per-node=4 cpus-per-task=10 mem=400GB time=2160
exclusive partition=vision account=milan job-name=pretrain signal=USR1@300 requeue
open-mode=append"""


def test_plan_of_a_job(tmp_path):
    """Translate the parameters into options of sbatch by submitit, without Slurm."""
    job = '--nodes 2 --gpus 4 --hours 36 --partition vision --mem_gb 400 --sbatch account=milan'
    words = ['--data_path', '/data', '--output_dir', str(tmp_path), '--batch_size', '128']
    args = slurm.parse(['pretrain', *job.split(), 'exclusive', '--', *words])
    flags = main_pretrain.get_args_parser().parse_args(args.flags)
    command, parameters = slurm._plan(args, flags, 'main_pretrain.py', True, False)
    more = ['--resume', 'auto', '--device', 'cuda']
    assert command == [sys.executable, '-u', 'main_pretrain.py', *words, *more]

    names = submitit.SlurmExecutor._equivalence_dict()
    sbatch = {names.get(k, k.removeprefix('slurm_')): v for k, v in parameters.items()}
    sbatch['mem'] = submitit.slurm.slurm._convert_mem(sbatch['mem'])
    script = submitit.slurm.slurm._make_sbatch_string('COMMAND', tmp_path, **sbatch)
    lines = script.splitlines()
    for option in OPTIONS.split():
        assert f'#SBATCH --{option}' in lines
    assert any(line.startswith('srun ') and line.endswith(' COMMAND') for line in lines)
    executor = submitit.AutoExecutor(tmp_path, cluster='local')
    with pytest.raises(ValueError, match='only one node'):  # it accepts all other parameters
        executor.update_parameters(**parameters)


@pytest.fixture
def flags(small_images):
    """3 epochs of 6 steps with two processes. A line is printed after every step."""
    words = '--model mae_vit_tiny_patch8 --input_size 32 --amp fp32 --batch_size 2 --num_workers 0'
    words += ' --blr 0.05 --epochs 3 --warmup_epochs 1 --print_freq 1 --device cpu --dist_timeout 3'
    return [*words.split(), '--log_dir', '', '--data_path', small_images]


def send(number, text, out, receivers):
    """Start a thread that sends a signal once rank 0 of the job in ``out`` has printed ``text``.

    receivers: maps the number of the job, a process ID, to the IDs of the processes to signal.
    """

    def wait():
        for _ in range(4000):
            for log in (out / 'slurm').glob('*_0_log.out'):
                if text in log.read_text():
                    for pid in receivers(int(log.name.split('_')[0])):
                        os.kill(pid, number)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def children(process):
    return map(int, Path(f'/proc/{process}/task/{process}/children').read_text().split())


def logs(out):
    return [log.read_text() for log in sorted((out / 'slurm').glob('*_log.out'))]


@pytest.mark.slow
def test_interrupted_job_saves_and_comes_back_once(flags, tmp_path):
    """Both processes are signaled, as Slurm does. test_preemption.py compares the weights."""
    out = tmp_path / 'out'
    thread = send(signal.SIGUSR1, 'Epoch [1] [2/6]', out, children)
    words = ['pretrain', '--cluster', 'local', '--gpus', 2, '--', *flags]
    result = submit(*words, '--output_dir', out)
    thread.join()
    ok(result)
    first, second = logs(out)
    events = ['Stopped by SIGUSR1', 'Calling checkpoint method', 'Requeued job', 'Resumed from']
    assert [first.count(text) for text in events] == [1, 1, 1, 1], first
    assert [first.index(text) for text in events] == sorted(first.index(text) for text in events)
    assert 'Requeued' not in second and 'Traceback' not in first + second, first + second
    assert [record['epoch'] for record in log_records(out)] == [0, 1, 2]
    assert (out / 'checkpoint-2.pth').exists()

    (pickled,) = (out / 'slurm').glob('*_submitted.pkl')
    submission = pickle.loads(pickled.read_bytes())
    command = [sys.executable, '-u', f'{ROOT}/main_pretrain.py', *map(str, flags)]
    command += ['--output_dir', str(out), '--resume', 'auto']
    assert submission.function.command == command and submission._timeout_countdown == 20
    assert submission._checkpoint_function().function.command == command


@pytest.mark.slow
def test_terminated_job_saves_and_does_not_come_back(flags, tmp_path):
    out = tmp_path / 'out'
    thread = send(signal.SIGTERM, 'Epoch [1] [ 2/12]', out, lambda job: [job])
    command = [sys.executable, '-m', 'tools.slurm', 'pretrain', '--cluster', 'local', '--gpus', 1]
    result = run(*command, '--', *flags, '--epochs', 100, '--output_dir', out)
    thread.join()
    (log,) = logs(out)
    one_error_line(result, out / 'slurm')
    assert log.count('Stopped by SIGTERM') == 1, log
    assert 'Requeued' not in log and 'Traceback' not in log, log
    assert (out / 'checkpoint-last.pth').exists()
