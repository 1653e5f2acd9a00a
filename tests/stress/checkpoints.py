"""Stress kind "checkpoints": damaged, altered and hostile files for every flag that reads one.

Each file is either refused with a UserError of one line, or gives the weights that it had
before. Any other exception, weights or effect is a failure. Formats without checksums, and
archives that were written again with correct checksums and without our digest, may give other
weights: these are counted separately.
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
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import save_file
from timm.optim import param_groups_weight_decay

import clip
import models_milan
import models_vit
from models_teacher import TeacherSpec, build_teacher
from tests.helpers import TINY_CLIP, draw_photo, ok, pretrain, save_archive
from tests.stress import damage, hostile
from util.amp import NativeScalerWithGradNormCount
from util.checkpoints.checkpointer import Checkpointer
from util.checkpoints.io import load_pretrained, save_on_master
from util.checkpoints.verify import save_safetensors
from util.errors import UserError

SIZES = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3)
models_milan.MODELS.setdefault(
    'mae_vit_stress',
    partial(
        models_milan.MaskedAutoencoderViT,
        **SIZES,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
    ),
)
MAX_SECONDS, MAX_MEGABYTES = 20, 1000  # for reading a file

SAME, REFUSED = 'the same weights', 'refused in one line'
UNDETECTED = 'other weights, which no checksum detects'
OTHER = 'WRONG: other weights'


@dataclass
class File:
    """A file to change.

    Attributes:
        name: its name in the folder of the stress run.
        share: share of the cases.
        changes: methods of Stress that change it.
        readers: methods of Stress that read it.
        undetectable: starts of the names of changes that leave a valid file.
    """

    name: str
    share: int
    changes: str
    readers: tuple[str, ...] = ('resume', 'finetune')
    undetectable: tuple[str, ...] = field(default=())


FILES = {
    'ours': File('ours.pth', 40, 'bytes records objects pickle'),
    'published': File('published.pth', 15, 'bytes records', undetectable=('swap', 'alter')),
    'legacy format': File('legacy.pth', 7, 'bytes objects pickle', undetectable=('',)),
    'CLIP, TorchScript': File(
        'archive.pt', 18, 'bytes records pickle', ('teacher',), ('swap', 'alter')
    ),
    'CLIP, state dict': File('clip.pth.tar', 6, 'bytes records', ('teacher',)),
    'our .safetensors': File('ours.safetensors', 9, 'bytes tensors pickle', ('finetune',)),
    '.safetensors': File('plain.safetensors', 5, 'bytes', ('finetune',), ('',)),
}


class Hang(BaseException):
    """A file took too long to read."""


def _alarm(*_):
    raise Hang


class Watch:
    """Record the first process, written file, connection or the like, while ``on``."""

    EVENTS = (
        'os.system',
        'os.exec',
        'os.fork',
        'os.posix_spawn',
        'subprocess.Popen',
        'os.mkdir',
        'os.remove',
        'os.rename',
        'os.symlink',
        'os.link',
        'os.chmod',
        'socket.connect',
        'shutil.rmtree',
        'webbrowser.open',
    )

    def __init__(self):
        self.on, self.seen = False, None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on:
            return
        mode = arguments[1] if event == 'open' else ''
        writes = isinstance(mode, str) and set(mode) & set('wax+')
        imports = event == 'import' and arguments[0] == 'antigravity'
        if writes or imports or event in self.EVENTS:
            self.seen = self.seen or event


class Stress:
    """Cases of this kind; see KINDS in __main__.py."""

    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        self.mark = folder / 'mark'
        self.model = models_milan.MODELS['mae_vit_stress'](img_size=16)
        self.classifier = models_vit.VisionTransformer(num_classes=3, **SIZES)
        self.watch = Watch()
        self.make_files()
        self.data = {kind: (folder / file.name).read_bytes() for kind, file in FILES.items()}
        self.expected = {
            (kind, reader): getattr(self, reader)(folder / file.name)
            for kind, file in FILES.items()
            for reader in file.readers
        }
        for value in self.expected.values():
            assert value and all(torch.isfinite(v).all() for v in value.values())
        self.before = signal.signal(signal.SIGALRM, _alarm)

    def close(self):
        signal.signal(signal.SIGALRM, self.before)

    def make_files(self):
        """Write a checkpoint of main_pretrain.py, the same in other formats, and a teacher."""
        folder = self.folder
        for i in range(4):
            draw_photo(folder / 'data' / 'train' / 'a' / f'{i}.png', i, (20, 20))
        flags = '--model mae_vit_stress --input_size 16 --batch_size 2 --epochs 1 --amp fp16'
        flags += ' --lr 1e-3 --num_workers 0'
        folders = ['--data_path', folder / 'data', '--output_dir', folder, '--log_dir', '']
        ok(pretrain(*flags.split(), *folders))
        os.replace(folder / 'checkpoint-0.pth', folder / 'ours.pth')
        checkpoint = torch.load(folder / 'ours.pth', weights_only=False)
        torch.save(checkpoint, folder / 'published.pth')
        torch.save(checkpoint, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
        weights = {
            k: v.clone() for k, v in checkpoint['model'].items() if not k.startswith('decoder_')
        }
        save_safetensors(weights, folder / 'ours.safetensors', {'epoch': '0'})
        save_file(weights, folder / 'plain.safetensors')
        torch.manual_seed(0)
        sizes = dict(image_resolution=16, vision_layers=1, vision_width=64, vocab_size=8)
        teacher = clip.CLIP(**{**TINY_CLIP, **sizes})
        save_archive(teacher, folder / 'archive.pt')
        save_on_master(teacher.state_dict(), folder / 'clip.pth.tar')

    # ---- one case ----

    def case(self, number):
        rng = random.Random(f'{self.seed}/{number}')
        kind = rng.choices(list(FILES), [file.share for file in FILES.values()])[0]
        file = FILES[kind]
        reader, change = rng.choice(file.readers), rng.choice(file.changes.split())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            what, data = getattr(self, change)(rng, kind)
        path = self.folder / ('x' + os.path.splitext(file.name)[1])
        path.write_bytes(data)
        outcome = self.read(path, reader, self.expected[kind, reader])
        if outcome == OTHER and change != 'pickle' and what.startswith(file.undetectable):
            outcome = UNDETECTED
        return outcome, f'{kind}, {what}, read by {reader}'

    def read(self, path, reader, expected):
        """Return the outcome of reading ``path``."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        hostile.RAN.clear()
        self.watch.seen, self.watch.on = None, True
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        try:
            found = getattr(self, reader)(path)
            common = expected.keys() & found.keys()
            same = all(torch.equal(found[name], expected[name]) for name in common)
            outcome = SAME if same else OTHER
        except UserError as e:
            one_line = str(e).isprintable() and len(str(e)) < 2500
            outcome = REFUSED if one_line else f'WRONG: {str(e)[:300]!r}'
        except Hang:
            outcome = f'WRONG: not read after {MAX_SECONDS} s'
        except BaseException as e:
            at = e.__traceback__
            while at.tb_next:
                at = at.tb_next
            where = f'{at.tb_frame.f_code.co_filename}:{at.tb_lineno}'
            outcome = f'WRONG: {type(e).__name__} at {where}: {str(e)[:300]!r}'
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watch.on = False
        if self.mark.exists() or hostile.RAN or self.watch.seen:
            action = self.watch.seen or hostile.RAN or 'the mark'
            outcome = f'WRONG: it did something: {action}'
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1000
        return f'WRONG: it took {grown:.0f} MB' if grown > MAX_MEGABYTES else outcome

    # ---- readers: each returns the tensors that it has read, by name ----

    def resume(self, path):
        _fill_with_nan(self.model)
        optimizer = torch.optim.AdamW(
            param_groups_weight_decay(self.model, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True
        )
        scaler = NativeScalerWithGradNormCount(enabled=True, device='cpu')
        checkpointer = Checkpointer(self.model, optimizer, scaler, '', flags={}, epochs=1)
        with contextlib.redirect_stdout(io.StringIO()):
            start = checkpointer.resume(str(path))
        found = dict(self.model.state_dict())
        if optimizer.state:  # otherwise it has printed that the file has only weights
            found['start_epoch'] = torch.tensor(start.epoch)
            for i, state in optimizer.state_dict()['state'].items():
                found.update({f'{i}.{name}': torch.as_tensor(v) for name, v in state.items()})
        return {name: value.clone() for name, value in found.items()}

    def finetune(self, path):
        _fill_with_nan(self.classifier)
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained(self.classifier, path, model_name='vit_stress', whole_encoder=True)
        weights = self.classifier.state_dict()
        return {name: v.clone() for name, v in weights.items() if not name.startswith('head')}

    def teacher(self, path):
        spec = TeacherSpec('clip_path', str(path), '', 'clip')
        with contextlib.redirect_stdout(io.StringIO()):
            teacher = build_teacher(
                spec, grid_size=2, input_size=16, model_name='mae_vit_stress', device='cpu'
            )
        return teacher.visual.state_dict()

    # ---- changes: each returns a description and the bytes of the changed file ----

    def bytes(self, rng, kind):
        change, data = rng.choice(damage.BYTES), bytearray(self.data[kind])
        change(rng, data)
        return change.__name__, data

    def records(self, rng, kind):
        change, records = rng.choice(damage.RECORDS), damage.unzip(self.data[kind])
        return change.__name__, change(rng, records) or damage.zipped(records)

    def objects(self, rng, kind):
        """Save other objects with torch.save, as in a file of somebody else."""
        checkpoint = torch.load(self.folder / 'ours.pth', weights_only=False)
        change, buffer = rng.choice(damage.OBJECTS), io.BytesIO()
        what = change(rng, checkpoint, self.mark)
        torch.save(checkpoint, buffer, _use_new_zipfile_serialization=kind != 'legacy format')
        return f'{change.__name__} ({what})', buffer.getvalue()

    def tensors(self, rng, kind):
        """Save a .safetensors file in which one tensor has another type or name."""
        path = self.folder / 'made.safetensors'
        weights = torch.load(self.folder / 'ours.pth', weights_only=False)
        what = rng.choice([damage.change_tensor, damage.change_name])(rng, weights, None)
        plain = {
            str(k): v.detach().contiguous().clone()
            for k, v in weights['model'].items()
            if isinstance(v, torch.Tensor)
            and v.layout == torch.strided
            and v.device.type == 'cpu'
            and not v.is_quantized
            and v.numel() < 1e6
        }
        save_file(plain, path)
        return f'saved again ({what})', path.read_bytes()

    def pickle(self, rng, kind):
        """Write a hostile pickle as the file, as the pickle in its archive, or before its end."""
        what, pickled = hostile.pickled(rng, str(self.mark))
        if self.data[kind].startswith(b'PK') and rng.random() < 0.7:
            records = damage.unzip(self.data[kind])
            next(r for r in records if r[0].endswith('data.pkl'))[1] = pickled
            return f'{what} in data.pkl', damage.zipped(records)
        legacy = 0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}
        head = b''.join(pickle.dumps(value, 2) for value in legacy[: rng.randrange(4)])
        tail = rng.choice([b'', pickle.dumps([], 2), self.data[kind]])
        return f'{what} alone', head + pickled + tail


def _fill_with_nan(model):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float('nan'))
