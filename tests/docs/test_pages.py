"""Test that the pages agree with the code: links, files, commands, flags."""

import re
import shlex

import pytest

import models_milan
import models_vit
from tests.docs.pages import PAGES, page
from tests.helpers import ROOT, main_module

SCRIPTS = ['main_pretrain', 'main_finetune', 'main_linprobe']
TOOLS = [
    f'tools.{name}'
    for name in (
        'ablation',
        'benchmark',
        'download',
        'export',
        'knn',
        'prepare_imagenet',
        'segment',
        'slurm',
        'visualize',
    )
]
# flags of launchers, TensorBoard, Docker and Slurm, and of tests.stress
OTHER_FLAGS = set(
    """--nproc_per_node --use_env --standalone --master_port --nnodes --rdzv_backend
    --rdzv_endpoint --rdzv_id --max-restarts --logdir --ipc --shm-size --cpus-per-task
    --gpus-per-node --ntasks-per-node --open-mode --requeue --signal --time""".split()
)


def parser_of(module):
    return main_module(module).get_args_parser()


def flags(module):
    return {flag for action in parser_of(module)._actions for flag in action.option_strings}


def code_of(path):
    """Return the indented code of a page, with continued lines joined."""
    lines = re.findall(r'^    +(\S.*)', path.read_text().replace('\\\n', ' '), re.MULTILINE)
    return [line for line in lines if re.search(r'python|torchrun', line)]


def commands():
    """Yield (page, module, arguments) of every command of a script or tool."""
    for path in PAGES:
        for line in code_of(path):
            words = shlex.split(line, comments=True)
            for i, word in enumerate(words):
                module = word.removesuffix('.py')
                if module in SCRIPTS + TOOLS and '...' not in words:
                    yield path.name, module, words[i + 1 :]
                    break


COMMANDS = list(commands())


def test_commands_are_found():
    assert {module for _, module, _ in COMMANDS} == {*SCRIPTS, *TOOLS}


@pytest.mark.parametrize('name, module, words', COMMANDS)
def test_commands_parse(name, module, words):
    end = words.index('--') if '--' in words else len(words)
    _, others = parser_of(module).parse_known_args(words[:end])
    if module == 'tools.benchmark':  # passes other flags on
        _, others = parser_of('main_pretrain').parse_known_args(others)
    assert not others
    if module == 'tools.slurm':
        parser_of(f'main_{words[0]}').parse_args(words[end + 1 :])


def test_flags_exist():
    known = set().union(OTHER_FLAGS, *map(flags, SCRIPTS + TOOLS))
    for path in PAGES:
        text = re.sub(r'\]\([^)]*\)', '', path.read_text())
        assert set(re.findall(r'(?<![\w-])--[a-z][\w-]+', text)) <= known, path.name


@pytest.mark.parametrize('module', [*SCRIPTS, 'tools.slurm'])
def test_every_flag_is_documented(module):
    text = page('docs/clusters.md' if module == 'tools.slurm' else 'docs/flags.md')
    for flag in flags(module) - {'-h', '--help', '--local-rank'}:
        assert f'`{flag}`' in text, flag


def test_flags_page_lists_every_model():
    for name in (*models_milan.MODELS, *models_vit.MODELS):
        size = name.removeprefix('mae_').removeprefix('vit_').split('_dec')[0]
        assert size in page('docs/flags.md'), name


@pytest.mark.parametrize('module', SCRIPTS + TOOLS)
def test_every_flag_has_help(module):
    parser = parser_of(module)
    for action in parser._actions:
        assert action.help, action.dest
        assert action.nargs == 0 or action.choices or action.metavar, action.dest
    if module in SCRIPTS:
        options = next(group for group in parser._action_groups if group.title == 'options')
        assert [action.dest for action in options._group_actions] == ['help'], 'no group'
    assert parser.format_help()


def anchors(text):
    """Return GitHub's anchors of the headings of a page."""
    titles = re.findall(r'^#+ (.*)', text, re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_links_exist(path):
    for target in re.findall(r'\]\((?!https?://)([^)\s]+)\)', path.read_text()):
        file, _, anchor = target.partition('#')
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), target


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_files_and_modules_exist(path):
    text = path.read_text()
    for name in re.findall(r'(?<![\w/])(?:\w+/)+(?:\w+\.py)?(?=`)|\b\w+\.py(?=`)', text):
        if name.split('/')[0] in ('clip', 'docs', 'tests', 'tools', 'util') or '/' not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r'\b(?:tools|tests)\.[a-z]\w*', text):
        file = ROOT / name.replace('.', '/')
        assert file.is_dir() or file.with_suffix('.py').exists(), name
