"""Builds a tokenizer from GGUF metadata, as the model's original tokenizer would be.

Two kinds: `gpt2`, byte-level BPE whose way of cutting text is named by `tokenizer.ggml.pre`, and
`llama`, SentencePiece BPE whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from splitserve.errors import CheckpointError
from splitserve.fields import Fields

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_KEY: Final = "tokenizer.ggml."
_SPACE: Final = "▁"  # SentencePiece's visible space


@dataclass(frozen=True)
class _Cut:
    """How byte-level BPE cuts text before it merges."""

    steps: tuple[Any, ...]
    adds_bos: bool = False
    ignores_merges: bool = False
    normalizer: Any = None


def build_gguf_tokenizer(fields: Fields) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the file's vocabulary, special tokens and BOS rule.

    Raises `CheckpointError` for a kind that could not be built exactly.
    """
    kind = fields.optional_text(_KEY + "model")
    if kind is None:
        raise CheckpointError(
            f"{fields.source}: has no tokenizer; it can only serve token ids (skip_tokenizer_init)"
        )
    tokens = fields.texts(_KEY + "tokens")
    if len(set(tokens)) != len(tokens):
        raise fields.error(_KEY + "tokens", "has a token twice")
    try:
        match kind:
            case "gpt2":
                tokenizer, adds_bos = _byte_level(fields, tokens)
            case "llama":
                tokenizer, adds_bos = _sentencepiece(fields, tokens), True
            case _:
                raise fields.error(
                    _KEY + "model", f"{kind!r} is not supported; supported: gpt2, llama"
                )
        _add_special_tokens(tokenizer, fields, tokens)
        _add_bos_and_eos(tokenizer, fields, tokens, adds_bos)
    except CheckpointError:
        raise
    # The library raises bare Exception for a vocabulary and merges that do not fit together.
    except Exception as exc:
        raise CheckpointError(f"{fields.source}: tokenizer cannot be built: {exc}") from exc
    return tokenizer


def _byte_level(fields: Fields, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    kind = fields.text(_KEY + "pre")
    cuts = _cuts()
    if kind not in cuts:
        known = ", ".join(sorted(cuts))
        raise fields.error(_KEY + "pre", f"{kind!r} is not supported; supported: {known}")
    cut = cuts[kind]
    merges = [_merge(fields, text) for text in fields.texts(_KEY + "merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=cut.ignores_merges))
    if cut.normalizer is not None:
        tokenizer.normalizer = cut.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(cut.steps))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def _merge(fields: Fields, text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise fields.error(_KEY + "merges", f"has {text[:60]!r}, which is not two tokens")
    return left, right


def _cuts() -> dict[str, _Cut]:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digit_then_gpt2 = _Cut((pre_tokenizers.Digits(individual_digits=True), gpt2))
    llama3 = _Cut(_words(r"\p{N}{1,3}"), adds_bos=True, ignores_merges=True)
    return {
        "gpt-2": _Cut((gpt2,)),
        "smollm": digit_then_gpt2,
        "starcoder": digit_then_gpt2,
        "refact": digit_then_gpt2,
        "llama-bpe": llama3,
        "llama3": llama3,
        "llama-v3": llama3,
        "qwen2": _Cut(_words(r"\p{N}"), normalizer=normalizers.NFC()),
        "default": _Cut(
            (
                pre_tokenizers.Split(Regex(r"[\p{P}\$\+<=>\^~\|]+"), "isolated"),
                pre_tokenizers.Split(
                    Regex(
                        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
                    ),
                    "isolated",
                ),
                pre_tokenizers.Split(Regex(r"\p{N}+"), "isolated"),
                pre_tokenizers.Split(Regex(r"[0-9][0-9][0-9]"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            )
        ),
    }


def _words(numbers: str) -> tuple[Any, ...]:
    """The cut that tiktoken's cl100k introduced, with the given pattern for numbers."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return (
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def _sentencepiece(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    scores = fields.raw(_KEY + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise fields.error(_KEY + "scores", "must hold a score for every token")
    kinds = _token_types(fields, tokens)
    unknown = kinds.index(_UNKNOWN) if _UNKNOWN in kinds else None
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges_by_score(vocabulary, scores, kinds),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    adds_space = fields.boolean(_KEY + "add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if adds_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip: list[Any] = [decoders.Strip(content=" ", left=1, right=0)] if adds_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(
    vocabulary: dict[str, int], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece scores highest: merges in that order."""
    normal = {token: index for token, index in vocabulary.items() if kinds[index] == 1}
    ranked = sorted(normal, key=lambda token: -scores[vocabulary[token]])
    return [
        (piece[:at], piece[at:])
        for piece in ranked
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]


def _token_types(fields: Fields, tokens: Sequence[str]) -> list[int]:
    kinds = fields.integers(_KEY + "token_type")
    if len(kinds) != len(tokens):
        raise fields.error(_KEY + "token_type", "must hold a type for every token")
    return kinds


def _add_special_tokens(tokenizer: Tokenizer, fields: Fields, tokens: Sequence[str]) -> None:
    """Control tokens and the named ends are special; user-defined ones are only kept whole."""
    kinds = _token_types(fields, tokens)
    named = {_token_id(fields, name, tokens) for name in ("bos", "eos", "eot", "unknown")}
    special = [i for i, kind in enumerate(kinds) if kind == _CONTROL or i in named]
    whole = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED and i not in named]
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in special])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False) for i in whole])


def _add_bos_and_eos(
    tokenizer: Tokenizer, fields: Fields, tokens: Sequence[str], adds_bos: bool
) -> None:
    template, used = ["$A"], []
    bos, eos = (_token_id(fields, name, tokens) for name in ("bos", "eos"))
    if bos is not None and fields.boolean(_KEY + "add_bos_token", adds_bos):
        template.insert(0, tokens[bos])
        used.append((tokens[bos], bos))
    if eos is not None and fields.boolean(_KEY + "add_eos_token", False):
        template.append(tokens[eos])
        used.append((tokens[eos], eos))
    if used:
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)


def _token_id(fields: Fields, name: str, tokens: Sequence[str]) -> int | None:
    key = f"{_KEY}{name}_token_id"
    token_id = fields.optional_integer(key)
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise fields.error(key, f"{token_id} is outside the vocabulary of {len(tokens)}")
    return token_id
