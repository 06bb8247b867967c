"""The manifests and scripts of docs/scale.md are what Kubernetes, torchrun and the command line take."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.support.processes import ROOT
from vtp.arguments import make_parser

PAGE = (ROOT / "docs" / "scale.md").read_text()
MANIFESTS = [
    manifest
    for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for manifest in yaml.safe_load_all(block)
]
# What stands for the dots of the page.
SETTINGS = shlex.split("--model deit_base_patch16_224 --data /data/imagenet --recipe deit --rate 0.4")


def manifest(kind: str) -> dict[str, Any]:
    (found,) = [each for each in MANIFESTS if each["kind"] == kind]
    return found


def with_settings(command: list[str]) -> list[str]:
    place = command.index("...")
    return command[:place] + SETTINGS + command[place + 1 :]


def torchrun(command: list[str]) -> Any:
    """The options of torchrun, after those of the program that it starts have been parsed."""
    assert command[0] == "torchrun"
    in_a_pod = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in with_settings(command[1:])]
    options = get_args_parser().parse_args(in_a_pod)
    assert options.module and options.training_script == "vtp.cli"
    ours = make_parser().parse_args(options.training_script_args)
    assert (ours.command, ours.resume, ours.recipe) == ("run", True, "deit")
    return options


def pods(kind: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """What is said of each pod, the container that trains, and the number of pods."""
    spec = manifest(kind)["spec"]
    if kind == "Job":
        (container,) = spec["template"]["spec"]["containers"]
        assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
        return spec["template"]["spec"], container, spec["completions"]
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["name"] == container["name"] == "node"  # as torch-distributed calls them
    trainer = spec["trainer"]
    return pod, container | {name: trainer[name] for name in ("command", "env")}, trainer["numNodes"]


@pytest.mark.parametrize("kind", ["Job", "TrainJob"])
def test_a_manifest_starts_a_run_with_time_to_save_and_room_for_data_workers(kind):
    pod, container, number = pods(kind)
    options = torchrun(container["command"])
    (timeout,) = container["env"]
    assert timeout["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    assert 60 <= int(timeout["value"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert "persistentVolumeClaim" in volumes[mounts["/runs"]]
    assert len(volumes) == len(mounts)
    if kind == "Job":  # what Kubeflow's runtime says in the environment
        name, service = manifest("Job")["metadata"]["name"], manifest("Service")
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
        assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
        assert options.master_addr == f"{name}-0.{pod['subdomain']}"
        assert options.nnodes == str(number) and options.node_rank == 3
        assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]


def test_the_manifests_are_what_the_schemas_of_kubernetes_and_kubeflow_take():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for kind in ("Service", "Job"):
        kubernetes_validate.validate(manifest(kind), kubernetes_validate.latest_version(), strict=True)
    job = manifest("TrainJob")
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # no field is unknown


def script(start: str) -> str:
    (found,) = [
        block
        for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
        if block.startswith(start)
    ]
    return found.replace("\\\n", " ")


def test_the_scripts_for_slurm_are_what_bash_torchrun_and_the_command_line_take():
    for start in ("#!/bin/bash\n", "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_ELASTIC"):
        text = script(start)
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
        words = shlex.split(line)
        if "torchrun" in words:
            options = torchrun(words[words.index("torchrun") :])
            assert (options.rdzv_endpoint, options.nproc_per_node) == ("$head:29400", "8")
        else:
            arguments = with_settings(words[words.index("vtp.cli") + 1 :])
            assert make_parser().parse_args(arguments).resume
