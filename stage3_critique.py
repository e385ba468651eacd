"""Stage 3: execution-guided action critique (section 4.3, figure 5).

    python stage3_critique.py --model models/SmolLM2-135M-Instruct --trajectories runs/x/expert.jsonl \\
        --rollouts runs/x/iter1/rollouts.jsonl --out runs/x/iter1/critiques.jsonl

The frozen base model judges every rolled out action in the light of what came of it: c_t ~ pi_base(. | a^_t, e^_t, r_t,
Prompt_c) (equation 5), at temperature 0. The prompt is prompts/critique.txt. What it writes is checked; a critique that
fails is sampled again at temperature 0.5, at the last attempt with its form held by a regular expression that begins with
the verdict, and then replaced by a plain sentence made of validity and reward. One row a rollout, with the same key:

    {"key": "scienceworld/find-animal/12/step3/2", "candidate": "scienceworld/find-animal/12/step3",
     "action": "focus on bee", "critique": "Focusing on the bee is possible here. ...",
     "verdict": "This is possible and leads on to completing the task", "fallback": false, "refused": []}
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter

from common import (GUIDED, REASON, REFUSED, ROLLOUT, TRAJECTORY, Output, StageOutput, UserError, add_engine_options,
                    copies, duration, failure, failures_last, fill_dialogue, first_sentences, generate_checked, held_at_last,
                    is_cut_off, leak_in, literally, make_engine, progress, prompt_path, read_rows, repeats_itself,
                    retry_sampling, run_stage, settings_of, share, steps_text, without_names)

TAG = "Action Evaluation:"
POSSIBLE = re.compile(r"\bis (?:also |indeed |quite )?(?:possible|valid|feasible)\b", re.IGNORECASE)
IMPOSSIBLE = re.compile(r"\bis (?:not|never) (?:possible|valid|feasible)\b|\bis (?:impossible|invalid)\b", re.IGNORECASE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--rollouts", required=True, metavar="JSONL", help="what stage 2 wrote for them")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--attempts", type=int, default=3, help="tries before falling back; default: %(default)s")
    parser.add_argument("--guided", choices=GUIDED, help="for small base models, which cannot judge by themselves: hold "
                        "every try to the form of the last, the verdict that follows from the rollout and the model's "
                        "reason; or verdicts alone, for which no model is asked")
    parser.add_argument("--shown-steps", type=int, metavar="K", help="show only the last K steps of the history and the first "
                        "K of the future, for base models that lose the thread in long prompts; default: all")
    add_engine_options(parser, model="the frozen base model", temperature=0.0, max_tokens=200)
    return parser.parse_args()


def critique_prompt(rollout: dict, trajectory: dict, shown: int | None) -> list[str]:
    """Prompt_c: the task, the history h_{t-1}, the action with the observations that followed, and the final reward. Where
    the action was refused the rollout ended there, so that its reward says nothing of the action."""
    step = int(rollout["candidate"].rsplit("/step", 1)[1])
    end = f"Final reward: {rollout['reward']:.2f} of 1" if rollout["valid"] else "The action was refused; nothing has changed."
    outcome = f"{steps_text(rollout['steps'][:shown])}\n{end}"
    return fill_dialogue("critique", task=trajectory["instruction"], action=rollout["action"], rollout=outcome,
                         history=steps_text(trajectory["steps"][:step - 1], last=shown))


def critique_form(rollout: dict) -> str:
    """The shortest critique as a regular expression, for models that cannot judge by themselves: the verdict is the
    environment's, the reason the model's."""
    return rf"{TAG} {literally(verdict(rollout))}, {REASON}"


def check_critique(rollout: dict, prompt: list[str], output: Output) -> tuple[str, str | None]:
    """(the paragraph after the tag, at most three sentences long; None or why it is of no use)."""
    _, tag, text = output.text.replace("**", "").partition(TAG)  # larger models like their tags in bold
    text = text.strip()
    if not tag:
        return text, "no tag"
    if re.search(r"^\s*(?:[-*]|\d+[.)]) ", text, re.MULTILINE):
        return text, "a list"
    text = first_sentences(text.split("\n\n")[0], 3)
    if len(text.split()) < 5:
        return text, "too short"
    own_words = without_names(text, [rollout["action"]])
    if leak_in(own_words):
        return text, "speaks of the simulation"
    if repeats_itself(own_words):
        return text, "repeats itself"
    if copies(text, prompt):
        return text, "copies the prompt"
    if is_cut_off(text):
        return text, "cut off"
    if (IMPOSSIBLE if rollout["valid"] else POSSIBLE).search(first_sentences(text, 1)):  # others may be of other actions
        return text, "contradicts the environment"
    return text, None


def verdict(rollout: dict) -> str:
    """What the environment says of an action, without its reason: whether it was possible, and what came of it, measured
    by the expert's way from here on. Only what leads to more reward, or to as much in as few steps, leads on: else every
    action that the policy recovers from in the end would be as good as every other."""
    if not rollout["valid"]:
        return REFUSED
    reward, expert_reward = round(rollout["reward"], 3), round(rollout["expert_reward"], 3)
    if (reward, -len(rollout["steps"])) >= (expert_reward, -rollout["expert_steps"]):
        return "This is possible and leads on to completing the task"
    if reward == expert_reward or (rollout["gained"] or 0) > 0:
        return "This is possible, but not the best way to complete the task"
    if rollout["end"] == "wrong focus" and len(rollout["steps"]) == 1:
        return "This is possible, but a grave mistake that ends the task unfinished"
    return "This is possible, but does not lead on to completing the task"


def main() -> None:
    args = parse_arguments()
    started = time.time()
    trajectories = {row["key"]: row for row in read_rows(args.trajectories, TRAJECTORY)}
    rollouts = {row["key"]: row for row in read_rows(args.rollouts, ROLLOUT, may_be_empty=True)
                if not failure(row["end"])}  # there is nothing to judge
    for key, row in rollouts.items():
        row["trajectory"], step = row["candidate"].rsplit("/step", 1)
        if row["trajectory"] not in trajectories:
            raise UserError(f"{args.rollouts}: '{key}' belongs to no trajectory of {args.trajectories}; "
                            "the two files do not belong together, run stages 1 and 2 again")
        expert = trajectories[row["trajectory"]]
        row |= {"expert_reward": expert["reward"], "expert_steps": len(expert["steps"]) - int(step) + 1}

    def prompt(rollout: dict) -> list[str]:
        return critique_prompt(rollout, trajectories[rollout["trajectory"]], args.shown_steps)

    def request(rollout: dict, attempt: int) -> tuple[list[str], dict]:
        return prompt(rollout), retry_sampling(args, rollout["key"], attempt, critique_form(rollout))

    def check(rollout: dict, output: Output) -> tuple[str, str | None]:
        if args.guided and not re.fullmatch(critique_form(rollout), output.text.strip()):
            return output.text, "not in its form"  # of a server that does not know regular expressions, or cut off
        return check_critique(rollout, prompt(rollout), output)

    inputs = [args.trajectories, args.rollouts, prompt_path("critique"), args.model]
    with StageOutput(args.out, settings_of(args), inputs) as output:
        todo = [row for key, row in rollouts.items() if key not in output.done]
        if todo:
            if args.guided == "verdicts":
                engine, results = None, ((rollout, verdict(rollout) + ".", []) for rollout in todo)
            else:
                engine = make_engine(args)
                results = failures_last(generate_checked(engine, todo, request, check, args.attempts, args.max_live),
                                        lambda result: failure((result[2] or [""])[-1]), len(rollouts))
            for rollout, text, refused in progress(results, total=len(todo), desc="critique"):
                output.write({"key": rollout["key"], "candidate": rollout["candidate"], "action": rollout["action"],
                              "critique": text or verdict(rollout) + ".", "verdict": verdict(rollout),
                              "fallback": text is None, "refused": refused})
            if engine:
                print(engine.usage())
        rows = [output.done[key] for key in rollouts]
        fallbacks = sum(row["fallback"] for row in rows)
        reasons = Counter(reason for row in rows for reason in row["refused"])
        held = sum(not row["fallback"] and held_at_last(args, len(row["refused"])) for row in rows)
        output.finish(rows, {"fallbacks": fallbacks, "held to the form": held, "refused attempts": reasons})
    print(f"{len(rows)} critiques, {share(fallbacks, len(rows))} fell back to a plain sentence"
          f"{f', {held} were held to the form' if held else ''}; refused attempts: "
          f"{', '.join(f'{count} {reason}' for reason, count in reasons.most_common()) or 'none'}; {args.out}; "
          f"{duration(time.time() - started)}")


if __name__ == "__main__":
    run_stage(main)
