"""Stage 3: execution-guided action critique (section 4.3, figure 5).

    python stage3_critique.py --model models/SmolLM2-135M-Instruct --trajectories runs/x/expert.jsonl \\
        --rollouts runs/x/iter1/rollouts.jsonl --out runs/x/iter1/critiques.jsonl

The frozen base model judges every rolled out action in the light of what came of it: c_t ~ pi_base(. | a^_t, e^_t, r_t,
Prompt_c) (equation 5), at temperature 0. The prompt is prompts/critique.txt. What it writes is checked; a critique that
fails is sampled again at temperature 0.5, its form then held by a regular expression, and after the last attempt
replaced by a plain sentence made of validity and reward. One row a rollout, with the same key:

    {"key": "scienceworld/find-animal/12/step3/2", "candidate": "scienceworld/find-animal/12/step3",
     "action": "focus on bee", "critique": "Focusing on the bee is possible here. ...", "fallback": false, "refused": []}
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter

from common import (ROLLOUT, TRAJECTORY, Output, StageOutput, UserError, add_engine_options, duration, fill_prompt,
                    first_sentences, generate_checked, history_text, leak_in, make_engine, progress, prompt_path,
                    read_rows, repeats_itself, retry_sampling, run_stage, share)

TAG = "Action Evaluation:"
SENTENCE = r"[A-Z][^\n.!?*]{20,160}\."
FORM = f"{TAG} {SENTENCE} {SENTENCE} {SENTENCE}"  # figure 5's output format, for models that do not find it by themselves


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--rollouts", required=True, metavar="JSONL", help="what stage 2 wrote for them")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--attempts", type=int, default=3, help="tries before falling back; default: %(default)s")
    add_engine_options(parser, model="the frozen base model", temperature=0.0, max_tokens=200)
    return parser.parse_args()


def critique_prompt(rollout: dict, trajectory: dict) -> str:
    """Prompt_c: the task, the history h_{t-1}, the action with the observations that followed, and the final reward."""
    step = int(rollout["candidate"].rsplit("/step", 1)[1])
    outcome = f"{history_text(rollout['steps'])}\nFinal reward: {rollout['reward']:.2f} of 1"
    return fill_prompt("critique", task=trajectory["instruction"], history=history_text(trajectory["steps"][:step - 1]),
                       action=rollout["action"], rollout=outcome)


def check_critique(rollout: dict, output: Output) -> tuple[str, str | None]:
    """(the paragraph after the tag, at most three sentences long; None or why it is of no use)."""
    _, tag, text = output.text.partition(TAG)
    text = text.strip()
    if not tag:
        return text, "no tag"
    if re.search(r"^\s*(?:[-*]|\d+[.)]) ", text, re.MULTILINE):
        return text, "a list"
    text = first_sentences(text.split("\n\n")[0], 3)
    if len(text.split()) < 5:
        return text, "too short"
    if leak_in(text):
        return text, "speaks of the simulation"
    if repeats_itself(text):
        return text, "repeats itself"
    return text, None


def factual_critique(rollout: dict) -> str:
    """What can be said without the model: whether the action was possible, and how the episode ended."""
    if not rollout["valid"]:
        return "This is not possible in the current situation, so it would only waste a turn."
    if rollout["reward"] >= 0.999:
        return "This is possible here and leads on to completing the task."
    if rollout["reward"] > 0:
        return f"This is possible here, but tends to get only {100 * rollout['reward']:.0f} percent of the task done."
    return "This is possible here, but tends to get nothing of the task done."


def main() -> None:
    args = parse_arguments()
    started = time.time()
    trajectories = {row["key"]: row for row in read_rows(args.trajectories, TRAJECTORY)}
    rollouts = {row["key"]: row for row in read_rows(args.rollouts, ROLLOUT)}
    for key, row in rollouts.items():
        row["trajectory"] = row["candidate"].rsplit("/step", 1)[0]
        if row["trajectory"] not in trajectories:
            raise UserError(f"{args.rollouts}: '{key}' belongs to no trajectory of {args.trajectories}; "
                            "the two files do not belong together, run stages 1 and 2 again")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "max_live")}

    def request(rollout: dict, attempt: int) -> tuple[list[str], dict]:
        form = {"regex": FORM} if attempt else {}
        prompt = critique_prompt(rollout, trajectories[rollout["trajectory"]])
        return [prompt], retry_sampling(args, rollout["key"], attempt) | form

    with StageOutput(args.out, settings, [args.trajectories, args.rollouts, prompt_path("critique")]) as output:
        todo = [row for key, row in rollouts.items() if key not in output.done]
        if todo:
            results = generate_checked(make_engine(args), todo, request, check_critique, args.attempts, args.max_live)
            for rollout, text, refused in progress(results, total=len(todo), desc="critique"):
                output.write({"key": rollout["key"], "candidate": rollout["candidate"], "action": rollout["action"],
                              "critique": text or factual_critique(rollout), "fallback": text is None,
                              "refused": refused})
        rows = [output.done[key] for key in rollouts]
        output.finish(rows)
    fallbacks = sum(row["fallback"] for row in rows)
    reasons = Counter(reason for row in rows for reason in row["refused"])
    print(f"{len(rows)} critiques, {share(fallbacks, len(rows))} fell back to a plain sentence; refused attempts: "
          f"{', '.join(f'{count} {reason}' for reason, count in reasons.most_common()) or 'none'}; {args.out}; "
          f"{duration(time.time() - started)}")


if __name__ == "__main__":
    run_stage(main)
