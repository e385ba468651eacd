"""Stage 4: action deliberation synthesis (section 4.4, figure 6).

    python stage4_synthesize.py --model models/SmolLM2-135M-Instruct --trajectories runs/x/expert.jsonl \\
        --candidates runs/x/iter1/candidates.jsonl --rollouts runs/x/iter1/rollouts.jsonl \\
        --critiques runs/x/iter1/critiques.jsonl --out runs/x/iter1/deliberations.jsonl

For every flagged step the frozen base model writes one deliberation thought from the candidate actions and their
critiques, z~_t ~ pi_base(. | {(a^(n), c^(n))}, Prompt_d) (equation 6); it ends in the expert's action. The prompt is
prompts/deliberation.txt. A thought that fails its checks is sampled again, at the last attempt with its form held by a
regular expression; then the step keeps its old thought. Unflagged steps keep theirs too (section 4.5).

Writes D_delib in the very format of expert.jsonl, so that it is the next iteration's D_exp. Steps that deliberate have
"deliberated": true, those that fell back "fallback": [reasons]. With --expert-switch, a rollout whose reward beats the
expert's replaces the rest of the trajectory from its step on; the row then says so in "switched". The thought that a step
had before it deliberated is in "plain".

With --recover, what the environment refused the policy at a step is shown as tried before the deliberation ("tried", turns
that are not learnt), whose list begins with the last of it and goes on with what is possible: experts are never refused, so
that nothing else teaches to go on from there.

The ablations of table 3: without --rollouts and --critiques the candidates come without judgements (w/o EAC); with
--propose N, and no candidates at all, the base model thinks of N other actions itself, at every step (w/o SAS).
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable

from common import (CANDIDATES, CRITIQUE, GUIDED, REASON, REFUSED, ROLLOUT, TRAJECTORY, Output, StageOutput, UserError,
                    add_engine_options, check_model, copies, duration, failure, failures_last, fill_dialogue,
                    first_sentences, generate_checked, held_at_last, is_cut_off, is_deliberation, is_valid, leak_in,
                    listed_candidates, literally, make_engine, normalise, parse_turn, progress, prompt_path, read_rows,
                    repeats_itself, retry_sampling, run_stage, settings_of, share, stable_seed, steps_text,
                    without_names)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", required=True, metavar="JSONL", help="expert trajectories, D_exp")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--candidates", metavar="JSONL", help="what stage 1 wrote for them")
    source.add_argument("--propose", type=int, metavar="N", help="no candidates: the base model proposes N others itself")
    parser.add_argument("--rollouts", metavar="JSONL", help="what stage 2 wrote")
    parser.add_argument("--critiques", metavar="JSONL", help="what stage 3 wrote; default: candidates are not judged")
    parser.add_argument("--out", required=True, metavar="JSONL")
    parser.add_argument("--expert-switch", action="store_true", help="let better rollouts replace the expert's actions "
                        "(collected experts all reach the full reward; published ones may not)")
    parser.add_argument("--attempts", type=int, default=3, help="tries before falling back; default: %(default)s")
    parser.add_argument("--guided", choices=GUIDED, help="for small base models: hold every try to the form of the "
                        "last, in which critiques' first sentences are the judgements and the model gives the reason of "
                        "the choice; or, where there are critiques, verdicts: no model is asked, the reason is the old "
                        "thought")
    parser.add_argument("--shown-steps", type=int, metavar="K", help="show only the last K steps of the history; "
                        "default: all")
    parser.add_argument("--choice-first", action="store_true", help="list the expert's action before all that was not tried; "
                        "default: in the order of how often the policy sampled them")
    recover = parser.add_mutually_exclusive_group()
    recover.add_argument("--recover", action="store_true", help="show what the policy tried in vain (stage 2's --refusals) "
                         "before the deliberation, and begin its list with the last of it")
    recover.add_argument("--recover-only", action="store_true", help="an ablation: show it before the old thought, and "
                         "deliberate nowhere")
    add_engine_options(parser, model="the frozen base model", temperature=0.0, max_tokens=1024)
    args = parser.parse_args()
    if (args.recover or args.recover_only) and not (args.rollouts and args.critiques):
        parser.error("--recover and --recover-only need --rollouts and --critiques, which tell what was refused")
    return args


# --- The expert switch --------------------------------------------------------------------------------------------


def switch_expert(trajectory: dict, rollouts: list[dict]) -> dict:
    """The trajectory, or from the first step on where a rollout's reward beats the expert's, the best such rollout."""
    better = [row for row in rollouts if row["reward"] > trajectory["reward"] and not failure(row["end"])]
    if not better:
        return trajectory
    first = min(step_of(row["candidate"]) for row in better)
    best = max((row for row in better if step_of(row["candidate"]) == first), key=lambda row: row["reward"])
    # What was refused changed nothing and is not to be learnt; a policy of a later iteration deliberates by itself.
    continuation = [step | {"deliberated": is_deliberation(step["thought"]), "plain": purpose(step["thought"], step["action"])}
                    for step in best["steps"] if is_valid(step["observation"])]
    return trajectory | {"steps": trajectory["steps"][:first - 1] + continuation, "reward": best["reward"],
                         "switched": {"step": first, "rollout": best["key"], "expert_reward": trajectory["reward"]}}


def step_of(candidate_key: str) -> int:
    return int(candidate_key.rsplit("/step", 1)[1])


# --- Synthesis ----------------------------------------------------------------------------------------------------


def refused_attempts(rollouts: list[dict], seed: int) -> dict[str, list[dict]]:
    """{step: what the policy tried there in vain, one action after the other}: any beginning of a refused rollout, by lot,
    so that going on is learnt after the first refusal as well as after the last."""
    beginnings = defaultdict(list)
    for row in rollouts:
        if row["source"] == "sample" and not row["valid"] and not failure(row["end"]):
            beginnings[row["candidate"]] += [row["steps"][:end] for end in range(1, len(row["steps"]) + 1)]
    return {step: random.Random(stable_seed(seed, step, "tried")).choice(choices) for step, choices in beginnings.items()}


def plan_steps(trajectory: dict, candidates: list[dict], critiques: dict[str, list[dict]], seed: int,
               choice_first: bool = False, attempts: dict[str, list[dict]] | None = None) -> list[dict]:
    """The steps of a (switched) trajectory that need a deliberation: flagged, with at least two candidates to compare.

    The candidates come in the order of how often the policy sampled them, equals by lot; the expert's where it was never
    sampled by lot among them all. At the end it would teach the policy to condemn what it lists first, at the front to
    praise it, whatever it is; and in a random order altogether it finds no end of its list. Wherever that puts it, the
    expert's comes before its equals by the environment's verdict: then the choice is the first that leads on, which a
    policy can learn, and no arbitrary one of several. With choice_first it comes before all of them: a policy whose lists
    begin with its own wrong actions learns to reject what it lists first, right or wrong. What was tried last before the
    step comes first of all.

    A step that differs from the one the candidates were sampled at, after a switch, keeps its thought.
    """
    last = trajectory.get("switched", {"step": len(trajectory["steps"])})["step"]
    return [{"key": row["key"], "trajectory": trajectory, "step": row["step"], "action": action,
             "candidates": tried_first(tried, by_preference(compared, row, action, seed, choice_first), action),
             "tried": tried, "sampled": row["actions"]}
            for row in candidates if row["flagged"] and row["step"] <= last
            for compared in [critiques.get(row["key"], row["actions"])] if len(compared) > 1
            for action in [trajectory["steps"][row["step"] - 1]["action"]]
            for tried in [[step for step in (attempts or {}).get(row["key"], [])
                           if normalise(step["action"]) not in ("", normalise(action))]]]


def tried_first(tried: list[dict], ranked: list[dict], choice: str) -> list[dict]:
    """What was tried last and in vain, and then those candidates that are possible, the choice among them in any case.

    Listing what is not possible teaches to list it. Where all that was tried came first, up to four, the policy's lists went
    on to the token limit (at 40 of 634 steps); where other impossible candidates came after the last, it listed the refused
    action a second time, as one that leads on (97 % of what it did after a second refusal had been refused before).
    """
    if not tried:
        return ranked
    others = {normalise(candidate["action"]): candidate for candidate in ranked}
    last = {"action": tried[-1]["action"], "critique": f"{REFUSED}.", "verdict": REFUSED}
    return [others.pop(normalise(last["action"]), last),
            *(row for action, row in others.items() if row["verdict"] != REFUSED or action == normalise(choice))]


def by_preference(compared: list[dict], row: dict, choice: str, seed: int, choice_first: bool) -> list[dict]:
    counts = {action["action"]: action["count"] for action in row["actions"]}
    lot = random.Random(stable_seed(seed, row["key"]))
    ranked = sorted(compared, key=lambda candidate: (-counts[candidate["action"]], lot.random()))
    if not counts[ranked[-1]["action"]]:
        ranked.insert(lot.randrange(len(ranked)), ranked.pop())
    chosen = next(candidate for candidate in ranked if normalise(candidate["action"]) == normalise(choice))
    first = next(place for place, candidate in enumerate(ranked)
                 if candidate is chosen or "verdict" in candidate and candidate["verdict"] == chosen["verdict"])
    ranked.remove(chosen)
    ranked.insert(0 if choice_first else first, chosen)
    return ranked


def plan_proposals(trajectory: dict) -> list[dict]:
    """Every step, without candidates: the base model is to think of them itself (w/o SAS)."""
    return [{"key": f"{trajectory['key']}/step{t}", "trajectory": trajectory, "step": t, "action": step["action"],
             "candidates": None} for t, step in enumerate(trajectory["steps"], 1)]


def deliberation_prompt(item: dict, args: argparse.Namespace) -> list[str]:
    """Prompt_d: the task, the history, the candidates with their critiques, and the action to arrive at."""
    trajectory, t = item["trajectory"], item["step"]
    if item["candidates"] is None:
        notes = f"- {item['action']}\n(and {args.propose} other actions that you think of yourself)"
    else:
        notes = "\n".join(f"- {row['action']}" + (f": {row['critique']}" if "critique" in row else "")
                          for row in item["candidates"])
    return fill_dialogue("deliberation", task=trajectory["instruction"], candidates=notes, expert_action=item["action"],
                         history=steps_text(trajectory["steps"][:t - 1], last=args.shown_steps))


def deliberation_form(item: dict) -> str:
    """What is left to a model that cannot keep figure 6's format, as a regular expression: the reason of the choice.

    Where the candidates are not judged yet, it judges them as well. There is no look back: small models announce the
    choice in it, and a policy that has learnt to choose first deliberates for show.
    """
    line, action = r"[A-Z][^\n]{20,140}\.", literally(item["action"])
    if item["candidates"] is None:
        judged = rf"- {action}: {line}\n(- [a-z][^\n:]{{2,60}}: {line}\n){{1,5}}"
    else:
        judged = "".join(rf"- {literally(row['action'])}: {line}\n" for row in item["candidates"] if "critique" not in row)
    return rf"{judged}I choose to {action}, {REASON}"


def whole_turn(item: dict, text: str) -> str:
    """The turn that an output stands for: one in deliberation_form is put together, with the first sentences of the
    critiques as judgements and the expert's action at the end; any other is figure 6's whole text already."""
    text = text.strip()
    if not re.fullmatch(deliberation_form(item), text):
        return re.sub(r"^[*•] ", "- ", text.replace("**", ""), flags=re.MULTILINE)  # as larger models set lists
    *judged, choice = text.split("\n")
    return "\n".join([*(judged or judgements(item)), "", choice, f"Action: {item['action']}"])


def judgements(item: dict) -> list[str]:
    return [f"- {row['action']}: {first_sentences(row['critique'], 1)}" for row in item["candidates"]]


def lists_its_candidates(thought: str, item: dict) -> bool:
    """Whether the bullets are the candidates; or, where there were none, the expert's action and at least another."""
    listed = set(listed_candidates(thought))
    if item["candidates"] is None:
        return normalise(item["action"]) in listed and len(listed) > 1
    return listed == {normalise(row["action"]) for row in item["candidates"]}


def check_deliberation(item: dict, prompt: list[str], output: Output) -> tuple[str, str | None]:
    """(the thought; None or why it is of no use)."""
    turn = parse_turn(whole_turn(item, output.text))
    thought = turn["thought"]
    if normalise(turn["action"]) != normalise(item["action"]):
        return thought, "no action line" if not turn["action"] else "another action than the expert's"
    if not lists_its_candidates(thought, item):
        return thought, "bullets are not the candidates"
    own_words = without_names(thought, listed_candidates(thought))
    if leak_in(own_words):
        return thought, "speaks of the scratch-pad"
    lines = [line.partition(": ")[2] if line.startswith("- ") else line for line in own_words.split("\n")]
    if any(map(repeats_itself, lines)):  # line by line: two actions may well deserve the same judgement
        return thought, "repeats itself"
    if copies(thought, prompt[:-1]):
        return thought, "copies the example"
    if is_cut_off(thought):
        return thought, "cut off"
    return thought, None


def by_verdicts(item: dict) -> str:
    """The deliberation thought that needs no model: the thought that came with the first candidate (the policy's when it
    sampled it; the expert's, where its action comes first), the verdicts, the choice, and what was thought at this step
    before.

    The old thought says what the action is for: a policy that learns the verdicts in its place forgets what it has done and
    what is left to do. The choice stands before it, next to the verdicts: else it follows the thought and not these. The
    policy's own thought comes first as it does where nothing is deliberated: what is listed is what it would have done.

    Where that was tried in vain there is neither: a policy that still wants it says so in the thought after the choice, and
    then does it again (of 101 such thoughts that led away from the choice, all but one led to a refused action).
    """
    choice = f"I choose to {item['action']}."
    if item.get("tried"):
        return "\n".join([*judgements(item), "", choice])
    first = item["candidates"][0]["action"]
    draft = purpose(next(sampled["thought"] for sampled in item["sampled"] if sampled["action"] == first), first)
    return "\n".join([*([draft, ""] if draft else []), *judgements(item), "", f"{choice} {plain_thought(item)}"])


def plain_thought(item: dict) -> str:
    """The thought that the step had before it deliberated."""
    step = item["trajectory"]["steps"][item["step"] - 1]
    return step.get("plain", step["thought"])


def purpose(thought: str, action: str) -> str:
    """What a policy's thought says an action is for; of a deliberation, what follows the list and the choice."""
    return thought.split("\n\n")[-1].removeprefix(f"I choose to {action}.").strip()


def grouped(path: str | None, fields: dict, group: Callable[[dict], str]) -> dict[str, list[dict]]:
    """The rows of a file by the group they belong to; nothing where there is no file."""
    groups: dict[str, list[dict]] = {}
    for row in read_rows(path, fields, may_be_empty=True) if path else ():
        groups.setdefault(group(row), []).append(row)
    return groups


def main() -> None:
    args = parse_arguments()
    started = time.time()
    candidates = grouped(args.candidates, CANDIDATES, lambda row: row["trajectory"])
    rollouts = grouped(args.rollouts, ROLLOUT, lambda row: row["candidate"].rsplit("/step", 1)[0])
    critiques = grouped(args.critiques, CRITIQUE, lambda row: row["candidate"])
    if args.critiques:
        check_model(args.critiques, args.model)
    trajectories, plan = [], {}
    for row in read_rows(args.trajectories, TRAJECTORY):
        row.pop("switched", None)  # the last iteration's
        if args.expert_switch:
            row = switch_expert(row, rollouts.get(row["key"], []))
        for step in row["steps"]:
            step.pop("fallback", None)
        trajectories.append(row)
        failed = defaultdict(set)
        for rollout in rollouts.get(row["key"], []):
            if failure(rollout["end"]):
                failed[rollout["candidate"]].add(rollout["action"])
        for step in candidates.get(row["key"], []) if args.critiques and args.rollouts else ():
            needed = {action["action"] for action in step["actions"]} - failed[step["key"]]
            judged = {critique["action"] for critique in critiques.get(step["key"], [])}
            if step["flagged"] and judged != needed:
                raise UserError(f"{args.critiques}: '{step['key']}' needs {len(needed)} critiques and has {len(judged)}, or "
                                f"those of other actions than {args.candidates} has; run stages 2 and 3 again")
        # Verdicts measure by the expert that a switch has just given up; the next iteration's measure by the new one.
        items = (plan_proposals(row) if args.propose else [] if args.guided and "switched" in row
                 else plan_steps(row, candidates.get(row["key"], []), critiques, args.seed, args.choice_first,
                                 refused_attempts(rollouts.get(row["key"], []), args.seed)
                                 if args.recover or args.recover_only else None))
        plan |= {item["key"]: item for item in items}

    def request(item: dict, attempt: int) -> tuple[list[str], dict]:
        return deliberation_prompt(item, args), retry_sampling(args, item["key"], attempt, deliberation_form(item))

    def check(item: dict, output: Output) -> tuple[str, str | None]:
        return check_deliberation(item, deliberation_prompt(item, args), output)

    files = (args.trajectories, args.candidates, args.rollouts, args.critiques, prompt_path("deliberation"),
             args.model)
    inputs = [file for file in files if file]
    with StageOutput(args.out, settings_of(args), inputs) as output:
        todo = [item for key, item in plan.items() if key not in output.done]
        if todo:
            if args.recover_only or args.guided == "verdicts" and args.critiques:
                thought_of = plain_thought if args.recover_only else by_verdicts
                engine, results = None, ((item, thought_of(item), []) for item in todo)
            else:
                engine = make_engine(args)
                results = failures_last(generate_checked(engine, todo, request, check, args.attempts, args.max_live),
                                        lambda result: failure((result[2] or [""])[-1]), len(plan))
            for item, thought, refused in progress(results, total=len(todo), desc="synthesize"):
                output.write({"key": item["key"], "thought": thought, "refused": refused})
            if engine:
                print(engine.usage())
        for key, item in plan.items():
            step = item["trajectory"]["steps"][item["step"] - 1]
            written = output.done[key]
            if written["thought"] is not None:
                for name in "text", "tried":
                    step.pop(name, None)
                step |= {"plain": plain_thought(item), "thought": written["thought"], "deliberated": not args.recover_only}
                if item.get("tried"):
                    step["tried"] = item["tried"]
            else:
                step["fallback"] = written["refused"]
        results = list(output.done.values())
        fallbacks = sum(row["thought"] is None for row in results)
        held = sum(row["thought"] is not None and held_at_last(args, len(row["refused"])) for row in results)
        reasons = Counter(reason for row in results for reason in row["refused"])
        steps = [step for row in trajectories for step in row["steps"]]
        made = 0 if args.recover_only else len(plan)
        switched, deliberating, recovering = (sum(bool(row.get(name)) for row in rows) for name, rows in
                                              (("switched", trajectories), ("deliberated", steps), ("tried", steps)))
        output.finish([row | {"source": "deliberation"} for row in trajectories], {
            "deliberations": made, "fallbacks": fallbacks, "held to the form": held, "refused attempts": reasons,
            "switched": switched, "deliberating steps": deliberating, "steps after a refusal": recovering})
    print(f"{made} deliberations, {share(fallbacks, made)} fell back to the old thought"
          f"{f', {held} were held to the form' if held else ''}; refused attempts: "
          f"{', '.join(f'{count} {reason}' for reason, count in reasons.most_common()) or 'none'}; "
          f"{switched} trajectories switched; {share(deliberating, len(steps))} steps deliberate, {recovering} go on from a "
          f"refusal; {args.out}; {duration(time.time() - started)}")


if __name__ == "__main__":
    run_stage(main)
