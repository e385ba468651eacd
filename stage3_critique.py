"""Stage 3: execution-guided action critique (section 4.3, figure 5).

    python stage3_critique.py --model models/SmolLM2-135M-Instruct --trajectories runs/x/expert.jsonl \\
        --rollouts runs/x/iter1/rollouts.jsonl --out runs/x/iter1/critiques.jsonl

The frozen base model judges every rolled out action in the light of what came of it: c_t ~ pi_base(. | a^_t,
e^_t, r_t, Prompt_c) (equation 5), at temperature 0. The prompt is prompts/critique.txt. What it writes is
checked; a critique that fails is sampled again at temperature 0.5, and at last replaced by a sentence made of
validity and reward. One row a rollout:

    {"key": "scienceworld/find-animal/12/step3/1", "task": "scienceworld/find-animal/12", "step": 3, "candidate": 1,
     "text": "Focusing on the bee is possible here. ...",
     "verdict": "This is possible and leads on to completing the task", "used_template": false, "draft_errors": []}

verdict is what the environment says of the action; draft_errors are the reasons why drafts were not used.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Collection

from common import (Kept, Output, Rollout, StageOutput, UserError, dialogue, duration, failure, failures_last, fraction,
                    index_rows, join, my_share, normalise, progress, prompt_path, run_stage, settings_of, tally,
                    without_thinking)
from environments import read_trajectories
from prompts.base_model import (REFUSED, copies, draft_sampling, drafts, fill_dialogue, first_sentences, leak_in,
                                quotes, repeats_itself, steps_text, without_names)
from prompts.engine import add_engine_options, make_engine

TAG = re.compile(r"Action Evaluation\s*[:：]", re.IGNORECASE)
POSSIBLE = re.compile(r"\bis (?:also |indeed |quite )?(?:possible|valid|feasible)\b", re.IGNORECASE)
IMPOSSIBLE = re.compile(r"\bis (?:not|never) (?:possible|valid|feasible)\b|\bis (?:impossible|invalid)\b", re.IGNORECASE)
# "I will now go to the outside." acts; "I will not find it there" and "I will lose a turn, since ..." judge.
ACTS = re.compile(r"(?:(?:now|next|first|then|so),? )?(?:I will|I'll|I shall|I am going to|I'm going to|let me|let us|let's) "
                  r"(?!not |never |likely |probably |be |have |find |need |get |lose |gain |waste |miss )[^,;:]*", re.IGNORECASE)
FINITE = re.compile(r"\b(?:is|are|was|were|would|will|may|might|can|could|should|must|do|does|did|has|have|had|seems?|appears?|"
                    r"makes?|helps?|leads?|brings?|gives?|gets?|wastes?|takes|moves|costs|shows|keeps|leaves|looks|needs|allows|"
                    r"advances|provides|serves|risks|ends|fails|works|contributes|follows|requires)\b|n['’]t\b", re.IGNORECASE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--rollouts", required=True, metavar="JSONL", help="what stage 2 wrote for them")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--attempts", type=int, default=3, help="drafts before the template; 0 asks no model; "
                        "default: %(default)s")
    add_engine_options(parser, model="the frozen base model", temperature=0.0, max_tokens=200)
    return parser.parse_args()


def critique_prompt(rollout: dict, trajectory: dict) -> list[str]:
    """Prompt_c: the environment's prompt, the history h_{t-1}, the action with what followed, and the final
    reward. Where the action was refused the rollout ended there, so that its reward says nothing of the
    action."""
    end = (f"Final reward: {rollout['reward']:.2f} of 1" if rollout["accepted"]
           else "The action was refused; nothing has changed.")
    (task,) = dialogue(trajectory["task"], trajectory["instruction"], [])
    return fill_dialogue("critique", task=task, action=rollout["steps"][0]["action"],
                         rollout=f"{steps_text(rollout['steps'])}\n{end}",
                         history=steps_text(trajectory["steps"][:rollout["step"] - 1]))


def acts(text: str, actions: set[str]) -> bool:
    """Whether the text takes an action instead of judging one: it has a turn's tag, announces an action, opens with one,
    ends its first sentence with one after a colon, or tells what "I" do and states nothing."""
    opening = first_sentences(text, 1).rstrip(".!") or text.split("\n")[0]
    opens_with_action = opening.split(" ")[0].lower() in {action.split()[0] for action in actions} and not FINITE.search(opening)
    return bool(re.search(r"^\W*(?:Action|Thought|Observation)\W*:", text, re.MULTILINE) or ACTS.fullmatch(opening)
                or opens_with_action or normalise(opening.rpartition(":")[2]) in actions
                or re.match(r"I \w+", opening) and not FINITE.search(text))


def judges_another(text: str, action: str, others: set[str]) -> bool:
    """Whether the first sentence names one of the other actions, and not the one that it should judge."""
    opening = first_sentences(text, 1)
    return not names(opening, action) and any(names(opening, other) for other in others)


def names(text: str, action: str) -> bool:
    """Whether a text names an action, as `go to shelf 2` or `going to the shelf 2`."""
    verb, *rest = map(re.escape, action.split())
    forms = rf"(?:{verb}|{verb.removesuffix('e')}ing|{verb}{verb[-1]}ing)"
    return bool(re.search(rf"\b{r'[^A-Za-z0-9]+(?:(?:the|a|an|my) )?'.join([forms, *rest])}(?!\w)", text, re.IGNORECASE))


def check_critique(rollout: dict, prompt: list[str], output: Output, others: Collection[str] = ()) -> tuple[str, str | None]:
    """(the paragraph after the tag, at most three sentences long; None or why it is of no use).

    others: further actions of the task, such as the trajectory's, to tell whether another one is judged.
    """
    action = rollout["steps"][0]["action"]
    _, *answer = TAG.split(without_thinking(output.text).replace("**", ""), maxsplit=1)
    if not answer:
        return without_thinking(output.text), "no tag"
    text = TAG.split(answer[0])[0].strip().strip("`").strip()
    if re.search(r"^\s*(?:[-*•]|\d+[.)]) ", text, re.MULTILINE):
        return text, "a list"
    known = {normalise(step["action"]) for step in rollout["steps"]}.union(map(normalise, others)) - {""}
    if acts(text, known):
        return text, "acts instead of judging"
    text = first_sentences(text.split("\n\n")[0], 3)
    if len(text.split()) < 5:
        return text, "too short"
    if judges_another(text, action, known - {normalise(action)}):
        return text, "judges another action"
    own_words = without_names(text, [action])
    if leak_in(own_words):
        return text, "speaks of the simulation"
    if repeats_itself(own_words):
        return text, "repeats itself"
    if copies(text, prompt) or quotes(own_words, prompt):
        return text, "copies the prompt"
    if (IMPOSSIBLE if rollout["accepted"] else POSSIBLE).search(first_sentences(text, 1)):  # others may be of other actions
        return text, "contradicts the environment"
    return text, None


def verdict(rollout: dict) -> str:
    """What the environment says of an action: whether it was possible, and what came of it, measured by the
    expert's way from here on. Only what leads to more reward, or to as much in as few steps, leads on: else
    every action that the policy recovers from in the end would be as good as every other."""
    if not rollout["accepted"]:
        return REFUSED
    reward, expert_reward = round(rollout["reward"], 3), round(rollout["expert_reward"], 3)
    if (reward, -len(rollout["steps"])) >= (expert_reward, -rollout["expert_steps_left"]):
        return "This is possible and leads on to completing the task"
    if reward == expert_reward or rollout["action_reward"] > 0:
        return "This is possible, but not the best way to complete the task"
    if len(rollout["steps"]) == 1 and rollout["end"] not in ("success", "turn limit", "context limit"):
        return "This is possible, but a grave mistake that ends the task unfinished"
    return "This is possible, but does not lead on to completing the task"


def critique_row(rollout: dict, text: str | None, errors: list[str]) -> dict:
    """A critique, or where no draft was of use (text is None) the verdict in its place."""
    return {**{name: rollout[name] for name in ("key", "task", "step", "candidate")},
            "text": text or f"{verdict(rollout)}.", "verdict": verdict(rollout), "used_template": text is None,
            "draft_errors": errors}


def critique(args: argparse.Namespace) -> None:
    """Write a critique of every rollout that did not fail."""
    started = time.time()
    trajectories = {row["task"]: row for row in read_trajectories(args.trajectories)}
    actions: dict[str, set[str]] = {task: {step["action"] for step in row["steps"]} for task, row in trajectories.items()}
    rollouts = Kept()
    judged = {}  # {key: task} of those that did not fail
    for row in index_rows(args.rollouts, Rollout, rollouts):
        if row["task"] not in trajectories:
            raise UserError(f"{args.rollouts}: '{row['key']}' belongs to no trajectory of {args.trajectories}; "
                            "the two files do not belong together, run stages 1 and 2 again")
        if not failure(row["end"]):
            judged[row["key"]] = row["task"]
            actions[row["task"]].add(row["steps"][0]["action"])

    def request(key: str, attempt: int) -> tuple[list[str], dict]:
        return critique_prompt(rollouts[key], trajectories[judged[key]]), draft_sampling(args, key, attempt)

    def check(key: str, output: Output) -> tuple[str, str | None]:
        rollout = rollouts[key]
        return check_critique(rollout, critique_prompt(rollout, trajectories[judged[key]]), output, actions[judged[key]])

    inputs = [args.trajectories, args.rollouts, prompt_path("critique"), args.model]
    with StageOutput(args.out, settings_of(args), inputs, [critique]) as output:
        share = my_share(judged)
        todo = [key for key in share if key not in output.done]
        engine = make_engine(args) if todo and args.attempts else None
        results = failures_last(drafts(engine, todo, request, check, args.attempts, args.max_live),
                                lambda result: failure((result[2] or [""])[-1]), len(share))
        for key, text, errors in progress(results, total=len(todo), desc="critique"):
            output.write(critique_row(rollouts[key], text, errors))
        if engine:
            print(engine.usage())
            output.asked = engine.asked(len(todo), time.time() - started)
        if not join((output, judged)):
            return
        rows = [output.done[key] for key in judged]
        templates = sum(row["used_template"] for row in rows)
        retried = sum(bool(row["draft_errors"]) and not row["used_template"] for row in rows)
        reasons = Counter(reason for row in rows for reason in row["draft_errors"])
        output.finish(rows, {"retried": retried, "templates": templates, "draft errors": reasons})
    print(f"{len(rows)} critiques, {fraction(retried, len(rows))} drafted again with success, {fraction(templates, len(rows))} from "
          "the template; drafts not used: "
          f"{tally(reasons)}; {args.out}; "
          f"{duration(time.time() - started)}")


def main() -> None:
    critique(parse_arguments())


if __name__ == "__main__":
    run_stage(main)
