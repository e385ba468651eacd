"""What a user can rely on with `make`: the whole loop at the smallest size, and then that only what is stale runs again."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

from conftest import ROOT, ScriptedServer, serve

pytestmark = pytest.mark.slow
SMALLEST = ["RUN=t", "TASKS=1", "TEST_TASKS=1", "ITERS=1", "N=2", "MAX_TURNS=4", "MAX_TOKENS=24", "EPOCHS=1 1 1",
            "TYPES=lifespan-longest-lived", "TEMPERATURE=1", "ATTEMPTS=1", "CRITIC=m"]
ITERATION = ["stage1_sample", "stage2_rollout", "stage3_critique", "stage4_synthesize", "stage5_finetune", "evaluate run"]
TRAINED = ["stage0_sft train", "evaluate run"]


LISTEN = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["CALLS"], "a") as file:
            print(event, arguments[1] if event == "socket.connect" else arguments[0], file=file)
sys.addaudithook(note)
"""


class Project:
    """A copy of the project that shares this checkout's set-up. `judge` is the base model's server, of stages 3 and 4;
    each connection that a process makes is in the file `calls`."""

    def __init__(self, folder, judge=""):
        ignored = shutil.ignore_patterns(".git", ".venv", "models", "runs", "games", "__pycache__", ".pytest_cache")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for name in (".venv", "models"):
            (folder / name).symlink_to(ROOT / name)
        (folder.parent / "listen").mkdir()
        (folder.parent / "listen" / "sitecustomize.py").write_text(LISTEN)
        self.folder, self.run, self.calls = folder, folder / "runs" / "t", folder.parent / "calls"
        self.variables, self.port = [*SMALLEST, f"JUDGE_BASE={judge}"], "".join(re.findall(r":(\d+)", judge))

    def start(self, *arguments, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        environment |= {"PYTHONPATH": str(self.folder.parent / "listen"), "CALLS": str(self.calls), "HF_HUB_OFFLINE": "0"}
        return subprocess.Popen(["make", *self.variables, *arguments], cwd=self.folder, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment | variables)

    def make(self, *arguments):
        """-> (exit status, stdout, stderr)"""
        process = self.start(*arguments)
        stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr

    def plan(self, *arguments, goal="all"):
        """The scripts that `make -n` would run, in order, without the report."""
        status, stdout, stderr = self.make("-n", goal, *arguments)
        assert status == 0, stderr
        found = re.findall(r"^\S*python (\w+\.py(?: expert| train| run)?)", stdout, re.MULTILINE)
        return [name for name in found if name != "evaluate.py"]

    def rows(self, name):
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]


class Judge(ScriptedServer):
    """The base model, which answers as many requests as it may."""
    may = threading.Semaphore(1_000_000)

    def answer(self, request):
        self.may.acquire()
        super().answer(request)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished `make all`, with the real policy and a scripted judge."""
    server, address = serve(Judge)
    project = Project(tmp_path_factory.mktemp("make") / "project", address)
    status, project.printed, stderr = project.make("all")
    assert status == 0, stderr
    yield project
    server.shutdown()


def scripts(*names):
    return [" ".join([f"{name.split()[0]}.py", *name.split()[1:]]) for name in names]


def test_the_plan_of_a_fresh_run_is_the_whole_algorithm(tmp_path):
    plan = Project(tmp_path / "project").plan("ITERS=2")
    assert sorted(plan) == sorted(scripts("stage0_sft expert", "stage0_sft train", "evaluate run", "evaluate run",
                                          *ITERATION, *ITERATION))


def test_make_all_ends_in_a_table(project):
    for text in (project.printed, (project.run / "report.md").read_text()):
        assert re.findall(r"^\| (\S+) \| \d\.\d{3} \[", text, re.MULTILINE) == ["base", "SFT", "SAND-1"]
        assert re.search(r"^\| iter1 \| \d of 3 \(\d+ %\) \|", text, re.MULTILINE)
    assert (project.run / "figure3.png").stat().st_size > 5000


def test_nobody_is_called_but_the_server_that_the_user_named(project):
    """Python reports every connection of a whole run's processes: to themselves, to their Java, and to JUDGE_BASE."""
    called = set(project.calls.read_text().splitlines())
    assert f"socket.connect ('127.0.0.1', {project.port})" in called
    here = re.compile(rf"socket\.connect \('(127\.0\.0\.1|::1)', .*\)|socket\.getaddrinfo (127\.0\.0\.1|::1|localhost|"
                      rf"{re.escape(socket.gethostname())})")
    assert not [call for call in called if not here.fullmatch(call)]


def test_the_rows_of_the_stages_join(project):
    experts = {row["task"]: row for row in project.rows("expert.jsonl")}
    candidates = {(row["task"], row["step"]): row for row in project.rows("iter1/candidates.jsonl")}
    rollouts = {(row["task"], row["step"], row["candidate"]): row for row in project.rows("iter1/rollouts.jsonl")}
    critiques = project.rows("iter1/critiques.jsonl")
    deliberations = project.rows("iter1/deliberations.jsonl")
    assert list(candidates) == [(task, t) for task, row in experts.items() for t in range(1, len(row["steps"]) + 1)]
    assert all(sum(each["count"] for each in row["candidates"]) + row["invalid"] == 2 for row in candidates.values())
    assert list(rollouts) == [(*place, number) for place, row in candidates.items() if row["flagged"]
                              for number in range(len(row["candidates"]))]
    assert [(row["task"], row["step"], row["candidate"]) for row in critiques] == list(rollouts)
    assert all(row["text"] and row["verdict"] for row in critiques)
    for row in deliberations:
        actions = [step["action"] for step in experts[row["task"]]["steps"]]
        assert [step["action"] for step in row["steps"]] == actions  # ScienceWorld: the expert's actions stay
        assert row.keys() == experts[row["task"]].keys()
    for (task, t, number), rollout in rollouts.items():
        assert 0 <= rollout["reward"] <= 1 and rollout["key"] == f"{task}/step{t}/{number}"
        assert rollout["steps"][0]["action"] == candidates[task, t]["candidates"][number]["action"]


def test_an_evaluation_holds_whole_transcripts(project):
    for model in ("base", "iter0", "iter1"):
        for split in ("seen", "unseen"):
            (episode,) = project.rows(f"{model}/eval-{split}.jsonl")
            assert 1 <= len(episode["steps"]) <= 4 and episode["split"] == split
            assert episode["tokens"] == sum(step["tokens"] for step in episode["steps"]) > 0
            assert all(step["observation"] for step in episode["steps"])


def test_an_unchanged_tree_makes_nothing(project):
    status, stdout, _ = project.make("all")
    assert status == 0 and stdout == "make: Nothing to be done for 'all'.\n"


EVERYTHING_TRAINED = [*TRAINED, *ITERATION]


@pytest.mark.parametrize("change, stale", [
    ("prompts/critique.txt", ITERATION[2:]),
    ("prompts/deliberation.txt", ITERATION[3:]),
    ("prompts/scienceworld.txt", ["evaluate run", *EVERYTHING_TRAINED]),
    ("prompts/alfworld.txt", []),
    ("N=3", ITERATION),
    ("TEMPERATURE=0.9", ITERATION),
    ("TEST_TASKS=2", ["evaluate run"] * 3),
    ("TASKS=3", ["stage0_sft expert", "evaluate run", *EVERYTHING_TRAINED]),
    ("CRITIC=some/other", ITERATION[2:]),
    ("ATTEMPTS=2", ITERATION[2:]),
    ("SMALL_MODEL=", EVERYTHING_TRAINED),
    ("MAX_MODEL_LEN=4096", ["evaluate run", *EVERYTHING_TRAINED]),
    ("MODEL=some/other", ["evaluate run", *EVERYTHING_TRAINED]),
    ("EPOCHS=2 1 1", EVERYTHING_TRAINED),
    ("EPOCHS=1 2 1", ITERATION[4:]),
    ("EPOCHS=1 1 2", []),
    ("ITERS=2", ITERATION),
    ("MAX_LIVE=4", []),
    ('ENGINE_ARGS={"max_num_seqs": 4}', []),
    ("API_BASE=http://elsewhere/v1", []),
    ("JUDGE_BASE=", []),
    ("REPORT_TO=wandb", []),
    ("GENERATE=torchrun --nproc-per-node 2", []),
    ("VARIANT=no-sas", ITERATION[3:]),
    ("VARIANT=no-eac", ITERATION[3:]),
    ("VARIANT=recover-only", ITERATION[2:]),
])
def test_a_change_makes_exactly_what_depends_on_it_stale(project, change, stale):
    what_if = [change] if "=" in change else ["-W", change]
    assert sorted(project.plan(*what_if)) == sorted(scripts(*stale))


EDITS = {  # (file, text, what stands there instead): the scripts that are stale then
    ("common.py", "# A row is one line", "# One row is a line"): [],
    ("common.py", '"""Read a JSONL file of rows', '"""Rows of a JSONL file'): [],
    ("environments/alfworld.py", "TURNS = 30", "TURNS = 31"): [],
    ("environments/__init__.py", 'TABLE = {', 'TABLE = {"toy": "Toy", '): [],
    ("environments/scienceworld.py", '"""One environment', '"""A single environment'): [],
    ("environments/scienceworld.py", "score >= 0.999", "score >= 0.99"):
        ["stage0_sft expert", "evaluate run", *EVERYTHING_TRAINED],
    ("tests/practice_games.py", "_OTHER_THINGS = 10", "_OTHER_THINGS = 11"): [],
    ("evaluate.py", "RESAMPLES = 10_000", "RESAMPLES = 20_000"): [],
    ("evaluate.py", 'AT_ONCE = r"', 'AT_ONCE = r"x'): ["evaluate run"] * 3,
    ("prompts/small_model.py", "MOST_REFUSALS = 4", "MOST_REFUSALS = 5"): ITERATION[1:],
    ("stage0_sft.py", "import argparse", "import argparse\nimport math"): [],
    ("stage2_rollout.py", '"action_reward": own[0]["reward"] - before', '"action_reward": own[0]["reward"]'): ITERATION[1:],
    ("stage3_critique.py", 'TAG = re.compile(r"Action Evaluation', 'TAG = re.compile(r"Evaluation'): ITERATION[2:],
    ("stage5_finetune.py", "round(args.warm_up", "int(args.warm_up"): EVERYTHING_TRAINED,
    ("stage5_finetune.py", 'batch["labels"][:, 1:]', 'batch["labels"][:, 2:]'): EVERYTHING_TRAINED,
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit[0]}: {edit[1]}")
def test_an_edit_of_code_makes_exactly_what_runs_it_stale(project, edit):
    """Comments, docstrings, other environments, practice games and the report's code make nothing stale; a loss, its models."""
    name, text, other = edit
    file = project.folder / name
    before = file.read_text()
    if text in before:
        file.write_text(before.replace(text, other, 1))
    try:
        assert text in before and sorted(project.plan()) == sorted(scripts(*EDITS[edit]))
    finally:
        file.write_text(before)


def test_iter_makes_one_iteration_and_takes_earlier_ones_as_they_are(project):
    assert project.plan(goal="iter") == []
    assert project.plan("ITER=2", "-W", "prompts/critique.txt", goal="iter") == scripts(*ITERATION)
    status, _, stderr = project.make("iter", "ITER=3")
    assert status == 2 and "iteration 3 begins with runs/t/iter2/deliberations.jsonl" in stderr


def test_a_kill_loses_nothing_and_only_the_rest_is_made(project, monkeypatch):
    """An edited prompt, a kill -9 of everything in the middle of stage 3, and `make` again."""
    goal, before = "runs/t/iter1/critiques.jsonl", project.rows("iter1/critiques.jsonl")
    prompt = project.folder / "prompts" / "critique.txt"
    prompt.write_text(prompt.read_text() + "\n")
    part = project.run / "iter1" / "critiques.jsonl.part"
    monkeypatch.setattr(Judge, "may", threading.Semaphore(2))
    killed = project.start(goal)
    while not part.exists() or part.read_text().count("\n") < 3:  # its header and two rows
        assert killed.poll() is None, "stage 3 ended before it could be killed"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    monkeypatch.undo()
    kept = [json.loads(line) for line in part.read_text().splitlines()[1:]]
    assert project.rows("iter1/critiques.jsonl") == before
    assert project.plan() == scripts(*ITERATION[2:])

    status, stdout, stderr = project.make(goal)
    assert status == 0 and f"going on from {len(kept)} rows" in stderr
    assert re.findall(r"python (\w+)\.py", stdout) == ["stage3_critique"]
    after = project.rows("iter1/critiques.jsonl")
    assert [row["key"] for row in after] == [row["key"] for row in before]
    assert all(row in after for row in kept) and not part.exists()
    assert project.plan() == scripts(*ITERATION[3:])


STAND_IN = """#!/bin/bash
# Writes what the stage would, says so in stand-in.wrote, and goes on for as long as PAUSE says.
page=report.md
while [ $# -gt 1 ]; do [ "$1" = --out ] && out=$2; [ "$1" = view ] && page=index.html; shift; done
case ${out:=$1/$page} in
    *.jsonl | *.md | *.html) made=$out ;;
    */model) made=$out/config.json ;;
    *) made="$out/eval-seen.jsonl $out/eval-unseen.jsonl"
esac
mkdir -p $(dirname $made) && echo {} | tee $made && echo $made >> stand-in.wrote && sleep ${PAUSE:-0}
"""


def test_make_stopped_just_as_a_stage_ends_keeps_what_it_made(tmp_path):
    """Every output of a study, by a stand-in for the stages: the moment is too short to be hit with the real ones."""
    project = Project(tmp_path / "project")
    wrote = project.folder / "stand-in.wrote"
    (project.folder / "stand-in").write_text(STAND_IN)
    (project.folder / "stand-in").chmod(0o755)
    stand_in = ("ITERS=1", "PYTHON=./stand-in")
    for arguments in (("all",), ("baselines",), ("all", "VARIANT=more-sft"), ("all", "VARIANT=recover-only")):
        status, _, stderr = project.make(*arguments, *stand_in)
        assert status == 0, stderr
    outputs = [line.split() for line in wrote.read_text().splitlines() if not line.endswith((".md", ".html"))]
    assert len(outputs) == len({made[0] for made in outputs}) > 15
    for made in reversed(outputs):  # so that nothing that a later one is made from is newer than it was
        for name in made:
            (project.folder / name).unlink()
        wrote.unlink()
        variant = [name for name in ("more-sft", "recover-only") if f"/{name}/" in made[0]]
        stopped = project.start(made[0], *stand_in, f"VARIANT={''.join(variant)}", PAUSE="60")
        while not (wrote.exists() and wrote.read_text()):
            assert stopped.poll() is None, stopped.communicate()
            time.sleep(0.01)
        assert wrote.read_text().split() == made
        os.killpg(stopped.pid, signal.SIGTERM)
        stopped.communicate()
        assert all((project.folder / name).exists() for name in made), made


def test_a_finished_run_is_as_it_was_made_until_something_changes(project):
    status, stdout, _ = project.make("verify")
    lines = stdout.splitlines()
    assert status == 0 and all(line.endswith(": as it was made") for line in lines)
    made = {line.partition(":")[0].removeprefix("runs/t/") for line in lines}
    stages = {f"iter1/{name}.jsonl" for name in ("candidates", "rollouts", "critiques", "deliberations")}
    evaluations = {f"{model}/eval-{split}.jsonl" for model in ("base", "iter0", "iter1") for split in ("seen", "unseen")}
    assert made == {"expert.jsonl", "iter0/model", "iter1/model"} | stages | evaluations
    said = json.loads((project.run / "iter1" / "critiques.meta.json").read_text())
    assert said["command"].startswith("stage3_critique.py ") and "prompts/critique.txt" in said["inputs"]
    assert said["counts"]["rows"] == len(project.rows("iter1/critiques.jsonl"))
    weights = project.run / "iter0" / "model" / "model.safetensors"
    weights.rename(project.run / "aside")
    try:
        status, stdout, _ = project.make("verify")
        assert status == 2 and "\nruns/t/iter1/candidates.jsonl: runs/t/iter0/model: has changed\n" in stdout
    finally:
        (project.run / "aside").rename(weights)


def test_a_plan_by_a_finished_run_is_that_run(project):
    """Requests, tokens in and tokens out of all stages, by `make plan` and by the sidecars."""
    asked = [json.loads((project.run / f"{name}.meta.json").read_text())["counts"].get("asked") for name in (
        "base/eval-unseen", "iter0/eval-unseen", "iter1/eval-unseen",
        *(f"iter1/{stage}" for stage in ("candidates", "rollouts", "critiques", "deliberations")))]
    spent = [sum(each[name] for each in asked if each) for name in ("requests", "tokens in", "tokens out")]
    status, stdout, stderr = project.make("plan")
    assert status == 0, stderr
    planned = re.search(r"^\| in all \|  \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| \d+\.\d\d \|", stdout, re.MULTILINE)
    assert [int(number.replace(",", "")) for number in planned.groups()] == pytest.approx(spent, rel=0.1)
    assert "Per row as in runs/t." in stdout and "weights while generating" in stdout


def test_help_explains_targets_and_variables_and_shows_their_values(project):
    status, stdout, _ = project.make("help", "TASKS=3")
    assert status == 0 and "make all" in stdout
    assert re.search(r"^  RUN +\S.* \[t\]$", stdout, re.MULTILINE) and re.search(r"^  TASKS +\S.* \[3\]$", stdout, re.MULTILINE)
    explained = set(re.findall(r"^  ([A-Z_]+) ", stdout, re.MULTILINE))
    settable = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert settable - {"ALFWORLD_DATA", "PYTHON3"} <= explained and len(explained) <= 34


def test_an_ablation_leaves_out_its_stages_and_leaves_the_run_as_it_is(project):
    assert project.plan("VARIANT=no-sas", "ITERS=2") == scripts(*ITERATION[3:], *ITERATION[3:])
    assert project.plan("VARIANT=no-eac", "ITERS=2") == scripts(*ITERATION[3:], "stage1_sample", *ITERATION[3:])


@pytest.mark.parametrize("profile", ["gpu", "paper"])
def test_a_profile_on_gpus_has_no_trace_of_what_a_small_model_needs(project, profile):
    for variant in "", "no-sas", "no-eac":
        _, stdout, _ = project.make("-n", "all", f"PROFILE={profile}", f"VARIANT={variant}", "MODEL=some/model", "ITERS=2")
        assert "stage4_synthesize.py" in stdout and "small" not in stdout and "recover" not in stdout


def test_the_control_goes_on_from_sft_with_the_expert_data_as_long_as_sand_did(project):
    assert project.plan("VARIANT=more-sft") == scripts("stage0_sft train", "evaluate run")
    status, stdout, _ = project.make("-n", "all", "VARIANT=more-sft", "ITERS=2")
    first, second = re.findall(r"stage0_sft\.py train --model (\S+) --data (\S+) --as-long-as (\S+)", stdout)
    assert status == 0 and first == ("runs/t/iter0/model", "runs/t/expert.jsonl", "runs/t/iter1/model")
    assert second == ("runs/t/more-sft/iter1/model", "runs/t/expert.jsonl", "runs/t/iter2/model")
    status, stdout, _ = project.make("runs/t/iter2/model/config.json", "VARIANT=more-sft", "ITERS=2")
    assert status == 2 and "there is no runs/t/iter2/model/config.json; make it first, without VARIANT" in stdout


def test_a_study_is_the_run_its_control_and_its_ablations(project):
    def variants(*variables):
        _, stdout, stderr = project.make("-n", "study", *variables)
        assert "Error" not in stderr
        return re.findall(r"^\S*make all(?: VARIANT=(\S+))?", stdout.replace("&& make", "\nmake"), re.MULTILINE)
    assert variants() == ["", "more-sft", "no-sas", "no-eac", "recover-only"]
    assert variants("SMALL_MODEL=") == ["", "more-sft", "no-sas", "no-eac"]


@pytest.mark.parametrize("wrong", ["EPOCHS=3", "ENV=chess", "PROFILE=huge", "VARIANT=no-no"])
def test_a_wrong_variable_says_what_it_can_be(project, wrong):
    status, _, stderr = project.make("all", wrong)
    assert status == 2 and f"{wrong.split('=')[0]} is '{wrong.split('=')[1]}'; it can be" in stderr
