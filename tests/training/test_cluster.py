"""What environments say about the place of a process."""

import pytest

from vlp_jax.training import cluster

SLURM = {
  "SLURM_JOB_ID": "70",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "gpu[003-004]",
  "SLURM_STEP_NUM_TASKS": "16",
  "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
  "SLURM_PROCID": "11",
  "SLURM_LOCALID": "3",
  "SLURM_NODEID": "1",
}
TPU = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1"}
SLICES = TPU | {
  "MEGASCALE_NUM_SLICES": "3",
  "MEGASCALE_SLICE_ID": "2",
  "MEGASCALE_COORDINATOR_ADDRESS": "s-0.svc:8080",
}


def said(coordinator="node1:61440", count="4", index="2"):
  return dict(zip(cluster.SAID, (coordinator, count, index), strict=True))


def test_alone():
  assert cluster.find({}) is None
  assert cluster.find(said(count="1", index="0")) is None
  assert (
    cluster.find(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
  )
  # As `plan` describes a machine that is not there.
  assert cluster.find({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
  # The batch script of a job is no task of it.
  batch = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
  assert cluster.find(batch | {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}) is None


def test_said_outright_wins():
  place = cluster.find(SLURM | said("[::1]:7000"))
  assert (place.host, place.port, place.count, place.index) == ("::1", 7000, 4, 2)


@pytest.mark.parametrize("name", cluster.SAID)
def test_half_of_it_is_refused(name):
  given = said() | {name: ""}
  with pytest.raises(ValueError, match=f"without {name}: set all three"):
    cluster.find(given)


@pytest.mark.parametrize(
  ("environ", "told"),
  [
    (said(coordinator="node1"), "coordinator is 'node1': want host:port"),
    (said(coordinator="node1:99999"), "want host:port"),
    (said(index="4"), "process 4 of 4: want 0 … 3"),
    (said(index="-1"), "process -1 of 4"),
    (said(count="four"), "VLP_JAX_NUM_PROCESSES='four': want a number"),
    (TPU | {"TPU_WORKER_ID": ""}, "TPU_WORKER_HOSTNAMES without TPU_WORKER_ID"),
    (SLICES | {"MEGASCALE_SLICE_ID": ""}, "without MEGASCALE_SLICE_ID"),
    (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8*2"}, "want e.g. 8"),
  ],
)
def test_what_cannot_be_is_refused(environ, told):
  with pytest.raises(ValueError, match=told):
    cluster.find(environ)


def test_slurm():
  place = cluster.find(SLURM)
  assert (place.coordinator, place.count, place.index) == ("gpu003:61510", 16, 11)
  assert place.local_devices is None
  other_step = cluster.find(SLURM | {"SLURM_STEP_ID": "1"})
  assert other_step.port != place.port
  assert 61_440 <= cluster.find(SLURM | {"SLURM_JOB_ID": "123456789"}).port < 65_536


def test_a_task_of_slurm_takes_its_gpu_or_all_it_sees():
  eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
  assert cluster.find(SLURM | eight).local_devices == (3,)
  # Bound by SLURM to one already.
  assert cluster.find(SLURM | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None
  # One task has the whole node.
  alone = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2"}
  alone |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
  assert cluster.find(SLURM | alone | eight).local_devices is None


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("vm", "vm"),
    ("n1,n2", "n1"),
    ("gpu-a[003-007,12],login", "gpu-a003"),
    ("n[12,14]", "n12"),
    ("rack[2-3]-ib", "rack2-ib"),
  ],
)
def test_first_host(nodes, first):
  assert cluster.first_host(nodes) == first


def test_tpu_pods():
  place = cluster.find(TPU)
  assert (place.coordinator, place.count, place.index) == ("a-0.svc:8482", 2, 1)
  place = cluster.find(SLICES)
  assert (place.coordinator, place.count, place.index) == ("s-0.svc:8482", 6, 5)
