"""Environments in processes of their own, and the scheduler, which keeps every live episode in flight."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from common import FAILED, PERMANENT, Output, UserError, dialogue, stable_seed, turn_of
from environments import Result, of

MEMORY_OF_A_WORKER = 1024  # MiB at which a worker makes room for a fresh one; ALFWorld's engine keeps 1 MiB a game
LONGEST_ANSWER = 300  # seconds; the slowest, Java's start and a long replay among many others, take some ten


def _environment_worker(connection, env: str) -> None:
    """Answer ("start", task, actions), ("step", action) and ("call", function, *arguments), which gives the
    environment to the function, until the parent hangs up or dies.

    Each answer ends with the MiB in use by this process (ScienceWorld's Java has a limit of its own).
    "permanent error": trying again does not help, as for a game that cannot be read; "user error": it holds for
    every task.
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
            kind_of_error = "user error"
            try:
                if environment is None:
                    environment = of(env)()
                kind_of_error = "permanent error"
                if kind == "start":
                    answer("started", *environment.branch(*rest))
                elif kind == "step":
                    answer("stepped", environment.step(rest[0]))
                else:
                    answer("done", rest[0](environment, *rest[1:]))
            except UserError as error:
                answer(kind_of_error, str(error))
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


def own_cores() -> int:
    """The cores of this process: those that it is bound to, or its part of the host's where several share a stage."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 8(x2) or 8,4
    return max(1, min(len(os.sched_getaffinity(0)), os.cpu_count() // int(re.match(r"\d+", here)[0])))


def add_workers_option(parser) -> None:
    parser.add_argument("--workers", type=int, default=8 * own_cores(), help="environments' processes, one for each episode in "
                        "flight; at most --max-live; default: %(default)s, eight a core, shared by the processes of this host")


def workers_of(args, episodes: int) -> int:
    """How many processes to start for so many episodes."""
    return min(args.workers, args.max_live, episodes)


def make_room_for(workers: int) -> None:
    """Each worker takes three or four file descriptors, and many systems give a process 1,024 unless it asks for more.
    Raises UserError where they allow too few."""
    import resource
    needed = 4 * workers + 300
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(f"{workers} environments need {needed} open files and the system allows {hard}; `ulimit -Hn` shows "
                            f"it; give --workers {max(1, (hard - 300) // 4)}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class EnvironmentPool:
    """`size` worker processes, each hosting one environment and playing one episode at a time. A worker whose
    memory has grown beyond MEMORY_OF_A_WORKER is replaced before its next episode; one that owes an answer for
    more than LONGEST_ANSWER seconds counts as failed."""

    def __init__(self, env: str, size: int) -> None:
        self.env = env
        self.memory: dict[int, int] = {}
        self.due: dict[int, float] = {}  # when an answer is late
        make_room_for(size)
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
        """(worker, reply) of every worker that owes an answer and has given it, has died or is late; waits up
        to `timeout` seconds for the first."""
        owing = {self.workers[worker][1]: worker for worker in self.due}
        patience = max(0.0, min(self.due.values(), default=0.0) - time.monotonic())
        for connection in wait(list(owing), patience if timeout is None else min(timeout, patience)):
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


# --- Scheduler --------------------------------------------------------------------------------------------------

AGENTS_OWN = ("thought", "action", "text", "tokens", "candidates", "failed_attempts")  # fields of a step: not the environment's


@dataclass(eq=False)  # two are never the same
class Playing:
    """One episode in play. `forced` steps are executed first, as they are; then the policy takes over. It ends
    when the environment says so, after `limit` steps, or when stop(steps) gives a reason."""

    key: str
    task: str
    limit: float
    forced: list[dict] = field(default_factory=list)
    stop: Callable[[list[dict]], str | None] = lambda steps: None
    example: dict | None = None  # a trajectory to show in the prompt
    instruction: str = ""
    steps: list[dict] = field(default_factory=list)
    written: dict[int, list[int]] = field(default_factory=dict)  # token ids of the policy's turns, by step from 0
    reward: float = 0.0
    end: str | None = None
    failures: list[str] = field(default_factory=list)

    def turns(self) -> list[str | list[int]]:
        """The history, with the policy's turns as the tokens that it wrote, which are in the prefix cache."""
        turns: list = dialogue(self.task, self.instruction, self.steps, self.example)
        for step, ids in self.written.items():
            turns[2 * (step - len(self.steps))] = ids  # the last two turns are those of the last step
        return turns

    def record(self, turn: dict, result: Result) -> None:
        """Take in what the environment answered to a turn."""
        self.steps.append({**turn, "observation": result.observation, "reward": result.reward, "accepted": result.accepted})
        self.reward = result.reward
        self.end = result.end or self.stop(self.steps) or ("turn limit" if len(self.steps) >= self.limit else None)


def play(episodes: Iterable[Playing], engine, pool: EnvironmentPool, sampling: dict, seed: int) -> Iterator[Playing]:
    """Play episodes to their ends, as many at a time as the pool has workers; yield each as it ends."""
    yield from Scheduler(episodes, engine, pool, sampling, seed).play()


class Scheduler:
    """Keeps every worker's environment and the engine busy.

    No barrier: whenever an environment has answered, that episode's next prompt joins the running batch, and
    environments step while the engine generates. The episodes of one task go to the same worker as long as
    there are other tasks for the others: environments and the prefix cache then branch instead of starting
    anew. An episode whose environment fails is replayed on a fresh worker, three times at most; then it ends as
    "failed: ...".
    """

    def __init__(self, episodes: Iterable[Playing], engine, pool: EnvironmentPool, sampling: dict, seed: int) -> None:
        self.engine, self.pool, self.sampling, self.seed = engine, pool, sampling, seed
        self.waiting: dict[str, deque[Playing]] = {}
        for episode in episodes:
            self.waiting.setdefault(episode.task, deque()).append(episode)
        self.untouched = iter(list(self.waiting))
        self.task_of: dict[int, str] = {}  # the task that each worker plays
        self.live: dict[int, Playing] = {}
        self.executing: dict[int, dict] = {}  # the turn whose answer each worker owes

    def play(self) -> Iterator[Playing]:
        for worker in self.pool.workers:
            self.begin(worker)
        while self.live:
            for worker, reply in self.pool.ready(timeout=0 if self.engine.busy else None):
                if self.observe(worker, *reply):
                    yield from self.go_on(worker)
            for worker, (output,) in self.engine.poll() if self.engine.busy else ():
                if output.unanswered:
                    self.live[worker].end = "context limit" if output.finish == "context" else output.finish
                    yield from self.go_on(worker)
                else:
                    self.act(worker, output)

    def begin(self, worker: int) -> None:
        """Give a worker its next episode, if there is one."""
        if self.task_of.get(worker) not in self.waiting:
            longest = max(self.waiting, key=lambda task: len(self.waiting[task]), default="")
            self.task_of[worker] = next(self.untouched, "") or longest
        if not (task := self.task_of[worker]):
            return
        self.live[worker] = episode = self.waiting[task].popleft()
        if not self.waiting[task]:
            del self.waiting[task]
        self.pool.send(worker, "start", task, [step["action"] for step in episode.forced])

    def observe(self, worker: int, kind: str, *payload) -> bool:
        """Take an environment's answer in; whether the episode can go on (or has ended)."""
        episode = self.live[worker]
        if kind == "user error":
            raise UserError(payload[0])
        if kind == "permanent error":
            episode.end = f"{PERMANENT}{payload[0]}"
            return True
        if kind == "failed":
            self.replay(worker, payload[0])
            return episode.end is not None
        if kind == "started":
            episode.instruction, results = payload
            for step, result in zip(episode.forced, results):
                if episode.end is None:
                    episode.record({name: step[name] for name in AGENTS_OWN if name in step}, result)
        else:
            episode.record(self.executing.pop(worker), payload[0])
        return True

    def replay(self, worker: int, reason: str) -> None:
        """Start the worker's episode again, on a fresh process, up to and with the action that failed."""
        episode, turn = self.live[worker], self.executing.pop(worker, None)
        self.pool.restart(worker)
        episode.failures.append(reason)
        if len(episode.failures) > 3:
            episode.end = f"{FAILED}{reason}"
            return
        if turn:
            episode.forced, episode.steps = [*episode.steps, turn], []
        self.pool.send(worker, "start", episode.task, [step["action"] for step in episode.forced])

    def go_on(self, worker: int) -> Iterator[Playing]:
        """Ask the policy for the next turn of a live episode; hand an ended one out and its worker on."""
        episode = self.live[worker]
        if episode.end is None:
            seed = stable_seed(self.seed, episode.key, len(episode.steps))
            self.engine.submit(worker, episode.turns(), **self.sampling, seed=seed)
        else:
            del self.live[worker]
            self.begin(worker)
            yield episode

    def act(self, worker: int, output: Output) -> None:
        """Have an environment execute the turn that the policy wrote."""
        episode = self.live[worker]
        turn = self.executing[worker] = {**turn_of(output), "tokens": output.tokens}
        if output.ids and turn["text"] == output.text:
            episode.written[len(episode.steps)] = output.ids
        self.pool.send(worker, "step", turn["action"])
