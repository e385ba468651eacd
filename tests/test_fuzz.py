"""What a user can rely on whatever a model writes and a file holds: an action or none, rows or one line that says what is
wrong; nothing else happens."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import common
from common import (CANDIDATES, CRITIQUE, EPISODE, NO_ACTION, ROLLOUT, TRAJECTORY, AlfWorld, ScienceWorld, UserError,
                    alfworld_tasks, clean_action, fill, fill_dialogue, is_deliberation, leak_in, list_tasks, literally,
                    normalise, parse_turn, read_rows, repeats_itself, write_practice_games)
from stage0_sft import read_published
from test_stages import CANDIDATE, ROW

WORDS = st.sampled_from(["Action:", "Thought:", "Action: look around", "\n", "- look: fine.", "Observation: ", " ", ".",
                         "Action Evaluation:", "\x00", "\ud800", "```", "<|im_end|>", "reset task", "0", "é\u2028"])
TEXT = st.one_of(st.text(), st.lists(st.one_of(WORDS, st.text(max_size=10)), max_size=12).map("".join))
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12)
in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(TEXT)
@settings(deadline=None)
def test_whatever_a_model_writes_is_one_action_or_none(text):
    turn = parse_turn(text)
    action = turn["action"]
    assert action == clean_action(action) and len(action) <= common.LONGEST_ACTION
    assert action.isprintable() and action == action.encode(errors="ignore").decode()  # no lone surrogates
    assert normalise(normalise(text)) == normalise(text)
    assert not action or "Action:" in turn["text"]
    assert isinstance(is_deliberation(turn["thought"]) | leak_in(text) | repeats_itself(text), bool)


@given(TEXT.filter(str.isprintable))
@settings(deadline=None)
def test_a_literal_expression_matches_its_text_alone(text):
    import re
    assert re.fullmatch(literally(text), text) and not re.fullmatch(literally(text), text + "x")


def mutated(row):
    """A row of which some fields hold something else, are missing, or are more."""
    return st.builds(lambda changes, gone: {name: value for name, value in {**row, **changes}.items() if name not in gone},
                     st.dictionaries(st.sampled_from([*row, "other"]), JSON, max_size=3),
                     st.sets(st.sampled_from(list(row)), max_size=2))


LINES = st.lists(st.one_of(JSON, mutated(ROW), mutated(CANDIDATE)).map(lambda row: json.dumps(row).encode())
                 | st.binary(max_size=40), max_size=4)


@given(LINES, st.sampled_from([TRAJECTORY, CANDIDATES, ROLLOUT, CRITIQUE, EPISODE]), st.booleans())
@in_folder
def test_a_file_is_read_or_refused_by_name(tmp_path, lines, fields, whole):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * whole)
    try:
        rows = read_rows(path, fields)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert all(row.keys() >= fields.keys() for row in rows)


TURNS = st.lists(st.dictionaries(st.sampled_from(["from", "role", "value", "content"]),
                                 st.sampled_from(["gpt", "human", "Action: look around"]) | JSON), max_size=6)


@given(st.lists(JSON | st.fixed_dictionaries({"id": JSON, "conversations": TURNS | JSON}), max_size=3),
       st.sampled_from(["scienceworld", "alfworld"]), st.booleans())
@in_folder
def test_imported_conversations_are_read_or_refused_by_their_index(tmp_path, rows, env, skip):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(rows))
    try:
        for task, turns in read_published(str(path), env, skip).items():
            assert task.startswith(f"{env}/") and all(action for _, action in turns)
    except UserError as error:
        assert not skip and f"{path}: row " in str(error)


PROMPT = st.sampled_from(["{task}", "{", "}", "{{", "}}", "{task!r}", "{task:>9}", "{task.x}", "{0}", "{}", "=== user\n",
                          "{task[0]}", "{task:{task}}", "{other}"])


@given(st.lists(PROMPT | TEXT, max_size=6).map("".join), TEXT)
@in_folder
def test_a_prompt_is_filled_or_refused_by_name(tmp_path, monkeypatch_prompts, text, value):
    path = monkeypatch_prompts / "p.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    for read in (lambda: fill(text, path, {"task": value}), lambda: fill_dialogue("p", task=value)):
        try:
            read()
        except UserError as error:
            assert str(path) in str(error)


@pytest.fixture
def monkeypatch_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "PROMPTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=["scienceworld", "alfworld"])
def environment(request, tmp_path_factory):
    if request.param == "scienceworld":
        env, task = ScienceWorld(), list_tasks("scienceworld", "seen", None, 1, 0)[0]
    else:
        root = tmp_path_factory.mktemp("games")
        write_practice_games(root, {"train": 1}, seed=0)
        env, task = AlfWorld(root), alfworld_tasks("train", root)[0]
    yield env, task
    env.close()


@given(st.lists(TEXT, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_an_environment_answers_whatever_is_said(environment, actions):
    env, task = environment
    env.reset(task)
    for action in actions:
        observation, reward, end = env.step(action)
        assert isinstance(observation, str) and observation and 0 <= reward <= 1
        assert end in (None, "wrong focus") and (clean_action(action) or observation == NO_ACTION)


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    """A folder of games with one game in it, and the same file in every folder around."""
    outside = tmp_path_factory.mktemp("outside")
    game = outside / "x" / "x" / "json_2.1.1" / "x" / "x" / "x"
    game.mkdir(parents=True)
    for folder in (outside, *game.parents[:5], game):
        (folder / "game.tw-pddl").write_text("{}")
    return outside / "x" / "x"


@given(st.lists(st.sampled_from(["..", ".", "x", "json_2.1.1", ""]) | TEXT, max_size=8).map("/".join))
@settings(deadline=None, max_examples=500)
@example("x/x/x").via("the game")
@example("../../x")
@example("x/x/x/..")
def test_no_task_id_leads_out_of_the_games_folder(houses, text):
    try:
        path = common.game_path(houses, f"alfworld/{text}")
    except UserError:
        assert text != "x/x/x"
    else:
        assert path == houses / "json_2.1.1" / "x" / "x" / "x" / "game.tw-pddl"
