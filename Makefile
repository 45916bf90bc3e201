# Usage: make TARGET [CONFIG=configs/gan.yaml] [RUN=runs/gan] [SET="key=value ..."]
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo yes),$(p))))
ILLM := $(VENV)/bin/illm
READY := $(VENV)/.ready
# One word for the shell, whatever it holds; SET and ARGS are words already, quoted by whoever gives them.
quoted = '$(subst ','\'',$(1))'
SET ?=
DATA ?=
FROM ?=
VALID ?=
LICENSE ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo codecs claim results smoke stage-shard stage-vqvae stage-pretrain stage-gan stage-evaluate promote sweep \
  submit-slurm submit-ray doctor describe fetch-weights mlflow format check quick test test-cluster test-both coverage test-all bench gpu-day gpu-pack tables clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv with the tested versions (about 7 GB, mostly torch)

$(READY): requirements/pins.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or 3.12 on the PATH, or PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/pins.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# FROM=nothing: a codec of its own
demo = demo$(if $(FROM),$(if $(filter-out nothing,$(FROM)),$(error FROM is $(FROM), expected nothing or no FROM),-from-nothing))

demo: $(READY) ## Fine-tune, evaluate, register and use a codec on sample photos, or DATA=folder; FROM=nothing trains a new one
	$(ILLM) demo configs/$(demo) --run $(call quoted,$(or $(RUN),runs/$(demo))) $(if $(DATA),--data $(call quoted,$(DATA)))

# One stage: CONFIG defaults to the reference run's file, RUN to the folder that file's successors read.
stage = $(ILLM) $(1) $(call quoted,$(or $(CONFIG),configs/$(1).yaml)) $(call quoted,run=$(or $(RUN),runs/$(1))) $(SET)

stage-shard: $(READY) ## Turn images into WebDataset shards
	$(call stage,shard)
stage-vqvae: $(READY) ## Train the labeler
	$(call stage,vqvae)
stage-pretrain: $(READY) ## Train the codec for rate and distortion
	$(call stage,pretrain)
stage-gan: $(READY) ## Fine-tune the codec against the label discriminator
	$(call stage,gan)
stage-evaluate: $(READY) ## Measure codecs on held-out images and write the report
	$(call stage,evaluate)
promote: $(READY) ## Register an evaluated codec if its gates hold
	$(call stage,promote)
sweep: $(READY) ## Search with Ray Tune; CONFIG=configs/sweep/smoke.yaml is the small one
	$(ILLM) sweep $(call quoted,$(or $(CONFIG),configs/sweep/rate_gan.yaml)) $(call quoted,run=$(or $(RUN),runs/sweep)) $(SET)

# Clusters: STAGES="vqvae pretrain gan evaluate", ARGS="--nodes 2 --gpus 8 --time 24:00:00"; jobs/README.md shows the rest.
submit = $(ILLM) submit $(1) --stages "$(or $(STAGES),vqvae pretrain gan evaluate)" --configs $(call quoted,$(or $(CONFIGS),configs)) --runs $(call quoted,$(or $(RUN),runs)) $(ARGS) $(SET)

submit-slurm: $(READY) ## Submit STAGES to SLURM, each after the one before; ARGS="--dry-run" only shows
	$(call submit,slurm)
submit-ray: $(READY) ## Submit STAGES to the Ray cluster at RAY_API_SERVER_ADDRESS
	$(call submit,ray)
doctor: $(READY) ## Check that this machine has what jobs need; ARGS="--nodes 2" looks at SLURM nodes
	$(ILLM) doctor $(ARGS)

smoke: $(READY) ## Run every stage on tiny networks (about a minute)
	$(ILLM) demo configs/smoke --run runs/smoke

describe: $(READY) ## Print what CONFIG would do
	$(ILLM) describe $(call quoted,$(or $(CONFIG),configs/gan.yaml)) $(SET)

fetch-weights: $(READY) ## Get the weights of LPIPS, DISTS, FID and KID, from the internet or the package index
	$(ILLM) fetch-weights

mlflow: $(READY) ## Serve the page with all runs on http://127.0.0.1:5000
	@echo "open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
	$(VENV)/bin/mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/runs/mlflow.db}"

results: $(READY) ## Measure the package's codecs on the images in DATA, called NAME; writes docs/results
	@test -n $(call quoted,$(DATA)) && test -n $(call quoted,$(NAME)) || { echo "needs DATA=folder of images and NAME=their name" >&2; exit 2; }
	mkdir -p docs/results
	set -e; name=$(call quoted,$(NAME)); for q in low medium high; do \
	  $(ILLM) evaluate configs/shipped/evaluate-$$q.yaml run="runs/results/$$name/$$q" images=$(call quoted,$(DATA)) $(SET); \
	  for f in totals intervals; do cp "runs/results/$$name/$$q/artifact/$$f.json" "docs/results/$$name-$$q-$$f.json"; done; \
	done

# SET goes to the trainings, for a GPU "data.batch_size=16 data.num_workers=4". Measured on VALID, a folder, or the photos that sharding held out. LICENSE:
# what the model cards say. All three are tried, and a gate that one does not pass is told at the end.
codecs: $(READY) ## Train, shrink, measure and promote the package's three codecs on the photos in DATA: hours; resumes
	@test -n $(call quoted,$(DATA)) || { echo "needs DATA=folder of photos" >&2; exit 2; }
	$(ILLM) shard configs/small/shard.yaml run=runs/small/shard source=$(call quoted,$(DATA))
	$(ILLM) pretrain configs/small/pretrain-base.yaml run=runs/small/base $(SET)
	set -e; for q in low medium high; do \
	  $(ILLM) pretrain configs/small/pretrain-$$q.yaml run=runs/small/$$q-first $(SET); \
	  $(ILLM) pretrain configs/small/pretrain-$$q.yaml run=runs/small/$$q init_from=runs/small/$$q-first fit.steps=9000 $(SET); \
	  test -d runs/small/$$q-8bit/artifact || $(ILLM) compact runs/small/$$q runs/small/$$q-8bit; \
	  $(ILLM) evaluate configs/shipped/evaluate-$$q.yaml run=runs/small/evaluate-$$q images=$(call quoted,$(or $(VALID),runs/small/shard)) "codecs={$$q: runs/small/$$q-8bit}" "anchors=[jpeg, webp]"; \
	done
	$(ILLM) evaluate configs/shipped/evaluate-compact.yaml run=runs/small/evaluate-compact images=$(call quoted,$(or $(VALID),runs/small/shard))
	code=0; for q in low medium high; do \
	  $(ILLM) promote configs/shipped/promote-$$q.yaml run=runs/small/promote-$$q $(if $(LICENSE),$(call quoted,license=$(LICENSE))) || code=$$?; \
	done; exit $$code

claim: $(READY) ## Compare no, label and PatchGAN discriminators over weights and seeds, from one codec on the photos in DATA: hours; resumes
	@test -n $(call quoted,$(DATA)) || { echo "needs DATA=folder of photos" >&2; exit 2; }
	$(ILLM) shard configs/small/shard.yaml run=runs/small/shard source=$(call quoted,$(DATA))
	$(ILLM) pretrain configs/small/pretrain-claim.yaml run=runs/small/claim-base
	$(ILLM) sweep configs/small/sweep-claim.yaml run=runs/small/claim $(if $(VALID),images=$(call quoted,$(VALID))) $(SET)
	$(VENV)/bin/python -m tests.benchmarks.claim runs/small/claim

format: $(READY) ## Format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

check: $(READY) ## Check format, lint, types, and that imports go downwards only
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

# Tests that start a daemon, or need more than make setup: .ci/run installs it. Without it they are skipped.
CLUSTER := slurm or ray or ray_jobs or mlflow_server or s3 or server or deepspeed or parity or browser
# Which tests may run beside each other, and in which order they begin: tests/conftest.py
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --no-loadscope-reorder

quick: $(READY) ## Run the tests that start no process and train nothing, in about two minutes
	$(VENV)/bin/python -m pytest -m quick -q --durations=0 --durations-min=5 $(PARALLEL) $(ARGS)

test: $(READY) ## Run the tests that need nothing but make setup
	$(VENV)/bin/python -m pytest -m "not long and not ($(CLUSTER))" $(PARALLEL) $(ARGS)

test-cluster: $(READY) ## Run the tests with a real SLURM, Ray, MLflow server, PostgreSQL and bucket, DeepSpeed, browser and parity
	$(VENV)/bin/python -m pytest -m "not long and ($(CLUSTER))" $(PARALLEL) $(ARGS)

test-both: $(READY) ## Run what test and test-cluster run, in one go: they share the smoke runs
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

coverage: $(READY) ## Run all but the long tests and report which lines they reached; a third slower
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest $(ARGS)
	@$(VENV)/bin/coverage combine --quiet && $(VENV)/bin/coverage report | tail -40

test-all: $(READY) ## Run every test, the long ones too
	$(VENV)/bin/python -m pytest -m "" $(PARALLEL) $(ARGS)

# STEP="1 4", by default all; REFERENCE=folder, SHARDS=run folder, OUT=folder and TINY=1 reach it by the environment
gpu-day: $(READY) ## Measure on one GPU: steps, options, training from shards; writes docs/bench
	$(VENV)/bin/python -m tests.benchmarks.gpu_day $(STEP)

gpu-pack: $(READY) ## Pack what a GPU machine without internet needs into RUN, by default runs/gpu-pack; SHARDS=run folder, IMAGES=folder
	$(VENV)/bin/python -m tests.benchmarks.gpu_day.pack $(call quoted,$(or $(RUN),runs/gpu-pack))

tables: $(READY) ## Write the tables of benchmarks in the docs from docs/bench
	$(VENV)/bin/python -m tests.benchmarks.tables

bench: $(READY) ## Measure training steps, loading and coding on this machine; writes docs/bench and its tables
	$(VENV)/bin/python -m tests.benchmarks $(ARGS)
	$(VENV)/bin/python -m tests.benchmarks.tables

clean: ## Remove caches; runs and the virtual environment stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
