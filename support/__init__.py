"""The workshop: what any program needs, so that the files above hold nothing but the paper.
Each file says in its first line what it holds.
"""
import sys


def without_trace(kind, error, trace):
    """What Python does with an error that nobody catches, but for Ctrl-C not a word."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = without_trace
