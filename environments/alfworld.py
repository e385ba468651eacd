"""ALFWorld (Shridhar et al., 2020): household tasks in text games, in the language of the paper's figure 7.

A task is its game's path: alfworld/valid_seen/<type>-<Obj>-<Mrecep>-<Recep>-<scene>/<trial>. Games are in
$ALFWORLD_DATA or ~/.cache/alfworld. Experts are the engine's handcoded one, which explores like a person. Tasks
of practice games (tests/practice_games.py) begin with alfworld-practice.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar

from common import NO_ACTION, UserError, clean_action, tally
from environments import Environment, Result, played_step, trajectory_row, turn_limit

FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
TASK_TYPES = ("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep", "pick_heat_then_place_in_recep",
              "pick_cool_then_place_in_recep", "pick_two_obj_and_place")
SOLVABLE = re.compile(rb'(?<!\\)"solvable":\s*(\w+)')
TURNS = 30  # Xiong et al., 2025
REFUSAL = "Nothing happens."

# What an agent may say, as (pattern, the engine's command). Figure 7's nine actions, the older and newer ways
# to put and to toggle, and the three commands that only look. The engine would also take `slice` and `help`;
# no task needs them. `{put}` stands for the game's own way to say put.
_THING = r"([a-z]+ [0-9]+)"
_COMMANDS = [(re.compile(pattern.replace("THING", _THING)), command) for pattern, command in [
    (r"go to THING", "go to {0}"),
    (r"take THING from THING", "take {0} from {1}"),
    (r"put THING (?:in/on|in|on) THING", "{put}"),
    (r"move THING to THING", "{put}"),
    (r"open THING", "open {0}"),
    (r"close THING", "close {0}"),
    (r"(?:toggle|use) THING", "use {0}"),
    (r"toggle THING THING", "use {0}"),
    (r"clean THING with THING", "clean {0} with {1}"),
    (r"heat THING with THING", "heat {0} with {1}"),
    (r"cool THING with THING", "cool {0} with {1}"),
    (r"examine THING", "examine {0}"),
    (r"look", "look"),
    (r"inventory", "inventory"),
]]


class AlfWorld(Environment):
    """One text game at a time.

    Games come in two dialects, older (`put X in/on Y`) and newer (`move X to Y`); here they look the same. An
    action that is none of the known commands answers "Nothing happens." and never reaches the engine.
    """

    EXAMPLE_PER_TYPE: ClassVar = True
    TYPICAL: ClassVar = {"steps": 10, "turns": 15, "first": 900, "step": 90, "acting": 500, "deliberating": 1200}
    PAPER: ClassVar = [
        ("GPT-4o, ReAct", 78.6, 83.6),
        ("GPT-4o-mini, ReAct", 32.1, 41.0),
        ("Llama-3.1-70B-Instruct, ReAct", 78.6, 73.9),
        ("Llama-3.1-70B-Instruct + MPO", 85.7, 86.6),
        ("Llama-3.1-8B-Instruct, ReAct", 22.9, 28.4),
        ("Llama-3.1-8B-Instruct + MPO", 50.0, 52.2),
        ("Llama-3.1-8B-Instruct + SFT (AgentTuning)", 79.3, 71.6),
        ("Llama-3.1-8B-Instruct + ETO", 77.1, 76.4),
        ("Llama-3.1-8B-Instruct + KnowAgent", 80.0, 74.9),
        ("Llama-3.1-8B-Instruct + WKM", 77.1, 78.2),
        ("Llama-3.1-8B-Instruct + ETO & MPO", 85.0, 79.1),
        ("Llama-3.1-8B-Instruct + SAND-1 w/o SAS", 85.7, 77.3),
        ("Llama-3.1-8B-Instruct + SAND-1 w/o EAC", 85.0, 86.6),
        ("Llama-3.1-8B-Instruct + SAND-1", 92.9, 91.8),
        ("Llama-3.1-8B-Instruct + SAND-2", 94.3, 94.0),
        ("Llama-3.1-8B-Instruct + SAND-3", 94.3, 96.3),
        ("Qwen2.5-7B-Instruct, ReAct", 71.4, 75.4),
        ("Qwen2.5-7B-Instruct + SFT (AgentTuning)", 72.1, 75.4),
        ("Qwen2.5-7B-Instruct + SAND-1 w/o SAS", 72.1, 62.7),
        ("Qwen2.5-7B-Instruct + SAND-1 w/o EAC", 70.6, 75.0),
        ("Qwen2.5-7B-Instruct + SAND-1", 85.7, 85.0),
        ("Qwen2.5-7B-Instruct + SAND-2", 85.0, 89.6),
        ("Qwen2.5-7B-Instruct + SAND-3", 90.7, 94.8)]

    def __init__(self, root: Path | None = None) -> None:
        """`root` is the folder that holds json_2.1.1; `games_root` by default."""
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs.pddl import PddlEnv
        _tune_engine()
        self.root = root or games_root()
        self._engine = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, facts=True)))
        self._engine.unwrapped.downward_lib.load_sas_replan = lambda sas: None  # for a planner that nobody asks here
        self.state = None  # the engine's state after the last command: more than an agent may know
        self._put = ""
        self._task = ""
        self._line: list[tuple] = []  # the last branch: (action, its result, snapshot after it), the reset first

    @classmethod
    def tasks(cls, split: str) -> list[str]:
        return game_tasks(split, games_root())

    @staticmethod
    def task_type(task: str) -> str:
        return task.split("/")[2].split("-")[0]

    @staticmethod
    def turn_limit(task: str) -> int:
        return TURNS

    @staticmethod
    def published_task(row: dict) -> str:
        """The game's path, or TASK_TRIAL; folders above the game's own may have any name."""
        name = str(row.get("game_file") or row.get("id") or row.get("item_id"))
        found = re.search(r"(?:([^/]*)/)?([^/_]+_[^/]*-[^/]*-[^/]*-[^/]*-\d+)[/_](trial_T\d+_\d+_\d+|practice_\w+)(?=/|$|\.)", name)
        if not found:
            raise UserError(f"'{name}' names no game; paths look like train/TASK/TRIAL/game.tw-pddl, ids like TASK_TRIAL")
        if found[1] in FOLDERS.values() and found[1] != "train":
            raise UserError(f"'{name}' is a game of {found[1]}, which agents are tested on")
        return task_id("train", found[2], found[3])

    def branch(self, task: str, actions: list[str]) -> tuple[str, list[Result]]:
        """Bring the game of a task to where it is after `actions`; -> (first observation, the result of each
        action).

        A branch of the same game as before goes on from a snapshot at the end of their longest common prefix,
        which takes a millisecond; only what is new is played.
        """
        if task != self._task:
            self._line = [("", self.reset(task), self._snapshot())]
            self._task = task
        shared = 1  # the reset
        for (before, _, _), action in zip(self._line[1:], actions):
            if before != action:
                break
            shared += 1
        del self._line[shared:]
        self._restore(self._line[-1][2])
        for action in actions[shared - 1:]:
            self._line.append((action, self.step(action), self._snapshot()))
        (_, instruction, _), *played = self._line
        return instruction, [result for _, result, _ in played]

    def _snapshot(self) -> tuple:
        """What a game is made of: the planner's numbered state, its mirror in Python, and the last answer."""
        engine = self._engine.unwrapped
        return engine.downward_lib.get_state_id(), _mirror(vars(engine._pddl_state)), engine._moves, self.state

    def _restore(self, snapshot: tuple) -> None:
        """Back to a snapshot of the present game, any number of times."""
        engine = self._engine.unwrapped
        number, mirror, engine._moves, self.state = snapshot
        engine.downward_lib.set_state_id(number)
        vars(engine._pddl_state).update(_mirror(mirror))
        engine.state = self.state

    def reset(self, task: str) -> str:
        """Start the game of this task id; the first observation names the receptacles and the task.

        Raises UserError if there is no such game or the engine cannot read it.
        """
        path = game_path(self.root, task)
        self._task = ""  # the snapshots were of another play
        try:
            game = json.loads(path.read_text(encoding="utf-8"))
            # Only the grammar tells the dialects apart: it holds the very command the engine will accept.
            self._put = re.search(r'action PutObject \{\s*template :: "(.*?)"', game["grammar"])[1]
            self._engine.load(game)
            self.state = self._engine.reset()
        except (Exception, SystemExit) as error:  # its parsers raise many kinds, one exits
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"{path}: not a game the engine can read ({reason}); get it again with "
                            "`alfworld-download`, or `make games` for practice games") from error
        return self.state.feedback.removeprefix("-= Welcome to TextWorld, ALFRED! =-").strip()

    def step(self, action: str) -> Result:
        """The reward is 0 or 1. The game ends when it is won."""
        command = self._command(action)
        if command is None:
            observation = REFUSAL if clean_action(action) else NO_ACTION
        else:
            self.state, _, _ = self._engine.step(command)
            observation = _same_in_both_dialects(self.state.feedback)
        won = self.state.won  # never the engine's `done`: winning is the only success
        accepted = not observation.startswith((REFUSAL, NO_ACTION))
        return Result(observation, float(won), accepted, "success" if won else None)

    def expert(self, task: str, max_turns: int | None, seed: int) -> dict | None:
        """The handcoded expert's trajectory, or None if it does not win.

        The expert plays first; then its useful actions are replayed in the prompt's language, which proves that
        they still win and shows the thoughts just what an agent would have seen. The same seed gives the same
        trajectory.
        """
        before = random.getstate()
        random.seed(f"{seed} {task}")  # the expert draws from the global generator
        try:
            actions = _expert_actions(self, task, turn_limit(task, max_turns))
            narrator = _Narrator(task)
            instruction, reward = self.reset(task), 0.0
            steps = []
            for action in actions:
                thought = narrator.think(action, instruction)
                result = self.step(action)
                reward = result.reward
                narrator.hear(action, result.observation)
                steps.append(played_step(thought, action, result))
        finally:
            random.setstate(before)
        return trajectory_row(task, instruction, steps, reward, "handcoded expert") if reward else None

    def close(self) -> None:
        """Let go of the game. Its library stays loaded: unloading a second copy crashes the process."""
        self._engine.close()
        self.state = None

    def _command(self, action: str) -> str | None:
        """The game's own words for the agent's action; None if it is no action at all."""
        action = " ".join(action.lower().split())
        for pattern, command in _COMMANDS:
            if match := pattern.fullmatch(action):
                put = self._put.replace("{o}", "{0}").replace("{r}", "{1}")
                return command.replace("{put}", put).format(*match.groups())
        return None


def _mirror(state: dict) -> dict:
    """The attributes of textworld's PddlState that change as a game is played, copied; its operators are never
    written to."""
    sets = {name: defaultdict(set, {key: set(items) for key, items in state[name].items()})
            for name in ("_facts", "_vars_by_type")}
    return sets | {name: state[name].copy() for name in ("_vars_by_name", "_var_counts")} | {"_operators": state["_operators"]}


def games_root() -> Path:
    """The games' folder: $ALFWORLD_DATA, or else ~/.cache/alfworld. Raises UserError if it holds none."""
    root = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
    if not (root / "json_2.1.1").is_dir():
        raise UserError(f"{root}: no ALFWorld games (json_2.1.1) here; run `alfworld-download`, point "
                        "ALFWORLD_DATA at your copy, or try `make games` and ALFWORLD_DATA=games/practice")
    return root


def task_id(folder: str, name: str, trial: str) -> str:
    return f"alfworld{'-practice' if trial.startswith('practice_') else ''}/{folder}/{name}/{trial}"


@functools.cache
def game_tasks(split: str, root: Path) -> list[str]:
    """The sorted task ids of a split of the games in `root`, those that the stock loader plays. Raises UserError if it
    has none."""
    folder = root / "json_2.1.1" / FOLDERS[split]
    # Games are known by path: the order of files is the file system's, and first observations repeat.
    games = {path: why_left_out(path) for path in sorted(folder.glob("*/*/game.tw-pddl"))}
    if reasons := Counter(filter(None, games.values())):
        print(f"{folder}: {len(games)} games, {sum(reasons.values())} of them left out, as by ALFWorld's own loader: "
              f"{tally(reasons)}", file=sys.stderr)
    tasks = [task_id(*path.parent.parts[-3:]) for path, reason in games.items() if not reason]
    if not tasks:
        raise UserError(f"{folder}: no games of the {split} split; "
                        "run `alfworld-download`, or try `make games` and ALFWORLD_DATA=games/practice")
    return tasks


def why_left_out(game: Path) -> str | None:
    """Why the stock loader does not play a game; None if it does. A game file says at its end whether it can be
    solved, so that only that is read."""
    name = game.parent.parent.name
    if "movable" in name or "Sliced" in name:
        return "with movable receptacles or slices"
    if name.partition("-")[0] not in TASK_TYPES:
        return "of another task type"
    with open(game, "rb") as file:
        file.seek(max(0, game.stat().st_size - 4096))
        said = SOLVABLE.findall(file.read())
        if not said:
            file.seek(0)
            said = SOLVABLE.findall(file.read())
    return {b"true": None, b"false": "unsolvable"}.get(said[-1] if said else b"", "never checked for a solution")


def game_path(root: Path, task: str) -> Path:
    """The file of a task's game. The engine runs code in it: no id may lead out of the games' folder."""
    found = re.fullmatch(r"alfworld(?:-practice)?/([\w-]+/[\w-]+/[\w-]+)", task)
    if not found:
        raise UserError(f"{task!r} is no ALFWorld task id; they look like alfworld/train/<task>/<trial>")
    path = root / "json_2.1.1" / found[1] / "game.tw-pddl"
    if not path.is_file():
        raise UserError(f"{path}: no such game; point ALFWORLD_DATA at the games these tasks came from")
    return path


def _same_in_both_dialects(feedback: str) -> str:
    """Say the same in both dialects, in the words of the agent's own commands.

    The arrival ("You arrive at loc 12." or "You arrive at desk 1.") goes: the first leaks an internal number,
    the second repeats the action, and the sentence after it names the place anyway.
    """
    feedback = re.sub(r"^You arrive at [^.]*\. ", "", feedback)
    return re.sub(r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2.", feedback)


@functools.cache
def _tune_engine() -> None:
    """Make textworld's engine quick and well behaved, once per process; what games say and do stays the same.

    Stock, a new game takes seconds and a step a tenth of a second: the same problem is translated four times
    for each game, and the same few phrases of the grammar are parsed again for each admissible command of
    each step.
    """
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Placeholder, Rule, Variable
    translate = fast_downward.pddl2sas

    @functools.lru_cache(maxsize=8)
    def translate_once(domain: str, problem: str):
        argv, stdout = sys.argv, sys.stdout  # translate() overwrites both
        gc.disable()  # it makes a great many objects that stay: looking for garbage takes a third of its time
        try:
            return translate(domain, problem)
        finally:
            gc.enable()
            sys.argv, sys.stdout = argv, stdout

    # The second translation of each pair (optimize=True) serves the engine's planner, which nobody asks here.
    fast_downward.pddl2sas = lambda domain, problem, **options: translate_once(domain, problem)
    parse_once = functools.lru_cache(maxsize=4096)(textgen._parse_and_convert)
    # The engine writes into the symbols it gets: hand out copies.
    textgen._parse_and_convert = lambda text, **options: copy.deepcopy(parse_once(text, **options))
    Rule.parse_conjunctive_query = functools.lru_cache(maxsize=4096)(Rule.parse_conjunctive_query)
    for value in (Variable, Placeholder):  # never written to; most of a step went into copying them
        value.__deepcopy__ = lambda self, memo: self


# --- The expert ------------------------------------------------------------------------------------------------


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
        observation, _, _, end = env.step(action)
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
    return action not in ("look", "inventory") and observation != REFUSAL


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
