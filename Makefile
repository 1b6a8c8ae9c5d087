# Everything from a fresh clone: needs Python 3.10 or newer, a C++ compiler and make. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
MAX_JOBS ?= 2
export MAX_JOBS

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
BUILD_INPUTS = setup.py build_config.py pyproject.toml MANIFEST.in $(shell find csrc -type f)

.DEFAULT_GOAL = help
.PHONY: help test demo bench clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "usage: make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)] [TORCH=$(TORCH)] [MAX_JOBS=$(MAX_JOBS)]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/.built-test  ## set up and run the whole test suite (PYTEST_ARGS are passed on)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: $(VENV)/.built-examples  ## set up and train both examples: PPO on a token-level task, PPO on CartPole
	$(BIN)/python examples/ppo_lm.py
	$(BIN)/python examples/ppo_cartpole.py

bench: $(VENV)/.built-bench  ## set up and run the benchmarks
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist python/*.egg-info python/fused_critic/*.so python/fused_critic/_build_stamp.py

# Each stamp is made anew when what it depends on is newer, so a second call installs nothing and a changed source is built again.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77.0.3" wheel ninja
	@echo "installing $(TORCH)"
	$(PIP) install --quiet "$(TORCH)" numpy
	@touch $@

# fused_critic with one group of extras.
$(VENV)/.built-%: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "building fused_critic"
	$(PIP) install --quiet --no-build-isolation --editable ".[$*]"
	$(BIN)/python -m fused_critic info
	@touch $@
