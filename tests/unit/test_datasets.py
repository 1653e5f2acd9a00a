"""Image folders, transforms, and checks of the data flags."""

import shutil
from functools import partial

import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize as torchvision_normalize
from torchvision.transforms.functional import pil_to_tensor

from util.data.image_file import ImageFile
from util.datasets import (
    DataConfig,
    SeededDataset,
    build_dataset,
    build_linprobe_transform,
    build_pretrain_transform,
    build_transform,
    check_classes,
    check_data_flags,
    image_folder,
    normalize,
)
from util.errors import UserError

TRANSFORM = build_pretrain_transform(32)


def test_items(labelled_images):
    data = DataConfig(labelled_images)
    for is_train, split, count in ((True, 'train', 24), (False, 'val', 13)):
        dataset = build_dataset(is_train, data, TRANSFORM)
        assert len(dataset) == count
        assert dataset.source.classes == ['class0', 'class1', 'class2']
        image, label, i, errors = dataset[0, count - 1]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        assert (label, i, errors) == (2, count - 1, {})
        assert dataset.source.name(0) == str(labelled_images / split / 'class0' / '00.png')


def test_augmentation_depends_only_on_seed_epoch_and_index(small_images):
    dataset = build_dataset(True, DataConfig(small_images, seed=3), TRANSFORM)
    first = dataset[2, 5][0]
    dataset[0, 1], torch.rand(7)
    assert torch.equal(first, dataset[2, 5][0])
    assert torch.equal(dataset[0, 5][0], dataset[5][0])
    other_seed = SeededDataset(dataset.source, TRANSFORM, seed=4)
    for other in (dataset[3, 5][0], other_seed[2, 5][0]):
        assert not torch.equal(first, other)


@pytest.fixture
def damaged(small_images, tmp_path):
    """small_images with images 1 and 2 of 24 damaged."""
    shutil.copytree(small_images, tmp_path / 'damaged')
    for name in ('03.png', '06.png'):
        (tmp_path / 'damaged' / 'train' / 'class0' / name).write_bytes(b'not an image')
    return tmp_path / 'damaged'


def test_unreadable_images_are_replaced_by_the_next(damaged, small_images):
    dataset = build_dataset(True, DataConfig(damaged), TRANSFORM)
    intact = build_dataset(True, DataConfig(small_images), TRANSFORM)
    image, label, i, errors = dataset[4, 1]
    names = [dataset.source.name(k) for k in (1, 2)]
    assert (label, i, list(errors)) == (0, 1, names)
    assert all(e.startswith('UnidentifiedImageError: ') for e in errors.values())
    assert list(dataset[4, 2][3]) == names[1:]
    for k in (0, 3, 23):  # the others are as without damaged images
        assert torch.equal(dataset[4, k][0], intact[4, k][0]) and not dataset[4, k][3]


def test_unreadable_images_are_not_replaced_in_evaluation(damaged):
    dataset = build_dataset(True, DataConfig(damaged), TRANSFORM)
    image, _, i, errors = SeededDataset(dataset.source, TRANSFORM, replace=False)[1]
    assert (i, list(errors)) == (1, [dataset.source.name(1)]) and not image.any()


def test_limit_of_unreadable_images_in_a_row(damaged):
    dataset = build_dataset(True, DataConfig(damaged, max_bad_images=1), TRANSFORM)
    image, _, i, errors = dataset[1]
    assert i == 1 and len(errors) == 2 and not image.any()
    for path in damaged.rglob('*.png'):
        path.write_bytes(b'')
    assert len(build_dataset(True, DataConfig(damaged), TRANSFORM)[0][3]) == 24


def test_unreadable_samples_of_a_custom_source():
    """Exceptions of the source and of decoding are reported; those of the transform are bugs."""

    class Source(list):
        classes = None

        def name(self, i):
            return f'number {i}'

        def __getitem__(self, i):
            return 1 / super().__getitem__(i), Image.new('RGB', (9, 9))

    errors = SeededDataset(Source([0]), TRANSFORM)[0][3]
    assert errors == {'number 0': 'ZeroDivisionError: division by zero'}
    with pytest.raises(ZeroDivisionError):
        SeededDataset([(Image.new('RGB', (9, 9)), 0)], lambda image: 1 / 0)[0]


@pytest.mark.parametrize('path, words', [('', ['is missing']), (None, ['is missing'])])
def test_missing_data_path(path, words):
    for dataset in ('', 'tar', 'torch/mnist', 'wds/x'):
        with pytest.raises(UserError) as error:
            check_data_flags(path, dataset)
        assert all(word in str(error.value) for word in ['--data_path', *words, dataset])
    check_data_flags(path, 'hfds/x')
    check_data_flags('anywhere')


@pytest.mark.parametrize('name', ['imagenet', 'torch', 'tar/x', 'foo/bar', '/'])
def test_malformed_dataset_name(name):
    with pytest.raises(UserError, match=f'^--dataset {name}: '):
        check_data_flags('anywhere', name)


def test_image_folder(tmp_path):
    (tmp_path / 'train').mkdir()
    assert image_folder(str(tmp_path), 'train') == str(tmp_path / 'train')
    for path, split in ((tmp_path, 'val'), (tmp_path / 'missing', 'train')):
        with pytest.raises(UserError, match=f'--data_path {path} .*{split}/'):
            image_folder(str(path), split)
    with pytest.raises(UserError, match='--data_path'):
        image_folder('', 'train')


def test_empty_folders(tmp_path, small_images, capsys):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'notes.txt').touch()
    for name in ('a', 'b'):
        with pytest.raises(UserError, match=f'{tmp_path}/train'):
            build_dataset(True, DataConfig(tmp_path), TRANSFORM)
        (tmp_path / 'train' / name).mkdir()
    capsys.readouterr()
    shutil.copy(small_images / 'train' / 'class0' / '00.png', tmp_path / 'train' / 'a')
    assert len(build_dataset(True, DataConfig(tmp_path), TRANSFORM)) == 1
    assert f'{tmp_path}/train/b' in capsys.readouterr().out


def test_check_classes(labelled_images, tmp_path):
    data = DataConfig(labelled_images)
    train, val = (build_dataset(is_train, data, TRANSFORM) for is_train in (True, False))
    check_classes(labelled_images, 3, train, val)
    with pytest.raises(UserError, match='--nb_classes 5.*--nb_classes 3'):
        check_classes(labelled_images, 5, val)
    shutil.copytree(labelled_images, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / 'other').mkdir()
    other = build_dataset(False, DataConfig(tmp_path / 'data'), TRANSFORM)
    with pytest.raises(UserError, match=f'--data_path {tmp_path}/data: .*other'):
        check_classes(tmp_path / 'data', 3, train, other)
    other.source.classes = None  # unknown classes are not checked
    check_classes(tmp_path / 'data', 3, train, other)


# ---- transforms ----


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last)
    expected = torchvision_normalize(images / 255, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    x = normalize(images)
    assert torch.equal(x, expected) and x.is_contiguous()
    assert normalize(x) is x


@pytest.mark.parametrize(
    'build, input_size, resize',
    [
        (build_transform, 32, 36),
        (build_transform, 224, 256),
        (build_transform, 384, 384),
        (build_linprobe_transform, 224, 256),
        (build_linprobe_transform, 384, 438),
    ],
)
def test_evaluation_resizes_and_crops_the_center(build, input_size, resize):
    pixels = torch.randint(0, 256, (3, 300, 500), dtype=torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    ours = build(False, input_size)(ImageFile(image))
    width = int(500 * resize / 300)
    scaled = pil_to_tensor(image.resize((width, resize), Image.BICUBIC))
    top, left = round((resize - input_size) / 2), round((width - input_size) / 2)
    assert torch.equal(ours, scaled[:, top : top + input_size, left : left + input_size])


def test_training_transforms():
    image = ImageFile(Image.new('RGB', (60, 40), (255, 0, 0)))
    for transform in (build_pretrain_transform(24), build_linprobe_transform(True, 24)):
        x = transform(image)
        assert x.shape == (3, 24, 24) and x.dtype == torch.uint8
    finetuning = build_transform(True, 24)
    assert 'RandAugment' in str(finetuning)
    assert finetuning(image).shape == (3, 24, 24)
    plain = build_transform(True, 24, aa='', reprob=0, color_jitter=None)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert torch.allclose(plain(image), normalize(red)[0].expand(3, 24, 24), atol=1e-6)
    erasing = partial(build_transform, True, 24, aa='')
    assert (erasing(reprob=1.0, remode='const')(image) == 0).all(dim=0).any()


def test_unknown_augmentation_policy():
    with pytest.raises(UserError, match='^--aa forest: '):
        build_transform(True, 32, aa='forest')
