"""A SLURM cluster of this machine alone: Debian's daemons, in a temporary folder."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

from tests import processes

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "srun", "scontrol")
INSTALL = (
  ("apt-get", "update"),
  ("apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"),
)
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
SchedulerParameters=sched_min_interval=100000,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def install() -> str | None:
  """Installs what is lacking, where that can be done; what is in the way otherwise."""
  os.environ["PATH"] = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
  if all(shutil.which(name) for name in PROGRAMS):
    return None
  if os.getuid() or not shutil.which("apt-get"):
    return "slurm-wlm is not there, and only root on Debian installs it"
  env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
  for command in INSTALL:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
      return f"{' '.join(command)}: {done.stderr[-300:]}"
  missing = [name for name in PROGRAMS if not shutil.which(name)]
  return f"slurm-wlm lacks {missing}" if missing else None


class Slurm(contextlib.AbstractContextManager):
  """`with Slurm(folder) as slurm:` … its commands; then ends all that it started."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    self._daemons: list[subprocess.Popen] = []

  def __enter__(self) -> "Slurm":
    try:
      self._start()
    except BaseException:
      self.__exit__()
      raise
    return self

  def _start(self):
    for name in ("munge", "state", "spool"):
      (self.folder / name).mkdir(mode=0o700)
    host = socket.gethostname().partition(".")[0]
    port = processes.free_port()
    text = CONF.format(
      folder=self.folder,
      host=host,
      user="root" if os.getuid() == 0 else os.environ["USER"],
      ctld_port=port,
      slurmd_port=port + 1,
    )
    (self.folder / "slurm.conf").write_text(text, "utf-8")
    munge = self.folder / "munge"
    key = munge / "key"
    subprocess.run(["mungekey", f"--keyfile={key}", "--create"], check=True)
    names = ("socket", "pid-file", "log-file", "seed-file")
    files = [f"--{name}={munge / name.removesuffix('-file')}" for name in names]
    self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
    self._until(lambda: (munge / "socket").exists(), "munged")
    self._daemon("slurmctld", "-D", "-c")
    self._daemon("slurmd", "-D", "-N", host)
    self._until(lambda: "idle" in self.tell("sinfo", "-h", "-o", "%T"), "slurmd")

  def _daemon(self, name, *arguments):
    with open(self.folder / f"{name}.out", "a", encoding="utf-8") as out:
      self._daemons.append(
        subprocess.Popen(
          [shutil.which(name), *arguments],
          env=self.env,
          stdin=subprocess.DEVNULL,
          stdout=out,
          stderr=subprocess.STDOUT,
        )
      )

  def _until(self, done, name, seconds=60):
    end = time.monotonic() + seconds
    while not done():
      if time.monotonic() > end:
        raise TimeoutError(f"{name} does not come up:\n{self.logs()}")
      time.sleep(0.1)

  def logs(self) -> str:
    """The ends of the daemons' logs."""
    texts = [p.read_text("utf-8")[-2_000:] for p in sorted(self.folder.glob("*.out"))]
    texts += [p.read_text("utf-8")[-2_000:] for p in sorted(self.folder.glob("*.log"))]
    return "\n---\n".join(texts)

  def tell(self, *command: str, **env: str) -> str:
    """Runs a command of the cluster; what it printed."""
    done = subprocess.run(
      command, env=self.env | env, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr

  def job(self, number: str) -> dict[str, str]:
    """What SLURM says of a job: {"JobState": …, "Restarts": …}."""
    words = self.tell("scontrol", "show", "job", number).split()
    return dict(word.split("=", 1) for word in words if "=" in word)

  def __exit__(self, *exception) -> None:
    for daemon in reversed(self._daemons):
      daemon.terminate()
    for daemon in self._daemons:
      try:
        daemon.wait(timeout=10)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    # Jobs and their keepers outlive slurmd.
    for pid in self._left():
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

  def _left(self):
    """Processes that were started in this cluster, which their environment says."""
    mark = f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      with contextlib.suppress(OSError):
        if mark in path.read_bytes() and int(path.parent.name) != os.getpid():
          yield int(path.parent.name)
