"""Stage 1: self-consistency action sampling (section 4.2).

    python stage1_sample.py --model runs/x/iter0/model --trajectories runs/x/expert.jsonl --out runs/x/iter1/candidates.jsonl

Replays every expert trajectory and, at each step t, samples N actions from the current policy given the history
h_{t-1} of the expert (equation 3). A step is flagged for deliberation when the samples and the expert's action
are not all the same (equation 4). One row a step; the expert's action is its candidate 0:

    {"key": "scienceworld/find-animal/12/step3", "task": "scienceworld/find-animal/12", "step": 3,
     "candidates": [{"action": "focus on dove egg", "thought": "...", "count": 2, "from_expert": true},
                    {"action": "focus on bee", "thought": "...", "count": 3, "from_expert": false}],
     "invalid": 0, "flagged": true}

count says how often an action was sampled; invalid, how many samples had no action.
"""

from __future__ import annotations

import argparse
import time

from common import (Output, StageOutput, dialogue, duration, failure, failures_last, fraction, generate, join, label_of,
                    my_share, normalise, progress, prompt_path, run_stage, settings_of, stable_seed, turn_of, turn_sampling)
from environments import read_trajectories, turn_limit
from prompts.engine import add_engine_options, make_engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--n-samples", type=int, default=5, help="N, sampled actions a step; default: %(default)s")
    add_engine_options(parser, model="the current policy", temperature=1.0, max_tokens=512)
    args = parser.parse_args()
    if args.temperature == 0 and args.n_samples > 1:
        parser.error("at --temperature 0 all samples of a step are the same; give it a temperature, or --n-samples 1")
    return args


def distinct_actions(step: dict, samples: list[dict]) -> list[dict]:
    """The candidate set {a^(1), ..., a^(N), a_t}: the expert's action first, then each new action in sampling
    order, with the first thought that was sampled with it and how often it was sampled. Samples without an
    action are left out."""
    candidates = {normalise(step["action"]): {"action": step["action"], "thought": step["thought"], "count": 0,
                                              "from_expert": True}}
    for sample in samples:
        if sample["action"]:
            candidate = candidates.setdefault(normalise(sample["action"]), {
                "action": sample["action"], "thought": sample["thought"], "count": 0, "from_expert": False})
            candidate["count"] += 1
    return list(candidates.values())


def is_flagged(candidates: list[dict], invalid: int) -> bool:
    """Equation 4: 1(|{a^(1), ..., a^(N), a_t}| > 1). An invalid sample counts as an action of its own."""
    return len(candidates) + bool(invalid) > 1


def candidate_row(key: str, trajectory: dict, t: int, outputs: list[Output]) -> dict:
    """The row of step t. One whose request failed, or whose history fills the context, says why and is not
    flagged."""
    failed = {"failed": outputs[0].finish} if outputs[0].unanswered else {}
    samples = [] if failed else [turn_of(output) for output in outputs]
    candidates = distinct_actions(trajectory["steps"][t - 1], samples)
    invalid = sum(not sample["action"] for sample in samples)
    return {"key": key, "task": trajectory["task"], "step": t, "candidates": candidates, "invalid": invalid,
            "flagged": is_flagged(candidates, invalid)} | failed


def sample(args: argparse.Namespace) -> None:
    """Sample N actions at every step of every trajectory."""
    started = time.time()
    trajectories = read_trajectories(args.trajectories)
    # A published trajectory may be longer than an agent's turn limit: what comes after it nobody has to decide.
    steps = {f"{row['key']}/step{t}": (row, t) for row in trajectories
             for t in range(1, min(len(row["steps"]), turn_limit(row["task"])) + 1)}
    inputs = [args.trajectories, args.model, prompt_path(label_of(trajectories[0]["task"]))]
    with StageOutput(args.out, settings_of(args), inputs, [sample]) as output:
        share = my_share({key: row["task"] for key, (row, _) in steps.items()})
        todo = [key for key in share if key not in output.done]  # in order: each step finds its history in the prefix cache
        engine = make_engine(args) if todo else None

        def requests():
            for key in todo:
                row, t = steps[key]
                yield key, dialogue(row["task"], row["instruction"], row["steps"][:t - 1]), {
                    **turn_sampling(args.temperature, args.max_tokens), "n": args.n_samples,
                    "seed": stable_seed(args.seed, key)}

        results = failures_last(generate(engine, requests(), args.max_live),
                                lambda result: failure(result[1][0].finish), len(share))
        for key, outputs in progress(results, total=len(todo), desc="sample"):
            output.write(candidate_row(key, *steps[key], outputs))
        if todo:
            print(engine.usage())
            output.asked = engine.asked(len(todo), time.time() - started)
        if not join((output, steps)):
            return
        rows = [output.done[key] for key in steps]
        counts = {"flagged": sum(row["flagged"] for row in rows), "invalid samples": sum(row["invalid"] for row in rows),
                  "failed": sum("failed" in row for row in rows)}
        output.finish(rows, counts)
    failed = f", {counts['failed']} steps without samples: the server failed or the context was full" * bool(counts["failed"])
    print(f"{len(trajectories)} trajectories -> {len(rows)} steps, {fraction(counts['flagged'], len(rows))} flagged, "
          f"{sum(len(row['candidates']) for row in rows if row['flagged'])} distinct actions in them, "
          f"{fraction(counts['invalid samples'], len(rows) * args.n_samples)} samples invalid{failed}; {args.out}; "
          f"{duration(time.time() - started)}")


def main() -> None:
    sample(parse_arguments())


if __name__ == "__main__":
    run_stage(main)
