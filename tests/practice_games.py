"""Practice games: small houses for the real ALFWorld engine, made from nothing but what the alfworld package ships.

    python tests/practice_games.py games/practice
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environments.alfworld import FOLDERS

# What each task type needs besides the goal's receptacle: a receptacle to treat the target in, and a fitting
# target.
_PRACTICE_TASKS = {
    "look_at_obj_in_light": (None, None),
    "pick_and_place_simple": (None, None),
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable"),
    "pick_two_obj_and_place": (None, None),
}
_LAMP_PLACES = ("Desk", "SideTable", "Dresser", "CoffeeTable")
_MAX_ALIKE, _MAX_RECEPTACLES = 3, 12  # enough to make the agent explore, few enough to load fast
_OTHER_THINGS = 10


def write_practice_games(out: Path, per_type: dict[str, int], seed: int, older_dialect: bool = False) -> int:
    """Write practice games into `out`/json_2.1.1; returns their number.

    `per_type` says how many games of each task type a split ("train", "seen", "unseen") gets; unseen games
    play in houses that the other splits never use. The same arguments write the same bytes. Trials are called
    practice_NNNN, so that all that is made from them says so: results on them are not ALFWorld results. There
    is no walkthrough to follow.
    """
    written = 0
    for split, count in per_type.items():
        for number in range(1, count + 1):
            for kind in _PRACTICE_TASKS:
                rng = random.Random(f"{seed} {split} {kind} {number}")
                name, game = _practice_game(kind, rng, split == "unseen", older_dialect)
                trial = out / "json_2.1.1" / FOLDERS[split] / name / f"practice_{number:04d}"
                trial.mkdir(parents=True, exist_ok=True)
                (trial / "game.tw-pddl").write_text(json.dumps(game), encoding="utf-8")
                written += 1
    return written


def _practice_game(kind: str, rng: random.Random, unseen: bool, older_dialect: bool) -> tuple[str, dict]:
    """-> (name of the task's folder, content of game.tw-pddl)"""
    from alfworld.gen.goal_library import gdict
    scene, poses, target, place = _draw_task(kind, rng, unseen)
    targets = 2 if kind == "pick_two_obj_and_place" else 1
    things = [(target, rng.choice(_hideouts(poses, target, place))) for _ in range(targets)]
    for receptacle in rng.choices(list(poses), k=_OTHER_THINGS):
        if others := [cls for cls in _contents(receptacle) if cls != target]:
            things.append((rng.choice(others), receptacle))
    if kind == "look_at_obj_in_light":
        things.append(("DeskLamp", next(r for r in poses if _class(r) in _LAMP_PLACES)))
        place = "DeskLamp"

    words = {"obj": target, "recep": place, "toggle": place}
    task = rng.choice(gdict[kind]["templates"]).format(**{key: word.lower() for key, word in words.items()})
    problem = _problem(poses, things) + gdict[kind]["pddl"].format(**words).replace("#", "-")
    problem += ")" * (problem.count("(") - problem.count(")"))  # only some goals close the problem
    return f"{kind}-{target}-None-{place}-{scene}", {
        "pddl_domain": _shipped("data/alfred.pddl"), "grammar": _grammar(task, older_dialect),
        "pddl_problem": problem, "solvable": True}


def _draw_task(kind: str, rng: random.Random, unseen: bool) -> tuple[int, dict[str, list], str, str]:
    """-> (scene, pose by receptacle, class of the target, class of the goal's receptacle)

    Draws until the house has what the task needs and at least three receptacles that may hide the target.
    """
    from alfworld.gen.constants import GOALS_VALID, SCENE_TYPE, VAL_ACTION_OBJECTS
    appliance, ability = _PRACTICE_TASKS[kind]
    while True:
        room = rng.choice(sorted(GOALS_VALID[kind]))
        scene = rng.choice([scene for scene in SCENE_TYPE[room] if (scene % 5 == 0) == unseen])
        poses = json.loads(_shipped(f"gen/layouts/FloorPlan{scene}-openable.json"))
        poses = {r: poses[r] for r in _draw_receptacles(sorted(poses), rng)}
        classes = [_class(r) for r in poses]
        choices = [(target, _class(r)) for r in poses for target in _contents(r)
                   if (not ability or target in VAL_ACTION_OBJECTS[ability])
                   and len(_hideouts(poses, target, _class(r))) >= 3]
        lit = kind != "look_at_obj_in_light" or any(place in classes for place in _LAMP_PLACES)
        if choices and lit and (not appliance or appliance in classes):
            return scene, poses, *rng.choice(choices)


def _draw_receptacles(scene: list[str], rng: random.Random) -> list[str]:
    """Some of a scene's receptacles, sorted; real kitchens have up to 27 cabinets."""
    house: list[str] = []
    for r in rng.sample(scene, len(scene)):
        if sum(_class(other) == _class(r) for other in house) < _MAX_ALIKE:
            house.append(r)
    return sorted(house[:_MAX_RECEPTACLES])


def _problem(poses: dict[str, list], things: list[tuple[str, str]]) -> str:
    """The PDDL problem up to its goal: the house, what is in it, and the agent in the middle of the room."""
    from alfworld.gen.constants import MOVABLE_RECEPTACLES_SET, OPENABLE_CLASS_SET, VAL_ACTION_OBJECTS
    start = "loc|99|99|0|30"
    locations = {r: f"loc|{x * 4:.0f}|{z * 4:.0f}|{turn // 90}|{tilt}"  # x and z in steps of 0.25 m
                 for r, (x, z, turn, tilt) in poses.items()}
    names = {f"{cls}|+00.00|+00.00|+00.{n:02d}": (cls, r) for n, (cls, r) in enumerate(things)}
    # The domain names some classes whether the house has them or not.
    kinds = sorted({cls for cls, _ in things} | {"Knife", "ButterKnife"})
    places = sorted({_class(r) for r in poses} | {"SinkBasin", "Microwave", "Fridge"})

    facts = [f"atLocation agent1 {start}"]
    for r in poses:
        facts += [f"receptacleType {r} {_class(r)}Type", f"receptacleAtLocation {r} {locations[r]}"]
        facts += [f"openable {r}"] if _class(r) in OPENABLE_CLASS_SET else []
    for name, (cls, r) in names.items():
        facts += [f"objectType {name} {cls}Type", f"inReceptacle {name} {r}",
                  f"objectAtLocation {name} {locations[r]}"]
        facts += [f"{ability.lower()} {name}" for ability, able in VAL_ACTION_OBJECTS.items() if cls in able]
        facts += [f"pickupable {name}"] if cls != "DeskLamp" else []
        facts += [f"isReceptacleObject {name}"] if cls in MOVABLE_RECEPTACLES_SET else []
    facts += [f"canContain {place}Type {cls}Type"
              for place in places for cls in _contents(place) if cls in kinds]
    declared = {"agent": ["agent1"], "receptacle": poses, "object": names,
                "location": sorted({start, *locations.values()}),
                "rtype": [f"{place}Type" for place in places], "otype": [f"{cls}Type" for cls in kinds]}
    objects = "\n".join(f"{name} - {kind}" for kind, group in declared.items() for name in group)
    init = "\n".join(f"({fact})" for fact in facts)
    return ("(define (problem practice)\n(:domain alfred)\n"
            f"(:objects\n{_mangled(objects)})\n(:init\n{_mangled(init)})\n")


def _mangled(text: str) -> str:
    """Names as the engine expects to take them apart again; the blanks around " - " keep the types apart."""
    for char, word in {"|": "_bar_", "+": "_plus_", ".": "_dot_"}.items():
        text = text.replace(char, word)
    return text.replace("-", "_minus_").replace(" _minus_ ", " - ")


def _grammar(task: str, older_dialect: bool) -> str:
    grammar = _shipped("data/alfred.twl2").replace("UNKNOWN GOAL", task)
    if older_dialect:
        for newer, older in [
                ("move {o} to {r}", "put {o} in/on {r}"),
                ("You arrive at {r.name}", "You arrive at {lend.name}"),
                ("You move the {o.name} to the {r.name}", "You put the {o.name} in/on the {r.name}")]:
            grammar = grammar.replace(newer, older)
    return grammar


def _hideouts(poses: dict[str, list], target: str, place: str) -> list[str]:
    """The receptacles where the target may start: any that holds such things, but for the goal's."""
    return [r for r in poses if target in _contents(r) and _class(r) != place]


def _contents(receptacle: str) -> list[str]:
    """The classes of things that such a receptacle may hold; no slices, and no boxes, which hold more."""
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS
    classes = VAL_RECEPTACLE_OBJECTS.get(_class(receptacle), ())
    return sorted(cls for cls in classes if not cls.endswith("Sliced") and cls != "Box")


def _class(receptacle: str) -> str:
    """Cabinet of Cabinet|+00.17|+02.01|-01.20, SinkBasin of Sink|-01.33|+00.92|-01.23|SinkBasin."""
    return receptacle.rpartition("|")[2] if receptacle.endswith("Basin") else receptacle.partition("|")[0]


def _shipped(path: str) -> str:
    """A text file of the alfworld package."""
    return importlib.resources.files("alfworld").joinpath(path).read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_practice_games(args.out, {"train": 8, "seen": 3, "unseen": 3}, args.seed)
    print(f"{count} practice games in {args.out}; results on them are not ALFWorld results")


if __name__ == "__main__":
    main()
