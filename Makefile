# The commands of the course. `make` alone lists them.
#
#   PYTHON=python3.12      the Python that .venv is made of
#   PIP_ARGS="..."         handed to pip, to choose a package index
#   ARGS="..."             handed to the command itself (make lab ARGS=--no-browser, make test ARGS="-k coupling")
#   OPEN=0                 make grade opens no browser
#   JOBS=2                 processes that the tests share (0: all in one, for a debugger)

PYTHON   ?= python3
PIP_ARGS ?=
ARGS     ?=
OPEN     ?= 1
JOBS     ?= 2

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/flowkit-ready
PYTEST := $(PY) -m pytest --no-skips -n $(JOBS) --no-loadscope-reorder

# The notebooks' kernels inherit these. Without the first, the debugger prints a warning at every kernel start.
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One thread: the course's nets are small, and on a busy machine two wait for each other (ten times slower, measured).
# It also makes sums come out the same on every machine.
lab test test-all lessons grade audit bench: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)

.DEFAULT_GOAL := help
.PHONY: help env lab test test-all lessons release grade audit bench clean FORCE

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# The stamp is written last and holds the folder's name: an environment whose making was cut off, that moved with its
# folder or whose Python is gone is not taken for a ready one.
ifneq ($(shell { $(PY) -c "" && cat $(STAMP); } 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

env: $(STAMP)  ## Make the environment in .venv (exact versions, requirements.lock)
	@:

$(STAMP): requirements.lock pyproject.toml
	@rm -f $(STAMP)
	@sh bin/make-env "$(PYTHON)" $(PIP_ARGS)
	@printf '%s\n' "$(CURDIR)" > $(STAMP)

lab: env  ## Open JupyterLab on the lessons
	@$(PY) bin/lab $(ARGS)

test: env  ## Run the tests that need neither a browser nor long (under 20 minutes)
	$(PYTEST) -m "not browser and not slow" $(ARGS)
	FLOWKIT_FAST=1 $(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=600 solutions/*.ipynb

test-all: test  ## All tests: make test, then the browser's and the slow ones (under 60 minutes)
	$(PYTEST) -m "browser or slow" --durations=10 $(ARGS)

lessons: env  ## Build lessons/, solutions/ and the sample class from solutions/*.py
	$(PY) -m autograder.build $(ARGS)
	$(PY) data/make_sample_class.py

release: env  ## Build what an instructor hands out, an nbgrader course, in course/
	$(PY) -m autograder.build --release course $(ARGS)

grade: env  ## Grade the sample class into graded/ and open the report
	$(PY) -m autograder grade data/sample_class --out graded --release lessons --timeout 20 $(ARGS)
	@echo "The report: graded/report.html"
	@if [ "$(OPEN)" != 0 ] && [ -n "$$DISPLAY$$WAYLAND_DISPLAY$$(uname | grep -i darwin)" ]; then \
	    $(PY) -c 'import pathlib, webbrowser; webbrowser.open(pathlib.Path("graded/report.html").resolve().as_uri())' || true; fi

audit: env  ## Measure how good the checks are (ARGS="coupling --fast" for one exercise, quickly)
	$(PY) -W ignore -m autograder audit --out audit $(ARGS)

bench: env  ## Run all benchmarks (ARGS="--quick --check" is the short form)
	@failed=; for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(PY) "$$script" $(ARGS) || failed="$$failed $$script"; done; \
	    if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

clean:  ## Delete what the commands made, except .venv and your progress
	rm -rf graded course build audit .pytest_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
