"""Which engine answers a stage: vLLM in this process, or an OpenAI-compatible server, which --api-base names."""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import FIRST_COMPLETED, wait

from common import ENDLESS, Engine, LocalEngine, Output, UserError


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

    The client tries again, with back-off, after rate limits, failures, half answers and answers that do not
    come within `timeout` seconds; a request that still gets none ends as "failed: ...". Requests wait in one
    background thread that never keeps the process from ending.
    """

    def __init__(self, api_base: str, model: str, timeout: float = 600, tries: int = 9) -> None:
        import asyncio
        import threading

        import openai
        self.model, self.tries = model, tries
        options: dict = {"base_url": api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none")}
        served = self._served_models(openai.OpenAI(**options, max_retries=0, timeout=10), api_base)
        if model not in served:
            raise UserError(f"{api_base} does not serve '{model}' but {', '.join(served) or 'nothing'}; mend --model")
        self.client = openai.AsyncOpenAI(**options, max_retries=tries - 1, timeout=timeout, http_client=openai.
                                         DefaultAsyncHttpxClient(event_hooks={"response": [refuse_half_answers]}))
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        # As in this process: else a server takes its defaults from the model's generation_config.json.
        self.extra = ({"repetition_detection": ENDLESS, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
                      if served[model] == "vllm" else {})
        self.pending: dict = {}

    @staticmethod
    def _served_models(client, api_base: str) -> dict[str, str | None]:
        """{model: who owns it} of the models that a server lists."""
        import openai
        try:
            return {entry.id: getattr(entry, "owned_by", None) for entry in client.models.list()}
        except openai.APIConnectionError:
            raise UserError(f"no server answers at {api_base}; start one (vllm serve MODEL) or mend --api-base") from None
        except openai.APIStatusError as error:
            raise UserError(f"{api_base} answered {error.status_code} when asked for its models; is it an "
                            "OpenAI-compatible server (the address often ends in /v1), is OPENAI_API_KEY right?") from None
        except Exception:  # whatever else listens there does not speak this protocol
            raise UserError(f"{api_base} does not answer like an OpenAI-compatible server; "
                            "is another program using that port?") from None

    @property
    def busy(self) -> bool:
        return bool(self.pending)

    def submit(self, name: object, turns: list[str], *, n: int = 1, regex: str | None = None, **sampling: object) -> None:
        import asyncio
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        extra = self.extra | ({"structured_outputs": {"regex": regex}} if regex else {})  # of vLLM's own, as far as known
        self.pending[asyncio.run_coroutine_threadsafe(self._complete(
            messages=messages, n=n, **sampling, extra_body=extra), self.loop)] = name

    async def _complete(self, **request: object) -> tuple[list[Output], int]:
        """(completions, tokens of the prompt)"""
        import openai
        try:
            reply = await self.client.chat.completions.create(model=self.model, **request)
            tokens_in, tokens = (reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else (0, 0)
            return [Output(choice.message.content or "", tokens // request["n"], choice.finish_reason)
                    for choice in reply.choices], tokens_in
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if "context" in str(error).lower():
                return [Output("", 0, "context")] * request["n"], 0
            if request["extra_body"]:  # not a server of vLLM's
                return await self._complete(**request | {"extra_body": None})
            reason = f"the server refused the request: {error}".replace(self.client.api_key, "...")
        except openai.APIStatusError as error:
            reason = f"the server answered {error.status_code}"
        except openai.APIConnectionError as error:
            reason = f"the server gave no answer to {self.tries} tries: {error.__cause__ or error}"
        return [Output("", 0, f"failed: {reason}")] * request["n"], 0

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


def make_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options of `add_engine_options` ask for."""
    if args.api_base:
        if args.engine_args:
            raise UserError("--engine-args are for vLLM in this process; with --api-base give them to the server")
        return ServerEngine(args.api_base, args.model)
    return LocalEngine(args.model, args.max_model_len, args.seed, args.engine_args)
