"""What a user can rely on in a run of days: thousands of episodes, workers that die at random, and nothing lost or kept."""

import random

import psutil
import pytest

from common import EnvironmentPool, Episode, alfworld_tasks, list_tasks, play, write_practice_games
from conftest import MOVES, wait_until_gone
from test_scheduler import Scripted

pytestmark = pytest.mark.slow
EPISODES = 2000
KILLS = 40


class Murderous(Scripted):
    """A policy under which, KILLS times a run, a random worker or what it has started is killed.

    One that has not answered yet is spared: as long as it takes to come up, the others submit hundreds of turns, and an
    episode whose worker dies four times is given up."""

    def __init__(self, moves, pool):
        super().__init__(moves)
        self.pool, self.kills = pool, 0

    def submit(self, name, turns, **sampling):
        super().submit(name, turns, **sampling)
        self.prompts.clear()
        if self.random.random() < KILLS / (2 * EPISODES):
            number = self.random.choice([number for number, memory in self.pool.memory.items() if memory])
            worker = psutil.Process(self.pool.workers[number][0].pid)
            try:
                self.random.choice([worker, *worker.children(recursive=True)]).kill()
                self.kills += 1
            except psutil.NoSuchProcess:
                pass


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
        write_practice_games(tmp_path, {"train": 20}, seed=0)
        monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
        tasks = alfworld_tasks("train", tmp_path)
    else:
        tasks = list_tasks("scienceworld", "train", None, 120, 0)
    episodes = [Episode(f"{task}/{n}", task) for task in tasks for n in range(1 + EPISODES // len(tasks))][:EPISODES]
    random.Random(0).shuffle(episodes)
    me, curve, ends = psutil.Process(), [], {}
    with EnvironmentPool(env, 3) as pool:
        policy = Murderous(MOVES[env], pool)
        for episode in play(episodes, policy, pool, {}, seed=0, max_turns=2):
            ends[episode.key] = episode.end
            curve.append((mebibytes([me]), mebibytes(me.children(recursive=True))))
    assert ends.keys() == {episode.key for episode in episodes}
    assert not {end for end in ends.values() if end.startswith("failed")}
    assert policy.kills > KILLS / 2
    tenth = EPISODES // 10
    first, last = ([sum(column) / tenth for column in zip(*part)] for part in (curve[:tenth], curve[-tenth:]))
    with capsys.disabled():
        print(f"\n{env}: {EPISODES} episodes, {policy.kills} kills; MiB in the first and last tenth: this process "
              f"{first[0]:.0f}, {last[0]:.0f}; workers and what they started {first[1]:.0f}, {last[1]:.0f}")
    assert last[0] < first[0] + 50 and last[1] < first[1] + 3 * 200
    assert not wait_until_gone(str(tmp_path))
