"""Two processes do what one does with the same global batch.

Run as a program, this file imports torch once, forks two processes that find each other as accelerate's do, and writes what
each of them saw to a folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pt_core.errors import InputError
from pt_core.method import Loss
from pt_core.plan import FitConfig
from pt_core.testing import SHORT, Killed, TinyLM, TinyPrompt, TinyPromptConfig, one_thread, stopped_after, tiny_split
from pt_core.training import NonFiniteLoss

RUNS: dict[str, dict[str, Any]] = {
    "even": {"batch_size": 4},
    "odd": {"batch_size": 5, "max_steps": 9},  # epochs of 5, 5 and 1 rows: the second process has none of the last
    "accumulated": {"batch_size": 7, "micro_batch_size": 1, "max_steps": 7},  # 4 and 3 micro-batches
    "bf16": {"batch_size": 4, "precision": "bf16"},
    "stopped": {"batch_size": 6, "optimiser": "adamw", "max_steps": 40, "evaluate_every": 1, "patience": 2}
    | {"min_delta": 0.03},
    "fading": {"batch_size": 4, "optimiser": "adamw", "weight_decay": 0.1, "max_steps": 6, "kind": "Fading"},
}


@pytest.fixture(autouse=True)
def few_threads():
    with one_thread():
        yield


class Watched(TinyPrompt):
    """Keeps the ids of the rows that it was trained on and the seeds of its steps, and fails as it is told."""

    seen: list[list[str]]
    seeds: list[int]
    coupled, poison = False, ""

    def loss(self, batch):
        loss = super().loss(batch)
        if self.training:
            self.seen.append(list(batch["sample_ids"]))
            self.seeds.append(torch.initial_seed())
        if self.coupled:
            return Loss.mean(loss.value)
        return Loss(loss.total * (math.nan if self.poison in batch["sample_ids"] else 1), loss.count, loss.parts)


class Fading(Watched):
    """Has a parameter that is used in the first two steps only: then an optimiser leaves it alone."""

    def __init__(self, backbone, config=None):
        super().__init__(backbone, config)
        self.early = nn.Parameter(torch.ones(3))

    def loss(self, batch):
        loss = super().loss(batch)
        if self.training and len(self.seen) <= 2:
            loss.total = loss.total * self.early.mean()
        return loss


def train(folder: Path | None, method_config=None, scored=False, kind="Watched", **run) -> tuple[Watched, Any]:
    method = {"Watched": Watched, "Fading": Fading}[kind](TinyLM(), TinyPromptConfig(**(method_config or {})))
    method.seen, method.seeds = [], []
    validation = tiny_split(5, seed=1)
    if scored:
        validation.scorer = lambda method, split, batch_size: {
            "process": float(os.environ.get("RANK", 0)),
            "rows": float(len(split)),
        }
    config = FitConfig.model_validate(SHORT.model_dump() | {"optimiser": "sgd", "log_every": 3} | run)
    return method, method.fit(tiny_split(11), validation, config, folder)


# --- the program ----------------------------------------------------------------------------------------------------
def work(folder: Path, rank: int) -> None:
    """Everything that one of two processes does."""
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        method, result = train(folder / name, **run)
        found[name] = {**vars(result), "seconds_per_step": 0, "seconds": 0, "seen": method.seen}
        save_file(method.trained_state(), folder / f"{name}-{rank}.safetensors")

    noisy = {"method_config": {"noise": 0.5}, "max_steps": 7}
    method, _ = train(folder / "noisy", **noisy)
    with stopped_after(3), contextlib.suppress(Killed):
        train(folder / "killed", **noisy)
    resumed, _ = train(folder / "killed", **noisy)
    found["steps resumed"] = len(resumed.seen)
    found["resumed"] = [torch.equal(tensor, resumed.state_dict()[key]) for key, tensor in method.state_dict().items()]
    found["seeds"] = method.seeds
    found["scored"] = train(None, scored=True)[1].metrics

    for attribute, value in (("coupled", True), ("poison", "row-7")):
        with mock.patch.object(Watched, attribute, value):
            try:
                train(folder / attribute, batch_size=11)
            except (InputError, NonFiniteLoss) as error:
                found[attribute] = f"{type(error).__name__}: {error}"
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | (
        {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    )
    torch.set_num_threads(1)
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ.update(common, RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                work(folder, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the two processes, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


# --- facts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, two):
    folder, found = two
    method, result = train(None, **RUNS[name])
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for rank in range(2):
        tensors = load_file(folder / f"{name}-{rank}.safetensors")
        for key in ("prompt.weight", "bias", *(["early"] if name == "fading" else [])):
            torch.testing.assert_close(tensors[key], method.state_dict()[key], **tolerance)
        for key in ("steps", "best_step", "stopped_early"):
            assert found[rank][name][key] == getattr(result, key)
        assert found[rank][name]["metrics"] == pytest.approx(result.metrics, rel=tolerance["rtol"])
        for ours, theirs in zip(result.history, found[rank][name]["history"], strict=True):
            assert theirs == pytest.approx(ours, rel=tolerance["rtol"])
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    assert torch.equal(first["prompt.weight"], second["prompt.weight"])
    assert found[0][name]["history"] == found[1][name]["history"]


def test_early_stopping_took_place(two):
    _, found = two
    assert found[0]["stopped"]["stopped_early"]
    assert 3 < found[0]["stopped"]["steps"] < 40


@pytest.mark.parametrize("name", ["even", "odd", "accumulated"])
def test_no_sample_is_repeated_or_dropped(name, two):
    _, found = two
    alone, result = train(None, **RUNS[name])
    together = [row for process in found for batch in process[name]["seen"] for row in batch]
    assert sorted(together) == sorted(row for batch in alone.seen for row in batch)
    whole_epochs = result.steps // math.ceil(11 / RUNS[name]["batch_size"])
    assert whole_epochs >= 2
    assert min(together.count(f"row-{i}") for i in range(11)) >= whole_epochs


def test_the_last_batch_may_be_smaller_than_the_number_of_processes(two):
    _, found = two
    assert [len(batch) for batch in found[0]["odd"]["seen"]] == [3, 3, 1] * 3
    assert [len(batch) for batch in found[1]["odd"]["seen"]] == [2, 2] * 3


def test_only_the_main_process_writes(two):
    folder, found = two
    rows = [json.loads(line) for line in (folder / "odd" / "metrics.jsonl").read_text().splitlines()]
    assert rows == found[0]["odd"]["history"]
    assert len(list((folder / "odd").glob("checkpoint-*"))) == 1


def test_random_numbers_differ_between_processes_and_steps_and_are_resumed_in_both(two):
    folder, found = two
    assert len({*found[0]["seeds"], *found[1]["seeds"]}) == 14
    for process in found:
        assert process["steps resumed"] == 5  # killed after 3 of 7, its checkpoint was of step 2
        assert all(process["resumed"][:2])  # prompt and bias; the rows that a process saw are its own
    assert (folder / "killed" / "metrics.jsonl").read_bytes() == (folder / "noisy" / "metrics.jsonl").read_bytes()


def test_the_scores_of_the_main_process_count(two):
    _, found = two
    assert [process["scored"]["process"] for process in found] == [0.0, 0.0]
    assert [process["scored"]["rows"] for process in found] == [5.0, 5.0]


def test_a_loss_that_couples_rows_is_refused_by_both(two):
    _, found = two
    assert all(process["coupled"].startswith("InputError: the loss of tiny-prompt couples") for process in found)


def test_a_bad_sample_of_one_stops_both(two):
    _, found = two
    assert all("NonFiniteLoss" in process["poison"] and "at step 1" in process["poison"] for process in found)
    assert ["'row-7'" in process["poison"] for process in found].count(True) == 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
