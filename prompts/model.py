"""What the stages share of a model: its folder, its number format, how a dialogue becomes its tokens, how it is saved."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import os
import re
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

from common import THINKING, UserError

# What chat templates are given besides the messages: no thinking, and one day for all dialogues, where a template writes a date.
CHAT_ARGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
OPEN_THINK = re.compile(rf"<({THINKING})>\s*\Z")


class ChatFormat:
    """A model's chat template, cut into pieces that never change as a dialogue grows.

    The token ids of a longer dialogue begin with those of the shorter one, whatever the template does with
    earlier turns: what is trained is what generation is prompted with and what the model must emit, and vLLM's
    prefix cache holds everything but the newest turn. An empty <think> block that a template writes into a
    prompt and not into the history (Qwen3) stays in the history.

    Raises UserError that names the model for a template that cannot be cut so.
    """

    def __init__(self, tokenizer, chat_args: dict | None = None) -> None:
        self.tokenizer, self.chat_args = tokenizer, CHAT_ARGS | (chat_args or {})
        if not tokenizer.chat_template:
            raise self._unfit("there is none; use an instruction-tuned model")
        # As many as a thousand long dialogues have; arrays, since a list of integers is nine times as large.
        self._ids = functools.lru_cache(maxsize=100_000)(lambda text: array("i", tokenizer(text, add_special_tokens=False).input_ids))
        self._cut()
        self._check()

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"the chat template of {self.tokenizer.name_or_path or 'the model'} cannot be used: {reason}")

    def _render(self, turns: list[str], prompt: bool = True) -> str:
        """The template's own text of a dialogue."""
        from datetime import datetime

        from jinja2 import TemplateError
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        day = datetime.strptime(CHAT_ARGS["date_string"], "%d %b %Y")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt,
                                                      strftime_now=day.strftime, **self.chat_args)
        except (TemplateError, TypeError, ValueError) as error:
            raise self._unfit(str(error)) from None

    def _cut(self) -> None:
        """Find the pieces: the template's text around turns that nothing else is like."""
        first, reply, following = "FIRST-TURN", "AGENT-REPLY", "NEXT-TURN"
        history = self._render([first, reply, following])
        try:
            self.before_first, self.after_first = self._render([first]).split(first)
            before, rest = history.split(first)
            before_reply, rest = rest.split(reply)
            after_reply, self.after_next = rest.split(following)
        except ValueError:
            raise self._unfit("it does not show each turn once") from None
        if before != self.before_first or not (before_reply.startswith(self.after_first) or
                                               self.after_first.startswith(before_reply)):
            raise self._unfit("a turn in the history looks unlike the prompt that it answered")
        # What the model itself writes before and after its reply: blanks, for some templates.
        self.lead = before_reply.removeprefix(self.after_first) if before_reply.startswith(self.after_first) else ""
        special = "|".join(re.escape(str(token)) for token in self.tokenizer.added_tokens_decoder.values())
        end = re.search(special, after_reply) if special else None
        if not end:
            raise self._unfit("no special token ends an agent's turn, so that its end could not be learnt")
        self.trail, self.after_reply = after_reply[:end.start()], after_reply[end.start():]
        self.end_of_turn = self._ids(self.after_reply)[0]
        if not self._render([first, reply], prompt=False).partition(reply)[2].startswith(self.trail + end[0]):
            raise self._unfit("the last turn of an agent ends unlike its earlier ones")
        if block := OPEN_THINK.search(self.after_next):
            closing = f"\n</{block[1]}>\n\n"  # the prompt opens a block of thinking, which the history does not keep
            if self.chat_args["enable_thinking"]:
                self.lead = closing + self.lead
            else:
                self.after_first, self.after_next = self.after_first + closing, self.after_next + closing

    def _check(self) -> None:
        """Compare with the template's own text of a dialogue, but for a think block that it leaves out."""
        turns = ["Line.\n\nLine: - `x` {y}", "Thought: \"a\".\nAction: look", "Observation:", "Action: go", "Observation: an end."]
        whole = "".join((self.before_first + turn + self.after_first) if i == 0 else self.lead + turn + self.trail if i % 2
                        else self.after_reply + turn + self.after_next for i, turn in enumerate(turns))
        blocks = re.compile(rf"<({THINKING})>\s*(?:</\1>\s*)?")
        if blocks.sub("", whole).strip() != blocks.sub("", self._render(turns)).strip():
            raise self._unfit("it writes turns in a longer dialogue unlike in a shorter one")

    def pieces(self, turns: list[str | list[int]]) -> list[Sequence[int]]:
        """Token ids of each turn with the template's text around it; odd ones are exactly what the agent
        writes, and may be given as the ids that it wrote: there is more than one way to spell a text, and the
        cache knows only the one."""
        pieces = []
        for i, turn in enumerate(turns):
            if i == 0:
                pieces.append(self._ids(self.before_first + turn + self.after_first))
            elif i % 2:
                pieces.append(turn if isinstance(turn, list) else self._reply(turn))
            else:
                pieces.append(self._ids(self.after_reply + turn + self.after_next))
        return pieces

    def _reply(self, turn: str) -> Sequence[int]:
        """The ids of an agent's turn as they follow its prompt: some tokenizers begin every text with a blank."""
        before, whole = self._ids(self.after_next), self._ids(self.after_next + self.lead + turn + self.trail)
        return whole[len(before):] if whole[:len(before)] == before else self._ids(self.lead + turn + self.trail)

    def spells(self, ids: list[int], text: str) -> bool:
        """Whether the tokens are those of the text and nothing else: no end of turn, no stop string, no role
        marker, no blank of the template's."""
        return not self.lead and not self.trail and self.tokenizer.decode(ids) == text

    def encode(self, turns: list[str | list[int]]) -> list[int]:
        return [token for piece in self.pieces(turns) for token in piece]


def bfloat16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware: a GPU, or a CPU with AMX or AVX512-BF16."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_model_folder(model: str) -> None:
    """A local folder must hold a checkpoint; anything else is taken for a name on the model hub."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: has no config.json, so it is not a model folder")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder}: has no *.safetensors weights; was the training that writes it interrupted?")
    elif model.startswith((".", "/", "runs/", "models/")):
        raise UserError(f"{folder}: there is no such model folder; train it first, or check --model")


def check_saving(model, tokenizer) -> None:
    """Raise UserError if what was loaded cannot be saved: better now than after the training."""
    import torch
    from transformers import AutoModelForCausalLM
    try:
        if getattr(model.config, "quantization_config", None):
            raise ValueError("its weights are quantized; take the model with plain ones")
        with torch.device("meta"):  # as `save_checkpoint` will
            twin = AutoModelForCausalLM.from_config(model.config)
        if other := set(twin.state_dict()) ^ set(model.state_dict()):
            raise ValueError(f"transformers would save it with other weights: {', '.join(sorted(other)[:3])}")
        with tempfile.TemporaryDirectory() as folder:
            for part in model.config, model.generation_config, tokenizer:
                part.save_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{model.name_or_path}: was loaded and cannot be saved again ({' '.join(str(error).split())}); mend that "
                        "before the training") from None


def generation_config(model):
    """A model's generation config as it can be written: some set a temperature and no do_sample, and mean to sample."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample = config.do_sample or any(getattr(config, name) is not None for name in ("temperature", "top_p", "top_k"))
    return config


def save_checkpoint(weights: dict, source, dtype, folder: Path) -> None:
    """Write whole `weights` as a plain checkpoint in `dtype`, with the configuration of the model that they are
    from: that may be sharded, or marked as quantized, so a new one takes them."""
    import torch
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = generation_config(source)
    model.save_pretrained(folder)


# ---- Trackers ----


def add_report_option(group) -> None:
    group.add_argument("--report-to", choices=("none", "tensorboard", "wandb", "trackio"), default="none", help="where losses, rewards "
                       "and deliberation rates are logged, by transformers' own integrations; default: %(default)s")


def tracking(report_to: str, folder: Path) -> dict:
    """TrainingArguments for a tracker of what is made in `folder`, such as runs/x/iter1, whose last two names are the run's
    there; TensorBoard's files go into it. Raises UserError where the tracker's package is missing."""
    folder = folder.absolute()
    if report_to == "none":
        return {"report_to": "none"}
    if not importlib.util.find_spec(report_to):
        raise UserError(f"--report-to {report_to}: the package is not installed; `.venv/bin/pip install {report_to}`")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
    return {"report_to": [report_to], "run_name": f"{folder.parent.name}/{folder.name}"}


def track(report_to: str, folder: Path, logs: dict[str, float]) -> None:
    """Log figures that belong to no training step beside the losses of the training."""
    settings = tracking(report_to, folder)
    if report_to == "none":
        return
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks
    arguments, state = TrainingArguments(output_dir=str(folder), **settings), TrainerState(is_world_process_zero=True)
    for callback in (kind() for kind in get_reporting_integration_callbacks([report_to])):
        callback.on_log(arguments, state, TrainerControl(), logs=logs)
        callback.on_train_end(arguments, state, TrainerControl())


def add_chat_options(group) -> None:
    group.add_argument("--chat-args", type=lambda text: CHAT_ARGS | json_object(text), default=CHAT_ARGS, metavar="JSON",
                       help="what the chat template is given besides the messages, such as '{\"enable_thinking\": true}'; default: "
                       f"{json.dumps(CHAT_ARGS)}")


def json_object(text: str) -> dict:
    """An option's value that is a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
