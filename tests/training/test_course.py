"""What this process says that it does."""

import dataclasses
import json
import pathlib
import threading

import pytest

from vlp_jax.training import course as course_lib


@pytest.fixture
def clock(monkeypatch):
  """A list of one number: now."""
  now = [100.0]
  monkeypatch.setattr(course_lib.time, "monotonic", lambda: now[0])
  return now


def test_a_run(clock):
  course = course_lib.Course()
  assert course.now() == course_lib.START and not course.now().limited
  seen = []

  def look():
    seen.append(course.now())

  with course.at("starts", limited=False):
    course.go_on()
    with course.at("evaluates", "test"):
      look()
    look()
    course.turn_to("trains")
    clock[0] = 107.0
    course.go_on()
    course.go_on()
    with course.at("saves", "step 2"):
      clock[0] = 110.0
      look()
    look()
  look()
  assert [(d.verb, d.of, d.batches, d.limited) for d in seen] == [
    ("evaluates", "test", 0, True),
    ("starts", "", 1, False),
    ("saves", "step 2", 0, True),
    ("trains", "", 2, True),
    ("starts", "", 0, False),
  ]
  assert [d.seconds for d in seen] == [0.0, 0.0, 3.0, 10.0, 10.0]
  # Each has come further than the one before.
  assert sorted({d.moves for d in seen}) == [d.moves for d in seen]


def test_what_fails_is_over_as_well():
  course = course_lib.Course()
  with pytest.raises(ValueError), course.at("saves", "step 2"):
    raise ValueError
  assert course.now().verb == "starts"


def test_what_is_written_beside():
  course = course_lib.Course()
  with course.at("trains"):
    course.go_on()
    course.writes("step 1")
    doing = course.now()
    words = "trains (1 batches so far) and has not written its part of step 1"
    assert str(doing) == words
    thread = threading.Thread(target=course.written)
    thread.start()
    thread.join()
    assert str(course.now()) == "trains (1 batches so far)"
    assert course.now().place != doing.place


def test_it_is_sent_as_json():
  doing = course_lib.Doing("saves", "step 2", 3.5, waits=True, writes="step 1")
  sent = json.loads(json.dumps(dataclasses.asdict(doing)))
  assert course_lib.Doing(**sent) == doing


def test_whether_it_waits_for_others(tmp_path):
  """Asked from another thread, as the watch does; of the main thread, which is here."""
  course = course_lib.Course()

  def asked():
    found = []
    thread = threading.Thread(target=lambda: found.append(course.now().waits))
    thread.start()
    thread.join()
    return found[0]

  assert not asked()
  # A file of the name of JAX's own.
  path = str(tmp_path / "multihost_utils.py")
  scope = {}
  exec(compile("def meet(call):\n  return call()", path, "exec"), scope)
  assert scope["meet"](asked)


def test_where_the_main_thread_is():
  found = course_lib.stands()
  assert len(found) == course_lib.FRAMES
  here = next(line for line in found if "test_where_the_main_thread_is" in line)
  assert here.startswith(f"{pathlib.Path(__file__)}:")
