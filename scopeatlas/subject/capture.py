"""Capturing activations at sites in one forward pass that stops after the last of them, and editing them.

What belongs here: hooks. What does not: which sites (`sites.py`), or what becomes of the activations (`activations/`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scopeatlas.errors import SubjectModelError
from scopeatlas.subject.sites import Site, resolve, transform_constant

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel


class _AllCaptured(Exception):
    """Raised inside the forward pass once the last site has been seen."""


@dataclass
class PassCount:
    """How often the subject model was run, and over how many tokens (padding left out)."""

    passes: int = 0
    tokens: int = 0


_counts: list[PassCount] = []


@contextmanager
def counting_passes() -> Iterator[PassCount]:
    """Count the forward passes made within this context, by whichever thread; contexts may be nested."""
    count = PassCount()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts[:] = [other for other in _counts if other is not count]


def capture(model: "PreTrainedModel", tokens_bs: "torch.Tensor", sites: Iterable[Site]) -> dict[Site, "torch.Tensor"]:
    """Activations [batch, sequence, d] at each site, from one forward pass: in the model's dtype, `widened` if transformed.

    tokens_bs: int64 [batch, sequence], padded at the end with -1. The pass stops after the last site: later layers
    and the unembedding are never run. Raises SubjectModelError for a site that the model lacks or never reaches.
    """
    import torch

    wanted = set(sites)
    captured: dict[Site, torch.Tensor] = {}

    def keep(site: Site) -> Callable[["torch.Tensor"], None]:
        def record(activation: torch.Tensor) -> None:
            captured[site] = activation
            if len(captured) == len(wanted):
                raise _AllCaptured

        return record

    with ExitStack() as hooks, torch.no_grad():
        for site in wanted:
            hooks.enter_context(observing(model, site, keep(site)))
        try:
            run_model(model, tokens_bs, logits=False)
        except _AllCaptured:
            return captured
    missing = ", ".join(map(str, sorted(wanted - captured.keys())))
    raise SubjectModelError(f"the forward pass of {type(model).__name__} never reached {missing}")


def run_model(model: "PreTrainedModel", tokens_bs: "torch.Tensor", *, logits: bool) -> "torch.Tensor":
    """Run the model on end-padded tokens (-1): logits [b, s, vocabulary] in float32, or the last hidden states."""
    is_token = tokens_bs >= 0
    _count(int(is_token.sum()))
    inputs = {"input_ids": tokens_bs.clamp(min=0), "attention_mask": is_token.long(), "use_cache": False}
    if logits:
        return model(**inputs).logits.float()
    return model.base_model(**inputs).last_hidden_state


def next_token_logits(model: "PreTrainedModel", tokens_t: "torch.Tensor", *, cache: "Cache | None" = None) -> "torch.Tensor":
    """Logits [vocabulary] of what follows a sequence int64 [t] without padding, in float32 or the model's wider dtype.

    cache: the keys and values of what comes before these tokens, to which theirs are added.
    """
    _count(len(tokens_t))
    outputs = model(input_ids=tokens_t[None], past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    return widened(outputs.logits[0, -1])


def _count(tokens: int) -> None:
    for count in _counts:
        count.passes += 1
        count.tokens += tokens


def widened(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor in float32, or as it is in a wider dtype."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adding(added: "torch.Tensor", mask_bs: "torch.Tensor") -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """An edit (`editing`) that adds `added`, one [d] or [b, s, d], where `mask_bs` holds, and leaves the rest bit for bit."""
    import torch

    return lambda acts: torch.where(mask_bs.unsqueeze(-1), (widened(acts) + added).to(acts.dtype), acts)


@contextmanager
def observing(model: "PreTrainedModel", site: Site, record: Callable[["torch.Tensor"], None]) -> Iterator[None]:
    """Within this context, `record` sees what `capture` gives for `site` in every forward pass, before edits begun later."""
    transform = _transform(model, site)
    module, side = resolve(model, site)
    if side == "output":
        handle = module.register_forward_hook(lambda _m, _args, out: record(transform(_tensor_of(out).detach())))
    else:
        handle = module.register_forward_pre_hook(
            lambda _m, args, named: record(transform(_input_of(args, named).detach())), with_kwargs=True
        )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def editing(model: "PreTrainedModel", site: Site, edit: Callable[["torch.Tensor"], "torch.Tensor"]) -> Iterator[None]:
    """Within this context, `edit` replaces the activation [batch, sequence, d] at `site` in every forward pass.

    `edit` sees what `capture` gives. Raises SubjectModelError for an `rms_norm` site: the division forgets the norm.
    """
    edit_raw = _edit_of_raw(model, site, edit)
    module, side = resolve(model, site)
    if side == "output":
        handle = module.register_forward_hook(lambda _m, _args, out: _with_tensor(out, edit_raw(_tensor_of(out))))  # pyright: ignore[reportArgumentType]
    else:
        handle = module.register_forward_pre_hook(lambda _m, args, named: _with_input(args, named, edit_raw), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _edit_of_raw(
    model: "PreTrainedModel", site: Site, edit: Callable[["torch.Tensor"], "torch.Tensor"]
) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    import torch

    if site.transform == "rms_norm":
        raise SubjectModelError(f"{site} can be read but not edited: what it was divided by is lost; edit a site after it")
    if site.transform == "none":
        return edit
    transform, scale = _transform(model, site), transform_constant(model, site)

    def edit_raw(raw: "torch.Tensor") -> "torch.Tensor":
        acts = transform(raw)
        edited = edit(acts)
        scaled = edited * scale
        # What is divided and multiplied again has lost digits: where the edit changed nothing they are put back. They are added,
        # not put in its place, so that a gradient still reaches what the edit added, be it zero.
        lost = torch.where(edited == acts, raw - scaled, 0).detach()
        return (scaled + lost).to(raw.dtype)

    return edit_raw


def _transform(model: "PreTrainedModel", site: Site) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """What makes of a module's own tensor the activation at `site`."""
    constant = transform_constant(model, site)
    if site.transform == "rms_norm":

        def divide_by_root_mean_square(raw: "torch.Tensor") -> "torch.Tensor":
            x = widened(raw)
            return x * (x.square().mean(-1, keepdim=True) + constant).rsqrt()

        return divide_by_root_mean_square
    return (lambda raw: raw) if site.transform == "none" else (lambda raw: widened(raw) / constant)


def _input_of(args: "tuple[torch.Tensor, ...]", named: "dict[str, torch.Tensor]") -> "torch.Tensor":
    # Attention is called with its input by name in transformers 5; every other module with a positional one.
    return args[0] if args else named["hidden_states"]


def _with_input(args: tuple, named: dict, edit: "Callable[[torch.Tensor], torch.Tensor]") -> tuple[tuple, dict]:
    if args:
        return (edit(args[0]), *args[1:]), named
    return args, named | {"hidden_states": edit(named["hidden_states"])}


def _tensor_of(output: "torch.Tensor | tuple[torch.Tensor, ...]") -> "torch.Tensor":
    # Decoder layers return a bare tensor in transformers 5, a tuple in 4; attention returns a tuple in both.
    return output[0] if isinstance(output, tuple) else output


def _with_tensor(output: "torch.Tensor | tuple[torch.Tensor, ...]", tensor: "torch.Tensor"):
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def batches(tokens: np.ndarray, batch_size: int) -> Iterator[slice]:
    """Consecutive slices of at most `batch_size` rows: a batch depends on its shard alone."""
    for start in range(0, len(tokens), batch_size):
        yield slice(start, min(start + batch_size, len(tokens)))
