"""Text maps in TensorBoard while pretraining: --vis_text."""

import io

import numpy as np
import pytest
import torch
from conftest import pretrain
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools import visualize as tool
from util import visualize
from util.checkpoint import load

TEXTS = 'a dog', 'grüne Wiese', 'a/dog'
TAGS = 'a_dog', 'grüne_Wiese', 'a_dog_2'


@pytest.fixture(scope='module')
def flags(small_images, talking_clip):
    """Of a MILAN run of 2 epochs and seconds."""
    return ['--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--amp', 'fp32', '--batch_size', 8, '--num_workers', 0,
            '--data_path', small_images, '--clip_path', talking_clip, '--use_clip', '--change_decoder', '--attn_mask',
            '--blr', 0.05, '--warmup_epochs', 1, '--epochs', 2]


def images(events, tag):
    """The newest image of a tag as the pictures in it: uint8 [N, 64, 64, 3]."""
    strip = np.array(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))
    width = 64 + visualize.GAP
    return np.stack([strip[:, x:x + 64] for x in range(0, strip.shape[1], width)])


@pytest.mark.parametrize('texts, tags', [(TEXTS, TAGS), (['one: $1'], ['one_1'])], ids=['several', 'one'])
def test_text_maps_are_those_of_the_tool(texts, tags, flags, small_images, tmp_path):
    """TensorBoard has what tools/visualize.py draws for the same checkpoint and pictures; the weights do not change."""
    for name, more in (('texts', ['--vis_every', 1, '--vis_text', *texts]), ('plain', [])):
        result = pretrain(*flags, '--output_dir', tmp_path / name, '--log_dir', tmp_path / name, *more)
        assert result.returncode == 0, result.stderr
    drawn, plain = [load(tmp_path / name / 'checkpoint-last.pth')['model'] for name in ('texts', 'plain')]
    assert all(torch.equal(drawn[name], plain[name]) for name in plain)

    paths = sorted((small_images / 'train').rglob('*.png'))[::6]
    line = [tmp_path / 'texts' / 'checkpoint-last.pth', *paths, '--text', *texts, '--device', 'cpu']
    parts = tool.prepare(tool.get_args_parser().parse_args([str(x) for x in line]))
    seen = visualize.look(parts.model, parts.teacher, torch.cat(parts.images), parts.settings.mask_ratio)
    rows, _ = tool.text_rows(seen, parts.features, parts.scale)
    events = EventAccumulator(str(tmp_path / 'texts')).Reload()
    found = [tag for tag in events.Tags()['images'] if tag.startswith('vis/text')]
    assert sorted(found) == sorted(f'vis/text_{who}/{tag}' for who in ('teacher', 'model') for tag in tags)
    assert all([e.step for e in events.Images(tag)] == [999, 1999] for tag in found)
    for who, (_, _, maps, _) in zip(('teacher', 'model'), rows):
        for tag, panel in zip(tags, maps):
            assert (images(events, f'vis/text_{who}/{tag}') == panel).all(), (who, tag)
    assert (rows[0][2][0] != rows[1][2][0]).any()


def test_any_text_can_be_a_tag():
    assert visualize.tag_names(['Dog.', 'dog', '?!', ' dog ', '..', 'dog_2', 'v1.5-b', 'w' * 99]) == [
        'Dog', 'dog', 'text', 'dog_2', 'text_2', 'dog_2_2', 'v1.5-b', 'w' * 60]


EVERY, TEXT = ['--vis_every', 1], ['--vis_text', 'a dog']
WRONG = {
    'without --vis_every': (TEXT, [], '--vis_text is drawn when --vis_every draws: give --vis_every N'),
    'pixels': ([*EVERY, *TEXT], ['--use_clip', '--attn_mask'], 'this run predicts pixels: give --use_clip'),
    'pixels beside a teacher': ([*EVERY, *TEXT, '--pixel_target'], [], 'this run predicts pixels: give --use_clip'),
    'no text tower': ([*EVERY, *TEXT, '--teacher', 'vit_tiny_patch16_224', '--teacher_path', __file__], ['--clip_path'],
                      '--vis_text compares texts with the tokens of a CLIP that has a text tower: give it by --clip_path'),
    'DINO': ([*EVERY, *TEXT, '--use_clip_dino', '--teacher_path', __file__], ['--clip_path'],
             'of a CLIP that has a text tower'),
    'empty': ([*EVERY, *TEXT, ' '], [], '--vis_text: one of the texts is empty'),
    'too long': ([*EVERY, *TEXT, 'word ' * 20], [], 'too many for a context of 16'),
    'other tokens': ([*EVERY, *TEXT, '--clip_path', 'MUTE'], [], 'its text tower knows 512 tokens'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, flags, tiny_clip, tmp_path):
    """One line, before the data are looked for and anything is written."""
    more, without, message = WRONG[case]
    out = tmp_path / 'out'
    line = [str(x) for x in (*flags, '--data_path', '/nowhere', '--output_dir', out, '--log_dir', out)]
    for name in without:
        at = line.index(name)
        del line[at:at + (2 if name == '--clip_path' else 1)]
    result = pretrain(*line, *[tiny_clip if x == 'MUTE' else x for x in more])
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode == 1 and len(errors) == 1, result.stderr
    assert errors[0].startswith('error: --vis_text') and message in errors[0]
    assert not out.exists()
