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
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from util.cli import Parser, add_flags, bounded, run
from util.datasets import check_data_flags
from util.errors import UserError, as_user_error, refuse
from util.lr_sched import absolute_lr
from util.preemption import EXIT_PREEMPTED
from util.runtime import describe_batch
from util.signals import SIGNALS

FLAGS = {
    'script': dict(
        choices=['pretrain', 'finetune', 'linprobe'],
        metavar='SCRIPT',
        help='pretrain, finetune, linprobe',
    ),
    '--nodes': dict(default=1, type=bounded(int, 1), metavar='N', help='number of machines'),
    '--gpus --ngpus': dict(
        default=8,
        type=bounded(int, 1),
        metavar='N',
        help='GPUs (= processes) per node; only processes with --device cpu after the --',
    ),
    '--hours': dict(
        default=24.0,
        type=bounded(float, 0.1),
        metavar='H',
        help='time limit, after which the job comes back',
    ),
    '--partition': dict(metavar='NAME', help="default: the cluster's"),
    '--cpus': dict(default=10, type=bounded(int, 1), metavar='N', help='cores per process'),
    '--mem_gb': dict(
        type=bounded(float, 0), metavar='GB', help="memory per node; default: the cluster's"
    ),
    '--sbatch': dict(
        nargs='+',
        default=[],
        metavar='NAME[=VALUE]',
        help='other options of sbatch, such as: account=vision qos=high exclusive',
    ),
    '--job_name': dict(metavar='NAME', help='default: SCRIPT'),
    '--job_dir': dict(metavar='DIR', help='output of all processes; default: OUTPUT_DIR/slurm'),
    '--save_seconds': dict(
        default=300,
        type=bounded(int, 1),
        metavar='N',
        help='seconds before the time limit at which the job is asked to save',
    ),
    '--max_timeouts': dict(
        default=20,
        type=bounded(int, 0),
        metavar='N',
        help='time limits after which the job still comes back; preemptions do not count',
    ),
    '--cluster': dict(
        default='slurm',
        choices=['slurm', 'local'],
        help='local: run on this machine, to try a command',
    ),
    '--dry_run': dict(action='store_true', help='check and print, but do not submit anything'),
}


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
        # the signal that the job was submitted with
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
            state = ''
            if job.cluster == 'slurm':
                state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
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
    add_flags(parser, FLAGS)
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """Parse a command line. The words after the first -- become ``flags``."""
    end = [*words, '--'].index('--')
    parser, flags = get_args_parser(), argparse.Namespace(flags=words[end + 1 :])
    args, unknown = parser.parse_known_args(words[:end], flags)
    if unknown:
        parser.error(
            f'unrecognized arguments: {" ".join(unknown)}; flags of the script go after --'
        )
    return args


# The command of each process of the job, and the parameters of submitit's executors.
def _plan(args, flags, path, on_gpu, evaluates):
    command = [
        *(sys.executable, '-u', path, *args.flags),
        *(() if evaluates else ('--resume', 'auto')),
        # a node without working GPUs must fail, not use its CPU
        *(('--device', 'cuda') if flags.device is None and args.cluster == 'slurm' else ()),
    ]
    parameters = {
        'name': args.job_name or args.script,
        'nodes': args.nodes,
        'tasks_per_node': args.gpus,
        'gpus_per_node': args.gpus if on_gpu else None,
        'cpus_per_task': args.cpus,
        'mem_gb': args.mem_gb,
        'timeout_min': round(60 * args.hours),
        'stderr_to_stdout': True,
        'slurm_partition': args.partition,
        'slurm_additional_parameters': {
            'requeue': True,
            'signal': f'USR1@{args.save_seconds}',
            **dict(o.split('=', 1) if '=' in o else (o, True) for o in args.sbatch),
        },
    }
    return command, parameters


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
        f'{script.__file__} on {args.nodes} node(s) with {args.gpus} '
        f'{"GPU" if on_gpu else "process"}(s) each, output in {os.path.abspath(flags.output_dir)}'
    )
    if not evaluates:
        world_size = args.nodes * args.gpus
        rates = script.base_rates(flags.probe, flags.blr) if 'probe' in flags else [flags.blr]
        for blr in rates:
            lr = absolute_lr(blr, flags.batch_size * flags.accum_iter * world_size)
            describe_batch(
                flags.batch_size,
                flags.accum_iter,
                world_size,
                lr if flags.lr is None else flags.lr,
            )
        if any(Path(flags.output_dir).glob('checkpoint-*.pth')):
            print(f'{flags.output_dir} has checkpoints: the job resumes from the newest one')
    if args.dry_run:
        return

    # ---- submission
    command, parameters = _plan(args, flags, script.__file__, on_gpu, evaluates)
    # The scripts know USR1. submitit's default, USR2, would end their loader workers. The variable
    # is read when submitit is imported, also by the processes of the job.
    os.environ['SUBMITIT_PREEMPT_SIGNAL'] = 'USR1'
    with as_user_error('a package is missing: pip install submitit', ImportError):
        import submitit
    context = 'the job could not be submitted (without Slurm, try --cluster local)'
    with as_user_error(context, OSError, RuntimeError):
        executor = submitit.AutoExecutor(
            args.job_dir or os.path.join(flags.output_dir or '.', 'slurm'),
            cluster=args.cluster,
            **{f'{args.cluster}_max_num_timeout': args.max_timeouts},
        )
        executor.update_parameters(**parameters)
        job = executor.submit(Task(command))
    print(f'Job {job.job_id}: its output is in {job.paths.stdout}')
    if args.cluster == 'local':
        job.wait()
        tasks = map(job.task, range(job.num_tasks))
        if not all(task.paths.result_pickle.exists() for task in tasks) or job.exception():
            raise UserError(f'the job did not finish; see {job.paths.stdout}')


if __name__ == '__main__':
    run(main, parse(sys.argv[1:]))
