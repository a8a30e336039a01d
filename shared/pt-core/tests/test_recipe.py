"""Recipes: what is read, and what is refused with which words. On a package made for the test, without a modality."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pt_core import recipe, registry
from pt_core.errors import InputError
from pt_core.files import write
from pt_core.settings import Settings

WORKBENCH = """
from pydantic import BaseModel, ConfigDict
from pt_core import recipe

class ToyData(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rows: int
    order: str = "up"

class Recipe(recipe.Recipe):
    package = "toy"
    told_elsewhere = {"seed": "the recipe says it: seed", "rows": "the data say it"}
    data: ToyData
"""
METHODS = """
[[method]]
name = "tiny-prompt"
target = "pt_core.testing:TinyPrompt"
paper = "nobody, 2024"
kind = "three rows | a bias"
reference = "a tiny model"
parameters = 1_036
fidelity = "reconstructed"

[[method]]
name = "lost"
target = "no_such_library.lost:Lost"
paper = "nobody"
kind = "nothing"
reference = "any"
parameters = 0
fidelity = "library"
"""
GOOD: dict[str, Any] = {
    "about": "Shows that recipes are read",
    "method": {"name": "tiny-prompt", "length": 4},
    "training": {"max_steps": 5},
    "data": {"rows": 3},
    "compare": {
        "noisy": {"method": "tiny-prompt", "noise": 0.5, "training": {"max_steps": 9}},
        "left-out": None,
    },
}


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An installed package `toy` with a workbench, two methods and the recipe `toy/first`."""
    folder = tmp_path / "site" / "pt_toy"
    (folder / "recipes").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "workbench.py").write_text(WORKBENCH)
    (folder / "methods.toml").write_text(METHODS)
    (folder / "recipes" / "first.yaml").write_text(yaml.safe_dump(GOOD))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(registry, "packages", lambda: {"toy": "pt_toy"})
    registry.methods.cache_clear()
    yield folder
    registry.methods.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "pt_toy"]:
        del sys.modules[name]


def refusal(changes: dict[str, Any] | None = None, name: str = "toy/first") -> str:
    with pytest.raises(InputError) as caught:
        recipe.load(name, changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_installed_recipe_is_read_and_its_methods_are_configured() -> None:
    package, checked = recipe.load("toy/first")
    assert (package, checked.method.name, checked.config().model_dump()["length"]) == ("toy", "tiny-prompt", 4)
    assert checked.labels() == ["tiny-prompt", "noisy"]
    noisy = checked.with_method("noisy")
    assert noisy.config().model_dump() == {"length": 3, "lr": 0.1, "bias_lr": 0.02, "noise": 0.5, "seed": 0}
    assert (checked.training.max_steps, noisy.training.max_steps) == (5, 9)
    assert recipe.installed() == {"toy/first": "Shows that recipes are read"}


def test_what_the_data_tell_fills_only_what_the_recipe_leaves_open() -> None:
    _, checked = recipe.load("toy/first", {"method.lr": 0.7})
    filled = checked.config(lr=0.2, seed=3, num_labels=5).model_dump()
    assert (filled["lr"], filled["seed"]) == (0.7, 3)


def test_a_file_elsewhere_names_its_package(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    write(own, yaml.safe_dump(GOOD | {"package": "toy"}))
    assert recipe.load(str(own))[0] == "toy"
    for package, problem in [(None, "is missing"), ("nope", "'nope' is no installed"), (["toy"], "is no installed")]:
        write(own, yaml.safe_dump(GOOD | {"package": package}))
        assert problem in refusal(name=str(own))
        assert f"{own}, field 'package'" in refusal(name=str(own))
        assert "Installed: toy" in refusal(name=str(own))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"trainning": {}},
            ["toy/first, field 'trainning'", "did you mean 'training'?", "about, compare, data, method"],
        ),
        ({"data.row": 3}, ["field 'data.row'", "did you mean 'rows'?", "Allowed there: order, rows"]),
        ({"data.rows": "many"}, ["field 'data.rows'", "valid integer", "got 'many'"]),
        ({"data": {}}, ["field 'data.rows'", "is missing"]),
        ({"data": None}, ["field 'data'", "got None"]),
        ({"training.optimiser": "lion"}, ["field 'training.optimiser'", "'adamw', 'adam'", "got 'lion'"]),
        ({"training.epochs": 2}, ["field 'training'", "exactly one of max_steps and epochs"]),
        ({"training.seed": 2}, ["field 'training'", "a key of the recipe"]),
        ({"method": {"length": 3}}, ["field 'method.name'", "is missing"]),
        ({"method.name": "tinny"}, ["unknown method 'tinny'", "Those of toy: lost, tiny-prompt"]),
        ({"method.name": ["a"]}, ["field 'method.name'", "valid string"]),
        (
            {"method.lenght": 3},
            ["field 'method.lenght'", "did you mean 'length'?", "there: bias_lr, length, lr, noise"],
        ),
        ({"method.seed": 3}, ["field 'method.seed': the recipe says it: seed. Leave it out here"]),
        ({"compare.noisy.seed": 3}, ["field 'compare.noisy.seed': the recipe says it: seed. Leave it out here"]),
        ({"method.rows": 3}, ["field 'method.rows': unknown key"]),  # of another method
        ({"method.length": "long"}, ["field 'method.length'", "valid integer", "got 'long'"]),
        ({"method.name": "lost", "method.length": 1}, ["'lost' needs no_such_library, which is not installed"]),
        ({"compare.noisy.nois": 1}, ["field 'compare.noisy.nois'", "did you mean 'noise'?"]),
        ({"compare.noisy.name": "x"}, ["field 'compare.noisy.name'", "Name the method by `method`"]),
        ({"compare.noisy.training": 3}, ["field 'compare.noisy.training'", "valid dictionary"]),
        ({"compare.noisy.training.steps": 3}, ["field 'compare.noisy.training.steps'", "unknown key"]),
        ({"compare.noisy.training.seed": 3}, ["field 'compare.noisy.training.seed'", "a key of the recipe"]),
        ({"compare.noisy.training.epochs": 3}, ["field 'compare.noisy.training'", "exactly one of"]),
        ({"compare.other": {}}, ["unknown method 'other'"]),
        ({"compare": ["noisy"]}, ["field 'compare'", "valid dictionary"]),
        ({"about.me": 3}, ["field 'about.me'", "'about' is a value, not a section"]),
        ({"seed": True}, ["field 'seed'", "true and false are no value of this setting", "got True"]),
        ({"method.length": True}, ["field 'method.length'", "true and false are no value of this setting"]),
        ({"seed": -1}, ["field 'seed'", "greater than or equal to 0", "got -1"]),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_with_the_key_the_problem_and_what_is_allowed(
    changes: dict[str, Any], parts: list[str]
) -> None:
    message = refusal(changes)
    assert all(part in message for part in ["toy/first", *parts]), message


def test_settings_that_a_comparison_would_not_use_are_refused() -> None:
    _, checked = recipe.load("toy/first", {"compare.tiny-prompt": {"length": 9}})
    with pytest.raises(
        InputError, match=r"'compare\.tiny-prompt': .* Choose another label, with `method: tiny-prompt`"
    ):
        checked.labels()
    _, checked = recipe.load("toy/first", {"compare.tiny-prompt": None, "compare.noisy": None})
    assert checked.labels() == ["tiny-prompt"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: [1", "is not YAML: while parsing a flow sequence"),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("- a\n- b", "holds no settings"),
        ("", "holds no settings"),
        ("\x00", "is not YAML"),
        ("about: 2024-02-30", "is not YAML: day is out of range for month"),
        ("about: " + "9" * 5000, "is not YAML: "),
        ("about: " + "[" * 3000, "is not YAML: "),
        ("metod: {name: tiny-prompt}", "field 'metod': unknown key (did you mean 'method'?)"),
        ("1: 2", "field '1': "),
        ("seed: 1\nmethod: {name: a}\nseed: 2", "first.yaml: row 3, field 'seed': the key is there twice. Leave one"),
        ("method: {name: a, name: b}", "row 1, field 'name': the key is there twice"),
    ],
)
def test_malformed_files_are_refused_in_one_line(toy: Path, text: str, problem: str) -> None:
    (toy / "recipes" / "first.yaml").write_text(text)
    assert problem in refusal()


def test_merged_keys_are_not_there_twice(toy: Path) -> None:
    own = toy / "own.yaml"
    own.write_text("package: toy\nbase: &base {rows: 1}\ndata: {<<: *base, rows: 2}\n")
    assert recipe.find(str(own)) == ("toy", own)


def test_a_key_or_value_that_must_be_text_says_how_to_quote_it() -> None:
    class Words(BaseModel):
        verbalizer: dict[str, str]

    for given, where, remedy in [
        ({1: "bad"}, "verbalizer.1", "(got 1). Quote it: '1'"),
        ({True: "bad"}, "verbalizer.1", "(got True). Quote it: YAML reads yes, no, on, off, true and false"),
        ({"a": 2.5}, "verbalizer.a", "(got 2.5). Quote it: '2.5'"),
    ]:
        with pytest.raises(ValidationError) as wrong:
            Words.model_validate({"verbalizer": given})
        message = str(recipe.explain(wrong.value, Words))
        assert f"field '{where}': " in message and remedy in message


def test_true_is_no_number_at_any_depth_and_a_truth_value_where_one_is_meant() -> None:
    class Some(Settings):
        share: float | None = None
        pair: tuple[float, float] = (0.0, 1.0)
        deep: list[tuple[int, ...]] | None = None
        named: dict[str, int] | None = None
        flag: bool = False
        either: bool | int = 0
        text: str = ""

    for given in ({"share": True}, {"pair": [False, 1.0]}, {"deep": [[1], [2, True]]}, {"named": {"a": True}}):
        with pytest.raises(ValidationError, match="true and false are no value of this setting"):
            Some.model_validate(given)
    with pytest.raises(ValidationError, match="valid string"):  # whose remedy is to quote it
        Some.model_validate({"text": True})
    made = Some.model_validate({"share": 1, "pair": [0, 1], "deep": [[1]], "flag": True, "either": True})
    assert (made.share, made.pair, made.deep, made.flag, made.either) == (1.0, (0.0, 1.0), [(1,)], True, True)


def test_a_file_that_is_not_utf8_is_refused(toy: Path) -> None:
    (toy / "recipes" / "first.yaml").write_bytes(b"about: \xff\xfe")
    assert "is not YAML" in refusal()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("first", "no recipe 'first'. Installed: toy/first"),
        ("toy/second", "no recipe 'toy/second'"),
        ("toy/", "no recipe 'toy/'"),
        ("gone.yaml", "gone.yaml: no such file. `pt list --recipes`"),
    ],
)
def test_an_unknown_recipe_is_refused_with_those_that_are_known(name: str, part: str) -> None:
    assert part in refusal(name=name)


def test_settings_of_the_command_line_are_yaml_values() -> None:
    lines = ["a.b=3", "c=null", "d={x: [1, 2]}", 'e="{text}\\nTopic:"', "f=1e-3", "g=x=y", "h="]
    expected = {"a.b": 3, "c": None, "d": {"x": [1, 2]}, "e": "{text}\nTopic:", "f": "1e-3", "g": "x=y", "h": None}
    assert recipe.parse_settings(lines) == expected
    _, checked = recipe.load("toy/first", recipe.parse_settings(["method.lr=1e-3", "data.rows=7"]))
    assert checked.config().model_dump()["lr"] == 1e-3


@pytest.mark.parametrize("value", ["2024-02-30", "9" * 5000, "[" * 3000])
def test_a_setting_that_yaml_cannot_make_a_value_of_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="field 'seed': the value is not YAML"):
        recipe.parse_settings([f"seed={value}"])


@pytest.mark.parametrize("line", ["lr", "=3", "a..b=1", ".a=1", ""])
def test_a_setting_without_key_or_value_is_refused(line: str) -> None:
    with pytest.raises(InputError, match=r"is no setting\. Write --set key\.key=value"):
        recipe.parse_settings([line])


def test_a_setting_that_is_not_yaml_is_refused_with_how_to_quote_it() -> None:
    with pytest.raises(
        InputError, match=r"field 'data\.template': the value is not YAML: '\{text\} Topic:'\. Quote text"
    ):
        recipe.parse_settings(["data.template={text} Topic:"])


def test_the_table_of_methods_is_markdown() -> None:
    head, rule, *rows = registry.markdown().splitlines()
    assert head == "| method | package | paper | what is trained | trained values | fidelity |"
    assert rule == "|---|---|---|---|---|---|"
    tiny = "| `tiny-prompt` | toy | nobody, 2024 | three rows \\| a bias | 1,036 (a tiny model) | reconstructed |"
    assert rows == [tiny, "| `lost` | toy | nobody | nothing | none | library |"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "old")
    write(tmp_path / "b.bin", b"\x00\xff")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.txt", "new, but never there")
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.*")} == {"a.txt": b"old", "b.bin": b"\x00\xff"}
