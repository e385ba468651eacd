"""What a user can rely on when text is generated: the packaged model in real vLLM, in this process and as a server."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace

import pytest

from common import UserError, dialogue, generate, parse_turn
from conftest import LONG, MODEL
from evaluate import AT_ONCE
from prompts.base_model import drafts
from prompts.engine import LocalEngine, ServerEngine, make_engine
from prompts.model import ChatFormat, bfloat16_is_fast
from stage5_finetune import supervised_tokens, training_sequences
from test_stages import ROW, STEP

pytestmark = pytest.mark.slow
# Greedy, the model prefers each token of "The capital of France is Paris." to the next best by at least 1.7 nats: far
# more than kernels for different processors differ by. As a plain question it was 0.08: the machine chose the answer.
QUESTION = ["Complete the sentence: The capital of France is"]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "seed": 0}
DIALOGUES = range(2, 10 if LONG else 6)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(MODEL)


def ask(engine, turns=QUESTION, **sampling):
    (_, outputs), = generate(engine, [("name", turns, GREEDY | sampling)], max_live=4)
    return outputs


def test_the_model_answers(engine):
    (output,) = ask(engine)
    assert "Paris" in output.text and output.finish in ("stop", "length") and 0 < output.tokens <= 12


def test_n_samples_differ_and_the_same_seed_gives_them_again(engine):
    first = ask(engine, ["Tell me a story."], temperature=1.0, n=4)
    assert len({output.text for output in first}) == 4
    assert ask(engine, ["Tell me a story."], temperature=1.0, n=4) == first
    assert ask(engine, ["Tell me a story."], temperature=1.0, n=4, seed=1) != first


def test_a_regular_expression_holds_the_form(engine):
    form = r"Action: (look around|wait)"
    (output,) = ask(engine, regex=form, max_tokens=30)
    assert re.fullmatch(form, output.text)


def test_a_model_that_would_write_a_list_can_be_held_to_act_at_once(engine):
    request = ["You are in a kitchen. Reply with a list of three actions."]
    (free,), (held,) = ask(engine, request, max_tokens=100), ask(engine, request, max_tokens=100, regex=AT_ONCE)
    assert free.text.count("\n") >= 2 and not parse_turn(free.text)["action"]
    assert re.fullmatch(AT_ONCE, held.text) and parse_turn(held.text)["action"]


def test_vllms_own_arguments_reach_it_and_one_that_it_does_not_know_is_named(engine):
    assert engine.engine.vllm_config.scheduler_config.max_num_seqs == 64  # the fixture's
    for name in "no_such_thing", "max_model_len":
        with pytest.raises(UserError, match=f"these --engine-args.*'{name}'"):
            LocalEngine(MODEL, 2048, 0, {name: 1})
    with pytest.raises(UserError, match="start `vllm serve` with it and give --api-base"):
        LocalEngine(MODEL, 2048, 0, {"data_parallel_size": 2})
    with pytest.raises(UserError, match="with --api-base give them to the server"):
        make_engine(Namespace(api_base="http://localhost:8000/v1", model="m", engine_args={"max_num_seqs": 64}))


def test_an_engine_argument_of_a_wrong_value_is_named():
    with pytest.raises(UserError, match="gpu_memory_utilization"):
        LocalEngine(str(MODEL), 2048, 0, {"gpu_memory_utilization": 2})


def test_engine_arguments_that_are_no_object_are_refused(script):
    evaluate = ("evaluate.py", "run", "--model", "m", "--env", "scienceworld", "--out", "o")
    for value, why in ("[1]", "'[1]' is not a JSON object"), ("{1", "'{1' is not JSON: "):
        done = script(*evaluate, "--engine-args", value)
        assert done.returncode == 2 and f"argument --engine-args: {why}" in done.stderr


def test_a_hub_name_that_cannot_be_had_is_one_line(script, tmp_path):
    (tmp_path / "expert.jsonl").write_text(json.dumps(ROW) + "\n")
    done = script("stage1_sample.py", "--model", "some/other", "--trajectories", "expert.jsonl",
                  "--out", "candidates.jsonl", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "vLLM cannot load the model 'some/other'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prompt_longer_than_the_context_says_so(engine):
    assert [output.finish for output in ask(engine, ["word " * 3000], n=2)] == ["context", "context"]


def test_every_request_is_answered_once_under_its_name(engine):
    requests = [(number, [f"Count from {number}."], GREEDY | {"max_tokens": 1 + number % 5}) for number in range(20)]
    names = [name for name, _ in generate(engine, requests, max_live=6)]
    assert sorted(names) == list(range(20))


def test_in_a_busy_engine_every_token_is_still_the_models_own_choice(engine):
    """Batches, cached prefixes and a GPU's kernels round sums another way, which must not change what the model says:
    as transformers sees it, no token that greedy decoding took is worse than the best one by more than rounding."""
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    dialogues = {number: [f"Name {number} things that one may find in a kitchen."] for number in DIALOGUES}
    for place in "the fridge", "the drawer", "the sink":
        requests = [(number, turns, GREEDY | {"max_tokens": 24}) for number, turns in dialogues.items()]
        for number, (output,) in generate(engine, requests, max_live=3):
            prompt = engine.format.encode(dialogues[number])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + output.ids])).logits[0, len(prompt) - 1:-1]
            lost = logits.max(-1).values - logits.gather(-1, torch.tensor(output.ids)[:, None])[:, 0]
            assert lost.max() < 1, f"{output.text!r} is not what the model would say"
            dialogues[number] = [*dialogues[number], output.text, f"Which of them are in {place}?"]


def test_a_refused_output_is_tried_again_and_then_given_up_with_its_reasons(engine):
    def check(item, output):
        return output.text, None if item["key"] == "good" or item["tries"].append(1) else "not good"
    items = [{"key": "good", "tries": []}, {"key": "bad", "tries": []}]
    results = drafts(engine, items, lambda item, attempt: (QUESTION, GREEDY), check, attempts=3, max_live=2)
    outcome = {item["key"]: (text, reasons) for item, text, reasons in results}
    assert "Paris" in outcome["good"][0] and outcome["good"][1] == []
    assert outcome["bad"] == (None, ["not good"] * 3) and len(items[1]["tries"]) == 3
    assert list(drafts(None, items, None, None, attempts=0, max_live=2)) == [(item, None, []) for item in items]


def test_prompts_are_the_chat_templates_own(tokenizer):
    turns = ["Hello", "Action: look", "Observation: a room"]
    messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ChatFormat(tokenizer).encode(turns) == ids


def test_a_longer_dialogue_begins_with_the_shorter_one(tokenizer):
    chat = ChatFormat(tokenizer)
    turns = ["Hello", "Thought: x\nAction: look", "Observation: a room", "Action: wait", "Observation: time passes"]
    for length in (1, 3, 5):
        shorter = chat.encode(turns[:length])
        assert chat.encode(turns)[:len(shorter)] == shorter


def test_only_the_agents_turns_are_learnt(tokenizer):
    chat = ChatFormat(tokenizer)
    turns = ["Hello", "Thought: x\nAction: look", "Observation: a room", "Action: wait"]
    ids, labels = supervised_tokens(turns, chat, 1000)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    learnt = tokenizer.decode([label for label in labels if label != -100])
    assert learnt == "Thought: x\nAction: look<|im_end|>Action: wait<|im_end|>"
    assert ids == chat.encode(turns) + [chat.end_of_turn]
    shorter, _ = supervised_tokens(turns, chat, len(ids) - 1)
    assert tokenizer.decode(shorter).endswith("Action: look<|im_end|>")


def test_failed_attempts_are_shown_and_not_learnt(tokenizer):
    attempt = {"thought": "I fly.", "action": "fly", "observation": "Nothing happens.", "reward": 0.0,
               "accepted": False}
    deliberation = "- fly: This is not possible here.\n- walk: It helps.\n\nI choose to walk."
    row = ROW | {"steps": [
        STEP | {"thought": deliberation, "action": "walk", "failed_attempts": [attempt]},
        STEP | {"thought": "I rest.", "action": "wait"}]}
    (sequence,), cut = training_sequences([row], ChatFormat(tokenizer), 1000)
    learnt = tokenizer.decode([label for label in sequence["labels"] if label != -100])
    assert learnt == f"Thought: {deliberation}\nAction: walk<|im_end|>Thought: I rest.\nAction: wait<|im_end|>"
    assert not cut
    shown = tokenizer.decode(sequence["input_ids"])  # as when the next iteration samples
    assert dialogue(row["task"], row["instruction"], row["steps"])[1:3] == ["Thought: I fly.\nAction: fly",
                                                                            "Observation: Nothing happens."]
    places = [shown.index(text) for text in ("Action: fly", "Nothing happens.", "- fly: ", "Action: wait")]
    assert places == sorted(places)


def test_a_dead_or_occupied_address_is_asked_again_and_is_one_line(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="no server answers"):
            ServerEngine(address, "m", tries=2)
        assert f"{address} does not answer; asking again, 2 times" in capsys.readouterr().err
        listener.listen()
        threading.Thread(target=answer_as_another_program, args=(listener,), daemon=True).start()
        with pytest.raises(UserError, match="is another program using that port|no server answers|answered"):
            ServerEngine(address, "m", tries=2)


def answer_as_another_program(listener):
    with contextlib.suppress(OSError):  # the test has closed the listener
        while True:
            connection, _ = listener.accept()
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.close()


@pytest.mark.parametrize("live", [8, 1])
def test_out_of_memory_halves_what_is_in_flight(live, engine, monkeypatch, capsys):
    """The error comes where a GPU's comes: in the model, when the scheduler has already counted the step as done."""
    import torch
    executor = engine.engine.engine_core.engine_core.model_executor
    steps, execute = [], executor.execute_model

    def fail_once(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return execute(*arguments, **options)

    def requests(step=1):
        return ((n, [f"Count from {n} to {n + 9}."],
                 {"temperature": n % 2, "max_tokens": 12, "seed": n, "n": 1 + n % 2}) for n in range(0, 12, step))

    monkeypatch.setattr(executor, "execute_model", fail_once)
    monkeypatch.setattr(engine, "most", float("inf"))
    if live == 1:
        with pytest.raises(UserError, match="out of memory with a single request in flight"):
            list(generate(engine, requests(), live))
        engine.engine.abort_request(list(engine.running))
        engine.running.clear()
        return
    answers = dict(generate(engine, requests(), live))
    said = "out of memory with 8 requests in flight; going on with at most 4"
    assert engine.most == 4 and said in capsys.readouterr().err
    assert {n: len(outputs) for n, outputs in answers.items()} == {n: 1 + n % 2 for n in range(12)}
    alone = dict(generate(engine, requests(step=2), 1))
    same = sum(answers[n][0].text == alone[n][0].text for n in alone)
    assert same >= 4  # bf16 rounds otherwise in other batches


# --- A real server, last: where it runs, the engine in this process is slow ------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The address of a real server. Its module is called: the CPU package's `vllm serve` looks for its own name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--served-model-name", "tiny",
         "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "1024", "--enforce-eager",
         "--override-generation-config", '{"top_k": 1}', "--no-enable-chunked-prefill",
         "--max-num-batched-tokens", "1024", "--dtype", "bfloat16" if bfloat16_is_fast() else "float32"],
        env=os.environ | settings, start_new_session=True)
    while not answers(port):
        assert process.poll() is None, "the server has ended"
        time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    os.killpg(process.pid, 9)
    process.wait()


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_an_output_that_repeats_itself_without_end_is_ended(engine, server):
    turns = ["Where are you?", "I am in the middle of a room. " * 20, "And now?"]
    for asked in engine, ServerEngine(server, "tiny"):
        (output,) = ask(asked, turns, max_tokens=300)
        assert output.finish == "repetition" and output.tokens < 100
        assert "outputs ended since they repeated themselves" in asked.usage()


def test_a_server_answers_like_the_engine_in_the_process(engine, server):
    remote = ServerEngine(server, "tiny")
    (here,), (there,) = ask(engine), ask(remote)
    assert (here.text, here.tokens) == (there.text, there.tokens)
    assert remote.tokens_out == there.tokens and remote.tokens_in > 10
    assert len({output.text for output in ask(remote, ["Tell me a story."], temperature=1.0, n=3)}) == 3  # no top_k
    assert re.fullmatch("yes|no", ask(remote, regex="yes|no")[0].text)
    assert ask(remote, ["word " * 3000])[0].finish == "context"
    with pytest.raises(UserError, match="does not serve 'other' but tiny"):
        ServerEngine(server, "other")


def test_a_stage_runs_through_a_server(script, server, tmp_path):
    (tmp_path / "expert.jsonl").write_text(json.dumps(ROW) + "\n")
    done = script("stage1_sample.py", "--api-base", server, "--model", "tiny", "--trajectories", "expert.jsonl",
                  "--out", "candidates.jsonl", "--n-samples", 2, "--max-tokens", 8, "--max-model-len", 1024, OPENAI_API_KEY="sk-secret")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "candidates.jsonl").read_text().splitlines())
    assert row["key"] == f"{ROW['key']}/step1"
    assert sum(candidate["count"] for candidate in row["candidates"]) + row["invalid"] == 2
    assert "sk-secret" not in done.stdout + done.stderr + (tmp_path / "candidates.jsonl").read_text()
