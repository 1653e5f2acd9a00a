"""What is recognised in a checkpoint file before PyTorch reads it, and what is taken as before."""

import io
import random
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import stress_mutations as mutations
import torch
from safetensors import safe_open

from tools import export
from util import integrity
from util.checkpoint import load, save_on_master
from util.errors import UserError


def checkpoint():
    torch.manual_seed(0)
    return {'model': {f'blocks.{i}.weight': torch.randn(20, 30) for i in range(4)}, 'epoch': 3, 'args': Namespace(lr=0.1)}


def refused(path, *words):
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert str(error.value).isprintable()


def equal(a, b):
    return a['model'].keys() == b['model'].keys() and all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())


@pytest.fixture
def ours(tmp_path):
    save_on_master(checkpoint(), tmp_path / 'ours.pth')
    return tmp_path / 'ours.pth'


def test_a_flipped_bit_anywhere(ours):
    """PyTorch itself takes nearly all of them. Those that are taken here change nothing."""
    whole, rng = ours.read_bytes(), random.Random(0)
    outcomes = {'refused': 0, 'the same': 0, 'other weights of PyTorch': 0}
    for place in rng.sample(range(len(whole)), 150):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        ours.write_bytes(data)
        try:
            found = torch.load(ours, weights_only=False)
            outcomes['other weights of PyTorch'] += not equal(found, checkpoint())
        except Exception:
            pass
        try:
            found = load(ours)
            assert equal(found, checkpoint()) and found['epoch'] == 3
            outcomes['the same'] += 1
        except UserError:
            outcomes['refused'] += 1
    assert outcomes['refused'] > 130 and outcomes['other weights of PyTorch'] > 100


def test_cut_anywhere(ours):
    whole = ours.read_bytes()
    for length in range(0, len(whole), 97):
        ours.write_bytes(whole[:length])
        refused(ours, 'damaged or not a checkpoint')


def test_exchanged_records_are_told_by_our_digest(ours):
    """With right checksums; as an archive of another's making they are what that other wrote."""
    records = mutations.unzip(ours.read_bytes())
    one, two = [r for r in records if '/data/' in r[0]][:2]
    one[1], two[1] = two[1], one[1]
    ours.write_bytes(mutations.zipped(records))
    assert not equal(torch.load(ours, weights_only=False), checkpoint())
    refused(ours, 'its records are not those that it was saved with')
    ours.write_bytes(mutations.zipped(records[:-1]))
    assert records[-1][0].endswith(integrity.SEAL) and not equal(load(ours), checkpoint())


def test_a_change_of_the_pickle_is_told_by_our_digest(ours):
    records = mutations.unzip(ours.read_bytes())
    for old, new in ((b'blocks.1', b'blocks.9'), (b'blocks.2', b'blocks.1'), (b'blocks.9', b'blocks.2')):
        records[0][1] = records[0][1].replace(old, new)
    ours.write_bytes(mutations.zipped(records))
    refused(ours, 'its records are not those that it was saved with')


def test_a_user_may_change_a_checkpoint(ours):
    """Loaded, changed and saved by PyTorch, it is another file, and as good."""
    changed = torch.load(ours, weights_only=False)
    changed['model']['blocks.0.weight'] += 1
    torch.save(changed, ours)
    assert equal(load(ours), changed)


def test_the_digest_is_in_nobodys_way(ours):
    assert torch.load(ours, weights_only=False).keys() == checkpoint().keys()
    assert equal(torch.load(ours, weights_only=False, mmap=True), checkpoint())
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None and archive.namelist()[-1] == f'archive/{integrity.SEAL}'


@pytest.mark.parametrize('kwargs', [{}, {'_use_new_zipfile_serialization': False}], ids=['zip', 'older format'])
def test_files_of_others(kwargs, tmp_path):
    tensor = torch.arange(12.0)
    given = {'model': {'a': tensor[2:8].view(2, 3).T, 'b': tensor, 'c': torch.nn.Parameter(tensor), 'e': torch.tensor(True),
                       'd': torch.ones(3).bfloat16(), 'f': torch.zeros(0)},
             'args': Namespace(dtype=torch.float16, size=torch.Size([3]), some={1, 2}, device=torch.device('cpu')),
             'epoch': 3, 'numpy': np.arange(100), 'number': np.float64(1), 'bytes': b'x'}
    torch.save(given, tmp_path / 'file.pth', **kwargs)
    assert equal(load(tmp_path / 'file.pth'), given)


@pytest.mark.skipif(not hasattr(torch.serialization, 'set_crc32_options'), reason='PyTorch always writes checksums')
def test_an_archive_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(), tmp_path / 'file.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(load(tmp_path / 'file.pth'), checkpoint())


# ---- what would fill the memory, or read beyond it ----

def tensor_file(numel, size, stride, offset=0, content=bytes(40)):
    """A checkpoint of one float32 tensor, in an archive with right checksums, of which the pickle says what it likes."""
    buffer = io.BytesIO()
    torch.save({'model': {'a': torch.zeros(10)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read('archive/data.pkl')
    old = b'K\nt'  # numel, at the end of the persistent id
    assert pickled.count(old) == 1 and pickled.count(b'K\x00K\n\x85') == 1 and pickled.count(b'K\x01\x85') == 1

    def number(n):
        return b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)

    pickled = pickled.replace(old, number(numel) + b't')
    head, _, tail = pickled.partition(b'K\x00K\n\x85')
    tail = tail.partition(b'K\x01\x85')[2]
    memo = pickled.partition(b'K\x00K\n\x85')[2].partition(b'K\x01\x85')[0]
    shape, steps = (b'(' + b''.join(map(number, v)) + b't' for v in (size, stride))
    pickled = head + number(offset) + shape + memo + steps + tail
    return mutations.zipped([('archive/data.pkl', pickled), ('archive/data/0', content), ('archive/version', b'3\n')])


RECORD = 'the record 0 of a tensor is not as large as it should be'


@pytest.mark.parametrize('numel, size, stride, offset, message', [
    (10**15, [10], [1], 0, RECORD), (20, [20], [1], 0, RECORD), (5, [10], [1], 0, RECORD),
    (-10, [10], [1], 0, 'it names bytes in a way that PyTorch does not'), (10, [20], [1], 0, 'resize'),
    (10, [10], [1], 5, 'resize'), (10, [10], [1], -1, 'offset'), (10, [2**40, 2**40], [1, 1], 0, 'overflow'),
    (10, [5], [-1], 9, 'overflow')],
    ids=['10**15 numbers', 'more than the record', 'fewer', 'less than none', 'a longer tensor', 'beyond the end',
         'before the beginning', 'overflow', 'backwards'])
def test_sizes_that_do_not_fit(numel, size, stride, offset, message, tmp_path):
    path = tmp_path / 'file.pth'
    path.write_bytes(tensor_file(10, [10], [1]))
    assert load(path)['model']['a'].shape == (10,)  # the file is right but for what is changed
    path.write_bytes(tensor_file(numel, size, stride, offset))
    refused(path, 'damaged or not a checkpoint', message)


def test_a_zip_bomb(tmp_path):
    """A megabyte that would become a gigabyte, and one record under many names."""
    path = tmp_path / 'file.pth'
    records = mutations.unzip(tensor_file(10, [10], [1]))
    path.write_bytes(mutations.zipped([*records, ('archive/data/1', bytes(1 << 30))], zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 2e6
    refused(path, 'compressed records')
    path.write_bytes(mutations.zipped([*records, records[1]]))
    refused(path, 'two records of one name')
    data = bytearray(mutations.zipped(records))
    at = data.index(b'PK\x01\x02') + 20
    data[at:at + 8] = (2**31).to_bytes(4, 'little') * 2
    path.write_bytes(data)
    refused(path, 'claim more bytes than the file has')


def test_a_tensor_of_a_terabyte_in_a_kilobyte(tmp_path):
    """It loads, as one number with strides of 0; nobody copies it."""
    torch.save({'model': {'blocks.0.weight': torch.zeros(()).expand(1 << 20, 1 << 18)}}, tmp_path / 'in.pth')
    args = Namespace(checkpoint=str(tmp_path / 'in.pth'), format='safetensors', output=str(tmp_path / 'x.safetensors'))
    with pytest.raises(UserError, match='its tensors claim more numbers than it has'):
        export.main(args)


# ---- .safetensors ----

def test_our_safetensors(tmp_path):
    """A flipped bit in the tensors of ours is told; another's file has no checksum."""
    weights, path = checkpoint()['model'], tmp_path / 'x.safetensors'
    for save, told in ((lambda: export.save(weights, str(path), {}), True),
                       (lambda: safetensors.torch.save_file(weights, path), False)):
        save()
        assert equal({'model': load(path)}, checkpoint())
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
        if told:
            refused(path, 'its tensors are not those that it was saved with')
        else:
            assert not equal({'model': load(path)}, checkpoint())


def test_the_digest_of_safetensors_is_of_names_and_kinds_too(tmp_path):
    weights, path = checkpoint()['model'], tmp_path / 'x.safetensors'
    export.save(weights, str(path), {})
    with safe_open(path, 'pt') as f:
        metadata = f.metadata()
    swapped = dict(zip(reversed(weights), weights.values()))
    turned = {name: value.T.contiguous() for name, value in weights.items()}
    for changed in (swapped, turned, {name: value.view(torch.int32) for name, value in weights.items()}):
        safetensors.torch.save_file(changed, path, metadata=metadata)
        refused(path, 'its tensors are not those that it was saved with')


def test_a_safetensors_header_without_end(tmp_path):
    for length in (2**63, 10**9, 1 << 25):
        (tmp_path / 'x.safetensors').write_bytes(length.to_bytes(8, 'little') + b'{' * 1000)
        refused(tmp_path / 'x.safetensors', 'its header is longer than')
    with open(tmp_path / 'x.safetensors', 'wb') as f:  # one that is as long as it says
        f.write((1 << 25).to_bytes(8, 'little') + b'{"a":' * 100)
        f.truncate(1 << 26)
    refused(tmp_path / 'x.safetensors', 'its header is longer than')


# ---- the state of a run ----

def resumable():
    """(checkpoint, optimiser like the one it is of)."""
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    scaler = {'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000, '_growth_tracker': 0}
    whole = {'epoch': 3, 'optimizer': optimizer.state_dict(), 'scaler': scaler, 'max_accuracy': 50.0}
    return whole, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4))], fused=True)


@pytest.mark.parametrize('place, name, value', [
    ([], 'epoch', 'three'), ([], 'epoch', -1), ([], 'epoch', 3.5), ([], 'epoch', 2**63), ([], 'max_accuracy', None),
    ([], 'optimizer', []), (['scaler'], 'scale', 'x'), (['optimizer'], 'state', [1]), (['optimizer'], 'param_groups', [1]),
    (['optimizer', 'param_groups', 0], 'betas', 0.9), (['optimizer', 'param_groups', 0], 'betas', (0.9, 'x')),
    (['optimizer', 'param_groups', 0], 'eps', float('nan')), (['optimizer', 'param_groups', 0], 'weight_decay', 10**400),
    (['optimizer', 'state'], 7, {}), (['optimizer', 'state'], 0, {}), (['optimizer', 'state', 0], 'exp_avg', 'x'),
    (['optimizer', 'state', 0], 'exp_avg', torch.zeros(4, 3)), (['optimizer', 'state', 0], 'step', [1]),
    (['optimizer', 'state', 0], 'exp_avg', 0.5), (['optimizer', 'state', 0], 'exp_avg', torch.tensor(0.5)),
    (['optimizer', 'state', 0], 'step', 1.5), (['optimizer', 'state', 0], 'step', torch.tensor(-1.0)),
    (['optimizer', 'state', 0], 'exp_avg', torch.zeros(()).expand(3, 4)),
    (['optimizer', 'state', 0], 'exp_avg', torch.zeros(3, 4).int())])
def test_a_state_that_a_run_would_stumble_over(place, name, value):
    checkpoint, optimizer = resumable()
    integrity.check_training_state(checkpoint, optimizer)
    inside = checkpoint
    for part in place:
        inside = inside[part]
    inside[name] = value
    with pytest.raises((ValueError, TypeError)):
        integrity.check_training_state(checkpoint, optimizer)


def test_states_of_other_releases():
    """PyTorch has had more and fewer switches; an option with a number in it has to be there."""
    checkpoint, optimizer = resumable()
    group = checkpoint['optimizer']['param_groups'][0]
    del group['fused']
    group['a_switch'] = True
    integrity.check_training_state(checkpoint, optimizer)
    del group['weight_decay']
    with pytest.raises(ValueError, match='weight_decay is missing'):
        integrity.check_training_state(checkpoint, optimizer)


# ---- what is said of it ----

def test_one_line_whatever_the_file_says(tmp_path):
    """Line ends, colours and endless names of a file do not reach the terminal."""
    for name in ('a\nerror: b', '\x1b[2Ja', 'x' * 100_000):
        torch.save({'state_dict': {'blocks.0.weight': torch.zeros(2), name: torch.zeros(2)}}, tmp_path / 'x.pth')
        with pytest.raises(UserError) as error:
            export.main(Namespace(checkpoint=str(tmp_path / 'x.pth'), format='timm', output=str(tmp_path / 'y.pth')))
        assert str(error.value).isprintable() and len(str(error.value)) < 2100
    assert str(UserError('ä – 日本\n')) == 'ä – 日本\\n'


def test_nothing_is_imported_to_look_at_it(tmp_path):
    (tmp_path / 'x.pth').write_bytes(b'\x80\x02cantigravity\ngeohash\n.')
    refused(tmp_path / 'x.pth', 'is refused: it holds antigravity.geohash')
    assert 'antigravity' not in sys.modules
