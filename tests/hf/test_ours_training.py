"""The Trainer of transformers with our language model: the loss falls, and a run that was stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from our_models import build
from taylor_attention import hf

pytest.importorskip("accelerate")

TEXT = ["the same words again and again", "and other words", "again the same words", "words, words"]


def trainer(folder: Path, steps: int, name: str, **options: Any) -> Trainer:
    tokenizer = hf.byte_tokenizer()
    tokenizer.padding_side = "right"  # else the first token of a text counts as predicted from padding
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=4,
        **options,
    )
    return Trainer(
        build(name, torch.float32),
        settings,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # padding, and -100 over it
        train_dataset=[tokenizer(line) for line in TEXT],
        eval_dataset=[tokenizer(line) for line in TEXT[:3]],
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("name", ["near and far", pytest.param("softmax", marks=pytest.mark.slow)])
def test_the_loss_falls_and_a_stopped_run_goes_on(name: str, tmp_path: Path):
    whole = trainer(tmp_path / "whole", 8, name)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before - 1
    trainer(tmp_path / "parts", 4, name).train()
    parts = trainer(tmp_path / "parts", 8, name)
    parts.train(resume_from_checkpoint=True)
    mine, theirs = parts.model.state_dict(), whole.model.state_dict()
    assert parts.state.global_step == 8
    assert all(torch.equal(mine[each], theirs[each]) for each in theirs)
    back = hf.TaylorForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-8")
    assert all(torch.equal(weight, theirs[each]) for each, weight in back.state_dict().items())


def test_evaluation_of_a_batch_is_of_its_texts(tmp_path: Path):
    run = trainer(tmp_path, 1, "near and far", per_device_eval_batch_size=3)
    model, tokenizer = run.model, hf.byte_tokenizer()
    sums = torch.zeros(2)
    for line in TEXT[:3]:
        tokens = torch.tensor([tokenizer.encode(line)])
        with torch.no_grad():
            sums += torch.tensor([float(model(tokens, labels=tokens).loss) * (len(line) - 1), len(line) - 1])
    assert run.evaluate()["eval_loss"] == pytest.approx(float(sums[0] / sums[1]), rel=1e-5)
