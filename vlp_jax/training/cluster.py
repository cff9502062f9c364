"""Which process of how many this one is, read from its environment alone.

Said outright (`VLP_JAX_*`), by SLURM's `srun`, or by a TPU pod on GKE; in this order.
"""

from collections.abc import Mapping
import dataclasses
import re

SAID = ("VLP_JAX_COORDINATOR", "VLP_JAX_NUM_PROCESSES", "VLP_JAX_PROCESS_ID")
# Above the ports that Linux gives to outgoing connections, where JAX looks too.
FIRST_PORT, PORTS = 61_440, 4_096
TPU_PORT = 8_482  # JAX's own


@dataclasses.dataclass(frozen=True)
class Place:
  """Of one process among several.

  Attributes:
    coordinator: "host:port" of process 0.
    count: of processes. index: of this one.
    local_devices: ids of this process's GPUs among those it sees; None: all.
    said_by: where it is from, for messages.
  """

  coordinator: str
  count: int
  index: int
  said_by: str
  local_devices: tuple[int, ...] | None = None

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
      raise ValueError(
        f"{self.said_by}: the coordinator is {self.coordinator!r}: want host:port of"
        " process 0, e.g. node1:61440."
      )
    if not 0 <= self.index < self.count:
      raise ValueError(
        f"{self.said_by}: process {self.index} of {self.count}: want 0 …"
        f" {self.count - 1}."
      )

  @property
  def host(self) -> str:
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    return int(self.coordinator.rpartition(":")[2])


def find(environ: Mapping[str, str]) -> Place | None:
  """The place that the environment names; None: this process is alone.

  Raises:
    ValueError: the environment says half of it, or what cannot be.
  """
  for look in (_said, _slurm, _tpu):
    place = look(environ)
    if place is not None:
      return place if place.count > 1 else None
  return None


def _number(environ, name):
  try:
    return int(environ[name])
  except ValueError:
    raise ValueError(f"{name}={environ[name]!r}: want a number.") from None


def _said(environ):
  given = [name for name in SAID if environ.get(name)]
  if not given:
    return None
  if len(given) < len(SAID):
    lacking = ", ".join(name for name in SAID if name not in given)
    raise ValueError(
      f"{', '.join(given)} without {lacking}: set all three (host:port of process 0,"
      " how many processes, and which this is), or none."
    )
  return Place(
    environ[SAID[0]],
    _number(environ, SAID[1]),
    _number(environ, SAID[2]),
    "VLP_JAX_…",
  )


def _slurm(environ):
  """Of a task of `srun`; the batch script itself is none."""
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
  if not all(environ.get(name) for name in (*names, "SLURM_PROCID", "SLURM_LOCALID")):
    return None
  # A step of its own has a port of its own; a requeued job has its old one.
  step = environ.get("SLURM_STEP_ID", "0")
  offset = _number(environ, "SLURM_JOB_ID") + 1_009 * int(step if step.isdigit() else 0)
  host = first_host(environ["SLURM_STEP_NODELIST"])
  return Place(
    f"{host}:{FIRST_PORT + offset % PORTS}",
    _number(environ, "SLURM_STEP_NUM_TASKS"),
    _number(environ, "SLURM_PROCID"),
    "SLURM",
    _slurm_gpus(environ),
  )


def _slurm_gpus(environ):
  """One GPU a task, where as many tasks as GPUs share a node and each sees all.

  JAX takes one a task on every SLURM cluster, also where a single task has the node.
  """
  visible = [x for x in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
  tasks = tasks_by_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
  node = int(environ.get("SLURM_NODEID", "0") or 0)
  here = tasks[node] if node < len(tasks) else tasks[-1]
  if here > 1 and len(visible) == here:
    return (_number(environ, "SLURM_LOCALID"),)
  return None


def first_host(nodes: str) -> str:
  """The first of SLURM's list: "gpu[003-007,12],login" -> "gpu003"."""
  match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
  if match is None:
    raise ValueError(f"SLURM_STEP_NODELIST={nodes!r}: there is no host in it.")
  return "".join(part or "" for part in match.groups())


def tasks_by_node(tasks: str) -> list[int]:
  """SLURM's count for each node: "8(x2),4" -> [8, 8, 4]."""
  counts = []
  for part in tasks.split(","):
    match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
    if match is None:
      raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={tasks!r}: want e.g. 8(x2),4.")
    counts += [int(match[1])] * int(match[2] or 1)
  return counts


def _tpu(environ):
  """Of a pod, or of several joined by a data-centre network, as GKE describes them."""
  hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
  slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
  if not hosts or (len(hosts) == 1 and slices == "1"):
    return None
  names = ["TPU_WORKER_ID"]
  if slices != "1":
    names += ["MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"]
    names += ["MEGASCALE_COORDINATOR_ADDRESS"]
  lacking = [name for name in names if not environ.get(name)]
  if lacking:
    raise ValueError(f"TPU_WORKER_HOSTNAMES without {', '.join(lacking)}: set them.")
  index, host = _number(environ, "TPU_WORKER_ID"), hosts[0]
  count = len(hosts)
  if slices != "1":
    index += count * _number(environ, "MEGASCALE_SLICE_ID")
    count *= _number(environ, "MEGASCALE_NUM_SLICES")
    host = environ["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0]
  return Place(f"{host}:{TPU_PORT}", count, index, "TPU_WORKER_HOSTNAMES")
