"""What main_linprobe.py can do beyond the published command: several rates in one pass, and attentive probing."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import linprobe, torchrun

import main_linprobe
import models_vit
from util.checkpoint import load
from util.probes import PROBES

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
    (['--probe', 'attentive', '--weight_decay', 0.1], None, RATES),
    (['--dist_eval', '--amp', 'bf16', '--global_pool'], torchrun(2), RATES[1:2])],
    ids=['accumulated', 'attentive', 'two processes'])
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


def test_the_attentive_probe_by_hand():
    model = models_vit.vit_tiny_patch8(num_classes=5)
    model.head = PROBES['attentive'](model)
    model.freeze_encoder(head_pools=True).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.norm(model.blocks(model._pos_embed(model.patch_embed(x))))[:, 1:]
    pool = model.head[0]
    query = (pool.latent[0] @ pool.q.weight.T + pool.q.bias).reshape(3, 64)
    keys, values = (tokens @ pool.kv.weight.T + pool.kv.bias).reshape(2, 64, 2, 3, 64).unbind(2)
    weights = (torch.einsum('hc,nlhc->nhl', query, keys) / 8).softmax(2)
    pooled = torch.einsum('nhl,nlhc->nhc', weights, values).flatten(1) @ pool.proj.weight.T + pool.proj.bias
    pooled = pooled + pool.mlp(pool.norm(pooled))
    torch.testing.assert_close(model(x), pooled @ model.head[1].weight.T + model.head[1].bias)
    model.train()(x).sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if name.startswith('head.')}
    assert not model.blocks.training and model.head.training


def test_attentive_probing_end_to_end(classifier_flags, pretrained, tmp_path):
    """A batch of one too, since there is no batch norm; the encoder stays as it was, and a resumed run is the same run."""
    flags = [*classifier_flags, '--input_size', 64, '--probe', 'attentive', '--batch_size', 1, '--blr', 0.2,
             '--weight_decay', 0.1]
    assert '78 tensors matched; missing, start anew: head (15)' in ok(linprobe(*flags))
    probe, encoder = load(tmp_path / 'out' / 'checkpoint-1.pth'), load(pretrained)['model']
    assert all(torch.equal(value, encoder[name]) for name, value in probe['model'].items() if not name.startswith('head.'))
    records = log(tmp_path / 'out')
    assert records[1]['train_loss'] < records[0]['train_loss']
    ok(linprobe(*flags, '--resume', tmp_path / 'out' / 'checkpoint-0.pth', '--output_dir', tmp_path / 'resumed'))
    assert all(same(probe[k], load(tmp_path / 'resumed' / 'checkpoint-1.pth')[k]) for k in ('model', 'optimizer'))
    said = ok(linprobe(*flags, '--eval', '--resume', tmp_path / 'out' / 'checkpoint-1.pth'))
    assert f'test images: {records[1]["test_acc1"]:.2f}%' in said
    decay = {len(group['params']): group['weight_decay'] for group in probe['optimizer']['param_groups']}
    args = main_linprobe.get_args_parser().parse_args(['--probe', 'attentive'])
    main_linprobe.check(args)
    assert args.blr == [5e-4]
    assert decay == {9: 0, 6: 0.1} and set(probe['optimizer']['state'][0]) == {'step', 'exp_avg', 'exp_avg_sq'}


WRONG = {
    'two poolings': (['--probe', 'attentive', '--global_pool'], '--global_pool with --probe attentive'),
    'a linear head': (['--probe', 'attentive', '--resume', 'ONE'], 'another model: head.0.latent is missing in it'),
    'unknown probe': (['--probe', 'nonlinear'], "--probe: invalid choice: 'nonlinear'"),
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
    return out


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, classifier_flags, sweep, tmp_path):
    flags, message = WRONG[case]
    files = {'SWEEP': sweep / 'checkpoint-last.pth', 'ONE': sweep / 'checkpoint-best.pth'}
    result = linprobe(*classifier_flags, *[files.get(f, f) for f in flags])
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode in (1, 2) and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0]
    assert not (tmp_path / 'out').exists()


def test_a_sweep_that_was_killed_between_two_files(labelled_images, sweep, tmp_path):
    """checkpoint-best.pth, written last, is another model's: --resume auto does not take it."""
    shutil.copytree(sweep, tmp_path / 'out')
    os.utime(tmp_path / 'out' / 'checkpoint-best.pth')
    said = ok(linprobe('--model', 'vit_tiny_patch8', '--input_size', 32, '--nb_classes', 3, '--batch_size', 8, '--num_workers', 0,
                       '--data_path', labelled_images, '--epochs', 2, '--warmup_epochs', 0, '--blr', 0.1, 0.2,
                       '--output_dir', tmp_path / 'out', '--log_dir', '', '--resume', 'auto'))
    assert 'checkpoint-last.pth: epoch 0 is done' in said


def test_fp16_scales_the_loss_of_one_head_and_not_of_a_sweep(classifier_flags, tmp_path):
    """A sweep clears what is not finite, and the scale would grow for ever."""
    for name, rates in (('one', [0.1]), ('both', [0.1, 0.5])):
        ok(linprobe(*classifier_flags, '--amp', 'fp16', '--blr', *rates, '--output_dir', tmp_path / name))
    one, both = (load(tmp_path / name / 'checkpoint-last.pth')['scaler'] for name in ('one', 'both'))
    assert one['scale'] > 1 and both == {}
