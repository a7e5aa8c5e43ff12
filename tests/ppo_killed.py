"""A tiny PPO-ptx run to be killed: a server that has torch and TRL loaded forks it again and again, a second each.

Started as a script it writes `ready`, then answers each line of its stdin, a JSON object with the arguments of `run`,
with a line of JSON: what `run` returns. It ends with its stdin.
"""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback

import conftest
import torch
from ppo_helpers import PROMPTS, make
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from instruct_trl import RewardScorer

STEPS = 6  # 3 iterations of 2
HANGS = 300  # seconds after which a run, which takes two, is ended with its stack in its log
TIMES = {"step_time", "episodes_per_second"}  # and time/...: what differs between two equal runs


def fresh(fixture, *args):
    """What a fixture of conftest.py gives, outside of a test."""
    function = getattr(fixture, "__wrapped__", None) or fixture._get_wrapped_function()
    return function(*args)


def build(folder, prompts=8, **kwargs):
    """A run of 6 steps, 24 episodes, on `prompts` prompts: 8 of them are an epoch of 2 steps."""
    tokenizer = fresh(conftest.tokenizer)
    settings = {
        "generation_batch_size": 8,
        "total_episodes": 24,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "ptx_ratio": 1,
        "use_cpu": True,
        "bf16": False,
        "prompts": PROMPTS.select(range(prompts)),
    }
    scorer = RewardScorer(fresh(conftest.reward_model), tokenizer)
    return make(folder, fresh(conftest.policy), scorer, tokenizer, **{**settings, **kwargs})


def step_metrics(log_history):
    """The logged steps without what measures time."""
    return [
        {name: value for name, value in row.items() if name not in TIMES and not name.startswith("time/")}
        for row in log_history
        if "loss" in row
    ]


def run(folder, resume=None, prompts=8, after=None, appears=None, changes=None):
    """Fork a run and wait for its end, or kill it.

    Args:
        folder: the run's output folder; what it prints goes to `<folder>.log`.
        resume: `resume_from_checkpoint`.
        prompts: rows of the training set.
        after: seconds after which it is killed.
        appears: a path that makes it be killed once it exists.
        changes: a file that makes it be killed once it is written anew.

    Returns:
        `exit`: 0, or minus the signal; `seconds`: how long it lived.
    """
    written = None if changes is None else os.stat(changes).st_mtime_ns
    pid = os.fork()
    if pid == 0:
        _be_the_run(folder, resume, prompts)
    begin = time.perf_counter()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.perf_counter() - begin
        if ended:
            return {"exit": os.waitstatus_to_exitcode(status), "seconds": seconds}
        late = after is not None and seconds > after
        if late or (appears and os.path.exists(appears)) or (changes and os.stat(changes).st_mtime_ns != written):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _be_the_run(folder, resume, prompts):
    """Train, save, and leave without any of the server's clean-up."""
    code = 1
    try:
        log = os.open(f"{folder}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        trainer = build(folder, prompts)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def share_no_lock():
    """tqdm's lock lies in memory that all forks share: a run killed while it held it would stop all later ones."""
    TqdmDefaultWriteLock.mp_lock = None
    tqdm.monitor_interval = 0  # no thread that could hold the other lock when a run is forked


def serve():
    """Load what a run loads lazily, by training once, then answer requests."""
    torch.set_num_threads(1)  # before any run: no pool of threads that a fork would lose
    share_no_lock()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the warm-up prints is no answer
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(folder, total_episodes=8)
        trainer.train()
        trainer.save_model()
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers)


if __name__ == "__main__":
    serve()
