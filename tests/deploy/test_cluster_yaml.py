"""`cluster.yaml`: as Ray's own launcher reads it, and which machines its autoscaler would start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from gt_ray.training.machines import machines
from tests.test_environment import pins

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"
SECRET = re.compile(r"(^|_)(token|secret|password|key)s?($|_)", re.IGNORECASE)


@pytest.fixture
def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return content


def launched(cluster: Mapping[str, Any], demands: list[dict[str, float]]) -> dict[str, int]:
    """Machines by type that the autoscaler starts for these demands, where none runs."""
    config = AutoscalingConfig(prepare_config(dict(cluster)), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(one) for one in demands]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_rays_launcher_takes_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    # What it does not name would come from the launcher's defaults, which install another Ray.
    assert prepared["setup_commands"] == cluster["setup_commands"]
    assert prepared["docker"] == cluster["docker"]


def test_images_have_the_pinned_ray_and_its_python(cluster: dict[str, Any]) -> None:
    images = [image for name, image in cluster["docker"].items() if name.endswith("image")]
    assert images and all(image.startswith(f"rayproject/ray:{pins()['ray']}-py311-") for image in images)
    (base,) = re.findall(r"^FROM (\S+)", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert base == cluster["docker"]["worker_image"]


def test_setup_installs_the_pinned_packages(cluster: dict[str, Any]) -> None:
    names = ("setup_commands", "head_setup_commands", "worker_setup_commands")
    installs = [command for name in names for command in cluster[name] if "pip install" in command]
    assert installs and all("--constraint constraints.txt" in command for command in installs)
    # A driver, which runs on the head, scores by vLLM where that can be imported.
    assert any("vllm" in command.split() for command in cluster["setup_commands"])


def test_no_work_lands_on_the_head(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0}


@pytest.mark.parametrize("an_actor", [{"GPU": 1.0}, {"GPU": 0.25}, {"GPU": 1.0, "CPU": 1.0}, {"GPU": 4.0}])
def test_curation_has_spot_machines(cluster: dict[str, Any], an_actor: dict[str, float]) -> None:
    assert launched(cluster, [an_actor] * int(8 / an_actor["GPU"])) == {"curation": 2}
    node = cluster["available_node_types"]["curation"]["node_config"]
    assert node["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_trainers_have_machines_that_stay(cluster: dict[str, Any]) -> None:
    assert launched(cluster, [{"GPU": 1.0, "CPU": 12.0}] * 4) == {"training": 1}
    assert "InstanceMarketOptions" not in cluster["available_node_types"]["training"]["node_config"]


def test_both_types_have_the_same_gpus(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types["curation"]["node_config"]["InstanceType"] == types["training"]["node_config"]["InstanceType"]


def test_no_secret_stands_in_it(cluster: dict[str, Any]) -> None:
    set_here = [option.split()[1] for option in cluster["docker"]["run_options"] if option.startswith("--env ")]
    assert set_here == [one for one in set_here if not SECRET.search(one.partition("=")[0])]
    assert set(cluster["auth"]) == {"ssh_user"}
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|BEGIN .*PRIVATE", FILE.read_text())


def test_what_has_to_be_replaced_is_told() -> None:
    told = (ROOT / "docs" / "cluster.md").read_text()
    found = {
        name
        for file in (FILE, *(ROOT / "deploy").rglob("*.*ml"))
        for name in re.findall(r"REPLACE-[a-z-]+", file.read_text())
    }
    assert found and {name for name in found if f"`{name}`" not in told} == set()


def test_node_types_that_a_plan_prints_fit_in() -> None:
    planned = machines("16xh100").node_types()
    cluster = {"cluster_name": "gt-ray", "provider": {"type": "aws", "region": "us-east-1"}, **planned}
    validate_config(prepare_config(cluster))
    assert planned["available_node_types"]["head"]["resources"] == {"CPU": 0}
