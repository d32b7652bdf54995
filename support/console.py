"""What a user sees: progress in one line, errors in one line, the loss as a chart."""
import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
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
            start, end = ("\r", "\n" if last else "") if self.terminal else ("", "\n")
            print(f"{start}{line:<78}" if self.terminal else line, end=end, flush=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h{minutes:02}m" if hours
            else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s")


def reporter(run) -> Callable:
    """report() tells in one line how a training run goes."""
    progress, first, start = Progress(), run.step, time.monotonic()
    steps, batch = run.config.steps, run.config.batch

    def report():
        rate = (run.step - first) / (time.monotonic() - start)
        progress(f"step {run.step} of {steps} · loss {run.log[-1][1]:.4f} · "
                 f"{rate * batch:.0f} images/s · {duration((steps - run.step) / rate)} left",
                 last=run.step == steps)
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
    low, high = y.min(), max(y.max(), y.min() + 1e-3)
    level = np.rint((y - low) / (high - low) * (height - 1))
    rows = ["".join("●" if at == row else " " for at in level) for row in reversed(range(height))]
    marks = 10 ** np.linspace(high, low, height)
    return "\n".join(f"{mark:8.4f} │{row}" for mark, row in zip(marks, rows)) + (
        f"\n    loss └{'─' * len(y)} step {log[-1][0]}")
