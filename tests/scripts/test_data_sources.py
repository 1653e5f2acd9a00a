"""--dataset in the scripts: tar files and WebDataset shards, from pretraining to evaluation."""

import tarfile

import pytest

from tests.helpers import (
    checkpoint,
    finetune,
    log_records,
    ok,
    one_error_line,
    pretrain,
    same,
    torchrun,
)

TINY = '--input_size 32 --batch_size 4 --epochs 1 --num_workers 1 --log_dir'.split() + ['']
CLASSIFIER = ['--model', 'vit_tiny_patch8', '--nb_classes', 3, '--dist_eval', *TINY]

pytestmark = pytest.mark.slow


def weights(path):
    return checkpoint(path)['model']


def pretrain_and_finetune(out, *flags):
    """Pretrain and fine-tune for an epoch on 24 training and 13 validation images."""
    ok(pretrain('--model', 'mae_vit_tiny_patch8', *TINY, '--output_dir', out, *flags))
    flags = ['--output_dir', out, '--finetune', out / 'checkpoint-last.pth', *flags]
    stdout = ok(finetune(*CLASSIFIER, *flags))
    assert '24 training images, 6 steps per epoch; 13 validation images' in stdout


def test_tar_files(labelled_images, tmp_path):
    """Training equals that with the same images in folders."""
    for split in ('train', 'val'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            for path in sorted((labelled_images / split).rglob('*.png')):
                tar.add(path, f'{path.parent.name}/{path.name}')
    flags = ['--dataset', 'tar', '--data_path', tmp_path]
    flags += ['--train_split', 'train.tar', '--val_split', 'val.tar']
    pretrain_and_finetune(tmp_path / 'out', *flags)
    for name, source in (('folder', ['--data_path', labelled_images]), ('tar', flags)):
        ok(finetune(*CLASSIFIER, '--output_dir', tmp_path / name, *source))
    a, b = (weights(tmp_path / name / 'checkpoint-0.pth') for name in ('folder', 'tar'))
    assert same(a, b)
    wrong = finetune(*CLASSIFIER, *flags, '--output_dir', '', '--nb_classes', 4)
    one_error_line(wrong, '--nb_classes 4', '--nb_classes 3')


def test_webdataset(shards, tmp_path):
    """A resumed run equals an uninterrupted one; accuracy is the same on 1 and 2 processes."""
    pytest.importorskip('webdataset')
    source = ['--dataset', 'wds/images', '--data_path', shards]
    pretrain_and_finetune(tmp_path / 'out', *source)
    flags = [*CLASSIFIER, *source, '--epochs', 3, '--blr', 0.01]
    first = tmp_path / 'whole' / 'checkpoint-0.pth'
    for name, extra in (('whole', []), ('resumed', ['--resume', first]), ('other', ['--seed', 1])):
        ok(finetune(*flags, '--output_dir', tmp_path / name, *extra))
    whole, resumed, other = (
        weights(tmp_path / name / 'checkpoint-2.pth') for name in ('whole', 'resumed', 'other')
    )
    assert same(whole, resumed) and not same(whole, other)

    # on 2 processes, which 13 images do not divide evenly
    out = tmp_path / 'two'
    flags += ['--amp', 'fp32', '--batch_size', 2, '--epochs', 1]
    ok(finetune(*flags, '--output_dir', out, launcher=torchrun(2)))
    (record,) = log_records(out)
    flags += ['--output_dir', '', '--eval', '--resume', out / 'checkpoint-0.pth']
    assert f'13 test images: {record["test_acc1"]:.2f}%' in ok(finetune(*flags))


def test_missing_data(tmp_path):
    flags = ['--dataset', 'torch/mnist', '--data_path', tmp_path, '--output_dir', '']
    result = pretrain('--model', 'mae_vit_tiny_patch8', *TINY, *flags)
    one_error_line(result, '--dataset torch/mnist', tmp_path)
