"""The pretended device refuses what a GPU refuses, and computes what the CPU computes."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from pt_core import FitConfig, fit
from pt_core.elsewhere import elsewhere
from pt_core.testing import tiny, tiny_split


def test_a_step_there_has_the_values_and_gradients_of_the_cpu() -> None:
    x, y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    found = []
    for there in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        held = model[0].weight
        if not there:
            F.cross_entropy(model(x), y).backward()
            found.append(model[0].weight.grad)
            continue
        with elsewhere():
            model.to(Accelerator().device)
            assert model[0].weight is held, "a parameter is no longer the object that others hold"
            loss = F.cross_entropy(model(x.to("meta")), y.to("meta"))
            loss.backward()
            assert loss.device.type == "meta"
            assert loss.item() > 0
            found.append(model[0].weight.grad.to("cpu"))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: F.embedding(torch.tensor([1]), there),
        lambda there, here: F.linear(here, there),
        lambda there, here: there.gather(1, torch.tensor([[1]])),
        lambda there, here: there * torch.arange(3),
    ],
)
def test_tensors_on_two_devices_are_refused(mix) -> None:
    here = torch.ones(3, 3)
    with elsewhere(), pytest.raises(AssertionError, match="tensors on two devices"):
        mix(here.to("meta"), here)


def test_doubles_are_refused_as_by_a_mac() -> None:
    with elsewhere():
        there = torch.ones(3, 3).to("meta")
        for widen in (there.double, lambda: torch.ones(3, dtype=torch.float64).to("meta")):
            with pytest.raises(AssertionError, match=r"torch\.float64, which not every accelerator has"):
                widen()
        assert there.cpu().double().dtype == there.to("cpu", torch.float64).dtype == torch.float64


def test_a_run_with_a_folder_is_made_and_resumed_there(tmp_path) -> None:
    for steps in (2, 0):
        _, method = tiny()
        made = []
        with elsewhere():
            run = FitConfig(max_steps=2, progress=False)
            fit(method, tiny_split(8), tiny_split(4, 1), run, tmp_path, after_step=made.append)
        assert len(made) == steps


def test_what_a_gpu_takes_from_the_cpu_is_taken() -> None:
    with elsewhere():
        there = torch.arange(6.0, device="meta").view(2, 3)
        assert (there + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert there[torch.tensor([1])].tolist() == [[3, 4, 5]]
        for made in (torch.tensor([7], device="meta"), there.new_tensor([7]), torch.as_tensor([7]).to(there)):
            assert made.device.type == "meta"
            assert made.tolist() == [7]
        there[0] = torch.zeros(3, device="meta")
        assert there.to("cpu").tolist() == [[0, 0, 0], [3, 4, 5]]


def test_nothing_of_it_stays() -> None:
    before = (torch.tensor, torch.autocast, torch.is_autocast_enabled, Accelerator.device)
    with elsewhere():
        assert Accelerator().device.type == "meta"
    assert (torch.tensor, torch.autocast, torch.is_autocast_enabled, Accelerator.device) == before
    assert torch.ones(2, device="meta").is_meta
    assert not torch.__future__.get_swap_module_params_on_conversion()
