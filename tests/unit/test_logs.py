"""Meters, log lines and the progress bar."""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest
import torch

from util.logs import MetricLogger, SmoothedValue


def test_smoothed_value():
    meter = SmoothedValue(window_size=3)
    for x in (1.0, 2.0, 9.0, 4.0):
        meter.update(x)
    figures = (meter.median, meter.avg, meter.global_avg, meter.max, meter.value)
    assert figures == (4.0, 5.0, 4.0, 9.0, 4.0)


def test_metric_logger():
    logger = MetricLogger()
    logger.update(loss=torch.tensor(2.0), lr=0.1, absent=None)
    assert logger.loss.value == 2.0 and 'lr: 0.1000' in str(logger) and 'absent' not in str(logger)
    with pytest.raises(AttributeError, match='absent'):
        _ = logger.absent


def test_log_lines(capsys):
    logger = MetricLogger()
    due = []
    for _ in logger.log_every(range(7), 3, 'Epoch [0]', items_per_step=4):
        due.append(logger.due)
        logger.update(loss=1.0)
    assert due == [False, False, True, False, False, True, True]
    lines = capsys.readouterr().out.splitlines()
    starts = ['Epoch [0] [3/7]', 'Epoch [0] [6/7]', 'Epoch [0] [7/7]']
    assert [line.split('  ')[0] for line in lines] == starts
    assert all('images/s' in line and 'eta' in line for line in lines)


@pytest.mark.parametrize('columns', [140, 80, 0])
def test_progress_bar_on_a_wide_terminal(columns, monkeypatch):
    """One bar that is redrawn, instead of lines; lines on a terminal that would cut it off."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    with os.fdopen(slave, 'w') as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', terminal)
        logger = MetricLogger()
        for i in logger.log_every(range(9), 3, 'Epoch [0]'):
            logger.update(loss=i)
        terminal.flush()
        text = ''
        while '9/9' not in text:  # a read may return a part
            text += os.read(master, 65536).decode()
    os.close(master)
    assert '9/9' in text and 'loss: 4.0000 (4.0000)' in text
    assert ('Epoch [0] [' in text) == (columns < 140)
