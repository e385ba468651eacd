"""Stage 1: self-consistency action sampling (section 4.2).

    python stage1_sample.py --model runs/x/iter0/model --trajectories runs/x/expert.jsonl --out runs/x/iter1/candidates.jsonl

Replays every expert trajectory and, at each step t, samples N actions from the current policy given the history
h_{t-1} of the expert (equation 3). A step is flagged for deliberation when the samples and the expert's action are not
all the same (equation 4). One row a step:

    {"key": "scienceworld/find-animal/12/step3", "trajectory": "scienceworld/find-animal/12", "step": 3,
     "samples": [{"thought": "...", "action": "focus on bee"}, ... N of them; an action of "" is an invalid output],
     "actions": [{"action": "focus on dove egg", "thought": "...", "source": "expert", "count": 2},
                 {"action": "focus on bee", "thought": "...", "source": "sample", "count": 3}],
     "flagged": true}
"""

from __future__ import annotations

import argparse
import time

from common import (TRAJECTORY, Output, StageOutput, add_engine_options, dialogue, duration, failure, failures_last,
                    generate, make_engine, normalise, progress, prompt_path, read_rows, run_stage, settings_of, share,
                    stable_seed, turn_of, turn_sampling)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--n-samples", type=int, default=5, help="N, sampled actions a step; default: %(default)s")
    parser.add_argument("--explore", type=int, metavar="K", help="sample along K trajectories only, those first that do not "
                        "deliberate yet, and leave the others as they are: rollouts are the longest part of an iteration; "
                        "default: all")
    add_engine_options(parser, model="the current policy", temperature=1.0, max_tokens=512)
    args = parser.parse_args()
    if args.temperature == 0 and args.n_samples > 1:
        parser.error("at --temperature 0 all samples of a step are the same; give it a temperature, or --n-samples 1")
    return args


def to_explore(trajectories: list[dict], count: int | None) -> list[dict]:
    """So many trajectories, those first in which stage 4 has rewritten no thought yet, or all of them at once in a switch, so
    that each iteration goes on where the last one stopped; all of them for None."""
    if count is None:
        return trajectories

    def explored(row: dict) -> bool:
        return "switched" not in row and any("plain" in step for step in row["steps"])
    return sorted(trajectories, key=explored)[:count]


def distinct_actions(step: dict, samples: list[dict]) -> list[dict]:
    """The candidate set {a^(1), ..., a^(N), a_t}: the expert's action first, then each new action in sampling order,
    with the first thought that was sampled with it and how often it was sampled. Invalid outputs are left out."""
    actions = {normalise(step["action"]): {"action": step["action"], "thought": step["thought"], "source": "expert",
                                           "count": 0}}
    for sample in samples:
        if sample["action"]:
            entry = actions.setdefault(normalise(sample["action"]), {
                "action": sample["action"], "thought": sample["thought"], "source": "sample", "count": 0})
            entry["count"] += 1
    return list(actions.values())


def is_flagged(actions: list[dict], samples: list[dict]) -> bool:
    """Equation 4: 1(|{a^(1), ..., a^(N), a_t}| > 1). An invalid output counts as an action of its own."""
    return len(actions) + any(not sample["action"] for sample in samples) > 1


def candidate_row(key: str, trajectory: dict, t: int, outputs: list[Output]) -> dict:
    """The row of step t; one whose request failed, or whose history fills the context, has no samples, says why, and is not
    flagged."""
    if outputs[0].unanswered:
        return {"key": key, "trajectory": trajectory["key"], "step": t, "samples": [],
                "actions": distinct_actions(trajectory["steps"][t - 1], []), "flagged": False, "failed": outputs[0].finish}
    samples = [{name: turn[name] for name in ("thought", "action")} for turn in map(turn_of, outputs)]
    actions = distinct_actions(trajectory["steps"][t - 1], samples)
    return {"key": key, "trajectory": trajectory["key"], "step": t, "samples": samples, "actions": actions,
            "flagged": is_flagged(actions, samples)}


def main() -> None:
    args = parse_arguments()
    started = time.time()
    trajectories = to_explore(read_rows(args.trajectories, TRAJECTORY), args.explore)
    steps = {f"{row['key']}/step{t}": (row, t) for row in trajectories for t in range(1, len(row["steps"]) + 1)}
    inputs = [args.trajectories, args.model, prompt_path(trajectories[0]["env"])]
    with StageOutput(args.out, settings_of(args), inputs) as output:
        todo = [key for key in steps if key not in output.done]
        engine = make_engine(args) if todo else None  # steps in order: each finds its history in the prefix cache

        def requests():
            for key in todo:
                row, t = steps[key]
                yield key, dialogue(row["env"], row["instruction"], row["steps"][:t - 1]), {
                    **turn_sampling(args.temperature, args.max_tokens), "n": args.n_samples,
                    "seed": stable_seed(args.seed, key)}

        results = failures_last(generate(engine, requests(), args.max_live),
                                lambda result: failure(result[1][0].finish), len(steps))
        for key, outputs in progress(results, total=len(todo), desc="sample"):
            row, t = steps[key]
            output.write(candidate_row(key, row, t, outputs))
        if todo:
            print(engine.usage())
        rows = [output.done[key] for key in steps]
        flagged = [row for row in rows if row["flagged"]]
        invalid = sum(not sample["action"] for row in rows for sample in row["samples"])
        failed = sum("failed" in row for row in rows)
        output.finish(rows, {"flagged": len(flagged), "invalid samples": invalid, "failed": failed})
    print(f"{len(trajectories)} trajectories -> {len(rows)} steps, {share(len(flagged), len(rows))} flagged, "
          f"{sum(len(row['actions']) for row in flagged)} distinct actions in them, "
          f"{share(invalid, len(rows) * args.n_samples)} samples invalid"
          f"{f', {failed} steps without samples: the server failed or the context was full' if failed else ''}; {args.out}; "
          f"{duration(time.time() - started)}")


if __name__ == "__main__":
    run_stage(main)
