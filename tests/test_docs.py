"""The documents say what is there: paths, links, code blocks, names, requirements."""

import ast
import importlib
import inspect
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import instruct_trl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER_MAP = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]


def code_blocks(text, language):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fences if name == language]


def anchors(path):
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_resolves(document):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


PYTHON_BLOCKS = code_blocks(README, "python")


def test_the_readme_shows_each_trainer():
    text = "\n".join(PYTHON_BLOCKS)
    for name in ("PPOPtxTrainer", "RankingRewardTrainer", "InstructSFTTrainer", "RewardScorer"):
        assert f"{name}(" in text


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=range(len(PYTHON_BLOCKS)))
def test_a_code_block_compiles_and_calls_us_with_arguments_that_we_take(block):
    calls = [
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    ours = [call for call in calls if call.func.id in instruct_trl.__all__]
    assert ours
    for call in ours:
        signature = inspect.signature(getattr(instruct_trl, call.func.id))
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    lines = [line for line in block.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 12


def test_the_commands_name_recipes_yamls_and_settings_that_exist():
    commands = (
        "\n".join(code_blocks((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), ""))
        .replace("\\\n", " ")
        .replace("$P", "recipes/paper")
    )
    lines = [line for line in commands.splitlines() if line.startswith("accelerate launch")]
    launches = [line.split() for line in lines if "--config mine/" not in line]  # which its reader has yet to write
    assert len(launches) == 7
    for _, _, recipe, *rest in launches:
        config = rest[rest.index("--config") + 1]
        known = yaml.safe_load((ROOT / config).read_text(encoding="utf-8")).keys() | {"config", "output_dir"}
        assert (ROOT / recipe).is_file()
        assert {word[2:] for word in rest if word.startswith("--")} <= known


def test_the_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [line for line in project["dependencies"] if f"`{line}`" not in README] == []
    assert f"Python {project['requires-python'].replace('>=', '≥ ')}" in README
    for extra in re.findall(r'pip install "\.\[(\w+)\]"', README):
        assert extra in project["optional-dependencies"]


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named = re.findall(r"`make ([\w-]+)`", text) + re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE)
        assert set(named) <= set(targets)


def test_every_name_of_the_paper_map_is_in_the_code():
    missing = []
    for module, names in re.findall(r"`([\w.]+):(\w+(?:\.\w+)*)`", PAPER_MAP):
        found = importlib.import_module(f"instruct_trl.{module}")
        for name in names.split("."):
            found = getattr(found, name, None)
        if found is None:
            missing.append(f"{module}:{names}")
    for config, name in re.findall(r"`(\w+Config)\.(\w+)`", PAPER_MAP):
        kind = getattr(instruct_trl, config)
        if name not in {item.name for item in fields(kind)} and not isinstance(getattr(kind, name, None), property):
            missing.append(f"{config}.{name}")
    assert missing == []


def test_every_test_of_the_paper_map_is_there():
    named = re.findall(r"`(test_\w+)::(\w+)`", PAPER_MAP)
    assert len(named) > 40
    missing = []
    for file, test in named:
        text = next(ROOT.glob(f"tests/**/{file}.py")).read_text(encoding="utf-8")
        if not re.search(rf"^ *def {test}\(", text, re.MULTILINE):
            missing.append(f"{file}::{test}")
    assert missing == []


def test_every_yaml_key_of_the_paper_map_is_in_the_papers_yamls():
    named = re.findall(r"`(\w+\.yaml): (\w+)`", PAPER_MAP)
    assert len(named) > 40
    assert [key for file, key in named if key not in yaml.safe_load((ROOT / "recipes/paper" / file).read_text())] == []


def test_every_line_of_the_papers_yamls_says_where_it_comes_from_or_belongs_to_a_group():
    # Bare are only: where the run goes, trackers, the second half of a batch size, a repeated saving rule.
    bare = set()
    for path in ROOT.glob("recipes/paper/*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        bare |= {line.split(":")[0] for line in lines if line and "#" not in line}
    assert bare <= {
        "run_dir",
        "report_to",
        "gradient_accumulation_steps",
        "save_strategy",
        "save_total_limit",
        "eval_strategy",
    }


def test_deviations_are_numbered_without_gaps_and_every_reference_has_one():
    numbers = [int(n) for n in re.findall(r"^- \*\*D(\d+)\.", PAPER_MAP, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    body = PAPER_MAP.split("## Deviations")[0]
    referenced = {int(n) for n in re.findall(r"\bD(\d+)\b", body)}
    assert referenced == set(numbers)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
