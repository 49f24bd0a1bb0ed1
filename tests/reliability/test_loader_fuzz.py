"""Files that are not what they should be: whatever their bytes, one clear line, and no memory for what they claim."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from taylor_attention.core import storage
from taylor_attention.core.state import State
from taylor_attention.core.storage import read_tensors, write_tensors
from taylor_attention.errors import StorageError
from taylor_attention.lm.checkpoint import load_checkpoint, save_checkpoint
from taylor_attention.lm.resume import read_position, write_position
from taylor_attention.lm.session import Session
from taylor_attention.nn import LanguageModel, ModelConfig
from taylor_attention.ops.attention import attention

LITTLE = 2**28  # bytes: far more than any loader here needs, far less than what the files below lie about


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Refuse this process more memory than a little, so that a loader which believes a lie fails by `MemoryError`."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, FileNotFoundError):  # not Linux: the tests then say less
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LITTLE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ---- whole files of every kind, and how each is read -----------------------------------------------------------------


def plain(tensors: dict[str, Tensor]) -> dict[str, object]:
    return {name: (x.dtype, x.shape, x.contiguous().view(-1).view(torch.uint8).tolist()) for name, x in tensors.items()}


def some_state(**reach: int) -> State:
    query, key, value = torch.randn(3, 2, 1, 40, 4).unbind(0)
    options: dict[str, Any] = {"degree": 2, "log_decay": -torch.rand(2, 1, 40), **reach}
    _, state = attention(query, key, value, return_state=True, **options)
    state.append_(key[:, :, 0], torch.ones(2, 1, 5), None, None)
    return state


def a_model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(d_model=4, num_layers=2, num_heads=1, **options)).eval()


MODELS = {"taylor": {"window": 4, "sinks": 1, "heavy": 2}, "softmax": {"attention": "softmax"}}


def write_state(path: Path) -> None:
    some_state().save(path)


def write_near_state(path: Path) -> None:
    some_state(window=4, sinks=1, heavy=2).save(path)


def read_state(path: Path) -> object:
    state = State.load(path)
    return plain(state.tensors()), state.metadata()


def write_session(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        session = Session(a_model(**MODELS[name]))
        session.read(b"Bytes and more bytes.")
        session.save(path)

    return write


def read_session(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        session = Session.load(path, a_model(**MODELS[name]))
        assert session.logits is not None
        rest = {"logits": session.logits, "generator": session.generator.get_state()}
        layers = [(plain(state.tensors()), state.metadata()) for state in session.states]
        return layers, plain(rest), session.seed, session.unshown

    return read


def read_model(path: Path) -> object:
    model, metadata = load_checkpoint(path)
    return plain(dict(model.state_dict())), model.config, metadata


def trained() -> tuple[LanguageModel, torch.optim.AdamW]:
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    return model, optimizer


def write_training(path: Path) -> None:
    write_position(path, *trained(), {"step": "1"})


def read_training(path: Path) -> object:
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    read_position(path, model, optimizer)
    kept = {f"{i} {key}": x for i, each in enumerate(optimizer.state.values()) for key, x in each.items()}
    return plain(dict(model.state_dict())), plain(kept)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "state": (write_state, read_state),
    "state with near tokens": (write_near_state, read_state),
    "session": (write_session("taylor"), read_session("taylor")),
    "session of softmax": (write_session("softmax"), read_session("softmax")),
    "model": (lambda path: save_checkpoint(path, a_model()), read_model),
    "training": (write_training, read_training),
}


class Sample:
    """A whole file of a kind, in its own folder, to be damaged and read again."""

    def __init__(self, kind: str, folder: Path) -> None:
        write, self.read = KINDS[kind]
        self.path = folder / "file"
        write(self.path)
        self.blob, self.content = self.path.read_bytes(), self.read(self.path)

    def refuses(self, blob: bytes) -> bool:
        """Whether a file of these bytes is refused, in one line that names it; if not, it must hold the same."""
        self.path.write_bytes(blob)
        try:
            found = self.read(self.path)
        except StorageError as error:
            assert str(error).startswith(f"{self.path}: ") and "\n" not in str(error)
            return True
        assert found == self.content
        return False


@pytest.fixture(scope="module", params=KINDS)
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    torch.manual_seed(0)
    return Sample(request.param, tmp_path_factory.mktemp("sample"))


def header_of(blob: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", blob[:8])[0]
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def assemble(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


EXAMPLES = pytest.mark.parametrize("examples", [20, pytest.param(2000, marks=pytest.mark.slow)])

# ---- damage ----------------------------------------------------------------------------------------------------------


def test_cut_anywhere_it_is_refused(sample: Sample):
    header, data = header_of(sample.blob)
    start = len(sample.blob) - len(data)
    ends = [start + end for name, entry in header.items() if name != "__metadata__" for end in entry["data_offsets"]]
    near = {end + step for end in (0, 8, start, len(sample.blob), *ends[:8], *ends[-8:]) for step in (-1, 0, 1)}
    cuts = sorted(cut for cut in near | set(range(16)) if 0 <= cut < len(sample.blob))
    assert [cut for cut in cuts if not sample.refuses(sample.blob[:cut])] == []
    assert sample.refuses(sample.blob + b"\0")
    assert not sample.refuses(sample.blob)


@EXAMPLES
def test_one_bit_flipped_anywhere_it_is_refused(sample: Sample, examples: int):
    @settings(max_examples=examples)
    @given(bit=st.integers(0, 8 * len(sample.blob) - 1))
    def check(bit: int) -> None:
        blob = bytearray(sample.blob)
        blob[bit // 8] ^= 1 << bit % 8
        assert sample.refuses(bytes(blob))

    check()


def change(blob: bytes, data: st.DataObject) -> bytes:
    """One thing done to some bytes: other ones in their place, more, fewer, or the same twice."""
    start = data.draw(st.integers(0, len(blob)) | st.integers(0, min(len(blob), 400)))
    end = data.draw(st.integers(start, min(len(blob), start + 64)))
    other = data.draw(st.sampled_from([b"", blob[start:end] * 2, b"\0" * (end - start)]) | st.binary(max_size=64))
    return blob[:start] + other + blob[end:]


@EXAMPLES
def test_whatever_is_done_to_its_bytes_it_is_refused_or_the_same(sample: Sample, examples: int):
    @settings(max_examples=examples)
    @given(data=st.data(), times=st.integers(1, 4))
    def check(data: st.DataObject, times: int) -> None:
        blob = sample.blob
        for _ in range(times):
            blob = change(blob, data)
        sample.refuses(blob)

    check()


@settings(max_examples=20)
@given(blob=st.binary(max_size=300))
@example(b"")
def test_any_bytes_are_refused(sample: Sample, blob: bytes):
    assert sample.refuses(blob)
    assert sample.refuses(assemble(blob, b""))


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@EXAMPLES
def test_whatever_its_header_says_it_is_refused_or_the_same(sample: Sample, examples: int):
    sizes = st.lists(st.sampled_from([0, 1, -1, 2, 5, 2**31, 2**53, 2**63, 2**64]), max_size=4)

    @settings(max_examples=examples)
    @given(data=st.data(), value=ODD | sizes)
    def check(data: st.DataObject, value: Any) -> None:
        header, rest = header_of(sample.blob)
        entry = header[data.draw(st.sampled_from(sorted(header)))]
        entry[data.draw(st.sampled_from(sorted(entry)))] = value
        sample.refuses(assemble(header, rest))

    check()


# ---- lies about sizes ------------------------------------------------------------------------------------------------


def lying(changes: dict[str, Any]) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    text = {"format": "taylor-attention", "version": "1", "kind": "state", "digest": "0"}
    return assemble({"__metadata__": text, "x": entry}, bytes(8))


LIES = {
    "a header of 2^64 bytes": b"\xff" * 8 + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2^30 bytes": struct.pack("<Q", 2**30) + b"{}",
    "a header that goes on past the end": struct.pack("<Q", 100) + b"{}",
    "a header without an end": assemble(b"[" * 200_000, b""),
    "a header with a number of many digits": assemble(b'{"x": ' + b"9" * 100_000 + b"}", b""),
    "data of 2^60 bytes": lying({"data_offsets": [0, 2**60]}),
    "data that end before they begin": lying({"data_offsets": [8, 0]}),
    "data from before the file": lying({"data_offsets": [-8, 8]}),
    "data that begin late": lying({"data_offsets": [4, 8], "shape": [1]}),
    "a shape of 2^60": lying({"shape": [2**60]}),
    "a shape whose size overflows": lying({"shape": [2**32, 2**32, 2]}),
    "a negative shape": lying({"shape": [-2]}),
    "nothing of an absurd shape": lying({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]})[:-8],
    "an unknown type": lying({"dtype": "Q8"}),
    "a type of half bytes": lying({"dtype": "F4", "shape": [16]}),
    "a type that is not stored": lying({"dtype": "F8_E5M2", "shape": [8]}),
}


@pytest.mark.parametrize("blob", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(tmp_path: Path, blob: bytes):
    (tmp_path / "file").write_bytes(blob)
    with pytest.raises(
        StorageError, match="file: (not a whole safetensors file|the content does not match its digest)"
    ):
        read_tensors(tmp_path / "file", kind="state")


def sparse(path: Path, header: bytes, size: int) -> None:
    """A file of so many bytes that takes no room on the disk."""
    path.write_bytes(header)
    os.truncate(path, size)


def test_a_huge_file_is_judged_before_it_is_read(tmp_path: Path):
    size = 2 * storage._memory()
    sparse(tmp_path / "foreign", b"", size)
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        State.load(tmp_path / "foreign")
    sparse(tmp_path / "longer", lying({}), size)
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        State.load(tmp_path / "longer")
    sparse(tmp_path / "all header", struct.pack("<Q", 2 * LITTLE), size)
    with pytest.raises(StorageError, match="not a whole safetensors file"):
        State.load(tmp_path / "all header")
    text = lying({"dtype": "U8", "shape": [size], "data_offsets": [0, size]})[:-8]
    sparse(tmp_path / "whole", text, len(text) + size)
    with pytest.raises(StorageError, match="expected at most [0-9,]+ bytes, half of this machine's memory, got"):
        State.load(tmp_path / "whole")


def test_a_file_that_memory_lacks_room_for_is_refused(tmp_path: Path):
    text = lying({"dtype": "U8", "shape": [2 * LITTLE], "data_offsets": [0, 2 * LITTLE]})[:-8]
    sparse(tmp_path / "file", text, len(text) + 2 * LITTLE)
    with pytest.raises(StorageError, match="file: cannot be read \\(out of memory\\)$"):
        State.load(tmp_path / "file")


# ---- what the digest vouches for and is wrong all the same -----------------------------------------------------------

torch.manual_seed(0)
NEAR = some_state(window=4, sinks=1, heavy=2)
EXPECTED = "state: expected the tensors and metadata of a State, got "
FLOATS = [name for name, x in NEAR.tensors().items() if x.is_floating_point()]
MAY_BE = {(name, -torch.inf) for name in FLOATS if name.endswith(("log_decay", "heavy_priority"))}
MAY_BE.add(("near_heavy_priority", torch.inf))
MAY_NOT_BE = [(name, x) for name in FLOATS for x in (torch.nan, torch.inf, -torch.inf) if (name, x) not in MAY_BE]


def with_last(name: str, value: float) -> dict[str, Tensor]:
    tensors = {each: x.clone() for each, x in NEAR.tensors().items()}
    tensors[name].view(-1)[-1] = value
    return tensors


@pytest.mark.parametrize(("name", "value"), MAY_NOT_BE)
def test_a_number_that_no_state_has_is_refused(name: str, value: float):
    with pytest.raises(StorageError, match=f"^{EXPECTED}{name}: [^\n]*$"):
        State.from_tensors(with_last(name, value), NEAR.metadata())


@pytest.mark.parametrize(("name", "value"), sorted(MAY_BE))
def test_infinities_that_states_have_are_kept(name: str, value: float):
    assert State.from_tensors(with_last(name, value), NEAR.metadata()).tensors()[name].view(-1)[-1] == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", -1, "tokens: expected counts from 0 to"),
        ("tokens", 2**62 + 1, "tokens: expected counts from 0 to"),
        ("log_decay", 0.01, "log_decay: expected numbers <= 0"),
        ("tail_log_decay", 0.01, "tail_log_decay: expected numbers <= 0"),
        ("near_log_decay", 0.01, "near_log_decay: expected numbers <= 0"),
        ("near_received", -0.01, "near_received: expected numbers >= 0"),
        ("tail_key", 0.01, "tail_key: expected zeros after its 1 tokens"),
        ("tail_value", 0.01, "tail_value: expected zeros after its 1 tokens"),
    ],
)
def test_a_value_that_no_state_has_is_refused(name: str, value: float, message: str):
    with pytest.raises(StorageError, match=f"^{EXPECTED}{message}"):
        State.from_tensors(with_last(name, value), NEAR.metadata())


SIZES = [0, 1, 2, 2**16, 2**17, 2**31, 2**40, 2**62]


@settings(max_examples=100)
@given(
    sizes=st.tuples(*[st.sampled_from(SIZES)] * 5),
    degree=st.sampled_from([None, 0, 1, 2, 2**16, 2**17, 2**40]) | st.integers(),
)
def test_a_state_of_nothing_in_absurd_shapes_is_refused_at_once(sizes: tuple[int, ...], degree: int | None):
    """Without a sequence there is no number, so that any shape fits into any file."""
    heads, columns, features, head_dim, width = sizes
    empty = torch.empty(0).as_strided
    tensors = {
        "sums": empty((0, heads, columns, features), (0,) * 4),
        "compensation": empty((0, heads, columns, features), (0,) * 4),
        "tokens": torch.empty(0, dtype=torch.int64),
        "log_decay": torch.empty(0, dtype=torch.float64).as_strided((0, heads), (0, 0)),
        "tail_key": empty((0, heads, head_dim, width), (0,) * 4),
        "tail_value": empty((0, heads, columns, width), (0,) * 4),
        "tail_log_decay": torch.empty(0, dtype=torch.float64).as_strided((0, heads), (0, 0)),
    }
    metadata = {"degree": str(degree), "scale": (0.5).hex(), "tail_length": "0"}
    with pytest.raises(StorageError, match=f"^{EXPECTED}"):
        State.from_tensors(tensors, metadata)


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(NEAR.metadata())), value=ODD | st.integers().map(str) | st.text(max_size=12))
def test_whatever_stands_in_its_metadata_a_state_is_refused_or_the_same(name: str, value: Any):
    metadata = {**NEAR.metadata(), name: value}
    try:
        state = State.from_tensors(NEAR.tensors(), metadata)
    except StorageError:
        return
    assert state.degree == NEAR.degree
    assert state.tail_length >= NEAR.tail_length  # beyond, there are zeros, which are no tokens
    assert state.scale == float.fromhex(metadata["scale"])  # any finite one is as good


# ---- sessions that are whole files and no sessions -------------------------------------------------------------------


@pytest.fixture
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[..., object]], str]:
    """A function that changes what a session's file holds and gives the line by which the file is refused."""
    path, name = tmp_path / "session", request.param
    write_session(name)(path)

    def refuse(alter: Callable[[dict[str, Tensor], dict[str, str]], object]) -> str:
        tensors, metadata = read_tensors(path, kind="session")
        alter(tensors, metadata)
        write_tensors(path, tensors, kind="session", metadata=metadata)
        with pytest.raises(StorageError) as caught:
            read_session(name)(path)
        return str(caught.value).removeprefix(f"{path}: ")

    return refuse


def put(name: str, value: Any) -> Callable[..., object]:
    """Put a tensor or a text in the place of another, or what a function makes of it."""

    def alter(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        place: dict[str, Any] = tensors if name in tensors else metadata
        place[name] = value(place[name]) if callable(value) else value

    return alter


def fill_last(value: float) -> Callable[[Tensor], Tensor]:
    def fill(x: Tensor) -> Tensor:
        x.view(-1)[-1] = value
        return x

    return fill


def move_on(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["1.tokens"] += 1


def with_other_degree(text: str) -> str:
    return json.dumps({**json.loads(text), "degree": "1"})


COMMON = {
    "seed a word": (put("seed", "one"), "invalid literal for int"),
    "seed too large": (put("seed", str(2**64)), "seed: expected an int <= 9,223,372,036,854,775,807"),
    "unshown no bytes": (put("unshown", "xyz"), "non-hexadecimal"),
    "another model": (put("model", "0" * 64), "model: expected the one that made the session, got another"),
    "generator cut": (put("generator", lambda x: x[:-1]), "size 5056|wrong size"),
    "generator of floats": (put("generator", lambda x: x.float()), "expected a torch.ByteTensor|RNG state must be"),
    "generator damaged": (put("generator", lambda x: torch.full_like(x, 255)), "mt19937|RNG"),
    "logits of floats twice as wide": (put("logits", lambda x: x.double()), "logits: expected"),
    "logits of another vocabulary": (put("logits", lambda x: x[:, :-1]), "logits: expected"),
    "logits not finite": (put("logits", fill_last(torch.nan)), "logits: expected finite numbers"),
    "no logits": (lambda tensors, _: tensors.pop("logits"), "logits: expected those after the last byte read"),
    "no generator": (lambda tensors, _: tensors.pop("generator"), "no whole session: it lacks 'generator'"),
    "no layer": (lambda _, metadata: metadata.pop("1"), "no whole session: it lacks '1'"),
    "a layer that is no JSON": (put("0", "{"), "Expecting property name"),
    "a layer that is a list": (put("0", "[1]"), "cannot convert dictionary|is not iterable|object is not"),
    "a layer that is null": (put("0", "null"), "object is not iterable"),
    "a layer that is nothing": (put("0", "{}"), "expected"),
}
TAYLOR = {
    "layers at different places": (move_on, "states: expected one text, at one place in all layers"),
    "another degree": (put("0", with_other_degree), "state: expected the tensors and metadata of a State"),
    "moments not finite": (put("1.sums", fill_last(torch.nan)), "sums: expected finite numbers"),
    "degree a number": (put("0", '{"degree": 2, "scale": 1, "tail_length": 0}'), "state: expected"),
}
SOFTMAX = {
    "keys not finite": (put("1.keys", fill_last(torch.inf)), "keys: expected finite numbers"),
    "values not finite": (put("1.values", fill_last(torch.nan)), "values: expected finite numbers"),
    "decay rising": (put("0.cumulative_decay", lambda x: x + 1), "cumulative_decay: expected numbers <= 0"),
    "decay single": (put("0.cumulative_decay", lambda x: x.float()), "cumulative_decay: expected torch.float64"),
    "no decay": (lambda tensors, _: tensors.pop("0.cumulative_decay"), "state of layer 0: expected decay True"),
    "tokens more than there are": (move_on, "tokens: expected as many as are attended to"),
    "tokens of floats": (put("0.tokens", lambda x: x.float()), "tokens: expected torch.int64"),
    "attended of numbers": (put("0.attended", lambda x: x.long()), "attended: expected torch.bool"),
    "values half": (put("0.values", lambda x: x.half()), "values: expected torch.float32"),
    "keys of integers": (lambda tensors, _: integers(tensors), "keys: expected a floating-point tensor"),
    "keys double": (lambda tensors, _: doubles(tensors), "state of layer 0: expected dtype torch.float32"),
}


def integers(tensors: dict[str, Tensor]) -> None:
    tensors["0.keys"], tensors["0.values"] = tensors["0.keys"].long(), tensors["0.values"].long()


def doubles(tensors: dict[str, Tensor]) -> None:
    tensors["0.keys"], tensors["0.values"] = tensors["0.keys"].double(), tensors["0.values"].double()


CASES = [
    pytest.param(model, *case, id=f"{model}-{name}")
    for model, cases in {"taylor": COMMON | TAYLOR, "softmax": COMMON | SOFTMAX}.items()
    for name, case in cases.items()
]


@pytest.mark.parametrize(("session", "alter", "message"), CASES, indirect=["session"])
def test_a_session_that_cannot_go_on_is_refused(
    session: Callable[..., str], alter: Callable[..., object], message: str
):
    line = session(alter)
    assert re.search(message, line)
    assert "\n" not in line


@EXAMPLES
def test_whatever_its_metadata_say_a_session_is_refused_or_the_same(tmp_path: Path, examples: int):
    whole = Sample("session", tmp_path)
    tensors, metadata = read_tensors(whole.path, kind="session")
    layers = st.fixed_dictionaries(dict.fromkeys(("degree", "scale", "tail_length"), ODD)).map(json.dumps)

    @settings(max_examples=examples)
    @given(name=st.sampled_from(sorted(metadata)), value=st.text(max_size=8) | ODD.map(json.dumps) | layers)
    def check(name: str, value: str) -> None:
        write_tensors(tmp_path / "other", tensors, kind="session", metadata={**metadata, name: value})
        try:
            found = read_session("taylor")(tmp_path / "other")
        except StorageError as error:
            assert "\n" not in str(error)
        else:
            assert name in ("seed", "unshown") or found == whole.content

    check()


# ---- what would not be loaded is not saved ---------------------------------------------------------------------------


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path):
    state = some_state()
    state.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    state.sums[1, 0, 0, 0] = torch.nan
    with pytest.raises(StorageError, match=r"sums: expected finite numbers, got NaN or infinity in sequences \[1\]"):
        state.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    state.select(torch.tensor([0])).save(tmp_path / "state")  # the others can be


@pytest.mark.parametrize("name", MODELS)
def test_a_session_that_could_not_be_loaded_is_not_saved(tmp_path: Path, name: str):
    path = tmp_path / "session"
    write_session(name)(path)
    session, before = Session.load(path, a_model(**MODELS[name])), path.read_bytes()
    assert session.logits is not None
    session.logits[0, 0] = torch.nan
    with pytest.raises(StorageError, match="logits: expected finite numbers"):
        session.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 2**17}, "configuration: expected a model of at most"),
        ({"num_layers": 2**12}, "configuration: expected a model of at most"),
        ({"vocab_size": 2**20}, "configuration: expected a model of at most"),
        ({"head_dim": 2**20, "degree": 2}, "configuration: expected a model of at most"),
        ({"mlp_ratio": 1e4}, "configuration: expected a model of at most"),
        ({"num_layers": 2**40}, "num_layers: expected an int <= 4,096"),
        ({"vocab_size": 2**60}, "vocab_size: expected an int <= 1,048,576"),
        ({"mlp_ratio": 1e300}, "mlp_ratio: expected an MLP 1 to 1,048,576 wide"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio: expected a number > 0, got inf"),
    ],
)
def test_a_model_larger_than_its_file_is_not_made(tmp_path: Path, config: dict[str, Any], message: str):
    save_checkpoint(tmp_path / "model", a_model())
    tensors, metadata = read_tensors(tmp_path / "model", kind="model")
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **config})
    write_tensors(tmp_path / "model", tensors, kind="model", metadata=metadata)
    with pytest.raises(StorageError, match=message):
        load_checkpoint(tmp_path / "model")


def test_weights_of_a_type_without_arithmetic_are_refused(tmp_path: Path):
    save_checkpoint(tmp_path / "model", a_model())
    tensors, metadata = read_tensors(tmp_path / "model", kind="model")
    tensors = {name: x.to(torch.float8_e5m2) for name, x in tensors.items()}
    write_tensors(tmp_path / "model", tensors, kind="model", metadata=metadata)
    with pytest.raises(StorageError, match="expected floating-point numbers, got torch.float8_e5m2"):
        load_checkpoint(tmp_path / "model")


OPTIMISER = {
    "a mean of one number": ("exp_avg/norm.weight", lambda x: x[0]),
    "a mean that is not finite": ("exp_avg/norm.weight", fill_last(torch.nan)),
    "a square below zero": ("exp_avg_sq/norm.weight", fill_last(-1.0)),
    "means of doubles": ("exp_avg/norm.weight", lambda x: x.double()),
    "steps for each number": ("step/norm.weight", lambda x: x.expand(4).clone()),
    "steps below zero": ("step/norm.weight", lambda x: -x),
}


@pytest.mark.parametrize(("name", "function"), OPTIMISER.values(), ids=OPTIMISER.keys())
def test_an_optimiser_state_that_is_none_is_refused(tmp_path: Path, name: str, function: Callable[[Tensor], Tensor]):
    path = tmp_path / "training"
    write_training(path)
    tensors, metadata = read_tensors(path, kind="training")
    tensors[name] = function(tensors[name])
    write_tensors(path, tensors, kind="training", metadata=metadata)
    with pytest.raises(StorageError, match=f"expected {name.partition('/')[0]} of every weight, in its shape"):
        read_training(path)
