"""CLIP: its outputs against open_clip, its file formats, its tokenizer and its errors."""

import sys
import warnings

import open_clip
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

import clip
from clip.simple_tokenizer import SimpleTokenizer
from models_teacher import Teacher
from tests.golden.deterministic import images, load_deterministic
from tests.helpers import ROOT, TINY_CLIP, openai_state_dict, run, save_archive
from util.checkpoints.io import read_weights

TEXTS = [
    'a photo of a cat',
    "It's   the dogs' 1,234.50 €!",
    'naïve café — “quoted” &amp;amp; &lt;b&gt;',
    '日本語 и русский текст 🚀',
    "ALL CAPS I'LL we've",
    'under_score\tand\nnewline',
    '',
    'mojibake: schÃ¶n',
    'supercalifragilisticexpialidocious ' * 3,
]


@pytest.fixture(scope='module')
def tiny_model():
    return load_deterministic(clip.CLIP(**TINY_CLIP), skip=()).eval()


def test_agrees_with_open_clip():
    """Same weights, images and texts give the same features as another implementation."""
    sizes = dict(
        embed_dim=128,
        image_resolution=64,
        vision_layers=3,
        vision_width=128,
        vision_patch_size=16,
        context_length=77,
        vocab_size=49408,
        transformer_width=128,
        transformer_heads=2,
        transformer_layers=2,
    )
    torch.manual_seed(0)
    ours = clip.CLIP(**sizes).eval()
    # open_clip's builder converts to float16
    state_dict = {k: v.half().float() for k, v in ours.state_dict().items()}
    ours.load_state_dict(state_dict)
    theirs = (
        open_clip.model.build_model_from_openai_state_dict(
            dict(state_dict), cast_dtype=torch.float32
        )
        .float()
        .eval()
    )
    imgs = torch.from_numpy(images('open_clip', 4, 64)).float()
    ids = clip.tokenize(TEXTS)
    assert torch.equal(ids.long(), open_clip.tokenize(TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(
            ours.encode_image(imgs), theirs.encode_image(imgs), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            ours.encode_text(ids), theirs.encode_text(ids.long()), rtol=1e-4, atol=1e-5
        )


def test_tokenizer():
    ids = clip.tokenize(['a cat', 'a'])
    assert ids.shape == (2, 77) and ids.dtype == torch.int
    assert ids[1].tolist() == [49406, 320, 49407] + [0] * 74
    assert clip.tokenize('a cat', context_length=8).shape == (1, 8)
    with pytest.raises(RuntimeError, match='77'):
        clip.tokenize('cat ' * 80)
    cut = clip.tokenize('cat ' * 80, truncate=True)
    assert cut[0, 0] == 49406 and cut[0, -1] == 49407
    tokenizer = SimpleTokenizer()
    assert (
        tokenizer.decode(tokenizer.encode('Ein schönes Bild, 12 🚀'))
        == 'ein schönes bild , 1 2 🚀 '
    )


def test_every_file_format_gives_the_same_model(tiny_model, tiny_clip, tmp_path):
    expected = {
        k: v.half().float() if v.ndim > 1 else v for k, v in tiny_model.state_dict().items()
    }
    plain, wrapped = tmp_path / 'plain.pth.tar', tmp_path / 'wrapped.pth.tar'
    torch.save(openai_state_dict(tiny_model), plain)
    torch.save(
        {'epoch': 3, 'state_dict': {f'module.{k}': v for k, v in tiny_model.state_dict().items()}},
        wrapped,
    )
    for path in (tiny_clip, plain, wrapped):
        model, preprocess = clip.load(str(path), 'cpu')
        assert not model.training
        assert model.state_dict().keys() == expected.keys()
        for k, v in model.state_dict().items():
            assert v.dtype == torch.float32
            torch.testing.assert_close(v, expected[k], rtol=1e-3, atol=1e-4)
    assert preprocess(Image.new('L', (100, 70))).shape == (3, 64, 64)


@pytest.mark.slow
def test_loading_gives_no_deprecation_warnings(tiny_clip):
    result = run(
        sys.executable,
        '-W',
        'always',
        '-c',
        f'import clip; clip.load({str(tiny_clip)!r}, "cpu")',
        cwd=ROOT,
    )
    assert result.returncode == 0
    assert 'deprecat' not in result.stderr.lower(), result.stderr


def test_found_by_name_in_the_working_directory(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(openai_state_dict(tiny_model), 'clip_vit_base_16.pth.tar')
    model, _ = clip.load('ViT-B/16', 'cpu')
    assert model.visual.input_resolution == 64
    assert 'clip_vit_base_16.pth.tar' in capsys.readouterr().out
    save_archive(tiny_model, 'ViT-L-14.pt')
    assert clip.load('ViT-L/14', 'cpu')[0].visual.grid_size == 8


def test_available_models():
    assert clip.available_models() == ['ViT-B/16', 'ViT-B/32', 'ViT-L/14', 'ViT-L/14@336px']


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda w: {'visual.layer1.0.conv1.weight': torch.zeros(1)}, ['ResNet']),
        (lambda w: {'weight': torch.zeros(1)}, ['visual.conv1.weight']),
        (lambda w: {'model': 'text'}, ['file.pt']),
        (lambda w: {**w, 'text_projection': torch.zeros(64, 50)}, ['text_projection']),
        (lambda w: {k: v for k, v in w.items() if k != 'ln_final.weight'}, ['ln_final.weight']),
        (lambda w: {**w, 'more': torch.zeros(1)}, ['more']),
        (lambda w: {**w, 'ln_final.weight': w['ln_final.weight'].int()}, ['ln_final', 'int32']),
        (lambda w: {**w, 'ln_final.weight': torch.zeros(0)}, ['ln_final.weight', '[0]']),
        (lambda w: {**w, 'visual.conv1.weight': torch.zeros(100, 3, 8, 8)}, ['100']),
    ],
    ids=[
        'ResNet',
        'another model',
        'no weights',
        'other shape',
        'missing tensor',
        'unexpected tensor',
        'integers',
        'empty tensor',
        'width',
    ],
)
def test_state_dicts_that_are_not_a_clip(change, words, tiny_model, tmp_path):
    torch.save(change(tiny_model.state_dict()), tmp_path / 'file.pt')
    with pytest.raises(ValueError) as error:
        clip.load(str(tmp_path / 'file.pt'), 'cpu')
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize('damage', [lambda data: b'text', lambda data: data[:-50_000]])
def test_damaged_files(damage, tiny_clip, tmp_path):
    (tmp_path / 'file.pt').write_bytes(damage(tiny_clip.read_bytes()))
    with pytest.raises(ValueError, match='file.pt') as error:
        clip.load(str(tmp_path / 'file.pt'), 'cpu')
    assert '\n' not in str(error.value)


class Writer(torch.nn.Module):
    """A module whose archive writes a file when torch.jit.load reads it."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.zeros(1))

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(torch.zeros(1), self.path)

    def forward(self, x: torch.Tensor):
        return x


def test_code_in_an_archive_does_not_run(tmp_path):
    torch.jit.script(Writer(str(tmp_path / 'proof'))).save(str(tmp_path / 'evil.pt'))
    with pytest.raises(ValueError):
        clip.load(str(tmp_path / 'evil.pt'), 'cpu')
    assert not (tmp_path / 'proof').exists()
    torch.jit.load(str(tmp_path / 'evil.pt'))  # here it runs
    assert (tmp_path / 'proof').exists()


def test_archive_agrees_with_torch_jit_load(tiny_clip):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = torch.jit.load(tiny_clip).state_dict()
    ours = read_weights(tiny_clip)[1]
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value)


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match='RN50.*ViT-B/16'):
        clip.load('RN50', 'cpu')


def test_importance_agrees_with_the_full_attention_matrix(tiny_model):
    """The matrix comes from nn.MultiheadAttention."""
    imgs = torch.from_numpy(images('importance', 2, 64)).float()
    visual = tiny_model.visual
    block = visual.transformer.resblocks[-1]
    with torch.no_grad():
        tokens, importance = tiny_model.encode_tokens(imgs)
        x = visual.embed(imgs)
        for earlier in visual.transformer.resblocks[:-1]:
            x, _ = earlier(x)
        reference = torch.nn.MultiheadAttention(128, 2, batch_first=True)
        reference.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        _, attention = reference(y, y, y, average_attn_weights=True)
    assert tokens.shape == (2, 65, 48) and importance.shape == (2, 64)
    torch.testing.assert_close(importance, attention[:, 0, 1:], rtol=1e-4, atol=1e-6)
    assert ((0 < importance.sum(1)) & (importance.sum(1) < 1)).all()


def test_teacher(tiny_model):
    imgs = torch.from_numpy(images('teacher', 2, 64)).float()
    teacher = Teacher(clip.build_model(tiny_model.state_dict()).visual)
    tokens, importance = teacher(imgs)
    assert torch.equal(tokens, tiny_model.encode_tokens(imgs)[0].detach())
    assert not tokens.requires_grad and not importance.requires_grad
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())

    raw = torch.rand(2, 3, 64, 64)
    imagenet = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(raw)
    own = transforms.Normalize(clip.clip.MEAN, clip.clip.STD)(raw)
    normalizing = Teacher(teacher.visual, norm='own')
    torch.testing.assert_close(normalizing(imagenet)[0], teacher(own)[0], rtol=1e-4, atol=1e-4)


def test_average_targets(tiny_model):
    imgs = torch.from_numpy(images('average', 2, 64)).float()
    visual = tiny_model.visual
    with torch.no_grad():
        first, _ = visual.transformer.resblocks[0](visual.embed(imgs))
        second, _ = visual.transformer.resblocks[1](first)
        expected = (visual.ln_post(first) + visual.ln_post(second)) / 2 @ visual.proj
        torch.testing.assert_close(visual.encode_tokens(imgs, average_targets=2)[0], expected)
