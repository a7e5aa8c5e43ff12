"""Rows of a rollout, rearranged: nobody is lost, nobody changes, and little padding is left."""

import pytest
import torch

from instruct_trl.trainers.minibatches import compute_by_length, similar_lengths, trim_padding

# Prompts and answers of a rollout; the last row's answer is the longest, the second row is the longest in all.
ROWS = [([11, 12], [21, 22, 23]), ([13, 14, 15, 16, 17], [24]), ([18], [25, 26, 27, 28])]
PAD = 99


def rollout():
    """(3, 6) prompts padded on the left, (3, 6) answers on the right, as GRPOTrainer pads them."""
    prompts = [[PAD] * (6 - len(p)) + p for p, _ in ROWS]
    answers = [a + [PAD] * (6 - len(a)) for _, a in ROWS]
    batch = {"prompt_ids": torch.tensor(prompts), "completion_ids": torch.tensor(answers)}
    batch |= {f"{kind}_mask": (batch[f"{kind}_ids"] != PAD).long() for kind in ("prompt", "completion")}
    numbers = 10.0 * batch["completion_ids"] * batch["completion_mask"]
    return batch | {"loss_mask": batch["completion_mask"], "advantages": numbers, "scores": torch.tensor([1.0, 2, 3])}


def test_trimmed_rows_are_the_same_rows_ending_together():
    batch = trim_padding(rollout())
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool()
    assert ids.shape == (3, 6)  # the longest row: 5 + 1 tokens
    assert batch["completion_ids"].shape == (3, 4)  # the longest answer
    assert seen[:, -1].all()
    for (prompt, answer), row, mask in zip(ROWS, ids, seen, strict=True):
        assert row[mask].tolist() == prompt + answer
        assert mask.int().diff().abs().sum() == (0 if len(prompt + answer) == 6 else 1)  # padding on the left only


def test_per_token_tensors_follow_the_answers_and_others_stay():
    batch = trim_padding(rollout())
    for (_, answer), numbers, ids, mask in zip(
        ROWS, batch["advantages"], batch["completion_ids"], batch["loss_mask"].bool(), strict=True
    ):
        assert ids[mask].tolist() == answer
        assert numbers[mask].tolist() == [10.0 * token for token in answer]
        assert numbers[~mask].tolist() == [0.0] * (4 - len(answer))
    assert batch["scores"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_computing_by_length_puts_every_number_back_in_its_place(size):
    shapes = []

    def squares(rows):
        shapes.append((len(rows["completion_ids"]), rows["prompt_ids"].size(1) + rows["completion_ids"].size(1)))
        return rows["completion_ids"].float() ** 2

    batch = rollout()
    found = compute_by_length({name: t for name, t in batch.items() if t.ndim == 2}, size, squares)
    expected = [[token**2 for token in answer] + [0] * (6 - len(answer)) for _, answer in ROWS]
    assert found.tolist() == expected
    assert sum(rows for rows, _ in shapes) == 3
    assert max(rows for rows, _ in shapes) <= size
    if size == 1:
        assert sorted(width for _, width in shapes) == [5, 5, 6]  # no padding at all


def test_batches_of_similar_length_hold_everyone_and_a_tenth_of_padding_at_most():
    torch.manual_seed(0)
    lengths = torch.randint(1, 400, (300,))
    batches = similar_lengths(lengths, 16)
    assert sorted(index for rows in batches for index in rows.tolist()) == list(range(300))
    assert max(map(len, batches)) == 16  # they do fill up where lengths allow it
    for rows in batches:
        computed = int(lengths[rows].max()) * len(rows)
        assert len(rows) <= 16
        assert lengths[rows].sum() >= 0.9 * computed


def test_batches_by_count_do_not_hang_on_lengths():
    """Processes under ZeRO-3 must call a model equally often, whatever their answers are like."""
    for lengths in ([1, 100, 1, 100, 1], [7, 7, 7, 7, 7]):
        batches = similar_lengths(torch.tensor(lengths), 2, by_count=True)
        assert [len(rows) for rows in batches] == [2, 2, 1]
        assert sorted(index for rows in batches for index in rows.tolist()) == list(range(5))
