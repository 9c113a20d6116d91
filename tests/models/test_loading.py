from __future__ import annotations

import json
import shutil

import pytest
import torch
from plain import largest_difference, plain_numbers, route_numbers
from safetensors.torch import load_file, save_file
from tiny_models import CHATML, bpe_tokenizer, random_groups, randomize, tiny_causal, tiny_config, tiny_reward
from transformers import AutoModelForCausalLM

from prefsel.errors import UserError
from prefsel.models.architecture import model_shape, supports_packing
from prefsel.models.attention import IMPLEMENTATION
from prefsel.models.declared import declared_config, head_names, max_positions
from prefsel.models.directional import directional_logps, finite_difference_logps
from prefsel.models.directory import check_directory, model_identity
from prefsel.models.loading import check_vocabulary, context_length, load_causal, load_reward, load_tokenizer
from prefsel.models.logps import logps_route, score_groups
from prefsel.score.multi_model import weights_bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_causal().save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_loads_in_evaluation_mode_with_the_registered_attention(folder):
    model = load_causal(str(folder), dtype="bf16", device="cpu")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == IMPLEMENTATION
    assert load_tokenizer(str(folder)).chat_template


def test_the_same_logits_as_transformers_own_loading(folder):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert torch.equal(load_causal(str(folder), dtype=torch.float32, device="cpu")(ids).logits, expected)


def test_a_saved_copy_loads_without_this_package(folder, tmp_path):
    load_causal(str(folder), dtype="fp32", device="cpu").save_pretrained(tmp_path / "copy")
    assert IMPLEMENTATION not in (tmp_path / "copy" / "config.json").read_text()


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", "no config.json"), ("*.safetensors", r"no \*\.safetensors"), ("*", "no config.json")],
)
def test_what_a_directory_lacks_is_named(folder, remove, message):
    for file in folder.glob(remove):
        file.unlink()
    with pytest.raises(UserError, match=f"{folder}.*{message}"):
        load_causal(str(folder), dtype="fp32", device="cpu")


def in_two_files(folder):
    """The folder's weights as `save_pretrained` splits large ones."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        save_file(dict(sorted(weights.items())[number::2]), folder / file, metadata={"format": "pt"})
    where = {name: files[number % 2] for number, name in enumerate(sorted(weights))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / files[1]


def test_a_missing_file_of_the_weights_is_named_before_anything_is_loaded(folder):
    second = in_two_files(folder)
    check_directory(str(folder))
    second.unlink()
    with pytest.raises(UserError, match=rf"{folder}: 1 of the 2 files of weights .*, the first {second.name}"):
        check_directory(str(folder))
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match=r"its model.safetensors.index.json (is not a JSON table|has no table)"):
        check_directory(str(folder))


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("config.json", "{no", "its config.json is not a JSON table"),
        ("config.json", "[1]", "its config.json is not a JSON table"),
        ("tokenizer.json", "{no", "its tokenizer cannot be loaded"),
        ("tokenizer.json", '{"model": 3}', "its tokenizer cannot be loaded"),
    ],
)
def test_a_broken_file_is_the_users_error_whatever_its_reader_raises(folder, file, text, told):
    (folder / file).write_text(text)
    load = declared_config if file == "config.json" else load_tokenizer
    with pytest.raises(UserError, match=rf"{folder}: {told}"):
        load(str(folder))


def test_weights_of_another_shape_are_named(folder):
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(
        UserError, match=r"6 tensors .* the first model\.layers\.0\.mlp\.down_proj\.weight: got \[32, 64\]"
    ):
        load_causal(str(folder), dtype="fp32", device="cpu")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found \['pytorch_model.bin'\], which is not read"):
        load_causal(str(folder), dtype="fp32", device="cpu")


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{folder}: no tokenizer in the directory; expected one of tokenizer.json"):
        load_tokenizer(str(folder))


def test_a_missing_directory_is_not_looked_up_on_a_hub(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_causal(str(tmp_path / "none"), dtype="fp32", device="cpu")


def test_a_language_model_is_no_reward_model(folder):
    with pytest.raises(
        UserError, match=r"weights lack 1 tensors of LlamaForSequenceClassification: \['score.weight'\]"
    ):
        load_reward(str(folder), dtype="fp32", device="cpu")


def test_wrong_options_name_the_valid_ones(folder):
    with pytest.raises(UserError, match="dtype: got 'int3'; valid: fp32, bf16, fp16"):
        load_causal(str(folder), dtype="int3", device="cpu")
    with pytest.raises(UserError, match=r"revision: got 'main'; valid: the 40 hex digits"):
        load_causal("some/model", dtype="fp32", device="cpu", revision="main", trust_remote_code=True)
    with pytest.raises(UserError, match="gpus_per_replica: got 99"):
        load_causal(str(folder), dtype="fp32", device="cpu", gpus_per_replica=99)


def test_identity_follows_the_content(folder):
    first = model_identity(str(folder))
    assert model_identity(str(shutil.copytree(folder, folder.parent / "copy"))) == first
    (folder / "tokenizer_config.json").write_text("{}")
    second = model_identity(str(folder))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({first, second, model_identity(str(folder))}) == 3


def test_identity_follows_every_chat_template(folder):
    first = model_identity(str(folder))
    bpe_tokenizer(chat_template={"default": CHATML, "tool_use": CHATML}).save_pretrained(folder)
    second = model_identity(str(folder))
    (other,) = folder.glob("*/tool_use.jinja")
    other.write_text(f"tools: {CHATML}")
    assert len({first, second, model_identity(str(folder))}) == 3


def test_identity_of_a_hub_commit_is_the_commit():
    assert model_identity("some/model", revision="0123456789" * 4) == "0123456789" * 4


def test_heads_are_named_by_the_configuration(tmp_path):
    model = tiny_reward(num_labels=2, id2label={0: "honesty", 1: "helpfulness"})
    model.save_pretrained(tmp_path)
    assert head_names(str(tmp_path)) == ["honesty", "helpfulness"]
    assert load_reward(str(tmp_path), dtype="fp32", device="cpu").config.num_labels == 2


CONFIG_CODE = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "prefsel_own"
    max_position_embeddings = 77
"""


def test_a_configuration_with_code_of_its_own_is_read_when_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_reward(num_labels=2).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "prefsel_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    own["id2label"] = {"0": "style", "1": "truth"}
    (folder / "config.json").write_text(json.dumps(config | own | {"max_position_embeddings": 77}))
    (folder / "configuration_own.py").write_text(CONFIG_CODE)
    assert head_names(str(folder), trust_remote_code=True) == ["style", "truth"]
    assert max_positions(str(folder), trust_remote_code=True) == 77
    with pytest.raises(UserError, match="trust_remote_code"):
        head_names(str(folder))


MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "prefsel_own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """A model whose configuration, weights and tokenizer need the code beside them."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    edit(folder / "config.json", model_type="prefsel_own_llama", auto_map=auto)
    auto = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto)
    (folder / "own_code.py").write_text(MODEL_CODE)
    return folder


def edit(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


OLDER_CODE = """
import torch
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ATTENTION = {"eager": torch.nn.Linear, "sdpa": torch.nn.Linear}

class OlderForCausalLM(PreTrainedModel):
    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.mixer = ATTENTION[config._attn_implementation](config.hidden_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, attention_mask=None):
        hidden_BTD = self.embedding(input_ids)
        return CausalLMOutput(logits=self.head(hidden_BTD + self.mixer(hidden_BTD).cumsum(1)))
"""


def test_code_of_a_packed_type_that_knows_its_own_attention_alone_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    known = {}
    exec(OLDER_CODE, known)  # the class that a repository of a `llama` brings along
    folder = tmp_path / "older"
    randomize(known["OlderForCausalLM"](tiny_config("llama"))).save_pretrained(folder)
    (folder / "older_code.py").write_text(OLDER_CODE)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "older_code.OlderForCausalLM"})
    model = load_causal(str(folder), dtype="fp32", device="cpu", trust_remote_code=True)
    route = logps_route(model)
    assert route.reason.startswith("OlderForCausalLM is not transformers' own code")
    groups = random_groups([2, 1])
    expected = plain_numbers(model, groups, is_reward=False)
    assert largest_difference(route_numbers(route, groups, 10_000), expected) < 1e-4


EVERY_READER = {
    "weights": lambda path, **code: load_causal(path, dtype="fp32", device="cpu", **code),
    "tokenizer": load_tokenizer,
    "configuration": lambda path, **code: declared_config(path, None, *code.values()),
    "outputs": head_names,
    "context": lambda path, **code: context_length(path, None, *code.values()),
    "positions": lambda path, **code: max_positions(path, None, *code.values()),
    "size": lambda path, **code: weights_bytes(path, "fp32", **code),
}


@pytest.mark.parametrize("reader", EVERY_READER)
def test_every_reader_runs_a_models_own_code_when_it_is_trusted_and_only_then(reader, own):
    assert EVERY_READER[reader](str(own), trust_remote_code=True)
    (own / "own_code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match="to run it, set the model's trust_remote_code: true"):
        EVERY_READER[reader](str(own))


@pytest.mark.parametrize("reader", EVERY_READER)
def test_code_of_another_repository_is_refused(reader, own):
    auto = {"AutoConfig": "someone/else--own_code.OwnConfig", "AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    edit(own / "config.json", auto_map=auto)
    with pytest.raises(UserError, match="takes code from the repository 'someone/else', at no fixed revision"):
        EVERY_READER[reader](str(own), trust_remote_code=True)


def test_the_identity_follows_the_code(own):
    first = model_identity(str(own))
    (own / "own_code.py").write_text(MODEL_CODE + "# changed")
    assert model_identity(str(own)) != first


def test_context_length_is_the_shortest_declared(tmp_path):
    tiny_causal().save_pretrained(tmp_path)
    tokenizer = bpe_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert (context_length(str(tmp_path)), max_positions(str(tmp_path))) == (256, 256)
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(tmp_path)
    assert (context_length(str(tmp_path)), max_positions(str(tmp_path))) == (100, 256)


def test_damaged_weights_are_the_users_error(tmp_path):
    tiny_causal().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_causal(str(tmp_path), dtype="fp32", device="cpu")


def test_shape_by_hand():
    # Per layer: q 32·32, k and v 32·16, o 32·32, three of 32·64.
    shape = model_shape(tiny_causal())
    assert shape.trunk_parameters == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert shape.head_parameters == 400 * 32
    assert (shape.num_layers, shape.attention_width) == (2, 32)
    assert model_shape(tiny_reward()).head_parameters == 0


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mistral", {"sliding_window": 16}, "sliding-window"),
        ("gemma2", {}, "'gemma2' is not among the tested"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' rotary"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}, "hybrid"),
    ],
)
def test_what_packing_would_not_serve_exactly(model_type, options, reason):
    is_supported, why = supports_packing(tiny_causal(model_type, **options))
    assert not is_supported
    assert reason in why


def test_the_configuration_on_disk_is_read(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    assert supports_packing(load_causal(str(folder), dtype="fp32", device="cpu")) == (
        False,
        "its attention is bidirectional",
    )


def with_more_tokens(tokens: list[str]):
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name_token_and_sizes():
    tokenizer = with_more_tokens(["<|turn|>", "<|tool|>"])
    size = len(tokenizer)
    model = tiny_causal(vocab_size=size - 2)
    wanted = rf"model shop/tiny: its tokenizer has {size} tokens and its embedding {size - 2} rows, none for token "
    with pytest.raises(UserError, match=wanted + rf"'<\|turn\|>' with id {size - 2} \(2 such tokens\)") as raised:
        check_vocabulary(tokenizer, model, path="shop/tiny")
    assert raised.value.exit_code == 2
    check_vocabulary(tokenizer, tiny_causal(vocab_size=size))
    check_vocabulary(tokenizer, tiny_causal(vocab_size=size + 62))  # a padded vocabulary


def test_an_id_beyond_the_embedding_counts_though_there_are_fewer_tokens_than_rows():
    class WithGap:
        def get_vocab(self):
            return {"a": 0, "b": 1, "<far>": 9}

        def __len__(self):
            return 3

    with pytest.raises(UserError, match=r"none for token '<far>' with id 9 \(1 such tokens\)"):
        check_vocabulary(WithGap(), path="m", rows=9)
    check_vocabulary(WithGap(), path="m", rows=10)


def test_notebook_calls_refuse_it_too():
    tokenizer = with_more_tokens(["<|turn|>"])
    model = tiny_causal(vocab_size=len(tokenizer) - 1)
    groups = [{"prompt": "who sat?", "completions": ["the cat", "a dog"]}]
    for call in (
        lambda: score_groups(model, tokenizer, groups, token_budget=64),
        lambda: directional_logps(model, tokenizer, groups, {}),
        lambda: finite_difference_logps(model, tokenizer, groups, {}),
    ):
        with pytest.raises(UserError, match="its tokenizer has"):
            call()
