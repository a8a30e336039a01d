"""A prompt goes into a backbone and comes out again, and calls carry the prompt that is theirs."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from contextvars import copy_context
from types import MethodType

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, extract_model_from_parallel
from safetensors.torch import save_model
from torch import nn

from pt_core import attachment as room
from pt_core.attachment import attach, off, register_family, route
from pt_core.errors import InputError
from pt_core.frozen import freeze, snapshot
from pt_core.prompts import Prompt, SoftPrompt
from pt_core.testing import TinyFamily, TinyLM, one_thread

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]])


@pytest.fixture(autouse=True)
def few_threads():
    register_family(TinyFamily())
    with one_thread(), torch.no_grad():
        yield


def model() -> TinyLM:
    return freeze(TinyLM())


def prompt(seed: int, length: int = 3) -> SoftPrompt:
    return SoftPrompt(length, 8, generator=torch.Generator().manual_seed(seed))


def by_hand(backbone: TinyLM, soft: SoftPrompt, ids=IDS) -> torch.Tensor:
    """The prompt in front, its rows dropped from the output."""
    embedded = torch.cat([soft.weight.expand(len(ids), -1, -1), backbone.embed(ids)], dim=1)
    return TinyLM.forward(backbone, embeddings=embedded)[:, soft.length :]


# --- in and out -----------------------------------------------------------------------------------------------------
def test_tokens_go_in_front_and_their_rows_are_dropped():
    backbone, soft = model(), prompt(0)
    plain = backbone(IDS)
    attach(backbone, soft)
    assert torch.equal(backbone(IDS), by_hand(backbone, soft))
    assert backbone(IDS).shape == plain.shape
    assert float((backbone(IDS) - plain).abs().max()) > 0.1


def test_a_prompt_may_be_attached_several_times():
    backbone, soft = model(), prompt(0)
    plain = backbone(IDS)
    handles = [attach(backbone, soft) for _ in range(3)]
    for handle in handles:
        assert torch.equal(backbone(IDS), by_hand(backbone, soft))
        handle.remove()
    assert torch.equal(backbone(IDS), plain)


def test_a_prompt_that_is_attached_twice_is_one_submodule_until_the_last_is_removed(tmp_path):
    backbone, soft = model(), prompt(0)
    first, second = attach(backbone, soft), attach(backbone, soft)
    other = attach(backbone, prompt(1))
    assert [name for name in backbone.state_dict() if name.startswith("pt_")] == [
        "pt_prompt_0.weight",
        "pt_prompt_1.weight",
    ]
    save_model(backbone, tmp_path / "model.safetensors")  # which refuses a tensor of two names
    first.remove()
    other.remove()
    assert backbone.pt_prompt_0 is soft
    assert torch.equal(backbone(IDS), by_hand(backbone, soft))
    second.remove()
    assert not hasattr(backbone, "pt_prompt_0")


def test_a_cast_of_the_backbone_leaves_its_prompt_as_it_is():
    backbone, soft = model(), prompt(0)
    before = soft.weight.clone()
    attach(backbone, soft)
    backbone.bfloat16()
    assert backbone.embed.weight.dtype == torch.bfloat16
    backbone.half().float()
    assert torch.equal(soft.weight, before)
    assert backbone.double().pt_prompt_0.weight.dtype == torch.float64


def test_what_is_no_prompt_is_refused():
    backbone = model()
    with pytest.raises(InputError, match=r"a str is no prompt.*SoftPrompt"):
        attach(backbone, "a photo of")
    handle = attach(backbone, prompt(0))
    with pytest.raises(InputError, match=r"a sequence of prompts.*\[handle\]"), route(backbone, handle):
        pass


class Outer(nn.Module):
    """A backbone whose prompts enter in a part of it."""

    def __init__(self):
        super().__init__()
        self.inner = model()


class OuterFamily(TinyFamily):
    name = "outer"

    def matches(self, backbone):
        return isinstance(backbone, Outer)

    def check(self, backbone, prompt):
        pass

    def patches(self, backbone, selected):
        return super().patches(backbone.inner, selected)


def test_a_part_of_a_backbone_with_prompts_takes_none_of_its_own():
    register_family(OuterFamily())
    outer = Outer()
    handle = attach(outer, prompt(0))
    with pytest.raises(InputError, match=r"a part of this TinyLM.*one of the two"):
        attach(outer.inner, prompt(1))
    handle.remove()
    inner = attach(outer.inner, prompt(1))
    with pytest.raises(InputError, match="a part of this Outer"):
        attach(outer, prompt(0))
    inner.remove()
    assert "forward" not in outer.inner.__dict__


def test_disabled_or_removed_the_backbone_is_bit_identical():
    backbone = model()
    before, parts, plain = snapshot(backbone), [*backbone.__dict__], backbone(IDS)
    handle = attach(backbone, prompt(0))
    handle.enabled(False)
    assert torch.equal(backbone(IDS), plain)
    handle.enabled()
    assert not torch.equal(backbone(IDS), plain)
    with off(backbone):
        assert torch.equal(backbone(IDS), plain)
    assert not torch.equal(backbone(IDS), plain)
    handle.remove()
    assert torch.equal(backbone(IDS), plain)
    assert snapshot(backbone) == before
    assert [*backbone.__dict__] == parts
    handle.remove()  # does no harm


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_prompts_are_removed_in_any_order(order):
    backbone = model()
    plain = backbone(IDS)
    soft = [prompt(i, length=i + 1) for i in range(3)]
    handles = [attach(backbone, p) for p in soft]
    left = [0, 1, 2]
    for i in order:
        assert torch.equal(backbone(IDS), by_hand(backbone, soft[left[-1]]))  # the newest one that is left
        handles[i].remove()
        left.remove(i)
    assert torch.equal(backbone(IDS), plain)
    assert "forward" not in backbone.__dict__
    assert list(dict(backbone.named_children())) == ["embed", "attention", "norm", "dropout", "head"]


def test_always_makes_the_prompt_a_submodule_that_optimisers_find():
    backbone = model()
    attach(backbone, prompt(0))
    second = attach(backbone, prompt(1))
    hidden = attach(backbone, prompt(2), always=False)
    assert [n for n, p in backbone.named_parameters() if p.requires_grad] == [
        "pt_prompt_0.weight",
        "pt_prompt_1.weight",
    ]
    assert hidden.name is None
    second.remove()
    assert attach(backbone, prompt(3)).name == "pt_prompt_1"
    assert backbone.pt_prompt_0.weight.requires_grad


def test_a_prompt_that_is_not_always_on_needs_its_context():
    backbone, soft = model(), prompt(0)
    plain = backbone(IDS)
    handle = attach(backbone, soft, always=False)
    assert torch.equal(backbone(IDS), plain)
    with handle.active():
        assert torch.equal(backbone(IDS), by_hand(backbone, soft))
        with off(backbone):
            assert torch.equal(backbone(IDS), plain)
        assert torch.equal(backbone(IDS), by_hand(backbone, soft))
    assert torch.equal(backbone(IDS), plain)


def test_an_error_inside_leaves_no_prompt_active():
    backbone = model()
    plain = backbone(IDS)
    handle = attach(backbone, prompt(0), always=False)
    with pytest.raises(ZeroDivisionError), handle.active():
        raise ZeroDivisionError
    assert torch.equal(backbone(IDS), plain)


def test_gradients_reach_the_prompt_and_not_the_backbone():
    backbone, soft = model(), prompt(0)
    attach(backbone, soft)
    with torch.enable_grad():
        backbone(IDS).square().sum().backward()
    assert float(soft.weight.grad.abs().min()) > 0
    assert all(p.grad is None for n, p in backbone.named_parameters() if not n.startswith("pt_prompt"))


# --- several prompts ------------------------------------------------------------------------------------------------
def test_each_row_carries_its_own_prompt():
    backbone, first, second = model(), prompt(1, length=2), prompt(2, length=5)
    a, b = attach(backbone, first, always=False), attach(backbone, second, always=False)
    plain = backbone(IDS)
    with route(backbone, [b, None, a]):
        routed = backbone(IDS)
    torch.testing.assert_close(routed[0], by_hand(backbone, second)[0])
    torch.testing.assert_close(routed[1], plain[1])
    torch.testing.assert_close(routed[2], by_hand(backbone, first)[2])


def test_two_backbones_do_not_mix():
    one, two = model(), TinyLM(seed=1).eval()
    plain = two(IDS)
    handle = attach(one, prompt(0), always=False)
    other = attach(two, prompt(1), always=False)
    with handle.active():
        assert torch.equal(two(IDS), plain)
        with other.active():
            assert torch.equal(one(IDS), by_hand(one, handle.prompt))
            assert torch.equal(two(IDS), by_hand(two, other.prompt))
    with pytest.raises(InputError, match="a prompt of another backbone"), route(one, [other]):
        pass


def test_two_threads_do_not_mix():
    backbone = model()
    prompts = [prompt(i, length=i + 1) for i in range(4)]
    handles = [attach(backbone, p, always=False) for p in prompts]
    plain = backbone(IDS)
    expected = [by_hand(backbone, p) for p in prompts]
    wrong, start = [], threading.Barrier(5)

    def work(i: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(60):
                if i == 4:
                    wrong.append(not torch.equal(backbone(IDS), plain))
                    continue
                with handles[i].active():
                    wrong.append(not torch.equal(backbone(IDS), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    with handles[0].active():  # of this thread alone
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 300
    assert not any(wrong)


def test_a_copied_context_keeps_its_prompt():
    backbone = model()
    handle = attach(backbone, prompt(0), always=False)
    with handle.active():
        context = copy_context()
    assert torch.equal(context.run(backbone, IDS), by_hand(backbone, handle.prompt))


def steps(backbone, handle):
    with handle.active():
        yield backbone(IDS)
        yield backbone(IDS)


def test_a_choice_that_ends_in_another_context_says_so():
    backbone = model()
    handle = attach(backbone, prompt(0), always=False)
    generator = steps(backbone, handle)
    copy_context().run(next, generator)
    with pytest.raises(InputError, match=r"ends in another thread or task.*around each step of a generator"):
        for _ in range(2):
            copy_context().run(next, generator, None)


def test_an_error_within_a_choice_that_ends_out_of_turn_is_what_is_raised():
    backbone = model()
    a, b = (attach(backbone, prompt(seed), always=False) for seed in (0, 1))
    inner = b.active()
    with pytest.raises(KeyError, match="mine"), a.active():
        inner.__enter__()
        raise KeyError("mine")
    inner.__exit__(None, None, None)
    assert torch.equal(backbone(IDS), model()(IDS))


def test_choices_that_end_out_of_turn_say_so_and_leave_nothing_behind():
    backbone = model()
    plain = backbone(IDS)
    a, b = (steps(backbone, attach(backbone, prompt(seed), always=False)) for seed in (0, 1))
    next(a), next(b), next(a)
    with pytest.raises(InputError, match="before one that was made within it"):
        next(a)
    next(b)
    assert next(b, None) is None
    assert torch.equal(backbone(IDS), plain)


def test_a_removed_prompt_is_carried_by_no_row_any_more():
    backbone = model()
    a, b = attach(backbone, prompt(0), always=False), attach(backbone, prompt(1), always=False)
    plain = backbone(IDS)
    with route(backbone, [a, b, a]):
        a.remove()
        routed = backbone(IDS)
        b.remove()
        assert torch.equal(backbone(IDS), plain)
    torch.testing.assert_close(routed[[0, 2]], plain[[0, 2]])
    torch.testing.assert_close(routed[1], by_hand(backbone, b.prompt)[1])
    with pytest.raises(InputError, match="one that was removed"), a.active():
        pass


# --- what stays as it was -------------------------------------------------------------------------------------------
def test_class_signature_and_mode_stay():
    backbone = model()
    before = inspect.signature(backbone.forward)
    handle = attach(backbone, prompt(0))
    assert inspect.signature(backbone.forward) == before
    assert list(before.parameters) == ["input_ids", "embeddings"]
    assert type(backbone) is TinyLM
    assert torch.equal(backbone(input_ids=IDS), backbone(IDS))
    handle.remove()
    assert inspect.signature(backbone.forward) == before


def test_a_forward_that_was_on_the_instance_comes_back():
    backbone = model()
    calls, own = [], backbone.forward

    def hooked(*arguments, **keywords):
        calls.append(1)
        return own(*arguments, **keywords)

    backbone.forward = hooked  # as accelerate does
    handle = attach(backbone, prompt(0))
    backbone(IDS)
    assert len(calls) == 1
    handle.remove()
    assert backbone.forward is hooked


def test_a_forward_wrapped_after_us_is_left_in_place():
    backbone = model()
    plain = backbone(IDS)
    handle = attach(backbone, prompt(0))
    ours = backbone.forward
    backbone.forward = lambda *arguments, **keywords: ours(*arguments, **keywords)
    theirs = backbone.forward
    handle.remove()
    assert backbone.forward is theirs
    assert torch.equal(backbone(IDS), plain)
    again = attach(backbone, prompt(1))
    assert torch.equal(backbone(IDS), by_hand(backbone, again.prompt))


def test_accelerate_unwraps_its_autocast_and_leaves_the_prompt_in():
    backbone = model()
    plain = backbone(IDS)
    handle = attach(backbone, prompt(0))
    ours, prompted = backbone.forward, backbone(IDS)
    # What `Accelerator(mixed_precision="bf16").prepare` does to a forward that is a method, without its global state.
    backbone._original_forward = ours
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)(ours.__func__)
    backbone.forward = MethodType(convert_outputs_to_fp32(autocast), backbone)
    assert backbone(IDS).dtype == torch.float32
    assert not torch.equal(backbone(IDS), prompted)
    extract_model_from_parallel(backbone, keep_fp32_wrapper=False)
    assert backbone.forward == ours
    assert torch.equal(backbone(IDS), prompted)
    handle.remove()
    assert "forward" not in backbone.__dict__
    assert torch.equal(backbone(IDS), plain)


def test_accelerate_unwraps_the_autocast_that_was_there_before_the_prompt():
    backbone = model()
    plain = backbone(IDS)
    backbone._original_forward = backbone.forward
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)(backbone.forward.__func__)
    backbone.forward = MethodType(convert_outputs_to_fp32(autocast), backbone)
    half = backbone(IDS)
    handle = attach(backbone, prompt(0))
    prompted = backbone(IDS)
    extract_model_from_parallel(backbone, keep_fp32_wrapper=False)  # binds our method to the model once more
    assert torch.equal(backbone(IDS), prompted)
    handle.remove()
    assert torch.equal(backbone(IDS), half) and not torch.equal(half, plain)
    again = attach(backbone, prompt(1))
    assert not torch.equal(backbone(IDS), half)
    again.remove()
    assert torch.equal(backbone(IDS), half)


def test_a_copy_of_a_part_is_a_part_of_its_own_without_prompts():
    register_family(OuterFamily())
    outer = Outer()
    plain = outer.inner(IDS)
    attach(outer, prompt(0))
    part = copy.deepcopy(outer.inner)
    assert torch.equal(part(IDS), plain) and not torch.equal(outer.inner(IDS), plain)
    part.embed.weight.zero_()
    assert not torch.equal(part(IDS), plain)


def test_a_backbone_with_prompts_is_not_copied():
    backbone = model()
    handle = attach(backbone, prompt(0))
    with pytest.raises(InputError, match=r"carries prompts cannot be copied.*Remove the prompts first"):
        copy.deepcopy(backbone)
    with pytest.raises(InputError, match=r"carries prompts cannot be pickled.*Remove the prompts first"):
        pickle.dumps(backbone)
    handle.remove()
    assert torch.equal(copy.deepcopy(backbone)(IDS), backbone(IDS))


def test_a_backbone_is_collected_with_its_prompts():
    backbone = model()
    attach(backbone, prompt(0))
    seen = weakref.ref(backbone)
    del backbone
    gc.collect()
    assert seen() is None


# --- families -------------------------------------------------------------------------------------------------------
def test_an_unknown_backbone_lists_the_families(monkeypatch):
    monkeypatch.setattr("pt_core.registry.packages", dict)
    with pytest.raises(InputError, match=r"how prompts enter a Linear \(families: .*tiny") as refusal:
        attach(nn.Linear(2, 2), prompt(0))
    assert "register_family" in str(refusal.value)


def test_what_compiles_a_backbone_is_not_what_a_prompt_is_attached_to():
    with pytest.raises(
        InputError, match=r"what `torch\.compile` returns\. Attach the prompt to the model, then compile it"
    ):
        attach(torch.compile(model()), prompt(0))


def test_a_prompt_that_does_not_fit_changes_nothing():
    backbone = model()
    for wrong in (SoftPrompt(3, 7), Prompt()):
        with pytest.raises(InputError, match="tokens of width 8"):
            attach(backbone, wrong)
    assert "forward" not in backbone.__dict__
    assert "_pt_attached" not in backbone.__dict__


def test_a_family_of_the_same_name_is_replaced(monkeypatch):
    monkeypatch.setattr(room, "_FAMILIES", [])
    first, second = TinyFamily(), TinyFamily()
    register_family(first)
    register_family(second)
    assert len(room._FAMILIES) == 1
    assert room._FAMILIES[0] is second
