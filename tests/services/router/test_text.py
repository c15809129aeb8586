"""Text and conversations in, text and stop texts out, with a tokenizer of words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers

from splitserve.v1 import common_pb2, inference_pb2

WORDS = 1000
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 999,
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Token n is the word `n`, but 1 to 3 are roles; `?` is what is no word."""
    names = {0: "?", 1: "user", 2: "assistant", 3: "system"}
    vocabulary = {names.get(token, str(token)): token for token in range(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.decoder = tokenizers.decoders.Metaspace("_")
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return tmp_path


@pytest.fixture
async def suite(start_suite: Any, checkpoint: Path) -> Any:
    return await start_suite(flags=["--no-skip-tokenizer-init", f"--model={checkpoint}"])


async def generate(suite: Any, request: Any) -> list[Any]:
    return [message async for message in suite.stub.Generate(request, timeout=10)]


def text_of(messages: list[Any]) -> str:
    return "".join(choice.text for message in messages for choice in message.choices)


async def test_text(suite: Any, tools: Any) -> None:
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=6)
    messages = await generate(
        suite, inference_pb2.GenerateRequest(model="toy", text="7 11 13 17", sampling=sampling)
    )
    expected = tools.tokens_after([7, 11, 13, 17], 6)
    assert tools.token_ids(messages) == expected
    assert text_of(messages).replace(" ", "") == "".join(map(str, expected))
    assert list(suite.prefill.requests[0].prompt_token_ids) == [7, 11, 13, 17]
    await suite.assert_nothing_left()


async def test_long_text_goes_to_a_thread(suite: Any, tools: Any) -> None:
    words = [str(10 + i % 80) for i in range(500)]
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=2)
    padded = ("  " * 4).join(words)
    messages = await generate(suite, inference_pb2.GenerateRequest(text=padded, sampling=sampling))
    assert tools.token_ids(messages) == tools.tokens_after([int(word) for word in words], 2)


async def test_chat(suite: Any) -> None:
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=1)
    turns = [
        inference_pb2.ChatMessage(role="system", content="20 21"),
        inference_pb2.ChatMessage(role="user", content="22"),
    ]
    for generate_prompt, ids in ((None, [3, 20, 21, 1, 22, 2]), (False, [3, 20, 21, 1, 22])):
        chat = inference_pb2.ChatPrompt(messages=turns, add_generation_prompt=generate_prompt)
        await generate(suite, inference_pb2.GenerateRequest(chat=chat, sampling=sampling))
        assert list(suite.prefill.requests[-1].prompt_token_ids) == ids


async def test_stop_text_ends_the_choice_on_all_tiers(suite: Any, tools: Any) -> None:
    prompt = [7, 11, 13, 17]
    expected = tools.tokens_after(prompt, 20)
    suite.decode.hold_at = 10
    sampling = common_pb2.SamplingParams(
        temperature=0, max_tokens=20, stop=[str(expected[4]), "never"]
    )
    request = inference_pb2.GenerateRequest(
        tokens=inference_pb2.TokenPrompt(ids=prompt), sampling=sampling
    )
    messages = await generate(suite, request)
    ids = tools.token_ids(messages)
    assert ids == expected[: len(ids)]
    assert len(ids) <= 5
    assert str(expected[4]) not in text_of(messages)
    assert messages[-1].choices[0].finish_reason == common_pb2.FINISH_REASON_STOP
    assert list(suite.prefill.requests[0].sampling.stop) == []
    await suite.until(lambda: len(suite.decode.cancels) == 1)
    await suite.assert_nothing_left()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (inference_pb2.GenerateRequest(text=""), "text"),
        (inference_pb2.GenerateRequest(text="   "), "text"),
        (inference_pb2.GenerateRequest(text="5 " * 600), "text"),
    ],
)
async def test_texts_that_cannot_be(suite: Any, request_: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(suite, request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}:")


async def test_list_models_tells_of_tokenizer_and_template(suite: Any) -> None:
    response = await suite.stub.ListModels(inference_pb2.ListModelsRequest())
    model = response.models[0]
    assert (model.has_tokenizer, model.has_chat_template) == (True, True)
    assert (model.vocab_size, model.max_context_tokens) == (WORDS, 512)
