"""The embedded directory against a dict of sets."""

from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvstore.directory import MemoryDirectory

KEYS = [bytes([at]) * 32 for at in range(6)]


async def test_counts_the_prefix_without_a_gap():
    directory = MemoryDirectory(max_entries=100)
    one, two = directory.open("one"), directory.open("two")
    directory.update(one, KEYS[:3], [])
    directory.update(two, [KEYS[0], KEYS[2]], [])
    assert await directory.lookup(KEYS) == {"one": 3, "two": 1}
    assert await directory.lookup(KEYS[1:]) == {"one": 2}
    assert await directory.lookup(KEYS[4:]) == {}
    assert await directory.lookup([]) == {}


async def test_a_late_end_does_not_wipe_out_the_successor():
    directory = MemoryDirectory(max_entries=100)
    broken = directory.open("worker")
    directory.update(broken, KEYS, [])
    fresh = directory.open("worker")
    assert directory.num_entries == 0
    directory.update(fresh, KEYS[:1], [])
    directory.update(broken, KEYS, [])
    directory.close(broken)
    assert await directory.lookup(KEYS) == {"worker": 1}
    directory.close(fresh)
    assert await directory.lookup(KEYS) == {}


async def test_what_it_has_no_room_for_is_left_out(caplog):
    directory = MemoryDirectory(max_entries=2)
    token = directory.open("worker")
    directory.update(token, KEYS[:4], [])
    directory.update(token, KEYS[4:], [])
    assert (directory.num_entries, directory.num_left_out) == (2, 4)
    assert await directory.lookup(KEYS) == {"worker": 2}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    directory.update(token, [], KEYS[3:])  # of what it never took
    directory.update(token, KEYS[2:3], KEYS[1:2])
    assert await directory.lookup([KEYS[0], KEYS[2]]) == {"worker": 2}
    directory.close(token)
    assert directory.num_entries == 0


CHANGES = st.tuples(
    st.sampled_from("abc"),
    st.sampled_from(["update", "open", "close"]),
    st.sets(st.sampled_from(KEYS)),
    st.sets(st.sampled_from(KEYS)),
)


@settings(max_examples=60)
@given(st.lists(CHANGES, max_size=30))
async def test_agrees_with_a_dict_of_sets(changes):
    directory, tokens, model = MemoryDirectory(max_entries=100), {}, {}
    for holder, what, added, removed in changes:
        if what == "open" or holder not in tokens:
            tokens[holder], model[holder] = directory.open(holder), set()
        elif what == "close":
            directory.close(tokens.pop(holder))
            del model[holder]
        else:
            directory.update(tokens[holder], added, removed)
            model[holder] = (model[holder] - removed) | added
        assert directory.num_entries == sum(map(len, model.values()))
    expected = {
        holder: next((at for at, key in enumerate(KEYS) if key not in have), len(KEYS))
        for holder, have in model.items()
    }
    assert await directory.lookup(KEYS) == {h: length for h, length in expected.items() if length}
