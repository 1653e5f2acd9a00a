"""`make demo` in small."""

import sys

from conftest import run
from PIL import Image

from tools.demo import draw


def test_demo(tmp_path):
    result = run(sys.executable, '-m', 'tools.demo.run', '--output_dir', tmp_path / 'demo', '--quick')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('=== done in') == 4
    assert 'zero-shot top-1 by captions' in result.stdout and 'Demo finished' in result.stdout
    for name in ('figure.png', 'loss.png'):
        with Image.open(tmp_path / 'demo' / name) as image:
            assert image.size[0] >= 500
    assert (tmp_path / 'demo' / 'pretrain' / 'checkpoint-1.pth').exists()


def test_a_failed_stage_ends_the_demo(tmp_path):
    (tmp_path / 'demo').mkdir()
    (tmp_path / 'demo' / 'captions_train.jsonl').mkdir()  # in the way of stage 1
    result = run(sys.executable, '-m', 'tools.demo.run', '--output_dir', tmp_path / 'demo', '--quick')
    assert result.returncode != 0
    assert 'error: the demo ended in stage 1' in result.stderr and 'stage 2' not in result.stdout


def test_pictures_depend_on_seed_split_and_number_alone():
    first = draw.draw_picture(0, 'train', 7)
    draw.draw_picture(0, 'val', 3)
    again = draw.draw_picture(0, 'train', 7)
    assert first[1:] == again[1:] and first[0].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != draw.draw_picture(1, 'train', 7)[0].tobytes()
    assert first[0].size == (64, 64) and first[1] in first[2]
