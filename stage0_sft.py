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
import os
import random
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from common import (ENVIRONMENTS, AlfWorld, EnvironmentPool, ScienceWorld, StageOutput, UserError, add_training_options,
                    duration, environment_of, failures_last, finetune, is_valid, list_tasks, parse_turn, progress,
                    run_stage, scienceworld_table, settings_of, task_type, turn_inputs, turn_limit)


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
    """The simulator's gold path in its shortest form that still reaches the full score within the turn limit, with things
    called by the names that the agent has seen, where the simulator knows these. It opens and activates what already is, and
    pours a bowl into itself: what it is refused is left out."""
    env.load(task, gold_path=True)
    gold = env.gold_path()
    for actions in (teleporting(gold), gold):  # some tasks need the time that walking spends
        trajectory = replay(env, task, [("", action) for action in actions], max_turns, drop_refused=True)
        if trajectory["reward"] >= 0.999:
            renamed = replay(env, task, [("", action) for action in named_as_seen(env, trajectory)], max_turns)
            trajectory = max(renamed, trajectory, key=lambda row: row["reward"])
            goal = trajectory["instruction"]
            for t, step in enumerate(trajectory["steps"]):
                step["thought"] = scienceworld_thought(goal, trajectory["steps"][:t], step["action"])
            return trajectory | {"source": "gold path"}
    return None


def teleporting(gold: list[str]) -> list[str]:
    """Gold paths open doors and walk; an agent teleports, and looks around where it begins and where it arrives."""
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
    """The actions of a trajectory, renamed wherever the simulator answers just the same: gold paths say "baby baby elephant"
    and "egg parrot" where the agent has seen "a baby elephant" and "a parrot egg", names it could only guess."""
    actions = [step["action"] for step in trajectory["steps"]]
    seen = trajectory["instruction"]
    for t, step in enumerate(trajectory["steps"]):
        for renamed in with_seen_names(actions[t], seen):
            _, results = env.branch(trajectory["task"], [*actions[:t], renamed])
            if results[-1][0] == step["observation"]:
                actions[t] = renamed
                break
        seen += "\n" + step["observation"]
    return actions


def with_seen_names(action: str, seen: str) -> Iterator[str]:
    """The action with each name that was not seen in another form that was: its first word moved to the end or left out, or
    without its contents. First all such names at once, then each alone."""
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


# --- ALFWorld: the handcoded expert -------------------------------------------------------------------------------


def alfworld_expert(env: AlfWorld, task: str, max_turns: int | None, seed: int) -> dict | None:
    """The handcoded expert's trajectory for one task, or None if it does not win within `max_turns` actions.

    The expert plays first; then its useful actions are replayed in the prompt's language, which proves that
    they still win and shows the thoughts just what an agent would have seen. The same seed gives the same
    trajectory.
    """
    before = random.getstate()
    random.seed(f"{seed} {task}")  # the expert draws from the global generator
    try:
        actions = _expert_actions(env, task, turn_limit(task, max_turns))
        narrator = _Narrator(task)
        instruction, reward = env.reset(task), 0.0
        steps = []
        for action in actions:
            thought = narrator.think(action, instruction)
            observation, reward, _ = env.step(action)
            narrator.hear(action, observation)
            steps.append({"thought": thought, "action": action, "observation": observation, "deliberated": False})
    finally:
        random.setstate(before)
    return trajectory_row(task, instruction, steps, reward, "handcoded expert") if reward else None


def _expert_actions(env: AlfWorld, task: str, max_turns: int) -> list[str]:
    """What the expert does to win, in the prompt's language, less what teaches nothing; [] if it loses."""
    from alfworld.agents.expert.handcoded_expert import HandCodedAgentFailed, HandCodedAgentTimeout
    from alfworld.agents.expert.handcoded_expert_tw import HandCodedTWAgent
    kind, target, _, place, _ = task.split("/")[2].lower().split("-")
    # All that the expert would read from ALFRED's traj_data.json, which is not part of the games, is in the
    # folder's name.
    goal = {"task_type": kind, "object_target": target, "parent_target": place, "toggle_target": place}
    expert = HandCodedTWAgent()
    expert.policy = expert.get_task_policy(goal)(goal, max_steps=150)

    actions, shown, end = [], set(), None
    env.reset(task)
    expert.observe(env.state.feedback)
    action = "look"
    while end is None and len(actions) < max_turns:
        state = {**env.state, "admissible_commands": _as_expert(env)}
        try:
            command = expert.act(state, 0, False, action)
        except (HandCodedAgentFailed, HandCodedAgentTimeout, IndexError):  # the last: it is at a loss
            return []
        if command not in state["admissible_commands"]:
            command = "look"
        action = _as_agent(command, env)
        observation, _, end = env.step(action)
        if _teaches(action, observation, shown):
            actions.append(action)
        shown.add(observation)
    return actions if end == "success" else []


def _as_expert(env: AlfWorld) -> list[str]:
    """The commands that the game admits now, as the expert words them and in one order for both dialects."""
    commands = [command for command in env.state["admissible_commands"]
                if not command.startswith(("slice ", "help"))]  # which are not among the agent's actions
    return sorted(re.sub("^put (.+) in/on ", r"move \1 to ", command) for command in commands)


def _as_agent(command: str, env: AlfWorld) -> str:
    """The expert's command in the words of the prompt."""
    verb, _, rest = command.partition(" ")
    if verb == "move":
        return f"put {rest.replace(' to ', ' in/on ')}"
    if verb == "use":
        where = [fact.names[1] for fact in env.state["facts"]
                 if fact.name == "inreceptacle" and fact.names[0] == rest]
        return f"toggle {rest} {where[0]}"
    return command


def _teaches(action: str, observation: str, shown: set[str]) -> bool:
    """Whether the action belongs in a demonstration: it did something, or showed a receptacle's contents.

    Looking around changes nothing in the game, so without it the trajectory wins all the same; the replay
    makes sure.
    """
    if action.startswith("examine "):
        shows_contents = observation.startswith(("On the ", "The ")) and "you see" in observation
        return shows_contents and observation not in shown
    return action not in ("look", "inventory") and observation != "Nothing happens."


# Thoughts by situation. {x} is the thing at hand, {here} the receptacle the agent is at, {there} the one in
# the action.
_THOUGHTS = {
    "start": ["I need to {goal}. First I have to find {a_target}; I will start looking at the {there}.",
              "My task is to {goal}. I do not know where to find {a_target}, so I check the {there} first."],
    "search": ["{A_target} may be at the {there}, so I look there next.",
               "I have not found {a_target} yet. I go on to the {there}.",
               "I still need {a_target}. The {there} is worth a look."],
    "search on": ["There is no {target} I can use at the {here}. I will try the {there}.",
                  "I do not see the {target} I need here. Next I check the {there}."],
    "return": ["I saw the {x} at the {there}, so I go back for it.",
               "I remember the {x} at the {there}; that is what I need now."],
    "treatment trip": ["I have the {x}. Now I take it to the {there} to {treatment} it.",
                       "Holding the {x}, I still have to {treatment} it, so I go to the {there}."],
    "lamp search": ["I have the {x}. I need the {place} now, and it may be at the {there}.",
                    "With the {x} in hand I look for the {place}; I try the {there}."],
    "lamp trip": ["I have the {x}, and I saw the {place} at the {there}, so I go there."],
    "deliver": ["I have the {x}. I bring it to the {there}, where it belongs.",
                "Now the {x} has to go to the {place}, so I head for the {there}."],
    "carry back": ["The {x} is not what I need. I go to the {there} to put it down."],
    "wander": ["I have a look at the {there}."],
    "open": ["The {there} is closed. I open it to see what is inside.",
             "I cannot see into the {there} while it is closed, so I open it."],
    "open to put": ["I have to open the {there} before I can put the {x} in it."],
    "close": ["I am done with the {there}, so I close it again."],
    "take": ["There is {a_x} at the {there}, just what I need. I take it.",
             "I found {a_x} here. I pick it up from the {there}."],
    "take second": ["Here is {a_x}, the second {target} I need. I take it too."],
    "put": ["I am at the {there} with the {x}. Putting it here should finish the task.",
            "This is where the {x} belongs. I put it in/on the {there}."],
    "put first": ["I put the first {target} in/on the {there}. Then I need one more."],
    "put back": ["I do not need the {x} now, so I put it in/on the {there} and free my hands."],
    "treat": ["I am at the {there} with the {x}, so I can {treatment} it now.",
              "The {there} is what I need to {treatment} the {x}."],
    "toggle": ["I hold the {held}, and the {x} is here. I turn it on to look at the {held} in its light.",
               "Here is the {x}. I switch it on, so that I can look at the {held} under it."],
    "examine": ["I am next to the {there} and have not seen what it holds, so I examine it."],
    "try": ["I am not sure what helps here, so I try this."],
}
_TREATMENTS = {  # task type -> (what the target needs first, where that is done)
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
}


class _Narrator:
    """Thinks aloud for the expert: finds a thought for each action in the task and what was seen and done."""

    def __init__(self, task: str):
        self.kind, self.target, _, self.place, _ = task.split("/")[2].lower().split("-")
        self.treatment, self.appliance = _TREATMENTS.get(self.kind, ("", ""))
        self.treated = not self.treatment
        self.seen: dict[str, str] = {}    # thing -> the receptacle where it was last seen
        self.looked: set[str] = set()     # receptacles whose contents were seen
        self.placed: set[str] = set()     # targets already where they belong
        self.held = self.here = ""

    def think(self, action: str, instruction: str) -> str:
        """One or two sentences that lead to this action."""
        verb, thing, there = _parts(action)
        situation = self._situation(verb, thing, there)
        x = self._target_at(there) if situation == "return" else thing or self.held
        a_target = f"another {self.target}" if self.placed else _with_article(self.target)
        return random.choice(_THOUGHTS[situation]).format(
            goal=instruction.rpartition("Your task is to: ")[2].rstrip("."), target=self.target,
            place=self.place, treatment=self.treatment, here=self.here, there=there, held=self.held,
            x=x, a_x=_with_article(x), a_target=a_target, A_target=a_target.capitalize())

    def hear(self, action: str, observation: str) -> None:
        """Remember what the action did and showed."""
        verb, thing, there = _parts(action)
        if verb == "take":
            self.held = thing
            self.seen.pop(thing, None)
        elif verb == "put":
            self.held, self.seen[thing] = "", there
            if self._is(thing, self.target) and self._is(there, self.place):
                self.placed.add(thing)
        elif verb == self.treatment:
            self.treated = True
        elif verb in ("go", "open", "examine"):
            self.here = there
            _, you_see, listed = observation.partition("you see ")
            if you_see:
                self.looked.add(there)
            self.seen |= {found: there for found in re.findall(r"\ba ([a-z]+ [0-9]+)", listed)}

    def _situation(self, verb: str, thing: str, there: str) -> str:
        """The key of _THOUGHTS that fits."""
        if verb == "go":
            return self._trip(there)
        if verb == "open":
            to_put = self._is(self.held, self.target) and self._is(there, self.place)
            return "open to put" if to_put else "open"
        if verb == "take" and self._is(thing, self.target) and self.seen.get(thing) == there:
            return "take second" if self.placed else "take"
        if verb == "put":
            if not (self._is(thing, self.target) and self._is(there, self.place)):
                return "put back"
            return "put first" if self.kind == "pick_two_obj_and_place" and not self.placed else "put"
        if verb == self.treatment:
            return "treat"
        if verb == "toggle":
            return "toggle" if self._is(self.held, self.target) else "try"
        return verb if verb in ("close", "examine") else "try"

    def _trip(self, there: str) -> str:
        """The situation of going somewhere."""
        if not self.here:
            return "start"
        if not self.held:
            if self._target_at(there):
                return "return"
            if any(self._target_at(place) for place in self.seen.values()):
                return "wander"
            just_placed = self.here in [self.seen.get(x) for x in self.placed]
            return "search on" if self.here in self.looked and not just_placed else "search"
        if not self._is(self.held, self.target):
            return "carry back"
        if not self.treated:
            return "treatment trip" if self._is(there, self.appliance) else "wander"
        if self.kind == "look_at_obj_in_light":
            lamp_there = any(self._is(x, self.place) and place == there for x, place in self.seen.items())
            return "lamp trip" if lamp_there else "lamp search"
        return "deliver" if self._is(there, self.place) else "wander"

    def _target_at(self, there: str) -> str:
        """A target seen at this receptacle that is still to be fetched; "" if none."""
        return next((x for x, place in self.seen.items()
                     if place == there and self._is(x, self.target) and x not in self.placed), "")

    @staticmethod
    def _is(thing: str, kind: str) -> bool:
        return thing.split(" ")[0] == kind


def _parts(action: str) -> tuple[str, str, str]:
    """-> (verb, the thing or "", the receptacle or "")"""
    names = re.findall(r"[a-z]+ [0-9]+", action)
    return action.split()[0], names[0] if len(names) == 2 else "", names[-1]


def _with_article(noun: str) -> str:
    return ("an " if noun[:1] in "aeiou" else "a ") + noun


# --- Published trajectories ---------------------------------------------------------------------------------------


def read_published(path: str, env: str, skip_bad: bool) -> dict[str, list[tuple[str, str]]]:
    """{task id: [(thought, action), ...]} of a published file (Song et al., 2024).

    The file is a JSON list of {"id" or "game_file", "conversations": [{"from" or "role", "value" or "content"}, ...]}:
    the instruction, "OK", the task, then the agent's Thought/Action turns and the observations in turn.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of trajectories, found {type(rows).__name__}")
    readable: dict[str, list[tuple[str, str]]] = {}
    bad = []
    for index, row in enumerate(rows):
        try:
            task = published_task(row, env)
            if task in readable:
                raise UserError(f"its task {task} came before")
            readable[task] = published_turns(row)
        except UserError as error:
            bad.append(f"{path}: row {index}: {error}")
    if bad and not skip_bad:
        raise UserError(f"{bad[0]} ({len(bad)} such rows; --skip-bad leaves them out)")
    for line in bad:
        print(f"skipped {line}")
    return readable


def choose_published(trajectories: dict[str, list], args: argparse.Namespace) -> dict[str, list]:
    """The trajectories that --task-types, --num-tasks and the turn limit leave."""
    types = args.task_types.split(",") if args.task_types else [task_type(task) for task in trajectories]
    chosen = [task for task in trajectories if task_type(task) in types][:args.num_tasks]
    short = [task for task in chosen if len(trajectories[task]) <= turn_limit(task, args.max_turns)]
    if len(short) < len(chosen):
        print(f"left out {len(chosen) - len(short)} trajectories that are longer than the turn limit")
    return {task: trajectories[task] for task in short}


def published_task(row: dict, env: str) -> str:
    """The task id of a published row: the path of its game, or its place in the published train split."""
    name = str(row.get("game_file", row.get("id", ""))) if isinstance(row, dict) else ""
    if not name:
        raise UserError("field 'id' or 'game_file' is missing")
    if env == "alfworld":
        found = re.search(r"train/([^/]+/[^/]+)", name)
        if not found:
            raise UserError(f"'{name}' does not name a training game like train/TASK/TRIAL/game.tw-pddl")
        return f"alfworld/train/{found[1]}"
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


def replay(env, task: str, turns: list[tuple[str, str]], max_turns: int | None, drop_refused: bool = False) -> dict:
    """Play (thought, action) turns in the environment, up to its end or the turn limit; a trajectory row.

    With drop_refused, turns that are refused are left out, and the rest is then played again from the start.
    """
    instruction = env.reset(task)
    steps, reward, end = [], 0.0, None
    for thought, action in turns[:turn_limit(task, max_turns)]:
        observation, reward, end = env.step(action)
        steps.append({"thought": thought, "action": action, "observation": observation, "deliberated": False})
        if end is not None:
            break
    kept = [(step["thought"], step["action"]) for step in steps if is_valid(step["observation"])]
    if drop_refused and len(kept) < len(steps):
        return replay(env, task, kept, max_turns, drop_refused)
    return trajectory_row(task, instruction, steps, reward, "published")


def trajectory_row(task: str, instruction: str, steps: list[dict], reward: float, source: str) -> dict:
    return {"key": task, "env": environment_of(task), "task": task, "split": "train", "instruction": instruction,
            "steps": steps, "reward": reward, "source": source}


# --- Collecting in parallel ---------------------------------------------------------------------------------------


def expert_trajectory(env, task: str, turns: list[tuple[str, str]] | None, max_turns: int | None, seed: int) -> dict | None:
    """In a worker: the expert's trajectory for a task, None if it has none; or what became of published turns."""
    if turns is not None:
        return replay(env, task, turns, max_turns)
    expert = scienceworld_expert if isinstance(env, ScienceWorld) else alfworld_expert
    return expert(env, task, max_turns, seed)


def expert_trajectories(work: dict, pool: EnvironmentPool, max_turns: int | None, seed: int) -> Iterator[dict]:
    """{"key": task, "row": its trajectory or None} as they come; a task that fails on four fresh environments, or that the
    environment refuses, has "failed": reason, too."""
    waiting, tries, served, busy = deque(work), Counter(), Counter(), {}

    def give(worker: int) -> None:
        if waiting:
            if served[worker] and served[worker] % 25 == 0:  # the simulator that solves its own tasks keeps memory
                pool.restart(worker)
            served[worker] += 1
            busy[worker] = task = waiting.popleft()
            pool.send(worker, "call", expert_trajectory, task, work[task], max_turns, seed)

    for worker in pool.workers:
        give(worker)
    while busy:
        for worker, (kind, payload) in pool.ready(None):
            task = busy.pop(worker)
            if kind == "user error":
                raise UserError(payload)
            if kind == "failed":
                pool.restart(worker)
                tries[task] += 1
            if kind == "done":
                yield {"key": task, "row": payload}
            elif kind == "failed" and tries[task] <= 3:
                waiting.appendleft(task)
            else:
                yield {"key": task, "row": None, "failed": f"{task}: {payload}"}
            give(worker)


def collect(args: argparse.Namespace) -> None:
    """Write D_exp: the trajectories that reach the full reward, or all of the published ones with their real reward."""
    started = time.time()
    if args.published:
        work = choose_published(read_published(args.published, args.env, args.skip_bad), args)
    else:
        work = dict.fromkeys(list_tasks(args.env, "train", args.task_types, args.num_tasks, args.seed))
    inputs = [*turn_inputs(args.env)[1:], *([args.published] if args.published else [])]  # experts see no prompt
    with StageOutput(args.out, settings_of(args), inputs) as output:
        todo = {task: turns for task, turns in work.items() if task not in output.done}
        with EnvironmentPool(args.env, min(args.workers, len(todo))) as pool:
            results = failures_last(expert_trajectories(todo, pool, args.max_turns, args.seed),
                                    lambda result: result.get("failed", ""), len(work))
            for result in progress(results, total=len(todo), desc="expert"):
                output.write(result)
        rows = [output.done[task]["row"] for task in work if output.done[task]["row"]]
        failed = [output.done[task]["failed"] for task in work if "failed" in output.done[task]]
        if not rows:
            raise UserError(f"no expert trajectory reaches the full reward in {len(work)} tasks; "
                            "try other --task-types, more --num-tasks or a higher --max-turns")
        output.finish(rows, {"tasks": len(work), "failed": failed})
    for line in failed:
        print(f"failed: {line}")
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
