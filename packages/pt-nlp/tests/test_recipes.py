"""The recipes that are installed: all are read and checked; one is run on its real model and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pt_core import artifacts, recipe, registry
from pt_core.assets import Unavailable
from pt_nlp import assets, workbench
from pt_nlp.methods.ptec import PTEC

RECIPES = [name for name in recipe.installed() if name.startswith("nlp/")]


def test_there_are_recipes_and_each_says_what_it_shows() -> None:
    assert {"nlp/bbc-topics", "nlp/bbc-records", "nlp/naics-sectors"} <= {*RECIPES}
    assert all(len(recipe.installed()[name]) > 20 for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_all_its_methods_take_their_settings(name: str) -> None:
    package, checked = recipe.load(name)
    assert package == "nlp" and isinstance(checked, workbench.Recipe)
    labels = checked.labels()
    assert len(labels) >= 2
    for label in labels:
        chosen = checked.with_method(label)
        config = chosen.config(num_labels=3)
        assert type(config) is registry.find_method("nlp", chosen.method.name).config_class
        for key, value in (chosen.method.model_extra or {}).items():  # nothing is dropped or changed
            assert config.model_dump()[key] == value


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_monitors_is_a_metric_of_its_kind_of_task(name: str) -> None:
    from pt_nlp.data import METRICS

    _, checked = recipe.load(name)
    assert isinstance(checked, workbench.Recipe)
    # None: the loss, or the first metric of a method that has none (zero-shot).
    assert checked.training.monitor in {None, "loss", *(checked.data.metrics or METRICS[checked.data.kind])}


@pytest.mark.parametrize("name", ["nlp/naics-sectors", "nlp/naics-writing"])
def test_a_recipe_of_ptec_is_its_published_run_but_for_the_epochs(name: str) -> None:
    _, checked = recipe.load(name)
    assert checked.method.name == "ptec"
    recommended = PTEC.recommended_fit(epochs=checked.training.epochs)
    assert checked.training.model_dump() == recommended.model_dump()


@pytest.mark.network
def test_a_recipe_runs_on_its_real_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: uv sync")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `report` of pt-core")
    try:
        assets.smollm2(), assets.bbc_news()
    except Unavailable as reason:
        pytest.skip(str(reason))
    from pt_core import cli

    changes = ["training.max_steps=2", "training.batch_size=2", "data.max_test_rows=10"]
    changes += ["data.validation_shots=1", "data.shots=2"]
    settings = [part for change in changes for part in ("--set", change)]
    monkeypatch.setattr("sys.argv", ["pt", "train", "nlp/bbc-topics", *settings, "-o", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "prompt-tuning" in capsys.readouterr().out
    artifact = artifacts.load_artifact(tmp_path / "run" / "prompt")
    assert artifact.config.backbone.name == "asset:smollm2"
    assert artifact.tensors["prompt.weight"].shape == (20, 576)
    result = json.loads((tmp_path / "run" / "results.json").read_text())[0]
    assert result["extra"]["steps"] == 2 and 0 <= result["metrics"]["accuracy"] <= 1
    text = "Shares in the bank fell after it cut its profit forecast"
    answer = workbench.open_artifact(artifact).predict([text])[0]
    assert set(answer["scores"]) == {"business", "entertainment", "politics", "sports", "tech"}
