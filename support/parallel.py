"""`pytest` on all processors: forked processes take the tests in turn, and one tells of all."""
import json
import os
import sys
import tempfile

import pytest

DONE = 77              # the exit status of a forked process; a test that exits would not choose it


class Recorder:
    """Writes down what a forked process finds, in the place of showing it."""

    def __init__(self, config, file):
        self.config, self.file = config, file
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(self)

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()


def workers(session) -> int:
    """As many as processors, if there are tests enough; one where a device or a user is shared."""
    option, torch = session.config.option, sys.modules.get("torch")
    alone = (sys.platform != "linux" or torch and torch.accelerator.is_available()
             or option.collectonly or option.usepdb or option.capture == "no"
             or getattr(option, "mine", None))
    return 1 if alone else min(len(os.sched_getaffinity(0)), len(session.items) // 50)


def run_from(queue: int, session):
    """Run the tests whose numbers come out of the queue, two bytes each, until it is empty."""
    def take():
        number = os.read(queue, 2)
        return session.items[int.from_bytes(number, "big")] if number else None
    item = take()
    while item:
        following = take()                          # pytest keeps what both need
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail or session.shouldstop:        # -x: nothing is left for the others
            return os.read(queue, 1 << 16)
        item = following


def forked(queue: int, session):
    """A process that takes tests from the queue too: its number, and the file it writes them to."""
    file = tempfile.TemporaryFile("w+", encoding="utf-8")
    pid, status = os.fork(), 1
    if pid == 0:
        try:
            Recorder(session.config, file)
            run_from(queue, session)
            status = DONE
        finally:
            os._exit(status)
    return pid, file


def tell(pid: int, file, session):
    """Show what another process found, once it has ended."""
    status, hook = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), session.config.hook
    file.seek(0)
    for data in map(json.loads, file):
        hook.pytest_runtest_logreport(report=hook.pytest_report_from_serializable(
            config=session.config, data=data))
    if status != DONE:
        raise session.Interrupted("a process that ran a part of the tests died")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """The tests, by several processes; without them None, and pytest runs them as always."""
    world = workers(session)
    if world < 2 or session.testsfailed:
        return None
    queue, fill = os.pipe()
    os.write(fill, b"".join(i.to_bytes(2, "big") for i in range(len(session.items))))
    os.close(fill)
    others = [forked(queue, session) for _ in range(1, world)]
    try:
        run_from(queue, session)
    finally:
        os.read(queue, 1 << 16)                             # the same after an interrupt
    for pid, file in others:
        tell(pid, file, session)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    return True
