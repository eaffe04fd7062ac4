# advlab: `make reproduce` sets up and reproduces the figures, `make test` checks everything.
PYTHON  ?= python3
PROFILE ?= quick
DATASET ?=
NOTEBOOK ?=
JOBS ?=
VENV := .venv
BENCH := .venv-bench
RUN  := $(VENV)/bin/python
STAMP := $(VENV)/.set-up

unexport PYTHONDONTWRITEBYTECODE  # else every kernel and test worker would compile torch, pandas and matplotlib anew

.PHONY: help setup reproduce dry-run resume report test lint lab notebooks bench lock clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'
	@echo 'variables: PROFILE=smoke|quick|standard|paper  DATASET=fashion_mnist  NOTEBOOK="00 01"  JOBS=2  PYTHON=python3.12'

setup: $(STAMP)  ## create .venv from requirements.lock (with uv where it is installed, else venv and pip)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("advlab needs Python 3.11 or newer; %s is %s: set PYTHON=..." % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	@rm -f $@
	@if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && \
	  uv pip sync -q --python $(RUN) --require-hashes requirements.lock && \
	  uv pip install -q --python $(RUN) --no-deps --no-build-isolation -e . ; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(RUN) -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock && \
	  $(RUN) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . ; \
	fi
	@touch $@

SERIES = $(RUN) -m advlab run $(NOTEBOOK) --profile $(PROFILE) $(if $(DATASET),--dataset $(DATASET)) $(if $(JOBS),--jobs $(JOBS))

reproduce: setup  ## run the notebooks that are not up to date: figures/, data/results/ and executed copies in runs/
	$(SERIES)

dry-run: setup  ## list the notebooks that `make reproduce` would run, and why
	$(SERIES) --dry-run

resume: setup  ## go on after a run that was killed
	$(SERIES) --resume

report: setup  ## the executed notebooks as HTML that opens without network: runs/PROFILE/report/index.html
	$(RUN) -m advlab report --profile $(PROFILE)

test: export OMP_NUM_THREADS = 1  # two workers with a thread each: threads that outnumber the cores wait for each other
test: lint  ## lint, unit tests, and the notebooks at smoke size under nbval
	$(RUN) -m pytest -n 2 --dist worksteal tests
	ADVLAB_PROFILE=smoke $(RUN) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-current-env -p no:cacheprovider notebooks

lint: setup
	$(RUN) -m ruff check advlab tests notebooks $(wildcard benchmarks)

lab: setup  ## JupyterLab on 127.0.0.1
	$(VENV)/bin/jupyter lab --ip 127.0.0.1 --notebook-dir notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: setup  ## run the quick series and put its outputs into the committed notebooks
	$(RUN) -m advlab run $(NOTEBOOK) --profile quick --refresh

bench: $(BENCH)/.set-up  ## attacks beside their peers' in .venv-bench: speed, memory, strength (an hour)
	$(BENCH)/bin/python benchmarks/attacks.py
	$(BENCH)/bin/python benchmarks/attacks.py --overhead
	$(BENCH)/bin/python benchmarks/strength.py

$(BENCH)/.set-up: requirements.lock benchmarks/requirements.txt pyproject.toml
	@rm -f $@
	@if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(BENCH) && \
	  uv pip sync -q --python $(BENCH)/bin/python --require-hashes requirements.lock && \
	  uv pip install -q --python $(BENCH)/bin/python --no-deps -r benchmarks/requirements.txt && \
	  uv pip install -q --python $(BENCH)/bin/python --no-deps --no-build-isolation -e . ; \
	else \
	  $(PYTHON) -m venv $(BENCH) && \
	  $(BENCH)/bin/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r requirements.lock && \
	  $(BENCH)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r benchmarks/requirements.txt && \
	  $(BENCH)/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . ; \
	fi
	@touch $@

lock:  ## resolve requirements.lock anew (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate -q -o requirements.lock

clean:  ## remove what runs have made, but not the environment
	rm -rf runs data/checkpoints data/results/smoke data/results/quick figures/smoke figures/quick
