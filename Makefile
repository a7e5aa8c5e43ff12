# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv first.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN     = .venv/bin
# Test files at a time, in the order of their folders: the longest come early. A test computes on one thread.
JOBS   ?= 2
PYTEST  = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-long evidence evidence-full evidence-gpu test test-fast test-slow check docs docs-links format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch .venv/installed

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch .venv/installed-dev

## The whole pipeline on a real model and real text, 15 to 30 minutes on 2 cores; ends in outputs/demo/report.html
demo: .venv/installed
	$(BIN)/accelerate launch recipes/ppo_ptx.py

## The same nearer to the paper, one to two hours, resumable: run it again after an interruption
demo-long: .venv/installed
	$(BIN)/accelerate launch recipes/ppo_ptx.py --config recipes/demo_long/ppo_ptx.yaml

## The paper's claims 1, 2, 3, 5, 8, 9 in miniature, 3 seeds each: table and pictures. Resumable
evidence: .venv/installed
	$(BIN)/python -m benchmarks.evidence --jobs 2

## Every claim, hours; resumable, and what `make evidence` made is used again
evidence-full: .venv/installed
	$(BIN)/python -m benchmarks.evidence --jobs 2 --all

## The same with SmolLM2-135M and larger sizes, for one GPU
evidence-gpu: .venv/installed
	$(BIN)/python -m benchmarks.evidence --all --large

## The whole test suite
test: .venv/installed-dev
	$(PYTEST)

## Without the tests that launch recipes or processes
test-fast: .venv/installed-dev
	$(PYTEST) -m "not slow"

## Only those
test-slow: .venv/installed-dev
	$(PYTEST) -m slow

## Format, lint, types, fast tests
check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test-fast

## The documentation as a site, in build/docs/index.html. Strict: a broken link or reference is an error. Needs no network
docs: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

## Whether the links to other sites still lead somewhere. Needs the network
docs-links: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/sphinx-build -b linkcheck --quiet docs build/links

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist *.egg-info
