"""Render a model's masks, features and predictions for a few images as image panels.

``run_model`` computes the outputs; ``draw_panels`` and ``text_maps`` render them. A panel
is a uint8 array [N, H, W, 3]. Used by tools/visualize.py and by --vis_every.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, filterfalse, islice

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.tensorboard import SummaryWriter

from util.datasets import DataConfig, SeededDataset, SeededStream, build_dataset, normalize
from util.errors import UserError, as_user_error
from util.masking import count_visible, patch_order, sample_noise, take
from util.seeding import seeded

HIDDEN = np.uint8(224)  # gray level of masked patches
GAP = 4  # pixels between images in TensorBoard

# color scales from low to high
SEQUENTIAL = (16, 12, 60), (110, 26, 110), (205, 62, 78), (248, 160, 60), (252, 250, 190)
DIVERGING = (38, 72, 165), (240, 240, 240), (170, 34, 40)


def fixed_images(
    data: DataConfig, transform: Callable, dataset: SeededDataset | SeededStream, count: int = 4
) -> torch.Tensor:
    """Return the normalized images that --vis_every draws, spread over the validation set.

    Without a validation set, the images are from the training set. All processes call
    this function. The state of ``dataset`` and of the random generators is unchanged.

    Args:
        data: where the images are.
        transform: the transform of evaluation, from an ImageFile to a tensor [3, H, W].
        dataset: the training set.
        count: number of images [count, 3, H, W]. A smaller dataset gives fewer.

    Raises:
        UserError: if no image can be read.
    """
    with seeded('look', data.seed):
        try:
            dataset = build_dataset(False, data, transform)
        except UserError:  # there is no validation set
            dataset = (
                build_dataset(True, data, transform)
                if isinstance(dataset, SeededStream)
                else SeededDataset(dataset.source, transform, replace=False)  # lists no files again
            )
        if isinstance(dataset, SeededDataset):
            # Evenly spaced in the list, hence usually of different classes. All other
            # samples follow, as replacements for unreadable ones.
            spaced = dict.fromkeys(k * len(dataset) // count for k in range(count))
            dataset = map(
                dataset.__getitem__,
                chain(spaced, filterfalse(spaced.__contains__, range(len(dataset)))),
            )
        images = list(islice((image for image, _, _, errors in dataset if not errors), count))
    if not images:
        raise UserError(f'--vis_every: no image in {data.data_path} can be read')
    return normalize(torch.stack(images))


# ---- outputs of the model ----


@dataclass
class Outputs:
    """Model outputs for N images of L patches, on the CPU.

    Fields that need a missing teacher or decoder are None.

    Attributes:
        pixels: the images, uint8 [N, H, W, 3].
        uniform: visible patches of a uniform draw, bool [N, L].
        semantic: visible patches of a draw by importance, bool [N, L]. Equal to
            ``uniform`` without a teacher.
        visible: the one of the two masks that the prediction was made from.
        features: patch tokens of the encoder with all patches visible, [N, L, D].
        importance: importance of the patches according to the teacher, [N, L].
        tokens: the teacher's tokens, class token first, [N, L+1, D_t].
        pred: the decoder's predictions of ``tokens``, [N, L+1, D_t].
        reconstruction: visible patches and predicted pixels of the masked patches, uint8
            [N, H, W, 3].
    """

    pixels: np.ndarray
    uniform: torch.Tensor
    semantic: torch.Tensor
    visible: torch.Tensor
    features: torch.Tensor
    importance: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    pred: torch.Tensor | None = None
    reconstruction: np.ndarray | None = None


@torch.no_grad()
def run_model(
    model: nn.Module,
    teacher: nn.Module | None,
    images: torch.Tensor,
    mask_ratio: float,
    seed: int = 0,
) -> Outputs:
    """Run the model, and the teacher if there is one, on a few images.

    Weights and random generators are unchanged.

    Args:
        model: MaskedAutoencoderViT, not wrapped in DDP. It has no decoder if it was built
            with decoder_depth=0.
        teacher: a Teacher, or None to draw the visible patches uniformly.
        images: [N, 3, H, W], normalized, on the device of the model.
        mask_ratio: share of masked patches.
        seed: seed of the masks. The mask of image n is a function of (seed, n).
    """
    training, length = model.training, model.patch_embed.num_patches
    model.eval()
    noise = sample_noise(seed, 0, torch.arange(len(images), device=images.device), length)
    # forward() bypasses torch.compile, which has specialized on the training batch size
    tokens, importance = (None, None) if teacher is None else teacher.forward(images)
    orders = [patch_order(noise), patch_order(noise, importance)]  # uniform, semantic
    ids, count = orders[model.attn_mask], count_visible(length, mask_ratio)
    uniform, semantic, visible = (x.argsort(dim=1).cpu() < count for x in (*orders, ids))

    features = model.forward_encoder(images, ids.sort(dim=1).values)[:, 1:]  # all patches
    pred = reconstruction = None
    if len(model.decoder_blocks):
        pred = model.forward_decoder(model.forward_encoder(images, ids[:, :count]), ids)
        pred = torch.cat([pred[:, :1], take(pred[:, 1:], ids.argsort(dim=1))], dim=1)
        if not model.use_clip:
            shown = visible.to(images.device)
            reconstruction, pred = reconstruct(model, images, pred[:, 1:], shown), None
    model.train(training)
    values = [x if x is None else x.float().cpu() for x in (features, importance, tokens, pred)]
    return Outputs(to_pixels(images), uniform, semantic, visible, *values, reconstruction)


def reconstruct(
    model: nn.Module, images: torch.Tensor, pred: torch.Tensor, visible: torch.Tensor
) -> np.ndarray:
    """Return uint8 images [N, H, W, 3] whose masked patches are the predicted pixels.

    With norm_pix_loss a prediction has no brightness and contrast of its own. It is given
    those of the true patch.

    Args:
        model: the model that made the prediction.
        images: [N, 3, H, W], normalized.
        pred: [N, L, p*p*3] in image order.
        visible: bool [N, L].
    """
    target = model.patchify(images)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    return to_pixels(model.unpatchify(torch.where(visible[..., None], target, pred)))


# ---- panels ----


def draw_panels(out: Outputs) -> dict[str, np.ndarray]:
    """Return the panels of ``out`` by name, uint8 [N, H, W, 3] each, in display order."""
    size, pixels = out.pixels.shape[1], out.pixels
    teacher, decoder, mae = (x is not None for x in (out.tokens, out.pred, out.reconstruction))
    target = F.normalize(out.tokens[:, 1:], dim=-1) if teacher else None
    pred = F.normalize(out.pred[:, 1:], dim=-1) if decoder else None
    cosine = (pred * target).sum(dim=-1) if teacher and decoder else None
    panels = {
        'image': pixels,
        'importance': heat_over(pixels, out.importance) if teacher else None,
        'visible_semantic': hide(pixels, out.semantic) if teacher else None,
        'visible_uniform': hide(pixels, out.uniform) if teacher or decoder or mae else None,
        'encoder': blocks(pca_colors(out.features), size),
        'reconstruction': out.reconstruction,
        'teacher': blocks(pca_colors(target), size) if cosine is not None else None,
        'prediction': blocks(pca_colors(pred, like=target), size) if decoder else None,
        'agreement': blocks(colors(cosine, 0, 1), size) if cosine is not None else None,
    }
    return {name: panel for name, panel in panels.items() if panel is not None}


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Convert normalized images [N, 3, H, W] to uint8 [N, H, W, 3]."""
    std, mean = torch.tensor(IMAGENET_DEFAULT_STD), torch.tensor(IMAGENET_DEFAULT_MEAN)
    return _to_uint8((images.float().cpu().permute(0, 2, 3, 1) * std + mean).nan_to_num())


# Convert a tensor with values in [0, 1] to uint8.
def _to_uint8(values):
    return (255 * values.clamp(0, 1)).round().byte().numpy()


def blocks(values: np.ndarray | torch.Tensor, size: int) -> np.ndarray:
    """Render one value per patch, [N, L, ...], as pixels [N, size, size, ...]."""
    grid = round(values.shape[1] ** 0.5)
    values = np.asarray(values).reshape(len(values), grid, grid, *values.shape[2:])
    return values.repeat(size // grid, axis=1).repeat(size // grid, axis=2)


def hide(pixels: np.ndarray, visible: torch.Tensor) -> np.ndarray:
    """Return ``pixels`` [N, H, W, 3] with all but the ``visible`` patches [N, L] in gray."""
    return np.where(blocks(visible, pixels.shape[1])[..., None], pixels, HIDDEN)


def colors(
    values: np.ndarray | torch.Tensor, low: float, high: float, scale: Sequence = SEQUENTIAL
) -> np.ndarray:
    """Map values [...] to colors uint8 [..., 3].

    Args:
        values: the numbers.
        low, high: values at the ends of the color scale.
        scale: evenly spaced RGB colors to interpolate between.
    """
    place = np.nan_to_num((np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12))
    channels = [np.interp(place, np.linspace(0, 1, len(scale)), c) for c in zip(*scale)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def heat_over(pixels: np.ndarray, values: torch.Tensor) -> np.ndarray:
    """Blend values >= 0 per patch, [N, L], as colors with the gray images [N, H, W, 3].

    The color scale of each image ranges from 0 to the largest value of that image.
    """
    shares = values / values.amax(dim=1, keepdim=True).clamp_min(1e-12)
    heat = blocks(colors(shares, 0, 1), pixels.shape[1])
    return (0.35 * pixels.mean(axis=-1, keepdims=True) + 0.65 * heat).astype(np.uint8)


def pca_colors(features: torch.Tensor, like: torch.Tensor | None = None) -> np.ndarray:
    """Show the first three principal components of each image as red, green and blue.

    Args:
        features: [N, L, D], for colors [N, L, 3].
        like: features [N, L', D] that determine components and value ranges, so that equal
            colors mean equal features. Default: ``features``.
    """
    features = features.double().nan_to_num()
    like = features if like is None else like.double().nan_to_num()
    mean = like.mean(dim=1, keepdim=True)
    axes = torch.linalg.svd(like - mean, full_matrices=False).Vh[:, :3]
    # The sign of a component is arbitrary. Making its largest entry positive gives equal
    # features equal colors.
    axes = axes * axes.gather(2, axes.abs().argmax(dim=2, keepdim=True)).sign()
    axes = F.pad(axes, (0, 0, 0, 3 - axes.shape[1]))
    features, like = ((x - mean) @ axes.transpose(1, 2) for x in (features, like))
    low, high = like.quantile(like.new_tensor([0.02, 0.98]), dim=1, keepdim=True)
    return _to_uint8((features - low) / (high - low).clamp_min(1e-9))


def draw_grid(
    cells: dict[tuple[int, int], tuple], width: float, height: float, space: float = 0
) -> tuple[object, np.ndarray]:
    """Draw a grid of images with text around each.

    Args:
        cells: {(row, column): (image, text above, text below, text on the left)}.
        width, height: of a cell, in inches.
        space: extra width on the right.

    Returns:
        The matplotlib.figure.Figure, and its axes.

    Raises:
        UserError: if matplotlib is not installed.
    """
    with as_user_error('figures need matplotlib: pip install matplotlib', ImportError):
        from matplotlib.figure import Figure
    rows, columns = (1 + max(indices) for indices in zip(*cells))
    figure = Figure((width * columns + space, height * rows), layout='constrained')
    empty = dict(xticks=[], yticks=[], frame_on=False)
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=empty)
    for place, (image, *texts) in cells.items():
        ax = axes[place]
        ax.set_frame_on(True)
        ax.imshow(image, interpolation='nearest')
        for write, text in zip((ax.set_title, ax.set_xlabel, ax.set_ylabel), texts):
            write(text, fontsize=10, parse_math=False)  # texts are not formulas
    return figure, axes


# ---- texts ----


def text_maps(
    out: Outputs, features: torch.Tensor, scale: float
) -> tuple[dict[str, tuple[np.ndarray, torch.Tensor]], tuple[float, float, Sequence]]:
    """Show how well texts match the teacher's tokens and, if there are any, the predictions.

    Args:
        out: outputs with a teacher.
        features: features of K texts, see models_teacher.read_texts.
        scale: logit scale of the CLIP, see models_teacher.read_texts.

    Returns:
        (maps, value_range). maps: for 'teacher' and 'model', (panels [K, N, H, W, 3],
        scores [N, K] of the whole images). In the panels of 'model', visible patches show
        the image. value_range: values at both ends of the color scale of
        all panels, and the scale.
    """
    size, tokens = out.pixels.shape[1], [x for x in (out.tokens, out.pred) if x is not None]
    scores = [text_scores(x, out.tokens, features, scale) for x in tokens]
    # one text: a quantile, because one outlier patch would make all others pale
    limits = [s[:, 1:].abs().quantile(0.98).item() for s in scores if len(features) == 1]
    value_range = (-max(limits), max(limits), DIVERGING) if limits else (0, 1, SEQUENTIAL)
    maps = [blocks(colors(s[:, 1:], *value_range), size) for s in scores]  # [N, H, W, K, 3]
    if out.pred is not None:
        shown = blocks(out.visible[..., None, None], size)
        maps[1] = np.where(shown, out.pixels[..., None, :], maps[1])
    pairs = [(np.moveaxis(m, 3, 0), s[:, 0]) for m, s in zip(maps, scores)]
    return dict(zip(('teacher', 'model'), pairs)), value_range


def text_scores(
    tokens: torch.Tensor, teacher_tokens: torch.Tensor, texts: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return how well each text describes each token: [N, L+1, K].

    Several texts are scored by a softmax over the texts, as in CLIP's zero-shot
    classification with CLIP's own ``scale``. The softmax removes whatever the texts have in
    common, and the general distance between images and texts. A single text cannot be
    compared with others. Its score is its cosine minus its mean cosine to the patches of
    the image as the teacher sees them. That mean is the same for both maps.

    Args:
        tokens: tokens of the teacher or the decoder, [N, L+1, D].
        teacher_tokens: tokens of the teacher, [N, L+1, D].
        texts: text features [K, D] of norm 1.
        scale: CLIP's logit scale.
    """
    cosines = F.normalize(tokens, dim=-1) @ texts.t()
    mean = (F.normalize(teacher_tokens[:, 1:], dim=-1) @ texts.t()).mean(dim=1, keepdim=True)
    return (scale * cosines).softmax(dim=-1) if len(texts) > 1 else cosines - mean


# ---- TensorBoard ----


def log_panels(
    log_writer: SummaryWriter,
    step: int,
    model: nn.Module,
    teacher: nn.Module | None,
    images: torch.Tensor,
    *,
    mask_ratio: float,
    seed: int,
    texts: tuple[torch.Tensor, float] | None = None,
    text_names: Sequence[str] = (),
) -> None:
    """Write the panels of ``images`` to TensorBoard under vis/.

    Args:
        step: x position. After an epoch this is (epoch + 1) * 1000 - 1, the last position of
            the epoch, because a run that resumes at epoch + 1 purges (epoch + 1) * 1000 on.
        model: MaskedAutoencoderViT, not wrapped in DDP.
        teacher: a Teacher or None.
        images: [N, 3, H, W], normalized.
        mask_ratio: share of masked patches.
        seed: seed of the masks.
        texts: (features, scale) of texts, see models_teacher.read_texts; None: no text maps.
        text_names: the texts, which name their panels.
    """
    out = run_model(model, teacher, images.to(model.pos_embed.device), mask_ratio, seed)
    panels = draw_panels(out)
    for owner, (maps, _) in text_maps(out, *texts)[0].items() if texts else ():
        panels |= {f'text_{owner}/{n}': m for n, m in zip(tag_names(text_names), maps)}
    for name, panel in panels.items():
        panel = np.pad(panel, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
        log_writer.add_images(f'vis/{name}', panel, step, dataformats='NHWC')
    log_writer.flush()


def tag_names(texts: Sequence[str]) -> list[str]:
    """Return a TensorBoard tag for each text: a_dog for "a dog!", then a_dog_2 for "a dog"."""
    return number_repeats(
        [re.sub(r'[^\w.-]+', '_', text)[:60].strip('_.-') or 'text' for text in texts], '_'
    )


def number_repeats(
    names: Sequence[str], separator: str, key: Callable[[str], str] = str
) -> list[str]:
    """Append a separator and 2, 3, ... to names whose ``key`` occurred before."""
    numbers, unique = ['', *(f'{separator}{k}' for k in range(2, len(names) + 1))], {}
    for name in names:
        name = next(name + n for n in numbers if key(name + n) not in unique)
        unique[key(name)] = name
    return list(unique.values())
