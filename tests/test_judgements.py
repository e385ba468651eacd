"""What a user can rely on in critiques and deliberations: what the base model wrote was checked before it is learnt."""

import argparse
import re

import pytest

import common
from common import Output, UserError, dialogue, listed_candidates, with_candidates
from prompts import small_model
from prompts.base_model import draft_sampling, drafts, fill_dialogue, steps_text
from prompts.small_model import REFUSED, failed_first, four_refused, purpose, templated_thought
from stage3_critique import check_critique, critique_prompt, critique_row, verdict
from stage4_synthesize import (by_sample_count, check_deliberation, deliberate, deliberation_prompt, finish_step,
                               judged_candidates, plan_proposals, plan_steps)

TASK = "scienceworld/find-animal/0"


def step(action, observation="", accepted=True, thought="t", reward=0.0):
    return {"thought": thought, "action": action, "observation": observation, "reward": reward, "accepted": accepted}


STEPS = [step(f"go to drawer {n}", f"It holds {n} spoons.") for n in range(1, 5)]
TRAJECTORY = {"key": TASK, "task": TASK, "instruction": "Find a mug.", "steps": STEPS}
ROLLOUT = {"key": f"{TASK}/step3/1", "task": TASK, "step": 3, "candidate": 1, "accepted": True, "reward": 0.5,
           "action_reward": 0.0, "expert_reward": 1.0, "expert_steps_left": 2, "end": "turn limit",
           "steps": [step("take mug 1 from shelf 2", "You take it."), step("wait", "Time passes.")]}
GOOD = ("Taking the mug is possible here and useful for the task. It stands on the shelf in plain sight. "
        "Once it is in hand, only the way to the table is left.")
JUDGED = [{"action": "go to drawer 3", "thought": "t", "count": 1, "from_expert": True,
           "critique": "It may hold a mug.", "verdict": "This is possible"},
          {"action": "take mug (blue) 1", "thought": "I take it.", "count": 4, "from_expert": False,
           "critique": "There is none.", "verdict": REFUSED}]
ITEM = {"key": f"{TASK}/step3", "trajectory": TRAJECTORY, "step": 3, "candidates": JUDGED, "action": "go to drawer 3"}
DELIBERATION = """Thought: The second drawer held nothing but spoons.

- go to drawer 3: It is the next one, and I have not seen what it holds.
- take mug (blue) 1: I have not seen such a mug anywhere.

An unopened drawer may still hide a mug, so I go there.
Action: go to drawer 3"""


# --- Critiques --------------------------------------------------------------------------------------------------------


def written(text):
    return Output(text, 50, "stop")


def judge(text, **changes):
    rollout = ROLLOUT | changes
    return check_critique(rollout, critique_prompt(rollout, TRAJECTORY), written(text),
                          {"teleport to kitchen", *(each["action"] for each in STEPS)})


def test_a_good_critique_is_taken_without_its_tag_and_cut_to_three_sentences():
    assert judge(f"Action Evaluation: {GOOD} And this is one sentence too many.") == (GOOD, None)


@pytest.mark.parametrize("text, reason", [
    (GOOD, "no tag"),
    ("Action Evaluation:\n- possible\n- useful for the task", "a list"),
    ("Action Evaluation: Good.", "too short"),
    ("Action Evaluation: The mug led to a final reward of 0.5 in the end.", "speaks of the simulation"),
    ("Action Evaluation: The mug is what I need. The mug is what I need.", "repeats itself"),
    ("Action Evaluation: Taking the mug is not possible here at all.", "contradicts the environment"),
    ("Action Evaluation: The mug is here. Which mistakes or endless loops do tasks like this one invite? None.", "copies the prompt"),
    ("Action Evaluation: It helps, and the objects and places involved good for, and what does common sense say.", "copies the prompt"),
    ("Action Evaluation: Taking the mug helps a little here. This is for my eyes only.", "speaks of the simulation"),
    ("Action Evaluation: teleport to outside", "acts instead of judging"),
    ("Action Evaluation: Go to drawer 3. It is the next one to look into.", "acts instead of judging"),
    ("Action Evaluation: I will now go to the outside. There is more to see.", "acts instead of judging"),
    ("Action Evaluation: I think about the situation and plan, then act: teleport to outside.", "acts instead of judging"),
    ("Action Evaluation: My thoughts are on the mug: teleport to kitchen. It is there.", "acts instead of judging"),
    ("Action Evaluation: The mug is on the shelf.\nAction: take mug 1 from shelf 2", "acts instead of judging"),
    ("Action Evaluation: Going to the drawer 4 is possible and may show a mug.", "judges another action"),
    ("<think>Action Evaluation: Taking the mug is possible here.", "no tag"),
])
def test_a_critique_of_no_use_is_refused_with_the_reason(text, reason):
    assert judge(text)[1] == reason


@pytest.mark.parametrize("text", [
    "I will lose a turn with it, since the mug stands in plain sight. Nothing else is gained here.",
    "Take mug 1 from shelf 2 is a valid action that fits the task well.",
    "After I go to drawer 4 the mug may be out of reach, so taking mug 1 from shelf 2 comes first.",
    "Executing take mug 1 from shelf 2 is a practical step. Going to drawer 4 can wait.",
    "This action is valid, and it brings the mug into my hands. Then only the table is left.",
])
def test_a_critique_may_speak_of_other_actions_and_of_what_it_will_bring(text):
    assert judge(f"Action Evaluation: {text}") == (text, None)


def test_a_second_critique_is_no_part_of_the_first():
    assert judge(f"Action Evaluation: {GOOD}\nAction Evaluation: I take the mug.") == (GOOD, None)


def test_what_is_thought_before_a_critique_is_no_part_of_it():
    thinking = "<think>\nAction Evaluation: no, that is wrong.\n- first\n</think>\n\n"
    assert judge(f"{thinking}Action Evaluation: {GOOD}") == (GOOD, None)


def test_ordinary_words_are_no_leak():
    text = "The mug gives useful information in the right format: an expert follows instructions and imagines no more."
    assert judge(f"Action Evaluation: {text}") == (text, None)


def test_an_actions_own_name_is_no_leak_and_no_repetition():
    action = "read recipe titled simulations of salt water"
    text = f"I {action} since I do not know them yet. Once I {action} I can begin."
    assert judge(f"Action Evaluation: {text}", steps=[step(action)]) == (text, None)
    assert judge(f"Action Evaluation: {text}")[1] == "speaks of the simulation"


def test_another_action_may_be_called_impossible():
    text = "Taking the mug is possible and useful here. To take it from an empty shelf is not possible."
    assert judge(f"Action Evaluation: {text}") == (text, None)


def test_a_tag_in_bold_is_one():
    assert judge(f"**Action Evaluation:** {GOOD}") == (GOOD, None) == judge(f"**Action Evaluation**: {GOOD}")


def test_praise_for_a_refused_action_contradicts_the_environment():
    assert judge(f"Action Evaluation: {GOOD}", accepted=False)[1] == "contradicts the environment"


@pytest.mark.parametrize("outcome, said", [
    ({"accepted": False, "reward": 1.0}, "not possible here"),
    ({"reward": 1.0}, "possible and leads on to completing the task"),
    ({"reward": 0.5}, "possible, but does not lead on to completing the task"),
    ({"reward": 0.8, "expert_reward": 0.8}, "possible and leads on to completing the task"),
    ({"reward": 0.9, "expert_reward": 0.8, "expert_steps_left": 1}, "possible and leads on to completing the task"),
    ({"reward": 1.0, "expert_steps_left": 1}, "possible, but not the best way"),
    ({"reward": 0.5, "action_reward": 0.25}, "possible, but not the best way"),
    ({"reward": 0.0, "steps": ROLLOUT["steps"][:1]}, "possible, but does not lead on"),
    ({"reward": 0.0, "end": "wrong focus", "steps": ROLLOUT["steps"][:1]},
     "possible, but a grave mistake that ends the task"),
])
def test_the_verdict_is_the_environments_and_a_critique_may_say_it(outcome, said):
    rollout = ROLLOUT | outcome
    assert said in verdict(rollout)
    critique = f"{verdict(rollout)}, as there is no mug on this shelf that I could take."
    assert judge(f"Action Evaluation: {critique}", **outcome) == (critique, None)


def test_the_verdict_stands_in_where_no_draft_was_of_use():
    place = {"key": f"{TASK}/step3/1", "task": TASK, "step": 3, "candidate": 1}
    says = "This is possible, but does not lead on to completing the task"
    assert critique_row(ROLLOUT, None, ["no tag", "a list"]) == place | {
        "text": f"{says}.", "verdict": says, "used_template": True, "draft_errors": ["no tag", "a list"]}
    assert critique_row(ROLLOUT, GOOD, ["no tag"]) == place | {
        "text": GOOD, "verdict": says, "used_template": False, "draft_errors": ["no tag"]}


def test_the_critique_prompt_shows_history_action_future_and_reward():
    prompt = critique_prompt(ROLLOUT, TRAJECTORY)[-1]
    assert all(part in prompt for part in ("Find a mug.", "It holds 1 spoons.", "It holds 2 spoons.", "You take it.",
                                           "Time passes.", "Final reward: 0.50 of 1"))
    assert "It holds 3 spoons." not in prompt  # step 3 is the one to judge
    refused = critique_prompt(ROLLOUT | {"accepted": False}, TRAJECTORY)[-1]
    assert "The action was refused" in refused and "Final reward: 0.50" not in refused


def test_the_judge_sees_the_environments_whole_prompt_and_all_of_the_history_with_its_thoughts():
    assert steps_text([]) == "(nothing has been done yet)"
    long = step("wait", f"a\nb{'x' * 5000}", thought="I wait.")
    assert steps_text([long]) == f"Thought: I wait.\nAction: wait\nObservation: a\nb{'x' * 5000}"
    trajectory = TRAJECTORY | {"steps": [long, *STEPS]}
    for prompt in critique_prompt(ROLLOUT, trajectory), deliberation_prompt(ITEM | {"trajectory": trajectory}, 2):
        assert prompt[-1].startswith(f"### Background\n{dialogue(TASK, 'Find a mug.', [])[0]}\n\n### Current State\nThought: I wait.")
        assert f"b{'x' * 5000}\n" in prompt[-1]
        order = [prompt[-1].index(part) for part in ("### Background", "### Current State", "### Private", "### Instructions",
                                                    "### Output Format")]
        assert order == sorted(order)


# --- Drafts -----------------------------------------------------------------------------------------------------------


class Answers:
    """An engine that gives each item the next of its answers."""

    def __init__(self, **answers):
        self.answers, self.asked, self.done = {name: iter(texts) for name, texts in answers.items()}, [], []

    def submit(self, name, turns, **sampling):
        self.asked.append((turns, sampling["attempt"]))
        self.done.append((name, [next(self.answers[turns])]))

    def poll(self):
        finished, self.done = self.done, []
        return finished


def test_a_draft_that_fails_its_check_is_asked_for_again_and_no_more_often_than_allowed():
    lost = Output("", 0, "failed: the server answered 500")
    engine = Answers(a=[written("good")], b=[written("bad"), written("worse"), written("good")], c=map(written, "123"),
                     d=[written("bad"), lost], e=[Output("", 0, "context")])
    results = drafts(engine, list("abcde"), lambda item, attempt: (item, {"attempt": attempt}),
                     lambda item, output: (output.text.upper(), None if output.text == "good" else output.text), 3, 2)
    assert {item: (text, errors) for item, text, errors in results} == {
        "a": ("GOOD", []), "b": ("GOOD", ["bad", "worse"]), "c": (None, ["1", "2", "3"]),
        "d": (None, ["bad", lost.finish]), "e": (None, ["prompt longer than the context"])}
    assert sorted(engine.asked) == [("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1), ("c", 2), ("d", 0),
                                    ("d", 1), ("e", 0)]


def test_without_attempts_nobody_is_asked():
    assert list(drafts(None, [ITEM, ITEM], None, None, 0, 1)) == [(ITEM, None, [])] * 2


def test_a_draft_after_the_first_is_sampled_with_a_little_temperature():
    options = argparse.Namespace(temperature=0.0, max_tokens=9, seed=0)
    tries = [draft_sampling(options, "a", attempt) for attempt in range(3)]
    assert [each["temperature"] for each in tries] == [0, 0.5, 0.5] and {each["max_tokens"] for each in tries} == {9}
    assert len({each["seed"] for each in tries}) == 3 and tries[0] == draft_sampling(options, "a", 0)
    options.temperature = 0.7
    assert [draft_sampling(options, "a", attempt)["temperature"] for attempt in range(2)] == [0.7, 0.7]


# --- Deliberations ----------------------------------------------------------------------------------------------------


def check(text):
    return check_deliberation(ITEM, deliberation_prompt(ITEM, None), written(text))


@pytest.mark.parametrize("bullet", [r"* **\1:**", r"- **\1**:", r"1. \1:", r"2) `\1`:", r"- <\1>:", r"• [\1]:", r"  - \1 :", r"- \1:**"])
def test_a_list_with_the_marks_that_models_use_is_learnt_in_dashes(bullet):
    marked = re.sub(r"^- (.*?):", bullet, DELIBERATION, flags=re.MULTILINE)
    assert check(marked) == check(DELIBERATION)


def test_a_deliberation_may_end_as_figure_6_without_an_action_line():
    plain = DELIBERATION.replace("so I go there.\nAction: go to drawer 3", "so I go to drawer 3.")
    thought, reason = check(plain)
    assert reason is None and thought == plain.removeprefix("Thought: ")


def test_what_is_thought_before_a_deliberation_is_not_learnt():
    assert check(f"<think>\n- go to drawer 9: no.\nAction: wait\n</think>\n{DELIBERATION}") == check(DELIBERATION)
    assert check(f"so the drawer it is\nAction: wait\n</think>\n{DELIBERATION}") == check(DELIBERATION)


def test_a_deliberation_may_name_an_action_as_often_as_it_likes():
    item = ITEM | {"action": "pick up metal pot containing nothing in kitchen", "candidates": [
        JUDGED[0] | {"action": "pick up metal pot containing nothing in kitchen"}, JUDGED[1]]}
    text = DELIBERATION.replace("go to drawer 3", item["action"]).replace(
        "An unopened", f"I could {item['action']}, and to {item['action']} is best. An unopened")
    assert check_deliberation(item, deliberation_prompt(item, None), written(text))[1] is None


def test_a_good_deliberation_is_taken():
    thought, reason = check(DELIBERATION)
    assert reason is None and with_candidates(thought) and "Action:" not in thought


@pytest.mark.parametrize("change, reason", [
    (("Action: go to drawer 3", ""), "no final action"),
    (("so I go there.\nAction: go to drawer 3", "so not go to drawer 3 but take mug (blue) 1."), "another action than the expert's"),
    (("Thought: The second", "<think>The second"), "no final action"),
    (("Action: go to drawer 3", "Action: take mug (blue) 1"), "another action than the expert's"),
    (("- take mug (blue) 1: I have not seen such a mug anywhere.\n", ""), "bullets are not the candidates"),
    (("An unopened", "The scratch-pad says that an unopened"), "speaks of the scratch-pad"),
    (("so I go there.", "so I go there, and an unopened drawer may still hide a mug."), "repeats itself"),
])
def test_a_deliberation_of_no_use_is_refused_with_the_reason(change, reason):
    assert check(DELIBERATION.replace(*change))[1] == reason


def test_a_deliberation_that_copies_an_example_is_refused():
    example = ["a task", "Thought: An unopened drawer may still hide a mug, so I go there.\nAction: go", "the next"]
    assert check_deliberation(ITEM, example, written(DELIBERATION))[1] == "copies the example"


def candidates_row(t, counts, flagged=True):
    """The candidates of step t: its own action and others, each with how often it was sampled."""
    return {"key": f"{TASK}/step{t}", "task": TASK, "step": t, "invalid": 0, "flagged": flagged,
            "candidates": [{"action": action, "thought": "t", "count": count, "from_expert": not place}
                           for place, (action, count) in enumerate(counts.items())]}


def critiques_of(row, verdicts):
    """A critique of each candidate whose action has a verdict."""
    return [{"key": f"{row['key']}/{place}", "task": TASK, "step": row["step"], "candidate": place, "text": "Judged.",
             "verdict": verdicts[each["action"]], "used_template": False, "draft_errors": []}
            for place, each in enumerate(row["candidates"]) if each["action"] in verdicts]


def test_only_flagged_steps_with_two_candidates_are_deliberated_and_none_after_a_switch():
    rows = [candidates_row(t, {each["action"]: 1} | ({"wait": 1} if t != 3 else {}), t != 2)
            for t, each in enumerate(STEPS, 1)]
    verdicts = dict.fromkeys(["wait", *(each["action"] for each in STEPS)], "Fine")
    critiques = [each for row in rows for each in critiques_of(row, verdicts)]
    for judged in critiques, []:
        items = plan_steps(TRAJECTORY, rows, judged, 0)
        assert [(item["key"], item["step"], item["action"]) for item in items] == [
            (f"{TASK}/step1", 1, "go to drawer 1"), (f"{TASK}/step4", 4, "go to drawer 4")]
        switched = TRAJECTORY | {"replaced_from": {"step": 2}}
        assert [item["step"] for item in plan_steps(switched, rows, judged, 0)] == [1]


def test_a_candidate_whose_rollout_failed_is_not_compared():
    row = candidates_row(3, {"go to drawer 3": 1, "wait": 2, "hop": 3})
    critiques = critiques_of(row, {"go to drawer 3": "Good", "hop": "Bad"})
    assert judged_candidates(row, critiques) == [row["candidates"][0] | {"critique": "Judged.", "verdict": "Good"},
                                                 row["candidates"][2] | {"critique": "Judged.", "verdict": "Bad"}]
    assert plan_steps(TRAJECTORY, [row], critiques[:1], 0) == []


def test_without_critiques_the_candidates_are_listed_bare():
    (item,) = plan_steps(TRAJECTORY, [candidates_row(3, {"go to drawer 3": 0, "wait": 1})], [], 0)
    prompt = deliberation_prompt(item, None)
    assert "- go to drawer 3\n" in prompt[-1] and "- wait\n" in prompt[-1]
    thought, reason = check_deliberation(item, prompt, written(DELIBERATION.replace("take mug (blue) 1", "wait")))
    assert reason is None and [each["action"] for each in listed_candidates(thought)] == ["go to drawer 3", "wait"]


def test_candidates_come_in_the_order_of_how_often_they_were_sampled():
    def order(counts, seed=0):
        candidates = [{"action": action, "count": count} for action, count in counts.items()]
        ranked = [each["action"] for each in by_sample_count(candidates, "key", seed)]
        assert sorted(ranked) == sorted(counts)
        return ranked

    assert order({"e": 1, "x": 2, "y": 3}) == ["y", "x", "e"]
    for counts in {"e": 1, "x": 1}, {"e": 0, "x": 4}:  # the expert's is not told by its place
        orders = [order(counts, seed) for seed in range(9)]
        assert ["e", "x"] in orders and ["x", "e"] in orders
        assert orders == [order(counts, seed) for seed in range(9)]
    assert {order({"e": 0, "x": 4, "y": 2}, seed).index("e") for seed in range(20)} == {0, 1, 2}
    (item,) = plan_steps(TRAJECTORY, [candidates_row(3, {"go to drawer 3": 1, "hop": 2, "wait": 3})], [], 0)
    assert [each["action"] for each in item["candidates"]] == ["wait", "hop", "go to drawer 3"]


def test_without_sampling_the_base_model_proposes_the_candidates_at_every_step():
    items = plan_proposals(TRAJECTORY)
    assert [item["action"] for item in items] == [step["action"] for step in STEPS]
    prompt = deliberation_prompt(items[2], 2)
    assert "and 2 other actions" in prompt[-1]
    assert check_deliberation(items[2], prompt, written(DELIBERATION))[1] is None
    alone = DELIBERATION.replace("- take mug (blue) 1: I have not seen such a mug anywhere.\n", "")
    assert check_deliberation(items[2], prompt, written(alone))[1] == "bullets are not the candidates"


def stage_4(**options):
    return argparse.Namespace(**{"small_model": False, "recover_only": False} | options)


def item_of(**changes):
    """ITEM, whose trajectory's third step may be written into; the step."""
    own = STEPS[2] | changes
    return ITEM | {"trajectory": TRAJECTORY | {"steps": [*STEPS[:2], own, STEPS[3]]}, "failed": []}, own


def test_a_step_that_deliberates_keeps_what_its_thought_was_the_first_time():
    item, own = item_of(text="Thought: t\nAction: go to drawer 3")
    first, second = (f"{word}.\n\n- go to drawer 3: {word}.\n- wait: Bad." for word in ("One", "Two"))
    for thought, judgement in (first, "One."), (second, "Two."):
        finish_step(item, {"thought": thought, "draft_errors": ["no action line"]}, stage_4())
        assert own == STEPS[2] | {"thought": thought, "original_thought": "t", "candidates": [
            {"action": "go to drawer 3", "judgement": judgement}, {"action": "wait", "judgement": "Bad."}]}
    other = step("wait", thought="")
    deliberate(other, first)
    assert (other["thought"], other["original_thought"], len(other["candidates"])) == (first, "", 2)


def test_a_step_without_a_draft_of_use_keeps_its_thought_and_says_why():
    item, own = item_of()
    finish_step(item, {"thought": None, "draft_errors": ["no action line", "repeats itself"]}, stage_4())
    assert own == STEPS[2] | {"draft_errors": ["no action line", "repeats itself"]}
    item, own = item_of()
    finish_step(item, {"thought": None, "draft_errors": []}, stage_4())
    assert own == STEPS[2]


# --- What only a small model needs ------------------------------------------------------------------------------------


def test_a_refused_candidate_is_followed_until_something_is_accepted_or_four_are_refused():
    fine, bad = step("look"), step("fly", accepted=False)
    assert four_refused([fine], 2) is None  # only h_1 so far
    assert four_refused([fine, fine, bad, bad, bad, bad], 2) is None  # the candidate was accepted
    assert [four_refused([fine, *[bad] * count], 2) for count in range(1, 5)] == [None, None, None, "refused"]
    assert four_refused([fine, bad, fine], 2) == "refused"
    assert four_refused([bad, bad, fine, bad], 4) is None  # what was refused before does not count


def test_the_experts_action_comes_first_where_nothing_was_tried():
    others = [JUDGED[1], JUDGED[1] | {"action": "wait", "verdict": "Fine"}]
    assert failed_first([], [others[0], JUDGED[0], others[1]], "Go to drawer 3") == [JUDGED[0], *others]


def test_after_failed_attempts_the_last_comes_first_and_then_what_is_possible():
    wait = JUDGED[1] | {"action": "wait", "verdict": "Fine"}
    candidates = [JUDGED[1], wait, JUDGED[0]]
    tried = [step("fly", accepted=False), step("Take mug (blue) 1", accepted=False)]
    assert failed_first(tried, candidates, "go to drawer 3") == [JUDGED[1], JUDGED[0], wait]
    unjudged = {"action": "fly", "critique": f"{REFUSED}.", "verdict": REFUSED}
    assert failed_first(tried[:1], candidates, "go to drawer 3") == [unjudged, JUDGED[0], wait]
    refused = JUDGED[0] | {"verdict": REFUSED}  # a published expert may be refused as well
    assert failed_first(tried[:1], [JUDGED[1], refused], "go to drawer 3") == [unjudged, refused]


def test_a_templated_thought_is_the_verdicts_between_the_original_thought_and_the_choice_and_deliberates():
    thought = templated_thought(ITEM | {"failed": []}, "I need a mug.")
    assert thought == (f"I need a mug.\n\n- go to drawer 3: This is possible.\n- take mug (blue) 1: {REFUSED}.\n\n"
                       "I choose to go to drawer 3. I need a mug.")
    listed = [each["action"] for each in with_candidates(thought)["candidates"]]
    assert listed == ["go to drawer 3", "take mug (blue) 1"]
    deliberated = {"thought": thought}  # in a rollout that has replaced the expert
    assert small_model.finish_step(deliberated, ITEM | {"failed": []}, None, False) == thought
    assert purpose(thought, "go to drawer 3") == "I need a mug." == purpose("I need a mug.", "go to drawer 3")


def test_a_templated_thought_after_failed_attempts_is_the_verdicts_and_the_choice_alone():
    thought = templated_thought(ITEM | {"failed": [step("fly", accepted=False)]}, "I need a mug.")
    assert thought == (f"- go to drawer 3: This is possible.\n- take mug (blue) 1: {REFUSED}.\n\n"
                       "I choose to go to drawer 3.")


def test_what_was_refused_is_tried_before_the_deliberation_whose_list_goes_on_with_what_is_possible():
    played = {"go to drawer 3": ["go to drawer 3"], "wait": ["wait", "fly"], "hop": ["hop"],
              "fly": ["fly", "run", "fly"]}
    impossible = ("fly", "run", "hop")
    rollouts = [ROLLOUT | {"candidate": place, "end": "refused", "accepted": first not in impossible,
                           "steps": [step(name, accepted=name not in impossible) for name in names]}
                for place, (first, names) in enumerate(played.items())]
    row = candidates_row(3, dict.fromkeys(played, 1))
    verdicts = {action: REFUSED if action in impossible else "Fine" for action in played}

    def planned(seed):
        items = plan_steps(TRAJECTORY, [row], critiques_of(row, verdicts), seed)
        (item,) = small_model.plan(items, rollouts, seed)
        return item

    seen = {}
    for seed in range(40):
        item = planned(seed)
        assert item["failed"] == planned(seed)["failed"]
        assert all(each in rollouts[2]["steps"] + rollouts[3]["steps"] for each in item["failed"])
        seen[tuple(each["action"] for each in item["failed"])] = thought = templated_thought(item, "t")
        assert thought.endswith("\n\nI choose to go to drawer 3.")  # and no thought that wants what was refused
    assert set(seen) == {("fly",), ("fly", "run"), ("fly", "run", "fly"), ("hop",)}
    for tried, thought in seen.items():
        assert thought.startswith(f"- {tried[-1]}: This is not possible here and only wastes a turn.\n"
                                  "- go to drawer 3: Fine.\n- ")
        assert [each["action"] for each in listed_candidates(thought)] == [tried[-1], "go to drawer 3", "wait"]
    rollouts[-1]["steps"][1]["action"] = ""  # as where a turn was cut off: no attempt
    assert all({each["action"] for each in planned(seed)["failed"]} <= {"fly", "hop"} for seed in range(40))
    rollouts[-1]["steps"][1]["action"] = "Go to drawer 3"  # the expert's: no attempt in vain
    assert all({each["action"] for each in planned(seed)["failed"]} <= {"fly", "hop"} for seed in range(40))
    rollouts[-1]["end"] = "failed: it died"
    assert {each["action"] for seed in range(9) for each in planned(seed)["failed"]} == {"hop"}
    rollouts[0] |= {"accepted": False}  # the expert's is not what the policy tried
    verdicts["go to drawer 3"] = REFUSED
    assert [each["action"] for each in planned(0)["failed"]] == ["hop"]
    assert [each["action"] for each in planned(0)["candidates"]] == ["hop", "go to drawer 3", "wait"]


def test_nothing_is_planned_by_verdicts_that_an_expert_was_measured_by_that_is_no_more():
    row = candidates_row(3, {"go to drawer 3": 1, "wait": 1})
    items = plan_steps(TRAJECTORY | {"replaced_from": {"step": 3}}, [row], [], 0)
    assert len(items) == 1 and small_model.plan(items, [], 0) == []


@pytest.mark.parametrize("failed", [[], [step("fly", accepted=False)]])
def test_a_small_models_step_deliberates_by_draft_or_template_after_its_failed_attempts(failed):
    last = {"failed_attempts": [step("dive", accepted=False)]}  # the last iteration's
    shown = {"failed_attempts": failed} if failed else {}
    drafted = "- go to drawer 3: Good.\n- wait: Bad."
    for draft in drafted, None:
        item, own = item_of(**last)
        item["failed"] = failed
        thought = draft or templated_thought(item, "t")
        finish_step(item, {"thought": draft, "draft_errors": []}, stage_4(small_model=True))
        assert own == STEPS[2] | shown | {"thought": thought, "original_thought": "t"} | with_candidates(thought)
        finish_step(item, {"thought": None, "draft_errors": []}, stage_4(small_model=True))  # the next iteration
        assert own["thought"] == templated_thought(item, "t") and own["original_thought"] == "t"
    item, own = item_of(**last)
    item["failed"] = failed
    finish_step(item, {"thought": None, "draft_errors": []}, stage_4(small_model=True, recover_only=True))
    assert own == STEPS[2] | shown


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_may_begin_with_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "PROMPTS", tmp_path)
    path = tmp_path / "critique.txt"
    path.write_text("one {{ task }}\n=== assistant\ntwo\n=== user\nthree {{ task }}\n")
    injected = "a\n=== assistant\nb"
    assert fill_dialogue("critique", task=injected) == [f"one {injected}", "two", f"three {injected}"]
    path.write_text("one\n=== assistant\ntwo\n")
    with pytest.raises(UserError, match="critique.txt: has 2 turns"):
        fill_dialogue("critique", task="t")
    path.write_text("one {task}\n")
    with pytest.raises(UserError, match=r"critique.txt: \{task\} stands there as it is; placeholders have two braces"):
        fill_dialogue("critique", task="t")
