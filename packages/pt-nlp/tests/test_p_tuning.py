"""P-tuning on small random models: the properties of its card, folding, and the shared prefix against the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from pt_nlp import models
from pt_nlp.methods.p_tuning import PTuning, PTuningConfig
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

VOCAB, WIDTH, LENGTH = 61, 16, 5


def small(model: type, config) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval().requires_grad_(False)


def llama() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"initializer_range": 0.3, "pad_token_id": 0, "num_key_value_heads": 2}
    return small(LlamaForCausalLM, LlamaConfig(vocab_size=VOCAB, **sizes, **special))


def bert() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return small(BertModel, BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    return small(T5ForConditionalGeneration, T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def ragged(padding: str = "right") -> dict[str, Tensor]:
    """The same three texts of 9, 6 and 4 tokens, padded on one side, to be learned token by token."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, VOCAB, (k,), generator=generator) for k in (9, 6, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding == "right" else slice(9 - len(row), 9)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "target_ids": ids.masked_fill(mask == 0, -100)}


def p_tuning(backbone: nn.Module, **settings) -> PTuning:
    return PTuning(backbone, PTuningConfig(prompt_length=LENGTH, **settings))


# --- 1. counts --------------------------------------------------------------------------------------------------------
def test_count_is_432_for_the_mlp_and_3952_for_the_lstm_of_the_toy_model() -> None:
    l, d, h = LENGTH, WIDTH, 8
    mlp = l * d + (d * h + h) + (h * h + h) + (h * d + d)
    lstm = l * d + 2 * (4 * h * (d + h) + 8 * h) + 2 * (4 * h * 3 * h + 8 * h) + (4 * h * h + 2 * h) + (2 * h * d + d)
    assert p_tuning(llama(), hidden_dim=8).count() == mlp == 432
    assert p_tuning(llama(), hidden_dim=8, encoder="lstm").count() == lstm == 3952


def test_width_of_the_network_is_d_for_the_mlp_and_half_of_it_for_each_direction_of_the_lstm() -> None:
    assert p_tuning(llama()).prompt.mlp[0].weight.shape == (WIDTH, WIDTH)
    lstm = p_tuning(llama(), encoder="lstm").prompt.lstm
    assert (lstm.hidden_size, lstm.num_layers, lstm.bidirectional) == (WIDTH // 2, 2, True)


# --- 8. identity ------------------------------------------------------------------------------------------------------
def make_identity(mlp: nn.Sequential) -> None:
    """Weights that let values pass both ReLUs: shifted above zero before them and back behind them."""
    shift = 8.0
    with torch.no_grad():
        for layer, bias in ((mlp[0], shift), (mlp[2], 0.0), (mlp[4], -shift)):
            layer.weight.copy_(torch.eye(WIDTH))
            layer.bias.fill_(bias)


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_an_identity_network_over_fixed_embeddings_equals_prompt_tuning(make) -> None:
    backbone, batch = make(), ragged()
    encoded, plain = p_tuning(backbone), PromptTuning(backbone, PromptTuningConfig(prompt_length=LENGTH))
    make_identity(encoded.prompt.mlp)
    encoded.prompt.embedding.data.copy_(plain.prompt.weight)
    arguments = {k: batch[k] for k in ("input_ids", "attention_mask")}
    if make is t5:
        arguments["decoder_input_ids"] = batch["input_ids"][:, :4]
    found = []
    for method in (encoded, plain):
        with method.active():
            found.append(backbone(**arguments)[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert (found[1] - backbone(**arguments)[0]).abs().max() > 1e-3


# --- folding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"encoder": "lstm", "dropout": 0.5}])
def test_folding_gives_prompt_tuning_with_equal_outputs(settings: dict) -> None:
    method = p_tuning(llama(), num_labels=3, **settings)
    plain, batch = method.folded(), ragged()
    assert isinstance(plain, PromptTuning)
    assert plain.count() == LENGTH * WIDTH + 3 * WIDTH + 3
    assert plain.config.lr == method.config.lr and plain.config.num_labels == 3
    method.eval(), plain.eval()
    torch.testing.assert_close(plain(batch).logits, method(batch).logits, atol=1e-6, rtol=1e-6)


def test_dropout_is_a_setting_of_the_lstm_only() -> None:
    with pytest.raises(ValueError, match="dropout would not be used: it is a setting of the LSTM, encoder is mlp"):
        PTuningConfig(dropout=0.1)
    assert PTuningConfig(encoder="lstm", dropout=0.1).dropout == 0.1
    assert PTuningConfig.model_validate(PTuningConfig().model_dump()) == PTuningConfig()


# --- fast == plain ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # one row; two passes
@pytest.mark.parametrize("padding", ["right", "left"])
def test_shared_prefix_equals_plain_path_in_loss_and_gradient(
    encoder: str, padding: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batch = p_tuning(llama().double(), encoder=encoder, hidden_dim=8).double(), ragged(padding)
    method.backbone.model.set_attn_implementation(attention)
    parameters = [p for _, p in method.trainable()]
    fast = method.loss(batch).value
    gradients = torch.autograd.grad(fast, parameters)
    monkeypatch.setattr(models, "SHARED_PREFIX", models.SHARED_PREFIX - {"llama"})
    assert models.shortcut_refused(method.backbone.model) is not None
    plain = method.loss(batch).value
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-6)
    for ours, expected in zip(gradients, torch.autograd.grad(plain, parameters), strict=True):
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_the_network_runs_once_in_a_step(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared:
        monkeypatch.setattr(models, "SHARED_PREFIX", set())
    for backbone in (llama(), bert(), t5()):
        settings = {"num_labels": 2} if isinstance(backbone, BertModel) else {}
        method, runs = p_tuning(backbone, **settings), []
        method.prompt.mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        method.loss(ragged() | {"labels": torch.tensor([0, 1, 1])})
        assert len(runs) == 1


def test_start_is_that_of_torch_layers_and_follows_the_seed() -> None:
    first, again, other = (p_tuning(llama(), encoder="lstm", hidden_dim=8, seed=s).prompt for s in (1, 1, 2))
    assert torch.equal(first.tokens(), again.tokens())
    assert not torch.equal(first.tokens(), other.tokens())
    assert 0.9 * 8**-0.5 < float(first.lstm.weight_hh_l0.detach().abs().max()) <= 8**-0.5
    assert 0.9 * 16**-0.5 < float(first.mlp[0].weight.detach().abs().max()) <= 16**-0.5


def test_defaults_are_the_mlp_of_peft_and_a_rate_for_short_runs() -> None:
    config = PTuningConfig()
    assert (config.prompt_length, config.encoder, config.hidden_dim, config.dropout) == (20, "mlp", None, 0.0)
    assert [group["lr"] for group in PTuning(llama()).parameter_groups()] == [1e-3]


def test_dropout_acts_between_the_layers_of_the_lstm_while_training_only() -> None:
    method = p_tuning(llama(), encoder="lstm", dropout=0.5)
    plain = p_tuning(llama(), encoder="lstm").train().prompt.tokens()
    torch.manual_seed(0)
    first, second = (method.train().prompt.tokens() for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    assert torch.equal(method.eval().prompt.tokens(), plain)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_rows_are_made_in_float32_under_autocast(encoder: str) -> None:
    method = p_tuning(llama(), encoder=encoder)
    with torch.autocast("cpu", torch.bfloat16):
        rows = method.prompt.tokens()
        method.loss(ragged()).total.backward()
    assert torch.equal(rows, method.prompt.tokens()) and rows.dtype == torch.float32
    assert method.prompt.embedding.grad.abs().max() > 0
