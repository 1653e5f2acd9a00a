"""`make demo` in small."""

import json
import sys

import pytest
from conftest import run
from PIL import Image

from tools.demo import draw
from tools.demo import run as demo


def test_demo(tmp_path):
    result = run(sys.executable, '-m', 'tools.demo.run', '--output_dir', tmp_path / 'demo', '--quick')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('=== done in') == 11
    assert 'zero-shot top-1 by captions' in result.stdout and 'Demo finished' in result.stdout
    for name in ('figure.png', 'text_query.png', 'loss.png', 'results.png'):
        with Image.open(tmp_path / 'demo' / name) as image:
            assert image.size[0] >= 500
    assert (tmp_path / 'demo' / 'milan' / 'checkpoint-1.pth').exists()
    results = json.loads((tmp_path / 'demo' / 'results.json').read_text())
    assert list(results['starts']) == ['MILAN', 'MAE', 'random weights'] and results['labels'] == 64
    for start, row in results['starts'].items():
        assert f'{row["finetune"]["top1"]:.1f} %' in next(x for x in result.stdout.splitlines() if x.startswith(f'{start}  '))


def test_a_failed_script_ends_the_demo():
    with pytest.raises(SystemExit, match='error: the demo ended here, status 3'):
        demo.run('-c', 'raise SystemExit(3)')


def test_nothing_of_others_is_deleted(tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'imagenet.tar').write_bytes(b'precious')
    with pytest.raises(SystemExit, match='has data in it, which the demo did not make'):
        demo.clear(tmp_path)
    assert (tmp_path / 'data' / 'imagenet.tar').read_bytes() == b'precious'
    demo.clear(tmp_path / 'mine')
    for name in ('data', 'milan'):
        (tmp_path / 'mine' / name).mkdir()
    (tmp_path / 'mine' / 'notes.txt').touch()
    demo.clear(tmp_path / 'mine')
    assert sorted(p.name for p in (tmp_path / 'mine').iterdir()) == ['.made_by_the_demo', 'notes.txt']


def test_captions_are_english():
    captions = [draw.draw_picture(0, 'train', i)[2] for i in range(300)]
    assert any(' an orange' in f' {c}' for c in captions) and not any(' a orange' in f' {c}' for c in captions)


def test_pictures_depend_on_seed_split_and_number_alone():
    first = draw.draw_picture(0, 'train', 7)
    draw.draw_picture(0, 'val', 3)
    again = draw.draw_picture(0, 'train', 7)
    assert first[1:] == again[1:] and first[0].tobytes() == again[0].tobytes()
    assert first[0].tobytes() != draw.draw_picture(1, 'train', 7)[0].tobytes()
    assert first[0].size == (64, 64) and first[1] in first[2]
