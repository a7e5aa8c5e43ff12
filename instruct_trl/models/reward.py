"""The reward model at work: from (prompt, completion) to one number, the same in training, evaluation and RL.

Legend: N rows (one per completion), T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from instruct_trl.data.encoding import (
    Text,
    ending_ids,
    pad_rows,
    plain_answer,
    template_kwargs,
    tokenize_drawn,
    tokenize_pair,
)
from instruct_trl.data.prefix_layout import GroupedRows, common_prefix_length
from instruct_trl.data.ranking_batch import fill, rows_cost
from instruct_trl.models.context import check_answer_room, refuse_long_row
from instruct_trl.models.loading import check_single_label, load_reward_model
from instruct_trl.models.model_files import load_tokenizer
from instruct_trl.models.prefix_sharing import ScoringRoute
from instruct_trl.models.scores import add_reward_bias

logger = logging.getLogger(__name__)


class RewardScorer:
    """Scores (prompts, completions) with a reward model and adds its bias, once: a TRL reward function.

    Use it wherever TRL takes `reward_funcs`, or call it: `scorer(prompts=[...], completions=[...])`.

    Args:
        model_or_path: a sequence classifier with one label (also a PeftModel), a folder, or a hub name.
        processing_class: its tokenizer; read from the model's path if None.
        batch_size: completions per forward pass; rows are sorted by length first.
        prefix_sharing: "auto" computes a prompt that comes with several completions once for all of them, if the
            model can; "on" raises an error if it cannot; "off" never shares.

    Attributes:
        model, processing_class: as loaded or given.
        reward_bias: `model.config.reward_bias`, 0.0 if there is none: demonstrations then average 0 (section 3.5).

    Raises:
        ValueError: no such path, or more than one label.
    """

    def __init__(
        self,
        model_or_path: Any,
        processing_class: Any = None,
        *,
        batch_size: int = 8,
        prefix_sharing: str = "auto",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.__name__ = "reward_model"  # TRL logs the reward under this name
        self.batch_size = batch_size
        self._said = False
        self._owns_device = isinstance(model_or_path, str | Path)
        if self._owns_device:
            self.model, tokenizer = load_reward_model(model_or_path)
        else:
            self.model, tokenizer = model_or_path, None
            check_single_label(self.model.config, f"The reward model ({type(self.model).__name__})")
        if processing_class is None and tokenizer is None:
            if not self.model.config._name_or_path:
                raise ValueError("The reward model was built in memory: pass its tokenizer as processing_class.")
            tokenizer = load_tokenizer(self.model.config._name_or_path)
        self.processing_class = processing_class or tokenizer
        self._route = ScoringRoute(self.model, prefix_sharing, logger.warning)
        self._autocast: Callable[[], AbstractContextManager] = nullcontext

    @contextmanager
    def computing_under(self, autocast: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """While active, the model's forward runs under the contexts that `autocast` makes: a trainer's precision."""
        before, self._autocast = self._autocast, autocast
        try:
            yield
        finally:
            self._autocast = before

    @property
    def reward_bias(self) -> float:
        return add_reward_bias(0.0, self.model.config)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Scores, bias included, in the order of the arguments.

        Args:
            prompts, completions: plain text, or conversational messages.
            completion_ids: the tokens that were generated. Where they are this tokenizer's spelling of the completion,
                the model reads these very tokens; otherwise it reads the text, and the log says so once.
            truncated: True for an answer that was cut at the length limit; it is scored without an end. Without
                `truncated`, an answer was cut if its `completion_ids` do not end in one of `ending_ids`; without both,
                every completion is finished.
            prompt_ids: the tokens that the policy read. Whoever gives them says that they and `completion_ids` are of
                this tokenizer and its chat template: the row is then made of these tokens, whatever the text.
            kwargs: TRL's other keywords; `tools` and `chat_template_kwargs` reach the chat template, the rest does not.

        Raises:
            ValueError: lengths differ, or a score is NaN or infinite.
        """
        columns = {"completions": completions, "completion_ids": completion_ids, "truncated": truncated}
        for name, column in (columns | {"prompt_ids": prompt_ids}).items():
            if column is not None and len(column) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(column)} {name}: give one for each prompt.")
        rows = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = None if completion_ids is None else completion_ids[index]
            cut = (ids is not None and not self._finished(ids)) if truncated is None else bool(truncated[index])
            given = template_kwargs({k: kwargs[k][index] for k in ("tools", "chat_template_kwargs") if kwargs.get(k)})
            of_prompt = None if prompt_ids is None else prompt_ids[index]
            rows.append(self._row(prompt, completion, ids, of_prompt, {**given, "truncated": cut}))
        # Rows of one prompt go into one batch, so that it can be computed once for all of them.
        scores = self._score(rows, [repr(prompt) for prompt in prompts])
        return [add_reward_bias(score, self.model.config) for score in scores]

    def _row(
        self, prompt: Text, completion: Text, ids: Sequence[int] | None, prompt_ids: Any, given: dict[str, Any]
    ) -> list[int]:
        """The tokens that the model reads: those that were drawn, or the text's."""
        text = plain_answer(completion)
        if ids is None or (text is None and prompt_ids is None):
            return tokenize_pair(self.processing_class, prompt, completion, **given)
        ids = [int(i) for i in ids]
        # Without the token that ended it: `tokenize_drawn` puts this tokenizer's own end there.
        for answer in [ids] if given["truncated"] else [ids[:-1], ids]:
            # Another tokenizer's ids mean other words here. They are read only if they spell the text.
            if prompt_ids is not None or self._spells(answer, text):
                return tokenize_drawn(self.processing_class, prompt, answer, prompt_ids=prompt_ids, **given)
        self.say_text_is_read("they are not this tokenizer's spelling of the answers")
        return tokenize_pair(self.processing_class, prompt, completion, **given)

    def _spells(self, ids: list[int], text: str | None) -> bool:
        """Whether `ids` decode to `text`, with or without special tokens: upstream's text lacks them."""
        return any(self.processing_class.decode(ids, skip_special_tokens=skip) == text for skip in (False, True))

    def say_text_is_read(self, reason: str) -> None:
        """Log once that the model reads answers as text, tokenised anew, and not as the tokens that were drawn."""
        if not self._said:
            self._said = True
            logger.warning("Reward model: it reads the text of answers, not the tokens that were drawn: %s.", reason)

    def _finished(self, ids: Sequence[int]) -> bool:
        return len(ids) > 0 and int(ids[-1]) in ending_ids(self.processing_class, self.model)

    @torch.no_grad()
    def _score(self, rows: list[list[int]], prompts: Sequence[str]) -> list[float]:
        """Scores of token rows without bias, in eval mode; rows of equal `prompts` are scored side by side."""
        for index, row in enumerate(rows):
            what = f"Row {index} (prompt {prompts[index]:.60})"
            refuse_long_row(len(row), what, self.model, "the reward model", "Shorten it, or drop it.")
        self._place()
        device = next(self.model.parameters()).device
        # Any valid id will do: padding is masked and never compared with.
        pad_token_id, config = self.processing_class.pad_token_id or 0, self.model.config.get_text_config()
        if config.pad_token_id is None:  # transformers refuses batches without one
            config.pad_token_id = pad_token_id
        was_training = self.model.training
        self.model.eval()  # with dropout, one answer would get another score at each call
        scores = [math.nan] * len(rows)
        for groups in self._batches(rows, prompts):
            chosen = [index for group in groups for index in group]
            sizes = torch.tensor([len(group) for group in groups])
            # One row alone has nobody to share its prompt with.
            shared = [common_prefix_length([rows[i] for i in group]) if len(group) > 1 else 0 for group in groups]
            batch = pad_rows([rows[index] for index in chosen], pad_token_id)
            grouped = GroupedRows(*(t.to(device) for t in (*batch.values(), sizes, torch.tensor(shared))))
            with self._autocast():
                values = self._route(self.model, grouped)
            for index, value in zip(chosen, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise ValueError(
                        f"The reward model gave {value} for row {index}: its weights or its dtype are broken."
                    )
                scores[index] = value
        self.model.train(was_training)
        return scores

    def _batches(self, rows: list[list[int]], prompts: Sequence[str]) -> list[list[list[int]]]:
        """Batches of at most `batch_size` rows of similar length; each batch is a list of groups with equal prompt."""

        def cost(chosen: list[int]) -> int:
            return rows_cost([len(rows[index]) for place in chosen for index in groups[place]], self.batch_size)

        by_prompt: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt, []).append(index)
        groups = [
            group[start : start + self.batch_size]
            for group in by_prompt.values()
            for start in range(0, len(group), self.batch_size)
        ]
        # Neighbours of similar length need little padding, which costs as much as tokens.
        groups.sort(key=lambda group: max(len(rows[index]) for index in group))
        return [[groups[place] for place in chosen] for chosen in fill(range(len(groups)), cost, self.batch_size)]

    def _place(self) -> None:
        """Move a model that we loaded to this process's accelerator, at the first call: by then a launcher chose it."""
        if self._owns_device and PartialState._shared_state:
            self.model.to(PartialState().device)
        elif self._owns_device and torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self._owns_device = False


def check_scorer_room(scorer: Any, prompts: Sequence[Text], max_new_tokens: int, setting: str) -> None:
    """`check_answer_room` for a reward model. How much another function reads is its own affair."""
    if isinstance(scorer, RewardScorer):
        model, tokenizer = scorer.model, scorer.processing_class
        check_answer_room(model, tokenizer, "The reward model", prompts, max_new_tokens, setting)
