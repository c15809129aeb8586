import gc

from splitserve.gc_heap import freeze_gc_heap


def test_collections_pass_over_what_is_there() -> None:
    lasting = [[] for _ in range(1000)]
    freeze_gc_heap()
    try:
        assert gc.get_freeze_count() >= len(lasting)
        passed_over = {id(each) for each in gc.get_objects()}
        assert not passed_over & {id(each) for each in lasting}
    finally:
        gc.unfreeze()
