from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.errors import InvalidRequest
from splitserve.kv.codec import DIGEST_BYTES
from splitserve.kv.layout import PoolPage
from splitserve.kv.receipt import KvReceipt
from splitserve.v1 import common_pb2

BLOCKS = st.dictionaries(
    st.integers(0, 1 << 20),
    st.tuples(
        st.integers(0, (1 << 32) - 1), st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES)
    ),
)


@given(pool_id=st.integers(0, (1 << 64) - 1), share_id=st.integers(0, (1 << 64) - 1), blocks=BLOCKS)
def test_it_survives_the_wire(
    pool_id: int, share_id: int, blocks: dict[int, tuple[int, bytes]]
) -> None:
    receipt = KvReceipt(pool_id, share_id, blocks)
    wire = receipt.to_proto().SerializeToString()
    back = KvReceipt.from_proto(common_pb2.KvReceipt.FromString(wire))
    assert back == receipt
    assert back.place_of(9) == PoolPage(pool_id, 9, share_id)


@pytest.mark.parametrize(
    ("indexes", "pages", "digests"),
    [
        ([0], [1, 2], b"d" * 17),
        ([0, 1], [1, 2], b"d" * 17),
        ([0], [1], b"d" * 16),
        ([], [], b"d"),
        ([1, 1], [2, 3], b"d" * 34),
    ],
)
def test_lists_that_do_not_fit_together(
    indexes: list[int], pages: list[int], digests: bytes
) -> None:
    message = common_pb2.KvReceipt(block_indexes=indexes, pages=pages, digests=digests)
    with pytest.raises(InvalidRequest, match="kv_receipt"):
        KvReceipt.from_proto(message)
