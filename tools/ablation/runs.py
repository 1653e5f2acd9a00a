"""The runs of the ablation: each variant is pretrained, probed and fine-tuned by the scripts."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from tools.ablation.report import FACTORS, METRICS, RANDOM
from util.errors import UserError
from util.run_info import available_cores

ROOT = Path(__file__).parents[2]


def pretrain_flags(target: str, decoder: str, masking: str, teacher: Path) -> list[Any]:
    """Return the flags of main_pretrain.py for a variant."""
    use_teacher = target == 'CLIP' or masking == 'semantic'
    flags = {
        '--norm_pix_loss': target == 'pixels',
        '--use_clip': use_teacher,
        '--pixel_target': use_teacher and target == 'pixels',
        '--change_decoder': decoder == 'prompting',
        '--attn_mask': masking == 'semantic',
    }
    clip_path = ['--clip_path', teacher] if use_teacher else []
    return [flag for flag, wanted in flags.items() if wanted] + clip_path


class Runs:
    """Runs the scripts as child processes.

    Args:
        out: --output_dir.
        setting: an entry of SETTINGS.
        lock: the locked file of ``out``. The scripts inherit it.
        device: 'cuda' or 'cpu'.
        jobs: the number of scripts that run at the same time.
        num_workers: loader workers per script.
    """

    def __init__(
        self,
        out: Path,
        setting: dict[str, Any],
        lock: TextIO | None,
        device: str,
        jobs: int,
        num_workers: int,
    ) -> None:
        self.out, self.setting, self.lock = out, setting, lock
        self.common = f"""--input_size 64 --batch_size {setting['batch_size']} --device {device}
            --num_workers {num_workers} --resume auto""".split()
        threads = {'OMP_NUM_THREADS': str(max(1, available_cores() // jobs))}
        self.env = {**os.environ, **(threads if device == 'cpu' else {})}
        all_gpus = ','.join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get('CUDA_VISIBLE_DEVICES', all_gpus).split(',')
        self.gpus = (gpus * jobs)[:jobs]  # one entry per script that may run at the same time
        self.processes, self.stopped = [], False

    def commands(
        self, folder: Path, variant: tuple[str, str, str], seed: int
    ) -> dict[str, list[str]]:
        """Return the commands of a run, by the subfolders of ``folder`` for their output."""
        start = folder / 'pretrain' / f'checkpoint-{self.setting["epochs"] - 1}.pth'
        classifier = [
            *'--model vit_tiny_patch8 --nb_classes 10 --warmup_epochs 0'.split(),
            *('--data_path', self.out / 'labeled'),
            *('--finetune', '' if variant == RANDOM else start),
        ]
        commands = {
            'pretrain': [
                *'main_pretrain.py --model mae_vit_tiny_patch8 --lr 1e-3'.split(),
                *('--epochs', self.setting['epochs']),
                *('--warmup_epochs', self.setting['warmup_epochs']),
                *('--data_path', self.out / 'data'),
                *pretrain_flags(*variant, self.out / 'clip.pth.tar'),
            ],
            'linear': [
                *'main_linprobe.py --blr 1 4 16'.split(),
                *('--epochs', self.setting['probe_epochs'], *classifier),
            ],
            'finetune': [
                *'main_finetune.py --lr 1e-3 --global_pool --reprob 0 --aa='.split(),
                *('--epochs', self.setting['finetune_epochs'], *classifier),
            ],
        }
        return {
            kind: [*map(str, command), *self.common, '--seed', str(seed)]
            for kind, command in commands.items()
            if kind != 'pretrain' or variant != RANDOM
        }

    def run(self, variant: tuple[str, str, str], seed: int) -> dict[str, Any]:
        """Pretrain, probe and fine-tune. Returns the line of results.jsonl."""
        name = '-'.join(word for word in variant if word).replace(' ', '-')
        folder = self.out / 'runs' / f'{name}-seed{seed}'
        for kind, command in self.commands(folder, variant, seed).items():
            self._script(folder / kind, command)
        logs = {kind: (folder / kind / 'log.txt').read_text() for kind in METRICS}
        top1 = {kind: json.loads(log.splitlines()[-1])['test_acc1'] for kind, log in logs.items()}
        return {**dict(zip(FACTORS, variant)), 'seed': seed, **top1}

    # Run one script with ``folder`` as its output_dir; its output goes to output.txt there.
    def _script(self, folder, command):
        if self.stopped:
            raise UserError('stopped')
        folder.mkdir(parents=True, exist_ok=True)
        command = [*command, '--output_dir', str(folder), '--log_dir', str(folder)]
        gpu = self.gpus.pop(0)  # there is one: each of the ``jobs`` threads runs one script
        with open(folder / 'output.txt', 'a', encoding='utf-8') as output:
            print(f'$ {shlex.join(["python", *command])}', file=output, flush=True)
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only
                pass_fds=[self.lock.fileno()],
                env={**self.env, 'CUDA_VISIBLE_DEVICES': gpu},
            )
        self.processes.append(process)
        status = process.wait()
        self.gpus.append(gpu)
        if status:
            raise UserError(
                f'{command[0]} failed with status {status}; see the end of {folder}/output.txt'
            )

    def stop(self) -> None:
        """Terminate the scripts. They save a checkpoint first, and the next call resumes."""
        self.stopped = True
        for process in self.processes:
            process.terminate()
