"""Environments behind one interface. A new one is a file here, a prompt in prompts/ and a line in TABLE.

A task has a readable id that begins with its environment's name: scienceworld/find-animal/12,
alfworld/valid_seen/pick_and_place_simple-Mug-None-Desk-308/trial_T2019. NAME-practice/... are tasks to play
with; they say so wherever they appear, since results on them are not the environment's results.
"""

from __future__ import annotations

import functools
import importlib
import random
import re
from pathlib import Path
from typing import ClassVar, NamedTuple

from common import Trajectory, UserError, label_of, prompt_path, read_rows, stable_seed

TABLE = {"scienceworld": "ScienceWorld", "alfworld": "AlfWorld"}  # environments/NAME.py holds the class
SPLITS = ("train", "seen", "unseen")


class Result(NamedTuple):
    """What an environment answers to an action."""

    observation: str
    reward: float  # of the episode so far, in [0, 1]
    accepted: bool  # whether the environment understood the action and carried it out
    end: str | None  # why the episode is over ("success", or a reason of the environment's own); None while it goes on


class Environment:
    """One episode at a time. Subclasses define everything that is not defined here."""

    FILES: ClassVar[tuple[Path, ...]] = ()  # files that decide how tasks are played, besides the prompt
    STATEMENT: ClassVar = re.compile(r"Your task is to:?\s+(\S[^\n]*)")  # where an instruction states the task
    EXAMPLE_PER_TYPE: ClassVar = False  # whether prompted agents see an example of their task's type
    # What a plan takes until a run says better: steps of an expert, turns of an agent, tokens of the first turn, tokens that a step
    # adds, and those that an agent writes in an episode before and after it has learnt to deliberate.
    TYPICAL: ClassVar = {"steps": 15, "turns": 20, "first": 1000, "step": 130, "acting": 800, "deliberating": 2400}
    PAPER: ClassVar[list[tuple[str, float, float]]] = []  # the paper's results: (method, seen, unseen) in percent

    @classmethod
    def tasks(cls, split: str) -> list[str]:
        """The task ids of "train", "seen" or "unseen", sorted. Raises UserError where there are none."""
        raise NotImplementedError

    @staticmethod
    def task_type(task: str) -> str:
        return task.split("/")[1]

    @staticmethod
    def turn_limit(task: str) -> int:
        """Turns that an agent has."""
        raise NotImplementedError

    @staticmethod
    def published_task(row: dict) -> str:
        """The task id of a row of published trajectories. Raises UserError that says what is wrong with the
        row."""
        raise UserError("published trajectories of this environment are not known")

    @classmethod
    def is_same_task(cls, instruction: str, said: str) -> bool | None:
        """Whether a text that was published with a trajectory states the task of this instruction; None if it
        states none."""
        here, *_ = map(_words, cls.STATEMENT.findall(instruction) or [instruction])
        there = [_words(statement) for statement in cls.STATEMENT.findall(said)]
        return any(each[:len(here)] == here or here[:len(each)] == each for each in there) if any(there) else None

    def reset(self, task: str) -> str:
        """Begin a task; what the agent is told, the {{ task }} of its prompt. Raises UserError for an unknown
        task."""
        raise NotImplementedError

    def step(self, action: str) -> Result:
        raise NotImplementedError

    def branch(self, task: str, actions: list[str]) -> tuple[str, list[Result]]:
        """Bring a task to where it is after `actions`; what `reset` and each `step` answer."""
        return self.reset(task), [self.step(action) for action in actions]

    def expert(self, task: str, max_turns: int | None, seed: int) -> dict | None:
        """An expert's trajectory with the full reward within the turn limit; None if there is none."""
        return None

    def close(self) -> None:
        """Let go of processes and files."""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def of(task: str) -> type[Environment]:
    """The class of the environment that a task id or a name belongs to. Raises UserError for an unknown one."""
    return _load(label_of(task).removesuffix("-practice"))


@functools.cache
def _load(name: str) -> type[Environment]:
    if name not in TABLE:
        raise UserError(f"unknown environment '{name}'; known are {', '.join(TABLE)}")
    return getattr(importlib.import_module(f"environments.{name}"), TABLE[name])


def read_trajectories(path: Path | str) -> list[dict]:
    """The trajectories of a file, all of one known environment."""
    rows = read_rows(path, Trajectory)
    label = label_of(rows[0]["task"])
    try:
        of(label)
    except UserError as error:
        raise UserError(f"{path}:1: field 'task' is of an {error}") from None
    for number, row in enumerate(rows, 1):
        if row["key"] != row["task"]:
            raise UserError(f"{path}:{number}: the key '{row['key']}' is not the task '{row['task']}'; a task has one trajectory")
        if label_of(row["task"]) != label:
            raise UserError(f"{path}:{number}: is of {label_of(row['task'])}, the first line of {label}; "
                            "a file holds one environment")
    return rows


def task_type(task: str) -> str:
    return of(task).task_type(task)


def turn_limit(task: str, max_turns: int | None = None) -> int:
    """Turns that an agent has: the environment's limit, or max_turns where that is lower."""
    limit = of(task).turn_limit(task)
    return min(limit, max_turns or limit)


def files_of(label: str) -> list[Path]:
    """The files that decide how an environment is played: its prompt and its own."""
    return [prompt_path(label), *of(label).FILES]


def file_of(label: str) -> Path:
    """The environment's own Python file."""
    return Path(__file__).with_name(f"{of(label).__module__.rpartition('.')[2]}.py")


def choose_tasks(env: str, split: str, types: str | None, count: int | None, seed: int) -> list[str]:
    """Tasks of a split, types taking turns, so that the first `count` are as balanced as the split allows.

    types: comma-separated task types, None for all. Raises UserError for unknown types and empty splits.
    """
    by_type: dict[str, list[str]] = {}
    for task in of(env).tasks(split):
        by_type.setdefault(task_type(task), []).append(task)
    wanted = types.split(",") if types else sorted(by_type)
    for kind in wanted:
        if kind not in by_type:
            raise UserError(f"no {split} task of type '{kind}' in {env}; types are {', '.join(sorted(by_type))}")
        random.Random(stable_seed(seed, kind)).shuffle(by_type[kind])
    longest = max(len(by_type[kind]) for kind in wanted)
    chosen = [by_type[kind][i] for i in range(longest) for kind in wanted if i < len(by_type[kind])]
    return chosen[:count]


def played_step(thought: str, action: str, result: Result) -> dict:
    return {"thought": thought, "action": action, "observation": result.observation, "reward": result.reward,
            "accepted": result.accepted}


def trajectory_row(task: str, instruction: str, steps: list[dict], reward: float, source: str) -> dict:
    return {"key": task, "task": task, "instruction": instruction, "steps": steps, "reward": reward, "source": source}


def replay(env: Environment, task: str, turns: list[tuple[str, str]], limit: int | None = None,
           drop_refused: bool = False) -> dict:
    """Play (thought, action) turns up to the environment's end or the limit; a trajectory row.

    With drop_refused, turns that are not accepted are left out, and the rest is played again from the start.
    """
    instruction = env.reset(task)
    steps, reward = [], 0.0
    for thought, action in turns[:limit]:
        result = env.step(action)
        reward = result.reward
        steps.append(played_step(thought, action, result))
        if result.end is not None:
            break
    kept = [(step["thought"], step["action"]) for step in steps if step["accepted"]]
    if drop_refused and len(kept) < len(steps):
        return replay(env, task, kept, limit, drop_refused)
    return trajectory_row(task, instruction, steps, reward, "published")
