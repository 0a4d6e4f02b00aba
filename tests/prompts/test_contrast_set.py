"""Conversations, rendering, batches and contrast sets."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from steerkit.errors import DataError
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, has_chat_template, render
from tests.tiny_tokenizers import BOS, CHATML, EOS, GEMMA, LLAMA3, TEMPLATES, byte_tokenizer

fast = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

MERGED = {name: byte_tokenizer(template) for name, template in TEMPLATES.items()}
BYTEWISE = {name: byte_tokenizer(template, merges=False) for name, template in TEMPLATES.items()}

HISTORY = (
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "<think>\nTwo and two, that is four.\n</think>\n\nFour."},
    {"role": "user", "content": "And three?"},
)

answers = st.text(min_size=1, max_size=24).filter(lambda text: "<" not in text)
awkward = [
    " leading",
    "trailing ",
    "\n\nlines\n",
    "\nHi",
    " ",
    "\n",
    "漢字 😀é",
    "e\u0301",
    "\r\n",
    "\x00",
    "\u2028",
    "[/INST]",
]


def with_awkward(test):
    for text in awkward:
        test = example(answer=text)(test)
    return test


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def conversations(answer):
    yield Conversation("How are you?", answer=answer)
    yield Conversation(HISTORY, answer=answer)


# Where the answer begins


@pytest.mark.parametrize("name", TEMPLATES)
@fast
@with_awkward
@given(answer=answers)
def test_the_answer_is_recovered_exactly_from_its_tokens(name, answer):
    tokenizer = BYTEWISE[name]
    for conversation in conversations(answer):
        rendered = render(tokenizer, conversation)
        assert decode(tokenizer, rendered.ids[rendered.prompt_length :]) == answer
        assert rendered.text[rendered.answer_start :] == answer
        assert decode(tokenizer, rendered.ids) == rendered.text


@pytest.mark.parametrize("name", TEMPLATES)
@fast
@with_awkward
@given(answer=answers)
def test_bug_07_a_token_of_prompt_and_answer_belongs_to_the_answer_and_no_other_does(name, answer):
    tokenizer = MERGED[name]
    for conversation in conversations(answer):
        rendered = render(tokenizer, conversation)
        first = rendered.prompt_length
        start, end = rendered.offsets[first]
        assert start <= rendered.answer_start < end
        assert all(stop <= rendered.answer_start for _, stop in rendered.offsets[:first])
        assert rendered.text[rendered.answer_start :] == answer
        assert decode(tokenizer, rendered.ids[first:]) == rendered.text[start:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_bug_07_an_answer_leaves_the_prompt_as_it_is_without_one(name):
    for prompt in ("How are you?", HISTORY):
        alone = render(BYTEWISE[name], Conversation(prompt))
        answered = render(BYTEWISE[name], Conversation(prompt, answer="Fine."))
        separator = " " if name == "llama2" else ""
        assert answered.text == alone.text + separator + "Fine."
        assert answered.ids[: len(alone.ids)] == alone.ids
        assert alone.prompt_length == len(alone.ids)
        assert alone.answer_start == len(alone.text)


def test_bug_07_counting_the_tokens_of_the_prompt_would_be_wrong_where_a_merge_crosses_the_boundary():
    tokenizer = MERGED["chatml"]
    alone = render(tokenizer, Conversation("How are you?"))
    answered = render(tokenizer, Conversation("How are you?", answer="\nHi"))
    assert answered.prompt_length == len(alone.ids) - 1
    assert decode(tokenizer, answered.ids[answered.prompt_length :]) == "\n\nHi"
    assert answered.text[answered.answer_start :] == "\nHi"


def test_bug_07_a_template_that_drops_thoughts_drops_them_inside_the_prompt_only():
    answer = "<think>\nThree and three.\n</think>\n\nSix."
    rendered = render(BYTEWISE["thinking"], Conversation(HISTORY, answer=answer))
    assert "that is four" not in rendered.text
    assert "Four." in rendered.text[: rendered.answer_start]
    assert decode(BYTEWISE["thinking"], rendered.ids[rendered.prompt_length :]) == answer


@pytest.mark.parametrize("thinks", [True, False])
def test_bug_07_the_answer_follows_the_generation_prompt_that_the_template_options_ask_for(thinks):
    options = {"enable_thinking": thinks}
    rendered = render(BYTEWISE["thinking"], Conversation("Hi", answer="Six."), chat_template_kwargs=options)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + ("" if thinks else "<think>\n\n</think>\n\n")
    assert rendered.text == prompt + "Six."
    assert decode(BYTEWISE["thinking"], rendered.ids[rendered.prompt_length :]) == "Six."


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tail", ["Fine.", "Fine. ", "Fine\n"])
def test_bug_08_a_rendering_with_an_answer_ends_with_the_answer_never_with_an_end_of_turn(name, tail):
    tokenizer = BYTEWISE[name]
    rendered = render(tokenizer, Conversation("How are you?", answer=tail))
    assert decode(tokenizer, rendered.ids[-1:]) == tail[-1]
    assert rendered.ids[-1] not in tokenizer.all_special_ids


def test_bug_08_a_rendering_without_an_answer_ends_with_the_generation_prompt():
    endings = {name: render(BYTEWISE[name], Conversation("Hi")).text for name in TEMPLATES}
    assert endings["chatml"].endswith("<|im_start|>assistant\n")
    assert endings["llama2"].endswith("Hi [/INST]")
    assert endings["llama3"].endswith("assistant<|end_header_id|>\n\n")
    assert endings["gemma"].endswith("<start_of_turn>model\n")


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma"])
def test_bug_09_a_template_that_brings_the_bos_gets_no_second_one(name):
    rendered = render(MERGED[name], Conversation("Hi", answer="Ho"))
    assert rendered.ids[0] == MERGED[name].bos_token_id
    assert rendered.ids.count(MERGED[name].bos_token_id) == 1


@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_bug_09_a_template_without_a_bos_gets_none_from_the_tokenizer(name):
    rendered = render(MERGED[name], Conversation("Hi", answer="Ho"))
    assert MERGED[name].bos_token_id not in rendered.ids


@pytest.mark.parametrize("prompt", ["Hi", f"{BOS}Hi", BOS])
@pytest.mark.parametrize("template", [None, LLAMA3])
def test_bug_09_plain_text_has_exactly_one_bos_whoever_wrote_it(prompt, template):
    tokenizer = byte_tokenizer(template)
    rendered = render(tokenizer, Conversation(prompt, answer="Ho", raw=True))
    assert rendered.ids[0] == tokenizer.bos_token_id
    assert rendered.ids.count(tokenizer.bos_token_id) == 1
    assert decode(tokenizer, rendered.ids[rendered.prompt_length :]) == "Ho"


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()])
def test_bug_11_the_tokenizer_is_left_as_it_was(template):
    tokenizer = byte_tokenizer(template)
    tokenizer.model_max_length = 8

    def state():
        attributes = {name: copy.deepcopy(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
        return attributes, tokenizer.backend_tokenizer.to_str()

    before = state()
    assert tokenizer.pad_token is None
    rendered = [render(tokenizer, Conversation("A long enough prompt", answer=text)) for text in ("Hi", "How long?")]
    for side in ("left", "right"):
        batches(rendered, 2, pad_id=pad_token_id(tokenizer), side=side)
    assert state() == before


# Chat templates


def test_whitespace_that_a_template_puts_before_the_answer_is_kept():
    rendered = render(BYTEWISE["llama2"], Conversation("Hi", system="Be kind.", answer="Hello"))
    assert rendered.text == f"{BOS}[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello"
    assert decode(BYTEWISE["llama2"], rendered.ids[: rendered.prompt_length]).endswith("[/INST] ")


def test_an_answer_is_never_stripped_by_the_template():
    assert render(BYTEWISE["llama2"], Conversation("Hi", answer="  Hello \n")).text.endswith("[/INST]   Hello \n")


def test_a_header_that_is_only_written_with_the_turn_comes_before_the_answer():
    headers = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(headers, merges=False)
    rendered = render(tokenizer, Conversation("Hi", answer="Ho"))
    assert rendered.text == "<user>Hi\n<assistant>Ho"
    assert decode(tokenizer, rendered.ids[rendered.prompt_length :]) == "Ho"


def test_words_that_a_template_puts_between_its_generation_prompt_and_an_answer_are_left_out():
    thought = "('[no thought]' if message['role'] == 'assistant' else '') + message['content']"
    tokenizer = byte_tokenizer(CHATML.replace("message['content']", thought), merges=False)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert "[no thought]Ho" in tokenizer.apply_chat_template(history, tokenize=False)
    assert render(tokenizer, Conversation.of(history)).text.endswith("<|im_start|>assistant\nHo")


def test_a_template_that_takes_no_assistant_turn_renders_an_answer_after_its_generation_prompt():
    only_user = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}"
        "{{ 'Q: ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert render(byte_tokenizer(only_user), Conversation("Hi", answer=" Ho")).text == "Q: Hi\nA: Ho"


def test_a_string_is_one_user_turn_and_a_system_prompt_comes_before_it():
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    assert render(MERGED["chatml"], Conversation("Hi")) == render(MERGED["chatml"], Conversation(turns[1:]))
    assert render(MERGED["chatml"], Conversation("Hi", system="Be kind.")) == render(
        MERGED["chatml"], Conversation(turns)
    )


@pytest.mark.parametrize("answer", [None, "Ho"])
def test_a_template_that_refuses_the_system_role_is_an_error_that_names_it(answer):
    tokenizer = byte_tokenizer(GEMMA)
    tokenizer.name_or_path = "/somewhere/models/tiny-gemma"
    with pytest.raises(DataError, match=r"tiny-gemma refuses .* system, user: System role not supported; write") as e:
        render(tokenizer, Conversation("Hi", system="Be kind.", answer=answer))
    assert "/somewhere" not in str(e.value)


def test_keys_of_a_message_beyond_role_and_content_reach_the_template():
    template = "{% for m in messages %}{{ m['content'] + m['mood'] }}{% endfor %}"
    turns = [{"role": "user", "content": "Hi", "mood": "!?", "name": None}]
    assert render(byte_tokenizer(template), Conversation.of(turns)).text == "Hi!?"


@pytest.mark.parametrize("option", ["tokenize", "add_generation_prompt", "continue_final_message", "return_dict"])
def test_template_options_that_are_set_here_are_refused(option):
    with pytest.raises(DataError, match=f"chat_template_kwargs: '{option}'"):
        render(MERGED["chatml"], Conversation("Hi"), chat_template_kwargs={option: True})


def test_has_chat_template():
    assert has_chat_template(byte_tokenizer())
    assert not has_chat_template(byte_tokenizer(None))


# Plain text


def test_plain_prompt_and_answer_are_joined_as_they_stand():
    tokenizer = byte_tokenizer(None, merges=False)
    rendered = render(tokenizer, Conversation("Paris is in", answer=" France"))
    assert rendered.text == "Paris is in France"
    assert rendered.prompt_length == 1 + len("Paris is in")
    assert rendered.answer_start == len("Paris is in")


def test_a_raw_prompt_bypasses_the_chat_template():
    assert render(MERGED["chatml"], Conversation("Love", raw=True)).text == "Love"
    assert render(MERGED["chatml"], Conversation("Love")).text != "Love"


@pytest.mark.parametrize("prompt", ["Hi", f"Hi{EOS}", ""])
def test_a_closing_eos_of_the_tokenizer_is_dropped_and_one_of_the_text_is_kept(prompt):
    rendered = render(byte_tokenizer(None, eos=True), Conversation(prompt))
    plain = render(byte_tokenizer(None), Conversation(prompt))
    assert rendered == plain
    assert len(rendered.ids) == len(rendered.offsets)


def test_an_answer_after_an_empty_prompt_begins_after_the_bos():
    rendered = render(byte_tokenizer(None, eos=True), Conversation("", answer="Hi"))
    assert (rendered.prompt_length, rendered.answer_start) == (1, 0)
    assert render(byte_tokenizer(None, bos=False), Conversation("", answer="Hi")).prompt_length == 0


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", [" ", "    ", "   Hi", " \n ", "😀"])
def test_tokens_of_spaces_belong_to_the_answer_even_where_offsets_are_trimmed(trim, answer):
    tokenizer = byte_tokenizer(None, merges=False, trim_offsets=trim)
    rendered = render(tokenizer, Conversation("Say:", answer=answer))
    assert decode(tokenizer, rendered.ids[rendered.prompt_length :]) == answer


def test_several_tokens_of_one_character_all_belong_to_the_side_the_character_is_on():
    tokenizer = byte_tokenizer(None, merges=False)
    rendered = render(tokenizer, Conversation("é", answer="漢é", raw=True))
    assert rendered.prompt_length == 1 + 2
    assert rendered.offsets[3:] == ((1, 2), (1, 2), (1, 2), (2, 3), (2, 3))


def test_messages_without_a_chat_template_become_plain_text_with_a_warning():
    tokenizer = byte_tokenizer(None)
    turns = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    with pytest.warns(UserWarning, match="has no chat template: messages and system prompts become plain text"):
        assert render(tokenizer, Conversation(turns)).text == "Be kind.\n\nHi"
    with pytest.warns(UserWarning, match="plain text"):
        assert render(tokenizer, Conversation(turns, answer="Ho")).text == "Be kind.\n\nHi\n\nHo"
    with pytest.warns(UserWarning, match="plain text"):
        assert render(tokenizer, Conversation("Hi", system="Be kind.", answer=" Ho")).text == "Be kind.\n\nHi Ho"


def test_the_warning_about_plain_text_is_shown_once_at_the_caller(recwarn):
    warnings.simplefilter("default")
    tokenizer = byte_tokenizer(None)
    for _ in range(3):
        render(tokenizer, Conversation(HISTORY))
    assert [warning.filename for warning in recwarn] == [__file__]  # the caller's line, whichever item it is


def test_a_tokenizer_without_offsets_serves_prompts_and_refuses_answers():
    slow = ByT5Tokenizer()
    rendered = render(slow, Conversation("Hé"))
    assert decode(slow, rendered.ids) == "Hé"  # without the EOS that it adds
    assert (rendered.prompt_length, rendered.offsets) == (3, ())
    with pytest.raises(DataError, match="ByT5Tokenizer tells no character offsets"):
        render(slow, Conversation("Hi", answer="Ho"))


def test_an_answer_or_a_prompt_without_a_token_is_refused():
    tokenizer = byte_tokenizer(None, bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(DataError, match="the answer '  ' yields no token"):
        render(tokenizer, Conversation("Hi", answer="  "))
    with pytest.raises(DataError, match="the prompt '  ' yields no token"):
        render(tokenizer, Conversation("  "))


# Conversations


def test_a_closing_assistant_turn_is_the_answer():
    made = Conversation.of([*HISTORY, {"role": "assistant", "content": "Six."}])
    assert made == Conversation(HISTORY, answer="Six.")
    assert Conversation.of(made) == made
    assert Conversation.of(HISTORY).answer is None


def test_what_is_given_beside_an_item_is_added_to_it():
    assert Conversation.of("Hi", answer="Ho", system="S") == Conversation("Hi", "Ho", "S")
    assert Conversation.of(Conversation("Hi"), answer="Ho", raw=True) == Conversation("Hi", "Ho", raw=True)
    system = {"role": "system", "content": "S"}
    assert Conversation.of(HISTORY, system="S") == Conversation((system, *HISTORY))


def test_a_conversation_does_not_follow_later_changes_of_the_list_it_was_made_of():
    turns = [{"role": "user", "content": "Hi"}]
    made = Conversation.of(turns)
    turns[0]["content"] = "changed"
    turns.append({"role": "user", "content": "more"})
    assert made.prompt == ({"role": "user", "content": "Hi"},)


USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Ho"}
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conversation("Hi", answer=""), "the answer is an empty string"),
        (lambda: Conversation("Hi", answer=5), "answer: expected a string, got 5"),
        (lambda: Conversation("Hi", system=5), "system: expected a string, got 5"),
        (lambda: Conversation(5), "expected a string or a list of messages, got 5"),
        (lambda: Conversation(b"Hi"), "expected a string or a list of messages"),
        (lambda: Conversation("Hi", raw="yes"), "raw is true or false, got 'yes'"),
        (lambda: Conversation((USER,), raw=True), "raw leaves a string as it is, got a list of messages"),
        (lambda: Conversation((USER,), system="S"), "cannot stand beside a list of messages"),
        (lambda: Conversation("Hi", system="S", raw=True), "cannot stand beside a raw prompt"),
        (lambda: Conversation("Hi \ud800"), "prompt: character 3 is a lone surrogate (U+D800)"),
        (lambda: Conversation.of([]), "an empty list of messages"),
        (lambda: Conversation.of([REPLY]), "an empty list of messages; give at least one turn before the answer"),
        (lambda: Conversation.of(["Hi"]), "message 0: expected an object with role and content, got 'Hi'"),
        (lambda: Conversation.of([USER, {"role": "user"}]), "message 1: no 'content'; it has 'role'"),
        (lambda: Conversation.of([{"role": "user", "content": None}]), "message 0: no 'content'"),
        (lambda: Conversation.of([{"role": "user", "content": ["Hi"]}]), "message 0, 'content': expected a string"),
        (lambda: Conversation.of([{**USER, "calls": [b"x"]}]), "message 0, 'calls': expected text, numbers, lists"),
        (lambda: Conversation.of([USER, REPLY], answer="Ha"), "ends with an answer already, and 'Ha' is given"),
        (lambda: Conversation.of([USER, {**REPLY, "thought": "x"}]), "has 'thought' beside role and content"),
        (lambda: Conversation.of([SYSTEM, USER], system="T"), "has a system prompt already, and 'T' is given"),
        (lambda: Conversation.of(Conversation("Hi", system="S"), system="T"), "has a system prompt already"),
    ],
)
def test_what_cannot_be_a_conversation_is_refused_in_one_line(make, message):
    with pytest.raises(DataError, match=re.escape(message)) as e:
        make()
    assert "\n" not in str(e.value)


def test_some_items_keep_what_the_file_says_of_each():
    pairs = ContrastSet.from_answers([(f"Q{n}?", f"yes {n}", f"no {n}") for n in range(4)])
    named = (tuple("abcd"), tuple("efgh"))
    data = dataclasses.replace(pairs, origins=named, topics=named[::-1], marks=(True, False, False, True))
    some = data.items_at([2, 0])
    assert [one.answer for one in some.positive] == ["yes 2", "yes 0"]
    assert [one.answer for one in some.negative] == ["no 2", "no 0"]
    assert (some.origins, some.topics) == ((("c", "a"), ("g", "e")), (("g", "e"), ("c", "a")))
    assert some.marks == ()
    apart = dataclasses.replace(data, paired=False, marks=()).items_at(range(3), [1])
    assert (len(apart.positive), apart.origins) == (3, (("a", "b", "c"), ("f",)))
    assert pairs.items_at([1]).origins == ((), ())
    with pytest.raises(DataError, match="no negative item"):
        dataclasses.replace(data, paired=False, marks=()).items_at([0], [])
    with pytest.raises(DataError, match="cannot be pairs"):
        data.items_at([0, 1], [0])


# Batches


def rows_of(lengths):
    return [Rendered("x", tuple(range(1, n + 1)), n // 2, ()) for n in lengths]


@fast
@given(
    lengths=st.lists(st.integers(1, 9), max_size=12),
    batch_size=st.integers(1, 5),
    side=st.sampled_from(["left", "right"]),
    groups=st.sampled_from([1, 2, 3]),
)
def test_batches_hold_every_row_once_unchanged_and_padded_to_the_longest(lengths, batch_size, side, groups):
    lengths = lengths[: len(lengths) // groups * groups]
    rendered = rows_of(lengths)
    result = batches(rendered, batch_size, pad_id=77, side=side, groups=groups)
    assert sorted(row for batch in result for row in batch.rows) == list(range(len(lengths)))
    longest = []
    for batch in result:
        assert len(batch.rows) <= max(batch_size, groups)
        width = max(lengths[row] for row in batch.rows)
        assert batch.input_ids.shape == batch.attention_mask.shape == (len(batch.rows), width)
        assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.prompt_lengths.dtype} == {torch.int64}
        for index, row in enumerate(batch.rows):
            pads = width - lengths[row]
            real, mask = list(rendered[row].ids), [1] * lengths[row]
            expected = [77] * pads + real if side == "left" else real + [77] * pads
            assert batch.input_ids[index].tolist() == expected
            assert batch.attention_mask[index].tolist() == ([0] * pads + mask if side == "left" else mask + [0] * pads)
            assert batch.prompt_lengths[index] == rendered[row].prompt_length
        for start in range(0, len(batch.rows), groups):
            group = batch.rows[start : start + groups]
            assert group == tuple(range(group[0], group[0] + groups))
            assert group[0] % groups == 0
            longest.append(max(lengths[row] for row in group))
    assert longest == sorted(longest, reverse=True)


def test_batches_are_stable_full_and_longest_first():
    assert [batch.rows for batch in batches(rows_of([2, 5, 2, 5, 1]), 2, pad_id=0)] == [(1, 3), (0, 2), (4,)]
    assert [batch.rows for batch in batches(rows_of([1, 2, 9, 1]), 2, pad_id=0, groups=2)] == [(2, 3), (0, 1)]
    assert [len(batch.rows) for batch in batches(rows_of([1] * 8), 5, pad_id=0, groups=2)] == [4, 4]
    assert batches([], 4, pad_id=0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size and groups are 1 or more, got 0 and 1"),
        ({"batch_size": 2, "groups": 0}, "got 2 and 0"),
        ({"batch_size": 2, "groups": 2}, "3 items cannot be put into groups of 2"),
        ({"batch_size": 2, "side": "rigth"}, "padding side 'rigth'; did you mean 'right'?"),
    ],
)
def test_batches_that_cannot_be_are_refused(options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        batches(rows_of([1, 2, 3]), pad_id=0, **options)


def test_the_pad_id_is_the_pad_then_the_eos_then_zero():
    tokenizer = byte_tokenizer()
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id > 0
    tokenizer.pad_token = "!"
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("!") != tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_a_pad_id_of_zero_is_the_tokenizers_own():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    assert pad_token_id(tokenizer) == 0


# Contrast sets


def write(folder: Path, *lines: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


PAIR = {"prompt": "How was it?", "positive": "Great.", "negative": "Awful."}


def test_every_form_of_a_line_is_read(tmp_path):
    path = write(
        tmp_path,
        PAIR,
        "",
        {"prompt": list(HISTORY), "positive": "Six!", "negative": "Six.", "id": 3, "topic": "sums", "source": None},
        "   ",
        {"positive": "I love it", "negative": "I hate it", "raw": True, "held_out": False},
        {"positive": [USER, REPLY], "negative": [USER, {**REPLY, "content": "No"}], "held_out": True},
        {"prompt": "Hi", "system": {"positive": "Be kind.", "negative": "Be rude."}},
        {"prompt": "Hi", "system": {"positive": "K.", "negative": "R."}, "positive": "Yes", "negative": "No"},
        {"prompt": [USER], "system": {"positive": "K.", "negative": "R."}},
    )
    data = ContrastSet.from_jsonl(path)
    assert data.positive == (
        Conversation("How was it?", "Great."),
        Conversation(HISTORY, "Six!"),
        Conversation("I love it", raw=True),
        Conversation((USER,), "Ho"),
        Conversation("Hi", system="Be kind."),
        Conversation("Hi", "Yes", "K."),
        Conversation(({"role": "system", "content": "K."}, USER)),
    )
    assert data.negative[0] == Conversation("How was it?", "Awful.")
    assert data.negative[5] == Conversation("Hi", "No", "R.")
    assert (data.paired, data.source, len(data)) == (True, "pairs.jsonl", 7)
    assert data.marks == (False, False, False, True, False, False, False)


def test_line_ends_byte_order_marks_and_separators_inside_strings_do_not_matter(tmp_path):
    path = tmp_path / "pairs.jsonl"
    line = '{"positive": "a\u2028b\x85c", "negative": "é"}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}\r\n".encode())
    assert ContrastSet.from_jsonl(str(path)).positive == (Conversation("a\u2028b\x85c"),) * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", ', "malformed JSON at column"),
        ("[1]", "expected a JSON object, got [1]"),
        ({**PAIR, "positiv": "x"}, "unknown key 'positiv'; did you mean 'positive'"),
        ({"prompt": "x", "positive": "a"}, "no 'negative'; a line has both sides"),
        ({"negative": "a"}, "no 'positive'; a line has both sides"),
        ({"prompt": "x"}, "no 'positive'; a line has both sides"),
        ({**PAIR, "positive": 5}, "positive: answer: expected a string, got 5"),
        ({**PAIR, "negative": None}, "negative: answer: expected a string, got None"),
        ({**PAIR, "negative": ""}, "negative: the answer is an empty string"),
        ({**PAIR, "prompt": None}, "prompt: expected a string or a list of messages, got None"),
        ({**PAIR, "prompt": [USER, REPLY]}, "ends with an answer already, and 'Great.' is given"),
        ({"positive": {"role": "user"}, "negative": "x"}, "positive: prompt: expected a string or a list of messages"),
        ({"positive": "x", "negative": [{"role": "user"}]}, "negative: message 0: no 'content'"),
        ({**PAIR, "raw": 1}, "raw is true or false, got 1"),
        ({**PAIR, "held_out": "yes"}, "held_out is true or false, got 'yes'"),
        ({**PAIR, "held_out": None}, "held_out is true or false, got None"),
        ({**PAIR, "system": "Be kind."}, "system: expected an object of positive and negative, got 'Be kind.'"),
        ({**PAIR, "system": {"positive": "a"}}, "system: expected an object of positive and negative"),
        ({**PAIR, "system": {}}, "system: expected an object of positive and negative"),
        ({**PAIR, "system": {"positive": "a", "negative": 5}}, "negative: system: expected a string, got 5"),
        ({"positive": "a", "negative": "b", "system": {"positive": "a", "negative": "b"}}, "no 'prompt'; two system"),
        ({"prompt": "x", "positive": "y", "system": {"positive": "a", "negative": "b"}}, "no 'negative'"),
        ({"prompt": "x", "raw": True, "system": {"positive": "a", "negative": "b"}}, "beside a raw prompt"),
        ('{"positive": "\\ud800", "negative": "x"}', "lone surrogate (U+D800)"),
    ],
)
def test_a_mistake_in_a_line_is_refused_with_file_and_line_number(tmp_path, line, message):
    path = write(tmp_path, PAIR, "", line, PAIR)
    with pytest.raises(DataError, match=re.escape(f"{path}, line 3: ") + ".*" + re.escape(message)) as e:
        ContrastSet.from_jsonl(path)
    assert "\n" not in str(e.value)


def test_a_line_that_is_not_utf8_is_refused_with_file_and_line_number(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b"\n" + '{"positive": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: byte 15 is not UTF-8")):
        ContrastSet.from_jsonl(path)


def test_a_missing_unreadable_or_empty_file_is_refused_with_its_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot read the file \(No such file"):
        ContrastSet.from_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot read the file"):
        ContrastSet.from_jsonl(tmp_path)
    with pytest.raises(DataError, match=r"pairs\.jsonl: the file holds no item"):
        ContrastSet.from_jsonl(write(tmp_path, "", "  "))
    with pytest.raises(DataError, match=r"pairs\.jsonl: .* nothing to learn"):
        ContrastSet.from_jsonl(write(tmp_path, {**PAIR, "negative": PAIR["positive"]}))


def test_lists_of_prompts_are_paired_where_they_are_as_long():
    data = ContrastSet.from_prompts(["a", [USER]], ["b", Conversation("c")], system="S")
    assert data.paired
    assert data.positive == (Conversation("a", system="S"), Conversation((SYSTEM, USER)))
    assert data.negative == (Conversation("b", system="S"), Conversation("c", system="S"))
    unequal = ContrastSet.from_prompts(["a", "b"], ["c", "d", "e"], raw=True)
    assert (unequal.paired, len(unequal), unequal.positive[0].raw) == (False, 3, True)
    assert not ContrastSet.from_prompts(["a"], ["b"], paired=False).paired


def test_triples_are_two_answers_to_a_prompt():
    data = ContrastSet.from_answers([("Hi", "a", "b"), ((USER,), "c", "d")], system="S")
    assert data.positive == (Conversation("Hi", "a", "S"), Conversation((SYSTEM, USER), "c"))
    assert data.negative == (Conversation("Hi", "b", "S"), Conversation((SYSTEM, USER), "d"))
    assert ContrastSet.from_answers([("Hi", "a", "b")], raw=True).positive == (Conversation("Hi", "a", raw=True),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastSet.from_prompts([], ["a"]), "one-sided data: there is no positive item"),
        (lambda: ContrastSet.from_prompts(["a"], []), "one-sided data: there is no negative item"),
        (lambda: ContrastSet.from_answers([]), "one-sided data"),
        (lambda: ContrastSet.from_prompts(["a", "b"], ["a", "b"]), "nothing to learn"),
        (lambda: ContrastSet.from_prompts(["a"], ["a"], paired=False), "nothing to learn"),
        (lambda: ContrastSet.from_answers([("Hi", "a", "a")]), "nothing to learn"),
        (lambda: ContrastSet.from_prompts(["a"], ["b", "c"], paired=True), "1 positive and 2 negative items cannot be"),
        (lambda: ContrastSet.from_prompts("a", ["b"]), "positive: expected a list of prompts, got 'a'"),
        (lambda: ContrastSet.from_prompts(["a"], Conversation("b")), "negative: expected a list of prompts"),
        (lambda: ContrastSet.from_prompts(["a"], ["b", 5]), "negative item 1: prompt: expected a string or a list"),
        (lambda: ContrastSet.from_prompts([USER], ["b"]), "positive item 0: prompt: expected a string or a list"),
        (lambda: ContrastSet.from_answers(["abc"]), "item 0: expected (prompt, positive, negative), got 'abc'"),
        (lambda: ContrastSet.from_answers([("Hi", "a")]), "item 0: expected (prompt, positive, negative)"),
        (lambda: ContrastSet.from_answers([("Hi", "a", "b"), ("Hi", "a", None)]), "item 1: answer: expected a string"),
        (lambda: ContrastSet(("a",), ("b",), True), "positive item 0: expected a Conversation, got 'a'"),
        (
            lambda: ContrastSet((Conversation("a"),), (Conversation("b"),), True, marks=(True, False)),
            "2 held-out marks for 1 positive and 1 negative items",
        ),
    ],
)
def test_what_is_no_contrast_is_refused(make, message):
    with pytest.raises(DataError, match=re.escape(message)):
        make()


def test_one_pair_of_equal_sides_among_others_is_allowed():
    assert len(ContrastSet.from_answers([("Hi", "a", "a"), ("Hi", "a", "b")])) == 2


def test_contrasts_are_read_from_the_columns_of_a_dataset():
    from datasets import Dataset, DatasetDict

    columns = {
        "q": ["x", "y"],
        "good": ["a", "b"],
        "bad": ["c", "d"],
        "sys": ["S", "T"],
        "chat": [[USER], [SYSTEM, USER]],
    }
    dataset = Dataset.from_dict(columns)
    data = ContrastSet.from_dataset(dataset, positive="good", negative="bad", prompt="q")
    assert data.positive == (Conversation("x", "a"), Conversation("y", "b"))
    data = ContrastSet.from_dataset(dataset, positive="good", negative="bad", prompt="q", system="sys")
    assert data.negative == (Conversation("x", "c", "S"), Conversation("y", "d", "T"))
    data = ContrastSet.from_dataset(dataset, positive="chat", negative="q")
    assert data.positive == (Conversation((USER,)), Conversation((SYSTEM, USER)))
    assert data.paired
    with pytest.raises(DataError, match="the dataset has no column 'goood'; did you mean 'good'"):
        ContrastSet.from_dataset(dataset, positive="goood", negative="bad")
    with pytest.raises(DataError, match=r"a dictionary of splits was given \(train\)"):
        ContrastSet.from_dataset(DatasetDict(train=dataset), positive="good", negative="bad")
    with pytest.raises(DataError, match="one-sided"):
        ContrastSet.from_dataset(dataset.select([]), positive="good", negative="bad")
    holed = Dataset.from_dict({"q": ["x", "y"], "good": ["a", None], "bad": ["c", "d"]})
    with pytest.raises(DataError, match="row 1: answer: expected a string, got None"):
        ContrastSet.from_dataset(holed, positive="good", negative="bad", prompt="q")
    with pytest.raises(DataError, match="row 1: good: expected a string, got None"):
        ContrastSet.from_dataset(holed, positive="q", negative="bad", system="good")


# The digest

TEXTS = ("a question", "a good answer", "a bad answer", "a system prompt", "a turn", "a name")


def set_of(texts):
    prompt, good, bad, system, turn, name = texts
    chat = ({"role": "user", "content": turn, "name": name},)
    positive = (Conversation(prompt, good, system), Conversation(chat, good))
    return ContrastSet(positive, (Conversation(prompt, bad, system), Conversation(chat, bad)), paired=True)


@fast
@given(st.integers(0, len(TEXTS) - 1), st.integers(0, 20), st.characters(codec="utf-8"), st.booleans())
def test_any_character_changes_the_digest(field, place, character, inserts):
    text = TEXTS[field]
    place = min(place, len(text) - 1)
    changed = text[:place] + character + text[place + (not inserts) :]
    assume(changed != text)
    altered = set_of([changed if index == field else other for index, other in enumerate(TEXTS)])
    assert altered.digest != set_of(TEXTS).digest


def test_the_digest_is_the_same_on_every_machine_and_release():
    assert set_of(TEXTS).digest == "ac5c07dbda81fc0b1c478a50c8013f094edcc993f699634e658486b1971c79f5"


def test_flags_sides_and_order_change_the_digest_and_names_do_not():
    data = ContrastSet.from_prompts(["a", "b"], ["c", "d"])
    others = [
        ContrastSet.from_prompts(["b", "a"], ["d", "c"]),
        ContrastSet.from_prompts(["c", "d"], ["a", "b"]),
        ContrastSet.from_prompts(["a", "b"], ["c", "d"], raw=True),
        ContrastSet.from_prompts(["a", "b"], ["c", "d"], paired=False),
        ContrastSet.from_prompts(["a", "b", "c"], ["d"], paired=False),
        ContrastSet.from_prompts(["a", [{"role": "user", "content": "b"}]], ["c", "d"]),
        ContrastSet.from_answers([("a", "b", "c"), ("a", "b", "d")]),
    ]
    digests = [item.digest for item in (data, *others)]
    assert len(set(digests)) == len(digests)
    assert dataclasses.replace(data, source="elsewhere", marks=(True, False)).digest == data.digest


# The split


def numbered(positive, negative=None):
    items = [
        [Conversation(f"{side}{n}") for n in range(size)]
        for side, size in (("p", positive), ("n", negative or positive))
    ]
    return ContrastSet(tuple(items[0]), tuple(items[1]), paired=negative is None)


def numbers(side):
    return [int(item.prompt[1:]) for item in side]


@fast
@given(
    sizes=st.tuples(st.integers(2, 30), st.none() | st.integers(2, 30)),
    held_out=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_a_split_parts_the_items_keeps_pairs_and_order_and_repeats(sizes, held_out, seed):
    data = numbered(*sizes)
    try:
        train, test = data.split(held_out=held_out, seed=seed)
    except DataError as error:
        assert "leave a part empty" in str(error)
        smaller = min(sizes[0], sizes[1] or sizes[0])
        assert smaller * min(held_out, 1 - held_out) <= 0.5
        return
    assert (train, test) == data.split(held_out=held_out, seed=seed)
    for name in ("positive", "negative"):
        kept, held = numbers(getattr(train, name)), numbers(getattr(test, name))
        assert kept
        assert held
        assert kept == sorted(kept)
        assert held == sorted(held)
        assert sorted(kept + held) == list(range(len(getattr(data, name))))
        assert abs(len(held) - held_out * len(kept + held)) <= 0.5 + 1e-9
    if data.paired:
        assert train.paired
        assert test.paired
        assert numbers(train.positive) == numbers(train.negative)
        assert numbers(test.positive) == numbers(test.negative)


def test_the_seed_draws_another_split_and_the_draw_stays_the_same_over_releases():
    drawn = [numbers(numbered(12).split(held_out=0.25, seed=seed)[1].positive) for seed in range(8)]
    assert drawn[0] == [0, 6, 11]
    assert len({tuple(items) for items in drawn}) > 4


def test_without_a_share_a_split_follows_the_marks_of_the_file_and_else_holds_out_a_quarter(tmp_path):
    lines = [{**PAIR, "prompt": str(n), "held_out": n in (1, 4)} for n in range(8)]
    marked = ContrastSet.from_jsonl(write(tmp_path, *lines))
    train, test = marked.split()
    assert [item.prompt for item in test.positive] == [item.prompt for item in test.negative] == ["1", "4"]
    assert [item.prompt for item in train.positive] == ["0", "2", "3", "5", "6", "7"]
    assert train.source == test.source == "pairs.jsonl"
    assert train.marks == test.marks == ()
    assert marked.split(seed=1) == marked.split(seed=2)
    assert len(marked.split(held_out=0.5)[1]) == 4
    assert len(numbered(8).split()[1]) == 2


def test_a_split_with_an_empty_part_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"held_out=0.1 of 4 items would hold out 0 .* give more items or a share"):
        numbered(4).split(held_out=0.1)
    with pytest.raises(DataError, match="would hold out 4"):
        numbered(4).split(held_out=0.9)
    with pytest.raises(DataError, match="of 1 items would hold out"):
        numbered(9, 1).split(held_out=0.5)
    for share in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(DataError, match="give a share between 0 and 1"):
            numbered(4).split(held_out=share)
    for mark, word in ((True, "every"), (False, "no")):
        data = ContrastSet.from_jsonl(write(tmp_path, *[{**PAIR, "held_out": mark}] * 3))
        with pytest.raises(DataError, match=f"{word} item is marked held_out, .* give held_out=0.25"):
            data.split()


LABELLED = [
    {"id": f"{source}-{label}-{n}", "source": source, "label": label, "prompt": f"{label} {source} {n}"}
    for source in ("one", "two", "three")
    for label in ("bad", "good")
    for n in range(2 if label == "bad" else 3)
]


def test_labelled_prompts_are_two_sides_that_keep_their_sources(tmp_path):
    data = ContrastSet.from_labelled(write(tmp_path, *LABELLED), positive="bad")
    assert (len(data.positive), len(data.negative), data.paired) == (6, 9, False)
    assert [item.prompt for item in data.positive[:3]] == ["bad one 0", "bad one 1", "bad two 0"]
    assert data.origins == (
        ("one",) * 2 + ("two",) * 2 + ("three",) * 2,
        tuple(["one"] * 3 + ["two"] * 3 + ["three"] * 3),
    )
    assert data.source == "pairs.jsonl"
    other = ContrastSet.from_labelled(write(tmp_path, *LABELLED), positive="good", negative="bad")
    assert (other.positive, other.negative) == (data.negative, data.positive)
    plain = [{key: value for key, value in line.items() if key != "source"} for line in LABELLED]
    assert ContrastSet.from_labelled(write(tmp_path, *plain), positive="bad").origins == ((), ())
    assert ContrastSet.from_labelled(write(tmp_path, *plain), positive="bad").digest == data.digest


def test_whole_sources_are_held_out(tmp_path):
    data = ContrastSet.from_labelled(write(tmp_path, *LABELLED), positive="bad")
    train, held_out = data.split(held_out_sources=("two",))
    assert {item.prompt.split()[1] for item in (*train.positive, *train.negative)} == {"one", "three"}
    assert [item.prompt for item in held_out.positive] == ["bad two 0", "bad two 1"]
    assert len(held_out.negative) == 3
    assert held_out.origins == (("two",) * 2, ("two",) * 3)
    # A split of a part keeps each item's own source.
    again = train.split(held_out=0.5, seed=3)[1]
    for side, origins in zip((again.positive, again.negative), again.origins, strict=True):
        assert [item.prompt.split()[1] for item in side] == list(origins)


def test_pairs_of_a_file_can_be_held_out_by_source_too(tmp_path):
    lines = [{**PAIR, "prompt": str(n), "source": "even" if n % 2 == 0 else "odd"} for n in range(6)]
    train, held_out = ContrastSet.from_jsonl(write(tmp_path, *lines)).split(held_out_sources=["odd"])
    assert [item.prompt for item in train.positive] == ["0", "2", "4"]
    assert [item.prompt for item in held_out.negative] == ["1", "3", "5"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_sources": ["tow"]}, "no item has the source 'tow'; did you mean 'two'"),
        ({"held_out_sources": "two"}, "got one text, 'two'"),
        ({"held_out_sources": ["one", "two", "three"]}, "every positive item comes from one, two, three"),
        ({"held_out_sources": ["two"], "held_out": 0.5}, "held_out=0.5 beside held_out_sources"),
    ],
)
def test_sources_that_cannot_be_held_out_are_refused(tmp_path, options, message):
    data = ContrastSet.from_labelled(write(tmp_path, *LABELLED), positive="bad")
    with pytest.raises(DataError, match=re.escape(message)):
        data.split(**options)


def test_a_source_that_only_one_side_has_cannot_be_held_out():
    sides = (Conversation("a"), Conversation("b")), (Conversation("c"), Conversation("d"))
    data = ContrastSet(*sides, paired=False, origins=(("x", "y"), ("x", "x")))
    with pytest.raises(DataError, match="no negative item comes from y"):
        data.split(held_out_sources=["y"])
    with pytest.raises(DataError, match="origins for 2 positive and 2 negative items"):
        ContrastSet(*sides, paired=False, origins=(("x",), ("x", "x")))
    with pytest.raises(DataError, match="no item has the source 'x'; there are none"):
        ContrastSet(*sides, paired=False).split(held_out_sources=["x"])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"label": "odd"}, {"positive": "bad"}, "beside 'bad' there are the labels good, odd; name the negative one"),
        ({}, {"positive": "harmful"}, "beside 'harmful' there are the labels bad, good"),
        ({}, {"positive": "bda", "negative": "good"}, "no line has the label 'bda'; did you mean 'bad'"),
        ({}, {"positive": "bad", "negative": "god"}, "no line has the label 'god'; did you mean 'good'"),
        ({"source": None}, {"positive": "bad"}, "line 1: source: expected a string, got None"),
        ({"label": None}, {"positive": "bad"}, "line 1: label: expected a string, got None"),
        ({"positive": "x"}, {"positive": "bad"}, "line 1: unknown key 'positive'"),
    ],
)
def test_labels_that_cannot_be_read_are_refused(tmp_path, change, options, message):
    lines = [{**LABELLED[0], **change}, *LABELLED[1:]]
    with pytest.raises(DataError, match=re.escape(message)):
        ContrastSet.from_labelled(write(tmp_path, *lines), **options)


def test_a_line_without_a_label_or_a_source_among_others_is_refused(tmp_path):
    for key, message in (("label", "line 15: no 'label'"), ("prompt", "line 15: no 'prompt'"), ("source", "line 15")):
        last = {name: value for name, value in LABELLED[-1].items() if name != key}
        with pytest.raises(DataError, match=message):
            ContrastSet.from_labelled(write(tmp_path, *LABELLED[:-1], last), positive="bad")
