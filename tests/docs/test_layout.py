"""Test the dependency rule and docs/layout.md."""

import ast
import re

import pytest

from tests.docs.pages import blocks
from tests.helpers import ROOT

LEVELS = ('util', 'clip', 'models', 'engine', 'main', 'tools', 'tests')
CODE = [*ROOT.glob('*.py')]
for folder in ('clip', 'util', 'tools'):
    CODE += (ROOT / folder).rglob('*.py')
CODE = {path.relative_to(ROOT).as_posix(): path for path in CODE}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def level(name):
    """Return the level of a file or module; -1 for other packages."""
    levels = (i for i, prefix in enumerate(LEVELS) if name.startswith(prefix))
    return 5 if name.startswith('hubconf') else next(levels, -1)


@pytest.mark.parametrize('name', CODE)
def test_imports_go_downward(name):
    for module in imports(CODE[name]):
        assert level(module) <= level(name), module
        if name.startswith('tools/') and module.startswith('tools.'):
            assert module.split('.')[1] == re.split('[/.]', name)[1], module


def test_page_lists_every_file():
    tree = blocks('docs/layout.md', 'text')[0]
    for name in CODE:
        if not name.endswith('__init__.py'):
            folder, _, file = name.rpartition('/')
            assert re.search(rf'(?<![\w/]){re.escape(file)}\b', tree), name
            assert f'{folder}/' in tree or not folder, name


def test_files_named_in_the_tree_exist():
    for name in re.findall(r'[\w/]+\.py', blocks('docs/layout.md', 'text')[0]):
        assert any(f'/{file}'.endswith(f'/{name}') for file in CODE), name
