"""Installed packages and their methods are found by entry points and tables, and nothing is imported for it."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pt_core import registry
from pt_core.errors import InputError

ROW = """
[[method]]
name = "{name}"
target = "{target}"
paper = "Somebody 2024"
kind = "soft | prompt"
reference = "a model, m = 4"
parameters = {parameters}
fidelity = "paper-checked"
"""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(short name=[rows]) makes packages `fake_<short name>` that raise when they are imported."""
    monkeypatch.syspath_prepend(tmp_path)
    points = []
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])

    def make(**packages):
        for short, rows in packages.items():
            folder = tmp_path / f"fake_{short}"
            folder.mkdir()
            (folder / "__init__.py").write_text("raise AssertionError('imported')")
            (folder / "methods.toml").write_text("".join(rows))
            points.append(EntryPoint(short, f"fake_{short}", "pt.packages"))
        registry.packages.cache_clear()
        registry.methods.cache_clear()

    yield make
    registry.packages.cache_clear()
    registry.methods.cache_clear()


def row(name: str, target: str = "fake:Class", parameters: int = 32) -> str:
    return ROW.format(name=name, target=target, parameters=parameters)


def test_packages_and_methods_are_found_without_an_import(install, tmp_path):
    install(sound=[row("echo"), row("silence", parameters=0)], colour=[row("red", "fake_colour.red:Red")])
    assert registry.packages() == {"colour": "fake_colour", "sound": "fake_sound"}
    assert [entry.name for entry in registry.all_methods()] == ["red", "echo", "silence"]
    entry = registry.methods("colour")["red"]
    assert (entry.package, entry.target, entry.parameters) == ("colour", "fake_colour.red:Red", 32)
    assert registry.package_folder("sound") == tmp_path / "fake_sound"
    assert not [name for name in sys.modules if name.startswith("fake_")]


def test_two_packages_may_each_have_a_method_of_one_name(install, tmp_path, monkeypatch):
    install(sound=[row("probe", "fake_sound_methods:Probe")], colour=[row("probe", "fake_colour_methods:Probe")])
    for short in ("sound", "colour"):
        (tmp_path / f"fake_{short}_methods.py").write_text("class Probe: pass")
        monkeypatch.delitem(sys.modules, f"fake_{short}_methods", raising=False)
    assert registry.find_method("sound", "probe").__module__ == "fake_sound_methods"
    assert registry.find_method("colour", "probe").__module__ == "fake_colour_methods"


def test_a_method_that_is_twice_in_a_package_is_refused(install):
    install(sound=[row("echo"), row("echo")])
    with pytest.raises(InputError, match=r"methods\.toml: the method 'echo' is there twice"):
        registry.methods("sound")


def test_a_package_is_found_by_its_import_name(install):
    install(sound=[row("echo")])
    assert registry.short_name("fake_sound") == "sound"
    with pytest.raises(InputError, match=r"fake_taste is not installed\. Installed: fake_sound"):
        registry.short_name("fake_taste")


def test_an_unknown_method_or_package_lists_the_known(install):
    install(sound=[row("silence"), row("echo")])
    with pytest.raises(InputError, match=r"unknown method 'eco'\. Those of sound: echo, silence"):
        registry.find_method("sound", "eco")
    with pytest.raises(InputError, match=r"no package 'taste' is installed \(installed: sound\)"):
        registry.package_folder("taste")


def test_a_method_is_imported_when_it_is_asked_for(install, tmp_path, monkeypatch):
    install(sound=[row("echo", "fake_sound_methods:Echo"), row("lost", "fake_sound_methods_2:Lost")])
    (tmp_path / "fake_sound_methods.py").write_text("class Echo: pass")
    monkeypatch.delitem(sys.modules, "fake_sound_methods", raising=False)
    assert registry.find_method("sound", "echo").__name__ == "Echo"
    with pytest.raises(InputError, match="'lost' needs fake_sound_methods_2, which is not installed"):
        registry.find_method("sound", "lost")


def test_the_table_is_markdown(install):
    install(sound=[row("echo", parameters=76800), row("silence", parameters=0)])
    lines = registry.markdown().splitlines()
    assert lines[1].count("|---") == lines[0].count("|") - 1
    assert "76,800 (a model, m = 4)" in lines[2]
    assert "soft \\| prompt" in lines[2]
    assert "| none |" in lines[3]


def test_no_package_at_all(install):
    install()
    assert registry.packages() == {}
    assert registry.all_methods() == []
    with pytest.raises(InputError, match="installed: none"):
        registry.package_folder("nlp")


def test_no_public_name_is_hidden_by_the_module_that_holds_it() -> None:
    import pt_core

    rooms = {path.stem for path in Path(pt_core.__file__).parent.glob("*.py")}
    assert not rooms & set(pt_core.__all__)
