"""What a user can rely on when a run is killed at any moment: no row is lost or doubled, and the end is the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, wait_until_gone

pytestmark = pytest.mark.slow
KILLS = 20
ENGINE = ("--model", "m", "--max-live", 4)
STAGES = {  # in the order of their inputs
    "expert": ("stage0_sft.py", "expert", "--env", "scienceworld", "--task-types", "lifespan-longest-lived,find-animal",
               "--num-tasks", 3, "--workers", 2),
    "candidates": ("stage1_sample.py", *ENGINE, "--trajectories", "expert.jsonl", "--n-samples", 3),
    "rollouts": ("stage2_rollout.py", *ENGINE, "--trajectories", "expert.jsonl", "--candidates", "candidates.jsonl",
                 "--max-turns", 20),
    "critiques": ("stage3_critique.py", *ENGINE, "--trajectories", "expert.jsonl", "--rollouts", "rollouts.jsonl"),
    "deliberations": ("stage4_synthesize.py", *ENGINE, "--trajectories", "expert.jsonl", "--candidates",
                      "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl"),
    "evaluation": ("evaluate.py", "run", "--env", "scienceworld", *ENGINE, "--num-tasks", 4, "--max-turns", 4),
}
TRAININGS = {"SFT": ("stage0_sft.py", "train"), "finetuning": ("stage5_finetune.py",)}


class Stage:
    """A stage's command in a folder of its own; everything that it starts carries a mark in its environment."""

    def __init__(self, folder, command, out):
        self.folder, self.out, self.mark = folder, out, f"{folder}/{out}"
        self.command = [sys.executable, str(ROOT / command[0]), *map(str, command[1:]), "--out", out]

    def start(self):
        return subprocess.Popen(self.command, cwd=self.folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                env=os.environ | {"SAND_TEST": self.mark, "OMP_NUM_THREADS": "1"})

    def finish(self):
        process = self.start()
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return stderr

    def kill_at_random_moments(self, seconds):
        """Start and kill -9 the stage KILLS times; each time that it ends before, its output goes, it begins anew, and
        kills come as much earlier."""
        draw, survived = random.Random(self.mark.rpartition("/")[2]), 0
        for _ in range(KILLS):
            started, process = time.monotonic(), self.start()
            try:
                process.communicate(timeout=draw.uniform(0, seconds))
                survived += 1
                seconds = min(seconds, time.monotonic() - started)
                self.remove()
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                _, stderr = process.communicate()
                # Python's own spawn may print an EOFError: its parent was gone before the worker had run a line of ours.
                assert not re.search(rf'File "{ROOT}/\w+\.py"', stderr), stderr
        assert survived < KILLS / 2

    def remove(self):
        subprocess.run(["rm", "-r", self.out], cwd=self.folder, check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scripted):
    """-> (a folder with every stage's output, uninterrupted; {stage: seconds})"""
    folder, seconds = tmp_path_factory.mktemp("uninterrupted"), {}
    for name, command in STAGES.items():
        started = time.monotonic()
        Stage(folder, at(command, scripted), name if name == "evaluation" else f"{name}.jsonl").finish()
        seconds[name] = time.monotonic() - started
    return folder, seconds


def at(command, address):
    """The command, with the server's address where it generates."""
    return (*command, "--api-base", address) if "--model" in command else command


def outputs(folder, name):
    """{file: its bytes} of a stage, without the sidecars, which tell the time."""
    files = folder.glob("evaluation/*.jsonl") if name == "evaluation" else [folder / f"{name}.jsonl"]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_killed_at_any_moment_ends_in_the_same_bytes(name, finished, scripted, tmp_path):
    whole, seconds = finished
    for other in whole.glob("*.jsonl"):
        if other.stem != name:
            (tmp_path / other.name).write_bytes(other.read_bytes())
    before = {path.name for path in tmp_path.iterdir()}
    out = name if name == "evaluation" else f"{name}.jsonl"
    stage = Stage(tmp_path, at(STAGES[name], scripted), out)
    # Another number in flight, to show that it does not matter.
    stage.command = ["2" if word == "4" and last == "--max-live" else word
                     for last, word in zip(["", *stage.command], stage.command)]
    stage.kill_at_random_moments(seconds[name])
    stage.finish()
    assert outputs(tmp_path, name) == outputs(whole, name)
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left == {out, f"{name}.meta.json"} if name != "evaluation" else left == {out}
    assert not wait_until_gone(stage.mark)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_killed_at_any_moment_ends_in_the_same_weights(name, finished, tiny_model, tmp_path):
    command = (*TRAININGS[name], "--model", tiny_model, "--data", finished[0] / "expert.jsonl", "--batch-size", 1)
    whole, stage = Stage(tmp_path, command, "whole"), Stage(tmp_path, command, "killed")
    started = time.monotonic()
    whole.finish()
    stage.kill_at_random_moments(time.monotonic() - started)
    stage.finish()
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    losses = [json.loads((tmp_path / folder / "training.json").read_text())["losses"] for folder in ("whole", "killed")]
    assert losses[0] == losses[1]


def test_a_training_goes_on_from_its_last_checkpoint(finished, tiny_model, tmp_path):
    command = ("stage5_finetune.py", "--model", tiny_model, "--data", finished[0] / "expert.jsonl", "--batch-size", 1)
    stage = Stage(tmp_path, command, "model")
    process = stage.start()
    while not list(tmp_path.glob("model.part/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert "going on from model.part/checkpoint-" in stage.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.meta.json"}


def test_what_a_kill_leaves_of_a_trainings_clean_up_is_no_hindrance(finished, tiny_model, tmp_path):
    """Half a checkpoint with its state, and the model that was replaced: the moment is too short to be hit at random."""
    command = ("stage5_finetune.py", "--model", tiny_model, "--data", finished[0] / "expert.jsonl", "--batch-size", 1)
    stage = Stage(tmp_path, command, "model")
    stage.finish()
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    left = tmp_path / "model.part"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "config.json").write_text("{}")
    (left / "checkpoint-3").mkdir()
    (left / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert "starting afresh" in stage.finish()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights and not left.exists()


# --- Two runs at once ---------------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_writes_the_output_and_takes_over_from_a_dead_one(finished, scripted, tmp_path):
    for name in ("expert", "candidates"):
        (tmp_path / f"{name}.jsonl").write_bytes((finished[0] / f"{name}.jsonl").read_bytes())
    stage = Stage(tmp_path, at(STAGES["rollouts"], scripted), "out.jsonl")
    first = stage.start()
    while not (tmp_path / "out.jsonl.part").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = stage.start()
    _, stderr = second.communicate()
    assert second.returncode == 2 and f"out.jsonl: is being written by process {first.pid} on " in stderr
    first.kill()
    first.communicate()
    assert f"out.jsonl: took over from process {first.pid} on " in stage.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == (finished[0] / "rollouts.jsonl").read_bytes()


