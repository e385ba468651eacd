"""What a user can rely on in files, turns and prompts."""

import json

import pytest

import common
from common import (TRAJECTORY, Output, StageOutput, UserError, fill_prompt, is_deliberation, normalise, parse_turn, read_rows,
                    turn_of)
from stage1_sample import distinct_actions, is_flagged, to_explore
from stage4_synthesize import switch_expert

ROW = {"key": "a", "env": "scienceworld", "task": "a", "split": "train", "instruction": "do it", "reward": 1.0,
       "source": "test", "steps": [{"thought": "t", "action": "look around", "observation": "a room"}]}


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("bad, says", [
    ("{broken\n", ":2: not valid JSON"),
    ({k: v for k, v in ROW.items() if k != "steps"}, ":2: field 'steps' is missing"),
    (ROW | {"reward": "high"}, ":2: field 'reward' holds 'high'"),
    (ROW | {"key": "b", "steps": [{"thought": "", "action": "x"}]}, ":2: step 1: field 'observation' is missing"),
    (ROW, "key 'a' occurs twice"),
])
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, says):
    path = write(tmp_path / "expert.jsonl", ROW, bad)
    with pytest.raises(UserError) as error:
        read_rows(path, TRAJECTORY)
    assert says in str(error.value) and str(path) in str(error.value)


def test_finished_rows_survive_a_kill_and_a_cut_off_line(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), StageOutput(out, {"n": 1}, []) as output:
        output.write({"key": "a"})
        raise RuntimeError
    assert not out.exists()
    with open(tmp_path / "out.jsonl.part", "a") as file:
        file.write('{"key": "b", "tex')
    with StageOutput(out, {"n": 1}, []) as output:
        assert list(output.done) == ["a"]
        output.write({"key": "b"})
        output.finish(list(output.done.values()), {})
    assert out.read_text() == '{"key": "a"}\n{"key": "b"}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.meta.json"}


def test_rows_made_with_other_settings_are_not_mixed_in(tmp_path):
    with pytest.raises(RuntimeError), StageOutput(tmp_path / "out.jsonl", {"n": 1}, []) as output:
        output.write({"key": "a"})
        raise RuntimeError
    with StageOutput(tmp_path / "out.jsonl", {"n": 2}, []) as output:
        assert not output.done


@pytest.mark.parametrize("text, thought, action", [
    ("Thought: I look.\nAction: look around", "I look.", "look around"),
    ("Action:  go  to desk 1. ", "", "go to desk 1"),
    ("Thought: a\n\n- x: y\n\nb\nAction: open door\nObservation: it opens\nAction: go", "a\n\n- x: y\n\nb", "open door"),
    ("I do not know", "", ""),
])
def test_the_first_action_line_is_the_action_and_nothing_after_it(text, thought, action):
    turn = parse_turn(text)
    assert (turn["thought"], turn["action"]) == (thought, action)


def test_actions_are_equal_whatever_their_blanks_and_case():
    assert normalise(" Go  to Desk 1. ") == normalise("go to desk 1")


def test_a_step_is_flagged_when_samples_differ_or_are_invalid():
    expert = {"action": "look around", "thought": "t"}
    same = [{"action": "Look  around", "thought": "a"}] * 3
    other = [*same, {"action": "focus on bee", "thought": "b"}]
    invalid = [*same, {"action": "", "thought": ""}]
    assert not is_flagged(distinct_actions(expert, same), same)
    assert is_flagged(distinct_actions(expert, other), other)
    assert is_flagged(distinct_actions(expert, invalid), invalid)
    assert [(a["action"], a["source"], a["count"]) for a in distinct_actions(expert, other)] == [
        ("look around", "expert", 3), ("focus on bee", "sample", 1)]


@pytest.mark.parametrize("finish", ["length", "repetition"])
def test_a_turn_that_was_cut_off_in_its_action_names_none(finish):
    half = "Thought: t\nAction: connect red wire terminal 1 to red"
    assert turn_of(Output(half, 9, finish)) == parse_turn(half) | {"action": ""}
    for whole, ended in (half, "stop"), (f"{half}\n", finish), (f"{half}\nObservation: a bee, a bee", finish):
        assert turn_of(Output(whole, 9, ended)) == parse_turn(half)


def test_each_iteration_explores_first_what_no_iteration_has_changed_yet():
    expert, rewritten = {"action": "look"}, {"action": "look", "deliberated": False, "plain": "I look."}
    one, two, three = ({"key": str(n), "steps": steps} for n, steps in
                       enumerate([[expert, rewritten], [expert, {"action": "look", "deliberated": False}], [expert]]))
    assert to_explore([one, two, three], 2) == [two, three]
    assert to_explore([one, two, three], 9) == [two, three, one]
    assert to_explore([one, two, three], None) == [one, two, three]
    assert to_explore([one | {"switched": {"step": 1}}, two, three], 1)[0]["key"] == one["key"]


def test_a_deliberation_lists_two_candidates_with_judgements():
    assert is_deliberation("Here I am.\n\n- look around: shows the room.\n- wait: wastes time.\n\nSo I look.")
    assert not is_deliberation("Here I am.\n\n- look around: shows the room.\n- Look around: again.")
    assert not is_deliberation("I look around: it helps.")


def test_a_better_rollout_replaces_the_rest_of_the_trajectory():
    deliberation = "- a: wastes time.\n- b: leads on.\n\nI choose to b. It is near."
    step = {"thought": deliberation, "action": "b", "observation": "o"}
    row = ROW | {"reward": 0.5, "steps": [ROW["steps"][0]] * 3}
    rollout = {"key": "a/step2/1", "candidate": "a/step2", "reward": 1.0, "end": "success",
               "steps": [step | {"action": "fly", "observation": "Nothing happens."}, step]}
    switched = switch_expert(row, [rollout, rollout | {"candidate": "a/step3"}])
    assert [s["action"] for s in switched["steps"]] == ["look around", "b"]
    assert (switched["steps"][1]["deliberated"], switched["steps"][1]["plain"]) == (True, "It is near.")
    assert switched["reward"] == 1.0 and switched["switched"]["rollout"] == "a/step2/1"
    assert switch_expert(row, [rollout | {"reward": 0.5}]) is row


def test_an_unknown_placeholder_names_the_prompt_and_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "PROMPTS", tmp_path)
    write(tmp_path / "alfworld.txt", "Go to {recep}. {task}")
    with pytest.raises(UserError, match=r"alfworld.txt: unknown placeholder \{recep\}.*\{task\}"):
        fill_prompt("alfworld", task="t")
    write(tmp_path / "alfworld.txt", "Go to {{recep}}. {task}")
    assert fill_prompt("alfworld-practice", task="t") == "Go to {recep}. t"
