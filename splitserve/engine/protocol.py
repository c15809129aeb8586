"""The narrow waist between scheduling and computing.

An engine owns the weights and one pool of KV pages, and runs one forward pass at a time over
slices of sequences. It knows nothing of requests, leases or gRPC; the scheduler knows nothing of
tensors. `TorchEngine` computes a model; `FakeEngine` does arithmetic that a reader can check by
hand, so that every service can be tested for exact tokens without a model.

What there is of each sequence in each step is a tuple: made in a third of the time of a dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from splitserve.sampling import SamplingParams


@dataclass(frozen=True)
class EngineSpec:
    """What the rest of a worker must know of an engine. Fixed for its life.

    A page holds `block_tokens` tokens of all layers, layer by layer, so that the bytes of layers
    [a, b) are [a * layer_bytes, b * layer_bytes) of the page. `layer_group` is how many layers
    are reported at once by `LayersDone`.
    """

    fingerprint: bytes
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: frozenset[int]
    num_layers: int
    layer_group: int
    block_tokens: int
    block_bytes: int
    num_pages: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one page."""
        return self.block_bytes // self.num_layers


class Logprob(NamedTuple):
    """A token and the natural logarithm of its probability under the raw distribution."""

    token_id: int
    logprob: float


class DrawnToken(NamedTuple):
    """One drawn token. `logprob` and `top` are set if log-probabilities were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()


class Draw(NamedTuple):
    """One token to draw from a row of logits.

    The draw depends on nothing but the logits, the parameters, the seed, the choice and the
    tokens before it, so that it is the same on any worker and after any interruption. `output` has
    all of these but `num_pending`, which only the device knows yet.
    """

    params: SamplingParams
    seed: int
    choice: int
    prompt: Sequence[int]
    output: Sequence[int]
    num_pending: int = 0

    @property
    def output_index(self) -> int:
        """How many tokens of output are before this one."""
        return len(self.output) + self.num_pending


DRAWN = -1
"""In `Slice.token_ids`: the token that the slot drew in the step before."""


class Slice(NamedTuple):
    """The part of one sequence that is computed in one step.

    Computes the KV of `token_ids` at positions [start, start + len(token_ids)), attending to
    everything before. `pages` covers positions [0, start + len(token_ids)). `draws` are taken
    from the last position's logits; a chunk that is not its prompt's last has none.

    `slot` is the sequence's place in the batch, -1 where steps do not follow each other. Until it
    leaves the batch, `pages` is one object that only grows. `came_from` is the place where it drew
    its last token, if that was another; else -1.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    draws: Sequence[Draw]
    slot: int = -1
    came_from: int = -1


LayersDone = Callable[[int, int], None]
"""Called as `layers_done(first, end)` once the whole step's layers [first, end) are in the pool.
From any thread; must not wait.
"""


class Launched(Protocol):
    """A step that is being computed."""

    def done(self) -> bool:
        """Whether `tokens` need not wait. Never raises: what failed is done."""
        ...

    def tokens(self) -> list[list[DrawnToken]]:
        """Wait for the drawn tokens of each slice, in its draws' order. Raises what failed."""
        ...


class Engine(Protocol):
    """One model on one device. All methods but `export_page` and `insert_page` are called from
    one thread; these two may run beside a step as long as they touch no page that it writes.
    """

    spec: EngineSpec

    def step(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> list[list[DrawnToken]]:
        """Run one forward pass; return the drawn tokens of each slice, in its draws' order."""
        ...

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        """Copy layers [first_layer, end_layer) of a page into `out`, which has their size."""
        ...

    def insert_page(self, page: int, content: memoryview) -> None:
        """Overwrite a whole page with `content` of `block_bytes` bytes."""
        ...

    def close(self) -> None:
        """Give back what else than memory it holds. No method may be called after."""
        ...


@runtime_checkable
class AsyncEngine(Engine, Protocol):
    """An engine whose steps follow each other on a device while the host prepares the next."""

    def launch(self, slices: Sequence[Slice], layers_done: LayersDone | None = None) -> Launched:
        """Begin a step after those launched before. Slices may have `DRAWN` tokens.

        A page that a launched step has part in must be neither exported nor inserted, nor given to
        another sequence, before that step's tokens have been read.
        """
        ...
