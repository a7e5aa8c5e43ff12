"""A stage runs once; half-written output is redone; another run's folder is never touched."""

import errno
import json
import os
import re
import resource
import signal
import socket
import time
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from instruct_trl.pipeline.stage import (
    FINISHED,
    LOCK,
    STARTED,
    disk_errors,
    fingerprint,
    fingerprints,
    locked,
    run_stage,
)
from instruct_trl.trainers.checkpoints import last_complete_checkpoint


def test_a_finished_stage_is_skipped_and_gives_its_summary_again(tmp_path, capsys):
    calls = []
    body = lambda checkpoint: calls.append(checkpoint) or {"score": 0.5}  # noqa: E731
    for _ in range(2):
        assert run_stage(tmp_path / "s", "SFT", {"lr": 1}, body) == {"score": 0.5}
    assert calls == [None]
    assert "finished earlier" in capsys.readouterr().out


def test_a_half_written_stage_is_redone_from_scratch(tmp_path):
    folder = tmp_path / "s"

    def dies(checkpoint):
        (folder / "half.bin").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, "SFT", {}, dies)
    run_stage(folder, "SFT", {}, lambda checkpoint: {})
    assert not (folder / "half.bin").exists()
    assert (folder / FINISHED).exists()


def test_a_half_written_stage_with_a_complete_checkpoint_is_resumed_there(tmp_path):
    folder, seen = tmp_path / "s", []

    def dies(checkpoint):
        for step in (2, 10):
            (folder / f"checkpoint-{step}").mkdir()
            (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        (folder / "checkpoint-12").mkdir()  # torn: its state, written last, is missing
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, "SFT", {}, dies)
    run_stage(folder, "SFT", {}, lambda checkpoint: seen.append(checkpoint) or {})
    assert seen == [str(folder / "checkpoint-10")]
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_another_runs_folder_is_refused_by_the_setting_that_differs(tmp_path):
    run_stage(tmp_path / "s", "SFT", {"learning_rate": 1e-5}, lambda _: {})
    with pytest.raises(ValueError, match="learning_rate: 1e-05 there, 0.1 now"):
        run_stage(tmp_path / "s", "SFT", {"learning_rate": 0.1}, lambda _: {})
    assert json.loads((tmp_path / "s" / FINISHED).read_text())["settings"] == {"learning_rate": 1e-5}


def test_a_stage_that_failed_before_it_wrote_anything_takes_other_settings(tmp_path):
    def mistyped(checkpoint):
        raise ValueError("no such labeler")

    with pytest.raises(ValueError, match="no such labeler"):
        run_stage(tmp_path / "s", "SFT", {"labeler": "typo"}, mistyped)
    assert list((tmp_path / "s").iterdir()) == []
    assert run_stage(tmp_path / "s", "SFT", {"labeler": "right"}, lambda _: {"steps": 1}) == {"steps": 1}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not made by this stage"):
        run_stage(tmp_path, "SFT", {}, lambda _: {})
    assert (tmp_path / "thesis.tex").exists()


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextmanager
def forked(function):
    """`function` in a child process, which is killed at the end of the block."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            function()
        os._exit(0)
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_for(path):
    for _ in range(400):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_a_second_run_in_a_folder_is_refused_by_pid_until_the_first_one_dies(tmp_path):
    folder = tmp_path / "s"

    def works(checkpoint):
        (folder / "weights.bin").write_text("of the first")
        time.sleep(60)

    with forked(lambda: run_stage(folder, "SFT", {}, works)) as pid:
        wait_for(folder / "weights.bin")
        with pytest.raises(ValueError, match=rf"pid {pid} on .* is working in .*s\. Nothing was touched"):
            run_stage(folder, "SFT", {}, lambda _: {})
        assert (folder / "weights.bin").read_text() == "of the first"
    assert (folder / LOCK).exists()  # the killed process left its file; the lock itself is gone
    assert run_stage(folder, "SFT", {}, lambda _: {"steps": 1}) == {"steps": 1}
    assert sorted(path.name for path in folder.iterdir()) == [FINISHED, STARTED]


def test_a_lock_left_behind_makes_no_folder_another_runs(tmp_path):
    (tmp_path / LOCK).write_text("{}")
    assert run_stage(tmp_path, "SFT", {}, lambda _: {}) == {}


def test_a_finished_stage_is_kept_while_another_process_holds_the_lock(tmp_path):
    run_stage(tmp_path, "SFT", {}, lambda _: {"steps": 1})
    with locked(tmp_path):
        assert run_stage(tmp_path, "SFT", {}, lambda _: {}) == {"steps": 1}


def one_of_two(rank, port, folders):
    """Process `rank` of two runs a stage in each folder, and writes beside it how that went."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    for folder in folders:
        try:
            said = str(run_stage(folder, "SFT", {}, lambda _: {"rank": rank}))
        except ValueError as error:
            said = str(error)
        folder.with_name(f"{folder.name}{rank}.txt").write_text(said)


def test_of_two_processes_the_main_one_locks_and_its_refusal_stops_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    held, fresh = tmp_path / "held", tmp_path / "fresh"
    first, second = (partial(one_of_two, rank, port, [held, fresh]) for rank in (0, 1))
    with locked(held), forked(first), forked(second):
        for rank in (0, 1):
            wait_for(tmp_path / f"fresh{rank}.txt")
    for rank in (0, 1):
        assert f"pid {os.getpid()} " in (tmp_path / f"held{rank}.txt").read_text()
        assert (tmp_path / f"fresh{rank}.txt").read_text() == str({"rank": rank})
    assert json.loads((fresh / FINISHED).read_text())["summary"] == {"rank": 0}


# -- what a stage was made from ----------------------------------------------------------------------------------------


def test_data_changed_after_the_stage_are_refused_and_a_copy_is_not(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"rank": 1}\n')
    settings = {"dataset_name": str(data)}
    run_stage(tmp_path / "s", "SFT", settings, lambda _: {"steps": 1})
    os.utime(data, (0, 0))  # the same content at another time
    assert run_stage(tmp_path / "s", "SFT", settings, lambda _: {}) == {"steps": 1}
    data.write_text('{"rank": 2}\n')  # as long as before
    os.utime(data, (0, 0))
    with pytest.raises(ValueError, match="made from other data: the files of dataset_name have changed since"):
        run_stage(tmp_path / "s", "SFT", settings, lambda _: {})
    data.unlink()
    assert run_stage(tmp_path / "s", "SFT", settings, lambda _: {}) == {"steps": 1}


def test_a_half_written_stage_is_not_resumed_on_other_data(tmp_path):
    data, folder = tmp_path / "d.csv", tmp_path / "s"
    data.write_text("a\n1\n")

    def dies(checkpoint):
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, "SFT", {"pretraining_dataset_name": str(data)}, dies)
    data.write_text("a\n2\n")
    with pytest.raises(ValueError, match="the files of pretraining_dataset_name have changed"):
        run_stage(folder, "SFT", {"pretraining_dataset_name": str(data)}, lambda _: {})


@pytest.mark.parametrize("record", ["finished", "started"])
def test_folders_of_older_versions_have_no_inputs_and_are_taken_up(tmp_path, record):
    (tmp_path / "d.jsonl").write_text("{}\n")
    settings, folder = {"dataset_name": str(tmp_path / "d.jsonl")}, tmp_path / "s"
    folder.mkdir()
    if record == "finished":
        (folder / FINISHED).write_text(json.dumps({"settings": settings, "summary": {"steps": 3}, "seconds": 1.0}))
    else:
        (folder / STARTED).write_text(json.dumps(settings))
    assert run_stage(folder, "SFT", settings, lambda _: {"steps": 3}) == {"steps": 3}


def test_what_belongs_to_an_input_and_what_lies_beside_it(tmp_path):
    model, out = tmp_path / "m", tmp_path / "m" / "out"
    (model / "checkpoint-1").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    settings = {"models": {"SFT": str(model)}, "prefixes": [f"base={tmp_path / 'p.txt'}"], "dataset_name": "org/name"}
    (tmp_path / "p.txt").write_text("examples")
    first = fingerprints(settings, out)
    assert sorted(first) == ["models SFT", "prefixes base"]
    for name in ("checkpoint-1/model.safetensors", "trainer_state.json", "README.md", "training_args.bin", FINISHED):
        (model / name).write_text("later")
    assert fingerprints(settings, out) == first
    (model / "model.safetensors").write_text("trained")
    changed = fingerprints(settings, out)
    assert changed["models SFT"] != first["models SFT"]
    assert changed["prefixes base"] == first["prefixes base"]


def test_a_folder_of_data_counts_by_its_data_files_without_what_stages_write_there(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "part").mkdir()
    for name in ("train.jsonl", "part/test.parquet"):
        (tmp_path / name).write_text("x")
    first = fingerprint(tmp_path, out)
    for folder, name in ((out, "new.jsonl"), (tmp_path / "sft", STARTED), (tmp_path / ".cache", "a.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    (tmp_path / "cache-0123.arrow").write_text("written by map")
    assert fingerprint(tmp_path, out) == first
    (tmp_path / "part" / "test.parquet").rename(tmp_path / "part" / "train.parquet")
    assert fingerprint(tmp_path, out) != first


def test_large_weights_are_read_in_samples_and_data_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("instruct_trl.pipeline.stage.SAMPLED", size := 2**23)
    for name in ("w.safetensors", "d.jsonl"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    before = {name: fingerprint(tmp_path / name, tmp_path / "out") for name in ("w.safetensors", "d.jsonl")}
    for name in before:
        with open(tmp_path / name, "r+b") as file:
            file.seek(100_000)  # the first sample ends at 65,536, the second begins at (2²³ − 2¹⁶)/64 = 130,048
            file.write(b"1")
    assert fingerprint(tmp_path / "w.safetensors", tmp_path) == before["w.safetensors"]
    assert fingerprint(tmp_path / "d.jsonl", tmp_path) != before["d.jsonl"]
    with open(tmp_path / "w.safetensors", "r+b") as file:
        file.seek(size - 1)
        file.write(b"1")
    assert fingerprint(tmp_path / "w.safetensors", tmp_path) != before["w.safetensors"]


# -- disks -------------------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size):
    """A limit on the size of files, which raises what a full disk raises, in whatever library writes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def by_safetensors(path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2000)}, path)


@pytest.mark.parametrize(
    "write",
    [by_safetensors, lambda path: torch.save(torch.zeros(2000), path), lambda path: path.write_text("x" * 8000)],
    ids=["safetensors", "torch", "python"],
)
def test_a_disk_that_takes_no_more_is_said_with_folder_and_remedy(tmp_path, write):
    def body(checkpoint):
        write(tmp_path / "s" / "file")
        return {}

    said = r"SFT: .*s could not be written: .*(limit|whole).*--output_dir"
    with pytest.raises(RuntimeError, match=said), files_up_to(4000):
        run_stage(tmp_path / "s", "SFT", {}, body)
    assert run_stage(tmp_path / "s", "SFT", {}, body) == {}


def test_a_full_disk_is_found_behind_the_error_that_it_led_to(tmp_path):
    def fails(checkpoint):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/data.arrow")
        except OSError as error:
            raise KeyError("in a library") from error

    with pytest.raises(RuntimeError, match=r"/cache/data\.arrow could not be written: the disk is full\. Make room \("):
        run_stage(tmp_path / "s", "SFT", {}, fails)


def test_a_users_own_errors_pass_as_they_are(tmp_path):
    def unreadable(checkpoint):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/of/others.jsonl")

    with pytest.raises(PermissionError, match="others"):
        run_stage(tmp_path / "s", "SFT", {}, unreadable)


@pytest.mark.parametrize("folder", ["file", "file/deep/er", "link"])
def test_an_output_folder_that_is_a_file_or_lies_in_one_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"cannot be made: .*(file is a file|link is a link to nothing)"):
        run_stage(tmp_path / folder, "SFT", {}, lambda _: {})


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_no_record_or_refusal_of_a_stage_holds_a_token(tmp_path):
    folder = tmp_path / "s"

    def dies(checkpoint):
        (folder / "half.bin").touch()
        raise KeyboardInterrupt

    settings = {"model_init_kwargs": {"token": "hf_SECRETa", "dtype": "bfloat16"}, "dataset_name": "http://me:pw1@h/d"}
    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, "SFT", settings, dies)
    written = (folder / STARTED).read_text()
    run_stage(folder, "SFT", settings, lambda _: {})
    with pytest.raises(ValueError, match="'dtype': 'bfloat16'") as refusal:
        run_stage(folder, "SFT", {"model_init_kwargs": {"token": "hf_SECRETb"}}, lambda _: {})
    written += (folder / FINISHED).read_text() + str(refusal.value)
    assert "SECRET" not in written
    assert "pw1" not in written


def test_an_error_that_quotes_another_is_not_of_the_disk(tmp_path):
    """A labeler's file that cannot be read, a server's quota: the output folder has no part in it."""
    for text in ("it raised PermissionError: [Errno 13] Permission denied: 'x'", "HTTP 429: Quota exceeded for metric"):
        with pytest.raises(ValueError, match=re.escape(text)), disk_errors(tmp_path, "SFT"):
            raise ValueError(text)
    with pytest.raises(RuntimeError, match="writing is not permitted"), disk_errors(tmp_path, "SFT"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "model"))
