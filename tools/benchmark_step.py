"""benchmark.py's ``step``: our training step against the textbook formulation, and where its time goes."""

import argparse
import contextlib
import io
import multiprocessing
import re
import time
from pathlib import Path
from statistics import mean, median

import textbook
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip
from engine_pretrain import train_one_epoch
from main_pretrain import build_model, build_training
from models_milan import MODELS, patch_order
from util import lr_sched, misc
from util.arguments import setup
from util.errors import UserError, as_user_error
from util.logs import peak_memory
from util.seeding import sample_noise, seeded
from util.teacher import Teacher


class Ours:
    """Model, teacher and optimiser as main_pretrain.py builds them; run() is its epoch over a few equal batches."""

    def __init__(self, args, device):
        self.args, self.device, self.batch = args, device, one_batch(args, device)
        self.teacher, self.model, _, self.optimizer, self.scaler = build_training(args, device)

    def run(self, steps, clocked=lambda name, module: module):
        """Train for ``steps`` steps; their mean loss. ``clocked`` may wrap teacher and model to see when they work."""
        with contextlib.redirect_stdout(io.StringIO()):
            return train_one_epoch(clocked('forward', self.model), [self.batch] * steps, self.optimizer, self.device, 0,
                                   self.scaler, args=self.args, teacher=clocked('teacher', self.teacher))['loss']


class Textbook:
    """The same with tests/textbook.py and the same weights: in fp16 on CUDA and fp32 on the CPU, or in ``amp``."""

    def __init__(self, args, device, amp=None):
        self.args, self.device, self.batch = args, device, one_batch(args, device)
        self.amp = amp or textbook_amp(device)
        self.visual = clip.load(args.clip_path, 'cpu')[0].visual.to(device)
        with seeded('weights', args.seed):
            self.model = textbook.TextbookMilan(**{
                **MODELS[args.model].keywords, 'img_size': args.input_size, 'use_clip': True, 'change_decoder': True,
                'target_dim': self.visual.output_dim}).to(device)
        self.optimizer = textbook.build_optimizer(self.model, args.lr, args.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == 'fp16')

    def run(self, steps):
        """Train for ``steps`` steps; their mean loss."""
        images, _, ids = self.batch
        losses = []
        for step in range(steps):
            lr_sched.adjust_learning_rate(self.optimizer, step / steps, self.args)
            noise = sample_noise(self.args.seed, 0, ids, self.model.patch_embed.num_patches)
            losses.append(textbook.train_step(self.model, self.visual, self.optimizer, self.scaler, images, noise,
                                              misc.AMP_DTYPES[self.amp], self.args.mask_ratio))
        return mean(losses)


FORMULATIONS = {'ours': Ours, 'textbook': Textbook}


def textbook_amp(device):
    return 'fp16' if device.type == 'cuda' else 'fp32'


def one_batch(args, device):
    """A batch as the loader's, of noise: (images [N, 3, H, W], classes [N], sample numbers [N]) on ``device``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, generator=generator)
    numbers = torch.arange(args.batch_size)
    return images.to(device), numbers.to(device), numbers.to(device)


def measure_step(args, device, options):
    """The entry ``step`` of the result: a dict of what is measured of one model, for JSON."""
    loss = first_losses(args, device)
    with as_user_error(f'--batch_size {args.batch_size} is too much for this GPU, for one of the two formulations',
                       torch.OutOfMemoryError), contextlib.ExitStack() as stack:
        both = {name: OwnProcess(name, args, options.threads) for name in FORMULATIONS}
        for process in both.values():
            stack.callback(process.close)
        memory = {name: process.ask('memory') for name, process in both.items()}
        seconds = {name: [] for name in both}
        for _ in range(options.rounds):
            for name, process in both.items():
                seconds[name].append(process.ask('seconds', options.steps))
        split = both['ours'].ask('split', options.steps * options.rounds)
    images = options.steps * args.batch_size
    rates = {name: images / median(rounds) for name, rounds in seconds.items()}
    flop, ceiling = flop_per_image(args), matmul_ceiling(device, args.amp)
    return {
        'model': args.model, 'input_size': args.input_size, 'batch_size': args.batch_size, 'device': device.type,
        'precision': {'ours': args.amp, 'textbook': textbook_amp(device)}, 'steps_a_round': options.steps,
        'images_per_s': rates, 'images_per_s_of_rounds': {k: [images / s for s in v] for k, v in seconds.items()},
        'ratio': rates['ours'] / rates['textbook'], 'split_ms_a_step': split,
        'peak_memory_bytes': memory, 'memory_ratio': memory['ours'] / memory['textbook'],
        'memory_of': 'tensors on the GPU' if device.type == 'cuda' else 'the process, PyTorch itself included',
        'flop_per_image': flop, 'flop_per_s': flop * rates['ours'], 'ceiling_flop_per_s': ceiling,
        'share_of_ceiling': flop * rates['ours'] / ceiling, 'first_step_loss': loss,
    }


def first_losses(args, device):
    """First losses of both formulations (at a learning rate of 0, as warm-up begins), and whether they agree to rounding.

    In fp32, whatever the run is in: in fewer bits the importance is rounded, and with it other patches may be drawn. With few
    images and nothing compiled, since it says nothing of speed.
    """
    args = argparse.Namespace(**{**vars(args), 'amp': 'fp32', 'batch_size': min(args.batch_size, 32), 'compile': False})
    with contextlib.redirect_stdout(io.StringIO()):
        a, b = Ours(args, device).run(1), Textbook(args, device, 'fp32').run(1)
    torch.cuda.empty_cache()  # of use to the processes that follow
    return {'ours': a, 'textbook': b, 'precision': 'fp32', 'agree': abs(a - b) <= 1e-5 * b}


class OwnProcess:
    """A formulation in a fresh process: memory is a process's own, and so is its set-up.

    Ours is set up as main_pretrain.py does it; the textbook's is as PyTorch makes it.
    """

    def __init__(self, name, args, threads):
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *question):
        """The answer to ('memory',), ('seconds', steps) or ('split', steps); see ``serve``."""
        try:
            self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise UserError('a process of the benchmark was ended from outside, most likely for want of memory: lower '
                            '--batch_size') from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.connection.close()
        self.process.join()


def serve(connection, name, args, threads):
    """Answer the questions of an OwnProcess until it is gone; what has gone wrong is an answer too."""
    formulation = None
    while True:
        try:
            what, *rest = connection.recv()
        except EOFError:
            return
        try:
            formulation = formulation or warmed_up(name, args, threads)
            connection.send(ANSWERS[what](formulation, *rest))
        except Exception as e:
            connection.send(e)


def warmed_up(name, args, threads):
    """A formulation in this process, after two steps."""
    torch.set_num_threads(threads)
    device = torch.device(args.device)
    with contextlib.redirect_stdout(io.StringIO()):
        if name == 'ours':
            compiled = 'off' if not args.compile else 'auto' if device.type == 'cuda' else 'on'
            start(argparse.Namespace(**{**vars(args), 'compile': compiled}), threads)
        formulation = FORMULATIONS[name](args, device)
    formulation.run(2)
    return formulation


def start(args, threads):
    """The torch.device of a run, after main_pretrain.py's set-up."""
    torch.set_num_threads(threads)
    return setup(args)


def peak_bytes(device):
    """This process's peak of memory: of PyTorch's tensors on CUDA, of all of it on the CPU."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage's ru_maxrss: Linux hands that of the parent on to the processes it starts.
        return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    except (OSError, TypeError):
        return round(float(peak_memory().split()[0]) * 2**30)


def alternate(work, rounds, device):
    """Seconds of each of the functions in the dict ``work``, called by turns: {name: [a number a round]}."""
    seconds = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            seconds[name].append(seconds_of(do, device=device))
    return seconds


def seconds_of(do, *args, device):
    synchronize(device)
    begin = time.perf_counter()
    do(*args)
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


class Clocked:
    """A module whose calls are told to ``lap``: under 'other' what came before one, under its name the call."""

    def __init__(self, name, module, lap):
        self.name, self.module, self.lap = name, module, lap

    def __getattr__(self, attribute):
        return getattr(self.module, attribute)

    def __call__(self, *args, **kwargs):
        self.lap('other')
        result = self.module(*args, **kwargs)
        self.lap(self.name)
        return result


def time_split(ours, steps):
    """Milliseconds a step of teacher, forward, backward, optimiser and the rest.

    The device is waited for after each, which a run does not do: together they take longer than a step.
    """
    seconds = dict.fromkeys(('teacher', 'forward', 'backward', 'optimiser', 'other'), 0.0)
    last = time.perf_counter()

    def lap(name):
        nonlocal last
        synchronize(ours.device)
        now = time.perf_counter()
        seconds[name] += now - last
        last = now

    hooks = [ours.optimizer.register_step_pre_hook(lambda *_: lap('backward')),
             ours.optimizer.register_step_post_hook(lambda *_: lap('optimiser'))]
    ours.run(steps, lambda name, module: Clocked(name, module, lap))
    for hook in hooks:
        hook.remove()
    return {name: 1000 * total / steps for name, total in seconds.items()}


ANSWERS = {'memory': lambda formulation: peak_bytes(formulation.device), 'split': time_split,
           'seconds': lambda formulation, steps: seconds_of(formulation.run, steps, device=formulation.device)}


def flop_per_image(args):
    """Operations of our step for an image in matrix products and convolutions, multiply and add counted apart.

    PyTorch counts them, on tensors without data, with attention taken apart into its two products.
    """
    visual = clip.load(args.clip_path, 'cpu')[0].visual.to('meta')
    with torch.device('meta'), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher = Teacher(visual, args.teacher_norm, args.average_targets)
        model = build_model(args, teacher.dim)
        images, noise = torch.empty(2, 3, args.input_size, args.input_size), torch.rand(2, model.patch_embed.num_patches)
        target = teacher(images)
        model(images, args.mask_ratio, target, patch_order(noise, target[1]), loss_only=True)[0].backward()
    return counter.get_total_flops() / 2


def matmul_ceiling(device, amp):
    """Operations a second of the best of 20 products of large square matrices in this precision."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=misc.AMP_DTYPES[amp] or torch.float32)
    return 2 * n**3 / min(alternate({'': lambda: a @ b}, 20, device)[''])
