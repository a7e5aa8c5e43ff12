"""PPO's bare calls, with no trainer around: generate, the forwards, the forward-backwards, the optimizers' steps.

Legend: B rows, P prompt tokens, T completion tokens.

The floor computes what has to be computed and nothing else, by the functions that our trainer calls: scored positions
only, rows of similar length without their padding, ended answers out of the batch. No metrics, no text, no clipping of
gradients, no guards.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.ppo_session import EOS, PAD, Session, build, prompts
from instruct_trl.maths.masking import masked_whiten
from instruct_trl.maths.objectives import clipped_policy_loss, clipped_value_loss
from instruct_trl.maths.returns import generalized_advantages, kl_estimate, token_rewards
from instruct_trl.models.generation import RolloutGenerate
from instruct_trl.models.logprobs import completion_logps, positions
from instruct_trl.trainers.minibatches import compute_by_length, trim_padding

Rows = dict[str, torch.Tensor]


def run(session: Session, learning_rate: float) -> None:
    """Iterations until the parent says stop."""
    case = session.case
    policy, reward, _ = build(case)
    reference, value = copy.deepcopy(policy).eval(), copy.deepcopy(reward)
    session.shape_lengths(policy)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate) for model in (policy, value)]
    while True:
        session.gate()
        rollout = _rollout(session, prompts(case), policy.eval(), reference, reward.eval(), value)
        lengths = rollout["prompt_mask"].sum(dim=1) + rollout["completion_mask"].sum(dim=1)
        policy.train()
        for minibatch in torch.randperm(case.rollout).split(case.micro * case.accumulation):
            minibatch = minibatch[lengths[minibatch].argsort()]
            tokens = rollout["completion_mask"][minibatch].sum()
            for micro in minibatch.split(case.micro):
                session.update_begins()
                _backward(trim_padding({name: rows[micro] for name, rows in rollout.items()}), policy, value, tokens)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@torch.no_grad()
def _rollout(session: Session, rows: list, policy: Any, reference: Any, reward: Any, value: Any) -> Rows:
    case = session.case
    rollout = _sample(sorted(rows, key=len), policy, case.chunk, case.answer[1])
    mask = rollout["completion_mask"]

    def score(rows: Rows) -> torch.Tensor:
        return _values(reward, rows)[:, -1:].expand(rows["loss_mask"].shape)

    logps = compute_by_length(rollout, case.chunk, lambda rows: _logps(policy, rows))
    ref_logps = compute_by_length(rollout, case.chunk, lambda rows: _logps(reference, rows))
    values = compute_by_length(rollout, case.chunk, lambda rows: _values(value, rows))
    scores = compute_by_length(rollout, case.chunk, score)[:, 0]
    rewards = token_rewards(scores, kl_estimate(logps, ref_logps), mask, 0.02)
    advantages, returns = generalized_advantages(rewards, values, mask)
    return rollout | {
        "logps": logps,
        "values": values,
        "advantages": masked_whiten(advantages, mask),
        "returns": returns,
    }


def _sample(rows: list[list[int]], policy: Any, chunk: int, limit: int) -> Rows:
    """Prompts padded on the left (B, P), answers on the right (B, T), and their masks."""
    generate = RolloutGenerate(policy, [EOS])
    settings: Any = {"do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": EOS, "pad_token_id": PAD}
    config = GenerationConfig(max_new_tokens=limit, **settings)
    longest = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    answers = []
    for batch in prompt.split(chunk):
        batch = batch[:, int((batch != PAD).any(dim=0).int().argmax()) :]
        ids = generate(input_ids=batch, attention_mask=(batch != PAD).long(), generation_config=config)
        ids = ids[:, batch.size(1) :]
        answers.append(torch.nn.functional.pad(ids, (0, limit - ids.size(1)), value=PAD))
    answer = torch.cat(answers)
    ends = (answer == EOS).int()
    mask = ((ends.cumsum(dim=1) - ends) == 0).long()
    return {
        "prompt_ids": prompt,
        "prompt_mask": (prompt != PAD).long(),
        "completion_ids": answer,
        "completion_mask": mask,
        "loss_mask": mask,
    }


def _inputs(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    return ids, torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)


def _logps(model: Any, rows: Rows) -> torch.Tensor:
    return completion_logps(model, *_inputs(rows), rows["loss_mask"].size(1), scored=rows["loss_mask"])[0]


def _values(model: Any, rows: Rows) -> torch.Tensor:
    """V of the state before each completion token; of a reward model, the last of them stands in for its score."""
    ids, mask = _inputs(rows)
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return model.score(hidden.last_hidden_state[:, -rows["loss_mask"].size(1) - 1 : -1]).squeeze(2)


def _backward(rows: Rows, policy: Any, value: Any, tokens: torch.Tensor) -> None:
    mask = rows["loss_mask"]
    losses, _ = clipped_policy_loss(_logps(policy, rows), rows["logps"], rows["advantages"], 0.2, 0.2)
    ((losses * mask).sum() / tokens).backward()
    losses = clipped_value_loss(_values(value, rows), rows["values"], rows["returns"], 0.2)
    ((losses * mask).sum() / tokens).backward()
