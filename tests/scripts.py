"""Run a script of the toolkit inside the test's own process: the same code and exit code without seconds of imports."""

import contextlib
import importlib
import io
import signal
import sys

from common import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_script(name: str, *flags, expect: int = 0) -> str:
    """What ``python NAME.py FLAGS`` prints (stdout and stderr); asserts its exit code and that no traceback reached the user."""
    output = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    arguments, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            cli.run(importlib.import_module(name).main)
    except SystemExit as exit:
        code = exit.code
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == expect, f"exit code {code}:\n{output.getvalue()}"
    return output.getvalue()
