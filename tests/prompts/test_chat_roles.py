"""Scopes by role: five chat templates, every way to run a model, each against marks found in the text's characters.

The slow form: every token is written out, the turns are found by a regular expression in that text, and one plain
forward pass gets the vector by a hook written out by hand on exactly those tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import DataError, ScopeError
from steerkit.network.decoder import find_decoder
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.marks import Marks, outside_thinking, spoken
from steerkit.prompts.rendering import render
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector
from tests import gated, modes, tolerances
from tests.families import build
from tests.steering.test_compile import counted, steerkit_compile_config
from tests.tiny_tokenizers import TEMPLATES, byte_tokenizer

# Where each template's turns are, in the characters of the text: an assistant's turn; what ends a turn or opens one.
CHATML = (
    r"<\|im_start\|>assistant\n(?P<turn>.*?)(?=<\|im_(?:end|start)\|>|</s>|$)",
    r"<\|im_end\|>|</s>|(?P<opens><\|im_start\|>)",
)
TURNS = {
    "chatml": CHATML,
    "thinking": CHATML,
    "llama2": (r"\[/INST\](?P<turn>.*?)(?=</s>|<s>|$)", r"</s>|(?P<opens><s>\[INST\]|\[/INST\])"),
    "llama3": (
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(?P<turn>.*?)(?=<\|eot_id\|>|<\|start_header_id\|>|</s>|$)",
        r"<\|eot_id\|>|</s>|(?P<opens><\|start_header_id\|>)",
    ),
    "gemma": (
        r"<start_of_turn>model\n(?P<turn>.*?)(?=<end_of_turn>|<start_of_turn>|</s>|$)",
        r"<end_of_turn>|</s>|(?P<opens><start_of_turn>)",
    ),
}
FIVE = sorted(TURNS)
assert sorted(TEMPLATES) == FIVE

CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi there"}],
    [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nwell, I say\n</think>\n\nHe said so."},
        {"role": "user", "content": "And the other\n\nmodel [INST] assistant?"},
        {"role": "assistant", "content": "It is the <assistant> one"},
        {"role": "user", "content": "Yes?"},
    ],
    [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "0"},
        {"role": "user", "content": "Why then? You know."},
    ],
)
NEW = 8
SCOPES = ("assistant", "answer", "after(0)", "after(3)")


def written_out(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A row of ids as characters, one for each byte, and where each token ends in them."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    pieces = [(token or "?").replace("Ċ", "\n").replace("Ġ", " ") for token in tokens]
    ends, total = [], 0
    for piece in pieces:
        total += len(piece)
        ends.append(total)
    return "".join(pieces), ends


def expected(name: str, tokenizer: Any, scope: str, ids: Sequence[int]) -> list[bool]:
    """Which tokens of an unpadded row a scope means, from the characters behind each token."""
    text, ends = written_out(tokenizer, ids)
    turn, end_of_message = TURNS[name]
    if scope.startswith("after"):
        number, stops, is_open = int(scope[6:-1]), [], False
        for found in re.finditer(end_of_message, text):
            if is_open:
                stops.append(found.end())
            is_open = found["opens"] is not None
        return [len(stops) > number and end >= stops[number] for end in ends]
    spans = [(found.start("turn"), found.end("turn")) for found in re.finditer(turn, text, re.DOTALL)]
    thoughts = []
    for start, stop in spans:
        for found in re.finditer(r"<think>.*?(?:</think>|$)", text[start:stop], re.DOTALL):
            closes = found.group().endswith("</think>")
            thoughts.append((start + found.start() + len("<think>"), start + found.end() + (0 if closes else 1)))
    inside = [any(start <= end <= stop for start, stop in spans) for end in ends]
    if scope == "assistant":
        return inside
    thinking = [any(start <= end < stop for start, stop in thoughts) for end in ends]
    return [one and not other for one, other in zip(inside, thinking, strict=True)]


def by_hand(model: Any, vector: SteeringVector, ids: Sequence[int], written: Sequence[bool]) -> Tensor:
    """[t, v] logits of one plain pass over a row in which just these tokens get the vector."""
    (site,) = vector.sites
    shift = vector.tensors[f"{site}/direction"] * torch.tensor(written).float()[:, None]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    handle = find_decoder(model).blocks[site.layer].register_forward_hook(add)
    try:
        return modes.plain_logits(model, ids)
    finally:
        handle.remove()


def close(one: Tensor, other: Tensor, tolerance: float | None = None) -> bool:
    tolerance = tolerances.of_family("llama") if tolerance is None else tolerance
    return bool((one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max())


def prompts(tokenizer: Any, **options: Any) -> list[list[int]]:
    return [list(render(tokenizer, Conversation.of(chat), **options).ids) for chat in CHATS]


class OnlyThese:
    """A logits processor that leaves a few tokens: words, and the marks of turns and thinking."""

    def __init__(self, tokenizer: Any) -> None:
        marks = [token for token in tokenizer.get_added_vocab() if token != "<s>"]
        marks += ["a", "H", "Ċ", "ĊĊ", "ĊH"]
        self.allowed = torch.tensor(sorted({tokenizer.convert_tokens_to_ids(mark) for mark in marks}))

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        # As high as the rest, so that all sorts of marks come; the order is the model's.
        kept[:, self.allowed] = scores[:, self.allowed]
        return kept


class Script:
    """A logits processor that has each row say what was written for it."""

    def __init__(self, lines: Sequence[Sequence[int]], width: int) -> None:
        self.lines, self.width = lines, width

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            line = self.lines[row % len(self.lines)]
            kept[row, line[(ids.shape[1] - self.width) % len(line)]] = 0.0
        return kept


LINES = {
    "chatml": ("<think>", "a", "</think>", "Ċ", "H", "<|im_end|>", "Ċ", "a"),
    "thinking": ("a", "<think>", "ĊH", "H", "</think>", "ĊĊ", "a", "<|im_end|>"),
    "llama2": ("<think>", "a", "</think>", "a", "</s>", "a", "Ċ", "a"),
    "llama3": ("H", "a", "<|eot_id|>", "<think>", "a", "</think>", "H", "a"),
    "gemma": ("H", "<end_of_turn>", "Ċ", "<start_of_turn>", "m", "o", "d", "e"),
}
# Another turn of the assistant's, opened by the model itself, with its first word joined to the header.
AGAIN = ("<|im_end|>", "Ċ", "<|im_start|>", *"assistant", "ĊH", "a", "<think>", "a", "</think>", "a")


@pytest.fixture(scope="module", params=FIVE)
def chat(request: Any) -> tuple[str, Any]:
    return request.param, byte_tokenizer(TEMPLATES[request.param])


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def padded(rows: Sequence[Sequence[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    return modes.rows_of(rows, side=side)


def generated(model: Any, rows: Sequence[Sequence[int]], **options: Any) -> Any:
    ids, mask = padded(rows)
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        output_logits=True,
        return_dict_in_generate=True,
        **{**settings, **options},
    )


def check_rows(
    model: Any, vector: SteeringVector, chat: tuple[str, Any], scope: str, rows: Sequence[Sequence[int]], out: Any
) -> None:
    """Every row of what `generate` gave against the plain pass; something must be steered and something not."""
    width = max(map(len, rows))
    each = len(out.sequences) // len(rows)
    stacked = torch.stack(out.logits, dim=1)
    moved = False
    for row, sequence in enumerate(out.sequences):
        prompt, answer = list(rows[row // each]), sequence[width:].tolist()
        whole = [*prompt, *answer]
        written = expected(*chat, scope, whole)
        behind = slice(len(prompt) - 1, len(whole) - 1)
        logits = by_hand(model, vector, whole, written)[behind]
        assert close(stacked[row, : len(answer)], logits)
        moved = moved or not close(logits, modes.plain_logits(model, whole)[behind], 1e-2)
    assert moved


def steered(model: Any, vector: SteeringVector, scope: str, tokenizer: Any) -> Any:
    return steerkit.steer(model, vector, scope=scope, tokenizer=tokenizer)


def script(tokenizer: Any, name: str, width: int) -> list[Script]:
    lines = [tokenizer.convert_tokens_to_ids(list(line)) for line in (LINES[name], LINES[name][3:] + LINES[name][:3])]
    assert all(token is not None for line in lines for token in line)
    return [Script(lines, width)]


OPTIONS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked": {"prefill_chunk_size": 5},
    "chunked_to_one": {"prefill_chunk_size": 2},
    "returned": {"num_return_sequences": 2, "do_sample": True, "temperature": 1.0, "top_k": 0},
}


@pytest.mark.parametrize(
    ("scope", "mode"),
    [("answer", mode) for mode in OPTIONS]
    + [(scope, mode) for scope in SCOPES if scope != "answer" for mode in ("cached", "uncached")],
)
def test_generate_equals_the_plain_pass(model: Any, chat: tuple[str, Any], scope: str, mode: str) -> None:
    name, tokenizer = chat
    rows = prompts(tokenizer)
    vector = modes.vector_for(model, scope="all")
    says = script(tokenizer, name, max(map(len, rows)))
    with torch.no_grad(), steered(model, vector, scope, tokenizer), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = generated(model, rows, logits_processor=says, **OPTIONS[mode])
    check_rows(model, vector, chat, scope, rows, out)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mamba", "qwen3_next"])
@pytest.mark.parametrize("mode", ["cached", "uncached"])
def test_families(family: str, mode: str) -> None:
    tokenizer, model = byte_tokenizer(TEMPLATES["thinking"]), build(family)
    rows = prompts(tokenizer)[1:2] if family in ("mamba", "qwen3_next") else prompts(tokenizer)
    vector = modes.vector_for(model, scope="all")
    says = script(tokenizer, "thinking", max(map(len, rows)))
    with torch.no_grad(), steered(model, vector, "answer", tokenizer):
        out = generated(model, rows, logits_processor=says, **OPTIONS[mode])
    stacked = torch.stack(out.logits, dim=1)
    for row, sequence in enumerate(out.sequences):
        whole = [*rows[row], *sequence[max(map(len, rows)) :].tolist()]
        logits = by_hand(model, vector, whole, expected("thinking", tokenizer, "answer", whole))
        assert close(stacked[row], logits[len(rows[row]) - 1 : -1], tolerances.of_family(family))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", ["assistant", "answer"])
def test_a_turn_that_the_model_opens_itself(model: Any, scope: str, use_cache: bool) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["thinking"])
    rows = prompts(tokenizer)[:1]
    vector = modes.vector_for(model, scope="all")
    line = tokenizer.convert_tokens_to_ids(list(AGAIN))
    says = [Script([line], len(rows[0]))]
    with torch.no_grad(), steered(model, vector, scope, tokenizer):
        out = generated(
            model, rows, logits_processor=says, use_cache=use_cache, max_new_tokens=len(line), min_new_tokens=len(line)
        )
    check_rows(model, vector, ("thinking", tokenizer), scope, rows, out)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("scope", ["assistant", "answer", "after(1)"])
def test_beams_that_change_places(model: Any, chat: tuple[str, Any], scope: str, use_cache: bool) -> None:
    _, tokenizer = chat
    rows = prompts(tokenizer)[1:]
    vector = modes.vector_for(model, scope="all", size=1.0)
    with torch.no_grad(), steered(model, vector, scope, tokenizer):
        out = generated(
            model,
            rows,
            num_beams=4,
            num_return_sequences=3,
            output_scores=True,
            length_penalty=0.0,
            use_cache=use_cache,
            logits_processor=[OnlyThese(tokenizer)],
        )
    width = max(map(len, rows))
    places = out.beam_indices[:, :NEW] % 4
    assert bool((places[:, 1:] != places[:, :-1]).any())  # rows do change places
    differ = False
    for row, sequence in enumerate(out.sequences):
        prompt, answer = rows[row // 3], sequence[width:].tolist()
        whole = [*prompt, *answer]
        scores = []
        for logits in (
            by_hand(model, vector, whole, expected(*chat, scope, whole)),
            modes.plain_logits(model, whole),
        ):
            behind = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)
            scores.append(behind.gather(-1, torch.tensor(answer)[:, None]).sum())
        assert close(out.sequences_scores[row], scores[0])
        differ = differ or not close(scores[0], scores[1], 1e-3)
    assert differ


@pytest.mark.parametrize("how", ["prompt_lookup", "self_draft", "draft"])
def test_assisted_decoding(model: Any, chat: tuple[str, Any], how: str) -> None:
    """Candidates that are rejected leave nothing behind, and a model that drafts for itself is steered alike."""
    _, tokenizer = chat
    rows = prompts(tokenizer)[1:2]
    vector = modes.vector_for(model, scope="all")
    more: dict[str, Any] = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "self_draft": {"assistant_model": model},
        "draft": {"assistant_model": build("llama", seed=1)},
    }[how]
    for scope in ("assistant", "answer"):
        with torch.no_grad(), steered(model, vector, scope, tokenizer):
            out = generated(model, rows, logits_processor=[OnlyThese(tokenizer)], **more)
        check_rows(model, vector, chat, scope, rows, out)


def test_a_continued_cache(model: Any, chat: tuple[str, Any]) -> None:
    _, tokenizer = chat
    (row,) = prompts(tokenizer)[1:2]
    vector = modes.vector_for(model, scope="all")
    more = tokenizer("\nand more", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), steered(model, vector, "assistant", tokenizer):
        first = generated(model, [row], max_new_tokens=3, min_new_tokens=3)
        longer = [*first.sequences[0].tolist(), *more]
        cache = first.past_key_values
        out = generated(model, [longer], past_key_values=cache)
        ids = torch.tensor([more])
        mask = torch.ones(1, out.sequences.shape[1] - 1 + len(more), dtype=torch.long)
        with pytest.raises(ScopeError, match="give it the whole text"):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=out.past_key_values,
                max_new_tokens=2,
                pad_token_id=0,
            )
    check_rows(model, vector, chat, "assistant", [longer], out)


def test_a_decoding_loop_written_by_hand(model: Any, chat: tuple[str, Any]) -> None:
    name, tokenizer = chat
    (row,) = prompts(tokenizer)[1:2]
    vector = modes.vector_for(model, scope="all")
    line = tokenizer.convert_tokens_to_ids(list(LINES[name]))
    whole = [*row, *line]
    for scope in SCOPES:
        with torch.no_grad(), steered(model, vector, scope, tokenizer):
            out = model(torch.tensor([row]), use_cache=True)
            found = [out.logits[0]]
            for token in line:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
                found.append(out.logits[0])
        assert close(torch.cat(found), by_hand(model, vector, whole, expected(name, tokenizer, scope, whole)))


def test_a_cache_filled_without_the_scope_is_refused(model: Any) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    out = model(torch.tensor(prompts(tokenizer)[:1]), use_cache=True)
    vector = modes.vector_for(model, scope="assistant")
    with steerkit.steer(model, vector, tokenizer=tokenizer), pytest.raises(ScopeError, match="was not filled under it"):
        model(torch.tensor([[7]]), past_key_values=out.past_key_values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_forward_pass(model: Any, chat: tuple[str, Any], side: str) -> None:
    name, tokenizer = chat
    rows = [[*row, *tokenizer.convert_tokens_to_ids(list(LINES[name]))] for row in prompts(tokenizer)]
    ids, mask = padded(rows, side)
    vector = modes.vector_for(model, scope="all")
    for scope in SCOPES:
        with torch.no_grad(), steered(model, vector, scope, tokenizer):
            logits = model(input_ids=ids, attention_mask=mask, **modes.positions_of(model, mask)).logits
        for row, whole in enumerate(rows):
            plain = by_hand(model, vector, whole, expected(name, tokenizer, scope, whole))
            assert close(logits[row][mask[row] == 1], plain)


def test_compiled_code_agrees(model: Any) -> None:
    scope, tokenizer = "answer", byte_tokenizer(TEMPLATES["llama2"])
    ids, mask = padded(prompts(tokenizer))
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        baseline = run(ids, attention_mask=mask).logits
        with steered(model, modes.vector_for(model, scope="all"), scope, tokenizer):
            got = run(ids, attention_mask=mask).logits
            with torch.compiler.set_stance("force_eager"):
                assert close(got, model(ids, attention_mask=mask).logits)
    assert not close(got, baseline, 1e-2)
    torch._dynamo.reset()


def test_inputs_embeds_have_no_roles(model: Any) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["chatml"])
    ids = torch.tensor(prompts(tokenizer)[:1])
    vector = modes.vector_for(model, scope="assistant")
    with steerkit.steer(model, vector, tokenizer=tokenizer):
        with pytest.raises(ScopeError, match="no token ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(ScopeError, match="no token ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2, pad_token_id=0)


def test_a_scope_by_role_needs_the_tokenizer_and_its_marks(model: Any) -> None:
    vector = modes.vector_for(model, scope="assistant")
    with pytest.raises(ScopeError, match="pass tokenizer= to steer"):
        steerkit.steer(model, vector)
    with pytest.raises(ScopeError, match="no chat template"):
        steerkit.steer(model, vector, tokenizer=byte_tokenizer(None))
    unmarked = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ScopeError, match="nothing stands before"):
        steerkit.steer(model, vector, tokenizer=byte_tokenizer(unmarked))
    plain = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ ('USER: ' if message['role'] == 'user' else 'BOT: ') + message['content'] "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}BOT:{% endif %}"
    )
    with pytest.raises(ScopeError, match="no special token ends"):
        steerkit.steer(model, vector, tokenizer=byte_tokenizer(plain))


def test_text_forms() -> None:
    for text in (*SCOPES, "after(12)"):
        assert str(Scope.parse(text)) == text
    for wrong in ("after", "after(-1)", "after(n)", "assistent"):
        with pytest.raises(ScopeError, match="unknown scope"):
            Scope.parse(wrong)


def test_the_scope_stands_in_the_file(tmp_path: Any, model: Any) -> None:
    vector = modes.vector_for(model, scope="answer")
    vector.save(tmp_path / "one.safetensors")
    loaded = SteeringVector.load(tmp_path / "one.safetensors")
    assert loaded.scope == "answer"
    assert loaded.at(scope="after(2)").scope == "after(2)"


def marks_of(template: str, *special: str) -> tuple[Any, Marks]:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer, Roles(tokenizer).marks


def test_marks_of_special_tokens_without_headers() -> None:
    """Mistral's newer tokenizers and DeepSeek's: one special token is all there is; thinking begins in the prompt."""
    mistral = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer, marks = marks_of(mistral, "[INST]", "[/INST]")
    assert tokenizer.convert_ids_to_tokens(marks.assistant.core) == ["[/INST]"]
    assert marks.counts
    deepseek = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
        "{% else %}{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    )
    tokenizer, marks = marks_of(deepseek, "<|User|>", "<|Assistant|>")
    assert tokenizer.convert_ids_to_tokens(marks.assistant.core) == ["<|Assistant|>"]
    assert marks.assistant.tail == ()
    assert not marks.counts  # a system prompt without a mark
    with pytest.raises(ScopeError, match="does not mark every message"):
        Roles(tokenizer).check("after")
    text = "<s><|User|>Hi<|Assistant|><think>\nwell</think>So.</s>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    written = marks.written("answer", 0, ids)[0].tolist()
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert [token for token, one in zip(tokens, written, strict=True) if one] == ["<|Assistant|>", "</think>", *"So."]


HARMONY = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
REPLY = "<|channel|>analysis<|message|>User greets.<|end|><|start|>assistant<|channel|>final<|message|>Hello."


def harmony(template: str = HARMONY) -> Any:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHANNELS)})
    return tokenizer


def test_channels_other_than_the_final_one_are_no_answer() -> None:
    tokenizer = harmony()
    marks = Roles(tokenizer).check("answer")
    text = f"<|start|>user<|message|>Hi<|end|><|start|>assistant{REPLY}<|end|><|start|>user<|message|>So?<|end|>"
    text += "<|start|>assistant<|channel|>commentary<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>I"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([encoding["input_ids"]])
    written = marks.written("answer", 0, ids)[0].tolist()
    shown = [text[slice(*span)] for span, one in zip(encoding["offset_mapping"], written, strict=True) if one]
    assert shown == ["<|message|>", *"Hello.", "<|message|>", "I"]
    by_token = [bool(marks.written("answer", 0, ids[:, : end + 1])[0, -1]) for end in range(ids.shape[1])]
    assert by_token == written
    assistant = marks.written("assistant", 0, ids)[0].tolist()
    assert sum(assistant) > sum(written)
    with pytest.raises(ScopeError, match="writes in channels, none of them"):
        Roles(harmony(HARMONY.replace("final", "says"))).check("answer")


def test_what_is_said_in_channels() -> None:
    assert spoken(REPLY) == spoken(f"{REPLY} <|return|>") == "Hello."
    assert spoken("<|channel|>analysis<|message|>User greets.<|end|><|start|>assistant<|channel|>fin") == ""
    text = f"<|start|>assistant{REPLY}"
    start = text.index("<|channel|>")
    assert [text[slice(*part)] for part in outside_thinking(text, start, len(text))] == ["Hello."]


def test_an_answer_stands_behind_the_header_of_its_channel(model: Any) -> None:
    tokenizer = harmony()
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert render(tokenizer, Conversation("Hi")).text == prompt
    plain = render(tokenizer, Conversation("Hi", answer="Hello."))
    assert plain.text == f"{prompt}<|channel|>final<|message|>Hello."
    assert plain.text[plain.answer_start :] == "Hello."
    assert render(tokenizer, Conversation("Hi", answer=REPLY)).text == prompt + REPLY


def test_generated_text_keeps_its_channels() -> None:
    from steerkit.generation import AnswerText

    tokenizer = harmony()
    ids = torch.tensor([tokenizer(f"{REPLY}<|return|></s>", add_special_tokens=False)["input_ids"]])
    assert spoken(AnswerText(tokenizer)(ids[0].tolist())) == "Hello."
    assert "<|message|>" not in AnswerText(byte_tokenizer())(ids[0, -1:].tolist())


def test_thinking_without_tokens_of_its_own() -> None:
    """Marks that the vocabulary spells out; the last character of one may be joined to what follows."""
    template = TEMPLATES["thinking"].replace("</think>", "[/THINK]").replace("<think>", "[THINK]")
    tokenizer = byte_tokenizer(template)
    marks = Roles(tokenizer).marks
    assert marks.think is not None
    assert marks.answer is not None
    assert "".join(tokenizer.convert_ids_to_tokens(marks.answer.core)) == "[/THINK"
    text = "<|im_start|>assistant\nI[THINK]so[/THINK] No[THINK] I[/THINK]!<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = marks.written("answer", 0, torch.tensor([ids]))[0].tolist()
    spelt, ends = written_out(tokenizer, ids)
    assert spelt == text
    # From each closing mark's end on, and up to the opening mark's; "] " is one token.
    spans = [("\nI", "\nI[THINK"), ("so[/THINK]", "No[THINK"), ("I[/THINK]", "!")]
    bounds = [(text.index(first) + len(first), text.index(last) + len(last)) for first, last in spans]
    assert written == [
        any(start <= end < stop or end == stop == bounds[-1][1] for start, stop in bounds) for end in ends
    ]


@pytest.mark.parametrize("settings", [{"merges": False}, {"trim_offsets": True}, {"bos": False}], ids=str)
@pytest.mark.parametrize("name", FIVE)
def test_marks_are_found_however_the_tokenizer_cuts(name: str, settings: dict[str, bool]) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[name], **settings)
    marks = Roles(tokenizer).marks
    assert marks.counts
    for ids in prompts(tokenizer):
        for scope in SCOPES:
            asked = Scope.parse(scope)
            written = marks.written(asked.kind, asked.count, torch.tensor([ids]))[0].tolist()
            assert written == expected(name, tokenizer, scope, ids)


@pytest.mark.parametrize("opens", [True, False])
def test_a_gate_decides_before_the_history_is_written(model: Any, opens: bool) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["thinking"])
    (row,) = prompts(tokenizer)[1:2]
    sides: dict[str, Any] = {"opens": [row, modes.SHORT], "closes": [modes.LONG, modes.SHORT[:4]]}
    if not opens:
        sides = {"opens": sides["closes"], "closes": sides["opens"]}
    vector = gated.gated_vector(model, scope="answer", **sides)
    says = script(tokenizer, "thinking", len(row))
    with torch.no_grad(), steerkit.steer(model, vector, tokenizer=tokenizer):
        out = generated(model, [row], logits_processor=says)
    whole = [*row, *out.sequences[0, len(row) :].tolist()]
    written = expected("thinking", tokenizer, "answer", whole) if opens else [False] * len(whole)
    plain = by_hand(model, gated.plain_of(vector), whole, written)
    assert close(torch.stack(out.logits, dim=1)[0], plain[len(row) - 1 : -1])


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_decoding(model: Any, fullgraph: bool) -> None:
    """`generate` compiles by itself with a static cache on an accelerator; compiled code sees no frames."""
    tokenizer = byte_tokenizer(TEMPLATES["thinking"])
    rows = prompts(tokenizer)
    vector = modes.vector_for(model, scope="all")
    torch._dynamo.reset()
    backend, calls = counted()
    config = steerkit_compile_config(backend)
    config.fullgraph = fullgraph
    says = script(tokenizer, "thinking", max(map(len, rows)))
    options: dict[str, Any] = {"cache_implementation": "static", "compile_config": config, "logits_processor": says}
    with torch.no_grad(), steered(model, vector, "answer", tokenizer):
        out = generated(model, rows, **options)
        compiles = len(calls)
        assert compiles > 0
        again = generated(model, rows, **options)
    assert len(calls) == compiles  # a second text is another state, and the same code
    assert torch.equal(again.sequences, out.sequences)
    check_rows(model, vector, ("thinking", tokenizer), "answer", rows, out)
    torch._dynamo.reset()


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_beams": 3, "use_cache": False}], ids=str)
def test_steerkit_generate(model: Any, chat: tuple[str, Any], more: dict[str, Any]) -> None:
    _, tokenizer = chat
    options: dict[str, Any] = {"max_new_tokens": 5, "vector": modes.vector_for(model, scope="all"), "scope": "answer"}
    alone = [steerkit.generate(model, tokenizer, [one], **options, **more)[0] for one in CHATS]
    assert steerkit.generate(model, tokenizer, CHATS, **options, **more) == alone
    assert alone != steerkit.generate(model, tokenizer, CHATS, max_new_tokens=5, **more)
    with steerkit.steer(model, options["vector"], scope="answer", tokenizer=tokenizer):
        assert steerkit.generate(model, tokenizer, CHATS, max_new_tokens=5, **more) == alone


READ = {"assistant_mean": "assistant", "answer_mean": "answer"}


def characters_read(name: str, tokenizer: Any, readout: str, ids: Sequence[int]) -> list[int]:
    """The tokens with a character of an assistant's message (or of it without thinking), from the characters alone."""
    text, ends = written_out(tokenizer, ids)
    starts = [0, *ends[:-1]]
    spans = []
    for found in re.finditer(TURNS[name][0], text, re.DOTALL):
        inner = found["turn"]
        offset = found.start("turn") + len(inner) - len(inner.lstrip())  # a template's own space before an answer
        inner = inner.strip()
        if readout == "assistant_mean":
            spans.append((offset, offset + len(inner)))
            continue
        blanked = re.sub(r"<think>.*?(</think>\s*|$)", lambda one: "\0" * len(one.group()), inner, flags=re.DOTALL)
        spans += [(offset + one.start(), offset + one.end()) for one in re.finditer(r"[^\0]+", blanked)]
    return [
        place
        for place, (start, end) in enumerate(zip(starts, ends, strict=True))
        if any(end > first and start < last for first, last in spans)
    ]


@pytest.mark.parametrize("readout", READ)
@pytest.mark.parametrize("answer", [None, "<think>\nso\n</think>\n\nWell, yes."])
def test_readouts_by_role(model: Any, chat: tuple[str, Any], readout: str, answer: str | None) -> None:
    name, tokenizer = chat
    items = [Conversation(tuple(one), answer=answer) for one in CHATS[1:]]
    read = steerkit.record(model, tokenizer, items, ["resid_post.1"], readout=readout, batch_size=2)
    for row, item in enumerate(items):
        ids = render(tokenizer, item).ids
        chosen = characters_read(name, tokenizer, readout, ids)
        assert chosen
        every = steerkit.activations.record_ids(model, [ids], [modes.RESID])[modes.RESID][0]
        assert close(read["resid_post.1"][row], every[chosen].mean(dim=0))
    both = steerkit.record(model, tokenizer, items, ["resid_post.1"], readout="assistant_mean")["resid_post.1"]
    thought = answer is not None or name != "thinking"  # whose history has no thinking left
    assert close(read["resid_post.1"], both) is (readout == "assistant_mean" or not thought)


def test_readouts_of_one_turn_are_the_response_s(model: Any, chat: tuple[str, Any]) -> None:
    _, tokenizer = chat
    items = [Conversation("Hi?", answer="Well, yes."), Conversation("And now?", answer="So it is: two\nlines.")]
    found = [
        steerkit.record(model, tokenizer, items, ["resid_post.1"], readout=readout)["resid_post.1"]
        for readout in ("response_mean", *READ)
    ]
    assert close(found[1], found[0])
    assert close(found[2], found[0])


def test_a_row_without_the_tokens_is_named(model: Any) -> None:
    tokenizer = byte_tokenizer(TEMPLATES["thinking"])
    items = [Conversation("Hi?", answer="Well."), Conversation("Hi?", answer="<think>\nand so on")]
    steerkit.record(model, tokenizer, items, ["resid_post.1"], readout="assistant_mean")
    with pytest.raises(DataError, match=r"^row 1: readout 'answer_mean' finds no token"):
        steerkit.record(model, tokenizer, items, ["resid_post.1"], readout="answer_mean")
    data = steerkit.ContrastSet(tuple(items[:1]), tuple(items[1:]), paired=True)
    with pytest.raises(DataError, match=r"^negative row 0: readout 'answer_mean' finds no token"):
        steerkit.record(model, tokenizer, data, ["resid_post.1"], readout="answer_mean")
    with pytest.raises(DataError, match=r"^negative row 0: "):
        steerkit.fit(model, tokenizer, data, method="caa", layers=[1], readout="answer_mean")


def test_a_template_that_wraps_the_last_message_in_a_thought() -> None:
    """As newer ones do: an empty thought where a message has none, its own where it has one."""
    template = TEMPLATES["thinking"].replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + content",
        "{% if message['role'] == 'assistant' and loop.index0 > last.user and '</think>' not in content %}"
        "{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + content",
    )
    tokenizer = byte_tokenizer(template)
    assert Roles(tokenizer).marks.counts
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "assistant", "content": "No."},
    ]
    text = render(tokenizer, Conversation(tuple(turns)))
    assert text.assistant is not None
    assert [text.text[start:stop] for start, stop in text.assistant] == [turns[1]["content"], "No."]


def test_thinking_that_the_prompt_has_begun() -> None:
    text = "ask<think>\nso\n</think>\n\nYes <think>no</think> it is"
    parts = outside_thinking(text, len("ask<think>\n"), len(text))
    assert [text[start:stop] for start, stop in parts] == ["Yes ", "it is"]
    assert outside_thinking("[THINK]never ends", 0, 17) == []
