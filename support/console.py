"""What a user sees: progress in one line, errors in one line, the loss as a chart."""
import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np


class Output:
    """A stream that one can always write to: what its encoding lacks is replaced, and what nobody
    can take (the reader of a pipe has gone, the disk is full, the stream is closed) is lost.
    """

    def __init__(self, stream, errors: str):
        self.stream, self.errors = stream or open(os.devnull, "w"), errors

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str):
        encoding = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(encoding, self.errors).decode(encoding))
            self.stream.flush()
        except OSError:                  # what the stream still holds must go somewhere at the end
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())


def refuse(message: object, status: int = 2):
    """One line on stderr, and the end."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    raise SystemExit(status)


@contextlib.contextmanager
def one_line_errors():
    """A script's main: what the user can mend ends it with one line (a bug keeps its trace), and
    its output cannot end it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:       # a closed stdout or stderr: its
        pass                                                     # number must not go to a file
    os.close(number)
    with (contextlib.redirect_stdout(Output(sys.stdout, "replace")),
          contextlib.redirect_stderr(Output(sys.stderr, "backslashreplace"))):
        try:
            yield
        except (OSError, ValueError) as error:
            name = getattr(error, "filename", None)
            refuse(f"{name}: {error.strerror}" if name else error)
        except (MemoryError, RuntimeError) as error:           # torch has a RuntimeError for it
            if isinstance(error, RuntimeError) and not re.search("alloc|of memory", str(error)):
                raise
            size = re.search(r"allocate ([\d.]+ \w+)", str(error))
            refuse(f"not enough memory{f' for {size[1]} more' if size else ''}: a smaller --batch, "
                   "smaller images or a smaller network need less")
        except KeyboardInterrupt:
            refuse("stopped", status=130)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        refuse(f"{message} ({self.prog} --help lists the options)")


class Progress:
    """One line about work in progress: refreshed in a terminal, elsewhere it comes now and then."""

    def __init__(self, total: int, first: int = 0, images: int = 1):
        """total: steps in all; first: those done before; images: how many a step works on."""
        self.total, self.first, self.images = total, first, images
        self.terminal, self.start, self.due = sys.stdout.isatty(), time.monotonic(), 0.0

    def __call__(self, done: float, text: str):
        now = time.monotonic()
        if done < self.total and now < self.due:
            return
        self.due = now + (0.1 if self.terminal else 15)
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - done) / max(rate, 1e-12)
        left = timedelta(seconds=round(left)) if left < 1e9 else "?"
        speed = f" · {rate * self.images:.4g} images/s · {left} left" if done > self.first else ""
        line = text + speed
        end = "\n" if done >= self.total or not self.terminal else ""
        width = shutil.get_terminal_size().columns - 1                  # a longer one would wrap
        print(f"\r{line[:width]:<{width}}" if self.terminal else line, end=end, flush=True)


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
    parts = np.array_split([loss for _, loss, *_ in log], min(width, len(log)))
    y = np.log10([part.mean() for part in parts])
    marks = np.linspace(max(y.max(), y.min() + 1e-3), y.min(), height)
    row = np.abs(y - marks[:, None]).argmin(0)
    lines = [f"{10 ** mark:8.4f} │{''.join('●' if at == k else ' ' for at in row)}"
             for k, mark in enumerate(marks)]
    return "\n".join([*lines, f"    loss └{'─' * len(y)} step {log[-1][0]}"])
