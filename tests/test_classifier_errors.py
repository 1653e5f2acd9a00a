"""Wrong use of main_finetune.py and main_linprobe.py."""

import argparse

import pytest
import torch
from conftest import draw_photo, finetune, linprobe

import models_vit
from util.checkpoint import load

SCRIPTS = {'finetune': finetune, 'linprobe': linprobe}

# what is asked for: (script, flags, what the one line must say)
WRONG = {
    'no checkpoint to evaluate': ('finetune', ['--eval', '--finetune', ''], '--eval needs a checkpoint'),
    'evaluate without a head': ('finetune', ['--eval'], 'has no head (2)'),
    'evaluate with another pooling': ('finetune', ['--eval', '--resume', 'CLASSIFIER', '--global_pool'], 'fc_norm'),
    'two poolings': ('finetune', ['--global_pool', '--global_pool_wcls'], 'give one of them'),
    'odd batch with mixup': ('finetune', ['--mixup', 0.8, '--batch_size', 3], 'give an even number'),
    'unknown policy': ('finetune', ['--aa', 'forest'], '--aa forest is no policy'),
    'minmax alike': ('finetune', ['--cutmix_minmax', 0.5, 0.5], '--cutmix_minmax'),
    'batch norm of one': ('linprobe', ['--batch_size', 1], 'at least 2 images'),
    'a gap in the encoder': ('linprobe', ['--finetune', 'GAP'], 'has no blocks (12); a frozen encoder has to be whole'),
    'a teacher as a checkpoint': ('finetune', ['--finetune', 'TEACHER'], 'is a TorchScript archive: a teacher for --clip_path'),
    'unknown data set': ('finetune', ['--dataset', 'cifar10'], '--dataset cifar10: take tar, folder, torch/NAME'),
    'data set without a place': ('finetune', ['--dataset', 'torch/cifar10', '--data_path', ''], '--data_path is missing'),
    'minmax': ('finetune', ['--cutmix_minmax', 0.8, 0.2], '--cutmix_minmax'),
    'checkpoint absent': ('finetune', ['--finetune', 'nowhere.pth'], 'nowhere.pth does not exist'),
    'checkpoint truncated': ('linprobe', ['--finetune', 'TRUNCATED'], 'cannot be read'),
    'checkpoint of another width': ('finetune', ['--model', 'vit_small_patch16'], 'does not fit --model vit_small_patch16'),
    'nothing of the encoder': ('linprobe', ['--finetune', 'STRANGER'], 'nothing of the encoder'),
    'code in the checkpoint': ('linprobe', ['--finetune', 'FOREIGN'], 'print, and could run code'),
    'resume of another head': ('finetune', ['--resume', 'CLASSIFIER', '--nb_classes', 4, '--data_path', 'FOUR'],
                               'another model: head.weight is [3, 192] in it and [4, 192] here'),
    'resume of the other script': ('linprobe', ['--resume', 'CLASSIFIER'], 'another model'),
    'classes': ('finetune', ['--nb_classes', 1000], 'has 3 classes; give --nb_classes 3'),
    'classes, probing': ('linprobe', ['--nb_classes', 2], 'has 3 classes; give --nb_classes 3'),
    'classes of val': ('finetune', ['--data_path', 'OTHER_VAL'], 'different classes; another is in one of them only'),
    'no val': ('finetune', ['--data_path', 'NO_VAL'], 'has no folder val/'),
    'empty val': ('linprobe', ['--data_path', 'EMPTY_VAL'], 'no images in the class folders of'),
    'gpu by name': ('linprobe', ['--device', 'cuda'], '--device cuda'),
    'size': ('finetune', ['--input_size', 36], 'not a multiple of the patch size'),
    'not finite': ('finetune', ['--lr', '1e9', '--warmup_epochs', 0], 'gradients that are'),
    'batch too large': ('finetune', ['--batch_size', 26], 'fewer than one effective batch'),
    'drop path': ('finetune', ['--drop_path', 1], '--drop_path'),
    'unknown model': ('linprobe', ['--model', 'vit_giant'], 'vit_base_patch16'),
    'output is a file': ('finetune', ['--output_dir', __file__], '--output_dir'),
}


class Foreign:
    def __reduce__(self):
        return print, ('this must never be printed',)


@pytest.fixture(scope='module')
def wrong_files(labelled_images, tiny_clip, pretrained, tmp_path_factory):
    root = tmp_path_factory.mktemp('wrong')
    (root / 'TEACHER').symlink_to(tiny_clip)
    torch.save({k: v for k, v in load(pretrained)['model'].items() if not k.startswith('blocks.3.')}, root / 'GAP')
    model = models_vit.vit_tiny_patch8(img_size=32, num_classes=3).state_dict()
    torch.save({'model': model, 'args': argparse.Namespace(model='vit_tiny_patch8')}, root / 'CLASSIFIER')
    torch.save({'model': {'layer1.weight': torch.zeros(3), 'head.weight': torch.zeros(3, 192)}}, root / 'STRANGER')
    (root / 'TRUNCATED').write_bytes((root / 'CLASSIFIER').read_bytes()[:-3000])
    torch.save({'model': model, 'args': Foreign()}, root / 'FOREIGN')
    names = ['class0', 'class1', 'class2']
    for name, classes in (('OTHER_VAL', [*names[:2], 'another']), ('NO_VAL', []), ('EMPTY_VAL', names)):
        (root / name).mkdir()
        (root / name / 'train').symlink_to(labelled_images / 'train')
        for c in classes:
            (root / name / 'val' / c).mkdir(parents=True)
            if name == 'OTHER_VAL':
                draw_photo(root / name / 'val' / c / '0.png', 0, (32, 32))
    for split in ('train', 'val'):
        for c in range(4):
            draw_photo(root / 'FOUR' / split / f'class{c}' / '0.png', c, (32, 32))
    return root


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, classifier_flags, wrong_files, tmp_path):
    """One line that names the flag or file, no traceback, status not 0, and nothing touched."""
    script, flags, message = WRONG[case]
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'checkpoint-0.pth').write_bytes(b'precious')
    paths = {p.name: str(p) for p in wrong_files.iterdir()}
    result = SCRIPTS[script](*classifier_flags, '--batch_size', 4, *[paths.get(str(f), f) for f in flags])
    assert result.returncode in (1, 2)
    errors = [line for line in result.stderr.splitlines() if not line.startswith(('No CUDA GPU', 'Step left out', 'Not saved'))]
    assert len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], result.stderr
    assert 'never be printed' not in result.stdout
    assert (out / 'checkpoint-0.pth').read_bytes() == b'precious'
    if case != 'not finite':
        assert [p.name for p in out.iterdir()] == ['checkpoint-0.pth']


def test_wrong_use_of_a_real_process(classifier_flags):
    result = finetune(*classifier_flags, '--nb_classes', 5, env={'OMP_NUM_THREADS': '1'})
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert [line for line in result.stderr.splitlines() if 'No CUDA' not in line] == [
        f'error: --nb_classes 5, but {classifier_flags[11]} has 3 classes; give --nb_classes 3']
