"""util/panels.py: rendering of masks, features, predictions and text maps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
from models_milan import MODELS
from models_teacher import Teacher
from tests.golden.deterministic import load_deterministic
from tests.helpers import TINY_CLIP, draw_photo
from util import panels
from util.data.image_file import ImageFile
from util.datasets import (
    DataConfig,
    build_dataset,
    build_pretrain_transform,
    build_transform,
    normalize,
)
from util.masking import patch_order, sample_noise


@pytest.fixture(scope='module')
def milan():
    """A MILAN model in training mode, a teacher, images [3, 3, 64, 64]."""
    torch.manual_seed(0)
    method = dict(use_clip=True, change_decoder=True, attn_mask=True, target_dim=48)
    model = MODELS['mae_vit_tiny_patch8'](**method).train()
    teacher = Teacher(load_deterministic(clip.CLIP(**TINY_CLIP), skip=()).visual)
    return model, teacher, torch.randn(3, 3, 64, 64)


def generator_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


# ---- images ----


def read(paths):
    transform = build_transform(False, 32)
    return normalize(torch.stack([transform(ImageFile(path)) for path in paths]))


@pytest.mark.parametrize('split', ['val', 'train'])
def test_fixed_images(split, labelled_images, small_images):
    """They are spread over the validation set if there is one, otherwise over the training set."""
    root = labelled_images if split == 'val' else small_images
    data = DataConfig(str(root))
    train = build_dataset(True, data, build_pretrain_transform(32))
    transform, states = train.transform, generator_states()
    images = panels.fixed_images(data, build_transform(False, 32), train)
    assert generator_states() == states and train.transform is transform
    paths = sorted((root / split).rglob('*.png'))
    assert torch.equal(images, read([paths[k * len(paths) // 4] for k in range(4)]))


def test_fixed_images_skip_unreadable_files(tmp_path):
    for i in range(3):
        draw_photo(tmp_path / 'train' / 'all' / f'{i}.png', i, (40, 40))
    (tmp_path / 'train' / 'all' / '0.png').write_bytes(b'not an image')
    data = DataConfig(str(tmp_path))
    train = build_dataset(True, data, build_pretrain_transform(32))
    images = panels.fixed_images(data, build_transform(False, 32), train)
    assert torch.equal(images, read([tmp_path / 'train' / 'all' / f'{i}.png' for i in (1, 2)]))


# ---- outputs of the model ----


def test_run_model_agrees_with_forward(milan):
    """Masks and predictions are those of forward(); mode and random generators do not change."""
    model, teacher, images = milan
    states = generator_states()
    out = panels.run_model(model, teacher, images, 0.75, seed=3)
    assert generator_states() == states and model.training and model.blocks[0].training

    tokens, importance = teacher(images)
    ids = patch_order(sample_noise(3, 0, torch.arange(3), 64), importance)
    _, pred, mask = model(images, 0.75, (tokens, importance), ids)
    torch.testing.assert_close(out.pred, pred.detach())
    assert torch.equal(out.visible, mask == 0) and torch.equal(out.semantic, out.visible)
    assert not torch.equal(out.uniform, out.visible) and (out.uniform.sum(dim=1) == 16).all()
    features = model.forward_encoder(images, torch.arange(64).expand(3, -1))[:, 1:]
    torch.testing.assert_close(out.features, features.detach())


def test_masks_depend_on_the_seed(milan):
    model, teacher, images = milan
    model.eval()
    first, same, other = (
        panels.run_model(model, teacher, images, 0.75, seed).visible for seed in (3, 3, 4)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not model.training
    model.train()


@pytest.mark.parametrize('norm_pix_loss', [False, True])
def test_reconstruct_shows_the_image_if_the_prediction_is_exact(norm_pix_loss):
    model = MODELS['mae_vit_tiny_patch8'](norm_pix_loss=norm_pix_loss)
    images = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    target = model.patchify(images)
    if norm_pix_loss:
        std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (target - target.mean(-1, keepdim=True)) / std
    visible = torch.rand(2, 64) < 0.3
    pred = torch.where(visible[..., None], 99.0, target)
    pixels = panels.to_pixels(images)
    exact = panels.reconstruct(model, images, pred, visible).astype(int)
    assert abs(exact - pixels).max() <= 1
    wrong = panels.reconstruct(model, images, -pred, visible)
    masked = panels.blocks(~visible, 64)
    assert (wrong[masked] != pixels[masked]).mean() > 0.9
    assert (wrong[~masked] == pixels[~masked]).all()


# ---- panels ----


def test_draw_panels(milan):
    model, teacher, images = milan
    out = panels.run_model(model, teacher, images, 0.75)
    drawn = panels.draw_panels(out)
    assert all(p.shape == (3, 64, 64, 3) and p.dtype == np.uint8 for p in drawn.values())
    for name, visible in (('visible_semantic', out.semantic), ('visible_uniform', out.uniform)):
        shown = panels.blocks(visible, 64)
        assert (drawn[name][shown] == drawn['image'][shown]).all()
        assert (drawn[name][~shown] == panels.HIDDEN).all()
    exact = panels.draw_panels(replace(out, pred=3 * out.tokens))
    assert (exact['prediction'] == exact['teacher']).all()
    assert (exact['agreement'] == panels.SEQUENTIAL[-1]).all()


def test_blocks_are_in_row_order():
    values = panels.blocks(torch.arange(4)[None], 4)
    assert values.tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]]


def test_heat_is_brightest_at_the_largest_value():
    values = torch.rand(3, 64)
    heat = panels.heat_over(np.full((3, 64, 64, 3), 255, np.uint8), values)
    brightness = heat.reshape(3, 8, 8, 8, 8, 3).sum(axis=(2, 4, 5)).reshape(3, 64)
    assert (brightness.argmax(axis=1) == values.argmax(dim=1).numpy()).all()


def test_pca_colors():
    """Red, green and blue are the components by size; equal features have equal colors."""
    torch.manual_seed(0)
    order = torch.stack([torch.randperm(60) for _ in range(3)])
    signals = torch.linspace(-1, 1, 60)[order]  # [3, 60]
    directions = torch.linalg.qr(torch.randn(16, 3)).Q.t()
    features = torch.tensor([9.0, 3.0, 1.0]) * signals.t() @ directions + 5
    rgb = panels.pca_colors(features[None])
    for channel in range(3):
        assert abs(np.corrcoef(rgb[0, :, channel], signals[channel])[0, 1]) > 0.9
    features = torch.randn(1, 60, 16)
    some = panels.pca_colors(features[:, 7:9], like=features)
    assert (some == panels.pca_colors(features)[:, 7:9]).all()


def test_pca_colors_of_degenerate_features():
    assert panels.pca_colors(torch.randn(2, 1, 16)).shape == (2, 1, 3)
    assert np.ptp(panels.pca_colors(torch.ones(1, 60, 16))) == 0
    assert panels.pca_colors(torch.full((1, 60, 16), math.nan)).shape == (1, 60, 3)


# ---- texts ----


def test_text_scores():
    """Patches match the text nearest to them, whatever all texts have in common."""
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(3, 32) + 2, dim=-1)
    owner = torch.randint(3, (1, 65))
    tokens = 7 * texts[owner] + torch.randn(1, 65, 32) * 0.2
    scores = panels.text_scores(tokens, tokens, texts, 100)
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(1, 65))
    assert (scores.argmax(dim=-1) == owner).all() and scores.amax(dim=-1).min() > 0.5

    single = panels.text_scores(tokens, tokens, texts[:1], 100)
    assert abs(single[:, 1:].mean()) < 1e-6
    assert single[owner == 0].min() > single[owner != 0].max()
    # predictions are compared with the mean over the teacher's tokens
    predicted = panels.text_scores(tokens[:, :1].expand_as(tokens), tokens, texts[:1], 100)
    torch.testing.assert_close(predicted, single[:, :1].expand_as(predicted))


@pytest.mark.parametrize('num_texts', [1, 2])
def test_text_maps(num_texts, milan):
    model, teacher, images = milan
    out = panels.run_model(model, teacher, images, 0.75)
    features = F.normalize(torch.randn(num_texts, 48), dim=-1)
    maps, (low, high, scale) = panels.text_maps(out, features, 100.0)
    if num_texts == 1:
        assert low == -high < 0 and scale == panels.DIVERGING
    else:
        assert (low, high, scale) == (0, 1, panels.SEQUENTIAL)
    shown = panels.blocks(out.visible, 64)
    for k in range(num_texts):
        teacher_map, model_map = (maps[owner][0][k] for owner in ('teacher', 'model'))
        assert teacher_map.shape == model_map.shape == (3, 64, 64, 3)
        assert (model_map[shown] == out.pixels[shown]).all()
        assert (model_map[~shown] != out.pixels[~shown]).any()
        assert (teacher_map != model_map).any()
    whole = panels.text_scores(out.tokens, out.tokens, features, 100.0)[:, 0]
    assert torch.equal(maps['teacher'][1], whole)


# ---- TensorBoard ----


class Writer:
    """Stand-in for a SummaryWriter that keeps the images."""

    def __init__(self):
        self.images = {}

    def add_images(self, tag, images, step, dataformats):
        assert dataformats == 'NHWC'
        self.images[tag] = images, step

    def flush(self):
        pass


def test_log_panels(milan):
    """The panels of a single text among them, with a white gap between images."""
    model, teacher, images = milan
    texts = F.normalize(torch.randn(1, 48), dim=-1), 100.0
    writer = Writer()
    panels.log_panels(
        writer,
        2999,
        model,
        teacher,
        images,
        mask_ratio=0.75,
        seed=3,
        texts=texts,
        text_names=['one: $1'],
    )
    out = panels.run_model(model, teacher, images, 0.75, seed=3)
    expected = {f'vis/{name}': panel for name, panel in panels.draw_panels(out).items()}
    for owner, (maps, _) in panels.text_maps(out, *texts)[0].items():
        expected[f'vis/text_{owner}/one_1'] = maps[0]
    assert writer.images.keys() == expected.keys()
    for tag, (panel, step) in writer.images.items():
        assert step == 2999 and (panel[:, :, :64] == expected[tag]).all(), tag
        assert panel.shape[2] == 64 + panels.GAP and (panel[:, :, 64:] == 255).all()


def test_tag_names():
    texts = ['Dog.', 'dog', '?!', ' dog ', '..', 'dog_2', 'v1.5-b', 'w' * 99]
    tags = ['Dog', 'dog', 'text', 'dog_2', 'text_2', 'dog_2_2', 'v1.5-b', 'w' * 60]
    assert panels.tag_names(texts) == tags


def test_number_repeats_ignores_case_if_asked():
    names = ['x', 'x', 'X', 'x-2']
    assert panels.number_repeats(names, '-', str.lower) == ['x', 'x-2', 'X-3', 'x-2-2']
