"""Files for people: blind, shuffled, never overwritten; what comes back is read, or refused cell by cell."""

import csv
import json

import pytest

from instruct_trl.evaluation.judges import PeopleJudge, WaitingForPeople, compare_models, find_questions, rate_models

PROMPTS = [f"prompt {i}" for i in range(12)]
GOOD = {"SFT": [f"dull {i}" for i in range(12)], "PPO": [f"bright, {i}\nsecond line" for i in range(12)]}


def read(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def prefer(rows, word):
    """Fill in whichever column holds an answer with `word` in it."""
    for row in rows:
        row["better"] = "a" if word in row["answer_a"] else "b"
    return rows


@pytest.fixture
def blank(tmp_path):
    with pytest.raises(WaitingForPeople, match="12 rows wait to be filled in"):
        compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")
    return tmp_path / "compare.csv"


def test_the_file_is_blind_and_shuffled(blank):
    rows = read(blank)
    assert list(rows[0]) == ["id", "prompt", "answer_a", "answer_b", "better"]
    text = blank.read_text(encoding="utf-8-sig")
    assert "PPO" not in text
    assert "SFT" not in text
    first = ["bright" in row["answer_a"] for row in rows]
    assert 0 < sum(first) < 12  # either model comes first
    assert [row["prompt"] for row in rows] != PROMPTS
    assert "`tie` if neither" in blank.with_suffix(".md").read_text()


def test_what_was_filled_in_is_counted_for_the_right_model(blank, tmp_path):
    write(blank, prefer(read(blank), "bright"))
    result = compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")["PPO"]
    assert result.outcomes == [1.0] * 12
    assert result.judge == "a person"
    # The same file, asked with the models exchanged.
    swapped = compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "PPO")["SFT"]
    assert swapped.outcomes == [0.0] * 12


def test_a_spreadsheets_habits_are_read(blank, tmp_path):
    rows = prefer(read(blank), "bright")
    for row in rows:
        row["better"] = f" {row['better'].upper()} "
    rows[3]["better"] = "Tie"
    write(blank, list(reversed(rows)), delimiter=";")
    outcomes = compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")["PPO"].outcomes
    assert sorted(outcomes) == [0.5] + [1.0] * 11
    assert outcomes[PROMPTS.index(rows[3]["prompt"])] == 0.5


def test_bad_cells_are_all_named_with_row_column_value_and_remedy(blank, tmp_path):
    rows = prefer(read(blank), "bright")
    rows[0]["better"], rows[4]["better"], rows[7]["id"], rows[9]["id"] = "", "both", "0000", rows[8]["id"]
    write(blank, rows)
    with pytest.raises(ValueError) as error:
        compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")
    text = str(error.value)
    assert "row 2, column 'better': not filled in. Write a, b or tie." in text
    assert "row 6, column 'better': 'both' is unknown. Write a, b or tie." in text
    assert "row 9, column 'id': '0000' is none of this evaluation's" in text
    assert f"row 11, column 'id': '{rows[8]['id']}' is there twice" in text
    assert "2 of 12 rows are missing" in text


def test_unfilled_rows_may_be_allowed_and_count_as_invalid(blank, tmp_path):
    rows = prefer(read(blank), "bright")
    rows[0]["better"] = ""
    write(blank, rows)
    result = compare_models(PeopleJudge(tmp_path, allow_unfilled=True), PROMPTS, GOOD, "SFT")["PPO"]
    assert (result.invalid, result.win.n, result.win.rate) == (1, 11, 1.0)


def test_a_file_is_never_overwritten_and_a_lost_column_is_named(blank, tmp_path):
    before = blank.read_bytes()
    with pytest.raises(WaitingForPeople):
        compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")
    assert blank.read_bytes() == before
    other = {**GOOD, "PPO": [f"other {i}" for i in range(12)]}
    with pytest.raises(ValueError, match="12 of 12 rows are missing"):
        compare_models(PeopleJudge(tmp_path), PROMPTS, other, "SFT")
    write(blank, [{k: v for k, v in row.items() if k != "better"} for row in read(blank)])
    with pytest.raises(ValueError, match="there is no column 'better'"):
        compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(tmp_path):
    result = compare_models(PeopleJudge(tmp_path), PROMPTS, {"SFT": GOOD["SFT"], "PPO": GOOD["SFT"]}, "SFT")["PPO"]
    assert result.outcomes == [0.5] * 12
    assert list(tmp_path.iterdir()) == []


def test_several_people_their_majority_and_their_agreement(blank, tmp_path):
    rows = read(blank)
    write(tmp_path / "compare_ann.csv", prefer(rows, "bright"))
    write(tmp_path / "compare_bob.csv", prefer(rows, "bright"))
    rows = prefer(rows, "bright")
    for row in rows[:3]:
        row["better"] = "b" if row["better"] == "a" else "a"
    write(tmp_path / "compare_cem.csv", rows)
    judge = PeopleJudge(tmp_path)
    result = compare_models(judge, PROMPTS, GOOD, "SFT")["PPO"]
    assert result.outcomes == [1.0] * 12  # two of three
    # Three pairs of people on each of 12 rows; on 3 rows only one of the three pairs agrees.
    assert judge.agreement == (pytest.approx((9 * 3 + 3 * 1) / 36), 36)
    assert judge.name == "3 people"


def test_whoever_filled_in_the_blank_counts_beside_the_copies_and_once(blank, tmp_path):
    rows = read(blank)
    write(blank, prefer(rows, "bright"))
    write(tmp_path / "compare_bob.csv", prefer(rows, "dull"))
    judge = PeopleJudge(tmp_path)
    outcomes = compare_models(judge, PROMPTS, GOOD, "SFT")["PPO"].outcomes
    assert outcomes == [0.5] * 12  # one for, one against
    assert judge.agreement == (0.0, 12)
    write(tmp_path / "compare_ann.csv", prefer(rows, "bright"))  # the blank again, under a name
    outcomes = compare_models(judge, PROMPTS, GOOD, "SFT")["PPO"].outcomes
    assert outcomes == [0.5] * 12
    assert judge.name == "2 people"


def test_the_commonest_verdict_counts_not_the_mean(blank, tmp_path):
    rows = read(blank)
    for name, word in (("ann", "tie"), ("bob", "tie"), ("cat", None)):
        filled = prefer(rows, "bright") if word is None else [row | {"better": word} for row in rows]
        write(tmp_path / f"compare_{name}.csv", filled)
    assert compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")["PPO"].outcomes == [0.5] * 12


def test_a_file_in_the_spreadsheets_own_encoding_is_read(tmp_path):
    prompts, answers = ["café?"], {"SFT": ["naïve"], "PPO": ["bright"]}
    with pytest.raises(WaitingForPeople):
        compare_models(PeopleJudge(tmp_path), prompts, answers, "SFT")
    write(tmp_path / "compare.csv", prefer(read(tmp_path / "compare.csv"), "bright"))
    text = (tmp_path / "compare.csv").read_text(encoding="utf-8")
    (tmp_path / "compare.csv").write_bytes(text.encode("cp1252"))
    assert compare_models(PeopleJudge(tmp_path), prompts, answers, "SFT")["PPO"].outcomes == [1.0]


def test_line_separators_inside_an_answer_break_no_line(tmp_path):
    prompts, answers = ["p"], {"SFT": ["dull\u2028one"], "PPO": ["bright\x85two"]}
    judge = PeopleJudge(tmp_path, file_type="jsonl")
    with pytest.raises(WaitingForPeople):
        compare_models(judge, prompts, answers, "SFT")
    row = json.loads((tmp_path / "compare.jsonl").read_text(encoding="utf-8"))
    assert "bright\x85two" in row.values()
    row["better"] = "a" if "bright" in row["answer_a"] else "b"
    (tmp_path / "compare.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert compare_models(judge, prompts, answers, "SFT")["PPO"].outcomes == [1.0]


def test_ratings_by_people(tmp_path):
    questions = find_questions(["likert", "hallucination"])
    answers = {"SFT": ["x", "y"]}
    judge = PeopleJudge(tmp_path, file_type="jsonl")
    with pytest.raises(WaitingForPeople, match="rate.jsonl"):
        rate_models(judge, ["p", "q"], answers, questions)
    path = tmp_path / "rate.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(rows[0]) == {"id", "prompt", "answer", "quality", "hallucination"}
    rows[0] |= {"quality": 5, "hallucination": "yes"}
    rows[1] |= {"quality": "2.0", "hallucination": "n/a"}
    path.write_text("\n".join(json.dumps(row) for row in rows))
    quality, hallucination = rate_models(judge, ["p", "q"], answers, questions)
    assert (quality.mean, quality.n) == (3.5, 2)
    assert (hallucination.mean, hallucination.n, hallucination.not_applicable) == (1.0, 1, 1)
    rows[0]["quality"] = 9
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match="row 1, column 'quality': 9 is unknown. Write 1, 2, 3, 4, 5, 6 or 7."):
        rate_models(judge, ["p", "q"], answers, questions)


def test_an_answer_that_looks_like_a_formula_is_written_as_text(tmp_path):
    with pytest.raises(WaitingForPeople):
        compare_models(PeopleJudge(tmp_path), ["p"], {"SFT": ["=HYPERLINK(1)"], "PPO": ["+1"]}, "SFT")
    (row,) = read(tmp_path / "compare.csv")
    assert {row["answer_a"], row["answer_b"]} == {"'=HYPERLINK(1)", "'+1"}
    write(tmp_path / "compare.csv", prefer([row], "HYPER"))
    assert compare_models(PeopleJudge(tmp_path), ["p"], {"SFT": ["=HYPERLINK(1)"], "PPO": ["+1"]}, "SFT")[
        "PPO"
    ].outcomes == [0.0]
