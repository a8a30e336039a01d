"""Killed at any moment, a run goes on to the same result.

Run as a program, this file imports torch once and then forks a child for every run it is asked for; a child can be told to
kill itself (SIGKILL) at the n-th line that it executes of a function of `pt_core.training` or `pt_core.evaluation`.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pt_core import evaluation, training
from pt_core.errors import InputError
from pt_core.method import Loss
from pt_core.plan import FitConfig
from pt_core.testing import (
    SHORT,
    Case,
    Killed,
    TinyLM,
    TinyPrompt,
    TinyPromptConfig,
    contract_checks,
    one_thread,
    tiny,
    tiny_split,
)
from pt_core.training import fit


@pytest.fixture(autouse=True)
def few_threads():
    with one_thread():
        yield


LONG = {"max_steps": 60, "batch_size": 5, "evaluate_every": 3, "checkpoint_every": 2, "log_every": 2}
LONG |= {"patience": 3, "min_delta": 0.1}
RUNS = {
    "plain": ({}, LONG),
    "random": ({"noise": 0.5}, LONG | {"micro_batch_size": 2, "schedule": "cosine", "seed": 3}),
}


def train(name: str, folder: Path, **changes):
    method_config, config = RUNS[name]
    _, method = tiny(**method_config)
    run = FitConfig.model_validate({"device": "cpu", "progress": False, **config, **changes})
    return method, fit(method, tiny_split(13), tiny_split(6, 1), run, folder)


# --- the program ----------------------------------------------------------------------------------------------------
def kill_at(function: str, line: int) -> None:
    """Die at the `line`-th executed line of `function` ("": of any function) of pt_core.training or pt_core.evaluation."""
    left, files = line, (training.__file__, evaluation.__file__)

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in files or function not in ("", frame.f_code.co_name):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def work(name: str, folder: Path, function: str, line: int) -> None:
    """One run, whose result is written down."""
    if line:
        kill_at(function, line)
    method, result = train(name, folder)
    sys.settrace(None)
    save_file(method.trained_state(), folder / "result.safetensors")
    (folder / "result.json").write_text(json.dumps({**vars(result), "seconds_per_step": 0, "seconds": 0}))


def serve() -> None:
    """Jobs from stdin, a line each: (run, folder, function, line). To stdout: the exit code of the child."""
    import torch._dynamo  # an optimiser would import it in every child

    assert torch._dynamo
    torch.set_num_threads(1)
    for job in sys.stdin:
        name, folder, function, line = json.loads(job)
        child = os.fork()
        if child == 0:
            try:
                work(name, Path(folder), function, line)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module", autouse=True)  # autouse: it imports torch while the first tests run
def program():
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(name: str, folder: Path, function: str = "", line: int = 0) -> int:
        server.stdin.write(json.dumps([name, str(folder), function, line]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.kill()
    server.communicate()


# --- optimisers ---------------------------------------------------------------------------------------------------------
RESUMES = next(check.values[0] for check in contract_checks() if check.id.startswith("a_killed_run"))


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "adafactor", "sgd"])
def test_optimiser_state_is_resumed(optimiser, tmp_path):
    config = SHORT.model_copy(update={"optimiser": optimiser, "weight_decay": 0.1, "schedule": "exponential"})
    RESUMES(Case(optimiser, tiny, tiny_split(11), tiny_split(5, seed=1), config), tmp_path)


def test_several_optimisers_with_momentum_and_plain_numbers_are_resumed(tmp_path):
    class Counting(torch.optim.SGD):
        """An optimiser whose state has a plain number, which its step depends on."""

        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                parameter.grad.mul_(state["calls"])
            return super().step(closure)

    class Two(TinyPrompt):
        def optimisers(self, config):
            groups = {group["name"]: [group] for group in self.parameter_groups()}
            return {
                "prompt": torch.optim.SGD(groups["prompt"], momentum=0.9, nesterov=True),
                "prompt.2": Counting(groups["bias"], lr=0.01),
            }

    def make(seed):
        backbone = TinyLM()
        return backbone, Two(backbone, TinyPromptConfig(seed=seed))

    RESUMES(Case("two", make, tiny_split(11), tiny_split(5, seed=1)), tmp_path)


# --- folders ----------------------------------------------------------------------------------------------------------
def short(folder, backbone=None, method_config=None, rows=9, validation=True, ids="a", moved=0.0, **changes):
    backbone = backbone or TinyLM()
    method = TinyPrompt(backbone, TinyPromptConfig(**(method_config or {})))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(moved)
    run = FitConfig.model_validate(SHORT.model_dump() | changes)
    train = replace(tiny_split(rows), ids=[f"{ids}/{i}" for i in range(rows)])
    return method, fit(method, train, tiny_split(5, 1) if validation else None, run, folder)


def test_start_values_of_another_device_are_the_same_run(tmp_path):
    _, first = short(tmp_path)
    assert short(tmp_path, moved=1e-7)[1].metrics == first.metrics


def test_settings_are_compared_to_the_last_digit(tmp_path, monkeypatch):
    for weight, refused in ((0.05, False), (0.0500001, True)):
        monkeypatch.setattr(TinyPrompt, "run_identity", lambda self, w=weight: {"weights": [500.0, w]})
        with pytest.raises(InputError, match=r"method_identity\.weights") if refused else nullcontext():
            short(tmp_path)


def test_a_buffer_with_infinities_is_resumed(tmp_path, monkeypatch):
    made = TinyPrompt.__init__

    def masked(self, backbone, config=None):
        made(self, backbone, config)
        self.register_buffer("mask", torch.tensor([[0.0, masks], [0.0, 0.0]]))

    masks = -math.inf
    monkeypatch.setattr(TinyPrompt, "__init__", masked)
    _, first = short(tmp_path)
    assert short(tmp_path)[1].metrics == first.metrics
    masks = 0.0
    with pytest.raises(InputError, match=r"start\.mask"):
        short(tmp_path)


def test_a_method_that_is_trained_already_does_not_go_on(tmp_path):
    method, _ = short(tmp_path)
    run = FitConfig.model_validate(SHORT.model_dump())
    train = replace(tiny_split(9), ids=[f"a/{i}" for i in range(9)])
    with pytest.raises(InputError, match="To go on with that run, make the method anew"):
        fit(method, train, tiny_split(5, 1), run, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are read from /proc")
def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(tmp_path, monkeypatch):
    synced, gone = [], []
    real_sync, real_remove = os.fsync, shutil.rmtree
    monkeypatch.setattr(
        os, "fsync", lambda n: (synced.append(Path(os.readlink(f"/proc/self/fd/{n}")).name), real_sync(n))
    )
    monkeypatch.setattr(shutil, "rmtree", lambda path: (gone.append(len(synced)), real_remove(path)))
    short(tmp_path, checkpoint_every=3)
    written = " ".join(synced[: gone[0]])
    for name in ("state.safetensors", "state.json", "metrics.jsonl", r"checkpoint-0000006"):
        assert re.search(rf"(^| )\.?{name}", written), written
    assert synced[gone[0] - 1] == tmp_path.name


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "metrics.jsonl", "best"])
def test_a_damaged_folder_is_named(name, tmp_path):
    short(tmp_path)
    file = next(path for path in tmp_path.rglob("*") if path.name.startswith(name))
    if name == "best":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] + b"}{")
    with pytest.raises(InputError, match="cannot be read .* Delete the run's folder"):
        short(tmp_path)


def test_a_log_that_became_shorter_is_not_filled_up(tmp_path):
    short(tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert len(short(tmp_path)[1].history) == len(lines) - 1
    assert file.read_text() == "".join(lines[:-1])


def test_a_checkpoint_that_another_run_has_written_meanwhile_says_so_and_is_left_alone(tmp_path, monkeypatch):
    write = training.write

    def meanwhile(file, content):
        write(file, content)
        if file.name == "state.json":
            others = tmp_path / "run" / file.parent.name.removeprefix(".").rpartition(".")[0]
            others.mkdir()
            (others / "state.json").write_text("theirs")

    monkeypatch.setattr(training, "write", meanwhile)
    with pytest.raises(InputError, match=r"run: another run writes here. Wait for its end, or choose another output"):
        fit(tiny()[1], tiny_split(20), None, SHORT, tmp_path / "run")
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    assert [file.read_text() for file in kept.iterdir()] == ["theirs"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the output folder is a file"):
        short(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 3}, "config.batch_size: 4 there, 3 here"),
        ({"seed": 1}, "config.seed: 0 there, 1 here"),
        ({"max_steps": 8}, "config.max_steps: 6 there, 8 here; total_steps: 6 there, 8 here"),
        ({"method_config": {"lr": 0.2}}, "method_config.lr: 0.1 there, 0.2 here"),
        ({"rows": 8}, "train: '9 rows ("),
        ({"ids": "b"}, "train: '9 rows ("),
        ({"validation": False}, "validation: '5 rows ("),
        ({"moved": 0.5}, "start.bias: [0.0, 0.0] there, ["),
        ({"backbone": TinyLM(seed=1)}, "backbone: '"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_another_configuration_is_refused_by_name(changes, named, tmp_path):
    short(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=re.escape(f"holds a run of another configuration ({named}")) as refusal:
        short(tmp_path, **changes)
    assert "another output folder" in str(refusal.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_same_weights_of_another_configuration_are_another_run(tmp_path):
    def backbone(activation):
        made = TinyLM()
        made.config = SimpleNamespace(to_dict=lambda: {"activation": activation})
        return made

    short(tmp_path, backbone=backbone("gelu"))
    short(tmp_path, backbone=backbone("gelu"))
    with pytest.raises(InputError, match="holds a run of another configuration .backbone: '"):
        short(tmp_path, backbone=backbone("relu"))


def test_a_method_adds_to_what_must_be_the_same(tmp_path, monkeypatch):
    short(tmp_path)
    monkeypatch.setattr(TinyPrompt, "run_identity", lambda self: {"rows": "b"})
    with pytest.raises(InputError, match=r"\(method_identity\.rows: None there, 'b' here\)"):
        short(tmp_path)


def test_a_checkpoint_of_before_these_keys_is_resumed(tmp_path):
    _, first = short(tmp_path)
    file = tmp_path / "checkpoint-0000006" / "state.json"
    content = json.loads(file.read_text())
    del content["identity"]["method_identity"]
    for key in ("training_seconds", "timed_steps", "seconds"):
        del content["state"][key]
    file.write_text(json.dumps(content))
    _, again = short(tmp_path)
    assert (again.metrics, again.seconds_per_step) == (first.metrics, 0)


OTHER = {
    **{
        "micro_batch_size": 1,
        "optimiser": "sgd",
        "lr": 0.1,
        "weight_decay": 0.1,
        "schedule": "linear",
        "warmup_steps": 1,
    },
    **{"final_factor": 0.5, "max_grad_norm": 0.5, "evaluate_every": 5, "eval_batch_size": 7, "monitor": "accuracy"},
    **{"larger_is_better": False, "patience": 5, "min_delta": 0.2, "interrupt_below": 9.0, "keep_best": False},
    **{"log_every": 7, "precision": "bf16", "packed_gib": 1.0, "batch_size": 3, "max_steps": 8, "seed": 1},
    **{"bucket_by_length": True},
}


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_that_changes_numbers_is_part_of_the_run(name, tmp_path):
    short(tmp_path)
    with pytest.raises(InputError, match=rf"holds a run of another configuration \(config\.{name}: "):
        short(tmp_path, **{name: OTHER[name]})


def test_all_settings_are_either_part_of_the_run_or_change_no_number():
    assert {*OTHER} | training.MAY_CHANGE_ON_RESUME | {"epochs", "momentum"} == FitConfig.model_fields.keys()


def test_what_changes_no_number_may_change(tmp_path):
    _, first = short(tmp_path)
    _, again = short(tmp_path, checkpoint_every=1, progress=True, device="auto", trackers=("tensorboard",))
    assert again.history == first.history


def test_a_finished_run_is_not_run_again(tmp_path):
    method, first = short(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = (tmp_path / "checkpoint-0000006").stat()
    again_method, again = short(tmp_path)
    assert (again.steps, again.best_step, again.metrics) == (first.steps, first.best_step, first.metrics)
    assert again.history == first.history
    assert torch.equal(again_method.prompt.weight, method.prompt.weight)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    now = (tmp_path / "checkpoint-0000006").stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_what_was_logged_after_the_last_step_is_not_doubled(tmp_path):
    class Reports(TinyPrompt):
        def fit(self, train, validation=None, config=None, output_dir=None):
            loop = training.Loop(self, config, output_dir, total_steps=3)
            for _ in loop.steps():
                loop.backward(self.loss(train.batch([0, 1])))
                loop.update()
            loop.log({"test": 1.0})
            return loop.finish()

    for _ in range(3):
        Reports(TinyLM()).fit(tiny_split(4), config=SHORT, output_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text().count("test") == 1


def test_what_was_logged_before_the_first_step_is_not_doubled(tmp_path):
    class Reports(TinyPrompt):
        def fit(self, train, validation=None, config=None, output_dir=None):
            loop = training.Loop(self, config, output_dir, total_steps=6)
            loop.log({"start": 1.0})
            loop.record(loop.evaluate(validation))
            for step in loop.steps():
                if step == self.dies_at:
                    raise Killed
                loop.backward(self.loss(train.batch([0, 1])))
                loop.update()
                loop.record(loop.evaluate(validation))
            return loop.finish()

    def run(folder, dies_at=None):
        made = Reports(TinyLM())
        made.dies_at = dies_at
        return made.fit(tiny_split(4), tiny_split(4, 1), SHORT, folder)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", dies_at=5)  # after the checkpoint of step 4
    assert run(tmp_path / "killed").history == whole.history
    assert [row["step"] for row in whole.history if "loss" not in row] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_checkpoint_appears_as_a_whole(tmp_path, monkeypatch):
    """What has its name is complete: it is written beside and renamed, never copied into place."""

    def dies(source, target):
        assert sorted(path.name for path in Path(source).iterdir()) == ["state.json", "state.safetensors"]
        assert not Path(target).exists()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.os, "rename", dies)
        with pytest.raises(Killed):
            short(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert short(tmp_path)[1].history == short(tmp_path / "plain")[1].history


def test_leftovers_of_a_run_without_a_checkpoint_are_cleared(tmp_path):
    (tmp_path / ".checkpoint-0000002.77").mkdir()
    (tmp_path / ".checkpoint-0000002.77" / "state.safetensors").write_bytes(b"half")
    (tmp_path / ".best-0000002.safetensors.77").write_bytes(b"half")
    (tmp_path / "best-0000002.safetensors").write_bytes(b"of the killed run")
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 9.0}\n{"step": 4, "lo')
    _, result = short(tmp_path)
    _, plain = short(tmp_path / "plain")
    assert result.history == plain.history
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"] == plain.history[0]["loss"]
    names = sorted(path.name for path in tmp_path.iterdir() if path.name != "plain")
    assert names == [f"best-{plain.best_step:07d}.safetensors", "checkpoint-0000006", "metrics.jsonl"]


def test_a_half_removed_old_checkpoint_does_not_matter(tmp_path):
    _, first = short(tmp_path)
    (tmp_path / "checkpoint-0000004").mkdir()
    assert short(tmp_path)[1].history == first.history


def test_the_newest_checkpoint_is_found_by_number(tmp_path):
    short(tmp_path)
    loop = training.Loop(tiny()[1], SHORT, total_steps=1)
    loop.folder = tmp_path
    (tmp_path / "checkpoint-10000000").mkdir()
    assert [path.name for path in loop._checkpoints()] == ["checkpoint-0000006", "checkpoint-10000000"]


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor"])
def test_a_checkpoint_has_what_is_trained_and_nothing_of_the_backbone(optimiser, tmp_path):
    class Wide(TinyPrompt):
        def __init__(self, backbone, config=None):
            super().__init__(backbone, config)
            self.wide = torch.nn.Parameter(torch.ones(600_000))

        def loss(self, batch):
            loss = super().loss(batch)
            return Loss(loss.total + loss.count * self.wide.square().mean(), loss.count)

        def parameter_groups(self):
            return [*super().parameter_groups(), {"name": "wide", "params": [self.wide]}]

    backbone = TinyLM(vocabulary=20_000, dim=64)
    weights = sum(p.numel() * 4 for p in backbone.parameters())
    method, run = Wide(backbone), FitConfig.model_validate(SHORT.model_dump() | {"optimiser": optimiser})
    fit(method, tiny_split(9), tiny_split(5, 1), run, tmp_path)
    trained = sum(t.numel() * t.element_size() for t in method.trained_state().values())
    assert min(weights, trained) > 2 * 2**20  # neither weights nor a second copy of what is trained would pass as slack
    (folder,) = tmp_path.glob("checkpoint-*")
    size = sum(path.stat().st_size for path in folder.iterdir())
    moments = 2 * trained if optimiser == "adamw" else 1.1 * trained
    assert trained < size <= trained + moments + 2**20
    (best,) = tmp_path.glob("best-*")
    assert trained < best.stat().st_size <= trained + 1000
    everything = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert everything <= 2 * trained + moments + 2**20
    names = load_file(folder / "state.safetensors").keys()
    assert {name for name in names if name.startswith("method.")} == {
        "method.prompt.weight",
        "method.bias",
        "method.wide",
        "method.rows_seen",
    }


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    short(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoint-0000006").iterdir()) == [
        "state.json",
        "state.safetensors",
    ]
    assert json.loads((tmp_path / "checkpoint-0000006" / "state.json").read_text())["state"]["step"] == 6


def test_tied_parameters_can_be_kept(tmp_path):
    class Tied(TinyPrompt):
        def __init__(self, backbone, config=None):
            super().__init__(backbone, config)
            self.same = self.bias

    run = FitConfig.model_validate(SHORT.model_dump())
    fit(Tied(TinyLM()), tiny_split(9), tiny_split(5, 1), run, tmp_path)
    assert fit(Tied(TinyLM()), tiny_split(9), tiny_split(5, 1), run, tmp_path).steps == 6


# --- killed -----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", RUNS)
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(name, program, tmp_path):
    """Kills in a pass, in accumulation, in evaluation, while a log row, a best prompt or a checkpoint is written, and while
    a run is resumed; the lines are drawn with a seed."""
    assert program(name, tmp_path / "whole") == 0
    draw = random.Random(name).randint
    kills = [
        ("", draw(200, 700)),
        ("backward", draw(20, 60)),  # mid-accumulation
        ("update", draw(30, 90)),
        ("checkpoint", draw(5, 20)),
        ("checkpoint", draw(40, 60)),
        ("_write_tensors", draw(4, 8)),
        ("_resume", draw(4, 10)),
        ("_load", draw(2, 12)),
        ("record", draw(14, 24)),
        ("evaluate", draw(20, 60)),
        ("log", draw(3, 12)),
        ("", draw(700, 1500)),
    ]
    for function, line in kills:
        assert program(name, tmp_path / "killed", function, line) == -signal.SIGKILL, f"{function}, line {line}"
        assert not (tmp_path / "killed" / "result.json").exists()
    assert program(name, tmp_path / "killed") == 0

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = json.loads((whole / "result.json").read_text())
    assert result["stopped_early"]
    assert 12 < result["steps"] < 60
    assert json.loads((killed / "result.json").read_text()) == result
    expected, found = load_file(whole / "result.safetensors"), load_file(killed / "result.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    kinds = [(row["step"], "loss" in row) for row in rows]
    assert len(set(kinds)) == len(kinds)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


if __name__ == "__main__":
    serve()
