"""Random command lines of the scripts and tools, drawn from their own parsers.

Values lie within the bounds, at their ends and beyond them.
"""

import argparse
import math

from tests.helpers import main_module


def files(names):
    """Return FILE: words for files that tests/stress/commands.py makes."""
    return [f'FILE:{name}' for name in names.split()]


# Flags for a run of a second or two.
SMALL = '--input_size 32 --batch_size 4 --num_workers 0 --data_path FILE:data'
ONE_EPOCH = '--epochs 1 --warmup_epochs 0 --output_dir out --log_dir out --print_freq 2'
CLASSIFIER = f'--model vit_tiny_patch8 --nb_classes 3 --finetune FILE:pretrained.pth {SMALL}'
MILAN = f'--model mae_vit_tiny_patch8 --clip_path FILE:clip.pt {SMALL}'
ARCHIVES = '--train_tar FILE:train.tar --val_tar FILE:val.tar --val_labels FILE:labels.txt'

# program: (weight, its flags, words after them)
PROGRAMS = {
    'main_pretrain.py': (30, f'{MILAN} {ONE_EPOCH}', ''),
    'main_finetune.py': (28, f'{CLASSIFIER} {ONE_EPOCH}', ''),
    'main_linprobe.py': (14, f'{CLASSIFIER} {ONE_EPOCH}', ''),
    'tools.knn': (4, CLASSIFIER, ''),
    'tools.segment': (4, f'{CLASSIFIER} --data_path FILE:pixels --epochs 1', ''),
    'tools.visualize': (5, '--output_dir out FILE:milan.pth FILE:a.png', ''),
    'tools.export': (5, 'FILE:pretrained.pth --format timm --output out.pth', ''),
    'tools.prepare_imagenet': (5, f'{ARCHIVES} --counts 3 9 6 --output_dir out', ''),
    'tools.slurm': (3, 'pretrain --dry_run', '-- --data_path FILE:data --output_dir out'),
    'tools.download': (2, '--output_dir out', ''),
    'tools.benchmark': (1, 'nothing', ''),
    'tools.ablation': (1, '--data_path FILE:data --report', ''),  # else it could download
    'tools.demo.run': (1, '', '--output_dir FILE:text.pth'),
}
PROGRAMS = {
    name: (weight, flags.split(), rest.split()) for name, (weight, flags, rest) in PROGRAMS.items()
}
# Never dropped, because the command would take long without them.
KEPT = '--model --input_size --batch_size --epochs --quick --dry_run --report'.split()

# Good and bad values of flags that name something, and of flags that could make a run long.
CHECKPOINTS = (
    files('pretrained.pth milan.pth plain.safetensors older.pth'),
    files(
        'classifier.pth probe.pth cut.pth text.pth empty.pth foreign.pth clip.pt folder pipe a.png'
        ' nan.pth strange.pth'
    ),
)
LONG = ['n' * 300, ('x' * 200 + '/') * 30]
FOLDERS = (
    ['out', 'new/deep/er', 'ü n', 'FILE:folder'],
    files('text.pth text.pth/x')
    + '/proc/x /sys/x /dev/null /dev/null/x ..'.split()
    + ['', '\n', *LONG],
)
OUTPUTS = '/dev/full /dev/null/x no/folder/x FILE:folder .. /proc/self/mem'.split() + LONG[:1]
VALUES = {
    'input_size': ('32 16 40 64 8'.split(), '1 4 33 0 4097'.split()),
    'epochs': (['1', '2'], ['0', '-1', 'x', '1.5', '']),
    'batch_size': ('4 2 3 6 1'.split(), '0 10000000000 -4 x'.split()),
    'num_workers': ('0 1 2'.split(), '-1 x'.split()),
    'recount': ('1 2 5'.split(), '0 x'.split()),
    'nb_classes': (['3'], '2 1 4 0 100000'.split()),
    'average_targets': ('1 2'.split(), '3 0 1000000000'.split()),
    'vis_every': ('0 1 2'.split(), ['-1']),
    'compile': ('off auto'.split(), ['x']),  # 'on' takes minutes
    'device': (
        ['cpu'],
        'cuda cuda:1 mps meta xla cpu:0 cpu:7 gpu cuda:x : hpu privateuseone'.split(),
    ),
    'model': (['TINY'], 'vit_small_patch16 mae_vit_small_patch16'.split()),
    'data_path': (
        ['FILE:data'],
        files('folder text.pth pipe train.tar damaged no_val other_val blank pixels')
        + ['/nowhere', '', '/dev', '\udcff', 'x\n'],
    ),
    'dataset': (
        [''],
        'tar folder torch/cifar10 torch/x torch/ torch/mnist torch/imagenet torch/folder hfds/x'
        ' hfds/ wds/x tfds/x / TAR torch/qmnist torch/places365 torch/inaturalist x'.split(),
    ),
    'train_split': (['train'], ['train.tar', '', 'x', '..', 'train[:1%]']),
    'val_split': (['validation'], ['val.tar', '', 'x']),
    'clip_path': (
        files('clip.pt clip.pth.tar'),
        [*CHECKPOINTS[1], *files('pretrained.pth resnet.pth'), 'ViT-B/99', ''],
    ),
    'teacher': (
        [''],
        'test_vit test_vit.r160_in1k vit_tiny_patch16_224 vit_base_patch16_clip_224.x ViT-B/99 .'
        ' eva02_tiny_patch14_224 resnet50 FILE:clip.pt'.split()
        + LONG[:1],
    ),
    'teacher_path': ([''], [*CHECKPOINTS[0], *CHECKPOINTS[1]]),
    'finetune': CHECKPOINTS,
    'checkpoint': CHECKPOINTS,
    'resume': (
        ['', 'auto', *files('pretrained.pth classifier.pth probe.pth')],
        [*CHECKPOINTS[1], 'FILE:milan.pth', '/x'],
    ),
    'output_dir': FOLDERS,
    'log_dir': FOLDERS,
    'job_dir': FOLDERS,
    'json': (['out.json', 'ü.json'], OUTPUTS),
    'output': (
        'out.pth out.safetensors out.bin'.split(),
        [*OUTPUTS, 'FILE:pretrained.pth', 'x.txt', ''],
    ),
    'images': (files('a.png gray.jpg one.png'), files('cut.png pipe folder text.pth nan.pth')),
    'text': (['a dog', ''], ['dog ' * 2000, '\udcff', '\x1b']),
    'vis_text': (['a dog', 'grass/x'], ['', 'dog ' * 2000, '\udcff', '\x1b']),
    'aa': (
        ['']
        + 'rand-m9-mstd0.5-inc1 original v0 3a augmix-m3-w2 rand-m0 rand-n1 rand'.split()
        + ['rand-mstdinf-m3'],
        'rand-mx rand-m-5 rand-n-1 rand-n0 rand-m1e9 rand-w9 augmix-w0 augmix-d-3 augmix-mx x -'
        ' rand-m9- original-mstdx rand-mstd-1 rand-incx rand-m99999999999999999999'.split(),
    ),
    'train_tar': (
        ['FILE:train.tar'],
        files('val.tar text.pth pipe folder cut.tar') + ['/x', '/dev/zero', ''],
    ),
    'val_tar': (['FILE:val.tar'], [*files('train.tar text.pth pipe cut.tar'), '']),
    'devkit': (['FILE:devkit.tar.gz'], [*files('train.tar text.pth pipe'), '/x', '/dev/zero']),
    'val_labels': (['FILE:labels.txt'], [*files('text.pth pipe a.png'), '/x', '/dev/zero']),
    'counts': ('3 9 6'.split(), '-1 x 0'.split()),
    'names': ([], ['x', 'milan_vit_base', 'openmmlab_milan_vit_base', '']),
    'what': ([], ['step', 'x', '']),
    'world_size': ('1 7'.split(), 'x 0'.split()),
    'local_rank': ('-1 5'.split(), ['x']),
    'dist_url': (['env://'], ['tcp://x', 'x']),
}
ANY = "x - -1 0 é中 nan .. %s%n {} \udcff ' /dev/null".split() + ['', ' ', '\n', 'a' * 5000]
NUMBERS = 'nan inf -inf x 1e400 0x10 1_0 ٣ 1e3 -- 1,5 -0 1e-400 .'.split()
NUMBERS += ['', ' 5 ', '9' * 5000]


def number(rng, kind, low, high):
    """Return two texts: a number within the bounds, and one at their ends, beyond or malformed.

    kind: 'int' or 'float'. low, high: the bounds, None if there is none.
    """
    bottom = -5 if low is None else low
    top = bottom + rng.choice([1, 3, 50, 10**6, 10**12]) if high is None else high
    ends = [bottom, top, bottom - 1, top + 1, 2**31, 2**63, 2**64, 10**30]
    if kind == 'int':
        inside = rng.randint(bottom, int(top))
    else:
        inside = rng.choice([rng.uniform(bottom, top), bottom + 10 ** -rng.uniform(0, 9)])
        ends += [math.nextafter(bottom, -math.inf), math.nextafter(top, math.inf)]
        ends += [0.0, 1e-300, 1e300]
    return str(inside), rng.choice([str(rng.choice(ends)), rng.choice(NUMBERS)])


def value(rng, action, program):
    """Return a value of the flag or argument ``action``, a good one in 4 of 5 cases."""
    good = rng.random() < 0.8
    if action.dest in VALUES:
        word = rng.choice(VALUES[action.dest][not good] or ANY)
        return ('mae_' * ('pretrain' in program) + 'vit_tiny_patch8') if word == 'TINY' else word
    if action.choices:
        return rng.choice(list(action.choices) if good else ANY)
    if action.type is not None:
        bounds = getattr(action.type, 'range', (None, None))
        return number(rng, action.type.__name__, *bounds)[not good]
    return rng.choice(ANY)


def values(rng, action, program):
    if action.nargs == 0:
        return []
    counts = {None: 1, '?': 1, '+': rng.choice([1, 1, 2, 3]), '*': rng.choice([0, 1, 2])}
    count = counts.get(action.nargs, action.nargs)
    count = count if rng.random() < 0.97 else rng.choice([0, count + 1])
    return [value(rng, action, program) for _ in range(count)]


def get_parser(program):
    return main_module(program.removesuffix('.py')).get_args_parser()


def command_line(rng):
    """Return (program, its arguments)."""
    program = rng.choices(list(PROGRAMS), [weight for weight, _, _ in PROGRAMS.values()])[0]
    line = list(PROGRAMS[program][1])
    if program == 'main_pretrain.py' and rng.random() < 0.4:
        line += ['--use_clip', '--change_decoder', '--attn_mask']
    if rng.random() < 0.06 and len(line) > 1:  # drop a word
        droppable = [i for i, word in enumerate(line) if not {word, line[i - 1]} & set(KEPT)]
        del line[rng.choice(droppable or [0])]
    actions = [
        action
        for action in get_parser(program)._actions
        if not isinstance(action, argparse._HelpAction) or rng.random() < 0.2
    ]
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5])):
        action = rng.choice(actions)
        given = values(rng, action, program)
        if not action.option_strings:
            line = [word for word in line if word not in CHECKPOINTS[0]] + given
            continue
        flag = rng.choice(action.option_strings)
        if flag.startswith('--') and rng.random() < 0.03:
            flag = flag[: rng.randrange(3, len(flag) + 1)]
        line += [f'{flag}={given[0]}'] if len(given) == 1 and rng.random() < 0.4 else [flag, *given]
    if rng.random() < 0.02:
        line.insert(rng.randrange(len(line) + 1), rng.choice(['--x', 'x', '--', '-x', '--=', '@x']))
    return program, line + PROGRAMS[program][2]
