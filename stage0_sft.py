"""Stage 0: behaviour initialisation (section 4.1): expert trajectories, then supervised finetuning on them.

    python stage0_sft.py expert --env scienceworld --num-tasks 24 --out runs/x/expert.jsonl
    python stage0_sft.py expert --env alfworld --published alfworld_sft.json --out runs/x/expert.jsonl
    python stage0_sft.py train --model models/SmolLM2-135M-Instruct --data runs/x/expert.jsonl --out runs/x/iter0/model

`expert` writes D_exp, one trajectory (u, z_1, a_1, o_1, ..., z_L, a_L) a row:

    {"key": "scienceworld/find-animal/12", "env": "scienceworld", "task": "scienceworld/find-animal/12",
     "split": "train", "instruction": "Your task is to find a(n) animal. ...", "reward": 1.0, "source": "gold path",
     "steps": [{"thought": "...", "action": "look around", "observation": "...", "deliberated": false}, ...]}

ScienceWorld's experts are the simulator's gold paths, shortened; ALFWorld's the handcoded expert, which explores like a
person; or published trajectories are imported. Whatever the source, a trajectory is what the environment answered when
the actions were replayed in it. `train` minimises equation 2.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import (ENVIRONMENTS, PROMPTS, TRAJECTORY, AlfWorld, ScienceWorld, StageOutput, UserError,
                    add_training_options, duration, environment_of, finetune, is_valid, list_tasks, make_environment,
                    parse_turn, progress, run_stage, scienceworld_table, task_type, turn_limit)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    expert = commands.add_parser("expert", help="collect or import expert trajectories")
    expert.add_argument("--env", required=True, choices=ENVIRONMENTS)
    expert.add_argument("--out", required=True, metavar="JSONL")
    expert.add_argument("--num-tasks", type=int, help="how many training tasks to try, task types taking turns; default: all")
    expert.add_argument("--task-types", metavar="A,B", help="only these task types; default: all")
    expert.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    expert.add_argument("--published", metavar="JSON", help="import expert trajectories from a JSON list of {id or "
                        "game_file, conversations}")
    expert.add_argument("--skip-bad", action="store_true", help="with --published: leave out rows that cannot be read")
    expert.add_argument("--workers", type=int, default=os.cpu_count(), help="environments at once; default: %(default)s")
    expert.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train = commands.add_parser("train", help="finetune on them")
    add_training_options(train, epochs=3)
    return parser.parse_args()


# --- ScienceWorld: gold paths, shortened --------------------------------------------------------------------------


def scienceworld_expert(env: ScienceWorld, task: str, max_turns: int | None, seed: int) -> dict | None:
    """The simulator's gold path in its shortest form that still reaches the full score within the turn limit."""
    env.load(task, gold_path=True)
    gold = env.gold_path()
    for actions in (teleporting(gold), gold):  # some tasks need the time that walking spends
        trajectory = replay(env, task, [("", action) for action in actions], max_turns, drop=is_idle)
        if trajectory["reward"] >= 0.999:
            goal = trajectory["instruction"]
            for t, step in enumerate(trajectory["steps"]):
                step["thought"] = scienceworld_thought(goal, trajectory["steps"][:t], step["action"])
            return trajectory | {"source": "gold path"}
    return None


def teleporting(gold: list[str]) -> list[str]:
    """Gold paths open doors and walk; an agent teleports, and looks around where it arrives."""
    actions: list[str] = []
    place = None
    for action in gold:
        if action.startswith("open door to "):
            continue
        if action.startswith("go to "):
            place = action.removeprefix("go to ")
            continue
        if place is not None:
            actions += [f"teleport to {place}"] + (["look around"] if action != "look around" else [])
            place = None
        actions.append(action)
    return actions


def is_idle(action: str, observation: str) -> bool:
    """Opening what is open already: gold paths do it, since they do not count on open containers."""
    return action.startswith("open ") and "already open" in observation


def scienceworld_thought(goal: str, earlier: list[dict], action: str) -> str:
    """A short ReAct thought for an expert's action, from what the agent knows before it acts."""
    verb, _, rest = action.partition(" ")
    reasons = {
        "look": "I look at what is here before I decide.",
        "teleport": f"What I need next should be in the {rest.removeprefix('to ')}, so I go there.",
        "focus": f"The {rest.removeprefix('on ')} is what the task asks for, so I focus on it.",
        "pick": f"I will need the {rest.removeprefix('up ')}, so I take it with me.",
        "move": "It belongs in the {1}, so I move it there.".format(*(rest.split(" to ", 1) + [""])[:2]),
        "pour": "The contents should be in the {1} now.".format(*(re.split(r" in(?:to)? ", rest, maxsplit=1) + [""])[:2]),
        "mix": "Everything is in one container, so I mix it.",
        "wait": "This needs some time, so I wait.",
        "wait1": "This needs some time, so I wait.",
        "use": "I use the {0} now to see what it tells me.".format(rest.split(" on ")[0]),
        "examine": f"A closer look at the {rest} will tell me more.",
        "read": f"The {rest} may hold what I need to know.",
        "activate": f"The {rest} has to be on for this.",
        "deactivate": f"The {rest} is no longer needed, so I switch it off.",
        "connect": "This connection belongs to the circuit that I need.",
        "open": f"The {rest} has to be open first.",
    }
    reason = reasons.get(verb, "This is the next step towards the goal.")
    return reason if earlier else f"{goal.split('. ')[0].rstrip('.')}. {reason}"


# ALFWORLD-EXPERT


# --- Published trajectories ---------------------------------------------------------------------------------------


def read_published(path: str, env: str, skip_bad: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(task id, [(thought, action), ...])] of a published file (Song et al., 2024).

    The file is a JSON list of {"id" or "game_file", "conversations": [{"from" or "role", "value" or "content"}, ...]}:
    the instruction, "OK", the task, then the agent's Thought/Action turns and the observations in turn.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of trajectories, found {type(rows).__name__}")
    readable, bad = [], []
    for index, row in enumerate(rows):
        try:
            readable.append((published_task(row, env), published_turns(row)))
        except UserError as error:
            bad.append(f"{path}: row {index}: {error}")
    if bad and not skip_bad:
        raise UserError(f"{bad[0]} ({len(bad)} such rows; --skip-bad leaves them out)")
    for line in bad:
        print(f"skipped {line}")
    return readable


def published_task(row: dict, env: str) -> str:
    """The task id of a published row: the path of its game, or its place in the published train split."""
    name = str(row.get("game_file", row.get("id", ""))) if isinstance(row, dict) else ""
    if not name:
        raise UserError("field 'id' or 'game_file' is missing")
    if env == "alfworld":
        found = re.search(r"(train|valid_seen|valid_unseen)/([^/]+/[^/]+)", name)
        if not found:
            raise UserError(f"'{name}' does not name a game like train/TASK/TRIAL/game.tw-pddl")
        return f"alfworld/{found[1]}/{found[2]}"
    if name.isdigit() and int(name) < len(scienceworld_table()["train"]):
        return scienceworld_table()["train"][int(name)]
    if name in scienceworld_table()["train"]:
        return name
    raise UserError(f"'{name}' is neither a place in the published train split nor a task of it")


def published_turns(row: dict) -> list[tuple[str, str]]:
    """The agent's (thought, action) turns of a published conversation."""
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or len(conversation) < 4:
        raise UserError("field 'conversations' is not a list of at least four turns")
    turns = []
    for place, message in enumerate(conversation):
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        role = message.get("from", message.get("role")) if isinstance(message, dict) else None
        if not isinstance(text, str) or role not in ("human", "user", "gpt", "assistant"):
            raise UserError(f"turn {place} of 'conversations' lacks from/role or value/content")
        if place >= 3 and role in ("gpt", "assistant"):  # before it: the instruction, "OK", the task
            turn = parse_turn(text)
            if not turn["action"]:
                raise UserError(f"turn {place} of 'conversations' has no Action line")
            turns.append((turn["thought"], turn["action"]))
    return turns


# --- Replay: a trajectory is what the environment answers ---------------------------------------------------------


def replay(env, task: str, turns: list[tuple[str, str]], max_turns: int | None, drop=None) -> dict:
    """Play (thought, action) turns in the environment, up to its end or the turn limit; a trajectory row.

    drop(action, observation) says which turns to leave out: the rest is then played again from the start.
    """
    instruction = env.reset(task)
    steps, reward, end = [], 0.0, None
    for thought, action in turns[:turn_limit(task, max_turns)]:
        observation, reward, end = env.step(action)
        steps.append({"thought": thought, "action": action, "observation": observation, "deliberated": False})
        if end is not None:
            break
    if drop and any(drop(step["action"], step["observation"]) for step in steps):
        kept = [(step["thought"], step["action"]) for step in steps if not drop(step["action"], step["observation"])]
        return replay(env, task, kept, max_turns)
    split = "train"
    return {"key": task, "env": environment_of(task), "task": task, "split": split, "instruction": instruction,
            "steps": steps, "reward": reward}


# --- Collecting in parallel ---------------------------------------------------------------------------------------

worker_environment = None  # one environment per worker process


def start_worker(env: str) -> None:
    global worker_environment
    worker_environment = make_environment(env)


def expert_trajectory(task: str, turns: list[tuple[str, str]] | None, max_turns: int | None, seed: int) -> dict:
    """In a worker: the expert's trajectory for a task, or what became of published turns. {"key", "row" or None}."""
    if turns is not None:
        row = replay(worker_environment, task, turns, max_turns) | {"source": "published"}
    else:
        expert = scienceworld_expert if isinstance(worker_environment, ScienceWorld) else alfworld_expert
        row = expert(worker_environment, task, max_turns, seed)
    return {"key": task, "row": row}


def collect(args: argparse.Namespace) -> None:
    """Write D_exp: the trajectories that reach the full reward, or all of the published ones with their real reward."""
    started = time.time()
    if args.published:
        work = dict(read_published(args.published, args.env, args.skip_bad))
    else:
        work = dict.fromkeys(list_tasks(args.env, "train", args.task_types, args.num_tasks, args.seed))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    inputs = [PROMPTS / "scienceworld_tasks.txt", *([args.published] if args.published else [])]
    with StageOutput(args.out, settings, inputs) as output:
        todo = [task for task in work if task not in output.done]
        context = multiprocessing.get_context("spawn")
        workers = max(1, min(args.workers, len(todo)))
        # a fresh process now and then: the simulator that solves its own tasks keeps memory
        with ProcessPoolExecutor(workers, context, start_worker, (args.env,), max_tasks_per_child=25) as pool:
            results = pool.map(expert_trajectory, todo, [work[task] for task in todo],
                               [args.max_turns] * len(todo), [args.seed] * len(todo))
            for result in progress(results, total=len(todo), desc="expert"):
                output.write(result)
        rows = [output.done[task]["row"] for task in work if output.done[task]["row"]]
        if not rows:
            raise UserError(f"no expert trajectory reaches the full reward in {len(work)} tasks; "
                            "try other --task-types, more --num-tasks or a higher --max-turns")
        output.finish(rows)
    steps = sum(len(row["steps"]) for row in rows)
    refused = sum(not is_valid(step["observation"]) for row in rows for step in row["steps"])
    kinds = len({task_type(row["task"]) for row in rows})
    print(f"{len(rows)} of {len(work)} tasks have an expert trajectory: {kinds} task types, {steps} steps, {refused} of "
          f"them refused by the environment; {args.out}; {duration(time.time() - started)}")


def main() -> None:
    args = parse_arguments()
    if args.command == "expert":
        collect(args)
    else:
        finetune(args)


if __name__ == "__main__":
    run_stage(main)
