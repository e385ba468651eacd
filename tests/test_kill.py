"""What a user can rely on when a run is killed at any moment, and when several processes share a stage: no
row is lost or doubled, the end is the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from conftest import LONG, MODEL, ROOT, wait_until_gone

pytestmark = pytest.mark.slow
KILLS = 20 if LONG else 2
ENGINE = ("--model", "m", "--max-live", 3)
STAGES = {  # in the order of their inputs
    "expert": ("stage0_sft.py", "expert", "--env", "scienceworld", "--types", "lifespan-longest-lived,find-animal",
               "--tasks", 3, "--workers", 2),
    "candidates": ("stage1_sample.py", *ENGINE, "--trajectories", "expert.jsonl", "--n-samples", 2),
    "rollouts": ("stage2_rollout.py", *ENGINE, "--trajectories", "expert.jsonl", "--candidates", "candidates.jsonl",
                 "--max-turns", 8, "--small-model"),
    "critiques": ("stage3_critique.py", *ENGINE, "--trajectories", "expert.jsonl", "--rollouts", "rollouts.jsonl"),
    "deliberations": ("stage4_synthesize.py", *ENGINE, "--trajectories", "expert.jsonl", "--candidates",
                      "candidates.jsonl", "--rollouts", "rollouts.jsonl", "--critiques", "critiques.jsonl",
                      "--small-model"),
    "evaluation": ("evaluate.py", "run", "--env", "scienceworld", *ENGINE, "--tasks", 2, "--max-turns", 3),
}
TRAININGS = {"SFT": ("stage0_sft.py", "train"), "finetuning": ("stage5_finetune.py",)}  # the same loop: SFT only with --long


class Stage:
    """A stage's command in a folder of its own; everything that it starts carries a mark in its environment."""

    def __init__(self, folder, command, out, launcher=(sys.executable,)):
        self.folder, self.out, self.mark = folder, out, f"{folder}/{out}"
        self.command = [*launcher, str(ROOT / command[0]), *map(str, command[1:]), "--out", out]

    def start(self, **variables):
        return subprocess.Popen(self.command, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True,
                                env=os.environ | {"SAND_TEST": self.mark, "OMP_NUM_THREADS": "1"} | variables)

    def finish(self, **variables):
        return ended(self.start(**variables))

    def kill_at_random_moments(self, seconds):
        """Start and kill -9 the stage KILLS times, each at another share of the seconds that it took.

        Where it ends before, its output goes, and it begins anew and is killed in half the time: each kill hits in the
        end, however much faster or slower the machine has become.
        """
        draw = random.Random(self.mark.rpartition("/")[2])
        for number in draw.sample(range(KILLS), KILLS):
            moment = seconds * (number + draw.random()) / KILLS
            while not self.is_killed_after(moment):
                self.remove()
                moment /= 2

    def is_killed_after(self, seconds):
        """Start and kill -9 the stage; whether the kill came before its end."""
        process = self.start()
        try:
            _, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            _, stderr = process.communicate()
        # Python's own spawn may print an EOFError: its parent was gone before the worker had run a line of ours.
        assert not re.search(rf'File "{ROOT}/(\w+/)*\w+\.py"', stderr), stderr
        assert process.returncode in (0, -signal.SIGKILL), stderr
        return process.returncode != 0

    def stop_when(self, is_seen):
        """Start the stage and stop it when something is seen, before it ends; -> its process, which just waits."""
        for _ in range(9):  # where it was faster, again
            process = self.start()
            while process.poll() is None and not is_seen():
                time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            if process.poll() is None and is_seen() and not (self.folder / self.out).exists():
                return process
            process.kill()
            process.communicate()
            self.remove()
        raise AssertionError("it has never been seen, or the stage was always faster")

    def remove(self):
        subprocess.run(["rm", "-rf", self.out, f"{self.out}.part"], cwd=self.folder, check=True)


def ended(process):
    """What a process said that has ended well."""
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return stdout + stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scripted):
    """-> (a folder with every stage's output, uninterrupted; {stage: seconds})"""
    folder, seconds = tmp_path_factory.mktemp("uninterrupted"), {}
    for name, command in STAGES.items():
        started = time.monotonic()
        Stage(folder, at(command, scripted), name if name == "evaluation" else f"{name}.jsonl").finish()
        seconds[name] = time.monotonic() - started
    return folder, seconds


@pytest.fixture(scope="module")
def train(finished, tiny_model):
    """train(folder, name) is a training whose output is "model"."""
    return lambda folder, name="finetuning": Stage(folder, (
        *TRAININGS[name], "--model", tiny_model, "--data", finished[0] / "expert.jsonl", "--batch-size", 1), "model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    """-> (a folder with the model of an uninterrupted training; its seconds)"""
    folder, started = tmp_path_factory.mktemp("trained"), time.monotonic()
    train(folder).finish()
    return folder, time.monotonic() - started


def at(command, address):
    """The command, with the server's address where it generates."""
    return (*command, "--api-base", address) if "--model" in command else command


def stage_of(name, whole, folder, address, launcher=(sys.executable,)):
    """A stage in another folder than that of the whole, with the inputs from there."""
    for other in whole.glob("*.jsonl"):
        if other.stem != name:
            (folder / other.name).write_bytes(other.read_bytes())
    return Stage(folder, at(STAGES[name], address), name if name == "evaluation" else f"{name}.jsonl", launcher)


def outputs(folder, name):
    """{file: its bytes} of a stage, without the sidecars, which tell the time."""
    files = folder.glob("evaluation/*.jsonl") if name == "evaluation" else [folder / f"{name}.jsonl"]
    return {file.name: file.read_bytes() for file in files}


def same_model(folder, other):
    assert all((folder / "model" / file).read_bytes() == (other / "model" / file).read_bytes()
               for file in ("model.safetensors", "config.json"))
    losses = [json.loads((each / "model" / "training.json").read_text())["losses"] for each in (folder, other)]
    assert losses[0] == losses[1]


def left_by(stage, *more):
    """What a finished stage leaves: its output, its sidecar and an empty lock."""
    assert (stage.folder / f".{stage.out}.lock").read_bytes() == b""
    return {stage.out, f"{stage.out.removesuffix('.jsonl')}.meta.json", f".{stage.out}.lock", *more}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_killed_at_any_moment_ends_in_the_same_bytes(name, finished, scripted, tmp_path):
    whole, seconds = finished
    stage = stage_of(name, whole, tmp_path, scripted)
    before, out = names(tmp_path), stage.out
    # Another number in flight, to show that it does not matter.
    stage.command = ["2" if word == "3" and last == "--max-live" else word
                     for last, word in zip(["", *stage.command], stage.command)]
    stage.kill_at_random_moments(seconds[name])
    stage.finish()
    assert outputs(tmp_path, name) == outputs(whole, name)
    if name == "evaluation":
        assert names(tmp_path) - before == {out}
        evals = [Stage(tmp_path / out, stage.command, f"eval-{split}.jsonl") for split in ("seen", "unseen")]
        assert names(tmp_path / out) == left_by(evals[0]) | left_by(evals[1])
    else:
        assert names(tmp_path) - before == left_by(stage)
    assert not wait_until_gone(stage.mark)


@pytest.mark.parametrize("name", TRAININGS if LONG else ["finetuning"])
def test_a_training_killed_at_any_moment_ends_in_the_same_weights(name, train, trained, tmp_path):
    whole, seconds = trained
    stage = train(tmp_path, name)
    stage.kill_at_random_moments(seconds)
    stage.finish()
    same_model(tmp_path, whole)
    assert names(tmp_path) == left_by(stage)


def test_a_training_goes_on_from_its_last_checkpoint(train, trained, tmp_path):
    stage = train(tmp_path)
    process = stage.stop_when(lambda: any(tmp_path.glob("model.part/checkpoint-*/trainer_state.json")))
    process.kill()
    process.communicate()
    assert "going on from model.part/checkpoint-" in stage.finish()
    same_model(tmp_path, trained[0])
    assert names(tmp_path) == left_by(stage)


def test_what_a_kill_leaves_of_a_trainings_clean_up_is_no_hindrance(train, trained, tmp_path):
    """Half a checkpoint with its state and the model that was replaced: no random kill hits so short a moment."""
    stage = train(tmp_path)
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    left = tmp_path / "model.part"
    (left / "replaced").mkdir(parents=True)
    (left / "replaced" / "config.json").write_text("{}")
    (left / "checkpoint-3").mkdir()
    (left / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert "starting afresh" in stage.finish()
    same_model(tmp_path, trained[0])
    assert names(tmp_path) == left_by(stage)


# --- Two runs at once ---------------------------------------------------------------------------------------------


def test_a_second_run_is_told_who_writes_the_output_and_takes_over_from_a_dead_one(finished, scripted, tmp_path):
    (tmp_path / "expert.jsonl").write_bytes((finished[0] / "expert.jsonl").read_bytes())
    stage = Stage(tmp_path, at(STAGES["candidates"], scripted), "out.jsonl")
    first = stage.stop_when((tmp_path / "out.jsonl.part").exists)
    second = stage.start()
    _, stderr = second.communicate()
    assert second.returncode == 2 and f"out.jsonl: is being written by process {first.pid} on " in stderr
    first.kill()
    first.communicate()
    assert f"out.jsonl: took over from process {first.pid} on " in stage.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == (finished[0] / "candidates.jsonl").read_bytes()
    assert names(tmp_path) == left_by(stage, "expert.jsonl")


# --- Several processes that share a stage -----------------------------------------------------------------------------

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SRUN = """#!/bin/bash
# srun, as far as the stages see it: `srun -n N command` starts N processes at once.
n=$2; shift 2
for rank in $(seq 0 $((n - 1))); do
    SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=$n SLURM_LOCALID=$rank SLURM_NTASKS=$n "$@" &
    all="$all $!"
done
for each in $all; do wait $each || exit 1; done
"""


def same_outputs(stage, whole):
    """Whether it has made what one process made, and left no parts."""
    name = stage.out.removesuffix(".jsonl")
    assert outputs(stage.folder, name) == outputs(whole, name) and not list(stage.folder.rglob("[!.]*.part*"))


@pytest.mark.parametrize("name", ["candidates", "critiques", "deliberations", "evaluation"])
def test_an_array_of_processes_gives_the_bytes_of_one(name, finished, scripted, tmp_path):
    """Three, the first two at once; the last one joins all parts."""
    stage = stage_of(name, finished[0], tmp_path, scripted)
    both = [stage.start(RANK=rank, WORLD_SIZE="3") for rank in "20"]
    assert all("not there yet" in ended(process) for process in both)
    stage.finish(RANK="1", WORLD_SIZE="3")
    same_outputs(stage, finished[0])


@pytest.mark.parametrize("victim, name", [("a rank", "rollouts"), ("the launcher", "candidates"), ("all", "critiques")])
def test_torchrun_killed_goes_on_with_another_number_of_processes(victim, name, finished, scripted, tmp_path):
    stage = stage_of(name, finished[0], tmp_path, scripted, (*TORCHRUN, "4"))
    process = stage.start()
    while process.poll() is None and not list(tmp_path.glob("*.part-*")):
        time.sleep(0.02)
    if victim == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif victim == "the launcher":
        process.kill()
    else:
        random.choice(psutil.Process(process.pid).children()).kill()
    process.communicate()
    assert not wait_until_gone(stage.mark)
    stage = stage_of(name, finished[0], tmp_path, scripted, (*TORCHRUN, "2"))
    stage.finish()
    same_outputs(stage, finished[0])


def test_srun_shares_and_a_batch_script_alone_does_all(finished, scripted, tmp_path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    for launcher, processes, variables in ((("srun", "-n", "2", sys.executable), 2, {"PATH": f"{tmp_path}:{os.environ['PATH']}"}),
                                           ((sys.executable,), 1, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})):
        stage = stage_of("candidates", finished[0], tmp_path, scripted, launcher)
        assert stage.finish(**variables).count("tokens of prompts in") == processes
        same_outputs(stage, finished[0])


def test_an_error_of_the_user_is_one_line_under_torchrun_too(finished, scripted, tmp_path):
    stage = stage_of("candidates", finished[0], tmp_path, scripted, (*TORCHRUN, "2"))
    (tmp_path / "expert.jsonl").unlink()
    _, stderr = (process := stage.start()).communicate()
    assert process.returncode and "expert.jsonl: cannot be read (No such file or directory)" in stderr


@pytest.mark.long
def test_two_processes_with_the_real_engine_sample_what_one_does(finished, tmp_path):
    """In fp32, where sums are the same whatever else is in the batch."""
    for out, launcher in (("one.jsonl", (sys.executable,)), ("two.jsonl", (*TORCHRUN, "2"))):
        Stage(tmp_path, ("stage1_sample.py", "--model", MODEL, "--trajectories", finished[0] / "expert.jsonl", "--n-samples", 2,
                         "--max-tokens", 12, "--max-model-len", 2048, "--engine-args", '{"dtype": "float32"}'), out, launcher).finish()
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
