"""The linear probe on a small random encoder and language model, against scikit-learn on the same features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from pt_core.artifacts import load_artifact
from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.evaluation import evaluate
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_core.probe import agreement, regression
from pt_nlp.data import pad
from pt_nlp.methods.linear_probe import LinearProbe, LinearProbeConfig

D, V, C = 16, 24, 3
RUN = FitConfig(epochs=1, device="cpu", eval_batch_size=7, progress=False)


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=20,
        initializer_range=0.5,
    )
    return BertModel(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def split(rows: int, seed: int, classes: int = C, multilabel: bool = False) -> Split:
    """Token sequences of unequal length; class c has many tokens 3 + c (multi-label: label c if token 3 + c occurs)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(rows):
        ids = torch.randint(10, V, (4 + i % 3,), generator=generator)
        label = torch.tensor(i % classes)
        if multilabel:
            label = (torch.rand(classes, generator=generator) < 0.5).float()
            ids = torch.cat([ids, torch.arange(3, 3 + classes)[label.bool()]])
        else:
            ids[: 1 + i % 2] = 3 + label
        made.append((ids.tolist(), label))

    def collate(chosen):
        ids, mask = pad([ids for ids, _ in chosen], 0, "right")
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([label for _, label in chosen])}

    task = "multilabel" if multilabel else "multiclass"
    metrics = ("micro-f1",) if multilabel else ("accuracy",)
    return Split(made, collate, metrics, task, classes)


def features(method: LinearProbe, part: Split) -> tuple[np.ndarray, np.ndarray]:
    batch = part.batch(list(range(len(part))))
    with torch.no_grad():
        return method.features(batch).double().numpy(), batch["labels"].numpy()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("make", [bert, llama])
def test_logits_are_those_of_scikit_learn_on_standardised_frozen_features(make, pooling):
    backbone = make()
    before = snapshot(backbone)
    method = LinearProbe(backbone, LinearProbeConfig(num_labels=C, pooling=pooling))
    train, test = split(30, 1), split(12, 2)
    result = method.fit(train, None, RUN)
    assert (result.steps, result.metrics, result.history) == (0, {}, [])
    x, y = features(method, train)
    scaler = StandardScaler().fit(x)
    reference = LogisticRegression(C=1.0, max_iter=1000).fit(scaler.transform(x), y)
    wanted = reference.predict_proba(scaler.transform(features(method, test)[0]))
    with torch.no_grad():
        output = method(test.batch(list(range(12))))
    assert np.abs(output.logits.softmax(-1).numpy() - wanted).max() < 1e-4
    assert output.features.shape == (12, D)
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Albert", {"embedding_size": 8}), ("Electra", {"embedding_size": 8}), ("OPT", {"word_embed_proj_dim": 8})],
)
def test_a_probe_is_as_wide_as_the_states_that_it_reads(tiny, kind, options):
    method = LinearProbe(tiny(kind, **options), LinearProbeConfig(num_labels=C))
    method.fit(split(30, 1), None, RUN)
    batch = split(12, 2).batch(list(range(12)))
    with torch.no_grad():
        output = method(batch)
    assert float(output.logits.abs().max()) > 1e-2
    assert output.features.shape[1] == method.head.in_features == (8 if kind == "OPT" else 16)


def test_mean_pooling_reads_real_tokens_only():
    backbone = llama()
    method = LinearProbe(backbone, LinearProbeConfig(num_labels=C))
    ids = torch.tensor([[3, 4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    wanted = backbone.model(ids[:, :3]).last_hidden_state.mean(1)
    assert (method.features({"input_ids": ids, "attention_mask": mask}) - wanted).abs().max() < 1e-6


def test_two_classes_and_one_vs_rest_agree_with_scikit_learn():
    train = split(24, 3, classes=2)
    method = LinearProbe(bert(), LinearProbeConfig(num_labels=2))
    x, y = features(method, train)
    weight, bias = regression(x, y, 0.5, 1000)
    wanted = LogisticRegression(C=0.5, max_iter=1000).fit(x, y).predict_log_proba(x)
    logits = x @ weight.T + bias
    assert np.abs(logits - np.log(np.exp(logits).sum(1, keepdims=True)) - wanted).max() < 1e-8
    many = split(24, 3, multilabel=True)
    x, y = features(method, many)
    weight, bias = regression(x, y, 0.5, 1000)
    for c in range(C):
        column = LogisticRegression(C=0.5, max_iter=1000).fit(x, y[:, c])
        assert np.abs(x @ weight[c] + bias[c] - column.decision_function(x)).max() < 1e-8


def test_validation_chooses_the_penalty_by_accuracy_and_gives_the_metrics():
    backbone, train, validation = bert(), split(30, 1), split(18, 2)
    accuracies = {}
    for strength in (0.0001, 0.1, 10.0):
        one = LinearProbe(backbone, LinearProbeConfig(num_labels=C, C=(strength,)))
        accuracies[strength] = one.fit(train, validation, RUN).metrics["accuracy"]
    assert len(set(accuracies.values())) > 1
    chosen = LinearProbe(backbone, LinearProbeConfig(num_labels=C, C=(10.0, 0.1, 0.0001)))
    result = chosen.fit(train, validation, RUN)
    assert result.metrics["accuracy"] == pytest.approx(max(accuracies.values()))
    assert evaluate(chosen, validation)["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert result.metrics["accuracy"] > 0.6


def test_multilabel_probes_are_chosen_and_measured_by_f1():
    method = LinearProbe(bert(), LinearProbeConfig(num_labels=C, multilabel=True))
    train, validation = split(60, 4, multilabel=True), split(20, 5, multilabel=True)
    result = method.fit(train, validation, RUN)
    wanted = features(method, validation)[1]
    with torch.no_grad():
        logits = method(validation.batch(list(range(20)))).logits.numpy()
    assert result.metrics["micro-f1"] == pytest.approx(agreement(logits, wanted))
    assert result.metrics["micro-f1"] > 0.6


def test_agreement_by_hand():
    logits = np.array([[1.0, -1.0], [-1.0, 1.0], [2.0, 3.0]])
    assert agreement(logits, np.array([0, 0, 1])) == pytest.approx(2 / 3)
    assert agreement(logits, np.array([[1, 0], [1, 1], [0, 1]])) == pytest.approx(2 * 3 / (4 + 4))


def test_an_artifact_restores_the_logits_bit_for_bit_and_fitting_is_deterministic(tmp_path):
    train, test = split(30, 1), split(12, 2).batch(list(range(12)))
    method = LinearProbe(bert(), LinearProbeConfig(num_labels=C))
    method.fit(train, None, RUN)
    artifact = load_artifact(method.save_pretrained(tmp_path / "probe", backbone_name="tiny"))
    assert {name: tuple(t.shape) for name, t in artifact.tensors.items()} == {"head.weight": (C, D), "head.bias": (C,)}
    again = LinearProbe.from_pretrained(tmp_path / "probe", bert(), strict=True)
    refitted = LinearProbe(bert(), LinearProbeConfig(num_labels=C, seed=3))
    refitted.fit(train, None, RUN)
    assert torch.equal(again(test).logits, method(test).logits)
    assert torch.equal(refitted(test).logits, method(test).logits)


def test_nothing_is_left_for_an_optimiser_and_the_count_is_that_of_the_formula():
    method = LinearProbe(bert(), LinearProbeConfig(num_labels=C))
    assert method.count() == C * (D + 1)
    assert not list(method.trainable()) and method.parameter_groups() == [] and not method.trains
    assert float(method(split(3, 1).batch([0, 1, 2])).logits.abs().max()) == 0.0


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(InputError, match=r"'num_labels'.*has to know the classes"):
        LinearProbe(bert())
    with pytest.raises(ValueError, match="head_bias"):
        LinearProbeConfig(num_labels=C, head_bias=False)
    method = LinearProbe(bert(), LinearProbeConfig(num_labels=4))
    with pytest.raises(InputError, match="none, are of class 3"):
        method.fit(split(12, 1), None, RUN)
    with pytest.raises(InputError, match=r"'multilabel'.*multilabel off"):
        method.fit(split(12, 1, multilabel=True), None, RUN)
