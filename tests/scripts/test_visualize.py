"""tools/visualize.py: one figure per image from any checkpoint."""

import argparse
import math
import sys

import pytest
import timm
import torch
from PIL import Image

import clip
from models_milan import MODELS
from tests.helpers import draw_photo, ok, one_error_line, script
from tools import visualize
from util.checkpoints.io import read_weights
from util.panels import run_model, text_maps

draw = script('tools.visualize')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Image files of several formats and shapes, two of them with the same name."""
    root = tmp_path_factory.mktemp('images')
    draw_photo(root / 'dog.jpg', 1, (90, 300))
    draw_photo(root / 'other' / 'Dog.png', 2, (20, 10))
    Image.new('I;16', (70, 64), 40000).save(root / 'deep $1_$.png')
    Image.new('RGBA', (1, 64), (255, 0, 0, 100)).save(root / 'thin.webp')
    return [root / name for name in ('dog.jpg', 'other/Dog.png', 'deep $1_$.png', 'thin.webp')]


@pytest.fixture(scope='module')
def files(tiny_clip, talking_clip, images, tmp_path_factory):
    """Checkpoints and other files by the names that the cases below use."""
    root = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    flags = dict(model='mae_vit_tiny_patch8', input_size=64, mask_ratio=0.75)
    milan = dict(use_clip=True, change_decoder=True, attn_mask=True)
    model = MODELS['mae_vit_tiny_patch8'](**milan, target_dim=48)
    weights = {k: v + 0.02 * torch.randn_like(v) for k, v in model.state_dict().items()}
    mae = MODELS['mae_vit_tiny_patch8'](norm_pix_loss=True).state_dict()
    encoder = {k: v for k, v in weights.items() if not k.startswith(('decoder', 'mask_token'))}
    head = {'head.weight': torch.zeros(5, 192), 'head.bias': torch.zeros(5)}
    pooled = {
        k.replace('norm.', 'fc_norm.') if k[:5] == 'norm.' else k: encoder[k] for k in encoder
    }
    bad = {**weights, 'cls_token': weights['cls_token'] * math.nan}
    contents = {
        'MILAN': (weights, {**flags, **milan, 'clip_path': str(talking_clip)}),
        'MAE': (mae, {**flags, 'norm_pix_loss': True, 'lr': None}),
        'NAN': (bad, {**flags, **milan}),
        'NAMELESS': (weights, {}),
        'ENCODER': (encoder, {}),
        'CLASSIFIER': ({**pooled, **head}, {'model': 'vit_tiny_patch8', 'input_size': '64'}),
    }
    for name, (state_dict, args) in contents.items():
        torch.save({'model': state_dict, 'args': argparse.Namespace(**args)}, root / name)
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=0)
    torch.save(vit.state_dict(), root / 'TIMM')
    paths = {name: root / name for name in (*contents, 'TIMM')}
    return {**paths, 'CLIP': talking_clip, 'MUTE': tiny_clip, 'IMAGE': images[0]}


def sizes(folder):
    """Sizes in panels (columns, rows) of the figures in a folder."""
    found = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            width, height = image.size
        found[path.name] = round(width / 286), round(height / 319)
    return found


def test_one_figure_per_image(files, images, tmp_path):
    """Figures of images with the same name do not overwrite each other."""
    stdout = ok(draw(files['MILAN'], *images, '--output_dir', tmp_path))
    names = 'dog-visualized', 'Dog-visualized-2', 'deep $1_$-visualized', 'thin-visualized'
    assert sizes(tmp_path) == {f'{name}.png': (4, 2) for name in names}
    assert 'Not drawn' not in stdout


# checkpoint, flags, (columns, rows) of panels, number of things that are not drawn
TIMM = ['--teacher', 'vit_tiny_patch16_224', '--teacher_path', 'TIMM']
NAMED = '--model mae_vit_tiny_patch8 --input_size 64 --use_clip --change_decoder --attn_mask'
FIGURES = {
    'texts': (['MILAN', '--text', 'a dog', 'costs $5^$', 'grüne Wiese'], (4, 4), 0),
    'five texts': (['MILAN', '--text', *'abcde'], (4, 6), 0),
    'one text': (['MILAN', '--text', 'a dog'], (4, 4), 0),
    'no teacher': (['MILAN', '--clip_path', '', '--no-attn_mask'], (4, 1), 1),
    'MAE': (['MAE'], (4, 1), 1),
    'MAE with texts': (['MAE', '--clip_path', 'CLIP', '--text', 'a dog', 'b'], (4, 3), 1),
    'MAE with a timm teacher': (['MAE', *TIMM], (4, 2), 0),
    'classifier': (['CLASSIFIER'], (2, 1), 2),
    'encoder with a teacher': (['ENCODER', '--clip_path', 'CLIP'], (4, 2), 1),
    'flags instead of args': (['NAMELESS', *NAMED.split(), '--clip_path', 'CLIP'], (4, 2), 0),
}


@pytest.mark.parametrize('case', FIGURES)
def test_figure(case, files, tmp_path):
    """Panels that a checkpoint does not allow are reported in one line."""
    (checkpoint, *flags), size, missing = FIGURES[case]
    flags = [files.get(f, f) for f in flags]
    stdout = ok(draw(files[checkpoint], files['IMAGE'], *flags, '--output_dir', tmp_path))
    assert sizes(tmp_path) == {'dog-visualized.png': size}
    notes = [line for line in stdout.splitlines() if line.startswith('Not drawn: ')]
    assert sum(note.count(';') + 1 for note in notes) == missing and len(notes) <= 1


def test_classifier_and_encoder_give_the_same_figure(files, tmp_path):
    """The norm of a classifier with global pooling has another name."""
    figures = []
    for name in ('ENCODER', 'CLASSIFIER'):
        ok(draw(files[name], files['IMAGE'], '--output_dir', tmp_path / name))
        figures.append((tmp_path / name / 'dog-visualized.png').read_bytes())
    assert figures[0] == figures[1]


def test_text_scores_of_the_whole_image_are_those_of_clip(files):
    """They are CLIP's zero-shot probabilities."""
    checkpoint, state_dict = read_weights(files['MILAN'])
    settings = visualize.resolve_settings({}, checkpoint)
    model = visualize.build_model(settings, state_dict, 'checkpoint')
    teacher, tower = visualize.open_teacher(settings, {}, model, torch.device('cpu'))
    assert tower == str(files['CLIP'])
    image = visualize.read_image(files['IMAGE'], 64)
    texts = ['a dog', 'grass']
    out = run_model(model, teacher, image, settings.mask_ratio)
    maps, _ = text_maps(out, *visualize.read_texts('--text', texts, tower))
    with torch.no_grad():
        logits = clip.load(tower, 'cpu')[0](image, clip.tokenize(texts, 16))[0]
    torch.testing.assert_close(maps['teacher'][1], logits.softmax(dim=-1))
    assert not torch.allclose(maps['model'][1], maps['teacher'][1], atol=1e-3)


def test_settings():
    """Flags take precedence over the checkpoint's, and foreign values are ignored."""
    saved = dict(model='m', use_clip=True, clip_path='a.pt', input_size='224', lr=None, attn_mask=1)
    checkpoint = {'args': argparse.Namespace(**saved)}
    settings = visualize.resolve_settings({'mask_ratio': 0.5, 'seed': 3, 'model': None}, checkpoint)
    expected = dict(model='m', mask_ratio=0.5, use_clip=True, clip_path='a.pt')
    assert vars(settings) == visualize.DEFAULTS | expected
    # another teacher replaces all of the saved one's flags
    saved = dict(teacher='vit', teacher_path='vit.pth')
    checkpoint = {'args': argparse.Namespace(**saved)}
    settings = visualize.resolve_settings({'clip_path': 'b.pt'}, checkpoint)
    assert vars(settings) == visualize.DEFAULTS | dict(use_clip=True, clip_path='b.pt')
    for checkpoint in ({}, {'args': {}}):
        assert vars(visualize.resolve_settings({}, checkpoint)) == visualize.DEFAULTS


ERRORS = {
    'no image file': (['MILAN', 'nowhere.jpg'], 'nowhere.jpg'),
    'not an image': (['MILAN', __file__], 'test_visualize.py'),
    'no checkpoint': (['nowhere.pth', 'IMAGE'], 'nowhere.pth'),
    'not a checkpoint': (['CLIP', 'IMAGE'], 'clip.pth.tar'),
    'unknown model': (['NAMELESS', 'IMAGE'], '--model'),
    'other flags': (
        ['NAMELESS', 'IMAGE', '--model', 'mae_vit_tiny_patch8', '--input_size', '64'],
        '--model mae_vit_tiny_patch8',
    ),
    'no teacher file': (['MILAN', 'IMAGE', '--clip_path', 'nowhere.pt'], '--clip_path nowhere.pt'),
    'unknown teacher': (['MILAN', 'IMAGE', '--teacher', 'vit_huge'], '--teacher vit_huge'),
    'two teachers': (
        ['MILAN', 'IMAGE', '--teacher', 'ViT-B/16', '--clip_path', 'CLIP'],
        '--teacher and --clip_path',
    ),
    'teacher of another width': (['MILAN', 'IMAGE', *TIMM], '192'),
    'nothing visible': (['MILAN', 'IMAGE', '--mask_ratio', '0.99'], '--mask_ratio 0.99'),
    'text without teacher': (['MILAN', 'IMAGE', '--clip_path', '', '--text', 'x'], '--text'),
    'teacher without texts': (['MAE', 'IMAGE', '--text', 'x', *TIMM], '--text'),
    'text too long': (['MILAN', 'IMAGE', '--text', 'word ' * 20], '--text'),
    'text empty': (['MILAN', 'IMAGE', '--text', 'a dog', ' '], '--text'),
    'small vocabulary': (['MILAN', 'IMAGE', '--text', 'grass', '--clip_path', 'MUTE'], '--text'),
    'output is a file': (['MILAN', 'IMAGE', '--output_dir', __file__], '--output_dir'),
    'not finite': (['NAN', 'IMAGE'], 'NAN'),
    'no such device': (['MILAN', 'IMAGE', '--device', 'gpu'], '--device gpu'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors(case, files, tmp_path):
    """They end the tool before it draws anything."""
    flags, word = ERRORS[case]
    out = [] if '--output_dir' in flags else ['--output_dir', tmp_path / 'out']
    one_error_line(draw(*[files.get(f, f) for f in flags], *out), word)
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_command_without_matplotlib(files, tmp_path):
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib' / '__init__.py').write_text('raise ImportError')
    flags = [files['MILAN'], files['IMAGE'], '--output_dir', tmp_path]
    result = draw(*flags, launcher=[sys.executable], env={'PYTHONPATH': str(tmp_path)})
    one_error_line(result, 'pip install matplotlib')
