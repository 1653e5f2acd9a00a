"""Rules of the code that ruff does not check."""

import ast

from tests.helpers import ROOT, TESTS

FOLDERS = ('.', 'clip', 'util', 'util/*', 'tools', 'tools/*')
CODE = [path for folder in FOLDERS for path in ROOT.glob(f'{folder}/*.py')]


def nodes_of(path):
    return ast.walk(ast.parse(path.read_text()))


def test_public_functions_have_type_hints():
    """Functions within functions count too, if their names do not start with an underscore."""
    missing = []
    for path in CODE:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
                args = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                names = {arg.arg for arg in args if not arg.annotation} - {'self', 'cls'}
                if names or not node.returns:
                    missing.append(f'{path.relative_to(ROOT)}:{node.lineno} {node.name}')
    assert not missing, '\n'.join(missing)


def test_tests_do_not_import_tests():
    for path in TESTS.rglob('*.py'):
        for node in nodes_of(path):
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ''
            assert not module.split('.')[-1].startswith('test_'), path
