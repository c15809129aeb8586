from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from splitserve.detokenizer import IncrementalDetokenizer, TextDelta
from splitserve.stop_strings import StopMatcher
from splitserve.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    """Every byte is a token, with a few longer ones that end inside a character."""
    backend = Backend(models.BPE({}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letter = [pre_tokenizers.ByteLevel(False, False).pre_tokenize_str(bytes([b]).decode("latin-1"))
              for b in range(128)]  # fmt: skip
    spelled = {bytes([b]): piece[0][0] for b, piece in enumerate(letter)}
    for char in "éĀ日😀":
        pieces = pre_tokenizers.ByteLevel(False, False).pre_tokenize_str(char)[0][0]
        spelled |= {bytes([b]): s for b, s in zip(char.encode(), pieces, strict=True)}
    tokens = list(spelled.values())
    for group in ("a\xc3", "\xa5b", "\xe6\x97", "\x97\xa5", "\xf0\x9f\x98"):
        joined = "".join(spelled.get(bytes([ord(c)]), "") for c in group)
        if joined not in tokens:
            tokens.append(joined)
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, frozenset())


def byte_fallback() -> Tokenizer:
    """As SentencePiece: a space before words, characters that are no piece come as bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁the", "é"]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, frozenset())


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()


def run(
    tokenizer: Tokenizer, pushes: list[list[int]], stop: list[str], skip: bool
) -> tuple[list[str], bool]:
    detokenizer = IncrementalDetokenizer(tokenizer, stop, skip)
    texts = [detokenizer.push(ids).text for ids in pushes]
    return [*texts, detokenizer.finish()], detokenizer.stopped


any_ids = st.integers(0, BYTE_LEVEL.vocab_size + 3)
no_text_ids = st.sampled_from(
    [i for i in range(BYTE_LEVEL.vocab_size) if "\ufffd" in BYTE_LEVEL.decode([i], False)]
)


@settings(max_examples=300)
@given(
    pushes=st.lists(st.lists(any_ids | no_text_ids, max_size=6), max_size=20), skip=st.booleans()
)
def test_deltas_join_to_the_whole_even_of_bytes_that_are_no_text(pushes, skip):
    texts, _ = run(BYTE_LEVEL, pushes, [], skip)
    assert "".join(texts) == BYTE_LEVEL.decode([i for ids in pushes for i in ids], skip)


@given(
    words=st.lists(st.sampled_from([" a", "b", " the", "é", " ", "日", "😀", "x"]), max_size=20),
    specials=st.lists(st.integers(0, 20), max_size=3),
    size=st.integers(1, 5),
)
def test_deltas_join_to_the_whole_with_byte_fallback(words, specials, size):
    ids = BYTE_FALLBACK.encode("".join(words))
    for place in specials:
        ids.insert(place, BYTE_FALLBACK.vocab_size - 1)
    pushes = [ids[at : at + size] for at in range(0, len(ids), size)]
    texts, _ = run(BYTE_FALLBACK, pushes, [], True)
    assert "".join(texts) == BYTE_FALLBACK.decode(ids)


@given(
    text=st.text("ab日😀é ", max_size=30), stop=st.lists(st.text("ab日 ", min_size=1, max_size=3))
)
def test_stop_strings_are_those_of_the_text(text, stop):
    ids = BYTE_LEVEL.encode(text)
    texts, stopped = run(BYTE_LEVEL, [[i] for i in ids], stop, True)
    matcher = StopMatcher(stop)
    expected = matcher.push(text) + matcher.flush()
    assert ("".join(texts), stopped) == (expected, matcher.stopped)


def test_no_half_character_is_emitted():
    ids = BYTE_LEVEL.encode("a日b")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert [detokenizer.push([i]).text for i in ids] == ["a", "", "", "日", "b"]
    assert detokenizer.finish() == ""


def test_an_unfinished_character_comes_at_the_end():
    ids = BYTE_LEVEL.encode("日")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    assert detokenizer.push(ids[:2]) == TextDelta("", False, 2)
    assert detokenizer.finish() == "\ufffd"


def test_tokens_after_the_stop_are_not_taken():
    ids = BYTE_LEVEL.encode("ab. More")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["."])
    assert detokenizer.push(ids[:2]) == TextDelta("ab", False, 2)
    assert detokenizer.push(ids[2:]) == TextDelta("", True, 1)
    assert detokenizer.push(ids) == TextDelta("", True, 0)
    assert detokenizer.finish() == ""


def test_what_could_have_been_a_stop_comes_at_the_end():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["the end"])
    assert detokenizer.push(BYTE_LEVEL.encode("so the en")).text == "so "
    assert detokenizer.finish() == "the en"
    assert not detokenizer.stopped


def test_spaces_after_special_tokens_are_kept():
    special = BYTE_FALLBACK.vocab_size - 1
    the = BYTE_FALLBACK.token_text(260)
    assert the == "▁the"
    pushes = [[260], [special], [260], [special, special], [260]]
    texts, _ = run(BYTE_FALLBACK, pushes, [], True)
    assert texts == ["the", "", " the", "", " the", ""]


@pytest.mark.parametrize("kind", ["text", "no text"])
def test_work_a_token_does_not_grow(kind):
    """Sixteen times the tokens take about sixteen times as long, not 256 times."""
    ids = BYTE_LEVEL.encode("a日b " if kind == "text" else "日")
    if kind == "no text":
        ids = ids[:1]

    def seconds(count: int) -> float:
        detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ["zebra"])
        start = time.perf_counter()
        for _ in range(count):
            detokenizer.push(ids)
        return time.perf_counter() - start

    seconds(100)
    short = min(seconds(200) for _ in range(3))
    assert seconds(3200) < 80 * short


@pytest.mark.model
def test_real_vocabulary(model_path):
    tokenizer = Tokenizer.from_checkpoint(model_path)
    text = "Naïve café 日本語 नमस्ते 👩‍👩‍👧: x = 12;\n\tdone." * 3
    ids = tokenizer.encode(text)
    texts, _ = run(tokenizer, [[i] for i in ids], [], True)
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)
