"""The manifests of launch/gke, held against JobSet's schema."""

import json
import os
import pathlib
import subprocess
import sys

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent.parent
SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset.schema.json").read_text())
RUN = ("--name=mine", "--image=registry/vlp_jax", "--config=configs/albef.py")
RUN += ("--workdir=gs://bucket/run",)
TPU = ("tpu", *RUN, "--accelerator=tpu-v5-lite-podslice", "--topology=4x8")
GPU = ("gpu", *RUN, "--accelerator=nvidia-h100-80gb", "--nodes=4")


def gke(*options, path=os.environ["PATH"]):
  return subprocess.run(
    [sys.executable, ROOT / "launch" / "gke" / "gke.py", *options],
    env={"PATH": path},
    capture_output=True,
    text=True,
    check=False,
  )


def render(*options):
  done = gke("render", *options)
  assert done.returncode == 0, done.stderr
  manifest = yaml.safe_load(done.stdout)
  errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
  assert not [(list(e.absolute_path), e.message) for e in errors]
  return manifest


def job(manifest):
  """(the job's spec, its pods')."""
  (replicated,) = manifest["spec"]["replicatedJobs"]
  spec = replicated["template"]["spec"]
  return spec, spec["template"]["spec"]


@pytest.mark.parametrize("topology, machines, chips", [("4x8", 8, 4), ("2x2", 1, 4)])
def test_tpu(topology, machines, chips):
  manifest = render(*TPU, f"--topology={topology}", "--slices=2", "--config.seed=3")
  spec, pod = job(manifest)
  assert (spec["completions"], spec["parallelism"]) == (machines, machines)
  assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
  (container,) = pod["containers"]
  assert container["args"] == [
    "--config=configs/albef.py",
    "--workdir=gs://bucket/run",
    "--config.seed=3",
  ]
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": topology,
  }
  assert pod["terminationGracePeriodSeconds"] == 120


def test_gpu():
  manifest = render(*GPU, "--spot", "--restarts=0")
  spec, pod = job(manifest)
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == 4
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 0
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  (container,) = pod["containers"]
  env = {item["name"]: item for item in container["env"]}
  # Of the first pod: JOBSET-JOB-REPLICA-INDEX.SUBDOMAIN.
  assert env["VLP_JAX_COORDINATOR"]["value"] == "mine-train-0-0.mine:61440"
  assert env["VLP_JAX_NUM_PROCESSES"]["value"] == "4"
  field = env["VLP_JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


@pytest.mark.parametrize("options", [TPU, GPU], ids=["tpu", "gpu"])
def test_a_mistake_is_not_begun_again(options):
  """Exit code 2 is; a lost process (75) and a saved one (143) are."""
  manifest = render(*options)
  spec, pod = job(manifest)
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
  # Kubernetes allows such a policy with this alone.
  assert pod["restartPolicy"] == "Never"
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_what_is_odd_stays_whole():
  manifest = render(*GPU, "--image=a:b#c", '--config.total="2 epochs": {x}')
  (container,) = job(manifest)[1]["containers"]
  assert container["image"] == "a:b#c"
  assert container["args"][-1] == '--config.total="2 epochs": {x}'


@pytest.mark.parametrize(
  "path, value",
  [
    (["spec", "replicatedJobs", 0, "replica"], 2),
    (["spec", "replicatedJobs", 0, "replicas"], "2"),
    (["spec", "failurePolicy", "restartStrategy"], "Sometimes"),
    (["spec", "replicatedJobs", 0, "template", "spec", "completion"], 4),
  ],
)
def test_the_schema_finds_mistakes(path, value):
  manifest = render(*GPU)
  at = manifest
  for key in path[:-1]:
    at = at[key]
  at[path[-1]] = value
  assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(manifest)


@pytest.mark.parametrize("left_out", ["name", "image", "config", "workdir", "topology"])
def test_half_given(left_out):
  options = [o for o in TPU if not o.startswith(f"--{left_out}=")]
  done = gke("apply", *options)
  assert done.returncode == 2
  assert f"vlp_jax: error: --{left_out} is missing" in done.stderr


@pytest.mark.parametrize(
  "options, told",
  [
    ((*GPU, "--nodes=0"), "--nodes=0: want 1 or more"),
    ((*GPU, "--name=My_run"), "--name=My_run: want at most 40 lower-case"),
    ((*GPU, "--workdir=/runs"), "pods share no disk"),
    ((*GPU, "--colour=red"), "no option --colour=red"),
    ((*TPU, "--accelerator=tpu-v99"), "--accelerator=tpu-v99: there are tpu-v4"),
    ((*TPU, "--topology=4x"), "--topology=4x: want e.g. 4x4"),
    ((*TPU, "--topology=3x5"), "15 chips are no machines of 4"),
  ],
)
def test_refuses(options, told):
  done = gke("render", *options)
  assert done.returncode == 2
  assert told in done.stderr


def test_commands(tmp_path):
  done = gke("apply", *GPU, "--dry-run", "--namespace=team")
  first, *manifest = done.stdout.splitlines(keepends=True)
  assert first == "kubectl --namespace=team apply --filename=- <<'EOF'\n"
  assert "".join(manifest[:-1]) == gke("render", *GPU, "--namespace=team").stdout
  done = gke("delete", "gpu", "--name=mine", "--dry-run")
  assert done.stdout == "kubectl --namespace=default delete jobset mine\n"
  done = gke("logs", "tpu", "--name=mine", "--process=2", "--dry-run")
  assert "jobset-name=mine,batch.kubernetes.io/job-completion-index=2" in done.stdout
  # And without --dry-run that is what runs.
  kubectl = tmp_path / "kubectl"
  kubectl.write_text('#!/bin/sh\necho "$*"; cat\n')
  kubectl.chmod(0o755)
  done = gke("apply", *GPU, path=f"{tmp_path}:/usr/bin:/bin")
  assert done.stdout.startswith("--namespace=default apply --filename=-\n")
  assert "kind: JobSet" in done.stdout
  assert "there is no kubectl" in gke("apply", *GPU, path=str(tmp_path / "no")).stderr
