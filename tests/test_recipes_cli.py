"""`pt train | eval | predict | export | compare` on a small random Llama and a file of rows, and what a kill leaves."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pt_core.testing import Command, Killed, command, one_thread, stopped_after

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `report` of pt-core")

WORDS = "good bad film news sport the a was is great awful Topic : positive negative"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS.split()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=32, max_position_embeddings=64, initializer_range=0.3, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(backbone: Path, tmp_path: Path) -> Path:
    """A recipe file beside the rows that it names."""
    rows = [
        {"text": f"{article} {subject} {verb} {how}", "label": "positive" if how in ("good", "great") else "negative"}
        for article in ("the", "a")
        for subject in ("film", "news", "sport")
        for verb in ("was", "is")
        for how in ("good", "great", "bad", "awful")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "package": "nlp",
        "about": "Tone of a sentence",
        "method": {"name": "prompt-tuning", "prompt_length": 4, "lr": 0.05},
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "template": "{text} Topic :",
            "shots": 8,
            "validation_shots": 4,
            "max_source_length": 16,
        },
        "training": {"max_steps": 20, "batch_size": 8, "evaluate_every": 5, "log_every": 5, "progress": False},
        "compare": {
            "short": {"method": "prompt-tuning", "prompt_length": 1, "training": {"max_steps": 10}},
            "zero-shot": {},
            "left-out": None,
        },
    }
    (tmp_path / "tone.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "tone.yaml"


@pytest.fixture
def pt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """(arguments) -> exit code, stdout, stderr; run in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    return command(monkeypatch, capsys)


def prompt_of(run: Path) -> bytes:
    return (run / "prompt" / "prompt.safetensors").read_bytes()


# --- train, and what can be done with what it leaves -----------------------------------------------------------------
def test_train_eval_predict_export(pt: Command, recipe: Path, backbone: Path, tmp_path: Path) -> None:
    code, out, err = pt("train", recipe, "-o", "run")
    assert code == 0, err
    assert "prompt-tuning" in out and "accuracy" in out and "trained prompt: run/prompt" in out
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(PNG)
    result = json.loads((tmp_path / "run" / "results.json").read_text())[0]
    assert (result["method"], result["seed"], result["trainable_parameters"]) == ("prompt-tuning", 0, 4 * 16)
    assert result["extra"]["steps"] == 20 and {"accuracy", "macro-f1", "loss"} <= result["metrics"].keys()
    logged = [json.loads(line) for line in (tmp_path / "run" / "training" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation/loss"] for row in logged if "validation/loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    artifact = json.loads((tmp_path / "run" / "prompt" / "prompt_config.json").read_text())
    assert artifact["backbone"]["name"] == "small-llama"  # not where it lies on this machine
    assert str(tmp_path) not in json.dumps(artifact) and artifact["task"]["labels"] == ["negative", "positive"]

    code, out, err = pt("eval", "run/prompt", "--data", "rows.jsonl", "--backbone", backbone)
    assert code == 0, err
    accuracy = float(next(line for line in out.splitlines() if "accuracy" in line).split()[-2])

    code, out, err = pt("predict", "run/prompt", "the film was great", "a sport is awful", "--backbone", backbone)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert set(answer["scores"]) == {"positive", "negative"}
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)

    code, out, err = pt("predict", "run/prompt", "--data", "rows.jsonl", "--backbone", backbone)
    assert code == 0 and out.count("\n") == 48
    labels = [json.loads(line)["label"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    right = [json.loads(line)["label"] == label for line, label in zip(out.splitlines(), labels, strict=True)]
    assert sum(right) / 48 == pytest.approx(accuracy, abs=1e-4)

    code, out, err = pt("predict", "run/prompt", "the film was great")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "pt: run/prompt: was trained on 'small-llama', which is neither a folder here nor to be had from the hub. "
        "Name its backbone's folder or hub id: --backbone"
    )

    pytest.importorskip("pt_nlp.interop")
    code, out, err = pt("export", "run/prompt", "-o", "adapter", "--backbone", backbone)
    assert (code, out) == (0, "written: adapter\n"), err
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra `peft` of pt-nlp")
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(backbone), tmp_path / "adapter")
    rows = model.get_prompt_embedding_to_save("default")
    assert torch.equal(rows, load_file(tmp_path / "run" / "prompt" / "prompt.safetensors")["prompt.weight"])


def test_what_cannot_be_read_or_written_is_refused_before_the_backbone_is_loaded(
    pt: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert pt("train", recipe, "-o", "run", "--set", "training.max_steps=2")[0] == 0
    monkeypatch.setattr("pt_nlp.workbench.load_backbone", lambda *_, **__: pytest.fail("the backbone was loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, problem in [
        (["eval", "run/prompt", "--data", "gone.csv"], "gone.csv: no such file"),
        (["predict", "run/prompt", "--data", "gone.csv"], "gone.csv: no such file"),
        (
            ["export", "run/prompt", "-o", "a", "--format", "onnx"],
            "run/prompt: a prompt of prompt-tuning is not written as 'onnx'. There is: peft",
        ),
        (
            ["export", "run/prompt", "-o", "full"],
            f"{tmp_path}/full: holds other files (notes.txt). Choose a new folder",
        ),
        (["train", recipe, "-o", "run", "--set", "data.shots=99"], None),
    ]:
        code, out, err = pt(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and problem in (None, err.removeprefix("pt: ").rstrip()), err


def test_a_run_that_was_killed_goes_on_to_the_same_prompt(pt: Command, recipe: Path, tmp_path: Path) -> None:
    longer = ["--set", "training.max_steps=60", "--set", "training.checkpoint_every=2", "--set", "method.lr=0.02"]
    assert pt("train", recipe, "-o", "whole", *longer)[0] == 0
    with stopped_after(5), pytest.raises(Killed):
        pt("train", recipe, "-o", "cut", *longer)
    assert [path.name for path in (tmp_path / "cut" / "training").glob("checkpoint-*")] == ["checkpoint-0000004"]
    assert not (tmp_path / "cut" / "prompt").exists()

    code, _, err = pt("train", recipe, "-o", "cut", *longer)
    assert code == 0, err
    assert prompt_of(tmp_path / "cut") == prompt_of(tmp_path / "whole")
    logs = [(tmp_path / run / "training" / "metrics.jsonl").read_text() for run in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_a_run_of_another_recipe_or_of_other_rows_does_not_go_on(pt: Command, recipe: Path, tmp_path: Path) -> None:
    assert pt("train", recipe, "-o", "run")[0] == 0
    code, _, err = pt("train", recipe, "-o", "run", "--set", "method.lr=0.1")
    assert code == 2 and "something else (method_config.lr differ)" in err
    code, _, err = pt("train", recipe, "-o", "run", "--set", "data.template={text} :")
    assert code == 2 and "not YAML" in err
    code, _, err = pt("train", recipe, "-o", "run", "--set", 'data.template="{text} :"')
    assert code == 2 and "run: holds results of something else (data.template differ)" in err
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([rows[0].replace("positive", "negative"), *rows[1:]]))
    code, _, err = pt("train", recipe, "-o", "run")
    assert code == 2 and "run: holds results of something else (rows differ)" in err


def test_without_matplotlib_train_and_compare_leave_all_but_the_pictures(
    pt: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchmetrics  # noqa: F401  # it looks for matplotlib once, when it is imported

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    notice = "no pictures: pictures need matplotlib. Install pt-core[report]"
    code, out, err = pt("train", recipe, "-o", "run", "--set", "training.max_steps=5")
    assert code == 0 and err.splitlines()[-1] == notice, err
    assert "trained prompt: run/prompt" in out and "curves" not in out
    assert (tmp_path / "run" / "results.json").is_file() and not list(tmp_path.rglob("*.png"))
    labels = ("--methods", "prompt-tuning,zero-shot", "--seeds", 1)
    code, out, err = pt("compare", recipe, *labels, "-o", "both", "--set", "training.max_steps=5")
    assert code == 0 and err.splitlines()[-1] == notice, err
    assert "report: both/report.html" in out and not list(tmp_path.rglob("*.png"))
    assert {"results.json", "results.csv", "table.md", "report.html"} <= {p.name for p in (tmp_path / "both").iterdir()}


def test_a_loss_that_is_not_finite_ends_in_one_line(pt: Command, recipe: Path) -> None:
    wild = ("method.lr=1.0e+38", "training.optimiser=sgd", "training.weight_decay=1.0e+30")
    code, out, err = pt("train", recipe, "-o", "run", *(part for setting in wild for part in ("--set", setting)))
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("pt: the loss or its gradient is not finite at step 2; samples [")


def test_the_seed_of_the_command_line_wins(pt: Command, recipe: Path, tmp_path: Path) -> None:
    runs = {"a": ["--seed", 3], "b": ["--set", "seed=3"], "c": []}
    for name, arguments in runs.items():
        assert pt("train", recipe, "-o", name, "--set", "training.max_steps=2", *arguments)[0] == 0
    assert prompt_of(tmp_path / "a") == prompt_of(tmp_path / "b") != prompt_of(tmp_path / "c")


# --- compare ---------------------------------------------------------------------------------------------------------
def cells(folder: Path) -> dict[str, Any]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}


def test_compare_runs_methods_and_seeds_and_keeps_what_is_done(pt: Command, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    code, out, err = pt("compare", recipe, "--seeds", 2, "--methods", "prompt-tuning,short", "-o", "grid")
    assert code == 0, err
    assert "prompt-tuning, seed 0 (1 of 4) ..." in out and "report: grid/report.html" in out
    before = cells(folder)
    assert set(before) == {f"{label}-{seed}" for label in ("prompt-tuning", "short") for seed in (0, 1)}
    page = (folder / "report.html").read_text()
    assert "Tone of a sentence" in page and "data:image/png;base64," in page and "short" in page

    (folder / "cells" / "short-1.json").unlink()  # as if it had been killed in the last cell
    code, out, err = pt("compare", recipe, "--seeds", 2, "-o", "grid")  # the recipe's own labels: one method more
    assert code == 0, err
    after = cells(folder)
    assert set(after) == set(before) | {"zero-shot-0", "zero-shot-1"}
    assert [name for name in before if after[name] == before[name]] == [name for name in before if name != "short-1"]
    assert out.count("kept from before") == 3
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        (label, str(seed)) for seed in (0, 1) for label in ("prompt-tuning", "short", "zero-shot")
    ]
    steps = {row["method"]: (row["steps"], row["trainable_parameters"]) for row in rows}
    assert steps == {"prompt-tuning": ("20", "64"), "short": ("10", "16"), "zero-shot": ("0", "0")}
    assert "left-out" not in (folder / "table.md").read_text()

    code, out, err = pt("compare", recipe, "--seeds", 2, "-o", "grid", "--set", "compare.short.lr=0.01")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == (
        "pt: grid: holds results of something else (compare.short.lr differ). Choose another output folder, or delete this one"
    )
    assert cells(folder) == after
