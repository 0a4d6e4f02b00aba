"""The LM Evaluation Harness under steering: figures against plain passes of the steered model, row by row."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import steerkit
from steerkit._support.shipped import vector_path
from steerkit.cli import lm_eval as command
from steerkit.errors import DataError, ScopeError, SteerError, StrengthError, UnknownNameError
from steerkit.evaluate import lm_eval as running
from steerkit.evaluate.lm_eval import evaluate_tasks
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.modes import vector_for
from tests.pairwise import pairwise
from tests.tiny_tokenizers import byte_tokenizer

TASKS = Path(__file__).parents[1] / "tasks"
CHOICE, ANSWER, TEXT = "steerkit_choice", "steerkit_answer", "steerkit_text"
RUNS = [("llama", 1), ("llama", 8), ("gpt2", 1), ("gpt2", 8), ("mistral", 8), ("gemma2", 8), ("mamba", 8)]
ITEMS = [json.loads(line) for line in (TASKS / "items.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The data set of the tasks is built once, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        # It asks other programs about the machine, most of a second each time.
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _results: None)
        patch.chdir(TASKS.parent.parent)  # the task files name their items from here
        yield


Samples = dict[str, list[Mapping[str, Any]]]


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> list[Samples]:
    """What lm_eval noted of every item, one entry for each of its runs."""
    seen: list[Samples] = []
    real = lm_eval.evaluator.simple_evaluate

    def noted(**settings: Any) -> Any:
        results = real(**settings)
        seen.append({task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in results["samples"].items()})
        return results

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", noted)
    return seen


def run(model: Any, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    return evaluate_tasks(model, byte_tokenizer(), tasks, include_path=TASKS, **options)


def log_prob(model: Any, vector: SteeringVector, ids: list[int], answer: int) -> float:
    """Of the last `answer` ids, each after all before it: the slow form, one row and its mask."""
    row = torch.tensor([ids])
    with torch.no_grad(), steerkit.steer(model, vector):
        logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0].log_softmax(dim=-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - answer, len(ids)))


def log_probs_of_choices(model: Any, vector: SteeringVector) -> list[list[float]]:
    tokenizer = byte_tokenizer()
    found = []
    for item in ITEMS:
        context = f"Question: {item['question']}\nAnswer:"
        known = len(tokenizer.encode(context))
        wholes = [tokenizer.encode(f"{context} {choice}") for choice in item["choices"]]
        found.append([log_prob(model, vector, whole, len(whole) - known) for whole in wholes])
    return found


def keep_norm_vector(model: Any) -> SteeringVector:
    plain = vector_for(model, scope="all")
    facts = {name: getattr(plain, name) for name in ("tensors", "sites", "scope", "unit", "model_type")}
    facts |= {"hidden_size": plain.hidden_size, "num_layers": plain.num_layers}
    return SteeringVector(
        method="repe", edit="add_keep_norm", settings={"restore_norm": True}, suggested_strength=1.0, **facts
    )


@pytest.mark.parametrize(("family", "batch_size"), pairwise(among=RUNS, strength=1))
def test_log_likelihoods_are_those_of_the_steered_model(family: str, batch_size: int, samples: list[Samples]) -> None:
    """Rows of many lengths, padded on the right without a mask, give what each gives alone."""
    model = build(family)
    vector = vector_for(model, scope="all", size=0.5)
    report = run(model, [CHOICE], vector=vector, batch_size=batch_size)
    expected = torch.tensor(log_probs_of_choices(model, vector))
    found = torch.tensor([[answer[0] for answer in row["filtered_resps"]] for row in samples[0][CHOICE]])
    torch.testing.assert_close(found, expected)
    right = [int(row.argmax()) == item["answer"] for row, item in zip(expected, ITEMS, strict=True)]
    assert report["tasks"][CHOICE]["acc"]["value"] == pytest.approx(fmean(right))
    assert report["n"] == {CHOICE: len(ITEMS)}
    assert len({len(row["arguments"][0][0]) for row in samples[0][CHOICE]}) > 5


def test_every_operator(samples: list[Samples]) -> None:
    model = build("llama")
    vector = keep_norm_vector(model)
    run(model, [CHOICE], vector=vector, limit=5)
    found = torch.tensor([[answer[0] for answer in row["filtered_resps"]] for row in samples[0][CHOICE]])
    torch.testing.assert_close(found, torch.tensor(log_probs_of_choices(model, vector)[:5]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_whole_texts(family: str, batch_size: int, samples: list[Samples]) -> None:
    model, tokenizer = build(family), byte_tokenizer()
    vector = vector_for(model, scope="all", size=0.5)
    run(model, [TEXT], vector=vector, batch_size=batch_size)
    for row, item in zip(samples[0][TEXT], ITEMS, strict=True):
        ids = tokenizer.encode(f"{item['question']} {item['choices'][item['answer']]}.")
        whole = [tokenizer.bos_token_id, *ids]
        assert row["filtered_resps"][0] == pytest.approx(log_prob(model, vector, whole, len(ids)), rel=1e-5)


@pytest.mark.parametrize(("family", "batch_size"), pairwise(among=RUNS, strength=1))
def test_generated_texts_are_those_of_the_steered_model(family: str, batch_size: int, samples: list[Samples]) -> None:
    model, tokenizer = build(family), byte_tokenizer()
    vector = vector_for(model, scope="all", size=3.0)
    run(model, [ANSWER], vector=vector, baseline=True, batch_size=batch_size)
    prompts = [f"Question: {item['question']}\nAnswer:" for item in ITEMS]
    options = {"raw": True, "max_new_tokens": 6, "batch_size": 1, "eos_token_id": tokenizer.eos_token_id}
    for noted, steering in zip(samples, [{}, {"vector": vector}], strict=True):
        expected = [
            text.partition("\n\n\n")[0] for text in steerkit.generate(model, tokenizer, prompts, **steering, **options)
        ]
        assert [row["resps"][0][0] for row in noted[ANSWER]] == expected
    baseline, steered = ([row["resps"][0][0] for row in noted[ANSWER]] for noted in samples)
    assert sum(one != other for one, other in zip(baseline, steered, strict=True)) > 10


def test_the_report(samples: list[Samples]) -> None:
    model = build("llama")
    report = run(model, [CHOICE, TEXT], vector=vector_for(model, scope="all"), baseline=True)
    json.dumps(report, allow_nan=False)
    for metric in ("acc", "acc_norm"):
        before, after = ([row[metric] for row in noted[CHOICE]] for noted in samples)
        assert report["baseline"][CHOICE][metric]["value"] == pytest.approx(fmean(before))
        assert report["tasks"][CHOICE][metric]["value"] == pytest.approx(fmean(after))
        assert report["tasks"][CHOICE][metric]["stderr"] == pytest.approx(stdev(after) / math.sqrt(20))
        change = [float(one) - float(other) for one, other in zip(after, before, strict=True)]
        assert any(change)
        assert report["difference"][CHOICE][metric]["value"] == pytest.approx(fmean(change))
        assert report["difference"][CHOICE][metric]["stderr"] == pytest.approx(stdev(change) / math.sqrt(20))
    assert report["difference"][TEXT]["byte_perplexity"]["value"] != 0
    assert report["difference"][TEXT]["byte_perplexity"]["stderr"] is None  # no mean over items
    assert report["versions"]["lm-eval"] and report["versions"]["tasks"] == {CHOICE: 1.0, TEXT: 1.0}
    assert report["num_fewshot"] == {CHOICE: 0, TEXT: 0}


def test_strength_and_unit_are_those_of_steer(samples: list[Samples]) -> None:
    model = build("llama")
    base = vector_for(model, scope="response", size=0.5)
    norms = {Site(1): 7.0}
    facts = {name: getattr(base, name) for name in ("tensors", "sites", "model_type", "hidden_size", "num_layers")}
    vector = SteeringVector(method="caa", edit="add", scope="response", unit="paper", norms=norms, **facts)
    run(model, [CHOICE], vector=vector, strength=0.5, unit="norm", scope="all", limit=2)
    expected = log_probs_of_choices(model, vector.at(strength=0.5, unit="norm", scope="all"))[:2]
    found = torch.tensor([[answer[0] for answer in row["filtered_resps"]] for row in samples[0][CHOICE]])
    torch.testing.assert_close(found, torch.tensor(expected))


def test_without_a_vector_the_bare_model_is_run(samples: list[Samples]) -> None:
    model = build("llama")
    report = run(model, [CHOICE], limit=3)
    none = log_probs_of_choices(model, vector_for(model, scope="all").at(strength=0.0))[:3]
    found = torch.tensor([[answer[0] for answer in row["filtered_resps"]] for row in samples[0][CHOICE]])
    torch.testing.assert_close(found, torch.tensor(none))
    assert report["n"] == {CHOICE: 3} and "baseline" not in report and "difference" not in report


def test_nothing_is_left_behind() -> None:
    model, tokenizer = build("llama"), byte_tokenizer()
    model.train()
    model.model.layers[2].eval()
    ids = torch.tensor([[5, 17, 44, 9, 101, 63]])
    training = [module.training for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    names = sorted(model.state_dict())
    with torch.no_grad():
        before = model(ids).logits
    environment = dict(os.environ)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    vector = vector_for(model, scope="all")
    evaluate_tasks(model, tokenizer, [CHOICE, ANSWER], vector=vector, baseline=True, include_path=TASKS, limit=2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert [module.training for module in model.modules()] == training
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert sorted(model.state_dict()) == names
    assert tokenizer.pad_token is None and tokenizer.padding_side == byte_tokenizer().padding_side
    assert dict(os.environ) == environment
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]


def test_an_error_on_the_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").train()

    def failing(**_settings: Any) -> Any:
        model.eval()
        random.seed(3)
        os.environ["LM_EVAL_SAID"] = "1"
        raise ValueError("a task\nwith a mistake")

    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", failing)
    state = random.getstate()
    with pytest.raises(DataError, match=r"lm-eval cannot run steerkit_choice \(a task with a mistake\)"):
        run(model, [CHOICE], vector=vector_for(model, scope="all"))
    assert model.training and random.getstate() == state and "LM_EVAL_SAID" not in os.environ
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("scope", ["response", "prompt", "generated", "first(2)"])
def test_other_scopes_are_refused_before_anything_is_loaded(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "load_evaluator", lambda: pytest.fail("loaded"))
    model = build("llama")
    for vector, options in (
        (vector_for(model, scope=scope), {}),
        (vector_for(model, scope="all"), {"scope": scope}),
        (vector_for(model, scope="all").at(scope=scope), {"scope": "all"}),
        ([vector_for(model, scope="all"), vector_for(model, scope=scope)], {}),
    ):
        with pytest.raises(ScopeError) as error:
            evaluate_tasks(None, None, [CHOICE], vector=vector, **options)  # type: ignore[arg-type]
        assert "scope='all'" in str(error.value) and scope in str(error.value) and "\n" not in str(error.value)


def test_what_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    vector = vector_for(model, scope="all")
    with pytest.raises(StrengthError, match="one number, not one per row"):
        run(model, [CHOICE], vector=vector.at(strength=[1.0, 2.0]))
    with pytest.raises(DataError, match="baseline"):
        run(model, [CHOICE], baseline=True)
    for tasks in ([], CHOICE):
        with pytest.raises(DataError, match="list of names"):
            run(model, tasks)
    for options in ({"limit": 0}, {"batch_size": 0}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(DataError, match=next(iter(options))):
            run(model, [CHOICE], **options)
    with pytest.raises(DataError, match="is no folder"):
        evaluate_tasks(model, byte_tokenizer(), [CHOICE], include_path=TASKS / "missing")
    ended = byte_tokenizer()
    ended.eos_token = None
    with pytest.raises(DataError, match="end-of-text"):
        evaluate_tasks(model, ended, [CHOICE], include_path=TASKS)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(SteerError, match=r"lm-eval .*pip install 'steerkit-hf\[lm-eval\]'"):
        run(model, [CHOICE])


def test_unknown_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: real(**{**options, "include_defaults": False}))
    with pytest.raises(UnknownNameError, match="unknown task 'steerkit_choise'; did you mean 'steerkit_choice'"):
        run(build("llama"), [CHOICE, "steerkit_choise"])
    with pytest.raises(UnknownNameError, match=r"unknown task 'q'; .*lm-eval ls tasks"):
        run(build("llama"), ["q"])


@pytest.mark.slow
def test_unknown_tasks_beside_those_of_lm_eval() -> None:
    with pytest.raises(UnknownNameError, match="unknown task 'steerkit_choise'") as error:
        run(build("llama"), ["arc_easy", "steerkit_choise"])
    assert "steerkit_choice" in str(error.value) and len(str(error.value)) < 200


def app() -> typer.Typer:
    made = typer.Typer()
    made.command("lm-eval")(command.run)
    return made


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    file = str(vector_for(model, scope="response", size=0.5).save(tmp_path / "v.safetensors"))
    monkeypatch.setattr(steerkit, "load_model", lambda _name: (model, byte_tokenizer()), raising=False)
    words = ["--tasks", f"{CHOICE},{TEXT}", "--include-path", str(TASKS), "--limit", "4"]
    words += ["--vector", file, "--scope", "all", "--strength", "2", "--baseline"]
    done = CliRunner().invoke(app(), [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    vector = SteeringVector.load(file)
    expected = run(model, [CHOICE, TEXT], vector=vector, strength=2.0, scope="all", baseline=True, limit=4)
    assert {key: told[key] for key in expected} == expected
    assert told["strength"] == 2.0 and told["vector"] == file

    shown = CliRunner().invoke(app(), words)
    assert shown.exit_code == 0, shown.output
    assert "acc_norm" in shown.stdout and "unsteered" in shown.stdout and "±" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_the_command_refuses_before_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(vector_for(build("llama"), scope="response").save(tmp_path / "v.safetensors"))
    monkeypatch.setattr(steerkit, "load_model", lambda _name: pytest.fail("loaded"), raising=False)
    refused = CliRunner().invoke(app(), ["--tasks", CHOICE, "--vector", file])
    assert isinstance(refused.exception, ScopeError)
    assert CliRunner().invoke(app(), ["--tasks", CHOICE, "--baseline"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_with_a_shipped_vector(embedded: tuple[Any, Any], samples: list[Samples]) -> None:
    model, tokenizer = embedded
    vector = SteeringVector.load(vector_path("optimism-caa")).at(scope="all")
    report = evaluate_tasks(
        model, tokenizer, [CHOICE, ANSWER], vector=vector, baseline=True, include_path=TASKS, limit=6
    )
    assert report["baseline"][CHOICE]["acc"]["value"] > 1 / 3  # easy questions: better than guessing
    item, row = ITEMS[0], samples[1][CHOICE][0]
    known = len(tokenizer.encode(f"Question: {item['question']}\nAnswer:"))
    for choice, found in zip(item["choices"], row["filtered_resps"], strict=True):
        whole = tokenizer.encode(f"Question: {item['question']}\nAnswer: {choice}")
        assert found[0] == pytest.approx(log_prob(model, vector, whole, len(whole) - known), rel=1e-3)
    baseline, steered = ([one["resps"][0][0] for one in noted[ANSWER]] for noted in samples)
    assert baseline != steered
