"""The template for Kubernetes fits the schemas of its resources."""
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

TEMPLATE = ROOT / "launch/templates/kubernetes.yaml"


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_the_template_fits_its_schemas(version):
    resources = list(yaml.safe_load_all(TEMPLATE.read_text()))
    assert [r["kind"] for r in resources] == ["Service", "Job"]
    for resource in resources:
        kubernetes_validate.validate(resource, version, strict=True)


def test_what_does_not_fit_is_found():
    job = list(yaml.safe_load_all(TEMPLATE.read_text()))[1]
    job["spec"]["completion"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)
