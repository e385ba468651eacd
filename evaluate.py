"""Evaluation: average reward at temperature 0 on the seen and unseen test splits (section 5.1, figures 7 and 8).

    python evaluate.py run --model runs/x/iter1/model --env scienceworld --out runs/x/iter1
    python evaluate.py report runs/x

`run` plays every test task once and writes OUT/eval-seen.jsonl and OUT/eval-unseen.jsonl, one episode a row with its
whole transcript, and prints a line for each: average reward, reward a step and deliberation rate (section 6.3), tokens a
task (section 6.5).

    {"key": "scienceworld/find-animal/225", "env": "scienceworld", "task": "...", "split": "unseen", "instruction": "...",
     "reward": 0.5, "end": "turn limit", "tokens": 211,
     "steps": [{"thought": "...", "action": "look around", "text": "Thought: ...", "tokens": 21, "observation": "...",
                "reward": 0.1}, ...]}

`report` prints the average rewards of all models of a run side by side, and what the stages counted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import (CANDIDATES, CRITIQUE, ENVIRONMENTS, EPISODE, PROMPTS, TRAJECTORY, EnvironmentPool, Episode,
                    StageOutput, UserError, add_engine_options, duration, environment_of, is_deliberation, list_tasks,
                    make_engine, play, progress, prompt_path, read_rows, run_stage, share)

TEST_SPLITS = ("seen", "unseen")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="play the test tasks")
    run.add_argument("--env", required=True, choices=ENVIRONMENTS)
    run.add_argument("--out", required=True, metavar="FOLDER", help="gets eval-SPLIT.jsonl for each split")
    run.add_argument("--splits", default=",".join(TEST_SPLITS), metavar="A,B", help="default: %(default)s")
    run.add_argument("--num-tasks", type=int, help="how many tasks of a split, task types taking turns; default: all")
    run.add_argument("--task-types", metavar="A,B", help="only these task types; default: all")
    run.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    add_engine_options(run, model="the policy to evaluate", temperature=0.0, max_tokens=512)
    report = commands.add_parser("report", help="average rewards of all models of a run, as Markdown")
    report.add_argument("folder", type=Path, help="the run's folder, such as runs/laptop-scienceworld")
    return parser.parse_args()


# --- The paper's measures -----------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def reward_per_step(episode: dict) -> float:
    """The final reward over the number of steps (section 6.3)."""
    return episode["reward"] / max(1, len(episode["steps"]))


def deliberation_rate(episode: dict) -> float:
    """The share of steps that deliberate (section 6.3)."""
    return mean([is_deliberation(step["thought"]) for step in episode["steps"]])


def summary(episodes: list[dict]) -> str:
    return (f"average reward {mean([row['reward'] for row in episodes]):.3f} over {len(episodes)} tasks, per step "
            f"{mean([reward_per_step(row) for row in episodes]):.3f}, deliberation rate "
            f"{mean([deliberation_rate(row) for row in episodes]):.2f}, {mean([row['tokens'] for row in episodes]):.0f} "
            "tokens a task")


# --- run ----------------------------------------------------------------------------------------------------------


def episode_row(episode: Episode, split: str) -> dict:
    return {"key": episode.key, "env": environment_of(episode.task), "task": episode.task, "split": split,
            "instruction": episode.instruction, "reward": episode.reward, "end": episode.end,
            "tokens": sum(step.get("tokens", 0) for step in episode.steps), "steps": episode.steps}


def run(args: argparse.Namespace) -> None:
    engine = pool = None
    try:
        for split in args.splits.split(","):
            if split not in ("train", *TEST_SPLITS):
                raise UserError(f"--splits: unknown split '{split}'; known are train, seen, unseen")
            started = time.time()
            tasks = list_tasks(args.env, split, args.task_types, args.num_tasks, args.seed)
            settings = {name: value for name, value in vars(args).items() if name not in ("out", "splits", "max_live")}
            inputs = [prompt_path(args.env), PROMPTS / "scienceworld_tasks.txt", Path(args.model) / "training.json"]
            out = Path(args.out) / f"eval-{split}.jsonl"
            with StageOutput(out, settings | {"split": split}, inputs) as output:
                todo = [Episode(task, task) for task in tasks if task not in output.done]
                if todo:
                    pool = pool or EnvironmentPool(args.env, min(args.max_live, len(todo)))
                    engine = engine or make_engine(args)
                    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens,
                                "stop": ["\nObservation:"]}
                    for episode in progress(play(todo, engine, pool, sampling, args.seed, args.max_turns),
                                            total=len(todo), desc=split):
                        output.write(episode_row(episode, split))
                rows = [output.done[task] for task in tasks]
                output.finish(rows)
            print(f"{split}: {summary(rows)}; {out}; {duration(time.time() - started)}")
    finally:
        if pool:
            pool.close()


# --- report -------------------------------------------------------------------------------------------------------


def report(folder: Path) -> None:
    """Print a Markdown table of the run's evaluations and what its stages counted."""
    iterations = sorted((path for path in folder.glob("iter*") if path.name[4:].isdigit()), key=lambda p: int(p.name[4:]))
    models = [("base", folder / "base"), *((f"SAND-{path.name[4:]}" if path.name != "iter0" else "SFT", path)
                                           for path in iterations)]
    rows = []
    for name, path in models:
        files = [path / f"eval-{split}.jsonl" for split in TEST_SPLITS]
        if all(file.exists() for file in files):
            rows.append((name, [read_rows(file, EPISODE) for file in files]))
    if not rows:
        raise UserError(f"{folder}: has no evaluations (base/eval-seen.jsonl, iter0/eval-seen.jsonl ...); run `make all`")
    env = rows[0][1][0][0]["env"]
    print(f"# {folder.name} ({env})\n")
    print("| model | seen | unseen | average | reward/step | deliberation rate | tokens/task |")
    print("|---|---|---|---|---|---|---|")
    for name, splits in rows:
        both = [row for episodes in splits for row in episodes]
        rewards = [mean([row["reward"] for row in episodes]) for episodes in splits]
        print(f"| {name} | {rewards[0]:.3f} (n={len(splits[0])}) | {rewards[1]:.3f} (n={len(splits[1])}) | "
              f"{mean(rewards):.3f} | {mean([reward_per_step(row) for row in both]):.3f} | "
              f"{mean([deliberation_rate(row) for row in both]):.2f} | {mean([row['tokens'] for row in both]):.0f} |")
    print()
    for path in iterations[1:]:
        files = [path / name for name in ("candidates.jsonl", "critiques.jsonl", "deliberations.jsonl")]
        if not all(file.exists() for file in files):
            continue
        candidates = read_rows(files[0], CANDIDATES)
        critiques = read_rows(files[1], CRITIQUE)
        steps = [step for row in read_rows(files[2], TRAJECTORY) for step in row["steps"]]
        fell_back = sum(bool(row["fallback"]) for row in critiques)
        print(f"- {path.name}: {share(sum(row['flagged'] for row in candidates), len(candidates))} steps flagged, "
              f"{share(fell_back, len(critiques))} critiques fell back, "
              f"{sum('fallback' in step for step in steps)} deliberations fell back, "
              f"{share(sum(bool(step.get('deliberated')) for step in steps), len(steps))} training steps deliberate")


def main() -> None:
    args = parse_arguments()
    if args.command == "run":
        run(args)
    else:
        report(args.folder)


if __name__ == "__main__":
    run_stage(main)
