"""What docs/ say is so."""

import ast
import importlib.util
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from models_milan import MaskedAutoencoderViT

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])
CODE = [path for pattern in ('*.py', 'util/*.py', 'clip/*.py', 'tools/*.py', 'tools/demo/*.py') for path in ROOT.glob(pattern)]


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


@pytest.mark.parametrize('file', [name for name in layout.BOXES if name.endswith('.py')])
def test_the_pictures_arrows_are_the_imports(file):
    upper = {name for name, box in layout.BOXES.items() if box[1] > 1}
    assert set(layout.ARROWS.get(file, [])) == imported(ROOT / file) & upper


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
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs' / 'layout.md').read_text(), re.DOTALL)
    names = {'partial': partial, 'MaskedAutoencoderViT': MaskedAutoencoderViT, 'math': math, 'F': F}
    for block in blocks:
        exec(block, names)
    with torch.device('meta'):
        assert names['mae_vit_base_patch8'](img_size=224).pos_embed.shape == (1, 28 * 28 + 1, 768)
    order = names['clustered_order'](torch.rand(2, 196, generator=torch.Generator().manual_seed(0)))
    assert (order.sort(dim=1).values == torch.arange(196)).all()
    side = torch.zeros(2, 196).scatter(1, order[:, :49], 1.0).view(2, 14, 14)
    assert side.diff(dim=2).abs().mean() < 0.25  # of 49 visible patches drawn uniformly, 0.38 of all neighbours differ


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
            if all(isinstance(text, str | None) for text in texts) and sum(len(text or '') for text in texts) >= 20:
                yield re.compile(''.join('.*' if text is None else re.escape(text) for text in texts) + '(: .+)?')


def test_quoted_messages_are_those_of_the_code():
    page = (ROOT / 'docs' / 'troubleshooting.md').read_text()
    blocks = re.findall(r'```text\n(.*?)```', page, re.DOTALL)
    quotes = [' '.join(quote.split()) for block in blocks for quote in block.split('\n\n')]
    patterns = list(message_patterns())
    assert len(quotes) > 40
    for quote in quotes:
        assert any(pattern.fullmatch(quote) for pattern in patterns), quote
