"""Sine-cosine position tables, and resizing position embeddings to another grid."""

import numpy as np
import torch


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int, cls_token: bool = False) -> np.ndarray:
    """Return the fixed 2-D table of MAE (appendix A.1), computed in float64.

    The first half of the channels encodes the column, the second half the row.

    Args:
        embed_dim: width, a multiple of 4.
        grid_size: number of patches per side.
        cls_token: begin with a row of zeros for the class token.

    Returns:
        float64 array [grid_size**2 (+ 1), embed_dim], rows in image order.

    Raises:
        ValueError: if the width is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f'the width of a sine-cosine table must be a multiple of 4: {embed_dim}')
    grid = np.stack(np.meshgrid(np.arange(grid_size), np.arange(grid_size)))
    table = get_2d_sincos_pos_embed_from_grid(embed_dim, grid)
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def get_2d_sincos_pos_embed_from_grid(embed_dim: int, grid: np.ndarray) -> np.ndarray:
    """Map a grid [2, ...] of M columns and M rows to a table [M, embed_dim]."""
    return np.hstack([get_1d_sincos_pos_embed_from_grid(embed_dim // 2, pos) for pos in grid])


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Map M positions, in any shape, to a table [M, embed_dim]: sines, then cosines."""
    omega = 10000.0 ** (-np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angle = np.outer(pos.reshape(-1).astype(np.float64), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def interpolate_pos_embed(
    model: torch.nn.Module, checkpoint_model: dict[str, torch.Tensor]
) -> None:
    """Resize ``checkpoint_model['pos_embed']`` in place to the grid of ``model``.

    Bicubic; the class token's row stays.

    Args:
        model: has ``pos_embed`` [1, extra + L', D] and ``patch_embed.num_patches``.
        checkpoint_model: a state dict. It is not changed if it has no pos_embed, or if the
            grids are equal.
    """
    pos_embed = checkpoint_model.get('pos_embed', model.pos_embed)
    num_patches = model.patch_embed.num_patches
    extra = model.pos_embed.shape[-2] - num_patches
    old_size, new_size = int((pos_embed.shape[-2] - extra) ** 0.5), int(num_patches**0.5)
    if old_size == new_size:
        return
    print(f'Position embedding resized from {old_size}x{old_size} to {new_size}x{new_size}')
    grid = pos_embed[:, extra:].reshape(1, old_size, old_size, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new_size, new_size), mode='bicubic')
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    checkpoint_model['pos_embed'] = torch.cat([pos_embed[:, :extra], grid], dim=1)
