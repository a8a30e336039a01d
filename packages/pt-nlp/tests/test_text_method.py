"""What text methods share: losses at labelled positions, label words, gradient checkpointing, precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.plan import FitConfig
from pt_core.prompts import KeyValuePrompt
from pt_core.registry import find_method
from pt_core.testing import watch
from pt_nlp import backbones, models
from pt_nlp import method as text_method
from pt_nlp.method import LINEAR_HEADS, TextConfig, TextMethod, _decoder_ids
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

M, CLASSES = 5, 3
LINEAR = ["Llama", "Qwen2", "Qwen3", "Mistral", "GPT2", "GPTNeoX"]
Build = Callable[..., nn.Module]


class KeysAndValues(TextMethod):
    """The least method of trained keys and values."""

    name = "keys-and-values"
    config_class = TextConfig

    def build_prompt(self) -> KeyValuePrompt:
        shape = models.shape_of(self.backbone)
        return KeyValuePrompt(shape.layers, shape.kv_heads, shape.head_dim, M, std=0.5, generator=self.generator)


def method(model: nn.Module, **config) -> PromptTuning:
    return PromptTuning(model, PromptTuningConfig(prompt_length=M, init="uniform", **config))


def sources(side: str = "left") -> dict[str, Tensor]:
    """Four texts of 7, 4, 6 and 3 tokens."""
    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(7)[None] < torch.tensor([7, 4, 6, 3])[:, None]).long()
    mask = mask.flip(1) if side == "left" else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def candidates(lengths: tuple[int, ...] = (1, 3, 2)) -> dict[str, Tensor]:
    """Label words of several tokens, padded on the right."""
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 40, mask.shape, generator=torch.Generator().manual_seed(4))
    return {"candidates": ids * mask, "candidate_mask": mask}


def to_text(kind: str) -> dict[str, Tensor]:
    """A text-to-text batch: targets of 3, 1, 2 and 3 tokens."""
    batch = sources("left" if kind != "T5" else "right")
    mask = (torch.arange(3)[None] < torch.tensor([3, 1, 2, 3])[:, None]).long()
    targets = torch.randint(3, 40, (4, 3), generator=torch.Generator().manual_seed(5)).masked_fill(mask == 0, -100)
    if kind == "T5":
        return batch | {"target_ids": targets}
    return {
        "input_ids": torch.cat([batch["input_ids"], targets.clamp(min=0)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], mask], 1),
        "target_ids": torch.cat([torch.full_like(batch["input_ids"], -100), targets], 1),
    }


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
    return float((a.detach().float() - b.detach().float()).abs().max())


def with_gradient(made: TextMethod, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    made.zero_grad()
    value = call()
    value.sum().backward()
    return value.detach(), made.prompt.weight.grad.clone()


def agree(made: TextMethod, ours: Callable[[], Tensor], naive: Callable[[], Tensor]) -> None:
    """Same values and prompt gradients, to 1e-5 of their size."""
    for a, b in zip(with_gradient(made, ours), with_gradient(made, naive), strict=True):
        assert gap(a, b) < 1e-5 * max(1.0, float(b.abs().max()))
    assert float(b.abs().max()) > 1e-3


# --- losses -----------------------------------------------------------------------------------------------------------
def test_every_type_of_a_linear_head_is_tested(tiny: Build) -> None:
    assert {tiny(kind).config.model_type for kind in LINEAR} == LINEAR_HEADS


@pytest.mark.parametrize("kind", [*LINEAR, "OPT", "T5"])
def test_the_token_loss_equals_that_of_all_logits(tiny: Build, kind: str) -> None:
    made, batch = method(tiny(kind)), to_text(kind)
    assert (made.backbone.config.model_type in LINEAR_HEADS) == (kind in LINEAR)

    def naive() -> Tensor:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with made.active():
            mean = made.backbone(**inputs, labels=batch["target_ids"]).loss
        return mean * 9

    loss = made.loss(batch)
    assert loss.count == 9
    agree(made, lambda: made.loss(batch).total, naive)


@pytest.mark.parametrize("kind", LINEAR)
def test_the_token_loss_projects_labelled_positions_only(tiny: Build, kind: str) -> None:
    made, shapes = method(tiny(kind)), []
    head = made.backbone.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    made.loss(to_text(kind))
    assert shapes == [(9, 48)]


@pytest.mark.parametrize(("side", "read"), [("left", 3), ("right", 7)])
@pytest.mark.parametrize("kind", ["OPT", "Mpt", "Falcon", "Gemma"])
def test_other_heads_see_the_columns_that_any_row_reads(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, kind: str, side: str, read: int
) -> None:
    made, batch, widths = method(tiny(kind)), to_text(kind), []
    if side == "right":
        ahead = batch["attention_mask"].argmax(1).tolist()
        batch = {k: torch.stack([row.roll(-n) for row, n in zip(v, ahead, strict=True)]) for k, v in batch.items()}
    made.backbone.get_output_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))

    def all_columns() -> Tensor:
        with monkeypatch.context() as plain:
            plain.setattr(text_method, "_keeps_columns", lambda model: False)
            return made.loss(batch).total

    agree(made, lambda: made.loss(batch).total, all_columns)
    made.backbone.hf_device_map = {"transformer": 0, "lm_head": 1}  # columns and states may lie on two devices
    made.loss(batch)
    assert widths == [read, 10, 10]


@pytest.mark.parametrize("kind", ["Llama", "OPT"])
def test_the_first_token_of_a_text_is_no_target_on_whichever_side_the_padding_is(tiny: Build, kind: str) -> None:
    made, losses, left = method(tiny(kind)), [], sources("left")
    lengths = left["attention_mask"].sum(1).tolist()
    right = {k: torch.stack([row.roll(n) for row, n in zip(v, lengths, strict=True)]) for k, v in left.items()}
    for batch in (left, right):
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses.append(made.loss(batch | {"target_ids": targets}))
    assert losses[0].count == losses[1].count == sum(lengths) - len(lengths)
    assert gap(losses[0].total, losses[1].total) < 1e-5 * float(losses[0].total)


@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_the_loss_of_a_head_is_that_of_its_logits(tiny: Build, kind: str, multilabel: bool) -> None:
    made, batch = method(tiny(kind), num_labels=CLASSES, multilabel=multilabel), sources("right")
    labels = (
        torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).float() if multilabel else torch.tensor([0, 2, 1, 2])
    )
    loss = made.loss(batch | {"labels": labels})
    logits = made(batch).logits
    criterion = F.binary_cross_entropy_with_logits if multilabel else F.cross_entropy
    assert loss.count == (12 if multilabel else 4)
    assert gap(loss.value, criterion(logits, labels)) < 1e-6


@pytest.mark.parametrize("multilabel", [False, True])
def test_labels_that_are_not_those_of_the_head_are_refused(tiny: Build, multilabel: bool) -> None:
    made, batch = method(tiny("Bert"), num_labels=CLASSES, multilabel=multilabel), sources("right")
    several, one = torch.eye(4, CLASSES), torch.tensor([0, 2, 1, 2])
    wrong, state = (one, "on") if multilabel else (several, "off")
    with pytest.raises(InputError, match=rf"'multilabel': labels of shape \[4.* 3 classes with multilabel {state}\."):
        made.loss(batch | {"labels": wrong})
    assert made.loss(batch | {"labels": several if multilabel else one}).value > 0


@pytest.mark.parametrize(
    ("kind", "side"),
    # T5 counts distances over padding: its sources are padded on the right.
    [(k, s) for k in ("Llama", "GPT2", "Bert", "T5") for s in ("left", "right") if (k, s) != ("T5", "left")],
)
def test_pooled_features_are_those_of_real_tokens(tiny: Build, kind: str, side: str) -> None:
    if (kind, side) == ("Bert", "left"):
        pytest.skip("BERT counts positions through padding on the left, with and without prompts")
    made, batch = method(tiny(kind), num_labels=CLASSES), sources(side)
    pooled = made(batch).features
    for i in range(4):
        keep = batch["attention_mask"][i].bool()
        row = {"input_ids": batch["input_ids"][i][keep][None], "attention_mask": torch.ones(1, int(keep.sum())).long()}
        with made.active():
            hidden = made.hidden(row, row["attention_mask"].bool())[0]
        expected = hidden.mean(0) if kind == "T5" else hidden[0] if kind == "Bert" else hidden[-1]
        assert gap(pooled[i], expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Albert", {"embedding_size": 8}), ("Electra", {"embedding_size": 8}), ("OPT", {"word_embed_proj_dim": 8})],
)
def test_a_head_is_as_wide_as_the_states_that_it_reads(tiny: Build, kind: str, options: dict[str, int]) -> None:
    made, batch = method(tiny(kind, **options), num_labels=CLASSES), sources("right")
    width = 8 if kind == "OPT" else 16  # OPT projects its states back to the width of its embeddings
    assert (made.prompt.weight.shape, made.head.weight.shape) == ((M, 8), (CLASSES, width))
    loss, gradient = with_gradient(made, lambda: made.loss(batch | {"labels": torch.tensor([0, 2, 1, 2])}).total)
    assert made(batch).features.shape == (4, width)
    assert float(loss) > 0 and float(gradient.abs().max()) > 1e-4


# --- label words ------------------------------------------------------------------------------------------------------
def naive_scores(made: TextMethod, batch: dict) -> Tensor:
    """Log-probability of every label word after every source: one full sequence for each pair, no padding, no cache."""
    model, words, mask = made.backbone, batch["candidates"], batch["candidate_mask"]
    scores = []
    for i in range(len(batch["input_ids"])):
        source = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        for word, real in zip(words, mask, strict=True):
            target = word[real.bool()]
            with made.active():
                if model.config.is_encoder_decoder:
                    begun = torch.cat([target.new_zeros(1), target[:-1]])
                    logits = model(input_ids=source[None], decoder_input_ids=begun[None], use_cache=False).logits[0]
                else:
                    whole = torch.cat([source, target])[None]
                    logits = model(input_ids=whole, use_cache=False).logits[0, len(source) - 1 : -1]
            picked = logits.log_softmax(-1)[torch.arange(len(target)), target]
            scores.append(picked.mean() if batch.get("length_normalised") else picked.sum())
    return torch.stack(scores).view(-1, len(words))


def scored(made: TextMethod, batch: dict) -> Tensor:
    with made.active():
        return made.class_scores(batch)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "T5"])
def test_scores_of_long_label_words_equal_full_sequences(tiny: Build, kind: str, normalised: bool) -> None:
    made = method(tiny(kind))
    batch = sources("right" if kind == "T5" else "left") | candidates() | {"length_normalised": normalised}
    agree(made, lambda: scored(made, batch), lambda: naive_scores(made, batch))


@pytest.mark.parametrize("kind", [*LINEAR, "OPT", "T5"])
def test_scores_of_label_words_of_one_token_equal_full_sequences(tiny: Build, kind: str) -> None:
    made = method(tiny(kind))
    batch = sources("right" if kind == "T5" else "left") | candidates((1, 1, 1))

    def relative(scores: Tensor) -> Tensor:  # logits and log-probabilities differ by a constant for each row
        return scores.log_softmax(-1)

    agree(made, lambda: relative(scored(made, batch))[:, :2], lambda: relative(naive_scores(made, batch))[:, :2])


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT"])
def test_sources_of_a_causal_model_may_be_padded_on_either_side(
    tiny: Build, kind: str, lengths: tuple[int, ...]
) -> None:
    made, words, labels = method(tiny(kind)), candidates(lengths), torch.tensor([1, 0, 2, 1])
    target = words["candidates"].masked_fill(words["candidate_mask"] == 0, -100)[labels]
    left, found = sources("left"), []
    shifts = left["attention_mask"].sum(1).tolist()
    right = {k: torch.stack([row.roll(n) for row, n in zip(v, shifts, strict=True)]) for k, v in left.items()}
    assert right["attention_mask"][:, 0].all()
    for batch in (left, right):
        whole = batch | words | {"labels": labels, "target_ids": target}
        written = made.generate(batch, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, 7:]
        found.append((scored(made, batch | words), made.loss(whole).total, made(whole).logits, written))
    for a, b in zip(*found, strict=True):
        assert gap(a, b) < 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("kind", LINEAR)
def test_the_shortcut_for_one_token_projects_the_label_words_only(tiny: Build, kind: str) -> None:
    made, calls = method(tiny(kind)), []
    made.backbone.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    assert scored(made, sources() | candidates((1, 1, 1))).shape == (4, 3)
    assert calls == []


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 3, 2)])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "OPT", "T5"])
def test_the_loss_of_the_right_word_is_read_from_the_scores(
    tiny: Build, kind: str, lengths: tuple[int, ...], normalised: bool
) -> None:
    made, labels, words = method(tiny(kind)), torch.tensor([1, 0, 2, 1]), candidates(lengths)
    batch = sources("right" if kind == "T5" else "left") | words | {"length_normalised": normalised, "labels": labels}
    batch["target_ids"] = words["candidates"].masked_fill(words["candidate_mask"] == 0, -100)[labels]

    def of_output() -> Tensor:
        return made.loss_of(made(batch), batch).total

    def naive() -> Tensor:
        scores = naive_scores(made, words | sources("right" if kind == "T5" else "left"))  # sums over tokens
        return -scores[torch.arange(4), labels].sum()

    assert (
        made.loss(batch).count == made.loss_of(made(batch), batch).count == words["candidate_mask"].sum(1)[labels].sum()
    )
    agree(made, of_output, naive)
    agree(made, lambda: made.loss(batch).total, naive)


def test_a_word_of_one_token_is_trained_without_reading_it(tiny: Build) -> None:
    made, shapes = method(tiny("Llama")), []
    block = models.decoder_blocks(made.backbone.model)[0]
    watch(block, lambda read, _: shapes.append(tuple(read[0].shape[:2])))
    words, labels = candidates((1, 1, 1)), torch.tensor([1, 0, 2, 1])
    target = {"labels": labels, "target_ids": words["candidates"][labels]}
    batch = sources() | words | target
    made.loss(batch)
    assert shapes == [(1, M + int(batch["attention_mask"].sum()))]


def test_the_source_is_read_once_for_all_label_words(tiny: Build) -> None:
    made, shapes = method(tiny("Llama")), []
    block = models.decoder_blocks(made.backbone.model)[0]
    watch(block, lambda read, _: shapes.append(tuple(read[0].shape[:2])))
    scored(made, sources() | candidates())
    assert shapes == [(1, M), (4, 7), (12, 2)]  # the prompt; the sources; the rest of every label word


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "T5"])
def test_scores_under_gradient_checkpointing_equal_full_sequences(tiny: Build, kind: str, lengths: tuple) -> None:
    model, read = tiny(kind), set()
    model.gradient_checkpointing_enable()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: read.add(args[0].shape[1]))
    made = method(model).train()
    assert models.checkpoints_blocks(model)
    batch = sources("right" if kind == "T5" else "left") | candidates(lengths)
    plain = method(tiny(kind))
    expected = with_gradient(plain, lambda: naive_scores(plain, batch).log_softmax(-1)[:, 0])
    for a, b in zip(with_gradient(made, lambda: scored(made, batch).log_softmax(-1)[:, 0]), expected, strict=True):
        assert gap(a, b) < 1e-5 * max(1.0, float(b.abs().max()))
    assert read <= {max(lengths)}  # not the source


def test_scores_of_trained_keys_and_values_equal_full_sequences(tiny: Build) -> None:
    for kind in ("Llama", "T5"):
        made = KeysAndValues(tiny(kind))
        batch = sources("right" if kind == "T5" else "left") | candidates()
        agree(made, lambda: scored(made, batch), lambda: naive_scores(made, batch))


# --- gradient checkpointing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "T5"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(tiny: Build, kind: str, when: str) -> None:
    config = {"num_labels": CLASSES} if kind == "Bert" else {}
    batch = sources("right") | {"labels": torch.tensor([0, 2, 1, 2])} if kind == "Bert" else to_text(kind)
    plain = method(tiny(kind), **config).train()
    expected = with_gradient(plain, lambda: plain.loss(batch).total)
    model = tiny(kind)
    if when == "before":
        model.gradient_checkpointing_enable()
    made = method(model, **config)
    if when == "after":
        model.gradient_checkpointing_enable()
    made.train()
    runs: list[int] = []
    block = models.decoder_blocks(model.get_encoder() if kind == "T5" else models.base_of(model))[0]
    inner = next(m for m in block.modules() if isinstance(m, nn.LayerNorm) or "Norm" in type(m).__name__)
    inner.register_forward_hook(lambda *_: runs.append(1))
    for a, b in zip(with_gradient(made, lambda: made.loss(batch).total), expected, strict=True):
        assert gap(a, b) < 1e-5 * max(1.0, float(b.abs().max()))
    assert len(runs) >= 2  # forward, and again in the backward pass
    assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("kind", ["OPT", "Bart"])
def test_blocks_that_drop_out_by_themselves_are_checkpointed_without_rates_only(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    model.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="drop states out wherever they are checkpointed"):
        method(model)
    batch = to_text("T5" if kind == "Bart" else kind)
    quiet = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    plain = method(tiny(kind, **quiet)).train()
    expected = with_gradient(plain, lambda: plain.loss(batch).total)
    model = tiny(kind, **quiet)
    model.gradient_checkpointing_enable()
    made = method(model).train()
    for a, b in zip(with_gradient(made, lambda: made.loss(batch).total), expected, strict=True):
        assert gap(a, b) < 1e-5 * max(1.0, float(b.abs().max()))
    with_dropout = tiny(kind)
    with_dropout.gradient_checkpointing_enable()
    method(with_dropout.train(), backbone_dropout=True).train()


def test_label_words_are_read_through_the_whole_head_where_its_weight_is_not_all(tiny: Build) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("Llama")
    torch.manual_seed(3)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).get_base_model()
    made = method(adapted).eval()
    words = {"candidates": torch.tensor([[5], [7]]), "candidate_mask": torch.ones(2, 1).long()}
    batch = sources("left") | words
    with torch.no_grad():
        scores = made(batch).logits.log_softmax(-1)
        with made.active():
            logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]
    assert gap(scores, logits[:, [5, 7]].log_softmax(-1)) < 1e-5


def test_parts_of_the_backbone_may_be_offloaded(tiny: Build, tmp_path: Path) -> None:
    tiny("Llama").save_pretrained(tmp_path / "model")
    words = {"candidates": torch.tensor([[5], [7]]), "candidate_mask": torch.ones(2, 1).long()}
    batch, found = sources("left") | words, []
    parts = {"model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    for where in (None, parts | {"model.embed_tokens": "disk", "lm_head": "disk"}):
        options = {} if where is None else {"device_map": where, "offload_folder": str(tmp_path / "off")}
        model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options).eval()
        made = PromptTuning(model, PromptTuningConfig(prompt_length=M, init="vocabulary")).eval()
        with torch.no_grad():
            found.append(made(batch).logits.log_softmax(-1))
    assert gap(*found) < 1e-5


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_backbone_under_a_device_map_trains_as_without_one(
    tiny: Build, words: Any, tmp_path: Path, where: str
) -> None:
    for part in (tiny("Llama"), words):
        part.save_pretrained(tmp_path / "model")
    parts = {"": "cpu"}
    if where == "disk":
        on_disk = {"model.embed_tokens", "model.layers.1", "lm_head"}
        others = {"model.layers.0", "model.norm", "model.rotary_emb"}
        parts = dict.fromkeys(on_disk, "disk") | dict.fromkeys(others, "cpu")
    batch, found = to_text("Llama"), []
    split = Split(range(4), lambda rows: {name: values[rows] for name, values in batch.items()})
    for options in ({}, {"device_map": parts, "offload_folder": str(tmp_path / "off")}):
        model, _ = backbones.load_backbone(tmp_path / "model", "causal-lm", dtype="float32", **options)
        assert any(p.is_meta for p in model.parameters()) == (bool(options) and where == "disk")
        made = method(model)
        start = made.prompt.weight.detach().clone()
        result = made.fit(split, None, FitConfig(max_steps=2, batch_size=2, log_every=1, device="cpu", progress=False))
        found.append((made.prompt.weight, torch.tensor([row["loss"] for row in result.history])))
        assert gap(made.prompt.weight, start) > 5e-3 and len(result.history) == 2
    for spread, plain in zip(*reversed(found), strict=True):
        assert gap(spread, plain) < 1e-6


def test_decoders_without_a_function_of_their_own_read_targets_one_later() -> None:
    from transformers.models.m2m_100.modeling_m2m_100 import shift_tokens_right

    config = hf.M2M100Config(
        vocab_size=48,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=0,
        decoder_start_token_id=2,
    )
    model = hf.M2M100ForConditionalGeneration(config).eval()
    targets = torch.tensor([[5, 6, 7], [8, 9, -100]])
    expected = shift_tokens_right(targets.masked_fill(targets == -100, 0), 0, 2)
    assert torch.equal(_decoder_ids(model, targets), expected)
    made = method(model)
    assert float(made.loss(sources("right") | {"target_ids": targets.repeat(2, 1)}).value) > 0


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "T5"])
def test_under_gradient_checkpointing_a_method_still_writes(tiny: Build, kind: str) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    batch = sources("left")
    expected = method(tiny(kind)).generate(batch, **options)
    model = tiny(kind)
    model.gradient_checkpointing_enable()
    made = method(model)
    assert torch.equal(made.train().generate(batch, **options), expected)
    assert torch.equal(made.eval().generate(batch, **options), expected)
    assert not models.checkpoints_blocks(model)  # evaluation keeps its cache


@pytest.mark.parametrize("kind", ["Llama", "Bert", "T5"])
def test_trained_keys_and_values_refuse_gradient_checkpointing(tiny: Build, kind: str) -> None:
    model = tiny(kind)
    model.gradient_checkpointing_enable()
    made = KeysAndValues(model, TextConfig(num_labels=CLASSES)).train()
    with pytest.raises(InputError, match="gradient checkpointing|checkpoints its blocks"), made.active():
        if kind == "T5":
            model(**sources("right"), decoder_input_ids=torch.zeros(4, 2, dtype=torch.long))
        else:
            made(sources("right"))


# --- precision, dropout -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        *[("prompt-tuning", kind, {"init": "uniform"}) for kind in ("Llama", "T5")],
        *[("prefix-tuning", kind, {"init": "random", "init_std": 0.5}) for kind in ("Llama", "T5")],
        ("prefix-tuning", "Llama", {"init": "random", "projection_dim": 8}),
        *[("p-tuning", kind, {}) for kind in ("Llama", "T5")],
        ("p-tuning", "Llama", {"encoder": "lstm"}),
        *[("dept", kind, {"init": "uniform", "rank": 2, "max_source_length": 7}) for kind in ("Llama", "T5")],
        *[("p-tuning-v2", kind, {"num_labels": CLASSES, "init_std": 0.5}) for kind in ("Llama", "Bert")],
        ("ptec", "Llama", {"num_labels": CLASSES, "init": "vocabulary", "pos_weight": (1.0, 2.0, 4.0)}),
        ("ptec", "Bert", {"num_labels": CLASSES, "init": "vocabulary", "multilabel": False, "pooling": "first"}),
    ],
)
def test_a_bf16_backbone_trains_a_float32_prompt_on_a_close_loss(
    tiny: Build, name: str, kind: str, settings: dict[str, Any]
) -> None:
    batch, cls = to_text(kind), find_method("nlp", name)
    if "num_labels" in settings:
        labels = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).float()
        several = name == "ptec" and settings.get("multilabel", True)
        batch = sources("right") | {"labels": labels if several else torch.tensor([0, 2, 1, 2])}
    exact, low = (
        cls(tiny(kind).to(dtype), cls.config_class(**{"prompt_length": M} | settings)).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.no_grad():
        for _, parameter in exact.trainable():
            if not parameter.any():  # DePT's B, without which A gets no gradient
                parameter.normal_(std=0.3, generator=exact.generator)
    low.load_trained_state(exact.trained_state())
    losses = [made.loss(batch).value for made in (exact, low)]
    assert losses[1].dtype == torch.float32
    assert gap(*losses) < 0.03 * float(losses[0])
    for loss in losses:
        loss.backward()
    assert next(low.backbone.parameters()).dtype == torch.bfloat16
    for (parameter, a), (_, b) in zip(exact.trainable(), low.trainable(), strict=True):
        assert b.dtype == b.grad.dtype == torch.float32, parameter
        assert float(a.grad.norm()) > 0 and bool(b.grad.isfinite().all()), parameter
        assert float((a.grad - b.grad).norm() / a.grad.norm()) < 0.15, parameter


def test_dropout_of_the_backbone_is_off_unless_it_is_asked_for(tiny: Build) -> None:
    batch = to_text("GPT2")
    quiet = method(tiny("GPT2")).train()
    assert torch.equal(quiet.loss(batch).total, quiet.loss(batch).total)
    noisy = method(tiny("GPT2"), backbone_dropout=True).train()
    assert gap(noisy.loss(batch).total, noisy.loss(batch).total) > 1e-3
    assert gap(noisy.eval().loss(batch).total, quiet.loss(batch).total) < 1e-5 * float(quiet.loss(batch).total)


def test_a_run_that_breaks_off_leaves_no_dropout_on_in_the_backbone(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = method(tiny("GPT2"), backbone_dropout=True)
    split = Split([0, 1], lambda rows: to_text("GPT2"))

    def stopped(batch: Any) -> Any:
        assert any(module.training for module in noisy.backbone.modules())
        raise KeyboardInterrupt

    monkeypatch.setattr(noisy, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        noisy.fit(split, None, FitConfig(max_steps=1, batch_size=2, device="cpu", progress=False))
    assert not any(module.training for module in noisy.backbone.modules())
    noisy.train().remove()  # also after a loop of somebody's own
    assert not any(module.training for module in noisy.backbone.modules())


# --- errors -----------------------------------------------------------------------------------------------------------
def test_a_batch_that_cannot_be_read_is_refused(tiny: Build) -> None:
    with pytest.raises(InputError, match="neither a head nor label words"):
        method(tiny("Llama"))(sources())
    with pytest.raises(InputError, match="neither labels nor target tokens"):
        method(tiny("Bert"), num_labels=2).loss(sources("right"))
