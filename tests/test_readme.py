"""The README keeps up with the code."""

import re

from conftest import ROOT

import main_finetune
import main_linprobe
import main_pretrain
import models_milan
import models_vit
from tools import ablation, benchmark, download, export, knn, prepare_imagenet, segment, slurm, visualize

README = (ROOT / 'README.md').read_text()
FLAGS = (ROOT / 'docs' / 'flags.md').read_text()
SCRIPTS = main_pretrain, main_finetune, main_linprobe
TOOLS = ablation, benchmark, download, export, knn, prepare_imagenet, segment, slurm, visualize


def flags(module):
    return {option for action in module.get_args_parser()._actions for option in action.option_strings}


def test_every_flag_is_in_a_table():
    for option in set().union(*map(flags, SCRIPTS)) - {'-h', '--help', '--local-rank'}:
        assert f'`{option}`' in FLAGS, option


def test_every_flag_of_the_commands_exists():
    known = set().union(*map(flags, SCRIPTS + TOOLS))
    known |= {'--nproc_per_node', '--use_env', '--logdir', '--max-restarts'}  # the launchers' and TensorBoard's
    code = '\n'.join(re.findall(r'^    .*', README, re.MULTILINE) + re.findall('`[^`]+`', README))
    assert set(re.findall(r'--[a-z][a-z_-]+', code)) <= known


def test_every_model_is_named():
    for name in (*models_milan.MODELS, *models_vit.MODELS):
        assert name.removeprefix('mae_').removeprefix('vit_').split('_dec')[0] in FLAGS
