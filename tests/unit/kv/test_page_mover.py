"""Work is cut into slices that lose nothing."""

from hypothesis import given
from hypothesis import strategies as st

from splitserve.kv.copier import Copier
from splitserve.kv.layout import KvLayout
from splitserve.kv.page_mover import PageMover


@given(
    count=st.integers(1, 200),
    item_bytes=st.sampled_from([1, 512, 1 << 18, 1 << 20, 1 << 21]),
    threads=st.integers(1, 8),
)
def test_slices_are_all_items_in_order(count, item_bytes, threads):
    copier = Copier(threads)
    mover = PageMover(None, copier, KvLayout(b"m" * 32, 16, 4096))
    slices = mover.slices(range(count), item_bytes)
    copier.close()
    assert [item for part in slices for item in part] == list(range(count))
    assert all(slices)
    assert len(slices) <= threads
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    if len(slices) > 1:
        assert count * item_bytes > 1 << 20, "one thread does for less than a MiB"
