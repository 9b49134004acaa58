"""Rows side by side give bit for bit what they give alone, whoever joins, leaves, rewinds or
fails."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from stage_worker import calibration, kv_cache, tiny_models
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import (
    CACHE_STEP,
    PADDING_FACTOR,
    PADDING_FREE,
    ROOM_MIN,
    CacheStore,
    bytes_per_position,
    can_batch,
    side_by_side,
)
from stage_worker.stage import Stage
from stagemesh.frame import FrameKind, RowStatus, StepRow
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import Span

LENGTHS = {"a": 9, "b": 3, "c": 17, "d": 1, "e": 6}


def prompt_of(name: str) -> tuple[int, ...]:
    return tuple((ord(name) * 31 + 7 * i) % 199 for i in range(LENGTHS[name]))


@pytest.fixture(scope="module")
def alone(pipeline: Any) -> dict[str, tuple[list[int], list[bytes]]]:
    """Per request: 30 tokens generated with no neighbour, and the hop-1 activations behind them."""
    found = {}
    for name, length in LENGTHS.items():
        mesh = pipeline(0, 3, 6)
        tokens = [mesh.prefill(name, prompt_of(name)).token.token_id]
        lines = []
        for index in range(29):
            answer = mesh.decode({name: (length + index, tokens[-1])})
            tokens.append(answer.rows[0].token.token_id)
            lines.append(bytes(mesh.hops[1].tensor.payload))
        found[name] = (tokens, lines)
    return found


class Crowd:
    """Drives several requests through one route and compares every step with each one alone."""

    def __init__(self, mesh: Any, alone: Any) -> None:
        self.mesh = mesh
        self.alone = alone
        self.progress: dict[str, int] = {}

    def join(self, name: str) -> None:
        token = self.mesh.prefill(name, prompt_of(name)).token.token_id
        assert token == self.alone[name][0][0]
        self.progress[name] = 0

    def leave(self, name: str, rig: Any) -> None:
        del self.progress[name]
        self.mesh.send(FrameKind.CLOSE, [StepRow(rig.key(name), 0, ())])

    def rewind(self, name: str, back: int, rig: Any) -> None:
        self.progress[name] -= back
        target = LENGTHS[name] + self.progress[name]
        row = self.mesh.send(FrameKind.REWIND, [StepRow(rig.key(name), target, ())]).rows[0]
        assert row.status is RowStatus.OK

    def step(self, names: list[str]) -> None:
        wanted = {
            name: (LENGTHS[name] + self.progress[name], self.alone[name][0][self.progress[name]])
            for name in names
        }
        rows = self.mesh.decode(wanted).rows
        lines = np.frombuffer(self.mesh.hops[1].tensor.payload, np.uint8).reshape(len(names), -1)
        for name, row, line in zip(names, rows, lines, strict=True):
            tokens, activations = self.alone[name]
            assert line.tobytes() == activations[self.progress[name]], (name, self.progress[name])
            self.progress[name] += 1
            assert row.token.token_id == tokens[self.progress[name]]


def test_five_requests_that_join_and_leave_between_steps_match_themselves_alone(
    pipeline: Any, alone: Any, rig: Any
) -> None:
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for name in "ab":
        crowd.join(name)
    for _ in range(4):
        crowd.step(["a", "b"])
    crowd.join("c")  # longer than the batch is wide
    for _ in range(3):
        crowd.step(["a", "b", "c"])
    crowd.leave("b", rig)
    crowd.join("d")  # takes b's slot
    for _ in range(3):
        crowd.step(["d", "c", "a"])
    crowd.join("e")
    for _ in range(5):
        crowd.step(["a", "c", "d", "e"])
    crowd.leave("c", rig)
    crowd.leave("a", rig)
    for _ in range(4):
        crowd.step(["e", "d"])
    crowd.leave("d", rig)
    for _ in range(4):
        crowd.step(["e"])
    assert crowd.mesh.stages[0].stage_counters["rows_batched"] > 0


def test_microbatches_that_alternate_keep_their_own_batches(
    pipeline: Any, alone: Any, rig: Any
) -> None:
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for name in LENGTHS:
        crowd.join(name)
    for _ in range(3):
        crowd.step(["a", "b"])
        crowd.step(["c", "d", "e"])
    copied = [stage._held.caches.rows_copied for stage in crowd.mesh.stages]
    for _ in range(5):
        crowd.step(["a", "b"])
        crowd.step(["c", "d", "e"])
    assert [stage._held.caches.rows_copied for stage in crowd.mesh.stages] == copied
    assert len(crowd.mesh.stages[0]._held.caches._batches) == 2
    crowd.step(["b", "c", "e"])  # regrouped
    crowd.step(["a", "d"])


def test_a_rewind_of_one_row_never_disturbs_its_neighbours(
    pipeline: Any, alone: Any, rig: Any
) -> None:
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for name in "abc":
        crowd.join(name)
    for _ in range(6):
        crowd.step(["a", "b", "c"])
    crowd.rewind("b", 4, rig)
    for _ in range(6):
        crowd.step(["a", "b", "c"])


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_of_joins_leaves_rewinds_and_groupings_matches_alone(
    seed: int, pipeline: Any, alone: Any, rig: Any
) -> None:
    chance = random.Random(seed)
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for _ in range(25):
        absent = [name for name in LENGTHS if name not in crowd.progress]
        present = list(crowd.progress)
        action = chance.choice(["join", "step", "step", "step", "leave", "rewind"])
        if action == "join" and absent:
            crowd.join(chance.choice(absent))
        elif action == "leave" and len(present) > 2:
            crowd.leave(chance.choice(present), rig)
        elif action == "rewind" and present:
            name = chance.choice(present)
            crowd.rewind(name, chance.randint(0, min(3, crowd.progress[name])), rig)
        else:
            ready = [name for name in present if crowd.progress[name] < 28]
            if ready:
                crowd.step(chance.sample(ready, chance.randint(1, len(ready))))


def test_rows_that_failed_upstream_sit_out_a_batched_step_unharmed(
    pipeline: Any, alone: Any, rig: Any
) -> None:
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for name in "abc":
        crowd.join(name)
    crowd.step(["a", "b", "c"])
    position = LENGTHS["b"] + 1
    rows = []
    for name in "abc":
        token = alone[name][0][1]
        row = StepRow(rig.key(name), LENGTHS[name] + 1, (token,), samples=True)
        rows.append(row.failed(RowStatus.INVALID, stage=0) if name == "b" else row)
    answer = crowd.mesh.send(FrameKind.DECODE, rows).rows
    assert [row.token.token_id for row in (answer[0], answer[2])] == [
        alone[name][0][2] for name in "ac"
    ]
    crowd.progress.update(a=2, c=2)
    again = crowd.mesh.decode({"b": (position, alone["b"][0][1])}).rows[0]
    assert again.token.token_id == alone["b"][0][2]
    crowd.progress["b"] = 2
    crowd.step(["a", "b", "c"])


def test_sampled_rows_draw_in_a_batch_what_they_draw_alone(pipeline: Any) -> None:
    specs = {
        "a": SamplingSpec(temperature=0.8, seed=1),
        "b": SamplingSpec(),
        "c": SamplingSpec(temperature=1.3, top_p=0.9, presence_penalty=0.4, seed=1),
    }
    expected = {
        name: pipeline(0, 6).generate(name, prompt_of(name), 12, spec)
        for name, spec in specs.items()
    }
    mesh = pipeline(0, 6)
    found = {n: [mesh.prefill(n, prompt_of(n), s).token.token_id] for n, s in specs.items()}
    for index in range(11):
        rows = mesh.decode({n: (LENGTHS[n] + index, found[n][-1]) for n in specs}).rows
        for name, row in zip(specs, rows, strict=True):
            found[name].append(row.token.token_id)
    assert found == expected


def test_a_batch_grows_past_the_cache_objects_block_size(pipeline: Any, rig: Any) -> None:
    """mlx-lm grows its arrays 256 positions at a time; crossing that must not lose anything."""
    prompts = {"a": tuple(i % 199 for i in range(250)), "b": (1, 2, 3)}
    expected = {n: pipeline(0, 6).generate(n, p, 12) for n, p in prompts.items()}
    mesh = pipeline(0, 6)
    found = {n: [mesh.prefill(n, p).token.token_id] for n, p in prompts.items()}
    for index in range(11):
        rows = mesh.decode({n: (len(p) + index, found[n][-1]) for n, p in prompts.items()}).rows
        for name, row in zip(prompts, rows, strict=True):
            found[name].append(row.token.token_id)
    assert found == expected


def test_a_row_that_turns_non_finite_in_a_batch_is_undone_alone(
    pipeline: Any, alone: Any, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(pipeline(0, 3, 6), alone)
    for name in "abc":
        crowd.join(name)
    crowd.step(["a", "b", "c"])
    stage = crowd.mesh.stages[0]
    compute = stage.model.forward

    def spoilt(tokens: mx.array, hidden: Any, cache: list[Any]) -> mx.array:
        output = compute(tokens, hidden, cache)
        factors = mx.array([1.0, float("nan"), 1.0])[:, None, None]
        for layer in cache:
            layer.keys = layer.keys * factors[..., None]
        return output * factors

    wanted = {n: (LENGTHS[n] + 1, alone[n][0][1]) for n in "abc"}
    with monkeypatch.context() as patched:
        patched.setattr(stage.model, "forward", spoilt)
        rows = crowd.mesh.decode(wanted).rows
    assert [row.status for row in rows] == [RowStatus.OK, RowStatus.NON_FINITE, RowStatus.OK]
    crowd.progress.update(a=2, c=2)
    crowd.leave("b", rig)
    crowd.step(["a", "c"])
    crowd.join("d")
    for _ in range(4):
        crowd.step(["a", "c", "d"])


@pytest.mark.parametrize(
    ("model_type", "batches"),
    [("qwen3_next", True), ("falcon_h1", True), ("mamba2", True), ("gemma3_text", False)],
)
def test_recurrent_and_hybrid_models_batch_and_sliding_windows_run_row_by_row(
    model_type: str, batches: bool, rig: Any
) -> None:
    config = tiny_models.tiny_config(model_type, layers=4)
    model = tiny_models.build(config)

    def route() -> Any:
        return rig.Pipeline(
            [
                Stage(
                    SpanModel.from_model(model, config, Span(*ends)),
                    name="w",
                    kv_budget_tokens=999,
                    clock_ns=lambda: 1,
                )
                for ends in ((0, 2), (2, 4))
            ]
        )

    mesh = route()
    assert all(("batch" in stage.capabilities) == batches for stage in mesh.stages)
    expected = {name: mesh.generate(name, prompt_of(name), 8) for name in "bde"}
    for name in "bde":
        mesh.send(FrameKind.CLOSE, [StepRow(rig.key(name), 0, ())])
    found = {n: [mesh.prefill(n, prompt_of(n)).token.token_id] for n in "bde"}
    for index in range(7):
        rows = mesh.decode({n: (LENGTHS[n] + index, found[n][-1]) for n in "bde"}).rows
        for name, row in zip("bde", rows, strict=True):
            found[name].append(row.token.token_id)
    assert found == expected
    assert (mesh.stages[0].stage_counters["rows_batched"] > 0) == batches


# -- the store itself -----------------------------------------------------------------------------


def prefill(store: CacheStore, request: bytes, length: int) -> None:
    """A request with so many positions in caches of its own."""
    store.open(request)
    store._model.forward(mx.zeros((1, length), mx.int32), None, store.single(request, 0))


def laid_side_by_side(model: SpanModel, count: int) -> tuple[CacheStore, dict[bytes, int]]:
    """A store with one batch of requests A, B, … that have 3, 4, … positions."""
    store = CacheStore(model)
    lengths = {bytes([65 + i]): 3 + i for i in range(count)}
    for request, length in lengths.items():
        prefill(store, request, length)
    store.batch(lengths)
    return store, lengths


def test_a_leaver_only_frees_its_slot_and_a_joiner_takes_it(spans_of_llama: Any) -> None:
    model = spans_of_llama((0, 6))[0]
    store, lengths = laid_side_by_side(model, 5)
    store.drop(b"B")
    del lengths[b"B"]
    copied = store.rows_copied
    assert store.batch(lengths).slot_count == 5
    assert store.rows_copied == copied
    prefill(store, b"Z", 2)
    lengths[b"Z"] = 2
    view = store.batch(lengths)
    assert view.slot_count == 5
    assert view.slot_of_row[-1] == 1
    assert store.rows_copied == copied + 1
    for request in (b"A", b"C"):
        store.drop(request)
        del lengths[request]
    assert store.batch(lengths).slot_count == 3


def test_a_joiner_longer_than_a_full_batch_copies_it_once_and_leaves_room(
    spans_of_llama: Any,
) -> None:
    model = spans_of_llama((0, 6))[0]
    store, lengths = laid_side_by_side(model, 4)
    length = 2 * CACHE_STEP - ROOM_MIN // 2
    prefill(store, b"Z", length)
    copied = store.rows_copied
    view = store.batch({**lengths, b"Z": length})
    assert store.rows_copied == copied + 4 + 1
    (batch,) = store._batches
    shapes = [leaf.keys.shape for leaf in batch.owned]
    for _ in range(ROOM_MIN):
        mx.eval(model.forward(mx.zeros((5, 1), mx.int32), None, view.cache))
    assert [leaf.keys.shape for leaf in batch.owned] == shapes


def test_a_batch_that_was_copied_without_its_free_slots_still_has_its_room(
    spans_of_llama: Any,
) -> None:
    model = spans_of_llama((0, 6))[0]
    store, _ = laid_side_by_side(model, 4)
    (batch,) = store._batches
    room = [leaf.keys.shape[2] for leaf in batch.owned]
    store.drop(b"A")
    store.drop(b"C")
    view = store.batch({b"B": 4, b"D": 6})
    assert view.slot_count == 2
    assert [leaf.keys.shape[2] for leaf in batch.owned] == room
    mx.eval(model.forward(mx.zeros((2, 1), mx.int32), None, view.cache))
    assert [leaf.keys.shape[2] for leaf in batch.owned] == room


def test_an_emptied_batch_is_gone_and_unknown_requests_have_no_cache(spans_of_llama: Any) -> None:
    store = CacheStore(spans_of_llama((0, 6))[0])
    for request in (b"A", b"B"):
        prefill(store, request, 2)
    store.batch({b"A": 2, b"B": 2})
    for request in (b"A", b"B"):
        assert request in store
        store.drop(request)
        assert request not in store
    assert store._batches == []
    with pytest.raises(KeyError):
        store.single(b"A", 0)


def test_recurrent_state_moves_in_and_out_of_a_batch_unchanged() -> None:
    def owned(value: float) -> list[Any]:
        plain, state = KVCache(), ArraysCache(2)
        plain.update_and_fetch(mx.full((1, 1, 2, 4), value), mx.full((1, 1, 2, 4), value))
        state[0] = mx.full((1, 3), value)
        return [CacheList(state, plain)]

    model: Any = type("Model", (), {"wrap_cache": staticmethod(list), "trimmable": False})()
    store = CacheStore(model)
    store._singles = {b"A": owned(1.0), b"B": owned(2.0)}
    store.batch({b"A": 2, b"B": 2})
    running = store._batches[0].owned[0].caches[0]
    running[0] = running[0] * 10  # a step that is then undone
    store.restore({b"A": 2, b"B": 2})
    for request, value in ((b"A", 1.0), (b"B", 2.0)):
        state, plain = store.single(request, 2)[0].caches
        assert state[0].tolist() == [[value] * 3]
        assert state[1] is None
        assert plain.offset == 2
        assert plain.keys.tolist() == mx.full((1, 1, 2, 4), value).tolist()
    store.batch({b"A": 2, b"B": 2})
    store.drop(b"A")
    store._singles[b"C"] = owned(3.0)
    store.batch({b"B": 2, b"C": 2})
    state, _ = store.single(b"C", 2)[0].caches
    assert state[0].tolist() == [[3.0] * 3]


def test_rotating_caches_are_not_laid_side_by_side() -> None:
    assert can_batch([KVCache(), CacheList(KVCache(), ArraysCache(1))])
    assert not can_batch([KVCache(), RotatingKVCache(8)])
    with pytest.raises(kv_cache.BatchUnsupported):
        kv_cache._empty_batch(RotatingKVCache(8))


def test_a_model_whose_batched_rows_disagree_or_raise_is_served_row_by_row(
    spans_of_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = spans_of_llama((0, 6))[0]
    assert calibration.batching_agrees(model)
    compute = model.forward

    def skewed(tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        return compute(tokens, *args, **options) * (1.0 + 0.1 * (tokens.shape[0] > 1))

    def raising(tokens: mx.array, *args: Any, **options: Any) -> mx.array:
        if tokens.shape[0] > 1:
            raise ValueError("one row at a time")
        return compute(tokens, *args, **options)

    for forward in (skewed, raising):
        with monkeypatch.context() as patched:
            patched.setattr(model, "forward", forward)
            assert not calibration.batching_agrees(model)
    with monkeypatch.context() as patched:
        patched.setattr(model, "batchable", False)
        assert not calibration.batching_agrees(model)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((5,), [1]),
        ((5, 90, 256, 1), [4]),  # below the step by which caches grow, padding is free
        ((1000, 1000, 900, 800), [4]),
        ((8000, 100, 100, 100, 100), [1, 4]),
        ((8000, 7000, 90, 80, 3000), [3, 2]),
        ((2000, 500), [2]),  # 4000 positions for 2500
    ],
)
def test_requests_are_grouped_so_that_padding_stays_small(
    lengths: tuple[int, ...], sizes: list[int]
) -> None:
    named = {bytes([index]): length for index, length in enumerate(lengths)}
    assert side_by_side(named, room=10**6) == [set(named)]
    groups = side_by_side(named, room=1000)
    assert [len(group) for group in groups] == sizes
    assert set().union(*groups) == set(named)
    for group in groups:
        held = [named[one] for one in group]
        free = PADDING_FREE * len(held)
        assert len(held) * max(held) <= PADDING_FACTOR * sum(held) + free


def test_a_long_request_is_computed_beside_a_batch_of_short_ones(pipeline: Any, rig: Any) -> None:
    prompts = {"long": [(3 * i) % 199 for i in range(1200)], "x": [5, 6], "y": [7], "z": [8, 9]}
    alone = {name: pipeline(0, 3, 6).generate(name, p, 6) for name, p in prompts.items()}
    mesh = pipeline(0, 3, 6, budget=1600)
    found = {name: [mesh.prefill(name, p).token.token_id] for name, p in prompts.items()}
    for step in range(5):
        wanted = {n: (len(prompts[n]) + step, tokens[-1]) for n, tokens in found.items()}
        for name, row in zip(wanted, mesh.decode(wanted).rows, strict=True):
            found[name].append(row.token.token_id)
    assert found == alone
    caches = mesh.stages[0]._held.caches
    assert [sorted(batch.live) for batch in caches._batches] == [sorted(map(rig.key, "xyz"))]
    assert caches._batches[0].width < 20


def test_a_batch_gives_back_its_width_when_the_request_that_needed_it_leaves(
    tiny_llama: Any, spans_of_llama: Any
) -> None:
    (model,) = spans_of_llama((0, 6))
    store = CacheStore(model)
    lengths = {b"long": 900, b"b": 500, b"c": 400}
    for request, length in lengths.items():
        store.open(request)
        cache = store.single(request, 0)
        model.forward(mx.ones((1, length), mx.int32), None, cache)
    view = store.batch(lengths)
    model.forward(mx.ones((3, 1), mx.int32), None, view.cache)
    store.advanced()
    (batch,) = store._batches
    assert batch.width == 901
    store.drop(b"long")
    store.drop(b"b")
    store.open(b"d")
    model.forward(mx.ones((1, 3), mx.int32), None, store.single(b"d", 0))
    view = store.batch({b"c": 401, b"d": 3})
    assert (batch.width, view.slot_count) == (401, 2)


def test_a_position_takes_the_keys_and_values_of_the_spans_own_layers(spans_of_llama: Any) -> None:
    first, second = spans_of_llama((0, 2, 6))
    per_layer = 2 * 2 * 16 * 4  # keys and values of two heads of 16 floats
    assert [bytes_per_position(first), bytes_per_position(second)] == [2 * per_layer, 4 * per_layer]
