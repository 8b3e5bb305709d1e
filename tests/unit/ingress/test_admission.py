"""What is taken in and what is refused, on a clock of the test's own."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from http import HTTPStatus

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from moeray.attention_shard import link as wire
from moeray.config import IngressConfig
from moeray.ingress.admission import LONGEST_RETRY_S, OVERALL, Admission
from moeray.vllm_hooks.admission import Need, NotRead, Overloaded, Place, Refused, begun, keep_place, need_of

READY = ("a", "b")


class Clock:
    """Seconds, by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Desk:
    """An Admission over two shards of 1000 KV tokens each, and numbered requests."""

    def __init__(self, **limits: float) -> None:
        self.clock = Clock()
        self.admission = Admission(IngressConfig(**limits), self.clock)  # type: ignore[arg-type]
        self.count = 0
        for shard in READY:
            self.load(shard)

    def load(self, shard: str, kv_tokens: int = 1000, others_tokens: int = 0) -> None:
        self.admission.report(shard, wire.Load(kv_tokens, others_tokens, 0, 0))

    def ask(self, num_prompt: int = 10, num_answer: int = 90, n: int = 1, priority: int = 0) -> Place:
        self.count += 1
        return self.admission.admit(Need(f"r{self.count}", num_prompt, num_answer, n, priority), READY)

    def measure(self, seconds_per_start: float) -> None:
        """Let twenty requests start, one every so many seconds."""
        places = [self.ask() for _ in range(20)]
        for place in places:
            self.clock.now += seconds_per_start
            place.answered()
        for place in places:
            place.leave()


def refused(desk: Desk, **ask: int) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        desk.ask(**ask)
    assert caught.value.http_status is HTTPStatus.TOO_MANY_REQUESTS
    assert 1 <= caught.value.retry_after_s <= LONGEST_RETRY_S
    return caught.value


@pytest.mark.parametrize(("num_prompt", "num_answer", "field"), [(900, 101, "max_tokens"), (1000, 1, "input_tokens")])
def test_a_request_that_no_shard_could_ever_hold_is_the_clients_mistake(
    num_prompt: int, num_answer: int, field: str
) -> None:
    desk = Desk()
    with pytest.raises(VLLMValidationError, match="1001 tokens; the KV cache of a shard holds 1000") as caught:
        desk.ask(num_prompt, num_answer)
    assert caught.value.parameter == field
    desk.ask(900, 100)


def test_tokens_beyond_the_kv_caches_and_the_queue_are_refused_until_a_place_is_left() -> None:
    desk = Desk(max_queued_kv=0.5)
    places = [desk.ask() for _ in range(30)]
    why = refused(desk)
    assert "3000 tokens are admitted, 100 asked for; the shards' KV caches hold 2000 and 1000 may wait" in str(why)
    places[7].leave()
    places[7].leave()
    desk.ask()
    refused(desk)


def test_every_sequence_counts_with_its_prompt() -> None:
    desk = Desk(max_queued_kv=0)
    desk.ask(n=19)
    desk.ask()
    refused(desk)


def test_requests_of_other_ingresses_take_room_too() -> None:
    desk = Desk(max_queued_kv=0)
    desk.load("a", others_tokens=1850)
    desk.ask()
    refused(desk)


def test_alone_a_request_is_never_too_much() -> None:
    desk = Desk(max_queued_kv=0)
    desk.ask(n=100).leave()
    desk.ask(n=100)


def test_a_shard_that_left_no_longer_counts_and_while_none_is_ready_the_last_ones_do() -> None:
    desk = Desk(max_queued_kv=0)
    assert desk.admission.describe()["kv_tokens"] == 2000
    desk.admission.admit(Need("x", 1, 1), ["b"])
    assert desk.admission.describe()["kv_tokens"] == 1000
    desk.admission.admit(Need("y", 1, 1), [])
    assert desk.admission.describe()["kv_tokens"] == 1000


def test_before_a_shard_has_spoken_only_the_number_of_requests_is_bounded() -> None:
    admission = Admission(IngressConfig(max_requests=2), Clock())
    for name in ("x", "y"):
        admission.admit(Need(name, 10**6, 10**6), [])
    with pytest.raises(Overloaded, match=r"2 requests are in hand, ingress\.max_requests is 2"):
        admission.admit(Need("z", 1, 1), [])


def test_lower_priority_is_refused_first_and_all_priorities_together_are_bounded() -> None:
    desk = Desk(max_queued_kv=0)
    for _ in range(20):
        desk.ask(priority=5)
    refused(desk, priority=5)
    refused(desk, priority=6)
    for _ in range(20 * (OVERALL - 1)):
        desk.ask(priority=-1)
    refused(desk, priority=-1)
    refused(desk, priority=-100)


def test_a_wait_beyond_the_limit_is_refused_with_the_time_to_come_back() -> None:
    desk = Desk(max_wait_s=10)
    desk.measure(seconds_per_start=2)
    places = [desk.ask() for _ in range(6)]
    why = refused(desk)
    assert why.retry_after_s == 6 and "about 12 s" in str(why)
    places[3].answered()
    desk.ask()


def test_the_urgent_do_not_wait_behind_the_others() -> None:
    desk = Desk(max_wait_s=10)
    desk.measure(seconds_per_start=2)
    for _ in range(6):
        desk.ask(priority=1)
    refused(desk, priority=1)
    desk.ask(priority=0)


def test_time_in_which_nothing_waited_is_no_part_of_the_pace() -> None:
    desk = Desk()
    desk.measure(seconds_per_start=2)
    desk.clock.now += 10_000
    desk.measure(seconds_per_start=2)
    assert desk.admission.describe()["seconds_per_start"] == pytest.approx(2)


def test_no_time_is_guessed_before_any_was_measured() -> None:
    desk = Desk(max_wait_s=1e-3)
    for _ in range(50):
        desk.ask()
    assert desk.admission.describe()["seconds_per_start"] is None


def test_when_all_have_left_nothing_is_kept() -> None:
    desk = Desk()
    places = [desk.ask() for _ in range(5)]
    places[1].answered()
    places[1].answered()
    for place in places:
        place.leave()
    described = desk.admission.describe()
    assert (described["requests"], described["waiting"], described["tokens"]) == (0, 0, 0)


def test_requests_that_clients_call_the_same_are_not_taken_for_one_another() -> None:
    desk = Desk()
    same = Need("x", 10, 90)
    first, second = desk.admission.admit(same, READY), desk.admission.admit(same, READY)
    assert desk.admission.describe()["waiting"] == 2
    first.answered()
    first.answered()
    assert desk.admission.describe()["waiting"] == 1
    first.leave()
    assert desk.admission.describe()["waiting"] == 1
    second.answered()
    assert desk.admission.describe()["waiting"] == 0


class Counted:
    """A place that counts how often it was left."""

    left = 0
    max_unread_s = 60.0
    need = Need("r", 1, 1)

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []

    async def begin(self) -> None: ...

    def answered(self) -> None: ...

    def leave(self, error: BaseException | None = None) -> None:
        self.left += 1
        self.errors.append(error)


async def _numbers(closed: list[bool]) -> AsyncGenerator[int, None]:
    try:
        for number in range(3):
            yield number
    finally:
        closed.append(True)


def test_a_place_is_given_back_when_the_stream_is_read_closed_or_never_begun() -> None:
    async def scenario() -> None:
        closed: list[bool] = []
        read, cut, unread = Counted(), Counted(), Counted()
        assert [number async for number in keep_place(read, _numbers(closed))] == [0, 1, 2]
        stream = keep_place(cut, _numbers(closed))
        assert await anext(stream) == 0
        await stream.aclose()
        assert closed == [True, True], "closing ours closes vLLM's, at once"
        waiting = keep_place(unread, _numbers(closed))
        assert not unread.left
        del waiting
        gc.collect()
        assert read.left and cut.left and unread.left

    asyncio.run(scenario())


class Impatient(Counted):
    """A place that a client which does not read loses at once."""

    max_unread_s = 0.02


def test_a_client_that_does_not_read_loses_its_place_and_its_request_and_is_told_if_it_reads_on() -> None:
    async def scenario() -> None:
        closed: list[bool] = []
        place = Impatient()
        stream = keep_place(place, _numbers(closed))
        assert await anext(stream) == 0
        async with asyncio.timeout(60):
            while not (place.left and closed):
                await asyncio.sleep(0.01)
        with pytest.raises(NotRead, match=r"0\.02 s \(ingress.max_wait_s\)") as error:
            await anext(stream)
        assert error.value.http_status == HTTPStatus.REQUEST_TIMEOUT
        assert isinstance(place.errors[0], NotRead)

    asyncio.run(scenario())


def test_a_client_that_reads_is_not_blamed_for_a_slow_answer() -> None:
    async def slow() -> AsyncGenerator[int, None]:
        for number in range(3):
            await asyncio.sleep(0.1)
            yield number

    async def scenario() -> None:
        assert [number async for number in keep_place(Impatient(), slow())] == [0, 1, 2]

    asyncio.run(scenario())


def test_what_a_request_needs_is_read_from_the_rendered_prompt() -> None:
    need = need_of("r", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=7, n=2), 4)
    assert need == Need("r", 3, 7, 2, 4) and need.num_tokens == 20


class Barred(Counted):
    """A place of which it turns out that it may not be filled."""

    async def begin(self) -> None:
        raise Refused("not you", HTTPStatus.FORBIDDEN)


def test_a_place_that_may_not_be_filled_is_given_back_and_its_request_never_made() -> None:
    async def scenario() -> None:
        closed: list[bool] = []
        place = Barred()
        with pytest.raises(Refused):
            await anext(keep_place(place, _numbers(closed)))
        assert isinstance(place.errors[0], Refused) and not closed

    asyncio.run(scenario())


def test_a_handlers_stream_is_returned_only_once_it_has_begun() -> None:
    async def scenario() -> None:
        place = Barred()

        async def handler() -> AsyncGenerator[int, None]:
            return keep_place(place, _numbers([]))

        with pytest.raises(Refused):
            await begun(handler)()
        assert place.left

    asyncio.run(scenario())
