# make demo | test | test-ci | test-all | chaos | check | audit | docs | bench. The environment is made once, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKSPACE ?= demo-workspace

BENCHMARKS := score_throughput score_flops influence_cost select_scale select_quota train_step end_to_end \
	read_through ray_overhead resume_cost refresh_cost ingest_scale generation

.PHONY: demo test test-ci test-all test-samples chaos check audit docs format bench bench-quick

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt "torch>=2.6"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/prefsel demo --workspace $(WORKSPACE)

# Two processes: tests that use Ray share one of them, see tests/conftest.py. What is marked slow, whole runs, is left out of
# `test`; CI adds those that kill something. A change of what whole runs go through is tested with `test-all`.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-ci: $(STAMP)
	$(PYTEST) -m "not slow or fault"

test-all: $(STAMP)
	$(PYTEST) -m "not samples"

# Runs killed fifty times, every damage of every kind of object, stores that fail: the long part of tests/faults, an hour.
chaos: $(STAMP)
	PREFSEL_KILLS=50 $(PYTEST) tests/faults -m "not samples"

# Whole runs on samples of public data sets, where a folder of them lies beside the checkout; minutes each.
test-samples: $(STAMP)
	$(PYTEST) -m samples

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Code that may be unsafe, and pinned packages with known vulnerabilities. The second needs a network, and says so without.
audit: $(STAMP)
	$(BIN)/pip install --quiet bandit==1.9.4 pip-audit==2.10.1
	$(BIN)/bandit -q -c pyproject.toml -r prefsel
	if $(BIN)/python -c "import urllib.request as u; u.urlopen('https://pypi.org/pypi/pip/json', timeout=10)" 2>/dev/null; \
	then $(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip; \
	else echo "audit: pypi.org cannot be reached, so known vulnerabilities of pinned packages were not looked up"; fi

# Writes the configuration reference and builds the site into site/; a broken link fails it. Seconds, no network.
docs: $(STAMP)
	$(BIN)/python docs/tools/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every claim of docs/performance.md beside its peer: about an hour on two quiet cores, 8 GB of disk. Writes results and table.
# DATA=FOLDER: samples of public data sets, see benchmarks/README.md; without it, the repository's own.
bench: $(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --write $(if $(DATA),--data $(DATA)); done
	$(BIN)/python benchmarks/table.py
	$(BIN)/python benchmarks/table.py --write

# The same scripts, tiny: equality with the peers and exact counters, no times.
bench-quick: $(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --quick; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
