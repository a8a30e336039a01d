import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pt_core.errors import InputError
from pt_core.metrics import (
    METRICS,
    check_names,
    evaluate_logits,
    evaluate_text,
    harmonic_mean,
    higher_is_better,
    mean_spread,
    paired_difference,
    t_quantile,
)


def logits_of(predictions, classes):
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def random_case(seed, rows=60, classes=4, missing=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 3
    labels = torch.randint(classes, (rows,), generator=generator)
    cells = (torch.rand(rows, classes, generator=generator) < 0.3).long()
    cells[torch.rand(rows, classes, generator=generator) < missing] = -1
    return logits, labels, cells


# Multi-class


def test_multiclass_numbers_by_hand():
    # Class 0: 2 right of 3, class 1: 1 of 1 and one row of class 0 on top, class 2: 1 of 2, the other went to class 0.
    logits = logits_of([0, 0, 1, 1, 2, 0], 3)
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    values = evaluate_logits(["accuracy", "micro-f1", "balanced-accuracy", "macro-f1"], "multiclass", logits, labels)
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["micro-f1"] == pytest.approx(4 / 6)
    assert values["balanced-accuracy"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    # F1 = 2 tp / (2 tp + fp + fn): 4/6, 2/3, 2/3
    assert values["macro-f1"] == pytest.approx((4 / 6 + 2 / 3 + 2 / 3) / 3)


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_have_rows():
    # Recall: class 0 2/4, class 1 1/1; class 2 is predicted but has no rows.
    values = evaluate_logits(
        ["balanced-accuracy"], "multiclass", logits_of([0, 0, 1, 2, 1], 3), torch.tensor([0, 0, 0, 0, 1])
    )
    assert values == pytest.approx({"balanced-accuracy": (1 / 2 + 1) / 2})


def test_macro_f1_leaves_out_a_class_absent_on_both_sides_and_counts_one_absent_on_one_side_as_zero():
    labels = torch.tensor([0, 0, 1, 1])
    nowhere = evaluate_logits(["macro-f1"], "multiclass", logits_of([0, 0, 1, 0], 4), labels)["macro-f1"]
    assert nowhere == pytest.approx((4 / 5 + 2 / 3) / 2)
    predicted_only = evaluate_logits(["macro-f1"], "multiclass", logits_of([0, 0, 1, 3], 4), labels)["macro-f1"]
    assert predicted_only == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("seed", range(3))
def test_multiclass_agrees_with_scikit_learn(seed):
    sk = pytest.importorskip("sklearn.metrics")
    logits, labels, _ = random_case(seed)
    predicted, probability = logits.argmax(1), logits.double().softmax(1).numpy()
    values = evaluate_logits(METRICS["multiclass"].keys() - {"top-5-accuracy"}, "multiclass", logits, labels)
    one_hot = np.eye(4)[labels]
    assert values == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, predicted),
            "balanced-accuracy": sk.balanced_accuracy_score(labels, predicted),
            "macro-f1": sk.f1_score(labels, predicted, average="macro"),
            "micro-f1": sk.f1_score(labels, predicted, average="micro"),
            "matthews": sk.matthews_corrcoef(labels, predicted),
            "roc-auc": sk.roc_auc_score(labels, probability, multi_class="ovr"),
            "average-precision": sk.average_precision_score(one_hot, probability, average="macro"),
            "calibration-error": values["calibration-error"],
        },
        abs=1e-6,
    )


def test_calibration_error_of_sure_and_half_right_predictions_is_a_half():
    logits = logits_of([0, 0, 1, 1], 2) * 50
    assert evaluate_logits(["calibration-error"], "multiclass", logits, torch.tensor([0, 1, 1, 0])) == pytest.approx(
        {"calibration-error": 0.5}
    )


def test_matthews_is_zero_when_one_class_is_always_predicted():
    logits = logits_of([1, 1, 1, 1], 3)
    assert evaluate_logits(["matthews"], "multiclass", logits, torch.tensor([0, 1, 2, 1])) == {"matthews": 0.0}


def test_top_5_accuracy_needs_more_than_five_classes():
    logits = torch.arange(12.0).reshape(2, 6)
    assert evaluate_logits(["top-5-accuracy"], "multiclass", logits, torch.tensor([0, 1])) == {"top-5-accuracy": 0.5}
    with pytest.raises(InputError, match="top-5 accuracy of 5 classes is always 1"):
        evaluate_logits(["top-5-accuracy"], "multiclass", torch.zeros(2, 5), torch.tensor([0, 1]))


# Ranking


def test_roc_auc_averages_over_the_classes_that_have_both_labels():
    logits = torch.tensor([[0.9, 3.0, 0.0], [0.1, 1.0, 0.0], [0.4, 2.0, 0.0], [0.3, 0.0, 0.0]])
    labels = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0]])
    # Class 0: pairs .9>.1, .9>.4, .3>.1, .3<.4: 3/4. Class 1: 3>1, 3>2, 0<1, 0<2: 2/4. Class 2 has no positive row.
    assert evaluate_logits(["roc-auc"], "multilabel", logits, labels)["roc-auc"] == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert math.isnan(evaluate_logits(["roc-auc"], "multilabel", logits[:, 2:], labels[:, 2:])["roc-auc"])


def test_roc_auc_ranks_large_logits_that_a_sigmoid_would_tie():
    logits = torch.tensor([[100.0], [200.0], [300.0], [400.0]])
    labels = torch.tensor([[0], [0], [1], [1]])
    assert evaluate_logits(["roc-auc", "average-precision"], "multilabel", logits, labels) == {
        "roc-auc": 1.0,
        "average-precision": 1.0,
    }
    rows = torch.tensor([[0.0, 20.0], [0.0, 25.0], [0.0, 30.0]])
    assert evaluate_logits(["roc-auc"], "multiclass", rows, torch.tensor([0, 0, 1])) == {"roc-auc": 1.0}


def test_tied_scores_count_half():
    logits, labels = torch.zeros(4, 1), torch.tensor([[0], [1], [0], [1]])
    assert evaluate_logits(["roc-auc"], "multilabel", logits, labels) == {"roc-auc": 0.5}


# Multi-label


def test_a_class_is_predicted_where_the_sigmoid_is_strictly_above_a_half():
    # All logits lie in [0, 1]: taken for probabilities, 0.4 would be a "no".
    logits = torch.tensor([[0.4, 0.0], [0.4, 0.0]])
    labels = torch.tensor([[1, 0], [1, 1]])
    values = evaluate_logits(["accuracy", "exact-match", "micro-f1", "macro-f1"], "multilabel", logits, labels)
    assert values == pytest.approx({"accuracy": 3 / 4, "exact-match": 1 / 2, "micro-f1": 4 / 5, "macro-f1": 1 / 2})


def test_missing_cells_count_nowhere():
    logits = torch.tensor([[5.0, -5.0], [5.0, 5.0], [-5.0, 5.0], [-6.0, -5.0]])
    labels = torch.tensor([[1, -1], [1, 1], [0, -1], [-1, 0]])
    names = list(METRICS["multilabel"])
    assert evaluate_logits(names, "multilabel", logits, labels, missing=-1) == dict.fromkeys(names, 1.0)
    wrong = labels.clone()
    wrong[0, 0] = 0
    values = evaluate_logits(["accuracy", "exact-match"], "multilabel", logits, wrong, missing=-1)
    assert values == pytest.approx({"accuracy": 4 / 5, "exact-match": 3 / 4})
    nan = torch.where(labels < 0, 7, labels)
    assert evaluate_logits(names, "multilabel", logits, nan, missing=7) == dict.fromkeys(names, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_multilabel_agrees_with_scikit_learn(seed):
    sk = pytest.importorskip("sklearn.metrics")
    logits, _, cells = random_case(seed)
    cells[:, 3], logits[:, 3] = 0, -1.0  # absent from labels and predictions: counts as 0 in macro-f1
    predicted = (logits > 0).long().numpy()
    values = evaluate_logits(METRICS["multilabel"], "multilabel", logits, cells)
    assert values == pytest.approx(
        {
            "accuracy": 1 - sk.hamming_loss(cells, predicted),
            "exact-match": sk.accuracy_score(cells, predicted),
            "macro-f1": sk.f1_score(cells, predicted, average="macro", zero_division=0),
            "micro-f1": sk.f1_score(cells, predicted, average="micro"),
            "roc-auc": sk.roc_auc_score(cells[:, :3], logits[:, :3]),
            "average-precision": sk.average_precision_score(cells[:, :3], logits[:, :3]),
        },
        abs=1e-6,
    )


def test_masked_roc_auc_agrees_with_scikit_learn_column_by_column():
    sk = pytest.importorskip("sklearn.metrics")
    logits, _, cells = random_case(5, missing=0.4)
    known = cells >= 0
    expected = [sk.roc_auc_score(cells[known[:, c], c], logits[known[:, c], c]) for c in range(4)]
    value = evaluate_logits(["roc-auc"], "multilabel", logits, cells, missing=-1)["roc-auc"]
    assert value == pytest.approx(np.mean(expected), abs=1e-6)


# Regression and text


def test_regression_numbers_by_hand():
    predictions, targets = torch.tensor([[1.0], [2.0], [3.0], [5.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    values = evaluate_logits(METRICS["regression"], "regression", predictions, targets)
    # Deviations of predictions: -1.75, -.75, .25, 2.25; of targets: -1.5, -.5, .5, 1.5; residual 1 in one row of 4.
    assert values == pytest.approx(
        {"pearson": 6.5 / math.sqrt(8.75 * 5), "spearman": 1.0, "mae": 0.25, "rmse": 0.5, "r2": 1 - 1 / 5}, abs=1e-6
    )


def test_text_numbers_by_hand():
    predictions = ["the cat sat ", "Dogs bark"]
    references = ["the cat sat", "a dog barks loudly"]
    values = evaluate_text(["exact-match", "token-f1", "rouge-1", "rouge-l"], predictions, references)
    assert values == pytest.approx({"exact-match": 0.5, "token-f1": 0.5, "rouge-1": 0.5, "rouge-l": 0.5})
    # SQuAD drops the article: tokens "cat sat" against "cat slept", one of two in common.
    assert evaluate_text(["token-f1"], ["The cat sat."], ["a cat slept"])["token-f1"] == pytest.approx(0.5)
    # ROUGE-1 of "a b c d" against "a c": precision 1/2, recall 1; ROUGE-2 has no bigram in common.
    values = evaluate_text(["rouge-1", "rouge-2"], ["a b c d"], ["a c"])
    assert values == pytest.approx({"rouge-1": 2 / 3, "rouge-2": 0.0}, abs=1e-6)


def test_json_keys_asks_for_one_object_with_the_keys_of_the_reference():
    reference = '{"topic": "tech", "headline": "A"}'
    right = ['{"headline": "other", "topic": 3}', ' {"topic": "tech", "headline": "A"}\n']
    wrong = [
        "topic: tech",
        '{"topic": "tech"}',
        '{"topic": 1, "headline": 2, "more": 3}',
        '["topic", "headline"]',
        f"```json\n{reference}\n```",
        f"{reference} {reference}",
        '{"topic": "tech", "headl',
    ]
    predictions = right + wrong
    assert evaluate_text(["json-keys"], predictions, [reference] * 9)["json-keys"] == pytest.approx(2 / 9)
    assert evaluate_text(["json-keys"], ["tech"], ["tech"])["json-keys"] == 0
    assert evaluate_text(["json-keys"], ["[" * 100_000], [reference])["json-keys"] == 0  # a model that repeats itself


def test_bleu_by_hand():
    # n-gram precisions 4/5, 3/4, 2/3, 1/2, and no brevity penalty: (1/5)^(1/4)
    value = evaluate_text(["bleu"], ["a b c d x"], ["a b c d e"])["bleu"]
    assert value == pytest.approx(0.2**0.25, abs=1e-5)


# Refusals


def test_an_unknown_metric_lists_those_there_are_per_task():
    with pytest.raises(
        InputError, match=r"no metric 'pearson' for the task 'multiclass'. Known, multiclass: accuracy, "
    ):
        check_names(["accuracy", "pearson"], "multiclass")
    with pytest.raises(InputError, match=r"unknown task 'ranking'. Use one of: multiclass, multilabel"):
        check_names([], "ranking")


@pytest.mark.parametrize(
    ("task", "logits", "labels", "message"),
    [
        ("multiclass", torch.zeros(3, 2), torch.tensor([0, 1]), r"logits \[3, 2\] do not go with labels \[2\]"),
        ("multiclass", torch.zeros(0, 2), torch.zeros(0), r"logits \[0, 2\] do not go"),
        ("multiclass", torch.zeros(2), torch.tensor([0, 1]), "do not go"),
        ("multiclass", torch.zeros(2, 2), torch.tensor([0, 2]), "row 2: the label is not one of 0 to 1"),
        ("multiclass", torch.tensor([[0, 1], [math.nan, 1]]), torch.tensor([0, 1]), "row 2: the logits are NaN"),
        ("multilabel", torch.zeros(2, 2), torch.tensor([[0, 1], [-1, 1]]), "row 2: a label is neither 0 nor 1"),
        ("multilabel", torch.zeros(2, 2), torch.tensor([0, 1]), "do not go"),
        ("text", torch.zeros(2, 2), torch.tensor([0, 1]), "has no logits"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(task, logits, labels, message):
    with pytest.raises(InputError, match=message):
        evaluate_logits([], task, logits, labels)


def test_texts_must_come_in_pairs():
    with pytest.raises(InputError, match="1 predictions for 2 references"):
        evaluate_text(["exact-match"], ["a"], ["a", "b"])


def test_half_precision_logits_are_evaluated():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    values = evaluate_logits(["accuracy", "roc-auc"], "multiclass", logits, torch.tensor([0, 1]))
    assert values == {"accuracy": 1.0, "roc-auc": 1.0}


def test_importing_metrics_does_not_import_torchmetrics():
    code = "import sys, pt_core.metrics; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# Several seeds


def test_direction_of_a_metric_ignores_its_prefix():
    assert higher_is_better("validation/accuracy") and higher_is_better("macro-f1")
    assert not higher_is_better("validation/loss") and not higher_is_better("rmse")


def test_spread_is_the_sample_standard_deviation():
    assert mean_spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, spread = mean_spread([0.5])
    assert mean == 0.5 and math.isnan(spread)
    assert all(map(math.isnan, mean_spread([])))


def test_paired_difference_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, t for two degrees of freedom 4.3027.
    difference = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert difference[:2] == (2.0, 1.0)
    assert difference.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert difference.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    single = paired_difference([2.0], [1.5])
    assert single.mean == 0.5 and math.isnan(single.low)
    with pytest.raises(InputError, match="2 and 1 values are not pairs"):
        paired_difference([1.0, 2.0], [1.0])


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.7062, 2: 4.30265, 4: 2.77645, 9: 2.26216, 30: 2.04227, 1000: 1.96234}
    assert {d: t_quantile(0.95, d) for d in table} == pytest.approx(table, abs=1e-4)
    assert t_quantile(0.99, 4) == pytest.approx(4.60409, abs=1e-4)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.lists(st.integers(0, 3), min_size=30, max_size=30))
@settings(max_examples=30, deadline=None)
def test_multiclass_scores_agree_with_scikit_learn_on_any_labels(labels, predictions):
    sk = pytest.importorskip("sklearn.metrics")
    labels, predictions = [*labels, 0, 1], [*predictions[: len(labels)], 0, 1]
    names = ["accuracy", "macro-f1", "matthews"]
    values = evaluate_logits(names, "multiclass", logits_of(predictions, 4), torch.tensor(labels))
    assert values == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, predictions),
            "macro-f1": sk.f1_score(labels, predictions, average="macro", zero_division=0),
            "matthews": sk.matthews_corrcoef(labels, predictions),
        },
        abs=1e-6,
    )


def test_the_harmonic_mean_of_base_and_new_is_that_of_the_field() -> None:
    assert round(harmonic_mean(82.28, 75.14), 2) == 78.55
    assert harmonic_mean(61.5, 61.5) == pytest.approx(61.5)
    assert 40 < harmonic_mean(40, 80) < 60
    assert harmonic_mean(0, 80) == harmonic_mean(80, 0) == harmonic_mean(0, 0) == 0


def test_equal_logits_count_as_argmax_takes_them():
    logits, labels = torch.zeros(4, 10), torch.tensor([0, 0, 1, 9])
    found = evaluate_logits(["accuracy", "micro-f1", "top-5-accuracy"], "multiclass", logits, labels)
    assert found == {"accuracy": 0.5, "micro-f1": 0.5, "top-5-accuracy": 0.75}


def test_rows_without_a_known_label_do_not_match():
    logits = torch.tensor([[3.0, -3.0], [1.0, 1.0], [2.0, -2.0]])
    labels = torch.tensor([[0, 1], [-1, -1], [1, -1]])
    assert evaluate_logits(["exact-match"], "multilabel", logits, labels, missing=-1) == {"exact-match": 0.5}
    assert math.isnan(
        evaluate_logits(["exact-match"], "multilabel", logits[1:2], labels[1:2], missing=-1)["exact-match"]
    )
