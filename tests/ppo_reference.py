"""PPO-ptx once more, in plain loops over episodes and tokens, written from the papers; imports nothing of the package.

Schulman et al. 2017 (clipped surrogate, Eq. 7), Ouyang et al. 2022 (Eq. 2), Schulman et al. 2016 (GAE, Eq. 16),
Schulman 2020 (KL estimators), Kingma & Ba 2015 (Adam, Algorithm 1). `settings` carries TRL's and our names of knobs.
Tensors occur only where a gradient has to flow: models, losses, Adam. Everything else is lists of floats.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Episode:
    """One prompt and its answer as token ids, with a number a token of the answer where a list is."""

    prompt: list[int]
    answer: list[int]
    score: float
    old_logps: list[float] = field(default_factory=list)
    ref_logps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)


def choices(policy: Any, prompt: list[int], answer: list[int], temperature: float) -> tuple[list, list[float]]:
    """log π of each token of the answer (scalar tensors), and the entropy in nats of each choice."""
    logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0]
    logps, entropies = [], []
    for i, token in enumerate(answer):
        probabilities = torch.softmax(logits[len(prompt) + i - 1] / temperature, dim=0)
        logps.append(torch.log(probabilities[token]))
        entropies.append(-sum(p * math.log(p) for p in probabilities.tolist() if p > 0))
    return logps, entropies


def state_values(classifier: Any, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """V of the state before each token of the answer: a forward of its own over exactly the tokens before it."""
    values = []
    for i in range(len(answer)):
        hidden = classifier.model(input_ids=torch.tensor([prompt + answer[:i]])).last_hidden_state
        values.append(classifier.score(hidden[0, -1])[0] + getattr(classifier.config, "reward_bias", 0.0))
    return values


def kl(logp: float, ref_logp: float, estimator: str) -> float:
    """Schulman 2020 with r = π_ref/π: k1 = −log r, k2 = (log r)²/2, k3 = (r − 1) − log r."""
    r = math.exp(ref_logp - logp)
    return {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": (r - 1) - math.log(r)}[estimator]


def advantages_of(rewards: list[float], values: list[float], discount: float, gae_lambda: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, every sum written out; the state after the last token is worth 0."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + discount * following[t] - values[t] for t in range(n)]
    return [sum((discount * gae_lambda) ** (u - t) * deltas[u] for u in range(t, n)) for t in range(n)]


@torch.no_grad()
def roll_out(
    policy: Any, reference: Any, classifier: Any, episodes: list[Episode], eos: int, settings: Any
) -> dict[str, float]:
    """Fill the episodes in, advantages whitened over all of their tokens; returns what the rollout should log."""
    logged: dict[str, list[float]] = {name: [] for name in ("score", "kl", "objective", "eos_rate", "value", "return")}
    for e in episodes:
        e.old_logps = [x.item() for x in choices(policy, e.prompt, e.answer, settings.temperature)[0]]
        e.ref_logps = [x.item() for x in choices(reference, e.prompt, e.answer, settings.temperature)[0]]
        e.values = [x.item() for x in state_values(classifier, e.prompt, e.answer)]
        ended = e.answer[-1] == eos
        score = e.score - (0.0 if ended else settings.missing_eos_penalty)
        pairs = list(zip(e.old_logps, e.ref_logps, strict=True))
        rewards = [-settings.beta * kl(p, q, settings.kl_estimator) for p, q in pairs]
        rewards[-1] += score
        e.advantages = advantages_of(rewards, e.values, settings.discount, settings.gae_lambda)
        e.returns = [a + v for a, v in zip(e.advantages, e.values, strict=True)]
        log_ratio = sum(p - q for p, q in pairs)
        numbers = (score, log_ratio, score - settings.beta * log_ratio, float(ended))
        for name, number in zip(
            logged, (*numbers, statistics.fmean(e.values), statistics.fmean(e.returns)), strict=True
        ):
            logged[name].append(number)
    everything = [a for e in episodes for a in e.advantages]
    mean, deviation = statistics.fmean(everything), statistics.pstdev(everything)
    for e in episodes:
        e.advantages = [(a - mean) / deviation for a in e.advantages]
    returns = [r for e in episodes for r in e.returns]
    errors = [r - v for e in episodes for r, v in zip(e.returns, e.values, strict=True)]
    explained = 1 - statistics.pvariance(errors) / statistics.pvariance(returns)
    return {name: statistics.fmean(numbers) for name, numbers in logged.items()} | {"explained_variance": explained}


def policy_loss(policy: Any, episodes: list[Episode], settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Eq. 7 of Schulman et al. 2017, negated, mean over the minibatch's tokens; metrics are means of answers' means."""
    total, tokens = torch.tensor(0.0), 0
    rows: dict[str, list[float]] = {name: [] for name in ("policy_loss", "ratio", "clip_fraction", "entropy")}
    for e in episodes:
        logps, entropies = choices(policy, e.prompt, e.answer, settings.temperature)
        terms, ratios = [], []
        for logp, old, advantage in zip(logps, e.old_logps, e.advantages, strict=True):
            ratio = torch.exp(logp - old)
            clipped = torch.clamp(ratio, 1 - settings.epsilon, 1 + settings.epsilon)
            terms.append(-torch.minimum(ratio * advantage, clipped * advantage))
            ratios.append(ratio.item())
            total, tokens = total + terms[-1], tokens + 1
        rows["policy_loss"].append(statistics.fmean(term.item() for term in terms))
        rows["ratio"].append(statistics.fmean(ratios))
        rows["clip_fraction"].append(statistics.fmean(abs(r - 1) > settings.epsilon for r in ratios))
        rows["entropy"].append(statistics.fmean(entropies))
    loss = total / tokens
    return loss, {name: statistics.fmean(numbers) for name, numbers in rows.items()} | {"loss": loss.item()}


def value_loss(classifier: Any, episodes: list[Episode], settings: Any) -> tuple[Any, dict[str, float]]:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²), mean over the minibatch's tokens; metrics as the policy's."""
    total, tokens, losses, shares = torch.tensor(0.0), 0, [], []
    for e in episodes:
        terms, moved = [], []
        values = state_values(classifier, e.prompt, e.answer)
        for value, old, goal in zip(values, e.values, e.returns, strict=True):
            clipped = torch.clamp(value, old - settings.value_clip, old + settings.value_clip)
            terms.append(torch.maximum((value - goal) ** 2, (clipped - goal) ** 2) / 2)
            moved.append(abs(value.item() - old) > settings.value_clip)
        total, tokens = total + sum(terms), tokens + len(terms)
        losses.append(statistics.fmean(term.item() for term in terms))
        shares.append(statistics.fmean(moved))
    metrics = {"value_loss": statistics.fmean(losses), "value_clip_fraction": statistics.fmean(shares)}
    return total / tokens, metrics


def pretraining_loss(policy: Any, texts: list[list[int]]) -> torch.Tensor:
    """Mean cross-entropy over all next tokens of the texts, under the plain model (no temperature)."""
    total, tokens = torch.tensor(0.0), 0
    for text in texts:
        logits = policy(input_ids=torch.tensor([text])).logits[0]
        for i in range(1, len(text)):
            total = total - torch.log(torch.softmax(logits[i - 1], dim=0)[text[i]])
            tokens += 1
    return total / tokens


class Adam:
    """Algorithm 1 of Kingma & Ba 2015, after scaling the gradient down to a norm of `max_norm` if it is longer."""

    def __init__(self, model: Any, settings: Any, max_norm: float):
        self.parameters = list(model.parameters())
        self.b1, self.b2, self.eps = settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon
        self.max_norm, self.t = max_norm, 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, loss: torch.Tensor, rate: float) -> float:
        """One step down `loss`; returns the norm of the gradient before the clip."""
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(math.fsum((g.double() ** 2).sum().item() for g in gradients))
        shrink = min(1.0, self.max_norm / norm)
        self.t += 1
        with torch.no_grad():
            for i, (p, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                g = gradient * shrink
                self.m[i] = self.b1 * self.m[i] + (1 - self.b1) * g
                self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * g**2
                m_hat, v_hat = self.m[i] / (1 - self.b1**self.t), self.v[i] / (1 - self.b2**self.t)
                p -= rate * m_hat / (v_hat.sqrt() + self.eps)
        return norm


def update(
    policy: Any, classifier: Any, minibatches: list[list[list[Episode]]], texts: list[list[list[int]]], settings: Any
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """One optimizer step a minibatch (a list of micro-batches) with its texts, learning rates falling linearly to 0.

    Returns the metrics of each step, and the average of the policy's parameters, which starts at the initial ones.
    """
    steps = len(minibatches)
    actor = Adam(policy, settings, settings.max_grad_norm)
    critic = Adam(classifier, settings, settings.value_max_grad_norm)
    average = [p.detach().clone() for p in policy.parameters()]
    logged = []
    for k, (micro_batches, text) in enumerate(zip(minibatches, texts, strict=True)):
        left = 1 - k / steps
        episodes = [e for batch in micro_batches for e in batch]
        clipped, metrics = policy_loss(policy, episodes, settings)
        ptx = pretraining_loss(policy, text)
        error, value_metrics = value_loss(classifier, episodes, settings)
        metrics |= value_metrics | {"ptx_loss": ptx.item(), "learning_rate": settings.learning_rate * left}
        metrics["grad_norm"] = actor.step(clipped + settings.ptx_coef * ptx, settings.learning_rate * left)
        metrics["value_grad_norm"] = critic.step(error, settings.value_learning_rate * left)
        decay = settings.ema_decay
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, policy.parameters(), strict=True)]
        logged.append(metrics)
    return logged, average
