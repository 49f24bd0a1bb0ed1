"""Public functions given what they do not take: one clear line that names the argument, and nothing has changed.

A row for each public callable: a call that is good, and what kind of thing each argument takes. What is bad for a kind
is listed once, in `BAD`. A new public name without a row, or a new argument without a kind, fails.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taylor_attention as ta
import taylor_attention.lm as lm
import taylor_attention.nn as nn
from problems import differences
from taylor_attention.core import series, threads
from taylor_attention.errors import ArgumentError, StorageError
from taylor_attention.lm import checkpoint, data, evaluation, generation, session, settings, training
from taylor_attention.nn import KeyValueCache, LanguageModel, ModelConfig, SoftmaxAttention, TaylorAttention
from taylor_attention.nn import checkpoint as model_files

HUGE = 10**30
FOLDER = str(Path(__file__).parent)

# ---- what is bad for a kind of argument: made of the good one --------------------------------------------------------

Bad = Mapping[str, Callable[[Any], Any]]


def values(*listed: Any) -> Bad:
    return {repr(value)[:30]: lambda _, value=value: value for value in listed}


def numpy(x: Tensor) -> Any:
    return pytest.importorskip("numpy").array(x.tolist())


NO_TENSOR: Bad = {"numpy": numpy, "list": Tensor.tolist, **values(1.5, "x", True)}
DENSE: Bad = {
    **NO_TENSOR,
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "an axis less": lambda x: x[0],
    "an axis more": lambda x: x[None],
    "complex": lambda x: x.to(torch.complex64),
}
FLOATS: Bad = {
    **DENSE,
    "long": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}
NO_INT = values(2.5, True, "2", math.nan, 2 + 0j, [2], torch.tensor(2))
NO_NUMBER = values(math.nan, math.inf, -math.inf, "1", True, 10**400, 1j, [1.0], torch.tensor(1.0))
NO_STATE = values(3, "state", [], torch.zeros(1))

BORDERS = {**DENSE, "long": Tensor.long, "empty": lambda x: x[:0], "falling": lambda x: x.flip(0)}

BAD: dict[str, Bad] = {
    "count": {**NO_INT, **values(-1, None, HUGE)},
    "size": {**NO_INT, **values(-1, 0, None, HUGE)},
    "size or None": {**NO_INT, **values(-1, 0, HUGE)},
    "int": NO_INT,
    "chunk": {**NO_INT, **values(-1, 0)},  # a huge one is one chunk
    "degree": {**NO_INT, **values(-1, HUGE)},
    "number": {**NO_NUMBER, **values(None)},
    "number or None": NO_NUMBER,
    "number >= 0": {**NO_NUMBER, **values(None, -1)},
    "number > 0": {**NO_NUMBER, **values(None, -1, 0)},
    "number > 0 or None": {**NO_NUMBER, **values(-1, 0)},
    "flag": values(0, 1, None, "yes", torch.tensor(True)),
    "choice": values("", "none", None, 3, b"auto", [], "\udc80", "a\nb"),
    "choice or None": values("", "nothing", 3, b"head", [], "\udc80", "a\nb"),
    "text": values(None, 3, b"x"),
    "bytes": values("text", 3, None, [], torch.zeros(3)),
    "dtype": values(torch.int64, torch.complex64, "float99", 3, float),
    "float or double": values(torch.int64, torch.bfloat16, torch.complex64, "float99", 3, float),
    "device": values("nowhere", "cuda:99", 3.5, [], "\0"),
    "series": values("exp", 3, (1.0, 0.5), [], None),
    "series or None": values("exp", 3, (1.0, 0.5), []),
    "terms": values("exp", 3, [1.0], (), ("1",), (math.nan,), (10**400,), (True,), None),
    "coefficients": values("exp", 3, [], ["1"], [math.nan], [10**400], [True], None),
    "function or None": values("f", 3, []),
    "state": {**NO_STATE, **values(None)},
    "state or None": NO_STATE,
    "states": values(3, "states", [], [None], [3], torch.zeros(1), None),
    "states or None": values(3, "states", [], [None], [3], torch.zeros(1)),
    "config": values(None, 3, {}, "taylor"),
    "mapping": values(None, 3, "x", [1], {"none": 1}, {1: 2, "none": 3}),
    "model": values(None, 3, "taylor", torch.nn.Linear(1, 1)),
    "generator or None": values(3, "seed", torch.default_generator.get_state()),
    "floats": {**FLOATS, **values(None), "meta": lambda x: x.to("meta")},
    "floats or None": {**FLOATS, "meta": lambda x: x.to("meta")},
    "mask or None": {**DENSE, "float": Tensor.float, "meta": lambda x: x.to("meta"), "longer": lambda x: x[:, [0] * 9]},
    "borders": {what: lambda _, bad=bad: bad(torch.tensor([0, 3], dtype=torch.int32)) for what, bad in BORDERS.items()},
    "indices": {
        **DENSE,
        **values(None),
        "int32": Tensor.int,
        "float": Tensor.float,
        "mask": lambda x: x == 0,
        "meta": lambda x: x.to("meta"),
        "beyond": lambda x: x + 9,
        "negative": lambda x: -1 - x,
    },
    "tokens": {**DENSE, **values(None), "float": Tensor.float, "bool": Tensor.bool, "meta": lambda x: x.to("meta"),
               "beyond": lambda x: x + 256, "negative": lambda x: -1 - x},
    "text bytes": {**DENSE, **values(None), "long": Tensor.long, "none": lambda x: x[:0],
                   "meta": lambda x: x.to("meta")},
    "text or bytes": {**DENSE, **values(None, b"", "text"), "long": Tensor.long, "none": lambda x: x[:0]},
    "logits": {**DENSE, **values(None), "long": Tensor.long, "meta": lambda x: x.to("meta"), "none": lambda x: x[:, :0],
               "nan": lambda x: x * math.nan},
    "rotation or None": values(3, "x", [], (torch.zeros(1), torch.zeros(1)), torch.zeros(1)),
    "sources": values(None, 3, [], [3], "", b"stdlib", "\0", "none" * 2000, FOLDER + "/none", "\udc80"),
    "path to read": values(None, 3, "", "\0", "none" * 2000, FOLDER, FOLDER + "/none", "\udc80"),
    "path to write": values(None, 3, "", "\0", "none" * 2000, FOLDER, FOLDER + "/none/none"),
    "names": values(None, 3, [], "stdlib", (3,), ()),
    "folder": values(None, 3, "", "\0", b"x"),
    "fraction": {**NO_NUMBER, **values(None, -0.1, 0, 1, 1.1)},
    "share": {**NO_NUMBER, **values(None, -0.1, 1.1)},
    "width or 0": {**NO_INT, **values(-1, 1, None, HUGE)},
    "share or None": {**NO_NUMBER, **values(0, -0.1, 1.1)},
}  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A public callable.

    Attributes:
        good: makes the arguments of a good call. kinds: of each argument, in `BAD`.
        says: another name that the error may give, for an argument that shows in another. call: how it is called.
    """

    target: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    kinds: dict[str, str]
    says: dict[str, str] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    beside: dict[str, Callable[[], dict[str, Any]]] = field(default_factory=dict)  # good ones that an argument needs

    def run(self, given: dict[str, Any]) -> Any:
        return (self.call or self.target)(**given)


def method(name: str) -> Callable[..., Any]:
    """Call it on the argument `self`."""
    return lambda self, **arguments: getattr(self, name)(**arguments)


def x4(tokens: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 2 * 2 * tokens * 4).view(2, 2, tokens, 4)


def state_of(tokens: int = 3, **options: Any) -> ta.State:
    return ta.attention(x4(tokens), x4(tokens), x4(tokens), degree=2, return_state=True, **options)[1]


def attended(tokens: int) -> dict[str, Any]:
    return {
        "query": x4(tokens),
        "key": x4(tokens),
        "value": x4(tokens),
        "key_padding_mask": torch.ones(2, tokens, dtype=torch.bool),
        "log_decay": torch.zeros(2, 2, tokens),
        "far_gain": torch.zeros(2),
        "state": state_of(window=2, sinks=1),
    }


def far(tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """A far part of its own, which only tests of its arguments have: compiled steps do without."""

    def given() -> dict[str, Any]:
        state = state_of(window=2, sinks=1, far_query=x4(), far_key=x4())
        return {"far_query": x4(tokens), "far_key": x4(tokens), "state": state}

    return {"far_query": given, "far_key": given}


TENSORS = {"query": "floats", "key": "floats", "value": "floats"}
ALONG = {
    "key_padding_mask": "mask or None",
    "log_decay": "floats or None",
    "far_gain": "floats or None",
    "far_query": "floats or None",
    "far_key": "floats or None",
}
READ = {"scale": "number or None", "series": "series or None", "reading": "choice", "backend": "choice"}
NEAR = {"window": "count", "sinks": "count", "heavy": "count"}
COST = {"head_dim": "size", "degree": "degree", "value_dim": "size or None", **NEAR}
PLACE = {"device": "device", "dtype": "float or double"}
LAYER = {
    "d_model": "size",
    "num_heads": "size",
    "num_kv_heads": "size or None",
    "head_dim": "size or None",
    "value_dim": "size or None",
}
TAYLOR = {
    "degree": "degree",
    **NEAR,
    "reading": "choice",
    "center_keys": "flag",
    "far_gain": "flag",
    "far_dim": "size or None",
}
OTHERS = {"conv": "width or 0", "qk_norm": "flag", "rope": "flag", "rope_base": "number > 0", "decay": "choice or None"}
SAMPLING = {"temperature": "number >= 0", "top_k": "size or None", "top_p": "share or None"}
STEPS = {"x": "floats", "state": "state or None", "return_state": "flag", "key_padding_mask": "mask or None"}

CONFIG = ModelConfig(d_model=8, num_layers=1, num_heads=2)
LAYERS = {"TaylorAttention": TaylorAttention, "SoftmaxAttention": SoftmaxAttention}


@lru_cache(maxsize=1)
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG)


def layer(kind: type) -> Any:
    torch.manual_seed(0)
    return kind(8, 2)


def cache() -> KeyValueCache:
    found = KeyValueCache.zeros(2, 2, 4, 4, decay=True)
    found.append_(x4(), x4(), torch.zeros(2, 2, 3), None)
    return found


APPENDED = {"key": "floats", "value": "floats", "log_decay": "floats or None", "key_padding_mask": "mask or None"}


def appended() -> dict[str, Any]:
    mask = torch.ones(2, 3, dtype=torch.bool)
    return {"self": cache(), "key": x4(), "value": x4(), "log_decay": torch.zeros(2, 2, 3), "key_padding_mask": mask}


def mixed(kind: type, stepping: bool) -> dict[str, Any]:
    found, x = layer(kind), torch.linspace(-1, 1, 48).view(2, 3, 8)
    mask = torch.ones(2, 3, dtype=torch.bool)
    state = found.new_state(2) if stepping else None
    return {"self": found, "x": x, "state": state, "key_padding_mask": mask}


def text() -> Tensor:
    return torch.arange(40, dtype=torch.uint8)


def tokens() -> Tensor:
    return torch.arange(6).view(2, 3)


def read_states() -> list[Any]:
    states = model().new_states(2)
    model().decode_(tokens(), states)
    return states


def of(kinds: dict[str, str], **others: str) -> dict[str, str]:
    return kinds | others


def rows() -> Iterator[tuple[str, Row]]:
    yield (
        "attention",
        Row(
            ta.attention,
            lambda: attended(3) | {"degree": 2, "window": 2, "sinks": 1},
            of(
                TENSORS | ALONG | READ | NEAR,
                degree="degree",
                causal="flag",
                cu_seqlens="borders",
                state="state or None",
                return_state="flag",
                chunk_size="chunk",
                max_state_bytes="count",
            ),
            says={"query": "key", "key": "query", "value": "query", "far_key": "far_query"},
            beside=far(3),
        ),
    )
    yield (
        "decode_",
        Row(
            ta.decode_,
            lambda: attended(1),
            of(TENSORS | ALONG | READ, state="state"),
            {"query": "key", "key": "query", "far_key": "far_query"},
            beside=far(1),
        ),
    )
    yield "watch_normalisers", Row(ta.watch_normalisers, dict, {"keep_masks": "flag"}, call=enter(ta.watch_normalisers))
    sizes = {"head_dim": 4, "degree": 2}
    yield "state_size", Row(ta.state_size, lambda: sizes, of(COST, kv_heads="size"))
    yield "flops_per_token", Row(ta.flops_per_token, lambda: sizes, of(COST, heads="size", kv_heads="size or None"))
    yield (
        "break_even_context",
        Row(
            ta.break_even_context,
            lambda: sizes,
            of(COST, heads="size", kv_heads="size or None", by="choice", dtype="dtype", cache_dtype="dtype"),
            says={"cache_dtype": "dtype"},
        ),
    )
    yield from series_rows()
    yield from state_rows()
    yield from layer_rows()
    yield from model_rows()
    yield from text_rows()
    yield from training_rows()


def enter(manager: Callable[..., Any]) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    return call


def series_rows() -> Iterator[tuple[str, Row]]:
    radius, degree = {"radius": "number >= 0"}, {"degree": "degree"}
    yield "error_bound", Row(ta.error_bound, lambda: {"radius": 1, "degree": 2}, of(radius | degree, series="series"))
    yield (
        "degree_for",
        Row(
            ta.degree_for,
            lambda: {"radius": 1.0, "tolerance": 1e-3},
            of(radius, tolerance="number > 0", series="series"),
        ),
    )
    yield (
        "expected_error",
        Row(
            ta.expected_error,
            lambda: {"std": 1.0, "degree": 2},
            of(degree, std="number >= 0", mean="number", series="series", fitted="flag"),
        ),
    )
    yield (
        "error_against_exp",
        Row(
            series.error_against_exp,
            lambda: {"series": series.EXP, "radius": 1.0, "degree": 2},
            of(radius | degree, series="series"),
        ),
    )
    yield (
        "fitted_gaussian",
        Row(
            series.fitted_gaussian,
            lambda: {"mean": 0.0, "std": 1.0, "degree": 2},
            of(degree, mean="number", std="number >= 0"),
        ),
    )
    yield (
        "fitted_chebyshev",
        Row(
            series.fitted_chebyshev,
            lambda: {"low": -1.0, "high": 1.0, "degree": 2},
            of(degree, low="number", high="number"),
            says={"low": "low, high", "high": "low, high"},
        ),
    )
    yield (
        "polynomial",
        Row(
            series.polynomial,
            lambda: {"coefficients": [1, 0.5]},
            {"coefficients": "coefficients", "name": "text", "bound": "function or None"},
        ),
    )
    yield (
        "Series",
        Row(
            ta.Series,
            lambda: {"name": "mine", "terms": (1.0, 0.5)},
            {"name": "text", "terms": "terms", "bound": "function or None", "lowest_degree": "count"},
        ),
    )
    for name in ("coefficients", "is_positive", "negative_intervals"):
        row = Row(getattr(ta.Series, name), lambda: {"self": series.EXP, "degree": 2}, degree, call=method(name))
        yield f"Series.{name}", row


def state_rows() -> Iterator[tuple[str, Row]]:
    yield (
        "State.zeros",
        Row(
            ta.State.zeros,
            lambda: {"batch_size": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4, "degree": 2},
            of(
                NEAR | PLACE,
                batch_size="count",
                kv_heads="size",
                head_dim="size",
                value_dim="size",
                degree="degree",
                far_dim="size or None",
                scale="number or None",
                max_state_bytes="count",
            ),
        ),
    )
    own = {
        "merge": ({"later": state_of}, {"later": "state"}),
        "select": ({"indices": lambda: torch.tensor([1, 0])}, {"indices": "indices"}),
        "to": ({}, PLACE),
        "save": ({"path": lambda: "/dev/null/none"}, {"path": "path to write"}),
    }
    for name, (given, kinds) in own.items():
        row = Row(getattr(ta.State, name), with_self(state_of, given), kinds, call=method(name))
        yield f"State.{name}", row
    yield (
        "State.load",
        Row(ta.State.load, lambda: {"path": "/dev/null/none"}, {"path": "path to read", "device": "device"}),
    )
    yield (
        "KeyValueCache.zeros",
        Row(
            KeyValueCache.zeros,
            lambda: {"batch_size": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4},
            {"batch_size": "count", "kv_heads": "size", "head_dim": "size", "value_dim": "size", "decay": "flag"}
            | {"dtype": "dtype", "device": "device"},
        ),
    )
    for name in ("append_", "extended"):
        yield f"KeyValueCache.{name}", Row(getattr(KeyValueCache, name), appended, APPENDED, call=method(name))
    select = with_self(cache, {"indices": lambda: torch.tensor([1, 0])})
    yield "KeyValueCache.select", Row(KeyValueCache.select, select, {"indices": "indices"}, call=method("select"))
    moved = of({}, device="device", dtype="dtype")
    yield "KeyValueCache.to", Row(KeyValueCache.to, with_self(cache, {}), moved, call=method("to"))


def with_self(make: Callable[[], Any], given: dict[str, Callable[[], Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {"self": make()} | {name: value() for name, value in given.items()}


def layer_rows() -> Iterator[tuple[str, Row]]:
    sizes = {"d_model": 8, "num_heads": 2}
    options = of(LAYER | OTHERS, bias="flag", causal="flag", scale="number > 0 or None")
    yield "SoftmaxAttention", Row(SoftmaxAttention, lambda: sizes, options)
    yield "TaylorAttention", Row(TaylorAttention, lambda: sizes | {"window": 2}, LAYER | TAYLOR)
    for name, kind in LAYERS.items():
        made = of(
            {}, batch_size="count", device="device", dtype="float or double" if kind is TaylorAttention else "dtype"
        )
        new = Row(
            kind.new_state, lambda kind=kind: {"self": layer(kind), "batch_size": 2}, made, call=method("new_state")
        )
        yield f"{name}.new_state", new
        turned = of({"x": "floats", "state": "state or None"}, key_padding_mask="mask or None")
        good = {
            way: lambda kind=kind, way=way: mixed(kind, way == "decode_") for way in ("forward", "decode_", "rotation")
        }
        yield f"{name}.rotation", Row(kind.rotation, good["rotation"], turned, call=method("rotation"))
        whole = of(STEPS, rotation="rotation or None")
        yield f"{name}.forward", Row(kind.forward, good["forward"], whole, call=method("forward"))
        step = of(turned, state="state", rotation="rotation or None")
        yield f"{name}.decode_", Row(kind.decode_, good["decode_"], step, call=method("decode_"))
        there = {
            "self": lambda kind=kind: layer(kind),
            "state": lambda kind=kind: layer(kind).new_state(2),
            "sequences": lambda: 2,
        }
        good_state = lambda there=there: {key: make() for key, make in there.items()}  # noqa: E731
        checked = Row(kind.check_state, good_state, {"state": "state"}, call=method("check_state"))
        yield f"{name}.check_state", checked


def block() -> Any:
    return model().blocks[0]


def model_rows() -> Iterator[tuple[str, Row]]:
    fields = {
        "vocab_size": "size",
        "num_layers": "size",
        "far_layers": "size or None",
        "attention": "choice",
        "mlp_ratio": "number > 0",
    }
    yield "ModelConfig", Row(ModelConfig, lambda: {"window": 2}, LAYER | TAYLOR | OTHERS | fields)
    yield (
        "ModelConfig.from_dict",
        Row(ModelConfig.from_dict, lambda: {"values": {}}, {"values": "mapping"}, {"values": "model configuration"}),
    )
    yield "LanguageModel", Row(LanguageModel, lambda: {"config": CONFIG}, {"config": "config"})
    x = torch.linspace(-1, 1, 48).view(2, 3, 8)
    into = {"x": "floats", "state": "state or None", "return_state": "flag"}
    yield "Block.forward", Row(nn.Block.forward, lambda: {"self": block(), "x": x}, into, call=method("forward"))
    config = lambda: {"config": dataclasses.replace(CONFIG, num_layers=2), "layer": 1}  # noqa: E731
    yield "Block", Row(nn.Block, config, {"config": "config", "layer": "count"})
    own = lambda: {"self": CONFIG, "layer": 0}  # noqa: E731
    build = Row(ModelConfig.build_attention, own, {"layer": "count"}, call=method("build_attention"))
    yield "ModelConfig.build_attention", build
    stepped = with_self(block, {"x": lambda: x, "state": lambda: model().new_states(2)[0]})
    step = {"x": "floats", "state": "state"}
    yield "Block.decode_", Row(nn.Block.decode_, stepped, step, call=method("decode_"))
    good = lambda: {"self": model(), "tokens": tokens(), "states": read_states(), "key_padding_mask": tokens() >= 0}  # noqa: E731
    kinds = {
        "tokens": "tokens",
        "states": "states or None",
        "key_padding_mask": "mask or None",
        "return_states": "flag",
    }
    says = {"states": "state"}
    yield "LanguageModel.forward", Row(LanguageModel.forward, good, kinds, says, method("forward"))
    step = of({}, tokens="tokens", states="states", key_padding_mask="mask or None")
    yield "LanguageModel.decode_", Row(LanguageModel.decode_, good, step, says, method("decode_"))
    made = of({}, batch_size="count", device="device", dtype="float or double")
    new = lambda: {"self": model(), "batch_size": 2}  # noqa: E731
    yield "LanguageModel.new_states", Row(LanguageModel.new_states, new, made, call=method("new_states"))


def text_rows() -> Iterator[tuple[str, Row]]:
    source = {"sources": __file__}
    says = {"sources": "data"}
    for function in (data.load_text, data.load_documents):
        yield function.__name__, Row(function, lambda: source, {"sources": "sources"}, says)
    yield (
        "load_split",
        Row(data.load_split, lambda: source, of({}, sources="sources", validation_fraction="fraction"), says),
    )
    yield "to_tensor", Row(data.to_tensor, lambda: {"text": b"x"}, {"text": "bytes"})
    yield (
        "sample_batch",
        Row(
            data.sample_batch,
            lambda: {"data": text(), "batch_size": 2, "length": 4, "seed": 0, "step": 1},
            {"data": "text bytes", "batch_size": "count", "length": "size", "seed": "int", "step": "int"},
        ),
    )
    yield (
        "evaluate",
        Row(
            evaluation.evaluate,
            lambda: {"model": model(), "data": text()},
            of(
                {},
                model="model",
                data="text or bytes",
                sequence_length="size",
                windows="size or None",
                batch_size="size",
            ),
            says={"data": "text"},
        ),
    )
    yield (
        "next_byte_loss",
        Row(
            evaluation.next_byte_loss,
            lambda: {"model": model(), "inputs": tokens(), "targets": tokens(), "reduction": "mean"},
            {"model": "model", "inputs": "tokens", "targets": "tokens", "reduction": "choice"},
            says={"inputs": "tokens|targets"},
        ),
    )
    yield "check_sampling", Row(generation.check_sampling, dict, SAMPLING)
    drawn = lambda: {"logits": torch.linspace(0, 1, 8).view(2, 4)}  # noqa: E731
    yield "distribution", Row(generation.distribution, drawn, of(SAMPLING, logits="logits"))
    kinds = of(SAMPLING, logits="logits", generator="generator or None")
    yield "sample", Row(generation.sample, drawn, kinds)
    given = lambda: {"model": model(), "states": read_states()}  # noqa: E731
    says = {"states": "state"}
    yield (
        "prefill",
        Row(
            generation.prefill,
            lambda: given() | {"tokens": tokens()},
            {"model": "model", "states": "states", "tokens": "tokens", "block": "size"},
            says,
        ),
    )
    going = lambda: given() | {"logits": torch.zeros(2, 256)}  # noqa: E731
    kinds = {"model": "model", "states": "states", "logits": "logits", "generator": "generator or None"}
    yield "advance", Row(generation.advance, going, kinds, says)
    first = lambda **given: next(generation.stream(**given))  # noqa: E731
    yield "stream", Row(generation.stream, going, of(kinds, tokens="count or None"), says, first)
    yield "Session", Row(session.Session, lambda: {"model": model()}, {"model": "model", "seed": "seed"})
    talk = lambda: {"self": opened()}  # noqa: E731
    reading = lambda: talk() | {"text": b"x"}  # noqa: E731
    yield "Session.read", Row(session.Session.read, reading, {"text": "bytes", "block": "size"}, call=method("read"))
    drawing = lambda self, **given: next(self.stream(**given))  # noqa: E731
    yield "Session.stream", Row(session.Session.stream, talk, {"tokens": "count or None"}, call=drawing)
    yield "Session.save", Row(session.Session.save, talk, {"path": "path to write"}, call=method("save"))
    yield (
        "Session.load",
        Row(
            session.Session.load,
            lambda: {"model": model(), "path": "/dev/null/none"},
            {"path": "path to read", "model": "model"},
        ),
    )


BAD["seed"] = {**NO_INT, **values(None, HUGE, -HUGE)}
BAD["count or None"] = {**NO_INT, **values(-1, HUGE)}


def opened() -> session.Session:
    found = session.Session(model())
    found.read(b"x")
    return found


def training_rows() -> Iterator[tuple[str, Row]]:
    sizes = ("steps", "batch_size", "sequence_length", "eval_interval", "eval_windows", "checkpoint_interval")
    yield (
        "TrainingConfig",
        Row(
            settings.TrainingConfig,
            dict,
            of(
                dict.fromkeys(sizes, "size"),
                data="names",
                out="folder",
                model="config",
                learning_rate="number > 0",
                final_learning_rate_fraction="share",
                warmup_steps="count",
                weight_decay="number >= 0",
                gradient_clip="number > 0",
                seed="count",
                validation_fraction="fraction",
                threads="size or None",
            ),
        ),
    )
    yield (
        "TrainingConfig.from_dict",
        Row(
            settings.TrainingConfig.from_dict,
            lambda: {"values": {}},
            {"values": "mapping"},
            {"values": "training configuration"},
        ),
    )
    config = settings.TrainingConfig(out="/dev/null/none")
    rate = {"config": "config", "step": "size"}
    yield "learning_rate", Row(settings.learning_rate, lambda: {"config": config, "step": 1}, rate)
    kinds = {"config": "config", "resume": "flag", "progress": "function or None"}
    yield "train", Row(training.train, lambda: {"config": config}, kinds)
    yield "saved_config", Row(training.saved_config, dict, {"out": "path to read"}, {"out": "resume"})
    yield (
        "thread_count",
        Row(
            threads.thread_count,
            lambda: {"count": 1},
            {"count": "size or None"},
            {"count": "threads"},
            enter(threads.thread_count),
        ),
    )
    write = {"path": "/dev/null/none", "model": model(), "metadata": {}}
    yield (
        "save_checkpoint",
        Row(checkpoint.save_checkpoint, lambda: write, {"path": "path to write", "model": "model", "dtype": "dtype"}),
    )
    yield (
        "load_checkpoint",
        Row(
            checkpoint.load_checkpoint, lambda: {"path": "/dev/null/none"}, {"path": "path to read", "device": "device"}
        ),
    )
    yield "shipped", Row(checkpoint.shipped, lambda: {"name": "taylor"}, {"name": "choice"})
    yield "fingerprint", Row(checkpoint.fingerprint, lambda: {"model": model()}, {"model": "model"})


ROWS = dict(rows())

UNUSABLE = {
    "State.save",
    "State.load",
    "Session.save",
    "Session.load",
    "train",
    "saved_config",
    "save_checkpoint",
    "load_checkpoint",
}
"""What a good call of which needs files: tests of theirs are elsewhere."""

ELSEWHERE = {
    "State": "put together by hand: test_a_state_whose_parts_do_not_fit_is_refused",
    "KeyValueCache": "made by zeros",
    "Document": "a record that is given out",
    "Evaluation": "a record that is given out",
    "TrainingDivergedError": "an error",
    "Log": "inside of train",
    "Progress": "a record that is given out",
    "write_position": "inside of train",
    "read_metadata": "inside of train",
    "read_position": "inside of train",
    "check_weights": "inside of load_checkpoint",
    "expect_bytes": "a check",
    "State.append_": "inside of decode_",
    "State.assign_": "inside of decode_",
    "State.from_sums": "inside of attention",
    "State.from_tensors": "loader: test_loader_fuzz.py",
    "KeyValueCache.from_tensors": "loader: test_loader_fuzz.py",
    "LanguageModel.states_from_tensors": "loader: test_loader_fuzz.py",
    "Log.append": "inside of train",
    "SoftmaxAttention.check_input": "a check",
    "TaylorAttention.check_input": "a check",
}
"""Public names without a row, and why."""


# ---- the table is whole ----------------------------------------------------------------------------------------------


def functions_of(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """A public function, or a class with its own public methods."""
    yield name, thing
    if inspect.isclass(thing) and not issubclass(thing, Exception):
        for own, found in inspect.getmembers(thing, inspect.isroutine):
            if not own.startswith("_") and str(getattr(found, "__module__", "")).startswith("taylor_attention"):
                yield f"{name}.{own}", found


def public() -> dict[str, Any]:
    """Every public callable: of the package and `nn` what they export, of `lm` and model files what they define."""
    found = {name: getattr(ta, name) for name in ta.__all__ if name != "series"}
    found |= {name: getattr(nn, name) for name in nn.__all__}
    modules = [
        series,
        threads,
        model_files,
        *(importlib.import_module(f"{lm.__name__}.{each.name}") for each in pkgutil.iter_modules(lm.__path__)),
    ]
    for module in modules:
        own = {
            name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__
        }
        found |= {name: thing for name, thing in own.items() if not name.startswith("_") and callable(thing)}
    return dict(pair for name, thing in found.items() for pair in functions_of(name, thing))


def arguments_of(target: Any) -> set[str]:
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {each.name for each in inspect.signature(target).parameters.values() if each.kind not in free} - {"self"}


PUBLIC = public()


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - ELSEWHERE.keys()))
def test_every_argument_of_every_public_name_is_in_the_table(name: str):
    known = {*ROWS[name].kinds, *ROWS[name].good()} - {"self"} if name in ROWS else set()
    assert known >= arguments_of(PUBLIC[name])


def test_the_table_has_no_row_too_many():
    assert (ROWS.keys() | ELSEWHERE.keys()) - PUBLIC.keys() == set()


# ---- good calls and bad ones -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ROWS.keys() - UNUSABLE))
def test_good_calls_are_good(name: str):
    ROWS[name].run(ROWS[name].good())


def same(x: Any, y: Any) -> bool:
    """Whether nothing has changed, to the last bit."""
    if isinstance(x, ta.State):
        return differences(x, y) == []
    if isinstance(x, Tensor):
        return torch.equal(x, y)
    if isinstance(x, KeyValueCache):
        return x.metadata() == y.metadata() and same(x.tensors(), y.tensors())
    if isinstance(x, session.Session):
        return same(x.states, y.states) and same(x.logits, y.logits)
    if isinstance(x, Mapping):
        return x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    return isinstance(x, torch.nn.Module) or x == y


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x if isinstance(x, torch.nn.Module) else copy.deepcopy(x) for name, x in given.items()}


CASES = [(name, argument) for name, row in ROWS.items() for argument in row.kinds]


def outcome(row: Row, argument: str, bad: Callable[[Any], Any]) -> str:
    """What is wrong with how a bad argument is refused, if anything is."""
    given = row.good() | row.beside.get(argument, dict)()
    wrong = bad(given.get(argument))
    before = copied(given)
    try:
        row.run(given | {argument: wrong})
    except ArgumentError as error:
        names = "|".join(filter(None, (argument, row.says.get(argument))))
        good = re.fullmatch(rf"({names}): expected .{{1,500}}, got .{{1,250}}", str(error))
        said = "" if good else str(error)
    except StorageError as error:
        said = "" if re.fullmatch(r".+: .+", str(error)) else str(error)
    except Exception as error:  # noqa: BLE001  # what the test is to show
        said = f"{type(error).__name__}: {error}"
    else:
        said = "was taken"
    return said if same(given, before) else f"{said}; something changed"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize(("name", "argument"), CASES, ids=[f"{name}, {argument}" for name, argument in CASES])
def test_bad_arguments_are_named_in_one_line_and_nothing_changes(name: str, argument: str):
    row = ROWS[name]
    found = {what: outcome(row, argument, bad) for what, bad in BAD[row.kinds[argument]].items()}
    assert {what: said for what, said in found.items() if said} == {}


# ---- states put together by hand -------------------------------------------------------------------------------------

BY_HAND: dict[str, dict[str, Callable[[ta.State], Any]]] = {
    "sums": {
        "shorter": lambda state: state.sums[..., 1:],
        "three axes": lambda state: state.sums[0],
        "sparse": lambda state: state.sums.to_sparse(),
        "numpy": lambda state: numpy(state.sums),
        "half": lambda state: state.sums.half(),
    },
    "compensation": {"that of sums": lambda state: state.sums, "wide": lambda state: state.compensation.double()},
    "tokens": {"float": lambda state: state.tokens.float(), "meta": lambda state: state.tokens.to("meta")},
    "log_decay": {"single": lambda state: state.log_decay.float(), "none": lambda state: None},
    "tail_key": {
        "wider": lambda state: state.tail_key.repeat(1, 1, 1, 2),
        "list": lambda state: state.tail_key.tolist(),
    },
    "tail_length": {"too many": lambda state: 99, "bool": lambda state: True, "negative": lambda state: -1},
    "degree": {"another": lambda state: 3, "huge": lambda state: HUGE, "float": lambda state: 2.0},
    "scale": {"nan": lambda state: math.nan, "text": lambda state: "1"},
    "near": {"of another batch": lambda state: state.select(torch.tensor([0])).near, "text": lambda state: "near"},
}
PARTS = [(name, what) for name, found in BY_HAND.items() for what in found]


@pytest.mark.parametrize(("name", "what"), PARTS)
@pytest.mark.parametrize("way", ["attention", "decode_"])
def test_a_state_whose_parts_do_not_fit_is_refused(way: str, name: str, what: str):
    state = state_of(window=2, sinks=1)
    state = dataclasses.replace(state, **{name: BY_HAND[name][what](state)})
    given = {"query": x4(1), "key": x4(1), "value": x4(1), "state": state}
    options = {"degree": 2, "window": 2, "sinks": 1} if way == "attention" else {}
    with pytest.raises(ArgumentError, match="^[a-z_]+: expected .+, got .+"):
        getattr(ta, way)(**given, **options)
