"""What a pretrained model makes of a few pictures, as panels of pixels: for tools/visualize.py and --vis_every.

``look`` runs the model, ``draw_panels`` and ``text_maps`` draw what came out; every panel is uint8 [N, H, W, 3].
"""

import math
import re
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models_milan import count_visible, patch_order, take
from util.datasets import SeededDataset, SeededStream, build_dataset, build_transform, normalise
from util.errors import UserError
from util.seeding import sample_noise, seeded

HIDDEN = np.uint8(224)  # the grey of patches that are hidden
GAP = 4  # pixels between pictures in TensorBoard
SEQUENTIAL = (16, 12, 60), (110, 26, 110), (205, 62, 78), (248, 160, 60), (252, 250, 190)  # from low to high
DIVERGING = (38, 72, 165), (240, 240, 240), (170, 34, 40)
MEAN, STD = [torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def fixed_images(args, dataset, count=4):
    """Images [count, 3, H, W] for --vis_every, from all over the validation set, or the training set where there is none.

    All processes call it. ``dataset``, which the training reads from, and the random generators stay as they were.

    Raises:
        UserError: not one image can be read.
    """
    transform = build_transform(False, args)
    with seeded('look', args.seed):
        try:
            dataset = build_dataset(False, args, transform)
        except UserError:  # there is no validation set
            dataset = (build_dataset(True, args, transform) if isinstance(dataset, SeededStream)
                       else SeededDataset(dataset.source, transform, replace=False))
        if isinstance(dataset, SeededStream):
            samples = dataset
        else:  # at equal distances in the list, most often of different classes; the others stand in for unreadable ones
            first = sorted({k * len(dataset) // count for k in range(count)})
            samples = map(dataset.__getitem__, chain(first, (i for i in range(len(dataset)) if i not in first)))
        images = list(islice((image for image, _, _, skipped in samples if not skipped), count))
    if not images:
        raise UserError(f'--vis_every: no image in {args.data_path} can be read')
    return normalise(torch.stack(images))


# ---- what the model makes of them ----

@dataclass
class Look:
    """What came out for N pictures of L patches; what there is no teacher or no decoder for is None."""
    pixels: np.ndarray             # the pictures, uint8 [N, H, W, 3]
    features: torch.Tensor         # the encoder's patch tokens with all patches visible, [N, L, D]
    uniform: torch.Tensor          # visible patches, drawn uniformly, bool [N, L]
    semantic: torch.Tensor         # the same drawn by importance; without a teacher they are the uniform ones
    visible: torch.Tensor          # those of the two that the prediction was made from
    importance: torch.Tensor       # the teacher's, [N, L]
    tokens: torch.Tensor           # the teacher's, class token first, [N, L+1, D_t]
    pred: torch.Tensor             # the decoder's predictions of these, [N, L+1, D_t]
    reconstruction: np.ndarray     # visible patches, and the decoder's pixels of the others, uint8 [N, H, W, 3]


@torch.no_grad()
def look(model, teacher, imgs, mask_ratio, seed=0):
    """Run the model, and the teacher if there is one, on a few pictures. Neither weights nor random generators change.

    Args:
        model: MaskedAutoencoderViT, not wrapped; with decoder_depth=0 it has no decoder.
        teacher: a Teacher or None; without, patches are drawn uniformly.
        imgs: [N, 3, H, W], normalised, on the model's device.
        seed: of the masks; the n-th picture's is a function of (seed, n).

    Returns:
        Look, on the CPU.
    """
    training = model.training
    model.eval()
    n, length = len(imgs), model.patch_embed.num_patches
    count = count_visible(length, mask_ratio)
    noise = sample_noise(seed, 0, torch.arange(n, device=imgs.device), length)
    tokens = importance = None
    semantic = uniform = patch_order(noise)
    if teacher is not None:
        tokens, importance = teacher.forward(imgs)  # by name, since what is compiled is compiled for the training's batches
        semantic = patch_order(noise, importance)
    ids = semantic if model.attn_mask else uniform

    everything = torch.arange(length, device=imgs.device).expand(n, -1)
    features = model.forward_encoder(imgs, everything)[:, 1:]
    pred = reconstruction = None
    if len(model.decoder_blocks):
        pred = model.forward_decoder(model.forward_encoder(imgs, ids[:, :count]), ids)
        pred = torch.cat([pred[:, :1], take(pred[:, 1:], ids.argsort(dim=1))], dim=1)
        if not model.use_clip:
            reconstruction, pred = reconstruct(model, imgs, pred[:, 1:], first_patches(ids, count)), None
    model.train(training)
    return Look(
        pixels=to_pixels(imgs), features=_to_cpu(features), uniform=_to_cpu(first_patches(uniform, count)),
        semantic=_to_cpu(first_patches(semantic, count)), visible=_to_cpu(first_patches(ids, count)),
        importance=_to_cpu(importance), tokens=_to_cpu(tokens), pred=_to_cpu(pred), reconstruction=reconstruction)


def first_patches(ids, count):
    """The first ``count`` patches of each order [N, L], as bool [N, L] in image order."""
    return ids.argsort(dim=1) < count


def _to_cpu(x):
    """Whatever precision it was computed in, numbers as float32."""
    return x if x is None else x.cpu() if x.dtype == torch.bool else x.float().cpu()


def reconstruct(model, imgs, pred, visible):
    """Predicted pixels pred [N, L, p*p*3] of hidden patches, and the visible ones as they are: uint8 [N, H, W, 3].

    With norm_pix_loss a prediction has neither brightness nor contrast: those of the true patch are given back to it.
    """
    target = model.patchify(imgs)
    if model.norm_pix_loss:
        var, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    return to_pixels(model.unpatchify(torch.where(visible[..., None], target, pred)))


# ---- panels out ----

def draw_panels(seen):
    """A Look as {name: uint8 [N, H, W, 3]}, in the order in which they are best looked at."""
    panels = {'image': seen.pixels}
    if seen.importance is not None:
        panels['importance'] = heat_over(seen.pixels, seen.importance)
        panels['visible_semantic'] = hide(seen.pixels, seen.semantic)
    if any(x is not None for x in (seen.importance, seen.pred, seen.reconstruction)):
        panels['visible_uniform'] = hide(seen.pixels, seen.uniform)
    size = seen.pixels.shape[1]
    panels['encoder'] = blocks(pca_colours(seen.features), size)
    if seen.reconstruction is not None:
        panels['reconstruction'] = seen.reconstruction
    if seen.pred is not None:
        pred = F.normalize(seen.pred[:, 1:], dim=-1)
        target = pred if seen.tokens is None else F.normalize(seen.tokens[:, 1:], dim=-1)
        if seen.tokens is not None:
            panels['teacher'] = blocks(pca_colours(target), size)
        panels['prediction'] = blocks(pca_colours(pred, like=target), size)
        if seen.tokens is not None:
            panels['agreement'] = blocks(colours((pred * target).sum(dim=-1), 0, 1), size)
    return panels


def to_pixels(imgs):
    """imgs [N, 3, H, W], ImageNet-normalised -> uint8 [N, H, W, 3]."""
    imgs = (imgs.float().cpu() * STD + MEAN).nan_to_num().clamp(0, 1)
    return (imgs * 255).round().byte().permute(0, 2, 3, 1).numpy()


def blocks(values, size):
    """A value a patch, [N, L, ...], as pixels [N, size, size, ...]: every patch is a block of one value."""
    values = np.asarray(values)
    grid = math.isqrt(values.shape[1])
    values = values.reshape(len(values), grid, grid, *values.shape[2:])
    return values.repeat(size // grid, axis=1).repeat(size // grid, axis=2)


def hide(pixels, visible):
    """Pictures uint8 [N, H, W, 3] with the patches that are not ``visible`` (bool [N, L]) light grey."""
    return np.where(blocks(visible, pixels.shape[1])[..., None], pixels, HIDDEN)


def colours(values, low, high, scale=SEQUENTIAL):
    """Numbers [...] as colours uint8 [..., 3]; ``low`` and ``high`` stand at the ends of ``scale``."""
    place = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-12)
    place = np.clip(np.nan_to_num(place), 0, 1)
    stops = np.linspace(0, 1, len(scale))
    return np.stack([np.interp(place, stops, channel) for channel in zip(*scale)], axis=-1).round().astype(np.uint8)


def heat_over(pixels, values):
    """Numbers >= 0 a patch, [N, L], as colours over grey pictures: from 0 to the picture's own largest number."""
    values = values / values.amax(dim=1, keepdim=True).clamp_min(1e-12)
    grey = pixels.mean(axis=-1, keepdims=True)
    return (0.35 * grey + 0.65 * blocks(colours(values, 0, 1), pixels.shape[1])).astype(np.uint8)


def pca_colours(features, like=None):
    """First three principal components of each picture's features as red, green and blue: [N, L, D] -> uint8 [N, L, 3].

    Args:
        like: features [N, L', D] that components and ranges are taken from, so that equal colours mean equal features.
    """
    like = features if like is None else like
    features, like = [x.double().nan_to_num() for x in (features, like)]
    mean = like.mean(dim=1, keepdim=True)
    axes = torch.linalg.svd(like - mean, full_matrices=False).Vh[:, :3]
    # An axis has no direction of its own: let its largest entry be positive, so that equal features give equal colours.
    axes = axes * axes.gather(2, axes.abs().argmax(dim=2, keepdim=True)).sign()
    axes = F.pad(axes, (0, 0, 0, 3 - axes.shape[1]))
    features, like = [(x - mean) @ axes.transpose(1, 2) for x in (features, like)]
    low, high = torch.quantile(like, torch.tensor([0.02, 0.98], dtype=like.dtype), dim=1, keepdim=True)
    return (255 * ((features - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)).round().byte().numpy()


# ---- texts ----

def text_maps(seen, features, scale):
    """What texts say of a Look: of the teacher's tokens and, where there are any, of the predictions.

    Args:
        features, scale: see util.texts.read_texts.

    Returns:
        {who: (K maps [N, H, W, 3], scores [N, K] of whole pictures)} of 'teacher' and 'model'.
        value_range: of all maps' colours; see score_range.
    """
    tokens = {'teacher': seen.tokens, 'model': seen.pred}
    scores = {who: text_scores(x, seen.tokens, features, scale) for who, x in tokens.items() if x is not None}
    value_range = score_range(list(scores.values()))
    return {who: (draw_text_maps(seen, s, value_range, seen.visible if who == 'model' else None), s[:, 0])
            for who, s in scores.items()}, value_range


def text_scores(tokens, teacher_tokens, texts, scale):
    """How well each text describes each token.

    Several texts: their shares, a softmax over them as in CLIP's classification by captions, with CLIP's own ``scale``. What
    all texts have in common, and how near images are to texts at all, drops out. A single text has no other to be compared
    with: its cosine minus its mean cosine to the picture's patches as the teacher sees them, one number for both maps.

    Args:
        tokens: the teacher's or the decoder's, [N, L+1, D].
        texts: [K, D], of length 1.

    Returns:
        [N, L+1, K], in [0, 1] for several texts.
    """
    cosines = F.normalize(tokens, dim=-1) @ texts.t()
    if len(texts) > 1:
        return (scale * cosines).softmax(dim=-1)
    return cosines - (F.normalize(teacher_tokens[:, 1:], dim=-1) @ texts.t()).mean(dim=1, keepdim=True)


def score_range(scores):
    """(low, high, scale of colours) for text_scores of several maps that one wants to compare."""
    if scores[0].shape[-1] > 1:
        return 0, 1, SEQUENTIAL
    limit = max(s[:, 1:].abs().quantile(0.98).item() for s in scores)  # one odd patch would make all others pale
    return -limit, limit, DIVERGING


def draw_text_maps(seen, scores, value_range, visible=None):
    """text_scores [N, L+1, K] as K panels uint8 [N, H, W, 3]; ``visible`` patches (bool [N, L]) show the picture instead."""
    size = seen.pixels.shape[1]
    maps = [blocks(colours(scores[:, 1:, k], *value_range), size) for k in range(scores.shape[-1])]
    return maps if visible is None else [np.where(blocks(visible, size)[..., None], seen.pixels, m) for m in maps]


# ---- TensorBoard ----

def log_panels(args, log_writer, epoch, model, teacher, imgs, texts=None):
    """Panels of ``imgs`` to TensorBoard after every args.vis_every-th epoch and the last; without either nothing is done.

    Args:
        texts: (features, scale) of args.vis_text, see util.texts.read_texts; None: no text maps.
    """
    if imgs is None or log_writer is None or epoch % args.vis_every and epoch + 1 != args.epochs:
        return
    seen = look(model, teacher, imgs.to(model.pos_embed.device), args.mask_ratio, args.seed)
    panels = draw_panels(seen)
    for who, (maps, _) in text_maps(seen, *texts)[0].items() if texts else ():
        panels |= {f'text_{who}/{name}': panel for name, panel in zip(tag_names(args.vis_text), maps)}
    for name, panel in panels.items():
        panel = np.pad(panel, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255)
        # on the curves' axis the epoch's last place: the next one's first is where a resumed run begins anew
        log_writer.add_images(f'vis/{name}', panel, (epoch + 1) * 1000 - 1, dataformats='NHWC')
    log_writer.flush()


def tag_names(texts):
    """A part of a tag for each text: a_dog for "a dog!", and a_dog_2 for the next text that would be called so."""
    names = []
    for text in texts:
        stem, k = re.sub(r'[^\w.-]+', '_', text)[:60].strip('_.-') or 'text', 1
        while (name := stem if k == 1 else f'{stem}_{k}') in names:
            k += 1
        names.append(name)
    return names
