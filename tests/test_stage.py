"""A stage runs once; half-written output is redone; another run's folder is never touched."""

import json

import pytest

from instruct_trl.pipeline.stage import FINISHED, last_complete_checkpoint, run_stage


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
