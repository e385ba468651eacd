"""What a user can rely on with ScienceWorld, in the real simulator."""

import pytest

from common import NO_ACTION, UserError
from environments import choose_tasks, replay, turn_limit
from environments.scienceworld import ScienceWorld, with_seen_names
from environments.workers import EnvironmentPool, Playing, play

TASK = "scienceworld/lifespan-longest-lived/0"


@pytest.fixture(scope="module")
def env():
    env = ScienceWorld()
    yield env
    env.close()


@pytest.fixture(scope="module")
def expert(env):
    return env.expert(TASK, None, 0)


def test_the_splits_are_the_published_ones():
    sizes = [len(choose_tasks("scienceworld", split, None, None, 0)) for split in ("train", "seen", "unseen")]
    assert sizes == [1483, 194, 211]


def test_a_few_tasks_are_of_many_types():
    assert len({task.split("/")[1] for task in choose_tasks("scienceworld", "unseen", None, 24, 0)}) == 24
    with pytest.raises(UserError, match="types are boil"):
        choose_tasks("scienceworld", "train", "bake", None, 0)


def test_an_expert_reaches_the_full_score_within_the_limit_with_a_thought_for_every_step(expert):
    assert expert["reward"] >= 0.999 and len(expert["steps"]) <= turn_limit(TASK)
    assert all(step["thought"].endswith(".") for step in expert["steps"])
    assert any(step["action"].startswith("teleport to") for step in expert["steps"])


def test_an_expert_calls_things_by_the_names_that_the_agent_has_seen(env):
    steps = env.expert("scienceworld/find-animal/75", None, 0)["steps"]
    actions = [step["action"] for step in steps]
    assert "a turtle egg" in steps[actions.index("focus on turtle egg") - 1]["observation"]
    assert not any("egg turtle" in action for action in actions)


def test_an_expert_looks_around_where_it_begins_and_does_nothing_that_is_refused(env):
    """The simulator's gold path to the first task begins with a focus, that to the others has refused actions."""
    steps = env.expert("scienceworld/lifespan-shortest-lived/16", None, 0)["steps"]
    assert steps[0]["action"] == "look around" and steps[1]["action"].startswith("focus on")
    for task in "scienceworld/test-conductivity/211", "scienceworld/chemistry-mix-paint-tertiary-color/10":
        trajectory = env.expert(task, None, 0)
        assert trajectory["reward"] >= 0.999 and all(step["accepted"] for step in trajectory["steps"])


@pytest.mark.parametrize("action, seen, renamed", [
    ("focus on egg parrot", "a parrot egg", ["focus on parrot egg"]),
    ("move baby baby bear in inventory to box", "a baby bear, a box", ["move baby bear in inventory to box"]),
    ("connect adult adult bee to egg bat", "a adult bee and a bat egg", [
        "connect adult bee to bat egg", "connect adult bee to egg bat", "connect adult adult bee to bat egg"]),
    ("pick up pot 1 containing pea plant and soil", "a pot 1 (containing a pea plant)", ["pick up pot 1"]),
    ("focus on cup containing milk", "a cup (containing milk)", []),
    ("focus on parrot", "a bat", []), ("look around", "", []), ("wait1", "wait", [])])
def test_a_name_that_was_not_seen_is_tried_in_the_form_that_was(action, seen, renamed):
    assert list(with_seen_names(action, seen)) == renamed


def test_the_same_actions_give_the_same_observations_in_another_process(expert):
    with EnvironmentPool("scienceworld", 1) as pool:
        (played,) = play([Playing("k", TASK, turn_limit(TASK), expert["steps"])], Silent(), pool, {}, 0)
    assert played.steps == expert["steps"]
    assert (played.reward, played.end) == (expert["reward"], "success")


class Silent:
    """An engine that nobody asks: every step of the episode is forced."""
    busy = False


def test_a_branch_is_the_episode_as_if_it_had_been_played_so_far(env, expert):
    actions = [step["action"] for step in expert["steps"]]
    for t in (2, len(actions), 0, 1):
        instruction, results = env.branch(TASK, actions[:t])
        assert instruction == expert["instruction"]
        assert [result[:3] for result in results] == [
            (step["observation"], step["reward"], step["accepted"]) for step in expert["steps"][:t]]


def test_wrong_focus_ends_the_episode_and_keeps_the_reward(env):
    env.reset("scienceworld/find-animal/0")
    env.step("teleport to kitchen")
    result = env.step("focus on counter")
    assert result.end == "wrong focus" and 0 <= result.reward < 1 and result.accepted


def test_commands_that_are_no_actions_do_not_reach_the_simulator(env):
    env.reset(TASK)
    for action in "reset task", "x" * 10_000, "fly to moon":
        result = env.step(action)
        assert result.observation.startswith("No known action") and not result.accepted
    assert env.step("") == env.step(" . ") == (NO_ACTION, 0.0, False, None)


def test_accepted_is_what_the_simulator_has_done(env):
    """It understands more than it does."""
    env.reset("scienceworld/test-conductivity/211")
    done = ["teleport to workshop", "look around", "connect battery anode to blue wire terminal 1", "look in table",
            "close door to hallway", "disconnect battery", "wait1", "look at table"]
    undone = ["connect battery to blue wire", "teleport to battery", "open table", "use battery on table",
              "pour table into table", "activate table", "read table", "eat table", "close door to hallway",
              "go to battery"]
    assert [action for action in done if not env.step(action).accepted] == []
    before = env.step("look around")
    assert [action for action in undone if env.step(action).accepted] == [] and env.step("look around") == before


@pytest.mark.parametrize("task", ["scienceworld/bake/0", "scienceworld/boil/100000", "scienceworld/boil/-1", "boil"])
def test_an_unknown_task_is_named(env, task):
    with pytest.raises(UserError, match="unknown ScienceWorld task"):
        env.reset(task)


def test_replayed_turns_are_what_the_environment_answers(env, expert):
    again = replay(env, TASK, [(step["thought"], step["action"]) for step in expert["steps"]], None)
    assert again["steps"] == expert["steps"] and again["reward"] == expert["reward"]
