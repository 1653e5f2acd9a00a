"""tests/stress.py checkpoints: damaged, altered, hostile files for the functions behind --resume, --finetune, --clip_path.

Each is refused with a UserError of one line, or gives the very weights that the file had before. Never another exception,
never a call of what the file names, never other weights. Only where a format has no checksum, or an archive was made anew
with right checksums and without our digest, may other weights come out; they are counted apart.
"""

import contextlib
import io
import os
import pickle
import random
import resource
import signal
import sys
import warnings
from argparse import Namespace
from functools import partial

import stress_hostile
import stress_mutations as mutations
import torch
from conftest import TINY_CLIP, draw_photo, pretrain
from openai_archive import save_archive
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay

import clip
import models_milan
import models_vit
from main_pretrain import get_args_parser
from tools import export
from util import misc
from util.checkpoint import load_pretrained, save_on_master
from util.errors import UserError
from util.teacher import build_teacher

SIZES = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)
models_milan.MODELS.setdefault('mae_vit_stress', partial(
    models_milan.MaskedAutoencoderViT, **SIZES, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
SECONDS, MEGABYTES = 20, 1000  # that no file may take to be read

# name: (file, its readers, share of the cases, kinds of change, those changes that nothing tells from another's good file)
FILES = {
    'ours': ('ours.pth', ['resume', 'finetune'], 40, ['bytes', 'records', 'objects', 'pickle'], []),
    'published': ('published.pth', ['resume', 'finetune'], 15, ['bytes', 'records'], ['swap', 'alter']),
    'older format': ('older.pth', ['resume', 'finetune'], 7, ['bytes', 'objects', 'pickle'], ['']),
    'CLIP, TorchScript': ('archive.pt', ['teacher'], 18, ['bytes', 'records', 'pickle'], ['swap', 'alter']),
    'CLIP, state dict': ('clip.pth.tar', ['teacher'], 6, ['bytes', 'records'], []),
    'our .safetensors': ('ours.safetensors', ['finetune'], 9, ['bytes', 'tensors', 'pickle'], []),
    '.safetensors': ('plain.safetensors', ['finetune'], 5, ['bytes'], ['']),
}


class Hang(BaseException):
    pass


def _alarm(*_):
    raise Hang


class Watch:
    """What a reader does beside reading: processes, files for writing, connections. ``seen`` has the first of each read."""

    EVENTS = ('os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'subprocess.Popen', 'os.mkdir', 'os.remove', 'os.rename',
              'os.symlink', 'os.link', 'os.chmod', 'socket.connect', 'shutil.rmtree', 'webbrowser.open')

    def __init__(self):
        self.on, self.seen = False, None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        writes = event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+')
        if self.on and (writes or event in self.EVENTS or event == 'import' and arguments[0] == 'antigravity'):
            self.seen = self.seen or event


class Stress:
    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        self.mark = folder / 'mark'
        self.model = models_milan.MODELS['mae_vit_stress'](img_size=16)
        self.classifier = models_vit.VisionTransformer(num_classes=3, **SIZES)
        self.watch = Watch()
        self.make_files()
        self.data = {name: (folder / file[0]).read_bytes() for name, file in FILES.items()}
        self.expected = {(name, reader): READERS[reader](self, folder / file[0])
                         for name, file in FILES.items() for reader in file[1]}
        for value in self.expected.values():
            assert value and all(torch.isfinite(v).all() for v in value.values())
        self.before = signal.signal(signal.SIGALRM, _alarm)

    def close(self):
        signal.signal(signal.SIGALRM, self.before)

    def make_files(self):
        """A real checkpoint of main_pretrain.py, the same in other formats, and a teacher."""
        folder = self.folder
        for i in range(4):
            draw_photo(folder / 'data' / 'train' / 'a' / f'{i}.png', i, (20, 20))
        run = pretrain('--model', 'mae_vit_stress', '--input_size', 16, '--batch_size', 2, '--epochs', 1, '--amp', 'fp16',
                       '--lr', 1e-3, '--data_path', folder / 'data', '--num_workers', 0, '--output_dir', folder,
                       '--log_dir', '')
        assert run.returncode == 0, run.stderr
        os.replace(folder / 'checkpoint-0.pth', folder / 'ours.pth')
        self.checkpoint = torch.load(folder / 'ours.pth', weights_only=False)
        torch.save(self.checkpoint, folder / 'published.pth')
        torch.save(self.checkpoint, folder / 'older.pth', _use_new_zipfile_serialization=False)
        weights = {k: v.clone() for k, v in self.checkpoint['model'].items() if not k.startswith('decoder_')}
        export.save(weights, str(folder / 'ours.safetensors'), {'epoch': '0'})
        save_file(weights, folder / 'plain.safetensors')
        torch.manual_seed(0)
        teacher = clip.CLIP(**{**TINY_CLIP, 'image_resolution': 16, 'vision_layers': 1, 'vision_width': 64, 'vocab_size': 8})
        save_archive(teacher, folder / 'archive.pt')
        save_on_master(teacher.state_dict(), folder / 'clip.pth.tar')

    # ---- one case ----

    def case(self, number):
        rng = random.Random(f'{self.seed}/{number}')
        name = rng.choices(list(FILES), [file[2] for file in FILES.values()])[0]
        file, readers, _, kinds, untold = FILES[name]
        reader, kind = rng.choice(readers), rng.choice(kinds)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            change, data = CHANGES[kind](self, rng, name)
        path = self.folder / ('x' + os.path.splitext(file)[1])
        path.write_bytes(data)
        outcome = self.read(path, reader, self.expected[name, reader])
        if outcome == OTHER and kind != 'pickle' and any(change.startswith(u) for u in untold):
            outcome = 'other weights, where no checksum can tell'
        return outcome, f'{name}, {change}, read by {reader}'

    def read(self, path, reader, expected):
        """The outcome of reading ``path``."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stress_hostile.RAN.clear()
        self.watch.seen, self.watch.on = None, True
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = self.compare(READERS[reader](self, path), expected)
        except UserError as e:
            outcome = 'refused in one line' if str(e).isprintable() and len(str(e)) < 2500 else f'WRONG: {str(e)[:300]!r}'
        except Hang:
            outcome = f'WRONG: not read after {SECONDS} s'
        except BaseException as e:
            at = e.__traceback__
            while at.tb_next:
                at = at.tb_next
            outcome = f'WRONG: {type(e).__name__} at {at.tb_frame.f_code.co_filename}:{at.tb_lineno}: {str(e)[:300]!r}'
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watch.on = False
        if self.mark.exists() or stress_hostile.RAN or self.watch.seen:
            outcome = f'WRONG: it did something: {self.watch.seen or stress_hostile.RAN or "the mark"}'
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1000
        return f'WRONG: it took {grown:.0f} MB' if grown > MEGABYTES else outcome

    def compare(self, found, expected):
        same = all(torch.equal(found[name], value) for name, value in expected.items() if name in found)
        return 'the very weights' if same else OTHER

    # ---- the readers: each gives what it has read, as {name: tensor} ----

    def resume(self, path):
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(float('nan'))
        optimizer = torch.optim.AdamW(param_groups_weight_decay(self.model, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
        scaler = misc.NativeScalerWithGradNormCount(enabled=True, device='cpu')
        args = Namespace(resume=str(path), start_epoch=0)
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoint = misc.load_model(args, self.model, optimizer, scaler)
        found = dict(self.model.state_dict())
        if checkpoint:  # or it has said that the file has only weights
            found['start_epoch'] = torch.tensor(args.start_epoch)
            for i, kept in optimizer.state_dict()['state'].items():
                found.update({f'{i}.{name}': torch.as_tensor(value) for name, value in kept.items()})
        return {name: value.clone() for name, value in found.items()}

    def finetune(self, path):
        with torch.no_grad():
            for p in self.classifier.parameters():
                p.fill_(float('nan'))
        args = Namespace(finetune=str(path), model='vit_stress', eval=False, nb_classes=3)
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained(args, self.classifier, whole_encoder=True)
        return {name: v.clone() for name, v in self.classifier.state_dict().items() if not name.startswith('head')}

    def teacher(self, path):
        args = get_args_parser().parse_args(['--clip_path', str(path), '--input_size', '16', '--amp', 'fp32'])
        args.compile = False
        with contextlib.redirect_stdout(io.StringIO()):
            return build_teacher(args, 2, 'cpu').visual.state_dict()

    # ---- the changes: each gives (what it is, the bytes of the file) ----

    def bytes(self, rng, name):
        change, data = rng.choice(mutations.BYTES), bytearray(self.data[name])
        change(rng, data)
        return change.__name__, data

    def records(self, rng, name):
        change, records = rng.choice(mutations.RECORDS), mutations.unzip(self.data[name])
        return change.__name__, change(rng, records) or mutations.zipped(records)

    def objects(self, rng, name):
        """Saved anew by torch.save: what somebody else's file could hold."""
        checkpoint = torch.load(self.folder / 'ours.pth', weights_only=False)
        change, buffer = rng.choice(mutations.OBJECTS), io.BytesIO()
        what = change(rng, checkpoint, self.mark)
        torch.save(checkpoint, buffer, _use_new_zipfile_serialization=name != 'older format')
        return f'{change.__name__} ({what})', buffer.getvalue()

    def tensors(self, rng, name):
        """A .safetensors file saved anew, with one tensor of another kind or name."""
        path = self.folder / 'made.safetensors'
        weights = torch.load(self.folder / 'ours.pth', weights_only=False)
        what = rng.choice([mutations.change_tensor, mutations.change_name])(rng, weights, None)
        plain = {str(k): v.detach().contiguous().clone() for k, v in weights['model'].items()
                 if isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == 'cpu'
                 and not v.is_quantized and v.numel() < 1e6}
        save_file(plain, path)
        return f'saved anew ({what})', path.read_bytes()

    def pickle(self, rng, name):
        """A pickle in the place of the file, of the pickle in its archive, or before its end."""
        what, hostile = stress_hostile.pickled(rng, str(self.mark))
        if self.data[name].startswith(b'PK') and rng.random() < 0.7:
            records = mutations.unzip(self.data[name])
            next(r for r in records if r[0].endswith('data.pkl'))[1] = hostile
            return f'{what} in data.pkl', mutations.zipped(records)
        older = 0x1950a86a20f9469cfc6c, 1001, {'little_endian': True}
        head = b''.join(pickle.dumps(value, 2) for value in older[:rng.randrange(4)])
        return f'{what} alone', head + hostile + rng.choice([b'', pickle.dumps([], 2), self.data[name]])


OTHER = 'WRONG: other weights'
READERS = {'resume': Stress.resume, 'finetune': Stress.finetune, 'teacher': Stress.teacher}
CHANGES = {'bytes': Stress.bytes, 'records': Stress.records, 'objects': Stress.objects, 'tensors': Stress.tensors,
           'pickle': Stress.pickle}
