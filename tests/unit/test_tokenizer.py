from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from splitserve.errors import CheckpointError, InvalidRequest
from splitserve.fields import Fields
from splitserve.tokenizer import Tokenizer
from splitserve.weights.gguf_tokenizer import build_gguf_tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab\n\nand lines \n ",
    "don't I'LL we've THEY'RE",
    "héllo wörld 日本語 नमस्ते 👩‍👩‍👧 \u200d\u0000",
    "def f(x):\n    return x ** 2  # ½\n",
]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@pytest.fixture
def hf_directory(tmp_path) -> Path:
    """A byte-level tokenizer whose file asks for truncation and padding, and adds BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_directory(hf_directory):
    tokenizer = Tokenizer.from_checkpoint(hf_directory)
    assert tokenizer.vocab_size == 259
    assert tokenizer.special_ids == {256, 257}
    assert tokenizer.eos_token_ids == {257}
    ids = tokenizer.encode("hi there</s><tool>")
    assert ids[0] == 256
    assert ids[-2:] == [257, 258]
    assert len(ids) == 1 + 8 + 2
    assert tokenizer.encode("hi there</s><tool>", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == "hi there<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>hi there</s><tool>"
    assert tokenizer.has_token(258)
    assert not tokenizer.has_token(259)
    assert tokenizer.token_text(257) == "</s>"
    assert tokenizer.decode([104, 9999]) == tokenizer.decode([104])


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back(hf_directory, text):
    tokenizer = Tokenizer.from_checkpoint(hf_directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogate_is_the_callers_fault(hf_directory):
    with pytest.raises(InvalidRequest, match="text: is not valid Unicode"):
        Tokenizer.from_checkpoint(hf_directory).encode("\ud800")


def test_missing_tokenizer(hf_directory):
    (hf_directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="it can only serve token ids"):
        Tokenizer.from_checkpoint(hf_directory)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_json(hf_directory, content):
    (hf_directory / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        Tokenizer.from_checkpoint(hf_directory)


def gpt2_metadata(pre: str | None, merges: tuple[str, ...] = (), **more: object) -> Fields:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<s>", "</s>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    return Fields(Path("m.gguf"), values | {f"tokenizer.ggml.{k}": v for k, v in more.items()})


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "in 2024  x", ["in", "Ġ2024", "Ġ", "Ġx"]),
        ("smollm", "in 2024  x", ["in", "Ġ", "2", "0", "2", "4", "Ġ", "Ġx"]),
        ("llama-bpe", "in 2024  X'S\n\n", ["in", "Ġ", "202", "4", "Ġ", "ĠX", "'S", "ĊĊ"]),
        ("qwen2", "in 20  x.\n", ["in", "Ġ", "2", "0", "Ġ", "Ġx", ".Ċ"]),
        ("default", "a+b 2024", ["a", "+", "b", "Ġ", "202", "4"]),
    ],
)
def test_text_is_cut_as_the_kind_says(pre, text, pieces):
    backend = build_gguf_tokenizer(gpt2_metadata(pre))
    assert backend.pre_tokenizer is not None
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_qwen2_composes_characters():
    backend = build_gguf_tokenizer(gpt2_metadata("qwen2"))
    assert backend.encode("e\u0301").ids == backend.encode("é").ids


def test_merges_and_bos():
    backend = build_gguf_tokenizer(gpt2_metadata("smollm", ("h e",)))
    assert backend.encode("he</s>").tokens == ["he", "</s>"]
    backend = build_gguf_tokenizer(gpt2_metadata("llama-bpe", ("h e",)))
    assert backend.encode("he").tokens == ["<s>", "he"]
    backend = build_gguf_tokenizer(gpt2_metadata("llama-bpe", ("h e",), add_bos_token=False))
    assert backend.encode("he").tokens == ["he"]
    backend = build_gguf_tokenizer(gpt2_metadata("gpt-2", add_bos_token=True, add_eos_token=True))
    assert backend.encode("h").tokens == ["<s>", "h", "</s>"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": None}, "it can only serve token ids"),
        ({"model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"pre": "poro"}, "tokenizer.ggml.pre 'poro' is not supported"),
        ({"tokens": ["a", "a"]}, "tokens has a token twice"),
        ({"token_type": [1]}, "must hold a type for every token"),
        ({"merges": ["ab"]}, "which is not two tokens"),
        ({"merges": ["zz yy"]}, "tokenizer cannot be built"),
        ({"bos_token_id": 99999}, "bos_token_id 99999 is outside the vocabulary"),
        ({"model": "llama"}, "must hold a score for every token"),
    ],
)
def test_metadata_that_cannot_be(changes, expected):
    fields = gpt2_metadata(**{"pre": "smollm", **changes})
    with pytest.raises(CheckpointError) as caught:
        build_gguf_tokenizer(fields)
    assert caught.value.message.startswith("m.gguf: ")
    assert expected in caught.value.message


@pytest.fixture(scope="module")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    """A small model trained as Llama 2's was."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in topics.values() for line in text.splitlines()),
        model_writer=trained,
        vocab_size=1500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor) -> Fields:
    def kind(index: int) -> int:
        if model.IsUnknown(index):
            return 2
        if model.IsControl(index):
            return 3
        return 6 if model.IsByte(index) else 1

    indexes = range(model.GetPieceSize())
    return Fields(
        Path("m.gguf"),
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [model.IdToPiece(i) for i in indexes],
            "tokenizer.ggml.scores": [model.GetScore(i) for i in indexes],
            "tokenizer.ggml.token_type": [kind(i) for i in indexes],
            "tokenizer.ggml.bos_token_id": model.bos_id(),
            "tokenizer.ggml.eos_token_id": model.eos_id(),
            "tokenizer.ggml.unknown_token_id": model.unk_id(),
        },
    )


def test_sentencepiece_kind_equals_sentencepiece(sentencepiece_model):
    tokenizer = Tokenizer(
        build_gguf_tokenizer(sentencepiece_metadata(sentencepiece_model)), frozenset({2})
    )
    lines = [line for text in list(topics.values())[:40] for line in text.splitlines()]
    for text in [*TEXTS[1:], *lines[:1500]]:
        if "\u0000" in text or not text:
            continue
        ids = tokenizer.encode(text)
        assert ids == [1, *sentencepiece_model.EncodeAsIds(text)], text
        assert tokenizer.decode(ids) == text


@pytest.mark.model
def test_real_model(model_path):
    tokenizer = Tokenizer.from_checkpoint(model_path)
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == set(range(17))
    assert tokenizer.eos_token_ids == {2}
    text = "<|im_start|>user\nIn 1969, two  men<|im_end|>"
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\nIn 1969, two  men"


@pytest.mark.model
@pytest.mark.slow
def test_real_model_equals_transformers(model_path):
    """On text without digits: transformers drops the digit cut that the model was trained with."""
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name)
    tokenizer = Tokenizer.from_checkpoint(model_path)
    lines = [line for text in topics.values() for line in text.splitlines(keepends=True)]
    texts = [*TEXTS, "<|im_start|>user\nhi<|im_end|>", *lines[:2000]]
    for text in texts:
        if not any(char.isnumeric() for char in text):
            assert tokenizer.encode(text) == oracle(text)["input_ids"], text
