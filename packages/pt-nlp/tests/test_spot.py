"""SPoT on small random models: where it starts, what is kept of its source, and similarities by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pt_core.artifacts import load
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_nlp.data import TextTask
from pt_nlp.interop import export_peft, import_peft
from pt_nlp.methods.prefix_tuning import PrefixTuning
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.methods.spot import SPoT, SPoTConfig, similarities

Build = Callable[..., nn.Module]
LENGTH = 4
RUN = {"batch_size": 4, "device": "cpu", "progress": False}
ROWS = [
    {"text": f"the {word} was {colour}", "label": label}
    for label, word in (("positive", "film"), ("negative", "news"))
    for colour in ("red", "blue", "green", "great")
]


def task_of(words, **labels: str) -> TextTask:
    rows = [row | {"label": labels.get(row["label"], row["label"])} for row in ROWS]
    return TextTask.from_rows({"train": rows}, words, kind="verbalizer", template="{text} Topic :")


def trained(tiny: Build, words, steps: int = 6, **settings) -> PromptTuning:
    """Prompt tuning after a few steps on the source task."""
    source = PromptTuning(tiny("Llama"), PromptTuningConfig(prompt_length=LENGTH, lr=0.1, **settings))
    if steps:
        source.fit(task_of(words).train, None, FitConfig(max_steps=steps, **RUN))
    return source.eval()


def loss(method: PromptTuning, task: TextTask) -> Tensor:
    with torch.no_grad():
        return method.eval().loss(task.train.batch(range(8))).value


# --- 8. the start -----------------------------------------------------------------------------------------------------
def test_without_source_steps_it_is_prompt_tuning(tiny: Build, words) -> None:
    target = task_of(words, positive="good", negative="bad")
    plain, source = (trained(tiny, words, steps=0) for _ in range(2))
    method = SPoT.from_source(tiny("Llama"), source, SPoTConfig(prompt_length=LENGTH, lr=0.1))
    assert torch.equal(method.prompt.weight, plain.prompt.weight)
    for made in (plain, method):
        made.fit(target.train, None, FitConfig(max_steps=4, **RUN))
    assert torch.equal(method.prompt.weight, plain.prompt.weight)


def test_before_the_first_step_the_target_loss_is_that_of_the_source_prompt(tiny: Build, words) -> None:
    target, source = task_of(words, positive="good", negative="bad"), trained(tiny, words)
    method = SPoT.from_source(source.backbone, source)
    assert method.config.prompt_length == LENGTH and method.count() == LENGTH * 16
    assert torch.equal(loss(method, target), loss(source, target))
    assert loss(method, target) != loss(trained(tiny, words, steps=0), target)
    kept = source.prompt.weight.detach().clone()
    method.fit(target.train, None, FitConfig(max_steps=6, **RUN))
    assert loss(method, target) < loss(source, target)
    assert torch.equal(source.prompt.weight, kept)  # a copy: the source stays what it is


def test_a_saved_source_is_the_start_and_is_not_needed_to_open_what_was_trained(
    tiny: Build, words, tmp_path: Path
) -> None:
    target, source = task_of(words, positive="good", negative="bad"), trained(tiny, words)
    folder = source.save_pretrained(tmp_path / "source", backbone_name="tiny")
    by_name = SPoT(tiny("Llama"), SPoTConfig(prompt_length=LENGTH, source=str(folder)))
    method = SPoT.from_source(tiny("Llama"), folder)
    assert torch.equal(by_name.prompt.weight, source.prompt.weight)
    assert torch.equal(method.prompt.weight, source.prompt.weight)
    by_name.fit(target.train, None, FitConfig(max_steps=2, **RUN))
    saved = by_name.save_pretrained(tmp_path / "target", backbone_name="tiny")
    folder.rename(tmp_path / "gone")
    assert str(tmp_path) not in (saved / "prompt_config.json").read_text("utf-8")
    assert "source" not in json.loads((saved / "prompt_config.json").read_text("utf-8"))["method_config"]
    again = load(saved, tiny("Llama"), strict=True)
    assert type(again) is SPoT
    assert torch.equal(loss(again, target), loss(by_name, target))
    again.fit(target.train, None, FitConfig(max_steps=1, **RUN))  # training goes on
    assert type(load(SPoT.from_source(tiny("Llama"), saved).save_pretrained(tmp_path / "b"), tiny("Llama"))) is SPoT


def test_peft_takes_it_as_prompt_tuning(tiny: Build, words, tmp_path: Path) -> None:
    method = SPoT.from_source(tiny("Llama"), trained(tiny, words))
    again = import_peft(export_peft(method, tmp_path / "peft"), tiny("Llama"))
    assert torch.equal(again.prompt.weight, method.prompt.weight)


def test_a_source_that_cannot_be_is_refused(tiny: Build, words, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'source': there is no source prompt.*SPoT\.from_source"):
        SPoT(tiny("Llama")).fit(task_of(words).train, None, FitConfig(max_steps=1, **RUN))
    source = trained(tiny, words, steps=0)
    with pytest.raises(InputError, match=r"'prompt_length': the source prompt is \[4, 16\], this one \[9, 16\].* 4"):
        SPoT.from_source(tiny("Llama"), source, SPoTConfig(prompt_length=9))
    other = PrefixTuning(tiny("Llama")).save_pretrained(tmp_path / "prefix")
    with pytest.raises(InputError, match="a prompt of prefix-tuning has no rows in front of the input"):
        SPoT.from_source(tiny("Llama"), other)
    wide = source.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="not the backbone that the prompt was trained on"):
        SPoT.from_source(tiny("Llama", hidden_size=32), wide)


def test_the_rows_of_the_source_are_part_of_what_a_run_is(tiny: Build, words) -> None:
    one, other = trained(tiny, words), trained(tiny, words, steps=0)
    first, second, again = (SPoT.from_source(tiny("Llama"), source).run_identity() for source in (one, other, one))
    assert first == again != second
    assert SPoT(tiny("Llama")).run_identity() == {}


# --- 9. similarities --------------------------------------------------------------------------------------------------
def test_similarities_by_hand() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert similarities(one, one)["cosine-concat"] == pytest.approx(1)
    found = similarities(one, other)
    assert found["cosine-concat"] == found["cosine-average"] == pytest.approx(0.70711, abs=1e-5)
    assert found["distance-concat"] == found["distance-average"] == pytest.approx(1 / (1 + 1))
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    found = similarities(a, b)
    assert found["cosine-concat"] == pytest.approx((3 - 4) / (5**0.5 * 13**0.5))
    assert found["cosine-average"] == pytest.approx((1 + 0 + 0 - 1) / 4)
    assert found["distance-concat"] == pytest.approx(1 / (1 + (2**2 + 4**2) ** 0.5))
    assert found["distance-average"] == pytest.approx(1 / (1 + (2 + 5**0.5 + 13**0.5 + 4) / 4))
    assert found["cosine-of-average"] == pytest.approx((0.5 * 1.5 + 1 * -1) / (1.25**0.5 * 3.25**0.5))


def test_the_cosine_of_averages_is_not_the_average_of_cosines() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = similarities(a, a.flip(0))
    assert found["cosine-of-average"] == pytest.approx(1)  # the order of rows does not count
    assert found["cosine-average"] == pytest.approx(0.5)
    assert found["cosine-concat"] == pytest.approx(0)
    with pytest.raises(InputError, match=r"shapes \[2, 2\] and \[2, 3\]"):
        similarities(a, torch.ones(2, 3))


def test_a_prompt_is_most_alike_to_itself(tiny: Build) -> None:
    a, b = (PromptTuning(tiny("Llama"), PromptTuningConfig(seed=s)).prompt.weight for s in (0, 1))
    itself, another = similarities(a, a), similarities(a, b)
    assert [itself[name] for name in ("cosine-concat", "cosine-of-average", "distance-concat")] == pytest.approx(
        [1] * 3
    )
    assert all(itself[name] > another[name] for name in ("cosine-concat", "cosine-of-average", "distance-concat"))
    assert similarities(b, a) == pytest.approx(another)
    with pytest.raises(InputError, match=r"shapes \[20, 16\] and \[5, 16\]"):
        similarities(a, b[:5])
