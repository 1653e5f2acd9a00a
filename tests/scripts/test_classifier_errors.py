"""Wrong use of main_finetune.py and main_linprobe.py ends with one error line."""

import argparse

import pytest
import torch

import models_vit
from tests.helpers import checkpoint, draw_photo, finetune, linprobe, one_error_line

SCRIPTS = {'finetune': finetune, 'linprobe': linprobe}

# Case: (script, flags, words of the error). A name in upper case is a file of wrong_files.
WRONG = {
    'no checkpoint to evaluate': ('finetune', ['--eval', '--finetune', ''], '--eval'),
    'evaluate without a head': ('finetune', ['--eval'], 'head'),
    'evaluate with another pooling': (
        'finetune',
        ['--eval', '--resume', 'CLASSIFIER', '--global_pool'],
        'CLASSIFIER',
        'fc_norm',
    ),
    'two poolings': (
        'finetune',
        ['--global_pool', '--global_pool_wcls'],
        '--global_pool',
        '--global_pool_wcls',
    ),
    'odd batch with mixup': ('finetune', ['--mixup', 0.8, '--batch_size', 3], '--batch_size 3'),
    'unknown policy': ('finetune', ['--aa', 'forest'], '--aa forest'),
    'equal minmax': ('finetune', ['--cutmix_minmax', 0.5, 0.5], '--cutmix_minmax'),
    'minmax in the wrong order': ('finetune', ['--cutmix_minmax', 0.8, 0.2], '--cutmix_minmax'),
    'batch norm of one image': ('linprobe', ['--batch_size', 1], '--batch_size 1'),
    'incomplete encoder': ('linprobe', ['--finetune', 'GAP'], 'GAP', 'blocks'),
    'teacher as a checkpoint': ('finetune', ['--finetune', 'TEACHER'], '--finetune', 'TEACHER'),
    'unknown data set': ('finetune', ['--dataset', 'cifar10'], '--dataset cifar10', 'torch/'),
    'data set without a path': (
        'finetune',
        ['--dataset', 'torch/cifar10', '--data_path', ''],
        '--data_path',
    ),
    'checkpoint absent': ('finetune', ['--finetune', 'nowhere.pth'], 'nowhere.pth'),
    'checkpoint absent, nothing to resume': (
        'finetune',
        ['--finetune', 'nowhere.pth', '--resume', 'auto', '--data_path', 'missing'],
        'nowhere.pth',
    ),
    'nothing to evaluate in the folder': (
        'linprobe',
        ['--eval', '--finetune', '', '--resume', 'auto'],
        '--eval',
    ),
    'checkpoint truncated': ('linprobe', ['--finetune', 'TRUNCATED'], 'TRUNCATED'),
    'checkpoint of another width': (
        'finetune',
        ['--model', 'vit_small_patch16'],
        '--model vit_small_patch16',
    ),
    'nothing of the encoder': ('linprobe', ['--finetune', 'STRANGER'], 'STRANGER'),
    'code in the checkpoint': ('linprobe', ['--finetune', 'FOREIGN'], 'FOREIGN', 'print'),
    'resume of another head': (
        'finetune',
        ['--resume', 'CLASSIFIER', '--nb_classes', 4, '--data_path', 'FOUR'],
        'CLASSIFIER',
        '[3, 192]',
        '[4, 192]',
    ),
    'resume of the other script': ('linprobe', ['--resume', 'CLASSIFIER'], 'CLASSIFIER'),
    'number of classes': ('finetune', ['--nb_classes', 1000], '--nb_classes 1000', '3 classes'),
    'number of classes, probing': ('linprobe', ['--nb_classes', 2], '--nb_classes 2', '3 classes'),
    'other classes in val': ('finetune', ['--data_path', 'OTHER_VAL'], 'another'),
    'no val': ('finetune', ['--data_path', 'NO_VAL'], '--data_path', 'val/'),
    'empty val': ('linprobe', ['--data_path', 'EMPTY_VAL'], 'EMPTY_VAL', 'no images'),
    'no GPU': ('linprobe', ['--device', 'cuda'], '--device cuda'),
    'image size': ('finetune', ['--input_size', 36], '--input_size 36'),
    'not finite': (
        'finetune',
        ['--lr', '1e9', '--warmup_epochs', 0, '--max_skipped_steps', 1],
        '--max_skipped_steps 1',
    ),
    'batch too large': ('finetune', ['--batch_size', 26], 'effective batch'),
    'drop path': ('finetune', ['--drop_path', 1], '--drop_path'),
    'unknown model': ('linprobe', ['--model', 'vit_giant'], '--model', 'vit_base_patch16'),
    'output is a file': ('finetune', ['--output_dir', __file__], '--output_dir', __file__),
}


class Foreign:
    """An object whose unpickling calls print."""

    def __reduce__(self):
        return print, ('this must never be printed',)


@pytest.fixture(scope='module')
def wrong_files(labelled_images, tiny_clip, pretrained, tmp_path_factory):
    root = tmp_path_factory.mktemp('wrong')
    (root / 'TEACHER').symlink_to(tiny_clip)
    encoder = checkpoint(pretrained)['model']
    gap = {k: v for k, v in encoder.items() if not k.startswith('blocks.3.')}
    torch.save(gap, root / 'GAP')
    model = models_vit.vit_tiny_patch8(img_size=32, num_classes=3).state_dict()
    args = argparse.Namespace(model='vit_tiny_patch8')
    torch.save({'model': model, 'args': args}, root / 'CLASSIFIER')
    (root / 'TRUNCATED').write_bytes((root / 'CLASSIFIER').read_bytes()[:-3000])
    torch.save({'model': model, 'args': Foreign()}, root / 'FOREIGN')
    stranger = {'layer1.weight': torch.zeros(3), 'head.weight': torch.zeros(3, 192)}
    torch.save({'model': stranger}, root / 'STRANGER')

    names = ['class0', 'class1', 'class2']
    classes = {'OTHER_VAL': [*names[:2], 'another'], 'NO_VAL': [], 'EMPTY_VAL': names}
    for name in classes:
        (root / name).mkdir()
        (root / name / 'train').symlink_to(labelled_images / 'train')
        for c in classes[name]:
            (root / name / 'val' / c).mkdir(parents=True)
    for c in classes['OTHER_VAL']:
        draw_photo(root / 'OTHER_VAL' / 'val' / c / '0.png', 0, (32, 32))
    for split in ('train', 'val'):
        for c in range(4):
            draw_photo(root / 'FOUR' / split / f'class{c}' / '0.png', c, (32, 32))
    return root


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, classifier_flags, wrong_files, tmp_path):
    """One error line that names the flag or file, and files stay as they were."""
    script, flags, *words = WRONG[case]
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'checkpoint-0.pth').write_bytes(b'precious')
    paths = {p.name: p for p in wrong_files.iterdir()}
    flags = [paths.get(f, f) for f in flags]
    result = SCRIPTS[script](*classifier_flags, '--batch_size', 4, *flags)
    one_error_line(result, *words)
    assert 'never be printed' not in result.stdout
    assert (out / 'checkpoint-0.pth').read_bytes() == b'precious'
    if case != 'not finite':  # that one has begun to train
        assert [p.name for p in out.iterdir()] == ['checkpoint-0.pth']


@pytest.mark.slow
def test_error_line_of_a_real_process(classifier_flags):
    result = finetune(*classifier_flags, '--nb_classes', 5, env={})
    one_error_line(result, '--nb_classes 5', '3 classes')
