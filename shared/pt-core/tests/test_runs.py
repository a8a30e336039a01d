"""One run and runs side by side, on the tiny model: what is kept, what goes on, what is refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pt_core import files, report, runs, training
from pt_core.artifacts import load_artifact
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.runs import Job
from pt_core.testing import TinyLM, TinyPrompt, TinyPromptConfig, one_thread, tiny_split

RUN: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "evaluate_every": 2, "log_every": 2, "progress": False}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with one_thread():
        yield


class Untrained(TinyPrompt):
    """The tiny language model as it is."""

    name = "untrained"
    trains = False

    def trained_state(self) -> dict[str, torch.Tensor]:
        return {}

    def trainable(self) -> Iterator[Any]:
        return iter(())


class Maker:
    """(label, seed) -> job on one backbone; knows which cells were made, and which of their methods are removed."""

    def __init__(self) -> None:
        self.backbone = TinyLM()
        self.made: list[tuple[str, int]] = []
        self.removed: list[tuple[str, int]] = []
        self.evaluated = 0
        self.fails_at: tuple[str, int] | None = None

    def __call__(self, label: str, seed: int) -> tuple[Job, FitConfig]:
        cell = (label, seed)
        self.made.append(cell)
        kind = Untrained if label == "untrained" else TinyPrompt
        method = kind(self.backbone, TinyPromptConfig(seed=seed, length=5 if label == "long" else 3))
        remove = method.remove

        def removed() -> None:
            remove()
            self.removed.append(cell)

        method.remove = removed  # type: ignore[method-assign]
        test = tiny_split(6, seed=3)
        collate = test.collate

        def counted(rows: list[Any]) -> dict[str, Any]:
            self.evaluated += len(rows)
            if self.fails_at == cell:
                raise KeyboardInterrupt
            return collate(rows)

        test.collate = counted
        job = Job(method, tiny_split(12, seed=1), tiny_split(6, seed=2), test, {"labels": ["a", "b"]}, "tiny-lm", "v1")
        return job, FitConfig(**RUN, seed=seed)


def test_a_run_keeps_the_prompt_its_result_and_its_history(tmp_path: Path) -> None:
    make = Maker()
    job, config = make("tiny", 4)
    outcome = runs.train(job, config, tmp_path, "a label")
    assert outcome.artifact == tmp_path / "prompt"
    artifact = load_artifact(outcome.artifact)
    for name, tensor in job.method.trained_state().items():
        assert torch.equal(artifact.tensors[name], tensor)
    assert (artifact.config.backbone.name, artifact.config.backbone.revision) == ("tiny-lm", "v1")
    assert artifact.config.task == {"labels": ["a", "b"]}
    assert artifact.config.metrics == outcome.result.metrics
    result = outcome.result
    assert (result.method, result.seed, result.trainable_parameters) == ("a label", 4, 3 * 8 + 12)
    assert result.artifact_bytes == (tmp_path / "prompt" / "prompt.safetensors").stat().st_size
    assert result.seconds_per_step is not None and result.seconds_per_step > 0
    assert result.extra["steps"] == 6
    assert [row["step"] for row in outcome.history if "validation/loss" in row] == [2, 4, 6]
    assert (tmp_path / "training" / "metrics.jsonl").is_file()


def test_the_test_rows_are_read_once_after_training(tmp_path: Path) -> None:
    make = Maker()
    job, config = make("tiny", 0)
    outcome = runs.train(job, config, tmp_path)
    assert make.evaluated == 6
    expected = runs.evaluate(job.method, tiny_split(6, seed=3))
    assert outcome.result.metrics == expected
    assert "validation" not in report.to_markdown(report.results_grid([outcome.result]))


def test_without_test_rows_the_metrics_are_those_of_the_validation_rows_and_tables_say_so(tmp_path: Path) -> None:
    job, config = Maker()("tiny", 0)
    job.test = None
    result = runs.train(job, config, tmp_path).result
    assert result.metrics == runs.evaluate(job.method, tiny_split(6, seed=2))  # those of the best step
    assert "There are no test rows: metrics are of the validation rows" in report.to_markdown(
        report.results_grid([result])
    )


def test_a_metric_that_is_not_finite_does_not_cost_the_prompt(tmp_path: Path) -> None:
    job, config = Maker()("tiny", 0)
    assert job.test is not None
    job.test.scorer = lambda method, split, batch_size: {
        "roc-auc": math.nan,
        "accuracy": 0.5,
    }  # one class among the test rows
    outcome = runs.train(job, config, tmp_path)
    assert outcome.artifact is not None
    assert load_artifact(outcome.artifact).config.metrics.keys() == {"accuracy", "loss"}
    assert math.isnan(outcome.result.metrics["roc-auc"])  # told as it is
    report.to_json([outcome.result], tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())[0]["metrics"]["roc-auc"] is None


def test_test_rows_are_computed_in_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(TinyPrompt, "forward", _spied(TinyPrompt.forward, seen))
    job, config = Maker()("tiny", 0)
    runs.train(job, config.model_copy(update={"precision": "bf16"}), tmp_path)
    assert len(seen) > 1 and all(seen)


def _spied(forward: Any, seen: list[bool]) -> Any:
    def spied(self: TinyPrompt, batch: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, batch)

    return spied


def test_of_several_processes_the_first_one_writes_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, config = Maker()("tiny", 0)
    fitted, save = job.method.fit(job.train, job.validation, config), job.method.save_pretrained
    monkeypatch.setattr(job.method, "fit", lambda *args: fitted)
    monkeypatch.setattr(job.method, "save_pretrained", lambda *args, **options: pytest.fail("written by the second"))
    for name, value in {"is_initialized": True, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: save(tmp_path / "prompt"))
    assert runs.train(job, config, tmp_path).artifact == tmp_path / "prompt"


def test_a_method_that_trains_nothing_leaves_no_artifact(tmp_path: Path) -> None:
    job, config = Maker()("untrained", 0)
    outcome = runs.train(job, config, tmp_path)
    assert (outcome.artifact, outcome.history) == (None, [])
    assert not (tmp_path / "prompt").exists()
    result = outcome.result
    assert (result.trainable_parameters, result.seconds_per_step, result.artifact_bytes) == (0, None, None)
    assert "accuracy" in result.metrics


def test_a_run_that_is_done_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 100.0)  # of the loop: by it a step takes minutes, by that of the second call a moment
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first = runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x"})
    before = (tmp_path / "prompt" / "prompt.safetensors").read_bytes()
    again = runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x"})
    assert (tmp_path / "prompt" / "prompt.safetensors").read_bytes() == before
    assert again.result.metrics == first.result.metrics
    assert again.history == first.history
    assert again.result.seconds_per_step == first.result.seconds_per_step  # kept with its checkpoint
    assert again.result.extra["seconds"] >= first.result.extra["seconds"] > 600


def test_a_start_that_came_to_nothing_does_not_block_the_folder(tmp_path: Path) -> None:
    job, config = Maker()("tiny", 0)
    job.train.collate = lambda rows: pytest.fail("refused")
    with pytest.raises(pytest.fail.Exception):
        runs.train(job, config, tmp_path, identity={"rows": "x"})
    assert (tmp_path / "identity.json").is_file()
    runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "y"})
    with pytest.raises(InputError, match=r"\(rows differ\)"):
        runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x"})


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x", "data": {"train": "a.jsonl"}})
    with pytest.raises(InputError, match=r"holds results of something else \(rows differ\)\. Choose another"):
        runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "y", "data": {"train": "a.jsonl"}})


@pytest.mark.parametrize("changed", ["method", "method_config", "config", "seed"])
def test_a_folder_with_a_finished_run_takes_no_other_one(tmp_path: Path, changed: str) -> None:
    runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x"})
    before = (tmp_path / "prompt" / "prompt_config.json").read_bytes()
    labels = {"method": "untrained", "method_config": "long"}
    job, config = Maker()(labels.get(changed, "tiny"), int(changed == "seed"))
    config = config.model_copy(update={"max_steps": 4} if changed == "config" else {})
    named = {"method_config": "method_config.length", "config": "config.max_steps", "seed": "config.seed"}
    with pytest.raises(
        InputError, match=rf"holds results of something else \(.*{named.get(changed, changed)}.* differ"
    ):
        runs.train(job, config, tmp_path, identity={"rows": "x"})
    assert (tmp_path / "prompt" / "prompt_config.json").read_bytes() == before
    resumed = {"checkpoint_every": 1, "progress": True, "device": "auto", "trackers": ()}
    job, config = Maker()("tiny", 0)
    runs.train(job, config.model_copy(update=resumed), tmp_path, identity={"rows": "x"})


@pytest.mark.parametrize("there", ["prompt/notes.txt", "prompt", "results.json/a", "curves.png/a"])
def test_what_a_run_could_not_write_at_its_end_is_refused_at_its_start(tmp_path: Path, there: str) -> None:
    file = tmp_path / "run" / there
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    job, config = Maker()("tiny", 0)
    job.train.collate = lambda rows: pytest.fail("training began")
    with pytest.raises(InputError, match=r"holds other files|is a file|is a folder, a file goes there"):
        runs.train(job, config, tmp_path / "run")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"link: is a link to nothing\. Choose another output folder"):
        runs.train(job, config, tmp_path / "link")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("mark", ["{", "[1]", "3"])
def test_a_damaged_mark_of_a_folder_is_named(tmp_path: Path, mark: str) -> None:
    (tmp_path / "identity.json").write_text(mark)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"identity\.json: is damaged"):
        runs.train(*Maker()("tiny", 0), tmp_path, identity={"rows": "x"})


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_file_in_the_place_of_the_folder_is_refused_and_left_alone(tmp_path: Path, below: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    make = Maker()
    job, config = make("tiny", 0)
    for run in (
        lambda: runs.train(job, config, file / below, identity={}),
        lambda: runs.compare(make, ["tiny"], [0], file / below),
    ):
        with pytest.raises(InputError, match=r"notes\.txt: is a file\. Choose another output folder"):
            run()
    assert file.read_text() == "mine" and make.made == [("tiny", 0)]


def test_a_comparison_runs_every_method_with_every_seed(tmp_path: Path) -> None:
    make, lines = Maker(), []
    before = snapshot(make.backbone)
    outcomes = runs.compare(make, ["tiny", "long", "untrained"], [0, 1], tmp_path, {"recipe": 1}, lines.append)
    cells = [(label, seed) for seed in (0, 1) for label in ("tiny", "long", "untrained")]
    assert make.made == make.removed == [("long", 0), ("untrained", 0), *cells]  # each label is tried first
    assert [(o.result.method, o.result.seed) for o in outcomes] == cells
    assert_unchanged(make.backbone, before)
    assert lines[0] == "tiny, seed 0 (1 of 6) ..."
    assert lines[1].startswith("tiny, seed 0: loss ")
    assert [o.result.trainable_parameters for o in outcomes[:3]] == [36, 52, 0]
    assert list(runs.histories(outcomes)) == ["tiny", "long"]
    assert [len(h) for h in runs.histories(outcomes).values()] == [2, 2]
    assert len(report.results_grid([o.result for o in outcomes]).rows) == 3


def test_a_comparison_that_stops_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = runs.compare(Maker(), ["tiny", "long"], [0, 1], tmp_path / "whole", announce=lambda line: None)
    stopped = Maker()
    stopped.fails_at = ("tiny", 1)
    with pytest.raises(KeyboardInterrupt):
        runs.compare(stopped, ["tiny", "long"], [0, 1], tmp_path / "cut", announce=lambda line: None)
    assert stopped.removed == stopped.made == [("long", 0), ("tiny", 0), ("long", 0), ("tiny", 1)]
    make, lines = Maker(), []
    outcomes = runs.compare(make, ["tiny", "long"], [0, 1], tmp_path / "cut", announce=lines.append)
    assert make.made == [("long", 1), ("tiny", 1), ("long", 1)]
    assert lines[:2] == ["tiny, seed 0: kept from before", "long, seed 0: kept from before"]
    for here, there in zip(outcomes, whole, strict=True):
        assert here.result.metrics == there.result.metrics
        assert here.history == there.history
        tensors = [load_file(o.artifact / "prompt.safetensors") for o in (here, there) if o.artifact]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
    assert outcomes[2].result.extra["steps"] == 6  # its training was done; only the test was cut


def test_a_comparison_grows_by_labels_and_seeds(tmp_path: Path) -> None:
    runs.compare(Maker(), ["tiny"], [0], tmp_path, {"recipe": 1}, announce=lambda line: None)
    make = Maker()
    outcomes = runs.compare(make, ["tiny", "long"], [0, 1], tmp_path, {"recipe": 1}, announce=lambda line: None)
    assert make.made == [("tiny", 1), ("long", 0), ("tiny", 1), ("long", 1)]
    assert len(outcomes) == 4


def test_kept_cells_are_found_where_the_folder_was_moved(tmp_path: Path) -> None:
    runs.compare(Maker(), ["tiny"], [0], tmp_path / "here", announce=lambda line: None)
    (tmp_path / "here").rename(tmp_path / "there")
    kept = runs.compare(Maker(), ["tiny"], [0], tmp_path / "there", announce=lambda line: None)
    assert kept[0].artifact == tmp_path / "there" / "cells" / "tiny-0" / "prompt"
    assert load_artifact(kept[0].artifact).config.method == "tiny-prompt"
    assert str(tmp_path) not in (tmp_path / "there" / "cells" / "tiny-0.json").read_text()


def test_a_changed_recipe_is_refused_with_what_changed(tmp_path: Path) -> None:
    runs.compare(Maker(), ["tiny"], [0], tmp_path, {"method": {"lr": 1}, "data": "a"}, announce=lambda line: None)
    make = Maker()
    with pytest.raises(
        InputError, match=r"something else \(compare\.a, method\.lr differ\)\. Choose another output folder"
    ):
        runs.compare(make, ["tiny"], [0], tmp_path, {"method": {"lr": 2}, "data": "a", "compare": {"a": 1}})
    assert make.made == []


def test_a_label_whose_job_cannot_be_made_is_refused_before_any_has_trained(tmp_path: Path) -> None:
    class Picky(Maker):
        def __call__(self, label: str, seed: int) -> tuple[Job, FitConfig]:
            if label == "bad":
                raise InputError("unknown layer", field="layer")
            return super().__call__(label, seed)

    make = Picky()
    with pytest.raises(InputError, match=r"^compare\.bad: field 'layer': unknown layer"):
        runs.compare(make, ["tiny", "bad"], [0], tmp_path, announce=lambda line: None)
    assert make.made == [] and not (tmp_path / "cells").exists()


def test_settings_that_a_label_would_not_follow_are_refused_before_any_has_trained(tmp_path: Path) -> None:
    class Named(Maker):
        def __call__(self, label: str, seed: int) -> tuple[Job, FitConfig]:
            job, config = super().__call__(label, seed)
            if label == "named":
                job.method.parameter_groups = lambda: [  # type: ignore[method-assign]
                    {"name": "prompt", "params": [p for _, p in job.method.trainable()], "lr": 0.1}
                ]
            return job, config.model_copy(update={"lr": 0.2})

    make = Named()
    with pytest.raises(InputError, match=r"^compare\.named: field 'lr': .* so the run's rate has no effect"):
        runs.compare(make, ["tiny", "named"], [0], tmp_path, announce=lambda line: None)
    assert make.made == make.removed == [("named", 0)] and not (tmp_path / "cells").exists()


def test_labels_that_some_disks_take_for_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="field 'methods': 'tiny' and 'Tiny' differ in case only"):
        runs.compare(Maker(), ["tiny", "Tiny"], [0], tmp_path)


def test_a_run_that_went_on_has_the_test_metrics_of_one_that_was_not_cut(tmp_path: Path) -> None:
    def made() -> tuple[Job, FitConfig]:
        job, config = Maker()("tiny", 0)
        assert job.test is not None
        job.test.scorer = lambda method, split, batch_size: {"sampled": float(torch.rand(()))}
        return job, config

    whole = runs.train(*made(), tmp_path / "whole").result.metrics
    assert runs.train(*made(), tmp_path / "whole").result.metrics == whole  # trained before, tested again
    other, config = made()
    assert runs.train(other, config.model_copy(update={"seed": 1}), tmp_path / "other").result.metrics != whole


def test_a_cell_that_was_cut_while_it_was_written_is_run_again(tmp_path: Path) -> None:
    runs.compare(Maker(), ["tiny"], [0], tmp_path, announce=lambda line: None)
    cell = tmp_path / "cells" / "tiny-0.json"
    content = json.loads(cell.read_text())
    assert content["result"]["method"] == "tiny"
    cell.rename(cell.with_name(f".{cell.name}.123"))  # what a kill before the renaming leaves
    make = Maker()
    runs.compare(make, ["tiny"], [0], tmp_path, announce=lambda line: None)
    assert make.made == [("tiny", 0)]


def test_a_damaged_cell_is_named_and_computed_again_once_it_is_deleted(tmp_path: Path) -> None:
    whole = runs.compare(Maker(), ["tiny"], [0], tmp_path, announce=lambda line: None)
    cell = tmp_path / "cells" / "tiny-0.json"
    for content in (
        cell.read_bytes()[:40],
        b"\x00" * 40,
        b"{}",
        b"[]",
        b'{"result": {}, "history": [], "artifact": null}',
    ):
        cell.write_bytes(content)
        with pytest.raises(InputError, match=r"tiny-0\.json: is damaged\. Delete it: the cell is computed again"):
            runs.compare(Maker(), ["tiny"], [0], tmp_path, announce=lambda line: None)
    cell.unlink()
    again = runs.compare(Maker(), ["tiny"], [0], tmp_path, announce=lambda line: None)
    assert again[0].result.metrics == whole[0].result.metrics


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, bool]] = []
    for name in ("fsync", "replace"):
        original = getattr(files.os, name)

        def spied(*values: Any, name: str = name, original: Any = original) -> None:
            done.append((name, (tmp_path / "a").exists()))
            original(*values)

        monkeypatch.setattr(files.os, name, spied)
    files.write(tmp_path / "a", "text")
    assert done == [("fsync", False), ("replace", False)] and (tmp_path / "a").read_text() == "text"


def test_labels_become_safe_file_names(tmp_path: Path) -> None:
    runs.compare(Maker(), ["../up", "a b"], [0], tmp_path / "in", announce=lambda line: None)
    assert {path.name for path in (tmp_path / "in" / "cells").glob("*.json")} == {"..%2Fup-0.json", "a%20b-0.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
