"""Stage 2: rolling out every distinct action of the flagged steps (section 4.3).

    python stage2_rollout.py --model runs/x/iter0/model --trajectories runs/x/expert.jsonl \\
        --candidates runs/x/iter1/candidates.jsonl --out runs/x/iter1/rollouts.jsonl

For a sampled action a^_t of a flagged step the environment is brought to the expert's state at t, executes the
action, and the current policy plays on at temperature 1 to the end of the episode or the turn limit: e^_t ~
pi(. | h_{t-1}, a^_t) with final reward r_t. The expert's own action needs no rollout: its execution is the rest
of the expert trajectory. The rollout of an action that the environment refuses ends there: nothing has changed,
and what the policy would do then says nothing of the action. One row a candidate:

    {"key": "scienceworld/find-animal/12/step3/1", "task": "scienceworld/find-animal/12", "step": 3, "candidate": 1,
     "steps": [{"thought": "...", "action": "focus on bee", "observation": "...", "reward": 0.5, "accepted": true}, ...],
     "reward": 0.5, "accepted": true, "end": "wrong focus", "expert_reward": 1.0, "expert_steps_left": 4,
     "action_reward": 0.0}

candidate is its place in the step's candidates, steps go from its action to the end, action_reward is what the
action itself added to the reward, and the expert's figures are what the trajectory has from this step on.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from common import (Candidates, StageOutput, UserError, check_model, duration, failure, failures_last, fraction, join, label_of,
                    my_share, progress, read_rows, run_stage, settings_of, turn_sampling)
from environments import file_of, files_of, read_trajectories, turn_limit
from environments.workers import EnvironmentPool, Playing, add_workers_option, play, workers_of
from prompts.base_model import small_model
from prompts.engine import add_engine_options, make_engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    parser.add_argument("--candidates", required=True, metavar="JSONL", help="what stage 1 wrote for them")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    parser.add_argument("--small-model", action="store_true", help="let the policy try on where the candidate is refused, "
                        "up to four times, for stage 4 to show (prompts/small_model.py)")
    add_engine_options(parser, model="the current policy", temperature=1.0, max_tokens=512)
    add_workers_option(parser)
    return parser.parse_args()


def branch(candidate: dict, trajectory: dict, step: int) -> list[dict]:
    """What is played as it is: h_{t-1} and the sampled action. The rest is the policy's."""
    return [*trajectory["steps"][:step - 1], {"thought": candidate["thought"], "action": candidate["action"]}]


def refused(steps: list[dict], step: int) -> str | None:
    """Why a rollout ends early: the environment refused its candidate."""
    return "refused" if len(steps) == step and not steps[-1]["accepted"] else None


def rollout_row(row: dict, place: int, trajectory: dict, steps: list[dict], reward: float, end: str) -> dict:
    """The row of a candidate, from all steps of its episode. One that failed may have no step of its own."""
    t = row["step"]
    before = steps[t - 2]["reward"] if 1 < t <= len(steps) + 1 else 0.0
    own = [{name: step[name] for name in ("thought", "action", "observation", "reward", "accepted", "candidates")
            if name in step} for step in steps[t - 1:]]
    return {"key": f"{row['key']}/{place}", "task": row["task"], "step": t, "candidate": place, "steps": own,
            "reward": reward, "accepted": bool(own) and own[0]["accepted"], "end": end,
            "expert_reward": trajectory["reward"], "expert_steps_left": len(trajectory["steps"]) - t + 1,
            "action_reward": own[0]["reward"] - before if own else 0.0}


def sampled_rollout(row: dict, place: int, trajectory: dict, episode: Playing) -> dict:
    """What the policy made of a sampled action; of a refused one, its attempts until one was accepted."""
    steps, end = episode.steps, episode.end
    if not failure(end) and not steps[row["step"] - 1]["accepted"]:
        accepted = next((t for t in range(row["step"], len(steps)) if steps[t]["accepted"]), len(steps))
        steps, end = steps[:accepted], "refused"
    reward = episode.reward if steps is episode.steps else steps[-1]["reward"]
    return rollout_row(row, place, trajectory, steps, reward, end)


def expert_rollout(row: dict, trajectory: dict) -> dict:
    """The expert's action, executed: the rest of the expert trajectory and its reward."""
    return rollout_row(row, 0, trajectory, trajectory["steps"], trajectory["reward"], "expert")


def read_inputs(args: argparse.Namespace) -> tuple[dict, dict]:
    """({task: trajectory}, {key of a rollout: (candidates row, place)}) of the flagged steps."""
    trajectories = {row["task"]: row for row in read_trajectories(args.trajectories)}
    check_model(args.candidates, args.model)
    work = {}
    for row in read_rows(args.candidates, Candidates):
        if row["task"] not in trajectories or row["step"] > len(trajectories[row["task"]]["steps"]):
            raise UserError(f"{args.candidates}: '{row['key']}' is no step of {args.trajectories}; "
                            "the two files do not belong together, run stage 1 again")
        if row["flagged"]:
            work |= {f"{row['key']}/{place}": (row, place) for place in range(len(row["candidates"]))}
    return trajectories, work


def left_the_expert(episode: Playing, trajectory: dict, t: int, path: str) -> bool:
    """Whether h_{t-1} was not answered as in the trajectory when it was replayed. Raises UserError where it
    ended the episode."""
    if len(episode.steps) < t and not failure(episode.end):
        raise UserError(f"{path}: '{trajectory['key']}' ended at step {len(episode.steps)} when it was replayed "
                        f"({episode.end}); is --max-turns below its length?")
    return any(mine["observation"] != theirs["observation"]
               for mine, theirs in zip(episode.steps[:t - 1], trajectory["steps"], strict=False))


def counted(row: dict, counts: Counter) -> dict:
    """The row, entered into the counts of a whole stage."""
    if failure(row["end"]):
        counts.update({"failed": 1})
    elif row["candidate"]:
        counts.update({"sampled": 1, "refused": not row["accepted"], "reward": row["reward"],
                       "beat the expert": row["reward"] > row["expert_reward"]})
    return row


def roll_out(args: argparse.Namespace) -> None:
    """Roll out every candidate of every flagged step."""
    started = time.time()
    trajectories, work = read_inputs(args)
    label = label_of(next(iter(trajectories)))
    stop = small_model().four_refused if args.small_model else refused
    inputs = [args.trajectories, args.candidates, args.model, *files_of(label)]
    code = [roll_out, file_of(label), *([stop] if args.small_model else [])]
    strays = 0
    with StageOutput(args.out, settings_of(args), inputs, code) as output:
        def episode_of(key: str) -> Playing:
            row, place = work[key]
            return Playing(key, row["task"], turn_limit(row["task"], args.max_turns),
                           branch(row["candidates"][place], trajectories[row["task"]], row["step"]),
                           lambda steps: stop(steps, row["step"]))

        sampled = {key: row["task"] for key, (row, place) in work.items() if not row["candidates"][place]["from_expert"]}
        share = my_share(sampled)
        todo = [key for key in share if key not in output.done]
        if todo:
            with EnvironmentPool(label, workers_of(args, len(todo))) as pool:
                engine = make_engine(args)
                sampling = turn_sampling(args.temperature, args.max_tokens)
                played = failures_last(play(map(episode_of, todo), engine, pool, sampling, args.seed),
                                       lambda episode: failure(episode.end), len(share))
                for episode in progress(played, total=len(todo), desc="rollout"):
                    row, place = work[episode.key]
                    trajectory = trajectories[row["task"]]
                    strays += left_the_expert(episode, trajectory, row["step"], args.trajectories)
                    output.write(sampled_rollout(row, place, trajectory, episode))
                print(engine.usage())
                output.asked = engine.asked(len(todo), time.time() - started)
        if not join((output, sampled)):
            return
        counts = Counter({name: 0 for name in ("sampled", "refused", "beat the expert", "reward", "failed")})
        output.finish((counted(output.done.get(key) or expert_rollout(row, trajectories[row["task"]]), counts)
                       for key, (row, _) in work.items()), counts)
    print(f"{counts['sampled']} sampled actions rolled out: {fraction(counts['refused'], counts['sampled'])} refused by the "
          f"environment, average reward {counts['reward'] / max(1, counts['sampled']):.2f}, {counts['beat the expert']} beat the "
          f"expert, {strays} met a state unlike the expert's; {counts['failed']} failed; {args.out}; "
          f"{duration(time.time() - started)}")


def main() -> None:
    roll_out(parse_arguments())


if __name__ == "__main__":
    run_stage(main)
