"""What a user can rely on whatever a model writes and a file holds: an action or none, rows or one line that says what
is wrong; nothing else happens."""

import json
from typing import get_origin

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typing_extensions import NotRequired, get_type_hints

import common
from common import (NO_ACTION, Candidates, Critique, Episode, Rollout, Trajectory, UserError, clean_action, fill,
                    normalise, parse_turn, read_rows, with_candidates)
from environments import choose_tasks
from environments.alfworld import AlfWorld, game_path, game_tasks
from environments.scienceworld import ScienceWorld
from practice_games import write_practice_games
from prompts.base_model import fill_dialogue, leak_in, repeats_itself
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
    assert isinstance(leak_in(text) | repeats_itself(text), bool)
    listed = turn.get("candidates", [])
    assert with_candidates(turn["thought"]) == ({"candidates": listed} if listed else {})
    assert not listed or len({each["action"] for each in listed}) > 1 and all(each["judgement"] for each in listed)


def mutated(row):
    """A row of which some fields hold something else, are missing, or are more."""
    return st.builds(lambda changes, gone: {name: of for name, of in {**row, **changes}.items() if name not in gone},
                     st.dictionaries(st.sampled_from([*row, "other"]), JSON, max_size=3),
                     st.sets(st.sampled_from(list(row)), max_size=2))


INNER = mutated(ROW["steps"][0]).map(lambda step: ROW | {"steps": [step]})
LINES = st.lists(st.one_of(JSON, mutated(ROW), INNER, mutated(CANDIDATE)).map(lambda row: json.dumps(row).encode())
                 | st.binary(max_size=40), max_size=4)


def required(kind):
    """The fields that every row of a kind has."""
    return {name for name, of in get_type_hints(kind, include_extras=True).items() if get_origin(of) is not NotRequired}


@given(LINES, st.sampled_from([Trajectory, Candidates, Rollout, Critique, Episode]), st.booleans())
@in_folder
def test_a_file_is_read_or_refused_by_name(tmp_path, lines, kind, whole):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * whole)
    try:
        rows = read_rows(path, kind)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert rows and all(row.keys() >= required(kind) for row in rows)
        assert all(step.keys() >= required(common.Step) for row in rows for step in row.get("steps", ()))


TURNS = st.lists(st.dictionaries(st.sampled_from(["from", "role", "value", "content"]),
                                 st.sampled_from(["gpt", "human", "Action: look around"]) | JSON), max_size=6)


@given(st.lists(JSON | st.fixed_dictionaries({"id": JSON, "conversations": TURNS | JSON}), max_size=3),
       st.sampled_from(["scienceworld", "alfworld"]), st.booleans())
@in_folder
def test_imported_conversations_are_read_or_refused_by_their_index(tmp_path, rows, env, skip):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(rows))
    try:
        for task, published in read_published(str(path), env, skip).items():
            assert task.startswith(f"{env}/") and all(action for _, action in published["turns"])
    except UserError as error:
        assert not skip and f"{path}: row " in str(error)


PROMPT = st.sampled_from(["{{ task }}", "{task}", "{", "}", "{{", "}}", "{%", "%}", "{#", "#}", "{{ task!r }}",
                          "{{ task.x }}", "{{ task[0] }}", "{{ task.__class__ }}", "{{ task | upper }}", "{{ 1 / 0 }}",
                          "{{ other }}", "{{ task(1) }}", "{% if task %}", "{% endif %}", "{% include task %}", "{0}",
                          "{{ task | no }}", "=== user\n"])


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
        env, task = ScienceWorld(), choose_tasks("scienceworld", "seen", None, 1, 0)[0]
    else:
        root = tmp_path_factory.mktemp("games")
        write_practice_games(root, {"train": 1}, seed=0)
        env, task = AlfWorld(root), game_tasks("train", root)[0]
    yield env, task
    env.close()


@given(st.lists(TEXT, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_an_environment_answers_whatever_is_said(environment, actions):
    env, task = environment
    env.reset(task)
    for action in actions:
        result = env.step(action)
        assert isinstance(result.observation, str) and result.observation and 0 <= result.reward <= 1
        assert isinstance(result.accepted, bool) and result.end in (None, "wrong focus")
        assert clean_action(action) or (result.observation == NO_ACTION and not result.accepted)


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
        path = game_path(houses, f"alfworld/{text}")
    except UserError:
        assert text != "x/x/x"
    else:
        assert path == houses / "json_2.1.1" / "x" / "x" / "x" / "game.tw-pddl"
