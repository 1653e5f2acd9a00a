"""Draws docs/layout.png: which file calls which. tests/test_docs.py compares boxes and arrows with the code.

    python docs/layout.py
"""

from pathlib import Path

# name: (left, bottom, width, height; lines inside). The picture is 104 wide and 62 high, in tenths of an inch.
BOXES = {
    'main_pretrain.py': (1, 55, 56, 6, []),
    'main_finetune.py': (61, 55, 13, 6, []),
    'main_linprobe.py': (75.5, 55, 13, 6, []),
    'hubconf.py': (90, 55, 13, 6, []),
    'engine_pretrain.py': (1, 37.5, 17, 11.5, ['one epoch']),
    'models_milan.py': (20.5, 37.5, 17, 11.5, ['encoder, both decoders,', 'order of patches, losses', 'util/visualize.py']),
    'util/teacher.py': (40, 37.5, 17, 11.5, ['frozen: images to', 'tokens and importance', 'util/texts.py']),
    'engine_finetune.py': (61, 37.5, 19, 11.5, ['one epoch, evaluation,', 'the loop over both']),
    'models_vit.py': (84, 37.5, 19, 11.5, ["the classifier: timm's ViT", 'probes on top of it:', 'util/probes.py']),
    'util/teachers_timm.py': (20.5, 25, 17, 9, ['any ViT of timm', 'as a teacher']),
    'clip/': (40, 25, 17, 9, ["OpenAI's CLIP:", 'both towers, tokenizer']),
    'tools/': (61, 25, 42, 11.5, [
        'prepare_imagenet.py   download.py   export.py   slurm.py   knn.py',
        'benchmark.py   benchmark_step.py   ablation.py   ablation_report.py',
        'segment.py   visualize.py   demo/']),
    'data: files to batches': (1, 1, 23, 19, [
        'util/loader.py', 'util/datasets.py', 'util/images.py', 'util/crop.py', 'util/folder.py']),
    'formulas': (27, 1, 20, 19, ['util/lr_sched.py', 'util/lr_decay.py', 'util/lars.py', 'util/pos_embed.py']),
    'checkpoints': (50, 1, 22, 19, [
        'util/checkpoint.py', 'util/formats.py', 'util/integrity.py', 'util/torchscript.py', 'util/download.py']),
    'what every run needs': (75, 1, 28, 19, [
        'util/arguments.py   util/parser.py', 'util/misc.py   util/errors.py', 'util/distributed.py   util/logs.py',
        'util/interruption.py   util/seeding.py', 'util/provenance.py   util/memory.py']),
}
ARROWS = {  # caller: called. The row at the bottom is called from all that is above it.
    'main_pretrain.py': ['engine_pretrain.py', 'models_milan.py', 'util/teacher.py'],
    'main_finetune.py': ['engine_finetune.py', 'models_vit.py'],
    'main_linprobe.py': ['engine_finetune.py', 'models_vit.py'],
    'hubconf.py': ['models_vit.py'],
    'engine_pretrain.py': ['models_milan.py'],
    'engine_finetune.py': ['models_vit.py'],
    'util/teacher.py': ['util/teachers_timm.py', 'clip/'],
    'util/teachers_timm.py': ['clip/'],
}
ROWS = {55: '#f6d8ae', 37.5: '#cfe3f5', 25: '#d7ecd0', 1: '#f3f0e6'}  # bottom of a row: its colour


def draw(axes, rectangle):
    for name, (x, y, width, height, lines) in BOXES.items():
        axes.add_patch(rectangle((x, y), width, height, facecolor=ROWS[y], edgecolor='#555555', linewidth=0.8))
        top = y + height - 2 if lines else y + height / 2
        axes.text(x + width / 2, top, name, ha='center', va='center', size=8.5, weight='bold')
        for i, line in enumerate(lines, 1):
            axes.text(x + width / 2, top - 2.6 * i, line, ha='center', va='center', size=7.5)
    for caller, callees in ARROWS.items():
        for called in callees:
            start, end = ends(BOXES[caller], BOXES[called])
            axes.annotate('', end, start, arrowprops={'arrowstyle': '-|>', 'color': '#333333', 'shrinkA': 0, 'shrinkB': 0})
    axes.text(52, 22.3, 'called from all that is above', ha='center', va='center', size=7.5, style='italic')


def ends(caller, called):
    """Where an arrow begins and ends: side to side within a row, else from a lower edge to an upper one."""
    (x, y, width, height, _), (u, v, _, high, _) = caller, called
    if y == v:
        return (x + width, y + height / 2), (u, v + high / 2)
    middle = u + called[2] / 2
    start = min(max(middle, x + 3), x + width - 3)
    return (start, y), (middle + 0.3 * (start - middle), v + high)


if __name__ == '__main__':
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(10.4, 6.2))
    whole = figure.add_axes((0, 0, 1, 1), xlim=(0, 104), ylim=(0, 62))
    whole.axis('off')
    draw(whole, plt.Rectangle)
    figure.savefig(Path(__file__).with_name('layout.png'), dpi=125, metadata={'Description': repr((BOXES, ARROWS))})
