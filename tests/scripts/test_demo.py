"""Test `make demo`, with fewer images and steps."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from tests.helpers import ok, one_error_line, script
from tools.demo import draw
from tools.demo import run as demo
from util.errors import UserError


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the scripts of the demo in this process, which saves the imports of ten processes."""
    run_process = subprocess.run

    def run_script(command, **kwargs):
        if command[0] != sys.executable:
            return run_process(command, **kwargs)
        name, *flags = command[2:] if command[1] == '-m' else command[1:]
        return script(name.removesuffix('.py'))(*flags)

    monkeypatch.setattr(subprocess, 'run', run_script)


@pytest.mark.slow
def test_demo(tmp_path, in_this_process):
    out = ok(script('tools.demo.run')('--output_dir', tmp_path / 'demo', '--quick'))
    assert out.count('=== done in') == 8
    for name in ('figure.png', 'text_query.png', 'loss.png', 'results.png'):
        with Image.open(tmp_path / 'demo' / name) as image:
            assert image.size[0] >= 500
    assert (tmp_path / 'demo' / 'milan' / 'checkpoint-1.pth').exists()
    results = json.loads((tmp_path / 'demo' / 'results.json').read_text())
    assert list(results['starts']) == ['MILAN', 'MAE', 'random weights'] and results['labels'] == 64
    for start, row in results['starts'].items():
        line = next(line for line in out.splitlines() if line.startswith(f'{start}  '))
        assert f'{row["finetune"]["top1"]:.1f} %' in line


def test_failing_script(capfd):
    with pytest.raises(UserError, match='status 3'):
        demo.run('-c', 'raise SystemExit(3)')


def test_output_dir_is_a_file(tmp_path):
    (tmp_path / 'file').touch()
    one_error_line(script('tools.demo.run')('--output_dir', tmp_path / 'file'), '--output_dir')


def test_clear_deletes_only_outputs_of_the_demo(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'imagenet.tar').write_bytes(b'content')
    with pytest.raises(UserError, match=f'--output_dir {tmp_path} '):
        demo.clear(tmp_path)
    assert (tmp_path / 'data' / 'imagenet.tar').read_bytes() == b'content'
    out = tmp_path / 'out'
    demo.clear(out)
    for name in ('data', 'milan'):
        (out / name).mkdir()
    (out / 'notes.txt').touch()
    demo.clear(out)
    assert sorted(p.name for p in out.iterdir()) == ['.made_by_the_demo', 'notes.txt']


def test_captions_use_the_right_article():
    captions = [draw.draw_image(0, 'train', i)[2] for i in range(300)]
    assert any(' an orange' in f' {caption}' for caption in captions)
    assert not any(' a orange' in f' {caption}' for caption in captions)


def test_images_are_a_function_of_seed_split_and_index():
    first = draw.draw_image(0, 'train', 7)
    draw.draw_image(0, 'val', 3)
    again = draw.draw_image(0, 'train', 7)
    assert first[1:] == again[1:] and first[0].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != draw.draw_image(1, 'train', 7)[0].tobytes()
    assert first[0].size == (64, 64) and first[1] in first[2]
