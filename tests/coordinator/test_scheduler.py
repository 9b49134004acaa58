"""Steps of one route: batching, chunks, order."""

from coordinator.echo import EchoStage
from coordinator.events import GenerationRequested
from coordinator.memory_worker import worker_info
from coordinator.scheduler import RouteScheduler
from coordinator.session import Session
from coordinator.settings import MeshPolicy
from coordinator.step_size import STEPS_FIRST, TRIAL_STEPS
from coordinator.token_validator import TokenValidator
from stagemesh.frame import ROWS_MAX, FrameKind
from stagemesh.sampling import SamplingSpec
from stagemesh.smoothed import Smoothed
from stagemesh.topology import Epoch, Route

POLICY = MeshPolicy(
    vocab_size=997, rows_per_step_max=4, prefill_chunk_tokens=4, prefill_chunk_tokens_shared=2
)
LARGE_CHUNKS = MeshPolicy(vocab_size=997, prefill_chunk_tokens=128, prefill_chunk_tokens_shared=64)


class Bench:
    """A scheduler whose frames are answered by honest stages, when the test says so."""

    step_s = 0.01

    def __init__(self, *, stages=2, batch=True, policy=POLICY, kv_budget_tokens=0):
        spans = [f"{index * 2}-{index * 2 + 2}" for index in range(stages)]
        workers = tuple(
            worker_info(
                f"stage-{index}",
                span,
                layer_count=2 * stages,
                batch=batch,
                kv_budget_tokens=kv_budget_tokens,
            )
            for index, span in enumerate(spans)
        )
        self.scheduler = RouteScheduler(Route(Epoch(1), workers), policy)
        self.stages = [EchoStage(w, 1, index, stages) for index, w in enumerate(workers)]
        self.sent = []
        self.now = 0.0

    def admit(self, number, prompt_length, max_tokens=10):
        demand = GenerationRequested(
            number.to_bytes(16, "big"), tuple(range(prompt_length)), SamplingSpec(), max_tokens
        )
        one = Session.begin(demand, TokenValidator(997), context_tokens_max=1000, now=0.0)
        self.scheduler.admit(one, self.now)
        return one

    def form(self):
        frames = list(self.scheduler.form(self.now))
        self.sent += frames
        return frames

    def answer(self):
        """The oldest step comes back, and every accepted token makes its request ready again."""
        self.now += self.step_s
        frame = self.sent.pop(0)
        for stage in self.stages:
            frame = stage.step(frame)
        sent = self.scheduler.steps.settle(frame.step, self.now)
        for asked, row in zip(sent.rows, frame.rows, strict=True):
            one = asked.session
            if one is None:
                continue
            if row.samples:
                one.stream.accept(row, epoch=1, step=frame.step)
                self.scheduler.ready(one)
            else:
                one.stream.confirm(row, epoch=1, step=frame.step)
        assert self.scheduler.check() == []
        return frame

    def go_on(self, steps=1):
        """So often: whatever may be sent is sent, and the oldest of it comes back."""
        for _ in range(steps):
            self.form()
            self.answer()

    def decode(self, count):
        """So many short requests join, and decode, in every step that is under way."""
        ones = [self.admit(number, 2, max_tokens=900) for number in range(count)]
        while not all(one.accepted_count for one in ones):
            self.go_on()
        self.form()
        assert {frame.kind for frame in self.sent} == {FrameKind.DECODE}

    def measured(self, *, decode_s, prefill_token_s, larger_s=None):
        """What steps have taken so far; ``larger_s``: decode steps with twice as many rows."""
        times = self.scheduler.times
        times.decode = Smoothed(decode_s, 0.0, 1)
        times.by_rows = {bits: Smoothed(larger_s or decode_s, 0.0, 1) for bits in range(12)}
        rows = max(len(frame.rows) for frame in self.sent)
        times.by_rows[rows.bit_length()] = Smoothed(decode_s, 0.0, 1)
        times.prefill_token = Smoothed(prefill_token_s, 0.0, 1)


def test_a_prompt_is_sent_in_chunks_one_behind_the_other_without_waiting():
    bench = Bench(stages=3)
    bench.admit(1, 10)
    assert [frame.token_count for frame in bench.form()] == [4, 4, 2]


def test_no_more_steps_are_in_flight_than_the_route_has_stages():
    bench = Bench(stages=2)
    bench.admit(1, 40)
    assert len(bench.form()) == 2
    assert bench.form() == []
    bench.answer()
    assert len(bench.form()) == 1


def test_a_request_is_in_at_most_one_decode_step():
    bench = Bench(stages=3)
    bench.admit(1, 3)
    bench.go_on()
    assert [frame.kind for frame in bench.form()] == [FrameKind.DECODE]
    assert bench.form() == []


def test_decoding_requests_are_spread_over_the_steps_in_flight():
    bench = Bench(stages=2)
    for number in range(4):
        bench.admit(number, 2)
    sizes = []
    for _ in range(30):
        sizes += [len(f.rows) for f in bench.form() if f.kind is FrameKind.DECODE]
        bench.answer()
    assert set(sizes[-6:]) == {2}


def test_more_requests_than_the_steps_in_flight_may_hold_are_spread_evenly_over_more():
    bench = Bench(policy=LARGE_CHUNKS)
    bench.step_s = 0.1  # too slow for other sizes to be tried
    bench.decode(150)
    bench.go_on(9)
    bench.form()
    assert [len(frame.rows) for frame in bench.sent] == [50, 50]
    seats = set()
    for _ in range(9):
        bench.form()
        seats.add(frozenset(row.request for row in bench.answer().rows))
    assert len(seats) == 3  # nobody changes places


def test_where_smaller_steps_cost_no_more_per_token_steps_become_smaller():
    bench = Bench(policy=LARGE_CHUNKS)
    bench.decode(128)
    for _ in range(6 * (STEPS_FIRST + 2 * TRIAL_STEPS)):
        bench.form()
        bench.step_s = 0.0004 * len(bench.sent[0].rows)
        bench.answer()
    bench.form()
    assert {len(frame.rows) for frame in bench.sent} == {8}


def test_workers_that_cannot_batch_get_one_row_per_step():
    bench = Bench(stages=2, batch=False)
    for number in range(4):
        bench.admit(number, 2)
    for _ in range(20):
        assert all(len(frame.rows) == 1 for frame in bench.form())
        bench.answer()


def test_the_last_token_of_a_prompt_is_never_left_alone():
    bench = Bench(policy=LARGE_CHUNKS)
    bench.admit(1, 2 * 128 + 1)
    frames = [*bench.form(), bench.answer(), *bench.form()]
    assert [(one.kind, one.token_count) for one in frames if one is not frames[2]] == [
        (FrameKind.PREFILL, 128),
        (FrameKind.PREFILL, 127),
        (FrameKind.PREFILL, 2),
    ]


def test_decoding_goes_on_while_a_long_prompt_is_prefilled_in_smaller_chunks():
    bench = Bench(stages=2)
    first = bench.admit(1, 2)
    bench.go_on()
    bench.form()
    bench.admit(2, 40)
    kinds = []
    for _ in range(30):
        kinds += [(frame.kind, frame.token_count) for frame in bench.form()]
        bench.answer()
    chunks = [tokens for kind, tokens in kinds if kind is FrameKind.PREFILL]
    assert max(chunks) == 2
    assert first.accepted_count >= 10
    longest = max(
        len(run)
        for run in "".join("p" if k is FrameKind.PREFILL else "d" for k, _ in kinds).split("d")
    )
    assert longest <= 2


def test_removing_a_request_frees_its_caches_with_the_next_step():
    bench = Bench()
    one = bench.admit(1, 2)
    bench.go_on()
    bench.scheduler.remove(one)
    (frame,) = bench.form()
    assert frame.kind is FrameKind.CLOSE
    assert frame.rows[0].request == one.request
    bench.answer()
    assert all(stage.kv_tokens == 0 for stage in bench.stages)
    assert bench.scheduler.reserved_tokens == 0


def test_what_ends_together_is_freed_in_frames_that_a_receiver_takes():
    bench = Bench()
    many = [bench.admit(number, 2) for number in range(ROWS_MAX + 44)]
    while not all(one.opened for one in many):
        bench.go_on()
    while bench.sent:
        bench.answer()
    for one in many:
        bench.scheduler.remove(one)
    closes = [frame for frame in bench.form() if frame.kind is FrameKind.CLOSE]
    assert [len(frame.rows) for frame in closes] == [ROWS_MAX, 44]
    while bench.sent:
        bench.answer()
    assert all(stage.kv_tokens == 0 for stage in bench.stages)


def test_a_request_that_was_never_sent_needs_no_close():
    bench = Bench()
    one = bench.admit(1, 2)
    bench.scheduler.remove(one)
    assert bench.form() == []


def test_a_cache_budget_bounds_what_fits():
    bench = Bench(kv_budget_tokens=25)
    bench.admit(1, 10, max_tokens=10)
    demand = GenerationRequested(bytes(16), (1, 2), SamplingSpec(), 10)
    other = Session.begin(demand, TokenValidator(997), context_tokens_max=1000, now=0.0)
    assert not bench.scheduler.fits(other)
    assert bench.scheduler.kv_free_tokens == 5


def test_a_rewind_trims_every_stage_and_the_stream_goes_on_unchanged():
    bench = Bench()
    one = bench.admit(1, 4)
    bench.go_on(2)
    expected = one.stream.tokens()
    bench.scheduler.rewind(one)
    (frame,) = bench.form()
    assert (frame.kind, frame.rows[0].first_position) == (FrameKind.REWIND, 5)
    for stage in bench.stages:
        frame = stage.step(frame)
    bench.sent.pop()
    bench.scheduler.steps.settle(frame.step, bench.now)
    bench.scheduler.ready(one)
    bench.go_on()
    assert one.stream.tokens()[: len(expected)] == expected


def test_chunks_stand_beside_the_decode_steps_one_to_each_round():
    bench = Bench(stages=2)
    bench.decode(2)
    bench.measured(decode_s=0.01, prefill_token_s=0.001, larger_s=0.1)
    bench.admit(3, 60)
    under_way, order = [], ""
    for _ in range(40):
        order += "".join("p" if f.kind is FrameKind.PREFILL else "d" for f in bench.form())
        under_way.append(sorted(frame.kind.name for frame in bench.sent))
        bench.answer()
    decode, chunk = ["DECODE"] * 2, ["PREFILL"]
    assert all(one in (decode + chunk, decode + 2 * chunk) for one in under_way[1:])
    assert decode + 2 * chunk in under_way  # both stages have one to compute
    assert set(order.strip("d").split("p")[1:-1]) == {"dd"}  # a round between any two


def test_a_prompt_beside_the_steps_changes_nobodys_place_in_them():
    """Places that change cost copies of caches: a pause of a tenth of a second for everybody."""
    bench = Bench(stages=2)
    bench.decode(4)
    bench.go_on(20)
    bench.form()
    bench.measured(decode_s=0.01, prefill_token_s=0.001, larger_s=0.1)
    before = [{row.request for row in frame.rows} for frame in bench.sent]
    bench.admit(5, 60)
    for _ in range(12):
        bench.form()
        decodes = [frame for frame in bench.sent if frame.kind is FrameKind.DECODE]
        assert all({row.request for row in frame.rows} in before for frame in decodes)
        bench.answer()


def rows_of(frames):
    """What is under way: the rows of decode steps, "p" for a chunk."""
    return [len(f.rows) if f.kind is FrameKind.DECODE else "p" for f in frames]


def four_that_decode(*, prefill_token_s):
    """Two stages, on which steps of 10 ms have been seen."""
    bench = Bench(stages=2)
    bench.decode(4)
    bench.go_on(20)
    bench.form()
    bench.measured(decode_s=0.01, prefill_token_s=prefill_token_s)
    return bench


def test_a_prompt_gets_the_place_of_a_decode_step_and_gives_it_back():
    bench = four_that_decode(prefill_token_s=0.0002)
    assert rows_of(bench.sent) == [2, 2]
    newcomer = bench.admit(5, 60, max_tokens=900)
    seen = []
    for _ in range(36):
        bench.form()
        seen.append(rows_of(bench.sent))
        bench.answer()
    assert seen[:4] == [[2, 2], [2], [4, "p"], ["p", 4, "p"]]  # no chunk in front of the first
    assert all(one in ([4, "p"], ["p", 4, "p"]) for one in seen[2:])
    while not newcomer.accepted_count:
        bench.go_on()
    bench.go_on(8)
    bench.form()
    assert sorted(rows_of(bench.sent)) == [2, 3]


def test_a_chunk_in_a_decode_steps_place_is_half_of_a_whole_round_too():
    bench = Bench(stages=2, policy=LARGE_CHUNKS)
    bench.decode(4)
    bench.measured(decode_s=0.050, prefill_token_s=0.002)
    bench.admit(5, 500)
    bench.form()
    assert bench.scheduler._steps_per_round == 1
    assert bench.scheduler._chunk_tokens() == 2 * 50 // 2 // 2


def test_caches_that_take_long_to_copy_stay_where_they_are():
    bench = four_that_decode(prefill_token_s=0.2)
    bench.admit(5, 60)
    bench.go_on(8)
    bench.form()
    assert [size for size in rows_of(bench.sent) if size != "p"] == [2, 2]


def test_in_a_rush_nobody_is_offered_a_place():
    bench = Bench(stages=2)
    bench.decode(4)
    bench.measured(decode_s=0.01, prefill_token_s=0.0002)
    for number in (5, 6):
        bench.admit(number, 60)
    bench.form()
    assert bench.scheduler._is_rush()
    assert bench.scheduler._place.is_open


def test_on_a_longer_route_decode_steps_close_up_by_one():
    bench = Bench(stages=4, policy=MeshPolicy(vocab_size=997, prefill_chunk_tokens_shared=4))
    bench.decode(12)
    bench.go_on(20)
    bench.form()
    bench.measured(decode_s=0.01, prefill_token_s=0.0002)
    assert rows_of(bench.sent) == [3, 3, 3, 3]
    bench.admit(13, 120)
    seen = []
    for _ in range(40):
        bench.form()
        seen.append(rows_of(bench.sent))
        bench.answer()
    assert all([size for size in one if size != "p"] == [4, 4, 4] for one in seen[12:])
    assert all(1 <= one.count("p") <= 2 for one in seen[12:])


def test_those_who_wait_for_something_else_do_not_hold_a_prompt_up_that_has_a_place():
    bench = Bench(stages=2)
    bench.decode(4)
    bench.measured(decode_s=0.01, prefill_token_s=0.0002)
    newcomer = bench.admit(5, 60)
    bench.form()
    decoding = [one for one in bench.scheduler.sessions.values() if one is not newcomer]
    while bench.sent:
        bench.answer()
    bench.scheduler._decoding.clear()  # nobody's next token is wanted
    bench.scheduler._ready -= {one.request for one in decoding}
    assert rows_of(bench.form()) == ["p"]


def test_prompts_that_are_given_up_in_line_do_not_make_steps_smaller():
    bench = Bench(stages=2)
    bench.decode(4)
    gone = [bench.admit(number, 60) for number in range(5, 10)]
    for one in gone[1:]:
        bench.scheduler.remove(one)
    sizes = []
    for _ in range(30):
        sizes += [len(frame.rows) for frame in bench.form() if frame.kind is FrameKind.DECODE]
        bench.answer()
    assert set(sizes[-8:]) == {2}


def test_a_prompt_that_stands_in_line_twice_counts_once():
    """As when it leaves the route and comes back; no decode step is left without rows."""
    bench = Bench(stages=2)
    bench.decode(1)
    bench.admit(2, 60)
    waiting = bench.admit(3, 60)
    for _ in range(2):
        bench.scheduler.remove(waiting)
        bench.scheduler.admit(waiting, bench.now)
    for _ in range(12):
        assert all(frame.rows for frame in bench.form())
        bench.answer()


def test_a_shared_chunk_takes_half_as_long_as_a_round_of_decode_steps():
    bench = Bench(stages=2, policy=LARGE_CHUNKS)
    bench.decode(2)
    bench.measured(decode_s=0.050, prefill_token_s=0.002, larger_s=0.5)
    bench.admit(3, 500)
    (chunk,) = bench.form()
    assert chunk.kind is FrameKind.PREFILL
    assert chunk.token_count == 2 * 50 // 2 // 2  # half of two places of 50 ms, 2 ms a token
    bench.measured(decode_s=0.050, prefill_token_s=0.5)
    assert bench.scheduler._chunk_tokens() == 12
    bench.measured(decode_s=0.050, prefill_token_s=0.0001)
    assert bench.scheduler._chunk_tokens() == 64


def test_prompts_go_at_full_speed_where_several_wait_for_theirs_and_few_decode():
    bench = Bench(stages=2, policy=LARGE_CHUNKS)
    bench.decode(1)
    bench.measured(decode_s=0.050, prefill_token_s=0.002)
    bench.admit(2, 500)
    assert bench.scheduler._chunk_tokens() < 64  # one waits, one decodes: it is not held up
    bench.admit(3, 500)
    assert bench.scheduler._chunk_tokens() == 128
    chunks = [frame for frame in bench.form() if frame.kind is FrameKind.PREFILL]
    assert [frame.token_count for frame in chunks] == [128, 128]  # one for each stage
    assert bench.scheduler.check() == []


def test_requests_that_decode_in_every_place_never_keep_those_who_wait_from_their_prompts():
    bench = Bench(stages=2)
    bench.decode(2)
    waiting = [bench.admit(number, 40, max_tokens=900) for number in range(3, 17)]
    bench.go_on(900)
    assert all(one.stream.next_position > 40 for one in waiting)


def test_several_that_wait_are_held_back_for_those_who_decode_if_these_are_many():
    bench = Bench(stages=2, policy=LARGE_CHUNKS)
    bench.decode(16)
    courtesy = []
    for number in range(16, 20):
        bench.admit(number, 500)
        courtesy.append(bench.scheduler._chunk_tokens() <= 64)
    assert courtesy == [True, True, False, False]  # 16 decode: for 1 and for 2, not for 3 or 4


def test_in_a_rush_prompts_fill_the_stages_and_those_who_decode_share_one_step():
    policy = MeshPolicy(vocab_size=997, prefill_chunk_tokens=8, rows_per_step_max=32)
    bench = Bench(stages=2, policy=policy)
    bench.decode(6)
    for number in range(6, 12):
        bench.admit(number, 200, max_tokens=900)
    seen = []
    for _ in range(40):
        bench.form()
        seen.append([(frame.kind.name, len(frame.rows)) for frame in bench.sent])
        bench.answer()
    settled = seen[4:]
    assert all(sum(kind == "DECODE" for kind, _ in one) <= 1 for one in settled)
    assert all(sum(kind == "PREFILL" for kind, _ in one) == 2 for one in settled)
    assert ("DECODE", 6) in settled[-1] + settled[-2] + settled[-3]
    bench.go_on(400)
    bench.form()
    assert [len(frame.rows) for frame in bench.sent] == [6, 6]  # the rush is over
