"""The settings of a recipe: a YAML file, strict about its keys, under the command line."""

from __future__ import annotations

import argparse
import atexit
import ctypes
import math
import os
import platform
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from os.path import expanduser
from pathlib import Path
from typing import Any

from instruct_trl.pipeline.stage import INPUTS
from instruct_trl.redaction import redact

# Settings that belong to the data of a YAML with a preparing step. They do not go with other data.
OF_THE_DATA = {*INPUTS, "prepare", "run_dir", "labeler", "labeler_description", "pretraining_description", "deviations"}
# Settings on which no result depends.
_VOLATILE = {
    *("output_dir", "logging_dir", "run_dir", "run_name", "prepare", "other_runs", "resume_from_checkpoint"),
    *("labeler_description", "pretraining_description", "deviations", "dry_run", "device_memory_gb", "cpu_threads"),
    *("report_to", "disable_tqdm", "local_rank", "push_to_hub", "hub_token", "hub_model_id", "trackio_space_id"),
    *("learning_curve", "control"),  # their models are stages of their own
}


def setting(default: Any, text: str) -> Any:
    """A field of an argument dataclass: its default and its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    """Where a run lives, and its data. `{run_dir}` in a setting stands for the run's folder."""

    run_dir: str = setting("outputs/run", "Folder of the whole run; each stage has a folder in it.")
    dataset_name: str | None = setting(None, "A hub name, a folder, or a json, jsonl, csv or parquet file.")
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.")
    dataset_train_split: str = setting("train", "Split to train on.")
    dataset_test_split: str | None = setting(
        None, "Split to evaluate on. Default: test, or else validation or a similar name."
    )
    prepare: str | None = setting(
        None,
        "'module:function' that writes the run's data. It is called once with the folder <run_dir>/data, and with the "
        "settings in data.yaml beside the config, if there is one.",
    )
    cpu_threads: int | None = setting(
        None, "Threads that torch uses on a CPU. Default: all cores, shared among processes."
    )
    dry_run: bool = setting(
        False,
        "Print the memory that this run needs and the memory that the device has, then stop. Only config.json of each "
        "model is read; no weights are downloaded or loaded, and nothing is written.",
    )
    device_memory_gb: float | None = setting(
        None, "With --dry_run: plan for a GPU with this memory. Default: the device here."
    )
    config_folder: Path = field(init=False, default=Path())
    """The folder of the YAML."""
    own_data: bool = field(init=False, default=False)
    """Whether the command line names another dataset than the YAML."""
    given_seed: int | None = field(init=False, default=None)
    """The command line's `--seed`, if it has no `--output_dir`: the seed of all stages that are still missing."""

    def __post_init__(self) -> None:
        require_at_least(self, cpu_threads=1)

    @property
    def run(self) -> Path:
        return Path(self.run_dir)

    @property
    def reward_path(self) -> str:
        """The reward model: the one named, or else the run's own."""
        return getattr(self, "reward_model_path", None) or str(self.run / "reward_model")

    def folder(self, stage: str) -> Path:
        """`--output_dir`, or the stage's folder in the run."""
        return Path(getattr(self, "output_dir", None) or self.run / stage)

    def models(self, name: str | None, *stages: str) -> list[str | Path | None]:
        """The models that a dry run may plan with: the one named, those that stages left, `base` beside the YAML.

        A model that the run makes itself may not be there yet. Until then base/config.json tells its size.
        """
        made_here = name is not None and Path(name).is_relative_to(self.run)
        return [Path(str(name)) if made_here else name, *(self.run / s for s in stages), self.config_folder / "base"]


@dataclass
class SamplingArguments(RunArguments):
    """How answers are sampled."""

    max_completion_length: int = setting(1024, "Longest answer in tokens (paper: 1k).")
    temperature: float = setting(1.0, "Sampling temperature.")
    batch_size: int = setting(64, "Answers sampled at once.")
    output_dir: str | None = setting(None, "Folder of the output. Default: the stage's in <run_dir>.")
    bf16: bool = setting(False, "Sample and score under bf16 autocast.")
    seed: int = setting(0, "Seed of the sampling, the same for every model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, max_completion_length=1, batch_size=1, temperature=0.0)

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings that decide how much memory sampling needs."""
        names = ("batch_size", "max_completion_length", "bf16", "device_memory_gb")
        return {name: getattr(self, name) for name in names}

    @property
    def drawn(self) -> dict[str, Any]:
        """How answers are drawn, as arguments of `generate_completions` and those who call it."""
        names = ("temperature", "batch_size", "seed")
        return {"max_new_tokens": self.max_completion_length} | {name: getattr(self, name) for name in names}


def require_at_least(settings: Any, **least: float) -> None:
    """Refuse settings below their least value; an int asks for a whole number. None, a setting left open, passes."""
    for name, low in least.items():
        value = getattr(settings, name)
        kind: Any = Integral if isinstance(low, int) else Real
        right = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value >= low
        if value is not None and not right:
            what = "a whole number" if kind is Integral else "a number"
            raise ValueError(f"--{name} is {value!r}; it must be {what}, at least {low}.")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as it is written, and every setting with its default."""


def parse_recipe(
    dataclass_types: tuple,
    recipe: str,
    description: str,
    argv: Sequence[str] | None = None,
    default: Path | None = None,
) -> tuple:
    """Read a YAML and the command line, which goes before it.

    A YAML with a preparing step describes one whole example. Where the command line names another dataset, the YAML's
    other data, its models, its labeler and its folder are left out (`OF_THE_DATA`).

    Args:
        dataclass_types: the settings; the first is a `RunArguments`.
        recipe, description: its name and docstring, for the help.
        argv: arguments; by default the command line's.
        default: the YAML that is read without `--config`.
    """
    from trl import TrlParser

    quiet_upstream()
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config", nargs="?", const="")
    given, rest = peek.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    if given.config == "":
        raise ValueError("--config names no file. Give it a YAML file, or leave it out.")
    config = Path(given.config).expanduser() if given.config else default
    if config is not None and not config.is_file():
        raise ValueError(f"The config {config} does not exist. Check the path.")
    parser = TrlParser(
        dataclass_types,
        prog=f"recipes/{recipe}.py",
        usage=f"accelerate launch recipes/{recipe}.py [--config FILE.yaml] [--setting VALUE ...]",
        description=f"{description.strip()}\n\nThe defaults shown are those of {config or 'the code'}.",
        formatter_class=_HelpFormatter,
    )
    settings = read_yaml(config, {action.dest for action in parser._actions} | {"env"}) if config else {}
    for name in ("dataset_name", "seed", "output_dir"):
        peek.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?")
    peeked = peek.parse_known_args(rest)[0]
    named = peeked.dataset_name
    own_data = named is not None and named != settings.get("dataset_name")
    borrowed = own_data and bool(settings.get("prepare"))
    if borrowed:
        settings = {name: value for name, value in settings.items() if name not in OF_THE_DATA}
    os.environ.update({name: str(value) for name, value in (settings.pop("env", None) or {}).items()})
    parser.set_defaults_with_config(**settings)
    parsed = _parse(parser, rest)
    run = parsed[0]
    if borrowed and not run.dry_run:
        print(f"Settings: those of {config}, made for other data and another model. --config names your own.")
    run.own_data, run.config_folder = own_data, config.parent if config else Path()
    run.given_seed = None if peeked.seed is None or peeked.output_dir is not None else int(peeked.seed)
    _fill_in_places(parsed, expanduser(run.run_dir))
    _load_as_asked(parsed)
    _tokens_to_environment(parsed)
    use_cpu_well(run.cpu_threads)
    atexit.register(_leave_process_group)
    return parsed


def _parse(parser: Any, argv: list[str]) -> tuple:
    """The dataclasses, with bf16 off on a CPU that has no instructions for it. A dry run plans for another device."""
    try:
        parsed = parser.parse_args_into_dataclasses(argv)
        if any(getattr(part, "bf16", False) for part in parsed) and not parsed[0].dry_run and bf16_is_emulated():
            print("bf16 is off: this CPU computes bfloat16 in software, many times slower than float32.", flush=True)
            parsed = parser.parse_args_into_dataclasses([*argv, "--bf16", "false"])
        return parsed
    except ValueError as error:
        raise ValueError(redact(str(error))) from None


def _leave_process_group() -> None:
    """Close the group of a launched run. Its threads, left open, can abort the exit of a busy machine (SIGABRT)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def read_yaml(path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty one if the file is empty or not there."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice. YAML's own loader would take the last one and say nothing."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    problem = f"the key {key!r} comes twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.value[place][0].start_mark)
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader) if path.exists() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise ValueError(f"{path}{line}: broken YAML, {problem}. Write one `key: value` per line.") from error
    if not isinstance(content, dict | None):
        kind = "a list" if isinstance(content, list) else f"the value {redact(repr(content))}"
        raise ValueError(f"{path} holds {kind} where settings should be. Write one `key: value` per line.")
    for key in content or {}:
        if known is not None and key not in known:
            close = get_close_matches(str(key), known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    return content or {}


def _fill_in_places(parsed: tuple, run_dir: str) -> None:
    """`~` becomes the home, which no shell did in a YAML or after `=`; `{run_dir}` becomes the run's folder."""

    def place(text: str) -> str:
        return expanduser(text).replace("{run_dir}", run_dir)

    for part in parsed:
        for item in fields(part):
            value = getattr(part, item.name)
            if isinstance(value, str):
                setattr(part, item.name, place(value))
            elif isinstance(value, list) and all(isinstance(entry, str) for entry in value):  # paths, or NAME=PATH
                setattr(part, item.name, ["=".join(map(place, entry.split("=", 1))) for entry in value])


def _load_as_asked(parsed: tuple) -> None:
    """Put ModelConfig's settings of loading where trainers read them. `model_init_kwargs` goes before them."""
    from trl import ModelConfig

    names = {"dtype": "dtype", "revision": "model_revision", "attn_implementation": "attn_implementation"}
    models = [part for part in parsed if isinstance(part, ModelConfig)]
    trainings = [part for part in parsed if hasattr(part, "model_init_kwargs")]
    for model, args in zip(models, trainings, strict=False):
        asked = {name: getattr(model, of) for name, of in names.items()}
        asked = {name: value for name, value in asked.items() if value != getattr(ModelConfig, names[name])}
        args.model_init_kwargs = asked | (args.model_init_kwargs or {}) or args.model_init_kwargs


def _tokens_to_environment(parsed: tuple) -> None:
    """Move hub tokens to where huggingface_hub looks: trainers write their arguments beside every model."""
    for part in parsed:
        loading = getattr(part, "model_init_kwargs", None)
        loading = loading if isinstance(loading, dict) else {}
        token = getattr(part, "hub_token", None) or loading.get("token")
        if isinstance(token, str):
            os.environ["HF_TOKEN"] = token
            if loading.get("token") == token:
                part.model_init_kwargs = {name: value for name, value in loading.items() if name != "token"}
            if hasattr(part, "hub_token"):
                part.hub_token = None


def quiet_upstream() -> None:
    """Hide short-lived progress bars and upstream's warnings about coming changes, so that a run's lines are seen."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    for module in ("transformers", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def use_cpu_well(threads: int | None = None) -> None:
    """Use `threads`, by default this process's share of all cores, and keep freed memory in the process."""
    import torch

    # Launchers set OMP_NUM_THREADS=1, which leaves the other cores idle.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // processes))
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return
    # glibc maps each tensor above 32 MB anew: page faults and zeroed pages took a quarter of a step's time.
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        libc.mallopt(option, value)


def bf16_is_emulated() -> bool:
    """Whether this machine computes on a CPU without bf16 instructions: 10 to 100 times slower there than float32."""
    import torch

    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 cannot tell
    known = bool(capabilities) and not torch.accelerator.is_available()
    return known and not any(has for name, has in capabilities.items() if "bf16" in name)


def settings_of(*parts: Any) -> dict[str, Any]:
    """The settings that a stage's output depends on, as far as they differ from their defaults."""
    settings = {}
    for part in parts:
        for item in fields(part):
            value = getattr(part, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.init and item.name not in _VOLATILE and value != default:
                settings[item.name] = value
    return settings
