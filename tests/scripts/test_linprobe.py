"""main_linprobe.py beyond the published command: several rates in one pass, attentive probing."""

import math
import os
import shutil
from functools import partial

import pytest
import torch

from tests.helpers import checkpoint, linprobe, log_records, ok, one_error_line, same, torchrun

RATES = (0.1, 0.5, 2.0)


# ---- several rates ----


@pytest.mark.parametrize(
    'more, launcher, compared',
    [
        ('--accum_iter 2 --min_lr 0.001 --weight_decay 0.01', None, RATES),
        ('--probe attentive --weight_decay 0.1', None, RATES),
        pytest.param(
            '--dist_eval --amp bf16 --global_pool', torchrun(2), RATES[1:2], marks=pytest.mark.slow
        ),
    ],
    ids=['accumulated', 'attentive', 'two processes'],
)
def test_head_of_a_sweep_equals_its_own_run(more, launcher, compared, classifier_flags, tmp_path):
    """Bit for bit: weights, statistics, log, and the checkpoint of the best head."""
    flags = [*classifier_flags, '--batch_size', 4, *more.split()]
    run = partial(linprobe, *flags, launcher=launcher)
    sweep = tmp_path / 'sweep'
    ok(run('--blr', *RATES[::-1], RATES[1], '--output_dir', sweep))
    heads, records = checkpoint(sweep / 'checkpoint-last.pth')['model'], log_records(sweep)
    best = checkpoint(sweep / 'checkpoint-best.pth')
    for rate in compared:
        out = tmp_path / str(rate)
        ok(run('--blr', rate, '--output_dir', out))
        name_of_head = f'head.blr{str(rate).replace(".", "_")}.'
        for name, value in checkpoint(out / 'checkpoint-last.pth')['model'].items():
            in_sweep = name.replace('head.', name_of_head)
            assert torch.equal(value, heads[in_sweep]), (rate, name)
        for record, of_all in zip(log_records(out), records):
            results = {k: record[f'test_{k}'] for k in ('loss', 'acc1', 'acc5')}
            assert of_all['heads'][RATES.index(rate)] == {'blr': rate, **results}
        if best['args'].blr in (rate, [rate]):
            single = checkpoint(out / 'checkpoint-best.pth')
            assert list(best) == list(single)
            assert all(same(single[k], best[k]) for k in single if k != 'args')
            flags_of_best = vars(best['args'])
            different = {k for k, v in vars(single['args']).items() if flags_of_best.get(k) != v}
            assert different == {'output_dir'}
    accuracies = [[head['acc1'] for head in record['heads']] for record in records]
    assert [record['test_acc1'] for record in records] == [max(row) for row in accuracies]
    assert best['max_accuracy'] == max(map(max, accuracies))
    assert len({tuple(head.values()) for head in records[-1]['heads']}) == len(RATES)


def test_sweep_resumes_and_is_evaluated(classifier_flags, tmp_path):
    flags = [*classifier_flags, '--epochs', 3, '--blr', *RATES]
    trained = ok(linprobe(*flags))
    out, resumed = tmp_path / 'out', tmp_path / 'resumed'
    ok(linprobe(*flags, '--resume', out / 'checkpoint-0.pth', '--output_dir', resumed))
    whole, again = (checkpoint(folder / 'checkpoint-2.pth') for folder in (out, resumed))
    assert all(same(whole[k], again[k]) for k in ('model', 'optimizer', 'epoch', 'max_accuracy'))
    assert log_records(out)[1:] == log_records(resumed)

    last = log_records(out)[-1]
    table = [
        f'{h["blr"]:10g}  {h["acc1"]:8.2f}  {h["acc5"]:8.2f}  {h["loss"]:10.4g}'
        for h in last['heads']
    ]
    evaluated = ok(linprobe(*flags, '--eval', '--resume', out / 'checkpoint-last.pth'))
    for text in (trained, evaluated):
        lines = text.splitlines()
        start = len(lines) - 1 - lines[::-1].index('       blr  top-1, %  top-5, %        loss')
        rows = lines[start + 1 : start + 4]
        assert [row.removesuffix('  best') for row in rows] == table
        marked = [h['blr'] for h, row in zip(last['heads'], rows) if row.endswith('best')]
        assert marked == [last['blr']]
    assert f'test images: {last["test_acc1"]:.2f}%' in evaluated
    # the best head alone is an ordinary checkpoint
    best = checkpoint(out / 'checkpoint-best.pth')
    flags = [*classifier_flags, '--eval', '--resume', out / 'checkpoint-best.pth']
    assert f'test images: {best["max_accuracy"]:.2f}%' in ok(linprobe(*flags))


def test_diverged_rate_leaves_the_others_alone(classifier_flags, tmp_path):
    """1e9 overflows with a weight decay; the run continues, and so does a resumed one."""
    more = '--epochs 3 --weight_decay 1 --warmup_epochs 0 --save_every 1'

    def run(name, *rates, resume=''):
        flags = [*classifier_flags, *more.split(), '--output_dir', tmp_path / name]
        return linprobe(*flags, '--blr', *rates, '--resume', resume)

    stdout = ok(run('both', 0.5, 1e9))
    notes = [line for line in stdout.splitlines() if '--blr 1000000000.0' in line]
    assert len(notes) == 1
    ok(run('one', 0.5))
    both, one = (checkpoint(tmp_path / n / 'checkpoint-last.pth')['model'] for n in ('both', 'one'))
    assert torch.equal(both['head.blr0_5.1.weight'], one['head.1.weight'])
    assert not both['head.blr1000000000_0.1.weight'].any()
    records = log_records(tmp_path / 'both')
    assert records[-1]['heads'][1] == {'blr': 1e9, 'loss': None, 'acc1': None, 'acc5': None}
    assert records[-1]['blr'] == 0.5 and math.isfinite(records[-1]['train_loss'])
    assert records[-1]['test_loss'] == log_records(tmp_path / 'one')[-1]['test_loss']
    stdout = ok(run('resumed', 0.5, 1e9, resume=tmp_path / 'both' / 'checkpoint-1.pth'))
    assert log_records(tmp_path / 'resumed') == records[2:] and notes[0] not in stdout
    one_error_line(run('none', 1e8, 1e9), '--blr')
    last = checkpoint(tmp_path / 'none' / 'checkpoint-last.pth')
    assert last['epoch'] == log_records(tmp_path / 'none')[-1]['epoch'] < 2


def test_fp16_scales_the_loss_of_one_head_only(classifier_flags, tmp_path):
    """A sweep zeroes NaN gradients, so that the loss scale would grow forever."""
    states = []
    for name, rates in (('one', [0.1]), ('both', [0.1, 0.5])):
        flags = [*classifier_flags, '--amp', 'fp16', '--output_dir', tmp_path / name]
        ok(linprobe(*flags, '--blr', *rates))
        states.append(checkpoint(tmp_path / name / 'checkpoint-last.pth')['scaler'])
    assert states[0]['scale'] > 1 and states[1] == {}


# ---- attentive probing ----


def test_attentive_probing(classifier_flags, pretrained, tmp_path):
    """It trains with a batch of one, keeps the encoder, resumes and is evaluated."""
    more = '--input_size 64 --probe attentive --batch_size 1 --blr 0.2 --weight_decay 0.1'
    flags = [*classifier_flags, *more.split()]
    out, resumed = tmp_path / 'out', tmp_path / 'resumed'
    assert 'head (15)' in ok(linprobe(*flags))
    probe, encoder = checkpoint(out / 'checkpoint-1.pth'), checkpoint(pretrained)['model']
    weights = {k: v for k, v in probe['model'].items() if not k.startswith('head.')}
    assert all(torch.equal(value, encoder[name]) for name, value in weights.items())
    records = log_records(out)
    assert records[1]['train_loss'] < records[0]['train_loss']
    ok(linprobe(*flags, '--resume', out / 'checkpoint-0.pth', '--output_dir', resumed))
    again = checkpoint(resumed / 'checkpoint-1.pth')
    assert all(same(probe[k], again[k]) for k in ('model', 'optimizer'))
    evaluated = ok(linprobe(*flags, '--eval', '--resume', out / 'checkpoint-1.pth'))
    assert f'test images: {records[1]["test_acc1"]:.2f}%' in evaluated
    groups = probe['optimizer']['param_groups']
    assert {len(g['params']): g['weight_decay'] for g in groups} == {9: 0, 6: 0.1}
    assert set(probe['optimizer']['state'][0]) == {'step', 'exp_avg', 'exp_avg_sq'}


def test_default_rate_of_the_attentive_probe(classifier_flags):
    """5e-4 * 8 / 256."""
    flags = [*classifier_flags, '--probe', 'attentive', '--epochs', 1]
    assert 'blr 0.0005' in ok(linprobe(*flags))


# ---- errors ----


@pytest.fixture(scope='module')
def sweep_flags(labelled_images):
    flags = '--model vit_tiny_patch8 --input_size 32 --nb_classes 3 --batch_size 8 --num_workers 0'
    flags += ' --warmup_epochs 0 --blr 0.1 0.2 --log_dir'
    return [*flags.split(), '', '--data_path', labelled_images]


@pytest.fixture(scope='module')
def sweep(sweep_flags, pretrained, tmp_path_factory):
    """The output of an epoch with two rates."""
    out = tmp_path_factory.mktemp('sweep')
    ok(linprobe(*sweep_flags, '--finetune', pretrained, '--epochs', 1, '--output_dir', out))
    return out


# Case: (flags, words of the error). SWEEP has two heads, ONE the best of them.
WRONG = {
    'two poolings': ('--probe attentive --global_pool', '--global_pool'),
    'a linear head': ('--probe attentive --resume ONE', 'head.0.latent'),
    'unknown probe': ('--probe nonlinear', '--probe'),
    'one rate too many': ('--lr 0.1 --blr 0.1 0.2', '--lr'),
    'other rates': ('--blr 0.1 0.3 --resume SWEEP', 'head.blr0_3.'),
    'one rate': ('--blr 0.1 --eval --resume SWEEP', 'head.0.'),
    'not a number': ('--blr 0.1 nan', '--blr'),
    'no rate': ('--blr', '--blr'),
}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, classifier_flags, sweep, tmp_path):
    flags, word = WRONG[case]
    files = {'SWEEP': sweep / 'checkpoint-last.pth', 'ONE': sweep / 'checkpoint-best.pth'}
    result = linprobe(*classifier_flags, *[files.get(f, f) for f in flags.split()])
    one_error_line(result, word)
    assert not (tmp_path / 'out').exists()


def test_sweep_killed_between_two_files(sweep_flags, sweep, tmp_path):
    """checkpoint-best.pth, which has one head, is the newest: --resume auto skips it."""
    out = tmp_path / 'out'
    shutil.copytree(sweep, out)
    os.utime(out / 'checkpoint-best.pth')
    flags = [*sweep_flags, '--epochs', 2, '--output_dir', out, '--resume', 'auto']
    assert 'checkpoint-last.pth: epoch 0 is done' in ok(linprobe(*flags))
