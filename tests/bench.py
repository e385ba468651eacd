"""What this project's speed rests on, measured side by side in one run: `make bench`.

    python tests/bench.py --model models/SmolLM2-135M-Instruct --out runs/bench.json
    python tests/bench.py --model models/SmolLM2-135M-Instruct --out /tmp/bench.json --only environments --rounds 1

Machines differ and are shared, so what counts are the ratios of two ways to do the same in the same run. The table
holds medians over rounds in which the two take turns:

    rollouts      the scheduler against one episode at a time (every eighth of its tasks), and against its own requests
                  without environments: the same engine, seeds and limits, the prefix cache emptied before each
    growth        the scheduler with 2 and 4 times the episodes, and the turns
    environments  load and reset, a step, and a branch at step 10, against the stock packages
    sampling      stage 1's N samples in one request against N requests
    training      against transformers' Trainer with padded batches of 2, in the same precision
    encoding      a prompt among 600 live dialogues against one that is alone
    bookkeeping   what stages 2 to 4 do besides asking a model, for 20,000 rollouts of 30 steps against 5,000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError, dialogue, generate, progress, run_stage, turn_sampling, write_rows
from environments import choose_tasks
from environments.alfworld import AlfWorld, game_path, game_tasks, games_root
from environments.scienceworld import ScienceWorld, java_folder
from environments.workers import EnvironmentPool, Playing, play
from practice_games import write_practice_games
from prompts.engine import LocalEngine
from prompts.model import ChatFormat, bfloat16_is_fast
from stage5_finetune import make_trainer, training_sequences

PARTS = ("rollouts", "growth", "environments", "sampling", "training", "encoding", "bookkeeping")
TYPES = "find-animal,find-living-thing,find-plant,lifespan-longest-lived,lifespan-shortest-lived"  # short ones
BRANCH_AT = 10
GAMES = 7  # a round
N = 5
TRAJECTORIES = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--out", required=True, type=Path, metavar="JSON", help="gets the table with all its times")
    parser.add_argument("--only", default=",".join(PARTS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--max-live", type=int, default=32, help="episodes in flight; default: %(default)s")
    parser.add_argument("--max-turns", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=192, help="most tokens of a turn; default: %(default)s")
    parser.add_argument("--max-model-len", type=int, default=4096, help="default: %(default)s")
    return parser.parse_args()


class Table:
    """Rows of what was measured, how this project and the other way did, in medians, and their ratio; printed as they
    come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        print("| what | this project | the other way | ratio | bar |\n| --- | --- | --- | --- | --- |", flush=True)

    def add(self, what: str, unit: str, ours: list[float], other: list[float], at_least: float | None = None,
            at_most: float | None = None) -> None:
        """A unit that ends in "/s" or "/min" is a rate: more is better. With at_most the ratio is that of our cost."""
        rate = unit.endswith(("/s", "/min"))
        better = median(ours) / median(other) if rate else median(other) / median(ours)
        ratio = better if at_most is None else 1 / better
        bar = f"at least {at_least:g}" if at_least else f"at most {at_most:g}" if at_most else ""
        self.rows.append({"what": what, "unit": unit, "ours": ours, "other": other, "ratio": ratio, "bar": bar})
        print(f"| {what} | {median(ours):.3g} {unit} | {median(other):.3g} {unit} | {ratio:.2f} | {bar} |", flush=True)


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


# --- Rollouts -----------------------------------------------------------------------------------------------------


class Recorder:
    """The engine, writing down what is asked of it."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.requests = engine, []

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def submit(self, name: object, turns: list, **sampling: object) -> None:
        self.requests.append((len(self.requests), turns, sampling))
        self.engine.submit(name, turns, **sampling)

    def poll(self) -> list:
        return self.engine.poll()


@contextlib.contextmanager
def running(size: int, task: str):
    """An EnvironmentPool whose environments are up: starting them is not what is measured."""
    with EnvironmentPool("scienceworld", size) as pool:
        for worker in pool.workers:
            pool.send(worker, "start", task, [])
        starting = set(pool.workers)
        while starting:
            starting -= {worker for worker, _ in pool.ready(None)}
        yield pool


def roll_out(engine, pool: EnvironmentPool, tasks: list[str], turns: int, max_tokens: int) -> list[Playing]:
    played = list(play([Playing(task, task, turns) for task in tasks], engine, pool, turn_sampling(0.0, max_tokens), 0))
    assert len(played) == len(tasks) and not any(episode.end.startswith("failed") for episode in played)
    return played


def cost(engine: LocalEngine, function, *arguments) -> tuple[float, float]:
    """(seconds, seconds a generated token) from an empty prefix cache."""
    engine.engine.reset_prefix_cache()
    before = engine.tokens_out
    spent = seconds(function, *arguments)
    return spent, spent / (engine.tokens_out - before)


def rollouts(table: Table, args: argparse.Namespace, engine: LocalEngine) -> None:
    tasks = choose_tasks("scienceworld", "train", TYPES, 4 * args.max_live, 0)  # enough to refill: a run has hundreds
    some = tasks[::8]  # one at a time, the pace does not depend on how many there are
    together, alone, bare = [], [], []
    with running(args.max_live, tasks[0]) as many, running(1, tasks[0]) as one:
        for _ in progress(range(args.rounds), desc="rollouts"):
            recorder = Recorder(engine)
            together.append(cost(engine, roll_out, recorder, many, tasks, args.max_turns, args.max_tokens))
            bare.append(cost(engine, list, generate(engine, recorder.requests, args.max_live)))
            alone.append(cost(engine, roll_out, engine, one, some, args.max_turns, args.max_tokens))
    table.add(f"rollouts, {args.max_live} in flight, against one at a time", "episodes/min",
              [60 * len(tasks) / spent for spent, _ in together], [60 * len(some) / spent for spent, _ in alone],
              at_least=6)
    table.add("rollouts, against the same requests without environments", "ms a token",
              *([1000 * each for _, each in times] for times in (together, bare)), at_most=1.25)


def growth(table: Table, args: argparse.Namespace, engine: LocalEngine) -> None:
    live = args.max_live // 2
    tasks = choose_tasks("scienceworld", "train", TYPES, 4 * live, 0)
    turns = max(1, args.max_turns // 3)
    sizes = {(episodes, times): [] for episodes, times in ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4))}
    with running(live, tasks[0]) as pool:
        for _ in progress(range(args.rounds), desc="growth"):
            for (episodes, times), spent in sizes.items():
                arguments = (engine, pool, tasks[:episodes * live], times * turns, args.max_tokens)
                spent.append(1000 * cost(engine, roll_out, *arguments)[1])  # a token: later turns may be longer
    for (episodes, times), spent in list(sizes.items())[1:]:
        what = f"{episodes}x the episodes" if episodes > 1 else f"{times}x the turns"
        table.add(f"rollouts, {what}, against 1x", "ms a token", spent, sizes[1, 1])


# --- Environments -------------------------------------------------------------------------------------------------
#
# Each way has a process of its own, since making ALFWorld's engine quick changes it for the whole process. A
# measurement is {"load and reset": s, "step": s, "branch at step 10": s}.

LABORATORY = ["look around", "teleport to kitchen", "open cupboard", "pick up thermometer", "look at table", "wait1",
              "teleport to greenhouse", "look around", "examine thermometer", "wait1"]
our_laboratory, our_house = cache(ScienceWorld), cache(AlfWorld)  # one in a process


@cache
def stock_laboratory():
    os.environ["PATH"] = f"{java_folder()}{os.pathsep}{os.environ['PATH']}"
    from scienceworld import ScienceWorldEnv
    return ScienceWorldEnv()


@cache
def stock_house():
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv
    return AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))


def measured(load, step, actions: list[str], replay) -> dict[str, float]:
    return {"load and reset": seconds(load), "step": median(seconds(step, action) for action in actions),
            f"branch at step {BRANCH_AT}": seconds(replay)}


def stock(env, actions: list[str], *game: object) -> dict[str, float]:
    """Both stock packages branch by a reset and a replay."""
    def load() -> None:
        env.load(*game)
        env.reset()

    def replay() -> None:
        env.reset()
        for action in actions:
            env.step(action)

    return measured(load, env.step, actions, replay)


def our_scienceworld(task: str) -> dict[str, float]:
    env = our_laboratory()
    return measured(lambda: env.reset(task), env.step, LABORATORY, lambda: env.branch(task, LABORATORY))


def stock_scienceworld(task: str) -> dict[str, float]:
    _, kind, variation = task.split("/")
    return stock(stock_laboratory(), LABORATORY, kind, int(variation), "easy")


def a_walk(game: Path) -> list[str]:
    """A round through a house, ten steps long."""
    problem = json.loads(game.read_text())["pddl_problem"]
    kinds = sorted(set(re.findall(r"receptacleType \S+ (\w+)Type", problem)))
    return [f"go to {kind.lower()} 1" for kind in islice(cycle(kinds), BRANCH_AT)]


def our_alfworld(root: Path, task: str) -> dict[str, float]:
    """The branch is the second one at this step: the first of a trajectory plays the line that the others leave."""
    env = our_house(root)
    walk = a_walk(game_path(root, task))

    def replay() -> None:
        env.branch(task, walk)

    line = measured(lambda: env.reset(task), env.step, walk, replay)
    env.step("look")
    return line | {f"branch at step {BRANCH_AT}": seconds(replay)}


def stock_alfworld(root: Path, task: str) -> dict[str, float]:
    game = game_path(root, task)
    return stock(stock_house(), a_walk(game), str(game))


def environments(table: Table, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            root, label = games_root(), "ALFWorld"
        except UserError:
            root, label = Path(folder), "ALFWorld (practice games)"
            write_practice_games(root, {"train": 2 * args.rounds}, seed=0)  # of each type: more than GAMES a round
        games = game_tasks("train", root)
        games = games[::len(games) // (GAMES * args.rounds)]  # from all over the list: neighbours are alike
        compare(table, label, [(root, task) for task in games], our_alfworld, stock_alfworld,
                {"load and reset": 5, f"branch at step {BRANCH_AT}": 10})
    tasks = choose_tasks("scienceworld", "train", TYPES, GAMES * args.rounds, 0)
    compare(table, "ScienceWorld", [(task,) for task in tasks], our_scienceworld, stock_scienceworld, {"step": 5})


def compare(table: Table, label: str, work: list[tuple], ours, stock, bars: dict[str, float]) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as mine, ProcessPoolExecutor(1, context) as theirs:
        pairs = [(mine.submit(ours, *task).result(), theirs.submit(stock, *task).result())
                 for task in progress(work, desc=label)]
    for what in pairs[0][0]:
        table.add(f"{label}: {what}, against the stock package", "ms", [1000 * mine[what] for mine, _ in pairs],
                  [1000 * theirs[what] for _, theirs in pairs], at_least=bars.get(what))


# --- Sampling and training ----------------------------------------------------------------------------------------


def expert_trajectories() -> list[dict]:
    env = ScienceWorld()
    found = (env.expert(task, None, 0) for task in choose_tasks("scienceworld", "train", TYPES, None, 0))
    rows = list(islice(filter(None, found), TRAJECTORIES))
    env.close()
    return rows


def sampling(table: Table, args: argparse.Namespace, engine: LocalEngine, experts: list[dict]) -> None:
    prompts = {f"{row['key']}/step{t}": dialogue(row["task"], row["instruction"], row["steps"][:t])
               for row in experts[:3] for t in range(len(row["steps"]))}
    options = turn_sampling(1.0, args.max_tokens)
    whole = [(key, turns, options | {"seed": 0, "n": N}) for key, turns in prompts.items()]
    single = [((key, seed), turns, options | {"seed": seed}) for key, turns in prompts.items() for seed in range(N)]
    times = [(cost(engine, list, generate(engine, whole, 8))[1], cost(engine, list, generate(engine, single, 8 * N))[1])
             for _ in progress(range(args.rounds), desc="sampling")]
    table.add(f"sampling, n={N}, against {N} requests", "ms a token",
              *([1000 * each for each in way] for way in zip(*times)))


def training(table: Table, args: argparse.Namespace, experts: list[dict]) -> None:
    import torch
    from transformers import (AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments,
                              set_seed)
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sequences, _ = training_sequences(experts, ChatFormat(tokenizer), args.max_model_len)
    tokens = sum(len(sequence["input_ids"]) for sequence in sequences)

    def ours(model, folder: str):
        options = argparse.Namespace(epochs=1, learning_rate=1e-5, batch_size=8, micro_batch_size=1, lora_rank=0,
                                     warm_up=0.03, seed=0, report_to="none", out=f"{folder}/model")
        return make_trainer(model, tokenizer, sequences, options, Path(folder))

    def padded(model, folder: str):
        trainer = Trainer(model=model, train_dataset=sequences, data_collator=DataCollatorForSeq2Seq(tokenizer),
                          args=TrainingArguments(
                              folder, num_train_epochs=1, learning_rate=1e-5, per_device_train_batch_size=2,
                              gradient_accumulation_steps=4, bf16=bfloat16_is_fast(), seed=0, report_to="none",
                              gradient_checkpointing=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
                              disable_tqdm=True))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def rate(make) -> float:
        set_seed(0)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make(model, folder)
            trainer.args.save_strategy = "no"
            return tokens / seconds(trainer.train)

    times = [(rate(ours), rate(padded)) for _ in progress(range(args.rounds), desc="training")]
    table.add("training all weights, against Trainer with padding", "tokens/s", *map(list, zip(*times)), at_least=1.5)


# --- The paper's size ---------------------------------------------------------------------------------------------

OBSERVATION = "You see a table, and on it a bowl, a knife and an apple. " * 14
CANDIDATES = 5  # a step, the expert's with them
STEPS = 30


def encoding(table: Table, args: argparse.Namespace) -> None:
    """Each of the dialogues grows by a turn while all others do."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def milliseconds(live: int) -> float:
        chat = ChatFormat(tokenizer)
        turns = [dialogue("scienceworld/boil/0", f"Task {n}.", []) for n in range(live)]
        spent = 0.0
        for t in range(12):
            spent += seconds(lambda: [chat.encode(each) for each in turns])
            for n, each in enumerate(turns):
                each += [f"Thought: {n}, {t}.\nAction: look around", f"Observation: {n}, {t}. {OBSERVATION[:400]}"]
        return 1000 * spent / live / 12

    times = [(milliseconds(600), milliseconds(1)) for _ in progress(range(args.rounds), desc="encoding")]
    table.add("encoding a prompt among 600 live dialogues, against one alone", "ms", *map(list, zip(*times)), at_most=1.5)


def step(t: int, name: str) -> dict:
    return {"thought": f"I do {name} next.", "action": f"look at {name} {t}", "observation": f"{t}: {OBSERVATION}", "reward": t / STEPS,
            "accepted": True}


def write_inputs(folder: Path, rollouts: int) -> None:
    """Expert trajectories and candidates of all their steps for so many sampled rollouts."""
    tasks = [f"scienceworld/find-animal/{n}" for n in range(rollouts // (CANDIDATES - 1) // STEPS)]
    write_rows(folder / "expert.jsonl", ({"key": task, "task": task, "instruction": "Find it.", "steps": [step(t, "it") for t in range(STEPS)],
                                          "reward": 1.0, "source": "bench"} for task in tasks))
    write_rows(folder / "candidates.jsonl", ({"key": f"{task}/step{t + 1}", "task": task, "step": t + 1, "invalid": 0, "flagged": True,
                                              "candidates": [{"action": step(t, name)["action"], "thought": "I try.", "count": 1,
                                                              "from_expert": name == "it"} for name in ("it", *"abcd")]}
                                             for task in tasks for t in range(STEPS)))


def played(episodes: list[Playing], *_: object):
    """In place of `play`: the policy goes on to the end at once."""
    for episode in episodes:
        episode.steps = [*episode.forced[:-1], *(step(t, "b") | {"action": episode.forced[-1]["action"] if not t else f"go {t}"}
                                                 for t in range(STEPS))]
        episode.end = "turn limit"
        yield episode


def bookkeeping_of(stage: str, folder: str) -> tuple[float, float]:
    """(seconds, MiB at most) of a stage without a model, in a process of its own."""
    import importlib
    module = importlib.import_module(stage)
    module.play, module.EnvironmentPool = played, lambda *_: contextlib.nullcontext()
    module.make_engine = lambda args: argparse.Namespace(usage=str, asked=lambda *_: {})
    os.chdir(folder)
    sys.argv = [stage, "--trajectories", "expert.jsonl", "--model", "none"] + {
        "stage2_rollout": ["--candidates", "candidates.jsonl", "--out", "rollouts.jsonl"],
        "stage3_critique": ["--rollouts", "rollouts.jsonl", "--attempts", "0", "--out", "critiques.jsonl"],
        "stage4_synthesize": ["--candidates", "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl",
                              "--attempts", "0", "--out", "deliberations.jsonl"]}[stage]
    with contextlib.redirect_stdout(None):
        spent = seconds(module.main)
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # getrusage's begins with the parent's
    return spent, int(most[1]) / 1024


def bookkeeping(rollouts: int) -> dict[str, tuple[float, float]]:
    """{stage: (seconds, MiB at most)} for so many rollouts."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), rollouts)
        found = {}
        for stage in ("stage2_rollout", "stage3_critique", "stage4_synthesize"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                found[stage] = process.submit(bookkeeping_of, stage, folder).result()
        return found


def add_bookkeeping(table: Table) -> None:
    many, few = bookkeeping(20_000), bookkeeping(5_000)
    for stage, (spent, memory) in many.items():
        table.add(f"{stage}, 20,000 rollouts against 5,000", "ms a rollout", [spent / 20], [few[stage][0] / 5], at_most=1.25)
        table.add(f"{stage}, the most memory", "MiB", [memory], [few[stage][1]], at_most=4)


def main() -> None:
    args = parse_arguments()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only: unknown part '{min(unknown)}'; known are {', '.join(PARTS)}")
    table = Table()
    if "environments" in parts:
        environments(table, args)
    if "encoding" in parts:
        encoding(table, args)
    if "bookkeeping" in parts:
        add_bookkeeping(table)
    experts = expert_trajectories() if {"sampling", "training"} & set(parts) else []
    if "training" in parts:
        training(table, args, experts)
    if {"rollouts", "growth", "sampling"} & set(parts):
        engine = LocalEngine(args.model, args.max_model_len, 0)
        if "rollouts" in parts:
            rollouts(table, args, engine)
        if "growth" in parts:
            growth(table, args, engine)
        if "sampling" in parts:
            sampling(table, args, engine, experts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()}
    written = {"settings": settings, "cores": os.cpu_count(), "rows": table.rows}
    args.out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"\n{args.out}")


if __name__ == "__main__":
    run_stage(main)
