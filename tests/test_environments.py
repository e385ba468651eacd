"""What a user can rely on when adding an environment: a file, a prompt and a line in a table are all that it takes."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from common import definitions
from conftest import ROOT

TOY = '''
from environments import Environment, Result, replay


class Toy(Environment):
    """Waiting three times is the task."""

    PAPER = [("nobody", 0.0, 0.0)]

    @classmethod
    def tasks(cls, split):
        return [f"toy/{kind}/{split}{n}" for kind in ("day", "night") for n in range(2)]

    @staticmethod
    def turn_limit(task):
        return 5

    def reset(self, task):
        self.waited = 0
        return f"Wait three times ({task})."

    def step(self, action):
        accepted = action in ("wait1", "look around")
        self.waited += action == "wait1"
        answer = f"You have waited {self.waited} times." if accepted else "What?"
        return Result(answer, self.waited / 3, accepted, "success" if self.waited == 3 else None)

    def expert(self, task, max_turns, seed):
        return replay(self, task, [("I wait.", "wait1")] * 3, max_turns) | {"source": "patience"}
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project with the toy environment added."""
    for path in [*ROOT.glob("*.py"), ROOT / "prompts", ROOT / "environments"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    (tmp_path / "environments" / "toy.py").write_text(TOY)
    (tmp_path / "prompts" / "toy.txt").write_text("Be patient.\n{{ example }}\n{{ task }}\n")
    table = tmp_path / "environments" / "__init__.py"
    table.write_text(table.read_text().replace("TABLE = {", 'TABLE = {"toy": "Toy", ', 1))

    def run(*command):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    run.folder = tmp_path
    return run


def test_a_new_environment_is_played_sampled_rolled_out_and_evaluated(project, scripted):
    def rows(name):
        return [json.loads(line) for line in (project.folder / name).read_text().splitlines()]

    model = ("--api-base", scripted, "--model", "m", "--max-live", 3)
    run = "runs/t/iter1"
    trajectories = ("--trajectories", "runs/t/expert.jsonl")
    project("stage0_sft.py", "expert", "--env", "toy", "--out", "runs/t/expert.jsonl")
    assert {(row["task"], row["reward"]) for row in rows("runs/t/expert.jsonl")} == {
        (f"toy/{kind}/train{n}", 1.0) for kind in ("day", "night") for n in range(2)}
    project("stage1_sample.py", *model, *trajectories, "--out", f"{run}/candidates.jsonl")
    project("stage2_rollout.py", *model, *trajectories, "--candidates", f"{run}/candidates.jsonl", "--out",
            f"{run}/rollouts.jsonl")
    rollouts = rows(f"{run}/rollouts.jsonl")
    assert {row["accepted"] for row in rollouts} == {True, False} and all(row["task"].startswith("toy/") for row in rollouts)
    project("stage3_critique.py", *model, *trajectories, "--rollouts", f"{run}/rollouts.jsonl", "--out",
            f"{run}/critiques.jsonl")
    project("stage4_synthesize.py", *model, *trajectories, "--candidates", f"{run}/candidates.jsonl", "--rollouts",
            f"{run}/rollouts.jsonl", "--critiques", f"{run}/critiques.jsonl", "--out", f"{run}/deliberations.jsonl")
    assert len(rows(f"{run}/deliberations.jsonl")) == 4
    for name in "base", "iter0":
        project("evaluate.py", "run", "--env", "toy", *model, "--example", "runs/t/expert.jsonl", "--out", f"runs/t/{name}")
    assert "| SFT |" in project("evaluate.py", "report", "runs/t")
    assert "| nobody | 0.0 | 0.0 |" in (project.folder / "runs" / "t" / "report.md").read_text()


def test_nothing_shared_names_an_environment():
    """Docstrings, comments and the examples of `--help` may."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("prompts/*.py"), ROOT / "environments" / "workers.py"]:
        for name, definition in definitions(path).items():
            if name not in ("PACKAGES", "parse_arguments"):
                assert not re.search("scienceworld|alfworld", definition.code, re.IGNORECASE), f"{path.name}: {name}"


def test_what_only_a_small_model_needs_is_not_imported_elsewhere():
    stages = [path.stem for path in ROOT.glob("*.py")]
    code = f"import sys, {', '.join(stages)}; assert 'prompts.small_model' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
