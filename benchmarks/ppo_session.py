"""What the contenders of `ppo.py` share in their processes: models, prompts, lengths, clocks, memory, step counts.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PAD, EOS, UNKNOWN, MARK, FIRST_WORD = 0, 1, 2, 3, 4  # MARK is the last token of every prompt


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        prompt: mean and largest prompt length, in tokens. Lengths are exponential, cut at the largest; equal where both
            are: people's prompts differ as much as their mean, or more (Ouyang et al. 2022, appendix A).
        answer: smallest and largest answer length; drawn evenly.
        rollout, micro, accumulation, chunk: episodes an iteration, rows a backward, backwards a step, rows generated
            or scored at once.
        model: folder of a causal LM whose config is used instead of the small Llama; weights stay random.
    """

    vocabulary: int
    prompt: tuple[int, int]
    answer: tuple[int, int]
    rollout: int = 64
    micro: int = 4
    accumulation: int = 2
    chunk: int = 32
    hidden: int = 256
    layers: int = 4
    model: str = ""

    @property
    def name(self) -> str:
        low, high = self.answer
        kind = f"{high} tokens each" if low == high else f"{low} to {high} tokens"
        return f"V {self.vocabulary:,}, answers of {kind}"

    @property
    def steps(self) -> int:
        """Optimizer steps an iteration."""
        return self.rollout // (self.micro * self.accumulation)


class Report(NamedTuple):
    """One iteration: seconds, by stage too; MiB of the process at its peak; what was really done."""

    seconds: float
    generate: float
    forwards: float
    update: float
    rollout_mib: float
    peak_mib: float
    optimizer_steps: int
    mean_length: float
    max_length: int
    stages: dict[str, float]


class Stop(Exception):
    """The parent has seen enough iterations."""


class Session:
    """The clock of one contender. It works through an iteration whenever the parent says so, and then reports it."""

    def __init__(self, pipe: Any, case: Case):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.pipe, self.case = pipe, case
        self.steps: dict[int, int] = defaultdict(int)
        self.stages: dict[str, float] = {}
        self._begin: float | None = None
        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer: Any, *args: Any) -> None:
        self.steps[id(optimizer)] += 1

    def gate(self) -> None:
        """Call where an iteration ends and the next begins.

        Raises:
            Stop: there is no next one.
        """
        self.pipe.send(self._report() if self._begin is not None else None)
        if not self.pipe.recv():
            raise Stop
        self.steps.clear()
        self.stages = {}
        self.lengths: list[int] = []
        self._generate, self._update, self._rollout_mib = 0.0, 0.0, 0.0
        _reset_high_water()
        self._begin = time.perf_counter()

    def update_begins(self) -> None:
        """Call before each forward of the update; the first ends the rollout."""
        if not self._update:
            self._update = time.perf_counter()
            self._rollout_mib = _high_water()
            _reset_high_water()

    def _report(self) -> Report:
        now = time.perf_counter()
        begin = self._begin or now
        rollout, update = self._update - begin, now - self._update
        return Report(
            now - begin,
            self._generate,
            rollout - self._generate,
            update,
            self._rollout_mib,
            max(self._rollout_mib, _high_water()),
            max(self.steps.values()),
            sum(self.lengths) / len(self.lengths),
            max(self.lengths),
            self.stages,
        )

    def shape_lengths(self, model: Any) -> Any:
        """Make `model.generate` end each answer where its prompt says, and time it."""
        plain = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            output = plain(*args, **kwargs, logits_processor=[EndWherePromptSays(self.lengths)])
            self._generate += time.perf_counter() - begin
            return output

        model.generate = generate
        return model


class EndWherePromptSays:
    """A logits processor: a row draws EOS as the n-th token after its prompt, n being the prompt's first token.

    Args:
        ended: the length of each answer that ends is added to it.
    """

    def __init__(self, ended: list[int]):
        self.ended = ended
        self.lengths: list[int] = []
        self.prompt_width = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores (B, V) of the next token, changed in place."""
        if not self.lengths:
            first = (input_ids != PAD).int().argmax(dim=1, keepdim=True)
            self.lengths = (input_ids.gather(1, first).squeeze(1) - FIRST_WORD).tolist()
            self.prompt_width = input_ids[0].tolist().index(MARK) + 1
        token = input_ids.size(1) - self.prompt_width + 1
        scores[:, [PAD, EOS, MARK]] = float("-inf")
        ends = [row for row, length in enumerate(self.lengths) if length == token]
        scores[ends] = float("-inf")
        scores[ends, EOS] = 0.0
        self.ended += [token] * len(ends)
        return scores


def _reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _high_water() -> float:
    """MiB of resident memory at most since the last reset (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM line: memory is measured on Linux only.")


def build(case: Case) -> tuple[Any, Any, Any]:
    """(policy, reward model, tokenizer): random weights, equal in every contender; float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    size = {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 43 // 16,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    config: Any = AutoConfig.from_pretrained(case.model) if case.model else LlamaConfig(**size)  # type: ignore[arg-type]
    config.vocab_size = case.vocabulary
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, EOS, PAD
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.num_labels = 1
    reward = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return policy, reward, _tokenizer(case.vocabulary)


def _tokenizer(vocabulary: int) -> Any:
    """One token a word, so that text and tokens go back and forth without change."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN, f"w{MARK}": MARK}
    words |= {f"w{index}": index for index in range(FIRST_WORD, vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def prompts(case: Case) -> list[list[int]]:
    """Token ids of one rollout's prompts, the same ones in every iteration: length of the answer, words, the mark."""
    draw = random.Random(0)
    mean, largest = case.prompt
    rows = []
    for _ in range(case.rollout):
        length = largest if mean == largest else min(largest, max(2, round(draw.expovariate(1 / mean))))
        words = draw.choices(range(FIRST_WORD, case.vocabulary), k=length - 2)
        rows.append([FIRST_WORD + draw.randint(*case.answer), *words, MARK])
    return rows
