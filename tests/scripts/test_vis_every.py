"""--vis_every and --vis_text: panels in TensorBoard while pretraining."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import ok, one_error_line, pretrain, weights_equal
from tools import visualize
from util import panels
from util.checkpoints.io import read_weights

TEXTS = 'a dog', 'grüne Wiese', 'a/dog'
TAGS = 'a_dog', 'grüne_Wiese', 'a_dog_2'
PANELS = 'image importance visible_semantic visible_uniform encoder teacher prediction agreement'


@pytest.fixture(scope='module')
def flags(small_images, talking_clip):
    """A MILAN run of 4 epochs."""
    flags = '--model mae_vit_tiny_patch8 --input_size 64 --batch_size 8 --num_workers 0 --amp fp32'
    flags += ' --use_clip --change_decoder --attn_mask --blr 0.05 --warmup_epochs 1 --epochs 4'
    return [*flags.split(), '--data_path', small_images, '--clip_path', talking_clip]


@pytest.fixture(scope='module')
def runs(flags, tmp_path_factory):
    """Folders of two equal runs, with and without panels; the first was also resumed."""
    root = tmp_path_factory.mktemp('runs')
    drawn, plain = [[*flags, '--output_dir', root / x, '--log_dir', root / x] for x in 'dp']
    drawn += ['--vis_every', 2, '--vis_text', *TEXTS]
    ok(pretrain(*plain))
    ok(pretrain(*drawn))
    log = (root / 'd' / 'log.txt').read_text()
    assert log == (root / 'p' / 'log.txt').read_text()
    ok(pretrain(*drawn, '--resume', root / 'd' / 'checkpoint-0.pth'))
    return root / 'd', root / 'p'


@pytest.mark.slow
def test_training_is_the_same_with_panels(runs):
    for name in ('checkpoint-3.pth', 'checkpoint-last.pth'):
        assert weights_equal(*[run / name for run in runs])
    files = [{name.split('.')[0] for name in os.listdir(run)} for run in runs]
    assert files[0] == files[1]  # the names of event files end in numbers


@pytest.mark.slow
def test_panels_in_tensorboard(runs):
    """They are at the last x position of every second epoch, also in a resumed run."""
    events, plain = [EventAccumulator(str(run)).Reload() for run in runs]
    assert not plain.Tags()['images']
    assert plain.Tags()['scalars'] == events.Tags()['scalars']
    tags = [f'vis/{name}' for name in PANELS.split()]
    tags += [f'vis/text_{owner}/{tag}' for owner in ('teacher', 'model') for tag in TAGS]
    assert sorted(events.Tags()['images']) == sorted(tags)
    for tag in tags:
        assert [e.step for e in events.Images(tag)] == [999, 2999, 3999]
    first, *_, last = events.Images('vis/prediction')
    assert (last.width, last.height) == (4 * (64 + panels.GAP), 64)
    assert first.encoded_image_string != last.encoded_image_string
    first, *_, last = events.Images('vis/visible_semantic')
    assert first.encoded_image_string == last.encoded_image_string


def newest_images(events, tag):
    """Return the images in the newest panel of a tag, uint8 [N, 64, 64, 3]."""
    strip = np.array(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
    return np.stack([strip[:, x : x + 64] for x in range(0, strip.shape[1], 64 + panels.GAP)])


@pytest.mark.slow
def test_panels_are_those_of_the_tool(runs, small_images):
    """tools/visualize.py draws the same for the same checkpoint and images."""
    checkpoint, state_dict = read_weights(runs[0] / 'checkpoint-last.pth')
    settings = visualize.resolve_settings({}, checkpoint)
    model = visualize.build_model(settings, state_dict, 'checkpoint')
    teacher, tower = visualize.open_teacher(settings, {}, model, torch.device('cpu'))
    paths = sorted((small_images / 'train').rglob('*.png'))[::6]
    images = [visualize.read_image(path, 64) for path in paths]
    out = panels.run_model(model, teacher, torch.cat(images), settings.mask_ratio)
    expected = panels.draw_panels(out)
    maps, _ = panels.text_maps(out, *visualize.read_texts('--text', TEXTS, tower))
    for owner, (text_panels, _) in maps.items():
        expected |= {f'text_{owner}/{tag}': panel for tag, panel in zip(TAGS, text_panels)}
    events = EventAccumulator(str(runs[0])).Reload()
    for name, panel in expected.items():
        assert (newest_images(events, f'vis/{name}') == panel).all(), name


# ---- errors ----

EVERY, TEXT = ['--vis_every', 1], ['--vis_text', 'a dog']
TIMM = ['--teacher', 'vit_tiny_patch16_224', '--teacher_path', __file__]
ERRORS = {
    '--vis_every without --log_dir': ([*EVERY, '--log_dir', ''], [], '--log_dir'),
    'without --vis_every': (TEXT, [], '--vis_every'),
    'pixels': (TEXT, ['--use_clip', '--attn_mask'], '--use_clip'),
    'pixels with a teacher': ([*TEXT, '--pixel_target'], [], '--pixel_target'),
    'timm teacher': ([*TEXT, *TIMM], ['--clip_path'], '--vis_text'),
    'DINO': (
        [*TEXT, '--use_clip_dino', '--teacher_path', __file__],
        ['--clip_path'],
        '--clip_path',
    ),
    'empty text': ([*TEXT, ' '], [], '--vis_text'),
    'text too long': ([*TEXT, 'word ' * 20], [], '--vis_text'),
    'small vocabulary': ([*TEXT, '--clip_path', 'MUTE'], [], '--vis_text'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors(case, flags, tiny_clip, tmp_path):
    """They end the run before the dataset is listed and anything is written."""
    more, without, word = ERRORS[case]
    out = tmp_path / 'out'
    line = [*flags, '--data_path', '/nowhere', '--output_dir', out, '--log_dir', out]
    for name in without:
        start = line.index(name)
        del line[start : start + (2 if name == '--clip_path' else 1)]
    line += EVERY if case != 'without --vis_every' else []
    line += [tiny_clip if x == 'MUTE' else x for x in more]
    error = one_error_line(pretrain(*line), word)
    assert error.startswith('error: --vis_')
    assert not out.exists()


def test_no_readable_image(tmp_path):
    (tmp_path / 'train' / 'all').mkdir(parents=True)
    for i in range(2):
        (tmp_path / 'train' / 'all' / f'{i}.png').write_bytes(b'not an image')
    flags = '--model mae_vit_tiny_patch8 --input_size 32 --batch_size 2 --num_workers 0'
    flags += ' --vis_every 1 --device cpu --output_dir'
    paths = ['--data_path', tmp_path, '--log_dir', tmp_path]
    one_error_line(pretrain(*flags.split(), '', *paths), '--vis_every', tmp_path)
