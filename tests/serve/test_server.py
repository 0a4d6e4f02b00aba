"""The server by its protocols: what clients send and read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from steerkit.composition import Composition
from steerkit.serve import Request
from steerkit.serve.settings import Settings
from tests.serve.asked import TOKENIZER, alone, chat
from tests.serve.spoken import Served, served

openai = pytest.importorskip("openai")

HI = chat("Hi")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as one:
        yield one


@pytest.fixture
def client(server: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as one:
        yield one


def text_of(steering: str | None, length: int = 6, **more: Any) -> str:
    asked = Request(HI, steering=steering, max_tokens=length, **more)
    return str(TOKENIZER.decode(alone("llama", asked), skip_special_tokens=True))


def test_the_openai_client_chats(client: Any) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 6, "temperature": 0}
    plain = client.chat.completions.create(**common)
    assert plain.choices[0].message.content == text_of(None)
    assert plain.choices[0].finish_reason == "length"
    assert plain.usage.completion_tokens == 6
    for steering in ("a*1.5", Composition.parse("a*1.5").as_json()):
        steered = client.chat.completions.create(**common, extra_body={"steering": steering})
        assert steered.choices[0].message.content == text_of("a*1.5")
    named = client.chat.completions.create(**{**common, "model": "tiny+a*1.5"}, n=2, logprobs=True, top_logprobs=2)
    assert [one.message.content for one in named.choices] == [text_of("a*1.5")] * 2
    tokens = named.choices[1].logprobs.content
    assert [one.top_logprobs[0].token for one in tokens] == [one.token for one in tokens]
    assert all(one.logprob < 0 for one in tokens)


def test_the_openai_client_streams(client: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"steering": "a*1.5"}}
    found = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=6, temperature=0, n=2, logprobs=True, **options
    )
    texts, ends, usage = ["", ""], [], None
    for chunk in found:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [text_of("a*1.5")] * 2
    assert ends == ["length"] * 2
    assert usage is not None
    assert usage.completion_tokens == 12


def test_the_openai_client_completes(client: Any) -> None:
    several = client.completions.create(
        model="tiny", prompt=["One, two,", "The sea"], max_tokens=5, temperature=0, logprobs=1, n=2
    )
    texts = [one.text for one in several.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert len(several.choices[3].logprobs.tokens) == 5
    ids = TOKENIZER("The sea")["input_ids"]
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0)
    assert again.choices[0].text == texts[2]
    seeds = [
        client.completions.create(model="tiny", prompt="The sea", max_tokens=8, temperature=1.2, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    ]
    first, same, other = (one.choices[0].text for one in seeds)
    assert first == same != other


def test_the_openai_client_meets_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="unknown vector"):
        client.chat.completions.create(model="tiny+nobody", messages=HI)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: tokens are not penalised"):
        client.chat.completions.create(model="tiny", messages=HI, frequency_penalty=0.5)
    assert [one.id for one in client.models.list()][:2] == ["tiny", "tiny+a"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_langchain_is_a_client(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    langchain = pytest.importorskip("langchain_openai")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    options = {"base_url": f"{server.address}/v1", "api_key": "none", "model": "tiny", "max_retries": 0}
    llm = langchain.ChatOpenAI(**options, temperature=0, max_tokens=6, extra_body={"steering": "a*1.5"})
    assert llm.invoke("Hi").content == text_of("a*1.5")
    assert "".join(one.content for one in llm.stream("Hi")) == text_of("a*1.5")


def test_ollama_clients_are_answered(server: Served) -> None:
    options = {"temperature": 0, "num_predict": 6}
    body = {"model": "tiny:latest", "messages": HI, "options": options, "steering": "a*1.5"}
    status, text = server.post("/api/chat", body)
    lines = [json.loads(line) for line in text.splitlines()]
    assert status == 200
    assert "".join(one["message"]["content"] for one in lines) == text_of("a*1.5")
    assert [one["done"] for one in lines] == [False] * (len(lines) - 1) + [True]
    status, text = server.post("/api/chat", {**body, "stream": False})
    assert json.loads(text)["message"]["content"] == text_of("a*1.5")
    assert json.loads(text)["eval_count"] == 6
    assert json.loads(server.get("/api/tags")[1])["models"][0]["name"] == "tiny"
    assert server.error("/api/chat", {"model": "tiny", "messages": HI, "format": "json"}) == (
        400,
        "format: answers are text; leave it out",
    )


def test_two_columns_come_together(server: Served) -> None:
    body = {"messages": HI, "steering": "a*1.5", "max_tokens": 6, "probe": "b"}
    *pieces, last = server.events("/steerkit/compare", body)
    texts = {name: "".join(one["text"] for one in pieces if one["column"] == name) for name in ("plain", "steered")}
    assert texts == {"plain": text_of(None), "steered": text_of("a*1.5")}
    told = [one for one in pieces if one["reading"] is not None]
    assert len(told) == 12
    assert all((one["kl"] is None) == (one["column"] == "plain") for one in told)
    assert max(one["kl"] for one in told if one["column"] == "steered") > 0.01
    assert {name: end["finish"] for name, end in last["done"].items()} == {"plain": "length", "steered": "length"}
    same = server.events("/steerkit/compare", {"messages": HI, "steering": None, "max_tokens": 4})
    assert {one["kl"] for one in same[:-1] if one["column"] == "steered"} == {0.0}


def test_each_column_may_have_its_own_chat(server: Served) -> None:
    other = [*HI, {"role": "assistant", "content": "Yes"}, *HI]
    body = {"messages": {"plain": other, "steered": HI}, "steering": "a*1.5", "max_tokens": 6}
    *pieces, last = server.events("/steerkit/compare", body)
    assert "".join(one["text"] for one in pieces if one["column"] == "steered") == text_of("a*1.5")
    assert last["done"]["plain"]["prompt_tokens"] > last["done"]["steered"]["prompt_tokens"]
    for wrong in ({"plain": HI}, {**body["messages"], "third": HI}, {"plain": HI, "steered": "Hi"}):  # type: ignore[dict-item]
        status, error = server.error("/steerkit/compare", {"messages": wrong})
        assert (status, error["param"]) == (400, "messages")


def test_what_is_told_of_vectors(server: Served) -> None:
    told = json.loads(server.get("/steerkit/vectors")[1])
    assert (told["model"], told["default"]) == ("tiny", None)
    assert told["vectors"][0] == {
        "name": "a",
        "method": "caa",
        "strength": 1.0,
        "ladder": [0.5, 1.0, 1.5, 2.0, 3.0, 4.0],
        "counts": "factor",
        "unit": "paper",
        "scope": "response",
        "scopes": ["all", "prompt", "response", "generated", "assistant", "answer"],
        "is_probe": True,
        "layers": [1],
    }


def test_tools_reach_the_template(server: Served) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    body = {"messages": HI, "tools": [tool], "tool_choice": "auto", "max_tokens": 2, "temperature": 0}
    assert server.post(CHAT, body)[0] == 200
    wanted = {**body, "tool_choice": "required"}
    assert server.error(CHAT, wanted)[1]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", 3),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("n", 0),
        ("top_p", 0),
        ("stop", [1]),
        ("seed", 2**70),
        ("messages", []),
        ("messages", [{"role": "user"}]),
        ("messages", "Hi"),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("steering", "a*"),
        ("steering", {"terms": 3}),
        ("steering", 5),
        ("steering", "/etc/passwd*1"),
        ("nonsense", 1),
    ],
)
def test_what_cannot_be_followed_is_refused(server: Served, field: str, value: Any) -> None:
    status, error = server.error(CHAT, {"messages": HI, "max_tokens": 2, field: value})
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"].count("\n") == 0
    assert server.post(CHAT, {"messages": HI, "max_tokens": 2})[0] == 200


def test_a_name_and_a_field_do_not_steer_both(server: Served) -> None:
    status, error = server.error(CHAT, {"messages": HI, "model": "tiny+a", "steering": "b"})
    assert (status, error["param"]) == (400, "steering")


def test_a_default_is_for_requests_that_say_nothing() -> None:
    with served(Settings("tiny", Composition.parse("a*1.5"))) as server:

        def answer(**more: Any) -> str:
            body = {"messages": HI, "max_tokens": 6, "temperature": 0, **more}
            return str(json.loads(server.post(CHAT, body)[1])["choices"][0]["message"]["content"])

        assert answer() == text_of("a*1.5")
        assert answer(steering=None) == answer(steering="") == text_of(None)
        assert answer(steering="b@all*0.7") == answer(model="tiny+b@all*0.7") == text_of("b@all*0.7")


def test_figures_are_told(server: Served) -> None:
    assert server.get("/health") == (200, '{"status":"ok"}')
    server.post(CHAT, {"messages": HI, "max_tokens": 2})
    server.until_idle()
    text = server.get("/metrics")[1]
    assert 'steerkit_requests_total{status="200"}' in text
    assert float(text.split("\nsteerkit_generated_tokens_total ")[1].split()[0]) > 0
    assert "\nsteerkit_running 0\n" in text
    assert server.get("/nowhere")[0] == 404


def test_pages_of_other_sites_are_refused(server: Served) -> None:
    body = {"messages": HI, "max_tokens": 2}
    assert server.post(CHAT, body, Origin="http://evil.example")[0] == 403
    assert server.post(CHAT, body, Host="evil.example")[0] == 403
    assert server.post(CHAT, body, Origin=server.address)[0] == 200
