"""What the launchers would run, what they refuse, and how they begin again."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch import test_scripts

ROOT = test_scripts.ROOT
CONFIG = "--config=configs/clip.py:tiny"
TPU = ("--name=pod", "--zone=us-west4-a")
BUCKET = "--workdir=gs://bucket/run"
POD = ("gcloud compute tpus queued-resources {} pod --zone=us-west4-a").format
LAUNCHERS = {
  "local_gpu.sh": ("launch/local_gpu.sh",),
  "slurm": ("launch/slurm/submit.sh",),
  "tpu": ("launch/tpu/tpu.sh", "create"),
  "worker": ("launch/tpu/worker.sh",),
}


def launch(*command, cwd=ROOT, **env):
  """Runs a launcher where Google's and SLURM's programs are not there."""
  bare = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "VLP_JAX_VENV": "/venv"}
  script, *options = command
  return subprocess.run(
    ["bash", str(ROOT / script), *options],
    cwd=cwd,
    env=bare | env,
    capture_output=True,
    text=True,
    check=False,
  )


def printed(*command, **env):
  """Lines of --dry-run."""
  done = launch(*command, "--dry-run", **env)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def refused(*command, **env):
  done = launch(*command, **env)
  assert done.returncode == 1, done.stdout
  assert done.stderr.count("\n") == 1
  return done.stderr


@pytest.mark.parametrize("command", LAUNCHERS.values(), ids=LAUNCHERS)
def test_help(command):
  done = launch(*command, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert f"bash {command[0]}" in done.stdout
  assert "--dry-run" in done.stdout
  assert "set -euo" not in done.stdout


@pytest.mark.parametrize("command", ["local_gpu.sh", "slurm", "tpu"])
def test_an_option_that_there_is_not(command):
  assert "no option --colour=red" in refused(*LAUNCHERS[command], "--colour=red")


# --- This machine ---------------------------------------------------------------------


def test_one_process_drives_all_gpus():
  (line,) = printed("launch/local_gpu.sh", CONFIG, "--workdir=/runs/a b")
  want = ["/venv/bin/python", "-m", "vlp_jax.train", CONFIG, "--workdir=/runs/a b"]
  assert shlex.split(line) == want
  (line,) = printed(
    "launch/local_gpu.sh", CONFIG, "--workdir=runs/a", "--gpus=1,3", "--config.total=3"
  )
  env, setting, *command = shlex.split(line)
  assert (env, setting) == ("env", "CUDA_VISIBLE_DEVICES=1,3")
  assert command[-2:] == [f"--workdir={ROOT}/runs/a", "--config.total=3"]


def test_processes_share_the_gpus():
  lines = printed(
    "launch/local_gpu.sh", CONFIG, "--workdir=/w", "--gpus=0,1,5,7", "--processes=2"
  )
  settings = [shlex.split(line)[1:5] for line in lines]
  assert settings == [
    [
      f"CUDA_VISIBLE_DEVICES={gpus}",
      "VLP_JAX_COORDINATOR=localhost:61440",
      "VLP_JAX_NUM_PROCESSES=2",
      f"VLP_JAX_PROCESS_ID={i}",
    ]
    for i, gpus in enumerate(("0,1", "5,7"))
  ]


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ((), "--config is missing"),
    ((CONFIG,), "--workdir is missing"),
    (("--config=configs/clop.py", "--workdir=/w"), "there is no configs/clop.py"),
    ((CONFIG, "--workdir=/w", "--gpus=a"), "--gpus=a: want numbers"),
    ((CONFIG, "--workdir=/w", "--gpus="), "--gpus=: name some"),
    ((CONFIG, "--workdir=/w", "--processes=0"), "--processes=0: want 1 or more"),
    (
      (CONFIG, "--workdir=/w", "--gpus=0,1,2", "--processes=2"),
      "3 GPUs do not divide by it",
    ),
  ],
)
def test_local_refuses(options, told):
  assert told in refused("launch/local_gpu.sh", *options)


# Trains, too: with the exit codes that a test has written down, one for each attempt.
# Process 1 is the last to read one, and removes it.
TRAIN = """\
case "$*" in
  "-m vlp_jax.train "*)
    echo "$VLP_JAX_PROCESS_ID run $*" >>{folder}/log
    codes=({folder}/code.*)
    code="$(cat "${{codes[0]}}")"
    sleep "0.$((VLP_JAX_PROCESS_ID + 1))"
    [ "$VLP_JAX_PROCESS_ID" != 1 ] || rm "${{codes[0]}}"
    sleep "0.$((2 - VLP_JAX_PROCESS_ID))"
    exit "$code"
    ;;
"""


class Machine(test_scripts.Machine):
  """Whose Python ends as a test wants."""

  def add_python(self, name="python3"):
    path = super().add_python(name)
    train = TRAIN.format(folder=self.folder)
    path.write_text(path.read_text().replace('case "$*" in\n', train, 1))
    return path

  def ends_with(self, *codes):
    for i, code in enumerate(codes):
      (self.folder / f"code.{i}").write_text(str(code))


@pytest.fixture
def machine(tmp_path):
  made = Machine(tmp_path)
  (made.bin / "sleep").symlink_to("/bin/sleep")
  made.add_python()
  return made


@pytest.mark.parametrize(
  ("codes", "attempts", "code"),
  [
    ((0,), 1, 0),
    ((2,), 1, 2),
    ((75, 137, 0), 3, 0),
    ((143,), 1, 143),
    ((75, 75), 2, 75),
  ],
)
def test_a_lost_process_is_begun_again(machine, codes, attempts, code):
  machine.ends_with(*codes)
  script = ROOT / "launch" / "local_gpu.sh"
  restarts = len(codes) - (code == 75)
  options = ("--workdir=/w", "--processes=2", f"--restarts={restarts}")
  done = machine.run(script, CONFIG, *options, VLP_JAX_ACCELERATOR="cpu")
  assert done.returncode == code, done.stderr
  runs = [line for line in machine.log.read_text().splitlines() if "run -m" in line]
  assert len(runs) == 2 * attempts
  assert {line[0] for line in runs} == {"0", "1"}
  assert done.stderr.count("goes on from the last checkpoint") == attempts - 1


# --- SLURM ----------------------------------------------------------------------------


def submitted(*options):
  lines = printed("launch/slurm/submit.sh", CONFIG, "--nodes=2", *options)
  assert lines[0] == "mkdir -p /w"
  assert lines[1].startswith("export VLP_JAX_PYTHON=/venv/bin/python VLP_JAX_REQUEUES=")
  return shlex.split(lines[2])


def test_slurm_submits():
  command = submitted("--workdir=/w", "--gpus-per-node=8", "--config.optim.lr=1e-3")
  at = command.index("launch/slurm/train.sbatch")
  assert command[0] == "sbatch"
  assert set(command[1:at]) == {
    "--job-name=w",
    "--nodes=2",
    "--ntasks-per-node=1",
    "--gpus-per-node=8",
    "--output=/w/slurm-%j.log",
    "--open-mode=append",
    "--requeue",
    "--signal=TERM@120",
  }
  assert command[at + 1 :] == [CONFIG, "--workdir=/w", "--config.optim.lr=1e-3"]


def test_slurm_passes_on():
  command = submitted(
    "--workdir=/w",
    "--grace=60",
    "--time=1-0",
    "--account=me",
    "--sbatch=--constraint=a100|h100",
    "--tasks-per-node=4",
    "--cpus-per-task=8",
    "--job-name=mine",
  )
  want = {"--signal=TERM@60", "--time=1-0", "--account=me", "--ntasks-per-node=4"}
  want |= {"--constraint=a100|h100", "--cpus-per-task=8", "--job-name=mine"}
  assert want <= set(command)


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ((CONFIG,), "--workdir is missing"),
    ((CONFIG, "--workdir=/w"), "--nodes is missing: how many"),
    ((CONFIG, "--workdir=/w", "--nodes=two"), "--nodes=two: want a whole number"),
    ((CONFIG, "--workdir=/w", "--nodes=1", "--time="), "--time is missing"),
    (
      (CONFIG, "--workdir=/w", "--nodes=1", "--gpus-per-node=8", "--tasks-per-node=3"),
      "8 GPUs do not divide by it",
    ),
    ((CONFIG, "--workdir=/w", "--nodes=1"), "there is no sbatch"),
    (("--mem=3",), "(one more of sbatch's: --sbatch=--mem=3)"),
  ],
)
def test_slurm_refuses(options, told, tmp_path):
  # Without SLURM, which another test may have installed.
  for name in test_scripts.TOOLS:
    (tmp_path / name).symlink_to(pathlib.Path("/usr/bin") / name)
  (tmp_path / "basename").symlink_to("/usr/bin/basename")
  told_by = refused("launch/slurm/submit.sh", *options, PATH=str(tmp_path))
  assert told in told_by


# --- TPU ------------------------------------------------------------------------------


def tpu(command, *options):
  return printed("launch/tpu/tpu.sh", command, *TPU, *options)


def test_tpu_creates():
  (line,) = tpu("create", "--type=v5litepod-16", "--spot", "--project=mine")
  assert line == (
    f"{POD('create')} --project=mine --accelerator-type=v5litepod-16"
    " --runtime-version=v2-alpha-tpuv5-lite --node-id=pod --spot"
  )
  (line,) = tpu("create", "--type=v6e-256", "--slices=2", "--valid-for=6h")
  assert line == (
    f"{POD('create')} --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e"
    " --node-count=2 --node-prefix=pod --valid-until-duration=6h"
  )


def test_tpu_copies_what_git_knows():
  lines = tpu("copy")
  assert shlex.split(lines[1])[:4] == ["bash", "-o", "pipefail", "-c"]
  # The archive itself, from the command that is printed.
  folder = shlex.split(lines[0])[-1]
  try:
    for line in lines[:2]:
      subprocess.run(line, shell=True, check=True, executable="/bin/bash")
    archive = pathlib.Path(folder, "vlp_jax.tar.gz")
    names = subprocess.run(
      ["tar", "-tzf", archive], capture_output=True, text=True, check=True
    ).stdout.split()
  finally:
    subprocess.run(shlex.split(lines[3]), check=True)
  assert {"setup.cfg", "launch/tpu/worker.sh", "vlp_jax/train.py"} <= set(names)
  assert not [name for name in names if name.startswith(("tests/", ".venv", "runs"))]
  scp = f"{POD('scp')[: -len(' pod --zone=us-west4-a')]} {archive} pod:"
  assert lines[2] == f"{scp} --zone=us-west4-a --node=all --worker=all"
  assert (
    "tar -C vlp_jax -xzf vlp_jax.tar.gz && bash vlp_jax/launch/prepare.sh tpu"
    in (lines[4])
  )


def test_tpu_runs_on_all_workers():
  (line,) = tpu("run", CONFIG, BUCKET, "--config.total=2 epochs")
  *command, remote = shlex.split(line)
  assert shlex.join(command) == f"{POD('ssh')} --node=all --worker=all"
  # What the shell of the machine makes of it.
  text = remote.removeprefix("--command=")
  assert re.fullmatch(r"cd vlp_jax && \{ setsid nohup .* & \} && sleep 1", text)
  inner = shlex.split(text[text.index("nohup") : text.index(" >>")])
  assert inner[1:] == [
    "bash",
    "launch/tpu/worker.sh",
    CONFIG,
    BUCKET,
    "--config.total=2 epochs",
  ]


def test_tpu_other_commands():
  describe = f"{POD('describe')} '--format=value(state.state)'"
  assert tpu("wait") == [describe]
  assert tpu("status") == [POD("describe")]
  assert tpu("delete") == [f"{POD('delete')} --force --quiet"]
  assert tpu("logs", "--worker=all") == [
    f"{POD('ssh')} --node=all --worker=all '--command=tail -n 100 -F vlp_jax.log'"
  ]
  assert "kill -TERM" in tpu("stop")[0]


def test_tpu_resumes_in_the_order_of_its_parts():
  options = ("--type=v4-32", CONFIG, BUCKET)
  lines = tpu("resume", *options)
  plain = lambda lines: [re.sub(r"vlp_jax\.\d+", "TMP", line) for line in lines]
  parts = [tpu("wait"), tpu("delete"), tpu("create", *options), tpu("wait")]
  parts += [tpu("copy"), tpu("run", *options)]
  assert plain(lines) == plain([line for part in parts for line in part])
  assert plain(tpu("watch", *options)) == plain(lines)


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ((), "say what: create, wait"),
    (("crate",), "no command crate"),
    (("create",), "--name is missing"),
    (("create", "--name=pod"), "--zone is missing"),
    (("create", *TPU), "--type is missing: e.g. v5litepod-16"),
    (("create", *TPU, "--type=v4-8", "--spot", "--reserved"), "say one of them"),
    (("create", *TPU, "--type=v99-8", "--dry-run"), "say its image too: --runtime"),
    (("run", *TPU), "--config is missing"),
    (("run", *TPU, CONFIG), "--workdir is missing: a bucket"),
    (("run", *TPU, CONFIG, "--workdir=/w"), "the machines share no disk"),
    (("resume", *TPU, CONFIG, BUCKET), "--type is missing"),
    (("logs", *TPU, "--worker=last"), "--worker=last: want a whole number"),
    (("wait", *TPU, "--limit=0"), "--limit=0: want 1 or more"),
  ],
)
def test_tpu_refuses(options, told):
  assert told in refused("launch/tpu/tpu.sh", *options)


@pytest.fixture
def gcloud(tmp_path):
  """Answers `describe` with the lines of a file, one a time; writes down the rest."""
  states, log = tmp_path / "states", tmp_path / "log"
  program = tmp_path / "gcloud"
  program.write_text(
    "#!/bin/bash\n"
    f'echo "$4" >>{log}\n'
    '[ "$4" = describe ] || exit 0\n'
    f"state=$(head -n 1 {states}); sed -i 1d {states}\n"
    '[ "$state" != NONE ] || { echo "ERROR: NOT_FOUND: no pod" >&2; exit 1; }\n'
    'echo "$state"\n'
  )
  (tmp_path / "sleep").write_text("#!/bin/bash\n")
  for path in (program, tmp_path / "sleep"):
    path.chmod(0o755)

  def run(command, *given, options=()):
    states.write_text("".join(f"{state}\n" for state in given))
    log.write_text("")
    path = f"{tmp_path}:/usr/bin:/bin"
    done = launch("launch/tpu/tpu.sh", command, *TPU, *options, PATH=path)
    return done, log.read_text().split()

  return run


def test_tpu_waits(gcloud):
  done, asked = gcloud("wait", "ACCEPTED", "PROVISIONING", "PROVISIONING", "ACTIVE")
  assert done.returncode == 0, done.stderr
  assert asked == ["describe"] * 4
  assert done.stderr.count("pod is PROVISIONING") == 1
  done, _ = gcloud("wait", "ACCEPTED", "FAILED")
  assert done.returncode == 1
  assert "pod is FAILED and will not come" in done.stderr


def test_tpu_resumes_what_was_preempted(gcloud):
  options = ("--type=v4-8", CONFIG, BUCKET)
  done, asked = gcloud("resume", "SUSPENDED", "ACCEPTED", "ACTIVE", options=options)
  assert done.returncode == 0, done.stderr
  waits = ["describe", "describe"]
  assert asked == ["describe", "delete", "create", *waits, "scp", "ssh", "ssh"]
  _, asked = gcloud("resume", "NONE", "ACTIVE", options=options)
  assert asked == ["describe", "create", "describe", "scp", "ssh", "ssh"]
  done, asked = gcloud("resume", "ACTIVE", options=options)
  assert (done.returncode, asked) == (0, ["describe"])


def worker(tmp_path, **metadata):
  """launch/tpu/worker.sh on a machine of which this is known, with --dry-run."""
  curl = tmp_path / "curl"
  cases = "".join(
    f"*/{name.replace('_', '-')}) echo {shlex.quote(text)} ;;\n"
    for name, text in metadata.items()
  )
  curl.write_text(f'#!/bin/bash\nfor url; do :; done\ncase "$url" in\n{cases}esac\n')
  curl.chmod(0o755)
  path = f"{tmp_path}:/usr/bin:/bin"
  return launch("launch/tpu/worker.sh", CONFIG, BUCKET, "--dry-run", PATH=path)


def test_a_tpu_worker_knows_its_place(tmp_path):
  known = dict(agent_worker_number="3", worker_network_endpoints="a,b,c,d")
  done = worker(tmp_path, **known)
  assert "process 3 of 4, the first is a" in done.stderr
  assert shlex.split(done.stdout)[-2:] == [CONFIG, BUCKET]
  old = dict(
    agent_worker_number="1", worker_network_endpoints="x:0:10.0.0.7,y:1:10.0.0.8"
  )
  assert "process 1 of 2, the first is 10.0.0.7" in worker(tmp_path, **old).stderr
  slices = "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
  slices += "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
  done = worker(tmp_path, tpu_env=slices, **known)
  assert "process 11 of 12, the first is 10.0.0.1" in done.stderr
  # One machine is no pod.
  alone = dict(agent_worker_number="0", worker_network_endpoints="a")
  assert worker(tmp_path, **alone).stderr == ""


def test_another_machine_is_no_tpu_worker(tmp_path):
  done = worker(tmp_path)
  assert done.returncode == 1
  assert "is this a machine of a TPU pod?" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["create", "describe", "ssh", "scp", "delete"])
def test_gcloud_has_these_options(command, tmp_path):
  if not shutil.which("gcloud"):
    pytest.skip("gcloud is not installed")
  # Of its help alone: elsewhere it would act, where somebody is logged in.
  argv = ["gcloud", "compute", "tpus", "queued-resources", command, "--help"]
  env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)}
  done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
  known = set(re.findall(r"--[a-z-]+", re.sub(r"\x1b\[[\d;]*m", "", done.stdout)))
  options = ("--type=v4-8", CONFIG, BUCKET, "--project=p", "--network=n")
  lines = tpu("resume", *options, "--spot", "--valid-for=6h")
  lines += tpu("create", *options, "--reserved", "--slices=2") + tpu("logs")
  used = set()
  for line in lines:
    words = shlex.split(line)
    if words[0] == "gcloud" and words[4] == command:
      used |= {word.partition("=")[0] for word in words if word.startswith("--")}
  assert used and used - {"--project", "--format", "--quiet"} <= known
