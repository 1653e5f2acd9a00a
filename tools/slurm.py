r"""Submit a script to a Slurm cluster, with one process per GPU. Interrupted jobs come back.

    python -m tools.slurm pretrain --nodes 2 --gpus 8 --hours 48 --partition NAME -- \
        --model mae_vit_base_patch16 --batch_size 256 --data_path /dataset/imagenet \
        --output_dir /shared/OUT --log_dir /shared/OUT

The flags below go before the --, the script's own after it. The latter are checked, and
the effective batch size and learning rate printed, before anything is submitted.
--output_dir, the data and this code must be on disks that all nodes see.

A job that Slurm preempts, or that is about to reach its time limit, saves a checkpoint within
the epoch, returns to the queue and resumes. A job that is ended by scancel saves too, but
does not come back; the same command resumes it. See docs/clusters.md.
"""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from main_linprobe import base_rates
from util.cli import Parser, bounded, run
from util.datasets import check_data_flags
from util.errors import as_user_error, refuse
from util.lr_sched import absolute_lr
from util.preemption import EXIT_PREEMPTED
from util.runtime import describe_batch
from util.signals import SIGNALS

# The scripts know this signal. submitit's default, USR2, would end their loader workers.
SIGNAL = 'USR1'


# ---- on the nodes ----


class Task:
    """Run a script in a child process; submitit calls this in each process of a job.

    The exit status is the script's if it fails, and 128 + N after signal N.
    Signals from Slurm are forwarded to the script, which saves a checkpoint
    (util/preemption.py). submitit's handler is only called after the script has ended in
    all processes; that of rank 0 requeues what ``checkpoint`` returns, the same job.
    --resume auto finds the checkpoint.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def checkpoint(self) -> object:
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        if job.num_nodes == 1:
            os.environ['MASTER_ADDR'] = '127.0.0.1'  # some machines cannot resolve their own name
        if job.num_tasks > 1:
            os.environ.setdefault('OMP_NUM_THREADS', '1')  # as torchrun does
        requeue_signal = getattr(signal, f'SIG{submitit.JobEnvironment.USR_SIG}')
        requeue = signal.getsignal(requeue_signal)
        process, received = subprocess.Popen(self.command), []

        def _forward(number, frame):
            received.append(number)
            process.send_signal(number)

        try:
            for number in SIGNALS:
                signal.signal(number, _forward)
            status = process.wait()
        finally:
            process.kill()
        if status and (received or status == EXIT_PREEMPTED):
            if job.global_rank > 0:
                sys.exit(0)  # with another status, srun might kill rank 0 before it requeues
            # SIGTERM comes from a preemption, or from scancel; after scancel, the job no longer
            # counts as running.
            command = ['squeue', '--noheader', '--format=%T', '--jobs', job.job_id]
            state = (
                subprocess.run(command, capture_output=True, text=True).stdout.strip()
                if job.cluster == 'slurm'
                else ''
            )
            if state == 'RUNNING' or (not state and signal.SIGTERM not in received):
                requeue(requeue_signal, None)
        if status:
            sys.exit(status if status > 0 else 128 - status)


# ---- the command ----


def get_args_parser() -> Parser:
    parser = Parser(
        'python -m tools.slurm',
        description=__doc__,
        allow_abbrev=False,
        usage='python -m tools.slurm SCRIPT [flags] -- [flags of SCRIPT]',
    )
    parser.add_argument(
        'script',
        choices=['pretrain', 'finetune', 'linprobe'],
        metavar='SCRIPT',
        help='pretrain, finetune, linprobe',
    )
    parser.add_argument(
        '--nodes', default=1, type=bounded(int, 1), metavar='N', help='number of machines'
    )
    parser.add_argument(
        '--gpus',
        '--ngpus',
        default=8,
        type=bounded(int, 1),
        metavar='N',
        help='GPUs (= processes) per node; only processes with --device cpu after the --',
    )
    parser.add_argument(
        '--hours',
        default=24.0,
        type=bounded(float, 0.1),
        metavar='H',
        help='time limit, after which the job comes back',
    )
    parser.add_argument('--partition', metavar='NAME', help="default: the cluster's")
    parser.add_argument(
        '--cpus', default=10, type=bounded(int, 1), metavar='N', help='cores per process'
    )
    parser.add_argument(
        '--mem_gb',
        type=bounded(float, 0),
        metavar='GB',
        help="memory per node; default: the cluster's",
    )
    parser.add_argument(
        '--sbatch',
        nargs='+',
        default=[],
        metavar='NAME[=VALUE]',
        help='other options of sbatch, such as: account=vision qos=high exclusive',
    )
    parser.add_argument('--job_name', metavar='NAME', help='default: SCRIPT')
    parser.add_argument(
        '--job_dir', metavar='DIR', help='output of all processes; default: OUTPUT_DIR/slurm'
    )
    parser.add_argument(
        '--save_seconds',
        default=300,
        type=bounded(int, 1),
        metavar='N',
        help='seconds before the time limit at which the job is asked to save',
    )
    parser.add_argument(
        '--max_timeouts',
        default=20,
        type=bounded(int, 0),
        metavar='N',
        help='time limits after which the job still comes back; preemptions do not count',
    )
    parser.add_argument(
        '--cluster',
        default='slurm',
        choices=['slurm', 'local'],
        help='local: run on this machine, to try a command',
    )
    parser.add_argument(
        '--dry_run', action='store_true', help='check and print, but do not submit anything'
    )
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line. The words after the first -- become ``flags``."""
    parser, end = get_args_parser(), [*words, '--'].index('--')
    args, unknown = parser.parse_known_args(words[:end], argparse.Namespace(flags=words[end + 1 :]))
    if unknown:
        parser.error(
            f'unrecognized arguments: {" ".join(unknown)}; flags of the script go after --'
        )
    return args


def main(args: argparse.Namespace) -> None:
    # ---- checks
    script = importlib.import_module(f'main_{args.script}')
    flags = script.get_args_parser().parse_args(args.flags)
    script.check(flags)
    check_data_flags(flags.data_path, flags.dataset)
    evaluates = args.script != 'pretrain' and flags.eval
    on_gpu = flags.device is None or flags.device.startswith('cuda')
    refuse(
        (
            args.save_seconds >= 3600 * args.hours,
            f'--save_seconds {args.save_seconds} is not shorter than --hours {args.hours:g}',
        ),
        (
            args.cluster == 'local' and args.nodes > 1,
            f'--nodes {args.nodes}: --cluster local has only one',
        ),
        (
            flags.dist_on_itp or flags.dist_url != 'env://',
            '--dist_on_itp and --dist_url are for other launchers; drop them',
        ),
        (
            not evaluates and not flags.output_dir,
            '--output_dir is empty: a job that comes back resumes from it',
        ),
        (
            not evaluates and flags.resume not in ('', 'auto'),
            f'--resume {flags.resume}: a job resumes from the newest checkpoint in --output_dir; '
            'move the file there',
        ),
    )

    # ---- summary
    print(
        f'{script.__name__}.py on {args.nodes} node(s) with {args.gpus} '
        f'{"GPU" if on_gpu else "process"}(s) each'
    )
    if not evaluates:
        world_size, linprobe = args.nodes * args.gpus, args.script == 'linprobe'
        for blr in base_rates(flags.probe, flags.blr) if linprobe else [flags.blr]:
            lr = absolute_lr(blr, flags.batch_size * flags.accum_iter * world_size)
            describe_batch(
                flags.batch_size,
                flags.accum_iter,
                world_size,
                lr if flags.lr is None else flags.lr,
            )
        if any(Path(flags.output_dir).glob('checkpoint-*.pth')):
            print(f'{flags.output_dir} has checkpoints: the job resumes from the newest one')
    if args.cluster == 'slurm':
        print(
            f'All nodes must see {os.path.abspath(flags.output_dir)}, '
            f'{os.path.dirname(script.__file__)}, and the files that the flags name'
        )
    if args.dry_run:
        return

    # ---- submission
    # read when submitit is imported, also by the processes of the job
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = SIGNAL
    with as_user_error('a package is missing: pip install submitit', ImportError):
        import submitit
    refuse(
        (
            args.cluster == 'slurm' and shutil.which('srun') is None,
            'Slurm is not installed here: log in to a node that submits jobs, or try the '
            'command with --cluster local',
        )
    )
    # a node without working GPUs must fail, not use its CPU
    cuda = flags.device is None and args.cluster == 'slurm'
    command = [
        *(sys.executable, '-u', script.__file__, *args.flags),
        *(() if evaluates else ('--resume', 'auto')),
        *(('--device', 'cuda') if cuda else ()),
    ]
    with (
        as_user_error('the job could not be submitted', OSError, RuntimeError),
        contextlib.redirect_stderr(io.StringIO()),  # submitit prints sbatch's error and raises it
    ):
        executor = submitit.AutoExecutor(
            args.job_dir or os.path.join(flags.output_dir or '.', 'slurm'),
            cluster=args.cluster,
            **{f'{args.cluster}_max_num_timeout': args.max_timeouts},
        )
        executor.update_parameters(
            name=args.job_name or args.script,
            nodes=args.nodes,
            tasks_per_node=args.gpus,
            gpus_per_node=args.gpus if on_gpu else None,
            cpus_per_task=args.cpus,
            mem_gb=args.mem_gb,
            timeout_min=round(60 * args.hours),
            stderr_to_stdout=True,
            slurm_partition=args.partition,
            slurm_additional_parameters={
                'requeue': True,
                'signal': f'{SIGNAL}@{args.save_seconds}',
                **dict(o.split('=', 1) if '=' in o else (o, True) for o in args.sbatch),
            },
        )
        job = executor.submit(Task(command))
    print(f'Job {job.job_id}: its output is in {job.paths.stdout}')
    if args.cluster == 'local':
        job.wait()
        results = [job.task(k).paths.result_pickle for k in range(job.num_tasks)]
        failed = not all(path.exists() for path in results) or job.exception()
        refuse((failed, f'the job did not finish; see {job.paths.stdout}'))


if __name__ == '__main__':
    run(main, parse(sys.argv[1:]))
