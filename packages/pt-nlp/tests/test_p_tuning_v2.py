"""P-tuning v2 on small random encoders: count, start, dropout, its head, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CamembertConfig,
    CamembertModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pt_core.errors import InputError
from pt_nlp.methods.p_tuning_v2 import PTuningV2, PTuningV2Config

VOCAB, WIDTH = 61, 32


def small(model: type, config) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval().requires_grad_(False)


def bert(layers: int = 2, model: type = BertModel, config: type = BertConfig) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    return small(model, config(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, **sizes))


def llama() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small(LlamaForCausalLM, LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=0, **sizes))


def v2(backbone: nn.Module, **settings) -> PTuningV2:
    return PTuningV2(backbone, PTuningV2Config(**({"num_labels": 3} | settings)))


def texts(rows: int = 24) -> dict[str, Tensor]:
    """Random texts of 3 to 8 tokens; the class is told by the second token."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(rows) % 3
    ids = torch.randint(10, VOCAB, (rows, 8), generator=generator)
    ids[:, 1] = labels + 3
    mask = (torch.arange(8)[None] < torch.randint(3, 9, (rows, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def test_count_is_2_n_l_d_and_the_head() -> None:
    for layers, length, classes in ((2, 20, 3), (3, 7, 5)):
        method = v2(bert(layers), prompt_length=length, num_labels=classes)
        assert method.count() == 2 * layers * length * WIDTH + (WIDTH * classes + classes)


def test_bert_large_with_20_rows_trains_983_040_values_without_the_head() -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        backbone = BertModel(BertConfig(**sizes))
    method = v2(backbone, num_labels=2)
    assert method.prompt.count() == 2 * 24 * 20 * 1024 == 983_040
    assert method.count() - method.prompt.count() == 1024 * 2 + 2


def test_defaults_are_those_of_the_card() -> None:
    config = PTuningV2Config(num_labels=2)
    assert (config.prompt_length, config.dropout, config.init_std, config.lr) == (20, 0.1, 0.02, 5e-3)
    assert (config.init, config.projection_dim) == ("random", None)


def test_start_is_normal_with_standard_deviation_0_02() -> None:
    weight = v2(bert(), prompt_length=64).prompt.weight.detach()
    assert abs(float(weight.std()) - 0.02) < 0.001
    assert abs(float(weight.mean())) < 0.001


def test_dropout_of_0_1_acts_on_the_prefix_while_training_only() -> None:
    method, batch = v2(bert(), prompt_length=64), texts()
    share = float((method.train().prompt.key_values() == 0).float().mean())
    assert 0.08 < share < 0.12
    assert not torch.equal(method(batch).logits, method(batch).logits)
    method.eval()
    assert torch.equal(method(batch).logits, method(batch).logits)
    assert int((method.prompt.key_values() == 0).sum()) == 0
    assert all(not module.training for module in method.train().backbone.modules())


def test_the_head_is_required() -> None:
    with pytest.raises(InputError, match=r"'num_labels': p-tuning-v2 reads a trained head.*prefix tuning"):
        PTuningV2(bert(), PTuningV2Config())


ENCODERS = {
    "roberta": (RobertaModel, RobertaConfig),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig),
    "camembert": (CamembertModel, CamembertConfig),
    "electra": (ElectraModel, ElectraConfig),  # embeddings of 128, hidden states of 32
}


@pytest.mark.parametrize("make", [bert, *(lambda kind=kind: bert(2, *kind) for kind in ENCODERS.values()), llama])
def test_prefix_and_head_both_learn_and_the_classes_are_told_apart(make) -> None:
    method, batch = v2(make(), prompt_length=4), texts()
    before = {name: value.clone() for name, value in method.trained_state().items()}
    groups = method.parameter_groups()
    assert [group["name"] for group in groups] == ["prompt", "head"]
    assert [group["lr"] for group in groups] == [5e-3, 5e-3]
    optimiser = torch.optim.AdamW([{**group, "lr": 3e-2} for group in groups])
    for _ in range(60):
        optimiser.zero_grad()
        method.loss(batch).value.backward()
        optimiser.step()
    method.eval()
    right = (method(batch).logits.argmax(-1) == batch["labels"]).float().mean()
    assert right > 0.9
    assert all((method.trained_state()[name] - value).abs().max() > 1e-2 for name, value in before.items())
