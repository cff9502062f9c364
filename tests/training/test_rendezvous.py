"""Processes that meet, and who is told when one is gone: threads stand for them."""

from concurrent import futures
import functools
import queue
import socket
import threading
import time

import pytest

from tests import processes
from vlp_jax.training import cluster
from vlp_jax.training import course
from vlp_jax.training import rendezvous
from vlp_jax.training import watch as watch_lib


@pytest.fixture
def port():
  return processes.free_port()


def place(port, index, count=3):
  return cluster.Place(f"localhost:{port}", count, index, "a test")


def meet(port, indices, count=3, limit=20.0, **limits):
  """{place: Watch, or the error} of all, who start at once."""
  with futures.ThreadPoolExecutor(8) as pool:
    limits |= dict(limit=limit)
    where = [place(port, index, count) for index in indices]
    made = [pool.submit(rendezvous.meet, each, **limits) for each in where]
    return [kept(each.exception() or each.result()) for each in made]


MADE = []


def kept(watch):
  """The same, to be closed after the test."""
  MADE.append(watch)
  return watch


@pytest.fixture(autouse=True)
def hang_up_afterwards():
  yield
  while MADE:
    if isinstance(watch := MADE.pop(), watch_lib.Watch):
      watch.close()


def hang_up(watch):
  """What the kernel does for a process that dies."""
  for line in watch._lines.values():
    line.sock.shutdown(socket.SHUT_RDWR)
  watch.close()


def losses(watches):
  """One queue of losses for each watch, which is started."""
  queues = [queue.SimpleQueue() for _ in watches]
  for watch, found in zip(watches, queues, strict=True):
    watch.start(found.put)
  return queues


def test_all_meet_and_the_port_is_free_again(port):
  watches = meet(port, [2, 1, 0])
  assert [w.me.index for w in watches] == [2, 1, 0]
  assert sorted(watches[2].peers) == [0, 1, 2]
  # JAX's service takes the port while these connections stay.
  socket.create_server(("", port)).close()
  found = losses(watches)
  with futures.ThreadPoolExecutor(3) as pool:
    ends = [pool.submit(watch.end) for watch in watches]
    for end in ends:
      end.result(timeout=10)
  assert all(each.empty() for each in found)


def test_whoever_ends_first_waits_for_the_others(port):
  first, other = watches = meet(port, [0, 1], count=2)
  losses(watches)
  with futures.ThreadPoolExecutor(2) as pool:
    end = pool.submit(other.end)
    with pytest.raises(futures.TimeoutError):
      end.result(timeout=0.2)
    pool.submit(first.end).result(timeout=10)
    end.result(timeout=10)


def test_everybody_is_told_who_did_not_come(port):
  begun = time.monotonic()
  errors = meet(port, [0, 2, 3], count=5, limit=1.0)
  assert time.monotonic() - begun < 5
  host = socket.gethostname()
  told = f"after 1 s 2 of 5 processes did not come: 1, 4. There are 0 ({host}), 2"
  for error in errors:
    assert isinstance(error, rendezvous.StartError)
    assert told in str(error)


def test_process_0_did_not_come(port):
  (error,) = meet(port, [1], limit=0.5)
  assert "process 0 of 3 did not come: after 0.5 s nobody answers" in str(error)
  assert f"at localhost:{port}" in str(error)


def test_two_with_the_same_number(port):
  errors = meet(port, [0, 1, 1], limit=10)
  assert all("two processes say that they are number 1" in str(e) for e in errors)


def test_another_number_of_processes(port):
  with futures.ThreadPoolExecutor(2) as pool:
    first = pool.submit(rendezvous.meet, place(port, 0, 3), limit=10)
    other = pool.submit(rendezvous.meet, place(port, 1, 4), limit=10)
    for each in (first, other):
      error = each.exception()
      assert "as one of 4 processes, process 0 as one of 3" in str(error)


def test_strangers_and_those_who_die_while_they_wait_do_not_count(port):
  with futures.ThreadPoolExecutor(4) as pool:
    made = [pool.submit(rendezvous.meet, place(port, 0), limit=20)]
    for words in (b"GET / HTTP/1.1\r\n\r\n", b'["hello"]\n', b""):
      stranger = rendezvous._reach(place(port, 1), time.monotonic() + 10, 10).sock
      stranger.sendall(words)
      stranger.close()
    dies = rendezvous._reach(place(port, 1), time.monotonic() + 10, 10)
    dies.send(hello=rendezvous.GREETING, index=1, count=3, host="x", pid=1)
    dies.close()
    made += [pool.submit(rendezvous.meet, place(port, i), limit=20) for i in (1, 2)]
    first, *_ = [kept(each.result(timeout=20)) for each in made]
  assert first.peers[1].host == socket.gethostname()


def test_a_port_that_another_holds(port):
  with socket.create_server(("", port)) as _:
    (error,) = meet(port, [0], limit=0.3)
  assert f"process 0 cannot listen on port {port}" in str(error)


@pytest.mark.parametrize("gone", [1, 2])
def test_all_notice_one_that_is_gone(port, gone):
  watches = meet(port, [0, 1, 2])
  found = losses([w for w in watches if w.me.index != gone])
  begun = time.monotonic()
  hang_up(watches[gone])
  loss = found[0].get(timeout=10)
  assert (loss.peer.index, loss.why, loss.code) == (gone, None, None)
  watches[0].pass_on(loss, wait=0.1)
  assert found[1].get(timeout=10) == loss
  assert time.monotonic() - begun < 2


def test_all_notice_that_process_0_is_gone(port):
  watches = meet(port, [0, 1, 2])
  found = losses(watches[1:])
  hang_up(watches[0])
  for each in found:
    loss = each.get(timeout=10)
    assert (loss.peer.index, loss.why) == (0, None)


@pytest.mark.parametrize("failing", [0, 2])
def test_last_words_reach_all(port, failing):
  watches = meet(port, [0, 1, 2])
  found = losses(watches)
  others = [i for i in range(3) if i != failing]
  with futures.ThreadPoolExecutor(1) as pool:
    pool.submit(watches[failing].fail, "ValueError: config: lr", 2)
    if failing:
      loss = found[0].get(timeout=10)
      watches[0].pass_on(loss, wait=0.1)
      others.remove(0)
    for i in others:
      loss = found[i].get(timeout=10)
      assert loss.peer.index == failing
      assert (loss.why, loss.code) == ("ValueError: config: lr", 2)
    for i in others:
      hang_up(watches[i])


# --- Who hangs ---


def test_all_say_that_they_live_and_process_0_says_how_often(port):
  watches = meet(port, [0, 1, 2], silence=0.4)
  assert [watch.silence for watch in watches] == [0.4] * 3
  found = losses(watches)
  time.sleep(1.2)
  # One that is at its end waits for the others, and hangs no more than they do.
  with futures.ThreadPoolExecutor(3) as pool:
    ends = [pool.submit(watches[2].end)]
    time.sleep(0.6)
    ends += [pool.submit(watch.end) for watch in watches[:2]]
    for end in ends:
      end.result(timeout=10)
  assert all(each.empty() for each in found)


@pytest.mark.parametrize("hanging", [0, 1])
def test_one_that_says_nothing_hangs(port, hanging):
  watches = meet(port, [0, 1, 2], silence=0.4)
  # Its connections stay, but nobody reads or writes there.
  found = losses([w for w in watches if w.me.index != hanging])
  loss = found[0].get(timeout=10)
  assert (loss.peer.index, loss.why, loss.code) == (hanging, None, None)
  assert 0.4 < loss.silent < 2
  if hanging:
    watches[0].pass_on(loss, wait=0.1)
  other = found[1].get(timeout=10)
  assert other.peer.index == hanging and 0.4 < other.silent < 2


def test_without_a_limit_it_may_be_silent(port):
  watches = meet(port, [0, 1], count=2)
  (found,) = losses(watches[:1])
  with pytest.raises(queue.Empty):
    found.get(timeout=0.5)
  hang_up(watches[1])
  assert found.get(timeout=10).silent is None


@pytest.mark.parametrize("behind", [0, 2, None])
def test_the_one_that_all_wait_for(port, behind):
  """All give signs of life, but none gets another batch."""
  watches = meet(port, [0, 1, 2], silence=0.4, stand=0.8)
  for watch in watches:
    moves = 8 - (watch.me.index == behind)
    watch.doing = functools.partial(course.Doing, "trains", batches=moves, moves=moves)
  found = losses(watches)
  for each in found[:1]:
    loss = each.get(timeout=10)
    assert (loss.peer.index, loss.why, loss.silent) == (behind or 0, None, None)
    assert "nobody has gone on for 1 s; " in loss.stands
    told = "do its data come?"
    assert (told in loss.stands) == (behind is not None)
    assert "it trains (7 batches" in loss.stands or behind is None
  watches[0].pass_on(loss, wait=0.1)
  for each in found[1:]:
    assert each.get(timeout=10) == loss


def test_who_starts_or_goes_on_is_not_waited_for(port):
  watches = meet(port, [0, 1], count=2, silence=0.2, stand=0.4)
  saves = functools.partial(course.Doing, "saves", "step 5")
  watches[0].doing = lambda: saves(moves=9)
  watches[1].doing = lambda: course.START
  found = losses(watches)
  time.sleep(1.0)
  watches[1].doing = lambda: saves(moves=int(10 * time.monotonic()))
  time.sleep(1.0)
  assert all(each.empty() for each in found)
  watches[1].doing = lambda: saves(moves=5, writes="step 2")
  loss = found[0].get(timeout=10)
  assert "it saves step 5 and has not written its part of step 2, " in loss.stands
  assert loss.peer.index == 1


def test_who_has_ended_is_not_waited_for(port):
  watches = meet(port, [0, 1, 2], silence=0.2, stand=0.6)
  for watch in watches:
    watch.doing = lambda: course.Doing("saves", "step 5")
  found = losses(watches)
  for watch in watches[:2]:  # they wait for the third one, which does not end
    threading.Thread(target=watch.end, daemon=True).start()
  loss = found[0].get(timeout=10)
  assert loss.peer.index == 2 and "it saves step 5: does" in loss.stands
  watches[0].pass_on(loss, wait=0.1)
  assert [each.get(timeout=10) for each in found[1:]] == [loss] * 2


def test_one_that_is_alone_may_hang(port):
  me = watch_lib.Peer(0, "here", 1)
  watch = watch_lib.Watch(me, {0: me}, {}, silence=0.2, stand=0.4)
  watch.doing = lambda: course.Doing("saves", "step 5")
  (found,) = losses([watch])
  loss = found.get(timeout=10)
  assert loss.peer == me and "it saves step 5: does its disk" in loss.stands
  watch.end()


def test_a_limit_below_the_time_between_two_signs(port):
  """Process 1 goes on all the time, but says so every 0.4 seconds."""
  watches = meet(port, [0, 1], count=2, silence=1.6, stand=0.1)
  watches[0].doing = lambda: course.Doing("saves", "step 5")
  watches[1].doing = lambda: course.Doing("trains", moves=int(100 * time.monotonic()))
  found = losses(watches)
  time.sleep(1.5)
  assert all(each.empty() for each in found)


def test_what_one_did_that_is_gone(port):
  watches = meet(port, [0, 1], count=2, silence=0.4)
  watches[1].doing = lambda: course.Doing("saves", "step 5", 3.0)
  found = losses(watches[:1])
  watches[1].start(lambda loss: None)
  until = time.monotonic() + 10
  while 1 not in watches[0]._did:
    assert time.monotonic() < until
    time.sleep(0.02)
  hang_up(watches[1])
  loss = found[0].get(timeout=10)
  assert (loss.silent, loss.did) == (None, "saves step 5, for 3 s")
