# SPDX-License-Identifier: Apache-2.0
"""The cluster files of `recipes/ray/` agree with the recipes and the image."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_kuberay_job_has_as_many_nodes_as_its_recipe_is_told():
    job = yaml.safe_load((ROOT / "recipes" / "ray" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    recipe, nodes = re.search(r"exec (\S+) trainer\.nnodes=(\d+) scale=cluster\b", job["spec"]["entrypoint"]).groups()
    assert (ROOT / recipe).is_file()
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == int(nodes) - 1
    for group in (workers, job["spec"]["rayClusterSpec"]["headGroupSpec"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_kuberay_job_finds_the_code_where_the_image_has_it():
    job = yaml.safe_load((ROOT / "recipes" / "ray" / "kuberay.yaml").read_text())
    (folder,) = re.findall(r"^WORKDIR (\S+)$", (ROOT / "docker" / "Dockerfile.gpu").read_text(), re.MULTILINE)
    assert f"cd {folder} &&" in job["spec"]["entrypoint"]


def test_the_skypilot_task_starts_the_recipe_on_all_its_nodes():
    task = yaml.safe_load((ROOT / "recipes" / "ray" / "skypilot.yaml").read_text())
    assert (ROOT / task["envs"]["RECIPE"]).is_file() and task["resources"]["accelerators"].endswith(":8")
    assert task["run"].rstrip().endswith('"$RECIPE" scale=cluster trainer.nnodes="$SKYPILOT_NUM_NODES"')
    (shared,) = task["volumes"]
    assert all(task["envs"][name].startswith(shared) for name in ("OPD_RUNS", "OPD_HOME", "HF_HOME"))
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", task[part]], capture_output=True, text=True).stderr == ""
