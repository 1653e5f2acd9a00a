"""The README keeps up with the code."""

import re

from conftest import ROOT

from main_pretrain import get_args_parser
from models_milan import MODELS

README = (ROOT / 'README.md').read_text()


def test_every_flag_is_in_the_table():
    for action in get_args_parser()._actions:
        if action.option_strings[0] not in ('-h', '--help'):
            assert f'`{action.option_strings[0]}`' in README, action.option_strings[0]


def test_every_flag_of_the_commands_exists():
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= {'--nproc_per_node', '--use_env', '--logdir'}  # the launchers' and TensorBoard's
    code = '\n'.join(re.findall(r'^    .*', README, re.MULTILINE) + re.findall('`[^`]+`', README))
    assert set(re.findall(r'--[a-z_]+', code)) <= known


def test_every_model_is_named():
    for name in MODELS:
        assert name.removeprefix('mae_vit_').split('_dec')[0] in README


def test_links_lead_somewhere():
    for target in re.findall(r'\]\((?!https?://)([^)]+)\)', README):
        assert (ROOT / target).exists(), target
