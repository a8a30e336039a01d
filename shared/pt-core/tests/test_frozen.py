"""Frozen stays frozen, a backbone is known again, and no feature is computed twice or lost by more than a kill allows."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pt_core.errors import InputError
from pt_core.frozen import FeatureCache, assert_unchanged, compare, fingerprint, freeze, identity, snapshot
from pt_core.prompts import Prompt


class Trunk(nn.Module):
    """A small backbone with everything that matters here: dropout, BatchNorm, tied weights, all kinds of buffers."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5)) for _ in range(3)
        )
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(8))
        self.register_buffer("table", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Config:
    """The part of a transformers configuration that is looked at."""

    def __init__(self, name_or_path: str = "org/tiny", **values: object) -> None:
        self._name_or_path = name_or_path
        self._commit_hash = "0123abc"
        self.values = values

    def to_dict(self) -> dict[str, object]:
        return {"hidden_act": "gelu", "hidden_size": 16, "_name_or_path": self._name_or_path, **self.values}


class OnePrompt(Prompt):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(2, 16))


def silent(saved: object, module: nn.Module, **keywords: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(saved, module, **keywords)


# --- freezing --------------------------------------------------------------------------------------------------------


def test_freezing_stops_gradients_dropout_and_batchnorm() -> None:
    trunk = Trunk()
    assert freeze(trunk) is trunk
    before = snapshot(trunk)
    tokens = torch.randint(0, 11, (32,))
    first, second = trunk(tokens), trunk(tokens)
    assert not first.requires_grad and torch.equal(first, second)
    assert not any(part.training for part in trunk.modules())
    assert_unchanged(trunk, before)  # in train mode the running statistics would have moved
    trunk.train()(tokens)
    with pytest.raises(AssertionError, match=r"layers\.0\.1\.num_batches_tracked"):
        assert_unchanged(trunk, before)


def test_freezing_leaves_attached_prompts_trainable() -> None:
    trunk = Trunk()
    trunk.add_module("pt_prompt_0", OnePrompt().train())
    freeze(trunk)
    assert trunk.pt_prompt_0.rows.requires_grad and trunk.pt_prompt_0.training
    assert [n for n, p in trunk.named_parameters() if p.requires_grad] == ["pt_prompt_0.rows"]


@pytest.mark.parametrize("name", ["layers.2.0.bias", "layers.1.1.running_var", "table", "positions"])
def test_one_bit_anywhere_is_noticed_and_named(name: str) -> None:
    trunk = Trunk()
    before = snapshot(trunk)
    tensors = {**dict(trunk.named_parameters()), **dict(trunk.named_buffers())}
    bits = tensors[name].data.view(torch.uint8)
    bits.view(-1)[3] ^= 1
    with pytest.raises(AssertionError, match=rf"changed in 1 tensors, first: {name}"):
        assert_unchanged(trunk, before)
    bits.view(-1)[3] ^= 1
    assert_unchanged(trunk, before)


def test_minus_zero_is_a_change() -> None:
    trunk = Trunk()
    trunk.layers[0][0].bias.data.zero_()
    before = snapshot(trunk)
    trunk.layers[0][0].bias.data.neg_()
    with pytest.raises(AssertionError):
        assert_unchanged(trunk, before)


def test_attaching_a_prompt_changes_neither_fingerprint_nor_snapshot() -> None:
    trunk = Trunk()
    before, short, full = snapshot(trunk), fingerprint(trunk, full=False), fingerprint(trunk)
    trunk.layers[1].add_module("pt_prompt_0", OnePrompt())
    assert (fingerprint(trunk, full=False), fingerprint(trunk)) == (short, full)
    assert_unchanged(trunk, before)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_order_of_registration() -> None:
    one, two = nn.Module(), nn.Module()
    values = {"a": torch.ones(2), "b": torch.zeros(3)}
    for name in ("a", "b"):
        one.register_parameter(name, nn.Parameter(values[name].clone()))
    for name in ("b", "a"):
        two.register_parameter(name, nn.Parameter(values[name]))
    for full in (False, True):
        assert fingerprint(one, full) == fingerprint(two, full)
    two.a.data[1] = 2
    for full in (False, True):
        assert fingerprint(one, full) != fingerprint(two, full)


def test_fingerprint_sees_names_shapes_and_dtypes() -> None:
    def of(name: str, tensor: Tensor) -> str:
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(tensor))
        return fingerprint(module)

    zeros = [
        of("a", torch.zeros(4)),
        of("b", torch.zeros(4)),
        of("a", torch.zeros(2, 2)),
        of("a", torch.zeros(8).half()),
    ]
    assert len(set(zeros)) == 4  # the same 16 zero bytes in each


def test_full_fingerprint_reads_every_value_and_the_short_one_a_sample() -> None:
    module = nn.Linear(1000, 1, bias=False)
    short, full = fingerprint(module, full=False), fingerprint(module)
    module.weight.data[0, 0] += 1  # 64 middles of segments of 15.6 values: not among them
    assert fingerprint(module, full=False) == short and fingerprint(module) != full
    module.weight.data += 1e-3
    assert fingerprint(module, full=False) != short


def test_fingerprint_covers_persistent_buffers_only_and_ties_once() -> None:
    trunk = Trunk()
    full = fingerprint(trunk)
    trunk.table.fill_(7)
    assert fingerprint(trunk) == full
    trunk.layers[0][1].running_mean.fill_(7)
    assert fingerprint(trunk) != full
    assert snapshot(Trunk()).count("[11, 16]") == 1
    assert identity(Trunk()).parameters == 11 * 16 + 3 * (16 * 16 + 16 + 2 * 16)


def test_a_fingerprint_takes_in_the_configuration_where_it_is_asked_to() -> None:
    def of(settings: object, **options: bool) -> str:
        trunk = Trunk()
        trunk.config = settings
        return fingerprint(trunk, **options)

    one, other = Config(), Config(hidden_act="relu")
    assert of(one) == of(other) == of(None) == of(None, config=True)
    assert of(one, config=True) != of(other, config=True)
    assert of(one, full=False, config=True) != of(other, full=False, config=True)
    assert of(one, config=True) == of(Config("elsewhere/tiny", torch_dtype="float16"), config=True)


def test_a_tensor_that_is_not_in_memory_has_no_fingerprint() -> None:
    with pytest.raises(InputError, match="bias is not in memory"):
        fingerprint(nn.Linear(2, 2, device="meta"))


def test_one_changed_weight_makes_another_fingerprint_which_a_cache_refuses(tmp_path: Path) -> None:
    tower = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    images = torch.randn(5, 64)
    before = fingerprint(tower)
    FeatureCache(tmp_path, before, "as it is").get_or_compute(range(5), lambda rows: tower(images[rows]))
    with torch.no_grad():
        tower[0].weight[3, 5] += 1
    after = fingerprint(tower)
    assert after != before and fingerprint(copy.deepcopy(tower)) == after
    with pytest.raises(InputError, match=f"the features are of backbone '{before}', not of '{after}'"):
        FeatureCache(tmp_path, after, "as it is")


# --- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("saved_in", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_backbone(saved_in: torch.dtype, dtype: torch.dtype) -> None:
    trunk = Trunk()
    with torch.no_grad():
        trunk.layers[0][0].weight.mul_(1e-6)  # float16 keeps fewer digits below 6e-5
        trunk.layers[1][1].running_var.uniform_(0.1, 3)
    silent(identity(copy.deepcopy(trunk).to(saved_in)), copy.deepcopy(trunk).to(dtype))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-30000, 30000, width=32), min_size=1, max_size=64))
def test_rounding_through_float16_never_looks_like_other_weights(values: list[float]) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor(values))
    silent(identity(module), copy.deepcopy(module).half())
    silent(identity(copy.deepcopy(module).half()), copy.deepcopy(module).bfloat16())


def test_a_hash_of_rounded_weights_would_not_survive_float16() -> None:
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    changed = (w.half().bfloat16() != w.bfloat16()).float().mean().item()
    assert 0.02 < changed < 0.1  # why the identity keeps values: 1 value in 16 is rounded twice


def test_other_weights_of_the_same_shapes_warn_and_say_so() -> None:
    with pytest.warns(
        UserWarning, match=r"org/tiny.*weights differ in \d+ of \d+ sampled tensors, first .*Load org/tiny at"
    ):
        compare(identity(Trunk(seed=0), "org/tiny", "v1"), Trunk(seed=1))


def test_one_training_step_of_the_backbone_warns() -> None:
    trunk = Trunk()
    saved = identity(trunk)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    with pytest.warns(UserWarning, match="weights differ"):
        compare(saved, trunk)


def test_other_batchnorm_statistics_warn() -> None:
    trunk = Trunk()
    saved = identity(trunk)
    trunk.layers[2][1].running_mean.fill_(0.5)
    with pytest.warns(UserWarning, match=r"first layers\.2\.1\.running_mean"):
        compare(saved, trunk)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_values_that_went_astray_warn(value: float) -> None:
    trunk = Trunk()
    saved = identity(trunk)
    with torch.no_grad():
        trunk.embed.weight.fill_(value)
    with pytest.warns(UserWarning, match="weights differ in 1 of .* first embed.weight"):
        compare(saved, trunk)


def test_a_buffer_that_is_gone_warns() -> None:
    trunk = Trunk()
    saved = identity(trunk)
    trunk.layers[2][1].running_mean = None
    with pytest.warns(UserWarning, match=r"first layers\.2\.1\.running_mean"):
        compare(saved, trunk)


def test_a_buffer_that_depends_on_the_dtype_is_not_compared() -> None:
    def masked(dtype: torch.dtype) -> nn.Module:
        module = nn.Linear(2, 2, dtype=dtype)
        nn.init.ones_(module.weight), nn.init.ones_(module.bias)
        module.register_buffer("mask", torch.full((4,), torch.finfo(dtype).min, dtype=dtype))
        return module

    saved = identity(masked(torch.float32))
    assert sorted(saved.sample) == ["bias", "weight"]
    silent(saved, masked(torch.float16))


def test_other_shapes_are_refused_and_named() -> None:
    saved = identity(Trunk(width=16), "org/tiny")
    with pytest.raises(InputError, match=r"org/tiny.*embed\.weight is 1 x \[11, 24\], was 1 x \[11, 16\]; "):
        compare(saved, Trunk(width=24))
    deeper = Trunk()
    deeper.layers.append(nn.Linear(16, 16))
    with pytest.raises(InputError, match=r"layers\.\*\.weight is 1 x \[16, 16\], was absent"):
        compare(saved, deeper)


def test_a_larger_vocabulary_warns_and_says_so() -> None:
    def grown(trunk: Trunk, rows: int, tied: bool = True) -> Trunk:
        more = torch.cat([trunk.embed.weight.detach(), torch.randn(max(rows - 11, 0), 16)])[:rows]
        trunk.embed = nn.Embedding(rows, 16, _weight=more)
        trunk.head = nn.Linear(16, rows, bias=False)
        trunk.head.weight = trunk.embed.weight if tied else nn.Parameter(torch.cat([trunk.head.weight, more])[:rows])
        return trunk

    saved = identity(Trunk(), "org/tiny", full=True)
    with pytest.warns(UserWarning, match=r"its vocabulary is larger, 13 rows of embed\.weight for 11\. Load org/tiny"):
        compare(saved, grown(Trunk(), 13))
    with pytest.raises(InputError, match="not bit for bit org/tiny: its vocabulary is larger"):
        compare(saved, grown(Trunk(), 13), strict=True)
    with pytest.warns(
        UserWarning, match=r"larger, 13 rows .*; weights differ in \d+ of \d+ sampled tensors, first layers"
    ):
        compare(saved, grown(Trunk(seed=1), 13))
    untied = identity(grown(Trunk(), 11, tied=False))
    with pytest.warns(UserWarning, match=r"its vocabulary is larger, 13 rows of embed\.weight for 11\. Load"):
        compare(untied, grown(Trunk(), 13, tied=False))
    with pytest.raises(InputError, match=r"embed\.weight is 1 x \[9, 16\], was 1 x \[11, 16\]"):
        compare(saved, grown(Trunk(), 9))
    uneven = grown(Trunk(), 13)
    uneven.layers[0][0] = nn.Linear(16, 18)
    with pytest.raises(InputError, match="shapes differ"):
        compare(saved, uneven)
    head = Trunk()
    head.head = nn.Linear(16, 13)
    with pytest.raises(InputError, match="shapes differ"):  # more classes are no vocabulary
        compare(identity(Trunk()), head)
    of_classes = nn.Linear(16, 3)
    with pytest.raises(InputError, match=r"weight is 1 x \[5, 16\], was 1 x \[3, 16\]"):
        compare(identity(of_classes), nn.Linear(16, 5))


def test_a_compiled_backbone_is_the_backbone() -> None:
    trunk = Trunk()
    saved = identity(trunk, full=True)
    silent(saved, torch.compile(trunk), strict=True)
    silent(identity(torch.compile(trunk), full=True), trunk, strict=True)
    parts = copy.deepcopy(trunk)
    parts.layers[0] = torch.compile(parts.layers[0])
    silent(saved, parts, strict=True)


def test_adapters_of_peft_are_named_as_the_cause() -> None:
    def adapted() -> Trunk:  # as peft names what it puts in
        trunk = Trunk()
        layer = nn.Module()
        layer.base_layer, layer.lora_A = trunk.layers[0][0], nn.ModuleDict({"default": nn.Linear(16, 2, bias=False)})
        trunk.layers[0][0] = layer
        return trunk

    plain, with_adapters = identity(Trunk(), "org/tiny"), identity(adapted(), "org/tiny")
    with pytest.raises(
        InputError, match=r"peft has put adapters into this backbone.*`unload\(\)`.*`merge_and_unload\(\)`"
    ):
        compare(plain, adapted())
    with pytest.raises(
        InputError, match=r"org/tiny with adapters of peft in it, this backbone has none.*`get_base_model"
    ):
        compare(with_adapters, Trunk())
    silent(with_adapters, adapted())


def test_strict_refuses_any_difference_and_wants_a_full_hash() -> None:
    trunk = Trunk()
    saved = identity(trunk, "org/tiny", full=True)
    silent(saved, copy.deepcopy(trunk), strict=True)
    with pytest.raises(InputError, match="dtype float32 when saved, bfloat16 here"):
        compare(saved, copy.deepcopy(trunk).bfloat16(), strict=True)
    trunk.embed.weight.data[0, 0] += 1e-6
    with pytest.raises(InputError, match="not bit for bit org/tiny: full hashes differ"):
        compare(saved, trunk, strict=True)
    silent(saved, trunk)
    with pytest.raises(InputError, match="none was saved"):
        compare(identity(trunk), trunk, strict=True)


def test_strict_refuses_the_same_weights_of_another_configuration() -> None:
    trunk, other = Trunk(), Trunk()
    trunk.config, other.config = Config(), Config(hidden_act="relu")
    saved = identity(trunk, full=True)
    silent(saved, trunk, strict=True)
    with pytest.raises(InputError, match="not bit for bit org/tiny: the configuration differs"):
        compare(saved, other, strict=True)
    silent(saved.model_copy(update={"config_hash": None}), other, strict=True)  # saved where there was none


def test_configuration_counts_without_what_changes_with_loading() -> None:
    def trunk(**values: object) -> Trunk:
        made = Trunk()
        made.config = Config(**values)
        return made

    saved = identity(trunk())
    assert (saved.name, saved.revision) == ("org/tiny", "0123abc")
    volatile = {"torch_dtype": "bfloat16", "use_cache": False, "transformers_version": "9", "later_key": None}
    silent(saved, trunk(name_or_path="/home/me/models/copy", **volatile))
    silent(saved, trunk(id2label={0: "a"}, architectures=["TinyForMaskedLM"], _attn_implementation="sdpa"))
    with pytest.warns(UserWarning, match="the configuration differs"):
        compare(saved, trunk(hidden_act="relu"))
    nested = identity(trunk(text_config={"dtype": "float32", "depth": 2}))
    silent(nested, trunk(text_config={"dtype": "bfloat16", "depth": 2}))
    with pytest.warns(UserWarning, match="the configuration differs"):
        compare(nested, trunk(text_config={"dtype": "float32", "depth": 3}))


def test_a_local_path_is_not_recorded() -> None:
    trunk = Trunk()
    trunk.config = Config("/home/someone/secret-project/tiny-bert")
    saved = identity(trunk)
    assert saved.name == "tiny-bert" and "secret-project" not in saved.model_dump_json()


def test_of_a_folder_here_only_the_last_part_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trunk = Trunk()
    trunk.config = Config("models/llama")
    assert identity(trunk).name == identity(trunk, "models/llama").name == "models/llama"  # a hub id
    Path("models/llama").mkdir(parents=True)
    assert identity(trunk).name == identity(trunk, "models/llama").name == "llama"


def packed(trunk: Trunk, dtype: torch.dtype = torch.uint8) -> Trunk:
    """As bitsandbytes leaves a model: matrices of linear layers packed into bytes, the rest in float16."""
    made = copy.deepcopy(trunk).half()
    for layer in made.layers:
        layer[0].weight = nn.Parameter(torch.zeros(layer[0].weight.numel() // 2, 1, dtype=dtype), requires_grad=False)
    return made


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_quantised_model_is_judged_by_name_and_configuration(dtype: torch.dtype) -> None:
    trunk = Trunk()
    trunk.config = Config()
    quantised = packed(trunk, dtype)
    quantised.config = Config(quantization_config={"bits": 4})
    saved = identity(trunk)
    assert not saved.quantised and identity(quantised).quantised
    silent(saved, quantised)
    silent(identity(quantised), trunk)

    quantised.config = Config("other/tiny-2")
    with pytest.warns(UserWarning, match=r"quantised: judged by name, configuration.*its name is other/tiny-2"):
        compare(saved, quantised)
    quantised.config = Config(hidden_act="relu")
    with pytest.warns(UserWarning, match=r"quantised: judged.*the configuration differs"):
        compare(saved, quantised)


def test_values_that_quantisation_leaves_alone_are_still_compared() -> None:
    trunk = Trunk()
    quantised = packed(trunk)
    quantised.layers[1][1].weight.data.fill_(3.0)
    with pytest.warns(UserWarning, match=r"weights differ in 1 of \d+ sampled tensors, first layers\.1\.1\.weight"):
        compare(identity(trunk), quantised)
    with pytest.raises(InputError, match=r"layers\.\*\.\*\.bias is 6 x \[24\], was 6 x \[16\]"):
        compare(identity(trunk), packed(Trunk(width=24)))


def test_a_backbone_with_nothing_to_judge_it_by_warns() -> None:
    bare = nn.Module()
    bare.w = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match="nothing to compare"):
        compare(identity(bare), bare)


def test_identity_is_small_and_survives_json() -> None:
    trunk = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
    saved = identity(trunk, "org/deep")
    assert saved.shapes == {"*.bias": ["300 x [8]"], "*.weight": ["300 x [8, 8]"]} and len(saved.sample) == 64
    text = saved.model_dump_json()
    assert len(text) < 6000
    silent(type(saved).model_validate_json(text), trunk)


# --- feature cache ---------------------------------------------------------------------------------------------------


class Counting:
    """Computes features of images by position and remembers for how many it was asked."""

    def __init__(self, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (3, 2)) -> None:
        self.calls: list[int] = []
        self.dtype, self.shape = dtype, shape

    def of(self, ids: list[str | int]) -> Tensor:
        rows = [torch.randn(self.shape, generator=torch.Generator().manual_seed(sum(map(ord, str(i))))) for i in ids]
        return torch.stack(rows).to(self.dtype)

    def __call__(self, ids: list[str | int], cache: FeatureCache) -> Tensor:
        def compute(positions: list[int]) -> Tensor:
            self.calls.append(len(positions))
            return self.of([ids[p] for p in positions])

        return cache.get_or_compute(ids, compute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_features_are_bit_equal_when_read_again_and_after_a_restart(tmp_path: Path, dtype: torch.dtype) -> None:
    trunk = Counting(dtype)
    ids: list[str | int] = ["b", 7, "a", "7"]
    first = trunk(ids, FeatureCache(tmp_path, "f", "resize"))
    assert first.dtype == dtype and torch.equal(first, trunk.of(ids))
    again = FeatureCache(tmp_path, "f", "resize")
    assert len(again) == 4 and "a" in again and 7 in again and 8 not in again
    assert torch.equal(trunk(["7", "a", "b", 7], again), first[[3, 2, 0, 1]])
    assert trunk.calls == [4]


def test_only_missing_rows_are_computed_and_each_once(tmp_path: Path) -> None:
    trunk, cache = Counting(), FeatureCache(tmp_path, "f", "resize")
    trunk(["a", "b"], cache)
    got = trunk(["c", "a", "d", "c", "b"], cache)
    assert trunk.calls == [2, 2]
    assert torch.equal(got, trunk.of(["c", "a", "d", "c", "b"]))


def test_what_another_process_has_stored_is_not_computed_again(tmp_path: Path) -> None:
    trunk, one, other = Counting(), FeatureCache(tmp_path, "f", "resize"), FeatureCache(tmp_path, "f", "resize")
    assert torch.equal(trunk(["a", "b"], one), trunk(["a", "b"], other))
    trunk(["b", "c"], other)
    trunk(["c", "a"], one)
    assert trunk.calls == [2, 1]


def test_scalar_features_and_gradients(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "f", "resize")
    weight = torch.ones(2, requires_grad=True)
    got = cache.get_or_compute([1, 2], lambda rows: weight[rows] * 3)
    assert got.tolist() == [3.0, 3.0] and not got.requires_grad
    got[0] = 9  # a copy: the stored row stays
    assert cache.get_or_compute([1], lambda rows: weight[rows])[0] == 3


def test_another_backbone_or_transform_is_refused_by_name(tmp_path: Path) -> None:
    Counting()(["a"], FeatureCache(tmp_path, "f1", {"resize": 224}))
    with pytest.raises(InputError, match=r"backbone 'f1', not of 'f2'\. Use another folder, or delete"):
        FeatureCache(tmp_path, "f2", {"resize": 224})
    with pytest.raises(InputError, match=r"transform \{'resize': 224\}, not of \{'resize': 256\}"):
        FeatureCache(tmp_path, "f1", {"resize": 256})
    late = FeatureCache(tmp_path / "new", "f1", "x")  # opened before there was anything to compare with
    Counting()(["a"], FeatureCache(tmp_path / "new", "f2", "x"))
    with pytest.raises(InputError, match="backbone 'f2', not of 'f1'"):
        Counting()(["a"], late)


def test_features_that_do_not_fit_are_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "f", "resize")
    Counting()(["a"], cache)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"rows are float32 \[3, 2\], the new ones are float32 \[4\]"):
        Counting(shape=(4,))(["b"], cache)
    with pytest.raises(InputError, match="new ones are bfloat16"):
        Counting(torch.bfloat16)(["b"], cache)
    with pytest.raises(InputError, match=r"samples \['c'\] are not finite"):
        cache.get_or_compute(
            ["a", "b", "c"], lambda rows: torch.stack([torch.ones(3, 2), torch.full((3, 2), torch.nan)])
        )
    with pytest.raises(InputError, match=r"shape \[1, 3, 2\] for 2 samples"):
        cache.get_or_compute(["b", "c"], lambda rows: torch.ones(1, 3, 2))
    with pytest.raises(InputError, match="bool cannot be stored"):
        cache.get_or_compute(["b"], lambda rows: torch.ones(1, 3, 2, dtype=torch.bool))
    with pytest.raises(InputError, match="no sample ids"):
        cache.get_or_compute([], lambda rows: torch.ones(0, 3, 2))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("tail", [b'["c", "d', b"\x00\x00\x00\n", b'{"a": 1}\n'])
def test_a_torn_tail_is_dropped_and_written_over(tmp_path: Path, tail: bytes) -> None:
    trunk = Counting()
    trunk(["a", "b"], FeatureCache(tmp_path, "f", "resize"))
    for file, torn in (("ids.jsonl", tail), ("features.bin", b"torn row")):
        with open(tmp_path / file, "ab") as handle:
            handle.write(torn)
    cache = FeatureCache(tmp_path, "f", "resize")
    assert len(cache) == 2
    assert torch.equal(trunk(["b", "c", "a"], cache), trunk.of(["b", "c", "a"]))
    assert (tmp_path / "ids.jsonl").read_text() == '["a", "b"]\n["c"]\n'
    assert (tmp_path / "features.bin").stat().st_size == 3 * 6 * 4


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    Counting()(["a", "b"], FeatureCache(tmp_path, "f", "resize"))
    (tmp_path / "features.bin").write_bytes(b"short")
    with pytest.raises(InputError, match=r"features\.bin: holds fewer than 2 rows"):
        FeatureCache(tmp_path, "f", "resize")
    header = json.loads((tmp_path / "features.json").read_text())
    for content, message in [
        (json.dumps({**header, "format_version": 2}), "has format_version 2, this pt-core reads 1"),
        (json.dumps({**header, "dtype": "float13"}), "is not the header of a feature cache"),
        ("[]", "is not the header"),
    ]:
        (tmp_path / "features.json").write_text(content)
        with pytest.raises(InputError, match=message):
            FeatureCache(tmp_path, "f", "resize")
    (tmp_path / "features.json").unlink()
    with pytest.raises(InputError, match=r"features\.json: is missing"):
        FeatureCache(tmp_path, "f", "resize")


def test_threads_and_open_caches_share_a_folder(tmp_path: Path) -> None:
    trunk = Counting()
    ids: list[str | int] = list(range(40))
    shared = FeatureCache(tmp_path, "f", "resize")
    results: list[Tensor] = []

    def work(own: FeatureCache, start: int) -> None:
        for at in range(start, start + 30):
            results.append(trunk([at % 40, (at + 7) % 40], own) - trunk.of([at % 40, (at + 7) % 40]))

    caches = [shared, shared, FeatureCache(tmp_path, "f", "resize"), FeatureCache(tmp_path, "f", "resize")]
    threads = [threading.Thread(target=work, args=(cache, 10 * n)) for n, cache in enumerate(caches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 120 and not any(difference.any() for difference in results)
    fresh = FeatureCache(tmp_path, "f", "resize")
    stored = [i for line in (tmp_path / "ids.jsonl").read_text().splitlines() for i in json.loads(line)]
    assert len(stored) == len(set(stored)) == len(fresh) == 40
    assert torch.equal(trunk(ids, fresh), trunk.of(ids))


KILLED_COMMITS = """
# For each n: a process that is killed at the n-th file event of its work, or once a file has grown to n bytes.
import os, resource, signal, sys
import torch
from pt_core.frozen import FeatureCache

def work(folder):
    cache = FeatureCache(folder, "f", "resize")
    for i in range(0, 6, 2):
        cache.get_or_compute([i, i + 1], lambda rows, i=i: torch.tensor([[i + r + 0.5] * 64 for r in rows]))

def killed_by_event(folder, n):
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.rename", "os.truncate", "os.mkdir") and str(args[0]).startswith(folder):
            seen[0] += 1
            if seen[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def killed_by_size(folder, n):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

root = sys.argv[1]
torch.set_num_threads(1)
for kind, trap, points in (("event", killed_by_event, range(1, 31)), ("size", killed_by_size, range(50, 1600, 110))):
    for n in points:
        folder = f"{root}/{kind}-{n}"
        child = os.fork()
        if child == 0:
            trap(folder, n)
            work(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(kind, n, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signals")
def test_whenever_it_is_killed_only_uncommitted_rows_are_lost(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED_COMMITS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    outcomes = [line.split() for line in run.stdout.splitlines()]
    wanted = torch.tensor([[i + 0.5] * 64 for i in range(6)])
    asked: list[int] = []

    def compute(positions: list[int]) -> Tensor:
        asked.extend(positions)
        return wanted[positions]

    counts = set()
    for kind, n, _ in outcomes:
        folder = tmp_path / f"{kind}-{n}"
        cache = FeatureCache(folder, "f", "resize")
        counts.add(kept := len(cache))
        asked.clear()
        assert torch.equal(cache.get_or_compute(list(range(6)), compute), wanted)
        assert asked == list(range(kept, 6))  # exactly what was not committed
        lines = [json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines()]
        assert [i for line in lines for i in line] == list(range(6))
    assert counts == {0, 2, 4, 6}  # kills fell before, between and after the commits
    assert sum(int(signal) > 0 for _, _, signal in outcomes) > 30  # and most processes were killed indeed


def test_nothing_is_pickled(tmp_path: Path) -> None:
    Counting(torch.bfloat16)(["a"], FeatureCache(tmp_path, "f", "resize"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "features.bin", "features.json", "ids.jsonl"]
    assert (tmp_path / "features.bin").stat().st_size == 6 * 2
    stored = torch.frombuffer(bytearray((tmp_path / "features.bin").read_bytes()), dtype=torch.bfloat16)
    assert torch.equal(stored.view(3, 2), Counting(torch.bfloat16).of(["a"])[0])
