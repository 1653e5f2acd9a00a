"""Submits one of the three scripts to a Slurm cluster, one process a GPU; when it is interrupted, it comes back.

    python tools/slurm.py pretrain --nodes 2 --gpus 8 --hours 48 --partition NAME -- --model mae_vit_base_patch16 \\
        --batch_size 256 --data_path /dataset/imagenet --output_dir /shared/OUT --log_dir /shared/OUT

Before the -- stand the flags below, behind it the script's own. These are checked, and the effective batch and the learning
rate printed, before anything is submitted. --output_dir, the data and this code have to be on disks that all nodes see.

A job that Slurm preempts, or whose time is nearly over, saves inside the epoch, goes back into the queue and continues from
there. One that scancel ends saves too, and stays away; the same command goes on with it. See docs/clusters.md.
"""

import argparse
import contextlib
import glob
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # of a script, Python adds only its own folder

from util.arguments import Parser, bounded, set_learning_rate  # noqa: E402
from util.datasets import check_data_flags  # noqa: E402
from util.errors import UserError, as_user_error  # noqa: E402
from util.interruption import SIGNALS, STATUS  # noqa: E402
from util.misc import run  # noqa: E402

SIGNAL = 'USR1'  # which the scripts know; submitit's own, USR2, would end their loader workers

SCRIPTS = {'pretrain': 'main_pretrain', 'finetune': 'main_finetune', 'linprobe': 'main_linprobe'}


# ---- on the nodes ----

class Task:
    """What submitit calls in each process of a job: the script with its flags, as a process of its own.

    Slurm's signals go on to the script, which knows what to save (util/interruption.py). Only when it has ended, and so have
    all its processes, submitit's handler is called: that of the first process puts the job back into the queue.
    """

    def __init__(self, command):
        self.command = command

    def checkpoint(self):
        """For submitit's handler: what a job is when it comes back. The same; --resume auto finds what was saved."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self):
        import submitit
        job = submitit.JobEnvironment()
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if job.num_nodes == 1:
            os.environ['MASTER_ADDR'] = '127.0.0.1'  # not every machine can look up its own name
        if job.num_tasks > 1:
            os.environ.setdefault('OMP_NUM_THREADS', '1')  # as torchrun does

        asked = getattr(signal, f'SIG{submitit.JobEnvironment.USR_SIG}')
        requeue = signal.getsignal(asked)
        process, received = None, []

        def pass_on(number, frame):
            received.append(number)
            if process is not None:
                process.send_signal(number)

        for number in SIGNALS:
            signal.signal(number, pass_on)
        process = subprocess.Popen(self.command)
        try:
            for number in received:  # those that came too early
                process.send_signal(number)
            status = process.wait()
        finally:
            process.kill()
        if status and (received or status == STATUS):
            if job.global_rank > 0:
                sys.exit(0)  # with another status, srun might end the first process before it has done what follows
            if comes_back(job, received):
                signal.signal(asked, requeue)
                signal.raise_signal(asked)
        if status:
            sys.exit(status if status > 0 else 128 - status)


def comes_back(job, received):
    """Whether an interrupted job is to be started again.

    SIGTERM is sent to a job that is preempted, and to one that scancel ends: only the first still counts as running.
    """
    state = ''
    if job.cluster == 'slurm':
        command = ['squeue', '--noheader', '--format=%T', '--jobs', job.job_id]
        state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return state == 'RUNNING' or (not state and signal.SIGTERM not in received)


# ---- the command ----

def get_args_parser():
    parser = Parser('tools/slurm.py', description=__doc__, allow_abbrev=False,
                    usage='python tools/slurm.py SCRIPT [flags] -- [flags of SCRIPT]',
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', choices=SCRIPTS, metavar='SCRIPT', help=', '.join(SCRIPTS))
    parser.add_argument('--nodes', default=1, type=bounded(int, 1), metavar='N', help='machines (default: 1)')
    parser.add_argument('--gpus', '--ngpus', default=8, type=bounded(int, 1), metavar='N',
                        help='GPUs and processes a node; processes alone with --device cpu behind the -- (default: 8)')
    parser.add_argument('--hours', default=24.0, type=bounded(float, 0.1), metavar='H',
                        help='time limit, after which the job comes back (default: 24)')
    parser.add_argument('--partition', metavar='NAME', help="default: the cluster's")
    parser.add_argument('--cpus', default=10, type=bounded(int, 1), metavar='N', help='cores a process (default: 10)')
    parser.add_argument('--mem_gb', type=bounded(float, 0), metavar='GB', help="memory a node; default: the cluster's")
    parser.add_argument('--sbatch', nargs='+', default=[], metavar='NAME[=VALUE]',
                        help="any other of sbatch's options: --sbatch account=vision qos=high exclusive")
    parser.add_argument('--job_name', metavar='NAME', help='default: the script')
    parser.add_argument('--job_dir', metavar='DIR', help='the output of every process; default: OUTPUT_DIR/slurm')
    parser.add_argument('--save_seconds', default=300, type=bounded(int, 1), metavar='N',
                        help='how long before its time limit a job is told to save (default: 300)')
    parser.add_argument('--max_timeouts', default=20, type=bounded(int, 0), metavar='N',
                        help='time limits after which a job still comes back; preemptions do not count (default: 20)')
    parser.add_argument('--cluster', default='slurm', choices=['slurm', 'local'],
                        help='local: here and now, to try a command out (default: slurm)')
    parser.add_argument('--dry_run', action='store_true', help='check and print, and submit nothing')
    return parser


def parse(words):
    """The options of a command line; in .flags what stands behind the first --."""
    parser, at = get_args_parser(), [*words, '--'].index('--')
    options, unknown = parser.parse_known_args(words[:at])
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}; flags of the script stand behind --')
    options.flags = words[at + 1:]
    return options


def check(args, options):
    """What cannot work on a cluster, beyond what the script itself would refuse."""
    if options.save_seconds >= 3600 * options.hours:
        raise UserError(f'--save_seconds {options.save_seconds} is as long as --hours {options.hours:g}')
    if options.cluster == 'local' and options.nodes > 1:
        raise UserError(f'--nodes {options.nodes}: --cluster local has one')
    if args.dist_on_itp or args.dist_url != 'env://':
        raise UserError('--dist_on_itp and --dist_url are for other launchers; leave them out')
    if getattr(args, 'eval', False):
        return
    if not args.output_dir:
        raise UserError('--output_dir is empty: a job that comes back looks there for its checkpoint')
    if args.resume not in ('', 'auto'):
        raise UserError(f'--resume {args.resume}: a job goes on from the newest checkpoint in --output_dir; put it there')


def parameters(options, on_gpu):
    """The job's, as submitit.AutoExecutor.update_parameters takes them."""
    extra = dict(option.split('=', 1) if '=' in option else (option, True) for option in options.sbatch)
    return {'name': options.job_name or options.script, 'nodes': options.nodes, 'tasks_per_node': options.gpus,
            'gpus_per_node': options.gpus if on_gpu else None, 'cpus_per_task': options.cpus, 'mem_gb': options.mem_gb,
            'timeout_min': round(60 * options.hours), 'stderr_to_stdout': True, 'slurm_partition': options.partition,
            'slurm_additional_parameters': {'requeue': True, 'signal': f'{SIGNAL}@{options.save_seconds}', **extra}}


def submit(options, command, on_gpu, folder):
    """The submitit.Job of ``command``, a list of words."""
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = SIGNAL  # read where submitit is imported, by the processes of the job too
    with as_user_error('this needs a package that is not here: pip install submitit', ImportError):
        import submitit
    if options.cluster == 'slurm' and shutil.which('srun') is None:
        raise UserError('there is no Slurm here: log in where jobs are submitted, or try the command out with --cluster local')
    words = io.StringIO()  # sbatch's own, which submitit prints and then raises
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster,
                                         **{f'{options.cluster}_max_num_timeout': options.max_timeouts})
        executor.update_parameters(**parameters(options, on_gpu))
        with contextlib.redirect_stderr(words):
            return executor.submit(Task(command))
    except (OSError, RuntimeError) as e:
        raise UserError(f'the job could not be submitted: {"; ".join(str(e).splitlines())}') from e


def wait(job):
    """Until a local job has ended; UserError unless all its processes have come to their end."""
    job.wait()
    tasks = [job.task(k) for k in range(job.num_tasks)]
    if not all(task.paths.result_pickle.exists() for task in tasks) or job.exception() is not None:
        raise UserError(f'the job has not come to its end; {job.paths.stdout} says why')


def main(options):
    script = importlib.import_module(SCRIPTS[options.script])
    args = script.get_args_parser().parse_args(options.flags)
    given, on_gpu, evaluates = hasattr(args, 'device_given'), args.device.startswith('cuda'), getattr(args, 'eval', False)
    script.check(args)
    check_data_flags(args)
    check(args, options)

    args.world_size = options.nodes * options.gpus
    name, kind = SCRIPTS[options.script], 'GPU' if on_gpu else 'process'
    print(f'{name}.py on {options.nodes} node(s) with {options.gpus} {kind}(s) each')
    for rate in args.blr if isinstance(args.blr, list) else [args.blr]:  # main_linprobe.py takes several
        set_learning_rate(argparse.Namespace(**{**vars(args), 'blr': rate}))
    if options.cluster == 'slurm':
        print(f'All nodes have to see {os.path.abspath(args.output_dir)}, {ROOT}, and the files that the flags name')
    if not evaluates and glob.glob(os.path.join(glob.escape(args.output_dir), 'checkpoint-*.pth')):
        print(f'{args.output_dir} has checkpoints: the job goes on from the newest of them')
    if options.dry_run:
        return

    command = [sys.executable, '-u', os.path.join(ROOT, f'{name}.py'), *options.flags]
    if not evaluates:
        command += ['--resume', 'auto']
    if on_gpu and not given and options.cluster == 'slurm':
        command += ['--device', 'cuda']  # a node that does not find its GPUs is to say so, and not to train on its cores
    job = submit(options, command, on_gpu, options.job_dir or os.path.join(args.output_dir or '.', 'slurm'))
    print(f'Job {job.job_id}: its output is in {job.paths.stdout}')
    if options.cluster == 'local':
        wait(job)


if __name__ == '__main__':
    run(main, parse(sys.argv[1:]))
