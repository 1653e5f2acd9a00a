"""Test the code in docs/recipes.md."""

import re

import torch
import torch.nn.functional as F

import clip
from models_milan import mae_vit_tiny_patch8
from tests.docs.pages import blocks, page
from tests.helpers import ok, pretrain


def test_blind_loss_is_the_lowest_of_a_constant_prediction(tiny_clip):
    names = {'F': F}
    exec(blocks('docs/recipes.md', 'python')[0], names)
    model = mae_vit_tiny_patch8(use_clip=True, target_dim=48)
    with torch.no_grad():
        tokens, _ = clip.load(str(tiny_clip), 'cpu')[0].encode_tokens(torch.randn(3, 3, 64, 64))
    order = torch.arange(64).expand(3, -1)

    def loss(constant):
        return model.forward_loss(None, constant.expand(3, 65, -1), tokens, order, 16)

    best = F.normalize(tokens, dim=-1).mean(dim=(0, 1))
    torch.testing.assert_close(names['blind_loss'](tokens), loss(best))
    assert all(loss(best + 0.1 * torch.randn(48)) > loss(best) for _ in range(20))


def test_pretraining_further_starts_at_epoch_0(pretrained, small_images, tmp_path):
    start = tmp_path / 'start.pth'
    code = re.search(r'python -c "(.*)"', page('docs/recipes.md'))[1]
    exec(code.replace('FILE', str(pretrained)).replace('start.pth', str(start)), {})
    assert set(torch.load(start)) == {'model'}
    flags = '--model mae_vit_tiny_patch8 --input_size 64 --batch_size 8 --epochs 1 --num_workers 0'
    folders = ['--data_path', small_images, '--output_dir', '', '--log_dir', '']
    assert 'Epoch [0]' in ok(pretrain(*flags.split(), *folders, '--resume', start))
