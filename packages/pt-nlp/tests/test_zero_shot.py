"""Zero-shot scores and their calibration, worked by hand on small random language models."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from pt_core.artifacts import load_artifact
from pt_core.errors import InputError
from pt_core.frozen import assert_unchanged, snapshot
from pt_core.plan import FitConfig
from pt_nlp.data import TextTask
from pt_nlp.methods.zero_shot import ZeroShot, ZeroShotConfig

WORDS = "<pad> </s> <unk> the a was film news great awful red blue good bad NA it"
TEXTS = ["the film was great", "a awful film", "the news was red", "it was blue a a", "great"]
ROWS = [{"text": text, "label": ("yes", "no", "so")[i % 3]} for i, text in enumerate(TEXTS)]
RUN = FitConfig(epochs=1, device="cpu", eval_batch_size=2, progress=False)


def tokenizer() -> PreTrainedTokenizerFast:
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def task(backbone: str = "causal-lm", long_words: bool = False, **spec) -> TextTask:
    words = {"yes": "good good", "no": "bad", "so": "it"} if long_words else {"yes": "good", "no": "bad", "so": "it"}
    rows = {"train": ROWS, "validation": ROWS[:3]}
    return TextTask.from_rows(
        rows, tokenizer(), kind="verbalizer", backbone=backbone, verbalizer=words, template="{text} was", **spec
    )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def by_hand(backbone, made: TextTask, text: str) -> torch.Tensor:
    """Log-probability of each label word after one text, among the words: one whole sequence at a time."""
    source = made.encoder.source({"text": text})
    scores = []
    for word in made.encoder.candidates():
        if backbone.config.is_encoder_decoder:
            logits = backbone(torch.tensor([source]), labels=torch.tensor([word])).logits[0]
        else:
            logits = backbone(torch.tensor([source + word])).logits[0, len(source) - 1 : -1]
        scores.append(sum(logits.log_softmax(-1)[i, token] for i, token in enumerate(word)))
    return torch.stack(scores).log_softmax(0)


@torch.no_grad()
def logits(method: ZeroShot, made: TextTask) -> torch.Tensor:
    return method(made.train.batch(list(range(len(TEXTS))))).logits


@pytest.mark.parametrize("objective", ["tokens", "classes"])
@pytest.mark.parametrize("calibrate", ["none", "train-mean"])
def test_the_loss_before_any_calibration_is_that_of_the_plain_scores(objective, calibrate):
    backbone, made = llama(), task(objective=objective)
    method, batch = ZeroShot(backbone, ZeroShotConfig(calibrate=calibrate)), made.train.batch([0, 1, 2])
    with torch.no_grad():
        found, wanted = method.loss(batch), 0.0
        for row, text in zip(made.train.rows, TEXTS[:3], strict=False):
            if objective == "classes":
                wanted -= float(by_hand(backbone, made, text)[row["label"]])
            else:
                logits = backbone(torch.tensor([row["source"]])).logits[0, -1]
                wanted -= float(logits.log_softmax(-1)[row["target"][0]])
    assert float(found.total) == pytest.approx(wanted, abs=1e-4)


CASES = [(llama, "causal-lm", False), (llama, "causal-lm", True), (t5, "seq2seq", True)]


@pytest.mark.parametrize(("make", "kind", "long"), CASES)
def test_plain_scores_are_the_log_probabilities_of_the_label_words(make, kind, long):
    backbone, made = make(), task(kind, long)
    before = snapshot(backbone)
    method = ZeroShot(backbone)
    wanted = torch.stack([by_hand(backbone, made, text) for text in TEXTS])
    assert (logits(method, made).log_softmax(-1) - wanted).abs().max() < 1e-5
    result = method.fit(made.train, made.validation, RUN)
    right = sum(int(wanted[i].argmax() == made.train.rows[i]["label"]) for i in range(3))
    assert result.steps == 0 and result.metrics["accuracy"] == pytest.approx(right / 3)
    assert method.count() == 0 and method.trained_state() == {}
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(("make", "kind", "long"), CASES)
def test_train_mean_subtracts_the_mean_log_probability_of_each_class(make, kind, long):
    backbone, made = make(), task(kind, long)
    before = snapshot(backbone)
    method = ZeroShot(backbone, ZeroShotConfig(calibrate="train-mean"))
    method.fit(made.train, None, RUN)
    plain = torch.stack([by_hand(backbone, made, text) for text in TEXTS])
    assert (method.calibration - plain.mean(0)).abs().max() < 1e-5
    found = logits(method, made)
    assert (found - (plain - plain.mean(0))).abs().max() < 1e-5
    assert found.mean(0).abs().max() < 1e-5
    assert (found.argmax(1) != plain.argmax(1)).any()  # it changes answers
    batch = made.train.batch(range(3))
    loss = method.loss_of(method(batch), batch)
    expected = torch.nn.functional.cross_entropy(found[:3], batch["labels"])
    assert float(loss.value) == pytest.approx(float(expected), abs=1e-5) and loss.count == 3
    assert_unchanged(backbone, before)


def test_train_mean_reads_no_labels_and_only_as_many_rows_as_asked_for():
    backbone, made = llama(), task()
    changed = [row | {"label": "so"} for row in ROWS]
    other = TextTask(made.spec, made.tokenizer)
    other.train = other.split(changed)
    fits = []
    for split, rows in ((made.train, None), (other.train, None), (made.train, 2)):
        fits.append(ZeroShot(backbone, ZeroShotConfig(calibrate="train-mean", calibration_rows=rows)))
        fits[-1].fit(split, None, RUN)
    assert torch.equal(fits[0].calibration, fits[1].calibration)
    plain = torch.stack([by_hand(backbone, made, text) for text in TEXTS])
    pairs = [(plain[i] + plain[j]) / 2 for i in range(5) for j in range(i)]
    assert min((fits[2].calibration - pair).abs().max() for pair in pairs) < 1e-5


def test_content_free_divides_by_the_mean_probability_of_inputs_without_content():
    backbone, made = llama(), task(long_words=True)
    texts = ["NA", "NA it"]
    ids = tuple(tuple(row["source"]) for row in made.texts(texts))
    assert {len(row) for row in ids} == {2, 3}  # unequal lengths: padded on the left
    method = ZeroShot(backbone, ZeroShotConfig(calibrate="content-free", content_free_ids=ids))
    method.fit(made.train, None, RUN)
    free = torch.stack([by_hand(backbone, made, text) for text in texts]).exp().mean(0)
    plain = torch.stack([by_hand(backbone, made, text) for text in TEXTS])
    found = logits(method, made)
    assert (found - (plain - free.log())).abs().max() < 1e-5
    assert torch.equal(found.argmax(1), (plain.exp() / free).argmax(1))  # Zhao et al.: argmax of p / p_cf


def test_an_artifact_restores_the_calibration_whatever_the_number_of_classes(tmp_path):
    backbone, made = llama(), task()
    method = ZeroShot(backbone, ZeroShotConfig(calibrate="train-mean"))
    method.fit(made.train, None, RUN)
    folder = method.save_pretrained(tmp_path / "prompt", backbone_name="tiny", task=made.spec.model_dump(mode="json"))
    assert {name: tuple(t.shape) for name, t in load_artifact(folder).tensors.items()} == {"calibration": (3,)}
    again = ZeroShot.from_pretrained(folder, llama(), strict=True).eval()
    assert torch.equal(logits(again, made), logits(method, made))
    refitted = ZeroShot(llama(), ZeroShotConfig(calibrate="train-mean"))
    refitted.fit(made.train, None, RUN)
    assert torch.equal(refitted.calibration, method.calibration)
    with pytest.raises(InputError, match="missing"):
        again.load_trained_state({})
    plain = ZeroShot(llama()).save_pretrained(tmp_path / "plain", backbone_name="tiny")
    assert ZeroShot.from_pretrained(plain, llama()).trained_state() == {}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match=r"'num_labels'.*has no head"):
        ZeroShot(llama(), ZeroShotConfig(num_labels=3))
    other = ZeroShot(llama(), ZeroShotConfig(calibrate="train-mean"))
    assert torch.equal(logits(other, task()), logits(ZeroShot(llama()), task()))  # nothing fitted yet
    other.load_trained_state({"calibration": torch.zeros(2)})
    with pytest.raises(InputError, match=r"'calibrate'.*that of 2 classes, the batch has 3.*Call fit"):
        logits(other, task())
    with pytest.raises(ValueError, match="content_free_ids are needed"):
        ZeroShotConfig(calibrate="content-free")
    with pytest.raises(ValueError, match="content_free_ids are needed"):
        ZeroShotConfig(calibrate="none", content_free_ids=((3,),))
    for ids in ((), (99,)):
        with pytest.raises(InputError, match="'content_free_ids'"):
            ZeroShot(llama(), ZeroShotConfig(calibrate="content-free", content_free_ids=(ids,)))
    made = TextTask.from_rows({"train": ROWS}, tokenizer(), kind="text-to-text", backbone="causal-lm")
    with pytest.raises(InputError, match="only scores of label words"):
        ZeroShot(llama(), ZeroShotConfig(calibrate="train-mean")).fit(made.train, None, RUN)
