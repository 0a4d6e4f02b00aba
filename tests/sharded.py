"""Two processes that hold one model between them; run by `tests/network/test_sharding.py` under torchrun.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.sharded FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DistributedConfig, Trainer, TrainingArguments

import steerkit
from steerkit._support.files import write_whole
from steerkit._support.journal import Journal
from steerkit.errors import DataError, SteerError
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.setup import Setup
from steerkit.export import bake
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.steering.callback import SteeringCallback
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import byte_tokenizer

DATA = steerkit.ContrastSet.from_answers(
    [("How was it?", "It was good.", "It was bad."), ("And the day?", "It was fine.", "The day was grey.")]
)
SITES = ("resid_pre.1", "resid_post.1", "attn_out.1", "mlp_in.1", "mlp_out.1", "z.1", "mlp_post.1")
SCOPES = ("all", "response", "generated", "first(2)")
IDS = torch.tensor([[5, 17, 44, 9, 101], [7, 23, 42, 88, 15]])
Found = dict[str, Any]


def attempt(work: Callable[[], Any]) -> Any:
    """What some work gives, or which error of ours it raises; any other error ends the process."""
    try:
        return work()
    except SteerError as error:
        return f"{type(error).__name__}: {error}"


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).abs().max() / other.abs().max()).detach())


def recorded(model: Any, whole: Any, site: str) -> float:
    ours, theirs = (steerkit.record(one, byte_tokenizer(), DATA, [site])[site] for one in (model, whole))
    return apart(ours, theirs)


def generated(model: Any, scope: str) -> list[list[int]]:
    vector = modes.vector_for(model, scope=scope)
    with steerkit.steer(model, vector, 2.0):
        return model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()


def steered(model: Any) -> torch.Tensor:
    with torch.no_grad(), steerkit.steer(model, modes.vector_for(model, scope="all"), 2.0):
        return model(IDS).logits


def fitted(model: Any) -> torch.Tensor:
    return steerkit.fit(model, byte_tokenizer(), DATA, method="caa", layers=[1]).params(Site(1))["direction"]


def tensor_parallel(folder: Path) -> Found:
    whole = build("llama").eval()
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "model")
    dist.barrier()
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=plan, dtype=torch.float32).eval()
    vector = modes.vector_for(whole, scope="all")
    tokens = {scope: generated(model, scope) == generated(whole, scope) for scope in SCOPES}
    return {
        "record": {site: attempt(lambda site=site: recorded(model, whole, site)) for site in SITES},
        "fit": apart(fitted(model), fitted(whole)),
        "fit at z": attempt(lambda: str(steerkit.fit(model, byte_tokenizer(), DATA, method="caa", sites=["z.1"]))),
        "steer": apart(steered(model), steered(whole)),
        "generate": tokens,
        "edited": attempt(lambda: steerkit.edited(model, vector, 1.0).__enter__()),
        "bake": attempt(lambda: bake(model, byte_tokenizer(), vector, folder / "baked")),
    }


def fully_sharded() -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, model = build("llama").eval(), build("llama").eval()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def gradient(one: Any) -> torch.Tensor:
        one.zero_grad()
        with steerkit.steer(one, modes.vector_for(one, scope="all"), 2.0):
            one(IDS, labels=IDS).loss.backward()
        grad = one.model.layers[0].self_attn.q_proj.weight.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    return {
        "record": {site: attempt(lambda site=site: recorded(model, whole, site)) for site in SITES},
        "fit": apart(fitted(model), fitted(whole)),
        "steer": apart(steered(model), steered(whole)),
        "gradient": apart(gradient(model), gradient(whole)),
        "edited": attempt(lambda: steerkit.edited(model, modes.vector_for(whole, scope="all"), 1.0).__enter__()),
    }


def data_parallel(folder: Path) -> Found:
    """Two steps of a Trainer of two processes, each with half of the rows, against a loop over all of them."""
    rows = IDS.repeat(4, 1) + torch.arange(8)[:, None]
    vector = modes.vector_for(build("llama"), scope="all")
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model, loop = build("llama"), build("llama").train()
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=[SteeringCallback(vector, 2.0)]).train()
    optimizer = torch.optim.SGD(loop.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        with steerkit.steer(loop, vector, 2.0):
            loop(rows, labels=rows).loss.backward()
        optimizer.step()

    def moved(one: Any) -> torch.Tensor:
        pairs = zip(one.parameters(), build("llama").parameters(), strict=True)
        return torch.cat([(after - before).detach().flatten() for after, before in pairs])

    return {"weights": apart(moved(model), moved(loop))}


class Counted:
    """Rows that go through a model in this process."""

    def __init__(self, model: Any) -> None:
        self.rows = 0
        body = model.model
        body.register_forward_pre_hook(lambda _m, args, kwargs: self._note(args, kwargs), with_kwargs=True)

    def _note(self, args: Any, kwargs: Any) -> None:
        self.rows += len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])


def split_work(folder: Path) -> Found:
    """The same work alone and shared by both: the same bits, in this process by about half of the rows."""
    model, tokenizer = build("llama").eval(), byte_tokenizer()
    pairs = [(f"Number {n}?", "Good." if n % 3 else "It is good.", "Bad.") for n in range(13)]
    data = steerkit.ContrastSet.from_answers(pairs)
    seen = Counted(model)

    def fitted(method: str) -> bytes:
        return steerkit.fit(model, tokenizer, data, method=method, layers=[1, 2], batch_size=4).to_bytes()

    def texts() -> list[str]:
        vector = modes.vector_for(model, scope="response")
        return steerkit.generate(
            model, tokenizer, [one[0] for one in pairs], vector=vector, strength=2.0, max_new_tokens=4, batch_size=3
        )

    def scores() -> list[float]:
        setup = Setup(model, tokenizer, data, neutral=data.positive, batch_size=3)
        trials = setup.trials([(modes.vector_for(model, scope="response"), one) for one in (0.5, 1.0, 2.0)])
        found = [PreferenceMargin().score(trial)["preference_margin"].tolist() for trial in trials]
        return [value for one in found for value in one] + Divergence().score(trials[0])["kl"].values.tolist()

    works: dict[str, Callable[[], Any]] = {
        "fit caa": lambda: fitted("caa"),
        "fit repe": lambda: fitted("repe"),
        "record": lambda: steerkit.record(model, tokenizer, data, ["resid_post.1"], batch_size=2)["resid_post.1"],
        "generate": texts,
        "scores": scores,
    }

    def counted(work: Callable[[], Any]) -> tuple[Any, int]:
        before = seen.rows
        return work(), seen.rows - before

    alone = {name: counted(work) for name, work in works.items()}
    before = counted(works["fit caa"])[1]  # the first time the model was looked at, too
    with steerkit.split_between_processes():
        shared = {name: counted(work) for name, work in works.items()}
        file = folder / f"written by {dist.get_rank()}"
        write_whole(file, b"here")
        journal = Journal(folder / "rows.jsonl", {"of": "all"})
        journal.append([{"row": dist.get_rank()}])
        dist.barrier()
        again = [row["row"] for row in Journal(folder / "rows.jsonl", {"of": "all"}).rows]

        def fails(batch: Any) -> int:
            if 0 in batch.rows:
                raise DataError("only one process has this row")
            return 1

        rendered = [render(tokenizer, Conversation.of(one[0])) for one in pairs]
        failing = attempt(lambda: list(run_batches(batches(rendered, 4, pad_id=0), fails)))
        other = batches(rendered[dist.get_rank() :], 4, pad_id=0)
        differing = attempt(lambda: list(run_batches(other, lambda _batch: 1)))
    return {
        "same": {
            name: bool(torch.equal(alone[name][0], shared[name][0]))
            if name == "record"
            else alone[name][0] == shared[name][0]
            for name in works
        },
        "rows": {name: (alone[name][1], shared[name][1]) for name in works},
        "files": sorted(path.name for path in folder.glob("written by *")),
        "journal": again,
        "failing": failing,
        "differing": differing,
        "before": before,
        "after": counted(works["fit caa"])[1],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {
        "tensor parallel": tensor_parallel(folder),
        "fully sharded": fully_sharded(),
        "data parallel": data_parallel(folder),
        "split work": split_work(folder),
    }
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
