"""What a user can rely on with ALFWorld games, on practice games in the real engine."""

import json
import random
import re
import shutil
import subprocess
import sys

import pytest

from common import NO_ACTION, UserError
from environments import Result, replay
from environments.alfworld import AlfWorld, game_path, game_tasks, games_root
from practice_games import write_practice_games
from stage0_sft import read_published

TYPES = ["look_at_obj_in_light", "pick_and_place_simple", "pick_clean_then_place_in_recep",
         "pick_cool_then_place_in_recep", "pick_heat_then_place_in_recep", "pick_two_obj_and_place"]


GAMES = {"train": 1, "unseen": 1}


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    root = tmp_path_factory.mktemp("newer")
    write_practice_games(root, GAMES, seed=0)
    return root


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    root = tmp_path_factory.mktemp("older")
    write_practice_games(root, GAMES, seed=0, older_dialect=True)
    return root


def game_of(kind: str, root) -> str:
    (task,) = [task for task in game_tasks("train", root) if f"/{kind}-" in task]
    return task


@pytest.fixture(scope="module")
def wins(newer):
    """The expert's trajectory in a game of each type."""
    env = AlfWorld(newer)
    return {kind: env.expert(game_of(kind, newer), max_turns=40, seed=0) for kind in TYPES}


def play(env: AlfWorld, task: str, actions: list[str]) -> list[str | Result]:
    return [env.reset(task), *(env.step(action) for action in actions)]


@pytest.fixture(scope="module")
def placed(wins):
    """A won game that ends in a put, and its actions."""
    trajectory = wins["pick_and_place_simple"]
    return trajectory["task"], [step["action"] for step in trajectory["steps"]]


@pytest.mark.parametrize("kind", TYPES)
def test_the_expert_wins_every_task_type_in_the_same_words_in_both_dialects(kind, wins, newer, older):
    trajectory = wins[kind]
    actions = [step["action"] for step in trajectory["steps"]]
    observations = [step["observation"] for step in trajectory["steps"]]
    for root in (newer, older):
        first, *rest = play(AlfWorld(root), trajectory["task"], actions)
        assert first == trajectory["instruction"]
        assert [result.observation for result in rest] == observations
        assert all(result[1:] == (0.0, True, None) for result in rest[:-1]) and rest[-1][1:] == (1.0, True, "success")


@pytest.mark.parametrize("kind", TYPES)
def test_the_expert_speaks_the_prompts_language_and_thinks_before_each_action(kind, wins):
    trajectory = wins[kind]
    assert trajectory["reward"] == trajectory["steps"][-1]["reward"] == 1.0
    known = set(re.findall(r"[a-z]+ [0-9]+", trajectory["instruction"]))
    for step in trajectory["steps"]:
        assert re.match(r"(go to|take|put|open|close|toggle|clean|heat|cool|examine) ", step["action"])
        assert " in/on " in step["action"] or not step["action"].startswith("put")
        assert step["observation"] != "Nothing happens." and step["accepted"]
        assert step["thought"].endswith(".")
        assert set(re.findall(r"[a-z]+ [0-9]+", step["thought"])) <= known  # no thought names what is unseen
        known |= set(re.findall(r"[a-z]+ [0-9]+", step["observation"]))
    assert len({step["thought"] for step in trajectory["steps"]}) > 1


def test_the_first_observation_is_the_house_and_the_task_without_the_banner(newer):
    first = AlfWorld(newer).reset(game_of("pick_and_place_simple", newer))
    assert first.startswith("You are in the middle of a room.")
    assert "Your task is to: put" in first


@pytest.mark.parametrize("wording", ["put {} in/on {}", "put {} in {}", "put {} on {}", "move {} to {}",
                                     " PUT  {}  IN/ON {} "])
def test_every_way_to_say_put_wins_in_both_dialects(wording, placed, newer, older):
    task, actions = placed
    thing, place = re.fullmatch(r"put (.+) in/on (.+)", actions[-1]).groups()
    for root in (newer, older):
        *_, last = play(AlfWorld(root), task, [*actions[:-1], wording.format(thing, place)])
        assert last == (f"You put the {thing} in/on the {place}.", 1.0, True, "success")


def test_every_way_to_say_toggle_wins(wins, newer):
    trajectory = wins["look_at_obj_in_light"]
    actions = [step["action"] for step in trajectory["steps"]]
    lamp = re.fullmatch(r"toggle (desklamp [0-9]+) .+", actions[-1])[1]
    for wording in (actions[-1], f"toggle {lamp}", f"use {lamp}"):
        *_, last = play(AlfWorld(newer), trajectory["task"], [*actions[:-1], wording])
        assert last == (f"You turn on the {lamp}.", 1.0, True, "success")


def test_accepted_is_what_the_game_has_done(wins, newer, older):
    """Most actions are of no use a second time."""
    trajectory = wins["pick_two_obj_and_place"]
    *actions, last = [step["action"] for step in trajectory["steps"]]
    assert {action.split()[0] for action in actions} == {"go", "open", "take", "close", "put"}
    for env in (AlfWorld(newer), AlfWorld(older)):
        env.reset(trajectory["task"])
        assert all(env.step(action).accepted for action in ("look", "inventory"))
        for action in actions:
            assert env.step(action).accepted
            assert env.step(action) == ("Nothing happens.", 0.0, False, None)
            assert env.step("look").accepted
        assert all(env.step(action) == (NO_ACTION, 0.0, False, None) for action in ("", " . ", "\x00"))
        assert env.step("look around") == ("Nothing happens.", 0.0, False, None)  # which ScienceWorld understands
        assert env.step(last)[1:] == (1.0, True, "success")


@pytest.mark.parametrize("action", [
    "reset", "quit", "help", "restart", "go to", "go to the moon", "put", "x" * 10_000, "look\nlook",
    "fly\x00", "go to ../../x 1", "{put}", "slice apple 1 with knife 1", "take a 1 from b 1",
    "go to cabinet ١"])
def test_nonsense_changes_nothing_and_does_not_end_the_game(action, placed, newer):
    task, actions = placed
    env = AlfWorld(newer)
    plain = play(env, task, actions)
    disturbed = play(env, task, [command for each in actions for command in (action, each)])
    assert disturbed[1::2] == [("Nothing happens.", 0.0, False, None)] * len(actions)
    assert [disturbed[0], *disturbed[2::2]] == plain


def test_a_branch_is_the_game_as_if_it_had_been_played_so_far(placed, newer):
    """Whatever was played on the branches before, and on other games."""
    task, actions = placed
    other = game_of("pick_two_obj_and_place", newer)
    first, *results = play(AlfWorld(newer), task, actions)
    env = AlfWorld(newer)
    for t in (3, len(actions), 0, 5, 5, len(actions) - 1, 1):
        assert env.branch(task, actions[:t]) == (first, results[:t])
        assert [env.step(action) for action in actions[t:]] == results[t:]
        if t % 2:
            env.branch(other, ["inventory"])
            env.branch(task, ["go to nowhere 1", *actions[:2]])


STOCK = """
import json, sys, textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs.pddl import PddlEnv
env = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, admissible_commands=True)))
for game, commands in json.load(sys.stdin):
    env.load(game)
    states = [env.reset(), *(env.step(command)[0] for command in commands)]
    print(json.dumps([[state.feedback, state.admissible_commands, state.won] for state in states]))
"""


def test_games_are_played_as_in_the_stock_engine(newer):
    """Random walks in one game of each type, by what the engine says, would admit, and takes for won."""
    env, walks = AlfWorld(newer), []
    for task in (game_of(kind, newer) for kind in TYPES):
        draw, commands = random.Random(task), []
        env.reset(task)
        states = [env.state]
        for _ in range(12):
            commands.append(draw.choice(env.state["admissible_commands"]))
            states.append(env._engine.step(commands[-1])[0])
            env.state = states[-1]
        ours = [[state.feedback, state["admissible_commands"], state.won] for state in states]
        walks.append((task, commands, ours))
    games = [(str(game_path(newer, task)), commands) for task, commands, _ in walks]
    stock = subprocess.run([sys.executable, "-c", STOCK], input=json.dumps(games), text=True, capture_output=True,
                           check=True)
    assert [json.loads(line) for line in stock.stdout.splitlines()] == [ours for _, _, ours in walks]


def test_a_won_game_stays_won_whatever_is_said_next(placed, newer):
    task, actions = placed
    *_, last = play(AlfWorld(newer), task, [*actions, "quit"])
    assert last == ("Nothing happens.", 1.0, False, "success")


def test_many_games_can_be_open_at_once_and_played_again(newer):
    tasks = game_tasks("train", newer)[:3]
    alone = [play(AlfWorld(newer), task, ["go to drawer 1", "look"]) for task in tasks]
    envs = [AlfWorld(newer) for _ in tasks]
    firsts = [env.reset(task) for env, task in zip(envs, tasks)]
    together = [[env.step(action) for env in envs] for action in ("go to drawer 1", "look")]
    assert [list(each) for each in zip(firsts, *together)] == alone
    assert [play(envs[0], task, ["go to drawer 1", "look"]) for task in tasks] == alone


def test_the_engine_leaves_the_command_line_and_the_output_alone(newer):
    before = (list(sys.argv), sys.stdout, random.getstate())
    AlfWorld(newer).expert(game_tasks("unseen", newer)[0], max_turns=5, seed=0)
    assert (list(sys.argv), sys.stdout, random.getstate()) == before


def test_task_ids_are_sorted_paths_that_say_practice(newer):
    tasks = game_tasks("train", newer)
    assert len(tasks) == 6 and tasks == sorted(tasks)
    assert all(re.fullmatch(r"alfworld-practice/train/\w+-\w+-None-\w+-\d+/practice_\d{4}", task) for task in tasks)
    scenes = {split: {task.split("/")[2].split("-")[-1] for task in game_tasks(split, newer)}
              for split in ("train", "unseen")}
    assert scenes["train"].isdisjoint(scenes["unseen"])


def test_the_same_seed_writes_the_same_bytes_and_plays_the_same_expert(newer, tmp_path):
    write_practice_games(tmp_path, GAMES, seed=0)
    files = {path.relative_to(newer): path.read_bytes() for path in newer.rglob("*.tw-pddl")}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.tw-pddl")} == files
    write_practice_games(tmp_path / "other", GAMES, seed=1)
    assert {path.read_bytes() for path in (tmp_path / "other").rglob("*.tw-pddl")}.isdisjoint(files.values())
    task = game_of("pick_two_obj_and_place", newer)
    random.seed(123)
    once = AlfWorld(newer).expert(task, max_turns=40, seed=7)
    assert AlfWorld(tmp_path).expert(task, max_turns=40, seed=7) == once


def test_the_expert_says_none_when_it_runs_out_of_turns(newer):
    assert AlfWorld(newer).expert(game_tasks("train", newer)[0], max_turns=1, seed=0) is None


def test_published_trajectories_are_found_by_their_game_file_and_replayed(wins, newer, tmp_path):
    """In the older dialect's words and with the path of the machine where they were made."""
    expert = wins["pick_and_place_simple"]
    turns = [("human", "Interact with a household."), ("gpt", "OK"), ("human", expert["instruction"])]
    for step in expert["steps"]:
        turns += [("gpt", f"Thought: {step['thought']}\nAction: {step['action']}"), ("human", step["observation"])]
    path = tmp_path / "published.json"
    path.write_text(json.dumps([{
        "game_file": f"/somewhere/json_2.1.1/{expert['task'].removeprefix('alfworld-practice/')}/game.tw-pddl",
        "conversations": [{"role": role, "content": content} for role, content in turns]}]))
    (task, published), = read_published(str(path), "alfworld", skip_bad=False).items()
    assert task == expert["task"]
    assert replay(AlfWorld(newer), task, published["turns"]) == expert | {"source": "published"}
    assert AlfWorld.is_same_task(expert["instruction"], published["said"])
    assert AlfWorld.is_same_task(expert["instruction"], "Your task is to: put a boat in fridge.") is False


def test_the_splits_are_those_of_the_stock_loader_and_what_is_left_out_is_said_once(tmp_path, capsys):
    """Public copies hold games that the stock loader does not play."""
    write_practice_games(tmp_path, {"seen": 1}, seed=0)
    games = sorted(tmp_path.rglob("game.tw-pddl"))
    assert len(games) == 6
    for game, said in zip(games, (False, None, "missing"), strict=False):
        content = json.loads(game.read_text())
        content.pop("solvable") if said == "missing" else content.update(solvable=said)
        game.write_text(json.dumps(content | {"walkthrough": ["look"] * 2000}))  # the answer is not at the file's end
    for name in ("pick_and_place_with_movable_recep-Mug-Pan-Desk-1", "pick_and_place_simple-AppleSliced-None-Desk-1",
                 "juggle-Mug-None-Desk-1"):
        shutil.copytree(games[-1].parent.parent, games[-1].parent.parent.with_name(name))
    tasks = game_tasks("seen", tmp_path)
    assert [task.split("/")[-1] for task in tasks] == [game.parent.name for game in games[3:]]
    assert game_tasks("seen", tmp_path) == tasks
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "9 games, 6 of them left out, as by ALFWorld's own loader: " in said
    for reason in ("1 unsolvable", "2 never checked for a solution", "2 with movable receptacles or slices", "1 of another task type"):
        assert reason in said


def test_an_unknown_task_is_one_line_that_names_the_file(newer):
    with pytest.raises(UserError, match="nowhere.*ALFWORLD_DATA") as error:
        AlfWorld(newer).reset("alfworld-practice/train/nowhere/practice_0001")
    assert str(newer) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no ALFWorld task id"):
        AlfWorld(newer).reset("alfworld/train/../../secret")


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"grammar": "", "pddl_domain": "("}'])
def test_an_unreadable_game_is_one_line_that_names_the_file(content, newer, tmp_path):
    path = tmp_path / "json_2.1.1/train/broken/practice_0001/game.tw-pddl"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match="not a game the engine can read") as error:
        AlfWorld(tmp_path).reset("alfworld-practice/train/broken/practice_0001")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_games_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(UserError, match="alfworld-download.*ALFWORLD_DATA.*make games.*games/practice"):
        games_root()
    with pytest.raises(UserError, match="seen split"):
        game_tasks("seen", tmp_path)
