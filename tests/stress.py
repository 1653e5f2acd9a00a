"""Long tests that do for real what a run has to survive, with a line of counts at the end. pytest runs a short form of each.

    python tests/stress.py checkpoints --count 10000 --seed 0
    python tests/stress.py commands --count 2000 --seed 0

A case is a function of the seed and its number alone: --only NUMBER does one again. The exit status is 1 if one went wrong.
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

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

# name: (the module with its class Stress, cases by default). Stress(folder, seed) makes what its cases need in the empty
# folder; case(number) does one and returns (outcome, what it was), of which one that begins with WRONG is a failure; close()
# ends it.
KINDS = {'checkpoints': ('stress_checkpoints', 10_000), 'commands': ('stress_commands', 2_000), 'kills': ('stress_kills', 10),
         'signals': ('stress_signals', 20), 'nodes': ('stress_nodes', 3), 'disk': ('stress_disk', 6_000),
         'images': ('stress_images', 10), 'memory': ('stress_memory', 2)}
WRONG = 'WRONG'


def stress(kind, numbers, seed, folder):
    """Do the cases of these numbers; a Counter of their outcomes. What goes wrong is told at once."""
    outcomes = Counter()
    cases = importlib.import_module(KINDS[kind][0]).Stress(folder, seed)
    try:
        for number in tqdm(numbers, desc=kind, unit='case', mininterval=1 if sys.stderr.isatty() else 60):
            outcome, what = cases.case(number)
            outcomes[outcome.split(':')[0]] += 1
            if outcome.startswith(WRONG):
                tqdm.write(f'{kind} --seed {seed} --only {number}: {what}: {outcome}')
    finally:
        cases.close()
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', choices=KINDS)
    parser.add_argument('--count', type=int, help='cases')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='NUMBER', help='this case alone, and its files are kept')
    args = parser.parse_args()
    numbers = range(args.count or KINDS[args.kind][1]) if args.only is None else [args.only]
    folder = Path(tempfile.mkdtemp(prefix=f'stress_{args.kind}_'))
    start = time.time()
    try:
        outcomes = stress(args.kind, numbers, args.seed, folder)
    finally:
        shutil.rmtree(folder) if args.only is None else print(f'Files: {folder}')
    counts = ', '.join(f'{n} {outcome}' for outcome, n in sorted(outcomes.items()) if outcome != WRONG)
    seconds = time.time() - start
    print(f'{args.kind}: {len(numbers)} cases, seed {args.seed}, {seconds:.0f} s: {counts}; {outcomes[WRONG]} wrong')
    sys.exit(outcomes[WRONG] > 0)


if __name__ == '__main__':
    main()
