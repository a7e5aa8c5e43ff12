"""Files for people: blind, shuffled, never overwritten; what comes back is read, or refused cell by cell."""

import csv
import hashlib
import io
import json
import re

import pytest

from instruct_trl.judges import (
    Answer,
    PeopleJudge,
    WaitingForPeople,
    compare_models,
    find_questions,
    rate_models,
)

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
    assert (result.invalid, result.win.n, result.win.mean) == (1, 11, 1.0)


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


IDS = [PeopleJudge("unused")._key(Answer(f"prompt {i}", "x")) for i in range(300)]


def test_ids_are_words_that_no_spreadsheet_knows():
    """Letters alone: no number (582394e15, 0012), no formula, no date (3-4, MAR1), neither TRUE nor FALSE."""
    assert len(set(IDS)) == len(IDS)
    assert all(re.fullmatch("[g-z]{16}", key) and not set(key) & set("aeiou") for key in IDS)


def test_a_sheet_with_the_ids_of_older_versions_is_read(blank, tmp_path):
    rows = prefer(read(blank), "bright")
    for row in rows:
        texts = sorted([row["answer_a"], row["answer_b"]])
        row["id"] = hashlib.sha256("\x00".join(["0", row["prompt"], *texts]).encode()).hexdigest()[:16]
    assert all(re.fullmatch("[0-9a-f]{16}", row["id"]) for row in rows)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)  # the order has not changed either
    write(blank, rows)
    assert compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")["PPO"].outcomes == [1.0] * 12


@pytest.mark.parametrize("broken", ["5.82394E+15", "5,82394E+15", "12", ""])
def test_an_id_that_a_spreadsheet_changed_is_named_with_its_row(blank, tmp_path, broken):
    rows = prefer(read(blank), "bright")
    lost, rows[5]["id"] = rows[5]["id"], broken
    write(blank, rows, delimiter=";")
    with pytest.raises(ValueError, match=f"such as id '{lost}'") as error:
        compare_models(PeopleJudge(tmp_path), PROMPTS, GOOD, "SFT")
    assert f"row 7, column 'id': {broken!r} is none of this evaluation's" in str(error.value)
    assert ("made a number of the id" in str(error.value)) == bool(broken)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("first", ["", "sep=;"])
def test_what_european_spreadsheets_save_is_read(tmp_path, encoding, end, first):
    judge, questions = PeopleJudge(tmp_path), find_questions(["likert"])
    with pytest.raises(WaitingForPeople):
        rate_models(judge, ["p", "q"], {"SFT": ["x; y\nz", "=1+1"]}, questions)
    rows = read(tmp_path / "rate.csv")
    for row, quality in zip(rows, ("5,0", "2.00"), strict=True):
        row["quality"] = quality
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=";", lineterminator=end)
    writer.writerow([f" {name}" for name in rows[0]])
    writer.writerows([*row.values()] for row in rows)
    writer.writerow([""] * len(rows[0]))  # a blank row at the end
    (tmp_path / "rate.csv").write_bytes(((first + end if first else "") + text.getvalue()).encode(encoding))
    (quality,) = rate_models(judge, ["p", "q"], {"SFT": ["x; y\nz", "=1+1"]}, questions)
    assert (quality.mean, quality.n) == (3.5, 2)


def test_a_cell_of_any_length_comes_back_and_one_that_was_cut_is_named(tmp_path):
    answers = {"SFT": ["dull", "short"], "PPO": ["bright " * 30_000, "\U0001f600" * 20_000]}
    judge = PeopleJudge(tmp_path)
    with pytest.raises(WaitingForPeople, match="2 texts have more than the 32,767 characters"):
        compare_models(judge, ["p", "q"], answers, "SFT")
    path, limit = tmp_path / "compare.csv", csv.field_size_limit(300_000)
    rows = [row | {"better": "a" if len(row["answer_a"]) > 9 else "b"} for row in read(path)]
    csv.field_size_limit(limit)
    write(path, rows)
    assert compare_models(judge, ["p", "q"], answers, "SFT")["PPO"].outcomes == [1.0, 1.0]
    assert csv.field_size_limit() == limit
    for number, row in enumerate(rows):
        column = f"answer_{row['better']}"
        kept = 32_767 // 2 if row["prompt"] == "q" else 32_767  # a spreadsheet counts an emoji twice
        write(path, [other | ({column: other[column][:kept]} if other is row else {}) for other in rows])
        with pytest.raises(
            ValueError, match=f"row {number + 2}, column '{column}': a spreadsheet cut the text"
        ) as error:
            compare_models(judge, ["p", "q"], answers, "SFT")
        assert f" {kept:,}, so that" in str(error.value)


def test_a_text_without_utf_8_is_written(tmp_path):
    for file_type in ("csv", "jsonl"):
        with pytest.raises(WaitingForPeople):
            compare_models(PeopleJudge(tmp_path, file_type=file_type), ["\ud800"], {"SFT": ["x"], "PPO": ["y"]}, "SFT")


def test_a_line_that_is_no_object_and_a_workbook_are_named(tmp_path):
    judge = PeopleJudge(tmp_path, file_type="jsonl")
    (tmp_path / "compare.xlsx").write_bytes(b"PK")
    with pytest.raises(WaitingForPeople, match="'compare.xlsx' is not read: save it as a .jsonl file"):
        compare_models(judge, PROMPTS, GOOD, "SFT")
    with (tmp_path / "compare.jsonl").open("a") as file:
        file.write("[1]\n")
    with pytest.raises(ValueError, match=r"line 13: '\[1\]' is not a JSON object"):
        compare_models(judge, PROMPTS, GOOD, "SFT")


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
