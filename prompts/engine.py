"""The two engines: vLLM in this process, and an OpenAI-compatible server, which --api-base names."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from urllib.parse import urljoin

from common import ENDLESS, FAILED, PERMANENT, Output, UserError, launched
from prompts.model import CHAT_ARGS, ChatFormat, add_chat_options, bfloat16_is_fast, check_model_folder, json_object


class Engine:
    """What both engines count."""

    requests = tokens_in = tokens_out = endless = 0
    seconds_to_start = 0.0

    def count(self, outputs: list[Output]) -> list[Output]:
        self.requests += 1
        self.tokens_out += sum(output.tokens for output in outputs)
        self.endless += sum(output.finish == "repetition" for output in outputs)
        return outputs

    def asked(self, rows: int, seconds: float) -> dict:
        """For a sidecar: what the rows that this process has made have cost."""
        return {"asked": {"rows": rows, "requests": self.requests, "tokens in": self.tokens_in, "tokens out": self.tokens_out,
                          "seconds to start": round(self.seconds_to_start, 1), "seconds": round(seconds, 1)}}

    def written(self) -> str:
        endless = f", {self.endless} outputs ended since they repeated themselves without end" if self.endless else ""
        return f"{self.tokens_out} tokens out{endless}"


class LocalEngine(Engine):
    """vLLM in this process, stepped request by request: `submit` at any time, `poll` runs one step.

    `engine_args` are more of vLLM's EngineArgs. Raises UserError for a model or arguments that vLLM does not
    take.
    """

    def __init__(self, model: str, max_model_len: int, seed: int, engine_args: dict | None = None,
                 chat_args: dict | None = None) -> None:
        check_model_folder(model)
        engine_args = engine_args or {}
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
                            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                            # A fork would keep the environments' pipes open, so that these would not end with
                            # them.
                            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                            "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)
        import logging
        import warnings
        logging.getLogger("vllm").setLevel(logging.ERROR)  # it warns while it is imported, before it reads its own level
        warnings.filterwarnings("ignore", category=FutureWarning)
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        options: dict = {}
        if current_platform.is_cpu():
            os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # else vLLM computes with a single one
            # Eager: compiling takes minutes. Whole prompts: with chunked ones vLLM 0.32 fails on a request that
            # has a seed ("CPU Generator does not use offset"). Small blocks: only whole ones are found again in
            # the prefix cache, and a turn is shorter than the default 128 tokens.
            options = {"enforce_eager": True, "dtype": "bfloat16" if bfloat16_is_fast() else "float32",
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max_model_len, "block_size": 32}
        elif launched()[1] > 1:
            local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
            size = engine_args.get("tensor_parallel_size", 1) * engine_args.get("pipeline_parallel_size", 1)
            options = {"device_ids": devices(local, current_platform.device_count(), size)}
        own = {"model": model, "max_model_len": max_model_len, "seed": seed, "tokenizer_mode": "hf",  # as in training
               "disable_log_stats": False}  # `usage` reads them
        options |= own | {"enable_prefix_caching": True, "use_tqdm_on_load": False, "generation_config": "vllm"}
        if unknown := engine_args.keys() - (EngineArgs.__dataclass_fields__.keys() - own.keys()):
            raise UserError("vLLM does not take these --engine-args, or they are set by the stage or another option: "
                            f"{', '.join(map(repr, sorted(unknown)))}")
        if engine_args.get("data_parallel_size", 1) != 1:
            raise UserError("--engine-args: data_parallel_size needs a server; start `vllm serve` with it and give --api-base")
        try:
            # What vLLM's LLM says of itself, for batches as large; an engine of no context gets 128 requests at
            # most.
            self.engine = LLMEngine.from_engine_args(EngineArgs(**options | engine_args),
                                                     usage_context=UsageContext.LLM_CLASS)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split("\n", 3)[:3])  # pydantic names the argument in the second line
            raise UserError(f"vLLM cannot load the model '{model}': {reason}") from None
        self.format = ChatFormat(self.engine.get_tokenizer(), chat_args)
        self.longest = max_model_len
        self.too_long: list[tuple[object, list[Output]]] = []
        self.waiting: deque[tuple] = deque()  # (name, token ids, vLLM's SamplingParams)
        self.running: dict[str, tuple] = {}
        self.most: float = float("inf")  # requests in vLLM at once
        self.submitted = 0

    @property
    def busy(self) -> bool:
        return bool(self.too_long or self.waiting or self.running)

    def submit(self, name: object, turns: list[str], *, n: int = 1, max_tokens: int, regex: str | None = None,
               **sampling: object) -> None:
        """Ask for `n` completions of a dialogue; `poll` returns them under `name`. regex constrains the output;
        `sampling` is temperature, seed and stop."""
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
        ids = self.format.encode(turns)
        room = self.longest - len(ids)
        if room < 1:
            self.too_long.append((name, [Output("", 0, "context")] * n))
            return
        self.tokens_in += len(ids)
        self.waiting.append((name, ids, SamplingParams(
            n=n, max_tokens=min(max_tokens, room), stop_token_ids=[self.format.end_of_turn], **sampling,
            structured_outputs=StructuredOutputsParams(regex=regex) if regex else None,
            repetition_detection=RepetitionDetectionParams(**ENDLESS), output_kind=RequestOutputKind.FINAL_ONLY)))
        self._admit()

    def _admit(self) -> None:
        """Hand waiting requests to vLLM as long as there is room."""
        while self.waiting and len(self.running) < self.most:
            request = _, ids, sampling = self.waiting.popleft()
            self.submitted += 1
            self.running[str(self.submitted)] = request
            self.engine.add_request(str(self.submitted), {"prompt_token_ids": ids}, sampling)

    def _make_room(self) -> None:
        """After the accelerator ran out of memory: begin all unfinished requests again, half as many at once.

        vLLM enters a prompt's blocks into the prefix cache before it computes them, so the cache has to go,
        too.
        """
        import torch
        live = len(self.running)
        if live == 1:
            raise UserError("out of memory with a single request in flight; lower --max-model-len or use a smaller model")
        self.most = max(1, live // 2)
        print(f"out of memory with {live} requests in flight; going on with at most {self.most}", file=sys.stderr)
        self.engine.abort_request(list(self.running))
        self.waiting.extendleft(reversed(self.running.values()))
        self.running.clear()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM keeps blocks of requests that were aborted; its prefix cache cannot be trusted")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._admit()

    def _output(self, completion) -> Output:
        """vLLM's completion as ours."""
        ended = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)  # by a token, not a text
        ids = list(completion.token_ids[:-1] if ended else completion.token_ids)
        return Output(completion.text, len(completion.token_ids), completion.finish_reason,
                      ids if self.format.spells(ids, completion.text) else None)

    def poll(self) -> list[tuple[object, list[Output]]]:
        """Run one step of the engine; the requests that it finished, as (name, completions)."""
        import torch
        finished, self.too_long = self.too_long, []
        if self.running:
            try:
                results = self.engine.step()
            except torch.OutOfMemoryError:
                self._make_room()
                return finished
            for result in results:
                if result.finished:
                    outputs = [self._output(each) for each in sorted(result.outputs, key=lambda each: each.index)]
                    finished.append((self.running.pop(result.request_id)[0], self.count(outputs)))
            self._admit()
        return finished

    def usage(self) -> str:
        """What was asked of the model so far; the hit rate is the share of prompt tokens, those of each of n
        samples counted, that needed no computing."""
        counted = {metric.name: metric.value for metric in self.engine.get_metrics() if "prefix_cache" in metric.name}
        rate = counted["vllm:prefix_cache_hits"] / max(1, counted["vllm:prefix_cache_queries"])
        return (f"{self.tokens_in} tokens of prompts in (prefix cache hit rate {100 * rate:.0f} %), "
                f"{self.written()}")


def devices(local: int, visible: int, size: int) -> list[int]:
    """The GPUs of the process number `local` on this host, `size` for each: its own among all that are visible, or those
    that the launcher has let it see. Raises UserError where there are too few."""
    if visible == size:
        return list(range(size))
    if visible < size * (local + 1):
        raise UserError(f"process {local} of this host needs {size} GPUs of its own and {visible} are visible; start fewer "
                        "processes a host")
    return list(range(size * local, size * (local + 1)))


PROBE = "Hello"
# Terms of servers for what the engine in this process does: sampling from all tokens with nothing but a temperature, which
# else follows a server's or a model's defaults; and an end to outputs that repeat themselves.
PLAIN = {"top_p": 1}
BEYOND = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "repeat_penalty": 1, "repetition_detection": ENDLESS}


async def refuse_half_answers(response) -> None:
    """Let the client try again, as after a line that was dropped, where an answer is not what was asked for."""
    import httpx2  # the client's own
    if response.request.method != "POST" or response.status_code != 200:
        return
    try:
        choices = json.loads(await response.aread())["choices"]
        whole = all(each["finish_reason"] and each["message"] for each in choices)
        whole &= len(choices) == json.loads(response.request.content)["n"]
    except (ValueError, TypeError, LookupError):  # whatever misses in it
        whole = False
    if not whole:
        raise httpx2.RemoteProtocolError("half an answer")


class ServerEngine(Engine):
    """Any OpenAI-compatible server. The key comes from OPENAI_API_KEY alone and is never written anywhere.

    Servers differ in what they know: `_learn` finds it out with one short request before the first real one,
    and raises UserError for what would give other rows than vLLM in this process. The client tries again, with
    back-off, after rate limits, failures, half answers and answers that do not come within `timeout` seconds; a
    request that still gets none ends as "failed: ...". Requests wait in one background thread that never keeps
    the process from ending.
    """

    def __init__(self, api_base: str, model: str, timeout: float = 600, tries: int = 9, max_model_len: int | None = None,
                 chat_args: dict | None = None, n_samples: int = 2) -> None:
        import asyncio
        import threading

        import openai
        self.api_base, self.model, self.tries, self.longest = api_base, model, tries, max_model_len
        options: dict = {"base_url": api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none")}
        asked = openai.OpenAI(**options, max_retries=0, timeout=10)
        served = self._served_models(asked)
        if model not in served:
            raise UserError(f"{api_base} does not serve '{model}' but {', '.join(served) or 'nothing'}; mend --model")
        self._check_context(asked, served[model])
        self._learn(asked.with_options(max_retries=tries - 1, timeout=timeout), chat_args or {}, max(2, n_samples))
        self.client = openai.AsyncOpenAI(**options, max_retries=tries - 1, timeout=timeout, http_client=openai.
                                         DefaultAsyncHttpxClient(event_hooks={"response": [refuse_half_answers]}))
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.pending: dict = {}

    def _served_models(self, client) -> dict[str, dict]:
        """{model: what the server says of it} of the models that it lists; some answer with the bare list. One that
        is dead, or still loads its model, is asked again."""
        import httpx2  # the client's own
        import openai
        try:
            try:
                reply = client.get("/models", cast_to=httpx2.Response)
            except (openai.APIConnectionError, openai.InternalServerError):
                print(f"{self.api_base} does not answer; asking again, {self.tries} times", file=sys.stderr)
                reply = client.with_options(max_retries=self.tries - 1).get("/models", cast_to=httpx2.Response)
            listed = reply.json()
            return {entry["id"]: entry for entry in (listed if isinstance(listed, list) else listed["data"])}
        except openai.APIConnectionError:
            raise UserError(f"no server answers at {self.api_base}; start one (vllm serve MODEL) or mend --api-base") from None
        except openai.APIStatusError as error:
            raise UserError(f"{self.api_base} answered {error.status_code} when asked for its models; is it an "
                            "OpenAI-compatible server (the address often ends in /v1), is OPENAI_API_KEY right?") from None
        except Exception:  # whatever else listens there does not speak this protocol
            raise UserError(f"{self.api_base} does not answer like an OpenAI-compatible server; "
                            "is another program using that port?") from None

    def _check_context(self, client, entry: dict) -> None:
        """Raise UserError where the server cuts dialogues shorter than --max-model-len, or is an Ollama that samples
        in a way which requests cannot change. vLLM, llama.cpp and Ollama tell, each in its own place."""
        import httpx2
        import openai
        context, owner = entry.get("max_model_len"), entry.get("owned_by")
        try:
            if owner == "llamacpp":
                props = client.get(urljoin(self.api_base, "/props"), cast_to=httpx2.Response).json()
                context = props["default_generation_settings"]["n_ctx"]
            elif owner == "library":
                shown = client.post(urljoin(self.api_base, "/api/show"), body={"model": self.model}, cast_to=httpx2.Response).json()
                own = dict(line.split(None, 1) for line in shown.get("parameters", "").splitlines() if " " in line)
                context = int(own.get("num_ctx", 4096))
                if (own.get("top_k"), float(own.get("repeat_penalty", 1.1)), float(own.get("min_p", 0))) != ("0", 1, 0):
                    raise UserError(f"Ollama samples '{self.model}' with its own top_k and repeat_penalty, which requests cannot "
                                    f"change; serve one made by `ollama create` from a Modelfile with FROM {self.model}, PARAMETER "
                                    f"top_k 0, PARAMETER repeat_penalty 1, PARAMETER num_ctx {self.longest or 8192}")
        except (openai.APIError, LookupError, TypeError, ValueError, AttributeError):
            pass  # another server that calls itself so
        if self.longest and isinstance(context, int) and context < self.longest:
            raise UserError(f"{self.api_base} serves '{self.model}' with a context of {context} tokens, less than --max-model-len "
                            f"{self.longest}; start it with more, or give --max-model-len {context}")

    def _learn(self, client, chat_args: dict, n: int) -> None:
        """Find out with a short request which terms the server knows: whether it gives n completions at once, what it
        calls the token limit, and which of the fields beyond OpenAI's it takes."""
        import openai
        self.limit, self.many = "max_tokens", True
        self.extra: dict = PLAIN | BEYOND | {"chat_template_kwargs": chat_args or CHAT_ARGS}
        while True:
            try:
                reply = client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": PROBE}], n=n if self.many else 1, temperature=1.0,
                    seed=0, stop=["\nObservation:"], **{self.limit: 16}, extra_body=self.extra)
                self.many &= len(reply.choices) == n
                return
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                self._give_way(" ".join(error.response.text.replace(client.api_key, "...").split()), chat_args)
            except openai.APIStatusError as error:
                raise UserError(f"{self.api_base} answered {error.status_code} to a first short request; look at its log") from None
            except openai.APIConnectionError as error:
                raise UserError(f"{self.api_base} gave no answer to a first short request ({error.__cause__ or error}); look at "
                                "its log") from None

    def _give_way(self, refusal: str, chat_args: dict) -> None:
        """Change the terms after a refusal of the first request; raise UserError where that cannot be."""
        named = [name for name in self.extra if re.search(rf"\b{name}\b", refusal)]
        if "max_completion_tokens" in refusal and self.limit == "max_tokens":
            self.limit = "max_completion_tokens"
        elif self.many and not named and re.search(r"(?<![\\\w])n\b", refusal):
            self.many = False
        elif not self.extra or not named and re.search(r"\b(?:stop|seed|temperature)\b", refusal):
            raise UserError(f"{self.api_base} refuses a short request of the kind that the stages make: {refusal}")
        else:
            lost = named or list(self.extra)
            if "chat_template_kwargs" in lost and chat_args not in ({}, CHAT_ARGS):
                raise UserError(f"{self.api_base} takes no chat_template_kwargs, so that --chat-args cannot reach its template: "
                                f"{refusal}")
            self.extra = {name: value for name, value in self.extra.items() if name not in lost}

    @property
    def busy(self) -> bool:
        return bool(self.pending)

    def submit(self, name: object, turns: list[str], *, n: int = 1, seed: int, **sampling: object) -> None:
        import asyncio
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        # One by one, the samples have the seeds that vLLM gives those of one request.
        requests = [(n, seed)] if self.many else [(1, seed + i) for i in range(n)]
        self.pending[asyncio.run_coroutine_threadsafe(self._all(requests, messages, sampling), self.loop)] = name

    async def _all(self, requests: list[tuple[int, int]], messages: list[dict], sampling: dict) -> tuple[list[Output], int]:
        """(completions, tokens of the prompt) of several requests."""
        import asyncio
        answers = await asyncio.gather(*(self._complete(messages=messages, n=n, seed=seed, **sampling) for n, seed in requests))
        return [output for outputs, _ in answers for output in outputs], sum(tokens for _, tokens in answers)

    async def _complete(self, *, n: int, max_tokens: int, regex: str | None = None, **request: object) -> tuple[list[Output], int]:
        """(completions, tokens of the prompt) of one request. Like the engine in this process it asks for no more
        tokens than the context has room for."""
        import openai
        form = {"structured_outputs": {"regex": regex}} if regex else {}  # of vLLM's own, as far as known
        again = request | {"n": n, "regex": regex}
        try:
            reply = await self.client.chat.completions.create(model=self.model, n=n, **{self.limit: max_tokens}, **request,
                                                              extra_body=self.extra | form)
            tokens_in, tokens = (reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else (0, 0)
            room = self.longest - tokens_in if self.longest else max_tokens
            if room < 1:
                return [Output("", 0, "context")] * n, 0
            if min(tokens, max_tokens) > room:
                return await self._complete(max_tokens=room, **again)
            return [answer(choice, tokens // n) for choice in reply.choices], tokens_in
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if overflow := context_overflow(str(error)):
                room = overflow[0] - overflow[1]
                if 0 < room < max_tokens:
                    return await self._complete(max_tokens=room, **again)
                return [Output("", 0, "context")] * n, 0
            if regex:  # a server that knows no forms
                return await self._complete(max_tokens=max_tokens, **again | {"regex": None})
            reason = f"{PERMANENT}the server refused the request: {error}".replace(self.client.api_key, "...")
        except openai.APIStatusError as error:
            reason = f"{FAILED if error.status_code >= 500 else PERMANENT}the server answered {error.status_code}"
        except openai.APIConnectionError as error:
            reason = f"{FAILED}the server gave no answer to {self.tries} tries: {error.__cause__ or error}"
        return [Output("", 0, reason)] * n, 0

    def poll(self) -> list[tuple[object, list[Output]]]:
        """The requests that have finished; waits a little for the first, so that callers need no pause of their
        own."""
        done, _ = wait(self.pending, timeout=0.02, return_when=FIRST_COMPLETED)
        finished = []
        for future in done:
            outputs, tokens_in = future.result()
            self.tokens_in += tokens_in
            finished.append((self.pending.pop(future), self.count(outputs)))
        return finished

    def usage(self) -> str:
        return f"{self.tokens_in} tokens of prompts in, {self.written()}"


def answer(choice, tokens: int) -> Output:
    """A server's choice as ours. What a server's parser has put aside as reasoning comes before the answer again,
    as a model writes it."""
    message = choice.message
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if reasoning and not message.content and choice.finish_reason == "stop":
        return Output("", tokens, f"{PERMANENT}the server took the whole answer for reasoning; start it without a reasoning "
                      "parser, or with the model's own")
    closing = "\n</think>\n" if message.content else ""
    return Output((f"<think>\n{reasoning}{closing}" if reasoning else "") + (message.content or ""), tokens, choice.finish_reason)


def context_overflow(error: str) -> tuple[int, int] | None:
    """(the context's length, the prompt's) in tokens as a server reports that a request does not fit; (0, 0) where
    it gives no figures, None for another error."""
    if not re.search(r"context|too (?:long|large)|maximum length", error, re.IGNORECASE):
        return None
    limit = re.search(r"context (?:length|size|window)\D{0,20}(\d+)", error)
    prompt = re.search(r"(\d+) (?:tokens )?(?:in|from) the (?:messages|prompt|input)|(\d+) (?:input|prompt) tokens", error)
    return (int(limit[1]), int(prompt[1] or prompt[2])) if limit and prompt else (0, 0)


def add_engine_options(parser: argparse.ArgumentParser, *, model: str, temperature: float, max_tokens: int) -> None:
    """The options of every stage that generates."""
    group = parser.add_argument_group("generation")
    group.add_argument("--model", required=True, metavar="FOLDER", help=f"{model}: a folder, a hub name, or with "
                       "--api-base the name the server knows")
    group.add_argument("--api-base", metavar="URL", help="use this OpenAI-compatible server, such as "
                       "http://localhost:8000/v1 of `vllm serve`, instead of vLLM in this process")
    group.add_argument("--temperature", type=float, default=temperature, help="default: %(default)s")
    group.add_argument("--max-tokens", type=int, default=max_tokens, help="most tokens of one output; default: %(default)s")
    group.add_argument("--max-model-len", type=int, default=8192, help="longest context in tokens; default: %(default)s")
    group.add_argument("--max-live", type=int, default=16, help="requests or episodes in flight; default: %(default)s")
    group.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help="more of vLLM's EngineArgs, such "
                       """as '{"tensor_parallel_size": 2}' for a model that one GPU does not hold; without --api-base""")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_chat_options(group)


def make_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options of `add_engine_options` ask for."""
    started = time.time()
    if args.api_base:
        if args.engine_args:
            raise UserError("--engine-args are for vLLM in this process; with --api-base give them to the server")
        engine: Engine = ServerEngine(args.api_base, args.model, max_model_len=args.max_model_len, chat_args=args.chat_args,
                                      n_samples=getattr(args, "n_samples", 1))
    else:
        engine = LocalEngine(args.model, args.max_model_len, args.seed, args.engine_args, args.chat_args)
    engine.seconds_to_start = time.time() - started
    return engine
