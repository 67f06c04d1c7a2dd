# make train: install, then train, test, export and film a walking G1.  make test: lint, types, tests.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/walk
# Train until the default number of steps, or for MINUTES= if that comes first.
MINUTES ?= inf
# MuJoCo Warp where there is an NVIDIA driver.
EXTRAS := $(if $(wildcard /proc/driver/nvidia),[gpu])

.PHONY: train test check browser format clean

# The report comes last: it shows the whole walking test.
train: .venv/installed
	if [ -f $(RUN)/checkpoint.pt ]; then \
	  $(BIN)/kouros train --resume $(RUN) --minutes $(MINUTES) --no-report; \
	else \
	  $(BIN)/kouros train --run $(RUN) --minutes $(MINUTES) --no-report; \
	fi
	$(BIN)/kouros eval $(RUN)
	$(BIN)/kouros play $(RUN)
	$(BIN)/kouros report $(RUN)

test: .venv/installed-dev check browser
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope  # a class on one core: it shares its files

# A browser opens the reports in the tests, which leave that out where there is none.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -qq -y chromium >/dev/null; } || \
	  echo "no browser to open reports in: sudo apt-get install chromium"

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is too old: Kouros needs Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "no virtual environments here: sudo apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
