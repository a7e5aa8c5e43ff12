"""The reward model at work: from (prompt, completion) to one number, the same in training, evaluation and RL.

Legend: N rows (one a completion), T tokens.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from instruct_trl._upstream import score_head
from instruct_trl.data.pairs import Text, pad_rows, template_kwargs
from instruct_trl.data.pairs import end_of_text as end_of_text
from instruct_trl.data.pairs import tokenize_pair as tokenize_pair
from instruct_trl.data.prefix_layout import common_prefix_length
from instruct_trl.data.token_budget import fill
from instruct_trl.models.scores import score_rows as score_rows
from instruct_trl.models.scoring_route import ScoringRoute

logger = logging.getLogger(__name__)

# Not `config.json`, beside which transformers would look for full weights and overlook the adapter.
ADAPTER_CONFIG = "reward_config.json"

# Special tokens that tokenizers carry for padding or leave unused, in order of preference.
_PAD_CANDIDATES = ("<|endoftext|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


def ensure_distinct_pad_token(tokenizer: Any, model: nn.Module | None = None) -> str | None:
    """Give `tokenizer` a pad token that is not its EOS: an unused special token if it has one, else a new `<|pad|>`.

    With pad == EOS, transformers' pooling takes the last token before the EOS, and no checkpoint that ends so can be
    read elsewhere. With `model`, its embeddings grow where the new token needs it, and its config learns the pad id.

    Returns:
        One line that says what changed, to be logged; None where the pad token was fine already.
    """
    line = None
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        was = "missing" if tokenizer.pad_token is None else f"its EOS token {tokenizer.eos_token!r}"
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        vocabulary = tokenizer.get_vocab()
        token = next((t for t in _PAD_CANDIDATES if t in vocabulary and t not in taken), None)
        source = "already in its vocabulary" if token else "added to it"
        tokenizer.add_special_tokens({"pad_token": token or "<|pad|>"})
        line = (
            f"The tokenizer's pad token was {was}; it is now {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}, "
            f"{source}), saved with model and tokenizer."
        )
    if model is not None:
        fit_model_to_tokenizer(model, tokenizer)
    return line


def fit_model_to_tokenizer(model: Any, tokenizer: Any) -> None:
    """Grow the embeddings of `model` to hold every token of `tokenizer`, and copy the pad id into its config."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def check_model_path(path: str | Path) -> None:
    """Refuse a path that is not there, with one line in place of a hub traceback.

    Raises:
        ValueError: neither a folder nor a reachable repository of the hub with this name.
    """
    path = str(path)
    if os.path.isdir(path):
        return
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"There is no model folder {path!r}. Check the path, or train the model first.")
    try:
        AutoConfig.from_pretrained(path)
    except OSError as error:
        offline = " HF_HUB_OFFLINE is set and it is not in the cache." if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"There is no model {path!r}: neither a local folder nor a repository that could be read.{offline} Check "
            "the name, or log in with `hf auth login` if it is private."
        ) from error


def check_single_label(config: Any, name: str) -> None:
    """Raises ValueError unless `config` has one label, the reward."""
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has num_labels={config.num_labels}; a reward model has one label, the reward. Train it with "
            "RankingRewardTrainer, or load it with num_labels=1."
        )


def load_reward_model(path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """Read a trained reward model, or the folder of its PEFT adapter, with its tokenizer and its `reward_bias`.

    Args:
        path: local folder or hub name.
        kwargs: for `AutoModelForSequenceClassification.from_pretrained` (dtype, device_map, revision, ...).

    Returns:
        (model, tokenizer), the model in eval mode.

    Raises:
        ValueError: no such path, more than one label, or an adapter without the trained head.
    """
    path = str(path)
    check_model_path(path)
    shared = {key: kwargs[key] for key in ("revision", "trust_remote_code", "token") if key in kwargs}
    tokenizer = AutoTokenizer.from_pretrained(path, **shared)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        model = _load_adapter(path, tokenizer, kwargs)
    else:
        check_single_label(AutoConfig.from_pretrained(path, **shared), f"The reward model {path!r}")
        model = AutoModelForSequenceClassification.from_pretrained(path, **kwargs)
    return model.eval(), tokenizer


def _load_adapter(path: str, tokenizer: Any, kwargs: dict[str, Any]) -> Any:
    from peft import PeftConfig, PeftModel
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    base_path = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
    check_model_path(base_path)
    # RankingRewardTrainer writes this file; adapters of other makers lack it.
    file = Path(path, ADAPTER_CONFIG)
    saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    dtype = saved.get("dtype", "float32")
    with suppress_seqcls_warning():
        base = AutoModelForSequenceClassification.from_pretrained(
            base_path, **{"dtype": dtype, **kwargs, "num_labels": 1}
        )
    fit_model_to_tokenizer(base, tokenizer)
    base.config.reward_bias = saved.get("reward_bias", getattr(base.config, "reward_bias", 0.0))
    model = PeftModel.from_pretrained(base, path)
    trained_base = any(
        "SequenceClassification" in name for name in AutoConfig.from_pretrained(base_path).architectures or []
    )
    if not trained_base and not hasattr(score_head(model), "modules_to_save"):
        raise ValueError(
            f"The adapter {path!r} does not hold the score head, which would be random. Train it with "
            "LoraConfig(task_type='SEQ_CLS')."
        )
    return model


def save_adapter_config(model: Any, folder: str | Path) -> None:
    """Write beside a PEFT adapter what PEFT does not: the reward bias, and the dtype that the base was trained in."""
    saved = {"reward_bias": model.config.reward_bias, "dtype": str(model.dtype).removeprefix("torch.")}
    Path(folder, ADAPTER_CONFIG).write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


class RewardScorer:
    """Scores (prompts, completions) with a reward model and adds its bias, once: a TRL reward function.

    Use it wherever TRL takes `reward_funcs`, or call it: `scorer(prompts=[...], completions=[...])`.

    Args:
        model_or_path: a sequence classifier with one label (also a PeftModel), a folder, or a hub name.
        processing_class: its tokenizer; read from the model's path if None.
        batch_size: completions a forward pass; rows are sorted by length first.
        prefix_sharing: "auto" computes a prompt that comes with several completions once for all of them, where the
            model can; "on" raises where it cannot; "off" never shares.

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
        self._owns_device = isinstance(model_or_path, str | Path)
        if self._owns_device:
            self.model, tokenizer = load_reward_model(model_or_path)
        else:
            self.model, tokenizer = model_or_path, None
            check_single_label(self.model.config, f"The reward model ({type(self.model).__name__})")
        self.processing_class = processing_class or tokenizer or self._tokenizer_of_model()
        self._route = ScoringRoute(self.model, prefix_sharing, logger.warning)

    def _tokenizer_of_model(self) -> Any:
        name = self.model.config._name_or_path
        if not name:
            raise ValueError("The reward model was built in memory: pass its tokenizer as processing_class.")
        return AutoTokenizer.from_pretrained(name)

    @property
    def reward_bias(self) -> float:
        return float(getattr(self.model.config, "reward_bias", 0.0))

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> list[float]:
        """Scores, bias included, in the order of the arguments.

        Args:
            prompts, completions: plain text, or conversational messages.
            completion_ids: what was generated, in this tokenizer's ids. One that does not end in EOS was cut at the
                limit, and is scored without EOS.
            truncated: the same, said outright, as the `truncated` column of rankings says it; goes first.
                Where neither is given, every completion is finished.
            kwargs: TRL's other keywords; `tools` and `chat_template_kwargs` reach the chat template, the rest does not.

        Raises:
            ValueError: lengths differ, or a score is NaN or infinite.
        """
        columns = {"completions": completions, "completion_ids": completion_ids, "truncated": truncated}
        for name, column in columns.items():
            if column is not None and len(column) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(column)} {name}: give one for each prompt.")
        if truncated is None:
            truncated = [
                completion_ids is not None and not self._finished(completion_ids[i]) for i in range(len(prompts))
            ]
        rows = [
            tokenize_pair(
                self.processing_class,
                prompts[index],
                completions[index],
                truncated=truncated[index],
                **template_kwargs({k: kwargs[k][index] for k in ("tools", "chat_template_kwargs") if kwargs.get(k)}),
            )
            for index in range(len(prompts))
        ]
        return [score + self.reward_bias for score in self._score(rows, [repr(prompt) for prompt in prompts])]

    def _finished(self, ids: Sequence[int]) -> bool:
        config_eos = self.model.config.get_text_config().eos_token_id
        ends = {self.processing_class.eos_token_id, *(config_eos if isinstance(config_eos, list) else [config_eos])}
        return len(ids) > 0 and int(ids[-1]) in ends

    @torch.no_grad()
    def _score(self, rows: list[list[int]], prompts: Sequence[str]) -> list[float]:
        """Scores of token rows without bias, in eval mode; rows of equal `prompts` are scored side by side."""
        self._place()
        device = next(self.model.parameters()).device
        pad_token_id = (
            self.processing_class.pad_token_id or 0
        )  # any valid id: padding is masked and never compared with
        if self.model.config.get_text_config().pad_token_id is None:  # transformers refuses batches without one
            self.model.config.get_text_config().pad_token_id = pad_token_id
        was_training = self.model.training
        self.model.eval()
        scores = [math.nan] * len(rows)
        for groups in self._batches(rows, prompts):
            chosen = [index for group in groups for index in group]
            sizes = {
                "group_sizes": torch.tensor([len(group) for group in groups]),
                "prefix_lengths": torch.tensor([_shared(rows, group) for group in groups]),
            }
            batch = pad_rows([rows[index] for index in chosen], pad_token_id) | sizes
            values = self._route(self.model, **{name: tensor.to(device) for name, tensor in batch.items()})
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
        by_prompt: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt, []).append(index)
        groups = [
            group[start : start + self.batch_size]
            for group in by_prompt.values()
            for start in range(0, len(group), self.batch_size)
        ]
        groups.sort(key=lambda group: max(len(rows[index]) for index in group))
        places = fill(range(len(groups)), lambda chosen: sum(len(groups[i]) for i in chosen), self.batch_size)
        return [[groups[place] for place in chosen] for chosen in places]

    def _place(self) -> None:
        """Move a model that we loaded to this process's accelerator, at the first call: by then a launcher chose it."""
        if not self._owns_device:
            return
        self._owns_device = False
        if PartialState._shared_state:
            self.model.to(PartialState().device)
        elif torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())


def _shared(rows: list[list[int]], group: list[int]) -> int:
    """Tokens that the rows of a group have in common; 0 for one row, which has nobody to share with."""
    return common_prefix_length([rows[index] for index in group]) if len(group) > 1 else 0
