"""Prompt tuning, prefix tuning and P-tuning against peft on small random models: values, gradients, counts, updates.

Where peft does something else on purpose or by accident, the test says how its numbers are made comparable:

- it ignores positions for prompt and P-tuning, so padding on the left counts; ours is given the same positions;
- it learns the first real token from the prompt's last row; that token's label is -100 here;
- its encoder-decoder prompts have a second set of rows without gradient; it is asked for one set;
- its pooled output of an encoder reads the first prompt row; hidden states of real tokens are compared;
- its prefix of an encoder-decoder hands layer i the columns 4i and 4i+1 modulo 2N.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig as PeftPrefix
from peft import PromptEncoderConfig as PeftEncoder
from peft import PromptTuningConfig as PeftPrompt
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_nlp.methods.p_tuning import PTuning, PTuningConfig
from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig, flatten, unflatten
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

VOCAB, WIDTH, LENGTH = 61, 32, 5
TASKS = {"llama": "CAUSAL_LM", "llama-mha": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
METHODS = ["prompt", "prefix", "prefix-projected", "mlp", "lstm"]
ROWS = [
    (family, method)
    for family in ("llama", "llama-mha", "bert", "t5")
    for method in METHODS
    # peft narrows a projection under grouped-query attention; T5's prefix has its own test
    if (family, method) not in {("llama", "prefix-projected"), ("t5", "prefix"), ("t5", "prefix-projected")}
    if family != "llama-mha" or method == "prefix-projected"
]


def small(family: str, layers: int = 2) -> nn.Module:
    """A small random model in float64, so that two ways of the same sum agree far below 1e-5."""
    torch.manual_seed(0)
    if family == "bert":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
        model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes))
    elif family == "t5":
        sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if family == "llama-mha" else 2}
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": layers} | heads
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, pad_token_id=0, **sizes))
    return model.double().eval().requires_grad_(False)


def ours_and_theirs(family: str, method: str) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Our method, peft's model with the same values, and pairs of parameters that belong together (ours first)."""
    model = small(family)
    common = {"task_type": TASKS[family], "num_virtual_tokens": LENGTH, "num_transformer_submodules": 1}
    if method == "prompt":
        mine = PromptTuning(model, PromptTuningConfig(prompt_length=LENGTH, init="random"))
        config = PeftPrompt(**common)
    elif method.startswith("prefix"):
        hidden = 12 if method == "prefix-projected" else None
        mine = PrefixTuning(model, PrefixTuningConfig(prompt_length=LENGTH, projection_dim=hidden, init="random"))
        config = PeftPrefix(**common, prefix_projection=hidden is not None, encoder_hidden_size=hidden)
    else:
        mine = PTuning(model, PTuningConfig(prompt_length=LENGTH, hidden_dim=12, encoder=method))
        config = PeftEncoder(**common, encoder_reparameterization_type=method.upper(), encoder_hidden_size=12)
    theirs = get_peft_model(copy.deepcopy(small(family)), config).double().eval()
    mine.double().eval()
    encoder = theirs.prompt_encoder["default"]
    names = {"embedding.weight": "embedding", "transform": "projection", "mlp_head": "mlp", "lstm_head": "lstm"}
    own, pairs = dict(mine.prompt.named_parameters()), []
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if method in ("prompt", "prefix"):
                if method == "prefix":
                    parameter.copy_(flatten(own["weight"]))
                pairs.append((own["weight"], parameter))
                continue
            for old, new in names.items():
                name = name.replace(old, new) if name.startswith(old) else name
            pairs.append((own[name], parameter))
        for a, b in pairs:
            b.copy_(as_theirs(a, b))
    assert len(pairs) == len(own)
    return mine, theirs, pairs


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-5, and near zero to 1e-6 of the largest: transformers takes the loss of a causal model in float32."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.detach().abs().max()))


def as_theirs(ours: Tensor, theirs: Tensor) -> Tensor:
    """Ours in the layout of theirs: flat prefixes are the only ones that differ."""
    return flatten(ours) if ours.ndim == 5 else ours.view_as(theirs)


def text(family: str, padding: str) -> tuple[dict[str, Tensor], Tensor]:
    """Ragged rows padded on one side, as arguments of a model, and the mask of real tokens."""
    torch.manual_seed(1)
    lengths, n = (9, 6, 4), 9
    ids = torch.randint(1, VOCAB, (len(lengths), n))
    mask = torch.stack([(torch.arange(n) < k).long() for k in lengths])
    if padding == "left":
        mask = mask.flip(1)
    arguments = {"input_ids": ids * mask, "attention_mask": mask}
    if family == "t5":
        arguments["labels"] = torch.randint(1, VOCAB, (len(lengths), 4))
    elif family != "bert":
        labels = ids.masked_fill(mask == 0, -100)
        labels[torch.arange(len(lengths)), mask.argmax(1)] = -100
        arguments["labels"] = labels
    return arguments, mask.bool()


def run(mine: nn.Module, theirs: nn.Module, family: str, padding: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits at real tokens and losses: ours, theirs, ours, theirs."""
    arguments, real = text(family, padding)
    own = dict(arguments)
    if family.startswith("llama"):
        own["position_ids"] = torch.arange(real.shape[1]).expand(len(real), -1)
    with mine.active():
        a = mine.backbone(**own)
    b = theirs(**arguments)
    if family == "t5":
        return a.logits, b.logits, a.loss, b.loss
    x, y = a.logits[real], b.logits[:, -real.shape[1] :][real]
    if family == "bert":
        weights = torch.linspace(-1, 1, VOCAB).double()
        return x, y, (x * weights).mean(), (y * weights).mean()
    return x, y, a.loss, b.loss


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("family", "method"), ROWS)
def test_values_gradients_and_counts_are_those_of_peft(family: str, method: str, padding: str) -> None:
    mine, theirs, pairs = ours_and_theirs(family, method)
    assert mine.count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    ours, other, loss, other_loss = run(mine, theirs, family, padding)
    close(ours, other)
    close(loss, other_loss)
    loss.backward()
    other_loss.backward()
    for a, b in pairs:
        assert b.grad.abs().max() > 0
        close(as_theirs(a.grad, b), b.grad)


@pytest.mark.parametrize(("family", "method"), ROWS)
def test_two_adamw_steps_make_the_same_updates_as_peft(family: str, method: str) -> None:
    mine, theirs, pairs = ours_and_theirs(family, method)
    before = [b.detach().clone() for _, b in pairs]
    optimisers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=1e-2, weight_decay=0.01) for i in (0, 1)]
    for padding in ("right", "left"):
        losses = run(mine, theirs, family, padding)[2:]
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for (a, b), start in zip(pairs, before, strict=True):
        assert (b - start).abs().max() > 1e-2
        torch.testing.assert_close(as_theirs(a, b), b, atol=1e-5, rtol=0)


def t5_prefixes(
    layers: int, hidden: int | None
) -> tuple[PrefixTuning, nn.Module, list[tuple[Tensor, Tensor]], list[int]]:
    """Ours and peft's prefix of T5 with the same values, pairs of parameters that belong together (ours first), and the pair
    of columns that each layer reads."""
    settings = PrefixTuningConfig(prompt_length=LENGTH, projection_dim=hidden, init="random")
    mine = PrefixTuning(small("t5", layers), settings).double()
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": LENGTH, "num_layers": layers}
    config = PeftPrefix(**common, prefix_projection=hidden is not None, encoder_hidden_size=hidden)
    theirs = get_peft_model(copy.deepcopy(small("t5", layers)), config).double().eval()
    read = [2 * i % layers for i in range(layers)]
    pairs = list(zip(mine.prompt.parameters(), theirs.prompt_encoder["default"].parameters(), strict=True))
    with torch.no_grad():
        for a, b in pairs:
            if by_layer(a):
                parts(a).copy_(parts(b)[read])
            else:
                a.copy_(b)
    return mine, theirs, pairs, read


def by_layer(parameter: Tensor) -> bool:
    """Whether a prefix has a part of this parameter for each layer: of keys and values, or of what a projection ends with."""
    return parameter.ndim == 5 or len(parameter) % (2 * WIDTH) == 0


def parts(parameter: Tensor) -> Tensor:
    """A view of the parts that layers read, [layers, ...]: of ours, of peft's flat columns, of what a projection ends with."""
    if parameter.ndim == 5:
        return parameter
    if len(parameter) == LENGTH:
        return parameter.view(LENGTH, -1, 2, 4, 8).permute(1, 2, 3, 0, 4)
    return parameter.view(-1, 2 * WIDTH, *parameter.shape[1:])


@pytest.mark.parametrize("hidden", [None, 12], ids=["plain", "projected"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_t5_prefix_of_peft_is_ours_with_layer_i_reading_columns_4i_modulo_2n(
    layers: int, padding: str, hidden: int | None
) -> None:
    """For even N half of peft's columns never get a gradient, and layers i and i + N/2 share one pair."""
    mine, theirs, pairs, read = t5_prefixes(layers, hidden)
    count = 2 * layers * LENGTH * WIDTH
    if hidden:
        count = LENGTH * WIDTH + WIDTH * hidden + hidden + 2 * layers * WIDTH * (hidden + 1)
    assert mine.count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad) == count
    ours, other, loss, other_loss = run(mine, theirs, "t5", padding)
    close(ours, other)
    loss.backward()
    other_loss.backward()
    assert sum(by_layer(a) for a, _ in pairs) == (2 if hidden else 1)
    for a, b in pairs:
        if not by_layer(a):
            assert b.grad.abs().max() > 0
            close(a.grad, b.grad)
            continue
        own, columns = parts(a.grad), parts(b.grad)
        summed = torch.zeros_like(own).index_add(0, torch.tensor(read), own)
        close(summed, columns)
        assert sum(float(layer.abs().max()) == 0 for layer in columns) == (1 if layers == 2 else 0)
        assert all(float(layer.abs().max()) > 0 for layer in own)  # ours trains all of them


@pytest.mark.parametrize("hidden", [None, 12], ids=["plain", "projected"])
def test_two_adamw_steps_on_a_t5_prefix_make_the_same_updates_as_peft(hidden: int | None) -> None:
    """With three layers, where each layer of peft's has columns of its own."""
    mine, theirs, pairs, read = t5_prefixes(3, hidden)
    before = [b.detach().clone() for _, b in pairs]
    optimisers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=1e-2, weight_decay=0.01) for i in (0, 1)]
    for padding in ("right", "left"):
        losses = run(mine, theirs, "t5", padding)[2:]
        for optimiser, loss in zip(optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for (a, b), start in zip(pairs, before, strict=True):
        assert (b - start).abs().max() > 1e-2
        if by_layer(a):
            a, b = parts(a), parts(b)[read]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_explicit_positions_agree_for_prefix_tuning_with_padding_on_the_left() -> None:
    """The one prompt kind for which peft takes positions: it adds l to them, as ours does."""
    mine, theirs, _ = ours_and_theirs("llama", "prefix")
    arguments, real = text("llama", "left")
    positions = (arguments["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with mine.active():
        ours = mine.backbone(**arguments).logits  # counts real tokens by itself
    other = theirs(**arguments, position_ids=positions).logits
    close(ours[real], other[real])


def test_flat_columns_and_keys_and_values_convert_into_each_other() -> None:
    from pt_nlp.models import Shape

    rows = torch.arange(2 * 3 * 2 * 2 * 4.0).view(2, -1)
    cut = unflatten(rows, Shape(dim=8, layers=3, kv_heads=2, head_dim=4))
    assert cut.shape == (3, 2, 2, 2, 4)
    assert cut[1, 0, 1, 0].tolist() == [20.0, 21.0, 22.0, 23.0]  # layer 1 key, head 1, row 0: (1 * 2 + 0) * 8 + 4
    assert torch.equal(flatten(cut), rows)
