# `make lab` opens the course, `make test` checks everything. Both start from a bare Python 3.11: they create
# .venv and install requirements.lock when needed, and a second call starts at once.
#
#   make lab PORT=8899 ARGS="--no-browser"
#   make unit ARGS="tests/test_loss.py -x"

PORT ?= 8888
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BROWSER_STAMP := $(VENV)/.installed-browser
ZERO3_STAMP := $(VENV)/.installed-zero3
EVAL_STAMP := $(VENV)/.installed-eval
DOCS_STAMP := $(VENV)/.installed-docs
PYTHON ?= $(shell command -v python3.11 || command -v python3)

# Two processes of one thread are faster on two cores than one of two; results do not depend on the machine's cores.
export OMP_NUM_THREADS ?= 1
# A kernel or a setting of the user's own must not shadow the environment's.
export JUPYTER_PREFER_ENV_PATH := 1

# Notebooks whose outputs depend on the machine (timings, sampled training) are run but not compared: a list with
# a reason for each. All others are compared output by output.
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb notebooks/solutions/*.ipynb))
LAX_LIST = $(shell sed 's/\#.*//' tests/notebooks/lax.txt)
LAX = $(filter $(LAX_LIST),$(NOTEBOOKS))
STRICT = $(filter-out $(LAX_LIST),$(NOTEBOOKS))

# -n 2: one notebook a core; no model hub is ever asked; the settings are those of KERNEL_ENV in
# minimal_aia/course.py, which stored the outputs.
NBVAL = HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 \
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile \
	-p tests.notebooks.like_the_course --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with=tests/notebooks/sanitize.cfg

# Jupyter refuses to run as root (containers, CI) unless it is told that this is meant.
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab course install doctor bench test lint types unit nbval test-browser test-eval test-zero3 docs dist clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
	@echo 'Variables: PORT=8888 (lab), ARGS="..." (lab, course, unit, nbval), PYTHON=python3.11'

lab: $(STAMP)  ## start JupyterLab on the first notebook
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
		--port $(PORT) $(ROOT) $(ARGS)

course: $(STAMP)  ## execute every notebook and print a table (ARGS="--write" stores the outputs)
	$(BIN)/python -m minimal_aia.course $(ARGS)

install: $(STAMP)  ## create .venv and install the locked versions

doctor: $(STAMP)  ## say what this machine has and lacks
	$(BIN)/minimal-aia doctor

bench: $(STAMP)  ## measure cost beside the alternatives (a quarter of an hour), print the table
	$(BIN)/minimal-aia bench $(ARGS)

test: lint types unit nbval  ## what must pass before a pull request: lint, types, unit tests, notebooks

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy
	$(BIN)/mypy minimal_aia

unit: $(STAMP)  ## pytest, two processes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup $(ARGS)

nbval: $(STAMP)  ## run every notebook; compare the outputs of all but those in tests/notebooks/lax.txt
	@test -n "$(NOTEBOOKS)" || { echo "no notebooks in notebooks/"; exit 1; }
	$(if $(STRICT),$(NBVAL) --nbval $(STRICT) $(ARGS))
	$(if $(LAX),$(NBVAL) --nbval-lax $(LAX) $(ARGS))

test-browser: $(BROWSER_STAMP)  ## drive the explorer in JupyterLab with Chromium (not part of `make test`)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/browser $(ARGS)

test-eval: $(EVAL_STAMP)  ## run our plug-in inside lmms-eval's evaluator (not part of `make test`)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/evaluation/test_understanding.py $(ARGS)

test-zero3: $(ZERO3_STAMP)  ## train under DeepSpeed's ZeRO-3 on CPUs (not part of `make test`)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q tests/distributed/test_zero3.py tests/train/test_export.py $(ARGS)

# Not --quiet: that drops the warnings which --strict counts.
docs: $(DOCS_STAMP)  ## build site/: the API, the command line and the notebooks as they are stored; any warning fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# Built from the last commit: the tree of somebody at work holds more than belongs in a release.
dist: $(DOCS_STAMP)  ## build wheel and sdist of the last commit in dist/, and use the wheel outside the clone
	rm -rf dist build/dist
	mkdir -p build/dist/source
	git archive HEAD | tar -x -C build/dist/source
	$(BIN)/python -m build --no-isolation --outdir dist build/dist/source > build/dist/log 2>&1 || { tail build/dist/log; exit 1; }
	$(BIN)/python tests/check_wheel.py dist

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs
	find minimal_aia tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# torch first and by its exact version: whatever comes later finds it installed and asks for no other build.
# The package itself goes in last, editable, without touching what the lock has chosen.
$(STAMP): requirements.lock pyproject.toml
	@test -x "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it or say PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: say PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no virtual environment could be made (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@# else the first JupyterLab asks whether it may ask a server for news
	@$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" >/dev/null 2>&1
	@touch $(STAMP)

# --no-deps: lmms-eval asks for torchvision, which would bring another torch.
$(EVAL_STAMP): $(STAMP) tests/evaluation/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r tests/evaluation/requirements.txt
	@touch $(EVAL_STAMP)

# DeepSpeed comes as source. None of its kernels is compiled: on CPUs it needs none.
$(ZERO3_STAMP): $(STAMP) tests/distributed/requirements.txt
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		-r tests/distributed/requirements.txt
	@touch $(ZERO3_STAMP)

$(DOCS_STAMP): $(STAMP) docs/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $(DOCS_STAMP)

$(BROWSER_STAMP): $(STAMP) tests/browser/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/browser/requirements.txt
	@touch $(BROWSER_STAMP)
