"""SIGTERM and SIGUSR1, with which a cluster asks a run to end."""

import signal
import threading

SIGNALS = signal.SIGTERM, signal.SIGUSR1


def ignore_signals() -> None:
    """Ignore the signals in a data-loader worker: clusters send them to all processes of a job."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restore_signals() -> None:
    """Restore the default handlers. Does nothing outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
