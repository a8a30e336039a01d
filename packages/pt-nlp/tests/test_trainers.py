"""A prompted model trains under this library's `fit`, transformers' Trainer and TRL's SFTTrainer: only the prompt changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from pt_core.attachment import attach
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.prompts import KeyValuePrompt, SoftPrompt
from pt_core.training import fit
from pt_nlp.data import TextTask
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

WIDTH, M = 16, 5
Build = Callable[..., nn.Module]
LINES = ["the film was good", "the sun is red", "rain is awful news", "a great sport", "the film was bad", "blue sun"]


def soft() -> SoftPrompt:
    return SoftPrompt(M, WIDTH, std=0.5, generator=torch.Generator().manual_seed(1))


def arguments(folder: Path, **changes) -> dict:
    """Three steps of two rows on the CPU, quiet."""
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    steps = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1, "seed": 0}
    return {"output_dir": str(folder), "save_strategy": "no", **quiet, **steps} | changes


def encoded(words) -> Dataset:
    return Dataset.from_list([{"input_ids": words(line)["input_ids"]} for line in LINES])


def trainer(model: nn.Module, words, folder: Path, data: Dataset | None = None, **changes) -> Trainer:
    data = encoded(words) if data is None else data
    return Trainer(
        model,
        TrainingArguments(**arguments(folder, **changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
    )


def unprompted(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=torch.arange(3, 9)[None]).logits
    return logits


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_fit_trains_the_prompt_only(tiny: Build, words) -> None:
    model = tiny("Llama")
    before, state = unprompted(model), snapshot(model)
    rows = [{"text": line, "label": "good" if i % 2 else "bad"} for i, line in enumerate(LINES)]
    task = TextTask.from_rows({"train": rows}, words, kind="verbalizer", template="{text} Topic :")
    method = PromptTuning(model, PromptTuningConfig(prompt_length=M, lr=0.05))
    start = method.prompt.weight.detach().clone()
    result = fit(
        method, task.train, None, FitConfig(max_steps=3, batch_size=2, log_every=1, progress=False, device="cpu")
    )
    assert result.steps == 3
    assert float((method.prompt.weight - start).abs().max()) > 0.01
    method.remove()
    assert_unchanged(model, state)
    assert torch.equal(unprompted(model), before)


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
def test_the_trainer_of_transformers_trains_the_prompt_only(tiny: Build, words, what: str, tmp_path: Path) -> None:
    model = tiny("Llama")
    before, state = unprompted(model), snapshot(model)
    prompt = soft() if what == "tokens" else KeyValuePrompt(2, 2, 4, M, std=0.5)
    start = prompt.weight.detach().clone()
    handle = attach(model, prompt, always=True)
    run = trainer(model, words, tmp_path, max_steps=12, label_names=["labels"])
    assert [id(p) for group in run.create_optimizer().param_groups for p in group["params"]] == [id(prompt.weight)]
    first = run.evaluate()["eval_loss"]
    run.train()
    assert float((prompt.weight - start).abs().max()) > 0.01
    assert run.evaluate()["eval_loss"] < first - 0.01
    told = run.predict(run.eval_dataset)
    assert told.predictions.shape[:2] == told.label_ids.shape  # no prompt positions
    handle.remove()
    assert_unchanged(model, state)
    assert torch.equal(unprompted(model.eval()), before)


def test_the_trainer_takes_the_step_of_a_loop_by_hand(tiny: Build, words, tmp_path: Path) -> None:
    weights = []
    for by_hand in (True, False):
        model, prompt = tiny("Llama"), soft()
        attach(model, prompt)
        data = encoded(words).select([0, 1])
        if by_hand:
            batch = DataCollatorForLanguageModeling(words, mlm=False)([dict(row) for row in data])
            optimiser = torch.optim.AdamW([prompt.weight], lr=0.05, weight_decay=0.0)
            for factor in (1.0, 2 / 3, 1 / 3):
                optimiser.param_groups[0]["lr"] = 0.05 * factor
                optimiser.zero_grad()
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_([prompt.weight], 1.0)
                optimiser.step()
        else:
            trainer(model, words, tmp_path, data).train()
        weights.append(prompt.weight.detach().clone())
    assert float((weights[0] - weights[1]).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_options_of_the_trainer_keep_the_backbone(tiny: Build, words, changes: dict, tmp_path: Path) -> None:
    model, prompt = tiny("Llama"), soft()
    before, state, start = unprompted(model), snapshot(model), prompt.weight.detach().clone()
    handle = attach(model, prompt)
    run = trainer(model, words, tmp_path, **changes)
    run.train()
    assert all(0 < loss < 20 for loss in losses(run))
    assert prompt.weight.dtype == torch.float32
    assert float((prompt.weight - start).abs().max()) > 0.01
    handle.remove()
    assert_unchanged(model, state)
    run.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(unprompted(model.eval()), before)


def test_a_checkpoint_of_the_trainer_resumes_the_prompt(tiny: Build, words, tmp_path: Path) -> None:
    ends = []
    for steps in (4, 2, 4):
        model, prompt = tiny("Llama"), soft()
        attach(model, prompt)
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        folder = tmp_path / ("whole" if not ends else "parts")
        run = trainer(model, words, folder, **options)
        run.train(resume_from_checkpoint=len(ends) == 2)
        ends.append(prompt.weight.detach().clone())
    assert torch.equal(ends[2], ends[0])
    assert not torch.equal(ends[1], ends[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_trl_trains_the_prompt_only(tiny: Build, words, checkpointing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model, prompt = tiny("Llama"), soft()
    before, state, start = unprompted(model), snapshot(model), prompt.weight.detach().clone()
    handle = attach(model, prompt, always=True)
    data = Dataset.from_list([{"text": line} for line in LINES])
    settings = arguments(tmp_path, max_length=32, gradient_checkpointing=checkpointing, bf16=False)
    run = trl.SFTTrainer(
        model, trl.SFTConfig(**settings), train_dataset=data, eval_dataset=data, processing_class=words
    )
    trained = [n for n, p in run.model.named_parameters() if p.requires_grad]
    assert trained == ["pt_prompt_0.weight"]
    run.train()
    assert run.state.global_step == 3
    assert float((prompt.weight - start).abs().max()) > 0.01
    assert 0 < run.evaluate()["eval_loss"] < 20
    handle.remove()
    assert_unchanged(model, state)
    assert torch.equal(unprompted(model.eval()), before)


def test_the_loss_of_trl_is_the_loss_of_the_model(tiny: Build, words, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    model = tiny("Llama")
    attach(model, soft())
    data = Dataset.from_list([{"text": line} for line in LINES[:2]])
    settings = arguments(tmp_path, max_length=32, bf16=False, learning_rate=0.0, max_steps=1)
    run = trl.SFTTrainer(model, trl.SFTConfig(**settings), train_dataset=data, processing_class=words)
    run.train()
    batch = words([line + "</s>" for line in LINES[:2]], return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = float(model(**batch, labels=labels).loss)
    assert abs(losses(run)[0] - expected) < 1e-4
