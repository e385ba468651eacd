"""What a user can rely on in files, turns and prompts, and in what makes rows stale."""

import json
import shutil
from typing import ClassVar

import pytest

import common
from common import (ROOT, Candidates, Critique, Episode, Output, Rollout, StageOutput, Trajectory, UserError,
                    code_digest, code_name, dialogue, normalise, parse_turn, read_rows, turn_of, with_candidates)
from environments import read_trajectories
from stage1_sample import candidate_row, distinct_actions, is_flagged, sample
from stage4_synthesize import switch_expert

TASK = "scienceworld/find-animal/0"
STEP = {"thought": "t", "action": "look around", "observation": "a room", "reward": 0.0, "accepted": True}
ROW = {"key": TASK, "task": TASK, "instruction": "do it", "reward": 1.0, "source": "test", "steps": [STEP]}
OF_STEP = {"key": f"{TASK}/step1", "task": TASK, "step": 1}
OF_CANDIDATE = {"key": f"{TASK}/step1/0", "task": TASK, "step": 1, "candidate": 0}
LIST = "Here I am.\n\n- look around: shows the room.\n- wait: wastes time.\n\nSo I look."
LISTED = [{"action": "look around", "judgement": "shows the room."}, {"action": "wait", "judgement": "wastes time."}]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad, says", [
    ("{broken\n", ":2: not valid JSON"),
    ([ROW], ":2: expected a JSON object, found list"),
    ({k: v for k, v in ROW.items() if k != "steps"}, ":2: field 'steps' is missing"),
    (ROW | {"reward": "high"}, ":2: field 'reward' holds 'high'"),
    (ROW | {"reward": True}, ":2: field 'reward' holds True"),
    (ROW | {"steps": [{"thought": "", "action": "x"}]}, ":2: field 'steps.1.observation' is missing"),
    (ROW | {"steps": [STEP, STEP | {"accepted": 1}]}, ":2: field 'steps.2.accepted' holds 1"),
    (ROW | {"steps": [STEP | {"candidates": [LISTED[0], {"action": "wait"}]}]},
     ":2: field 'steps.1.candidates.2.judgement' is missing"),
    (ROW | {"steps": [STEP | {"failed_attempts": [STEP | {"reward": None}]}]},
     ":2: field 'steps.1.failed_attempts.1.reward' holds None"),
    (ROW, f":2: the key '{TASK}' is that of line 1, too"),
])
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, says):
    path = write(tmp_path / "expert.jsonl", ROW, bad)
    with pytest.raises(UserError) as error:
        read_rows(path, Trajectory)
    assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("kind, row, bad, says", [
    (Candidates, OF_STEP | {"invalid": 0, "flagged": True, "candidates": [
        {"action": "wait", "thought": "", "count": 0, "from_expert": True}]},
     {"candidates": [{"action": "wait", "thought": "", "count": "0"}]}, "'candidates.1.count' holds '0'"),
    (Rollout, OF_CANDIDATE | {"steps": [STEP], "reward": 1, "accepted": True, "end": "success", "expert_reward": 1.0,
                              "expert_steps_left": 1, "action_reward": 0},
     {"steps": [STEP | {"observation": None}]}, "'steps.1.observation' holds None"),
    (Critique, OF_CANDIDATE | {"text": "Good.", "verdict": "Good", "used_template": False, "draft_errors": []},
     {"draft_errors": ["no tag", 2]}, "'draft_errors.2' holds 2"),
    (Episode, ROW | {"split": "seen", "end": "success", "tokens": 9, "steps": [STEP | {"text": "", "tokens": 9}]},
     {"steps": [STEP | {"text": ""}]}, "'steps.1.tokens' is missing"),
])
def test_every_kind_of_row_is_read_as_it_is_and_checked_field_by_field(tmp_path, kind, row, bad, says):
    more = row | {"note": "one's own"}
    assert read_rows(write(tmp_path / "rows.jsonl", more), kind) == [more]
    with pytest.raises(UserError, match=f"rows.jsonl:1: field {says}"):
        read_rows(write(tmp_path / "rows.jsonl", row | bad), kind)


def test_files_of_another_format_are_refused(tmp_path):
    path = write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "expert.meta.json", {"format": 1})
    with pytest.raises(UserError, match="expert.jsonl: was written in format 1, this version reads format 2; run"):
        read_rows(path, Trajectory)
    write(tmp_path / "expert.meta.json", {"format": 2})
    assert read_rows(path, Trajectory) == [ROW]
    old = {"key": "a", "env": "scienceworld", "task": TASK, "split": "train", "instruction": "do it", "reward": 1.0,
           "source": "test", "steps": [{"thought": "t", "action": "look around", "observation": "a room"}]}
    path = write(tmp_path / "by-hand.jsonl", old)  # without a sidecar
    with pytest.raises(UserError, match="by-hand.jsonl:1: field 'steps.1.reward' is missing"):
        read_rows(path, Trajectory)


@pytest.mark.parametrize("task, says", [
    ("chess/opening/1", ":1: field 'task' is of an unknown environment 'chess'; known are scienceworld, alfworld"),
    ("alfworld/train/x/y", ":2: is of scienceworld, the first line of alfworld; a file holds one environment"),
])
def test_a_file_of_trajectories_holds_one_known_environment(tmp_path, task, says):
    path = write(tmp_path / "expert.jsonl", ROW | {"key": task, "task": task}, ROW)
    with pytest.raises(UserError) as error:
        read_trajectories(path)
    assert str(error.value) == f"{path}{says}"


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
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.meta.json", ".out.jsonl.lock"}
    assert (tmp_path / ".out.jsonl.lock").read_text() == ""  # nobody holds it


def test_rows_made_with_other_settings_are_not_mixed_in(tmp_path):
    with pytest.raises(RuntimeError), StageOutput(tmp_path / "out.jsonl", {"n": 1}, []) as output:
        output.write({"key": "a"})
        raise RuntimeError
    with StageOutput(tmp_path / "out.jsonl", {"n": 2}, []) as output:
        assert not output.done


# --- Staleness ------------------------------------------------------------------------------------------------------


class Project:
    """Small project files in a folder that stands for the project's."""

    FILES: ClassVar = {
        "stage.py": '"""A stage."""\n'
                    "from helpers import used as helper, unused\n\n"
                    "LIMIT = 3\n\n\n"
                    "def run():\n"
                    '    """Run."""\n'
                    "    from tools.box import late\n"
                    "    return helper(LIMIT) + late()  # now\n\n\n"
                    "def other():\n"
                    "    return unused(LIMIT)\n",
        "helpers.py": "STEP = 2\n\n\n"
                      "class Counter:\n"
                      '    """It counts."""\n\n'
                      "    def add(self):\n"
                      "        return STEP\n\n\n"
                      "def used(x):\n"
                      "    return inner(x) + Counter().add()\n\n\n"
                      "def inner(x):\n"
                      "    return [x, x]\n\n\n"
                      "def unused(x):\n"
                      "    return x\n",
        "tools/__init__.py": "",
        "tools/box.py": "def late():\n    return 4\n\n\ndef never():\n    return 5\n"}

    def __init__(self, root):
        self.root = root
        (root / "tools").mkdir()
        for name, text in self.FILES.items():
            (root / name).write_text(text)

    def edit(self, name, old, new):
        text = (self.root / name).read_text()
        assert text.count(old) == 1
        (self.root / name).write_text(text.replace(old, new))
        common.definitions.cache_clear()  # a process reads a file once


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    common.definitions.cache_clear()
    return Project(tmp_path)


@pytest.mark.parametrize("edit, changed", [
    (("stage.py", "  # now", "\n    # and nothing else"), False),
    (("stage.py", '"""A stage."""', '"""A stage of the project."""'), False),
    (("stage.py", '"""Run."""', '"""Run it."""'), False),
    (("stage.py", '    """Run."""\n', ""), False),
    (("helpers.py", '"""It counts."""', '"""It counts on."""'), False),
    (("helpers.py", "[x, x]", "[\n        x,\n        x]"), False),
    (("stage.py", "return unused", "return 2 * unused"), False),
    (("helpers.py", "    return x\n", "    return -x\n"), False),
    (("tools/box.py", "return 5", "return 6"), False),
    (("stage.py", "LIMIT = 3", "LIMIT = 4"), True),
    (("stage.py", "helper(LIMIT) +", "helper(LIMIT) -"), True),
    (("helpers.py", "inner(x) +", "inner(x + 1) +"), True),
    (("helpers.py", "[x, x]", "[x]"), True),
    (("helpers.py", "return STEP", "return -STEP"), True),
    (("helpers.py", "STEP = 2", "STEP = 1"), True),
    (("tools/box.py", "return 4", "return 5"), True),
])
def test_rows_are_stale_when_code_that_their_stage_reaches_has_changed(project, edit, changed):
    before = code_digest("stage.py:run")
    project.edit(*edit)
    assert (code_digest("stage.py:run") != before) == changed


def test_a_whole_file_counts_with_all_that_it_uses(project):
    for edit in (("stage.py", "return unused", "return 2 * unused"),
                 ("helpers.py", "    return x\n", "    return -x\n")):
        before = code_digest("stage.py")
        project.edit(*edit)
        assert code_digest("stage.py") != before
    before = code_digest("stage.py")
    project.edit("tools/box.py", "return 5", "return 6")
    assert code_digest("stage.py") == before
    assert code_digest("gone.py") is None is code_digest("gone.py:run")


def test_kept_rows_are_of_the_same_code(project):
    out, code = project.root / "out.jsonl", [project.root / "stage.py"]
    with pytest.raises(RuntimeError), StageOutput(out, {}, [], code) as output:
        output.write({"key": "a"})
        raise RuntimeError
    project.edit("stage.py", "  # now", "")
    with StageOutput(out, {}, [], code) as output:
        assert list(output.done) == ["a"]
    project.edit("helpers.py", "STEP = 2", "STEP = 1")
    with StageOutput(out, {}, [], code) as output:
        assert not output.done
        output.finish([], {})
    assert json.loads((project.root / "out.meta.json").read_text())["code"] == {"stage.py": code_digest("stage.py")}


def test_code_is_named_by_file_and_function():
    assert code_name(sample) == "stage1_sample.py:sample" and code_name(ROOT / "common.py") == "common.py"


def test_neither_the_report_nor_another_environment_makes_rows_stale(tmp_path, monkeypatch):
    for file in (*ROOT.glob("*.py"), *ROOT.glob("environments/*.py"), *ROOT.glob("prompts/*.py")):
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    monkeypatch.setattr(common, "ROOT", tmp_path)
    names = ("stage1_sample.py:sample", "evaluate.py:evaluate", "environments/scienceworld.py",
             "environments/alfworld.py")

    def changed_by(file, function):
        common.definitions.cache_clear()
        before = [code_digest(name) for name in names]
        text = (tmp_path / file).read_text()
        head = next(line for line in text.splitlines(keepends=True) if line.strip().startswith(f"def {function}("))
        (tmp_path / file).write_text(text.replace(head, head.replace(f"def {function}(", f"def {function}(*a, ")))
        common.definitions.cache_clear()
        return [name for name, digest in zip(names, before, strict=True) if code_digest(name) != digest]

    assert changed_by("evaluate.py", "report") == [] == changed_by("prompts/small_model.py", "templated_thought")
    assert changed_by("environments/alfworld.py", "game_path") == ["environments/alfworld.py"]
    assert changed_by("environments/workers.py", "play") == ["evaluate.py:evaluate"]
    assert changed_by("common.py", "clean_action") == list(names)


# --- Turns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, thought, action", [
    ("Thought: I look.\nAction: look around", "I look.", "look around"),
    ("Action:  go  to desk 1. ", "", "go to desk 1"),
    ("Thought: a\n\n- x: y\n\nb\nAction: open door\nObservation: it opens\nAction: go", "a\n\n- x: y\n\nb",
     "open door"),
    ("I do not know", "", ""),
    ("Action:", "", ""),
    ("Action:\nObservation: nothing", "", ""),
    # Where ETO's and AgentGym's parsers find it: on the next line, or behind the thought in its line.
    ("Thought:\nI look.\n\nAction:\nlook around", "I look.", "look around"),
    ("Thought: I look. Action: look around", "I look.", "look around"),
    ("Thought: I look Action: look around", "I look", "look around"),
    ("Thought: My last Action: wait failed.\nAction: go", "My last Action: wait failed.", "go"),
    # AgentInstruct's capitals; ReAct's numbers; what figure 6 calls the final action.
    ("THOUGHT: I look.\n ACTION: look around", "I look.", "look around"),
    ("Thought 1: I look.\nAction 1: look around", "I look.", "look around"),
    ("Thought: I look.\nFinal Action: look around", "I look.", "look around"),
    # The marks of chat models.
    ("**Thought:** I look.\n**Action:** look around", "I look.", "look around"),
    ("**Thought**: I look.\n**Action**: look around", "I look.", "look around"),
    ("### Thought: I look.\n### Action: **look around**", "I look.", "look around"),
    ("Thought: I look.\nAction: `look around`.", "I look.", "look around"),
    ('Thought: I look.\nAction: "look around"', "I look.", "look around"),
    ("Thought: I look.\nAction: <look around>", "I look.", "look around"),
    ("Thought: I look.\nAction\uff1alook around", "I look.", "look around"),
    ("Thought: I look.\nAction:\u00a0look around", "I look.", "look around"),
    ("Thought: I look.\n```\nAction: look around\n```", "I look.", "look around"),
    ("Thought: I look.\nAction:\n```text\nlook around\n```", "I look.", "look around"),
    ('Thought: "Baby" egg it is.\nAction: focus on egg', '"Baby" egg it is.', "focus on egg"),
    ("Thought: I look.\nAction: <action>look around</action>", "I look.", "look around"),
    ("Thought: I look.\nAction: [look around]</s>", "I look.", "look around"),
    ("Thought: I look.\n**Action: look around**<|eot_id|>", "I look.", "look around"),
    ("Action: click[size: < 3 > `x`]", "", "click[size: < 3 > `x`]"),
    # What is imagined behind it.
    ("Thought: I look.\nAction: look around\nHuman: Observation: a bee\nAction: wait", "I look.", "look around"),
    ("Thought: I look.\nAction: look around. Observation: a bee", "I look.", "look around"),
    # What reasoning models think first, with and without the tag that the template may have written.
    ("<think>\nAction: wait\nNo.\n</think>\n\nThought: I look.\nAction: look around", "I look.", "look around"),
    ("Hm.\nAction: wait\n</think>\nThought: I look.\nAction: look around", "I look.", "look around"),
    ("<think>\nAction: wait", "", ""),
    ("[THINK]Action: wait[/THINK]Action: look around", "", "look around"),
    ("<seed:think>Action: wait</seed:think>Action: look around", "", "look around"),
    ("◁think▷Action: wait◁/think▷Action: look around", "", "look around"),
    ("<think>a <think>Action: wait</think> b</think>\nAction: look around", "", "look around"),
])
def test_the_first_action_is_the_action_and_nothing_after_it(text, thought, action):
    turn = parse_turn(text)
    assert (turn["thought"], turn["action"]) == (thought, action)
    assert "candidates" not in turn
    assert not action or turn["text"] in text and "imagined" not in turn["text"]


def test_a_turn_that_deliberates_has_candidates():
    assert parse_turn(f"Thought: {LIST}\nAction: look around")["candidates"] == LISTED
    assert "candidates" not in parse_turn(f"Thought: I look.\nAction: look around\n{LIST}")
    assert "candidates" not in parse_turn(f"Thought: {LIST}")  # and no action


def test_actions_are_equal_whatever_their_blanks_and_case():
    assert normalise(" Go  to Desk 1. ") == normalise("go to desk 1")


def test_a_step_is_flagged_when_samples_differ_or_are_invalid():
    expert = {"action": "look around", "thought": "t"}
    same = [{"action": "Look  around", "thought": "a"}] * 3
    other = [*same, {"action": "focus on bee", "thought": "b"}]
    invalid = [*same, {"action": "", "thought": ""}]
    assert not is_flagged(distinct_actions(expert, same), 0)
    assert is_flagged(distinct_actions(expert, other), 0)
    assert is_flagged(distinct_actions(expert, invalid), 1)
    assert distinct_actions(expert, other) == [
        {"action": "look around", "thought": "t", "count": 3, "from_expert": True},
        {"action": "focus on bee", "thought": "b", "count": 1, "from_expert": False}]


def test_a_row_of_candidates_counts_samples_without_an_action():
    whole, none = Output("Action: look around", 9, "stop"), Output("Hm.", 9, "stop")
    row = candidate_row("k", ROW, 1, [whole, none, none])
    assert row == {"key": "k", "task": TASK, "step": 1, "invalid": 2, "flagged": True, "candidates": [
        {"action": "look around", "thought": "t", "count": 1, "from_expert": True}]}
    assert not candidate_row("k", ROW, 1, [whole, whole])["flagged"]
    row = candidate_row("k", ROW, 1, [Output("", 0, "context")] * 2)
    assert (row["failed"], row["flagged"], row["invalid"]) == ("context", False, 0)


@pytest.mark.parametrize("finish", ["length", "repetition"])
def test_a_turn_that_was_cut_off_in_its_action_names_none(finish):
    half = "Thought: t\nAction: connect red wire terminal 1 to red"
    assert turn_of(Output(half, 9, finish)) == parse_turn(half) | {"action": ""}
    for whole, ended in (half, "stop"), (f"{half}\n", finish), (f"{half}\nObservation: a bee, a bee", finish):
        assert turn_of(Output(whole, 9, ended)) == parse_turn(half)


def test_a_deliberation_lists_two_candidates_with_judgements():
    assert with_candidates(LIST) == {"candidates": LISTED}
    assert with_candidates("Here I am.\n\n- look around: shows the room.\n- Look around: again.") == {}
    assert with_candidates("I look around: it helps.") == {}


def test_a_better_rollout_replaces_the_rest_of_the_trajectory():
    deliberation = "- a: wastes time.\n- b: leads on.\n\nI choose to b. It is near."
    step = STEP | {"thought": deliberation, "action": "b", "observation": "o"} | with_candidates(deliberation)
    row = ROW | {"reward": 0.5, "steps": [STEP] * 3}
    rollout = {"key": f"{TASK}/step2/1", "task": TASK, "step": 2, "candidate": 1, "reward": 1.0, "end": "success",
               "expert_steps_left": 2, "steps": [step | {"action": "fly", "observation": "Nothing happens.", "accepted": False}, step]}
    switched = switch_expert(row, [rollout | {"key": "worse", "reward": 0.75}, rollout, rollout | {"step": 3}], "better")
    assert [s["action"] for s in switched["steps"]] == ["look around", "b"]
    assert switched["steps"][1] == step and len(step["candidates"]) == 2
    assert switched["reward"] == 1.0
    assert switched["replaced_from"] == {"step": 2, "rollout": f"{TASK}/step2/1", "expert_reward": 0.5}
    assert switch_expert(row, [rollout | {"reward": 0.5}], "better") is row
    assert switch_expert(row, [rollout | {"end": "failed: it died"}], "better") is row


def test_a_rollout_of_as_much_reward_in_fewer_steps_replaces_the_expert_where_that_is_asked_for():
    row = ROW | {"reward": 1.0, "steps": [STEP] * 5}
    rollout = {"key": f"{TASK}/step2/1", "task": TASK, "step": 2, "candidate": 1, "reward": 1.0, "end": "success",
               "expert_steps_left": 4, "steps": [STEP | {"accepted": False}, STEP, STEP, STEP]}
    assert switch_expert(row, [rollout], "better") is row
    assert len(switch_expert(row, [rollout], "shorter")["steps"]) == 4  # the refused step is left out
    as_long = rollout | {"steps": [STEP] * 4}
    assert switch_expert(row, [as_long, rollout | {"reward": 0.9}, as_long | {"candidate": 0}], "shorter") is row


# --- Prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_of(tmp_path, monkeypatch):
    """What a task of practice games is told, by the text of ALFWorld's prompt."""
    monkeypatch.setattr(common, "PROMPTS", tmp_path)

    def begin(text, instruction="t"):
        write(tmp_path / "alfworld.txt", text)
        (prompt,) = dialogue("alfworld-practice/train/x/practice_0001", instruction, [])
        return prompt
    return begin


def test_an_unknown_placeholder_names_the_prompt_and_the_known_ones(prompt_of):
    says = r"alfworld.txt: unknown placeholder \('recep' is undefined\); this prompt knows \{\{ task \}\}, "
    says += r"\{\{ example \}\}$"
    with pytest.raises(UserError, match=says):
        prompt_of("Go to {{ recep }}. {{ task }}")
    assert prompt_of("Go to {recep}. {{ task }}") == "Go to {recep}. t"


@pytest.mark.parametrize("text, says", [
    ("Go. {task}", r"\{task\} stands there as it is; placeholders have two braces: \{\{task\}\}"),
    ("{{ task }} {task}", r"\{task\} stands there as it is"),
    ("{{ task", r"unexpected end of template.*; write \{\{ '\{\{' \}\} for two literal braces"),
    ("{{ task.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
])
def test_a_placeholder_that_would_not_be_filled_is_refused(prompt_of, text, says):
    with pytest.raises(UserError, match=f"alfworld.txt: {says}"):
        prompt_of(text)


def test_what_is_filled_in_is_text_whatever_it_holds(prompt_of):
    assert prompt_of("{{ '{{' }} <{{ task }}>", "{{ x }} {task} {% if %} <b> &") == "{{ <{{ x }} {task} {% if %} <b> &>"
