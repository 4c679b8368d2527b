"""A JobSet of Kubernetes (jobset.x-k8s.io/v1alpha2) for the same stages.

Each stage is a replicated job of one indexed job, a pod for each node; a stage starts when the one before it is
complete. A pod that fails restarts the whole set, in which stages that are done end at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from paxlike.launch.job import SECRET, Job, Stage

PORT = 61440
SECRETS = "paxlike-secrets"


def manifest(job: Job, stages: list[Stage]) -> dict[str, Any]:
    """The JobSet as JSON, which is YAML. Raises ValueError, in one line, for what a pod cannot have."""
    if job.container is None:
        raise ValueError("--where=kubernetes needs --container=IMAGE")
    if job.tasks_per_node not in (1, job.gpus_per_node) or job.processes_per_node not in (None, 1):
        raise ValueError(
            "--where=kubernetes runs one process in each pod: leave out --processes_per_node"
        )
    name = re.sub(r"[^a-z0-9-]+", "-", job.title.lower()).strip("-")
    # Names of pods add the stage and two numbers, and are host names: 63 characters at most.
    name = (name if name[:1].isalpha() else f"run-{name}")[:40].strip("-")
    jobs = []
    for number, stage in enumerate(stages):
        replicated = {"name": stage.name, "replicas": 1, "template": _job(job, stage, name)}
        if number:
            replicated["dependsOn"] = [{"name": stages[number - 1].name, "status": "Complete"}]
        jobs.append(replicated)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                # Exit code 2 is a mistake of the user: another start would not mend it.
                "rules": [
                    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
                "maxRestarts": job.max_restarts,
            },
            "replicatedJobs": jobs,
        },
    }


def _job(job: Job, stage: Stage, name: str) -> dict[str, Any]:
    pods = job.nodes if stage.parallel else 1
    folder = str(Path(job.job_log_dir).absolute())
    environment: list[dict[str, Any]] = []
    for variable, value in job.environment.items():
        if value is not None:
            environment.append({"name": variable, "value": _literal(value)})
        elif SECRET.search(variable):
            source = {"secretKeyRef": {"name": SECRETS, "key": variable}}
            environment.append({"name": variable, "valueFrom": source})
        else:
            raise ValueError(
                f"--env={variable}: a pod inherits nothing; write --env={variable}=VALUE"
            )
    if pods > 1:
        address = f"{name}-{stage.name}-0-0.{name}:{PORT}"
        environment += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
            {"name": "JAX_NUM_PROCESSES", "value": str(pods)},
        ]
    mounts, volumes = [], []
    for number, (source, target) in enumerate(_mounts(job, folder)):
        volume = f"volume-{number}"
        volumes.append({"name": volume, **source})
        mounts.append({"name": volume, "mountPath": target})
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container: dict[str, Any] = {
        "name": "paxlike",
        "image": job.container,
        "command": [_literal(word) for word in job.command(stage)],
        "env": environment,
        "volumeMounts": mounts,
    }
    if stage.parallel and job.request_gpus != "none":
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus_per_node}}
    if pods > 1:
        container["ports"] = [{"containerPort": PORT}]
    return {
        "spec": {
            "parallelism": pods,
            "completions": pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "paxlike",
                            "operator": "In",
                            "values": [2],
                        },
                    }
                ]
            },
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": job.signal_seconds,
                    "containers": [container],
                    "volumes": volumes,
                }
            },
        }
    }


def _mounts(job: Job, folder: str) -> list[tuple[dict[str, Any], str]]:
    """(volume, path in the pod): pvc/CLAIM:TARGET is a claim, another SOURCE:TARGET a folder of the node."""
    pairs = []
    for mount in job.mounts:
        source, _, target = mount.partition(":")
        target = (target or source).split(":")[0]
        if source.startswith("pvc/"):
            pairs.append(({"persistentVolumeClaim": {"claimName": source[4:]}}, target))
        else:
            pairs.append(({"hostPath": {"path": source}}, target))
    targets = [target for _, target in pairs]
    if not any(folder == target or folder.startswith(f"{target}/") for target in targets):
        raise ValueError(
            f"--job_log_dir={folder} lies in no --mount: it must outlive the pods (--mount=pvc/CLAIM:FOLDER)"
        )
    return pairs


def _literal(text: str) -> str:
    """Kubernetes would put the value of a variable in place of `$(NAME)`; doubled, the dollar stands for itself."""
    return text.replace("$(", "$$(")
