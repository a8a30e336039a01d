"""PTEC on small random models, against hand numbers and a linear head on the frozen model's own features."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.metrics import evaluate_logits
from pt_core.plan import FitConfig, lr_factor
from pt_core.training import Loop, fit
from pt_nlp.data import TextTask
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from pt_nlp.methods.ptec import PTEC, PTECConfig, positive_weights, prompt_ids

D, L = 32, 5
WORDS = "<pad> </s> <unk> the a was film news great awful red blue green warm cold fast slow ;"
LABELS = ("cold", "fast", "warm")


def llama(vocabulary: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def ptec(backbone: nn.Module, **settings) -> PTEC:
    config = {"prompt_length": L, "num_labels": 3, "init": "vocabulary", "pos_weight": (1.0, 2.0, 4.0)} | settings
    return PTEC(backbone, PTECConfig(**config)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


ROWS = [
    {"text": "the film was red", "label": ["warm"]},
    {"text": "a blue film", "label": ["cold"]},
    {"text": "the news was blue great", "label": ["cold", "fast"]},
    {"text": "blue", "label": ["cold"]},
    {"text": "great news", "label": ["fast"]},
    {"text": "the green film", "label": []},
] * 2


def task_of(rows=ROWS, kind: str = "multilabel", backbone: str = "causal-lm", **settings) -> TextTask:
    parts = {"train": rows, "validation": rows[:6]}
    labels = LABELS if kind == "multilabel" else None
    return TextTask.from_rows(parts, tokenizer(), kind=kind, backbone=backbone, labels=labels, **settings)


def sources(lengths: list[int], width: int, side: str = "left") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, at], mask[i, at] = torch.randint(2, 24, (n,), generator=generator), 1
    return {"input_ids": ids, "attention_mask": mask}


CONFIG = {"batch_size": 4, "device": "cpu", "progress": False}


# --- the card's properties ------------------------------------------------------------------------------------------
def test_property_1_parameter_count_and_a_frozen_backbone():
    backbone = llama()
    method, task = ptec(backbone, init="labels", init_ids=(3, 4, 5, 6, 7), prompt_length=5), task_of()
    assert method.count() == (5 + 3) * D == 256
    assert (53 + 22) * 4096 == 307_200
    before = snapshot(backbone)
    method.fit(task.train, None, FitConfig(max_steps=3, **CONFIG))
    assert_unchanged(backbone, before)
    assert all(p.grad is None for p in backbone.parameters())
    groups = method.parameter_groups()
    assert [(group["name"], group["lr"]) for group in groups] == [("prompt", 1e-3), ("head", 1e-3)]
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [5 * D, 3 * D]
    assert all(p.dtype == torch.float32 for _, p in method.trainable())


def test_property_2_the_order_of_labels_does_not_matter():
    backbone, order = llama(), torch.tensor([2, 0, 1])
    one = ptec(backbone)
    other = ptec(backbone, pos_weight=tuple(torch.tensor([1.0, 2.0, 4.0])[order].tolist()))
    other.load_trained_state(one.trained_state() | {"head.weight": one.head.weight[order].detach()})
    assert other.pos_weight.tolist() == one.pos_weight.tolist()  # the state of `one`, put right below
    other.pos_weight.copy_(one.pos_weight[order])
    labels = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])
    batch = sources([6, 3, 4], 6)
    a, b = one(batch).logits, other(batch).logits
    assert torch.equal(a[:, order], b)
    losses = [one.loss(batch | {"labels": labels}), other.loss(batch | {"labels": labels[:, order]})]
    torch.testing.assert_close(losses[0].value, losses[1].value)
    wrong = other.loss(batch | {"labels": labels})
    assert (wrong.value - losses[0].value).abs() > 1e-3


def test_property_2_the_order_of_labels_matters_to_prompt_tuning():
    method = PromptTuning(llama(), PromptTuningConfig(prompt_length=L)).eval()
    losses = []
    for target in ("cold ; fast", "fast ; cold"):
        rows = {"train": [{"text": "the news was blue great", "label": target}]}
        task = TextTask.from_rows(rows, tokenizer(), kind="text-to-text", target_prefix="")
        losses.append(method.loss(task.train.batch([0])).value.item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_property_3_weights_by_hand():
    counts = {"Neutral": 540, "Humiliation": 259, "Racist towards black": 14}
    labels = torch.zeros(540, 3)
    for column, count in enumerate(counts.values()):
        labels[:count, column] = 1
    weights = positive_weights(labels)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.085, 38.571]), rtol=0, atol=5e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_property_4_texts_do_not_depend_on_each_other(side):
    method = ptec(llama())
    batch = sources([9, 3, 6], 11, side)
    with torch.no_grad():
        together = method(batch).logits
        for i in range(3):
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
            alone = method({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_property_5_a_head_of_zeros():
    method, task = ptec(llama()), task_of()
    nn.init.zeros_(method.head.weight)
    answers = task.predict(method, ["the film was red", "blue"])
    assert all(answer["labels"] == [] for answer in answers)
    assert all(score == 0.5 for answer in answers for score in answer["scores"].values())
    batch = task.train.batch([0, 1, 2])
    weights = torch.where(batch["labels"] == 1, torch.tensor([1.0, 2.0, 4.0]), torch.ones(3))
    expected = math.log(2) * float(weights.mean())
    assert method.loss(batch).value.item() == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(math.log(2) * 13 / 9)  # warm 4, cold 1, cold 1 and fast 2, five negatives of 1
    assert method.loss(batch).count == 9


def test_property_6_without_a_prompt_it_is_a_head_on_frozen_features():
    backbone = llama()
    method, batch = ptec(backbone, prompt_length=0), sources([6, 3, 4], 7)
    with torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        features = backbone.model(**batch, position_ids=positions).last_hidden_state[:, -1]
        torch.testing.assert_close(method(batch).logits, features @ method.head.weight.T)
    assert method.count() == 3 * D


def test_property_7_start_from_label_names_by_hand():
    assert prompt_ids([5, 9, 7], 5) == [5, 9, 7, 1000, 1001]
    assert prompt_ids([5, 9, 7], 3) == [5, 9, 7]
    chosen = prompt_ids([5, 9, 7], 2, generator=torch.Generator().manual_seed(0))
    assert len(set(chosen)) == 2
    assert set(chosen) < {5, 9, 7}
    drawn = [prompt_ids([5, 9, 7], 2, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert {frozenset(ids) for ids in drawn} == {
        frozenset(pair) for pair in ((5, 9), (5, 7), (9, 7))
    }  # a random subset
    assert drawn == [prompt_ids([5, 9, 7], 2, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    again = prompt_ids([5, 9, 7], 9, "labels", torch.Generator().manual_seed(0))
    assert again[:3] == [5, 9, 7]
    assert len(again) == 9
    assert set(again) == {5, 9, 7}
    backbone = llama(vocabulary=1010)
    table = backbone.get_input_embeddings().weight
    assert PTECConfig().init == "labels"
    method = PTEC(backbone, PTECConfig(prompt_length=L, num_labels=3, init_ids=(5, 9, 7)))
    assert torch.equal(method.prompt.weight, table[torch.tensor([5, 9, 7, 1000, 1001])])


@pytest.mark.parametrize("init", ["labels", "vocabulary"])
def test_the_start_is_what_a_backbone_reads_that_scales_its_embeddings(init):
    """Gemma reads sqrt(d) times the rows of its table."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    backbone = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=24, num_key_value_heads=2, head_dim=8, **sizes))
    rows = ptec(backbone, init=init, init_ids=(5, 9, 7), fill="labels").prompt.weight
    distances = torch.cdist(rows, backbone.get_input_embeddings().weight * D**0.5)
    assert distances.min(1).values.max() < 1e-3
    if init == "labels":
        assert distances.argmin(1)[:3].tolist() == [5, 9, 7]


def test_property_8_exponential_schedule():
    config = PTEC.recommended_fit(max_steps=100)
    assert lr_factor(config, 0, 100) == 1
    assert lr_factor(config, 1, 100) == pytest.approx(0.954548, abs=5e-7)
    assert lr_factor(config, 99, 100) == pytest.approx(0.01)
    method, task = ptec(llama(), lr=0.02, head_lr=0.004), task_of()
    config = PTEC.recommended_fit(max_steps=10, log_every=1, patience=None, device="cpu", progress=False)
    history = method.fit(task.train, None, config).history
    assert history[-1]["lr/prompt"] == pytest.approx(0.02 * 0.01)
    assert history[-1]["lr/head"] == pytest.approx(0.004 * 0.01)
    assert history[0]["lr/prompt"] == pytest.approx(0.02)


def records(values: list[float], **changes) -> Loop:
    """A loop that saw these macro-F1, one for each epoch."""
    config = PTEC.recommended_fit(max_steps=len(values), **changes, device="cpu", progress=False)
    loop = Loop(ptec(llama()), config, total_steps=len(values))
    for step, value in zip(loop.steps(), values, strict=False):
        loop.method.prompt.weight.data.fill_(step)
        loop.record({"macro-f1": value})
    return loop


def test_property_10_what_counts_as_a_gain():
    loop = records([0.300, 0.304])
    assert loop.state.best_step == 1
    assert loop.state.best_metrics == {"macro-f1": 0.300}
    loop = records([0.300, 0.304, 0.306])
    assert loop.state.best_step == 3
    assert not loop.state.stopped
    loop.finish()
    assert loop.method.prompt.weight.unique().item() == 3
    loop = records([0.300, 0.304, 0.302, 0.9])
    assert loop.state.stopped
    assert loop.state.step == 3
    loop.finish()
    assert loop.method.prompt.weight.unique().item() == 1


def test_a_run_stops_at_once_below_the_interrupt_threshold():
    assert not records([0.5, 0.2], interrupt_below=0.07).state.stopped
    loop = records([0.5, 0.06, 0.9], interrupt_below=0.07)
    assert loop.state.stopped
    assert (loop.state.step, loop.state.best_step) == (2, 1)
    assert records([0.06, 0.9], interrupt_below=0.07).state.step == 1


# --- weights of the labels ------------------------------------------------------------------------------------------
def test_fit_counts_the_weights_of_the_training_split_and_keeps_them(tmp_path):
    backbone, task = llama(), task_of()
    method = ptec(backbone, pos_weight=None)
    method.fit(task.train, task.validation, FitConfig(max_steps=2, **CONFIG))
    assert method.pos_weight.tolist() == [1.0, 1.5, 3.0]  # cold 6, fast 4, warm 2
    assert set(method.trained_state()) == {"prompt.weight", "head.weight", "pos_weight"}
    folder = method.save_pretrained(tmp_path / "ptec")
    again = PTEC.from_pretrained(folder, backbone).eval()
    batch = task.train.batch([0, 1, 2])
    assert torch.equal(method.eval()(batch).logits, again(batch).logits)
    assert torch.equal(again.loss(batch).value, method.loss(batch).value)


def test_given_weights_are_kept():
    method, task = ptec(llama()), task_of()
    method.fit(task.train, None, FitConfig(max_steps=1, **CONFIG))
    assert method.pos_weight.tolist() == [1.0, 2.0, 4.0]


def test_the_loss_is_weighted_bce():
    method, task = ptec(llama()), task_of()
    batch = task.train.batch([0, 2, 5])
    logits, labels = method(batch).logits, batch["labels"]
    weight = torch.tensor([1.0, 2.0, 4.0])
    by_hand = -(weight * labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(method.loss(batch).value, by_hand)


def test_unknown_weights_and_absent_labels_are_refused():
    method, task = ptec(llama(), pos_weight=None), task_of()
    with pytest.raises(InputError, match=r"the weights of the labels are not known.*method\.fit"):
        fit(method, task.train, None, FitConfig(max_steps=1, **CONFIG))
    only_cold = task.split([row for row in ROWS if row["label"] in (["cold"], [])])
    with pytest.raises(InputError, match="no training row has the labels of columns 1, 2"):
        method.fit(only_cold, None, FitConfig(max_steps=1, **CONFIG))
    for weights, problem in (((1.0, 2.0), "2 values"), ((1.0, 0.0, 1.0), "positive")):
        with pytest.raises(ValueError, match=problem):
            PTECConfig(num_labels=3, pos_weight=weights)
    with pytest.raises(ValueError, match="belongs to multilabel"):
        PTECConfig(num_labels=3, pos_weight=(1.0, 1.0, 1.0), multilabel=False)


def test_rows_of_one_class_are_refused_unless_multilabel_is_off():
    classes = task_of([row | {"label": row["label"][0]} for row in ROWS if row["label"]], kind="classification")
    config = FitConfig(max_steps=1, **CONFIG)
    with pytest.raises(InputError, match=r"'multilabel': labels of shape \[10\] have no positives to weigh"):
        ptec(llama(), pos_weight=None).fit(classes.train, None, config)
    with pytest.raises(InputError, match=r"'multilabel': labels of shape \[4\].*3 classes with multilabel on"):
        ptec(llama()).fit(classes.train, None, config)
    ptec(llama(), pos_weight=None, multilabel=False).fit(classes.train, None, config)


def test_micro_batches_give_the_step_of_the_whole_batch():
    task, states = task_of(), []
    for size in (4, 2, 1):
        method = ptec(llama(), lr=0.05)
        method.fit(task.train, None, FitConfig(max_steps=3, micro_batch_size=size, **CONFIG))
        states.append(method.prompt.weight.detach())
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states[0], states[2], rtol=1e-4, atol=1e-6)


# --- start, pooling, other settings ---------------------------------------------------------------------------------
def test_a_head_without_bias_drawn_like_the_models_own():
    method = PTEC(llama(), PTECConfig(num_labels=200, init="vocabulary"))
    assert method.head.bias is None
    assert method.head.weight.std().item() == pytest.approx(0.2, rel=0.05)


def test_starts_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match="init_ids"):
        ptec(llama(), init="labels")
    with pytest.raises(InputError, match=r"the vocabulary of 24 ends before.*Set fill to `labels`"):
        ptec(llama(), init="labels", init_ids=(5, 9, 7))
    ptec(llama(), init="labels", init_ids=(5, 9, 7), fill="labels")
    with pytest.raises(ValueError, match="init_text would not be used: init is vocabulary, not labels"):
        PTECConfig(num_labels=3, init="vocabulary", init_text="cold fast warm")
    with pytest.raises(InputError, match="num_labels"):
        PTEC(llama())


def test_first_token_of_an_encoder():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=24, hidden_size=D, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    backbone = BertModel(config).eval()
    method, batch = ptec(backbone, pooling="first"), sources([6, 3], 6, "right")
    with torch.no_grad():
        table = backbone.get_input_embeddings()
        embeds = torch.cat([method.prompt.weight.expand(2, -1, -1), table(batch["input_ids"])], dim=1)
        mask = torch.cat([torch.ones(2, L, dtype=torch.long), batch["attention_mask"]], dim=1)
        states = backbone(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(method(batch).logits, states[:, L] @ method.head.weight.T, rtol=1e-5, atol=1e-5)


def test_one_of_many_classes_by_softmax():
    rows = [row | {"label": row["label"][0]} for row in ROWS if len(row["label"]) == 1]
    method, task = ptec(llama(), multilabel=False, pos_weight=None), task_of(rows, kind="classification")
    batch = task.train.batch([0, 1, 2])
    expected = F.cross_entropy(method(batch).logits, batch["labels"])
    torch.testing.assert_close(method.loss(batch).value, expected)
    result = method.fit(task.train, task.validation, FitConfig(max_steps=2, **CONFIG))
    assert set(method.trained_state()) == {"prompt.weight", "head.weight"}
    assert 0 <= result.metrics["macro-f1"] <= 1


def test_it_learns_and_is_scored_by_macro_and_micro_f1():
    method, task = ptec(llama(), pos_weight=None, lr=0.05, head_lr=0.05), task_of()
    config = PTEC.recommended_fit(epochs=25, batch_size=4, patience=25, device="cpu", progress=False)
    result = method.fit(task.train, task.validation, config)
    assert result.metrics["macro-f1"] > 0.9
    assert result.metrics["micro-f1"] > 0.9
    answers = task.predict(method, [row["text"] for row in ROWS[:6]])
    right = sum(answer["labels"] == sorted(row["label"]) for answer, row in zip(answers, ROWS[:6], strict=True))
    assert right >= 5


def test_macro_and_micro_f1_by_hand():
    logits = torch.tensor([[1.0, -1, -1], [1, 1, -1], [-1, -1, -1]])
    labels = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])  # F1: 0.5, 1, 0 (absent)
    scores = evaluate_logits(("macro-f1", "micro-f1"), "multilabel", logits, labels)
    assert scores["macro-f1"] == pytest.approx(0.5)
    assert scores["micro-f1"] == pytest.approx(4 / 6)


def test_without_a_configuration_the_papers_run_is_used(monkeypatch):
    seen = []
    monkeypatch.setattr("pt_core.training.fit", lambda *arguments: seen.append(arguments[3]))
    method, task = ptec(llama()), task_of()
    method.fit(task.train, task.validation)
    config = seen[0]
    assert (config.epochs, config.batch_size, config.schedule, config.final_factor) == (10, 32, "exponential", 0.01)
    assert (config.monitor, config.min_delta, config.patience, config.max_grad_norm) == ("macro-f1", 0.005, 2, 1.0)
    method.fit(task.train)
    assert seen[1].patience is None
