"""LoRA and (IA)^3: what peft adds, on a copy that shares the backbone's tensors; numbers worked by hand."""

from __future__ import annotations

import builtins
import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.artifacts import load_artifact
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, identity, snapshot
from pt_core.plan import FitConfig
from pt_core.training import Loop
from pt_nlp.methods.peft_peers import IA3, AdapterMethod, IA3Config, LoRA, LoRAConfig, shared_copy
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

D, V = 16, 24


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
    return BertModel(config).eval()


IDS = torch.randint(2, V, (4, 6), generator=torch.Generator().manual_seed(1))
WORDS = torch.tensor([[3, 4], [5, 6], [7, 8]])


def batch(head: bool = False) -> dict:
    made = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1, 2, 1])}
    return made if head else made | {"candidates": WORDS, "candidate_mask": torch.ones_like(WORDS)}


def disturbed(method: AdapterMethod) -> AdapterMethod:
    """The method with every trained value moved away from its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return method.eval()


def train(method: AdapterMethod, steps: int = 3, head: bool = False) -> list[float]:
    loop = Loop(method, FitConfig(max_steps=steps, progress=False, device="cpu"), total_steps=steps)
    method.train()
    losses = []
    for _ in loop.steps():
        loss = method.loss(batch(head))
        losses.append(loss.value.item())
        loop.backward(loss)
        loop.update()
    method.eval()
    return losses


BACKBONES = [llama, lambda: llama(tied=True), gpt2, t5]
METHODS = [LoRA, IA3]


# --- the card's properties --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def t5_base() -> T5ForConditionalGeneration:
    """T5-base without values."""
    config = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(("cls", "values", "layers"), [(LoRA, 884_736, 72), (IA3, 129_024, 96)])
def test_1_counts_for_t5_base_are_those_of_the_table(t5_base, cls, values, layers):
    method = cls(t5_base)
    assert method.count() == values
    assert len(method.adapter) == layers


def test_1_counts_follow_the_formulas_with_grouped_queries():
    # q: 16 -> 16, v: 16 -> 8 (2 of 4 heads), 2 layers
    assert LoRA(llama(), LoRAConfig(r=3)).count() == 2 * (3 * (16 + 16) + 3 * (16 + 8))
    assert IA3(llama()).count() == 2 * (8 + 8 + 20)  # k, v and the input of down_proj


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("make", BACKBONES)
def test_2_both_are_the_identity_at_the_start(cls, make):
    backbone = make()
    method = cls(backbone)
    kwargs = {"decoder_input_ids": IDS} if backbone.config.is_encoder_decoder else {}
    assert method.model is not backbone
    assert torch.equal(method.model(IDS, **kwargs).logits, backbone(IDS, **kwargs).logits)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("make", BACKBONES)
def test_3_folding_gives_equal_logits_and_touches_nothing_else(cls, make):
    backbone = make()
    before = snapshot(backbone)
    method = disturbed(cls(backbone))
    kwargs = {"decoder_input_ids": IDS} if backbone.config.is_encoder_decoder else {}
    with torch.no_grad():
        wanted = method.model(IDS, **kwargs).logits
        folded = method.folded()
        assert type(folded) is type(backbone)
        assert {n for n, _ in folded.named_parameters()} == {n for n, _ in backbone.named_parameters()}
        assert (folded(IDS, **kwargs).logits - wanted).abs().max() < 1e-5
        assert (wanted - backbone(IDS, **kwargs).logits).abs().max() > 1e-3
        assert torch.equal(method.model(IDS, **kwargs).logits, wanted)
    assert_unchanged(backbone, before)


def test_3_unmerging_lora_restores_the_weights_within_rounding():
    backbone = llama()
    tuner = copy.deepcopy(disturbed(LoRA(backbone)).tuner)
    weight = tuner.model.model.layers[0].self_attn.q_proj.weight
    wanted = weight.clone()
    tuner.merge_adapter()
    assert (weight - wanted).abs().max() > 1e-2
    tuner.unmerge_adapter()
    assert (weight - wanted).abs().max() < 1e-6


def test_4_scaling_the_branch_output_equals_scaling_the_input_of_the_second_matrix():
    backbone = t5()
    method = IA3(backbone, IA3Config(targets=("wo",), feedforward=("wo",)))
    disturbed(method)
    vectors = [v.detach().flatten() for v in method.adapter.parameters()]
    assert [len(v) for v in vectors] == [20, 20, 20, 20]
    branches = [m.wi_1 for m in backbone.modules() if hasattr(m, "wi_1")]
    with torch.no_grad():
        wanted = method.model(IDS, decoder_input_ids=IDS).logits
        for branch, vector in zip(branches, vectors, strict=True):
            branch.register_forward_hook(lambda _m, _a, out, vector=vector: out * vector)
        assert (backbone(IDS, decoder_input_ids=IDS).logits - wanted).abs().max() < 1e-5


def test_6_at_the_start_only_b_of_lora_has_a_gradient():
    method = LoRA(llama()).train()
    method.loss(batch()).value.backward()
    gradients = {name: p.grad.abs().max() for name, p in method.named_parameters()}
    assert all(g == 0 for name, g in gradients.items() if "lora_A" in name)
    assert all(g > 1e-6 for name, g in gradients.items() if "lora_B" in name)


def test_6_lora_adds_a_matrix_of_rank_r_and_the_scale_keeps_when_r_and_alpha_double():
    method = disturbed(LoRA(llama(), LoRAConfig(r=2, alpha=6)))
    layer = method.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.linalg.matrix_rank(b @ a) == 2
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    by_hand = x @ layer.base_layer.weight.T + 6 / 2 * (x @ a.T @ b.T)
    assert (layer(x) - by_hand).abs().max() < 1e-5
    assert layer.scaling["default"] == 3.0
    doubled = LoRA(llama(), LoRAConfig(r=4, alpha=12)).model.model.layers[0].self_attn.q_proj
    assert doubled.scaling["default"] == 3.0
    stabilised = LoRA(llama(), LoRAConfig(r=4, alpha=12, rank_stabilised=True)).model.model.layers[0].self_attn.q_proj
    assert stabilised.scaling["default"] == 12 / 4**0.5


def test_a_of_lora_starts_uniform_within_one_over_root_d_in_and_b_at_zero():
    method = LoRA(llama())
    for name, parameter in method.named_parameters():
        bound = parameter.abs().max()
        assert bound == 0 if "lora_B" in name else 0.8 * D**-0.5 < bound <= D**-0.5


# --- the backbone stays the user's ------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("make", BACKBONES)
def test_training_lowers_the_loss_and_leaves_the_backbone_bit_identical(cls, make):
    backbone = make()
    before, modules = snapshot(backbone), [type(m) for m in backbone.modules()]
    method = cls(backbone, cls.config_class(lr=3e-2))
    losses = train(method, steps=8)
    assert losses[-1] < losses[0] - 1e-3
    assert_unchanged(backbone, before)
    assert [type(m) for m in backbone.modules()] == modules
    assert not hasattr(backbone, "peft_config")
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())


def test_the_copy_holds_the_very_tensors_of_the_backbone_also_after_a_move():
    backbone = llama(tied=True)
    method = LoRA(backbone)
    assert method.model.lm_head.weight is method.model.model.embed_tokens.weight is backbone.lm_head.weight
    assert method.model.model.rotary_emb.inv_freq is backbone.model.rotary_emb.inv_freq
    backbone.to(torch.bfloat16)  # replaces buffers
    assert method.model.lm_head.weight.dtype == torch.bfloat16
    assert method.model.model.rotary_emb.inv_freq is backbone.model.rotary_emb.inv_freq
    assert method.adapter["model/layers/0/self_attn/q_proj"]["lora_A"]["default"].weight.dtype == torch.float32


def test_two_adapters_and_a_prompt_on_one_backbone_do_not_see_each_other():
    backbone = llama()
    plain = backbone(IDS).logits
    first, second = disturbed(LoRA(backbone)), disturbed(IA3(backbone))
    alone = first.model(IDS).logits, second.model(IDS).logits
    prompt = PromptTuning(backbone, PromptTuningConfig(prompt_length=3))
    with prompt.active():
        assert torch.equal(first.model(IDS).logits, alone[0])
    assert torch.equal(second.model(IDS).logits, alone[1])
    assert torch.equal(backbone(IDS).logits, plain)


def test_a_backbone_that_carries_a_prompt_is_refused():
    backbone = llama()
    prompt = PromptTuning(backbone, PromptTuningConfig(prompt_length=3))
    with pytest.raises(InputError, match=r"cannot be copied.*Remove the prompts first"):
        LoRA(backbone)
    prompt.remove()
    assert LoRA(backbone).count() > 0


@pytest.mark.parametrize("cls", METHODS)
def test_bf16_backbones_get_float32_adapters(cls):
    method = cls(llama().to(torch.bfloat16))
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    assert train(method)[0] > 0
    assert {p.dtype for p in method.parameters()} == {torch.float32}


@pytest.mark.parametrize("make", [llama, t5])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients_without_dropout(make):
    found = []
    for checkpointing in (False, True):
        backbone = make()
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        method = disturbed(LoRA(backbone)).train()
        loss = method.loss(batch()).value
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in method.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        assert (plain - checkpointed).abs().max() < 1e-5


# --- the contract -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", METHODS)
def test_an_artifact_is_small_names_the_original_backbone_and_restores_the_logits(cls, tmp_path):
    backbone = llama()
    method = cls(backbone)
    train(method)
    folder = method.save_pretrained(tmp_path / "adapter", backbone_name="tiny")
    artifact = load_artifact(folder)
    assert artifact.config.backbone == identity(backbone, "tiny", full=True)
    assert set(artifact.tensors) == {name for name, _ in method.trainable()}
    assert sum(t.numel() for t in artifact.tensors.values()) == method.count()
    again = cls.from_pretrained(folder, llama(), strict=True).eval()
    assert torch.equal(again(batch()).logits, method(batch()).logits)
    assert not torch.equal(again(batch()).logits, cls(llama()).eval()(batch()).logits)


def test_seeds_decide_the_start_and_leave_the_global_generator_alone():
    starts = [LoRA(llama(), LoRAConfig(seed=seed)).trained_state() for seed in (0, 0, 1)]
    names = [name for name in starts[0] if "lora_A" in name]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in names)
    assert not any(torch.equal(starts[0][name], starts[2][name]) for name in names)
    backbone = llama()
    state = torch.get_rng_state()
    LoRA(backbone)
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_are_adapter_and_head_disjoint_and_complete():
    method = LoRA(bert(), LoRAConfig(num_labels=3, head_lr=0.5))
    groups = {group["name"]: group for group in method.parameter_groups()}
    assert {name: group["lr"] for name, group in groups.items()} == {"adapter": 5e-4, "head": 0.5}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for _, p in method.trainable())
    assert IA3(bert()).parameter_groups()[0]["lr"] == 3e-3


@pytest.mark.parametrize("cls", METHODS)
def test_encoders_are_read_through_a_head_behind_the_adapter(cls):
    backbone = bert()
    before = snapshot(backbone)
    method = cls(backbone, cls.config_class(num_labels=3, lr=0.05, head_lr=0.05))
    losses = train(method, steps=8, head=True)
    assert losses[-1] < losses[0] - 0.05
    assert method(batch(head=True)).features.shape == (4, D)
    assert_unchanged(backbone, before)


def test_dropout_of_the_adapter_follows_the_methods_mode_and_that_of_the_backbone_does_not():
    method = disturbed(LoRA(t5(), LoRAConfig(dropout=0.5)))
    assert torch.equal(method(batch()).logits, method(batch()).logits)
    method.train()
    assert not torch.equal(method(batch()).logits, method(batch()).logits)
    added, kinds = set(method.adapter.modules()), {type(m) for m in method.backbone.modules()}
    assert not any(m.training for m in method.model.modules() if type(m) in kinds and m not in added)
    assert not any(m.training for m in method.backbone.modules())


def test_dropout_in_the_layers_of_the_backbone_is_on_only_if_asked_for_and_only_in_the_copy():
    method = disturbed(LoRA(t5(), LoRAConfig(backbone_dropout=True)))
    method.train()
    assert not torch.equal(method(batch()).logits, method(batch()).logits)
    assert not any(m.training for m in method.backbone.modules())
    method.eval()
    assert torch.equal(method(batch()).logits, method(batch()).logits)


def test_generation_and_multi_token_label_words_run_through_the_adapter():
    backbone = llama()
    method = LoRA(backbone)
    with torch.no_grad():
        start = method(batch()).logits
        disturbed(method)
        assert (method(batch()).logits - start).abs().max() > 1e-2
        folded = method.folded()
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        wanted = folded.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
        assert torch.equal(method.generate(batch(), **options), wanted)


def test_the_loss_of_an_encoder_decoder_is_the_models_own_and_its_encoder_never_sees_the_target():
    backbone = t5()
    method = LoRA(backbone).eval()
    targets = WORDS[torch.tensor([0, 1, 2, 1])]
    seen = []
    method.model.get_encoder().register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        loss = method.loss(batch() | {"target_ids": targets})
        wanted = backbone(input_ids=IDS, labels=targets).loss
    assert loss.value.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert len(seen) == 1 and torch.equal(seen[0], IDS)


# --- refusals ---------------------------------------------------------------------------------------------------------
def test_missing_peft_and_unknown_layers_are_said_with_the_remedy(monkeypatch):
    with pytest.raises(InputError, match=r"'targets'.*nothing to adapt in a LlamaForCausalLM.*Name the linear layers"):
        LoRA(llama(), LoRAConfig(targets=("no_such_layer",)))
    with pytest.raises(InputError, match=r"'targets'.*head cannot be adapted"):
        LoRA(llama(), LoRAConfig(targets=("q_proj", "lm_head")))
    with pytest.raises(InputError, match=r"'targets'.*subset of `target_modules`"):
        IA3(llama(), IA3Config(targets=("k_proj",), feedforward=("down_proj",)))
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"peft, which is not installed.*extra `peft`"):
        LoRA(llama())


def test_shared_copy_is_a_model_of_its_own_over_the_same_tensors():
    backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    copied = shared_copy(backbone)
    assert copied[0] is not backbone[0] and copied[0].weight is backbone[0].weight
    copied[0] = nn.Identity()
    assert isinstance(backbone[0], nn.Linear)
    assert copied[1].running_mean is backbone[1].running_mean
