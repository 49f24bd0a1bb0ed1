"""Generation with our language model in transformers: every way gives what whole forwards give, in constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, pipeline

from our_models import OPTIONS, build, pad_left, text
from taylor_attention import hf
from taylor_attention.errors import ArgumentError

each_model = pytest.mark.parametrize("name", OPTIONS)
NEW = 4


def continue_greedily(model: hf.TaylorForCausalLM, tokens: Tensor, count: int = NEW) -> Tensor:
    """By whole forwards of the language model itself."""
    for _ in range(count):
        tokens = torch.cat([tokens, model.model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def generate(model: hf.TaylorForCausalLM, tokens: Tensor, **options: Any) -> Any:
    return model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, **options})


WAYS: dict[str, dict[str, Any]] = {
    "with the cache": {},
    "without": {"use_cache": False},
    "a prompt in chunks": {"prefill_chunk_size": 4},
}


@each_model
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_greedy_is_the_likeliest_of_whole_forwards(name: str, way: dict[str, Any]):
    model, tokens = build(name), text(2, 9)
    assert torch.equal(generate(model, tokens, **way), continue_greedily(model, tokens))


DRAWN: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that draw": {"num_beams": 3, "do_sample": True},
}


@each_model
@pytest.mark.parametrize("options", DRAWN.values(), ids=DRAWN.keys())
def test_draws_and_beams_are_those_without_a_cache(name: str, options: dict[str, Any]):
    model, tokens = build(name), text(2, 7)
    outcomes = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outcomes.append(generate(model, tokens, use_cache=use_cache, **options))
    assert outcomes[0].shape == (2 * options.get("num_return_sequences", 1), 7 + NEW)
    assert torch.equal(*outcomes)


@each_model
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 5}], ids=str)
def test_a_batch_with_left_padding_is_its_sequences_alone(name: str, options: dict[str, Any]):
    model, sequences = build(name), [text(1, length)[0] for length in (9, 4, 7)]
    tokens, mask = pad_left(sequences)
    together = generate(model, tokens, attention_mask=mask, **options)[:, -NEW:]
    alone = [generate(model, sequence[None], **options)[:, -NEW:] for sequence in sequences]
    assert torch.equal(together, torch.cat(alone))


@each_model
def test_it_goes_on_from_a_saved_state(name: str, tmp_path: Path):
    model, tokens = build(name), text(2, 9)
    first = generate(model, tokens, return_dict_in_generate=True)
    assert first.past_key_values.length == 9 + NEW - 1  # the last one is not read yet
    first.past_key_values.save(tmp_path / "cache", model)
    whole = continue_greedily(model, tokens, 2 * NEW)
    back = hf.LanguageModelCache.load(tmp_path / "cache", model)
    assert torch.equal(generate(model, first.sequences, past_key_values=back), whole)
    # with the new part alone, and a mask over all
    new, back = first.sequences[:, -1:], hf.LanguageModelCache.load(tmp_path / "cache", model)
    mask = torch.ones(2, back.length + 1, dtype=torch.int64)
    assert torch.equal(generate(model, new, past_key_values=back, attention_mask=mask)[:, 1:], whole[:, -NEW:])


def test_a_state_of_one_prompt_serves_many_continuations():
    model, prompt, endings = build(), text(1, 12), text(3, 4)
    with torch.no_grad():
        cache = model(prompt).past_key_values
    cache.batch_repeat_interleave(3)
    tokens = torch.cat([prompt.expand(3, -1), endings], dim=1)
    assert torch.equal(generate(model, tokens, past_key_values=cache), continue_greedily(model, tokens))


def test_it_ends_where_the_end_is():
    model, tokens = build(), text(1, 9)
    expected = continue_greedily(model, tokens)
    end = int(expected[0, 10])
    stopped = generate(model, tokens, eos_token_id=end, pad_token_id=255)
    assert stopped.tolist() == expected[:, : 1 + expected[0, 9:].tolist().index(end) + 9].tolist()


def test_the_state_stays_as_large_as_it_was():
    model = build("near and far", torch.float32, num_layers=1, d_model=8, num_heads=1)
    sizes = {generate_bytes(model, count) for count in (1, 10, 100)}
    assert len(sizes) == 1
    twin = build("softmax", torch.float32, num_layers=1, d_model=8, num_heads=1)
    assert generate_bytes(twin, 100) > generate_bytes(twin, 1)  # which is what is compared with


def generate_bytes(model: hf.TaylorForCausalLM, count: int) -> int:
    return int(generate(model, text(1, 3), max_new_tokens=count, return_dict_in_generate=True).past_key_values.nbytes)


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a cache of the library": (ArgumentError, "cache_implementation: expected N", {"cache_implementation": "static"}),
    "a cache of keys": (ArgumentError, "past_key_values: expected a Lang", {"past_key_values": DynamicCache()}),
    "tokens taken back": (ValueError, "is not supported with stateful models", {"prompt_lookup_num_tokens": 2}),
    "embeddings": (ValueError, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 5, 16)}),
    "positions": (ValueError, "position_ids", {"position_ids": torch.arange(5)[None]}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "options"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_cannot_do_is_refused(kind: type[Exception], message: str, options: dict[str, Any]):
    with pytest.raises(kind, match=message):
        generate(build(), text(1, 5), **options)


@pytest.mark.parametrize("length", [3, 9])
def test_a_text_that_the_state_has_read_already_is_refused(length: int):
    model, tokens = build(), text(1, 9)
    with torch.no_grad():
        cache = model(tokens).past_key_values
    with pytest.raises(ArgumentError, match=f"^input_ids: expected a text longer than the 9 tokens read.*{length} tok"):
        generate(model, tokens[:, :length], past_key_values=cache)


def test_sequences_and_states_must_be_as_many():
    model, tokens = build(), text(2, 9)
    with torch.no_grad():
        cache = model(tokens[:, :5]).past_key_values
    with pytest.raises(ArgumentError, match="^state: expected"):
        generate(model, tokens, past_key_values=cache, do_sample=True, num_return_sequences=2)


# ---- text in, text out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over bytes and its tokenizer, as `taylor-attention convert` leaves them."""
    folder = tmp_path_factory.mktemp("model")
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 255)
    build(dtype=torch.float32, **ends).save_pretrained(folder)
    hf.byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_pipeline_writes_text_from_the_folder_alone(folder: Path):
    write = pipeline("text-generation", model=str(folder))
    assert isinstance(write.model, hf.TaylorForCausalLM)
    prompts = ["naïve", "a longer prompt: ", "€"]
    together = write(prompts, max_new_tokens=NEW, do_sample=False, batch_size=3, return_tensors=True)
    for prompt, answer in zip(prompts, together, strict=True):
        expected = continue_greedily(write.model, torch.tensor([list(prompt.encode())]))
        assert answer[0]["generated_token_ids"][-NEW:] == expected[0, -NEW:].tolist()
    assert write("naïve", max_new_tokens=1, do_sample=False)[0]["generated_text"].startswith("naïve")


class Harness:
    """What `lm_eval.models.huggingface.HFLM` asks of a model and a tokenizer, call by call."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        model.tie_weights()

    def logits(self, rows: list[list[int]]) -> Tensor:
        """Sequences filled up with zeros on the right, without a mask."""
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for place, row in enumerate(rows):
            tokens[place, : len(row)] = torch.tensor(row)
        with torch.no_grad():
            return self.model(tokens).logits

    def loglikelihood(self, pairs: list[tuple[str, str]], longest: int) -> list[float]:
        """Of each text after its context, or after the tokenizer's first token; cut on the left to the longest."""
        contexts = [self.tokenizer.encode(before) or [self.tokenizer.bos_token_id] for before, _ in pairs]
        texts = [self.tokenizer.encode(after) for _, after in pairs]
        rows = [(one + other)[-(longest + 1) :] for one, other in zip(contexts, texts, strict=True)]
        scores = self.logits([row[:-1] for row in rows]).log_softmax(-1)
        found = []
        for row, after, score in zip(rows, texts, scores, strict=True):
            count = len(after)
            of_text = score[len(row) - 1 - count : len(row) - 1]
            found.append(float(of_text.gather(-1, torch.tensor(row[-count:])[:, None]).sum()))
        return found

    def generate_until(self, prompts: list[str], count: int) -> list[str]:
        """Batches filled up on the left; `max_length` and `pad_token_id` are given, the mask too."""
        batch = self.tokenizer(prompts, padding="longest", return_tensors="pt")
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        length, pad = tokens.shape[1] + count, self.tokenizer.pad_token_id
        written = self.model.generate(
            input_ids=tokens, attention_mask=mask, max_length=length, pad_token_id=pad, use_cache=True, do_sample=False
        )
        return self.tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)


def test_the_calls_of_the_evaluation_harness(folder: Path):
    model = hf.TaylorForCausalLM.from_pretrained(folder).double()
    harness = Harness(model, hf.byte_tokenizer())
    assert model.num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert len(harness.tokenizer) == model.config.vocab_size  # nothing is resized
    pairs = [("", "one"), ("a context ", "naïve"), ("of another length, ", "x")]
    together = harness.loglikelihood(pairs, 20)
    assert together == pytest.approx([harness.loglikelihood([pair], 20)[0] for pair in pairs], rel=1e-9)
    tokens = torch.tensor([list("a context naïve".encode())])
    logits = model.model(tokens).detach()[0, 9:-1]
    expected = logits.log_softmax(-1).gather(-1, tokens[0, 10:, None]).sum()
    assert together[1] == pytest.approx(float(expected), rel=1e-9)
    prompts = ["a", "a longer one"]
    assert harness.generate_until(prompts, 4) == [harness.generate_until([prompt], 4)[0] for prompt in prompts]
