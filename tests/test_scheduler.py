"""What a user can rely on when many episodes are in flight: the same transcripts, nothing computed or played twice."""

import random
import re

import pytest

import common
import stage5_finetune
from common import stable_seed
from conftest import MODEL, MOVES
from environments import Result, choose_tasks, workers
from environments.alfworld import game_tasks
from environments.workers import EnvironmentPool, Playing, play
from practice_games import write_practice_games
from prompts.model import ChatFormat
from prompts.small_model import four_refused
from stage2_rollout import branch, refused, sampled_rollout
from test_stages import CANDIDATE, ROW, STEP


class Scripted:
    """A policy that draws its turn from the request's seed, as sampling does, and answers late and out of order."""

    def __init__(self, moves, disorder=0):
        self.moves, self.random, self.waiting, self.prompts = moves, random.Random(disorder), [], []

    @property
    def busy(self):
        return bool(self.waiting)

    def submit(self, name, turns, *, seed, **sampling):
        self.prompts.append(turns)
        move = self.moves[stable_seed(seed, turns[-1]) % len(self.moves)]
        self.waiting.append((name, [common.Output(f"Thought: {seed}.\nAction: {move}" if move else "Hm.", 5, "stop")]))

    def poll(self):
        self.random.shuffle(self.waiting)
        done = self.random.randint(0, len(self.waiting))
        finished, self.waiting = self.waiting[:done], self.waiting[done:]
        return finished

    def usage(self):
        return "scripted"


class Even:
    """A pool of three environments that all take the same time and answer `end` to "leave"."""

    def __init__(self, end=None):
        self.workers, self.replies, self.started, self.end = dict.fromkeys(range(3)), {}, [], end

    def send(self, worker, kind, *rest):
        if kind == "start":
            self.started.append((worker, rest[0]))
            self.replies[worker] = ("started", "Do it.", [self.answer(action) for action in rest[1]])
        else:
            self.replies[worker] = ("stepped", self.answer(rest[0]))

    def answer(self, action):
        return Result("a room", 0.0, True, self.end if action == "leave" else None)

    def ready(self, timeout):
        replies, self.replies = self.replies, {}
        yield from replies.items()


class Watched(EnvironmentPool):
    """A pool that counts the processes that it starts."""
    processes = 0

    def restart(self, worker):
        self.processes += 1
        super().restart(worker)


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    root = tmp_path_factory.mktemp("games")
    write_practice_games(root, {"train": 1}, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", str(root))
        yield game_tasks("train", root)


@pytest.fixture(scope="module")
def house(games):
    """A pool of one ALFWorld."""
    with EnvironmentPool("alfworld", 1) as pool:
        yield pool


def transcripts(env, tasks, size, disorder=0):
    """Each task from the start and from a branch, {key: (instruction, steps, reward, end)}."""
    episodes = [Playing(f"{task}/{n}", task, 7, [{"thought": "", "action": move} for move in MOVES[env][:n]])
                for task in tasks for n in range(3)]
    with EnvironmentPool(env, size) as pool:
        played = list(play(episodes, Scripted(MOVES[env], disorder), pool, {}, seed=1))
    assert sorted(episode.key for episode in played) == sorted(episode.key for episode in episodes)
    return {each.key: (each.instruction, each.steps, each.reward, each.end) for each in played}


@pytest.mark.parametrize("env", MOVES)
def test_episodes_in_flight_are_played_as_they_are_alone(env, games):
    tasks = games[:2] if env == "alfworld" else choose_tasks("scienceworld", "seen", None, 2, 0)
    alone = transcripts(env, tasks, size=1)
    assert transcripts(env, tasks, size=3, disorder=1) == alone
    assert len({str(steps) for _, steps, _, _ in alone.values()}) == len(alone)


def test_the_episodes_of_a_task_share_a_worker_until_others_have_nothing_to_do():
    tasks = [f"scienceworld/boil/{n}" for n in range(3)]
    episodes = [Playing(f"{task}/{n}", task, 1) for task, count in zip(tasks, (6, 6, 30)) for n in range(count)]
    pool, policy = Even(), Scripted(["look"])
    assert len(list(play(episodes, policy, pool, {}, seed=0))) == 42
    workers = [{worker for worker, started in pool.started if started == task} for task in tasks]
    assert workers == [{0}, {1}, {0, 1, 2}]


def test_a_worker_that_has_grown_makes_room_for_a_fresh_one_and_no_other_does(games, monkeypatch):
    for limit, processes in ((workers.MEMORY_OF_A_WORKER, 1), (1, 3)):
        monkeypatch.setattr(workers, "MEMORY_OF_A_WORKER", limit)
        with Watched("alfworld", 1) as pool:
            played = list(play([Playing(str(n), games[0], 2) for n in range(3)], Scripted(["look"]), pool, {}, 0))
        assert pool.processes == processes
        assert all(episode.end == "turn limit" and not episode.failures for episode in played)


@pytest.mark.parametrize("forced, move, after, end, turns, prompts", [
    (0, "look", 3, "enough", 3, 3),  # before its limit
    (4, "look", 3, "enough", 3, 0),  # in the middle of what is forced
    (0, "look", 5, "enough", 5, 5),  # at its limit
    (0, "look", 6, "turn limit", 5, 5),
    (0, "leave", 1, "left", 1, 1)])  # the environment's own end comes first
def test_an_episode_ends_where_it_is_to_stop(forced, move, after, end, turns, prompts):
    def stop(steps):
        return "enough" if len(steps) == after else None
    policy = Scripted([move])
    episode = Playing("k", "scienceworld/boil/0", 5, [{"thought": "", "action": "look"}] * forced, stop)
    (played,) = play([episode], policy, Even("left"), {}, seed=0)
    assert (played.end, len(played.steps), len(policy.prompts)) == (end, turns, prompts)


# --- Rollouts -----------------------------------------------------------------------------------------------------


def trajectory_of(task, **step):
    steps = [STEP | {"thought": "", "action": "inventory"} | step] * 2
    return ROW | {"key": task, "task": task, "steps": steps}


def rolled_out(house, trajectory, action, stop, policy, limit):
    """The episode of an action that was sampled at step 2."""
    forced = branch({"thought": "", "action": action}, trajectory, 2)
    episode = Playing("k", trajectory["task"], limit, forced, lambda steps: stop(steps, 2))
    (played,) = play([episode], policy, house, {}, 0)
    return played


def row_of(episode, step, place=1):
    """The row of an episode of stage 2."""
    candidates = CANDIDATE | {"key": f"{episode.task}/step{step}", "task": episode.task, "step": step}
    row = sampled_rollout(candidates, place, ROW | {"task": episode.task, "steps": [STEP] * 3}, episode)
    common.check_row(row, common.Rollout, "a rollout")
    return row


@pytest.mark.parametrize("stop, action, limit, end, turns", [
    (refused, "fly to moon 1", 5, "refused", 2), (refused, "look", 5, "turn limit", 5),
    (four_refused, "fly to moon 1", 9, "refused", 5), (four_refused, "fly to moon 1", 3, "turn limit", 3),
    (four_refused, "look", 7, "turn limit", 7)])
def test_a_rollout_ends_where_its_action_is_refused_but_not_the_policys_own(
        games, house, stop, action, limit, end, turns):
    episode = rolled_out(house, trajectory_of(games[0]), action, stop, Scripted(["fly to moon 1"]), limit)
    assert episode.end == end and len(episode.steps) == turns and not episode.failures
    row = row_of(episode, 2)
    assert row["steps"] == [{name: step[name] for name in STEP} for step in episode.steps[1:]]
    assert (row["end"], row["accepted"]) == (("turn limit", True) if action == "look" else ("refused", False))


def test_a_refused_rollout_ends_when_an_action_is_accepted(games, house):
    episode = rolled_out(house, trajectory_of(games[0]), "fly to moon 1", four_refused, Scripted(["look"]), 9)
    assert episode.end == "refused"
    assert [(step["action"], step["accepted"]) for step in episode.steps] == [
        ("inventory", True), ("fly to moon 1", False), ("look", True)]
    row = row_of(episode, 2)
    assert [step["action"] for step in row["steps"]] == ["fly to moon 1"] and not row["accepted"]
    assert (row["end"], row["reward"], row["action_reward"]) == ("refused", 0.0, 0.0)


def test_a_rollout_begins_with_the_history_that_its_action_was_sampled_after(games, house):
    """Failed attempts that an earlier iteration shows are in it and are not executed again."""
    attempt = {"thought": "Up!", "action": "fly to moon 1", "observation": "Nothing happens.", "reward": 0.0,
               "accepted": False}
    policy = Scripted(["look"])
    episode = rolled_out(house, trajectory_of(games[0], failed_attempts=[attempt]), "look", refused, policy, 3)
    assert policy.prompts[0][1:4] == ["Thought: Up!\nAction: fly to moon 1", "Observation: Nothing happens.",
                                      "Action: inventory"]
    assert [step["action"] for step in episode.steps] == ["inventory", "look", "look"]


@pytest.mark.parametrize("step, added", [(1, 0.25), (2, 0.0), (3, 0.5)])
def test_a_rollout_says_what_its_action_itself_added_to_the_reward(step, added):
    steps = [STEP | {"reward": reward} for reward in (0.25, 0.25, 0.75)]
    row = row_of(Playing("k", ROW["task"], 3, steps=steps, reward=0.75, end="turn limit"), step)
    assert row["action_reward"] == added and len(row["steps"]) == row["expert_steps_left"] == 4 - step
    assert (row["reward"], row["end"], row["accepted"]) == (0.75, "turn limit", True)


def test_a_rollout_that_failed_before_its_action_has_no_steps():
    row = row_of(Playing("k", ROW["task"], 9, end="failed: no answer"), 3)
    assert (row["steps"], row["reward"], row["action_reward"]) == ([], 0.0, 0.0)
    assert (row["end"], row["accepted"]) == ("failed: no answer", False)


# --- The prefix is computed once ----------------------------------------------------------------------------------

LLAMA_3 = ("{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
           "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.mark.slow
@pytest.mark.parametrize("template", ["the model's own", LLAMA_3])
def test_a_prompt_begins_with_the_last_one_and_the_tokens_that_answered_it(template):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if template == LLAMA_3:
        tokenizer.chat_template = LLAMA_3
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|begin_of_text|>", "<|start_header_id|>",
                                                                    "<|end_header_id|>", "<|eot_id|>"]})
    chat = ChatFormat(tokenizer)
    turn = "Thought: I look.\nAction: look around"
    letters = [token for letter in turn for token in tokenizer(letter, add_special_tokens=False).input_ids]
    assert chat.spells(letters, turn) and letters != chat.encode(["x", turn])[len(chat.encode(["x"])):]
    episode = Playing("k", "scienceworld/boil/0", 9, instruction="Boil water.")
    before = chat.encode(episode.turns())
    for step in range(3):
        episode.record({"thought": "I look.", "action": "look around", "text": turn}, Result("a room", 0.0, True, None))
        episode.written[step] = letters
        prompt = chat.encode(episode.turns())
        assert prompt[:len(before) + len(letters)] == before + letters
        assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
            [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(
                common.dialogue(episode.task, "Boil water.", episode.steps))],
            tokenize=False, add_generation_prompt=True)
        before = prompt


@pytest.mark.slow
def test_the_engines_own_tokens_are_given_back_to_it(engine, games, house):
    """A real model plays; each prompt begins with the last one, answer included, and is found in the prefix cache."""
    class Listening:
        busy = property(lambda self: engine.busy)
        prompts, answers = [], []

        def submit(self, name, turns, **sampling):
            self.prompts.append(engine.format.encode(turns))
            engine.submit(name, turns, **sampling)

        def poll(self):
            finished = engine.poll()
            self.answers += [output.ids for _, (output,) in finished]
            return finished

    (episode,) = play([Playing("k", games[0], 4)], Listening(), house, {"temperature": 1.0, "max_tokens": 20}, 0)
    prompts, answers = Listening.prompts, Listening.answers
    assert len(prompts) == len(episode.steps) == 4
    for step, (shorter, answer, longer) in enumerate(zip(prompts, answers, prompts[1:])):
        whole = shorter + answer if step in episode.written else shorter
        assert longer[:len(whole)] == whole
    assert 0 < int(re.search(r"prefix cache hit rate (\d+) %", engine.usage())[1]) < 100


# --- Training wastes nothing --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_is_the_models_own_and_only_the_agents_tokens_have_logits():
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20) + 500
    labels = torch.full_like(ids, -100)
    labels[0, 5:8], labels[1, 6:11] = ids[0, 5:8], ids[1, 6:11]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with torch.no_grad():
        whole, short = model(**batch), model(**stage5_finetune.keep_supervised_logits(batch))
    assert short.logits.shape[:2] == (2, 6)
    torch.testing.assert_close(short.loss, whole.loss)
