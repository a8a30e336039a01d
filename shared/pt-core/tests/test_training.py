"""Training does what its configuration says: batches, accumulation, rates, early stopping, logs, warnings, refusals."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pt_core import evaluation, metrics, training
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.method import Loss, Method, Output
from pt_core.plan import BatchPlan, FitConfig, lr_factor
from pt_core.testing import SHORT, Killed, TinyPrompt, TinyPromptConfig, one_thread, tiny, tiny_split
from pt_core.training import Loop, NonFiniteLoss, NotLearning, fit


@pytest.fixture(autouse=True)
def few_threads():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def short_runs_learn_little():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotLearning)
        yield


def config(**changes) -> FitConfig:
    changes = {"max_steps": None} | changes if "epochs" in changes else changes
    return FitConfig.model_validate(SHORT.model_dump() | changes)


class Line(Method):
    """y = w x + b by squared error: everything can be worked out by hand."""

    name = "line"

    def __init__(self, backbone, config=None):
        super().__init__(backbone, config)
        self.w = nn.Parameter(torch.zeros(1))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return Output(logits=(self.w * batch["x"] + self.b)[:, None])

    def loss(self, batch):
        return Loss(((self.forward(batch).logits[:, 0] - batch["labels"]) ** 2).sum(), len(batch["x"]))

    def parameter_groups(self):
        return [{"name": "w", "params": [self.w], "lr": 0.5}, {"name": "b", "params": [self.b]}]


def line() -> Line:
    return Line(nn.Identity())


def pairs(x: list[float], y: list[float], **more) -> Split:
    def collate(rows):
        return {"x": torch.tensor([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}

    return Split(list(zip(x, y, strict=True)), collate, task="regression", **more)


# --- configuration --------------------------------------------------------------------------------------------------
def test_a_run_has_one_length():
    for wrong in ({}, {"max_steps": 3, "epochs": 1}):
        with pytest.raises(ValueError, match="exactly one of max_steps and epochs"):
            FitConfig(**wrong)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        FitConfig(max_steps=3, batchsize=4)


@pytest.mark.parametrize(
    ("field", "given"),
    [("max_steps", True), ("batch_size", True), ("lr", True), ("min_delta", False)],
)
def test_true_and_false_are_no_numbers(field, given):
    with pytest.raises(ValueError, match=f"{field}\n.*true and false are no value of this setting"):
        FitConfig(**{"max_steps": 3} | {field: given})
    with pytest.raises(ValueError, match="monitor\n.*valid string"):  # whose remedy, in a recipe, is to quote it
        FitConfig(max_steps=3, monitor=True)


def test_whole_numbers_may_be_rates_and_switches_stay_switches():
    run = FitConfig.model_validate(
        {"max_steps": 3, "lr": 1, "min_delta": "1e-3", "keep_best": False, "progress": False}
    )
    assert (run.lr, run.min_delta, run.keep_best, run.progress) == (1.0, 0.001, False, False)


def test_epochs_count_short_last_batches():
    result = fit(line(), pairs([1.0] * 10, [1.0] * 10), config=config(epochs=3, batch_size=4))
    assert result.steps == 9


# --- schedules and groups -------------------------------------------------------------------------------------------
def test_exponential_ends_at_a_hundredth():
    run = config(schedule="exponential", max_steps=100)
    factors = [lr_factor(run, step, 100) for step in range(100)]
    gamma = 0.01 ** (1 / 99)
    assert round(gamma, 6) == 0.954548
    assert factors[0] == 1
    assert factors[1] == pytest.approx(0.954548, abs=5e-7)
    assert factors[50] == pytest.approx(gamma**50)
    assert factors[99] == pytest.approx(0.01)


def test_linear_cosine_constant_and_warm_up():
    linear = config(schedule="linear", warmup_steps=4)
    assert [lr_factor(linear, s, 12) for s in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert [lr_factor(linear, s, 12) for s in (4, 6, 8, 11)] == [1.0, 0.75, 0.5, 0.125]
    cosine = config(schedule="cosine")
    assert lr_factor(cosine, 0, 8) == 1
    assert lr_factor(cosine, 2, 8) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert lr_factor(cosine, 4, 8) == pytest.approx(0.5)
    assert lr_factor(config(schedule="constant"), 7, 8) == 1
    warm = config(schedule="exponential", warmup_steps=10)
    assert lr_factor(warm, 9, 110) == 1
    assert lr_factor(warm, 10, 110) == 1
    assert lr_factor(warm, 109, 110) == pytest.approx(0.01)


def test_epoch_cosine_starts_at_a_fixed_rate_and_steps_once_an_epoch():
    run = config(max_steps=None, epochs=5, schedule="epoch-cosine")
    published = [1e-5, 1, 0.9045, 0.6545, 0.3455]
    assert [lr_factor(run, step, 5) for step in range(5)] == pytest.approx(published, abs=5e-5)
    three_an_epoch = [lr_factor(run, step, 15) for step in range(15)]
    assert three_an_epoch == pytest.approx([factor for factor in published for _ in range(3)], abs=5e-5)
    assert 0.002 * lr_factor(run, 0, 5, lr=0.002) == pytest.approx(1e-5)
    assert lr_factor(run, 1, 5, lr=0.002) == 1
    history = fit(line(), pairs([1.0] * 4, [1.0] * 4), config=run.model_copy(update={"log_every": 1})).history
    assert [row["lr/w"] for row in history] == pytest.approx([1e-5, *(0.5 * f for f in published[1:])], abs=5e-5)


def test_the_plain_epoch_cosine_starts_at_the_whole_rate():
    run = config(max_steps=None, epochs=3, schedule="epoch-cosine-plain")
    assert [lr_factor(run, step, 9) for step in range(9)] == pytest.approx([1.0] * 3 + [0.75] * 3 + [0.25] * 3)


@pytest.mark.parametrize("schedule", ["epoch-cosine", "epoch-cosine-plain"])
def test_epoch_cosine_without_epochs_is_refused(schedule):
    with pytest.raises(ValidationError, match=f"{schedule} needs epochs"):
        config(schedule=schedule)

    class Scheduled(Line):
        def parameter_groups(self):
            return [group | {"schedule": schedule} for group in super().parameter_groups()]

    with pytest.raises(InputError, match="Give epochs, not max_steps"):
        Loop(Scheduled(nn.Identity()), config(), total_steps=1)


def test_sgd_has_momentum_and_others_refuse_it():
    method = line()
    run = config(max_steps=3, lr=0.01, optimiser="sgd", momentum=0.9, max_grad_norm=None)
    fit(method, pairs([1.0] * 4, [1.0] * 4), config=run)
    w = b = speed = 0.0
    for _ in range(3):
        speed = 0.9 * speed + 2 * (w + b - 1)
        w, b = w - 0.5 * speed, b - 0.01 * speed
    assert (method.w.item(), method.b.item()) == pytest.approx((w, b), rel=1e-5)
    with pytest.raises(ValidationError, match="momentum is a setting of sgd"):
        config(momentum=0.9)


def test_groups_have_their_own_rates_under_one_schedule():
    method = line()
    run = config(max_steps=3, lr=0.01, schedule="linear", optimiser="sgd", max_grad_norm=None, log_every=1)
    history = fit(method, pairs([1.0] * 4, [1.0] * 4), config=run).history
    assert [row["lr/w"] for row in history] == pytest.approx([0.5, 0.5 * 2 / 3, 0.5 / 3])
    assert [row["lr/b"] for row in history] == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])
    w = b = 0.0
    for factor in (1, 2 / 3, 1 / 3):
        slope = 2 * (w + b - 1)  # d/dw = d/db of the mean squared error, all x are 1
        w, b = w - 0.5 * factor * slope, b - 0.01 * factor * slope
    assert (method.w.item(), method.b.item()) == pytest.approx((w, b), rel=1e-5)


def test_a_group_may_name_its_own_schedule():
    class Scheduled(Line):
        def parameter_groups(self):
            w, b = super().parameter_groups()
            return [w | {"schedule": "exponential"}, b]

    def rates(method, **changes):
        run = config(max_steps=6, lr=0.1, schedule="linear", warmup_steps=2, log_every=1, **changes)
        history = fit(method, pairs([1.0] * 4, [1.0] * 4), config=run).history
        return [row["lr/w"] for row in history], [row["lr/b"] for row in history]

    w, b = rates(Scheduled(nn.Identity()))
    assert w == pytest.approx([0.25, 0.5, 0.5, 0.5 * 0.01 ** (1 / 3), 0.5 * 0.01 ** (2 / 3), 0.005])
    assert b == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    assert rates(line())[0] == pytest.approx([5 * rate for rate in b])
    run = config(schedule="cosine")
    for schedule in ("constant", "linear", "cosine", "exponential"):
        assert lr_factor(run, 3, 8, schedule) == lr_factor(config(schedule=schedule), 3, 8)
    assert lr_factor(run, 3, 8) == lr_factor(run, 3, 8, "cosine")


def test_a_schedule_that_is_none_is_refused_before_the_first_step():
    class Scheduled(Line):
        def optimisers(self, config):
            return {"main": torch.optim.SGD([{"params": [self.w, self.b], "schedule": "steps"}], lr=0.1)}

    with pytest.raises(InputError, match=r"schedule 'steps'.*Choose one of: constant, linear, cosine, exponential"):
        Loop(Scheduled(nn.Identity()), config(), total_steps=1)


def test_a_rate_without_effect_is_refused():
    _, method = tiny()
    with pytest.raises(InputError, match=r"names the rates of all its groups.*method's configuration"):
        fit(method, tiny_split(4), config=config(lr=0.3))


def test_a_parameter_in_two_groups_is_refused():
    class Twice(Line):
        def parameter_groups(self):
            return [{"name": "first", "params": [self.w]}, {"name": "second", "params": [self.b, self.w]}]

    with pytest.raises(InputError, match="twice in the groups of one optimiser: 'first' and 'second'"):
        fit(Twice(nn.Identity()), pairs([1.0], [1.0]), config=config())


def test_gradients_are_cut_to_their_global_norm():
    method = line()
    loop = Loop(method, config(optimiser="sgd", lr=1.0, max_grad_norm=2.0), total_steps=1)
    batch = pairs([3.0], [-1.0]).batch([0])
    for _ in loop.steps():
        loop.backward(method.loss(batch), batch)
        norm = loop.update()
    slope = torch.tensor([2.0 * 3.0, 2.0])  # of (0 + 1)^2 by w and b
    assert float(norm) == pytest.approx(math.hypot(6, 2))
    moved = torch.cat([method.w / 0.5, method.b / 1.0])
    torch.testing.assert_close(-moved.detach(), slope * 2 / math.hypot(6, 2))


def test_an_update_may_be_cut_otherwise_than_the_run_says():
    def moved(run_norm, **changes):
        method, batch = line(), pairs([3.0], [-1.0]).batch([0])
        loop = Loop(method, config(optimiser="sgd", lr=1.0, max_grad_norm=run_norm), total_steps=1)
        for _ in loop.steps():
            loop.backward(method.loss(batch), batch)
            assert float(loop.update(**changes)) == pytest.approx(math.hypot(6, 2))
        return math.hypot(method.w.item() / 0.5, method.b.item())

    assert moved(2.0) == pytest.approx(2)
    assert moved(2.0, max_grad_norm=0.5) == pytest.approx(0.5)
    assert moved(2.0, max_grad_norm=None) == pytest.approx(math.hypot(6, 2))
    assert moved(None, max_grad_norm=0.5) == pytest.approx(0.5)
    assert moved(None) == pytest.approx(math.hypot(6, 2))


# --- batches and accumulation ---------------------------------------------------------------------------------------
def test_an_epoch_has_every_row_once_and_epochs_differ():
    plan = BatchPlan(11, 4, seed=3)
    epochs = [[plan.batch(3 * e + i) for i in range(3)] for e in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 3]
        assert sorted(row for batch in epoch for row in batch) == list(range(11))
    assert epochs[0] != epochs[1] != epochs[2]
    assert BatchPlan(11, 4, seed=3).batch(7) == epochs[2][1]
    assert BatchPlan(11, 4, seed=4).batch(0) != epochs[0][0]


def test_bucketed_batches_are_of_like_length_and_complete():
    lengths = [(7 * i) % 100 for i in range(1000)]
    plan = BatchPlan(1000, 10, seed=0, lengths=lengths)
    batches = [plan.batch(i) for i in range(100)]
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / 100 < 3
    shortest = [min(lengths[i] for i in batch) for batch in batches[:50]]
    rising = sum(a <= b for a, b in itertools.pairwise(shortest))
    assert 10 < rising < 39  # of 49: sorted batches would go from the short to the long
    plain = BatchPlan(1000, 10, seed=0)
    assert (
        sum(max(lengths[i] for i in plain.batch(b)) - min(lengths[i] for i in plain.batch(b)) for b in range(100))
        > 6000
    )


def test_bucketing_needs_lengths():
    with pytest.raises(InputError, match="no lengths"):
        fit(line(), pairs([1.0], [1.0]), config=config(bucket_by_length=True))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_accumulation_equals_the_large_batch(size):
    """Rows have 1 to 5 terms each, so that a mean of means would be off."""
    train, run = tiny_split(13), {"batch_size": 7, "max_steps": 5, "optimiser": "sgd", "log_every": 1}
    counts = [int(tiny()[1].loss(train.batch([i])).count) for i in range(13)]
    assert len(set(counts)) > 2
    whole, parts = tiny()[1], tiny()[1]
    large = fit(whole, train, config=config(**run))
    small = fit(parts, train, config=config(micro_batch_size=size, **run))
    for name, tensor in whole.trained_state().items():
        torch.testing.assert_close(parts.trained_state()[name], tensor, rtol=1e-5, atol=1e-6)
    for one, other in zip(large.history, small.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
        assert one["twice"] == pytest.approx(2 * one["loss"])


def test_a_loss_that_couples_rows_refuses_accumulation():
    class Coupled(TinyPrompt):
        def loss(self, batch):
            return Loss.mean(super().loss(batch).value)

    def method():
        return Coupled(tiny()[0])

    fit(method(), tiny_split(8), config=config())
    with pytest.raises(InputError, match=r"couples the rows.*micro_batch_size to batch_size"):
        fit(method(), tiny_split(8), config=config(micro_batch_size=2))


def test_a_loss_that_depends_on_nothing_trained_is_refused():
    class Detached(TinyPrompt):
        def loss(self, batch):
            loss = super().loss(batch)
            return Loss(loss.total.detach(), loss.count)

    with pytest.raises(InputError, match="does not depend on anything that is trained"):
        fit(Detached(tiny()[0]), tiny_split(4), config=config())


def test_update_needs_a_gradient():
    loop = Loop(line(), config(), total_steps=1)
    with pytest.raises(RuntimeError, match=r"update\(\) without backward\(\)"):
        loop.update()


def test_optimisers_step_together_or_alone():
    class Two(Line):
        def optimisers(self, config):
            return {"w": torch.optim.SGD([self.w], lr=0.1), "b": torch.optim.SGD([self.b], lr=0.1)}

    method, batch = Two(nn.Identity()), pairs([1.0, 1.0], [1.0, 1.0]).batch([0, 1])
    loop = Loop(method, config(max_grad_norm=None), total_steps=3)
    seen = []
    for step in loop.steps():
        loop.backward(method.loss(batch), batch)
        loop.update(*{1: ("w",), 2: ("w", "b"), 3: ()}[step])
        seen.append((method.w.item(), method.b.item()))
    # The slope of the mean is 2 (w + b - 1) for both; what reached b in the first step is dropped.
    assert seen[0] == pytest.approx((0.2, 0.0))
    assert seen[1] == pytest.approx((0.2 + 0.16, 0.16))
    assert seen[2] == pytest.approx((0.36 + 0.096, 0.16 + 0.096))


class Duo(Line):
    """Two optimisers with losses of their own: of w a squared error with a part, of b a coupled one."""

    def optimisers(self, config):
        w = {"params": [self.w], "lr": 0.1, "schedule": "linear"}
        return {"w": torch.optim.Adam([w]), "b": torch.optim.SGD([self.b], lr=0.1)}

    def loss_of_w(self, batch):
        loss = ((self.w * batch["x"] - batch["labels"]) ** 2).sum()
        return Loss(loss, len(batch["x"]), {"twice": 2 * loss.detach()})

    def loss_of_b(self):
        return Loss.mean(((self.b - torch.rand(())) ** 2).sum())

    def epoch(self, loop, parts):
        """An update of w by each of the parts, in micro-batches of one row, each followed by two updates of b."""
        for part in parts:
            for i in range(len(part["x"])):
                row = {key: value[i : i + 1] for key, value in part.items()}
                loop.backward(self.loss_of_w(row), row)
            loop.update("w", max_grad_norm=None)
            for _ in range(2):
                loop.backward(self.loss_of_b())
                loop.update("b")


def test_a_step_may_have_many_updates_of_several_optimisers():
    split = pairs([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])
    parts = [split.batch([0, 1]), split.batch([2])]
    method = Duo(nn.Identity())
    loop = Loop(method, config(max_steps=3, log_every=2), total_steps=3)
    by_hand = nn.Parameter(torch.zeros(1))
    adam, losses = torch.optim.Adam([by_hand]), []
    for step in loop.steps():
        adam.param_groups[0]["lr"] = 0.1 * (1 - (step - 1) / 3)
        method.epoch(loop, parts)
        for part in parts:
            loss = ((by_hand * part["x"] - part["labels"]) ** 2).mean()
            losses.append(float(loss) * len(part["x"]))
            adam.zero_grad()
            loss.backward()
            adam.step()
    torch.testing.assert_close(method.w.detach(), by_hand.detach())
    assert [row["step"] for row in loop.history] == [2, 3]
    for row, of_w in zip(loop.history, (losses[:4], losses[4:]), strict=True):
        # The mean of a part is over the losses that have it, not over all of the step.
        assert row["twice"] == pytest.approx(2 * sum(of_w) / (3 * len(of_w) / 2), rel=1e-5)
    assert [row["lr/w/0"] for row in loop.history] == pytest.approx([0.2 / 3, 0.1 / 3])
    assert [row["lr/b/0"] for row in loop.history] == [0.1, 0.1]


def test_a_run_of_many_updates_a_step_resumes_to_the_same_result(tmp_path):
    split = pairs([1.0, 2.0, 3.0], [1.0, 1.0, 2.0])
    parts = [split.batch([0, 1]), split.batch([2])]

    def run(folder, killed_in=None):
        method = Duo(nn.Identity())
        loop = Loop(method, config(max_steps=5, checkpoint_every=1, log_every=2), folder, total_steps=5)
        for step in loop.steps():
            method.epoch(loop, parts if step != killed_in else parts[:1])
            if step == killed_in:
                break
        return method, loop.history

    whole, rows = run(tmp_path / "whole")
    run(tmp_path / "killed", killed_in=4)
    resumed, again = run(tmp_path / "killed")
    assert torch.equal(resumed.w, whole.w)
    assert torch.equal(resumed.b, whole.b)
    assert again == rows


def test_only_a_loss_that_couples_rows_must_be_alone_in_its_update():
    method, batch = Duo(nn.Identity()), pairs([1.0], [1.0]).batch([0])
    loop = Loop(method, config(), total_steps=1)
    loop.backward(method.loss_of_b())
    loop.update("b")
    loop.backward(method.loss_of_w(batch))
    loop.backward(method.loss_of_w(batch))
    loop.update("w")
    loop.backward(method.loss_of_b())
    with pytest.raises(InputError, match="couples the rows"):
        loop.backward(method.loss_of_w(batch))


# --- random numbers and precision -----------------------------------------------------------------------------------
def test_evaluation_does_not_disturb_training():
    """Random numbers of a step follow from its number, so those that evaluation draws change nothing."""

    class Restless(TinyPrompt):
        def forward(self, batch):
            torch.rand(7), random.random(), np.random.rand()
            return super().forward(batch)

    def run(every):
        method = Restless(tiny()[0], TinyPromptConfig(noise=0.5))
        fit(method, tiny_split(8), tiny_split(4, 1), config(evaluate_every=every, keep_best=False))
        return method.prompt.weight

    assert torch.equal(run(1), run(6))


def test_bf16_runs_passes_in_bf16_and_keeps_float32():
    seen = []

    class Watched(TinyPrompt):
        def logits(self, batch):
            with self.handle.active():
                seen.append(self.backbone(batch["input_ids"]).dtype)
            return super().logits(batch)

    method = Watched(tiny()[0])
    fit(method, tiny_split(8), tiny_split(4, 1), config(precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert method.prompt.weight.dtype == torch.float32
    exact = tiny()[1]
    fit(exact, tiny_split(8), tiny_split(4, 1), config())
    gap = (method.prompt.weight - exact.prompt.weight).abs().max()
    assert 0 < gap.item() < 0.2


# --- evaluation and early stopping ----------------------------------------------------------------------------------
def test_evaluation_is_over_the_whole_split_and_its_terms():
    _, method = tiny()
    split = tiny_split(7)
    whole = evaluate(method, split, batch_size=7)
    assert evaluate(method, split, batch_size=2) == pytest.approx(whole, rel=1e-5)
    method.eval()
    losses = [method.loss(split.batch([i])) for i in range(7)]
    assert whole["loss"] == pytest.approx(float(sum(x.total for x in losses) / sum(x.count for x in losses)), rel=1e-5)
    answers = torch.cat([method(split.batch([i])).logits.argmax(1) for i in range(7)])
    assert whole["accuracy"] == float((answers == split.batch(range(7))["labels"]).double().mean())


def test_evaluation_puts_the_mode_back_and_passes_missing_labels_on(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "evaluate_logits", lambda *a: seen.append(a) or {"accuracy": 0.25})
    method = line().train()
    split = pairs([1.0, 2.0, 3.0], [1.0, 0.0, 1.0], metrics=("mae",), missing=-9)
    assert evaluate(method, split, batch_size=2) == {"loss": pytest.approx(2 / 3), "accuracy": 0.25}
    assert method.training
    names, task, logits, labels, missing = seen[0]
    assert (names, task, missing) == (("mae",), "regression", -9)
    assert (logits.shape, labels.tolist()) == ((3, 1), [1.0, 0.0, 1.0])


def recorded(values, metric="accuracy", **changes) -> tuple[Loop, Line]:
    """A loop that saw these values, one in each step; the prompt is the number of the step."""
    method = line()
    loop = Loop(method, config(max_steps=len(values), **changes), total_steps=len(values))
    for step, value in zip(loop.steps(), values, strict=False):
        method.w.data.fill_(step)
        loop.record({metric: value})
    return loop, method


def test_early_stopping_by_patience_and_min_delta():
    values = [0.5, 0.55, 0.59, 0.595, 0.9, 0.91]
    loop, method = recorded(values, patience=3, min_delta=0.1)
    assert (loop.state.step, loop.state.best_step, loop.state.stopped) == (4, 1, True)
    result = loop.finish()
    assert (result.metrics, result.best_step, result.steps) == ({"accuracy": 0.5}, 1, 4)
    assert result.stopped_early
    assert float(method.w) == 1
    loop, _ = recorded(values, patience=4, min_delta=0.1)
    assert (loop.state.step, loop.state.best_step, loop.state.stopped) == (6, 5, False)
    loop, _ = recorded(values, patience=3)
    assert (loop.state.step, loop.state.best_step, loop.state.stopped) == (6, 6, False)


def test_the_last_step_of_a_run_that_stops_early_has_its_loss_logged():
    run = config(max_steps=30, evaluate_every=5, log_every=7, patience=1, min_delta=100.0)
    result = fit(tiny()[1], tiny_split(8), tiny_split(4, 1), run)
    assert (result.stopped_early, result.steps) == (True, 10)
    assert [row["step"] for row in result.history if "loss" in row] == [7, 10]


def test_losses_and_errors_are_better_when_smaller():
    for metric in ("loss", "rmse", "calibration-error"):
        assert recorded([3.0, 1.0, 2.0], metric)[0].finish().best_step == 2
    assert recorded([3.0, 1.0, 2.0], "pearson")[0].finish().best_step == 1


def test_nan_is_never_the_best():
    loop, method = recorded([math.nan, 0.2, math.nan, 0.1], patience=3)
    assert (loop.state.best_step, loop.finish().metrics) == (2, {"accuracy": 0.2})
    assert float(method.w) == 2
    assert [row.get("validation/accuracy") for row in loop.history] == [None, 0.2, None, 0.1]
    loop, method = recorded([math.nan] * 3)
    assert loop.finish().best_step == 3
    assert float(method.w) == 3


def test_a_hopeless_run_is_interrupted():
    assert recorded([0.5, 0.06, 0.9], interrupt_below=0.07)[0].state.step == 2
    assert recorded([0.5, 0.08, 0.9], interrupt_below=0.07)[0].state.step == 3
    assert recorded([2.0, 5.0, 1.0], "loss", interrupt_below=4.0)[0].state.step == 2
    assert recorded([0.5, math.nan, 0.9], interrupt_below=0.07)[0].state.step == 2


def test_without_keep_best_the_last_prompt_and_its_metrics_stay():
    loop, method = recorded([0.5, 0.9, 0.7], keep_best=False)
    result = loop.finish()
    assert (result.best_step, result.metrics, float(method.w)) == (3, {"accuracy": 0.7}, 3)


def test_monitor_names_a_metric_and_is_checked_before_the_first_step():
    method, train, validation = tiny()[1], tiny_split(8), tiny_split(4, 1)
    result = fit(method, train, validation, config(monitor="accuracy", patience=1, evaluate_every=1, max_steps=30))
    values = [row["validation/accuracy"] for row in result.history if "validation/accuracy" in row]
    assert result.metrics["accuracy"] == max(values)
    before = method.prompt.weight.detach().clone()
    with pytest.raises(
        InputError, match=r"'macro-f1'.*not among the validation metrics\. Choose one of: accuracy, loss"
    ):
        fit(method, train, validation, config(monitor="macro-f1"))
    assert torch.equal(method.prompt.weight, before)


@pytest.mark.parametrize("setting", [{"patience": 2}, {"interrupt_below": 0.1}], ids=str)
def test_what_stops_by_validation_needs_validation(setting):
    method = tiny()[1]
    with pytest.raises(InputError, match=f"field '{next(iter(setting))}': there are no validation rows to stop by"):
        fit(method, tiny_split(8), None, config(**setting))
    assert fit(method, tiny_split(8), tiny_split(4, 1), config(**setting)).steps > 0


def test_a_scorer_gives_the_metrics_and_their_names():
    validation = tiny_split(4, 1)
    validation.scorer = lambda method, split, batch_size: {"exact-match": float(len(split))}
    result = fit(tiny()[1], tiny_split(8), validation, config(monitor="exact-match"))
    assert result.metrics["exact-match"] == 4.0
    assert set(result.metrics) == {"loss", "exact-match"}
    with pytest.raises(InputError, match="Choose one of: accuracy, exact-match, loss"):
        fit(tiny()[1], tiny_split(8), validation, config(monitor="bleu"))
    asked = []
    validation.scorer = lambda method, split, batch_size: (
        asked.append((len(split), method.training, torch.is_grad_enabled())) or {"exact-match": 1.0}
    )
    fit(tiny()[1], tiny_split(8), validation, config(monitor="exact-match"))
    assert asked[0] == (1, False, False) and {ask[1:] for ask in asked} == {(False, False)}


@pytest.mark.parametrize("free", [True, False])
def test_evaluation_runs_one_pass_where_the_loss_follows_from_the_outputs(free):
    passes = 0

    class Counted(Line):
        loss = Method.loss  # `loss_of` below is the class's own way

        def forward(self, batch):
            nonlocal passes
            passes += 1
            return super().forward(batch)

    class FromOutputs(Counted):
        def loss_of(self, output, batch):
            return Loss(((output.logits[:, 0] - batch["labels"]) ** 2).sum(), len(output.logits)) if free else None

        if not free:
            loss = Line.loss

    split = pairs([1.0, 2.0, 3.0, 4.0], [1, 0, 1, 2], metrics=("mae",))
    assert evaluate(FromOutputs(nn.Identity()), split, batch_size=2)["loss"] == 1.5
    assert passes == (2 if free else 4)
    assert (Line.loss_comes_from(), Counted.loss_comes_from(), FromOutputs.loss_comes_from()) == (
        "batch",
        None,
        "output",
    )


def test_a_loss_that_a_subclass_overrides_is_the_one_that_is_evaluated():
    class FromOutputs(Line):
        loss = Method.loss

    class Given(FromOutputs):
        def loss_of(self, output, batch):
            return Loss(output.logits.sum() * 0 + 1.0, 1)

    class Doubled(Given):
        def loss(self, batch):
            return Loss(super().loss(batch).total * 2, 1)

    split = pairs([1.0, 2.0], [1, 0], metrics=("mae",))
    assert evaluate(Given(nn.Identity()), split)["loss"] == 1.0
    assert evaluate(Doubled(nn.Identity()), split)["loss"] == 2.0


def test_a_method_without_a_loss_is_monitored_by_its_first_metric():
    class Own(TinyPrompt):
        loss = Method.loss

        def fit(self, train, validation=None, config=None, output_dir=None):
            loop = Loop(self, config, total_steps=2)
            for _ in loop.steps():
                loop.backward(TinyPrompt.loss(self, train.batch([0, 1])))
                loop.update()
                loop.record(loop.evaluate(validation))
            return loop.finish()

    result = Own(tiny()[0]).fit(tiny_split(4), tiny_split(4, 1), config())
    assert set(result.metrics) == {"accuracy"}


def test_a_method_that_trains_nothing_is_only_evaluated(tmp_path):
    class Fixed(TinyPrompt):
        trains = False

    method = Fixed(tiny()[0])
    method.requires_grad_(False)
    result = fit(method, tiny_split(4), tiny_split(4, 1), config(), tmp_path / "run")
    assert (result.steps, result.history, set(result.metrics)) == (0, [], {"accuracy"})


# --- logs -----------------------------------------------------------------------------------------------------------
def test_metrics_jsonl_has_the_mean_over_terms_since_the_last_row(tmp_path):
    train = pairs([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    run = {"lr": 0.1, "max_steps": 5, "batch_size": 2, "evaluate_every": 4}
    each = fit(line(), train, config=config(log_every=1, **run)).history
    result = fit(line(), train, train, config(log_every=2, **run), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["step"] for row in rows] == [2, 4, 4, 5, 5]
    trained = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "loss" not in row]
    assert all(set(row) == {"step", "loss", "lr/w", "lr/b"} for row in trained)
    assert all(set(row) == {"step", "validation/loss"} for row in validation)
    losses = [row["loss"] for row in each]  # batches of 2, 1, 2, 1, 2 rows
    means = [(2 * losses[0] + losses[1]) / 3, (2 * losses[2] + losses[3]) / 3, losses[4]]
    assert [row["loss"] for row in trained] == pytest.approx(means)


def test_values_that_are_not_finite_are_no_json_and_left_out(tmp_path):
    loop = Loop(line(), config(), tmp_path, total_steps=1)
    loop.log({"a": math.nan, "b": math.inf, "c": 1.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "c": 1.5}\n'


def test_a_row_logged_in_a_step_has_its_number():
    loop = Loop(line(), config(), total_steps=2)
    for step in loop.steps():
        loop.log({"reward": 1.0})
        assert loop.step == step
    assert [row["step"] for row in loop.history] == [1, 2]


def test_tensorboard_gets_the_same_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(trackers=("tensorboard",))
    result = fit(tiny()[1], tiny_split(8), tiny_split(4, 1), run, tmp_path)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for key in ("loss", "validation/accuracy", "lr/prompt"):
        written = [(event.step, event.value) for event in events.Scalars(key)]
        logged = [(row["step"], row[key]) for row in result.history if key in row]
        assert written == [(step, pytest.approx(value)) for step, value in logged]


def test_tensorboard_forgets_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(trackers=("tensorboard",), log_every=1, checkpoint_every=4, max_steps=6)

    def dies(step):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        fit(tiny()[1], tiny_split(8), None, run, tmp_path, after_step=dies)
    result = fit(tiny()[1], tiny_split(8), None, run, tmp_path)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [row["step"] for row in result.history] == [*range(1, 7)]


def test_tensorboard_without_a_folder_is_refused():
    with pytest.raises(InputError, match="tensorboard needs a folder"):
        fit(tiny()[1], tiny_split(8), config=config(trackers=("tensorboard",)))


def test_runs_with_and_without_trackers_follow_each_other(tmp_path):
    for i, trackers in enumerate([(), ("tensorboard",), (), ("tensorboard",)]):
        fit(tiny()[1], tiny_split(8), config=config(trackers=trackers), output_dir=tmp_path / str(i))
        assert (tmp_path / str(i) / "run").exists() == bool(trackers)


def test_the_bar_shows_loss_and_metric(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    result = fit(tiny()[1], tiny_split(8), tiny_split(4, 1), config(progress=True))
    shown = capsys.readouterr()
    assert shown.out == ""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.err)
    loss, metric = result.history[-1]["loss"], result.metrics["loss"]
    assert "tiny-prompt" in text
    assert "6/6" in text
    assert f"loss {loss:.4f}" in text
    assert f"(best {metric:.4f})" in text
    fit(tiny()[1], tiny_split(8), tiny_split(4, 1), config(progress=False))
    assert capsys.readouterr().err == ""


# --- warnings and stops ---------------------------------------------------------------------------------------------
@pytest.fixture
def alarms():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NotLearning)
        yield lambda: [str(w.message) for w in caught if w.category is NotLearning]


def test_no_gradient_is_noticed_in_the_first_step(alarms):
    class Unused(TinyPrompt):
        def loss(self, batch):
            return Loss(super().loss(batch).total * 0, 1)

    fit(Unused(tiny()[0]), tiny_split(8), config=config())
    assert len(alarms()) == 1
    assert "no gradient reaches what tiny-prompt trains" in alarms()[0]


def test_a_later_update_of_the_first_step_may_be_without_gradient(alarms):
    """An advantage may be zero; that nothing reaches the prompt shows in the first update."""

    def run(weights):
        method, batch = line(), pairs([1.0], [1.0]).batch([0])
        loop = Loop(method, config(), total_steps=2)
        for _ in loop.steps():
            for weight in weights:
                loss = method.loss(batch)
                loop.backward(Loss(loss.total * weight, loss.count), batch)
                loop.update()

    run([1, 0, 0])
    assert alarms() == []
    run([0, 0, 1])
    assert len(alarms()) == 1


def test_a_flat_loss_is_noticed_and_names_the_rates(alarms):
    method = tiny(lr=1e-6, bias_lr=2e-6)[1]
    fit(method, tiny_split(8), config=config(max_steps=10, batch_size=8))
    assert len(alarms()) == 1
    assert re.search(r"not learning: the loss went from 2\.\d+ to 2\.\d+ in 10 steps.*1e-06, 2e-06", alarms()[0])


def test_no_alarm_while_something_is_learned(alarms):
    fit(tiny()[1], tiny_split(8), config=config(max_steps=20, batch_size=8))
    assert alarms() == []


def test_no_alarm_where_the_metric_gains_though_the_loss_does_not(alarms):
    method = line()
    loop = Loop(method, config(max_steps=10, lr=1e-9, batch_size=1), total_steps=10)
    batch = pairs([1.0], [1.0]).batch([0])
    for step in loop.steps():
        loop.backward(method.loss(batch), batch)
        loop.update()
        loop.record({"accuracy": step / 10})
    assert alarms() == []


def test_nan_stops_with_step_samples_and_last_good_checkpoint(tmp_path):
    class Breaks(TinyPrompt):
        def loss(self, batch):
            loss = super().loss(batch)
            broken = self.training and "row-3" in batch["sample_ids"]
            return Loss(loss.total * math.nan if broken else loss.total, loss.count)

    method = Breaks(tiny()[0])
    train = tiny_split(12)
    plan = BatchPlan(12, 2, seed=0)
    at = next(step for step in range(6) if 3 in plan.batch(step))
    names = [f"row-{i}" for i in plan.batch(at)]
    with pytest.raises(NonFiniteLoss) as stop:
        fit(method, train, config=config(batch_size=2, checkpoint_every=1), output_dir=tmp_path)
    assert f"at step {at + 1}" in str(stop.value)
    assert str(names) in str(stop.value)
    kept = tmp_path / f"checkpoint-{at:07d}"
    assert (f"last good checkpoint: {kept}" if at else "last good checkpoint: none") in str(stop.value)
    assert at == 0 or kept.is_dir()
    assert bool(torch.isfinite(method.prompt.weight).all())


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_on_an_accelerator_a_bad_step_is_masked_and_stops_one_late(broken, tmp_path):
    """The path that never waits for the device, run on the CPU."""

    class Breaks(Line):
        bad = False

        def loss(self, batch):
            loss = super().loss(batch)
            if not self.bad:
                return loss
            if broken == "loss":
                return Loss(loss.total + math.inf, loss.count)
            return Loss(loss.total + torch.sqrt(self.w - self.w.detach()).sum() * 0, loss.count)

    method = Breaks(nn.Identity())
    loop = Loop(method, config(optimiser="sgd", lr=0.1, max_steps=9, checkpoint_every=1), tmp_path, total_steps=9)
    loop._reads_late = True
    batch = pairs([1.0], [1.0]).batch([0])
    with pytest.raises(NonFiniteLoss, match=r"at step 3; samples \[0\]; last good checkpoint: .*checkpoint-0000002"):
        for step in loop.steps():
            method.bad = step == 3
            before = float(method.w)
            loop.backward(method.loss(batch), batch)
            loop.update()
            assert (float(method.w) == before) == method.bad
    assert loop.state.step == 3
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-0000002"]


@pytest.mark.parametrize("late", [False, True])
def test_nan_in_one_of_many_updates_stops_before_the_step_is_over(late):
    method, split = line(), pairs([1.0, 1.0, 1.0], [1.0, math.inf, 1.0])
    loop = Loop(method, config(optimiser="sgd", lr=0.1), total_steps=9)
    loop._reads_late = late
    made = []
    with pytest.raises(NonFiniteLoss, match=r"at step 1; samples \[1\]"):
        for _ in loop.steps():
            for i in range(3):
                batch = split.batch([i])
                loop.backward(method.loss(batch), batch)
                loop.update()
                made.append(float(method.w))
    assert made == ([made[0]] * 2 if late else [made[0]])
    assert math.isfinite(float(method.w))
    assert float(method.w) == made[0]


# --- shares of processes --------------------------------------------------------------------------------------------
def test_shares_cover_a_batch_without_repetition():
    loop = Loop(line(), config(micro_batch_size=2), total_steps=1)
    assert loop.share([5, 6, 7, 8, 9]) == [[5, 6], [7, 8], [9]]
    for processes in (2, 3, 4):
        found = Counter()
        for index in range(processes):
            loop.accelerator = type("Several", (), {"num_processes": processes, "process_index": index})()
            found.update(row for part in loop.share([5, 6, 7]) for row in part)
        assert found == Counter([5, 6, 7])


def test_a_finished_run_is_in_eval_mode_and_the_backbone_never_leaves_it():
    backbone, method = tiny()
    fit(method, tiny_split(4), config=config())
    assert not method.training
    assert not any(module.training for module in backbone.modules())


def test_after_step_is_called_with_every_step():
    seen = []
    fit(line(), pairs([1.0], [1.0]), config=config(max_steps=4), after_step=seen.append)
    assert seen == [1, 2, 3, 4]


def test_a_run_on_the_cpu_does_not_bind_later_runs_to_it(monkeypatch):
    """accelerate keeps the first device of a process: asked for the CPU once, it would give no other again."""
    asked = []

    class Recorder:
        device, log_with = torch.device("cuda", 0), ()

        def __init__(self, cpu, **_):
            asked.append(cpu)

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(training, "Accelerator", Recorder)
    devices = [training._accelerator(config(device=device), None)[1].type for device in ("auto", "cpu", "auto")]
    assert (devices, asked) == (["cuda", "cpu", "cuda"], [False] * 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert training._accelerator(config(device="cpu"), None)[1].type == "cpu"
    assert asked[-1] is True


def test_a_method_may_make_its_steps_itself_and_still_be_resumed(tmp_path):
    def twice(loop, step, rows):  # two plain updates where there would be one
        for _ in range(2):
            training.backward(loop, split, rows)
            loop.update()

    split = pairs([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8])
    run = config(max_steps=4, batch_size=4)
    plain, own = line(), line()
    fit(plain, split, config=run.model_copy(update={"max_steps": 8}))
    fit(own, split, config=run, make_step=twice)
    torch.testing.assert_close(torch.cat([own.w, own.b]), torch.cat([plain.w, plain.b]))
    fit(line(), split, config=run, output_dir=tmp_path, make_step=twice)
    again = fit(line(), split, config=run, output_dir=tmp_path, make_step=twice)
    assert again.steps == 4


def test_logits_that_are_nan_in_an_evaluation_stop_the_run_with_its_step():
    _, method = tiny()

    def spoil(step):
        with torch.no_grad():
            next(method.parameters()).fill_(torch.nan)

    config = FitConfig(max_steps=4, batch_size=4, evaluate_every=2, progress=False, device="cpu")
    with pytest.raises(NonFiniteLoss, match=r"row 1: the logits are NaN at step 2\. Lower the learning rate"):
        fit(method, tiny_split(8), tiny_split(4, 1), config, after_step=lambda step: spoil(step) if step == 2 else None)


def test_a_run_begins_without_gradients_of_another():
    x, y = pairs([1.0, 2.0], [2.0, 4.0]), config(max_steps=1, batch_size=2, lr=0.1, optimiser="sgd")
    fresh, used = line(), line()
    for parameter in used.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    fit(fresh, x, None, y)
    fit(used, x, None, y)  # one of no number would stop it
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), used.parameters(), strict=True))


def test_weight_decay_is_that_of_the_run():
    ends = []
    for decay in (0.0, 0.5):
        method = line()
        method.w.data.fill_(3.0)
        fit(method, pairs([0.0], [1.0]), None, config(max_steps=1, weight_decay=decay))
        ends.append(float(method.w))
    assert ends == [3.0, pytest.approx(3.0 * (1 - 0.5 * 0.5))]  # no gradient, and a rate of its own


def test_a_metric_of_ones_own_says_which_way_is_better():
    best = []
    for larger in (None, False):
        loop, _ = recorded([0.9, 0.5, 0.3], "regret", larger_is_better=larger)
        best.append(loop.state.best_value)
    assert best == [0.9, 0.3]
    assert not metrics.higher_is_better("validation/wer")


def test_a_tie_is_no_gain():
    loop, _ = recorded([0.5, 0.5, 0.5], patience=2)
    assert (loop.state.best_step, loop.state.bad, loop.state.stopped) == (1, 2, True)


def test_a_batch_without_terms_changes_nothing_and_stops_nothing():
    class Sometimes(Line):
        def loss(self, batch):
            known = (batch["labels"] > 0).float()
            return Loss(((self(batch).logits[:, 0] - batch["labels"]) ** 2 * known).sum(), known.sum())

    method = Sometimes(nn.Identity())
    with pytest.warns(NotLearning, match="no gradient"):
        fit(method, pairs([1.0, 2.0], [-1.0, -2.0]), None, config(max_steps=2, batch_size=1, optimiser="sgd"))
    assert (float(method.w), float(method.b)) == (0.0, 0.0)


def test_where_gradients_are_off_the_run_says_so():
    with torch.no_grad(), pytest.raises(InputError, match="gradients are switched off here"):
        fit(line(), pairs([1.0], [2.0]), None, config(max_steps=1))


def test_a_method_that_trains_nothing_is_evaluated_as_a_run_is(monkeypatch):
    seen = []

    class Still(Line):
        trains = False

        def forward(self, batch):
            seen.append((self.training, torch.is_autocast_enabled("cpu")))
            return super().forward(batch)

    method = Still(nn.Identity())
    fit(method, pairs([1.0], [2.0]), pairs([1.0], [2.0], metrics=("mae",)), config(max_steps=1, precision="bf16"))
    assert seen and set(seen) == {(False, True)} and not method.training


def test_an_evaluation_that_breaks_off_puts_the_mode_back_and_scores_are_numbers():
    def score(method, split, batch_size):
        return {"own": np.float32(0.5), "batch": batch_size}

    def broken(method, split, batch_size):
        raise RuntimeError("no")

    method = line().train()
    rows = pairs([1.0], [2.0])
    scores = evaluate(method, replace(rows, scorer=score), batch_size=5)
    assert type(scores["own"]) is float and scores["batch"] == 5
    with pytest.raises(RuntimeError, match="no"):
        evaluate(method, replace(rows, scorer=broken))
    assert method.training
