"""Ties, comparison lists, weights and margins: from a raw row to the loss, against loops over the definition."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.nn import functional

from instruct_trl.data.ranking import parse_ranking, prepare_ranking_dataset
from instruct_trl.data.ranking_batch import RankingCollator
from instruct_trl.maths.rankings import kendall_tau, pair_counts, ranking_loss, ranking_metrics

THREE = {"prompt": "ab", "completions": ["cd", "e", "fgh"]}


def prepare(rows, tokenizer, **kwargs):
    return prepare_ranking_dataset(Dataset.from_list(rows), tokenizer, where="the train dataset", **kwargs)


def comparisons(row, use_margins):
    """(winner, loser, margin) of a raw row, straight from what the columns mean."""
    if "chosen" in row:
        return [(0, 1, row.get("margin", 0.0))]
    if "pairs" in row:
        return [(winner, loser, 0.0) for winner, loser in row["pairs"]]
    found, places = [], range(len(row["completions"]))
    for i in places:
        for j in places:
            if "ranks" in row and row["ranks"][i] < row["ranks"][j]:
                found.append((i, j, 0.0))
            if "scores" in row and row["scores"][i] > row["scores"][j]:
                found.append((i, j, row["scores"][i] - row["scores"][j] if use_margins else 0.0))
    return found


def loss_by_loop(rows, rewards, use_margins):
    """Σ w_b · mean over pairs of −log σ(r_w − r_l − m), over Σ w_b; prompts without a pair left out."""
    total, weights = 0.0, 0.0
    for row, own in zip(rows, rewards, strict=True):
        found = comparisons(row, use_margins)
        if found:
            terms = [-torch.log(1 / (1 + torch.exp(-(own[w] - own[lo] - margin)))) for w, lo, margin in found]
            total = total + row.get("weight", 1.0) * sum(terms) / len(terms)
            weights += row.get("weight", 1.0)
    return total / weights


def random_rows(form):
    draw = random.Random(3)
    rows = []
    for size in (4, 2, 3, 9):
        row = {"prompt": "p", "completions": [f"answer {i}" for i in range(size)]}
        if form.startswith("pairs"):
            two = [(i, j) for i in range(size) for j in range(i)]
            chosen = draw.sample(two, max(1, len(two) // 2))
            row["pairs"] = [list(pair if draw.random() < 0.5 else pair[::-1]) for pair in chosen]
        elif form.startswith("scores"):
            row["scores"] = [draw.choice([-1.5, 0.25, 2.0, 3.0]) for _ in range(size)]
        elif form.startswith("ranks"):
            row["ranks"] = [draw.randint(1, 3) for _ in range(size)]
        else:
            row = {"prompt": "p", "chosen": "a", "rejected": f"answer {size}", "margin": draw.uniform(-1, 2)}
        if form.endswith("weights"):
            row["weight"] = draw.choice([0.25, 1.0, 3.0])
        rows.append(row)
    if form.startswith("ranks"):
        rows[1]["ranks"] = [2, 2]  # a prompt without an untied pair
    if form.startswith("pairs"):
        rows[1]["pairs"] = []  # a prompt that nobody compared
        rows[2]["pairs"] = [[0, 1], [1, 2], [2, 0]]  # a cycle
    return rows


@pytest.mark.parametrize(
    "form", ["ranks", "ranks, weights", "scores", "scores, margins", "pairs", "pairs, weights", "chosen, weights"]
)
def test_loss_and_gradient_equal_a_loop_over_the_raw_rows(tokenizer, form):
    use_margins = form == "scores, margins"
    rows = random_rows(form)
    dataset, _ = prepare(rows, tokenizer, use_margins=use_margins)
    batch = RankingCollator(257)(list(dataset))
    assert ("margins" in batch) == (use_margins or form.startswith("chosen"))
    rewards = torch.randn(batch["mask"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = rewards.clone().requires_grad_(), rewards.clone().requires_grad_()
    loss = ranking_loss(ours, batch["pairs"], batch["weights"], batch.get("margins"))
    expected = loss_by_loop(rows, theirs, use_margins)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)  # margins travel as float32
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)


def test_two_completions_with_margin_equal_the_formula_of_trl(tokenizer):
    margins = [0.5, 0.0, 2.0]
    rows = [{"prompt": "p", "chosen": "good", "rejected": "bad", "margin": margin} for margin in margins]
    batch = RankingCollator(257)(list(prepare(rows, tokenizer)[0]))
    rewards = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    expected = -functional.logsigmoid(rewards[:, 0] - rewards[:, 1] - torch.tensor(margins)).mean()
    torch.testing.assert_close(ranking_loss(rewards, batch["pairs"], batch["weights"], batch["margins"]), expected)


def test_a_weight_of_two_equals_the_prompt_twice():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [-2.0, 1.0, 0.0]])
    pairs = torch.zeros(2, 3, 3, dtype=torch.bool)
    pairs[0, 0, 1] = pairs[1, 2, 0] = pairs[1, 0, 1] = True
    twice = ranking_loss(rewards[[0, 0, 1]], pairs[[0, 0, 1]])
    torch.testing.assert_close(ranking_loss(rewards, pairs, weights=torch.tensor([2.0, 1.0])), twice)


def test_the_weight_of_a_prompt_without_a_pair_changes_nothing():
    pairs = torch.zeros(2, 2, 2, dtype=torch.bool)
    pairs[0, 0, 1] = True
    loss = ranking_loss(torch.zeros(2, 2), pairs, weights=torch.tensor([0.1, 100.0]))
    assert loss.item() == pytest.approx(math.log(2))


def test_a_completion_in_no_pair_reaches_neither_loss_nor_gradient():
    rewards = torch.tensor([[1.0, float("nan"), 0.0]], requires_grad=True)
    pairs = torch.zeros(1, 3, 3, dtype=torch.bool)
    pairs[0, 0, 2] = True
    loss = ranking_loss(rewards, pairs, center_coefficient=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.5)
    assert rewards.grad[0, 1] == 0
    assert torch.isfinite(rewards.grad).all()


def test_a_cycle_cannot_be_satisfied_and_no_closure_is_taken(tokenizer):
    dataset, _ = prepare([{**THREE, "pairs": [[0, 1], [1, 2], [2, 0]]}], tokenizer)
    pairs = RankingCollator(257)(list(dataset))["pairs"]
    assert pairs.sum() == 3
    assert ranking_loss(torch.zeros(1, 3), pairs).item() == pytest.approx(math.log(2))  # the least that it can be
    correct, total = pair_counts(torch.tensor([[3.0, 2.0, 1.0]]), pairs)
    assert (correct.item(), total.item()) == (2, 3)
    chain, _ = prepare([{**THREE, "pairs": [[0, 1], [1, 2]]}], tokenizer)
    assert chain[0]["pairs"] == [[0, 1], [1, 2]]
    assert chain[0]["ranks"] == []


def test_kendall_tau_of_partial_comparisons_is_over_what_was_compared():
    rewards = torch.tensor([[3.0, 1.0, 1.0, 5.0]])
    pairs = torch.zeros(1, 4, 4, dtype=torch.bool)
    for winner, loser in [(0, 1), (1, 2), (0, 3)]:  # concordant, tied in rewards, discordant
        pairs[0, winner, loser] = True
    assert kendall_tau(rewards, pairs).item() == 0
    pairs[0, 3, 2] = True  # concordant: 2 − 1, over sqrt(4 pairs · 3 of them untied in rewards)
    assert kendall_tau(rewards, pairs).item() == pytest.approx(1 / math.sqrt(12))


def test_metrics_over_rankings_and_comparison_lists():
    rewards = torch.tensor([[2.0, 1.0, 0.0], [1.0, 5.0, 7.0]])
    ranks = torch.tensor([[1, 2, 2], [0, 0, 0]])  # the second has only pairs
    pairs = torch.zeros(2, 3, 3, dtype=torch.bool)
    pairs[0, 0, 1] = pairs[0, 0, 2] = pairs[1, 0, 1] = True
    margins = torch.where(pairs, 0.5, 0.0)
    weights = torch.tensor([3.0, 1.0])
    metrics = ranking_metrics(rewards, pairs, ranks, torch.ones(2, 3), weights, margins)

    def term(x):
        return math.log(1 + math.exp(-(x - 0.5)))

    assert metrics["loss"] == pytest.approx((3 * (term(1.0) + term(2.0)) / 2 + term(-4.0)) / 4, rel=1e-6)
    assert metrics["pair_accuracy"] == pytest.approx(2 / 3)
    assert metrics["kendall_tau"] == pytest.approx((2 / math.sqrt(2 * 3) - 1) / 2)
    assert (metrics["tied_pairs"], metrics["tied_prompts"]) == (1, 0)
    assert (metrics["mean_score_rank_1"], metrics["mean_score_rank_2"]) == (2.0, 0.5)
    assert "mean_score_rank_3" not in metrics


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [[0, 1], [0, 3]],
            r"row 0: pairs\[1\] is \[0, 3\], but the row has 3 completions. Use whole numbers from 0 to 2",
        ),
        ([[-1, 1]], r"pairs\[0\] is \[-1, 1\], but the row has 3 completions"),
        ([[0, 1], [2]], r"pairs\[1\] is \[2\]. Give two positions in 'completions': \[winner, loser\]"),
        ([[0, 1, 2]], r"pairs\[0\] is \[0, 1, 2\]. Give two positions"),
        ([[0, 0.5]], r"Use whole numbers from 0 to 2"),
        ([[1, 1]], r"pairs\[0\] is \[1, 1\], which compares a completion with itself. Drop the pair"),
        ([[0, 1], [1, 2], [1, 0]], r"'pairs' holds both \[0, 1\] and \[1, 0\], which contradict each other. Keep one"),
        (None, r"row 0: 'pairs' must be a list of \[winner, loser\], empty where nothing was compared, got None"),
    ],
)
def test_bad_pairs_are_named(tokenizer, pairs, message):
    row = {**THREE, "pairs": pairs}
    with pytest.raises(ValueError, match=message):
        prepare([row], tokenizer)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), None])
def test_bad_weights_are_named(tokenizer, weight):
    rows = [{**THREE, "ranks": [1, 2, 3], "weight": value} for value in (1.0, weight)]
    with pytest.raises(ValueError, match=rf"row 1: 'weight' is {weight}. Give a finite number above 0"):
        prepare(rows, tokenizer)


@pytest.mark.parametrize("margin", [float("nan"), None])
def test_bad_margins_are_named(tokenizer, margin):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": value} for value in (1.0, margin)]
    with pytest.raises(ValueError, match=rf"row 1: 'margin' is {margin}. Give a finite number; 0 is none"):
        prepare(rows, tokenizer)


def test_no_pair_anywhere_is_refused(tokenizer):
    with pytest.raises(ValueError, match="none of its 2 prompts has an untied pair.*'pairs' are filled in"):
        prepare([{**THREE, "pairs": []}, {**THREE, "pairs": []}], tokenizer)
    with pytest.raises(ValueError, match=r"none of its 1 prompts.*1 pairs went with completions longer than max_len"):
        prepare([{**THREE, "completions": ["c", "longest", "d"], "pairs": [[1, 0]]}], tokenizer, max_length=5)


def test_margins_need_a_source(tokenizer):
    for labels in ({"ranks": [1, 2, 3]}, {"pairs": [[0, 1]]}):
        with pytest.raises(ValueError, match="use_margins=True, but the train dataset has no column 'scores'.*Add it"):
            prepare([{**THREE, **labels}], tokenizer, use_margins=True)
    with pytest.raises(ValueError, match="no column 'margin'"):
        prepare([{"prompt": "p", "chosen": "a", "rejected": "b"}], tokenizer, use_margins=True)
    with pytest.raises(ValueError, match="'margin' column, which belongs to 'chosen'.*use_margins=True"):
        prepare([{**THREE, "scores": [1.0, 2.0, 3.0], "margin": 1.0}], tokenizer)
    prepared, _ = prepare([{**THREE, "ranks": [1, 2, 3]}], tokenizer)
    with pytest.raises(ValueError, match="prepared without margins. Prepare it with use_margins=True"):
        prepare_ranking_dataset(prepared, tokenizer, use_margins=True)


def test_two_kinds_of_labels_are_refused(tokenizer):
    with pytest.raises(ValueError, match="'ranks', 'pairs', which mean the same"):
        prepare([{**THREE, "ranks": [1, 2, 3], "pairs": [[0, 1]]}], tokenizer)


def test_pairs_of_dropped_completions_go_with_them(tokenizer):
    # With prompt and EOS: 5, 4, 9 and 4 tokens. Completion 2 goes, and 3 moves to its place.
    row = {"prompt": "ab", "completions": ["cd", "e", "longest", "f"], "pairs": [[3, 0], [2, 1], [0, 2], [1, 3]]}
    dataset, report = prepare([row, {**THREE, "pairs": [[0, 1]]}], tokenizer, max_length=6)
    assert dataset[0]["pairs"] == [[2, 0], [1, 2]]
    assert (report.overlong_rows, report.dropped_pairs, report.dropped_prompts, report.tied_prompts) == (1, 2, 0, 0)
    line = report.line("the train dataset", 6, None)
    assert "1 completions longer than max_length=6 tokens (prompt included) and the 2 pairs that touch them" in line


def test_a_row_that_lost_its_pairs_counts_as_one_without(tokenizer):
    rows = [{**THREE, "pairs": [[2, 0], [2, 1]]}, {**THREE, "pairs": [[0, 1]]}]
    dataset, report = prepare(rows, tokenizer, max_length=5)
    assert dataset["pairs"][:] == [[], [[0, 1]]]
    assert (report.dropped_pairs, report.tied_prompts, report.dropped_prompts) == (2, 1, 0)


def test_margins_follow_the_pairs_that_are_kept(tokenizer):
    row = {"prompt": "ab", "completions": ["longest", "c", "d"], "scores": [9.0, 1.5, 4.0]}
    dataset, report = prepare([row], tokenizer, max_length=5, use_margins=True)
    assert (dataset[0]["pairs"], dataset[0]["margins"], dataset[0]["ranks"]) == ([[1, 0]], [2.5], [2, 1])
    assert report.dropped_pairs == 2


def test_a_pair_given_twice_counts_once():
    ranking = parse_ranking({**THREE, "pairs": [[0, 1], [2, 1], [0, 1]]})
    assert ranking.pairs == [(0, 1), (2, 1)]


def test_labeler_and_weight_are_kept(tokenizer):
    rows = [{**THREE, "ranks": [1, 2, 3], "weight": w, "labeler": name} for w, name in [(0.5, "ann"), (2.0, None)]]
    dataset, _ = prepare(rows, tokenizer)
    assert dataset["labeler"][:] == ["ann", None]
    assert dataset["weight"][:] == [0.5, 2.0]
    stream, _ = prepare_ranking_dataset(IterableDataset.from_generator(lambda: iter(rows)), tokenizer)
    assert list(stream) == dataset.to_list()


def test_rankings_and_comparison_lists_share_a_batch(tokenizer):
    scores, _ = prepare([{**THREE, "scores": [1.0, 0.0, 0.0]}], tokenizer, use_margins=True)
    pairs, _ = prepare([{"prompt": "ab", "completions": ["c", "d"], "pairs": [[1, 0]], "weight": 2.0}], tokenizer)
    batch = RankingCollator(257)(list(concatenate_datasets([scores, pairs])))
    assert batch["ranks"].tolist() == [[1, 2, 2], [0, 0, 0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["pairs"].nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [1, 1, 0]]
    assert batch["margins"].nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]
    assert batch["weights"].tolist() == [1.0, 2.0]
    own = RankingCollator(257)([{"input_ids": [[1], [2]], "ranks": [1, 2], "pairs": [[1, 0]]}])
    assert own["pairs"].nonzero().tolist() == [[0, 1, 0]]  # pairs that are given stand in for those of the ranks


def test_prefix_lengths_equal_a_naive_loop():
    draw = random.Random(0)
    examples = []
    for size in (2, 3, 9, 4, 2):
        start = [draw.randint(0, 3) for _ in range(draw.randint(0, 5))]
        rows = [start + [draw.randint(0, 1) for _ in range(draw.randint(1, 4))] for _ in range(size)]
        examples.append({"input_ids": rows, "ranks": list(range(1, size + 1))})
    examples.append({"input_ids": [[1, 2, 3], [1, 2, 3]], "ranks": [1, 2]})  # each keeps a token of its own
    lengths = RankingCollator(0)(examples)["prefix_lengths"]
    for example, length in zip(examples, lengths.tolist(), strict=True):
        rows, naive = example["input_ids"], 0
        while naive < min(map(len, rows)) - 1 and len({row[naive] for row in rows}) == 1:
            naive += 1
        assert length == naive
    assert lengths[-1] == 2
    assert lengths.dtype == torch.long


def test_the_forms_in_the_docs_are_accepted(tokenizer):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "data_format.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.splitlines() if line.startswith('{"prompt": "Name a prime number.", "c')]
    forms = [row for row in rows if "completions" in row or "chosen" in row]
    assert {form for row in forms for form in ("ranks", "scores", "pairs", "chosen") if form in row} == {
        "ranks",
        "scores",
        "pairs",
        "chosen",
    }
    for row in forms:
        dataset, _ = prepare([row], tokenizer, use_margins="scores" in row)
        assert dataset[0]["pairs"]
