# The two commands of the README: `make pretrain` and `make test`. Everything else is a part of them.
# A second call of either starts at once: .venv is made again only when pyproject.toml or constraints.txt change.

PYTHON312 := $(shell launch/find_python.sh)
VENV := .venv
PY := $(VENV)/bin/python
RUNS := runs
TINY_CORPUS := corpora/sotu_tiny
TINY_TOKENIZER := corpora/sotu_tiny_tokenizer.json
SAMPLE := data_pipeline/samples/sotu.jsonl.xz
SOURCES ?= $(SAMPLE)
CORPUS ?= corpora/$(if $(filter $(SAMPLE),$(SOURCES)),sotu,mine)_$(basename $(notdir $(TOKENIZER)))
TOKENIZER ?= deepseek-v3
NPROC ?= 2
# The first free name, so that a second `make pretrain` is a second run; `make resume` goes on with the newest.
RUN_DIR ?= $(shell n=1; d=$(RUNS)/engram_tiny; while [ -e $$d ]; do n=$$((n + 1)); d=$(RUNS)/engram_tiny_$$n; done; echo $$d)
LAST_RUN = $(or $(shell ls -dt $(RUNS)/engram_tiny* 2>/dev/null | head -n 1),$(RUNS)/engram_tiny)

.PHONY: pretrain resume test test-all soak lint layouts corpus conformance compare bench-tables bench-checkpoints bench-jobs clean

pretrain: $(VENV)/.installed $(TINY_CORPUS)/corpus.json  ## pretrain a small Engram model on two ranks
	$(PY) launch/train.py engram_tiny --nproc-per-node $(NPROC) \
	    run_dir=$(RUN_DIR) data.corpus=$(TINY_CORPUS) parallel.expert=$(NPROC) $(ARGS)

resume: $(VENV)/.installed $(TINY_CORPUS)/corpus.json  ## continue the newest run of `make pretrain`
	$(PY) launch/train.py engram_tiny --resume --nproc-per-node $(NPROC) \
	    run_dir=$(LAST_RUN) data.corpus=$(TINY_CORPUS) parallel.expert=$(NPROC) $(ARGS)

test: $(VENV)/.installed  ## the test suite, without the tests marked slow
	$(PY) -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.installed  ## every test
	$(PY) -m pytest $(ARGS)

soak: $(VENV)/.installed  ## kill builds of a corpus, runs and conversions at 50 random instants each, and a run of Slurm by 20 random faults; 85 minutes
	KILLS=50 $(PY) -m pytest tests/data/test_parallel_build.py -k at_random_instants $(ARGS)
	KILLS=50 $(PY) -m pytest -m slow tests/launch/test_kill_saves.py \
	    tests/launch/test_kill_node_snapshots.py tests/launch/test_convert_program.py $(ARGS)
	RANDOM_FAULTS=20 $(PY) -m pytest -m slow tests/slurm/test_faults.py -k through_faults $(ARGS)

layouts: $(VENV)/.installed  ## every parallel layout against one rank, and resumes in another, 20 minutes; FULL=1: every variation
	$(PY) launch/layouts.py $(if $(filter 1,$(FULL)),--full) $(if $(THIRD),--third $(THIRD)) $(ARGS)

lint: $(VENV)/.installed  ## ruff, mypy, the layers of the house
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

compare: $(VENV)/.installed $(TINY_CORPUS)/corpus.json  ## engram_tiny against its MoE twin of equal parameters, 3 seeds
	$(PY) launch/compare_budget.py --corpus $(TINY_CORPUS) --nproc-per-node $(NPROC) --out $(RUNS)/compare $(ARGS)

bench-tables: $(VENV)/.installed  ## the tables against torch, C, bare traffic and bare transports; 10 GiB, ten minutes
	$(PY) launch/bench_tables.py $(ARGS)
	PATH=$(VENV)/bin:$$PATH mpiexec -n 2 $(PY) launch/bench_exchange.py

bench-checkpoints: $(VENV)/.installed  ## saves, loads and conversions against plain files; 6 GiB of disk, five minutes
	$(PY) launch/bench_checkpoints.py $(ARGS)

bench-jobs: $(VENV)/.installed  ## jobs of Slurm on a local cluster: how soon they train, also after faults; five minutes
	$(PY) launch/bench_jobs.py $(ARGS)

conformance: $(VENV)/.installed  ## our code against vectors of DeepSeek's demo
	$(PY) launch/conformance.py tests/golden

corpus: $(VENV)/.installed  ## SOURCES (files and folders of text) to the folder CORPUS; by default the shipped text, with the DeepSeek-V3 tokenizer
	$(PY) launch/build_corpus.py $(SOURCES) $(CORPUS) --tokenizer $(TOKENIZER) $(ARGS)

$(TINY_TOKENIZER): $(SAMPLE) | $(VENV)/.installed
	@mkdir -p corpora
	$(PY) launch/train_tokenizer.py $(SAMPLE) $@ --vocab-size 4096

$(TINY_CORPUS)/corpus.json: $(TINY_TOKENIZER) | $(VENV)/.installed
	@rm -rf $(TINY_CORPUS)
	$(PY) launch/build_corpus.py $(SAMPLE) $(TINY_CORPUS) --tokenizer $(TINY_TOKENIZER)

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON312)" || { echo "No Python 3.12 found. Install one (for example 'pyenv install 3.12' or 'uv python install 3.12') and run make again." >&2; exit 1; }
	@echo "installing into $(VENV) with $(PYTHON312) (about two minutes, 5 GB: torch brings its CUDA libraries)"
	$(PYTHON312) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:  ## remove what make built, keep runs
	rm -rf $(VENV) corpora
