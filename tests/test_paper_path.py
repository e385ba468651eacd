"""What a user can rely on without help for small models: what a judge writes as in figures 5 and 6 reaches the loss, and
PROFILE=paper runs what the paper describes."""

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common import Trajectory, read_rows
from conftest import ROOT, Server, serve
from prompts.model import ChatFormat
from stage5_finetune import training_sequences

MOVES = ["look around", "teleport to outside", "teleport to kitchen", "focus on agent", "wait1", "fly away"]
PARTS = {"critique": r"taking the action \*\*(.+?)\*\* next", "final": r"at your end must be \*\*(.+?)\*\*",
         "candidates": r"^- (.+?): "}


class Paper(Server):
    """A policy that acts at random and a base model that judges and deliberates in the figures' form; now and then in the
    marks of chat models, after a block of thinking, or without the Action line that figure 6 does not ask for."""

    def answer(self, request):
        draw = random.Random(json.dumps([request["messages"], request["seed"]]))
        self.complete(*(self.write(request["messages"][-1]["content"], draw) for _ in range(request["n"])))

    def write(self, prompt, draw):
        if "### Private Mental Simulations" in prompt:
            return self.critique(re.search(PARTS["critique"], prompt)[1], "was refused" not in prompt)
        if "### Private Scratch-pad" in prompt:
            notes = prompt.partition("### Private Scratch-pad")[2].partition("###")[0]
            return self.deliberation(re.findall(PARTS["candidates"], notes, re.MULTILINE), re.search(PARTS["final"], prompt)[1], draw)
        return f"Thought: I try it.\nAction: {draw.choice(MOVES)}"

    @staticmethod
    def critique(action, accepted):
        verdict = "is valid here and costs one turn" if accepted else "is not possible here and costs a turn"
        return (f"Action Evaluation: To {action} {verdict}. It is of use only where it shows what the task still lacks. "
                "Repeating it would be a loop.")

    @staticmethod
    def deliberation(actions, final, draw):
        marks = draw.choice(["- {}: ", "* **{}:** ", "1. `{}`: ", "- <{}>: "])
        bullets = "\n".join(marks.format(action) + f"As number {n} it would tell me something of its own." for n, action in
                            enumerate(actions))
        thinking = draw.choice(["", "<think>\n- wait: no.\nAction: wait\n</think>\n\n"])
        end = draw.choice([f"Weighing these, the best is to {final}.", f"The last word is about what the task needs.\nAction: {final}"])
        return f"{thinking}Thought: My last action has shown me where I stand.\n\n{bullets}\n\n{end}"


@pytest.fixture
def paper():
    server, address = serve(Paper)
    yield address
    server.shutdown()


def test_figures_5_and_6_reach_the_loss_without_help(script, paper, tiny_model, tmp_path):
    """Stages 1 to 5 on one expert with the full reward and one that a rollout beats."""
    def run(name, *options):
        done = script(name, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    published = [{"id": f"11_{n}", "conversations": [{"from": who, "value": text} for who, text in [
        ("human", "Rules."), ("gpt", "OK"), ("human", "Your task is ..."),
        *(turn for action in actions for turn in (("gpt", f"Thought: I go on.\nAction: {action}"), ("human", "Observation: ...")))]]}
        for n, actions in enumerate((["look around", "wait1"], ["look around", "teleport to outside", "wait1"]))]
    (tmp_path / "published.json").write_text(json.dumps(published))
    run("stage0_sft.py", "expert", "--env", "scienceworld", "--published", "published.json", "--out", "expert.jsonl")
    experts = read_rows(tmp_path / "expert.jsonl", Trajectory)
    experts[1]["reward"] = 1.0  # as an expert's that no rollout beats
    (tmp_path / "expert.jsonl").write_text("".join(json.dumps(row) + "\n" for row in experts))
    model, data = ("--api-base", paper, "--model", "m"), ("--trajectories", "expert.jsonl")
    run("stage1_sample.py", *model, *data, "--n-samples", 4, "--out", "candidates.jsonl")
    run("stage2_rollout.py", *model, *data, "--candidates", "candidates.jsonl", "--max-turns", 6, "--out", "rollouts.jsonl")
    recorded = json.loads((tmp_path / "candidates.meta.json").read_text())["settings"]["chat_args"]
    assert recorded == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    said = run("stage3_critique.py", *model, *data, "--rollouts", "rollouts.jsonl", "--out", "critiques.jsonl")
    assert "0 of " in said and "from the template; drafts not used: none" in said
    said = run("stage4_synthesize.py", *model, *data, "--candidates", "candidates.jsonl", "--rollouts", "rollouts.jsonl",
               "--critiques", "critiques.jsonl", "--expert-switch", "better", "--out", "deliberations.jsonl")
    assert "drafts not used: none; 1 trajectories switched" in said
    rows = read_rows(tmp_path / "deliberations.jsonl", Trajectory)
    assert ["replaced_from" in row for row in rows] == [True, False]
    thoughts = [step["thought"] for row in rows for step in row["steps"] if "candidates" in step]
    assert len(thoughts) >= 3 and all("My last action has shown me" in thought for thought in thoughts)
    assert not any(mark in thought for thought in thoughts for mark in ("think>", "**", "`", "<"))

    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sequences, _ = training_sequences(rows, ChatFormat(tokenizer), 8192)
    learnt = "".join(tokenizer.decode([label for label in sequence["labels"] if label != -100]) for sequence in sequences)
    assert all(thought in learnt for thought in thoughts) and "Observation:" not in learnt
    said = run("stage5_finetune.py", "--model", tiny_model, "--data", "deliberations.jsonl", "--out", "model", "--epochs", 1,
               "--batch-size", 1, "--learning-rate", 1e-3)
    assert "2 trajectories" in said and (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("profile, env", [("paper", "scienceworld"), ("paper", "alfworld"), ("gpu", "alfworld")])
def test_the_plan_of_a_profile_on_gpus_is_known_to_the_letter(profile, env, tmp_path):
    """tests/plans, without digests of code. After a wanted change of the Makefile, write what this prints there."""
    shutil.copytree(ROOT, tmp_path / "p", ignore=shutil.ignore_patterns(".git", ".venv", "models", "runs", "games", ".*cache"))
    (tmp_path / "p" / ".venv").symlink_to(ROOT / ".venv")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ALFWORLD"))}
    done = subprocess.run(["make", "-n", "all", f"PROFILE={profile}", f"ENV={env}", "PUBLISHED=published.json", "ITERS=1",
                           "-o", "published.json", "-o", "requirements.txt"], cwd=tmp_path / "p", text=True, capture_output=True, timeout=60,
                          env=clean | {"HOME": str(tmp_path)})
    commands = (line for line in done.stdout.splitlines() if ".py " in line and "printf" not in line)
    plan = "".join(re.sub(" +", " ", line).strip() + "\n" for line in commands)
    assert done.returncode == 0 and "small" not in plan, done.stderr
    print(plan)
    assert plan == (Path(__file__).with_name("plans") / f"{profile}-{env}.txt").read_text()
