"""The block pool: every block is free, held or idle; content is found by its whole past and owner."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiosd.cores.engine.kv import BlockPool, chain, root


def test_keys_depend_on_all_tokens_before_on_the_owner_and_on_the_tag() -> None:
    a, b = root("ada"), root("bob")
    keys = {
        chain(a, [1, 2]),
        chain(b, [1, 2]),
        chain(a, [2, 1]),
        chain(a, [1, 2], 5),
        chain(chain(a, [1]), [2]),
    }
    assert len(keys) == 5
    assert chain(a, [1, 2]) == chain(root("ada"), [1, 2])


def test_the_least_recently_used_prefix_is_evicted_last_block_first() -> None:
    pool = BlockPool(4)
    old, new = [[b for b in (pool.allocate(), pool.allocate()) if b is not None] for _ in range(2)]
    for i, block in enumerate(old + new):
        pool.publish(block, bytes([i]))
    pool.release(old)
    pool.release(new)
    assert pool.available == 4
    assert [pool.allocate() for _ in range(3)] == [old[1], old[0], new[1]]
    assert pool.find([bytes([0])]) == []
    assert pool.find([bytes([2]), bytes([3])]) == [new[0]]
    assert pool.allocate() is None


class Pool(RuleBasedStateMachine):
    """Against a model that remembers who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[list[int]] = []
        self.keys: dict[bytes, int] = {}  # last known place of a content

    @rule()
    def take_one(self) -> None:
        block = self.pool.allocate()
        users = {b for held in self.held for b in held}
        if block is None:
            assert len(users) == 6
        else:
            assert block not in users
            self.keys = {k: b for k, b in self.keys.items() if b != block}
            self.held.append([block])

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, key: bytes) -> None:
        if self.held:
            block = self.held[-1][0]
            known = self.pool.find([key])
            self.pool.release(known)
            self.pool.publish(block, key)
            found = self.pool.find([key])
            self.pool.release(found)
            if known:
                assert found == known
            elif found:
                assert found == [block]
                self.keys[key] = block

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=3, unique=True))
    def find(self, keys: list[bytes]) -> None:
        found = self.pool.find(keys)
        assert found == [self.keys[k] for k in keys[: len(found)]]
        assert len(found) == len(keys) or keys[len(found)] not in self.keys
        if found:
            self.held.append(found)

    @rule(index=st.integers(0, 5))
    def release(self, index: int) -> None:
        if index < len(self.held):
            self.pool.release(self.held.pop(index))

    @rule()
    def drop_idle(self) -> None:
        self.pool.drop_idle()
        users = {b for held in self.held for b in held}
        self.keys = {k: b for k, b in self.keys.items() if b in users}

    @invariant()
    def counts_agree(self) -> None:
        users = {b for held in self.held for b in held}
        assert self.pool.held == len(users)
        assert self.pool.available == 6 - len(users)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
