"""Random command lines of the scripts and tools: each is a run or ends with one error line."""

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

import torch
from PIL import Image
from safetensors.torch import save_file

import clip
from tests.helpers import (
    NOTES,
    ROOT,
    TINY_CLIP,
    draw_photo,
    finetune,
    linprobe,
    ok,
    pretrain,
    save_archive,
)
from tests.imagenet_archives import LISTS, devkit, pack, train_members, val_members
from tests.stress.command_lines import PROGRAMS, command_line

SECONDS = 120  # per command, on a busy machine too
ENVIRONMENT = {
    'OMP_NUM_THREADS': '1',
    'CUDA_VISIBLE_DEVICES': '',
    'HF_HUB_OFFLINE': '1',
    'COLUMNS': '200',
    'https_proxy': 'http://127.0.0.1:9',  # no download leaves this machine
    'http_proxy': 'http://127.0.0.1:9',
}


class Foreign:
    """An object whose unpickling calls print."""

    def __reduce__(self):
        return print, ('this must never be printed',)


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed, self.process = folder, seed, None
        self.files = folder / 'files'
        (self.files / 'folder').mkdir(parents=True)
        (folder / 'home').mkdir()
        self._make_images()
        self._make_checkpoints()
        self._make_files()

    def close(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with loader workers that it left
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def case(self, number):
        program, line = command_line(random.Random(f'{self.seed}/{number}'))
        line = self._with_files(line)
        folder = self.folder / 'case'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.rmtree(self.files / 'folder', ignore_errors=True)  # some commands write into it
        (self.files / 'folder').mkdir()
        description = f'{program} {" ".join(map(ascii, line))[:1500]}'
        return self._outcome(*self._run(program, line, folder)), description

    def _with_files(self, line):
        return [re.sub('^FILE:', f'{self.files}/', word) for word in line]

    def _run(self, program, arguments, folder):
        """Return (exit status, stdout, stderr); the status is None if the process had to be killed.

        The same process runs the next command.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, '-m', 'tests.stress.worker', self.folder / 'other_output'],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, 'HOME': str(self.folder / 'home')},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        job = {'program': program, 'arguments': arguments, 'folder': str(folder)}
        self.process.stdin.write(json.dumps(job) + '\n')
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        answer = self.process.stdout.readline() if ready else ''
        if answer:
            return json.loads(answer)
        self.close()
        return None, '', 'the process died' if ready else f'still running after {SECONDS} s'

    def _outcome(self, status, out, err):
        lines = [line for line in re.split(r'[\n\r]', err) if line.strip()]
        lines = [line for line in lines if not NOTES.match(line)]
        text = '\n'.join(lines)[-1500:]
        if status is None or 'Traceback' in out + err or 'must never be printed' in out:
            return f'WRONG: {text}'
        if status == 0:
            return 'a run' if not lines else f'WRONG: a run that prints {text!r}'
        if status in (1, 2) and len(lines) == 1 and lines[0].startswith('error: '):
            return 'one line'
        return f'WRONG: status {status}, {text!r}'

    # The files that command_lines calls FILE:name.

    def _make_images(self):
        files = self.files
        for split, count in (('train', 12), ('val', 6)):
            for i in range(count):
                for name in ('data', 'damaged'):
                    draw_photo(files / name / split / f'class{i % 3}' / f'{i}.png', i, (40 + i, 36))
                draw_photo(files / 'pixels' / 'images' / split / f'{i}.png', i, (40, 36))
                mask = files / 'pixels' / 'masks' / split / f'{i}.png'
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.new('L', (40, 36), i % 3).save(mask)
            draw_photo(files / 'no_val' / 'train' / split / '0.png', 0, (30, 30))
            draw_photo(files / 'other_val' / split / split / '0.png', 0, (30, 30))
            (files / 'blank' / split / 'class0').mkdir(parents=True)
            for path in (files / 'damaged' / split / 'class1').iterdir():
                path.write_bytes(path.read_bytes()[:100])
        draw_photo(files / 'a.png', 0, (50, 40))
        Image.new('L', (50, 40), 7).save(files / 'gray.jpg')
        Image.new('RGB', (1, 1)).save(files / 'one.png')
        (files / 'cut.png').write_bytes((files / 'a.png').read_bytes()[:300])

    def _make_files(self):
        contents = {
            'train.tar': pack(train_members()),
            'val.tar': pack(val_members()),
            'devkit.tar.gz': devkit(),
            'labels.txt': LISTS['named'].encode(),
            'cut.tar': pack(train_members())[:9000],
            'text.pth': b'not a checkpoint\n',
            'empty.pth': b'',
        }
        for name, content in contents.items():
            (self.files / name).write_bytes(content)
        os.mkfifo(self.files / 'pipe')

    def _make_checkpoints(self):
        """Make checkpoints of each script in several formats, and invalid ones."""
        files, out = self.files, self.folder / 'made'
        torch.manual_seed(0)
        teacher = clip.CLIP(**{**TINY_CLIP, 'image_resolution': 32})
        save_archive(teacher, files / 'clip.pt')
        torch.save(teacher.state_dict(), files / 'clip.pth.tar')

        def train(script, program, name, *more):
            line = self._with_files(PROGRAMS[program][1])
            ok(script(*line, '--output_dir', out, '--log_dir', '', *more))
            os.replace(out / 'checkpoint-0.pth', files / name)

        milan = ('--use_clip', '--change_decoder', '--attn_mask')
        train(pretrain, 'main_pretrain.py', 'pretrained.pth')
        train(pretrain, 'main_pretrain.py', 'milan.pth', *milan)
        train(finetune, 'main_finetune.py', 'classifier.pth')
        train(linprobe, 'main_linprobe.py', 'probe.pth')
        checkpoint = torch.load(files / 'pretrained.pth', weights_only=False)
        weights = checkpoint['model']
        torch.save(checkpoint, files / 'older.pth', _use_new_zipfile_serialization=False)
        save_file(weights, files / 'plain.safetensors')
        (files / 'cut.pth').write_bytes((files / 'pretrained.pth').read_bytes()[:-5000])
        torch.save({**checkpoint, 'more': Foreign()}, files / 'foreign.pth')
        broken = {k: v * float('nan') for k, v in weights.items()}
        torch.save({**checkpoint, 'model': broken}, files / 'nan.pth')
        strange = {
            'patch_embed.proj.weight': torch.zeros(192, 3),
            'blocks.0.attn.qkv.weight': torch.zeros(0),
            'pos_embed': torch.ones(3),
        }
        args = argparse.Namespace(model=3, input_size='x')
        strange = {'model': strange, 'args': args, 'epoch': 0, 'optimizer': []}
        torch.save(strange, files / 'strange.pth')
        torch.save({'visual.layer1.0.conv1.weight': torch.zeros(1)}, files / 'resnet.pth')
