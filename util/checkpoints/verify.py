"""Checks of checkpoint files and their contents before they are used.

A torch.save file is a zip archive with a CRC-32 per record, which detects corruption.
Records that were exchanged, each with its right CRC-32, are detected by a digest of all of
them, which our own writer adds. PyTorch's legacy format and .safetensors have no checksums;
save_safetensors adds a digest.
"""

import hashlib
import os
import zipfile
from typing import BinaryIO

import safetensors.torch
import torch

from util.errors import UserError
from util.files import atomic_write

DIGEST_RECORD = '.sha256'  # name of our record, and of our entry in .safetensors metadata


# ---- zip archives ----


def write_archive(obj: object, file: BinaryIO) -> None:
    """Write ``obj`` to an open file with torch.save, and add a digest of all records."""
    torch.save(obj, file)
    with zipfile.ZipFile(file, 'a') as archive:  # torch.save puts all records into archive/
        archive.writestr(f'archive/{DIGEST_RECORD}', _digest_records(archive.infolist()))


# Hex SHA-256 of the records' names, sizes and CRC-32s. This detects corruption, not
# tampering: anyone who can write the file can also update the digest. So the CRC-32s are as
# good as the content, and nothing has to be read.
def _digest_records(records):
    listed = sorted(
        (r.filename, r.file_size, r.CRC) for r in records if not r.filename.endswith(DIGEST_RECORD)
    )
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def check_archive(archive: zipfile.ZipFile, size: int) -> str:
    """Check the directory of a zip archive of ``size`` bytes, and our digest if there is one.

    Returns:
        The folder that all its records are in.

    Raises:
        ValueError: if its records are not those that it was saved with; or if they overlap or
            are compressed, so that a small file could fill the memory.
    """
    records, root = archive.infolist(), archive.namelist()[0].partition('/')[0]
    digest = f'{root}/{DIGEST_RECORD}'
    # the code in a TorchScript archive is compressed, but never read
    used = [r for r in records if r.filename.startswith((f'{root}/data', digest))]
    if sum(r.file_size for r in used) > size or any(r.compress_type for r in used):
        raise ValueError('its records are compressed, or overlap')
    if len(set(archive.namelist())) < len(records):
        raise ValueError('two of its records have the same name')
    if not any(r.CRC for r in records):  # PyTorch can omit the checksums, and then writes 0
        for record in records:
            del record.CRC  # zipfile does not compare what is missing
    elif digest in archive.namelist() and archive.read(digest).decode() != _digest_records(records):
        raise ValueError('its records are not those that it was saved with')
    return root


# ---- .safetensors ----


def save_safetensors(
    tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str]
) -> None:
    """Write a .safetensors file whose metadata contain a digest of the tensors.

    Raises:
        UserError: if it cannot be written. An earlier file stays as it was.
    """
    metadata = {'format': 'pt', **metadata, DIGEST_RECORD: _digest_tensors(tensors)}
    atomic_write(path, lambda f: f.write(safetensors.torch.save(tensors, metadata)))


def load_safetensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors file by name.

    Raises:
        ValueError: if the file has our digest and its tensors do not match it.
        safetensors.SafetensorError: if it is damaged.
    """
    with safetensors.safe_open(path, 'pt') as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        if (f.metadata() or {}).get(DIGEST_RECORD) not in (None, _digest_tensors(tensors)):
            raise ValueError('its tensors are not those that it was saved with')
    return tensors


# hex SHA-256 of the names, dtypes, shapes and bytes of a dict of tensors
def _digest_tensors(tensors):
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(repr((name, value.dtype, list(value.shape))).encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


# ---- contents ----


def check_tensor_sizes(state_dict: dict[str, torch.Tensor]) -> None:
    """Check that copying these tensors does not need far more memory than their storages.

    A file of 1 kB can hold an expanded tensor of 1 TB, which costs nothing until it is copied.

    Raises:
        ValueError: if it does.
    """
    storages = [value.untyped_storage() for value in state_dict.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    # tied weights share a storage, and any machine has room for 8 GB
    if sum(v.nbytes for v in state_dict.values()) > max(4 * stored, 1 << 33):
        raise ValueError('its tensors claim more numbers than it has')


# What these optimizers cannot continue without, for each parameter.
_REQUIRED = {'AdamW': {'step', 'exp_avg', 'exp_avg_sq'}, 'LARS': {'mu'}}


def check_training_state(checkpoint: dict, optimizer: torch.optim.Optimizer) -> None:
    """Check types, ranges and shapes of the entries of a checkpoint besides the weights.

    The optimizer's own load_state_dict compares little more than counts: anything else would
    fail in the middle of a step.

    Args:
        checkpoint: 'epoch' and 'optimizer'; optionally 'scaler' and 'max_accuracy'; 'step',
            'step_images' and 'sums' if it was saved within the epoch after 'epoch'.
        optimizer: the optimizer that is to take over the state.

    Raises:
        UserError, ValueError, KeyError, TypeError, AttributeError: if it does not fit.
    """
    within_epoch, saved = 'step' in checkpoint, checkpoint['optimizer']
    pairs = [  # (name, example, value): see _is_like
        ('epoch', -1 if within_epoch else 0, checkpoint['epoch']),
        ('step', 0, checkpoint.get('step', 0)),
        ('step_images', 0, checkpoint.get('step_images', 0)),
        ('max_accuracy', -1.0, checkpoint.get('max_accuracy', 0.0)),
        ('sums', 0, len(checkpoint['sums']) if within_epoch else 0),
        *((name, 0.0, value) for name, value in (checkpoint.get('scaler') or {}).items()),
    ]
    params = {}
    for ours, theirs in zip(optimizer.param_groups, saved['param_groups']):
        params.update(zip(theirs['params'], ours['params']))
        pairs += [(k, value, theirs.get(k)) for k, value in ours.items() if k != 'params']
    for i, state in saved['state'].items():
        required = _REQUIRED.get(type(optimizer).__name__, set())
        for name in required | state.keys():
            value, may_be_number = state.get(name), name == 'step' or name not in required
            if may_be_number and _is_like(torch.zeros(()), value):
                value = value.item()  # old releases have a number
            is_number = name == 'step' or may_be_number and isinstance(value, int | float)
            pairs.append((f'{name} of parameter {i}', 0.0 if is_number else params[i], value))
    for name, example, value in pairs:
        if not _is_like(example, value) or name.startswith('step of') and value % 1:
            raise UserError(f'{name} is missing, or has another type, range or shape')


# Whether value is of the kind of example: a tensor, a pair, a switch or a number. Numbers may be
# zero or more, or as low as the example. Switches may be missing: releases of PyTorch differ in
# those that they have.
def _is_like(example, value):
    if isinstance(example, torch.Tensor):
        return (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.shape == example.shape
            # an expanded tensor has less memory than elements, and cannot be written to
            and value.untyped_storage().nbytes() >= value.nbytes
        )
    if isinstance(example, tuple | list):
        same_length = isinstance(value, tuple | list) and len(value) == len(example)
        return same_length and all(map(_is_like, example, value))
    types = {int: [int], float: [int, float]}.get(type(example), [bool, type(None)])
    limit = 1e30 if isinstance(example, float) else 1e9
    return type(value) in types and min(example or 0, 0) <= (value or 0) < limit
