"""What a user sees: progress in one line, errors in one line, the loss as a chart."""
import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np


def refuse(message: object, status: int = 2):
    """One line on stderr, and the end."""
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def one_line_errors():
    """What the user can mend (ValueError, OSError) as one line; a bug keeps its trace."""
    try:
        yield
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}" if error.filename else error)
    except ValueError as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("stopped", status=130)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        refuse(f"{message} ({self.prog} --help lists the options)")


class Progress:
    """One line about work in progress: refreshed in a terminal, elsewhere it comes now and then."""

    def __init__(self):
        self.terminal, self.due = sys.stdout.isatty(), 0.0

    def __call__(self, line: str, last: bool = False):
        if last or time.monotonic() >= self.due:
            self.due = time.monotonic() + (0.1 if self.terminal else 15)
            end = "\n" if last or not self.terminal else ""
            print(f"\r{line:<78}" if self.terminal else line, end=end, flush=True)


def reporter(run) -> Callable:
    """report() tells in one line how a training run goes."""
    progress, first, start, steps = Progress(), run.step, time.monotonic(), run.config.steps

    def report():
        rate = (run.step - first) / (time.monotonic() - start)
        left = timedelta(seconds=round((steps - run.step) / rate))
        progress(f"step {run.step} of {steps} · loss {run.log[-1][1]:.4f} · "
                 f"{rate * run.config.batch:.0f} images/s · {left} left", last=run.step == steps)
    return report if run.rank == 0 else lambda: None


def stop_signals() -> list[int]:
    """A list, empty until SIGINT or SIGTERM asks to stop; a second one ends the process at once."""
    asked = []

    def ask(number, frame):
        if asked:
            os._exit(128 + number)
        asked.append(number)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


def chart(log: list, width: int = 72, height: int = 8) -> str:
    """The loss along the run, in text; the scale is logarithmic."""
    parts = np.array_split([loss for _, loss in log], min(width, len(log)))
    y = np.log10([part.mean() for part in parts])
    marks = np.linspace(max(y.max(), y.min() + 1e-3), y.min(), height)
    row = np.abs(y - marks[:, None]).argmin(0)
    lines = [f"{10 ** mark:8.4f} │{''.join('●' if at == k else ' ' for at in row)}"
             for k, mark in enumerate(marks)]
    return "\n".join([*lines, f"    loss └{'─' * len(y)} step {log[-1][0]}"])
