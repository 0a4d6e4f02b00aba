"""Steering while a model is trained: prevention, and ablation while training. Nothing of it stays in the model.

    prevention:  h' = h + strength * v          at every token of every training forward, v fixed
    CAFT:        h' = h - Q^T Q h               Q: [k, d] orthonormal rows that span the directions

What steering supplies, the weights need not learn: a model that is steered towards a trait while it is trained on data
that shows the trait has less reason to acquire it, and is used without steering afterwards.

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509 (preventative steering). Casademunt, Juang, Karvonen, Marks, Rajamanoharan, Nanda (2025),
"Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning", arXiv 2507.16795 (CAFT).

Where this file departs. CAFT as published finds its directions by principal components or sparse autoencoders; here
they are those of the vectors given. The steering is on in training steps only: evaluation in between sees the plain
model, unless asked otherwise.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import CodeType, TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from steerkit.errors import DataError, ModelError, ScopeError
from steerkit.maths.directions import orthonormalise
from steerkit.methods._registry import method_of, resolve
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.steering.dispatch import forget_compiled
from steerkit.steering.steering import Steering, steer
from steerkit.steering.strengths import Strength, vectors_of
from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SteeringCallback", "additions", "span_ablation"]

_OUTSIDE = ("resid_pre", "resid_post")


class SteeringCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Steers a model during the training steps of a `transformers.Trainer`, and at no other time.

    The steering is attached when a step begins (all its accumulated batches included) and comes off when it ends, so
    that evaluation, prediction and saving in between see the plain model. If training is broken off by an error, the
    first forward pass outside of the training loop finds that out and takes it off before anything is computed; used as
    a context manager the callback takes it off at once (with a compiled model, whose code asks nobody, use it so).
    Adapters (PEFT) are trained like anything else. A compiled model keeps its hooks between steps, where they do
    nothing: attaching them anew would compile it again for every step.

    Args:
        vectors: one vector or several. They are fixed: gradients flow through, not into them.
        strength: see `steer`; None takes each vector's own, else its suggested one, else the method's.
        mode: None applies the vectors as they are; `add` adds their directions, whatever method fitted them; `ablate`
            takes the space that their directions span out (CAFT).
        scope: which tokens are written. Scopes by role (`assistant`, `answer`, `after(n)`) need the trainer's
            `processing_class`, whose chat template tells whose tokens are whose. A trainer does not say where prompts
            end, so `response` and others that ask for it raise a `ScopeError`.
        unit: see `steer`.
        during_evaluation: stay on for evaluation in the course of training.

    Raises:
        DataError: an unknown mode, or a vector without a direction where the mode needs one.

    Example:
        callback = steerkit.SteeringCallback(vector, strength=2.0)
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        vectors: SteeringVector | Sequence[SteeringVector],
        strength: Strength | None = None,
        *,
        mode: Literal["add", "ablate"] | None = None,
        scope: str = "all",
        unit: Literal["paper", "norm"] | None = None,
        during_evaluation: bool = False,
    ) -> None:
        if mode not in (None, "add", "ablate"):
            raise DataError(f"mode {mode!r}: give 'add', 'ablate', or None for the vectors' own edit")
        listed = vectors_of(vectors)
        changed = {"add": additions, "ablate": span_ablation}
        self.vectors = tuple(listed if mode is None else changed[mode](listed))
        self.strength, self.scope, self.unit, self.during_evaluation = strength, scope, unit, during_evaluation
        self._model: nn.Module | None = None
        self._steering: Steering | None = None
        self._guards: list[Any] = []
        self._loop: _Loop | None = None
        self._is_compiled = False
        self._pause = contextlib.ExitStack()

    @property
    def is_attached(self) -> bool:
        """Whether the model is steered at the moment."""
        return bool(self._guards)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the steering, before the first step.

        Args:
            args: the trainer's arguments.
            state: not used.
            control: not used.
            kwargs: `model` is the one that is trained.

        Raises:
            ScopeError: a site inside a block under gradient checkpointing, a scope that a trainer cannot tell, or one
                by role without the trainer's tokenizer.
            ModelError: the trainer copies the model to several devices (`nn.DataParallel`).
            SteerError: whatever `steer` finds wrong.
        """
        self._detach()
        self._plan(args, kwargs)
        if self.during_evaluation or self._is_compiled:
            self._attach()
            self._step_aside()

    def _plan(self, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Plan the steering and refuse what would train without it."""
        model: nn.Module = kwargs["model"]
        if (getattr(args, "n_gpu", 1) or 1) > 1:
            raise ModelError(
                f"{args.n_gpu} devices would get copies of the model without its steering; start one process per "
                "device (torchrun), or show the trainer a single one"
            )
        self._model = model
        kinds = [set(resolve(vector.method).scopes) for vector in self.vectors]
        scope = Scope.parse(self.scope).among(sorted(set.intersection(*kinds)))
        tokenizer = _tokenizer_for(scope, kwargs.get("processing_class"))
        self._steering = steer(
            model, self.vectors, self.strength, scope=self.scope, unit=self.unit, tokenizer=tokenizer
        )
        _refuse_checkpointed(model, self._steering.sites)
        self._is_compiled = bool(getattr(args, "torch_compile", False)) or _has_compiled_code(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the steering, for all batches of this step."""
        if self._steering is None:  # taken off since training began: not silently for the rest of it
            self._plan(args, kwargs)
        self._pause.close()
        self._attach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it off: what follows may be an evaluation."""
        self._step_aside()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it off after a step that was broken off on purpose."""
        self._step_aside()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it off for good."""
        self._forget()

    def __enter__(self) -> SteeringCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forget()

    def _attach(self) -> None:
        """Put the hooks on, and beside them guards that see the training loop end."""
        if self.is_attached or self._steering is None or self._model is None:
            return
        self._loop = _Loop.around()
        decoder = find_decoder(self._model)
        self._steering.__enter__()
        # On the body as well, which people also call alone. Appended: torch looks up how to call each hook before a
        # module while it runs them, so only those that have run already may be taken off in one.
        places = {id(one): one for one in (decoder.model, decoder.body)}.values()
        self._guards = [one.register_forward_pre_hook(_Guard(self)) for one in places]

    def _step_aside(self) -> None:
        """Leave the model unsteered while it is evaluated, unless that is asked for."""
        if self.during_evaluation:
            return
        if not self._is_compiled:
            self._detach()
            return
        self._pause.close()
        clock = PassClock.of(find_decoder(self._model).model) if self._model is not None else None
        if clock is not None:
            self._pause.enter_context(clock.suspended())

    def _detach(self) -> None:
        """Take hooks and guards off, where they are on."""
        self._pause.close()
        guards, self._guards, self._loop = self._guards, [], None
        for guard in guards:
            guard.remove()
        if guards and self._steering is not None:
            self._steering.__exit__(None, None, None)

    def _forget(self) -> None:
        """Take everything off for good, compiled code with the hooks in it too."""
        self._detach()
        if self._model is not None:
            forget_compiled(find_decoder(self._model).model)
        self._model = self._steering = None

    def look(self) -> None:
        """Take the steering off if the training loop that attached it has been left."""
        if self._loop is not None and not self._loop.is_running:
            self._forget()


class _Guard(Hook):
    """Asks before each pass whether training goes on."""

    def __init__(self, callback: SteeringCallback) -> None:
        self._callback = callback

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._callback.look()


class _Loop(NamedTuple):
    """What runs the training steps, told by its frame's id: holding the frame would keep all that it holds alive.

    Attributes:
        thread: the thread it runs in; passes of others say nothing about it.
        frame: the id of its frame.
        code: what runs in the frame.
        owner: whose method that is; None of a plain function. An id alone may be given to a later frame.
    """

    thread: int
    frame: int
    code: CodeType
    owner: weakref.ref[Any] | None

    @classmethod
    def around(cls) -> _Loop:
        """The first frame that is neither a callback's nor of their own machinery."""
        ours = (__name__, TrainerCallback.__module__)
        frame: Any = sys._getframe(1)
        while frame.f_back is not None and (
            frame.f_globals.get("__name__") in ours or isinstance(frame.f_locals.get("self"), TrainerCallback)
        ):
            frame = frame.f_back
        owner = frame.f_locals.get("self")
        held = None if owner is None or not hasattr(owner, "__weakref__") else weakref.ref(owner)
        return cls(threading.get_ident(), id(frame), frame.f_code, held)

    @property
    def is_running(self) -> bool:
        """Whether its frame is still on its thread's stack."""
        frame: Any = sys._current_frames().get(self.thread)
        while frame is not None and (id(frame) != self.frame or frame.f_code is not self.code):
            frame = frame.f_back
        return frame is not None and (self.owner is None or frame.f_locals.get("self") is self.owner())


def _tokenizer_for(scope: Scope, processing: Any) -> Any:
    """The trainer's tokenizer, where a scope needs one.

    Raises:
        ScopeError: the trainer has none, or no trainer can tell the scope.
    """
    if scope.needs_prompt_end:
        roles = scope.instead("; ", "assistant", "answer")
        roles += " with the trainer's processing_class" if roles else ""
        raise ScopeError(
            f"scope '{scope}': a trainer cannot tell where the prompt ends{roles}"
            f"{scope.instead(', or ' if roles else '; ', 'all')}"
        )
    if scope.is_by_role and processing is None:
        raise ScopeError(
            f"scope '{scope}': its marks are the chat template's; give the trainer the tokenizer (processing_class=)"
        )
    return getattr(processing, "tokenizer", processing) if scope.is_by_role else None


def _has_compiled_code(model: nn.Module) -> bool:
    decoder = find_decoder(model)
    modules = (model, decoder.model, decoder.body, *decoder.blocks)
    return any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules)


def _refuse_checkpointed(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse, before the first step, what each pass would refuse: a second run of a block sees another pass's state."""
    blocks = find_decoder(model).blocks
    for site in sites:
        if site.kind not in _OUTSIDE and getattr(blocks[site.layer], "gradient_checkpointing", False):
            raise ScopeError(
                f"{site}: a site inside a block cannot be steered under gradient checkpointing, whose second run comes "
                "after the pass; steer at resid_pre or resid_post, or switch checkpointing off"
            )


def additions(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    """The same directions, as vectors that add them.

    Args:
        vectors: of any method with one direction per site.

    Returns:
        One vector of method `caa` for each.

    Raises:
        DataError: a vector has no single direction.
    """
    return [_made(vector, _directions(vector), "caa", "add") for vector in vectors]


def span_ablation(vectors: Sequence[SteeringVector]) -> list[SteeringVector]:
    """Vectors that together take the space out that some directions span: h - Q^T Q h at each of their sites.

    Args:
        vectors: of any method with one direction per site; several directions at a site are made orthonormal, so that
            taking them out one after the other is the projection.

    Returns:
        Vectors of method `ablation`; as many as there are directions at one site at most.

    Raises:
        DataError: a vector has no single direction.
        FitError: directions at a site are linearly dependent.
    """
    rows: dict[Site, list[Tensor]] = {}
    for vector in vectors:
        for site, direction in _directions(vector).items():
            rows.setdefault(site, []).append(direction.float())
    bases = {site: orthonormalise(torch.stack(found)) for site, found in rows.items()}
    most = max(len(basis) for basis in bases.values())
    layers = [{site: basis[k] for site, basis in bases.items() if k < len(basis)} for k in range(most)]
    return [_made(vectors[0], chosen, "ablation", "project_out") for chosen in layers]


def _made(vector: SteeringVector, directions: dict[Site, Tensor], method: str, edit: str) -> SteeringVector:
    """A vector of another method, for the model of a given one; its strength only where it still means the same."""
    adds = edit == "add" and vector.edit == "add"
    return SteeringVector(
        method=method,
        tensors={f"{site}/direction": direction for site, direction in directions.items()},
        sites=tuple(directions),
        edit=edit,
        scope="all",
        unit=vector.unit if adds else "paper",
        model_type=vector.model_type,
        hidden_size=vector.hidden_size,
        num_layers=vector.num_layers,
        norms={site: norm for site, norm in vector.norms.items() if site in directions},
        spreads={site: spread for site, spread in vector.spreads.items() if site in directions},
        widths={site: len(row) for site, row in directions.items() if len(row) != vector.hidden_size},
        model_id=vector.model_id,
        strength=vector.strength if adds else None,
        suggested_strength=vector.suggested_strength if adds else None,
        own_unit=adds and vector.own_unit,
    )


def _directions(vector: SteeringVector) -> dict[Site, Tensor]:
    """The direction [d] at each site that is written.

    Raises:
        DataError: there is none.
    """
    method = method_of(vector)
    found = {site: method.direction(vector.params(site)) for site in vector.sites}
    kept = {site: direction for site, direction in found.items() if direction is not None}
    if len(kept) < len(found):
        raise DataError(f"{vector.method} has no single direction to add or to take out; use mode=None")
    return kept
