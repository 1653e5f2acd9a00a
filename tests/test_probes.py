"""What main_linprobe.py can do beyond the published command: several rates in one pass."""

import json
import math

import pytest
import torch
from conftest import linprobe, torchrun

from util.checkpoint import load

RATES = (0.1, 0.5, 2.0)


def ok(result):
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout


def log(folder):
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def same(a, b):
    """Whether two entries of checkpoints are equal, bit for bit, keys and their order included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize('more, launcher, compared', [
    (['--accum_iter', 2, '--min_lr', 0.001, '--weight_decay', 0.01], None, RATES),
    (['--dist_eval', '--amp', 'bf16', '--global_pool'], torchrun(2), RATES[1:2])], ids=['accumulated', 'two processes'])
def test_each_head_of_a_sweep_is_that_of_a_run_with_its_rate(more, launcher, compared, classifier_flags, tmp_path):
    """Bit for bit: weights, statistics, log, and the checkpoint of the best head with its optimiser's state."""
    more = ['--batch_size', 4, *more]
    flags = [*classifier_flags, '--epochs', 3, *more]
    ok(linprobe(*flags, '--blr', *RATES[::-1], RATES[1], '--output_dir', tmp_path / 'sweep', launcher=launcher))
    sweep, records = load(tmp_path / 'sweep' / 'checkpoint-last.pth')['model'], log(tmp_path / 'sweep')
    best = load(tmp_path / 'sweep' / 'checkpoint-best.pth')
    for rate in compared:
        out = tmp_path / str(rate)
        ok(linprobe(*flags, '--blr', rate, '--output_dir', out, launcher=launcher))
        alone = load(out / 'checkpoint-last.pth')['model']
        for name, value in alone.items():
            in_sweep = name.replace('head.', f'head.blr{str(rate).replace(".", "_")}.')
            assert torch.equal(value, sweep[in_sweep]), (rate, name)
        for record, of_all in zip(log(out), records):
            results = {k: record[f'test_{k}'] for k in ('loss', 'acc1', 'acc5')}
            assert of_all['heads'][RATES.index(rate)] == {'blr': rate, **results}
        if rate == best['args'].blr:
            single = load(out / 'checkpoint-best.pth')
            assert list(best) == list(single) and all(same(single[k], best[k]) for k in single if k != 'args')
            assert {k for k, v in vars(single['args']).items() if vars(best['args']).get(k) != v} == {'output_dir'}
    accuracies = [[head['acc1'] for head in record['heads']] for record in records]
    assert [record['test_acc1'] for record in records] == [max(row) for row in accuracies]
    assert best['max_accuracy'] == max(map(max, accuracies))
    assert len({tuple(head.values()) for head in records[-1]['heads']}) == len(RATES)


def test_a_sweep_goes_on_and_is_evaluated(classifier_flags, tmp_path):
    flags = [*classifier_flags, '--epochs', 3, '--blr', *RATES]
    said = ok(linprobe(*flags))
    out, resumed = tmp_path / 'out', tmp_path / 'resumed'
    ok(linprobe(*flags, '--resume', out / 'checkpoint-0.pth', '--output_dir', resumed))
    whole, again = (load(folder / 'checkpoint-2.pth') for folder in (out, resumed))
    assert all(same(whole[k], again[k]) for k in ('model', 'optimizer', 'epoch', 'max_accuracy'))
    assert log(out)[1:] == log(resumed)

    last = log(out)[-1]
    table = [f'{h["blr"]:10g}  {h["acc1"]:8.2f}  {h["acc5"]:8.2f}  {h["loss"]:10.4g}' for h in last['heads']]
    evaluated = ok(linprobe(*flags, '--eval', '--resume', out / 'checkpoint-last.pth'))
    for text in (said, evaluated):
        lines = text.splitlines()
        start = len(lines) - 1 - lines[::-1].index('       blr  top-1, %  top-5, %        loss')
        rows = lines[start + 1:start + 4]
        assert [row.removesuffix('  best') for row in rows] == table
        assert [h['blr'] for h, row in zip(last['heads'], rows) if row.endswith('best')] == [last['blr']]
    assert f'test images: {last["test_acc1"]:.2f}%' in evaluated
    best = load(out / 'checkpoint-best.pth')  # an ordinary checkpoint: evaluated without the rates
    evaluated = ok(linprobe(*classifier_flags, '--eval', '--resume', out / 'checkpoint-best.pth'))
    assert f'test images: {best["max_accuracy"]:.2f}%' in evaluated


def test_a_rate_that_diverges_leaves_the_others_alone(classifier_flags, tmp_path):
    """1e9 overflows with a weight decay; the run goes on, is saved and goes on from there."""
    flags = [*classifier_flags, '--epochs', 3, '--weight_decay', 1, '--warmup_epochs', 0, '--save_every', 1, '--output_dir']
    said = ok(linprobe(*flags, tmp_path / 'both', '--blr', 0.5, 1e9))
    assert said.count('with --blr 1000000000.0 the loss is no longer finite') == 1 and said.count('diverged') == 2
    ok(linprobe(*flags, tmp_path / 'one', '--blr', 0.5))
    both, one = (load(tmp_path / name / 'checkpoint-last.pth') for name in ('both', 'one'))
    assert torch.equal(both['model']['head.blr0_5.1.weight'], one['model']['head.1.weight'])
    assert not both['model']['head.blr1000000000_0.1.weight'].any()
    record = log(tmp_path / 'both')[-1]
    assert record['heads'][1] == {'blr': 1e9, 'loss': None, 'acc1': None, 'acc5': None}
    assert record['blr'] == 0.5 and record['test_loss'] == log(tmp_path / 'one')[-1]['test_loss']
    assert math.isfinite(record['train_loss'])
    said = ok(linprobe(*flags, tmp_path / 'on', '--blr', 0.5, 1e9, '--resume', tmp_path / 'both' / 'checkpoint-1.pth'))
    assert log(tmp_path / 'on') == log(tmp_path / 'both')[2:] and 'no longer finite' not in said
    failed = linprobe(*flags, tmp_path / 'none', '--blr', 1e8, 1e9)
    assert failed.returncode == 1 and 'error: --blr: the loss is finite with none of these rates' in failed.stderr
    assert load(tmp_path / 'none' / 'checkpoint-last.pth')['epoch'] == log(tmp_path / 'none')[-1]['epoch'] < 2


WRONG = {
    'one rate too many': (['--lr', 0.1, '--blr', 0.1, 0.2], '--lr with several --blr'),
    'other rates': (['--blr', 0.1, 0.3, '--resume', 'SWEEP'], 'another model: head.blr0_3.0.running_mean is missing in it'),
    'one rate': (['--blr', 0.1, '--eval', '--resume', 'SWEEP'], 'another model: head.0.running_mean is missing in it'),
    'not a number': (['--blr', 0.1, 'nan'], '--blr: nan is outside'),
    'no rate': (['--blr'], '--blr: expected at least one argument'),
}


@pytest.fixture(scope='module')
def sweep(labelled_images, pretrained, tmp_path_factory):
    out = tmp_path_factory.mktemp('sweep')
    ok(linprobe('--model', 'vit_tiny_patch8', '--input_size', 32, '--nb_classes', 3, '--batch_size', 8, '--num_workers', 0,
                '--data_path', labelled_images, '--finetune', pretrained, '--epochs', 1, '--warmup_epochs', 0,
                '--blr', 0.1, 0.2, '--output_dir', out, '--log_dir', ''))
    return out / 'checkpoint-last.pth'


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, classifier_flags, sweep, tmp_path):
    flags, message = WRONG[case]
    result = linprobe(*classifier_flags, *[sweep if f == 'SWEEP' else f for f in flags])
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode in (1, 2) and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0]
    assert not (tmp_path / 'out').exists()
