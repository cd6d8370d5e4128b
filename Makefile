# make demo | check | test | docs | bench | clean. Each makes the environment .venv on its first call.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A launcher for 3.11 may exist without a 3.11 behind it, so each candidate is tried.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import venv' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q

.PHONY: env demo lint docs check check-unit check-contract check-runs test test-whole test-unit \
	test-contract test-plain test-avx2 bench clean

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

# One thread each, two processes at a time: on two cores that takes half as long as two threads,
# which so small tensors leave idle. The output of each group comes when it ends.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TWO := $(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target

# The fast lane, for while one works: under three minutes on two cores.
check: env
	@+$(TWO) lint check-contract check-unit check-runs

# Of about the same length as the others, so that both cores are busy to the end.
RUNS := $(addprefix tests/unit/,committee dynamics model training)

check-unit: env
	$(PYTEST) -m "not slow" tests/unit $(addprefix --ignore=,$(RUNS))

check-runs: env
	$(PYTEST) -m "not slow" $(RUNS)

check-contract: env
	$(PYTEST) -m "not slow" tests/contract

# Everything, some twelve minutes on two cores (and two or three more where kernels are yet to be
# compiled). The longest groups come first, so that both cores are busy to the end.
test: env
	@echo "Lint, documentation and five groups of tests, two at a time; each is shown when it ends."
	@+$(TWO) test-whole test-unit test-contract test-avx2 test-plain lint docs

test-whole: env
	$(PYTEST) --ignore=tests/unit --ignore=tests/contract

test-unit: env
	$(PYTEST) tests/unit

test-contract: env
	$(PYTEST) tests/contract

# The quick tests of what computes, once without the fused kernels and once as on a processor that
# has AVX2 and no AVX-512, which adds numbers up in another order. Graphs of the network consist of
# torch's own operations either way.
COMPUTES := $(addprefix --ignore=tests/,contract/test_compiled_step.py \
	contract/test_exported_models.py unit/model/test_scripted.py unit/model/test_traced.py) \
	tests/contract $(wildcard $(addprefix tests/unit/,nn model backends adapters \
	committee test_calculator*.py))

test-plain: env
	PET_FINETUNE_KERNELS=off $(PYTEST) -m "not slow" $(COMPUTES)

test-avx2: env
	@if grep -qsw avx2 /proc/cpuinfo && command -v "$${CXX:-c++}" >/dev/null; then set -x; \
	PET_FINETUNE_KERNELS=require PET_FINETUNE_KERNELS_MARCH=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) -m "not slow" \
	$(COMPUTES); \
	else echo "No AVX2 or no compiler here: the tests with AVX2 alone are left out."; fi

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
