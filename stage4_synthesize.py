"""Stage 4: action deliberation synthesis (section 4.4, figure 6).

    python stage4_synthesize.py --model models/SmolLM2-135M-Instruct --trajectories runs/x/expert.jsonl \\
        --candidates runs/x/iter1/candidates.jsonl --rollouts runs/x/iter1/rollouts.jsonl \\
        --critiques runs/x/iter1/critiques.jsonl --out runs/x/iter1/deliberations.jsonl

For every flagged step the frozen base model writes one deliberation thought from the candidate actions and
their critiques, z~_t ~ pi_base(. | {(a^(n), c^(n))}, Prompt_d) (equation 6); it ends in the expert's action.
The prompt is prompts/deliberation.txt. A thought that fails its checks is sampled again; then the step keeps
its old thought. Unflagged steps keep theirs, too (section 4.5).

Writes D_delib in the very format of expert.jsonl, so that it is the next iteration's D_exp. A step that
deliberates has "candidates": [{"action": "...", "judgement": "..."}, ...] and "original_thought"; one whose
drafts were of no use has "draft_errors". With --expert-switch, a rollout that beats the expert
replaces the rest of the trajectory from its step on; the row then has "replaced_from": {"step": 3, "rollout":
KEY, "expert_reward": 0.5}.

The ablations of table 3: without --rollouts and --critiques the candidates come without judgements (w/o EAC);
with --propose N, and no candidates at all, the base model thinks of N other actions itself, at every step (w/o
SAS).
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter

from common import (THOUGHT_TAG, Candidates, Critique, Output, Rollout, StageOutput, UserError, check_model, dialogue, duration,
                    failure, failures_last, fraction, join, listed_candidates, my_share, normalise, parse_turn,
                    progress, prompt_path, rows_by_task, run_stage, settings_of, stable_seed, tally, with_candidates, without_thinking)
from environments import read_trajectories
from prompts.base_model import (copies, draft_sampling, drafts, fill_dialogue, leak_in, plain_bullets, repeats_itself,
                                small_model, steps_text, without_names)
from prompts.engine import add_engine_options, make_engine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--candidates", metavar="JSONL", help="what stage 1 wrote for them")
    source.add_argument("--propose", type=int, metavar="N", help="no candidates: the base model proposes N others itself")
    parser.add_argument("--rollouts", metavar="JSONL", help="what stage 2 wrote")
    parser.add_argument("--critiques", metavar="JSONL", help="what stage 3 wrote; default: candidates are not judged")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--expert-switch", choices=("better", "shorter"), help="let rollouts replace the expert's actions: of "
                        "more reward (collected experts all have the full one), or shorter: also of as much in fewer steps")
    parser.add_argument("--attempts", type=int, default=3, help="drafts before a step keeps its old thought; 0 asks no model; "
                        "default: %(default)s")
    small = parser.add_argument_group("for small models only (prompts/small_model.py)")
    small.add_argument("--small-model", action="store_true", help="where no draft is of use, put the thought together from the "
                       "verdicts; show what the policy tried in vain before the step")
    small.add_argument("--recover-only", action="store_true", help="an ablation: show what was tried in vain, deliberate nowhere")
    add_engine_options(parser, model="the frozen base model", temperature=0.0, max_tokens=1024)
    args = parser.parse_args()
    args.small_model |= args.recover_only
    if bool(args.rollouts) != bool(args.critiques):
        parser.error("--rollouts and --critiques go together: without them candidates are not judged")
    if args.small_model and not args.critiques:
        parser.error("--small-model and --recover-only need --rollouts and --critiques, which tell what was refused")
    return args


def switch_expert(trajectory: dict, rollouts: list[dict], how: str) -> dict:
    """The trajectory, or from the first step on where a rollout beats the expert, the best such rollout. It beats with
    more reward, and if `how` is "shorter" with as much in fewer steps, too."""
    def worth(row: dict) -> tuple:
        return row["reward"], -sum(step["accepted"] for step in row["steps"]) if how == "shorter" else 0

    better = [row for row in rollouts if row["candidate"] and not failure(row["end"])
              and worth(row) > (trajectory["reward"], -row["expert_steps_left"] if how == "shorter" else 0)]
    if not better:
        return trajectory
    best = min(better, key=lambda row: (row["step"], *(-value for value in worth(row))))
    # What was refused changed nothing and is not to be learnt.
    continuation = [step for step in best["steps"] if step["accepted"]]
    return trajectory | {"steps": trajectory["steps"][:best["step"] - 1] + continuation, "reward": best["reward"],
                         "replaced_from": {"step": best["step"], "rollout": best["key"],
                                           "expert_reward": trajectory["reward"]}}


# --- What is compared ---------------------------------------------------------------------------------------------


def judged_candidates(row: dict, critiques: list[dict]) -> list[dict]:
    """A step's candidates with their critiques, of the task's; where there are none, as they are. One whose
    rollout failed is left out."""
    if not critiques:
        return row["candidates"]
    return [row["candidates"][each["candidate"]] | {"critique": each["text"], "verdict": each["verdict"]}
            for each in critiques if each["step"] == row["step"]]


def by_sample_count(candidates: list[dict], key: str, seed: int) -> list[dict]:
    """Sorted by sample count, ties at random; an expert action that was never sampled goes to a random place:
    its place must not tell that it is the expert's."""
    draw = random.Random(stable_seed(seed, key))
    ranked = sorted(candidates, key=lambda candidate: (-candidate["count"], draw.random()))
    if not ranked[-1]["count"]:
        ranked.insert(draw.randrange(len(ranked)), ranked.pop())
    return ranked


def plan_steps(trajectory: dict, rows: list[dict], critiques: list[dict], seed: int) -> list[dict]:
    """The steps of a (switched) trajectory that need a deliberation: flagged, with at least two candidates to
    compare. One that differs from the step that the candidates were sampled at, after a switch, keeps its
    thought."""
    last = trajectory.get("replaced_from", {"step": len(trajectory["steps"])})["step"]
    compared = [(row, judged_candidates(row, critiques)) for row in rows if row["flagged"] and row["step"] <= last]
    return [{"key": row["key"], "trajectory": trajectory, "step": row["step"],
             "action": trajectory["steps"][row["step"] - 1]["action"],
             "candidates": by_sample_count(candidates, row["key"], seed)}
            for row, candidates in compared if len(candidates) > 1]


def plan_proposals(trajectory: dict) -> list[dict]:
    """Every step, without candidates: the base model is to think of them itself (w/o SAS)."""
    return [{"key": f"{trajectory['key']}/step{t}", "trajectory": trajectory, "step": t, "action": step["action"],
             "candidates": None} for t, step in enumerate(trajectory["steps"], 1)]


# --- Synthesis ----------------------------------------------------------------------------------------------------


def deliberation_prompt(item: dict, propose: int | None) -> list[str]:
    """Prompt_d: the environment's prompt, the history, the candidates with their critiques, and the action to
    arrive at."""
    trajectory, t = item["trajectory"], item["step"]
    (task,) = dialogue(trajectory["task"], trajectory["instruction"], [])
    if item["candidates"] is None:
        notes = f"- {item['action']}\n(and {propose} other actions that you think of yourself)"
    else:
        notes = "\n".join(f"- {row['action']}" + (f": {row['critique']}" if "critique" in row else "")
                          for row in item["candidates"])
    return fill_dialogue("deliberation", task=task, candidates=notes, expert_action=item["action"],
                         history=steps_text(trajectory["steps"][:t - 1]))


def lists_its_candidates(thought: str, item: dict) -> bool:
    """Whether the bullets are the candidates; or, where there were none, the expert's action and at least
    another."""
    listed = {each["action"] for each in listed_candidates(thought)}
    if item["candidates"] is None:
        return normalise(item["action"]) in listed and len(listed) > 1
    return listed == {normalise(row["action"]) for row in item["candidates"]}


def final_action(turn: dict) -> str:
    """The action that a deliberation ends in: its Action line's, or the candidate that its last paragraph names
    last, since figure 6's output format has no such line."""
    if turn["action"]:
        return turn["action"]
    named = [(found.end(), each["action"]) for each in listed_candidates(turn["text"])
             for found in re.finditer(rf"\b{re.escape(each['action'])}(?!\w)", turn["text"].split("\n")[-1].lower())]
    return max(named, default=(0, ""))[1]


def check_deliberation(item: dict, prompt: list[str], output: Output) -> tuple[str, str | None]:
    """(the thought; None or why it is of no use)."""
    turn = parse_turn(plain_bullets(without_thinking(output.text)))
    thought = turn["thought"] if turn["action"] else THOUGHT_TAG.sub("", turn["text"]).strip()
    action = final_action(turn)
    if normalise(action) != normalise(item["action"]):
        return thought, "another action than the expert's" if action else "no final action"
    if not lists_its_candidates(thought, item):
        return thought, "bullets are not the candidates"
    own_words = without_names(thought, [each["action"] for each in listed_candidates(thought)])
    if leak_in(own_words):
        return thought, "speaks of the scratch-pad"
    lines = [line.partition(": ")[2] if line.startswith("- ") else line for line in own_words.split("\n")]
    if any(map(repeats_itself, lines)):  # line by line: two actions may well deserve the same judgement
        return thought, "repeats itself"
    if copies(thought, prompt[:-1]):
        return thought, "copies the example"
    return thought, None


def deliberate(step: dict, thought: str) -> None:
    """Give a step its deliberation thought."""
    step.pop("text", None)
    step |= {"original_thought": step.get("original_thought", step["thought"]), "thought": thought, **with_candidates(thought)}


# --- The stage ----------------------------------------------------------------------------------------------------


def check_critiques(args: argparse.Namespace, rows: list[dict], rollouts: list[dict], critiques: list[dict]) -> None:
    """Raise UserError unless each candidate of a task whose rollout did not fail has a critique."""
    for row in rows:
        rolled = {rollout["candidate"]: rollout for rollout in rollouts if rollout["step"] == row["step"]}
        needed = {place: candidate["action"] for place, candidate in enumerate(row["candidates"])
                  if not (place in rolled and failure(rolled[place]["end"]))}
        played = {place: rollout["steps"][0]["action"] for place, rollout in rolled.items() if rollout["steps"]}
        judged = {critique["candidate"]: played.get(critique["candidate"]) for critique in critiques
                  if critique["step"] == row["step"]}
        if row["flagged"] and judged != needed:
            raise UserError(f"{args.critiques}: '{row['key']}' needs {len(needed)} critiques and has {len(judged)}, or those of "
                            f"other candidates than {args.candidates} has; run stages 2 and 3 again")


def plan(args: argparse.Namespace) -> tuple[list[dict], dict[str, dict]]:
    """(the trajectories, switched where a rollout is better; {key: a step that needs a deliberation})"""
    rows_of = [rows_by_task(*file) for file in ((args.candidates, Candidates), (args.rollouts, Rollout), (args.critiques, Critique))]
    if args.critiques:
        check_model(args.critiques, args.model)
    trajectories, items = [], []
    for row in read_trajectories(args.trajectories):
        row.pop("replaced_from", None)  # the last iteration's
        for step in row["steps"]:
            step.pop("draft_errors", None)
        rows, rolled, judged = (of_task(row["task"]) for of_task in rows_of)
        if args.critiques:
            check_critiques(args, rows, rolled, judged)
        row = switch_expert(row, rolled, args.expert_switch) if args.expert_switch else row
        trajectories.append(row)
        planned = plan_proposals(row) if args.propose else plan_steps(row, rows, judged, args.seed)
        items += small_model().plan(planned, rolled, args.seed) if args.small_model else planned
    return trajectories, {item["key"]: item for item in items}


def synthesize(args: argparse.Namespace) -> None:
    """Write a deliberation for every step that needs one."""
    started = time.time()
    trajectories, items = plan(args)

    def request(key: str, attempt: int) -> tuple[list[str], dict]:
        return deliberation_prompt(items[key], args.propose), draft_sampling(args, key, attempt)

    def check(key: str, output: Output) -> tuple[str, str | None]:
        return check_deliberation(items[key], deliberation_prompt(items[key], args.propose), output)

    files = (args.trajectories, args.candidates, args.rollouts, args.critiques, prompt_path("deliberation"), args.model)
    code = [synthesize, *([small_model().finish_step, small_model().plan] if args.small_model else [])]
    with StageOutput(args.out, settings_of(args), filter(None, files), code) as output:
        share = my_share({key: item["trajectory"]["task"] for key, item in items.items()})
        todo = [key for key in share if key not in output.done]
        attempts = 0 if args.recover_only else args.attempts
        engine = make_engine(args) if todo and attempts else None
        results = failures_last(drafts(engine, todo, request, check, attempts, args.max_live),
                                lambda result: failure((result[2] or [""])[-1]), len(share))
        for key, thought, errors in progress(results, total=len(todo), desc="synthesize"):
            output.write({"key": key, "thought": thought, "draft_errors": errors})
        if engine:
            print(engine.usage())
            output.asked = engine.asked(len(todo), time.time() - started)
        if not join((output, items)):
            return
        written = [output.done[key] for key in items]
        for item, draft in zip(items.values(), written, strict=True):
            finish_step(item, draft, args)
        steps = [step for row in trajectories for step in row["steps"]]
        counts = {"drafted": len(items), "retried": sum(bool(row["thought"] and row["draft_errors"]) for row in written),
                  "no draft of use": sum(row["thought"] is None for row in written),
                  "draft errors": Counter(reason for row in written for reason in row["draft_errors"]),
                  "switched": sum("replaced_from" in row for row in trajectories),
                  "deliberating steps": sum("candidates" in step for step in steps),
                  "steps after failed attempts": sum("failed_attempts" in step for step in steps)}
        output.finish([row | {"source": "deliberation"} for row in trajectories], counts)
    print(summary(counts, len(steps), args) + f"; {args.out}; {duration(time.time() - started)}")


def finish_step(item: dict, draft: dict, args: argparse.Namespace) -> None:
    """Write into a step what came of its drafts: a deliberation, or why there is none."""
    step, thought = item["trajectory"]["steps"][item["step"] - 1], draft["thought"]
    if thought is None and draft["draft_errors"]:
        step["draft_errors"] = draft["draft_errors"]
    if args.small_model:
        thought = small_model().finish_step(step, item, thought, args.recover_only)
    if thought is not None:
        deliberate(step, thought)


def summary(counts: dict, steps: int, args: argparse.Namespace) -> str:
    without = "put together from verdicts" if args.small_model else "kept their thought"
    return (f"{counts['drafted']} steps to deliberate at, {fraction(counts['retried'], counts['drafted'])} drafted again with "
            f"success, {fraction(counts['no draft of use'], counts['drafted'])} {without}; drafts not used: "
            f"{tally(counts['draft errors'])}; {counts['switched']} trajectories switched; "
            f"{fraction(counts['deliberating steps'], steps)} steps deliberate, "
            f"{counts['steps after failed attempts']} come after failed attempts")


def main() -> None:
    synthesize(parse_arguments())


if __name__ == "__main__":
    run_stage(main)
