# parazoo's everyday commands. `make` lists them. Each sets up what it needs.
# PYTHON=3.11 (a version) or PYTHON=/path/to/python3 overrides the choice of Python.
export PYTHON
# Tests run in this many processes.
WORKERS ?= 2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo test test-all aot lint clean

# Compiling is most of what the tests do; without LLVM's optimizations it takes about half as long.
quick = --xla_backend_optimization_level=0

pytest = "$$python" -m pytest -n $(WORKERS) --dist=loadfile

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

venv: ## make the virtual environment and say how to enter it
	@python=$$(.ci/venv) && echo "Ready. Enter it with: . $${python%python}activate"

demo: ## train a tiny Llama on Python's standard library, then let it write some
	@python=$$(.ci/venv) && start=$$(date +%s) && \
	if [ -e runs/demo ]; then \
	  echo "runs/demo exists and is taken up where it stands; for a new run: rm -r runs/demo"; \
	fi && \
	"$$python" -m recipes.train --flagfile=recipes/flags/llama_tiny_stdlib.flags \
	  --workdir=runs/demo && \
	"$$python" -m recipes.decode --checkpoint=runs/demo --prompt='def ' && \
	echo "Demo done in $$(($$(date +%s) - start)) s; its files are in runs/demo."

test: ## run the tests
	@python=$$(.ci/venv) && JAX_PLATFORMS=cpu XLA_FLAGS="$(quick) $$XLA_FLAGS" $(pytest)

test-all: ## run the tests with the full product of kernel cases, into docs/test_all.md (slow)
	@python=$$(.ci/venv) && \
	JAX_PLATFORMS=cpu XLA_FLAGS="$(quick) $$XLA_FLAGS" $(pytest) --run-slow --junitxml=.cache/test_all.xml && \
	"$$python" -m tests.table .cache/test_all.xml > docs/test_all.md

aot: ## compile for described TPU slices and Hopper GPUs, without one
	@python=$$(.ci/venv aot) && \
	JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false $(pytest) --dist=loadgroup tests/aot

lint: ## check the style with ruff
	@python=$$(.ci/venv) && "$$python" -m ruff check .

clean: ## remove environments and caches; runs/ stays
	rm -rf .venv-* .cache .pytest_cache .ruff_cache build dist parazoo.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
