"""What a user sees: progress in one line, errors in one line."""
import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta

SIGPIPE = 13                                # Python on Windows has no name for it


def on_stop(handle: Callable):
    """handle(number) for Ctrl-C, a request to end, and the loss of the terminal; a second one ends
    the process at once.
    """
    def first(number, frame):
        on_stop(lambda number: os._exit(128 + number))
        handle(number)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)                        # Windows has no SIGHUP,
        if number and signal.getsignal(number) != signal.SIG_IGN:   # and nohup wants it ignored
            signal.signal(number, first)


def one_line(text: object, most: int = 400) -> str:
    """A text that may be a stranger's, as it can be shown: one line, printable, not too long."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:most]


def quoted(path: object) -> str:
    """The path as an argument of a command, for any shell."""
    return f'"{path}"' if " " in str(path) else str(path)


def refuse(message: object):
    """One line on stderr, and the end with status 2."""
    print(f"{os.path.basename(sys.argv[0])}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(2)


def one_voice(main: Callable):
    """main(); of several processes the first one speaks for all.  If another ends by an error, it
    waits for the launcher to end it, and speaks only if it is still there.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        with (open(os.devnull, "w", encoding="utf-8") as quiet,
              redirect_stdout(quiet if rank else sys.stdout),
              redirect_stderr(quiet if rank else sys.stderr)):
            main()
    except BaseException:
        if rank:
            on_stop(lambda number: os._exit(128 + number))
            time.sleep(5)
        raise


def run_script(main: Callable, description: str | None = None):
    """main(): what the user can mend ends it with one line, and a bug keeps its trace.

    description: the text of --help, for a script that has no options.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")   # closed, as by >&-
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")               # for terminals that have no ε
        setattr(sys, name, stream)
    on_stop(lambda number: sys.exit(128 + number))
    try:
        if description:
            argparse.ArgumentParser(description=description, formatter_class=argparse.
                                    RawDescriptionHelpFormatter).parse_args()
        one_voice(main)
    except BrokenPipeError:                                    # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + SIGPIPE) from None
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None)
        refuse(f"{name}: {error.strerror}" if name else error)
    except (MemoryError, RuntimeError) as error:               # torch has a RuntimeError for it
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            refuse(f"--compile does not work here: {str(error).splitlines()[0]}")
        if re.search("gloo|NCCL", str(error)):
            refuse(f"another of the processes has ended: {error}")
        if isinstance(error, RuntimeError) and not re.search("alloc|of memory", str(error)):
            raise
        refuse("not enough memory: a smaller --batch or network or larger --patch-size needs less")


class Progress:
    """One line about work in progress: refreshed in a terminal, elsewhere printed now and then."""

    def __init__(self, total: int, first: int = 0, images: int = 1):
        """total: steps in all; first: those done before; images: how many a step works on."""
        self.total, self.first, self.images = total, first, images
        self.terminal, self.start, self.due = sys.stdout.isatty(), time.monotonic(), 0.0

    def __call__(self, done: float, text: str):
        now = time.monotonic()
        if done < self.total and now < self.due:
            return
        self.due = now + (0.1 if self.terminal else 15)
        if done > self.first:
            rate = (done - self.first) / max(now - self.start, 1e-9)
            left = timedelta(seconds=round(min((self.total - done) / rate, 1e9)))
            text += f" · {rate * self.images:.4g} images/s · {left} left"
        end = "\n" if done >= self.total or not self.terminal else ""
        width = shutil.get_terminal_size().columns - 1                  # a longer one would wrap
        print(f"\r{text[:width]:<{width}}" if self.terminal else text, end=end, flush=True)
