"""Long tests of damage and interruptions. Each prints a line of counts at the end.

    python -m tests.stress checkpoints --count 10000 --seed 0
    python -m tests.stress commands --count 2000 --seed 0

A case depends only on the seed and its number: --only NUMBER repeats one. The exit status is 1 if
a case failed. `make test` runs a few cases of each kind (tests/stress/test_stress.py).
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

if not __package__:  # python tests/stress KIND: put the repository first, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

# Kind: number of cases by default. The module of that name has a class Stress.
# Stress(folder, seed) prepares the cases in an empty folder. case(number) runs one and returns
# (outcome, description); an outcome that starts with WRONG is a failure. close() cleans up.
KINDS = {
    'checkpoints': 10_000,
    'commands': 2_000,
    'kills': 10,
    'signals': 20,
    'nodes': 3,
    'disk': 6_000,
    'images': 10,
    'memory': 2,
}
WRONG = 'WRONG'


def stress(kind, numbers, seed, folder):
    """Run the cases with these numbers; return a Counter of outcomes. Failures are printed."""
    outcomes = Counter()
    cases = importlib.import_module(f'tests.stress.{kind}').Stress(folder, seed)
    interval = 1 if sys.stderr.isatty() else 60
    try:
        for number in tqdm(numbers, desc=kind, unit='case', mininterval=interval):
            outcome, description = cases.case(number)
            outcomes[outcome.split(':')[0]] += 1
            if outcome.startswith(WRONG):
                tqdm.write(f'{kind} --seed {seed} --only {number}: {description}: {outcome}')
    finally:
        cases.close()
    return outcomes


def main():
    parser = argparse.ArgumentParser(
        prog='python -m tests.stress',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('kind', choices=KINDS)
    parser.add_argument('--count', type=int, help='number of cases')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--only', type=int, metavar='NUMBER', help='run only this case and keep its files'
    )
    args = parser.parse_args()
    numbers = range(args.count or KINDS[args.kind]) if args.only is None else [args.only]
    folder = Path(tempfile.mkdtemp(prefix=f'{args.kind}_'))
    start = time.time()
    try:
        outcomes = stress(args.kind, numbers, args.seed, folder)
    finally:
        shutil.rmtree(folder) if args.only is None else print(f'Files: {folder}')
    wrong = outcomes.pop(WRONG, 0)
    counts = ', '.join(f'{n} {outcome}' for outcome, n in sorted(outcomes.items()))
    seconds = f'{time.time() - start:.0f} s'
    cases = f'{args.kind}: {len(numbers)} cases, seed {args.seed}, {seconds}'
    print(f'{cases}: {counts}; {wrong} wrong')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
