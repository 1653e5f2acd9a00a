"""Device and compilation."""

import pytest
import torch

from util.errors import UserError
from util.runtime import choose_device, resolve_compile


def test_resolve_compile():
    assert resolve_compile('on', 'cpu') and not resolve_compile('off', 'cuda')
    assert not resolve_compile('auto', 'cpu') and resolve_compile('auto', 'cuda')


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_device_without_a_gpu(capsys):
    assert choose_device('cpu').type == 'cpu' and not capsys.readouterr().err
    assert choose_device(None).type == 'cpu' and 'CPU' in capsys.readouterr().err
    for name in ('cuda', 'cuda:1', 'mps', 'nonsense'):
        with pytest.raises(UserError, match=f'--device {name}'):
            choose_device(name)
