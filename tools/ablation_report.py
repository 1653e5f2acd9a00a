"""Results of tools/ablation.py: kept a line a run, read as a table and a plot."""

import itertools
import json
import statistics
from pathlib import Path

from util.errors import UserError, as_user_error
from util.logs import write_whole

MEASURES = {'linear': 'linear top-1', 'finetune': 'fine-tuned top-1'}
FACTORS = {'target': ('pixels', 'CLIP'), 'decoder': ('MAE', 'prompting'), 'masking': ('uniform', 'semantic')}
RANDOM = 'random weights', '', ''
VARIANTS = [*itertools.product(*FACTORS.values()), RANDOM]


# ---- results.jsonl ----

def read_json(path):
    with as_user_error(f'{path} cannot be read', OSError, ValueError):
        return json.loads(Path(path).read_text(encoding='utf-8'))


def read_results(out):
    """{(target, decoder, masking, seed): line} of what is done so far."""
    file = out / 'results.jsonl'
    if not file.exists():
        return {}
    with as_user_error(f'{file} cannot be read', OSError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()]
        return {(*(row[name] for name in FACTORS), row['seed']): row for row in rows}


def add_result(out, row):
    """One more line; a kill at any moment leaves the lines before it."""
    file = out / 'results.jsonl'
    before = file.read_text(encoding='utf-8') if file.exists() else ''
    write_whole(file, before + json.dumps(row) + '\n')


def in_words(row):
    return (f'{describe(tuple(row[name] for name in FACTORS))}, seed {row["seed"]}: linear {row["linear"]:.1f} %, fine-tuned '
            f'{row["finetune"]:.1f} %')


def describe(variant):
    target, decoder, masking = variant
    return f'{target}, {decoder} decoder, {masking} masking' if decoder else target


# ---- table and plot ----

def write(out):
    """ablation.md and ablation.png of the folder's results; prints the table."""
    results = read_results(out)
    if not results:
        raise UserError(f'--output_dir {out} has no results.jsonl of this tool with a run in it')
    setting, teacher = read_json(out / 'setting.json'), read_json(out / 'teacher.json')['zero_shot']
    text = table(results, setting, teacher)
    write_whole(out / 'ablation.md', text)
    print(text)
    draw(results, setting, teacher, out / 'ablation.png')
    print(f'{out}/ablation.md, {out}/ablation.png')


def by_variant(results, measure):
    """{variant: its accuracies, a seed each}, of those that have any."""
    values = {variant: [row[measure] for key, row in results.items() if key[:-1] == variant] for variant in VARIANTS}
    return {variant: accuracies for variant, accuracies in values.items() if accuracies}


def effects(results, measure):
    """{factor: differences in points, a seed each}: mean of the four variants that have it, minus that of the four without."""
    found = {}
    for factor, levels in FACTORS.items():
        at = list(FACTORS).index(factor)
        for seed in sorted({key[-1] for key in results}):
            family = {key: row[measure] for key, row in results.items() if key[-1] == seed and key[:-1] != RANDOM}
            if len(family) == len(VARIANTS) - 1:
                without, having = [statistics.mean(v for k, v in family.items() if k[at] == level) for level in levels]
                found.setdefault(factor, []).append(having - without)
    return found


def spread(values, sign=''):
    """Mean and standard deviation over seeds, in words."""
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):{sign}.1f}{deviation}'


def table(results, setting, teacher):
    """Markdown."""
    values = {measure: by_variant(results, measure) for measure in MEASURES}
    lines = [f'| target | decoder | masking | {" | ".join(MEASURES.values())} | runs |', '|---' * 6 + '|']
    for variant in values['linear']:
        cells = [spread(values[measure][variant]) for measure in MEASURES]
        lines.append(f'| {" | ".join(variant)} | {" | ".join(cells)} | {len(values["linear"][variant])} |')
    found = {measure: effects(results, measure) for measure in MEASURES}
    if found['linear']:
        lines += ['', f'| what changes, in all else the same | {" | ".join(MEASURES.values())} |', '|---' * 3 + '|']
        for factor, (without, having) in FACTORS.items():
            cells = [f'{spread(found[measure][factor], "+")} points' for measure in MEASURES]
            lines.append(f'| {factor}: {having} instead of {without} | {" | ".join(cells)} |')
    lines.append(f"""
Mean and standard deviation over seeds, in per cent; the teacher, the images and the labels are the same for all seeds, so that
the deviation does not tell what others would give. Linear: the best of three rates on the validation images. CIFAR-10 at 64
pixels, {setting["images"]} images to pretrain on for {setting["epochs"]} epochs, {setting["labels"]} labelled ones for
{setting["probe_epochs"]} epochs of probing and {setting["finetune_epochs"]} of fine-tuning, {setting["val"]} to validate.
Chance is 10 %. The teacher, told the classes by captions, is right in {teacher:.1f} %. The captions that it has learned from
name the classes of all {setting["images"]} images: what learns from it has learned from labels at second hand.
""")
    return '\n'.join(lines)


def draw(results, setting, teacher, path):
    """A panel a measure: a dot a run, a bar at the mean, the teacher as a line."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('the plot needs matplotlib; pip install matplotlib') from None
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(10, 3.8), dpi=90, sharey=True)
    for ax, (measure, title) in zip(axes, MEASURES.items()):
        values = by_variant(results, measure)
        for row, (variant, accuracies) in enumerate(values.items()):
            colour = {'pixels': 'C0', 'CLIP': 'C1'}.get(variant[0], 'gray')
            ax.barh(row, statistics.mean(accuracies), color=colour, alpha=0.35)
            ax.plot(accuracies, [row] * len(accuracies), '.', color=colour)
        ax.axvline(teacher, color='black', linestyle='--', label='teacher, by captions')
        ax.axvline(10, color='gray', linestyle=':', label='chance')
        ax.set_xlabel(f'{title}, %')
    axes[0].set_yticks(range(len(values)), [describe(variant) for variant in values], fontsize=8)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc='upper right', fontsize=8)
    seeds = len({key[-1] for key in results})
    figure.suptitle(f'CIFAR-10, {setting["epochs"]} epochs on {setting["images"]} images; dots: {seeds} seeds, bars: their mean',
                    fontsize=10, x=0.02, ha='left')
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path)
    plt.close(figure)
