"""What a user can rely on in a report: the paper's measures on cases worked out by hand, and figures of that data."""

import json
import os

import pytest

from common import dialogue, with_candidates
from evaluate import (
    UserError,
    action_tokens,
    band_rates,
    best_of,
    changes_its_mind,
    choose_example,
    compare,
    deliberation_rate,
    difficulty_bands,
    draw_bands,
    draw_steps,
    draw_success,
    evaluations,
    interval,
    is_loop,
    refused_again,
    refused_rate,
    report,
    reward_per_step,
    reward_section,
    show,
    success_by_turn,
)

WEIGHS = "I stand here.\n\n- go: It is open.\n- wait: It wastes time.\n\nSo I go."


def step(action="look around", thought="", observation="a room", tokens=10, accepted=True):
    text = f"Thought: {thought}\nAction: {action}" if thought else f"Action: {action}"
    return {"thought": thought, "action": action, "text": text, "tokens": tokens, "observation": observation,
            "reward": 0.0, "accepted": accepted} | with_candidates(thought)


def episode(task="find-animal/1", reward=0.5, steps=None, end="turn limit", split="seen"):
    steps = steps or [step(), step("go", WEIGHS)]
    task = f"scienceworld/{task}"
    return {"key": task, "task": task, "split": split, "instruction": "Find an animal.", "reward": reward, "end": end,
            "tokens": sum(one["tokens"] for one in steps), "steps": steps}


def write(folder, model, rewards, steps=None, splits=("seen", "unseen")):
    (folder / model).mkdir(parents=True, exist_ok=True)
    for split in splits:
        rows = [episode(f"find-animal/{n}", reward, steps, "success" if reward == 1 else "turn limit", split)
                for n, reward in enumerate(rewards)]
        (folder / model / f"eval-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "run-seed0"
    write(folder, "base", [0, 0.25, 0.5])
    write(folder, "iter0", [0.5, 0.5, 0.5], [step()] * 4)
    write(folder, "iter1", [1, 1, 0.25])
    return folder


# --- Measures -----------------------------------------------------------------------------------------------------


def test_reward_and_deliberation_per_step():
    row = episode(reward=0.5, steps=[step(), step("go", WEIGHS), step("go", WEIGHS), step()])
    assert reward_per_step(row) == 0.125 and deliberation_rate(row) == 0.5
    assert reward_per_step(episode() | {"steps": []}) == 0.5


def test_the_tertiles_of_the_bases_reward_are_the_difficulty_bands():
    bands = difficulty_bands([episode(f"a/{n}", reward) for n, reward in enumerate([0, 0.1, 0.4, 0.5, 0.9, 1])])
    assert {band: sorted(task[-1] for task in tasks) for band, tasks in bands.items()} == {
        "hard": ["0", "1"], "medium": ["2", "3"], "easy": ["4", "5"]}


@pytest.mark.parametrize("rewards", [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1]])
def test_ties_leave_no_bands(rewards):
    assert difficulty_bands([episode(f"a/{n}", reward) for n, reward in enumerate(rewards)]) is None


def test_an_actions_tokens_are_its_share_of_the_turn():
    # "Action: 1234" is 12 of 24 characters
    half = {"action": "1234", "text": "12345678901\nAction: 1234", "tokens": 24}
    nothing = {"action": "", "text": "no idea", "tokens": 9}
    assert action_tokens({"steps": [half, nothing]}) == 12


def test_refusals_loops_and_changes_of_mind():
    refused = step("fly", observation="No known action matches that input.", accepted=False)
    assert refused_rate(episode(steps=[refused, step(), step(), refused])) == 0.5
    episodes = [episode(steps=[refused, refused, refused, step(), refused]), episode(steps=[step(), refused, step()])]
    assert refused_again(episodes, 1, 1) == [True, False] and refused_again(episodes, 2, 9) == [True, False]
    assert is_loop(episode(steps=[step(), refused, refused, refused]))
    assert not is_loop(episode(steps=[step(), refused, refused, step(), refused]))
    assert changes_its_mind(step("wait", WEIGHS)) and not changes_its_mind(step("Go", WEIGHS))


def test_the_interval_is_that_of_the_mean_over_tasks_and_splits():
    assert interval([[0.5] * 9, [1.0] * 9]) == (0.75, 0.75, 0.75)
    value, low, high = interval([[0.0, 1.0] * 50])
    assert value == 0.5 and low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert interval([[0.0, 1.0] * 50]) == (value, low, high)


def test_success_by_turn_only_grows():
    rows = [episode("a/1", 1, [step()] * 2, "success"), episode("a/2", 0.9, [step()] * 3)]
    assert success_by_turn(rows) == [0, 0.5, 0.5]


def test_the_best_of_k_tries_counts_the_tokens_of_all():
    tries = [episode(reward=reward, steps=[step(tokens=n)]) for n, reward in [(5, 0.2), (7, 0.8), (9, 0.8)]]
    best = best_of(tries, "t")
    assert (best["key"], best["reward"], best["tokens"], best["tries"]) == ("t", 0.8, 21, [0.2, 0.8, 0.8])
    assert best["steps"][0]["tokens"] == 7


def test_an_example_is_shown_in_the_first_turn_one_for_all_or_one_a_type():
    experts = [{"task": task, "instruction": task, "steps": [step("wait")]} for task in ("scienceworld/boil/1", "scienceworld/melt/2")]
    assert choose_example("scienceworld/melt/9", experts) is experts[0]
    games = [{"task": f"alfworld/train/{kind}-Mug-None-Desk-1/t"} for kind in ("pick", "heat")]
    assert choose_example("alfworld/valid_seen/heat-Mug-None-Desk-1/t", games) is games[1]
    assert choose_example("alfworld/valid_seen/cool-Mug-None-Desk-1/t", games) is games[0]
    turns = dialogue("scienceworld/melt/9", "Find a plant.", [step("go")], experts[1])
    assert turns[0].endswith("another task.\nscienceworld/melt/2\nAction: wait\n\nHere is your task.\nFind a plant.")
    assert turns[1:] == ["Action: go", "Observation: a room"]
    assert dialogue("scienceworld/melt/9", "x", [])[0].endswith("\n\nHere is your task.\nx")


# --- Reports ------------------------------------------------------------------------------------------------------


def test_the_report_has_rewards_differences_and_every_section(finished, capsys):
    report(finished)
    text = (finished / "report.md").read_text()
    assert "| base | 0.250 [" in text and "| SAND-1 | 0.750 [" in text
    assert "+0.250 [" in next(line for line in text.splitlines() if line.startswith("| SAND-1 |"))
    for heading in ("table 4", "figure 3", "figure 4", "by task type", "Why episodes ended", "Calibration"):
        assert heading in text
    assert "| SAND-1 | 20 | 0.5x |" in text  # 2 steps of 10 tokens, against SFT's 4
    assert (finished / "figure3.png").exists() and (finished / "figure4.png").exists()
    assert "| SAND-1 |" in capsys.readouterr().out


def test_the_same_inputs_give_the_same_bytes(finished):
    report(finished)
    first = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    report(finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == first


def test_the_figures_show_the_data(finished):
    models = evaluations(finished)
    figure = draw_steps(models)
    bars, lines = figure.axes
    assert [bar.get_height() for bar in bars.patches[:2]] == [0.125, pytest.approx(0.375)]  # seen: SFT, SAND-1
    assert list(lines.lines[0].get_ydata()) == [0, 0.5]
    assert bars.get_ylabel() and lines.get_ylabel()
    assert band_rates(models) == {"SAND-1": {"hard": [0.5], "medium": [0.5], "easy": [0.5]}}
    (panel,) = draw_bands(band_rates(models)).axes
    assert panel.get_title() == "SAND-1" and len(panel.collections) >= 3
    seen, _ = draw_success(models).axes
    assert {line.get_label(): line.get_ydata()[-1] for line in seen.lines} == {
        "base": 0, "SFT": 0, "SAND-1": pytest.approx(2 / 3)}


def test_variants_and_baselines_stand_beside_the_run(finished):
    for folder in ("more-sft/iter1", "no-sas/iter1", "no-eac/iter1", "recover-only/iter1", "base-example",
                   "iter0/best-of-5", "iter1/no-deliberation", "iter2"):
        write(finished, folder, [0, 0, 0])
    assert list(evaluations(finished)) == [
        "base", "base, one example", "SFT", "SAND-1", "SAND-2", "token-matched SFT, SAND-1", "SAND-1 w/o SAS",
        "SAND-1 w/o EAC", "SAND-1 without deliberations", "SFT, best of 5", "SAND-1, acting at once"]


def test_sand_is_compared_with_token_matched_sft(finished):
    write(finished, "more-sft/iter1", [1, 1, 1])
    write(finished, "no-eac/iter1", [1, 1, 1])
    lines = reward_section(evaluations(finished))
    cells = {row[1].strip(): row[-3:-1] for line in lines if (row := line.split("|"))[1:]}
    assert [cell.split()[0] for cell in cells["SAND-1"]] == ["+0.250", "-0.250"]
    assert [cell.strip() for cell in cells["SFT"]] == ["", ""] and cells["token-matched SFT, SAND-1"][1].strip() == ""
    assert cells["SAND-1 w/o EAC"][1].strip() == ""  # it was trained for another number of tokens


def test_a_report_says_what_every_model_was_finetuned_on(finished, capsys):
    for model, trajectories, epochs in (("iter0", 4, 3.0), ("iter1", 9, 1.5)):
        said = {"settings": {"epochs": epochs},
                "counts": {"trajectories": trajectories, "tokens": 1000, "optimizer_steps": 7}}
        (finished / model / "model.meta.json").write_text(json.dumps(said))
    report(finished)
    written = (finished / "report.md").read_text()
    assert "| SFT | 4 | 3 | 3,000 | 7 |" in written and "| SAND-1 | 9 | 1.5 | 1,500 | 7 |" in written


def test_a_report_says_what_the_stages_did(finished):
    task = "scienceworld/find-animal/0"
    acts, weighs = ({name: value for name, value in one.items() if name not in ("text", "tokens")}
                    for one in (step(), step("go", WEIGHS)))
    of_step = {"key": f"{task}/step1", "task": task, "step": 1}
    candidates = [{"action": action, "thought": "", "count": 1, "from_expert": action == "look around"}
                  for action in ("look around", "go", "fly")]
    rollout = {"reward": 1.0, "accepted": True, "end": "expert", "expert_reward": 0.75, "expert_steps_left": 1,
               "action_reward": 0.0}
    rollouts = [rollout | {"steps": [acts], "reward": 0.75}, rollout | {"steps": [weighs]},
                rollout | {"steps": [acts | {"accepted": False}], "reward": 0.5, "accepted": False, "end": "refused"},
                rollout | {"steps": [], "reward": 0.0, "accepted": False, "end": "failed: it died"}]
    critique = {"text": "Good.", "verdict": "Good", "draft_errors": []}
    trajectory = {"key": task, "task": task, "instruction": "i", "reward": 1.0, "source": "deliberation"}
    rows = {
        "candidates": [of_step | {"candidates": candidates, "invalid": 0, "flagged": True},
                       of_step | {"key": f"{task}/step2", "step": 2, "candidates": [], "invalid": 0, "flagged": False}],
        "rollouts": [of_step | {"key": f"{task}/step1/{n}", "candidate": n} | row for n, row in enumerate(rollouts)],
        "critiques": [of_step | critique | {"key": f"{task}/step1/{n}", "candidate": n, "used_template": n > 0}
                      for n in range(3)],
        "deliberations": [trajectory | {"steps": [weighs, acts, acts, acts]}]}
    for name, lines in rows.items():
        (finished / "iter1" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    said = {"critiques": {"settings": {"model": "models/judge"}}, "deliberations": {
        "counts": {"drafted": 1, "retried": 1, "no draft of use": 0, "draft errors": {"no tag": 2}}}}
    for name, sidecar in said.items():
        (finished / "iter1" / f"{name}.meta.json").write_text(json.dumps(sidecar))
    report(finished)
    written = (finished / "report.md").read_text()
    assert "| critic | critiques retried | from the template | deliberations retried | without a draft of use |" in written
    assert ("| iter1 | 1 of 2 (50 %) | judge | 0 of 3 (0 %) | 2 of 3 (67 %) | 1 of 1 (100 %) | 0 of 1 (0 %) | 1 of 4 (25 %) |"
            in written)
    assert "| iter1 | none | 2 no tag |" in written
    assert "| iter1 | 1.000 (n=1) | 0.500 (n=1) |" in written  # sampled thoughts: with deliberation, without
    assert "| iter1 | 1 | 3.0 | 0.750 | 0.750 | 1 of 2 (50 %) | 1 of 2 (50 %) |" in written


def test_evaluations_on_other_tasks_are_not_compared(finished):
    write(finished, "iter1", [1, 1])
    with pytest.raises(UserError, match="iter1/eval-seen.jsonl and .*base/eval-seen.jsonl were made on different"):
        evaluations(finished)


def test_an_evaluation_of_an_earlier_run_is_left_out_and_named(finished, capsys):
    for n, model in enumerate(("iter0", "iter1", "iter1/best-of-5", "iter1/no-deliberation")):
        write(finished, model, [0, 0, 0])
        config = finished / model.split("/")[0] / "model" / "config.json"
        config.parent.mkdir(exist_ok=True)
        config.touch()
        os.utime(config, (n, n))
    assert list(evaluations(finished)) == ["base", "SFT", "SAND-1", "SAND-1, best of 5", "SAND-1, acting at once"]
    os.utime(finished / "iter0" / "model" / "config.json", (9, 9))  # SFT was trained again
    assert list(evaluations(finished)) == ["base", "SFT"]
    assert "left out SAND-1: " in capsys.readouterr().err
    (finished / "iter1" / "model" / "config.json").unlink()  # without it, its evaluation is no younger
    os.utime(finished / "iter0" / "model" / "config.json", (2e10, 2e10))
    assert "SAND-1" not in evaluations(finished)


def test_a_control_of_an_earlier_sand_is_left_out(finished, capsys):
    write(finished, "more-sft/iter1", [1, 1, 1])
    for n, model in enumerate(("iter0", "iter1", "more-sft/iter1")):
        config = finished / model / "model" / "config.json"
        config.parent.mkdir()
        config.touch()
        os.utime(config, (n, n))
    assert "token-matched SFT, SAND-1" in evaluations(finished)
    os.utime(finished / "iter1" / "model" / "config.json", (9, 9))  # SAND-1 was trained again
    assert "token-matched SFT, SAND-1" not in evaluations(finished)
    assert "left out token-matched SFT, SAND-1: " in capsys.readouterr().err


def test_half_an_evaluation_is_named(finished, tmp_path, capsys):
    path = finished / "iter1" / "eval-unseen.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="were made on different tasks"):
        evaluations(finished)
    assert "iter1/eval-unseen.jsonl: dropped its last line, number 3" in capsys.readouterr().err
    path.write_text("")
    with pytest.raises(UserError, match="iter1/eval-unseen.jsonl: has no rows"):
        evaluations(finished)
    path.unlink()
    with pytest.raises(UserError, match="iter1/eval-unseen.jsonl: cannot be read"):
        evaluations(finished)
    with pytest.raises(UserError, match="has no evaluations"):
        evaluations(tmp_path / "empty")


def test_runs_are_compared_over_their_seeds(finished, capsys):
    other = finished.with_name("run-seed1")
    write(other, "iter0", [1, 1, 1])
    compare([finished, other])
    assert "| run | SFT | 2 | 0.750 ± 0.354 | 0.750 ± 0.354 | 0.750 ± 0.354 |" in capsys.readouterr().out


def test_an_episode_is_shown_with_its_deliberation_apart(finished, capsys):
    show(finished / "iter1" / "eval-seen.jsonl", "find-animal/0")
    shown = capsys.readouterr().out
    assert "reward 1.00, success" in shown and "--- 2 (deliberates)" in shown
    assert "        - wait: It wastes time." in shown and "> go\na room" in shown
    with pytest.raises(UserError, match="0 episodes of a task that ends in 'boil/1'"):
        show(finished / "iter1" / "eval-seen.jsonl", "boil/1")
