"""What a user can rely on whichever OpenAI-compatible server answers: the same rows, or one line that says why not."""

import random

import pytest

from common import ENDLESS, UserError, generate
from conftest import Server, serve
from prompts.engine import PROBE, ServerEngine, context_overflow

TURNS = ["Look.", "Action: look", "Observation: a room"]
SAMPLING = {"temperature": 1.0, "seed": 7, "max_tokens": 50, "stop": ["\nObservation:"]}


class Dialect(Server):
    """A server that gives the same sample to the same dialogue and seed, and speaks as vLLM does."""
    listed = {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 100}]}
    asked: list
    unknown = ()  # fields that it refuses

    def do_GET(self):
        self.send(200, self.listed)

    def do_POST(self):
        import json
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        if refused := [name for name in request if name in self.unknown]:
            self.send(400, {"error": {"message": f"Unsupported parameter: '{refused[0]}' is not supported with this model."}})
        else:
            self.answer(request)

    def texts(self, request):
        return [f"Action: go {random.Random(request['seed'] + i).randrange(1000)}" for i in range(request["n"])]

    def answer(self, request):
        self.complete(*self.texts(request))


class LlamaCpp(Dialect):
    """One completion, whatever n is."""
    listed = {"data": [{"id": "m", "owned_by": "llamacpp"}]}

    def do_GET(self):
        self.send(200, {"default_generation_settings": {"n_ctx": 100}} if self.path == "/props" else self.listed)

    def answer(self, request):
        self.complete(self.texts(request)[0])


class OpenAI(Dialect):
    """Another name of the token limit, and no fields but its own."""
    listed = {"data": [{"id": "m", "owned_by": "openai"}]}
    unknown = ("top_k", "min_p", "repetition_penalty", "repeat_penalty", "repetition_detection", "chat_template_kwargs")

    def answer(self, request):
        if "max_tokens" in request:
            self.send(400, {"error": {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                                      "'max_completion_tokens' instead.", "param": "max_tokens"}})
        else:
            self.complete(*self.texts(request))


class BareList(Dialect):
    listed = [{"id": "m", "object": "model"}]


class OneChoice(Dialect):
    """A server that says that it gives one completion."""

    def answer(self, request):
        if request["n"] > 1:
            self.send(422, {"detail": "n must be 1"})
        else:
            self.complete(*self.texts(request))


class Ollama(LlamaCpp):
    listed = {"data": [{"id": "m", "owned_by": "library"}]}
    parameters = "num_ctx                        100\ntop_k    0\nrepeat_penalty   1"

    def do_POST(self):
        if self.path == "/api/show":
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send(200, {"parameters": self.parameters})
        else:
            super().do_POST()


def started(dialect, **changes):
    """-> (the server, its address, what it is asked)"""
    kind = type("Started", (dialect,), {"asked": [], **changes})
    return *serve(kind), kind.asked


def ask(dialect, n=3, engine=None, sampling=SAMPLING, **changes):
    server, address, asked = started(dialect, **changes)
    try:
        made = ServerEngine(address, "m", tries=2, **engine or {"max_model_len": 100})
        ((_, outputs),) = generate(made, [("name", TURNS, sampling | {"n": n})], 1)
    finally:
        server.shutdown()
    return outputs, [request for request in asked if request["messages"][-1]["content"] != PROBE]


@pytest.mark.parametrize("dialect", [LlamaCpp, OpenAI, BareList, OneChoice, Ollama])
def test_samples_are_the_same_whichever_server_gives_them(dialect):
    expected, (request,) = ask(Dialect)
    assert len({output.text for output in expected}) == 3
    assert request["top_k"] == 0 and request["repetition_detection"] == ENDLESS
    assert request["chat_template_kwargs"] == {"enable_thinking": False, "date_string": "26 Jul 2024"}
    outputs, requests = ask(dialect)
    assert [output.text for output in outputs] == [output.text for output in expected]
    assert len(requests) == (1 if dialect in (OpenAI, BareList) else 3)
    assert all(not set(request) & set(dialect.unknown) for request in requests)
    assert all(request.get("max_completion_tokens", request.get("max_tokens")) == 50 for request in requests)


@pytest.mark.parametrize("dialect, engine, reason", [
    (Dialect, {"max_model_len": 200}, "serves 'm' with a context of 100 tokens, less than --max-model-len 200; start it with more"),
    (LlamaCpp, {"max_model_len": 200}, "with a context of 100 tokens"),
    (Ollama, {"max_model_len": 200}, "with a context of 100 tokens"),
    (type("Default", (Ollama,), {"parameters": 'stop "x"'}), {}, "PARAMETER top_k 0, PARAMETER repeat_penalty 1"),
    (OpenAI, {"chat_args": {"enable_thinking": True}}, "takes no chat_template_kwargs, so that --chat-args cannot reach its template"),
    (type("Fixed", (Dialect,), {"unknown": ("stop",)}), {}, "refuses a short request of the kind that the stages make: .*'stop'"),
    (type("Fixed", (Dialect,), {"unknown": ("seed",)}), {}, "refuses a short request of the kind that the stages make: .*'seed'"),
])
def test_what_cannot_be_made_equal_is_refused_before_the_first_request(dialect, engine, reason):
    with pytest.raises(UserError, match=reason) as raised:
        ask(dialect, engine=engine)
    assert "\n" not in str(raised.value)


def reasoned(content, reasoning, finish="stop", name="reasoning_content"):
    class Reasons(Dialect):
        def answer(self, request):
            message = {"role": "assistant", "content": content, name: reasoning}
            self.complete(choices=[{"index": i, "finish_reason": finish, "message": message} for i in range(request["n"])])
    return Reasons


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_a_parser_has_put_aside_is_thinking_and_never_the_answer(name):
    from common import turn_of
    ((output,), _) = ask(reasoned("Action: look", "Action: wait?", name=name), n=1)
    assert output.text == "<think>\nAction: wait?\n</think>\nAction: look" and turn_of(output)["action"] == "look"
    ((output,), _) = ask(reasoned(None, "Action: wait", "length", name), n=1)  # it was still thinking
    assert output.text == "<think>\nAction: wait" and turn_of(output)["action"] == ""
    ((output,), _) = ask(reasoned(None, "Action: wait", name=name), n=1)
    assert output.unanswered and "start it without a reasoning parser" in output.finish


@pytest.mark.parametrize("message, figures", [
    ("This model's maximum context length is 100 tokens. However, you requested 140 tokens (90 in the messages, 50 in the "
     "completion). Please reduce the length.", (100, 90)),
    ("'max_tokens' or 'max_completion_tokens' is too large: 50. This model's maximum context length is 100 tokens and your "
     "request has 90 input tokens (50 > 100 - 90).", (100, 90)),
    ("You passed 90 input tokens and requested 50 output tokens. However, the model's context length is only 100 tokens.", (100, 90)),
    ("request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it", (0, 0)),
    ("prompt is too long", (0, 0)),
    ("invalid seed", None)])
def test_a_context_that_is_full_is_told_from_other_errors(message, figures):
    assert context_overflow(message) == figures
    if figures == (100, 90):
        class Strict(Dialect):
            def answer(self, request):
                self.complete(*["Action: look"] * request["n"]) if request["max_tokens"] <= 16 else self.send(400, {"error": {
                    "message": message}})
        outputs, requests = ask(Strict, n=2)
        assert [each["max_tokens"] for each in requests] == [50, 10] and outputs[0].text == "Action: look"
    elif figures:
        class Strict(Dialect):
            def answer(self, request):
                self.complete("Hi", "Hi") if request["max_tokens"] == 16 else self.send(400, {"error": {"message": message}})
        assert ask(Strict, n=2)[0][0].finish == "context"


def test_a_dialogue_ends_where_it_would_in_this_process():
    def long_prompt(tokens, written):
        class Long(Dialect):
            def answer(self, request):
                self.complete("Action: look", usage={"prompt_tokens": tokens, "completion_tokens": min(written, request["max_tokens"]),
                                                     "total_tokens": 0})
        return Long

    (output,), requests = ask(long_prompt(100, 5), n=1)
    assert output.finish == "context" and len(requests) == 1
    (output,), requests = ask(long_prompt(80, 40), n=1)
    assert [each["max_tokens"] for each in requests] == [50, 20] and output.tokens == 20
    (output,), requests = ask(long_prompt(80, 15), n=1)
    assert [each["max_tokens"] for each in requests] == [50] and output.tokens == 15
