"""glibc's memory: kept by a run on a CPU, given back by what it forks. Other C libraries are left as they are."""

import ctypes
import sys


def _glibc():
    library = ctypes.CDLL(None) if sys.platform == 'linux' else None
    return library if hasattr(library, 'mallopt') and hasattr(library, 'malloc_trim') else None


def keep_freed_memory():
    """Keep what tensors free, in place of handing it back and getting it anew, page by page, in each step.

    For runs on a CPU, where it buys the time in which the system fills those pages with zeros.
    """
    if glibc := _glibc():
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # of malloc.h
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, 2**31 - 1)
        glibc.mallopt(m_arena_max, 1)


def give_back_freed_memory():
    """For a process that was forked: what its parent keeps would be copied for it as soon as the parent writes there."""
    if glibc := _glibc():
        glibc.malloc_trim(0)
