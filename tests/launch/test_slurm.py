"""launch/slurm on a real SLURM cluster, of this machine alone."""

import os
import pathlib
import re
import shutil
import sys
import time

import pytest

from tests import runs
from tests.launch import slurm_daemons

STEPS = 120
# ITC alone: its step compiles in a third of the time.
SMALL = (
  "--config.objectives.itm=None",
  "--config.objectives.mlm=None",
  "--config.objectives.itc.queue=0",
  "--config.objectives.itc.distill=0.0",
  "--config.model.fusion=None",
  "--config.ema_decay=None",
  "--config.checkpoint.every=40",
)


@pytest.fixture(scope="module")
def slurm():
  missing = slurm_daemons.install()
  if missing:
    pytest.skip(missing)
  # Not below pytest's folders: the paths of sockets are short.
  folder = pathlib.Path("/tmp") / f"vlp_jax_slurm_{os.getpid()}"
  folder.mkdir(mode=0o755)
  try:
    with slurm_daemons.Slurm(folder) as running:
      yield running
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def submit(slurm, workdir, *options, tasks=2, **env):
  """The number of a job that launch/slurm/submit.sh has submitted."""
  script = runs.ROOT / "launch" / "slurm" / "submit.sh"
  config = f"--config={runs.CONFIG}:{STEPS}"
  nodes = ("--nodes=1", f"--tasks-per-node={tasks}")
  told = slurm.tell(
    "bash", str(script), config, f"--workdir={workdir}", *nodes, *options, **env
  )
  found = re.search(r"Submitted batch job (\d+)", told)
  assert found, told
  return found[1]


def wait_for(slurm, job, done, seconds=300):
  """What SLURM says of the job once `done` is content with it."""
  end = time.monotonic() + seconds
  while not done(said := slurm.job(job)):
    assert time.monotonic() < end, f"{said}\n{slurm.logs()}"
    time.sleep(0.1)
  return said


def state(*names):
  return lambda said: said.get("JobState") in names


def go_on(slurm, job, restarts):
  """A requeued job waits two minutes, by SLURM's rule: here it need not.

  A moment is for the node, which still clears up after it.
  """
  wait_for(slurm, job, lambda said: said.get("Restarts") == str(restarts))
  wait_for(slurm, job, state("PENDING"))
  time.sleep(2)
  told = slurm.tell("scontrol", "update", f"jobid={job}", "StartTime=now")
  assert not told.strip(), told


def log(workdir, job):
  return (workdir / f"slurm-{job}.log").read_text("utf-8")


def program(tmp_path, text):
  """What a job runs in the trainer's place."""
  path = tmp_path / "python"
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)
  return f"--python={path}"


def test_a_mistake_is_not_requeued(slurm, tmp_path):
  job = submit(slurm, tmp_path / "run", program(tmp_path, "exit 2"))
  said = wait_for(slurm, job, state("FAILED"))
  assert (said["ExitCode"], said["Restarts"]) == ("2:0", "0")


def test_a_lost_task_is_requeued_but_not_for_ever(slurm, tmp_path):
  text = 'echo "$SLURM_RESTART_COUNT of $SLURM_NTASKS"; exit 75'
  job = submit(slurm, tmp_path / "run", program(tmp_path, text), "--requeues=1")
  go_on(slurm, job, 1)
  said = wait_for(slurm, job, state("FAILED"))
  assert (said["ExitCode"], said["Restarts"]) == ("75:0", "1")
  text = log(tmp_path / "run", job)
  assert text.count("1 of 2") == 2
  assert "ended with 75 after 1 requeues: no more" in text


def test_a_cancelled_job_is_not_requeued(slurm, tmp_path):
  text = "trap 'exit 143' TERM; echo begun; sleep 60 & wait"
  job = submit(slurm, tmp_path / "run", program(tmp_path, text))
  path = tmp_path / "run" / f"slurm-{job}.log"
  wait_for(slurm, job, lambda _: path.exists() and path.read_text().count("begun") == 2)
  slurm.tell("scancel", job)
  said = wait_for(slurm, job, state("CANCELLED"))
  assert said["Restarts"] == "0"
  assert "the job was cancelled" in log(tmp_path / "run", job)


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_finishes(slurm, tmp_path):
  workdir = tmp_path / "run"
  cache = os.environ["JAX_COMPILATION_CACHE_DIR"] + os.sep + "processes"
  env = {"JAX_COMPILATION_CACHE_DIR": cache}
  job = submit(slurm, workdir, f"--python={sys.executable}", *SMALL, **env)
  wait_for(slurm, job, lambda _: len(runs.metrics(workdir)) >= 3)
  # As a cluster does before it takes the node: to the tasks alone.
  slurm.tell("scancel", "--signal=TERM", job)
  go_on(slurm, job, 1)
  stopped = re.search(
    r"stopped by SIGTERM.* at step (\d+), which is", log(workdir, job)
  )
  assert stopped, log(workdir, job)
  step = int(stopped[1])
  assert 3 <= step < STEPS
  assert runs.steps(workdir)[-1] == step
  said = wait_for(slurm, job, state("COMPLETED", "FAILED"))
  text = log(workdir, job)
  assert (said["JobState"], said["ExitCode"]) == ("COMPLETED", "0:0"), text
  assert said["Restarts"] == "1"
  assert "attempt 2" in text
  # It went on: no step was made twice, none is missing.
  assert text.count(f"goes on from step {step} ") == 1
  assert text.count("2 x cpu, mesh 2x1x1") == 2
  assert [line["step"] for line in runs.metrics(workdir)] == list(range(1, STEPS + 1))
  assert runs.steps(workdir)[-1] == STEPS
  assert (workdir / "report.html").is_file()
