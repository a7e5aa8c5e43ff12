"""The recipes: the stages of InstructGPT, each one command."""

from pathlib import Path

EXAMPLE = Path(__file__).parent / "demo"
"""The folder of the YAMLs that recipes read without `--config`."""
