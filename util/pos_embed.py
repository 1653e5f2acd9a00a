"""Sine-cosine position tables, and the resizing of position embeddings to another grid."""

import numpy as np
import torch
import torch.nn.functional as F


def get_2d_sincos_pos_embed(embed_dim, grid_size, cls_token=False):
    """Fixed 2-D table (MAE, appendix A.1), computed in float64.

    The first half of the channels encodes the column, the second half the row.

    Args:
        embed_dim: width, a multiple of 4.
        grid_size: patches along a side.
        cls_token: put a row of zeros for the class token first.

    Returns:
        float64 array [grid_size**2 (+ 1), embed_dim], rows in image order.
    """
    if embed_dim % 4:
        raise ValueError(f'a 2-D sine-cosine table needs a width that is a multiple of 4, not {embed_dim}')
    column, row = np.meshgrid(np.arange(grid_size), np.arange(grid_size))
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, np.stack([column, row]))
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def get_2d_sincos_pos_embed_from_grid(embed_dim, grid):
    """grid [2, ...], columns then rows -> [M, embed_dim]."""
    return np.concatenate([get_1d_sincos_pos_embed_from_grid(embed_dim // 2, g) for g in grid], axis=1)


def get_1d_sincos_pos_embed_from_grid(embed_dim, pos):
    """Positions of any shape with M entries -> [M, embed_dim]: sines, then cosines."""
    omega = 10000.0 ** (-np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angle = np.outer(pos.reshape(-1).astype(np.float64), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def interpolate_pos_embed(model, checkpoint_model):
    """Resize ``checkpoint_model['pos_embed']`` in place to the grid of ``model``: bicubic, the class token's row kept.

    Args:
        model: has ``pos_embed`` [1, extra + L', D] and ``patch_embed.num_patches``.
        checkpoint_model: a state dict; left alone if it has no pos_embed or the grids agree.
    """
    if 'pos_embed' not in checkpoint_model:
        return
    pos_embed = checkpoint_model['pos_embed']
    num_patches = model.patch_embed.num_patches
    extra = model.pos_embed.shape[-2] - num_patches
    old_size = int((pos_embed.shape[-2] - extra) ** 0.5)
    new_size = int(num_patches**0.5)
    if old_size == new_size:
        return
    print(f'Position embedding resized from {old_size}x{old_size} to {new_size}x{new_size}')
    grid = pos_embed[:, extra:].reshape(1, old_size, old_size, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_size, new_size), mode='bicubic', align_corners=False)
    checkpoint_model['pos_embed'] = torch.cat([pos_embed[:, :extra], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
