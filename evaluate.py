"""Evaluation: average reward at temperature 0 on the seen and unseen test splits (section 5.1, figures 7 and
8).

    python evaluate.py run --model runs/x/iter1/model --env scienceworld --out runs/x/iter1
    python evaluate.py report runs/x
    python evaluate.py compare runs/x runs/y
    python evaluate.py show runs/x/iter1/eval-unseen.jsonl --task find-animal/225
    python evaluate.py view runs/x
    python evaluate.py verify runs/x
    python evaluate.py plan --env scienceworld --model models/SmolLM2-135M-Instruct --like runs/x

`run` plays every test task once and writes OUT/eval-seen.jsonl and OUT/eval-unseen.jsonl, one episode a row
with its whole transcript, and prints a line for each: average reward, reward a step and deliberation rate
(section 6.3), tokens a task (section 6.5). --example puts an expert trajectory into the prompt; --best-of K
--temperature 1 plays K times; --no-deliberation has a policy that deliberates act at once.

    {"key": "scienceworld/find-animal/225", "task": "scienceworld/find-animal/225", "instruction": "...",
     "steps": [{"thought": "...", "action": "look around", "text": "Thought: ...", "tokens": 21, "observation": "...",
                "reward": 0.1, "accepted": true}, ...],
     "reward": 0.5, "split": "unseen", "end": "turn limit", "tokens": 211}

`report` writes report.md and its figures into a run's folder: the paper's tables and figures for this run, and
why episodes ended as they did. `compare` puts several runs into one table; those whose names differ only in
-seedN are averaged. `show` prints one episode, `view` makes a page of all that the run has. `verify` compares a
run's files with what their sidecars say of inputs, code and versions. `plan` says what a run will ask for and
what it needs, before anything is spent.
"""

from __future__ import annotations

import argparse
import base64
import functools
import gzip
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median, stdev
from typing import NamedTuple

from common import (PACKAGES, ROOT, Candidates, Critique, Episode, Rollout, StageOutput, Trajectory, UserError, agent_turn,
                    checked_rows, code_digest, digest, duration, failure, failures_last, fraction, join, label_of, my_share,
                    normalise, progress, read_rows, relative, rows_by_task, run_stage, settings_of, sidecar, sidecar_path,
                    tally, turn_sampling, version, writing)
from environments import SPLITS, TABLE, choose_tasks, file_of, files_of, of, read_trajectories, task_type, turn_limit
from environments.workers import EnvironmentPool, Playing, add_workers_option, play, workers_of
from prompts.engine import add_engine_options, make_engine
from prompts.model import add_report_option, track, tracking

TEST_SPLITS = ("seen", "unseen")
RESAMPLES = 10_000  # of the bootstrap
CONTROL = "token-matched SFT, {}"  # what VARIANT=more-sft is called
AT_ONCE = r"(Thought: [^\n-][^\n]*\n)?Action: [^\n]+"  # a turn without a list of candidates


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    add_run_options(commands.add_parser("run", help="play the test tasks"))
    writer = commands.add_parser("report", help="write report.md and its figures for a run")
    writer.set_defaults(run=lambda args: report(args.folder))
    writer.add_argument("folder", type=Path, help="the run's folder, such as runs/laptop-scienceworld")
    comparison = commands.add_parser("compare", help="one table of several runs, as Markdown")
    comparison.set_defaults(run=lambda args: compare(args.folders))
    comparison.add_argument("folders", type=Path, nargs="+", metavar="folder")
    reader = commands.add_parser("show", help="print one episode, deliberations set apart")
    reader.set_defaults(run=lambda args: show(args.file, args.task))
    reader.add_argument("file", type=Path, help="an evaluation, such as runs/x/iter1/eval-unseen.jsonl")
    reader.add_argument("--task", required=True, help="the task's id or the end of it")
    page = commands.add_parser("view", help="write index.html, the run as a page to look at")
    page.set_defaults(run=lambda args: view(args.folder))
    page.add_argument("folder", type=Path, help="the run's folder, such as runs/laptop-scienceworld")
    check = commands.add_parser("verify", help="compare a run's files with what their sidecars say; exit status 1 if any "
                                "differs")
    check.set_defaults(run=lambda args: verify(args.folder))
    check.add_argument("folder", type=Path, help="the run's folder, such as runs/laptop-scienceworld")
    add_plan_options(commands.add_parser("plan", help="what a run will ask for and what it needs"))
    return parser.parse_args()


def add_plan_options(planner: argparse.ArgumentParser) -> None:
    planner.set_defaults(run=plan)
    planner.add_argument("--env", required=True, choices=TABLE)
    planner.add_argument("--model", required=True, metavar="FOLDER", help="the base model: a folder or a hub name")
    planner.add_argument("--tasks", type=int, help="expert trajectories that are tried; default: all training tasks")
    planner.add_argument("--test-tasks", type=int, help="test tasks of a split; default: all")
    planner.add_argument("--types", metavar="A,B", help="only these task types; default: all")
    planner.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    planner.add_argument("--iterations", type=int, default=3, help="default: %(default)s")
    planner.add_argument("--n-samples", type=int, default=5, help="N; default: %(default)s")
    planner.add_argument("--attempts", type=int, default=3, help="0: the base model is not asked; default: %(default)s")
    planner.add_argument("--epochs", default="3 3 1", help="of SFT, of the first iteration, of each later one; default: %(default)s")
    planner.add_argument("--lora-rank", type=int, default=0, help="0 trains all weights; default: %(default)s")
    planner.add_argument("--max-live", type=int, default=16, help="requests in flight; default: %(default)s")
    planner.add_argument("--max-model-len", type=int, default=8192, help="longest context; default: %(default)s")
    planner.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    planner.add_argument("--like", type=Path, metavar="RUN", help="take averages and speeds from this run, which has an iteration")
    planner.add_argument("--tokens-per-second", type=float, help="that the engine writes, of all devices; default: the run's")
    planner.add_argument("--training-tokens-per-second", type=float, help="of all devices; default: the run's")


def add_run_options(run: argparse.ArgumentParser) -> None:
    run.set_defaults(run=evaluate)
    run.add_argument("--env", required=True, choices=TABLE)
    run.add_argument("--out", required=True, metavar="FOLDER", help="gets eval-SPLIT.jsonl for each split")
    run.add_argument("--splits", default=",".join(TEST_SPLITS), metavar="A,B", help="default: %(default)s")
    run.add_argument("--tasks", type=int, help="how many tasks of a split, task types taking turns; default: all")
    run.add_argument("--types", metavar="A,B", help="only these task types; default: all")
    run.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    run.add_argument("--example", metavar="JSONL", help="show an expert trajectory of this file in the prompt: the first, or "
                     "where the environment's prompts have one for each task type, the first of the task's")
    run.add_argument("--best-of", type=int, default=1, metavar="K", help="play each task K times and keep the best "
                     "reward (the environment judges: an upper bound for any judge); use it with --temperature 1")
    run.add_argument("--no-deliberation", action="store_true", help="hold every turn to a line of thought that is no list "
                     "of actions: with the weights the same, what is deliberating itself worth?")
    add_report_option(run)
    add_engine_options(run, model="the policy to evaluate", temperature=0.0, max_tokens=512)
    add_workers_option(run)


# --- The paper's measures, one function each ----------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def reward_per_step(episode: dict) -> float:
    """The final reward over the number of steps (section 6.3, the bars of figure 3)."""
    return episode["reward"] / max(1, len(episode["steps"]))


def deliberation_rate(episode: dict) -> float:
    """The share of steps that deliberate (section 6.3, the lines of figure 3; section 6.4, the violins of
    figure 4)."""
    return mean("candidates" in step for step in episode["steps"])


def difficulty_bands(base: list[dict]) -> dict[str, set[str]] | None:
    """Tasks by the tertiles of the base model's reward (section 6.4): the bottom third is hard, the top third
    easy.

    None where ties leave a band empty: where nearly all rewards are the same there are no thirds to speak of.
    """
    rewards = sorted(episode["reward"] for episode in base)
    low, high = rewards[(len(rewards) - 1) // 3], rewards[2 * (len(rewards) - 1) // 3]
    bands = {"hard": {episode["task"] for episode in base if episode["reward"] <= low},
             "medium": {episode["task"] for episode in base if low < episode["reward"] <= high},
             "easy": {episode["task"] for episode in base if episode["reward"] > high}}
    return bands if all(bands.values()) else None


def action_tokens(episode: dict) -> float:
    """Tokens of an episode's Action lines (section 6.5), each by its share of the turn's characters, which
    needs no tokenizer; a turn without an action is all thought."""
    return sum(step["tokens"] * len(f"Action: {step['action']}") / len(step["text"])
               for step in episode["steps"] if step["action"])


def refused_rate(episode: dict) -> float:
    """The share of steps whose action the environment refused, or that had none."""
    return mean(not step["accepted"] for step in episode["steps"])


def refused_again(episodes: list[dict], fewest: int, most: float) -> list[bool]:
    """Of the steps that follow `fewest` to `most` refusals in a row, whether each was refused too."""
    again = []
    for episode in episodes:
        run = 0
        for step in episode["steps"]:
            refused = not step["accepted"]
            if fewest <= run <= most:
                again.append(refused)
            run = run + 1 if refused else 0
    return again


def loops(steps: list[dict]) -> list[bool]:
    """Of each step, whether it is at least the third in a row with the same action and answer."""
    turns = [(step["action"], step["observation"]) for step in steps]
    return [t > 1 and turns[t - 2] == turns[t - 1] == turns[t] for t in range(len(turns))]


def is_loop(episode: dict) -> bool:
    """Whether some action was repeated three times in a row with the same answer."""
    return any(loops(episode["steps"]))


def changes_its_mind(step: dict) -> bool:
    """Whether a deliberation ends in another action than the one it lists first."""
    return step["candidates"][0]["action"] != normalise(step["action"])


def interval(splits: list[list[float]]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of the splits' means over tasks, and its 95 % percentile bootstrap over
    tasks."""
    import numpy as np
    random = np.random.default_rng(0)
    means = [random.choice(np.array(values), (RESAMPLES, len(values))).mean(axis=1) for values in splits]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return mean(mean(values) for values in splits), float(low), float(high)


def summary(episodes: list[dict]) -> str:
    return (f"average reward {mean(row['reward'] for row in episodes):.3f} over {len(episodes)} tasks, per step "
            f"{mean(map(reward_per_step, episodes)):.3f}, deliberation rate "
            f"{mean(map(deliberation_rate, episodes)):.2f}, {mean(row['tokens'] for row in episodes):.0f} tokens a task")


# --- run ----------------------------------------------------------------------------------------------------------


def episode_row(episode: Playing, split: str) -> dict:
    return {"key": episode.key, "task": episode.task, "instruction": episode.instruction, "steps": episode.steps,
            "reward": episode.reward, "split": split, "end": episode.end,
            "tokens": sum(step.get("tokens", 0) for step in episode.steps)}


def best_of(tries: list[dict], task: str) -> dict:
    """The try with the best reward, the first of equals; its tokens are those of all tries (Table 4's
    terms)."""
    best = max(tries, key=lambda row: row["reward"])
    return best | {"key": task, "tokens": sum(row["tokens"] for row in tries), "tries": [row["reward"] for row in tries]}


def choose_example(task: str, experts: list[dict]) -> dict:
    """The first expert, or where the environment's prompts show one for each task type, the first of the task's."""
    own = (row for row in experts if not of(task).EXAMPLE_PER_TYPE or task_type(row["task"]) == task_type(task))
    return next(own, experts[0])


def chosen_tasks(args: argparse.Namespace) -> dict[str, list[str]]:
    """{split: its tasks} of the options."""
    splits = args.splits.split(",")
    for split in splits:
        if split not in SPLITS:
            raise UserError(f"--splits: unknown split '{split}'; known are {', '.join(SPLITS)}")
    return {split: choose_tasks(args.env, split, args.types, args.tasks, args.seed) for split in splits}


def read_examples(args: argparse.Namespace) -> list[dict]:
    experts = read_trajectories(args.example) if args.example else []
    if experts and label_of(experts[0]["task"]).removesuffix("-practice") != args.env:
        raise UserError(f"{args.example}: its trajectories are of {label_of(experts[0]['task'])}, not of {args.env}")
    return experts


def evaluate(args: argparse.Namespace) -> None:
    """Play the episodes of all splits together; the files appear when all are played."""
    started = time.time()
    tracking(args.report_to, Path(args.out))  # a missing package is named now, not at the end
    tasks, experts = chosen_tasks(args), read_examples(args)
    tries = {split: {f"{split}/{task}/try{n}": task for task in tasks[split] for n in range(args.best_of)} for split in tasks}
    settings = {name: value for name, value in settings_of(args).items() if name != "splits"}
    inputs = [args.model, *files_of(args.env), *([args.example] if args.example else [])]

    def episode_of(key: str) -> Playing:
        _, task = todo[key]
        return Playing(key, task, turn_limit(task, args.max_turns), example=choose_example(task, experts) if experts else None)

    with ExitStack() as stack:
        outputs = {split: stack.enter_context(StageOutput(Path(args.out) / f"eval-{split}.jsonl", settings | {"split": split},
                                                          inputs, [evaluate, file_of(args.env)])) for split in tasks}
        share = set(my_share({key: task for of_split in tries.values() for key, task in of_split.items()}))
        todo = {key: (split, task) for split in tasks for key, task in tries[split].items()
                if key in share and key not in outputs[split].done}
        if todo:
            pool = stack.enter_context(EnvironmentPool(args.env, workers_of(args, len(todo))))
            engine = make_engine(args)
            sampling = turn_sampling(args.temperature, args.max_tokens) | ({"regex": AT_ONCE} if args.no_deliberation else {})
            episodes = failures_last(play(map(episode_of, todo), engine, pool, sampling, args.seed),
                                     lambda episode: failure(episode.end), len(share))
            for episode in progress(episodes, total=len(todo), desc="evaluate"):
                if args.no_deliberation and any("candidates" in step for step in episode.steps):
                    raise UserError(f"{args.api_base or args.model} lets the model deliberate; --no-deliberation needs an "
                                    "engine that holds outputs to a regular expression, as vLLM does")
                split, _ = todo[episode.key]
                outputs[split].write(episode_row(episode, split))
            print(engine.usage())
            for output in outputs.values():  # of all of them together
                output.asked = engine.asked(len(todo), time.time() - started)
        if not join(*((output, tries[split]) for split, output in outputs.items())):
            return
        logs: dict[str, float] = {}
        for split, output in outputs.items():
            rows = [best_of([output.done[f"{split}/{task}/try{n}"] for n in range(args.best_of)], task)
                    for task in tasks[split]]
            failed = sum(bool(failure(row["end"])) for row in rows)
            output.finish(rows, {"average reward": mean(row["reward"] for row in rows), "failed": failed})
            logs |= {f"{split}/reward": mean(row["reward"] for row in rows), f"{split}/deliberation_rate": mean(map(deliberation_rate, rows))}
            print(f"{split}: {summary(rows)}{f', {failed} episodes failed' if failed else ''}; {output.path}")
    track(args.report_to, Path(args.out), logs)
    print(f"{sum(map(len, tasks.values()))} tasks in {duration(time.time() - started)}")


# --- report -------------------------------------------------------------------------------------------------------
#
# A run's evaluations are {model: {split: [episode, ...]}}, such as {"SFT": {"seen": [...], "unseen": [...]},
# ...}.


def evaluations(folder: Path) -> dict[str, dict[str, list[dict]]]:
    """All evaluations in a run's folder, in the order of the paper's tables.

    Raises UserError where one is not whole, or where two were made on other tasks: they could not be compared.
    """
    models: dict[str, dict[str, list[dict]]] = {}
    first: dict[str, Path] = {}
    for name, label in model_names(folder).items():
        files = {split: folder / name / f"eval-{split}.jsonl" for split in TEST_SPLITS}
        if not any(file.exists() for file in files.values()):
            continue
        stale = outdated(folder / name, folder)
        if stale:
            print(f"left out {label}: {stale}; `make` it again", file=sys.stderr)
            continue
        models[label] = {split: read_rows(file, Episode) for split, file in files.items()}
        for split, file in files.items():
            other = first.setdefault(split, file)
            mine = {row["task"] for row in models[label][split]}
            theirs = {row["task"] for row in next(iter(models.values()))[split]}
            if mine != theirs:
                raise UserError(f"{file} and {other} were made on different tasks ({len(mine - theirs)} and "
                                f"{len(theirs - mine)} are in only one of them); evaluate both with the same options")
    if not models:
        raise UserError(f"{folder}: has no evaluations (base/eval-seen.jsonl, iter0/eval-seen.jsonl, ...); "
                        "run `make all`")
    return models


def model_names(folder: Path) -> dict[str, str]:
    """What the report calls the models of a run, by their folders in it."""
    names = {"base": "base", "base-example": "base, one example", "iter0": "SFT"}
    for variant, label in {"": "SAND-{}", "more-sft": CONTROL.format("SAND-{}"), "no-sas": "SAND-{} w/o SAS",
                           "no-eac": "SAND-{} w/o EAC", "recover-only": "SAND-{} without deliberations"}.items():
        found = (path for path in (folder / variant).glob("iter*") if path.name[4:].isdigit() and path.name != "iter0")
        for path in sorted(found, key=lambda path: int(path.name[4:])):
            names[path.relative_to(folder).as_posix()] = label.format(path.name[4:])
    for path in (*sorted(folder.glob("*/best-of-*")), *sorted(folder.glob("*/no-deliberation"))):
        of = names.get(path.parent.name, path.parent.name)
        how = "acting at once" if path.name == "no-deliberation" else f"best of {path.name.removeprefix('best-of-')}"
        names[path.relative_to(folder).as_posix()] = f"{of}, {how}"
    return names


def outdated(model: Path, folder: Path) -> str | None:
    """Why a model's evaluation is of an earlier run, told by its files' times: it is older than the model, or
    the model is older than the one it was finetuned from, or a control than the model it was trained as long
    as. None where it is current, or where the models are not there."""
    home = model.parent if model.name.startswith(("best-of-", "no-deliberation")) else model
    if not re.fullmatch(r"iter\d+", home.name):
        return None
    before = int(home.name[4:]) - 1
    policy = (home.parent if before > 0 else folder) / f"iter{before}" / "model" / "config.json"
    mine = home / "model" / "config.json"
    trained_after = [policy, folder / home.name / "model" / "config.json"] if home.parent.name == "more-sft" else [policy]
    for earlier in trained_after:
        files = [file for file in (earlier, mine, model / "eval-unseen.jsonl") if file.exists()]
        for older, newer in pairwise(files):
            if newer.stat().st_mtime < older.stat().st_mtime:
                return f"{newer} is older than {older}"
    return None


def rewards(splits: dict[str, list[dict]], split: str) -> list[float]:
    return [row["reward"] for row in splits[split]]


def differences(splits: dict[str, list[dict]], reference: dict[str, list[dict]], split: str) -> list[float]:
    """Rewards less the reference's on the same task."""
    theirs = {row["task"]: row["reward"] for row in reference[split]}
    return [row["reward"] - theirs[row["task"]] for row in splits[split]]


def table(header: list[str], rows: Iterable[list[object]]) -> list[str]:
    """A Markdown table, as lines."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines] + [""]


def with_interval(splits: list[list[float]], sign: str = "") -> str:
    value, low, high = interval(splits)
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def control_of(name: str) -> str | None:
    """The control of SAND-k: SFT on the expert data for as many tokens. An ablation was trained on another
    number."""
    return CONTROL.format(name) if re.fullmatch(r"SAND-\d+", name) else None


def reward_section(models: dict) -> list[str]:
    sizes = {split: len(next(iter(models.values()))[split]) for split in TEST_SPLITS}
    lines = ["## Average reward (tables 2 and 3)", "",
             "95 % bootstrap intervals over tasks; differences are paired, on the same tasks. Token-matched SFT goes on "
             "from SFT, on the expert's trajectories as they were, for as many training tokens as SAND-k.", ""]

    def against(name: str, reference: str | None) -> str:
        if name == reference or reference not in models:
            return ""
        return with_interval([differences(models[name], models[reference], split) for split in TEST_SPLITS], "+")

    rows = [[name, *(with_interval([rewards(splits, split)]) for split in TEST_SPLITS),
             with_interval([rewards(splits, split) for split in TEST_SPLITS]), against(name, "SFT"),
             against(name, control_of(name))] for name, splits in models.items()]
    lines += table(["model", *(f"{split} (n={sizes[split]})" for split in TEST_SPLITS), "average", "against SFT",
                    "against token-matched SFT"], rows)
    failed = {name: sum(bool(failure(row["end"])) for row in both(splits)) for name, splits in models.items()}
    if any(failed.values()):
        lines += ["Episodes that failed for good, with an environment or a server, count with the reward they had reached: "
                  + ", ".join(f"{name} {count}" for name, count in failed.items() if count) + ".", ""]
    return lines


def quoted_section(env: str) -> list[str]:
    """The paper's own figures; none for practice tasks, which are not what it measured."""
    if env not in TABLE:
        return []
    return ["<details><summary>The paper's own figures, quoted from its tables 2 and 3 (percent, all test "
            "tasks)</summary>", "", *table(["method", *TEST_SPLITS], of(env).PAPER), "</details>", ""]


def step_section(models: dict) -> list[str]:
    lines = ["## Reward and deliberation per step (figure 3)", "", "![figure 3](figure3.png)", ""]
    return lines + table(
        ["model", *(f"reward/step {split}" for split in TEST_SPLITS), *(f"deliberation rate {s}" for s in TEST_SPLITS)],
        ([name, *(f"{mean(map(reward_per_step, splits[split])):.3f}" for split in TEST_SPLITS),
          *(f"{mean(map(deliberation_rate, splits[split])):.2f}" for split in TEST_SPLITS)]
         for name, splits in models.items()))


def band_rates(models: dict) -> dict[str, dict[str, list[float]]] | None:
    """Figure 4's data: {SAND-k: {band: deliberation rate of each unseen task}}; None where there are no bands.

    The paper's base has an example in its prompt (section 5.2); the one without stands in for it.
    """
    base = models.get("base, one example") or models.get("base")
    bands = difficulty_bands(base["unseen"]) if base else None
    if bands is None or "SAND-1" not in models:
        return None
    return {name: {band: [deliberation_rate(row) for row in splits["unseen"] if row["task"] in tasks]
                   for band, tasks in bands.items()}
            for name, splits in models.items() if re.fullmatch(r"SAND-\d+", name)}


def band_section(rates: dict[str, dict[str, list[float]]] | None) -> list[str]:
    lines = ["## Deliberation by difficulty (figure 4)", ""]
    if rates is None:
        return [*lines, "Not drawn: the bands are tertiles of the base model's reward on the unseen split, and either ties "
                "leave a band empty or the base or SAND-1 has not been evaluated.", ""]
    return [*lines, "![figure 4](figure4.png)", "", "Medians, as the paper quotes them, and means.", "", *table(
        ["model", "hard", "medium", "easy"],
        ([name, *(f"{median(values):.2f}, {mean(values):.2f} (n={len(values)})" for values in bands.values())]
         for name, bands in rates.items()))]


def token_section(models: dict) -> list[str]:
    lines = ["## Tokens per task (table 4)", "", "What the agent wrote, averaged over both splits; an action's tokens are "
             "its share of the turn's characters. A best-of-K row counts all K tries.", ""]
    totals = {name: mean(row["tokens"] for row in both(splits)) for name, splits in models.items()}
    reference = totals.get("SFT")
    return lines + table(
        ["model", "tokens", "of SFT's", "thought", "action"],
        ([name, f"{totals[name]:.0f}", f"{totals[name] / reference:.1f}x" if reference else "",
          f"{totals[name] - acting:.0f}" if "best of" not in name else "",
          f"{acting:.0f}" if "best of" not in name else ""]
         for name, splits in models.items() for acting in [mean(map(action_tokens, both(splits)))]))


def both(splits: dict[str, list[dict]]) -> list[dict]:
    return [row for split in TEST_SPLITS for row in splits[split]]


def type_section(models: dict) -> list[str]:
    kinds = Counter(task_type(row["task"]) for row in both(next(iter(models.values()))))
    return ["## Average reward by task type", "", *table(
        ["task type", "tasks", *models],
        ([kind, kinds[kind], *(f"{mean(row['reward'] for row in both(splits) if task_type(row['task']) == kind):.3f}"
                               for splits in models.values())] for kind in sorted(kinds)))]


def ending_section(models: dict) -> list[str]:
    ends = sorted({row["end"].split(":")[0] for splits in models.values() for row in both(splits)})
    counts = {name: Counter(row["end"].split(":")[0] for row in both(splits)) for name, splits in models.items()}
    lines = ["## Why episodes ended, and when they succeeded", "", "![success by turn](success.png)", ""]
    lines += table(["model", *ends], ([name, *(counts[name][end] for end in ends)] for name in models))
    lines += ["## Actions", "", "Refused: the share of steps whose action the environment did not accept, or that had "
              "none; again: of those that follow one refusal, or two and more in a row. In a loop: episodes with an action "
              "repeated three times in a row with the same answer.", ""]
    return lines + table(
        ["model", "refused", "again after one", "again after more", "without an action", "in a loop"],
        ([name, f"{mean(map(refused_rate, both(splits))):.2f}",
          *(fraction(sum(again), len(again)) for again in (refused_again(both(splits), 1, 1),
                                                        refused_again(both(splits), 2, math.inf))),
          f"{mean(mean(not step['action'] for step in row['steps']) for row in both(splits)):.2f}",
          fraction(sum(map(is_loop, both(splits))), len(both(splits)))] for name, splits in models.items()))


def calibration_section(models: dict, folder: Path) -> list[str]:
    """How deliberation behaves: in evaluations, and in the rollouts of flagged steps."""
    lines = ["## Calibration of deliberation", ""]
    rows = []
    for name, splits in models.items():
        steps = [step for row in both(splits) for step in row["steps"] if "candidates" in step and step["action"]]
        if steps:
            changed = sum(map(changes_its_mind, steps))
            rows.append([name, len(steps), fraction(changed, len(steps))])
    lines += ["How often a deliberating step ends in another action than the one it lists first.", "",
              *table(["model", "deliberating steps", "another than the first"], rows)] if rows else [
              "No model deliberates.", ""]
    rows, spread = [], []
    for path in iteration_files(folder, "rollouts.jsonl"):
        rollouts = [row | {"steps": row["steps"][:1]} for row, _ in checked_rows(path, Rollout, may_be_empty=True)
                    if not failure(row["end"])]
        sampled = [row for row in rollouts if row["candidate"]]
        expert = [row for row in rollouts if not row["candidate"]]
        groups = [[row["reward"] for row in sampled if ("candidates" in row["steps"][0]) == with_it]
                  for with_it in (True, False)]
        rows.append([path.parent.name, *(f"{mean(group):.3f} (n={len(group)})" if group else "none" for group in groups)])
        beaten = sum(row["reward"] > row["expert_reward"] for row in sampled)
        spread.append([path.parent.name, len(expert), f"{len(rollouts) / max(1, len(expert)):.1f}",
                       f"{mean(row['reward'] for row in expert):.3f}", f"{mean(row['reward'] for row in sampled):.3f}",
                       fraction(sum(not row["accepted"] for row in sampled), len(sampled)), fraction(beaten, len(sampled))])
    if rows:
        lines += ["Average reward of the rollouts from flagged steps, by whether the sampled thought deliberated.", "",
                  *table(["iteration", "with deliberation", "without"], rows),
                  "## Candidates and their rollouts (stage 2)", "",
                  *table(["iteration", "flagged steps", "actions a step", "reward, expert", "reward, sampled",
                          "sampled and refused", "sampled and better than the expert"], spread)]
    return lines


def iteration_files(folder: Path, name: str) -> list[Path]:
    found = (path for path in folder.glob(f"iter*/{name}") if path.parent.name[4:].isdigit())
    return sorted(found, key=lambda path: int(path.parent.name[4:]))


def stage_section(folder: Path) -> list[str]:
    """What the stages counted: flagged steps, templates in place of critiques, steps that deliberate in the
    training data."""
    rows, reasons = [], []
    for path in iteration_files(folder, "deliberations.jsonl"):
        iteration = path.parent
        if not ((iteration / "candidates.jsonl").exists() and (iteration / "critiques.jsonl").exists()):
            continue
        candidates = read_rows(iteration / "candidates.jsonl", Candidates)
        critiques = read_rows(iteration / "critiques.jsonl", Critique, may_be_empty=True)
        steps = [step for row in read_rows(path, Trajectory) for step in row["steps"]]
        said = sidecar(path).get("counts", {})
        rows.append([iteration.name, fraction(sum(row["flagged"] for row in candidates), len(candidates)),
                     critic_of(iteration),
                     fraction(sum(bool(row["draft_errors"]) and not row["used_template"] for row in critiques), len(critiques)),
                     fraction(sum(row["used_template"] for row in critiques), len(critiques)),
                     fraction(said["retried"], said["drafted"]) if said else "unknown",
                     fraction(said["no draft of use"], said["drafted"]) if said else "unknown",
                     fraction(sum("candidates" in step for step in steps), len(steps))])
        reasons.append([iteration.name, tally(row_error for row in critiques for row_error in row["draft_errors"]),
                        tally(said.get("draft errors", {}))])
    return ["## What the stages did", "", *table(
        ["iteration", "steps flagged", "critic", "critiques retried", "from the template", "deliberations retried",
         "without a draft of use", "training steps that deliberate"], rows), "Why drafts were not used:", "", *table(
        ["iteration", "critiques", "deliberations"], reasons)] if rows else []


def critic_of(iteration: Path) -> str:
    asked = sidecar(iteration / "critiques.jsonl").get("settings", {})
    return Path(asked.get("model", "unknown")).name if asked.get("attempts", 1) else "none asked"


def expert_section(folder: Path) -> list[str]:
    """Where the experts come from: collected ones have thoughts from templates, which the paper's have not."""
    if not (folder / "expert.jsonl").exists():
        return []
    sources = Counter(row["source"] for row in read_rows(folder / "expert.jsonl", Trajectory))
    text = tally(sources)
    collected = "" if set(sources) == {"published"} else (" They were collected here, with thoughts from templates; the paper's "
                                                          "are published trajectories (`PUBLISHED`).")
    return [f"Expert trajectories: {text}.{collected}", ""]


def training_section(models: dict, folder: Path) -> list[str]:
    """What every model was finetuned on, by its sidecar: which differences in reward are differences in
    data."""
    rows = []
    for name, label in model_names(folder).items():
        said = sidecar(folder / name / "model") if label in models else {}
        if said:
            epochs, counts = said["settings"]["epochs"], said["counts"]
            rows.append([label, counts["trajectories"], f"{epochs:.3g}", f"{counts['tokens'] * epochs:,.0f}",
                         counts["optimizer_steps"]])
    return ["## What the models were finetuned on", "", *table(
        ["model", "trajectories", "epochs", "tokens in all", "optimizer steps"], rows)] if rows else []


def source_section(models: dict, folder: Path) -> list[str]:
    return ["## Where the numbers come from", "",
            f"`python evaluate.py report {folder}` read the whole transcripts in eval-seen.jsonl and eval-unseen.jsonl of "
            f"{len(models)} models ({', '.join(models)}), and each iteration's candidates.jsonl, rollouts.jsonl, "
            "critiques.jsonl and deliberations.jsonl. `make -n` with the run's variables shows the commands that wrote "
            "them.", ""]


def report(folder: Path) -> None:
    models = evaluations(folder)
    env = label_of(next(iter(models.values()))["seen"][0]["task"])
    lines = [f"# {folder.name} ({env})", ""]
    rewarded, stages, rates = reward_section(models), stage_section(folder), band_rates(models)
    lines += rewarded + quoted_section(env) + expert_section(folder) + training_section(models, folder) + stages
    lines += step_section(models) + band_section(rates) + token_section(models)
    lines += type_section(models) + ending_section(models) + calibration_section(models, folder)
    lines += source_section(models, folder)
    figures = {"figure3": draw_steps(models), "success": draw_success(models)}
    if rates:
        figures["figure4"] = draw_bands(rates)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    with writing(folder / "report.md") as file:
        file.write("\n".join(lines).rstrip() + "\n")
    print("\n".join(rewarded + stages))
    print(f"{folder / 'report.md'} has more")


# --- Figures ------------------------------------------------------------------------------------------------------


def new_figure(columns: int = 1, width: float = 7.0):
    from matplotlib.figure import Figure  # no pyplot: works without a display and keeps no state
    figure = Figure(figsize=(width, 3.4), dpi=120, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, sharey=columns > 1)[0]


def draw_steps(models: dict):
    """Figure 3: reward per step as bars, deliberation rate per step as lines, over SFT and the iterations."""
    names = [name for name in models if re.fullmatch(r"SFT|SAND-\d+", name)] or list(models)
    figure, (axis,) = new_figure()
    rates = axis.twinx()
    for offset, split in zip((-0.2, 0.2), TEST_SPLITS, strict=True):
        places = [place + offset for place in range(len(names))]
        axis.bar(places, [mean(map(reward_per_step, models[name][split])) for name in names], width=0.36,
                 label=f"reward, {split}", color={"seen": "#9ecae1", "unseen": "#3182bd"}[split])
        rates.plot(places, [mean(map(deliberation_rate, models[name][split])) for name in names], marker="o",
                   label=f"deliberation, {split}", color={"seen": "#fdae6b", "unseen": "#e6550d"}[split])
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("average reward per step")
    rates.set_ylabel("deliberation rate per step")
    rates.set_ylim(-0.02, 1.02)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    return figure


def draw_bands(rates: dict[str, dict[str, list[float]]]):
    """Figure 4: the distribution of deliberation rates in the three difficulty bands, one panel an
    iteration."""
    figure, axes = new_figure(len(rates), width=max(4.0, 3.0 * len(rates)))
    for axis, (name, bands) in zip(axes, rates.items(), strict=True):
        axis.violinplot(list(bands.values()), showmedians=True)
        axis.set_xticks(range(1, len(bands) + 1), [f"{band}\n(n={len(values)})" for band, values in bands.items()])
        axis.set_title(name)
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("deliberation rate of a task")
    return figure


def success_by_turn(episodes: list[dict]) -> list[float]:
    """The share of tasks that have succeeded within 1, 2, ... turns."""
    longest = max(len(row["steps"]) for row in episodes)
    at = Counter(len(row["steps"]) for row in episodes if row["end"] == "success")
    return [count / len(episodes) for count in accumulate(at[turn] for turn in range(1, longest + 1))]


def draw_success(models: dict):
    figure, axes = new_figure(2)
    longest = max(len(row["steps"]) for splits in models.values() for row in both(splits))
    for axis, split in zip(axes, TEST_SPLITS, strict=True):
        for name, splits in models.items():
            if "best of" not in name:
                curve = success_by_turn(splits[split])
                curve += [curve[-1]] * (longest - len(curve))
                axis.step(range(1, longest + 1), curve, where="post", label=name)
        axis.set_title(split)
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel("turns")
    axes[0].set_ylabel("share of tasks solved by then")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    return figure


# --- plan ---------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What a part of a run takes for each of its rows: on average in a run that is like it, or as assumed."""

    requests: float
    tokens_in: float
    tokens_out: float
    seconds: float | None = None  # None where no run has told
    start: float = 0.0  # seconds before the first row


def assumed_parts(typical: dict, n: int, most: float) -> dict[str, Part]:
    """{part: what a row of it takes} where there is no run yet."""
    steps, turns, first, step, acting, deliberating = typical.values()
    longer = (deliberating - acting) / turns
    acting, turns = acting * min(1, most / turns), min(turns, most)

    def prompts(begin: float, end: float, longer: float = 0) -> float:
        """Tokens of the prompts of the turns from one to another."""
        return (end - begin) * (first + (step + longer) * (begin + end) / 2)

    return {"SFT": Part(turns, prompts(0, turns), acting), "SAND": Part(turns, prompts(0, turns, longer), acting + turns * longer),
            "candidates": Part(1, prompts(0, steps) / steps, n * acting / turns),
            "rollouts": Part(turns / 2, prompts(turns / 2, turns), acting / 2),
            "critiques": Part(1.3, 1.3 * (first + step * turns), 1.3 * 100),
            "deliberations": Part(1.5, 1.5 * (first + step * steps / 2 + 300), 1.5 * 250),
            "experts' tokens": Part(0, first + step * steps, 0), "deliberations' tokens": Part(0, first + (step + longer / 2) * steps, 0)}


def measured_parts(run: Path) -> dict[str, Part]:
    """The same from the sidecars of a run, for the parts that it has."""
    found: dict[str, Part] = {}
    files = {"base": run / "base" / "eval-unseen.jsonl", "SFT": run / "iter0" / "eval-unseen.jsonl",
             "SAND": run / "iter1" / "eval-unseen.jsonl"}
    stages = {name: run / "iter1" / f"{name}.jsonl" for name in ("candidates", "rollouts", "critiques", "deliberations")}
    for name, file in (files | stages).items():
        if asked := sidecar(file).get("counts", {}).get("asked"):
            rows = asked["rows"]
            found[name] = Part(asked["requests"] / rows, asked["tokens in"] / rows, asked["tokens out"] / rows,
                               (asked["seconds"] - asked["seconds to start"]) / rows, asked["seconds to start"])
    for name, model in ("experts' tokens", run / "iter0" / "model"), ("deliberations' tokens", run / "iter1" / "model"):
        if (file := model / "training.json").exists():
            made = json.loads(file.read_text())
            found[name] = Part(0, made["tokens"] / made["trajectories"], 0,
                               made["seconds"] / made["trajectories"] / made["settings"]["epochs"])
    return found


def measured_shares(run: Path) -> dict[str, float]:
    """How many experts a task, steps an expert, flagged ones a step and sampled actions a flagged step a run has."""
    found = {}
    expert, candidates, rollouts = (sidecar(run / name).get("counts", {}) for name in
                                    ("expert.jsonl", "iter1/candidates.jsonl", "iter1/rollouts.jsonl"))
    if expert:
        found["experts"] = expert["rows"] / expert["tasks"]
    if candidates:
        found |= {"steps": candidates["rows"] / expert["rows"], "flagged": candidates["flagged"] / candidates["rows"]}
    if rollouts and candidates["flagged"]:
        found["sampled"] = rollouts["sampled"] / candidates["flagged"]
    return found


def plan(args: argparse.Namespace) -> None:
    """Print what a run will ask for and what it needs, before anything is spent."""
    typical = of(args.env).TYPICAL
    measured = measured_parts(args.like) if args.like else {}
    if args.like and not measured:
        raise UserError(f"{args.like}: has no sidecars that tell what its stages have asked for; run it again with this version")
    parts = assumed_parts(typical, args.n_samples, args.max_turns or math.inf) | measured
    parts.setdefault("base", parts["SFT"])
    shares = {"experts": 1.0, "steps": typical["steps"], "flagged": 0.5, "sampled": 0.3 * args.n_samples}
    shares |= measured_shares(args.like) if args.like else {}
    tasks = len(choose_tasks(args.env, "train", args.types, args.tasks, args.seed))
    tests = sum(len(choose_tasks(args.env, split, args.types, args.test_tasks, args.seed)) for split in TEST_SPLITS)
    experts = tasks * shares["experts"]
    steps = experts * shares["steps"]
    flagged = steps * shares["flagged"]
    sampled = flagged * shares["sampled"]
    asked = bool(args.attempts)
    first, later, last = map(float, args.epochs.split())
    rows = [("base, evaluation", "base", 1, tests), ("SFT, training", "experts' tokens", 1, first * experts),
            ("SFT, evaluation", "SFT", 1, tests), ("stage 1", "candidates", args.iterations, steps),
            ("stage 2", "rollouts", args.iterations, sampled), ("stage 3", "critiques", args.iterations, asked * (flagged + sampled)),
            ("stage 4", "deliberations", args.iterations, asked * flagged),
            ("stage 5", "deliberations' tokens", 1, experts * (later + last * (args.iterations - 1))),
            ("SAND, evaluation", "SAND", args.iterations, tests)]
    print_costs([cost(what, parts[part], times, count, args) for what, part, times, count in rows])
    print(f"{tasks} training tasks, {experts:.0f} experts, {steps:.0f} steps, {flagged:.0f} flagged, {sampled:.0f} sampled actions an "
          f"iteration; {tests} test tasks. Per row " + (f"as in {args.like}" if args.like else "as assumed: a small run tells better, "
          "with LIKE=runs/NAME") + ".\n")
    print_needs(args, rollouts=sampled)


def cost(what: str, part: Part, times: int, rows: float, args: argparse.Namespace) -> list[object]:
    """[what, rows, requests, tokens in, tokens out, seconds or None]"""
    numbers = [times * rows * each for each in (part.requests, part.tokens_in, part.tokens_out)]
    rate = args.tokens_per_second if part.requests else args.training_tokens_per_second
    seconds = times * (part.start + rows * part.seconds) if rows and part.seconds is not None else None if rows else 0.0
    if rate:
        seconds = (numbers[2] if part.requests else numbers[1]) / rate
    return [what, times * rows, *numbers, seconds]


def print_costs(costs: list[list]) -> None:
    total = [sum(row[place] for row in costs if row[2]) for place in (2, 3, 4)]
    known = [row[5] for row in costs if row[5] is not None]
    costs = [*costs, ["in all", "", *total, sum(known) if len(known) == len(costs) else None]]
    print(*table(["part", "rows", "requests", "tokens in", "tokens out", "hours"],
                 ([what, *(f"{number:,.0f}" if number != "" else "" for number in numbers),
                   "?" if seconds is None else f"{seconds / 3600:.2f}"] for what, *numbers, seconds in costs)), sep="\n")
    if len(known) < len(costs) - 1:
        print("Hours need a rate: --tokens-per-second and --training-tokens-per-second, or a run to go by, --like.\n")


def print_needs(args: argparse.Namespace, rollouts: float) -> None:
    """Memory and disk that the model needs, by its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(args.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        print(f"What '{args.model}' needs is unknown: {str(error).splitlines()[0]}")
        return
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_hidden_layers * heads * size  # keys and values in bf16
    number, gib = model.num_parameters(), 1 << 30
    head = model.get_output_embeddings()
    trained = args.lora_rank * sum(sum(module.weight.shape) for module in model.modules()
                                   if isinstance(module, torch.nn.Linear) and module is not head) or number
    print(*table(["need", "GiB"], [
        ["weights while generating, bf16", f"{2 * number / gib:.1f}"],
        [f"cache of {args.max_live} contexts of {args.max_model_len} tokens, at most", f"{args.max_live * args.max_model_len * token / gib:.1f}"],
        ["training: weights in fp32, gradients and Adam's state, of all devices", f"{(4 * number + 12 * trained) / gib:.1f}"],
        [f"disk, {args.iterations + 1} models in bf16", f"{(args.iterations + 1) * 2 * number / gib:.1f}"],
        ["disk, two checkpoints of a training", f"{2 * 12 * trained / gib:.1f}"],
        ["disk, rows of an iteration", f"{rollouts * 30 * 900 / gib:.2f}"]]), sep="\n")


# --- view ---------------------------------------------------------------------------------------------------------


def view(folder: Path) -> None:
    """Write index.html: view.html with the run's report, figures and tasks in it."""
    models = evaluations(folder)
    figures = {path.name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in sorted(folder.glob("*.png"))}
    try:
        page, text = (ROOT / "view.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); `make report` writes report.md, git restores view.html") from None
    before, end, after = page.rpartition("</body>")
    tasks = []
    with writing(folder / "index.html") as file:
        file.write(before)
        for entry, rows in task_pages(folder, models):
            tasks.append(entry)
            packed = gzip.compress(json.dumps(rows).encode(), mtime=0)  # the same bytes for the same rows
            file.write(f'<script type="text/plain" class="task">{base64.b64encode(packed).decode()}</script>\n')
        run = {"name": folder.name, "report": text, "figures": figures, "models": list(models), "tasks": tasks}
        # No `<` in it: nothing that a model has written ends the script.
        file.write('<script type="application/json" id="run">' + json.dumps(run).replace("<", "\\u003c") + f"</script>\n{end}{after}")
    print(f"{folder / 'index.html'}: {len(tasks)} tasks; open it in a browser")


def task_pages(folder: Path, models: dict) -> Iterator[tuple[dict, dict]]:
    """(what the list of tasks needs, the rows) of every task of a run."""
    experts = {row["task"]: row for row in read_rows(folder / "expert.jsonl", Trajectory)} if (folder / "expert.jsonl").exists() else {}
    episodes: dict[str, dict[str, dict]] = {}
    for model, splits in models.items():
        for row in both(splits):
            episodes.setdefault(row["task"], {})[model] = row | {"steps": marked(row["steps"])}
    read = functools.cache(rows_by_task)  # variants share files with the run
    stages = {path.parent.relative_to(folder).as_posix(): stage_rows(folder, path.parent, read)
              for path in sorted(folder.rglob("deliberations.jsonl"))}
    for task in sorted(experts.keys() | episodes.keys(), key=lambda task: re.sub(r"\d+", lambda digits: digits[0].zfill(9), task)):
        played = episodes.get(task, {})
        iterations = {name: iteration for name, of_task in stages.items() if (iteration := of_task(task))}
        candidates = [each for iteration in iterations.values() for step in iteration["steps"] for each in step.get("candidates", ())]
        instruction = next(iter(played.values()), experts.get(task))["instruction"]
        yield {"task": task, "training": task in experts, "rewards": {model: row["reward"] for model, row in played.items()},
               "ends": {model: row["end"] for model, row in played.items()},
               "deliberated_and_failed": [model for model, row in played.items() if row["reward"] < 0.999 and deliberation_rate(row)],
               "refused": [model for model, row in played.items() if refused_rate(row)],
               "loops": [model for model, row in played.items() if is_loop(row)],
               "flagged": sum(step["flagged"] for iteration in iterations.values() for step in iteration["steps"]),
               "templates": sum(each["critique"]["used_template"] for each in candidates if "critique" in each),
               "no_draft": sum("draft_errors" in step["learnt"] for iteration in iterations.values() for step in iteration["steps"])}, {
                   "task": task, "instruction": instruction, "expert": experts.get(task), "iterations": iterations, "episodes": played}


def marked(steps: list[dict]) -> list[dict]:
    """The steps, those marked that do for the third time in a row what has changed nothing."""
    return [step | ({"loops": True} if is_third else {}) for step, is_third in zip(steps, loops(steps), strict=True)]


def stage_rows(folder: Path, iteration: Path, read: Callable) -> Callable[[str], dict]:
    """What an iteration has of a task: each step as it is learnt, with its candidates, their rollouts and critiques.
    `read` is `rows_by_task`."""
    def rows_of(name: str, kind: type) -> Callable[[str], list[dict]]:
        shared = [path for path in (iteration / name, folder / iteration.name / name) if path.exists()]
        return read(shared[0] if shared else None, kind)

    learnt, sampled = rows_of("deliberations.jsonl", Trajectory), rows_of("candidates.jsonl", Candidates)
    rolled, judged = rows_of("rollouts.jsonl", Rollout), rows_of("critiques.jsonl", Critique)

    def of_task(task: str) -> dict:
        rows = {row["step"]: row for row in sampled(task)}
        places = {(row["step"], row["candidate"]): {"rollout": row | {"steps": marked(row["steps"])}} for row in rolled(task)}
        for row in judged(task):
            places.setdefault((row["step"], row["candidate"]), {})["critique"] = row
        for trajectory in learnt(task):
            return {"replaced_from": trajectory.get("replaced_from"), "steps": [
                {"learnt": step, "text": agent_turn(step), "flagged": bool(rows.get(t) and rows[t]["flagged"])} |
                ({"invalid": rows[t]["invalid"], "candidates": [each | places.get((t, place), {}) for place, each in enumerate(rows[t]["candidates"])]}
                 if t in rows else {}) for t, step in enumerate(trajectory["steps"], 1)]}
        return {}
    return of_task


# --- compare, show, verify ---------------------------------------------------------------------------------------------


def compare(folders: list[Path]) -> None:
    """Print one table of several runs; those whose names differ only in -seedN are averaged, with their
    spread."""
    groups: dict[str, list[dict]] = {}
    for folder in folders:
        groups.setdefault(re.sub(r"-seed\d+$", "", folder.name), []).append(evaluations(folder))
    rows = []
    for group, runs in groups.items():
        for name in dict.fromkeys(name for models in runs for name in models):
            having = [models[name] for models in runs if name in models]
            rows.append([group, name, len(having), *(over_seeds([mean(rewards(splits, split)) for splits in having])
                                                     for split in TEST_SPLITS),
                         over_seeds([mean(mean(rewards(splits, split)) for split in TEST_SPLITS) for splits in having])])
    print("Average rewards; mean ± standard deviation over seeds.\n")
    print("\n".join(table(["run", "model", "seeds", *TEST_SPLITS, "average"], rows)).rstrip())
    print("\n".join(across_environments([models for runs in groups.values() for models in runs])).rstrip())


def across_environments(runs: list[dict]) -> list[str]:
    """Table 2 for runs in different environments, one each: both splits of each, and the average of them all."""
    by_env = {label_of(both(next(iter(models.values())))[0]["task"]): models for models in runs}
    if len(by_env) < 2 or len(by_env) < len(runs):
        return []
    names = [name for name in next(iter(by_env.values())) if all(name in models for models in by_env.values())]
    columns = [(env, split) for env in by_env for split in TEST_SPLITS]
    values = {name: [mean(rewards(by_env[env][name], split)) for env, split in columns] for name in names}
    return ["", "Across environments (table 2).", "", *table(
        ["model", *(f"{env} {split}" for env, split in columns), "average"],
        ([name, *(f"{value:.3f}" for value in values[name]), f"{mean(values[name]):.3f}"] for name in names))]


def over_seeds(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def show(file: Path, task: str) -> None:
    """Print one episode: observations as they are, thoughts indented, the candidates of a deliberation set
    apart."""
    rows = [row for row in read_rows(file, Episode) if f"/{row['task']}".endswith(f"/{task}")]
    if len(rows) != 1:
        raise UserError(f"{file}: {len(rows)} episodes of a task that ends in '{task}'; name one of its tasks")
    (row,) = rows
    print(f"{row['task']} ({row['split']}): reward {row['reward']:.2f}, {row['end']}, {row['tokens']} tokens\n\n"
          f"{row['instruction']}")
    for number, step in enumerate(row["steps"], 1):
        print(f"\n--- {number}" + (" (deliberates)" if "candidates" in step else ""))
        for line in filter(None, step["thought"].split("\n")):
            print(f"    {'    ' if line.startswith('- ') else ''}{line}")
        print(f"> {step['action'] or '(no action)'}\n{step['observation']}")


def verify(run: Path) -> None:
    """Compare the outputs in a run's folder, their inputs and the code with what their sidecars say; print what
    no longer matches. Exit status 1 if anything differs. Paths are those of the project's folder."""
    sidecars = sorted(run.rglob("*.meta.json"))
    if not sidecars:
        raise UserError(f"{run}: has no *.meta.json; name a run that `make all` has made")
    here = {name: version(name) for name in PACKAGES}
    differences = 0
    for path in sidecars:
        output = path.with_name(path.name.removesuffix(".meta.json"))
        output = output if output.is_dir() else output.with_name(output.name + ".jsonl")
        said = sidecar(output)
        now = {name: digest(ROOT / name) for name in (relative(output), *said["inputs"])}
        now |= {name: code_digest(name) for name in said["code"]}
        found = [f"{name}: {'is gone' if now[name] is None else 'has changed'}"
                 for name, then in {relative(output): said["sha256"], **said["inputs"], **said["code"]}.items()
                 if then is not None and now[name] != then]
        found += [f"{name} was {then}, is {here[name]}" for name, then in said["versions"].items()
                  if name in here and here[name] != then]
        print(f"{relative(output)}: {'; '.join(found) or 'as it was made'}")
        differences += len(found)
    unaccounted = [path for path in run.rglob("*.jsonl") if not sidecar_path(path).exists()]
    for path in unaccounted:
        print(f"{path}: has no sidecar; what made it?")
    if differences + len(unaccounted):
        print(f"{differences + len(unaccounted)} differences")
        sys.exit(1)


def main() -> None:
    args = parse_arguments()
    args.run(args)


if __name__ == "__main__":
    run_stage(main)
