"""Adapter folders of peft, read and written: outputs are equal in both directions, and bad folders are refused by name."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft import PrefixTuningConfig as PeftPrefix
from peft import PromptEncoderConfig as PeftEncoder
from peft import PromptTuningConfig as PeftPrompt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from pt_core.errors import InputError
from pt_nlp import interop
from pt_nlp.interop import export_peft, import_peft
from pt_nlp.methods.p_tuning import PTuning, PTuningConfig
from pt_nlp.methods.p_tuning_v2 import PTuningV2, PTuningV2Config
from pt_nlp.methods.peft_peers import IA3, IA3Config, LoRA, LoRAConfig
from pt_nlp.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from pt_nlp.methods.prompt_tuning import PromptTuning, PromptTuningConfig

VOCAB, WIDTH, LENGTH = 61, 32, 5
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}


def small(family: str) -> nn.Module:
    torch.manual_seed(0)
    common = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    start = {"vocab_size": VOCAB, "initializer_range": 0.3}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **start, num_key_value_heads=2, pad_token_id=0))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**start, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64))
    elif family == "bert":
        model = BertForMaskedLM(BertConfig(**common, **start))
    else:
        sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))
    return model.eval().requires_grad_(False)


def text(family: str) -> dict[str, Tensor]:
    """Three ragged rows, padded on the right."""
    torch.manual_seed(1)
    mask = torch.stack([(torch.arange(9) < k).long() for k in (9, 6, 4)])
    arguments = {"input_ids": torch.randint(1, VOCAB, (3, 9)) * mask, "attention_mask": mask}
    return arguments | ({"decoder_input_ids": torch.randint(1, VOCAB, (3, 4))} if family == "t5" else {})


def assert_equal_outputs(family: str, method, theirs: nn.Module) -> None:
    arguments = text(family)
    with torch.no_grad(), method.active():
        ours = method.backbone(**arguments).logits
    with torch.no_grad():
        other = theirs.eval()(**arguments).logits[:, -ours.shape[1] :]
        bare = small(family)(**arguments).logits
    real = slice(None) if family == "t5" else arguments["attention_mask"].bool()
    torch.testing.assert_close(ours[real], other[real], atol=1e-5, rtol=1e-5)
    assert (ours - bare)[real].abs().max() > 1e-2


def peft_config(family: str, kind: str):
    common = {"task_type": TASKS[family], "num_virtual_tokens": LENGTH}
    if kind == "prompt":
        return PeftPrompt(**common)
    if kind.startswith("prefix"):
        projection = {"prefix_projection": True, "encoder_hidden_size": 12} if kind.endswith("projected") else {}
        return PeftPrefix(**common, **projection)
    return PeftEncoder(**common, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=12)


KINDS = ["prompt", "mlp", "lstm", "prefix", "prefix-projected"]
CASES = [(f, k) for f in ("llama", "gpt2", "bert") for k in KINDS] + [("t5", k) for k in KINDS[:3]]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_adapter_that_peft_wrote_gives_the_same_outputs_here(family: str, kind: str, tmp_path: Path) -> None:
    """For T5 peft writes two sets of rows (2 * l) and uses the first."""
    torch.manual_seed(2)
    theirs = get_peft_model(small(family), peft_config(family, kind)).eval()
    theirs.save_pretrained(tmp_path)
    method = import_peft(tmp_path, small(family))
    assert type(method) is (PrefixTuning if kind.startswith("prefix") else PromptTuning)
    assert method.config.prompt_length == LENGTH
    assert not method.training
    assert_equal_outputs(family, method, theirs)


def ours(family: str, kind: str):
    if kind == "prompt":
        return PromptTuning(small(family), PromptTuningConfig(prompt_length=LENGTH, init="random"))
    if kind.startswith("prefix"):
        hidden = 12 if kind.endswith("projected") else None
        config = PrefixTuningConfig(prompt_length=LENGTH, projection_dim=hidden, dropout=0.5, init="random")
        return PrefixTuning(small(family), config)
    dropout = 0.5 if kind == "lstm" else 0.0
    return PTuning(small(family), PTuningConfig(prompt_length=LENGTH, encoder=kind, dropout=dropout))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_exported_adapter_gives_the_same_outputs_in_peft_and_comes_back(
    family: str, kind: str, tmp_path: Path
) -> None:
    method = ours(family, kind)
    assert export_peft(method, tmp_path / "adapter") == tmp_path / "adapter"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = PeftModel.from_pretrained(small(family), tmp_path / "adapter")
    assert_equal_outputs(family, method.eval(), theirs)
    assert_equal_outputs(family, import_peft(tmp_path / "adapter", small(family)), theirs)


@pytest.mark.parametrize("family", list(TASKS))
@pytest.mark.parametrize("peer", [LoRA, IA3])
def test_an_exported_lora_or_ia3_adapter_gives_the_same_outputs_in_peft(
    family: str, peer: type[LoRA | IA3], tmp_path: Path
) -> None:
    config = LoRAConfig(r=4, alpha=16, rank_stabilised=True) if peer is LoRA else IA3Config()
    method = peer(small(family), config).eval()
    with torch.no_grad():
        for weights in method.adapter.parameters():
            weights.copy_(torch.empty_like(weights).normal_(1.0, 0.5))
    export_peft(method, tmp_path / "adapter")
    theirs, bare = PeftModel.from_pretrained(small(family), tmp_path / "adapter").eval(), small(family)
    assert theirs.peft_config["default"].task_type == TASKS[family]
    arguments = text(family)
    with torch.no_grad():
        ours, other, frozen = (model(**arguments).logits for model in (method.model, theirs, bare))
    torch.testing.assert_close(other, ours, atol=1e-5, rtol=1e-5)
    assert (ours - frozen).abs().max() > 1e-2


def test_export_leaves_nothing_on_the_backbone_and_the_method_as_it_was(tmp_path: Path) -> None:
    method = ours("llama", "mlp")
    before = {name: value.clone() for name, value in method.trained_state().items()}
    export_peft(method, tmp_path / "adapter")
    assert method.training
    assert all(torch.equal(value, method.trained_state()[name]) for name, value in before.items())
    assert method.backbone.__dict__["_pt_attached"].handles == [method.handle]


def test_export_replaces_an_adapter_but_no_other_folder(tmp_path: Path) -> None:
    method = ours("llama", "prompt")
    export_peft(method, tmp_path / "adapter")
    with torch.no_grad():
        method.prompt.weight.fill_(0.25)
    export_peft(method, tmp_path / "adapter")
    assert float(load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"].max()) == 0.25
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        export_peft(method, tmp_path / "adapter")


def test_neither_direction_needs_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails from here on
    spec = importlib.util.spec_from_file_location("interop_without_peft", interop.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    method = ours("llama", "prompt")
    folder = fresh.export_peft(method, tmp_path / "adapter")
    assert torch.equal(fresh.import_peft(folder, small("llama")).prompt.weight, method.prompt.weight)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return export_peft(ours("llama", "prompt"), tmp_path / "adapter")


def change(adapter: Path, **fields) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_other_kinds_are_refused_by_name_with_what_is_supported(tmp_path: Path) -> None:
    get_peft_model(small("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"'peft_type': 'LORA' is not supported.*PROMPT_TUNING, P_TUNING, PREFIX_TUNING"
    ):
        import_peft(tmp_path, small("llama"))


def test_a_prefix_of_an_encoder_decoder_is_refused_in_both_directions(tmp_path: Path) -> None:
    get_peft_model(small("t5"), peft_config("t5", "prefix")).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        InputError, match=r"PREFIX_TUNING of an encoder-decoder is not supported.*share keys and values"
    ):
        import_peft(tmp_path / "theirs", small("t5"))
    with pytest.raises(InputError, match="PREFIX_TUNING of an encoder-decoder is not supported"):
        export_peft(ours("t5", "prefix"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_methods_that_are_not_exported_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"p-tuning-v2 is not exported.*prompt-tuning, p-tuning, prefix.*the saved artifact"
    ):
        export_peft(PTuningV2(small("bert"), PTuningV2Config(num_labels=2)), tmp_path / "a")
    with pytest.raises(InputError, match="holds no head"):
        export_peft(PromptTuning(small("bert"), PromptTuningConfig(num_labels=2)), tmp_path / "a")


def test_another_backbone_is_refused_with_both_sizes(adapter: Path, tmp_path: Path) -> None:
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(InputError, match=r"'prompt_embeddings': has shape \(5, 32\), this backbone takes \(5, 64\)"):
        import_peft(adapter, wide)
    export_peft(ours("llama", "prefix"), tmp_path / "prefix")
    with pytest.raises(InputError, match=r"has shape \(5, 64\), this backbone takes \(5, 128\)"):
        import_peft(tmp_path / "prefix", small("gpt2"))


def test_a_head_in_the_adapter_is_refused_rather_than_dropped(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.score.weight": torch.ones(2, WIDTH)}, file)
    with pytest.raises(InputError, match=r"adapter_model.safetensors.*holds base_model.score.weight.*modules_to_save"):
        import_peft(adapter, small("llama"))


def test_the_head_that_peft_adds_for_classes_is_named_with_what_can_be_done(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, num_labels=3)
    backbone = LlamaForSequenceClassification(config).eval()
    theirs = get_peft_model(backbone, PeftPrompt(task_type="SEQ_CLS", num_virtual_tokens=LENGTH))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="score.*peft adds a head for SEQ_CLS by itself.*prompt_embeddings alone"):
        import_peft(tmp_path, backbone)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)
    ours = import_peft(tmp_path, backbone)
    assert torch.equal(ours.prompt.weight, theirs.prompt_encoder["default"].embedding.weight)


def test_missing_and_damaged_files_are_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/adapter_config.json: is missing"):
        import_peft(tmp_path / "nowhere", small("llama"))
    change(adapter, num_virtual_tokens=None)
    with pytest.raises(InputError, match="'num_virtual_tokens': is None"):
        import_peft(adapter, small("llama"))
    change(adapter, num_virtual_tokens=LENGTH)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"adapter_model.safetensors: is damaged"):
        import_peft(adapter, small("llama"))
    save_file({"prompt_embeddings": torch.full((LENGTH, WIDTH), torch.nan)}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="not finite"):
        import_peft(adapter, small("llama"))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config.json: is not JSON"):
        import_peft(adapter, small("llama"))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors: is missing.*saved as safetensors"):
        import_peft(adapter, small("llama"))
