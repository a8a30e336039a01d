"""MVLPT: many tasks, one prompt; the union of their classes, transfer to a target, and averages over seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pt_core import FitConfig, InputError
from pt_core.artifacts import load_artifact
from pt_core.data import Split
from pt_core.method import Output
from pt_vl import workbench
from pt_vl.method import Stacked, VLMethod
from pt_vl.methods.coop import CoOp, CoOpConfig
from pt_vl.methods.mvlpt import MVLPT, MVLPTConfig, average, union
from pt_vl.methods.upt import UPT, UPTConfig
from pt_vl.methods.vpt import VPT, VPTConfig

TASKS = {"animals": ("cat", "dog", "bird"), "things": ("house", "red car")}


def mvlpt(encoder: Any, **settings: Any) -> MVLPT:
    return MVLPT(encoder, MVLPTConfig(**({"tasks": TASKS, "prompt_length": 2, "hidden": 8, "seed": 3} | settings)))


def images(classes: int, rows: int = 6, seed: int = 0) -> Split:
    pixels = torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    listed = [{"pixels": p, "label": i % classes} for i, p in enumerate(pixels)]
    return Split(listed, Stacked(), metrics=("accuracy",), num_classes=classes)


def both(seed: int = 0) -> Split:
    return union({"animals": images(3, 6, seed), "things": images(2, 4, seed + 10)})


def run(**changes: Any) -> FitConfig:
    plain = {"max_steps": 4, "batch_size": 5, "device": "cpu", "progress": False, "optimiser": "sgd", "log_every": 1}
    return FitConfig(**(plain | changes))


def single(encoder: Any, prompt: str) -> VLMethod:
    """The single-task method with the settings that MVLPT gives it."""
    common: dict[str, Any] = {"class_names": TASKS["animals"], "seed": 3, "lr": 0.002, "prompt_length": 2}
    if prompt == "text":
        return CoOp(encoder, CoOpConfig(position="middle", **common))
    if prompt == "visual":
        return VPT(encoder, VPTConfig(init="uniform", place="after-cls", **common))
    return UPT(encoder, UPTConfig(hidden=8, **common))


@pytest.mark.parametrize("prompt", ["text", "visual", "unified"])
def test_one_source_task_is_the_single_task_method(prompt: str, make_encoder: Callable[..., Any]) -> None:
    method = mvlpt(make_encoder(), prompt=prompt, tasks={"animals": TASKS["animals"]})
    plain = single(make_encoder(), prompt)
    assert method.count() == plain.count()
    mine = method.fit(union({"animals": images(3)}), None, run())
    theirs = plain.fit(images(3), None, run())
    losses = [[row["loss"] for row in result.history] for result in (mine, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", {"prompt_length": 16, "position": "middle"}),
        ("visual", {"prompt_length": 16, "depth": None, "init": "uniform", "place": "after-cls"}),
        ("unified", {"prompt_length": 4, "position": "middle", "hidden": 128, "mixer": "transformer"}),
    ],
)
def test_the_defaults_are_the_published_ones(prompt: str, expected: dict[str, Any], vit_b16: Any) -> None:
    prompted = MVLPT(vit_b16, MVLPTConfig.model_validate({"tasks": TASKS, "prompt": prompt})).prompted
    found = prompted.config.model_dump()
    assert {name: found[name] for name in expected} == expected and found["lr"] == 0.002
    assert {type(prompted)} == {{"text": CoOp, "visual": VPT, "unified": UPT}[prompt]}
    config = MVLPTConfig(tasks=TASKS)
    assert (config.prompt, config.restrict, config.repo_compat) == ("unified", False, False)


def test_the_union_offsets_labels_and_tags_tasks() -> None:
    batch = both().batch(range(10))
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert batch["task"].tolist() == [0] * 6 + [1] * 4
    assert both().ids[6] == "things/0" and both().num_classes == 5


def test_a_union_of_other_tasks_than_the_methods_is_refused(make_encoder: Callable[..., Any]) -> None:
    method = mvlpt(make_encoder())
    turned = union({"things": images(2, 4, 10), "animals": images(3, 6, 0)})
    with pytest.raises(InputError, match="the method's are"):
        method.fit(turned, None, run())
    with pytest.raises(InputError, match="the method's are"):
        method.fit(both(), union({"things": images(2)}), run())  # animals have no validation images
    with pytest.raises(InputError, match="task 'animals' has no rows"):
        union({"animals": None, "things": images(2)})
    with pytest.raises(InputError, match="task 'things' has 3 classes, or is none of `tasks`"):
        union({"things": images(3)}, TASKS)


def test_the_union_is_called_as_its_tasks_are(make_encoder: Callable[..., Any]) -> None:
    parts = {"things": images(2, 4, 10), "animals": images(3, 6, 0)}
    for name, split in parts.items():
        split.class_names = TASKS[name]
    assert union(parts, TASKS).class_names == [*TASKS["animals"], *TASKS["things"]]
    assert mvlpt(make_encoder()).column_names == (*TASKS["animals"], *TASKS["things"])
    assert union({"things": parts["things"]}, TASKS).class_names is None
    parts["things"].class_names = TASKS["things"][::-1]
    with pytest.raises(InputError, match=f"label 3 is {TASKS['things'][1]!r} in the training rows"):
        mvlpt(make_encoder()).fit(union(parts, TASKS), None, run())


def test_with_the_tasks_splits_come_in_any_order_and_may_be_missing(make_encoder: Callable[..., Any]) -> None:
    turned = union({"things": images(2, 4, 10), "animals": images(3, 6, 0)}, TASKS)
    batch = turned.batch(range(10))
    assert batch["labels"].tolist() == [3, 4, 3, 4, 0, 1, 2, 0, 1, 2] and batch["task"].tolist() == [1] * 4 + [0] * 6
    method, some = mvlpt(make_encoder()), union({"animals": None, "things": images(2)}, TASKS)
    assert some.num_classes == 5
    result = method.fit(turned, some, run())
    assert result.metrics.keys() == {"accuracy", "accuracy/things", "loss"}
    assert some.scorer is not None and some.scorer(method.eval(), some, 2)["accuracy"] == result.metrics["accuracy"]


def test_a_class_name_of_two_tasks_has_a_column_in_each(make_encoder: Callable[..., Any]) -> None:
    method = mvlpt(make_encoder(), tasks={"a": ("cat", "dog"), "b": ("tree", "cat")})
    assert method.config.class_names == ("cat", "dog", "tree")
    logits = method(both().batch([0, 1])).logits
    assert logits.shape == (2, 4)
    assert torch.equal(logits[:, 0], logits[:, 3])


def test_the_order_of_tasks_permutes_columns_only(make_encoder: Callable[..., Any]) -> None:
    method = mvlpt(make_encoder())
    turned = mvlpt(make_encoder(), tasks=dict(reversed(TASKS.items())))
    pixels = images(2).batch(range(6))
    expected = method(pixels).logits[:, [3, 4, 0, 1, 2]]
    torch.testing.assert_close(turned(pixels).logits, expected, rtol=1e-5, atol=1e-5)
    swapped = union({"things": images(2, 4, 10), "animals": images(3, 6, 0)})
    scores, again = both().scorer(method, both(), 3), swapped.scorer(turned, swapped, 2)  # type: ignore[misc]
    assert scores == pytest.approx(again)


def test_rows_of_the_only_task_need_not_name_it_to_be_restricted(make_encoder: Callable[..., Any]) -> None:
    found = []
    for restrict in (False, True):
        method = mvlpt(make_encoder(), tasks={"all": TASKS["animals"]}, prompt="text", restrict=restrict)
        method.fit(images(3), images(3, seed=1), run())
        found.append(method.trained_state()["prompted.context"])
    assert torch.equal(*found)
    with pytest.raises(
        InputError, match="field 'task': `restrict` needs the task of every row. Give rows of a `union`"
    ):
        mvlpt(make_encoder(), prompt="text", restrict=True).fit(images(5), None, run())


def test_restricting_masks_with_minus_infinity(make_encoder: Callable[..., Any]) -> None:
    by_hand = {"labels": torch.tensor([0]), "task": torch.tensor([0])}
    for compat, expected in ((False, 0.3133), (True, 0.4076)):
        other = mvlpt(make_encoder(), tasks={"a": ("cat", "dog"), "b": ("tree",)}, restrict=True, repo_compat=compat)
        loss = other.loss_of(Output(torch.tensor([[2.0, 1.0, 5.0]])), by_hand)
        assert float(loss.value) == pytest.approx(expected, abs=1e-4)
    method = mvlpt(make_encoder(), restrict=True)
    batch = both().batch(range(10))
    logits = method(batch).logits
    expected = F.cross_entropy(logits[:6, :3], batch["labels"][:6], reduction="sum")
    expected = expected + F.cross_entropy(logits[6:, 3:], batch["labels"][6:] - 3, reduction="sum")
    torch.testing.assert_close(method.loss(batch).total, expected)
    open_method = mvlpt(make_encoder())
    torch.testing.assert_close(
        open_method.loss(batch).total, F.cross_entropy(open_method(batch).logits, batch["labels"], reduction="sum")
    )


def test_validation_is_the_mean_of_accuracies_among_each_tasks_own_classes(make_encoder: Callable[..., Any]) -> None:
    method, split = mvlpt(make_encoder()), both()
    scores = split.scorer(method, split, 4)  # type: ignore[misc]
    logits, labels = method(split.batch(range(10))).logits, split.batch(range(10))["labels"]
    animals = float((logits[:6, :3].argmax(1) == labels[:6]).float().mean())
    things = float((logits[6:, 3:].argmax(1) + 3 == labels[6:]).float().mean())
    assert scores == pytest.approx(
        {"accuracy": (animals + things) / 2, "accuracy/animals": animals, "accuracy/things": things}
    )
    published = method.published(both())
    assert (published.monitor, published.keep_best, published.epochs) == ("accuracy", True, 200)
    result = method.fit(both(), both(5), run(monitor="accuracy", evaluate_every=2))
    assert set(result.metrics) == {"loss", "accuracy", "accuracy/animals", "accuracy/things"}


def test_averages_of_prompts() -> None:
    state = {"prompted.context": torch.randn(2, 3)}
    torch.testing.assert_close(average([state, state, state])["prompted.context"], state["prompted.context"])
    negative = {name: -value for name, value in state.items()}
    assert not average([state, negative])["prompted.context"].any()
    with pytest.raises(InputError, match="different forms"):
        average([state, {"prompted.context": torch.randn(3, 3)}])


@pytest.mark.parametrize("prompt", ["text", "visual", "unified"])
def test_a_target_with_other_classes_starts_from_the_shared_prompt(
    prompt: str, make_encoder: Callable[..., Any]
) -> None:
    source = mvlpt(make_encoder(), prompt=prompt)
    source.fit(both(), None, run())
    target = source.for_target(("tree", "pet", "house", "bird"))
    assert target.trained_state().keys() == source.prompted.trained_state().keys()
    for name, tensor in target.trained_state().items():
        assert torch.equal(tensor, source.prompted.trained_state()[name])
    of_target = target.published(images(4))
    assert (of_target.epochs, of_target.batch_size, of_target.keep_best) == (200, 32, True)
    assert (of_target.optimiser, of_target.schedule, target.config.lr) == ("sgd", "epoch-cosine", 0.002)
    pixels = images(2).batch(range(3))
    torch.testing.assert_close(target(pixels).logits[:, 2], source(pixels).logits[:, 3], rtol=1e-4, atol=1e-4)
    group = source.for_group({"first": ("tree", "pet"), "second": ("house", "bird")})
    torch.testing.assert_close(group(pixels).logits, target(pixels).logits, rtol=1e-4, atol=1e-4)


def test_one_loss_reaches_both_prompts_through_the_mixer_only(make_encoder: Callable[..., Any]) -> None:
    for mixer, coupled in (("transformer", True), ("identity", False)):
        method = mvlpt(make_encoder(), mixer=mixer)
        method.encode_text().square().sum().backward()
        assert (method.prompted.visual.grad is not None) is coupled


def test_a_prompt_whose_tasks_share_a_class_is_not_opened_for_one_list_of_names(
    make_encoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workbench, "load_backbone", lambda *names: make_encoder())
    for tasks, opens in ((TASKS, True), ({"a": ("cat", "dog"), "b": ("cat", "tree")}, False)):
        method = mvlpt(make_encoder(), tasks=tasks)
        saved = method.save_pretrained(tmp_path / str(opens), backbone_name="tiny", task={"templates": ["{}"]})
        if opens:
            assert workbench.open_artifact(load_artifact(saved)).spec.class_names == method.config.class_names
        else:
            with pytest.raises(
                InputError, match="answers for the 4 classes of its tasks, some of which are there twice"
            ):
                workbench.open_artifact(load_artifact(saved))


def test_tasks_that_cannot_be_told_apart_are_refused(make_encoder: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="the class names of a task must differ"):
        MVLPTConfig(tasks={"a": ("cat", "cat")})
    with pytest.raises(InputError, match="does not say how many classes"):
        union({"a": images(2), "b": Split([{"label": 0}], Stacked())})
    with pytest.raises(InputError, match="belongs to its own classes"):
        mvlpt(make_encoder()).with_classes(("cat", "dog"))
