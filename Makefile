# Everything from a fresh clone: needs Python 3.10 or newer, a C++ compiler and make. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
MAX_JOBS ?= 2
export MAX_JOBS

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
BUILD_INPUTS = setup.py build_config.py pyproject.toml MANIFEST.in $(shell find csrc -type f)

.DEFAULT_GOAL = help
.PHONY: help test test-trainers test-cuda lint wheel check-wheel demo bench docs clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "usage: make TARGET [PYTHON=$(PYTHON)] [VENV=$(VENV)] [TORCH=$(TORCH)] [MAX_JOBS=$(MAX_JOBS)]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/.built-test  ## set up and run the test suite but the real trainers (PYTEST_ARGS are passed on)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-trainers: $(VENV)/.built-trainers  ## set up and run the real trainers, with their own critic and with ours
	$(BIN)/python -m pytest tests/trainers $(PYTEST_ARGS)

# On a CUDA build of torch without its CUDA libraries; tests/fakecuda stands in for the CUDA runtime. Needs nvcc. The audit of the kernels
# wants every architecture, PTX for the simulated cards, and what ptxas says.
CUDA_BUILD = build/simulated
SIMULATOR = PYTHONPATH=tests/fakecuda FAKECUDA_CACHE=$(abspath $(CUDA_BUILD))/fakecuda $(CUDA_VENV)/bin/python -m fakecuda

test-cuda: $(CUDA_VENV)/.built  ## set up, build for CUDA and run the suite on device cuda, on a simulated GPU (needs nvcc)
	FAKECUDA_CACHE=$(abspath $(CUDA_BUILD))/fakecuda $(CUDA_VENV)/bin/python tests/simulate.py --log $(CUDA_BUILD)/build.log \
	  --library "$$(echo $(CUDA_VENV)/lib/python*/site-packages/fused_critic/_C*.so)" --reports $(CUDA_BUILD)/reports $(SIMULATE_ARGS)

$(CUDA_VENV)/.torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(CUDA_VENV)/bin/python -m pip install --quiet --group test-cuda
	@echo "installing $(CUDA_TORCH) without the CUDA libraries"
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps "$(CUDA_TORCH)"
	@touch $@

# Installed, not editable: the checkout's own library is the CPU's. What ptxas says is appended, since a second build compiles only what changed.
$(CUDA_VENV)/.built: $(CUDA_VENV)/.torch $(BUILD_INPUTS) $(shell find python -name '*.py*' -not -name '*.pyc' -not -name _build_stamp.py)
	@echo "building fused_critic for CUDA"
	@mkdir -p $(CUDA_BUILD) && rm -f $(CUDA_BUILD)/*.whl
	FUSED_CRITIC_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST="7.5+PTX;8.0+PTX;8.6;8.9;9.0;10.0;12.0" NVCC_APPEND_FLAGS=-Xptxas=-v $(SIMULATOR) run -- \
	  $(abspath $(CUDA_VENV))/bin/python -m pip wheel --verbose --no-build-isolation --no-deps --wheel-dir $(CUDA_BUILD) . \
	  >>$(CUDA_BUILD)/build.log 2>&1 || { tail -n 100 $(CUDA_BUILD)/build.log; exit 1; }
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall $(CUDA_BUILD)/*.whl
	@touch $@

lint: $(VENV)/.tools-lint  ## set up and run ruff and mypy; nothing is compiled
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both are made from this folder, so that the wheel reuses the objects in build/. torch's libraries and the CUDA runtime, which torch brings, stay
# outside of the wheel. The platform tag is the oldest glibc that the library runs on: of the compiler and the libc that are used here.
wheel: $(VENV)/.tools-packaging  ## set up, build sdist and wheel into dist/, audit and check them
	rm -rf dist build/dist build/lib.* build/bdist.*
	$(BIN)/python -m build --no-isolation --sdist --wheel --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --exclude 'libcudart.so.*' build/dist/*.whl
	cp build/dist/*.tar.gz dist
	$(BIN)/twine check --strict dist/*
	@ls -l dist

check-wheel: wheel  ## install the wheel of dist/ beside torch in a fresh environment, and check it there
	rm -rf build/wheel-venv
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --upgrade pip
	build/wheel-venv/bin/python -m pip install --quiet "$(TORCH)" numpy dist/*.whl
	build/wheel-venv/bin/python -m pip check
	cd build && wheel-venv/bin/python -m fused_critic check --quick --report wheel-check.json

demo: $(VENV)/.built-examples  ## set up and train both examples: PPO on a token-level task, PPO on CartPole
	$(BIN)/python examples/ppo_lm.py
	$(BIN)/python examples/ppo_cartpole.py

bench: $(VENV)/.built-bench  ## set up and run the benchmarks, five minutes (BENCH_ARGS are passed on)
	$(BIN)/python -m benchmarks --fetch $(BENCH_ARGS)

# Neither torch nor the package is needed: docstrings are read from the sources.
docs: $(VENV)/.docs  ## set up and build the documentation, build/site/index.html; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --group docs
	@touch $@

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(CUDA_VENV) $(CUDA_VENV)-full build dist python/*.egg-info python/fused_critic/*.so python/fused_critic/_build_stamp.py

# Each stamp is made anew when what it depends on is newer, so a second call installs nothing and a changed source is built again.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip "setuptools>=77.0.3" wheel ninja
	@echo "installing $(TORCH)"
	$(PIP) install --quiet "$(TORCH)" numpy
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >$@

# The tools of one dependency group.
$(VENV)/.tools-%: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --group $*
	@touch $@

# fused_critic with one group of extras. The stamp of torch holds its version, which no dependency of the extras may change.
$(VENV)/.built-%: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "building fused_critic"
	$(PIP) install --quiet --no-build-isolation --constraint $(VENV)/.torch --editable ".[$*]"
	$(BIN)/python -m fused_critic info
	@touch $@
