"""What a user can rely on when many episodes are in flight: the same transcripts, nothing computed or played twice."""

import random
import re

import pytest

import common
import stage2_rollout
from common import (ChatFormat, EnvironmentPool, Episode, alfworld_tasks, list_tasks, play, stable_seed,
                    write_practice_games)
from conftest import MODEL, MOVES
from test_stages import CANDIDATE, ROW, STEP, write


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
    """A pool of three environments that all take the same time."""

    def __init__(self):
        self.workers, self.replies, self.started = dict.fromkeys(range(3)), {}, []

    def send(self, worker, kind, *rest):
        if kind == "start":
            self.started.append((worker, rest[0]))
        self.replies[worker] = ("started", "Do it.", []) if kind == "start" else ("stepped", ("a room", 0.0, None))

    def ready(self, timeout):
        replies, self.replies = self.replies, {}
        yield from replies.items()


class Watched(EnvironmentPool):
    """A pool that counts the processes that it starts."""
    processes = 0

    def restart(self, worker):
        self.processes += 1
        super().restart(worker)


@pytest.fixture
def games(tmp_path, monkeypatch):
    write_practice_games(tmp_path, {"train": 1}, seed=0)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    return alfworld_tasks("train", tmp_path)


def transcripts(env, tasks, size, disorder=0):
    """Each task from the start and from a branch, {key: (instruction, steps, reward, end)}."""
    episodes = [Episode(f"{task}/{n}", task, forced=[{"thought": "", "action": move} for move in MOVES[env][:n]])
                for task in tasks for n in range(3)]
    with EnvironmentPool(env, size) as pool:
        played = list(play(episodes, Scripted(MOVES[env], disorder), pool, {}, seed=1, max_turns=7))
    assert sorted(episode.key for episode in played) == sorted(episode.key for episode in episodes)
    return {each.key: (each.instruction, each.steps, each.reward, each.end) for each in played}


@pytest.mark.parametrize("env", MOVES)
def test_episodes_in_flight_are_played_as_they_are_alone(env, games):
    tasks = games[:3] if env == "alfworld" else list_tasks("scienceworld", "seen", None, 3, 0)
    alone = transcripts(env, tasks, size=1)
    assert transcripts(env, tasks, size=4, disorder=1) == alone
    assert len({str(steps) for _, steps, _, _ in alone.values()}) == len(alone)


def test_the_episodes_of_a_task_share_a_worker_until_others_have_nothing_to_do():
    tasks = [f"scienceworld/boil/{n}" for n in range(3)]
    episodes = [Episode(f"{task}/{n}", task) for task, count in zip(tasks, (6, 6, 30)) for n in range(count)]
    pool, policy = Even(), Scripted(["look"])
    assert len(list(play(episodes, policy, pool, {}, seed=0, max_turns=1))) == 42
    workers = [{worker for worker, started in pool.started if started == task} for task in tasks]
    assert workers == [{0}, {1}, {0, 1, 2}]


def test_a_worker_that_has_grown_makes_room_for_a_fresh_one_and_no_other_does(games, monkeypatch):
    for limit, processes in ((common.MEMORY_OF_A_WORKER, 1), (1, 3)):
        monkeypatch.setattr(common, "MEMORY_OF_A_WORKER", limit)
        with Watched("alfworld", 1) as pool:
            played = list(play([Episode(str(n), games[0]) for n in range(3)], Scripted(["look"]), pool, {}, 0, 2))
        assert pool.processes == processes
        assert all(episode.end == "turn limit" and not episode.failures for episode in played)


def test_what_an_earlier_rollout_determines_is_not_played_again(tmp_path, monkeypatch, capsys):
    """Two experts of one task with the same first state, and a sampled action that ends the episode there."""
    fatal = CANDIDATE["actions"][1] | {"action": "focus on agent"}
    rows = [ROW | {"key": key} for key in ("a", "b")]
    write(tmp_path / "expert.jsonl", *rows)
    write(tmp_path / "candidates.jsonl", *(CANDIDATE | {
        "key": f"{row['key']}/step1", "trajectory": row["key"], "actions": [CANDIDATE["actions"][0], fatal]} for row in rows))
    played = []

    def recorded(episodes, *rest):
        played.extend(episodes)
        return play(episodes, *rest)
    monkeypatch.setattr(stage2_rollout, "play", recorded)
    monkeypatch.setattr(stage2_rollout, "make_engine", lambda args: Scripted([]))
    monkeypatch.setattr("sys.argv", [stage2_rollout.__file__, "--model", "m", "--trajectories", f"{tmp_path}/expert.jsonl",
                                     "--candidates", f"{tmp_path}/candidates.jsonl", "--out", f"{tmp_path}/out.jsonl"])
    stage2_rollout.main()
    rollouts = {row["key"]: row for row in common.read_rows(tmp_path / "out.jsonl", common.ROLLOUT)}
    assert [episode.key for episode in played] == ["a/step1/1"]
    assert list(rollouts) == ["a/step1/0", "a/step1/1", "b/step1/0", "b/step1/1"]
    assert rollouts["b/step1/1"]["candidate"] == "b/step1"
    assert rollouts["b/step1/1"]["steps"] == rollouts["a/step1/1"]["steps"] and rollouts["a/step1/1"]["end"] == "wrong focus"


@pytest.mark.parametrize("action, extra, refusals, end, turns", [
    ("fly to moon 1", None, 1, "refused", 2), ("fly to moon 1", None, 3, "refused", 4), ("look", None, 3, "turn limit", 5),
    ("look", 1, 1, "turn limit", 3), ("look", 0, 1, "turn limit", 2), ("look", 9, 1, "turn limit", 5)])
def test_a_rollout_ends_at_its_limits_and_where_its_action_is_refused_but_not_the_policys_own(
        games, action, extra, refusals, end, turns):
    trajectory = {"task": games[0], "steps": [{"thought": "", "action": "inventory"}] * 2}
    episode = stage2_rollout.branch("k", {"step": 2}, {"thought": "", "action": action}, trajectory, extra, refusals)
    with EnvironmentPool("alfworld", 1) as pool:
        list(play([episode], Scripted(["fly to moon 1"]), pool, {}, 0, 5))
    assert episode.end == end and len(episode.steps) == turns and not episode.failures


def test_a_refused_rollout_ends_when_an_action_is_accepted(games):
    trajectory = {"task": games[0], "steps": [{"thought": "", "action": "inventory"}] * 2}
    episode = stage2_rollout.branch("k", {"step": 2}, {"thought": "", "action": "fly to moon 1"}, trajectory, None, 4)
    with EnvironmentPool("alfworld", 1) as pool:
        list(play([episode], Scripted(["look"]), pool, {}, 0, 9))
    assert episode.end == "refused" and [step["action"] for step in episode.steps] == ["inventory", "fly to moon 1", "look"]
    action = {"action": "fly to moon 1", "thought": "", "source": "sample"}
    row = stage2_rollout.sampled_rollout({"key": "a", "step": 2}, action, episode)
    assert [step["action"] for step in row["steps"]] == ["fly to moon 1"] and not row["valid"]


def test_a_rollout_begins_with_the_history_that_its_action_was_sampled_after(games):
    """What an earlier iteration shows as tried is in it, and is not done again."""
    tried = {"thought": "Up!", "action": "fly to moon 1", "observation": "Nothing happens."}
    trajectory = {"task": games[0], "steps": [{"thought": "", "action": "inventory", "tried": [tried]}] * 2}
    episode = stage2_rollout.branch("k", {"step": 2}, {"thought": "", "action": "look"}, trajectory, None, 1)
    policy = Scripted(["look"])
    with EnvironmentPool("alfworld", 1) as pool:
        list(play([episode], policy, pool, {}, 0, 3))
    assert policy.prompts[0][1:4] == ["Thought: Up!\nAction: fly to moon 1", "Observation: Nothing happens.",
                                      "Action: inventory"]
    assert [step["action"] for step in episode.steps] == ["inventory", "look", "look"]


@pytest.mark.parametrize("step, gained", [(1, 0.25), (2, 0.0), (3, 0.5)])
def test_a_rollout_says_what_its_action_itself_gained(step, gained):
    steps = [STEP | {"reward": reward} for reward in (0.25, 0.25, 0.75)]
    episode = Episode("a/1", "a", steps=steps, reward=0.75, end="turn limit")
    row = stage2_rollout.sampled_rollout({"key": "a", "step": step}, CANDIDATE["actions"][1], episode)
    assert row["gained"] == gained and len(row["steps"]) == 4 - step


# --- The prefix is computed once ----------------------------------------------------------------------------------

LLAMA_3 = ("{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
           "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


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
    episode = Episode("k", "scienceworld/boil/0", instruction="Boil water.")
    before = chat.encode(episode.turns())
    for step in range(3):
        episode.record({"thought": "I look.", "action": "look around", "text": turn}, ("a room", 0.0, None), 9)
        episode.written[step] = letters
        prompt = chat.encode(episode.turns())
        assert prompt[:len(before) + len(letters)] == before + letters
        assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
            [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(
                common.dialogue("scienceworld", "Boil water.", episode.steps))],
            tokenize=False, add_generation_prompt=True)
        before = prompt


@pytest.mark.slow
def test_the_engines_own_tokens_are_given_back_to_it(engine, games):
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

    with EnvironmentPool("alfworld", 1) as pool:
        (episode,) = play([Episode("k", games[0])], Listening(), pool, {"temperature": 1.0, "max_tokens": 20}, 0, 4)
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
        whole, short = model(**batch), model(**common.learnt_batch(batch))
    assert short.logits.shape[:2] == (2, 6)
    torch.testing.assert_close(short.loss, whole.loss)
