# Everything runs in .venv, which the first verb that needs it makes.
#   make PYTHON=python3.12 setup      another interpreter
#   make train ARGS="--k 5"           options of benchmarks.train
#   make test ARGS="-k checkpoint"    options of pytest

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
WITH_TRAINERS := $(VENV)/.trainers
WITH_DOCS := $(VENV)/.docs
WITH_TRANSLATION := $(VENV)/.translation
CODE   := setup.py lookbehind_fused benchmarks docs examples tests
CPP    := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc csrc/*/*.cu csrc/*/*.cuh tests/*/*.cpp)
CXX    ?= g++

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup train compare fractions lifelong translation vit test test-all trainers docs translation-tests \
	fuzz bench bench-distributed gpu-check sanitize dist-check wheel matrix check format clean

# An interpreter that was asked for by name must be the one in .venv; otherwise any that .venv has will do.
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
ifneq ($(filter command environment,$(origin PYTHON)),)
WANTED := $(or $(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null),missing)
endif
# The stamp holds the folder it was made in: a copied .venv points back to where it came from.
STATE := $(shell [ "$$(cat $(READY) 2>/dev/null)" = "$(CURDIR)" ] && $(PY) -c '$(VERSION)' 2>/dev/null)
ifeq ($(and $(STATE),$(filter $(or $(WANTED),$(STATE)),$(STATE))),)
.PHONY: $(READY)
endif

help:  ## list the verbs
	@echo "make VERB [ARGS=\"...\"] [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY)  ## make .venv and install everything into it (the second time there is nothing to do)
	@echo "$(VENV) is ready"

# Threads that wait are to sleep: where other programs share the cores, spinning ones cost ten times the time.
train compare fractions lifelong translation translation-tests vit test test-all trainers fuzz: export OMP_WAIT_POLICY ?= PASSIVE

train: $(READY)  ## compare SGD, SAM and Lookbehind, minutes; with ARGS="--k 5" a single run: ARGS="--help"
	@$(PY) -m benchmarks.train $(ARGS)

compare: $(READY)  ## compare all methods, each tuned, five seeds: an hour or two on two cores; goes on where it stopped
	@$(PY) -m benchmarks.compare $(ARGS)

fractions: $(READY)  ## compare ascents on parts of the minibatch with other ways to save gradients: ten minutes on two cores
	@$(PY) -m benchmarks.fractions $(ARGS)

lifelong: $(READY)  ## learn 20 tasks one after the other with each method: one to two CPU hours; goes on where it stopped
	@$(PY) -m benchmarks.lifelong $(ARGS)

translation: $(WITH_TRANSLATION)  ## train translators from German messages, each method tuned: an hour on two cores; goes on where it stopped
	@$(PY) -m benchmarks.transformers.translation $(ARGS)

vit: $(READY)  ## fine-tune vision transformers, each method tuned: half an hour on two cores; goes on where it stopped
	@$(PY) -m benchmarks.transformers.vit $(ARGS)

test: $(READY)  ## run what a change needs: of large tables a sample, another one each time; ARGS are pytest's
	@$(PY) -m pytest -n auto --dist loadgroup $(ARGS)

test-all: $(READY)  ## run every test: 45 CPU minutes
	@$(PY) -m pytest -n auto --dist loadgroup --all $(ARGS)

trainers: $(WITH_TRAINERS)  ## run the tests of Lightning, Fabric, Hugging Face, Accelerate, skorch, which it installs first
	@$(PY) -m pytest -n auto --dist loadgroup tests/integrations $(ARGS)

docs: $(WITH_DOCS)  ## build the documentation into build/site, which can be opened from there; no link in it may be dead
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)
	@$(PY) -m tests.docs.links build/site

translation-tests: $(WITH_TRANSLATION)  ## run the tests of translation, whose packages it installs first
	@$(PY) -m pytest -n auto --dist loadgroup tests/benchmarks/transformers $(ARGS)

fuzz: $(READY)  ## ten thousand random walks over the interface: 15 CPU minutes; ARGS="--first N" takes others
	@$(PY) -m tests.fuzz $(ARGS)

bench: $(READY)  ## measure against the reference loops and print the bounds; ARGS="--help" lists its options
	@$(PY) -m benchmarks.bench $(ARGS)

bench-distributed: $(READY)  ## measure steps of 2 and 4 processes on a slow link beside a model of their cost; minutes
	@$(PY) -m benchmarks.distributed $(ARGS)

# With PYTHON=... that interpreter as it is, so that it works where nothing can be installed: the library is built in place.
# Where that fails it is the first of the checks that fail.
gpu-check: $(if $(WANTED),,$(READY))  ## run what needs a GPU: ten minutes; PYTHON=python3 takes the PyTorch that is there; ARGS="--help" lists options
ifdef WANTED
	@$(PYTHON) setup.py -q build_ext --inplace || failed=--build-failed; \
		$(PYTHON) -m tests.gpu $$failed $(ARGS)
else
	@$(PY) -m tests.gpu $(ARGS)
endif

# -O1: what the optimizer removes, no sanitizer sees. The thread sanitizer excludes the other two.
sanitize:  ## run the C++ kernels under the address, undefined-behaviour and thread sanitizers; needs no torch
	@mkdir -p build/sanitize
	@for kind in address,undefined thread; do \
		echo "-fsanitize=$$kind"; \
		$(CXX) -std=c++17 -O1 -g -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas \
			-fno-omit-frame-pointer -fsanitize=$$kind -fno-sanitize-recover=all \
			csrc/sanitize/main.cpp csrc/cpu/*.cpp -o build/sanitize/$$kind -pthread && \
			TSAN_OPTIONS=halt_on_error=1 build/sanitize/$$kind || exit 1; \
	done

dist-check: $(READY)  ## build a source archive, install it into new environments with and without a compiler
	@$(PY) -m tests.dist_check

wheel: $(READY)  ## build wheels in dist/, audit them, install and try them without a compiler; ARGS="--cpu", "--cuda", "--no-install"
	@$(PY) -m tests.wheel $(ARGS)

matrix: $(READY)  ## build and test on each torch and each Python: an hour or two, 12 GB; ARGS="--torch 2.10 --python 3.12"
	@$(PY) -m tests.matrix $(ARGS)

check: $(READY)  ## lint, check the format and the types, changing nothing
	@$(PY) -m ruff check --quiet $(CODE)
	@$(PY) -m ruff format --check --quiet $(CODE) || { echo "run 'make format'" >&2; exit 1; }
	@$(PY) -m mypy --no-error-summary
	@$(VENV)/bin/clang-format --dry-run -Werror $(CPP) || { echo "run 'make format'" >&2; exit 1; }

format: $(READY)  ## sort imports, apply safe fixes, format
	@$(PY) -m ruff check --fix --quiet $(CODE)
	@$(PY) -m ruff format --quiet $(CODE)
	@$(VENV)/bin/clang-format -i $(CPP)

clean:  ## remove .venv, build outputs and caches; keeps runs/
	@rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +

# The stamp goes before anything changes and comes back last: whatever interrupts this, the next call finds no stamp and
# starts from nothing. torch is installed first and pinned, so that nothing after it can choose another build.
$(READY): constraints.txt pyproject.toml setup.py $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)
	@[ "$(or $(WANTED),$(STATE))" = "$(or $(STATE),none)" ] && $(PIP) --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
			echo "make: $(PYTHON) is missing or older than Python 3.10: name another with PYTHON=..." >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "make: $(PYTHON) has no venv module: on Debian or Ubuntu, apt install python3-venv" >&2; exit 1; }; \
		echo "making $(VENV) with $$($(PYTHON) --version)"; rm -f $(READY); rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV); }
	@rm -f $(READY)
	@echo "installing torch (the largest part)"
	@$(PIP) install -qq -c constraints.txt torch setuptools
	@echo "installing the rest"
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e '.[train,dev]'
	@echo "$(CURDIR)" > $(READY)

# A stamp of its own: only who asks for the trainers has them installed.
$(WITH_TRAINERS): $(READY)
	@rm -f $(WITH_TRAINERS)
	@echo "installing the trainers"
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e '.[trainers]'
	@touch $(WITH_TRAINERS)

$(WITH_DOCS): $(READY)
	@rm -f $(WITH_DOCS)
	@echo "installing what builds the documentation"
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e '.[docs]'
	@touch $(WITH_DOCS)

$(WITH_TRANSLATION): $(READY)
	@rm -f $(WITH_TRANSLATION)
	@echo "installing what translation needs"
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e '.[translation]'
	@touch $(WITH_TRANSLATION)
