"""Training a dictionary: steps against plain definitions, killed runs, streams, and planted rows that come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from steerkit.activations.recording import record_ids
from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.learning import AUXILIARY, BROUGHT_BACK, Learner, Learning, seed_of
from steerkit.dictionary.token_chunks import TokenChunks
from steerkit.dictionary.training import PROGRESS, train_dictionary
from steerkit.errors import DataError, FitError, SiteError
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from tests.dictionary.made import made
from tests.families import build
from tests.program import Cli, plain, strict_json
from tests.tiny_tokenizers import CHATML, byte_tokenizer

SITE = Site(1)
SMALL = Learning(latents=48, top_k=4, tokens=3000, batch=64, dead_after=500)


def texts(count: int = 40) -> list[Conversation]:
    return [Conversation(f"{n} {'abc xyz '[n % 5 :] * (n % 4 + 1)}", raw=True) for n in range(count)]


def planted(tokens: int, latents: int = 24, width: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens that are sums of three rows each, and the rows."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(latents, width, generator=draw, dtype=torch.float32))
    codes = torch.zeros(tokens, latents, dtype=torch.float32)
    places = torch.rand(tokens, latents, generator=draw).topk(3).indices
    codes.scatter_(1, places, 1 + torch.rand(tokens, 3, generator=draw))
    return 5 + 3 * codes @ rows, rows


def slow_loss(learner: Learner, rows: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and its part without dead latents, token by token as the file's top says it."""
    how = learner.how
    x = rows.double() * learner.scale
    pre = torch.relu((x - leaves["decoder_bias"]) @ leaves["encoder"].T + leaves["encoder_bias"])
    kept = set(pre.detach().flatten().argsort(descending=True)[: how.top_k * len(x)].tolist())
    mask = torch.tensor([place in kept for place in range(pre.numel())]).view_as(pre)
    left = x - (pre * mask) @ leaves["decoder"] - leaves["decoder_bias"]
    main = left.square().sum() / (x - x.mean(0)).square().sum()
    dead = [k for k in range(how.latents) if learner.seen - int(learner.fired[k]) > how.dead_after]
    if not dead:
        return main, main
    error, own = left.detach(), pre[:, dead]
    mask = torch.zeros_like(own)
    for token, row in enumerate(own.detach()):
        mask[token, row.argsort(descending=True)[:BROUGHT_BACK]] = 1.0
    back = error - (own * mask) @ leaves["decoder"][dead]
    return main + AUXILIARY * back.square().sum() / error.square().sum(), main


def test_a_step_is_adam_on_the_loss_with_a_decoder_of_length_1() -> None:
    rows, _ = planted(64)
    how = Learning(latents=30, top_k=3, tokens=640, batch=64, dead_after=100)
    learner = Learner(rows, how)
    assert learner.scale == pytest.approx((12 / float((rows - rows.mean(0)).square().sum(-1).mean())) ** 0.5, rel=1e-5)
    learner.fired[:5] = -200  # dead from the beginning
    slow = {name: one.double().clone() for name, one in learner.parameters.items()}
    moments = {name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in slow.items()}
    for turn in (1, 2, 3):
        leaves = {name: one.clone().requires_grad_() for name, one in slow.items()}
        loss, main = slow_loss(learner, rows, leaves)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        assert learner.step(rows).unexplained == pytest.approx(float(main.detach()), rel=1e-4)
        done = learner.seen / how.tokens
        rate = how.learning_rate * min(done / 0.05, (1 - done) / 0.2, 1.0)
        for (name, one), gradient in zip(slow.items(), gradients, strict=True):
            own = gradient
            if name == "decoder":
                own = own - (own * one).sum(-1, keepdim=True) * one
            mean, power = moments[name]
            moments[name] = mean, power = 0.9 * mean + 0.1 * own, 0.999 * power + 0.001 * own.square()
            one -= rate * (mean / (1 - 0.9**turn)) / ((power / (1 - 0.999**turn)).sqrt() + 1e-8)
        slow["decoder"] /= slow["decoder"].norm(dim=-1, keepdim=True)
        for name, one in slow.items():
            assert torch.allclose(learner.parameters[name].double(), one, atol=2e-5), (turn, name)
    assert learner.seen == 192


def test_no_row_begins_as_a_random_direction_that_is_a_control_elsewhere() -> None:
    """A dictionary that began with the directions of small seeds would explain just these."""
    rows, _ = planted(50)
    for seed in range(3):
        begun = Learner(rows, Learning(latents=40, top_k=3, seed=seed)).parameters["decoder"]
        for other in range(5):
            drawn = torch.randn(40, 12, generator=torch.Generator().manual_seed(other), dtype=torch.float32)
            assert float((torch.nn.functional.normalize(drawn) * begun).sum(-1).abs().mean()) < 0.5
    assert len({seed_of("tokens", run, turn, n) for run in range(4) for turn in range(4) for n in range(4)}) == 64
    assert 0 <= seed_of("x") < 1 << 32


def test_planted_rows_come_back() -> None:
    rows, truth = planted(4000, latents=40, width=32)
    how = Learning(latents=60, top_k=3, tokens=200_000, batch=200, learning_rate=3e-3, dead_after=2000)
    learner = Learner(rows, how)
    order = torch.Generator().manual_seed(1)
    while learner.seen < how.tokens:
        last = learner.step(rows[torch.randperm(len(rows), generator=order)[: how.batch]])
    assert last.unexplained < 0.05
    cosines = (learner.parameters["decoder"] @ truth.T).max(0).values
    assert float((cosines > 0.95).float().mean()) >= 0.9
    found = Dictionary(**learner.tensors(), site=SITE)
    latents = found.encode(rows)
    assert float((latents > 0).float().sum(-1).mean()) == pytest.approx(3, abs=0.5)
    assert float((rows - found.decode(latents)).square().sum() / (rows - rows.mean(0)).square().sum()) < 0.06
    assert not found.needs_all  # its threshold stands for the batch


def test_chunks_hold_every_token_but_the_first_of_each_text(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    chunks = TokenChunks(model, tokenizer, texts(), SITE, size=100, batch_size=3, folder=tmp_path)
    read = list(chunks.read())
    assert len(read) > 2
    assert read[-1].texts == 40
    assert all(torch.equal(one.rows, chunks.kept(number).rows) for number, one in enumerate(read))
    whole = record_ids(model, [render(tokenizer, one).ids for one in texts()], [SITE])[SITE]
    expected = torch.cat([one[1:] for one in whole])
    found = torch.cat([one.rows for one in read]).float()
    assert found.shape == expected.shape

    def by_sum(rows: Tensor) -> Tensor:
        return rows.sum(-1).sort().values

    assert torch.allclose(by_sum(found), by_sum(expected), atol=0.3)  # bfloat16 on the way
    later = list(chunks.read(1, read[0].texts))
    assert all(torch.equal(one.rows, two.rows) for one, two in zip(later, read[1:], strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, keep: bool) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)

    def run(folder: str, stop: int | None = None) -> Dictionary:
        done = 0

        def step(_words: str) -> None:
            nonlocal done
            done += 1
            if done == stop:
                raise KeyboardInterrupt

        return train_dictionary(
            model, tokenizer, texts(), SITE, SMALL, work=tmp_path / folder, keep=keep, batch_size=2, chunk=60, step=step
        )

    whole = run("whole")
    for stop in (1, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            run("killed", stop)
    rows = (tmp_path / "killed" / PROGRESS).read_bytes()
    # Killed between the row and the state: a row too many is dropped.
    (tmp_path / "killed" / PROGRESS).write_bytes(rows + rows.splitlines(keepends=True)[-1] + b'{"torn')
    again = run("killed")
    assert again.digest == whole.digest
    assert again.provenance == whole.provenance
    trained = whole.provenance["trained"]
    assert (trained["texts_read"], trained["passes"] > 1) == (40, True)
    assert run("killed").digest == whole.digest  # nothing is left to be done
    other = replace(SMALL, seed=1)
    with pytest.raises(DataError, match="was begun with seed 0, now it is 1"):
        train_dictionary(
            model, tokenizer, texts(), SITE, other, work=tmp_path / "whole", keep=keep, batch_size=2, chunk=60
        )


def test_no_more_than_one_chunk_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are read only as far as the chunk that is learned from, however many there are."""
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    given = 0

    class Endless:
        def __iter__(self) -> Iterator[Conversation]:
            nonlocal given
            while True:
                given += 1
                yield Conversation(f"{given} abc", raw=True)

    sizes: dict[str, Any] = {"keep": False, "batch_size": 4, "chunk": 200}
    found = train_dictionary(model, tokenizer, Endless(), SITE, SMALL, work=tmp_path, **sizes)
    trained = found.provenance["trained"]
    assert trained["passes"] == 1
    assert given == trained["texts_read"]
    rows = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()[1:]]
    assert len(rows) > 10
    assert max(row["tokens"] for row in rows) < 600  # a chunk, and what is left of its last group of texts


def test_half_the_room_and_the_same_file(tmp_path: Path) -> None:
    whole = made("jumprelu", width=64, latents=512)
    path = tmp_path / "half.safetensors"
    kept = whole.compact()
    kept.save(path)
    found = load_dictionary(path)
    assert found.digest == kept.digest != whole.digest
    assert torch.equal(found.encoder, whole.encoder.bfloat16().float())
    assert torch.equal(found.threshold, whole.threshold)  # type: ignore[arg-type]
    assert path.stat().st_size < 0.55 * whole.save(tmp_path / "whole.safetensors").stat().st_size
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("encoder").dtype == torch.bfloat16


def test_what_is_refused(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    for changes in ({"latents": 0}, {"top_k": 49}, {"tokens": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"seed": -1}):
        with pytest.raises(FitError, match=next(iter(changes))):
            replace(SMALL, **changes)
    with pytest.raises(DataError, match="no text has a token"):
        train_dictionary(model, tokenizer, [], SITE, SMALL, work=tmp_path / "none")
    with pytest.raises(SiteError):
        train_dictionary(model, tokenizer, texts(), "resid_post.9", SMALL, work=tmp_path / "x")
    with pytest.raises(FitError, match="do not differ"):
        Learner(torch.ones(4, 3, dtype=torch.float32), SMALL)
    with pytest.raises(FitError, match="lower the learning rate"):
        Learner(planted(8)[0], SMALL).step(torch.full((8, 12), torch.inf))


WORDS = ("dictionary", "train", "--latents", 40, "--top-k", 4, "--tokens", 900, "--batch-size", 4)


def test_the_command(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    rows = [
        {"text": "plain text, as it stands"},
        {"prompt": "Why?", "response": "So."},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ]
    Path("t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows * 6))
    told = answer(*WORDS, "--texts", "t.jsonl", "--site", "resid_post.2", "--model", tiny, "--out", "d.safetensors")
    found = load_dictionary("d.safetensors")
    assert (str(found.site), found.num_latents, found.activation) == ("resid_post.2", 40, "batchtopk")
    assert (told["texts"], told["texts_read"]) == ("t.jsonl", 18)
    assert 0 < told["neutral"]["l0"] <= 40
    shown = cli(*WORDS, "--model", tiny, "--out", "e.safetensors")  # the shipped texts, at the block in the middle
    assert (shown.code, "of the variance left" in shown.out) == (0, True)
    assert str(load_dictionary("e.safetensors").site) == "resid_post.2"
    Path("t.jsonl").write_text('{"text": "another file of that name"}\n' * 18)
    words = (*WORDS, "--texts", "t.jsonl", "--site", "resid_post.2", "--model", tiny, "--out", "d.safetensors")
    assert "was begun with told" in cli(*words).err
    Path("bad.jsonl").write_text('{"text": "fine, it is"}\n{"nothing": 1}\n')
    ended = cli(*WORDS, "--texts", "bad.jsonl", "--model", tiny, "--out", "f.safetensors")
    assert (ended.code, "bad.jsonl, line 2" in ended.err) == (1, True)
    assert cli(*WORDS, "--model", tiny, "--out", "f.bin").code == 2
    parts = strict_json(
        cli("dictionary", "decompose", "--vector", "v.safetensors", "--dictionary", "d.safetensors", "--json").out
    )
    (site,) = parts["sites"]
    assert (site["site"], parts["at"]) == ("resid_post.1", "resid_post.2")
    shown = cli("dictionary", "decompose", "--vector", "v.safetensors", "--dictionary", "d.safetensors")
    assert "the dictionary is of resid_post.2" in plain(shown.out)
