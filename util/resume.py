"""Find the checkpoint that a run continues from."""

import glob
import os
import sys

from util.checkpoints import io
from util.distributed import gather, is_main_process
from util.errors import UserError
from util.run_info import first_start, restart_count


def find_resume(resume: str, output_dir: str) -> str:
    """Resolve --resume: the path of the checkpoint, or '' to start from scratch.

    ``auto`` is the newest intact checkpoint in ``output_dir``. Processes that torchrun has
    restarted continue from what this run has saved, whatever the flag says. All ranks follow
    rank 0.

    Raises:
        UserError: if ``auto`` has no folder to look in.
    """
    auto, given = resume == 'auto', '' if resume == 'auto' else resume
    restarted = any(gather(restart_count()))
    if auto and not output_dir:
        raise UserError('--resume auto looks for checkpoints in --output_dir, which is empty')
    if not auto and not (restarted and output_dir):
        return given
    found = ''
    if is_main_process():
        # Without auto, only files that this run has written: others were there before it.
        found = newest_checkpoint(output_dir, 0 if auto else first_start(output_dir))
    found = gather(found)[0]
    if auto and not found:
        print(f'--resume auto: no checkpoint in {output_dir}, starting from scratch')
    return found or given


def newest_checkpoint(folder: str, since: float = 0) -> str:
    """Return the newest intact checkpoint-*.pth in ``folder``, or ''.

    Damaged files are skipped and reported. checkpoint-best.pth comes last: it has nothing that
    checkpoint-last.pth has not, except for the best of several probing heads.

    Args:
        since: ignore files that are older, in seconds since 1970.
    """
    paths = glob.glob(os.path.join(glob.escape(folder), 'checkpoint-*.pth'))
    ranked = [
        (not path.endswith('best.pth'), os.stat(path).st_mtime, path.endswith('last.pth'), path)
        for path in paths
    ]
    newest = [path for _, time, _, path in sorted(ranked, reverse=True) if time >= since]
    for path in newest:
        try:
            io.load(path)
            return path
        except UserError as e:
            print(f'Skipped: {e}', file=sys.stderr)
    return ''
