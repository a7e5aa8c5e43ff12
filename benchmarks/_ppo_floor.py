"""PPO's bare calls, with no trainer around: generate, the forwards, the forward-backwards, the optimizers' steps.

Legend: B rows, P prompt tokens, T completion tokens.

The floor computes what has to be computed and nothing else: completion positions only, micro-batches of similar length
cut to it, no metrics, no text, no clipping of gradients.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from _ppo_session import EOS, PAD, Session, build, prompts

from instruct_trl.maths.masking import masked_whiten
from instruct_trl.maths.objectives import clipped_policy_loss, clipped_value_loss
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards

Rows = dict[str, torch.Tensor]


def run(session: Session, learning_rate: float) -> None:
    """Iterations until the parent says stop."""
    case = session.case
    policy, reward, _ = build(case)
    reference, value = copy.deepcopy(policy).eval(), copy.deepcopy(reward)
    session.shape_lengths(policy)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate) for model in (policy, value)]
    rows, draw = prompts(case, 16 * case.rollout), random.Random(0)
    while True:
        session.gate()
        rollout = _rollout(session, draw.sample(rows, case.rollout), policy.eval(), reference, reward.eval(), value)
        order = torch.randperm(case.rollout)
        policy.train()
        for minibatch in order.split(case.micro * case.accumulation):
            minibatch = minibatch[rollout["length"][minibatch].argsort()]
            tokens = rollout["mask"][minibatch].sum()
            for micro in minibatch.split(case.micro):
                session.update_begins()
                _backward(_cut(rollout, micro), policy, value, tokens)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@torch.no_grad()
def _rollout(session: Session, rows: list, policy: Any, reference: Any, reward: Any, value: Any) -> Rows:
    case = session.case
    rollout = _sample(rows, policy, case.chunk, case.answer[1])
    order = rollout["length"].argsort()
    results: dict[str, torch.Tensor] = {
        name: torch.zeros(rollout["mask"].shape) for name in ("logps", "ref_logps", "values")
    }
    scores = torch.zeros(len(rows))
    for chunk in order.split(case.chunk):
        part = _cut(rollout, chunk)
        width = part["mask"].size(1)
        results["logps"][chunk, :width] = _logps(policy, part)
        results["ref_logps"][chunk, :width] = _logps(reference, part)
        results["values"][chunk, :width] = _values(value, part)
        last = part["prompt"].size(1) + part["mask"].sum(dim=1) - 1
        scores[chunk] = reward.score(_hidden(reward, part)[torch.arange(len(chunk)), last]).squeeze(1)
    mask = rollout["mask"]
    rewards = token_rewards(scores, kl_estimate(results["logps"], results["ref_logps"]), mask, 0.02)
    advantages, returns = generalized_advantages(rewards, results["values"], mask)
    return rollout | results | {"advantages": masked_whiten(advantages, mask), "returns": returns}


def _sample(rows: list[list[int]], policy: Any, chunk: int, limit: int) -> Rows:
    """Prompts padded on the left (B, P), answers on the right (B, T), and `length` (B,) of both together."""
    longest = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    parts = []
    for batch in prompt.split(chunk):
        ids = policy.generate(
            input_ids=batch,
            attention_mask=(batch != PAD).long(),
            max_new_tokens=limit,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, longest:]
        parts.append(torch.nn.functional.pad(ids, (0, limit - ids.size(1)), value=PAD))
    answer = torch.cat(parts)
    ends = (answer == EOS).int()
    mask = (ends.cumsum(dim=1) - ends) == 0
    length = (prompt != PAD).sum(dim=1) + mask.sum(dim=1)
    return {"prompt": prompt, "answer": answer, "mask": mask, "length": length}


def _cut(rollout: Rows, rows: torch.Tensor) -> Rows:
    """Some rows, without the columns that are padding in all of them."""
    first = int((rollout["prompt"][rows] == PAD).sum(dim=1).min())
    longest = int(rollout["mask"][rows].sum(dim=1).max())
    cut = {name: t[rows, :longest] for name, t in rollout.items() if t.ndim == 2 and name != "prompt"}
    return cut | {"prompt": rollout["prompt"][rows, first:]}


def _inputs(rows: Rows) -> dict[str, Any]:
    mask = torch.cat([rows["prompt"] != PAD, rows["mask"]], dim=1).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ids = torch.cat([rows["prompt"], rows["answer"]], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def _logps(model: Any, rows: Rows) -> torch.Tensor:
    logits = model(**_inputs(rows), logits_to_keep=rows["answer"].size(1) + 1).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows["answer"].flatten(), reduction="none")
    return -losses.view(rows["answer"].shape)


def _hidden(model: Any, rows: Rows) -> torch.Tensor:
    return model.model(**_inputs(rows)).last_hidden_state


def _values(model: Any, rows: Rows) -> torch.Tensor:
    width = rows["answer"].size(1)
    return model.score(_hidden(model, rows)[:, -width - 1 : -1]).squeeze(2)


def _backward(rows: Rows, policy: Any, value: Any, tokens: torch.Tensor) -> None:
    mask = rows["mask"]
    losses, _ = clipped_policy_loss(_logps(policy, rows), rows["logps"], rows["advantages"], 0.2, 0.2)
    ((losses * mask).sum() / tokens).backward()
    losses = clipped_value_loss(_values(value, rows), rows["values"], rows["returns"], 0.2)
    ((losses * mask).sum() / tokens).backward()
