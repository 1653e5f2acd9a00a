"""Images, flags and comparison of checkpoints for the kinds that run main_pretrain.py."""

from tests.helpers import draw_photo, weights_equal

FLAGS = (
    '--model mae_vit_tiny_patch8 --input_size 32 --amp fp32 --warmup_epochs 1 --blr 0.01'.split()
)


def draw_images(folder, count=24, suffix='png'):
    """Draw an image folder with one class in ``folder``/data and return its path."""
    for i in range(count):
        path = folder / 'data' / 'train' / 'all' / f'{i:03d}.{suffix}'
        draw_photo(path, i, (70 + i % 30, 60 + i % 20))
    return folder / 'data'


def step_line(step):
    """Return the start of the log line of a step, counted from 1, in epochs of 6 steps."""
    return f'Epoch [{(step - 1) // 6}] [{(step - 1) % 6 + 1}/6]'


def same_checkpoints(expected, out):
    """Return whether ``out`` holds the checkpoints of the folder ``expected``, bit for bit."""
    names = {path.name for path in expected.glob('*.pth')}
    return names == {path.name for path in out.glob('*.pth')} and all(
        weights_equal(expected / name, out / name) for name in names
    )
