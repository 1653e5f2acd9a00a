"""tests/stress.py commands: random command lines of the scripts and tools. Each is a run, or one line of what is wrong."""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import stress_lines
import torch
from conftest import ROOT, TINY_CLIP, draw_photo, finetune, linprobe, pretrain
from imagenet_archives import LISTS, devkit, pack, train_members, val_members
from openai_archive import save_archive
from PIL import Image
from safetensors.torch import save_file

import clip

SECONDS = 120  # for one command, on a busy machine too
# What may stand on stderr beside the one line: said of single images, files and steps, or drawn while something goes on.
NOTICES = re.compile(r'No CUDA GPU here|Image .* cannot be read|Passed over: |Step left out|Connection lost|'
                     r'.*(it/s|B/s|s/it|\?)\]|.*\d+%\|')
SURROUNDINGS = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1', 'COLUMNS': '200',
                'https_proxy': 'http://127.0.0.1:9', 'http_proxy': 'http://127.0.0.1:9'}  # no download leaves this machine


class Foreign:
    def __reduce__(self):
        return print, ('this must never be printed',)


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed, self.process = Path(folder), seed, None
        self.files = self.folder / 'files'
        self.make_files()

    def close(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with the workers of loaders that it may have left
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def case(self, number):
        rng = random.Random(f'{self.seed}/{number}')
        program, line = stress_lines.command_line(rng)
        line = [re.sub('^FILE:', f'{self.files}/', word) for word in line]
        folder = self.folder / 'case'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.rmtree(self.files / 'folder', ignore_errors=True)  # some write into it
        (self.files / 'folder').mkdir()
        return self.outcome(*self.run(program, line, folder)), f'{program} {" ".join(map(ascii, line))[:1500]}'

    def run(self, program, arguments, folder):
        """(exit status, stdout, stderr), in a process that goes on to the next; a status of None: it had to be ended."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / 'tests' / 'stress_worker.py', self.folder / 'beside'], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, env={**os.environ, **SURROUNDINGS, 'HOME': str(self.folder / 'home')}, text=True,
                start_new_session=True)
        job = {'program': program, 'arguments': arguments, 'folder': str(folder)}
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        answer = self.process.stdout.readline() if ready else ''
        if answer:
            return json.loads(answer)
        self.close()
        return None, '', f'no end after {SECONDS} s' if not ready else 'the process has died'

    def outcome(self, status, out, err):
        lines = [line for line in re.split(r'[\n\r]', err) if line.strip() and not NOTICES.match(line)]
        said = '\n'.join(lines)[-1500:]
        if status is None or 'Traceback' in out + err or 'must never be printed' in out:
            return f'WRONG: {said}'
        if status == 0:
            return 'a run' if not lines else f'WRONG: a run that says {said!r}'
        if status in (1, 2) and len(lines) == 1 and lines[0].startswith('error: '):
            return 'one line'
        return f'WRONG: status {status}, {said!r}'

    def make_files(self):
        """What stress_lines calls FILE:name."""
        files = self.files
        (files / 'folder').mkdir(parents=True)
        (self.folder / 'home').mkdir()
        for split, count in (('train', 12), ('val', 6)):
            for i in range(count):
                for name in ('data', 'damaged'):
                    draw_photo(files / name / split / f'class{i % 3}' / f'{i}.png', i, (40 + i, 36))
                draw_photo(files / 'pixels' / 'images' / split / f'{i}.png', i, (40, 36))
                (files / 'pixels' / 'masks' / split).mkdir(parents=True, exist_ok=True)
                Image.new('L', (40, 36), i % 3).save(files / 'pixels' / 'masks' / split / f'{i}.png')
            for name in ('no_val', 'other_val'):
                draw_photo(files / name / ('train' if name == 'no_val' else split) / split / '0.png', 0, (30, 30))
            (files / 'blank' / split / 'class0').mkdir(parents=True)
            for path in (files / 'damaged' / split / 'class1').iterdir():
                path.write_bytes(path.read_bytes()[:100])
        self.make_checkpoints()
        for name, content in {'train.tar': pack(train_members()), 'val.tar': pack(val_members()), 'devkit.tar.gz': devkit(),
                              'labels.txt': LISTS['named'].encode(), 'cut.tar': pack(train_members())[:9000],
                              'text.pth': b'no checkpoint\n', 'empty.pth': b''}.items():
            (files / name).write_bytes(content)
        draw_photo(files / 'a.png', 0, (50, 40))
        Image.new('L', (50, 40), 7).save(files / 'grey.jpg')
        Image.new('RGB', (1, 1)).save(files / 'one.png')
        (files / 'cut.png').write_bytes((files / 'a.png').read_bytes()[:300])
        os.mkfifo(files / 'pipe')

    def make_checkpoints(self):
        """Of each script, in several formats, and some that are none."""
        files, out = self.files, self.folder / 'made'
        torch.manual_seed(0)
        teacher = clip.CLIP(**{**TINY_CLIP, 'image_resolution': 32})
        save_archive(teacher, files / 'clip.pt')
        torch.save(teacher.state_dict(), files / 'clip.pth.tar')

        def script(start, program, name, *more):
            line = [re.sub('^FILE:', f'{files}/', word) for word in stress_lines.PROGRAMS[program][1]]
            result = start(*line, '--output_dir', out, '--log_dir', '', *more)
            assert result.returncode == 0, result.stderr
            os.replace(out / 'checkpoint-0.pth', files / name)

        script(pretrain, 'main_pretrain.py', 'pretrained.pth')
        script(pretrain, 'main_pretrain.py', 'milan.pth', '--use_clip', '--change_decoder', '--attn_mask')
        script(finetune, 'main_finetune.py', 'classifier.pth')
        script(linprobe, 'main_linprobe.py', 'probe.pth')
        checkpoint = torch.load(files / 'pretrained.pth', weights_only=False)
        weights = checkpoint['model']
        torch.save(checkpoint, files / 'older.pth', _use_new_zipfile_serialization=False)
        save_file(weights, files / 'plain.safetensors')
        (files / 'cut.pth').write_bytes((files / 'pretrained.pth').read_bytes()[:-5000])
        torch.save({**checkpoint, 'more': Foreign()}, files / 'foreign.pth')
        torch.save({**checkpoint, 'model': {k: v * float('nan') for k, v in weights.items()}}, files / 'nan.pth')
        strange = {'patch_embed.proj.weight': torch.zeros(192, 3), 'blocks.0.attn.qkv.weight': torch.zeros(0),
                   'pos_embed': torch.ones(3)}
        torch.save({'model': strange, 'args': argparse.Namespace(model=3, input_size='x'), 'epoch': 0, 'optimizer': []},
                   files / 'strange.pth')
        torch.save({'visual.layer1.0.conv1.weight': torch.zeros(1)}, files / 'resnet.pth')
