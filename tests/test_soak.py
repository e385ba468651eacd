"""What a user can rely on in a run of days: thousands of episodes, workers that die, and nothing lost or kept.

Without --long it is a sample: as many kills an episode, and every kind of them.
"""

import random

import psutil
import pytest

from conftest import LONG, MOVES, wait_until_gone
from environments import choose_tasks
from environments.alfworld import game_tasks
from environments.workers import EnvironmentPool, Playing, play
from practice_games import write_practice_games
from test_scheduler import Scripted

pytestmark = pytest.mark.slow
EPISODES = 2000 if LONG else 100
KILLS = EPISODES // 50
TURNS = 2


class Murderous(Scripted):
    """A policy under which, KILLS times a run, a worker or a process that it has started is killed, in turn.

    One that has not answered yet is spared: as long as it takes to come up, the others submit hundreds of turns, and an
    episode whose worker dies four times is given up."""

    def __init__(self, moves, pool):
        super().__init__(moves)
        self.pool, self.submitted, self.kills = pool, 0, 0

    def submit(self, name, turns, **sampling):
        super().submit(name, turns, **sampling)
        self.prompts.clear()
        self.submitted += 1
        if self.submitted > TURNS * EPISODES / KILLS * (self.kills + 0.5):
            answered = [number for number, memory in self.pool.memory.items() if memory]
            worker = psutil.Process(self.pool.workers[answered[self.kills % len(answered)]][0].pid)
            victims = [worker, *worker.children(recursive=True)]
            try:
                victims[self.kills % len(victims)].kill()
                self.kills += 1
            except psutil.NoSuchProcess:
                pass  # the next turn tries again


def mebibytes(processes):
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss >> 20
        except psutil.NoSuchProcess:
            pass
    return total


@pytest.mark.parametrize("env", MOVES)
def test_thousands_of_episodes_lose_nothing_and_keep_nothing(env, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SAND_TEST", str(tmp_path))
    if env == "alfworld":
        write_practice_games(tmp_path, {"train": 20 if LONG else 2}, seed=0)
        monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
        tasks = game_tasks("train", tmp_path)
    else:
        tasks = choose_tasks("scienceworld", "train", None, 120 if LONG else 12, 0)
    rounds = 1 + EPISODES // len(tasks)
    episodes = [Playing(f"{task}/{n}", task, TURNS) for task in tasks for n in range(rounds)][:EPISODES]
    random.Random(0).shuffle(episodes)
    me, curve, ends = psutil.Process(), [], {}
    with EnvironmentPool(env, 3) as pool:
        policy = Murderous(MOVES[env], pool)
        for episode in play(episodes, policy, pool, {}, seed=0):
            ends[episode.key] = episode.end
            curve.append((mebibytes([me]), mebibytes(me.children(recursive=True))))
    assert ends.keys() == {episode.key for episode in episodes}
    assert not {end for end in ends.values() if end.startswith("failed")}
    assert policy.kills >= 0.9 * KILLS  # some episodes end at their first turn
    tenth = EPISODES // 10
    first, last = ([sum(column) / tenth for column in zip(*part)] for part in (curve[:tenth], curve[-tenth:]))
    with capsys.disabled():
        print(f"\n{env}: {EPISODES} episodes, {policy.kills} kills; MiB in the first and last tenth: this process "
              f"{first[0]:.0f}, {last[0]:.0f}; workers and what they started {first[1]:.0f}, {last[1]:.0f}")
    assert last[0] < first[0] + 50
    if LONG:  # a Java takes hundreds of episodes to fill its heap
        assert last[1] < first[1] + 3 * 200
    assert not wait_until_gone(str(tmp_path))
