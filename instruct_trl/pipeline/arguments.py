"""The arguments that recipes share, and how they are read: a YAML, strict about its keys, under the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from os.path import expanduser
from pathlib import Path
from typing import Any

from instruct_trl.pipeline.bounds import check_sampling, require_at_least
from instruct_trl.redaction import redact


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it is written, and every setting with its default."""


@dataclass
class RunArguments:
    """Where a run lives, and a user's own data."""

    run_dir: str = field(
        default="outputs/demo", metadata={"help": "Folder of the whole run; each stage has a folder in it."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Own data: a hub name, a folder, or a json, jsonl, csv or parquet file. Default: the demo's."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Default: test, else validation or its like, where there is one."},
    )
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads torch may use on a CPU. Default: all cores, shared among processes."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the memory this run will need, by role and kind, against the device's, and stop. Reads the "
            "models' config.json alone: nothing is downloaded, loaded or written."
        },
    )
    device_memory_gb: float | None = field(
        default=None, metadata={"help": "With --dry_run: plan for a GPU with this memory. Default: the device here."}
    )

    @property
    def run(self) -> Path:
        return Path(self.run_dir)

    @property
    def config_folder(self) -> Path:
        """Where this run's YAMLs lie: the folder of `--config`, set by `parse_recipe`."""
        return getattr(self, "_config_folder", default_config("ppo_ptx").parent)

    @property
    def demo_model(self) -> Path | None:
        """Where the config of the demo's model lies, on the demo's data: a dry run does not download the model."""
        return default_config("sft").parent / "base" if self.dataset_name is None else None

    def folder(self, stage: str) -> Path:
        """`--output_dir`, or the stage's folder in the run."""
        return Path(getattr(self, "output_dir", None) or self.run / stage)

    def __post_init__(self) -> None:
        from instruct_trl.pipeline.cpu import use_cpu_well

        check_sampling(self)
        require_at_least(self, cpu_threads=1)
        use_cpu_well(self.cpu_threads)


def parse_recipe(dataclass_types: tuple, recipe: str, description: str, argv: list[str] | None = None) -> tuple:
    """Parse `--config` and the command line; without `--config`, the YAML of the demo.

    Args:
        dataclass_types: what the keys may name.
        recipe: the recipe's name; `demo/<recipe>.yaml` beside the recipes is its default.
        description: for `--help`.
        argv: arguments, default the command line's.

    A `~` that begins a path is the home, whether a shell expanded it or not.

    Raises:
        ValueError: the config file does not exist, is no mapping in YAML, or holds a key that nothing knows.
    """
    from trl import TrlParser

    quiet_upstream()
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in argv:
        argv = ["--config", str(default_config(recipe)), *argv]
    place = argv.index("--config") + 1
    if place == len(argv):
        raise ValueError("--config names no file. Give it a YAML file, or leave it out.")
    config = Path(argv[place]).expanduser()
    argv[place] = str(config)
    parser = TrlParser(
        dataclass_types,
        prog=f"recipes/{recipe}.py",
        usage=f"accelerate launch recipes/{recipe}.py [--config FILE.yaml] [--setting VALUE ...]",
        description=f"{description.strip()}\n\nDefaults shown are those of {config}.",
        formatter_class=_HelpFormatter,
    )
    if not config.is_file():
        raise ValueError(f"The config {config} does not exist. Recipes have theirs in {default_config(recipe).parent}.")
    known = {action.dest for action in parser._actions} | {"env"}
    settings = read_yaml(config, known)
    if not settings:  # TRL's parser wants a mapping
        del argv[place - 1 : place + 1]
    try:
        parsed = parser.parse_args_and_config(argv)
    except ValueError as error:
        raise ValueError(redact(str(error))) from None
    _expand_home(parsed)
    parsed[0]._config_folder = config.parent
    _load_as_asked(parsed)
    _tokens_to_environment(parsed)
    return parsed


def _loader_of_keys_once() -> Any:
    """YAML's safe loader, which refuses a key that comes twice; of two it would take the last and say nothing."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    problem = f"the key {key!r} comes twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.value[place][0].start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def load_yaml(path: Path) -> Any:
    """The content of a YAML file; None if it is empty.

    Raises:
        ValueError: it is not UTF-8 or no YAML; names file and, where known, line.
    """
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), _loader_of_keys_once())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ValueError(f"{path}{line}: broken YAML, {problem}. Write one `key: value` per line.") from error


def read_yaml(path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty one if the file is empty or not there.

    Raises:
        ValueError: as `load_yaml`; or it holds a list or a bare word, or a key that is none of `known`.
    """
    content = load_yaml(path) if path.exists() else None
    if not isinstance(content, dict | None):
        kind = "a list" if isinstance(content, list) else f"the value {redact(repr(content))}"
        raise ValueError(f"{path} holds {kind} where settings should be. Write one `key: value` per line.")
    for key in content or {}:
        if known is not None and key not in known:
            close = get_close_matches(str(key), known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    return content or {}


def _expand_home(parsed: tuple) -> None:
    """`~/…` in a YAML, or after `=`, where no shell expands it, means what it means on a command line."""
    for part in parsed:
        for item in fields(part):
            value = getattr(part, item.name)
            if isinstance(value, str) and value.startswith("~"):
                setattr(part, item.name, expanduser(value))
            elif isinstance(value, list) and any("~" in str(entry) for entry in value):  # of paths, or of NAME=PATH
                setattr(part, item.name, ["=".join(map(expanduser, str(entry).split("=", 1))) for entry in value])


def _load_as_asked(parsed: tuple) -> None:
    """What ModelConfig says on loading goes where trainers read it; `model_init_kwargs` given beside it wins."""
    from trl import ModelConfig

    names = {"dtype": "dtype", "revision": "model_revision", "attn_implementation": "attn_implementation"}
    models = [part for part in parsed if isinstance(part, ModelConfig)]
    trainings = [part for part in parsed if hasattr(part, "model_init_kwargs")]
    for model, args in zip(models, trainings, strict=False):
        asked = {name: getattr(model, field) for name, field in names.items()}
        asked = {name: value for name, value in asked.items() if value != getattr(ModelConfig, names[name])}
        args.model_init_kwargs = asked | (args.model_init_kwargs or {}) or args.model_init_kwargs


def _tokens_to_environment(parsed: tuple) -> None:
    """A hub token goes where huggingface_hub looks for it: trainers write their arguments beside every model."""
    for part in parsed:
        loading = getattr(part, "model_init_kwargs", None)
        token = getattr(part, "hub_token", None)
        if isinstance(loading, dict) and isinstance(loading.get("token"), str):
            token = token or loading["token"]
            if token == loading["token"]:
                part.model_init_kwargs = {name: value for name, value in loading.items() if name != "token"}
        if token:
            os.environ["HF_TOKEN"] = token
            if hasattr(part, "hub_token"):
                part.hub_token = None


def quiet_upstream() -> None:
    """Leave out bars that last a blink and warnings of what upstream will rename: a run's own lines are to be seen."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in ("transformers", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def default_config(recipe: str) -> Path:
    """The demo's YAML of a recipe."""
    from importlib.util import find_spec

    spec = find_spec("instruct_trl.recipes")
    if spec is None or spec.origin is None:
        raise ValueError("instruct_trl is installed without its recipes. Install it again: pip install .")
    return Path(spec.origin).parent / "demo" / f"{recipe}.yaml"


def settings_of(*parts: Any) -> dict[str, Any]:
    """What a stage's output depends on: the settings that differ from their defaults, less the run's own paths."""
    from dataclasses import MISSING

    volatile = {
        "output_dir",
        "logging_dir",
        "run_dir",
        "cpu_threads",
        "dry_run",
        "device_memory_gb",
        "resume_from_checkpoint",
        "report_to",
        "run_name",
        "other_runs",
    }
    volatile |= {"disable_tqdm", "local_rank", "push_to_hub", "hub_token", "hub_model_id", "trackio_space_id"}
    settings = {}
    for part in parts:
        for item in fields(part):
            value = getattr(part, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.init and item.name not in volatile and value != default:
                settings[item.name] = value
    return settings
