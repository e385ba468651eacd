"""Stage 2: rolling out every distinct action of the flagged steps (section 4.3).

    python stage2_rollout.py --model runs/x/iter0/model --trajectories runs/x/expert.jsonl \\
        --candidates runs/x/iter1/candidates.jsonl --out runs/x/iter1/rollouts.jsonl

For a sampled action a^_t of a flagged step the environment is brought to the expert's state at t, executes the action,
and the current policy plays on at temperature 1 to the end of the episode or the turn limit: e^_t ~ pi(. | h_{t-1}, a^_t)
with final reward r_t. The expert's own action needs no rollout: its execution is the rest of the expert trajectory. The
rollout of an action that the environment refuses ends there: all is as it was, and what the policy would do then says
nothing of the action (and was a third of all turns of a small model). With --refusals K it ends when an action is accepted
or K have been refused: what the policy tries in vain, which stage 4's --recover shows. One row a distinct action, joined to
its candidate row by key:

    {"key": "scienceworld/find-animal/12/step3/2", "candidate": "scienceworld/find-animal/12/step3",
     "action": "focus on bee", "thought": "...", "source": "sample", "valid": true, "reward": 0.5, "gained": 0.0,
     "end": "wrong focus", "steps": [{"thought": "...", "action": "focus on bee", "observation": "..."}, ... to the end]}

`gained` is what the action itself added to the reward; null for the expert's, whose steps have none.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time

from common import (CANDIDATES, TRAJECTORY, EnvironmentPool, Episode, StageOutput, UserError, add_engine_options,
                    check_model, duration, failure, failures_last, is_valid, make_engine, normalise, play, progress,
                    read_rows, run_stage, settings_of, share, turn_inputs, turn_sampling, turns_of)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--candidates", required=True, metavar="JSONL", help="what stage 1 wrote for them")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    parser.add_argument("--extra-turns", type=int, metavar="K", help="end a rollout K turns after the expert would have been "
                        "done: by then an action has led astray, and a small policy goes in circles; default: never")
    parser.add_argument("--refusals", type=int, default=1, metavar="K", help="let the policy try on where the sampled action "
                        "is refused, until K in a row have been; default: %(default)s")
    add_engine_options(parser, model="the current policy", temperature=1.0, max_tokens=512)
    return parser.parse_args()


def expert_rollout(key: str, candidate: dict, action: dict, trajectory: dict) -> dict:
    """The expert's action, executed: the rest of the expert trajectory and its reward."""
    rest = trajectory["steps"][candidate["step"] - 1:]
    return rollout_row(key, candidate, action, rest, trajectory["reward"], None, "expert")


def sampled_rollout(candidate: dict, action: dict, episode: Episode) -> dict:
    """The sampled action, executed after h_{t-1}, and what the policy made of it; of a refused one what it tried in vain."""
    before, steps = episode.steps[:candidate["step"] - 1], episode.steps[candidate["step"] - 1:]
    gained = steps[0]["reward"] - (before[-1]["reward"] if before else 0.0) if steps else 0.0
    refused = list(itertools.takewhile(lambda step: not is_valid(step["observation"]), steps))
    if refused and not failure(episode.end):
        return rollout_row(episode.key, candidate, action, refused, refused[-1]["reward"], gained, "refused")
    return rollout_row(episode.key, candidate, action, steps, episode.reward, gained, episode.end)


def branch(key: str, candidate: dict, action: dict, trajectory: dict, extra_turns: int | None, refusals: int) -> Episode:
    """An episode that replays h_{t-1}, executes the sampled action and leaves the rest to the policy, if it is accepted."""
    limit = math.inf if extra_turns is None else len(trajectory["steps"]) + extra_turns
    prefix = trajectory["steps"][:candidate["step"] - 1]
    sampled = {"thought": action["thought"], "action": action["action"]}
    return Episode(key, trajectory["task"], forced=[*prefix, sampled], tried=candidate["step"], refusals=refusals,
                   limit=limit)


def determined_by(candidate: dict, action: dict, trajectory: dict) -> tuple:
    """What a rollout depends on: the task, h_{t-1} and a^_t. Several experts of one task share their first steps."""
    prefix = trajectory["steps"][:candidate["step"] - 1]
    return trajectory["task"], *turns_of(prefix), normalise(action["action"])


def rollout_row(key: str, candidate: dict, action: dict, steps: list[dict], reward: float,
                gained: float | None, end: str) -> dict:
    """A rollout that failed may have no steps."""
    return {"key": key, "candidate": candidate["key"], "action": action["action"], "thought": action["thought"],
            "source": action["source"], "reward": reward, "gained": gained, "end": end,
            "valid": bool(steps) and is_valid(steps[0]["observation"]),
            "steps": [{name: step[name] for name in ("thought", "action", "observation")} for step in steps]}


def main() -> None:
    args = parse_arguments()
    started = time.time()
    trajectories = {row["key"]: row for row in read_rows(args.trajectories, TRAJECTORY)}
    check_model(args.candidates, args.model)
    work = {}
    for candidate in read_rows(args.candidates, CANDIDATES):
        trajectory = trajectories.get(candidate["trajectory"])
        if trajectory is None or candidate["step"] > len(trajectory["steps"]):
            raise UserError(f"{args.candidates}: '{candidate['key']}' is no step of {args.trajectories}; "
                            "the two files do not belong together, run stage 1 again")
        if candidate["flagged"]:
            for place, action in enumerate(candidate["actions"]):
                work[f"{candidate['key']}/{place}"] = (candidate, action, trajectory)
    env = next(iter(trajectories.values()))["env"]
    strays = 0
    inputs = [args.trajectories, args.candidates, args.model, *turn_inputs(env)]
    first: dict[tuple, str] = {}  # {what determines a sampled action's rollout: the key of the first such}
    for key, item in work.items():
        if item[1]["source"] == "sample":
            first.setdefault(determined_by(*item), key)
    with StageOutput(args.out, settings_of(args), inputs) as output:
        todo = [branch(key, *work[key], args.extra_turns, args.refusals) for key in first.values() if key not in output.done]
        if todo:
            with EnvironmentPool(env, min(args.max_live, len(todo))) as pool:
                sampling = turn_sampling(args.temperature, args.max_tokens)
                engine = make_engine(args)
                episodes = failures_last(play(todo, engine, pool, sampling, args.seed, args.max_turns),
                                         lambda episode: failure(episode.end), len(work))
                for episode in progress(episodes, total=len(todo), desc="rollout"):
                    candidate, action, trajectory = work[episode.key]
                    t = candidate["step"]
                    if len(episode.steps) < t and not failure(episode.end):
                        raise UserError(f"{args.trajectories}: '{trajectory['key']}' ended at step {len(episode.steps)} "
                                        f"when it was replayed ({episode.end}); is --max-turns below its length?")
                    strays += any(mine["observation"] != theirs["observation"]
                                  for mine, theirs in zip(episode.steps[:t - 1], trajectory["steps"], strict=False))
                    output.write(sampled_rollout(candidate, action, episode))
                print(engine.usage())
        rows = [expert_rollout(key, *item) if item[1]["source"] == "expert"
                else output.done[first[determined_by(*item)]] | {"key": key, "candidate": item[0]["key"],
                                                                 "action": item[1]["action"]}
                for key, item in work.items()]
        failed = sum(bool(failure(row["end"])) for row in rows)
        sampled = [row for row in rows if row["source"] == "sample" and not failure(row["end"])]
        refused = sum(not row["valid"] for row in sampled)
        better = sum(row["reward"] > work[row["key"]][2]["reward"] for row in sampled)
        output.finish(rows, {"sampled": len(sampled), "refused": refused, "beat the expert": better, "failed": failed})
    average = sum(row["reward"] for row in sampled) / len(sampled) if sampled else 0
    print(f"{len(sampled)} sampled actions rolled out: {share(refused, len(sampled))} refused by the environment, average "
          f"reward {average:.2f}, {better} beat the expert, {strays} met a state unlike the expert's"
          f"{f'; {failed} more failed' if failed else ''}; {args.out}; {duration(time.time() - started)}")


if __name__ == "__main__":
    run_stage(main)
