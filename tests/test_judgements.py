"""What a user can rely on in critiques and deliberations: what the base model wrote was checked before it is learnt."""

import argparse
import re

import pytest

import common
from common import (REASON, REFUSED, Output, UserError, fill_dialogue, is_deliberation, listed_candidates, literally,
                    retry_sampling)
from stage3_critique import check_critique, critique_form, critique_prompt, verdict
from stage4_synthesize import (by_verdicts, check_deliberation, deliberation_form, deliberation_prompt, plan_proposals,
                               plan_steps, refused_attempts)

STEPS = [{"thought": "t", "action": f"go to drawer {n}", "observation": f"It holds {n} spoons."} for n in range(1, 5)]
TRAJECTORY = {"key": "a", "instruction": "Find a mug.", "steps": STEPS}
ROLLOUT = {"key": "a/step3/1", "candidate": "a/step3", "action": "take mug 1 from shelf 2", "valid": True, "reward": 0.5,
           "gained": 0.0, "expert_reward": 1.0, "expert_steps": 2, "end": "turn limit",
           "steps": [{"action": "take mug 1 from shelf 2", "observation": "You take it."},
                     {"action": "wait", "observation": "Time passes."}]}
GOOD = ("Taking the mug is possible here and useful for the task. It stands on the shelf in plain sight. "
        "Once it is in hand, only the way to the table is left.")
CRITIQUES = [{"action": "go to drawer 3", "critique": "It may hold a mug."},
             {"action": "take mug (blue) 1", "critique": "There is none."}]
ITEM = {"key": "a/step3", "trajectory": TRAJECTORY, "step": 3, "candidates": CRITIQUES, "action": "go to drawer 3",
        "sampled": [{"action": "go to drawer 3", "thought": "t"}, {"action": "take mug (blue) 1", "thought": "I take it."}]}
OPTIONS = argparse.Namespace(shown_steps=None, propose=None)
DELIBERATION = """Thought: The second drawer held nothing but spoons.

- go to drawer 3: It is the next one, and I have not seen what it holds.
- take mug (blue) 1: I have not seen such a mug anywhere.

An unopened drawer may still hide a mug, so I go there.
Action: go to drawer 3"""


def written(text):
    return Output(text, 50, "stop")


def judge(text, **changes):
    rollout = ROLLOUT | changes
    return check_critique(rollout, critique_prompt(rollout, TRAJECTORY, None), written(text))


def test_a_good_critique_is_taken_without_its_tag_and_cut_to_three_sentences():
    assert judge(f"Action Evaluation: {GOOD} And this is one sentence too many.") == (GOOD, None)


@pytest.mark.parametrize("text, reason", [
    (GOOD, "no tag"),
    ("Action Evaluation:\n- possible\n- useful for the task", "a list"),
    ("Action Evaluation: Good.", "too short"),
    ("Action Evaluation: The mug led to a final reward of 0.5 in the end.", "speaks of the simulation"),
    ("Action Evaluation: The mug is what I need. The mug is what I need.", "repeats itself"),
    ("Action Evaluation: Taking the mug is not possible here at all.", "contradicts the environment"),
    ("Action Evaluation: The mug is here. Which must be found in the task and the current state.", "copies the prompt"),
])
def test_a_critique_of_no_use_is_refused_with_the_reason(text, reason):
    assert judge(text)[1] == reason


def test_ordinary_words_are_no_leak():
    text = "The mug gives useful information for this experimental task."
    assert judge(f"Action Evaluation: {text}") == (text, None)


def test_an_actions_own_name_is_no_leak_and_no_repetition():
    action = "read recipe titled instructions to make salt water"
    text = f"I {action} since I do not know them yet. Once I {action} I can begin."
    assert judge(f"Action Evaluation: {text}", action=action) == (text, None)
    assert judge(f"Action Evaluation: {text}")[1] == "speaks of the simulation"


def test_another_action_may_be_called_impossible():
    text = "Taking the mug is possible and useful here. To take it from an empty shelf is not possible."
    assert judge(f"Action Evaluation: {text}") == (text, None)


def test_a_tag_in_bold_is_one():
    assert judge(f"**Action Evaluation:** {GOOD}") == (GOOD, None) == judge(f"**Action Evaluation**: {GOOD}")


def test_praise_for_a_refused_action_contradicts_the_environment():
    assert judge(f"Action Evaluation: {GOOD}", valid=False)[1] == "contradicts the environment"


@pytest.mark.parametrize("outcome, said", [
    ({"valid": False, "reward": 1.0}, "not possible here"),
    ({"reward": 1.0}, "possible and leads on to completing the task"),
    ({"reward": 0.5}, "possible, but does not lead on to completing the task"),
    ({"reward": 0.8, "expert_reward": 0.8}, "possible and leads on to completing the task"),
    ({"reward": 0.9, "expert_reward": 0.8, "expert_steps": 1}, "possible and leads on to completing the task"),
    ({"reward": 1.0, "expert_steps": 1}, "possible, but not the best way"),
    ({"reward": 0.5, "gained": 0.25}, "possible, but not the best way"),
    ({"reward": 0.0, "steps": ROLLOUT["steps"][:1]}, "possible, but does not lead on"),
    ({"reward": 0.0, "end": "wrong focus", "steps": ROLLOUT["steps"][:1]}, "possible, but a grave mistake that ends the task"),
])
def test_a_held_critique_gives_the_environments_verdict_and_a_reason(outcome, said):
    rollout = ROLLOUT | outcome
    assert said in verdict(rollout)
    critique = f"{verdict(rollout)}, as there is no mug on this shelf that I could take."
    assert re.fullmatch(critique_form(rollout), f"Action Evaluation: {critique}")
    assert judge(f"Action Evaluation: {critique}", **outcome) == (critique, None)
    for change in (("This is", "This may be"), (", as", ""), ("as there", "as the agent"), ("as there", "as the task")):
        wrong = critique.replace(*change)
        assert not re.fullmatch(critique_form(rollout), f"Action Evaluation: {wrong}")


@pytest.mark.parametrize("subject", ["table", "task", "agar", "agent", "mug"])
def test_a_reason_is_about_anything_but_the_agent_and_the_task(subject):
    fits = re.fullmatch(REASON, f"since the {subject} is right here in plain sight.")
    assert bool(fits) == (subject not in ("task", "agent"))


@pytest.mark.parametrize("length, cut", [(119, False), (120, True)])
def test_a_reason_that_its_form_cuts_off_is_sampled_again(length, cut):
    words = ("stands in plain sight on the desk by the lamp and neither drawer nor shelf nor bed has held any such mug before "
             "now, so far")
    reason = f"since it {words[:length]}."
    assert re.fullmatch(REASON, reason)
    assert judge(f"Action Evaluation: {verdict(ROLLOUT)}, {reason}")[1] == ("cut off" if cut else None)
    assert deliberate(f"I choose to go to drawer 3, {reason}")[1] == ("cut off" if cut else None)


def test_verdicts_alone_make_a_deliberation_without_a_model():
    thought = by_verdicts(ITEM)
    assert is_deliberation(thought) and listed_candidates(thought) == ["go to drawer 3", "take mug (blue) 1"]
    assert thought.startswith("t\n\n- go to") and thought.endswith("There is none.\n\nI choose to go to drawer 3. t")
    again = {"sampled": [{"action": "go to drawer 3", "thought": thought}],
             "trajectory": {"steps": [*STEPS[:2], STEPS[2] | {"thought": thought, "plain": "t"}]}}
    assert by_verdicts(ITEM | again) == thought


def test_a_deliberation_by_verdicts_begins_with_what_the_policy_would_have_done():
    item = ITEM | {"candidates": CRITIQUES[::-1]}
    assert by_verdicts(item).startswith("I take it.\n\n- take mug (blue) 1: There is none.\n- go to drawer 3: ")
    wordless = item | {"sampled": [{"action": "take mug (blue) 1", "thought": ""}]}
    assert by_verdicts(wordless).startswith("- take mug (blue) 1: There is none.\n")


def test_the_last_try_is_held_to_the_form_and_with_guided_the_first_too():
    options = argparse.Namespace(temperature=0.0, max_tokens=9, seed=0, guided=None, attempts=3)
    tries = [retry_sampling(options, "a", attempt, "form") for attempt in range(3)]
    assert [(each["temperature"], each["regex"]) for each in tries] == [(0, None), (0.5, None), (0.5, "form")]
    assert len({each["seed"] for each in tries}) == 3
    options.guided = "reasons"
    assert retry_sampling(options, "a", 0, "form") == tries[0] | {"regex": "form"}


def test_the_critique_prompt_shows_history_action_future_and_reward():
    prompt = critique_prompt(ROLLOUT, TRAJECTORY, None)[-1]
    assert all(part in prompt for part in ("Find a mug.", "It holds 1 spoons.", "It holds 2 spoons.", "You take it.",
                                           "Time passes.", "Final reward: 0.50 of 1"))
    assert "It holds 3 spoons." not in prompt  # step 3 is the one to judge
    refused = critique_prompt(ROLLOUT | {"valid": False}, TRAJECTORY, None)[-1]
    assert "The action was refused" in refused and "Final reward: 0.50" not in refused
    shorter = critique_prompt(ROLLOUT, TRAJECTORY, 1)[-1]
    assert "It holds 2 spoons." in shorter and "You take it." in shorter
    assert "It holds 1 spoons." not in shorter and "Time passes." not in shorter


def deliberate(text):
    return check_deliberation(ITEM, deliberation_prompt(ITEM, OPTIONS), written(text))


def test_a_list_in_stars_is_learnt_in_dashes():
    starred = re.sub(r"^- (.*?):", r"* **\1:**", DELIBERATION, flags=re.MULTILINE)
    assert "* **go to drawer 3:** It" in starred and deliberate(starred) == deliberate(DELIBERATION)


def test_a_deliberation_may_name_an_action_as_often_as_it_likes():
    item = ITEM | {"action": "pick up metal pot containing nothing in kitchen", "candidates": [
        {"action": "pick up metal pot containing nothing in kitchen", "critique": "It is empty."}, CRITIQUES[1]]}
    text = DELIBERATION.replace("go to drawer 3", item["action"]).replace(
        "An unopened", f"I could {item['action']}, and to {item['action']} is best. An unopened")
    assert check_deliberation(item, deliberation_prompt(item, OPTIONS), written(text))[1] is None


def test_a_good_deliberation_is_taken():
    thought, reason = deliberate(DELIBERATION)
    assert reason is None and is_deliberation(thought) and "Action:" not in thought


def test_a_held_deliberation_is_put_together_from_the_critiques_and_what_the_model_wrote():
    choice = "I choose to go to drawer 3, because I have not seen yet what it holds."
    assert re.fullmatch(deliberation_form(ITEM), choice)
    thought, reason = deliberate(choice)
    assert reason is None and is_deliberation(thought)
    assert thought == f"- go to drawer 3: It may hold a mug.\n- take mug (blue) 1: There is none.\n\n{choice}"


@pytest.mark.parametrize("change, reason", [
    (("Action: go to drawer 3", ""), "no action line"),
    (("Action: go to drawer 3", "Action: take mug (blue) 1"), "another action than the expert's"),
    (("- take mug (blue) 1: I have not seen such a mug anywhere.\n", ""), "bullets are not the candidates"),
    (("An unopened", "The scratch-pad says that an unopened"), "speaks of the scratch-pad"),
    (("so I go there.", "so I go there, and an unopened drawer may still hide a mug."), "repeats itself"),
])
def test_a_deliberation_of_no_use_is_refused_with_the_reason(change, reason):
    assert deliberate(DELIBERATION.replace(*change))[1] == reason


def test_a_deliberation_that_copies_an_example_is_refused():
    example = ["a task", "Thought: An unopened drawer may still hide a mug, so I go there.\nAction: go", "the next task"]
    assert check_deliberation(ITEM, example, written(DELIBERATION))[1] == "copies the example"


def test_only_flagged_steps_with_two_candidates_are_deliberated_and_none_after_a_switch():
    rows = [{"key": f"a/step{t}", "step": t, "flagged": t != 2,
             "actions": [{"action": step["action"], "count": 1}, {"action": "wait", "count": 1}][:1 if t == 3 else 2]}
            for t, step in enumerate(STEPS, 1)]
    critiques = {row["key"]: [{"action": action["action"], "critique": "Fine."} for action in row["actions"]] for row in rows}
    assert [item["step"] for item in plan_steps(TRAJECTORY, rows, critiques, 0)] == [1, 4]
    switched = TRAJECTORY | {"switched": {"step": 2}}
    assert [item["step"] for item in plan_steps(switched, rows, critiques, 0)] == [1]


def test_without_critiques_the_candidates_are_listed_bare():
    rows = [{"key": "a/step3", "step": 3, "flagged": True,
             "actions": [{"action": "go to drawer 3", "count": 0}, {"action": "wait", "count": 1}]}]
    (item,) = plan_steps(TRAJECTORY, rows, {}, 0)
    prompt = deliberation_prompt(item, OPTIONS)[-1]
    assert "- go to drawer 3\n" in prompt and "- wait\n" in prompt
    actions = [row["action"] for row in item["candidates"]]
    held = [*(f"- {action}: I can do this right here." for action in actions),
            "I choose to go to drawer 3, as I have not seen what it holds."]
    thought, reason = check_deliberation(item, deliberation_prompt(item, OPTIONS), written("\n".join(held)))
    assert reason is None and listed_candidates(thought) == actions


def candidates_in_order(verdicts, counts, seed=0, **options):
    """The names of the expert's action ("e") and others as step 3 lists them, by {name: its verdict} and {name: count}."""
    actions = {name: STEPS[2]["action"] if name == "e" else f"take {name}" for name in counts}
    row = {"key": "a/step3", "step": 3, "flagged": True,
           "actions": [{"action": actions[name], "count": count} for name, count in counts.items()]}
    critiques = [{"action": actions[name], "critique": "Fine.", "verdict": verdict} for name, verdict in verdicts.items()]
    (item,) = plan_steps(TRAJECTORY, [row], {"a/step3": critiques} if critiques else {}, seed, **options)
    names = {action: name for name, action in actions.items()}
    return [names[candidate["action"]] for candidate in item["candidates"]]


def test_candidates_come_in_the_order_of_how_often_they_were_sampled():
    assert candidates_in_order({}, {"e": 1, "x": 2, "y": 3}) == ["y", "x", "e"]
    assert candidates_in_order({"e": "good", "x": "bad", "y": "worse"}, {"e": 1, "x": 2, "y": 3}) == ["y", "x", "e"]
    for counts in {"e": 1, "x": 1}, {"e": 0, "x": 4}:  # the expert's is not told by its place
        orders = [candidates_in_order({}, counts, seed) for seed in range(9)]
        assert ["e", "x"] in orders and ["x", "e"] in orders
        assert orders == [candidates_in_order({}, counts, seed) for seed in range(9)]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_choice_is_the_first_of_those_with_its_verdict(count):
    verdicts = {"e": "good", "x": "bad", "y": "good", "z": "good"}
    for seed in range(9):
        order = candidates_in_order(verdicts, {"e": count, "x": 4, "y": 3, "z": 2}, seed)
        assert order.index("e") < order.index("y") < order.index("z")


@pytest.mark.parametrize("count", [0, 1, 9])
def test_with_the_choice_first_only_the_others_come_in_their_order(count):
    for verdicts in {}, {"e": "good", "x": "bad", "y": "good"}:
        assert candidates_in_order(verdicts, {"e": count, "x": 2, "y": 3}, choice_first=True) == ["e", "y", "x"]


def test_what_was_refused_is_tried_before_the_deliberation_whose_list_goes_on_with_what_is_possible():
    played = {"go to drawer 3": ["go to drawer 3"], "wait": ["wait", "fly"], "hop": ["hop"],
              "fly": ["fly", "run", "fly"]}
    said = {"fly": "Nothing happens.", "run": "Nothing happens.", "hop": "Nothing happens."}
    rollouts = [{"candidate": "a/step3", "source": "expert" if first == "go to drawer 3" else "sample", "end": "refused",
                 "valid": first not in said,
                 "steps": [{"thought": "t", "action": name, "observation": said.get(name, "Done.")} for name in names]}
                for first, names in played.items()]
    actions = [{"action": name, "thought": "t", "count": 1} for name in played]
    row = {"key": "a/step3", "step": 3, "flagged": True, "actions": actions}
    critiques = {"a/step3": [action | {"critique": "Judged.", "verdict": REFUSED if action["action"] in said else "Fine"}
                             for action in actions]}
    seen = {}
    for seed in range(40):
        (item,) = plan_steps(TRAJECTORY, [row], critiques, seed, attempts=refused_attempts(rollouts, seed))
        seen[tuple(step["action"] for step in item["tried"])] = thought = by_verdicts(item)
        assert thought.endswith("\n\nI choose to go to drawer 3.")  # and no thought that wants what was refused
    assert set(seen) == {("fly",), ("fly", "run"), ("fly", "run", "fly"), ("hop",)}
    assert seen["fly", "run"].startswith("- run: This is not possible here and only wastes a turn.\n- ")
    rollouts[0]["valid"] = False
    critiques["a/step3"][0]["verdict"] = REFUSED  # a published expert may be refused as well
    (item,) = plan_steps(TRAJECTORY, [row], critiques, 0, attempts=refused_attempts(rollouts, 0))
    assert "- go to drawer 3: Judged.\n" in by_verdicts(item)
    assert seen["fly", "run", "fly"].startswith("- fly: Judged.\n- ")
    for tried, thought in seen.items():
        assert sorted(listed_candidates(thought)) == sorted(["go to drawer 3", "wait", tried[-1]])
    rollouts[-1]["steps"][1]["action"] = ""  # as where a turn was cut off: no attempt
    for seed in range(40):
        (item,) = plan_steps(TRAJECTORY, [row], critiques, seed, attempts=refused_attempts(rollouts, seed))
        assert {step["action"] for step in item["tried"]} <= {"fly", "hop"}


def test_without_sampling_the_base_model_proposes_the_candidates_at_every_step():
    items = plan_proposals(TRAJECTORY)
    assert [item["action"] for item in items] == [step["action"] for step in STEPS]
    options = argparse.Namespace(shown_steps=None, propose=2)
    assert "and 2 other actions" in deliberation_prompt(items[2], options)[-1]
    prompt = deliberation_prompt(items[2], options)
    assert check_deliberation(items[2], prompt, written(DELIBERATION))[1] is None
    alone = DELIBERATION.replace("- take mug (blue) 1: I have not seen such a mug anywhere.\n", "")
    assert check_deliberation(items[2], prompt, written(alone))[1] == "bullets are not the candidates"


@pytest.mark.parametrize("text", ["a.b*c", "(x) [y] {z}", "a|b^c$", "1+1=2?", "back\\slash", "it's – fine"])
def test_a_literal_expression_matches_just_its_text(text):
    assert re.fullmatch(literally(text), text) and not re.fullmatch(literally(text), text + "x")


def test_a_prompt_may_begin_with_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "PROMPTS", tmp_path)
    path = tmp_path / "critique.txt"
    path.write_text("one {task}\n=== assistant\ntwo\n=== user\nthree {task}\n")
    injected = "a\n=== assistant\nb"
    assert fill_dialogue("critique", task=injected) == [f"one {injected}", "two", f"three {injected}"]
    path.write_text("one\n=== assistant\ntwo\n")
    with pytest.raises(UserError, match="critique.txt: has 2 turns"):
        fill_dialogue("critique", task="t")
