import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels import sampling
from splitserve_kernels.sampling import MAX_VOCAB, logprobs, sample, sample_reference
from splitserve_kernels.sampling_keys import NARROWED, STAGE, notes_of_row
from splitserve_kernels.sampling_settle import enlist
from splitserve_kernels.small_tiles import counters
from torch import Tensor

from splitserve.engine import sampler
from splitserve.engine.protocol import Draw
from splitserve.sampling import SamplingParams

FP32 = torch.float32
ALL_PASSES = ["survey", "narrow", "narrow", "enlist", "settle", "draw"]


def row_of(kind: str, vocab: int) -> Tensor:
    """Logits, fp32."""
    if kind == "flat":
        return torch.randn(vocab) * 0.1
    if kind == "ties":
        return torch.randint(-3, 3, (vocab,)).float()
    if kind == "peaked":
        return torch.randn(vocab) * 8
    row = torch.randn(vocab) * 2
    row[torch.rand(vocab) < 0.5] = -torch.inf
    row[vocab // 2] = 1.0
    return row


def boundaries(row: Tensor, params: SamplingParams) -> Tensor:
    """Where uniforms change the token: the sampler's cumulative distribution, scaled to 1."""
    probs = torch.softmax((row.double() - row.max()) / params.temperature, dim=-1)
    if params.top_k or params.top_p < 1.0:
        probs = sampler._truncate(probs, params.top_k, params.top_p)
    probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    return probs.cumsum(-1) / probs.sum()


def tensors(params: list[SamplingParams]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.tensor([p.temperature for p in params], dtype=FP32),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=FP32),
        torch.tensor([p.min_p for p in params], dtype=FP32),
    )


def fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=FP32))


@contextmanager
def cut(chunk: int, listed: int) -> Iterator[None]:
    """Chunks and lists of these sizes, and memory in which every byte is 0xFF."""
    plain_empty = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        memory.view(torch.uint8).fill_(0xFF)
        return memory

    sizes = mock.patch.multiple(sampling, _CHUNK=chunk, _LISTED=listed)
    with sizes, mock.patch.object(torch, "empty", empty):
        yield


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the passes that are launched."""
    launched: list[str] = []

    class Pass:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(sampling, name)

        def __getitem__(self, grid: tuple[int, int]) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    with mock.patch.multiple(sampling, **{name: Pass(name) for name in ALL_PASSES}):
        yield launched


def drawn_in_pieces(logits: Tensor, *parameters: Tensor) -> Tensor:
    """`sample` with many chunks and short lists, which leaves the counters at zero."""
    with cut(64, 32):
        tokens = sample(logits, *parameters)
    assert not counters(logits.device).any()
    return tokens


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 3.0]).map(fp32),
    top_k=st.sampled_from([0, 0, 1, 2, 50, 300, 10**6]),
    top_p=st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.71, 0.951]).map(fp32),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.31, 1.0]).map(fp32),
)


@settings(max_examples=40, deadline=None)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=3),
    kinds=st.lists(
        st.sampled_from(["flat", "ties", "peaked", "forbidden"]), min_size=3, max_size=3
    ),
    sizes=st.sampled_from([(1, 0), (3, 0), (100, 0), (20011, 0), (300, 64), (2000, 512)]),
    listed=st.sampled_from([16, 64, 8192]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_sampler(
    params: list[SamplingParams],
    kinds: list[str],
    sizes: tuple[int, int],
    listed: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Rows of one chunk and of many, whose thresholds are found in a list or by one program."""
    vocab, chunk = sizes
    torch.manual_seed(seed)
    rows = [row_of(kind, vocab).to(dtype) for kind, _ in zip(kinds, params, strict=False)]
    draws = [Draw(p, seed, i, [0], ()) for i, p in enumerate(params)]
    uniforms = [sampler.uniform(d.seed, d.choice, 0) for d in draws]
    with cut(chunk or 4096, listed):
        tokens = sample(torch.stack(rows), *tensors(params), torch.tensor(uniforms).double())
    expected = sampler.Sampler(frozenset()).draw(torch.stack(rows).float(), draws)
    for i, (row, p, drawn) in enumerate(zip(rows, params, expected, strict=True)):
        if not p.greedy:
            distance = boundaries(row.float(), p) - uniforms[i]
            if distance.abs().min() < 1e-5:
                continue
            # A nucleus that ends within rounding of its share may be a token larger.
            wider = [
                SamplingParams(
                    temperature=p.temperature,
                    top_k=p.top_k,
                    min_p=p.min_p,
                    top_p=min(1.0, p.top_p * (1 + s)),
                )
                for s in (-1e-5, 1e-5)
            ]
            if p.top_p < 1.0 and not torch.equal(*(boundaries(row.float(), w) for w in wider)):
                continue
        assert int(tokens[i]) == drawn.token_id


def test_draws_follow_the_distribution() -> None:
    """Uniforms over the whole of [0, 1) give each token its share."""
    count = 200
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log().repeat(count, 1)
    uniforms = (torch.arange(count) + 0.5).double() / count
    params = tensors([SamplingParams()] * count)
    tokens = sample(logits, *params, uniforms)
    assert tokens.bincount().tolist() == [100, 20, 50, 30]
    assert torch.equal(tokens, tokens.sort().values)
    assert torch.equal(tokens, sample_reference(logits, *params, uniforms))


@pytest.mark.parametrize(
    ("top_k", "top_p", "drawn"),
    [(3, 1.0, {0, 1, 2}), (0, 0.29, {0, 1, 2}), (5, 0.5, {0, 1, 2}), (5, 0.21, {0, 1})],
)
def test_of_equal_logits_the_first_are_kept(top_k: int, top_p: float, drawn: set[int]) -> None:
    uniforms = torch.arange(0, 1, 1 / 16).double()
    params = tensors([SamplingParams(top_k=top_k, top_p=top_p)] * len(uniforms))
    tokens = sample(torch.zeros(len(uniforms), 10), *params, uniforms)
    assert set(tokens.tolist()) == drawn


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_extreme_logits(top_p: float) -> None:
    most = torch.finfo(FP32).max
    logits = torch.full((2, 9000), -torch.inf)
    logits[0, 8500] = -most
    logits[1, :] = most / 2
    params = tensors([SamplingParams(temperature=1e-30, top_p=top_p, top_k=4500)] * 2)
    tokens = sample(logits, *params, torch.tensor([0.9999, 0.0]).double())
    assert tokens.tolist() == [8500, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_what_is_no_number_is_never_drawn(top_p: float) -> None:
    logits = torch.full((4, 300), torch.nan)
    logits[1, 7] = -torch.inf
    logits[2, 200], logits[2, 250] = 1.0, 1.0
    logits[3] = torch.randn(300)
    logits[3, 100] = torch.inf
    params = tensors([SamplingParams(top_k=2, top_p=top_p)] * 4)
    tokens = drawn_in_pieces(logits, *params, torch.tensor([0.5, 0.5, 0.1, 0.9]).double())
    assert tokens.tolist() == [0, 0, 200, 100]


def test_a_nucleus_may_be_all_but_nothing() -> None:
    """Where the sum of all weights may be rounded to less than is wanted."""
    torch.manual_seed(6)
    logits, uniforms = torch.randn(6, 300), torch.rand(6).double()
    temperature, top_k, top_p, min_p = tensors([SamplingParams(temperature=0.7)] * 6)
    inputs = (logits, temperature, top_k, top_p.double() - 1e-9, min_p, uniforms)
    assert torch.equal(drawn_in_pieces(*inputs), sample_reference(*inputs))


def test_rows_do_not_depend_on_each_other() -> None:
    torch.manual_seed(5)
    rules = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=100, top_p=0.5),
        SamplingParams(min_p=0.2),
    ]
    logits = torch.randn(6, 300) * 3
    inputs = (logits, *tensors(rules), torch.rand(6).double())
    together = drawn_in_pieces(*inputs)
    assert torch.equal(together, sample_reference(*inputs))
    for i in range(6):
        assert int(drawn_in_pieces(*(each[i : i + 1] for each in inputs))) == int(together[i])
    assert torch.equal(together, sample(*inputs))


PLAIN, MIN_P = SamplingParams(temperature=0.8), SamplingParams(min_p=0.2)
GREEDY = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.2)


@pytest.mark.parametrize(
    ("params", "any_top_k_or_p", "any_min_p", "passes"),
    [
        (GREEDY, False, False, ["survey"]),
        (PLAIN, False, False, ["survey"]),
        (PLAIN, False, True, ["survey", "draw"]),
        (MIN_P, False, True, ["survey", "draw"]),
        (SamplingParams(top_k=5), True, False, ALL_PASSES),
        (SamplingParams(top_p=0.9), True, False, ALL_PASSES),
        (SamplingParams(top_p=0.9, min_p=0.2), True, True, ALL_PASSES),
    ],
)
def test_passes_that_no_row_needs_are_left_out(
    params: SamplingParams, any_top_k_or_p: bool, any_min_p: bool, passes: list[str]
) -> None:
    torch.manual_seed(10)
    rules = [params, PLAIN, params, GREEDY]
    inputs = (torch.randn(4, 300) * 3, *tensors(rules), torch.rand(4).double())
    with cut(64, 32), launches() as launched:
        tokens = sample(*inputs, any_top_k_or_p=any_top_k_or_p, any_min_p=any_min_p)
    assert launched == passes
    assert not counters(tokens.device).any()
    assert torch.equal(tokens, sample_reference(*inputs))
    assert torch.equal(tokens, drawn_in_pieces(*inputs))


def test_a_list_is_never_overrun() -> None:
    """Whatever earlier passes have counted, what follows a row's list is left alone."""
    vocab, listed = 64, 16
    num_ints, _ = notes_of_row(chunks=1, listed=listed)
    ints = torch.ones(num_ints + vocab, dtype=torch.int32)
    ints[STAGE.value] = NARROWED.value
    none = torch.zeros(1)
    enlist[(1, 1)](
        torch.ones(1, vocab), none, none, none, none, none, ints, none, none, none, vocab,
        VOCAB=vocab, CHUNK=vocab, NUM=1, CHUNKS=2, LISTED=listed, EARLY=False,
    )  # fmt: skip
    assert ints[num_ints - listed : num_ints - 1].tolist() == list(range(listed - 1))
    assert (ints[num_ints:] == 1).all()


def test_logprobs_equal_the_sampler() -> None:
    logits = torch.randn(3, 50)
    drawn = sampler.Sampler(frozenset()).draw(
        logits, [Draw(SamplingParams(temperature=0, logprobs=4), 0, 0, [0], ())] * 3
    )
    tokens = torch.tensor([d.token_id for d in drawn])
    own, top, top_tokens = logprobs(logits, tokens, 4)
    for i, d in enumerate(drawn):
        assert d.logprob is not None
        assert math.isclose(float(own[i]), d.logprob, abs_tol=1e-6)
        assert [entry.token_id for entry in d.top] == top_tokens[i].tolist()
        assert top[i].tolist() == pytest.approx([entry.logprob for entry in d.top], abs=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        sample(torch.zeros(1, MAX_VOCAB + 1), *tensors([SamplingParams()]), torch.zeros(1))
    with pytest.raises(ValueError, match="parameters"):
        sample(torch.zeros(2, 300), *tensors([SamplingParams()]), torch.zeros(1))
