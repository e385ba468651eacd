"""What a user can rely on whatever chat model they train: the templates of the field's families (tests/templates, without
their branches for tools and images) give the same tokens in training and in generation."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from common import UserError
from prompts.model import CHAT_ARGS, ChatFormat
from stage5_finetune import supervised_tokens

FOLDER = Path(__file__).with_name("templates")
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if path.stem != "gpt-oss")
TURNS = ["You are in a room.\n\nFind a mug.", "Thought: I look.\nAction: look", "Observation:", "Action: go north", "Observation: a mug",
         "Thought: There it is.\nAction: take mug"]
SPECIAL = {"llama-2": ("<s>", "</s>"), "llama-3": ("<|begin_of_text|>", "<|eot_id|>"), "qwen": ("<|endoftext|>", "<|im_end|>"),
           "mistral": ("<s>", "</s>"), "gemma": ("<bos>", "<eos>"), "phi": ("<s>", "<|endoftext|>"),
           "smollm": ("<|im_start|>", "<|im_end|>"), "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
           "gpt-oss": ("<|startoftext|>", "<|return|>")}
MORE = ["<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<start_of_turn>", "<end_of_turn>", "<|user|>",
        "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>", "<|start|>", "<|message|>", "<|channel|>"]


def tokenizer_of(template, bos="<s>", eos="</s>", name="stand-in", **pre):
    """A byte-level tokenizer with the families' special tokens, or one that begins every text with a blank."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if not pre else ["▁", *map(chr, range(10, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    if pre:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**pre)
        tokenizer.decoder = decoders.Metaspace(**pre)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in dict.fromkeys([bos, eos, *MORE])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False)
    fast.chat_template, fast.name_or_path = template, name
    return fast


def tokenizer_for(name):
    bos, eos = next(tokens for family, tokens in SPECIAL.items() if name.startswith(family))
    return tokenizer_of((FOLDER / f"{name}.jinja").read_text(), bos, eos, name)


def own_text(tokenizer, turns, prompt=True, **chat_args):
    """What the template itself makes of a dialogue, on the day of CHAT_ARGS."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt,
                                         strftime_now=datetime(2024, 7, 26).strftime, **CHAT_ARGS | chat_args)


def without_blocks(text):
    """The text without blocks of thinking, which some templates leave out of the history, and without blanks."""
    return re.sub(r"\s+|</?think>", "", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_templates_own_token_by_token(name):
    tokenizer = tokenizer_for(name)
    chat = ChatFormat(tokenizer)
    for length in 1, 3, 5:
        own = own_text(tokenizer, TURNS[:length])
        if name == "deepseek-r1-distill":  # the prompt opens a block of thinking; here it is closed at once
            own += "\n</think>\n\n"
        if "<think>" not in own:
            assert chat.encode(TURNS[:length]) == tokenizer(own, add_special_tokens=False).input_ids
        decoded = tokenizer.decode(chat.encode(TURNS[:length]))
        assert own == decoded or length > 1 and without_blocks(own) == without_blocks(decoded)
        # The newest turn's prompt is exactly the template's, whatever the history's blocks of thinking are.
        assert decoded.endswith(own[own.rindex(TURNS[length - 1]):])


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_trained_is_what_generation_is_prompted_with_and_what_the_model_must_write(name, thinking):
    tokenizer = tokenizer_for(name)
    chat = ChatFormat(tokenizer, {"enable_thinking": thinking})
    ids, labels = supervised_tokens(TURNS, chat, 10_000)
    learnt_before = 0
    for i in 1, 3, 5:
        prompt = chat.encode(TURNS[:i])
        assert ids[:len(prompt)] == prompt
        end = next((place for place in range(len(prompt), len(ids)) if labels[place] == -100), len(ids))
        learnt = ids[len(prompt):end]
        assert labels[len(prompt):end] == learnt and learnt[-1] == chat.end_of_turn
        assert tokenizer.decode(learnt[:-1]).removeprefix("\n</think>\n\n").strip(" ") == TURNS[i]
        assert tokenizer.decode(learnt[-1:]) in ("</s>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>")
        assert all(label == -100 for label in labels[learnt_before:len(prompt)])  # prompts and observations are not
        learnt_before = end
    whole = own_text(tokenizer, TURNS, prompt=False, enable_thinking=thinking)
    assert without_blocks(whole).startswith(without_blocks(tokenizer.decode(ids)))


@pytest.mark.parametrize("name", ["qwen3", "smollm3", "deepseek-r1-distill"])
def test_a_model_does_not_think_unless_it_is_asked_to(name):
    tokenizer = tokenizer_for(name)
    silent = tokenizer.decode(ChatFormat(tokenizer).encode(TURNS[:3]))
    assert silent.endswith("</think>\n\n") or silent.endswith("</think>\n")
    thinks = tokenizer.decode(ChatFormat(tokenizer, {"enable_thinking": True}).encode(TURNS[:3]))
    assert thinks.endswith("<think>\n") if name == "deepseek-r1-distill" else not thinks.endswith("</think>\n")


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.2", "mistral-small-3", "smollm3"])
def test_no_prompt_has_todays_date(name):
    text = tokenizer_for(name).decode(ChatFormat(tokenizer_for(name)).encode(TURNS[:1]))
    assert "26 Jul" in text or "2024-07-26" in text and str(datetime.now().year) not in text
    if name.startswith("llama"):
        other = ChatFormat(tokenizer_for(name), {"date_string": "1 Jan 2025"}).encode(TURNS[:1])
        assert "1 Jan 2025" in tokenizer_for(name).decode(other)


@pytest.mark.parametrize("name", ["llama-2", "mistral-7b-v0.2", "mistral-7b-v0.3"])
@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_tokenizer_that_begins_texts_with_a_blank_gives_the_tokens_of_the_whole_text(name, scheme):
    tokenizer = tokenizer_of((FOLDER / f"{name}.jinja").read_text(), prepend_scheme=scheme)
    chat = ChatFormat(tokenizer)
    for length in 1, 3, 5:
        whole = tokenizer(own_text(tokenizer, TURNS[:length]), add_special_tokens=False).input_ids
        assert chat.encode(TURNS[:length]) == whole


CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


@pytest.mark.parametrize("template, reason", [
    ((FOLDER / "gpt-oss.jinja").read_text(), "the last turn of an agent ends unlike its earlier ones"),
    ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no special token ends an agent's turn"),
    (CHATML.replace("<|im_end|>", ""), "the last turn of an agent ends unlike its earlier ones"),
    ("{{ messages[-1]['content'] }}", "it does not show each turn once"),
    ("{{ raise_exception('Only tools are answered') }}", "Only tools are answered"),
    ("{{ messages | length }}" + CHATML, "a turn in the history looks unlike the prompt that it answered"),
    ("", "there is none; use an instruction-tuned model"),
])
def test_a_template_that_cannot_be_used_is_refused_by_the_models_name(template, reason):
    with pytest.raises(UserError, match=f"the chat template of acme/chat cannot be used: .*{re.escape(reason)}"):
        ChatFormat(tokenizer_of(template, name="acme/chat"))
