"""What docs/ say is so."""

import ast
import importlib.util
import math
import re
from functools import partial

import pytest
import test_readme
import torch
import torch.nn.functional as F
from conftest import ROOT, pretrain
from PIL import Image

import clip
from models_milan import MaskedAutoencoderViT, mae_vit_tiny_patch8

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
CODE = [path for pattern in ('*.py', 'util/*.py', 'clip/*.py', 'tools/*.py', 'tools/demo/*.py') for path in ROOT.glob(pattern)]


def page_blocks(name, language):
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / 'docs' / name).read_text(), re.DOTALL)


# ---- layout.md ----

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


layout = load(ROOT / 'docs' / 'layout.py')


def imported(path):
    """Files and top folders of this repository that the file at ``path`` imports, such as engine_pretrain.py and clip/."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    files = {f'{name.replace(".", "/")}.py' for name in names}
    return {file for file in files if (ROOT / file).exists()} | {f'{name}/' for name in names if (ROOT / name).is_dir()}


def test_the_pictures_arrows_are_the_imports():
    upper = {name: {name, *re.findall(r'util/\w+\.py', ' '.join(box[4]))} for name, box in layout.BOXES.items() if box[1] > 1}
    for name in upper.keys() - {'tools/', 'clip/'}:
        files = set().union(*(imported(ROOT / file) for file in upper[name]))
        assert {box for box in upper if upper[box] & files} - {name} == set(layout.ARROWS.get(name, [])), name


def test_the_picture_is_the_scripts():
    with Image.open(ROOT / 'docs' / 'layout.png') as image:
        assert image.info['Description'] == repr((layout.BOXES, layout.ARROWS)), 'run python docs/layout.py'


def test_the_picture_has_every_file():
    shown = ' '.join([*layout.BOXES, *(line for box in layout.BOXES.values() for line in box[4])])
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        top = 'clip/' if name.startswith('clip/') else 'demo/' if name.startswith('tools/demo/') else None
        assert name.endswith('__init__.py') or (top or name.removeprefix('tools/')) in shown, name


def test_the_page_has_every_file():
    page = (ROOT / 'docs' / 'layout.md').read_text()
    for path in CODE:
        name = path.relative_to(ROOT).as_posix()
        if not name.endswith('__init__.py') and 'demo/' not in name:
            assert f'`{name.removeprefix("tools/")}`' in page, name
    for name in re.findall(r'`((?:\w+/)*\w+\.py)`', page):
        assert (ROOT / name).exists() or (ROOT / 'tools' / name).exists(), name


def test_the_pages_examples_of_a_fork_work():
    blocks = page_blocks('layout.md', 'python')
    names = {'partial': partial, 'MaskedAutoencoderViT': MaskedAutoencoderViT, 'math': math, 'F': F}
    for block in blocks:
        exec(block, names)
    with torch.device('meta'):
        assert names['mae_vit_base_patch8'](img_size=224).pos_embed.shape == (1, 28 * 28 + 1, 768)
    order = names['clustered_order'](torch.rand(2, 196, generator=torch.Generator().manual_seed(0)))
    assert (order.sort(dim=1).values == torch.arange(196)).all()
    side = torch.zeros(2, 196).scatter(1, order[:, :49], 1.0).view(2, 14, 14)
    assert side.diff(dim=2).abs().mean() < 0.25  # of 49 visible patches drawn uniformly, 0.38 of all neighbours differ


# ---- recipes.md ----

def test_the_blind_loss_is_the_least_of_a_constant_prediction(tiny_clip):
    names = {'F': F}
    exec(page_blocks('recipes.md', 'python')[0], names)
    model = mae_vit_tiny_patch8(use_clip=True, target_dim=48)
    with torch.no_grad():
        tokens, _ = clip.load(str(tiny_clip), 'cpu')[0].encode_tokens(torch.randn(3, 3, 64, 64))
    order = torch.arange(64).expand(3, -1)

    def loss(constant):
        return model.forward_loss(None, constant.expand(3, 65, -1), tokens, order, 16)

    best = F.normalize(tokens, dim=-1).mean(dim=(0, 1))
    torch.testing.assert_close(names['blind_loss'](tokens), loss(best))
    assert all(loss(best + 0.1 * torch.randn(48)) > loss(best) for _ in range(20))


def test_pretraining_further_starts_from_the_weights_alone(pretrained, small_images, tmp_path):
    """The page's command makes a file without optimiser and epoch, which --resume takes for a start."""
    code = re.search(r'python -c "(.*)"', (ROOT / 'docs' / 'recipes.md').read_text())[1]
    exec(code.replace('FILE', str(pretrained)).replace('start.pth', str(tmp_path / 'start.pth')), {})
    result = pretrain('--model', 'mae_vit_tiny_patch8', '--input_size', 64, '--batch_size', 8, '--data_path', small_images,
                      '--epochs', 1, '--num_workers', 0, '--output_dir', '', '--log_dir', '', '--resume', tmp_path / 'start.pth')
    assert result.returncode == 0 and 'no optimiser state' in result.stdout and 'Epoch [0]' in result.stdout, result.stderr


# ---- links ----

def anchors(page):
    """GitHub's anchors of a page's headings."""
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in re.findall(r'^#+ (.*)', page, re.MULTILINE)}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r'\]\((?!https?://)([^)\s]+)\)', path.read_text()):
        file, _, anchor = target.partition('#')
        page = path.parent / file if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text()), target


# ---- troubleshooting.md ----

def message_patterns():
    """A regular expression for every string of the code: anything may stand where an f-string has a value."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if all(isinstance(text, str | None) for text in texts) and sum(len(text or '') for text in texts) >= 10:
                yield re.compile(''.join('(.*)' if text is None else re.escape(text) for text in texts) + '(?:: (.+))?')


def is_printed(text, patterns):
    """Whether ``text`` is one of the code's strings; what stands for a value in it may be anything shorter than a sentence."""
    def sentence(value):
        return len(re.findall(r'\b[a-z]{3,}\b', value or '')) > 3
    matches = filter(None, (pattern.fullmatch(text) for pattern in patterns))
    return any(all(is_printed(value.strip(': '), patterns) for value in filter(sentence, match.groups())) for match in matches)


def test_quoted_messages_are_those_of_the_code():
    quotes = [' '.join(quote.split()) for block in page_blocks('troubleshooting.md', 'text') for quote in block.split('\n\n')]
    patterns = list(message_patterns())
    assert len(quotes) > 40
    for quote in quotes:
        assert is_printed(quote, patterns), quote


# ---- flags ----

def test_flags_in_the_pages_exist():
    known = set().union(*map(test_readme.flags, test_readme.SCRIPTS + test_readme.TOOLS))
    known |= {'--nproc_per_node', '--standalone', '--use_env', '--master_port', '--logdir', '--ipc', '--shm-size', '--nnodes',
              '--rdzv_backend', '--rdzv_endpoint', '--rdzv_id', '--max-restarts', '--cpus-per-task', '--gpus-per-node',
              '--ntasks-per-node', '--open-mode', '--requeue', '--signal', '--time'}  # others' own
    for path in PAGES:
        page = re.sub(r'\]\([^)]*\)', '', path.read_text())
        assert set(re.findall(r'(?<![\w-])--[a-z][\w-]+', page)) <= known, path.name


@pytest.mark.parametrize('module', [*test_readme.SCRIPTS, *test_readme.TOOLS], ids=lambda module: module.__name__)
def test_help_tells_of_every_flag(module):
    parser = module.get_args_parser()
    for action in parser._actions:
        assert action.help, action.dest
        assert action.nargs == 0 or action.choices or action.metavar, f'{action.dest}: argparse would repeat its name'
    if module in test_readme.SCRIPTS:
        options = next(group for group in parser._action_groups if group.title == 'options')
        assert [action.dest for action in options._group_actions] == ['help'], 'not in a group'
    assert parser.format_help()
