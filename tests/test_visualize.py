"""Pictures of what a checkpoint makes of images: tools/visualize.py and --vis_every."""

import argparse
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_CLIP, draw_photo, pretrain, run, script
from deterministic import load_deterministic
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clip
from main_pretrain import get_args_parser
from models_milan import MODELS, patch_order
from tools.visualize import output_names
from util import visualize
from util.checkpoint import load
from util.datasets import build_dataset, build_pretrain_transform, build_transform
from util.images import ImageFile
from util.seeding import sample_noise
from util.teacher import Teacher

draw = script('tools.visualize')


@pytest.fixture(scope='module')
def timm_vit(tmp_path_factory):
    """Weights of a ViT of timm's: ['--teacher', its name, '--teacher_path', their file]."""
    path = tmp_path_factory.mktemp('timm') / 'vit.pth'
    torch.save(timm.create_model('vit_tiny_patch16_224', num_classes=0).state_dict(), path)
    return ['--teacher', 'vit_tiny_patch16_224', '--teacher_path', path]


@pytest.fixture(scope='module')
def pretrain_milan(small_images, talking_clip):
    """A function that runs 5 epochs of MILAN into a folder."""
    def start(out, *flags):
        result = pretrain(
            '--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--amp', 'fp32', '--batch_size', 8, '--num_workers', 1,
            '--data_path', small_images, '--clip_path', talking_clip, '--use_clip', '--change_decoder', '--attn_mask',
            '--blr', 0.05, '--warmup_epochs', 1, '--epochs', 5, '--output_dir', out, '--log_dir', out, *flags)
        assert result.returncode == 0, result.stderr
    return start


@pytest.fixture(scope='module')
def runs(pretrain_milan, tmp_path_factory):
    """Two equal runs, `drawn` with --vis_every 3 and `plain` without."""
    root = tmp_path_factory.mktemp('runs')
    pretrain_milan(root / 'drawn', '--vis_every', 3)
    pretrain_milan(root / 'plain')
    return root


@pytest.fixture(scope='module')
def milan(runs):
    return runs / 'drawn' / 'checkpoint-last.pth'


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """(a MILAN model in training mode, a teacher, images [3, 3, 64, 64])."""
    torch.manual_seed(0)
    model = MODELS['mae_vit_tiny_patch8'](use_clip=True, change_decoder=True, attn_mask=True, target_dim=48).train()
    teacher = Teacher(load_deterministic(clip.CLIP(**TINY_CLIP), skip=()).visual)
    return model, teacher, torch.randn(3, 3, 64, 64)


def same(a, b):
    """Whether two nested dicts and lists are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


# ---- --vis_every ----

def test_pictures_change_nothing_in_the_training(runs):
    drawn, plain = [load(runs / name / 'checkpoint-4.pth') for name in ('drawn', 'plain')]
    assert same(drawn['model'], plain['model']) and same(drawn['optimizer'], plain['optimizer'])
    assert (runs / 'drawn' / 'log.txt').read_text() == (runs / 'plain' / 'log.txt').read_text()
    files = [{p.name.split('.')[0] for p in (runs / name).iterdir()} for name in ('drawn', 'plain')]
    assert files[0] == files[1]  # but for the numbers in the names of TensorBoard's


def test_pictures_in_tensorboard(runs, pretrain_milan):
    """After every third epoch and the last, at the curves' places on the x axis; a resumed run goes on with them."""
    pretrain_milan(runs / 'drawn', '--vis_every', 3, '--resume', runs / 'drawn' / 'checkpoint-0.pth')
    events, others = [EventAccumulator(str(runs / name)).Reload() for name in ('drawn', 'plain')]
    assert not others.Tags()['images'] and others.Tags()['scalars'] == events.Tags()['scalars']
    names = 'image', 'importance', 'visible_semantic', 'visible_uniform', 'encoder', 'teacher', 'prediction', 'agreement'
    assert sorted(events.Tags()['images']) == sorted(f'vis/{name}' for name in names)
    for name in names:
        assert [e.step for e in events.Images(f'vis/{name}')] == [999, 3999, 4999]
    first, *_, last = events.Images('vis/prediction')
    assert (last.width, last.height) == (4 * (64 + visualize.GAP), 64)
    assert first.encoded_image_string != last.encoded_image_string
    first, *_, last = events.Images('vis/visible_semantic')
    assert first.encoded_image_string == last.encoded_image_string


def vis_args(root, *flags):
    args = get_args_parser().parse_args([str(f) for f in ('--data_path', root, '--input_size', 32, *flags)])
    args.rank, args.world_size = 0, 1
    return args


def pictures(args, paths):
    return visualize.normalise(torch.stack([build_transform(False, args)(ImageFile(path)) for path in paths]))


def test_pictures_are_of_the_validation_set_where_there_is_one(labelled_images, small_images, tmp_path):
    """And of the training set, cut as in evaluation, where there is none; unreadable ones are passed over."""
    for root, split in ((labelled_images, 'val'), (small_images, 'train')):
        args = vis_args(root)
        train = build_dataset(True, args, build_pretrain_transform(args))
        paths = sorted((root / split).rglob('*.png'))
        chosen = [paths[k * len(paths) // 4] for k in range(4)]
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        images = visualize.fixed_images(args, train)
        assert torch.equal(images, pictures(args, chosen))
        assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
        assert isinstance(train.transform.transforms[0], type(build_pretrain_transform(args).transforms[0]))

    for i in range(3):
        draw_photo(tmp_path / 'train' / 'all' / f'{i}.png', i, (40, 40))
    (tmp_path / 'train' / 'all' / '0.png').write_bytes(b'no picture')
    args = vis_args(tmp_path)
    images = visualize.fixed_images(args, build_dataset(True, args, build_pretrain_transform(args)))
    assert torch.equal(images, pictures(args, [tmp_path / 'train' / 'all' / f'{i}.png' for i in (1, 2)]))


def test_wrong_use_of_vis_every(small_images, tmp_path):
    flags = ['--model', 'mae_vit_tiny_patch8', '--input_size', 32, '--data_path', small_images, '--output_dir', '',
             '--device', 'cpu']
    result = pretrain(*flags, '--log_dir', '', '--vis_every', 1)
    assert result.returncode == 1 and result.stderr.startswith('error: --vis_every draws into TensorBoard: give --log_dir')
    (tmp_path / 'train' / 'all').mkdir(parents=True)
    for i in range(2):
        (tmp_path / 'train' / 'all' / f'{i}.png').write_bytes(b'no picture')
    result = pretrain(*flags, '--data_path', tmp_path, '--log_dir', tmp_path, '--batch_size', 2, '--vis_every', 1)
    assert result.returncode == 1 and result.stderr.startswith('error: --vis_every: no image in'), result.stderr


# ---- what is drawn ----

def test_a_look_is_what_the_model_computes(pair):
    """Mask and prediction are those of the model's own forward pass; mode and generators stay as they were."""
    model, teacher, images = pair
    state = torch.get_rng_state()
    seen = visualize.look(model, teacher, images, 0.75, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.blocks[0].training
    tokens, importance = teacher(images)
    ids = patch_order(sample_noise(3, 0, torch.arange(3), 64), importance)
    _, pred, mask = model(images, 0.75, (tokens, importance), ids)
    torch.testing.assert_close(seen.pred, pred.detach())
    assert torch.equal(seen.visible, mask == 0) and torch.equal(seen.semantic, seen.visible)
    assert not torch.equal(seen.uniform, seen.visible) and (seen.uniform.sum(dim=1) == 16).all()
    torch.testing.assert_close(seen.features, model.forward_encoder(images, torch.arange(64).expand(3, -1))[:, 1:].detach())
    again, other = [visualize.look(model.eval(), teacher, images, 0.75, seed) for seed in (3, 4)]
    assert not model.training and torch.equal(again.visible, seen.visible) and not torch.equal(other.visible, seen.visible)
    model.train()


def test_panels_show_what_they_say(pair):
    model, teacher, images = pair
    seen = visualize.look(model, teacher, images, 0.75)
    panels = visualize.draw_panels(seen)
    assert all(panel.shape == (3, 64, 64, 3) and panel.dtype == np.uint8 for panel in panels.values())
    for name, visible in (('visible_semantic', seen.semantic), ('visible_uniform', seen.uniform)):
        shown = visualize.blocks(visible, 64)
        assert (panels[name][shown] == panels['image'][shown]).all() and (panels[name][~shown] == visualize.HIDDEN).all()
        assert shown[0, :8, :8].all() == visible[0, 0].item() and shown[0, :8, 8:16].all() == visible[0, 1].item()  # row by row
    white = visualize.heat_over(np.full((3, 64, 64, 3), 255, np.uint8), seen.importance)
    brightest = white.reshape(3, 8, 8, 8, 8, 3).sum(axis=(2, 4, 5)).reshape(3, 64).argmax(axis=1)
    assert (brightest == seen.importance.argmax(dim=1).numpy()).all()
    perfect = visualize.draw_panels(argparse.Namespace(**{**vars(seen), 'pred': 3 * seen.tokens}))
    assert (perfect['prediction'] == perfect['teacher']).all()
    assert (perfect['agreement'] == visualize.SEQUENTIAL[-1]).all()


def test_principal_components_as_colours():
    """The planted directions in the order of their size; equal features in equal colours; no failure where there are few."""
    torch.manual_seed(0)
    signals = torch.linspace(-1, 1, 60)[torch.stack([torch.randperm(60) for _ in range(3)])]  # [3, 60]
    directions = torch.linalg.qr(torch.randn(16, 3)).Q.t()
    colours = visualize.pca_colours((torch.tensor([9.0, 3.0, 1.0]) * signals.t() @ directions + 5)[None])
    for channel in range(3):
        correlation = np.corrcoef(colours[0, :, channel], signals[channel])[0, 1]
        assert abs(correlation) > 0.9
    features = torch.randn(1, 60, 16)
    assert (visualize.pca_colours(features[:, 7:9], like=features) == visualize.pca_colours(features)[:, 7:9]).all()
    assert visualize.pca_colours(torch.randn(2, 1, 16)).shape == (2, 1, 3)
    assert np.ptp(visualize.pca_colours(torch.ones(1, 60, 16))) == 0
    assert visualize.pca_colours(torch.full((1, 60, 16), math.nan)).shape == (1, 60, 3)


@pytest.mark.parametrize('norm_pix_loss', [False, True])
def test_reconstruction_is_the_picture_where_the_prediction_is_right(norm_pix_loss):
    model = MODELS['mae_vit_tiny_patch8'](norm_pix_loss=norm_pix_loss)
    images = torch.randn(2, 3, 64, 64).clamp(-1, 1)
    target = model.patchify(images)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    visible = torch.rand(2, 64) < 0.3
    prediction = torch.where(visible[..., None], 99.0, target)
    difference = visualize.reconstruct(model, images, prediction, visible).astype(int) - visualize.to_pixels(images)
    assert abs(difference).max() <= 1
    other = visualize.reconstruct(model, images, -prediction, visible)
    hidden = visualize.blocks(~visible, 64)
    assert (other[hidden] != visualize.to_pixels(images)[hidden]).mean() > 0.9
    assert (other[~hidden] == visualize.to_pixels(images)[~hidden]).all()


def test_scores_of_texts():
    """Each patch is given to the text it is nearest to, whatever all of them have in common; one text is centred."""
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(3, 32) + 2, dim=-1)
    whose = torch.randint(3, (1, 65))
    tokens = 7 * texts[whose] + torch.randn(1, 65, 32) * 0.2
    scores = visualize.text_scores(tokens, tokens, texts, 100)
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(1, 65))
    assert (scores.argmax(dim=-1) == whose).all() and scores.amax(dim=-1).min() > 0.5
    assert visualize.score_range([scores])[:2] == (0, 1)
    alone = visualize.text_scores(tokens, tokens, texts[:1], 100)
    assert abs(alone[:, 1:].mean()) < 1e-6 and (alone[whose == 0].min() > alone[whose != 0].max())
    predicted = visualize.text_scores(tokens[:, :1].expand_as(tokens), tokens, texts[:1], 100)
    torch.testing.assert_close(predicted, alone[:, :1].expand_as(predicted))  # by the same number, for both maps
    low, high, scale = visualize.score_range([alone, predicted])
    assert low == -high and scale == visualize.DIVERGING


# ---- tools/visualize.py ----

@pytest.fixture(scope='module')
def odd_pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    draw_photo(root / 'dog.jpg', 1, (90, 300))
    draw_photo(root / 'other' / 'Dog.png', 2, (20, 10))
    Image.new('I;16', (70, 64), 40000).save(root / 'deep $1_$.png')
    Image.new('RGBA', (1, 64), (255, 0, 0, 100)).save(root / 'thin.webp')
    return [root / 'dog.jpg', root / 'other' / 'Dog.png', root / 'deep $1_$.png', root / 'thin.webp']


def sizes(folder):
    found = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            found[path.name] = image.size
    return found


def test_figures(milan, odd_pictures, tmp_path):
    """One a picture, of any format and size; two of one name do not overwrite each other; texts stand below the panels."""
    result = draw(milan, *odd_pictures, '--output_dir', tmp_path / 'plain')
    assert result.returncode == 0, result.stderr
    found = sizes(tmp_path / 'plain')
    assert list(found) and found.keys() == {
        'dog-visualized.png', 'Dog-visualized-2.png', 'deep $1_$-visualized.png', 'thin-visualized.png'}
    assert len(set(found.values())) == 1 and 'Left out' not in result.stdout
    result = draw(milan, odd_pictures[0], '--output_dir', tmp_path / 'texts', '--text', 'a dog', 'costs $5^$', 'grüne Wiese')
    assert result.returncode == 0, result.stderr
    width, height = sizes(tmp_path / 'texts')['dog-visualized.png']
    assert width == found['dog-visualized.png'][0] and height == 2 * found['dog-visualized.png'][1]
    assert output_names(['a/x.jpg', 'x.png', 'b/X.gif', 'x-visualized.png']) == [
        'x-visualized.png', 'x-visualized-2.png', 'X-visualized-3.png', 'x-visualized-visualized.png']


def test_the_teacher_s_text_map_is_clip_s(milan, talking_clip, odd_pictures):
    """Scores of a picture as a whole are what CLIP's classification by captions gives."""
    from tools import visualize as tool
    flags = [milan, odd_pictures[0], '--text', 'a dog', 'grass', '--device', 'cpu']
    parts = tool.prepare(tool.get_args_parser().parse_args([str(f) for f in flags]))
    seen = visualize.look(parts.model, parts.teacher, parts.images[0], parts.settings.mask_ratio)
    rows, _ = tool.text_rows(seen, parts.features, parts.scale)
    model, _ = clip.load(str(talking_clip), 'cpu')
    with torch.no_grad():
        expected = model(parts.images[0], clip.tokenize(['a dog', 'grass'], 16))[0].softmax(dim=-1)
    torch.testing.assert_close(rows[0][3], expected)
    assert len(rows) == 2 and not torch.allclose(rows[1][3], expected, atol=1e-3)
    maps, shown = rows[1][2], visualize.blocks(seen.visible, 64)
    for k in range(2):
        assert (maps[k][shown] == seen.pixels[shown]).all() and (maps[k][~shown] != seen.pixels[~shown]).any()


def test_what_cannot_be_drawn_is_said(pretrained, milan, talking_clip, timm_vit, odd_pictures, tmp_path):
    """MAE's checkpoint, an encoder alone, and flags in place of what a checkpoint does not say of itself."""
    state_dict = load(milan)['model']
    encoder = {name: value for name, value in state_dict.items() if not name.startswith(('decoder', 'mask_token'))}
    classifier = {name.replace('norm.', 'fc_norm.') if name.startswith('norm.') else name: v for name, v in encoder.items()}
    classifier |= {'head.weight': torch.zeros(5, 192), 'head.bias': torch.zeros(5)}
    torch.save({'model': state_dict}, tmp_path / 'nameless.pth')
    torch.save({'state_dict': encoder}, tmp_path / 'encoder.pth')
    torch.save({'model': classifier, 'args': argparse.Namespace(model='vit_tiny_patch8')}, tmp_path / 'classifier.pth')
    named = ['--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--use_clip', '--change_decoder', '--attn_mask']
    no_teacher = 'importance and masks by it (no teacher'
    for file, flags, panels, said in (
            (pretrained, [], 4, no_teacher),
            (pretrained, ['--clip_path', talking_clip, '--text', 'a dog', 'grass'], 12, 'texts beside the predictions'),
            (pretrained, timm_vit, 6, ''),
            (tmp_path / 'classifier.pth', [], 2, 'no decoder in the checkpoint'),
            (tmp_path / 'encoder.pth', ['--clip_path', talking_clip], 8, 'no decoder in the checkpoint'),
            (tmp_path / 'encoder.pth', [], 2, 'no decoder in the checkpoint'),
            (tmp_path / 'nameless.pth', [*named, '--clip_path', talking_clip], 8, ''),
            (milan, ['--clip_path', '', '--no-attn_mask'], 4, no_teacher)):
        result = draw(file, odd_pictures[0], *flags, '--output_dir', tmp_path / file.stem)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout and result.stdout.count('Left out') == (said != '')
        width, height = sizes(tmp_path / file.stem)['dog-visualized.png']
        assert round(width / 286) == min(panels, 4) and round(height / 319) == math.ceil(panels / 4), (file, flags)
    figures = [(tmp_path / name / 'dog-visualized.png').read_bytes() for name in ('encoder', 'classifier')]
    assert figures[0] == figures[1]  # the norm has another name, and is the same


WRONG = {
    'no such picture': (['MILAN', 'nowhere.jpg'], 'nowhere.jpg cannot be read as a picture: FileNotFoundError'),
    'no picture': (['MILAN', __file__], 'test_visualize.py cannot be read as a picture: UnidentifiedImageError'),
    'no checkpoint': (['nowhere.pth', 'PICTURE'], 'checkpoint nowhere.pth does not exist'),
    'no weights': (['CLIP', 'PICTURE'], 'is not a plain ViT'),
    'no args': (['NAMELESS', 'PICTURE'], 'does not say what its model is: give --model'),
    'wrong flags': (['NAMELESS', 'PICTURE', '--model', 'mae_vit_tiny_patch8', '--input_size', '64'], 'is not of --model'),
    'no teacher file': (['MILAN', 'PICTURE', '--clip_path', 'nowhere.pt'], '--clip_path nowhere.pt'),
    'nothing visible': (['MILAN', 'PICTURE', '--mask_ratio', '0.99'], 'leaves none of 64 patches visible'),
    'text without teacher': (['MILAN', 'PICTURE', '--clip_path', '', '--text', 'x'], '--text compares texts'),
    'teacher without texts': (['MAE', 'PICTURE', '--text', 'x', '--teacher', 'vit_tiny_patch16_224', '--teacher_path', 'TIMM'],
                              '--text compares texts'),
    'no such teacher': (['MILAN', 'PICTURE', '--teacher', 'vit_huge'], '--teacher vit_huge'),
    'two teachers': (['MILAN', 'PICTURE', '--teacher', 'ViT-B/16', '--clip_path', 'CLIP'], 'name two teachers'),
    'teacher of another width': (['MILAN', 'PICTURE', '--teacher', 'vit_tiny_patch16_224', '--teacher_path', 'TIMM'],
                                 'are 192 wide and the model predicts 48'),
    'text too long': (['MILAN', 'PICTURE', '--text', 'word ' * 20], 'too many for a context of 16'),
    'text empty': (['MILAN', 'PICTURE', '--text', 'a dog', ' '], '--text: one of the texts is empty'),
    'text of other tokens': (['MILAN', 'PICTURE', '--text', 'grass', '--clip_path', 'MUTE'], 'knows 512 tokens'),
    'output is a file': (['MILAN', 'PICTURE', '--output_dir', __file__], '--output_dir'),
    'not finite': (['NAN', 'PICTURE'], 'weights that are not finite'),
    'no such device': (['MILAN', 'PICTURE', '--device', 'gpu'], '--device gpu'),
}


@pytest.fixture(scope='module')
def files(milan, pretrained, tiny_clip, talking_clip, timm_vit, odd_pictures, tmp_path_factory):
    root = tmp_path_factory.mktemp('files')
    whole = load(milan)
    torch.save({'model': whole['model']}, root / 'NAMELESS')
    whole['model']['cls_token'][:] = math.nan
    torch.save({'model': whole['model'], 'args': whole['args']}, root / 'NAN')
    return {'MILAN': milan, 'MAE': pretrained, 'CLIP': talking_clip, 'MUTE': tiny_clip, 'TIMM': timm_vit[3],
            'PICTURE': odd_pictures[0], 'NAMELESS': root / 'NAMELESS', 'NAN': root / 'NAN'}


@pytest.mark.parametrize('case', WRONG)
def test_wrong_use(case, files, tmp_path):
    """One line that names the file or flag, no traceback, and no figure."""
    flags, message = WRONG[case]
    result = draw(*[files.get(f, f) for f in flags], *([] if '--output_dir' in flags else ['--output_dir', tmp_path / 'out']))
    errors = [line for line in result.stderr.splitlines() if 'No CUDA GPU' not in line]
    assert result.returncode == 1 and len(errors) == 1 and errors[0].startswith('error: ') and message in errors[0], result.stderr
    assert not (tmp_path / 'out').exists()


def test_the_command(milan, odd_pictures, tmp_path):
    """As users start it, from another folder, and where matplotlib is not installed."""
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib' / '__init__.py').write_text('raise ImportError')
    result = run(sys.executable, ROOT / 'tools' / 'visualize.py', milan, odd_pictures[0], cwd=tmp_path,
                 env={'PYTHONPATH': str(tmp_path)})
    assert result.returncode == 1 and result.stderr.splitlines()[-1].endswith('pip install matplotlib')
