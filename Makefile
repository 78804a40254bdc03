# make demo   set up and run the main job on the embedded default
# make test   set up and run the tests
# make docs   the documents as a site, in build/docs
# make check  format, lint, types, package, documents, tests: what a change has to pass

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-positive demo-negative test test-gpu stress zoo check lint types package matrix format embedded bench bench-gpu scaling docs-outputs install clean

install: $(READY)

# The program alone, which is all that the demo needs.
$(RUNS): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $(RUNS)

$(READY): $(RUNS)
	$(PIP) -e ".[dev]"
	touch $(READY)

# Two runs beside each other, a thread each: on two cores that takes a quarter less than one after the other.
# 96 steps instead of 128 end equally well or a little further from the reference (tests/benchmarks/STUDY.md).
demo: $(RUNS)
	@mkdir -p demo
	@$(MAKE) --jobs=2 --no-print-directory demo-positive demo-negative
	@cat demo/ppo-bad.txt
	$(BIN)/ppo-cli compare demo/ppo-good demo/ppo-bad
	$(BIN)/ppo-cli plot demo/ppo-good demo/ppo-bad --output demo/training.png
	$(BIN)/ppo-cli plot demo/ppo-good demo/ppo-bad --terminal --metric env/reward_mean

demo-positive:
	OMP_NUM_THREADS=1 $(BIN)/ppo-cli train --sentiment positive --steps 96 --output demo/ppo-good --overwrite

demo-negative:
	OMP_NUM_THREADS=1 $(BIN)/ppo-cli train --sentiment negative --steps 96 --output demo/ppo-bad --overwrite --quiet > demo/ppo-bad.txt

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

# What only a CUDA GPU can show: the other tests do not look at it.
test-gpu: $(READY)
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest tests/test_gpu.py

# Kills a training run at 50 random instants and resumes it; minutes.
# make stress SETTINGS=all KILLS=5 does so with other settings, SETTINGS=adapter,rollback with those.
stress: $(READY)
	$(BIN)/python tests/stress/kill.py $(if $(SETTINGS),--settings $(SETTINGS)) $(if $(KILLS),--kills $(KILLS))

# Trains a tiny model of every causal family that transformers has; seven minutes.
zoo: $(READY)
	$(BIN)/python tests/stress/zoo.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The package, and the Python examples of the README and docs/ as their readers would write them.
types: $(READY)
	$(BIN)/mypy
	$(BIN)/python tests/readme_types.py

# Builds wheel and sdist into dist/, checks what they hold, and trains a step with the wheel alone.
package: $(READY)
	$(BIN)/python tests/package.py

.PHONY: docs docs-links

# Builds the documents into build/docs as a site; a warning, such as of a dead link, is an error.
docs: $(READY)
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs
	@echo "the site is at build/docs/index.html"

# Asks every address that the documents link to.
docs-links: $(READY)
	$(BIN)/python -m sphinx --builder linkcheck --quiet docs build/docs-links

# Runs the tests with the lowest and the newest versions that pyproject.toml allows; minutes to hours.
# make matrix MATRIX="--pin torch==2.13.0 tests/ppo" picks a build of torch and some of the tests.
matrix: $(READY)
	$(BIN)/python tests/matrix.py $(MATRIX)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint types package docs test

# Rebuilds the embedded models from a seed and checks their quality.
embedded: $(READY)
	$(BIN)/python -m ppo_cli.data.embedded.build

# Makes the outputs and pictures of README.md and docs/ anew from real runs: ten minutes on two cores.
docs-outputs: $(READY)
	$(BIN)/python docs/make_outputs.py

# make bench PEER=/path/to/python compares with TRL 0.11.4 installed there; SHORT=1 takes minutes.
bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py $(if $(PEER),--peer $(PEER)) $(if $(SHORT),--short)

# What a CUDA GPU does in a batch, and how often it is waited for.
bench-gpu: $(READY)
	$(BIN)/python tests/benchmarks/gpu_profile.py gpt2 32 bf16

scaling: $(READY)
	$(BIN)/python tests/benchmarks/scaling.py

clean:
	rm -rf $(VENV) .matrix build dist demo .pytest_cache .mypy_cache .ruff_cache
