"""Checkpoint files that are damaged, altered or hostile, and training state that does not fit."""

import io
import random
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.helpers import same
from tests.stress import damage
from util.checkpoints import verify
from util.checkpoints.io import load, read_weights, save_on_master
from util.errors import UserError


def checkpoint():
    torch.manual_seed(0)
    return {
        'model': {f'blocks.{i}.weight': torch.randn(20, 30) for i in range(4)},
        'epoch': 3,
        'args': Namespace(lr=0.1),
    }


def refused(path, *words):
    """Assert that the file is refused with one line that has its name and all words."""
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.isprintable() and all(word in message for word in (str(path), *words)), message


@pytest.fixture
def ours(tmp_path):
    save_on_master(checkpoint(), tmp_path / 'ours.pth')
    return tmp_path / 'ours.pth'


def test_flipped_bits(ours):
    """PyTorch accepts nearly all of them. Those that are accepted here change nothing."""
    intact, rng = ours.read_bytes(), random.Random(0)
    refusals = other_weights_of_pytorch = 0
    for place in rng.sample(range(len(intact)), 150):
        data = bytearray(intact)
        data[place] ^= 1 << rng.randrange(8)
        ours.write_bytes(data)
        try:
            found = torch.load(ours, weights_only=False)
            other_weights_of_pytorch += not same(found['model'], checkpoint()['model'])
        except Exception:
            pass
        try:
            assert same(load(ours), checkpoint())
        except UserError:
            refusals += 1
    assert refusals > 130 and other_weights_of_pytorch > 100


def test_truncated_file(ours):
    intact = ours.read_bytes()
    for length in range(0, len(intact), 97):
        ours.write_bytes(intact[:length])
        refused(ours)


def test_digest_detects_exchanged_records(ours):
    """Their checksums are right. Without our digest they are not detected."""
    records = damage.unzip(ours.read_bytes())
    one, two = [r for r in records if '/data/' in r[0]][:2]
    one[1], two[1] = two[1], one[1]
    ours.write_bytes(damage.zipped(records))
    assert not same(torch.load(ours, weights_only=False), checkpoint())
    refused(ours)
    assert records[-1][0].endswith(verify.DIGEST_RECORD)
    ours.write_bytes(damage.zipped(records[:-1]))
    assert not same(load(ours), checkpoint())


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_two_records_with_one_name(ours):
    """The second one would replace the first, without our digest unnoticed."""
    records = [r for r in damage.unzip(ours.read_bytes()) if verify.DIGEST_RECORD not in r[0]]
    one, two = [r for r in records if '/data/' in r[0]][:2]
    ours.write_bytes(damage.zipped([*records, (one[0], two[1])]))
    refused(ours, 'same name')


def test_digest_detects_an_altered_pickle(ours):
    records = damage.unzip(ours.read_bytes())
    for old, new in ((b'blocks.1', b'blocks.9'), (b'blocks.2', b'blocks.1')):
        records[0][1] = records[0][1].replace(old, new)
    ours.write_bytes(damage.zipped(records))
    refused(ours)


def test_file_saved_again_by_pytorch(ours):
    changed = torch.load(ours, weights_only=False)
    changed['model']['blocks.0.weight'] += 1
    torch.save(changed, ours)
    assert same(load(ours), changed)


def test_pytorch_reads_files_with_a_digest(ours):
    assert same(torch.load(ours, weights_only=False), checkpoint())
    assert same(torch.load(ours, weights_only=False, mmap=True), checkpoint())
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[-1] == f'archive/{verify.DIGEST_RECORD}'


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy format'])
def test_contents_of_foreign_files(zipped, tmp_path):
    """The content is that of torch.load, except for NumPy objects, which are ignored."""
    tensor = torch.arange(12.0)
    content = {
        'model': {
            'view': tensor[2:8].view(2, 3).T,
            'shared': tensor,
            'bool': torch.tensor(True),
            'bfloat16': torch.ones(3).bfloat16(),
            'uint16': torch.tensor([1, 65535], dtype=torch.uint16),
            'empty': torch.zeros(0),
            'parameter': torch.nn.Parameter(tensor),
        },
        'args': Namespace(
            dtype=torch.float16, size=torch.Size([3]), some={1, 2}, device=torch.device('cpu')
        ),
        'epoch': 3,
        'bytes': b'x\xff',
        'numpy': np.arange(100),
        'number': np.float64(1),
    }
    path = tmp_path / 'file.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = load(path)
    del content['numpy'], content['number'], found['numpy'], found['number']
    assert same(found, content) and vars(found['args']) == vars(content['args'])
    model = found['model']
    assert model['view'].untyped_storage().data_ptr() == model['shared'].data_ptr()


@pytest.mark.skipif(
    not hasattr(torch.serialization, 'set_crc32_options'), reason='PyTorch always writes checksums'
)
def test_archive_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(), tmp_path / 'file.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load(tmp_path / 'file.pth'), checkpoint())


# ---- memory ----


def tensor_file(numel, size, stride, offset=0):
    """Return an archive of one float32 tensor whose pickle has these numbers, and 40 bytes."""
    buffer = io.BytesIO()
    torch.save({'model': {'a': torch.zeros(10)}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        pickled = archive.read('archive/data.pkl')

    def number(n):
        return b'\x8a\x09' + n.to_bytes(9, 'little', signed=True)

    persistent_id_end, offset_and_shape, strides = b'K\nt', b'K\x00K\n\x85', b'K\x01\x85'
    assert all(pickled.count(x) == 1 for x in (persistent_id_end, offset_and_shape, strides))
    pickled = pickled.replace(persistent_id_end, number(numel) + b't')
    head, _, tail = pickled.partition(offset_and_shape)
    memo, _, tail = tail.partition(strides)
    shape, steps = (b'(' + b''.join(map(number, v)) + b't' for v in (size, stride))
    pickled = head + number(offset) + shape + memo + steps + tail
    records = {'data.pkl': pickled, 'data/0': bytes(40), 'version': b'3\n'}
    return damage.zipped([(f'archive/{name}', content) for name, content in records.items()])


@pytest.mark.parametrize(
    'numel, size, stride, offset',
    [
        (10**15, [10], [1], 0),
        (20, [20], [1], 0),
        (5, [10], [1], 0),
        (-10, [10], [1], 0),
        (10, [20], [1], 0),
        (10, [10], [1], 5),
        (10, [10], [1], -1),
        (10, [2**40, 2**40], [1, 1], 0),
        (10, [5], [-1], 9),
    ],
    ids=[
        'storage too large',
        'storage larger than its record',
        'storage smaller than its record',
        'storage of negative size',
        'tensor larger than its storage',
        'tensor ends outside of its storage',
        'tensor starts outside of its storage',
        'overflow',
        'negative stride',
    ],
)
def test_sizes_that_do_not_fit(numel, size, stride, offset, tmp_path):
    path = tmp_path / 'file.pth'
    path.write_bytes(tensor_file(10, [10], [1]))
    assert load(path)['model']['a'].shape == (10,)  # nothing else is wrong with the file
    path.write_bytes(tensor_file(numel, size, stride, offset))
    refused(path)


def test_zip_bomb(tmp_path):
    path = tmp_path / 'file.pth'
    records = damage.unzip(tensor_file(10, [10], [1]))
    path.write_bytes(
        damage.zipped([*records, ('archive/data/1', bytes(1 << 27))], zipfile.ZIP_DEFLATED)
    )
    assert path.stat().st_size < 1e6
    refused(path)
    data = bytearray(damage.zipped(records))  # the size in the archive's directory is too large
    at = data.index(b'PK\x01\x02') + 20
    data[at : at + 8] = (2**31).to_bytes(4, 'little') * 2
    path.write_bytes(data)
    refused(path)


class SetOf:
    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return set, (self.value,)


def test_pickle_that_unpacks_an_expanded_tensor(tmp_path):
    """torch.load makes a set of 2**16 tensors, from 2 kB; with 2**30 it fills the memory."""
    content = {'model': {'a': torch.zeros(2)}, 'set': SetOf(torch.zeros(1).expand(1 << 16))}
    torch.save(content, tmp_path / 'file.pth')
    assert (tmp_path / 'file.pth').stat().st_size < 2500
    assert len(torch.load(tmp_path / 'file.pth', weights_only=True)['set']) == 1 << 16
    assert not load(tmp_path / 'file.pth')['set']


def test_expanded_weights(tmp_path):
    """A tensor of a terabyte in a file of a kilobyte fails before anything copies it."""
    huge = torch.zeros(()).expand(1 << 20, 1 << 18)
    torch.save({'model': {'blocks.0.weight': huge}}, tmp_path / 'in.pth')
    with pytest.raises(UserError, match='in.pth'):
        read_weights(tmp_path / 'in.pth')


# ---- .safetensors ----


def test_safetensors_digest(tmp_path):
    """Changes of values, names, shapes and dtypes are detected; in foreign files they are not."""
    weights, path = checkpoint()['model'], tmp_path / 'x.safetensors'
    verify.save_safetensors(weights, path, {'epoch': '3'})
    assert same(load(path), weights)
    with safe_open(path, 'pt') as f:
        metadata = f.metadata()
    assert metadata['epoch'] == '3' and metadata['format'] == 'pt'
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(path)
    for changed in (
        dict(zip(reversed(weights), weights.values())),
        {name: value.T.contiguous() for name, value in weights.items()},
        {name: value.view(torch.int32) for name, value in weights.items()},
    ):
        safetensors.torch.save_file(changed, path, metadata=metadata)
        refused(path)
        safetensors.torch.save_file(changed, path)
        assert same(load(path), dict(sorted(changed.items())))


def test_safetensors_header_without_end(tmp_path):
    for length in (2**63, 10**9, 1 << 25):
        (tmp_path / 'x.safetensors').write_bytes(length.to_bytes(8, 'little') + b'{' * 1000)
        refused(tmp_path / 'x.safetensors')
    with open(tmp_path / 'x.safetensors', 'wb') as f:  # a header of the length that it claims
        f.write((1 << 25).to_bytes(8, 'little') + b'{"a":' * 100)
        f.truncate(1 << 26)
    refused(tmp_path / 'x.safetensors')


# ---- training state ----


def resumable():
    """Return a checkpoint and an optimizer that it fits."""
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.ones(3, 4)
    optimizer.step()
    scaler = {
        'scale': 65536.0,
        'growth_factor': 2.0,
        'backoff_factor': 0.5,
        'growth_interval': 2000,
        '_growth_tracker': 0,
    }
    content = {
        'epoch': 3,
        'optimizer': optimizer.state_dict(),
        'scaler': scaler,
        'max_accuracy': 50.0,
    }
    return content, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4))], fused=True)


@pytest.mark.parametrize(
    'place, name, value',
    [
        ([], 'epoch', 'three'),
        ([], 'epoch', -1),
        ([], 'epoch', 3.5),
        ([], 'epoch', 2**63),
        ([], 'step', 7),  # without sums
        ([], 'step', -7),
        ([], 'max_accuracy', None),
        ([], 'optimizer', []),
        (['scaler'], 'scale', 'x'),
        (['optimizer'], 'state', [1]),
        (['optimizer'], 'param_groups', [1]),
        (['optimizer', 'param_groups', 0], 'betas', 0.9),
        (['optimizer', 'param_groups', 0], 'betas', (0.9, 'x')),
        (['optimizer', 'param_groups', 0], 'eps', float('nan')),
        (['optimizer', 'param_groups', 0], 'weight_decay', 10**400),
        (['optimizer', 'state'], 7, {}),
        (['optimizer', 'state'], 0, {}),
        (['optimizer', 'state', 0], 'exp_avg', 'x'),
        (['optimizer', 'state', 0], 'exp_avg', torch.zeros(4, 3)),
        (['optimizer', 'state', 0], 'step', [1]),
        (['optimizer', 'state', 0], 'exp_avg', 0.5),
        (['optimizer', 'state', 0], 'exp_avg', torch.tensor(0.5)),
        (['optimizer', 'state', 0], 'step', 1.5),
        (['optimizer', 'state', 0], 'step', torch.tensor(-1.0)),
        (['optimizer', 'state', 0], 'exp_avg', torch.zeros(()).expand(3, 4)),
        (['optimizer', 'state', 0], 'exp_avg', torch.zeros(3, 4).int()),
        (['optimizer', 'state', 0], 'other', [[1]]),
        (['optimizer', 'state', 0], 'other', torch.zeros(2)),
    ],
)
def test_training_state_that_does_not_fit(place, name, value):
    content, optimizer = resumable()
    verify.check_training_state(content, optimizer)
    inner = content
    for part in place:
        inner = inner[part]
    inner[name] = value
    with pytest.raises((UserError, ValueError, TypeError, KeyError, AttributeError)):
        verify.check_training_state(content, optimizer)


def test_training_state_of_other_releases_of_pytorch():
    """Switches may be missing or new. An option with a number must be there."""
    content, optimizer = resumable()
    group = content['optimizer']['param_groups'][0]
    del group['fused']
    group['a_switch'] = True
    verify.check_training_state(content, optimizer)
    del group['weight_decay']
    with pytest.raises(UserError, match='weight_decay'):
        verify.check_training_state(content, optimizer)


# ---- messages ----


def test_names_from_a_file_cannot_control_the_terminal(tmp_path):
    """Line ends, escape sequences and long names are escaped or truncated."""
    for name in ('a\nerror: b', '\x1b[2Ja', 'x' * 100_000):
        pickled = b'\x80\x02X' + len(name).to_bytes(4, 'little') + name.encode() + b'Q.'
        (tmp_path / 'x.pth').write_bytes(damage.zipped([('archive/data.pkl', pickled)]))
        refused(tmp_path / 'x.pth')
        pickled = b'\x80\x02c' + name.replace('\n', '').encode() + b'\nb\n.'
        (tmp_path / 'x.pth').write_bytes(damage.zipped([('archive/data.pkl', pickled)]))
        with pytest.raises(UserError) as error:
            load(tmp_path / 'x.pth')
        assert str(error.value).isprintable() and len(str(error.value)) < 2100
    assert str(UserError('ä – 日本\n')) == 'ä – 日本\\n'


def test_nothing_is_imported(tmp_path):
    pickled = b'\x80\x02cantigravity\ngeohash\n.'
    (tmp_path / 'x.pth').write_bytes(damage.zipped([('archive/data.pkl', pickled)]))
    refused(tmp_path / 'x.pth', 'antigravity.geohash')
    (tmp_path / 'x.pth').write_bytes(pickled)
    refused(tmp_path / 'x.pth', 'antigravity.geohash')
    assert 'antigravity' not in sys.modules


def test_state_of_another_optimizer():
    """NAdam keeps a number per parameter besides tensors: its state is accepted."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.NAdam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    verify.check_training_state({'epoch': 0, 'optimizer': optimizer.state_dict()}, optimizer)
