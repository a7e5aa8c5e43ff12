"""Programs that tests start: what one said on its way to an error is in the failure, not lost."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = str(Path(__file__).parent)


def with_helpers(environment):
    """The environment of a program that imports this folder's helpers, as a test does."""
    paths = [TESTS, environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_program(command, timeout=1200, **kwargs):
    """Run `command` to its end, at most `timeout` seconds; returns what it wrote to stdout.

    Other keywords are those of `subprocess.Popen`. Where the program fails, so does the test, with what it said.
    """
    command = [str(part) for part in command]
    kwargs["env"] = with_helpers(kwargs.get("env", os.environ))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        stdout, stderr = process.communicate()
    if process.returncode != 0:
        raise AssertionError(
            f"exit {process.returncode} of {' '.join(command)}\n--- stdout, its end\n{stdout[-4000:]}\n"
            f"--- stderr, its end\n{stderr[-12000:]}"
        )
    return stdout


def python(*arguments, **kwargs):
    """Run this Python with `arguments`."""
    return run_program([sys.executable, *arguments], **kwargs)


def processes(count, *script, **kwargs):
    """Run a script and its arguments on `count` processes of this machine, as torchrun does, on a free port."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count, *script, **kwargs)


def leave_process_group():
    """End a launched script whose work is done, without Python's own end.

    gloo's threads outlive `destroy_process_group`. If one lets go of a tensor while the interpreter ends, the process
    aborts (SIGABRT) after all work is done; pytorch issue 190489 is about it. A failed script never comes here.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
