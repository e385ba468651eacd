"""What a user can rely on when several processes share a stage: which tasks and devices are whose, and what becomes of their
parts. Stages that are shared and killed are in test_kill.py."""

import pytest

from common import Held, StageOutput, UserError, join, launched, my_share
from environments.workers import own_cores
from prompts.engine import devices


# --- Who makes what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variables, place", [
    ({}, (0, 1)),
    ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),  # torchrun, array jobs
    ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, (3, 8)),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # the batch script itself
    ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),  # torchrun in srun
])
def test_a_process_knows_its_place(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() == place


@pytest.mark.parametrize("rank, number", [("4", "4"), ("-1", "4"), ("one", "2"), ("0", "0")])
def test_an_impossible_place_is_named(monkeypatch, rank, number):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", number)
    with pytest.raises(UserError, match=f"RANK={rank} WORLD_SIZE={number}: is not the place of a process"):
        launched()


def test_shares_are_whole_tasks_and_as_large_as_each_other(monkeypatch):
    tasks = {f"{kind}/{n}/step{t}": f"{kind}/{n}" for kind in "abcd" for n in range(25) for t in range(4)}
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        shares.append(my_share(tasks))
    assert sorted(key for share in shares for key in share) == sorted(tasks)
    assert [len({tasks[key] for key in share}) for share in shares] == [25] * 4
    assert all(len({key[0] for key in share}) == 4 for share in shares)  # no share of a single task type


@pytest.mark.parametrize("local, visible, size, used", [
    (0, 8, 1, [0]), (7, 8, 1, [7]),  # torchrun: all see all
    (3, 8, 2, [6, 7]),
    (5, 1, 1, [0]), (1, 2, 2, [0, 1]),  # srun --gpus-per-task: each sees its own
])
def test_a_process_takes_its_own_devices(local, visible, size, used):
    assert devices(local, visible, size) == used


def test_too_few_devices_are_named():
    with pytest.raises(UserError, match="process 4 of this host needs 2 GPUs of its own and 8 are visible"):
        devices(4, 8, 2)


@pytest.mark.parametrize("variables, bound_to, cores", [
    ({}, 128, 128), ({"LOCAL_WORLD_SIZE": "8"}, 128, 16),
    ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 128, 16), ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 4, 4), ({"LOCAL_WORLD_SIZE": "200"}, 128, 1)])
def test_processes_of_a_host_share_its_cores(monkeypatch, variables, bound_to, cores):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):  # vLLM sets the first in its own process
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(bound_to))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert own_cores() == cores


# --- Parts ---------------------------------------------------------------------------------------------------------


def rank(monkeypatch, number, of):
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("WORLD_SIZE", str(of))


def test_the_last_of_them_makes_the_output_from_all_parts(tmp_path, monkeypatch, capsys):
    out, keys = tmp_path / "out.jsonl", ["a", "b", "c"]
    for number, mine in enumerate((["a"], ["c"], ["b"])):
        rank(monkeypatch, number, 3)
        with StageOutput(out, {}, []) as output:
            for key in mine:
                output.write({"key": key, "by": number})
            last = join((output, keys))
            assert last == (number == 2)
            if last:
                output.finish((output.done[key] for key in keys), {})
    assert "1 rows of other processes are not there yet" in capsys.readouterr().out
    assert out.read_text() == '{"key": "a", "by": 0}\n{"key": "b", "by": 2}\n{"key": "c", "by": 1}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.meta.json", ".out.jsonl.lock"}


def test_one_that_ends_while_another_makes_the_output_leaves_it_alone(tmp_path, monkeypatch):
    """Its parts are gone, whether it sees that when it lists them, when it opens them, or when it has the lock."""
    out, keys = tmp_path / "out.jsonl", ["a", "b"]
    rank(monkeypatch, 0, 2)
    with StageOutput(out, {}, []) as slow:
        slow.write({"key": "a"})
        rank(monkeypatch, 1, 2)
        with StageOutput(out, {}, []) as fast:
            fast.write({"key": "b"})
            slow.close()
            parts = fast._parts()
            assert join((fast, keys))
            assert not join((slow, keys))  # the other holds the lock
            fast.finish((fast.done[key] for key in keys), {})
        monkeypatch.setattr(slow, "_parts", lambda: parts)
        assert not join((slow, keys))
    assert out.read_text() == '{"key": "a"}\n{"key": "b"}\n' and not list(tmp_path.glob("out.jsonl.part*"))


def test_a_part_with_a_cut_line_or_of_other_settings_is_no_hindrance(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    for number, settings in enumerate(({}, {"other": 1}, {})):
        rank(monkeypatch, number, 3)
        with StageOutput(out, settings, []) as output:
            output.write({"key": f"row{number}"})
    with open(tmp_path / "out.jsonl.part-2", "a") as file:
        file.write('{"key": "half')
    monkeypatch.delenv("RANK")
    with StageOutput(out, {}, []) as output:
        assert list(output.done) == ["row0", "row2"] and "going on from 2 rows" in capsys.readouterr().err
        output.write({"key": "row1"})
        assert join((output, output.done))
        output.finish(output.done.values(), {})
    assert out.read_text() == '{"key": "row0"}\n{"key": "row2"}\n{"key": "row1"}\n' and not list(tmp_path.rglob("out.jsonl.part*"))


def test_one_process_does_not_begin_while_others_share_the_stage(tmp_path, monkeypatch):
    rank(monkeypatch, 1, 2)
    with StageOutput(tmp_path / "out.jsonl", {}, []) as output:
        output.write({"key": "a"})
        with pytest.raises(Held), StageOutput(tmp_path / "out.jsonl", {}, []):  # the same place twice
            pass
        monkeypatch.delenv("RANK")
        with pytest.raises(Held, match="out.jsonl.part-1: is being written by process"), StageOutput(tmp_path / "out.jsonl", {}, []):
            pass
