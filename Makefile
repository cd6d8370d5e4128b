# make demo | test | docs | bench | clean. Each makes the environment .venv on its first call.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A launcher for 3.11 may exist without a 3.11 behind it, so each candidate is tried.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import venv' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q

.PHONY: env demo test lint docs bench clean

env: $(STAMP)

# torch comes first and pinned: a looser request made later would be free to swap the build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer (3.11 is tested) is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

demo: env
	$(BIN)/pet-finetune train options.yaml

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# -W: a warning, such as a broken reference, is an error.
docs: env
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

test: env lint docs
	$(BIN)/python -m pytest

# Side by side with metatrain; needs the sets and a checkpoint that metatrain wrote. On two cores an
# hour for the speeds, one for the time to target, one for the accuracy. Nothing else should run
# meanwhile. What has been measured is kept in BENCH_WORK, so an interrupted benchmark goes on.
BENCH_DATA ?= ../shared/data
BENCH_FOUNDATION ?= ../shared/foundation/pet-xtb-v0.ckpt
BENCH_WORK ?= runs/benchmarks
BENCH_THREADS ?= 2

bench: env
	$(BIN)/python -m benchmarks.speed --data $(BENCH_DATA) --work $(BENCH_WORK)/speed \
		--threads $(BENCH_THREADS)
	$(BIN)/python -m benchmarks.time_to_target --data $(BENCH_DATA) \
		--foundation $(BENCH_FOUNDATION) --work $(BENCH_WORK)/time-to-target \
		--threads $(BENCH_THREADS)
	$(BIN)/python -m benchmarks.accuracy --data $(BENCH_DATA) --foundation $(BENCH_FOUNDATION) \
		--work $(BENCH_WORK) --threads $(BENCH_THREADS)

clean:
	rm -rf $(VENV) docs/_build docs/options.md runs build dist .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
