"""Asking the frozen base model in stages 3 and 4: what it is shown, how often it is asked, and checks of what
it writes."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Collection, Iterator

from common import (BULLET, Output, UserError, fill, generate, normalise, prompt_path, read_prompt, stable_seed, turns_of,
                    unmarked)

REFUSED = "This is not possible here and only wastes a turn"  # the verdict on what the environment refuses


def fill_dialogue(name: str, **values: str) -> list[str]:
    """The turns of prompts/NAME.txt, which may begin with examples: a line `=== assistant` or `=== user` starts
    the next turn; the first is the user's and so is the last, which the model answers."""
    turns = re.split(r"^=== (?:assistant|user)\s*\n", read_prompt(name), flags=re.MULTILINE)
    if len(turns) % 2 == 0:
        raise UserError(f"{prompt_path(name)}: has {len(turns)} turns; it must begin and end with the user's")
    return [fill(turn, prompt_path(name), values) for turn in turns]


def steps_text(steps: list[dict]) -> str:
    """Thoughts, actions and observations in plain text, for the prompts of the base model (figures 5 and 6)."""
    return "\n".join(turns_of(steps)) or "(nothing has been done yet)"


def small_model():
    """What only a small base model and policy need; nothing else imports it."""
    return importlib.import_module("prompts.small_model")


def draft_sampling(args: argparse.Namespace, key: str, attempt: int) -> dict:
    """Sampling options of a draft: as asked at first, then with a little temperature."""
    return {"temperature": args.temperature if attempt == 0 else max(0.5, args.temperature),
            "max_tokens": args.max_tokens, "seed": stable_seed(args.seed, key, attempt)}


def drafts(engine, items: list[str], request: Callable[[str, int], tuple[list[str], dict]],
           check: Callable[[str, Output], tuple[str, str | None]], attempts: int, max_live: int
           ) -> Iterator[tuple[str, str | None, list[str]]]:
    """Generate once for every item and again where a check fails, up to `attempts` times.

    request(item, attempt) gives the turns and sampling options, check(item, output) the usable text and None,
    or anything and the reason for not using it. Yields (item, text or None, the reasons of drafts that were not
    used).
    """
    if not attempts:
        yield from ((item, None, []) for item in items)
        return
    queue = [(item, []) for item in reversed(items)]

    def requests() -> Iterator[tuple[object, list[str], dict]]:
        while queue:
            item, errors = queue.pop()
            yield (item, errors), *request(item, len(errors))

    while queue:
        for (item, errors), (output,) in generate(engine, requests(), max_live):
            if output.unanswered:
                reason = "prompt longer than the context" if output.finish == "context" else output.finish
                yield item, None, [*errors, reason]
                continue
            text, error = check(item, output)
            if error is None:
                yield item, text, errors
            elif len(errors) + 1 < attempts:
                queue.append((item, [*errors, error]))
            else:
                yield item, None, [*errors, error]


# --- Checks ----------------------------------------------------------------------------------------------------

# What would teach the policy that there was a simulation, a scratch-pad or a reward. "Expert" or "instructions" are ordinary words.
LEAKS = re.compile(r"\b(?:simulat(?:ed?|ions?|ing)|scratch-?\s?pads?|roll-?outs?|(?:imagined|private|mental) (?:futures?|notes?)|"
                   r"futures? (?:that )?I (?:have )?imagined|final rewards?|rewards? of \d|eyes only)\b", re.IGNORECASE)
SENTENCE = re.compile(r"\S(?:[^.!?\n]|[.!?](?!\s|$))*[.!?]+(?=\s|$)")  # 0.5 does not end one


def without_names(text: str, actions: Collection[str]) -> str:
    """The text with each action's name, which is the environment's, as one word: it may hold any word and occur
    often."""
    numbers = {normalise(action): f"<{number}>" for number, action in enumerate(actions)}
    names = "|".join(re.escape(name) for name in sorted(numbers, key=len, reverse=True))
    return re.sub(rf"\b(?:{names})(?!\w)", lambda found: numbers[found[0].lower()], text, flags=re.IGNORECASE)


def leak_in(text: str) -> bool:
    """Whether the text gives away that something was simulated."""
    return bool(LEAKS.search(text))


def plain_bullets(text: str) -> str:
    """The text with its bullets as in figure 6, `- <action>: <judgement>`: models number them, and set actions in
    bold, back-ticks or angle brackets."""
    return BULLET.sub(lambda found: f"- {unmarked(found[1])}: {found[2]}", text.replace("**", ""))


def first_sentences(text: str, count: int) -> str:
    """The first whole sentences; a last one that was cut off is left out."""
    return " ".join(sentence.strip() for sentence in SENTENCE.findall(text)[:count])


def one_line(prompt: list[str]) -> str:
    """A prompt's words, in small letters, with single blanks."""
    return " ".join(" ".join(prompt).split()).lower()


def copies(text: str, prompt: list[str]) -> bool:
    """Whether a sentence of at least six words is taken from the prompt as it is."""
    source = one_line(prompt)
    sentences = (" ".join(sentence.split()).lower() for sentence in SENTENCE.findall(text))
    return any(sentence.count(" ") >= 5 and sentence in source for sentence in sentences)


def quotes(own_words: str, prompt: list[str]) -> bool:
    """Whether ten words in a row are the prompt's. Actions' names, which may be long, should not be among the words."""
    source, words = one_line(prompt), own_words.lower().split()
    return any(" ".join(words[i:i + 10]) in source for i in range(len(words) - 9))


def repeats_itself(text: str) -> bool:
    """Whether a sentence or a bullet's judgement occurs twice, or a run of six words does."""
    parts = [part.strip().lower() for part in re.split(r"[.!?\n]+\s*|: ", text) if len(part.split()) > 3]
    words = text.lower().split()
    runs = [tuple(words[i:i + 6]) for i in range(len(words) - 5)]
    return len(set(parts)) < len(parts) or len(set(runs)) < len(runs)
