"""Results of the ablation: one line per run, summarized as a table and a plot."""

import itertools
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from util.errors import UserError, as_user_error
from util.files import atomic_write_text

METRICS = {'linear': 'linear top-1', 'finetune': 'fine-tuned top-1'}
FACTORS = {
    'target': ('pixels', 'CLIP'),
    'decoder': ('MAE', 'prompting'),
    'masking': ('uniform', 'semantic'),
}
RANDOM = 'random weights', '', ''
VARIANTS = [*itertools.product(*FACTORS.values()), RANDOM]

# (target, decoder, masking, seed) -> line of results.jsonl
Results = dict[tuple[str, str, str, int], dict[str, Any]]


def read_results(out: Path) -> Results:
    """Return the results so far. Raises UserError if results.jsonl cannot be read."""
    file = out / 'results.jsonl'
    with as_user_error(f'{file} cannot be read', OSError, ValueError, KeyError, TypeError):
        lines = file.read_text('utf-8').splitlines() if file.exists() else []
        return {(*(r[name] for name in FACTORS), r['seed']): r for r in map(json.loads, lines)}


def add_result(out: Path, row: dict[str, Any]) -> None:
    """Add a line to results.jsonl. A kill at any moment leaves the previous lines intact."""
    lines = [f'{json.dumps(r)}\n' for r in (*read_results(out).values(), row)]
    atomic_write_text(out / 'results.jsonl', ''.join(lines))


def summary(row: dict[str, Any]) -> str:
    """Describe a line of results.jsonl."""
    variant = _describe([row[name] for name in FACTORS])
    return (
        f'{variant}, seed {row["seed"]}: '
        f'linear {row["linear"]:.1f} %, fine-tuned {row["finetune"]:.1f} %'
    )


def _describe(variant):
    target, decoder, masking = variant
    return f'{target}, {decoder} decoder, {masking} masking' if decoder else target


def write(out: Path) -> None:
    """Write ablation.md and ablation.png from the results in a folder, and print the table.

    Raises:
        UserError: if there are no results, or a file cannot be read.
    """
    results = read_results(out)
    if not results:
        raise UserError(f'--output_dir {out} has no results.jsonl with a finished run')
    with as_user_error(f'--output_dir {out}', OSError, ValueError, KeyError):
        setting = json.loads((out / 'setting.json').read_text())
        teacher = json.loads((out / 'teacher.json').read_text())['zero_shot']
    text = table(results, setting, teacher)
    atomic_write_text(out / 'ablation.md', text)
    _draw(results, setting, teacher, out / 'ablation.png')
    print(f'{text}\n{out}/ablation.md, {out}/ablation.png')


# {variant: accuracies, one per seed}, without variants that have none.
def _by_variant(results, metric):
    keys = {v: [key for key in results if key[:-1] == v] for v in VARIANTS}
    return {v: [results[key][metric] for key in found] for v, found in keys.items() if found}


def effects(results: Results, metric: str) -> dict[str, list[float]]:
    """Return the effect of each factor in points, one per seed with all eight variants.

    The effect is the mean of the four variants with the second level of the factor, minus the
    mean of the four with the first level.
    """
    seeds, variants = sorted({key[-1] for key in results}), VARIANTS[:-1]
    seeds = [seed for seed in seeds if all((*v, seed) in results for v in variants)]

    def _mean(level, seed):
        return mean(results[(*v, seed)][metric] for v in variants if level in v)

    return {
        factor: [_mean(level, seed) - _mean(reference, seed) for seed in seeds]
        for factor, (reference, level) in FACTORS.items()
    }


def _mean_std(values, sign=''):
    std = f' ± {stdev(values):.1f}' if len(values) > 1 else ''
    return f'{mean(values):{sign}.1f}{std}'


def table(results: Results, setting: dict[str, Any], teacher: float) -> str:
    """Return the results as Markdown.

    Args:
        results: from ``read_results``.
        setting: of these results, an entry of SETTINGS.
        teacher: zero-shot accuracy of the teacher in percent.
    """
    titles = ' | '.join(METRICS.values())
    linear, finetune = (_by_variant(results, metric) for metric in METRICS)
    lines = [f'| target | decoder | masking | {titles} | runs |', '|---' * 6 + '|']
    lines += [
        f'| {" | ".join(variant)} | {_mean_std(accuracies)} | {_mean_std(finetune[variant])} '
        f'| {len(accuracies)} |'
        for variant, accuracies in linear.items()
    ]
    linear, finetune = (effects(results, metric) for metric in METRICS)
    if linear['target']:
        lines += ['', f'| change of one factor | {titles} |', '|---' * 3 + '|']
        lines += [
            f'| {factor}: {level} instead of {reference} | {_mean_std(linear[factor], "+")} points '
            f'| {_mean_std(finetune[factor], "+")} points |'
            for factor, (reference, level) in FACTORS.items()
        ]
    lines.append(f"""
Mean and standard deviation over seeds, in percent. Teacher, images and labels are the same for all
seeds, so the standard deviation does not show how other teachers, images or labels would differ.
Linear: the best of three learning rates on the validation images. CIFAR-10 at 64 pixels,
{setting['images']} pretraining images for {setting['epochs']} epochs, {setting['labels']} labeled
images for {setting['probe_epochs']} epochs of probing and {setting['finetune_epochs']} of
fine-tuning, {setting['val']} validation images. Chance is 10 %. The zero-shot accuracy of the
teacher is {teacher:.1f} %. The captions that it was trained on name the classes of all
{setting['images']} images: a model that learns from the teacher learns from labels indirectly.
""")
    return '\n'.join(lines)


# One panel per metric: a dot per run, a bar for the mean, a dashed line for the teacher.
def _draw(results, setting, teacher, path):
    with as_user_error('the plot needs matplotlib; pip install matplotlib', ImportError):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), dpi=90)
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for ax, (metric, title) in zip(axes, METRICS.items()):
        for variant, accuracies in _by_variant(results, metric).items():
            name = _describe(variant)
            color = {'pixels': 'C0', 'CLIP': 'C1'}.get(variant[0], 'gray')
            ax.barh(name, mean(accuracies), color=color, alpha=0.35)
            ax.plot(accuracies, [name] * len(accuracies), '.', color=color)
        ax.axvline(teacher, color='black', linestyle='--', label='teacher, zero-shot')
        ax.axvline(10, color='gray', linestyle=':', label='chance')
        ax.set_xlabel(f'{title}, %')
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc='upper right', fontsize=8)
    figure.suptitle(
        f'CIFAR-10, {setting["epochs"]} epochs on {setting["images"]} images; '
        f'dots: {len({key[-1] for key in results})} seeds, bars: their mean',
        fontsize=10,
        x=0.02,
        ha='left',
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path)
