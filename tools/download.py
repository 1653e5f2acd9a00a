"""Download released weights by name, resume broken downloads, and check the files.

python -m tools.download --list
python -m tools.download milan_vit_base clip_vit_b16 --output_dir weights
"""

import argparse
from urllib.parse import urlparse

import clip.clip
from models_released import DRIVE, FILES, fetch
from util.cli import Parser, add_flags, run
from util.errors import refuse
from util.logs import check_writable


# Print one row per released file: size, source and published accuracy.
def _print_table():
    line = '{:34}  {:46}  {:>10}  {:>10}  {:26}  {}'
    print(line.format('name', 'what', 'parameters', 'as float32', 'source', 'published top-1, %'))
    for name, file in FILES.items():
        millions = sum(tensor.numel() for tensor in file.tensors().values()) / 1e6
        url = file.url or (DRIVE if file.drive_id else clip.clip._URL)
        print(
            line.format(
                name,
                file.description,
                f'{millions:.1f} M',
                f'{4 * millions:,.0f} MB',
                urlparse(url).hostname,
                file.top1,
            )
        )
    print(
        '\nSizes are those of the listed weights. A file may hold more, such as an optimizer, '
        'or store them as float16.'
    )


FLAGS = {
    'names': dict(nargs='*', metavar='NAME', help=', '.join(FILES)),
    '--output_dir': dict(
        metavar='DIR',
        help='default: the working directory, and for CLIP ~/.cache/clip, where '
        'main_pretrain.py --clip_path finds it by name',
    ),
    '--list': dict(
        action='store_true', help='list the files with size, source and published accuracy'
    ),
}


def get_args_parser() -> Parser:
    parser = Parser(
        'python -m tools.download', description='Download released weights', allow_abbrev=False
    )
    add_flags(parser, FLAGS)
    return parser


def main(args: argparse.Namespace) -> None:
    if args.list:
        return _print_table()
    choices = f'choose from {", ".join(FILES)} (see --list)'
    refuse(
        (not args.names, f'give a name: {choices}'),
        *((name not in FILES, f'unknown name {name}: {choices}') for name in args.names),
    )
    if args.output_dir:
        check_writable('--output_dir', args.output_dir)
    for name in dict.fromkeys(args.names):
        print(
            f'{name} is downloaded and checked:',
            '--clip_path' if FILES[name].clip_name else '--finetune',
            fetch(name, args.output_dir),
        )


if __name__ == '__main__':
    run(main, get_args_parser().parse_args())
