VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
ARGS ?=

.PHONY: train test test-long check docs bench peers returns plots clean

train: $(VENV)/.train
	$(RUN) scripts/train.py algo=ppo env=HalfCheetah $(ARGS)

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 $(ARGS)

# The tests that take longer.
test-long: $(VENV)/.dev
	PGSUITE_LONG=1 $(RUN) -m pytest -n 2 -m long $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# The documentation as a site in build/site; a dead link is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.train
	$(RUN) benchmarks/throughput.py $(ARGS)

# Other libraries beside this one.
peers: $(VENV)/.train
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[peers]"
	$(RUN) benchmarks/peers.py $(ARGS)

# The learning results, from nothing; hours on two cores.
returns: $(VENV)/.train
	$(RUN) benchmarks/returns.py run all $(ARGS)

plots: $(VENV)/.dev
	$(RUN) benchmarks/plot.py
	$(RUN) benchmarks/returns.py table --docs
	$(RUN) benchmarks/returns.py compare compile --docs
	$(RUN) benchmarks/throughput.py --docs
	$(RUN) benchmarks/peers.py --docs
	$(RUN) benchmarks/wallclock.py table --docs
	$(RUN) benchmarks/speedrun.py table --docs
	$(RUN) benchmarks/films.py table --docs
	$(RUN) benchmarks/scaling.py table --docs
	$(RUN) benchmarks/parity.py --docs
	$(RUN) benchmarks/gpu.py --docs
	$(RUN) benchmarks/envs.py --docs
	$(RUN) benchmarks/language.py table --docs
	$(RUN) benchmarks/language.py plot

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.train: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[test,dev]"
	touch $@ $(VENV)/.train
