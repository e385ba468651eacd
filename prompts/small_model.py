"""What only a small policy and a small base model need: the switch --small-model of stages 2 and 4.

A policy of 135 million parameters is refused often and then goes on in vain; experts are never refused, so that
nothing else teaches what to do then. Stage 2 lets it try on where a candidate is refused, up to four times.
Stage 4 shows some of these attempts before the step (they are not learnt) and has its deliberation begin with
the last of them. A base model of that size cannot judge: where no draft is of use, the deliberation is put
together from the verdicts, which state what the rollouts have shown, and the step's original thought.
RESULTS.md has what this is worth. PROFILE=paper and PROFILE=gpu never come here.
"""

from __future__ import annotations

import random

from common import failure, normalise, stable_seed
from prompts.base_model import REFUSED

MOST_REFUSALS = 4


def four_refused(steps: list[dict], step: int) -> str | None:
    """Why a rollout of a refused candidate ends: an action was accepted, or four in a row were refused."""
    own = steps[step - 1:]
    if own and not own[0]["accepted"] and (own[-1]["accepted"] or len(own) >= MOST_REFUSALS):
        return "refused"
    return None


def failed_attempts(rollouts: list[dict], step: int, key: str, seed: int) -> list[dict]:
    """What the policy tried at a step in vain, one action after the other: any beginning of a refused rollout,
    at random, so that going on is learnt after the first refusal as well as after the last."""
    beginnings = [row["steps"][:end] for row in rollouts
                  if row["step"] == step and row["candidate"] and not row["accepted"] and not failure(row["end"])
                  for end in range(1, len(row["steps"]) + 1)]
    return random.Random(stable_seed(seed, key, "tried")).choice(beginnings) if beginnings else []


def plan(items: list[dict], rollouts: list[dict], seed: int) -> list[dict]:
    """Stage 4's steps to deliberate at, of one task, with their failed attempts and with their candidates in
    another order.

    Verdicts measure by the expert, so that there are none where a rollout has just replaced it.
    """
    planned = []
    for item in items:
        if "replaced_from" not in item["trajectory"]:
            failed = [step for step in failed_attempts(rollouts, item["step"], item["key"], seed)
                      if normalise(step["action"]) not in ("", normalise(item["action"]))]
            planned.append(item | {"failed": failed, "candidates": failed_first(failed, item["candidates"], item["action"])})
    return planned


def failed_first(failed: list[dict], candidates: list[dict], choice: str) -> list[dict]:
    """The expert's action before the others: a policy whose lists begin with its own wrong actions learns to
    reject what it lists first, right or wrong. After failed attempts the last of them comes first of all, and
    then only what is possible: listing what is not possible teaches to list it."""
    others = {normalise(candidate["action"]): candidate for candidate in candidates}
    chosen = others.pop(normalise(choice))
    if not failed:
        return [chosen, *others.values()]
    last = {"action": failed[-1]["action"], "critique": f"{REFUSED}.", "verdict": REFUSED}
    return [others.pop(normalise(last["action"]), last), chosen,
            *(candidate for candidate in others.values() if candidate["verdict"] != REFUSED)]


def templated_thought(item: dict, original: str) -> str:
    """The original thought, the verdicts, the choice, and the original thought again, which says what the
    action is for. The choice stands next to the verdicts: else it would follow the thought and not these. After
    failed attempts there is no thought: a policy that still wants what was refused says so in it, and does it
    again."""
    judgements = [f"- {candidate['action']}: {candidate['verdict']}." for candidate in item["candidates"]]
    choice = f"I choose to {item['action']}."
    if item["failed"]:
        return "\n".join([*judgements, "", choice])
    return "\n".join([original, "", *judgements, "", f"{choice} {original}"]).strip()


def finish_step(step: dict, item: dict, thought: str | None, recover_only: bool) -> str | None:
    """Give a step its failed attempts; the thought for it, a templated one where no draft was of use; None with
    recover_only."""
    step.pop("failed_attempts", None)
    if item["failed"]:
        step["failed_attempts"] = item["failed"]
    if recover_only:
        return None
    return thought or templated_thought(item, purpose(step.get("original_thought", step["thought"]), item["action"]))


def purpose(thought: str, action: str) -> str:
    """What a thought says an action is for. A rollout that has replaced the expert may have deliberated itself:
    of that, what follows the list and the choice."""
    return thought.split("\n\n")[-1].removeprefix(f"I choose to {action}.").strip()
