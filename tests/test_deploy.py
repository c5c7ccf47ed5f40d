"""The files of serving/deploy say what TF Serving, Prometheus, Grafana, Docker, Kubernetes and KServe take."""

import json
import re
from pathlib import Path

import pytest
import yaml
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from tensorflow_serving.config import model_server_config_pb2

from serving.warmup import ALLOWED_BATCH_SIZES

FOLDER = Path(__file__).parents[1] / "serving" / "deploy"
IMAGE = "tensorflow/serving:2.20.0"
# What the exporter makes of TF Serving's names, "/" to ":"; histograms have _bucket, _sum and _count.
METRICS = {
    ":tensorflow:serving:request_count",
    ":tensorflow:serving:request_latency_bucket",
    ":tensorflow:serving:request_latency_sum",
    ":tensorflow:serving:runtime_latency_bucket",
    ":tensorflow:serving:batching_session:queuing_latency_bucket",
}

_PLAIN = descriptor_pb2.FieldDescriptorProto
# Messages of TF Serving that tensorflow-serving-api leaves out: name → (number, type, label) of each field, after
# session_bundle_config.proto and monitoring_config.proto.
_MESSAGES = {
    "BatchingParameters": {
        "max_batch_size": (1, "Int64Value"),
        "batch_timeout_micros": (2, "Int64Value"),
        "max_enqueued_batches": (3, "Int64Value"),
        "num_batch_threads": (4, "Int64Value"),
        "thread_pool_name": (5, "StringValue"),
        "allowed_batch_sizes": (6, "repeated int64"),
        "pad_variable_length_inputs": (7, "bool"),
        "enable_large_batch_splitting": (8, "BoolValue"),
    },
    "PrometheusConfig": {"enable": (1, "bool"), "path": (2, "string")},
    "MonitoringConfig": {"prometheus_config": (1, "PrometheusConfig")},
}
_SCALARS = {"bool": _PLAIN.TYPE_BOOL, "string": _PLAIN.TYPE_STRING, "int64": _PLAIN.TYPE_INT64}


@pytest.fixture(scope="module")
def messages():
    """The message classes, declared at run time."""
    file = descriptor_pb2.FileDescriptorProto(name="declared.proto", package="declared", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            *repeated, kind = kind.split()
            added = message.field.add(name=field, number=number)
            added.label = _PLAIN.LABEL_REPEATED if repeated else _PLAIN.LABEL_OPTIONAL
            if kind in _SCALARS:
                added.type = _SCALARS[kind]
            else:
                added.type = _PLAIN.TYPE_MESSAGE
                added.type_name = f".declared.{kind}" if kind in _MESSAGES else f".google.protobuf.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"declared.{name}")) for name in _MESSAGES}


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def documents(name):
    return list(yaml.safe_load_all(read(name)))


def flags(arguments):
    """--name=value as a dict."""
    assert all(re.fullmatch(r"--\w+=\S+", argument) for argument in arguments)
    return dict(argument[2:].split("=", 1) for argument in arguments)


# === TF Serving's own ===


def test_models_config():
    config = text_format.Parse(read("models.config"), model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path, model.model_platform) == ("purified", "/models/purified", "tensorflow")
    assert list(model.model_version_policy.specific.versions) == [1]
    assert dict(model.version_labels) == {"stable": 1}


def test_canary_of_the_models_config():
    """The lines that a comment offers make two labels, each on a version that is loaded."""
    text = read("models.config")
    offered = re.findall(r"^ +#  +(model_version_policy .*|version_labels .*)$", text, re.MULTILINE)
    assert len(offered) == 2
    policy = next(line for line in text.splitlines() if line.strip().startswith("model_version_policy"))
    text = text.replace(policy, offered[0]).replace("    # A canary", f"    {offered[1]}\n    # A canary")
    (model,) = text_format.Parse(text, model_server_config_pb2.ModelServerConfig()).model_config_list.config
    assert dict(model.version_labels) == {"stable": 1, "canary": 2}
    assert set(model.version_labels.values()) <= set(model.model_version_policy.specific.versions)


def test_batching_config(messages):
    config = text_format.Parse(read("batching.config"), messages["BatchingParameters"]())
    sizes = list(config.allowed_batch_sizes)
    assert sizes == list(ALLOWED_BATCH_SIZES)  # those of the warm-up requests
    assert sizes == sorted(set(sizes)) and sizes[-1] == config.max_batch_size.value  # as TF Serving demands
    assert 0 <= config.batch_timeout_micros.value <= 10_000
    assert config.num_batch_threads.value >= 1 and config.max_enqueued_batches.value >= 1
    assert config.enable_large_batch_splitting.value


def test_a_misspelt_setting_is_seen(messages):
    with pytest.raises(text_format.ParseError, match="max_batch_sise"):
        text_format.Parse("max_batch_sise { value: 32 }", messages["BatchingParameters"]())


def test_monitoring_config(messages):
    config = text_format.Parse(read("monitoring.config"), messages["MonitoringConfig"]())
    assert config.prometheus_config.enable
    (scrape,) = yaml.safe_load(read("prometheus.yml"))["scrape_configs"]
    assert scrape["metrics_path"] == config.prometheus_config.path
    (deployment, *_) = documents("deployment.yaml")
    annotations = deployment["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] == config.prometheus_config.path
    assert scrape["static_configs"] == [{"targets": ["serving:8501"]}]


# === Docker ===


def test_docker_compose():
    compose = yaml.safe_load(read("docker-compose.yml"))
    services = compose["services"]
    assert services.keys() == {"serving", "prometheus", "grafana"}
    serving = services["serving"]
    assert serving["image"] == IMAGE
    mounts = dict(reversed(volume.removesuffix(":ro").rsplit(":", 1)) for volume in serving["volumes"])
    for name, file in flags(serving["command"]).items():
        if name.endswith("_file"):
            assert (FOLDER / mounts[file]).is_file(), f"--{name}={file} is not mounted"
    assert mounts["/models/purified"].startswith("${EXPORT_DIR:?")
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (FOLDER / source).exists()
            assert volume.endswith(":ro")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert ":" in service["image"] and not service["image"].endswith(":latest")
    check = serving["healthcheck"]["test"]
    assert check[:3] == ["CMD", "bash", "-c"]
    assert "GET /v1/models/purified HTTP/1.0" in check[3] and "AVAILABLE" in check[3]
    assert services["prometheus"]["depends_on"] == ["serving"]


def test_grafana_asks_for_metrics_that_there_are():
    source = yaml.safe_load(read("grafana/provisioning/datasources/prometheus.yml"))["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load(read("grafana/provisioning/dashboards/dashboards.yml"))["providers"][0]
    mounted = yaml.safe_load(read("docker-compose.yml"))["services"]["grafana"]["volumes"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in mounted)
    dashboard = json.loads(read("grafana/dashboards/purified.json"))
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        for target in panel["targets"]:
            asked |= set(re.findall(r":tensorflow:[\w:]+", target["expr"]))
    assert asked == METRICS
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})


# === Kubernetes ===


def test_kubernetes_deployment():
    deployment, service, scaler = documents("deployment.yaml")
    assert [part["kind"] for part in (deployment, service, scaler)] == [
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
    ]
    assert (deployment["apiVersion"], service["apiVersion"], scaler["apiVersion"]) == (
        "apps/v1",
        "v1",
        "autoscaling/v2",
    )
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "/v1/models/purified" in str(container[probe])
    assert "AVAILABLE" in container["readinessProbe"]["exec"]["command"][-1]
    assert (
        container["resources"]["requests"].keys() == {"cpu", "memory"} and "memory" in container["resources"]["limits"]
    )
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert scaler["spec"]["minReplicas"] <= deployment["spec"]["replicas"] <= scaler["spec"]["maxReplicas"]
    mounted(container, pod["volumes"], flags(container["args"]))
    assert pod["terminationGracePeriodSeconds"] > int(container["lifecycle"]["preStop"]["exec"]["command"][1])


def test_kserve_inference_service():
    (service,) = documents("inference-service.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert model["modelFormat"] == {"name": "tensorflow"}
    assert model["runtimeVersion"] == IMAGE.split(":")[1]
    assert re.match(r"(pvc|gs|s3)://", model["storageUri"])
    assert model["resources"]["requests"] and model["resources"]["limits"]
    assert 0 < predictor["minReplicas"] <= predictor["maxReplicas"]
    mounted(model, predictor["volumes"], flags(model["args"]))


def mounted(container, volumes, given):
    """Every file that a flag names lies in this folder and in the ConfigMap's mount; every mount has its volume."""
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert paths.keys() == {volume["name"] for volume in volumes}
    files = [file for name, file in given.items() if name.endswith("_file")]
    assert files
    for file in files:
        folder, _, name = file.rpartition("/")
        assert folder == paths["config"]
        assert (FOLDER / name).is_file()


def test_the_same_name_everywhere():
    """models.config names the model; the REST path and the mount must follow."""
    for name in ("docker-compose.yml", "deployment.yaml"):
        assert set(re.findall(r"/v1/models/(\w+)", read(name))) == {"purified"}
        assert "/models/purified" in read(name)
